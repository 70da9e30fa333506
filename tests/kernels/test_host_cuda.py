"""The host emulation of the CUDA kernels itself: orders of threads, barriers, launches, and a compiler that makes fmas.
Parity with the oracle is in tests/parity/test_cuda_host.py.
"""

import ctypes
import math
from functools import partial
from typing import Any

import pytest
import torch

from cpo_kernels import library, reference
from cpo_kernels.check.compare import Backend
from cpo_kernels.check.preference import TYPES, make_batch, typed, without
from cpo_kernels.check.tokens import DTYPES, IGNORE, make_rows
from tests.support.host_emulation import (
    COMPILER,
    LIBRARY_FLAGS,
    PREFERENCES,
    TOKENS,
    HostPreference,
    HostTokens,
    Machine,
    broken_copy,
    compile_host,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    target = tmp_path_factory.mktemp("host_cuda") / "tokens.so"
    return ctypes.CDLL(compile_host(TOKENS, target, *LIBRARY_FLAGS))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    target = tmp_path_factory.mktemp("host_cuda") / "preferences.so"
    return ctypes.CDLL(compile_host(PREFERENCES, target, *LIBRARY_FLAGS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_order_of_threads_gives_the_same_bits(dtype, tokens):
    runs = []
    for seed in range(3):
        rows = make_rows(Backend("cuda", torch.device("cpu")), 4, 9001, dtype, seed=5)
        kernels = HostTokens(tokens, 64, 1, 1, seed)
        results = kernels.token_logps_fused_(rows.logits, rows.labels, IGNORE, 1.0, 0.0, 8999, True)
        runs.append((*results, rows.logits))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_missing_barrier_changes_what_fibers_compute(tmp_path):
    root = broken_copy(tmp_path, "row_sums.h", "  sync_block();\n", "")
    broken = ctypes.CDLL(compile_host(TOKENS, tmp_path / "ops.so", *LIBRARY_FLAGS, root=root))
    rows = make_rows(Backend("cuda", torch.device("cpu")), 3, 700, torch.float32)
    logps = [
        HostTokens(broken, 64, 1, 1, seed).token_logps_fwd(rows.logits, rows.labels, IGNORE, 1.0, 0.0, 700, False)[0]
        for seed in range(4)
    ]
    assert torch.stack(logps).isnan().any()  # shared memory that was not written yet


def anchored_rows(dtype):
    """Labels that their rows hold as -inf, as their top though they are not, or not at all; rows of nothing else, of
    one column, with a NaN or ignored, whose anchors and gradients are NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(9, 700, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.arange(9) * 70
    acc = library.acc_dtype(dtype)
    anchors = torch.stack([torch.linspace(-3, 30, 9, dtype=acc), torch.linspace(0, 33, 9, dtype=acc)])
    logits[0, 0] = -math.inf
    logits[1, 70], anchors[1, 1] = 8.0, anchors[0, 1] + 6.5
    logits[2, 140], anchors[1, 2] = 1.0, anchors[0, 2] + 12.0
    logits[3], anchors[1, 3] = -math.inf, anchors[0, 3] + 2.0
    logits[4, 280], anchors[1, 4] = 300.0, anchors[0, 4] + 300.3
    logits[5, 17] = math.nan
    labels[6] = IGNORE
    anchors[:, 6] = math.nan
    labels[7] = 699
    anchors[1, 8] = -math.inf
    return logits, labels, anchors


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("machine", [(64, 1, 1), (64, 132, 0)], ids=["one kernel", "pieces"])
def test_labels_that_their_rows_do_not_hold(dtype, softcap, machine, tokens):
    logits, labels, anchors = anchored_rows(dtype)
    kernels, options = HostTokens(tokens, *machine), (IGNORE, 0.9, softcap, 700)
    exact: Any = (logits.double(), labels, *options)
    want = reference.token_logps_fwd(*exact, True, anchors.double())
    got = kernels.token_logps_fwd(logits, labels, *options, True, anchors)
    want[2][0, 5] = math.nan  # not the 0 of terms left out
    if not softcap:  # of a row that holds -inf the mean stays -inf
        want[2][2, [0, 3]] = -math.inf
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=5e-6, check_dtype=False, equal_nan=True)
    close(got[:2], want[:2])
    close(got[2], want[2])
    assert got[0][4] == 0 or softcap, "the log of what is all there is"
    grad, entropies = (
        torch.linspace(-1, 1, 9, dtype=got[0].dtype),
        torch.stack([torch.full_like(got[0], 0.3), got[2][0]]),
    )
    entropies[:, 6] = math.nan
    for given in ({}, {"entropies": entropies}):
        ours, theirs = logits.clone(), logits.double()
        kernels.token_logps_bwd_(ours, labels, got[1], grad, *options, anchors, **given)
        exact_given = {name: torch.stack([t[0].double(), want[2][0]]) for name, t in given.items()}
        reference.token_logps_bwd_(theirs, labels, want[1], grad.double(), *options, anchors.double(), **exact_given)
        close(ours, theirs, rtol=torch.finfo(dtype).eps + 5e-5)
    ours, theirs = logits.clone(), logits.double()
    kernels.token_logps_fused_(ours, labels, *options, False, anchors)
    reference.token_logps_fused_(theirs, labels, *options, False, anchors.double())
    close(ours, theirs, rtol=torch.finfo(dtype).eps + 5e-5)


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
def test_plan(rows, columns, element_size, held, clusters, pieces, cluster, tokens):
    got = (ctypes.c_int64(), ctypes.c_int64())
    machine, vectors = Machine(512, 132, clusters, 0), ctypes.c_int64(columns * element_size // 16)
    tokens.host_plan(ctypes.byref(machine), ctypes.c_int64(rows), vectors, held, *map(ctypes.byref, got))
    assert (got[0].value, got[1].value) == (pieces, cluster)


@pytest.mark.parametrize("threads", [64, 256])
def test_any_order_of_threads_gives_the_same_bits(preferences, threads):
    """Several tiles of pairs and blocks of sequences, the losses that couple the batch among them."""
    losses = ["aot", "sigmoid", "aot_unpaired", "sft", "aot"]
    batch = without(make_batch(3, count=400, sequences=150, objectives=6), "pair_betas")
    batch |= dict(loss_types=[TYPES.index(n) for n in losses], loss_weights=[1.0, 0.5, 2.0, 0.1, 0.3])
    runs = [HostPreference(preferences, threads, seed).preference(*batch.values()) for seed in range(4)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs an x86 fma")
def test_objectives_that_cancel_leave_a_tie_without_a_margin(tmp_path):
    """Gains of w x and -w x add up to exactly 0 under a compiler that makes fmas of products and sums, as nvcc does."""
    flags = (*LIBRARY_FLAGS, "-mfma", "-ffp-contract=fast")
    library = ctypes.CDLL(compile_host(PREFERENCES, tmp_path / "fma.so", *flags))
    batch = typed(make_batch(5, objectives=2, sequences=40, count=20), "sigmoid", tie_margin=0.0)
    scores = torch.rand(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch["scores"] = torch.cat([scores, scores.flip(1)])
    batch["pairs"] = torch.stack([torch.arange(20), torch.arange(20, 40)], 1)
    batch["conditions"] = torch.full((20, 2), 0.3, dtype=torch.float64)
    batch["objectives"] = torch.tensor([[0.9, 0.9], [1.3, 1.3]], dtype=torch.float64)
    assert HostPreference(library, 64).preference(*batch.values())[7].tolist() == [0, 20, 0]
