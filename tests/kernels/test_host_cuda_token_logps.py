"""The CUDA token kernels on the CPU (tests/host_cuda): parity with the float64 oracle through the cases of `cpo-kernels
check`, on machines that lead to each form of launch, and a program under the sanitizers.
"""

import ctypes

import pytest
import torch

from cpo_kernels import library
from cpo_kernels.check.compare import Backend
from cpo_kernels.check.limits import limit_cases
from cpo_kernels.check.run import run_case
from cpo_kernels.check.tokens import IGNORE, make_rows, token_cases
from tests.support.host_emulation import COMPILER, LIBRARY_FLAGS, HostBackend, broken_copy, compile_host

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
# Left to GPUs, by size: 70,001 rows, there for a grid's second dimension, which no launch has; 1,100 rows of 50,257
# columns and 4 GiB of logits, more than a CPU should touch. MACHINES lead smaller cases to every form of launch.
LEFT_OUT = ("N=70001", "N=1100,V=50257", "beyond-2^31/bfloat16/elements")
CASES = {c.name: c for c in (*token_cases(), *limit_cases()) if not any(part in c.name for part in LEFT_OUT)}


class HostKernels:
    """The token ops of the host emulation, with the signatures of library.py."""

    def __init__(self, library, block, multiprocessors, clusters, seed=0):
        self.library, self.machine = library, Machine(block, multiprocessors, clusters, seed)

    def call(self, logits, labels, ignore_index, scale, softcap, vocab_size):
        sizes = (*logits.shape[:1], logits.stride(0), logits.shape[1], vocab_size, ignore_index)
        kind = DTYPES.index(logits.dtype)
        return ctypes.byref(Call(kind, *sizes, scale, softcap, logits.data_ptr(), labels.data_ptr()))

    def forward(self, logits, labels, head, extras, overwrite):
        labels, rows, acc = labels.contiguous(), logits.shape[0], library.acc_dtype(logits.dtype)
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


OPS = "tests/host_cuda/token_logps_ops.cpp"


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host_cuda") / "token_logps_ops.so"
    return ctypes.CDLL(compile_host(OPS, target, *LIBRARY_FLAGS))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", CASES)
def test_check_cases(name, machine, host_library):
    result = run_case(HostBackend(HostKernels(host_library, *MACHINES[machine], seed=len(name))), CASES[name])
    assert result["status"] == "passed", result["wrong"][:3] or result["reason"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_order_of_threads_gives_the_same_bits(dtype, host_library):
    runs = []
    for seed in range(3):
        rows = make_rows(Backend("cuda", torch.device("cpu")), 4, 9001, dtype, seed=5)
        kernels = HostKernels(host_library, 64, 1, 1, seed)
        results = kernels.token_logps_fused_(rows.logits, rows.labels, IGNORE, 1.0, 0.0, 8999, True)
        runs.append((*results, rows.logits))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_missing_barrier_changes_what_fibers_compute(tmp_path):
    root = broken_copy(tmp_path, "row_sums.h", "  sync_block();\n", "")
    broken = ctypes.CDLL(compile_host(OPS, tmp_path / "ops.so", *LIBRARY_FLAGS, root=root))
    rows = make_rows(Backend("cuda", torch.device("cpu")), 3, 700, torch.float32)
    logps = [
        HostKernels(broken, 64, 1, 1, seed).token_logps_fwd(rows.logits, rows.labels, IGNORE, 1.0, 0.0, 700, False)[0]
        for seed in range(4)
    ]
    assert torch.stack(logps).isnan().any()  # shared memory that was not written yet


@pytest.mark.parametrize(
    "rows, columns, element_size, held, clusters, pieces, cluster",
    [
        (4096, 128256, 2, 8, 1, 1, 4),  # Llama 3: 251 KB a row, 64 KB a block
        (4096, 151936, 2, 8, 1, 1, 8),
        (4096, 151936, 2, 5, 1, 1, 8),  # with extras: still one chunk a thread
        (4096, 151936, 2, 8, 0, 1, 1),
        (4096, 128256, 4, 8, 1, 1, 8),
        (4096, 32000, 2, 8, 1, 1, 1),
        (4096, 262144, 4, 8, 1, 1, 8),  # two chunks a thread
        (8, 262144, 2, 8, 1, 32, 0),  # 256 blocks on 132 multiprocessors
        (8, 262144, 2, 8, 0, 32, 0),
        (20, 262144, 2, 8, 1, 14, 8),
        (1, 1, 2, 8, 1, 1, 1),
        (132, 128256, 2, 8, 0, 2, 1),
    ],
)
def test_plan(rows, columns, element_size, held, clusters, pieces, cluster, host_library):
    got = (ctypes.c_int64(), ctypes.c_int64())
    machine, vectors = Machine(512, 132, clusters, 0), ctypes.c_int64(columns * element_size // 16)
    host_library.host_plan(ctypes.byref(machine), ctypes.c_int64(rows), vectors, held, *map(ctypes.byref, got))
    assert (got[0].value, got[1].value) == (pieces, cluster)
