"""The Triton kernels in its interpreter, on CPU tensors. What is too slow there runs on GPUs (test_cuda.py)."""

import pytest

from cpo_kernels.backends import dispatch
from cpo_kernels.check.compare import Backend
from tests.support.parity import HEAD, NEEDS_GPU, NEEDS_MEMORY, OWN_MATMULS, cases_but, parametrize, passes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(dispatch.missing("triton")), reason="Triton is not installed")]

TOO_SLOW = (
    "sizes/*/N=700*", "sizes/*/N=3,V=50257", "sizes/*,V=128256", "sizes/*,V=262144", "options/*,V=20001",
    "anchors/*,N=700,V=33", "anchors/*,V=50257",
    "sequence_sum/*,S=5000", "loss-types/*,P=2500", "pairs/*/tiles", "same-bits/f*",
    "extreme/bfloat16/*-the-lowest", "extreme/float16/*-the-lowest", "extreme/float64/*-the-lowest",
)  # fmt: skip
# The public functions check arguments; the interpreter does not round to bfloat16.
NOT_HERE = ("errors/*", "against-naive/bfloat16/*", "live products/bfloat16/*")


@pytest.fixture
def backend(device):
    return Backend("triton", device)


@parametrize(cases_but(*NEEDS_GPU, *NEEDS_MEMORY, *TOO_SLOW, *NOT_HERE, *HEAD, *OWN_MATMULS))
def test_case(case, backend):
    passes(backend, case)
