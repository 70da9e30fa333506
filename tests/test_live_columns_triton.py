"""Triton's live_columns and live_grads in its interpreter (on CPU tensors), against the reference in float64."""

import pytest
import torch
from live_cases import CASES, Case, check, run

from cpo_kernels import kernels
from cpo_kernels.backends import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def poisoned_memory_and_one_thread():
    """Memory of new tensors is NaN or the largest integer, so that an output element left unwritten shows."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name, dtype):
    check(kernels, CASES[name], dtype, truncates=dtype == torch.bfloat16 and dispatch.triton_interpreted())


def test_no_rows():
    live, tail, row_sums, g = run(kernels, Case(0, 300, 4), torch.float32)
    assert live.shape == tail.shape == (0, 300) and row_sums.shape == g.shape == (0,)


def test_the_same_bits_every_time():
    first, again = (run(kernels, CASES["last set short, odd sizes"], torch.float32) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_dispatch_offers_them():
    assert dispatch.kernels("triton", torch.empty(0)).live_grads is kernels.live_grads
