"""The kernels of every backend against the oracle in float64: every op, dtype, option and awkward size.

Triton's run in its interpreter where there is no GPU. As a program it runs the token op comparisons on the CPU
backend alone; the tests start it once for each instruction set.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cpo_kernels import reference
from cpo_kernels.backends import dispatch
from cpo_kernels.check.compare import Backend, short
from cpo_kernels.check.run import run_case
from cpo_kernels.check.tokens import token_cases
from cpo_kernels.reference.terms import OPTION_DEFAULTS

pytestmark = pytest.mark.skipif(bool(dispatch.missing("cpu")), reason="the C++ extension is not built")

IGNORE = -100
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative error of log-probs (over 1 + |logp|), and of gradients (over |gradient| + the smallest of interest).
LOGP_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRAD_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SIZES = (
    1,  # a vocabulary of one: log-prob exactly 0
    2,
    31,  # less than one vector of 16-bit elements
    64,  # exactly one AVX-512 step
    65,
    257,  # odd
    4096,  # exactly one block of the scan
    4096 + 127,
    9001,  # three blocks, odd
)


@pytest.fixture(autouse=True)
def poisoned_memory_and_one_thread():
    """Memory of new tensors is NaN or the largest integer, so that an output element left unwritten shows."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: what needs threads asks for them
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = previous


_backend = "cpu"


def kernels():
    return dispatch.kernels(_backend, torch.empty(0))


@pytest.fixture(params=["cpu", "triton"])
def backend(request):
    """The backend whose kernels a test calls."""
    global _backend
    _backend = request.param
    yield _backend
    _backend = "cpu"


every_backend = pytest.mark.usefixtures("backend")


def truncates(dtype):
    """Triton's interpreter rounds float32 to bfloat16 toward zero; GPUs round to nearest."""
    return _backend == "triton" and dispatch.triton_interpreted() and dtype == torch.bfloat16


def assert_same_logps(actual, expected):
    """The same bits, where tiles are the same: the CPU sweeps a row alike in every op, Triton in tiles of the op's."""
    if _backend == "cpu":
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    else:
        assert_close(actual, expected.double(), LOGP_TOLERANCE[actual.dtype], 1.0, "logp or lse of fused_")


def make_rows(rows, vocab, dtype, *, seed=0, spread=4.0, stride=None, label_limit=None):
    """Logits [rows, vocab] with a row stride and labels [rows], every third one ignored."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((rows, stride or vocab), math.nan, dtype=dtype)
    logits = storage[:, :vocab]
    logits.copy_(torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread)
    labels = torch.randint(0, label_limit or vocab, (rows,), generator=generator)
    labels[2::3] = IGNORE
    return logits, labels


def assert_close(actual, expected, tolerance, floor, what):
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN at other places"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), f"{what}: infinities differ"
    error = ((actual - expected).abs() / (expected.abs() + floor))[~infinite & ~expected.isnan()]
    assert error.numel() == 0 or error.max() <= tolerance, f"{what}: error {error.max():.2e} > {tolerance:.0e}"


def check_token_ops(logits, labels, scale=1.0, softcap=0.0, vocab_size=None, loose=1.0):
    """All three token ops against the float64 oracle. `loose` widens what a rounded lse costs bwd_."""
    vocab_size = vocab_size or logits.shape[1]
    options = (labels, IGNORE, scale, softcap, vocab_size)
    tolerance, grad_tolerance = LOGP_TOLERANCE[logits.dtype], GRAD_TOLERANCE[logits.dtype]
    grad_tolerance *= 2 if truncates(logits.dtype) else 1
    smallest = {torch.float16: 2.0**-14, torch.bfloat16: 1e-30}.get(logits.dtype, 1e-30)
    before, exact = logits.clone(), logits.double()
    want_logp, want_lse, want_extra = reference.token_logps_fwd(exact, *options, True)

    logp, lse, extra = kernels().token_logps_fwd(logits, *options, True)
    assert torch.equal(logits.view(torch.uint8), before.view(torch.uint8)), "fwd must not write"
    assert_close(logp, want_logp, tolerance, 1.0, "logp")
    assert_close(lse, want_lse, tolerance, 1.0, "lse")
    assert_close(extra[:3], want_extra[:3], 4 * tolerance, 1.0, "extras")
    assert torch.equal(extra[3].double(), want_extra[3]), "is_top1"
    plain = kernels().token_logps_fwd(logits, *options, False)
    assert torch.equal(plain[0].nan_to_num(), logp.nan_to_num()) and plain[2].numel() == 0

    want = exact.clone()
    reference.token_logps_fused_(want, *options, False)
    fused = logits.clone()
    fused_logp, fused_lse, _ = kernels().token_logps_fused_(fused, *options, False)
    assert_same_logps(fused_logp, logp)
    assert_same_logps(fused_lse, lse)
    check_gradient(fused, want, labels, vocab_size, grad_tolerance, smallest, "fused_")

    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1), dtype=lse.dtype)
    want = exact.clone()
    reference.token_logps_bwd_(want, labels, want_lse, upstream.double(), IGNORE, scale, softcap, vocab_size)
    grad = logits.clone()
    kernels().token_logps_bwd_(grad, labels, lse, upstream, IGNORE, scale, softcap, vocab_size)
    check_gradient(grad, want, labels, vocab_size, grad_tolerance * loose, smallest, "bwd_")


def check_gradient(actual, expected, labels, vocab_size, tolerance, smallest, what):
    """Relative error per element; at the label, where 1 - softmax may cancel, relative to 1e-1 at least."""
    assert not actual[:, vocab_size:].any(), f"{what}: padded columns must be 0"
    assert not actual[labels == IGNORE].any(), f"{what}: ignored rows must be 0"
    kept = labels != IGNORE
    at_label = torch.zeros_like(actual, dtype=torch.bool)
    at_label[kept.nonzero().squeeze(1), labels[kept]] = True
    assert_close(actual[at_label], expected[at_label], tolerance, 0.1, f"{what} at the label")
    # Softmax values that the dtype cannot hold (below 1e-30, or subnormal in float16) round to something near 0.
    assert_close(actual[~at_label], expected[~at_label], tolerance, smallest, what)


# ------------------------------------------------------------------------------------------------ token log-probs


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_sizes(vocab, dtype):
    check_token_ops(*make_rows(5, vocab, dtype, seed=vocab))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale, softcap", [(1.0, 5.0), (0.0625, 0.0), (1.7, 30.0), (0.3, 0.5)])
def test_scale_and_softcap(scale, softcap, dtype):
    logits, labels = make_rows(4, 1111, dtype, seed=2)
    # At softcap 0.5 tanh saturates, and 1 - (z/c)^2 of the oracle itself cancels: compare where it does not.
    check_token_ops(logits if softcap != 0.5 else logits * 0.1, labels, scale, softcap, loose=2.0)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_rows_strides_and_padded_vocabulary(rows, dtype):
    logits, labels = make_rows(rows, 700, dtype, seed=rows, stride=777, label_limit=613)
    logits[:, 613:] = math.inf  # must never be looked at
    check_token_ops(logits, labels, vocab_size=613)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_split_over_the_vocabulary(dtype):
    torch.set_num_threads(3)
    vocab = 2 * 16384 + 77  # two pieces and a bit
    logits, labels = make_rows(2, vocab, dtype, seed=3, label_limit=2 * 16384)
    logits[0, 10_000:30_000] = -math.inf
    logits[1, :20_000] = -math.inf  # a first piece of nothing
    logits[1, labels[1]] = 1.5
    check_token_ops(logits, labels, vocab_size=vocab - 3)
    check_token_ops(logits.nan_to_num(neginf=-60), labels, softcap=20.0, loose=2.0)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype):
    low, high = (-1e4, 1e4)
    logits, labels = make_rows(7, 5000, dtype, seed=4)
    labels[:] = torch.tensor([0, 4999, 17, 4990, 30, 4100, 77])
    logits[0] = low  # all strongly negative
    logits[1] = low
    logits[1, 4999] = high  # the last column, and the label, has everything
    logits[2] = low
    logits[2, 3000] = high  # another column has everything
    logits[3, :4500] = -math.inf  # a masked vocabulary that starts with whole blocks of nothing
    logits[4, ::2] = -math.inf
    logits[5] *= 30  # sums need raising from block to block
    logits[6] = torch.linspace(-90, 90, 5000, dtype=dtype)
    logits[4, 30] = 0.5
    # lse itself rounds to 5e-4 at 1e4, and softmax rebuilt from it in bwd_ carries that.
    loose = 1.0 if dtype == torch.float64 else 100.0
    check_token_ops(logits, labels, loose=loose)
    logp, lse, extra = kernels().token_logps_fwd(logits, labels, IGNORE, 1.0, 0.0, 5000, True)
    assert logp[1] == 0 and lse[1] == float(logits[1, 4999])


@pytest.mark.parametrize(
    "name, dtype, threads", [*(("cpu", d, t) for d in DTYPES for t in (1, 2)), ("triton", torch.float32, 1)]
)
def test_blocks_masked_with_the_lowest_number(name, dtype, threads):
    torch.set_num_threads(threads)
    case = next(c for c in token_cases() if c.name == f"extreme/{short(dtype)}/masked-with-the-lowest")
    result = run_case(Backend(name, torch.device("cpu")), case)
    assert result["status"] == "passed", result["wrong"][:3]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinite_rows(dtype):
    logits, labels = make_rows(5, 300, dtype, seed=5)
    labels[:] = torch.tensor([3, 4, 5, 6, IGNORE])
    logits[0, 299] = math.nan  # in the tail
    logits[1, 0] = math.nan
    logits[1, 1:] = -math.inf
    logits[2] = -math.inf
    logits[3, 7] = math.inf
    logits[4] = math.nan  # ignored: must not leak
    logp, _, extra = kernels().token_logps_fwd(logits, labels, IGNORE, 1.0, 0.0, 300, True)
    assert logp[:4].isnan().all() and logp[4] == 0
    assert extra[:2, :4].isnan().all() and not extra[:, 4].any()
    assert extra[3].tolist() == [0, 0, 1, 0, 0]  # all -inf: every column ties for the top
    kernels().token_logps_fused_(logits, labels, IGNORE, 1.0, 0.0, 300, False)
    assert logits[:4].isnan().any(1).all() and not logits[4].any()
    assert logits[[0, 2]].isnan().all()


@every_backend
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_error_is_no_larger_than_naive(dtype):
    if truncates(dtype):
        pytest.skip("Triton's interpreter does not round to bfloat16")
    logits, labels = make_rows(8, 3001, dtype, seed=6, spread=3.0)
    labels[labels == IGNORE] = 1
    exact = logits.double()
    want = F.one_hot(labels, 3001) - exact.softmax(-1)
    naive_logits = logits.clone().requires_grad_()
    naive = naive_logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    naive.sum().backward()
    fused = logits.clone()
    logp, _, _ = kernels().token_logps_fused_(fused, labels, IGNORE, 1.0, 0.0, 3001, False)
    want_logp = exact.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    assert (logp - want_logp).abs().max() <= (naive - want_logp).abs().max()
    assert (fused - want).norm() <= (naive_logits.grad - want).norm() * (1 + 1e-3)


@every_backend
def test_same_bits_every_time_and_with_every_row_order():
    torch.set_num_threads(3)
    vocab = 20_001 if _backend == "cpu" else 20_000  # Triton's lanes start at a row's first 16-byte boundary
    logits, labels = make_rows(33, vocab, torch.bfloat16, seed=7)
    runs = []
    for _ in range(3):
        copy = logits.clone()
        runs.append((*kernels().token_logps_fused_(copy, labels, IGNORE, 1.0, 0.0, vocab, True), copy))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    forward = kernels().token_logps_fwd(logits, labels, IGNORE, 1.0, 0.0, vocab, False)
    flipped = kernels().token_logps_fwd(logits.flip(0), labels.flip(0), IGNORE, 1.0, 0.0, vocab, False)
    assert torch.equal(flipped[0].flip(0), forward[0])
    assert_same_logps(runs[0][0], forward[0])


@every_backend
def test_expanded_labels_and_gradients_are_taken():
    logits, _ = make_rows(4, 50, torch.float32, seed=8)
    labels, ones = torch.tensor([7]).expand(4), torch.ones(1).expand(4)
    logp, lse, _ = kernels().token_logps_fwd(logits, labels, IGNORE, 1.0, 0.0, 50, False)
    torch.testing.assert_close(logp, logits.log_softmax(-1)[:, 7])
    kernels().token_logps_bwd_(logits, labels, lse, ones, IGNORE, 1.0, 0.0, 50)
    assert logits.sum(-1).abs().max() < 1e-5  # softmax sums to 1


@every_backend
def test_rows_beyond_2_31_elements_are_addressed():
    """A row stride of 2^30 + 8 elements over memory that is never touched between the rows."""
    stride, rows = 2**30 + 8, 3
    torch.use_deterministic_algorithms(False)  # or new memory is filled
    try:
        storage = torch.empty(stride * (rows - 1) + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GB of address space are not to be had")
    logits = storage.as_strided((rows, 64), (stride, 1))
    source, labels = make_rows(rows, 64, torch.bfloat16, seed=9)
    logits.copy_(source)
    got = kernels().token_logps_fused_(logits, labels, IGNORE, 1.0, 0.0, 64, False)
    want = kernels().token_logps_fused_(source, labels, IGNORE, 1.0, 0.0, 64, False)
    assert torch.equal(got[0], want[0]) and torch.equal(logits, source)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=torch.tensor([1, 50, 2])), "label 50 at row 1 is out of range"),
        (dict(labels=torch.tensor([1, 2, -1])), "label -1 at row 2 is out of range"),
        (dict(labels=torch.tensor([1, 2, 45]), vocab_size=45), r"label 45 at row 2 .* \[0, 45\)"),
        (dict(labels=torch.tensor([1, 2])), r"labels must have shape \[3\], got \[2\]"),
        (dict(labels=torch.zeros(3, dtype=torch.int32)), "labels must be int64, got int32"),
        (dict(logits=torch.zeros(3, 50, dtype=torch.int64)), "logits must be float32, .* got int64"),
        (dict(logits=torch.zeros(50, 3).t()), "unit stride over the vocabulary, got stride 3"),
        (dict(logits=torch.zeros(50)), r"logits must have shape \[N, V\], got \[50\]"),
        (dict(vocab_size=51), r"vocab_size must be in \[1, 50\].*got 51"),
        (dict(scale=0.0), "scale must be a positive number, got 0"),
        (dict(softcap=-3.0), "softcap must be positive.*got -3"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(
        logits=torch.zeros(3, 50), labels=torch.zeros(3, dtype=torch.int64), scale=1.0, softcap=0.0, vocab_size=50
    )
    a = {**arguments, **change}
    options = (a["labels"], IGNORE, a["scale"], a["softcap"], a["vocab_size"], False)
    for op in (kernels().token_logps_fwd, kernels().token_logps_fused_):
        with pytest.raises(RuntimeError, match=message):
            op(a["logits"], *options)


def test_overlapping_rows_are_read_but_never_written():
    logits, labels = torch.randn(1, 50).expand(3, 50), torch.tensor([1, 2, 3])
    logp, lse, _ = kernels().token_logps_fwd(logits, labels, IGNORE, 1.0, 0.0, 50, False)
    torch.testing.assert_close(logp, logits[0].log_softmax(-1)[labels])
    with pytest.raises(RuntimeError, match="rows must not overlap"):
        kernels().token_logps_fused_(logits, labels, IGNORE, 1.0, 0.0, 50, False)
    with pytest.raises(RuntimeError, match="lse must be float32, got float64"):
        kernels().token_logps_bwd_(torch.zeros(3, 50), labels, lse.double(), lse, IGNORE, 1.0, 0.0, 50)


# ---------------------------------------------------------------------------------------------- instruction sets


def run_all_token_checks():
    torch.set_num_threads(1)
    for dtype, vocab in itertools.product(DTYPES, (1, 31, 64, 9001)):
        test_sizes(vocab, dtype)
    for dtype in DTYPES:
        test_scale_and_softcap(1.0, 5.0, dtype)
        test_rows_strides_and_padded_vocabulary(9, dtype)
        test_extreme_logits(dtype)
        test_nan_and_infinite_rows(dtype)
    test_few_rows_are_split_over_the_vocabulary(torch.bfloat16)


def run_with_isa(isa):
    environment = {**os.environ, "CPO_KERNELS_CPU_ISA": isa}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    done = run_with_isa(isa)
    if "this processor has no" in done.stderr or (isa != "portable" and "this build" in done.stderr):
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused():
    done = run_with_isa("sse9")
    assert done.returncode != 0 and "CPO_KERNELS_CPU_ISA" in done.stderr and "'sse9'" in done.stderr


# ---------------------------------------------------------------------------------------------------- sequences


@every_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sequence_sum(weighted, average, dtype):
    generator = torch.Generator().manual_seed(10)
    cu = torch.tensor([3, 3, 4, 1000, 1000, 70_000])  # empty, of one token, long; tokens outside count nowhere
    logps = torch.randn(70_003, generator=generator, dtype=dtype) * 10 - 5
    weights = torch.rand(70_003, generator=generator, dtype=dtype) if weighted else logps.new_empty(0)
    got = kernels().sequence_sum(logps, cu, weights, average)
    terms = (logps.double() * weights.double() if weighted else logps.double()).tolist()
    assert got.dtype == dtype
    for s, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        tokens = max(end - begin, 1) if average else 1
        exact = math.fsum(terms[begin:end]) / tokens
        size = math.fsum(map(abs, terms[begin:end])) / tokens
        tolerance = 32 * torch.finfo(torch.float64).eps * size + torch.finfo(dtype).eps * abs(exact)
        assert abs(float(got[s]) - exact) <= tolerance, (s, float(got[s]), exact)
    assert got[0] == 0 and got[3] == 0


def test_sequence_sum_errors():
    logps, none = torch.zeros(5), torch.empty(0)
    for cu, message in (
        ([0, 6], r"\[0, 5\].*0 to 6"),
        ([-1, 5], "-1 to 5"),
        ([0, 3, 2], "not decrease, got 3 before 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels().sequence_sum(logps, torch.tensor(cu), none, False)
    with pytest.raises(RuntimeError, match=r"token_weights must have shape \[5\], got \[4\]"):
        kernels().sequence_sum(logps, torch.tensor([0, 5]), torch.zeros(4), False)
    with pytest.raises(RuntimeError, match="token_logps must be float32 or float64, got bfloat16"):
        kernels().sequence_sum(logps.bfloat16(), torch.tensor([0, 5]), none, False)


# --------------------------------------------------------------------------------------------------- preference

NAMES = ("loss", "losses", "grad", "chosen_rewards", "rejected_rewards", "value_gap", "order", "counts")


def make_batch(seed=0, dtype=torch.float64, sequences=7, objectives=3, count=11):
    """Responses that stand in several pairs, partly unrated or unconditioned, with ties among them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 30, (sequences,), generator=generator)
    pairs = torch.stack([torch.randperm(sequences, generator=generator)[:2] for _ in range(count)])
    scores = torch.randint(1, 6, (sequences, objectives), generator=generator).double()
    scores[0] = math.nan  # pairs with response 0 are unrated
    scores[1, 0] = math.nan
    scores[3] = scores[2]
    pairs[0], pairs[1], pairs[2] = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([5, 4])
    conditions = torch.randint(1, 6, (count, objectives), generator=generator).double()
    conditions[uniform(count, objectives) < 0.3] = math.nan
    logps = -lengths * uniform(sequences, low=0.2, high=3.0)
    return dict(
        seq_logps=logps.to(dtype),
        ref_logps=(logps + uniform(sequences, low=-3, high=3)).to(dtype),
        lengths=lengths,
        pairs=pairs,
        scores=scores,
        conditions=conditions,
        objectives=torch.stack([uniform(objectives, low=0.5, high=2), uniform(objectives, low=0.5, high=2)]),
        pair_weights=uniform(count, low=0.2, high=2),
        pair_betas=uniform(count, low=0.05, high=0.5),
        margins=uniform(sequences, low=-1, high=1),
        loss_types=[0],
        loss_weights=[1.0],
        options=list(OPTION_DEFAULTS.values()),
        num_pairs=-1.0,
        chosen_tokens=-1.0,
    )


def with_options(batch, **options):
    return {**batch, "options": list({**OPTION_DEFAULTS, **options}.values())}


def without(batch, *names):
    return {**batch, **{name: batch[name].new_empty(0) for name in names}}


def check_preference(batch, tolerance=1e-11):
    got = kernels().preference(*batch.values())
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    want = reference.preference(*exact.values())
    for name, a, b in zip(NAMES, got, want, strict=True):
        if a.is_floating_point():
            assert a.dtype == batch["seq_logps"].dtype
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
        else:
            assert torch.equal(a, b), name
            assert a.dtype == b.dtype
    return got


OPTION_SETS = (
    {},
    dict(label_smoothing=0.1),
    dict(tau=0.7, margin=0.2),
    dict(f_divergence=1),
    dict(f_divergence=2, beta=0.5),
    dict(f_divergence=3, f_alpha=0.4),
    dict(f_divergence=3, f_alpha=1.0),
    dict(simpo_gamma=1.5, alphapo_alpha=0.0, nll_alpha=0.0, modpo_weight=0.3, discopop_tau=0.5),
    dict(alphapo_alpha=0.6, nll_alpha=0.2, tie_margin=0.8),
)


@every_backend
@pytest.mark.parametrize("loss_type", list(reference.LOSS_TYPES))
def test_every_loss_type_and_option(loss_type):
    index = list(reference.LOSS_TYPES).index(loss_type)
    for seed, options in enumerate(OPTION_SETS):
        if loss_type == "exo_pair" and not options.get("label_smoothing"):
            options = {**options, "label_smoothing": 0.02}
        batch = {**with_options(make_batch(seed), **options), "loss_types": [index], "loss_weights": [0.7]}
        if loss_type.startswith("aot"):
            batch = without(batch, "pair_weights", "pair_betas")
        got = check_preference(batch)
        assert got[7].tolist()[0] > 0 and got[2].abs().max() > 0
    check_preference({**batch, "num_pairs": 17.0, "chosen_tokens": 400.0})
    float32 = {k: v.float() if k in ("seq_logps", "ref_logps") else v for k, v in batch.items()}
    check_preference(float32, tolerance=1e-5)


@every_backend
@pytest.mark.parametrize("spread", [1.0, 60.0, 1000.0])
def test_far_from_the_reference(spread):
    """Sequence log-probs far apart: no overflow, no NaN, the tails of every formula."""
    for index, name in enumerate(reference.LOSS_TYPES):
        batch = make_batch(20)
        batch["ref_logps"] = batch["seq_logps"] + spread * torch.linspace(-1, 1, 7, dtype=torch.float64)
        batch = {**with_options(batch, label_smoothing=0.05), "loss_types": [index]}
        if name.startswith("aot"):
            batch = without(batch, "pair_weights", "pair_betas")
        if name == "discopop" and spread > 60:
            continue  # e^-u is astronomically large by definition
        got = check_preference(batch, tolerance=1e-9)
        assert got[2].isfinite().all(), name


@every_backend
def test_lists_of_losses_and_reported_rewards():
    names = list(reference.LOSS_TYPES)
    for mix in (["sigmoid", "bco_pair", "sft"], ["simpo", "orpo"], ["contrastive_cpo"], ["aot", "hinge"], ["sft"]):
        batch = {
            **make_batch(30),
            "loss_types": [names.index(n) for n in mix],
            "loss_weights": [1.0, 0.5, 2.0][: len(mix)],
        }
        check_preference(without(batch, "pair_betas", "pair_weights"))
        check_preference(without(batch, "pair_betas", "pair_weights", "ref_logps", "margins"))


@every_backend
def test_without_ratings_the_first_is_chosen():
    batch = without(make_batch(31), "scores", "conditions", "objectives")
    got = check_preference(batch)
    assert (got[6] == 1).all() and got[5].isinf().all() and got[7].tolist() == [11, 0, 0]
    check_preference(without(make_batch(32), "conditions"))


@every_backend
def test_ties_give_nothing():
    batch = make_batch(33)
    batch["pairs"] = torch.tensor([[0, 1], [2, 3], [0, 5]])  # unrated, equal, unrated
    batch["conditions"] = torch.full((3, 3), math.nan, dtype=torch.float64)
    batch = without(batch, "pair_weights", "pair_betas")
    got = check_preference(batch)
    assert got[0] == 0 and not got[1].any() and not got[2].any() and got[7].tolist() == [0, 3, 2]
    assert got[6].tolist() == [0, 0, 0] and got[5].isnan().tolist() == [True, False, True]


@every_backend
def test_no_pairs():
    batch = make_batch(34)
    batch["pairs"] = torch.empty(0, 2, dtype=torch.int64)
    batch["conditions"] = torch.empty(0, 3, dtype=torch.float64)
    batch = without(batch, "pair_weights", "pair_betas")
    got = kernels().preference(*batch.values())
    assert got[0] == 0 and not got[2].any() and got[1].shape == (0,) and got[7].tolist() == [0, 0, 0]


@every_backend
def test_gradient_of_a_shared_response_is_the_sum_over_its_pairs():
    batch = without(make_batch(35, count=40), "scores", "conditions", "objectives")
    whole = kernels().preference(*{**batch, "num_pairs": 1.0}.values())
    parts = torch.zeros(7, dtype=torch.float64)
    for p in range(40):
        one = {**batch, "pairs": batch["pairs"][p : p + 1], "num_pairs": 1.0}
        one["pair_weights"], one["pair_betas"] = batch["pair_weights"][p : p + 1], batch["pair_betas"][p : p + 1]
        parts += kernels().preference(*one.values())[2]
    torch.testing.assert_close(whole[2], parts, rtol=1e-13, atol=1e-13)
    again = kernels().preference(*{**batch, "num_pairs": 1.0}.values())
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@every_backend
def test_aot_orders_equal_ratios_as_they_come():
    batch = without(make_batch(36), "scores", "conditions", "objectives", "pair_weights", "pair_betas")
    batch["seq_logps"] = torch.tensor([-1.0, -2.0, -1.0, -2.0, -3.0, -3.0, -3.0], dtype=torch.float64)
    batch["pairs"] = torch.tensor([[2, 3], [0, 1], [4, 5], [6, 5], [4, 6]])
    for name in ("aot", "aot_unpaired"):
        check_preference({**batch, "loss_types": [list(reference.LOSS_TYPES).index(name)]})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pairs=torch.tensor([[0, 7]])), r"pairs\[0\] holds sequence 7, but there are 7 sequences"),
        (dict(pairs=torch.tensor([[0, 1], [-1, 2]])), r"pairs\[1\] holds sequence -1"),
        (dict(pairs=torch.tensor([[3, 3]])), r"pairs\[0\] pairs sequence 3 with itself"),
        (dict(pairs=torch.tensor([0, 1])), r"pairs must have shape \[P, 2\], got \[2\]"),
        (dict(pairs=torch.tensor([[0, 1]]).int()), "pairs must be int64, got int32"),
        (dict(ref_logps=torch.zeros(6)), r"ref_logps must have shape \[7\], got \[6\]"),
        (dict(lengths=torch.ones(8, dtype=torch.int64)), r"lengths must have shape \[7\]"),
        (dict(scores=torch.zeros(6, 3)), r"scores must have shape \[7, 3\], got \[6, 3\]"),
        (dict(conditions=torch.zeros(7, 3)), r"conditions must have shape \[11, 3\], got \[7, 3\]"),
        (dict(objectives=torch.zeros(2, 4)), r"objectives must have shape \[2, 3\], got \[2, 4\]"),
        (dict(pair_weights=torch.zeros(10)), r"pair_weights must have shape \[11\]"),
        (dict(seq_logps=torch.zeros(7, dtype=torch.bfloat16)), "seq_logps must be float64 or float32, got bfloat16"),
        (dict(loss_types=[20]), r"loss_types must be in \[0, 20\), got 20"),
        (dict(loss_weights=[1.0, 2.0]), "loss_types and loss_weights .* got 1 and 2"),
        (dict(options=[0.1]), "options must have 12 values, got 1"),
        (dict(lengths=torch.empty(0, dtype=torch.int64), loss_types=[15]), "lengths must be given"),
    ],
)
def test_preference_errors(change, message):
    with pytest.raises(RuntimeError, match=message):
        kernels().preference(*{**make_batch(40), **change}.values())


if __name__ == "__main__":
    run_all_token_checks()
