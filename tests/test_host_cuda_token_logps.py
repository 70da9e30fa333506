"""The CUDA token kernels on the CPU (tests/host_cuda): parity with the float64 oracle through the cases of `cpo-kernels
check`, on machines that lead to each form of launch, and a program under the sanitizers.
"""

import ctypes
import itertools

import pytest
import torch
from host_twin import COMPILER, LIBRARY_FLAGS, HostHome, bites, compile_host, run_sanitized

from cpo_kernels import ops
from cpo_kernels.check.limits import limit_cases
from cpo_kernels.check.run import run_case
from cpo_kernels.check.tokens import IGNORE, make_rows, token_cases

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of token_logps_ops.cpp


class Machine(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("block", "multiprocessors", "clusters", "seed")]


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "rows", "stride", "width", "columns", "ignore_index")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("logits", "labels")),
    ]


# Blocks of 64 threads hold 4096 16-bit columns, or 1024 of float64.
MACHINES = {
    "wide rows: clusters that loop": (64, 1, 1),
    "few rows: pieces": (64, 132, 0),
    "no clusters: the row is read again": (64, 1, 0),
    "H100": (512, 132, 1),
}
CASES = {case.name: case for case in (*token_cases(), *limit_cases())}
LARGE = ("N=8,V=262144", "N=3,V=128256", "N=70001,V=3")  # once each dtype is enough


class HostKernels:
    """The token ops of the twin, with the signatures of ops.py."""

    def __init__(self, library, block, multiprocessors, clusters, seed=0):
        self.library, self.machine = library, Machine(block, multiprocessors, clusters, seed)

    def call(self, logits, labels, ignore_index, scale, softcap, vocab_size):
        sizes = (*logits.shape[:1], logits.stride(0), logits.shape[1], vocab_size, ignore_index)
        kind = DTYPES.index(logits.dtype)
        return ctypes.byref(Call(kind, *sizes, scale, softcap, logits.data_ptr(), labels.data_ptr()))

    def forward(self, logits, labels, head, extras, overwrite):
        labels, rows, acc = labels.contiguous(), logits.shape[0], ops.acc_dtype(logits.dtype)
        outputs = [torch.empty(shape, dtype=acc) for shape in (rows, rows, (4, rows) if extras else 0)]
        if rows:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in outputs]
            self.library.host_forward(
                ctypes.byref(self.machine), self.call(logits, labels, *head), overwrite, extras, *pointers
            )
        return tuple(outputs)

    def token_logps_fwd(self, logits, labels, ignore_index, scale, softcap, vocab_size, extras):
        return self.forward(logits, labels, (ignore_index, scale, softcap, vocab_size), extras, False)

    def token_logps_fused_(self, logits, labels, ignore_index, scale, softcap, vocab_size, extras):
        return self.forward(logits, labels, (ignore_index, scale, softcap, vocab_size), extras, True)

    def token_logps_bwd_(self, logits, labels, lse, grad, *head):
        labels, lse, grad = labels.contiguous(), lse.contiguous(), grad.contiguous()
        if len(labels):
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (lse, grad)]
            self.library.host_backward(ctypes.byref(self.machine), self.call(logits, labels, *head), *pointers)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host_cuda") / "token_logps_ops.so"
    return ctypes.CDLL(compile_host("tests/host_cuda/token_logps_ops.cpp", target, *LIBRARY_FLAGS))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", CASES)
def test_check_cases(name, machine, library):
    result = run_case(HostHome(HostKernels(library, *MACHINES[machine], seed=len(name))), CASES[name])
    if result["status"] == "skipped":
        pytest.skip(result["reason"])
    assert result["status"] == "passed", result["wrong"][:3] or result["reason"]
