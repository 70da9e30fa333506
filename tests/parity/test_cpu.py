"""The C++ kernels of the CPU: every case of `cpo-kernels check`, and those of the ops on each instruction set."""

import ctypes
import math
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cpo_kernels as cpo
from cpo_kernels import reference
from cpo_kernels.backends import dispatch
from cpo_kernels.check.compare import Backend, threads
from cpo_kernels.check.run import all_cases
from tests.support.parity import (
    HEAD,
    LIVE_PRODUCTS,
    NEEDS_GPU,
    NEEDS_MEMORY,
    OWN_MATMULS,
    PREFERENCE,
    cases_but,
    matches,
    parametrize,
    passes,
)
from tests.support.processes import run_processes

pytestmark = pytest.mark.skipif(bool(dispatch.missing("cpu")), reason="the C++ extension is not built")


@pytest.fixture
def backend(device):
    return Backend("cpu", device)


NOT_HERE = (*NEEDS_GPU, *NEEDS_MEMORY, *LIVE_PRODUCTS, *OWN_MATMULS)


@parametrize(cases_but(*NOT_HERE))
def test_case(case, backend):
    passes(backend, case)


@parametrize([case for case in all_cases() if matches(case, OWN_MATMULS)])
def test_own_matmuls(case, backend):
    if dispatch.own_matmuls(backend.kernels, torch.empty(0, dtype=torch.bfloat16)) is None:
        pytest.skip("this processor has no AVX512_BF16")
    if matches(case, ("own matmuls/unstored*",)) and not dispatch.cpu_has_tiles():
        pytest.skip("this processor has no AMX")
    passes(backend, case)


TOKEN_OPS = [case.name for case in cases_but(*NOT_HERE, *HEAD, *PREFERENCE, "sizes/*/N=8,V=262144")]


def check_with(isa, *names):
    command = [sys.executable, "-m", "cpo_kernels.check.run", "--device", "cpu", "--impl", "cpu", "--in-process"]
    environment = {**os.environ, "CPO_KERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "--only", *names], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_every_instruction_set(isa):
    """amx differs from avx512 in its matmuls only."""
    done = check_with(isa, *(() if isa == "amx" else TOKEN_OPS), *OWN_MATMULS)
    if "this processor has no" in done.stdout or (isa != "portable" and "this build" in done.stdout):
        pytest.skip(f"this build or processor has no {isa}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


SMALL = """
import torch
from cpo_kernels.backends import dispatch

cpu, exact = (dispatch.kernels(impl, torch.empty(0)) for impl in ("cpu", "reference"))
g = torch.Generator().manual_seed(0)
z, y = (6e-5 * torch.rand(4, 301, generator=g)).half(), torch.arange(4)
head = y, -100, 1e5, 0.0, 301, True
for got, want in zip(cpu.token_logps_fwd(z, *head), exact.token_logps_fwd(z.double(), *head)):
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
q, tails = (4e-5 * torch.rand(2, 100, generator=g)).half(), 100 * torch.randn(2, 64, generator=g)
none = torch.zeros(0, dtype=torch.int64)
rest = q.new_empty(0, 64), none, torch.zeros(3, dtype=torch.int64)
got, want = cpu.live_sum(q, tails, *rest), q.double().t() @ tails.double()
torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)
z = torch.full((1, 70000), -1.0)
z[0, 5] = 1e-40
for op in (cpu.token_logps_fwd, cpu.token_logps_fused_):
    assert op(z.clone(), torch.tensor([5]), -100, 1.0, 0.0, 70000, True)[2][3] == 1
print("right")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_subnormal_float16_numbers_keep_their_value(isa):
    environment = {**os.environ, "CPO_KERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", SMALL], env=environment, capture_output=True, text=True)
    if isa != "portable" and ("this build" in done.stderr or "this processor has no" in done.stderr):
        pytest.skip(f"this build or processor has no {isa}")
    assert done.stdout == "right\n", done.stderr[-2000:]


def test_an_unknown_instruction_set_is_refused():
    done = check_with("sse9", "sizes/float32/N=1,V=1")
    assert done.returncode == 1 and "CPO_KERNELS_CPU_ISA" in done.stdout and "'sse9'" in done.stdout


def test_subnormal_numbers_cost_no_time():
    """exp of what lies 87 nats below the maximum: rows of deviation 24 took 27 times as long as of deviation 3."""
    logits = {scale: (scale * torch.randn(512, 2048)).bfloat16() for scale in (3, 24)}
    labels, best = torch.zeros(512, dtype=torch.int64), dict.fromkeys(logits, math.inf)
    for _ in range(7):
        for scale, z in logits.items():
            start = time.perf_counter()
            cpo.token_logps(z, labels)
            best[scale] = min(best[scale], time.perf_counter() - start)
    assert best[24] < 6 * best[3]


def test_other_operations_keep_subnormal_numbers():
    with torch.inference_mode(), threads(1):
        cpo.token_logps(24 * torch.randn(8, 512), torch.zeros(8, dtype=torch.int64))
        assert float(torch.tensor([1e-39]) * 0.5) > 0


def huge_pages_wanted(tensor):
    """Whether the system was asked for pages of 2 MB in the middle of a tensor."""
    middle, inside = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("memory without a mapping")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages on this system")
def test_large_results_ask_for_huge_pages():
    large, small = torch.empty(48 << 20, dtype=torch.uint8), torch.empty(24 << 20, dtype=torch.uint8)
    assert not huge_pages_wanted(large)
    assert huge_pages_wanted(dispatch.prefer_huge_pages(large))
    assert not huge_pages_wanted(dispatch.prefer_huge_pages(small))
    assert dispatch.prefer_huge_pages(small[:0]).numel() == 0


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages on this system")
def test_a_new_block_is_one_that_glibc_maps():
    """Of which only whole pages of 2 MB within its rows are asked for: the rest is never written."""
    run_processes(_takes_blocks, 1)


def _takes_blocks(rank):  # in a new process, whose heap has no room for 32 MiB
    like = torch.empty(0, dtype=torch.bfloat16)
    small, medium, large = (dispatch.new_block(like, rows, 49152) for rows in (64, 256, 512))
    assert [len(b) for b in (small, medium, large)] == [64, 256, 512] and medium.is_contiguous()
    assert [b.untyped_storage().nbytes() >> 20 for b in (small, medium, large)] == [6, 32, 48]
    assert [huge_pages_wanted(b) for b in (small, medium, large)] == [False, True, True]
    assert not huge_pages_wanted(torch.as_strided(medium, (256 << 10,), (1,), medium.numel() + (256 << 10)))
    torch.use_deterministic_algorithms(True)  # torch fills new memory
    assert dispatch.new_block(like, 256, 49152).untyped_storage().nbytes() >> 20 == 24


def between_pages_that_nobody_may_read(values, at_start):
    """The same values, at the start or the end of memory between two such pages."""
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE if at_start else (pages + 1) * mmap.PAGESIZE - size
    found = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    return found.copy_(values)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 64, 97])
def test_gathered_gradients_read_only_their_rows(columns, at_start):
    """A wrong read ends the process. All columns are live; numbers against the reference."""
    logits = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    labels, lse = torch.tensor([0, -100, columns - 1]), torch.logsumexp(logits.float(), 1)
    live, options = (torch.arange(columns), torch.tensor([0, columns])), (-100, 1.0, 0.0, columns)
    rest = labels, lse, torch.tensor([1.0, 0.0, 1.0]), *live, 3, *options
    seen = torch.ops.cpo_kernels.live_grads(between_pages_that_nobody_may_read(logits, at_start), *rest)
    torch.testing.assert_close(seen, reference.live_grads(logits, *rest), rtol=0.01, atol=1e-3)
