"""The C++ kernels of the CPU: every case of `cpo-kernels check`, and those of the ops on each instruction set."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch

import cpo_kernels as cpo
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
