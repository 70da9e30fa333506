"""filter_eps: head gradients on the live columns, against the formula in float64, and all that passes through them."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cpo_kernels as cpo
from cpo_kernels import reference
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import Backend
from cpo_kernels.check.compare import threads
from cpo_kernels.head import live_backward as backward_of_sets
from cpo_kernels.head import strategy
from cpo_kernels.head.inputs import Execution, Head, HeadConfig, Logits, Needs, head_inputs
from cpo_kernels.head.live import LIVE_LIMIT, KeptSets, LiveDx, LiveSets, filter_shares, filtered_chunk, live_columns
from cpo_kernels.head.live_backward import live_backward
from cpo_kernels.head.nll import nll_of
from cpo_kernels.ops.token_logps import HeadOptions
from tests.support.heads import BACKENDS, limits_of, relative_error
from tests.support.processes import run_processes

VOCAB, HIDDEN = 600, 24


def rows(
    count: int = 90, dtype: torch.dtype = torch.float64, padding: int = 0, seed: int = 0, flat: slice = slice(40, 60)
):
    """hidden [count, H] that puts most of the softmax on a few words, but for `flat` rows; every sixth is masked."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB + padding, HIDDEN, generator=g, dtype=torch.float64)
    labels = torch.randint(VOCAB, (count,), generator=g)
    near = torch.nn.functional.normalize(weight[labels], dim=1) * (3 + 3 * torch.rand(count, 1, generator=g))
    hidden = near + 0.3 * torch.randn(count, HIDDEN, generator=g)
    hidden[flat] *= 0.05
    bias = 0.3 * torch.randn(VOCAB + padding, generator=g, dtype=torch.float64)
    labels[::6] = -100
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], labels


def formula(
    leaves, labels, coef, eps, sets, scale=1.0, softcap=0.0, vocab_size=None, shards=None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX, dW, db, and the means of `FilterShares` [3], as the docstring of `head.live` states them, in float64."""
    hidden, weight, bias = (t.detach().double() for t in leaves)
    keep = labels != -100
    x, y, c = hidden[keep], labels[keep], coef[keep].double()
    vocab = len(weight) if vocab_size is None else vocab_size
    z = scale * (x @ weight.t() + bias)
    slope = torch.full_like(z, scale)
    if softcap:
        slope *= 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    sizes = torch.softmax(z[:, :vocab], 1) * slope[:, :vocab]
    g = torch.nn.functional.one_hot(y, vocab) * slope[:, :vocab] - sizes
    used, sums = torch.zeros_like(g), torch.zeros(3, dtype=torch.float64)
    cuts = [slice(low, low + sets) for low in range(0, len(x), sets)] if isinstance(sets, int) else sets
    for rows_of_set, shard in itertools.product(cuts, shards or [slice(0, vocab)]):
        part = rows_of_set, shard
        width = len(range(*shard.indices(vocab)))
        columns = (sizes[part] >= eps * scale).any(0)
        mine = y[rows_of_set] - shard.start
        columns[mine[(mine >= 0) & (mine < width)]] = True
        exact = columns.sum() > LIVE_LIMIT * width
        columns |= exact
        tail = torch.where(columns, 0.0, g[part])
        used[part] = torch.where(columns, g[part], 0.0)
        if not columns.all():
            used[part] += tail.sum(1)[:, None] * (tail.sum(0) / tail.sum())
        counts = torch.stack([columns.sum(), exact * width]) / vocab * len(x[rows_of_set])
        sums += torch.stack([counts[0], sizes[part][:, ~columns].sum() / scale, counts[1]])
    dx, dw, db = torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
    dx[keep] = c[:, None] * (used @ weight[:vocab])
    dw[:vocab], db[:vocab] = used.t() @ (c[:, None] * x), used.t() @ c
    return dx, dw, db, sums / max(1, len(x))


HEADS = {
    "plain": {},
    "softcap": {"softcap": 30.0},
    "scale": {"scale": 0.7},
    "padded vocabulary": {"vocab_size": VOCAB},
    "all": {"softcap": 25.0, "scale": 1.3, "vocab_size": VOCAB},
}


def budget(set_rows: int, dtype: torch.dtype, padding: int) -> int:
    """Of chunks of as many rows: one set is one chunk."""
    return set_rows * (VOCAB + padding) * dtype.itemsize


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("filter_head_grad", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_the_formula(name, filter_head_grad, impl):
    check_formula(name, filter_head_grad, impl, *rows(padding=9 if "vocab_size" in HEADS[name] else 0))


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_gradients_in_triton(filter_head_grad):
    check_formula("all", filter_head_grad, "triton", *rows(40, padding=9, flat=slice(24, 40)))


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_dx_of_16_bit_rows_in_triton_is_that_of_other_backends(filter_head_grad):
    """Its matmul too adds what rounding took from the gradients of the labels; without it they differ by 5e-4."""
    (hidden, weight, bias), labels = rows(96, torch.float16, flat=slice(0))
    peaked, dx = (2 * hidden.detach()).requires_grad_(), {}  # with almost no tail, for which Triton adds columns
    where = {"filter_eps": 1e-5, "filter_head_grad": filter_head_grad, "memory_budget": budget(16, torch.float16, 0)}
    for impl in ("triton", "reference"):
        logp = cpo.linear_token_logps(peaked, weight, labels, bias, impl=impl, **where)
        (dx[impl],) = torch.autograd.grad(logp.sum(), [peaked])
    assert relative_error(dx["triton"], dx["reference"]) < 3e-5


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_dx_in_bfloat16_has_its_tail(filter_head_grad):
    """Several chunks, and rows that leave much to the tail: without it dX is wrong by 0.057."""
    (hidden, weight, bias), labels = rows(150, torch.bfloat16, flat=slice(100, 120))
    hidden = (0.6 * hidden.detach()).requires_grad_()
    coef = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))
    weight = weight.detach().requires_grad_(filter_head_grad)
    where = {"filter_eps": 0.02, "filter_head_grad": filter_head_grad, "memory_budget": budget(32, torch.bfloat16, 0)}
    logp = cpo.linear_token_logps(hidden, weight, labels, bias, **where)
    (dx,) = torch.autograd.grad((logp * coef.masked_fill(labels == -100, 0.0)).sum(), [hidden])
    want = formula((hidden, weight, bias), labels, coef, 0.02, 32)[0]
    assert relative_error(dx, want) < 0.01


def test_dx_of_chunks_that_are_no_whole_number_of_sets():
    """Four sets in two chunks of 167 rows, where 333 rows in a row would be three. Without tails 0.057 as well."""
    (hidden, weight, bias), labels = rows(400, torch.bfloat16, flat=slice(100, 120))
    hidden = (0.6 * hidden.detach()).requires_grad_()
    where = {"loss_type": "aot", "beta": 0.05, "memory_budget": budget(192, torch.bfloat16, 0)}
    loss_fn, ref_logps = cpo.FusedLinearCPOLoss(filter_eps=0.02, **where), torch.zeros(4)
    of_labels = labels.view(4, 100)
    out = loss_fn(hidden.view(4, 100, -1), weight, of_labels, bias, ref_logps=ref_logps)
    (dx,) = torch.autograd.grad(out.loss, [hidden])
    doubles = [t.detach().double() for t in (hidden.view(4, 100, -1), weight)]
    logp = reference.linear_token_logps(*doubles, of_labels, bias.detach().double()).requires_grad_()
    loss = cpo.preference_loss(logp.sum(1), ref_logps=ref_logps.double(), loss_type="aot", beta=0.05).loss
    (coef,) = torch.autograd.grad(loss, logp)
    layout = loss_fn.plan(of_labels, VOCAB, torch.bfloat16, device="cpu").layout
    assert layout.strategy == "two_pass" and [c.stop - c.start for c in layout.row_chunks] == [167, 166]
    sets = [slice(low, min(low + 128, c.stop)) for c in layout.row_chunks for low in range(c.start, c.stop, 128)]
    want = formula((hidden, weight, bias), labels, coef.flatten(), 0.02, sets)[0]
    assert relative_error(dx, want) < 0.01


@pytest.mark.parametrize("all_positions", [True, False])
@pytest.mark.parametrize("train_head", [True, False])
def test_dx_does_not_depend_on_how_sets_are_taken(train_head, all_positions, monkeypatch):
    """To the bit: a set for each thread; or, with more threads than sets, some sets after another whose gradients are
    stored. Beside exact sets that reach over several turns and rows without a label."""
    (hidden, weight, bias), labels = rows(400, torch.bfloat16, flat=slice(100, 200))
    labels[230:330] = -100
    weight = weight.detach().requires_grad_(train_head)
    monkeypatch.setattr("cpo_kernels.head.inputs.SET_ROWS", 16)
    of_a_set, given = 16 * (int(LIVE_LIMIT * VOCAB) + 1), []

    def dx_of(count, sets):
        room = torch.full((sets * of_a_set,), torch.nan, dtype=torch.bfloat16)
        given.append(room)
        monkeypatch.setattr(LiveDx, "_room", lambda *_: room)
        loss_fn, of_labels = cpo.FusedLinearCPOLoss(filter_eps=1e-3), labels.view(4, 100)
        places = {"device": "cpu", "all_positions": all_positions}
        plan = loss_fn.plan(of_labels, VOCAB, torch.bfloat16, hidden_size=HIDDEN, **places)
        with threads(count):
            out = loss_fn(hidden.view(4, 100, -1), weight, of_labels, bias, ref_logps=torch.zeros(4), plan=plan)
        return torch.autograd.grad(out.loss, hidden)[0], shares(out)

    dx, found = dx_of(1, 1)
    assert 0.1 < found[2] < 0.9
    for count, sets in ((3, 1), (64, 1), (64, 3), (64, 40)):
        other, other_found = dx_of(count, sets)
        assert torch.equal(dx, other) and found == pytest.approx(other_found, rel=1e-5)
    if dispatch.own_matmuls(dispatch.kernels("auto", hidden), weight):
        written = [not room.isnan().all() for room in given]
        assert written == [False, False, True, True, True]


@pytest.mark.parametrize("words", [VOCAB, 7])
def test_dw_of_16_bit_rows_in_triton_lacks_the_rounding_of_the_labels(words, monkeypatch):
    """As that of the CPU's own matmuls does: rows with a label each, and many with one of seven."""
    (hidden, weight, bias), labels = rows(96, torch.float16, flat=slice(0))
    generator = torch.Generator().manual_seed(0)
    peaked = 2 * hidden.detach()
    if words < VOCAB:
        labels[labels != -100] %= words
        near = torch.nn.functional.normalize(weight.detach()[labels.clamp(min=0)].float(), dim=1)
        peaked = (6 * near + torch.randn(96, HIDDEN, generator=generator)).half()
    peaked.requires_grad_()
    coef = torch.randn(96, generator=generator)
    want = formula((peaked, weight, bias), labels, coef, 1e-5, 16)[1]
    where = {"impl": "triton", "filter_eps": 1e-5, "filter_head_grad": True}

    def error():
        logp = cpo.linear_token_logps(peaked, weight, labels, bias, memory_budget=budget(16, torch.float16, 0), **where)
        return relative_error(torch.autograd.grad(logp, [weight], coef)[0], want)

    lacks = error()
    monkeypatch.setattr(backward_of_sets._IndexedDw, "_add_label_remainders", lambda *_: None)
    assert lacks < 0.8 * error()


def check_formula(name, filter_head_grad, impl, leaves, labels):
    """Sets of 16 rows: the flat ones are exact, the others keep some tenth of the columns."""
    head, padding = HEADS[name], len(leaves[1]) - VOCAB
    coef = torch.randn(len(labels), dtype=torch.float64)
    where = {"memory_budget": budget(16, torch.float64, padding), "impl": impl, **head}
    logp = cpo.linear_token_logps(
        *leaves[:2], labels, leaves[2], filter_eps=1e-3, filter_head_grad=filter_head_grad, **where
    )
    exact = cpo.linear_token_logps(*leaves[:2], labels, leaves[2], **where)
    assert relative_error(logp, exact) < 1e-14
    got, whole = (torch.autograd.grad(out, leaves, coef) for out in (logp, exact))
    options = {"softcap": 0.0} | head
    *want, (live, *_) = formula(leaves, labels, coef, 1e-3, 16, **options)
    assert 0.1 < live < 0.9 and relative_error(whole[0], want[0]) > 1e-3  # the sets are of both kinds, and it matters
    want = want if filter_head_grad else [want[0], *whole[1:]]
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("set_rows", [1, 7, 128])
@pytest.mark.parametrize("count", [0, 1, 5, 130, 300])
def test_any_number_of_rows(count, set_rows, impl):
    """Many rows a chunk: sets are cut from the labelled rows in order, the last one is short."""
    leaves, labels = rows(count, flat=slice(0, 0))
    coef = torch.randn(count, dtype=torch.float64)
    memory = budget(set_rows, torch.float64, 0) if set_rows < 16 else None
    logp = cpo.linear_token_logps(
        *leaves[:2], labels, leaves[2], filter_eps=0.1, filter_head_grad=True, memory_budget=memory, impl=impl
    )
    got = torch.autograd.grad(logp, leaves, coef)
    *want, _ = formula(leaves, labels, coef, 0.1, set_rows)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


def test_nothing_labelled():
    leaves, labels = rows(10)
    logp = cpo.linear_token_logps(*leaves[:2], labels.fill_(-100), leaves[2], filter_eps=0.1, filter_head_grad=True)
    assert not any(g.any() for g in torch.autograd.grad(logp.sum(), leaves))


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap, others", [(None, -90.0), (None, -100.0), (10.0, -torch.inf)])
def test_a_tail_of_almost_nothing(softcap, others, dtype, impl):
    """Words that a bias rules out: their probability is a float32 number whose inverse is none."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = 0.01 * torch.randn(6, 8, generator=g), torch.randn(40, 8, generator=g)
    bias = torch.where(torch.arange(40) < 3, 0.0, others)
    leaves, labels = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], torch.arange(6) % 3
    got, exact = (
        torch.autograd.grad(
            cpo.linear_token_logps(*leaves[:2], labels, leaves[2], softcap=softcap, impl=impl, **options).sum(), leaves
        )
        for options in ({"filter_eps": 0.01, "filter_head_grad": True}, {})
    )
    true = [t.detach().double().requires_grad_() for t in leaves]
    truth = reference.linear_token_logps(*true[:2], labels, true[2], softcap=softcap)
    # dX and dW by their size: single elements cancel, and exact and filtered gradients round them differently. Rows
    # of about 1 cancel in db.
    dx, dw, db = torch.autograd.grad(truth.sum(), true)
    eps = torch.finfo(dtype).eps
    for grads in (got, exact):
        assert max(relative_error(grads[0], dx), relative_error(grads[1], dw)) < max(eps, 1e-6)
        assert (grads[2].double() - db).abs().max() < max(0.5 * eps, 1e-6)


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_only_what_is_asked_for(wanted, filter_head_grad):
    leaves, labels = rows()
    coef = torch.randn(len(labels), dtype=torch.float64)
    options = {"filter_eps": 0.02, "filter_head_grad": filter_head_grad, "memory_budget": budget(16, torch.float64, 0)}

    def grads(leaves):
        logp = cpo.linear_token_logps(*leaves[:2], labels, leaves[2], **options)
        return torch.autograd.grad(logp, [leaves[i] for i in wanted], coef)

    some = [t if i in wanted else t.detach() for i, t in enumerate(leaves)]
    for a, b in zip(grads(some), grads(leaves), strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_backward_twice_and_bits(filter_head_grad):
    leaves, labels = rows(dtype=torch.float32)
    coef = torch.randn(len(labels))
    where = {"memory_budget": budget(16, torch.float32, 0), "filter_eps": 0.02, "filter_head_grad": filter_head_grad}
    logp = cpo.linear_token_logps(*leaves[:2], labels, leaves[2], **where)
    first = torch.autograd.grad(logp, leaves, coef, retain_graph=True)
    again = torch.autograd.grad(logp, leaves, coef)
    other = torch.autograd.grad(cpo.linear_token_logps(*leaves[:2], labels, leaves[2], **where), leaves, coef)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, other, strict=True))


class HostTensors(TorchFunctionMode):
    """Tensors made without a device are the host's: what joins or searches them with others fails on a GPU."""

    def __init__(self) -> None:
        self.host: dict[int, Tensor] = {}
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.searchsorted):
            given = [id(t) in self.host for t in (args[0] if func is torch.cat else args)]
            assert all(given) or not any(given), f"{func.__name__} of tensors of the host and of the device"
            self.calls += func is torch.searchsorted
        if func in (torch.arange, torch.tensor) and not (kwargs or {}).get("device"):
            self.host[id(out)] = out
        return out


def test_head_gradients_join_no_tensors_of_the_host():
    """Products of a copy of W_A, as impl="cuda" makes them."""
    leaves, labels = rows()
    x, weight, bias = (t.detach() for t in leaves)
    x, labels = x[labels != -100], labels[labels != -100]
    head = Head(weight, bias, labels, HeadOptions(-100, 1.0, 0.0, VOCAB), len(x), dispatch.kernels("cpu", weight))
    execution, kept = Execution(limits_of(16, 1000), Backend.of("cpu"), 1e-3, True), KeptSets(x, len(x))
    logps, _ = filtered_chunk(head, (x, labels, False, None), execution, x[:0], LiveDx(head, 0), kept)
    sets = LiveSets.of(kept.tensors(), len(x), execution.set_rows)
    assert any(sets.exact) and not all(sets.exact)
    with HostTensors() as seen:
        live_backward(
            head, sets, x, labels, logps.lse, logps.lacks, torch.ones_like(logps.lse), Needs(True, True, True)
        )
    assert seen.calls


STRATEGIES = {  # name -> rows of a chunk, options
    "pairs": (200, {}),
    "several chunks of pairs": (48, {}),
    "two_pass": (48, {"loss_type": "aot"}),
    "deferred": (24, {}),
    "weighted": (200, {"use_weighting": True}),
}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("filter_head_grad", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_preference_losses(name, filter_head_grad, impl):
    """Each strategy gives the loss of the exact one, and the formula's gradients under its coefficients."""
    limit, options = STRATEGIES[name]
    sequences = 2 if name == "deferred" else 6
    leaves, labels = rows(flat=slice(40, 70))
    labels = labels[: 90 // sequences * sequences].view(sequences, -1)
    hidden, weight, bias = (t.detach().requires_grad_() for t in leaves)
    hidden = hidden.detach()[: labels.numel()].view(sequences, -1, HIDDEN).requires_grad_()
    ref_logps = -30 * torch.rand(sequences, dtype=torch.float64)
    where = {"memory_budget": budget(limit, torch.float64, 0), "impl": impl, "beta": 0.05, **options}
    loss_fn = cpo.FusedLinearCPOLoss(filter_eps=0.02, filter_head_grad=filter_head_grad, **where)
    out = loss_fn(hidden, weight, labels, bias, ref_logps=ref_logps)
    exact = cpo.FusedLinearCPOLoss(**where)(hidden, weight, labels, bias, ref_logps=ref_logps)
    assert relative_error(out.loss, exact.loss) < 1e-14 and exact.live_share.isnan()
    assert 0.02 < out.live_share < 0.9 and 0 < out.tail_mass < 0.5 and 0 <= out.exact_share < 0.9
    got, whole = (torch.autograd.grad(o.loss, (hidden, weight, bias)) for o in (out, exact))
    assert relative_error(got[0], whole[0]) < 0.3
    if not filter_head_grad:
        assert max(relative_error(a, b) for a, b in zip(got[1:], whole[1:], strict=True)) < 1e-12
    if name == "weighted" or (name == "several chunks of pairs" and not filter_head_grad):
        return  # coefficients of a detour, rows in another order
    logp = reference.linear_token_logps(hidden, weight, labels, bias).detach().requires_grad_()
    args = {k: v for k, v in where.items() if k in ("beta", "loss_type")}
    (coef,) = torch.autograd.grad(cpo.preference_loss(logp.sum(1), ref_logps=ref_logps, **args).loss, logp)
    layout = loss_fn.plan(labels, VOCAB, torch.float64, device="cpu").layout
    assert filter_head_grad or layout.strategy == name
    chunks = layout.row_chunks if name in ("two_pass", "deferred") and not filter_head_grad else limit // 16 * 16
    flat = hidden.detach().reshape(-1, HIDDEN), weight, bias
    *want, means = formula(flat, labels.flatten(), coef.flatten(), 0.02, chunks)
    assert shares(out) == pytest.approx(means.tolist(), rel=1e-6)
    assert relative_error(got[0].reshape(-1, HIDDEN), want[0]) < 1e-12
    if filter_head_grad:
        assert max(relative_error(a, b) for a, b in zip(got[1:], want[1:], strict=True)) < 1e-12


@pytest.mark.parametrize("filter_head_grad", [True, False])
@pytest.mark.parametrize("limit", [96, 32, 16, 8], ids=["one chunk", "two sequences", "each", "pieces"])
def test_kto(limit, filter_head_grad):
    """The formula's gradients under KTO's coefficients; sets do not cross the chunks, which are whole sequences."""
    leaves, labels = rows(flat=slice(40, 70))
    hidden, weight, bias = (t.detach().requires_grad_() for t in leaves)
    hidden, labels = hidden.detach().view(5, 18, HIDDEN).requires_grad_(), labels.view(5, 18)
    labels[0, :10] = -100
    logp = reference.linear_token_logps(hidden, weight, labels, bias).detach().requires_grad_()
    ref_logps = logp.detach().sum(1) + torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0])
    given = {"desirable": torch.arange(5) % 2 == 0, "kl": 0.3, "ref_logps": ref_logps}
    (coef,) = torch.autograd.grad(cpo.kto_loss(logp.sum(1), **given, beta=0.2).mean(), logp)
    where = {"beta": 0.2, "memory_budget": budget(limit, torch.float64, 0)}
    options = {"filter_eps": 0.02, "filter_head_grad": filter_head_grad}
    out, exact = (
        cpo.FusedLinearKTOLoss(**where, **more)(hidden, weight, labels, bias, **given) for more in (options, {})
    )
    assert relative_error(out.loss, exact.loss) < 1e-14
    got, whole = (torch.autograd.grad(o.loss, (hidden, weight, bias)) for o in (out, exact))
    assert 1e-6 < relative_error(got[0], whole[0]) < 0.3
    ends = [0, *itertools.accumulate((labels != -100).sum(1).tolist())]
    starts = {96: [0, 5], 32: [0, 2, 4, 5]}.get(limit, range(6))
    bounds = itertools.pairwise([ends[s] for s in starts])
    sets = [slice(low, min(low + limit, high)) for first, high in bounds for low in range(first, high, limit)]
    flat = hidden.detach().reshape(-1, HIDDEN), weight, bias
    *want, means = formula(flat, labels.flatten(), coef.flatten(), 0.02, limit if filter_head_grad else sets)
    assert shares(out) == pytest.approx(means.tolist(), rel=1e-6) and 0.01 < means[0] < 0.9 and means[1] > 0.01
    assert all(math.isnan(share) for share in shares(exact))
    want = want if filter_head_grad else [want[0], *whole[1:]]
    assert relative_error(got[0].reshape(-1, HIDDEN), want[0]) < 1e-11
    assert max(relative_error(a, b) for a, b in zip(got[1:], want[1:], strict=True)) < 1e-11


def shares(out):
    return [float(t) for t in (out.live_share, out.tail_mass, out.exact_share)]


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_shares_are_means_over_labelled_rows(filter_head_grad, train_head):
    """A plan of all positions puts ignored ones into the sets: here each sequence is one, the second a flat one."""
    leaves, labels = rows(64, flat=slice(32, 64))
    hidden, weight = leaves[0].view(2, 32, HIDDEN), leaves[1].detach().requires_grad_(train_head)
    labels = labels.view(2, 32)
    labels[0, 8:], labels[:, 0] = -100, 5
    where = {"filter_eps": 1e-3, "filter_head_grad": filter_head_grad, "memory_budget": budget(32, torch.float64, 0)}
    loss_fn = cpo.FusedLinearCPOLoss(**where)
    plan = loss_fn.plan(labels, VOCAB, torch.float64, device="cpu", all_positions=True)
    got = shares(loss_fn(hidden, weight, labels, ref_logps=torch.zeros(2), plan=plan))
    p = torch.softmax(hidden.detach() @ weight.detach().t(), -1)
    first = labels[0] != -100
    live = (p[0, first] >= 1e-3).any(0).index_fill(0, labels[0, first], True)
    total = (labels != -100).sum()
    exact = 1 - first.sum() / total
    want = exact + (1 - exact) * live.double().mean(), p[0, first][:, ~live].sum() / total, exact
    assert live.double().mean() < LIVE_LIMIT and got == pytest.approx([float(w) for w in want], rel=1e-4)


@pytest.mark.skipif(not dispatch.cpu_multiplies_bf16(), reason="needs a CPU with AVX512_BF16")
@pytest.mark.parametrize("flat", [slice(0), slice(32, 64)])
def test_a_filtered_dx_is_rounded_once(flat):
    """Beside a trainable head: it waits for its coefficients in float32. flat: rows of an exact set, or none."""
    leaves, labels = rows(150, flat=flat)
    hidden, weight, bias = (leaf.detach().bfloat16() for leaf in leaves)
    coef = torch.randn(len(labels), generator=torch.Generator().manual_seed(1)) / 3
    made = []
    for filter_head_grad in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"filter_eps": 0.02, "filter_head_grad": filter_head_grad}
        logp = cpo.linear_token_logps(x, w, labels, bias, memory_budget=budget(32, torch.bfloat16, 0), **options)
        made += torch.autograd.grad(logp, x, coef)
    exact = torch.zeros(len(labels), dtype=torch.bool)
    exact[flat] = True
    assert made[0].dtype == torch.bfloat16 and torch.equal(made[0][~exact], made[1][~exact])
    assert relative_error(made[0].float(), made[1].float()) < 3e-3


@pytest.mark.skipif(not dispatch.cpu_multiplies_bf16(), reason="needs a CPU with AVX512_BF16")
def test_a_filtered_dx_of_linked_pairs_is_rounded_once():
    """`two_pass` knows the coefficients only after dX: it is that of log-probs whose gradient are these."""
    leaves, labels = rows(96, flat=slice(0))
    labels = torch.where(labels == -100, 1, labels).view(3, 32)
    hidden, weight = (leaf.detach().bfloat16() for leaf in leaves[:2])
    pairs, ref_logps = torch.tensor([[0, 1], [0, 2]]), torch.tensor([-100.0, -90.0, -120.0])
    options = {"filter_eps": 0.02, "memory_budget": budget(32, torch.bfloat16, 0)}
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = cpo.FusedLinearCPOLoss(**options)(x.view(3, 32, -1), w, labels, pairs=pairs, ref_logps=ref_logps).loss
    (seen,) = torch.autograd.grad(loss, x)
    logp = cpo.linear_token_logps(x, w, labels.flatten(), filter_head_grad=True, **options)
    loss = cpo.CPOLoss()(logp.view(3, 32).sum(1), ref_logps=ref_logps, pairs=pairs).loss
    (want,) = torch.autograd.grad(loss, x)
    assert cpo.explain(96, HIDDEN, VOCAB, group_tokens=96, **options).strategy == "two_pass"
    assert (seen == want).double().mean() > 0.99


@pytest.mark.skipif(not dispatch.cpu_multiplies_bf16(), reason="needs a CPU with AVX512_BF16")
def test_dx_on_copies_of_live_rows_is_rounded_once():
    """The CPU's kernels multiply by index, the reference copies of W_A, as CUDA C++ does."""
    leaves, labels = rows(150, flat=slice(0))
    hidden, weight = (leaf.detach().bfloat16() for leaf in leaves[:2])
    coef = torch.randn(len(labels), generator=torch.Generator().manual_seed(1)) / 3
    made = []
    for impl in ("cpu", "reference"):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"filter_eps": 0.02, "filter_head_grad": True, "impl": impl}
        made += torch.autograd.grad(cpo.linear_token_logps(x, w, labels, **options), x, coef)
    assert (made[0] == made[1]).double().mean() > 0.8  # 0.86; rounded twice 0.70


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_the_default_dtype_does_not_count(filter_head_grad):
    """301 columns of 600 are too many; as a bfloat16 number they would be 300."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(600, 16, generator=generator)
    weight[:, :2], weight[:301, 0], weight[5, 1] = 0.0, 3.0, 3.0
    hidden = 0.1 * torch.randn(256, 16, generator=generator)
    hidden[:, :2] = 0.0
    hidden[:128, 0], hidden[128:, 1] = 2.0, 6.0
    labels = torch.full((256,), 5)
    labels[:128] = 0
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss_fn = cpo.FusedLinearCPOLoss(filter_eps=1e-3, filter_head_grad=filter_head_grad)
        torch.set_default_dtype(dtype)
        try:
            out = loss_fn(leaves[0].view(2, 128, 16), leaves[1], labels.view(2, 128), ref_logps=torch.zeros(2).float())
            out.loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        made.append((shares(out), *(leaf.grad for leaf in leaves)))
    assert made[0][0] == made[1][0] and made[0][0][2] == 0.5
    assert all(torch.equal(a, b) for a, b in zip(made[0][1:], made[1][1:], strict=True))


def test_the_tail_of_a_row_that_is_not_finite():
    leaves, labels = rows(64)
    hidden = leaves[0].detach().clone()
    hidden[40, 0] = torch.nan
    loss_fn = cpo.FusedLinearCPOLoss(filter_eps=0.02)
    hidden = hidden.requires_grad_().view(2, 32, HIDDEN)
    out = loss_fn(hidden, leaves[1].detach(), labels.view(2, 32), ref_logps=torch.zeros(2))
    live, tail, exact = shares(out)
    assert out.loss.isnan() and math.isnan(tail) and 0 < live < 1 and exact == 0


def test_no_shares_where_nothing_is_filtered():
    leaves, labels = rows(20)
    hidden, weight, labels = leaves[0].view(2, 10, HIDDEN), leaves[1], labels.view(2, 10)
    for grad, head_grad, given in ((False, True, hidden), (True, False, hidden.detach())):
        loss_fn = cpo.FusedLinearCPOLoss(filter_eps=0.02, filter_head_grad=head_grad)
        with torch.set_grad_enabled(grad):
            out = loss_fn(given, weight, labels, ref_logps=torch.zeros(2))
            unpaired = cpo.FusedLinearKTOLoss(filter_eps=0.02, filter_head_grad=head_grad)
            desirable = {"desirable": torch.tensor([True, False]), "kl": 0.0, "ref_logps": torch.zeros(2)}
            nll = nll_shares(given, weight, labels, filter_eps=0.02, filter_head_grad=head_grad)
            kto = unpaired(given, weight, labels, **desirable)
        assert all(math.isnan(share) for made in (out, kto, nll) for share in shares(made))


def nll_shares(hidden, weight, labels, bias=None, shards=None, index=None, **options):
    """The `FilterShares` of `linear_nll`."""
    config = HeadConfig(-100, None, 1.0, None, None)._replace(**options)
    inputs = head_inputs(hidden, weight, labels, bias, config, shards)
    return filter_shares(inputs, nll_of(inputs, "auto", index=index)[1])


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("filter_head_grad", [True, False])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows_of_a_chunk", [16, 1000])
def test_shares_of_the_nll(rows_of_a_chunk, name, filter_head_grad, train_head):
    """Rows without a label, and exact sets: of the chunks of 16 rows those of the flat ones, else none."""
    head, padding = HEADS[name], 9 if "vocab_size" in HEADS[name] else 0
    leaves, labels = rows(padding=padding)
    weight, bias = (t.detach().requires_grad_(train_head) for t in leaves[1:])
    options = {"filter_eps": 1e-3, "filter_head_grad": filter_head_grad, **head}
    memory = budget(rows_of_a_chunk, torch.float64, padding)
    got = shares(nll_shares(leaves[0], weight, labels, bias, memory_budget=memory, **options))
    *_, want = formula(
        leaves, labels, torch.ones(len(labels)), 1e-3, min(128, rows_of_a_chunk), **{"softcap": 0.0} | head
    )
    assert got == pytest.approx(want.tolist(), rel=1e-6, abs=1e-9)
    if rows_of_a_chunk == 16:
        assert 0.1 < want[0] < 0.9 and 1e-4 < want[1] and 0.1 < want[2] < want[0]


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_shares_of_the_nll_are_means_over_labelled_rows(filter_head_grad):
    """An index of all positions puts ignored ones into the sets; no label, no share."""
    leaves, labels = rows(64, flat=slice(32, 64))
    labels[8:32], labels[[0, 32]] = -100, 5
    where = {"filter_eps": 1e-3, "filter_head_grad": filter_head_grad, "memory_budget": budget(32, torch.float64, 0)}
    got = shares(nll_shares(*leaves[:2], labels, leaves[2], index=torch.arange(64), **where))
    first, second = (int(part.sum()) for part in (labels != -100).split(32))
    *_, (live, tail, exact) = formula((leaves[0][:32], *leaves[1:]), labels[:32], torch.ones(32), 1e-3, 32)
    want = torch.stack([live * first + second, tail * first, exact * first + second]) / (first + second)
    assert live < LIVE_LIMIT and got == pytest.approx(want.tolist(), rel=1e-6)
    none = nll_shares(*leaves[:2], labels.fill_(-100), leaves[2], **where)
    assert shares(none) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_nll(filter_head_grad):
    leaves, labels = rows()
    weights = torch.rand(len(labels), dtype=torch.float64)
    options = {"filter_eps": 0.02, "filter_head_grad": filter_head_grad, "memory_budget": budget(16, torch.float64, 0)}
    loss = cpo.linear_nll(*leaves[:2], labels, leaves[2], token_weights=weights, num_tokens=50, **options)
    whole = cpo.linear_nll(*leaves[:2], labels, leaves[2], token_weights=weights, num_tokens=50)
    assert relative_error(loss, whole) < 1e-14
    got, exact = (torch.autograd.grad(out, leaves) for out in (loss, whole))
    *want, _ = formula(leaves, labels, -weights / 50, 0.02, 16)
    want = want if filter_head_grad else [want[0], *exact[1:]]
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


# ------------------------------------------------------------------------------------------------ several processes

SHARDS = (250, 0, 358)  # of 608 rows, 600 of them words


def sharded(rank, filter_head_grad, dtype):
    leaves, labels = rows(padding=8, dtype=dtype)
    shards = cpo.VocabShards(dist.group.WORLD, SHARDS)
    mine = slice(shards.start, shards.start + SHARDS[rank])
    hidden, weight, bias = leaves[0], *(t.detach()[mine].requires_grad_() for t in leaves[1:])
    options = {"filter_eps": 1e-3, "filter_head_grad": filter_head_grad, "vocab_size": VOCAB}
    where = {"memory_budget": 16 * max(SHARDS) * dtype.itemsize, "vocab_shards": shards}
    logp = cpo.linear_token_logps(hidden, weight, labels, bias, **options, **where)
    return torch.autograd.grad(logp, (hidden, weight, bias), upstream(len(labels)).to(logp.dtype))


def upstream(count: int) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_a_sharded_head_has_sets_of_each_shard(filter_head_grad, dtype, bound):
    """One rank has no rows of the head."""
    leaves, labels = rows(padding=8, dtype=dtype)
    coef = upstream(len(labels))
    *want, _ = formula(leaves, labels, coef, 1e-3, 16, vocab_size=VOCAB, shards=[slice(0, 250), slice(250, VOCAB)])
    if not filter_head_grad:
        logp = cpo.linear_token_logps(*leaves[:2], labels, leaves[2], vocab_size=VOCAB)
        want[1:] = torch.autograd.grad(logp, leaves, coef.to(logp.dtype))[1:]
    grads = run_processes(sharded, 3, filter_head_grad, dtype)
    assert all(relative_error(dx, want[0]) < bound for dx, *_ in grads)
    for i in (1, 2):
        assert relative_error(torch.cat([g[i] for g in grads]), want[i]) < bound


def sharded_shares(rank, filter_head_grad):
    leaves, labels = rows(padding=8)
    shards = cpo.VocabShards(dist.group.WORLD, SHARDS)
    mine = slice(shards.start, shards.start + SHARDS[rank])
    where = {"memory_budget": 16 * max(SHARDS) * 8, "filter_eps": 1e-3, "filter_head_grad": filter_head_grad}
    weight = leaves[1].detach()[mine].requires_grad_()
    hidden, labels, ref_logps = leaves[0].view(2, -1, HIDDEN), labels.view(2, -1), torch.zeros(2)
    given, last = (hidden, weight, labels), {"ref_logps": ref_logps, "vocab_shards": shards}
    pairs = cpo.FusedLinearCPOLoss(vocab_size=VOCAB, **where)(*given, **last)
    unpaired = cpo.FusedLinearKTOLoss(vocab_size=VOCAB, **where)(*given, desirable=ref_logps > 0, kl=0.0, **last)
    nll = nll_shares(*given, shards=shards, vocab_size=VOCAB, **where)
    return {"nll": shares(nll), "pairs": shares(pairs), "unpaired": shares(unpaired)}


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_shares_of_a_sharded_head_are_those_of_the_whole(filter_head_grad):
    leaves, labels = rows(padding=8)
    *_, want = formula(
        (*leaves[:2], torch.zeros(VOCAB + 8)), labels, upstream(len(labels)), 1e-3, 16, vocab_size=VOCAB,
        shards=[slice(0, 250), slice(250, VOCAB)],
    )  # fmt: skip
    first, *others = run_processes(sharded_shares, 3, filter_head_grad)
    assert all(other == first for other in others)
    for name in first if filter_head_grad else ["nll"]:  # sets of 16 rows in the batch's order
        assert first[name] == pytest.approx(want.tolist(), rel=1e-5)
    for live, tail, exact in first.values():
        assert 0.1 < live < 0.9 and 0 < tail < 0.1 and 0 < exact < live


# ------------------------------------------------------------------------------------------------------- 16-bit errors


def peaked(dtype: torch.dtype, count: int = 256, seed: int = 0):
    """Rows like those of a trained model: the top word has most of the mass, the rest falls off like a power law."""
    g = torch.Generator().manual_seed(seed)
    vocab, hidden = 4096, 64
    weight = torch.randn(vocab, hidden, generator=g) * 0.6
    labels = torch.randint(vocab, (count,), generator=g)
    x = weight[labels] * (0.35 + 0.35 * torch.rand(count, 1, generator=g)) + 0.45 * torch.randn(
        count, hidden, generator=g
    )
    coef = torch.where(torch.arange(count) % 2 == 0, 1e-2, -1e-2) * (0.5 + torch.rand(count, generator=g))
    return x.to(dtype), weight.to(dtype), labels, coef


def test_auto_is_as_exact_as_exact_gradients_of_16_bit():
    """rms over 8 batches. So much of this softmax is above eps that all sets are exact: dX and dW are rounded as often
    as without a filter. (Live sets on rows of a real model: docs/filtered_gradients.md.)"""
    errors = {False: [0.0, 0.0], True: [0.0, 0.0]}
    for seed in range(8):
        x, weight, labels, coef = peaked(torch.bfloat16, seed=seed)
        truth = [t.double().requires_grad_() for t in (x, weight)]
        want = torch.autograd.grad(reference.linear_token_logps(*truth, labels), truth, coef.double())
        for filtered in (False, True):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            options = {"filter_eps": "auto", "filter_head_grad": True} if filtered else {}
            got = torch.autograd.grad(cpo.linear_token_logps(*leaves, labels, **options), leaves, coef)
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                errors[filtered][i] += float((a.double() - b).norm() / b.norm()) ** 2
    (dx, dw), (live_dx, live_dw) = ([e**0.5 for e in errors[k]] for k in (False, True))
    assert live_dx <= 1.01 * dx and live_dw <= 1.01 * dw


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_auto_is_exact_in_other_dtypes(dtype):
    leaves, labels = rows(dtype=dtype)
    coef = torch.randn(len(labels), dtype=dtype)
    auto, exact = (
        torch.autograd.grad(cpo.linear_token_logps(*leaves[:2], labels, leaves[2], **options), leaves, coef)
        for options in ({"filter_eps": "auto", "filter_head_grad": True}, {})
    )
    assert all(torch.equal(a, b) for a, b in zip(auto, exact, strict=True))


def test_a_grad_scaler_in_float16():
    """Coefficients of 1e-3 / 2^16 to 1e3 times 2^16 neither vanish nor overflow before the sum."""
    for factor in (2.0**-14, 2.0**14):
        x, weight, labels, coef = peaked(torch.float16)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        got = torch.autograd.grad(
            cpo.linear_token_logps(*leaves, labels, filter_eps="auto", filter_head_grad=True), leaves, coef * factor
        )
        truth = [t.double().requires_grad_() for t in (x, weight)]
        want = torch.autograd.grad(reference.linear_token_logps(*truth, labels), truth, coef.double() * factor)
        for a, b in zip(got, want, strict=True):
            floor = 2.0**-24 * b.numel() ** 0.5  # what float16 cannot hold at all
            assert float((a.double() - b).norm()) <= 0.02 * float(b.norm()) + floor


# -------------------------------------------------------------------------------------------------------- the kernels


def test_kernels_refuse_what_does_not_fit():
    logits, labels, lse = torch.randn(4, 9), torch.zeros(4, dtype=torch.long), torch.randn(4)
    ops, options = torch.ops.cpo_kernels, (-100, 1.0, 0.0, 9)
    columns, offsets = torch.tensor([0, 3]), torch.tensor([0, 2, 2])
    kept = logits, labels, lse, lse, columns, offsets, 2, *options, None  # 2 * (2 + 1) + 2 * (0 + 1) numbers
    for call, message in (
        (lambda: ops.live_grads_(*kept, logits.new_empty(7)), r"out must have shape \[8\]"),
        (lambda: ops.live_grads_(*kept, logits.new_empty(8).double()), "out must be"),
        (lambda: ops.live_grads_(*kept, logits.new_empty(16)[::2]), "out must be contiguous"),
        (lambda: ops.live_columns(logits, labels, lse, 0.1, 0, *options), "set_rows must be at least 1, got 0"),
        (lambda: ops.live_columns(logits, labels, lse[:3], 0.1, 2, *options), r"lse must have shape \[4\]"),
        (lambda: ops.live_columns(logits, labels, lse.double(), 0.1, 2, *options), "lse must be"),
        (lambda: ops.list_live_columns(logits, labels, lse, 0.1, 0, *options, 4, 1.0), "set_rows must be at least 1"),
        (lambda: ops.list_live_columns(logits, labels, lse[:3], 0.1, 2, *options, 4, 1.0), "lse must have shape"),
        (
            lambda: ops.live_grads(logits, labels, lse, lse, columns, offsets[:2], 2, *options),
            "offsets must have shape",
        ),
        (lambda: ops.live_grads(logits, labels, lse, lse, columns.flip(0), offsets, 2, *options), "must rise"),
        (lambda: ops.live_grads(logits, labels, lse, lse, columns + 6, offsets, 2, *options), r"within \[0, 9\)"),
        (
            lambda: ops.live_grads(logits, labels, lse, lse, columns, offsets - 1, 2, *options),
            "offsets must run from 0",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("with_anchors", [True, False])
def test_lists_of_live_columns(name, dtype, with_anchors):
    """The CPU's op makes of the live columns what the operations in `live_columns` make of them: sets of 7 rows, the
    last of 3, one of them flat and so exact, one without a label, one with a row whose log-sum-exp is not finite."""
    options, kernels, g = HEADS[name], torch.ops.cpo_kernels, torch.Generator().manual_seed(1)
    width = 2 * 2048 + 37
    logits = (5 * torch.randn(38, width + 9, generator=g)).to(dtype)
    logits[7:14] *= 0.01
    labels = torch.randint(width, (38,), generator=g)
    labels[3], labels[14:21], labels[9] = -100, -100, width - 1
    head = HeadOptions(-100, options.get("scale", 1.0), options.get("softcap", 0.0), width)
    acc = torch.promote_types(dtype, torch.float32)
    lacks = torch.randn(38, generator=g).to(acc)
    given = torch.stack([lacks, logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] + lacks]) if with_anchors else None
    _, lse, _ = kernels.token_logps_fwd(logits, labels, *head, False, given)
    lse[22], lse[30] = torch.inf, torch.nan
    labels[30] = -100
    own = Head(logits.new_empty(0, 1), logits.new_empty(0), labels, head, 0, kernels)
    plain = Head(
        logits.new_empty(0, 1), logits.new_empty(0), labels, head, 0, SimpleNamespace(live_columns=kernels.live_columns)
    )
    got, want = (live_columns(h, Logits(logits, given), labels, lse, 2.0**-13, 7) for h in (own, plain))
    assert got.columns.exact == want.columns.exact == [False, True, False, False, False, False]
    assert got.columns.offsets == want.columns.offsets and torch.equal(got.columns.columns, want.columns.columns)
    assert got.columns.offsets[1] > 20 and got.columns.offsets[3] == got.columns.offsets[1]
    assert got.columns.tail.dtype == dtype and got.columns.num_rows == 38 and got.columns.set_rows == 7
    tail = got.columns.tail.double(), want.columns.tail.double()
    assert bool(tail[0][0].any()) and not tail[0][2].any()
    unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-6)  # rounded from sums in another order
    torch.testing.assert_close(*tail, rtol=unit, atol=2.0**-24)
    assert torch.equal(got.row_sums.nan_to_num(7.0), want.row_sums.nan_to_num(7.0)) and bool(got.row_sums[22].isnan())
    torch.testing.assert_close(got.filter_sums, want.filter_sums, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert bool(got.filter_sums[1].isnan()) and float(got.filter_sums[2]) == 7.0
    assert torch.equal(got.labels.label_columns, want.labels.label_columns)
    assert got.labels.label_columns.numel() == (38 if with_anchors else 0)
    torch.testing.assert_close(got.labels.label_grads, want.labels.label_grads, rtol=1e-6, atol=1e-7)


def test_lists_of_no_columns():
    """No rows; then sets whose tails are 0, which nothing may divide by; the second time a set longer than the rows."""
    kernels, head = torch.ops.cpo_kernels, (-100, 1.0, 0.0, 9)
    logits, none = torch.full((3, 9), -torch.inf), torch.empty(0, dtype=torch.int64)
    columns, offsets, exact, tail, *_ = kernels.list_live_columns(
        logits[:0], none, torch.empty(0), 0.1, 2, *head, 4, 1.0
    )
    assert columns.numel() == exact.numel() == 0 and offsets.tolist() == [0] and tail.shape == (0, 9)
    logits[:, 4] = 0.0
    labels = torch.tensor([4, 4, 4])
    for set_rows, ends in ((2, [0, 1, 2]), (2**63 - 1, [0, 1])):
        columns, offsets, _, tail, row_sums, sums, *_ = kernels.list_live_columns(
            logits, labels, torch.zeros(3), 0.1, set_rows, *head, 4, 1.0
        )
        assert columns.tolist() == [4] * (len(ends) - 1) and offsets.tolist() == ends and not tail.any()
    assert row_sums.tolist() == [1.0] * 3 and sums.tolist() == pytest.approx([3 / 9, 0.0, 0.0])


def test_only_a_cpu_lists_live_columns():
    """torch.ops, which are the kernels of impl="cuda" too, have a name for every op on every device."""
    ops = torch.ops.cpo_kernels
    assert dispatch.lists_live_columns(ops, torch.empty(1))
    assert not dispatch.lists_live_columns(ops, torch.empty(1, device="meta"))
    assert not dispatch.lists_live_columns(dispatch.kernels("reference", torch.empty(1)), torch.empty(1))


def test_kept_gradients_stay_while_their_buffer_grows():
    """More than twice what the first rows foretell."""
    kept = KeptSets(torch.empty(0), 30)
    kept.room(10, 5).fill_(1.0)
    first = kept.g
    kept.room(10, 100).fill_(2.0)
    assert kept.g is not first
    kept.room(10, 7).fill_(3.0)
    assert kept.g[: kept.used].tolist() == [1.0] * 5 + [2.0] * 100 + [3.0] * 7


# --------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("function", ["linear_token_logps", "linear_nll", "FusedLinearCPOLoss"])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"filter_eps": 0.0}, ValueError, "filter_eps must be None, 'auto' or a number in \\(0, 1\\), got 0.0"),
        ({"filter_eps": 1}, ValueError, "got 1"),
        ({"filter_eps": float("nan")}, ValueError, "got nan"),
        ({"filter_eps": "high"}, ValueError, "got 'high'"),
        ({"filter_eps": True}, TypeError, r"None, 'auto' or a number in \(0, 1\), got True"),
        ({"filter_head_grad": True}, ValueError, "requires filter_eps"),
        ({"filter_eps": 0.1, "filter_head_grad": 1}, TypeError, "True or False, got 1"),
    ],
)
def test_wrong_options(function, options, error, message):
    leaves, labels = rows(4)
    with pytest.raises(error, match=message):
        if function == "FusedLinearCPOLoss":
            cpo.FusedLinearCPOLoss(**options)
        else:
            getattr(cpo, function)(*leaves[:2], labels, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled(dtype):
    leaves, labels = rows(dtype=dtype)
    loss_fn = cpo.FusedLinearCPOLoss(filter_eps=0.02, filter_head_grad=True, memory_budget=budget(16, dtype, 0))

    def loss(hidden, weight, bias):
        return loss_fn(hidden.view(2, -1, HIDDEN), weight, labels.view(2, -1), bias, ref_logps=torch.zeros(2)).loss

    torch._dynamo.reset()
    eager, compiled = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, torch.compile(loss, fullgraph=True)))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_compiled_nll(filter_head_grad):
    leaves, labels = rows()
    options = {"filter_eps": 0.02, "filter_head_grad": filter_head_grad, "memory_budget": budget(16, torch.float64, 0)}

    def run(hidden, weight, bias):
        loss = cpo.linear_nll(hidden, weight, labels, bias, **options)
        return loss, nll_shares(hidden, weight, labels, bias, **options)

    torch._dynamo.reset()
    (loss, eager), (again, compiled) = (f(*leaves) for f in (run, torch.compile(run, fullgraph=True)))
    assert shares(eager) == shares(compiled) and 0 < eager.tail_mass
    first, second = (torch.autograd.grad(made, leaves) for made in (loss, again))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_of_what_is_kept_is_that_of_live_columns():
    """A frozen head keeps dX and the caller's labels; a trained one its live gradients, not the logits."""
    x, weight, labels, _ = peaked(torch.float32, 512)
    for train, most in ((False, 1.01), (True, 1.5)):
        kept: list[int] = []

        def pack(t: Tensor, kept=kept) -> Tensor:
            kept.append(t.untyped_storage().nbytes())
            return t

        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_(train)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            cpo.linear_token_logps(*leaves, labels, filter_eps=2**-8, filter_head_grad=train)
        live = 0.3 * 512 * 4096 * 4 if train else 0
        inputs = sum(t.untyped_storage().nbytes() for t in ((x, weight, labels) if train else (labels,)))
        assert sum(kept) <= most * (x.untyped_storage().nbytes() + inputs + live)


def test_explain():
    """Products that follow from the live share, and what is kept for backward."""
    shape = {"num_tokens": 1024, "hidden_size": 576, "vocab_size": 49152, "live_share": 0.1}
    for options, want in (
        ({"filter_eps": "auto"}, 2.1),
        ({"filter_eps": "auto", "filter_head_grad": True}, 1.2),
        ({"filter_eps": "auto", "filter_head_grad": True, "loss": "unknown"}, 1.2),
        ({"filter_eps": "auto", "loss": "unknown"}, 2.1),
        ({"filter_eps": "auto", "loss": "unknown", "memory_budget": 1 << 20}, 3.1),
        ({"filter_eps": "auto", "train_head": False}, 1.1),
        ({"filter_eps": "auto", "filter_head_grad": True, "train_head": False}, 1.1),
        ({"filter_eps": "auto", "filter_head_grad": True, "dtype": torch.float32}, 3),
        ({"filter_eps": 0.01, "filter_head_grad": True, "train_hidden": False}, 1.1),
        ({"filter_eps": 0.01, "train_hidden": False}, 3),
        ({"filter_eps": 0.01, "train_hidden": False, "train_head": False}, 1),
    ):
        assert cpo.explain(**shape, **options).products == pytest.approx(want), options
    with pytest.raises(ValueError, match=r"live_share must lie in \[0, 1\], got 2"):
        cpo.explain(8, 8, 8, live_share=2.0)


@pytest.mark.parametrize(
    ("train_hidden", "train_head", "filter_head_grad", "want"),
    [
        (True, False, False, 128),
        (True, False, True, 128),
        (True, True, True, 256),
        (False, True, True, 256),
        (False, False, True, 256),
    ],
)
def test_chunks_are_half_as_large_where_only_dx_is_filtered(
    train_hidden, train_head, filter_head_grad, want, monkeypatch
):
    """24 MiB are 256 rows of 49,152 words."""
    monkeypatch.setattr("cpo_kernels.head.inputs.own_sums", lambda *_: True)
    monkeypatch.setattr("cpo_kernels.head.strategy.own_sums", lambda *_: True)
    monkeypatch.setattr(dispatch, "cpu_has_tiles", lambda: False)
    made, head = [], Head.__init__

    def watched(self, *args):
        head(self, *args)
        made.append(self.buffer.shape[0])

    monkeypatch.setattr(Head, "__init__", watched)
    hidden = torch.randn(600, 2).bfloat16().requires_grad_(train_hidden)
    weight = (9 * torch.randn(49152, 2)).bfloat16().requires_grad_(train_head)
    options = {"filter_eps": "auto", "filter_head_grad": filter_head_grad}
    cpo.linear_token_logps(hidden, weight, torch.arange(600), **options)
    given = {"loss": "unknown", "train_hidden": train_hidden, "train_head": train_head}
    assert made == [cpo.explain(600, 2, 49152, **given, **options).chunk_rows] == [want]


@pytest.mark.parametrize("hidden_size", [strategy.MADE_COLUMNS, strategy.MADE_COLUMNS + 2])
@pytest.mark.parametrize("count", [1, 3])
def test_explain_knows_whether_live_gradients_are_stored(hidden_size, count, monkeypatch):
    """Two sets of a frozen head in one chunk: they are stored if threads share a set, or H is large."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, hidden_size, generator=g).bfloat16()
    if not dispatch.own_matmuls(dispatch.kernels("auto", weight), weight):
        pytest.skip("the CPU kernels' own matmuls need AVX512_BF16")
    labels = torch.randint(VOCAB, (256,), generator=g)
    noise = torch.randn(256, hidden_size, generator=g)
    hidden = (0.01 * weight[labels] + 0.05 * noise).bfloat16().requires_grad_()
    room, given = LiveDx._room, []

    def watched(self, rows, size):
        given.append(room(self, rows, size).fill_(torch.nan))
        return given[-1]

    monkeypatch.setattr(LiveDx, "_room", watched)
    with threads(count):
        out = nll_shares(hidden, weight, labels, filter_eps=0.02)
        args = {"loss": "nll", "train_head": False, "filter_eps": 0.02}
        live, none = (
            cpo.explain(256, hidden_size, VOCAB, live_share=share, **args) for share in (float(out.live_share), 0.0)
        )
    assert 0.1 < float(out.live_share) < 0.5 and float(out.exact_share) == 0.0
    assert len(given) == (hidden_size > strategy.MADE_COLUMNS or count > 2)
    assert all(not room.isnan().any() for room in given)
    planned = live.extra_bytes - none.extra_bytes
    assert planned == pytest.approx(2 * sum(room.numel() for room in given), rel=0.05)


EXPLAINED = {  # loss, train_head, filter_head_grad
    "nll": ("nll", True, False),
    "pairs": ("preference", True, False),
    "kept": ("unknown", True, False),
    "recompute": ("unknown", True, False),
    "frozen": ("nll", False, False),
    "live": ("nll", True, True),
}


@pytest.mark.parametrize("count, few", [(100, 128), (280, 128), (300, 128), (600, 256)])
@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_has_the_chunks_of_the_ops_and_what_waits(name, count, few, monkeypatch):
    """A budget of 144 rows (or all, where chunks are whole groups), pieces of `few` rows: chunks are whole sets."""
    loss, train_head, filter_head_grad = EXPLAINED[name]
    leaves, labels = rows(count, flat=slice(0, 0))
    labels[labels == -100] = 3
    limit = 640 if name in ("pairs", "kept") else 288 if few == 256 else 144
    monkeypatch.setitem(strategy.DEFAULT_BUDGET, "cpu", limit * VOCAB * 8)
    monkeypatch.setitem(strategy.SMALL, "cpu", (1, few))
    hidden, weight = leaves[0], leaves[1].detach().requires_grad_(train_head)
    options = {"filter_eps": 0.05, "filter_head_grad": filter_head_grad}
    made, waiting = [], [0]
    head, add, keep = Head.__init__, LiveDx.add, KeptSets.add

    def watched_head(self, *args):
        head(self, *args)
        made.append(self.buffer.shape[0])

    def watched(self, sets, *rest):
        held = [*(s for s, *_ in self.parts), sets]
        waiting.append(sum(s.g.numel() + s.tail.numel() for s in held))
        add(self, sets, *rest)

    def watched_kept(self, sets):
        keep(self, sets)
        waiting.append(self.used + sum(part.tail.numel() for part in self.parts))

    monkeypatch.setattr(Head, "__init__", watched_head)
    monkeypatch.setattr(LiveDx, "add", watched)
    monkeypatch.setattr(KeptSets, "add", watched_kept)
    if name == "pairs":
        loss_fn = cpo.FusedLinearCPOLoss(**options)
        live = loss_fn(hidden.view(2, -1, HIDDEN), weight, labels.view(2, -1), ref_logps=torch.zeros(2)).live_share
    elif loss == "unknown":
        cpo.linear_token_logps(hidden, weight, labels, **options)
        live = formula((*leaves[:2], torch.zeros(VOCAB)), labels, torch.ones(count), 0.05, 128)[-1][0]
    else:
        live = nll_shares(hidden, weight, labels, **options).live_share
    assert len(made) == 1
    given = {"dtype": torch.float64, "loss": loss, "train_head": train_head, "live_share": float(live)}
    plan = cpo.explain(count, HIDDEN, VOCAB, **given, **options)
    assert plan.strategy == name or count < few
    assert plan.num_chunks == -(-count // plan.chunk_rows)
    if name != "recompute":  # explained by its second pass
        assert (plan.chunk_rows, plan.logits_bytes) == (made[0], made[0] * VOCAB * 8)
    sums = count * (plan.strategy == "recompute" and plan.num_chunks > 1)  # dX of chunks
    rest = plan.extra_bytes - plan.logits_bytes - (count + sums) * HIDDEN * 8
    assert 0.8 * rest < max(waiting) * 8 < 1.2 * rest  # the sets differ
