"""The CUDA kernels on the CPU (tests/host_cuda), on machines that lead to each form of launch."""

import ctypes

import pytest

from tests.support.host_emulation import (
    COMPILER,
    LIBRARY_FLAGS,
    PREFERENCES,
    TOKENS,
    HostBackend,
    HostKernels,
    compile_host,
)
from tests.support.parity import HEAD, NEEDS_GPU, NEEDS_MEMORY, OWN_MATMULS, PREFERENCE, cases_but, matches, passes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")]

# Blocks of 64 threads hold 4096 16-bit columns, or 1024 of float64.
MACHINES = {
    "wide rows: clusters that loop": (64, 1, 1),
    "few rows: pieces": (64, 132, 0),
    "no clusters: the row is read again": (64, 1, 0),
    "H100": (512, 132, 1),
}
OF_PREFERENCE = ("few rows: pieces", "H100")  # which know two sizes of a block
# 70,001 rows are there for a grid's second dimension, which no launch has; 700 anchored ones take the launches that 700
# take without anchors, and minutes. Argument checks are in .cu files, which tests/kernels/test_cuda_extension.py calls.
# Live columns: tests/kernels/test_live_columns_host_cuda.py.
LEFT_OUT = ("sizes/*/N=70001,V=3", "anchors/*,N=700,V=33", "errors/*", "live/*", "live products/*")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host_cuda")
    sources = {"tokens.so": TOKENS, "preferences.so": PREFERENCES}
    return [ctypes.CDLL(compile_host(source, folder / name, *LIBRARY_FLAGS)) for name, source in sources.items()]


RUNS = [
    pytest.param(case, machine, id=f"{case.name}-{name}")
    for case in cases_but(*NEEDS_GPU, *NEEDS_MEMORY, *LEFT_OUT, *HEAD, *OWN_MATMULS)
    for name, machine in MACHINES.items()
    if name in OF_PREFERENCE or not matches(case, PREFERENCE)
]


@pytest.mark.parametrize("case, machine", RUNS)
def test_case(case, machine, libraries):
    passes(HostBackend(HostKernels(*libraries, *machine, seed=len(case.name))), case)
