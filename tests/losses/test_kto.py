"""KTO from hidden states: against the plain composition in float64, Liger's fused loss, and misuse.

TRL's trainer: tests/integrations/test_trl_head.py.
"""

import re

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import cpo_kernels as cpo
from cpo_kernels import reference
from tests.support.heads import (
    BACKENDS,
    EVERY_BACKEND,
    LOW_PRECISION,
    count_products,
    make_batch,
    relative_error,
    true_seq_logps,
)
from tests.support.processes import run_processes

ROW = 101 * 8  # bytes of one row of float64 logits of the default batch
DESIRABLE = torch.tensor([True, False, True, True, False, False])
OPTIONS = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6}
# Sequences of 5 to 9 labelled rows: all at once, two at a time, each by itself, each in several chunks
BUDGETS = {"one_chunk": None, "two": 18 * ROW, "each": 9 * ROW, "pieces": 3 * ROW, "rows": 1}
HEADS = {"plain": {}, "softcap": {"softcap": 3.0, "scale": 0.25}, "padded": {"vocab_size": 97}}


def sample(seed=0, **sizes):
    """A batch whose references lie near its log-probs, some labels cut short: no loss is saturated."""
    batch = make_batch(6, seed=seed, **sizes)
    batch.labels[batch.labels >= 97] = 5
    noise = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch.ref_logps = true_seq_logps(batch).detach() + 3 * noise
    return batch


def composition(batch, average=False, head=None):
    """(losses [S], seq_logps [S]) of the oracle."""
    seq_logps, ref_logps = true_seq_logps(batch, **(head or {})), batch.ref_logps
    if average:
        seq_logps = seq_logps / batch.lengths().clamp(min=1)
    return reference.kto_loss(seq_logps, ref_logps, DESIRABLE, 0.7, **OPTIONS), seq_logps


def head_of(batch, train_head):
    """Weight and bias, and the leaves that train."""
    weight, bias = (t if train_head or t is None else t.detach() for t in (batch.weight, batch.bias))
    return weight, bias, batch.leaves if train_head else batch.leaves[:1]


def assert_close(seen, want, limit=1e-11):
    for s, w in zip(seen, want, strict=True):
        assert relative_error(s, w) < limit


# ---------------------------------------------------------------- values and gradients


def check(impl, budget, head, average=False, labelled=slice(None)):
    batch = sample()
    batch.labels[2] = -100
    if average:
        batch.ref_logps = batch.ref_logps / batch.lengths().clamp(min=1)
    losses, seq_logps = composition(batch, average=average, head=head)
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    want = torch.autograd.grad(losses.sum() / 4.5, batch.leaves, upstream)
    loss_fn = cpo.FusedLinearKTOLoss(**OPTIONS, **head, average_log_prob=average, memory_budget=budget, impl=impl)
    given = {"desirable": DESIRABLE, "kl": 0.7, "ref_logps": batch.ref_logps, "num_sequences": 4.5}
    for train_head in (True, False):
        weight, bias, leaves = head_of(batch, train_head)
        out = loss_fn(batch.hidden, weight, batch.labels, bias, **given)
        rewards = 0.3 * (seq_logps - batch.ref_logps)
        good, bad = rewards[DESIRABLE].mean(), rewards[~DESIRABLE].mean()
        truth = (losses.sum() / 4.5, losses, seq_logps, rewards, good, bad, good - bad, torch.tensor(0.7))
        assert_close(out[: len(truth) - 1], truth[:-1])
        assert out.kl.item() == pytest.approx(0.7)
        assert all(share.isnan() for share in (out.live_share, out.tail_mass, out.exact_share))
        assert [name for name, value in zip(out._fields, out, strict=True) if value.requires_grad] == ["loss"]
        assert_close(torch.autograd.grad(out.loss, leaves, upstream), want[: len(leaves)])
        assert not want[0][2].any()  # the sequence without labels has a loss and no gradient


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_loss_and_gradients(budget, head, impl):
    check(impl, BUDGETS[budget], HEADS[head])


@pytest.mark.parametrize("budget", ["one_chunk", "two", "pieces"])
def test_log_probs_per_token(budget):
    check("cpu", BUDGETS[budget], {}, average=True)


@pytest.mark.parametrize("budget", ["two", "pieces"])
def test_loss_and_gradients_in_triton(budget):
    check("triton", BUDGETS[budget], {})


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("rows", [100, 2])
def test_gradcheck(rows, impl):
    batch = make_batch(3, 3, 3, 7, seed=2)
    loss_fn = cpo.FusedLinearKTOLoss(**OPTIONS, impl=impl, memory_budget=rows * 7 * 8)
    ref_logps = true_seq_logps(batch).detach() + torch.tensor([1.0, -2.0, 0.5])

    def fused(hidden, weight, bias):
        given = {"desirable": DESIRABLE[:3], "kl": 0.4, "ref_logps": ref_logps}
        return loss_fn(hidden, weight, batch.labels, bias, **given).loss

    torch.autograd.gradcheck(fused, batch.leaves)


@pytest.mark.parametrize("train_head", [True, False])
def test_apo_zero_unpaired_as_trl_writes_it(train_head):
    batch = sample()
    d = 0.3 * (true_seq_logps(batch) - batch.ref_logps)
    want = torch.cat([1.3 * (1 - F.sigmoid(d[DESIRABLE])), 0.6 * F.sigmoid(d[~DESIRABLE])]).mean()
    weight, bias, leaves = head_of(batch, train_head)
    loss_fn = cpo.FusedLinearKTOLoss(**OPTIONS, loss_type="apo_zero_unpaired")
    out = loss_fn(batch.hidden, weight, batch.labels, bias, desirable=DESIRABLE, ref_logps=batch.ref_logps)
    assert relative_error(out.loss, want) < 1e-12 and out.kl == 0
    assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("what", ["trained", "frozen", "one product"])
def test_products(monkeypatch, what):
    """Multiply-adds of labelled rows: 3, 2 and 1 products; 4 of only a sequence that is longer than the budget."""
    batch, count = sample(dtype=torch.float32, bias=False), count_products(monkeypatch)
    lengths, one = batch.lengths(), 24 * 101
    weight = batch.weight.detach() if what == "frozen" else batch.weight
    limit = int(lengths.max()) - 1
    given = {"desirable": DESIRABLE, "kl": 0.0, "ref_logps": batch.ref_logps.float()}
    for budget, long in ((None, lengths[:0]), (limit * 101 * 4, lengths[lengths > limit])):
        count[0] = 0
        loss_fn = cpo.FusedLinearKTOLoss(memory_budget=budget)
        with torch.set_grad_enabled(what != "one product"):
            loss = loss_fn(batch.hidden, weight, batch.labels, **given).loss
        if loss.requires_grad:
            loss.backward()
        products = {"trained": 3, "frozen": 2, "one product": 1}[what]
        again = int(long.sum()) if what == "trained" else 0
        assert count[0] == (products * int(lengths.sum()) + again) * one
    assert 0 < len(long) < 6


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("budget", [None, 60 * 501 * 2, 20 * 501 * 2], ids=["one_chunk", "chunks", "pieces"])
@pytest.mark.parametrize("train_head", [True, False])
def test_other_dtypes(dtype, budget, train_head):
    """float32 to 1e-5; 16 bit no further from the truth than logits of the whole batch."""
    truth = sample(seed=3, length=33, hidden=48, vocab=501)
    truth.ref_logps = truth.ref_logps.float().double()
    losses, _ = composition(truth)
    want = [losses.mean(), *torch.autograd.grad(losses.mean(), head_of(truth, train_head)[2])]

    def errors(function):
        low = truth.to(dtype)
        weight, bias, leaves = head_of(low, train_head)
        loss = function(low, weight, bias)
        return [relative_error(s, w) for s, w in zip([loss, *torch.autograd.grad(loss, leaves)], want, strict=True)]

    def naive(low, weight, bias):
        logps = F.linear(low.hidden, weight, bias).float().log_softmax(-1)
        logps = logps.gather(-1, low.labels.clamp(min=0)[..., None]).squeeze(-1) * (low.labels != -100)
        return reference.kto_loss(logps.sum(1), low.ref_logps, DESIRABLE, 0.7, **OPTIONS).mean()

    def ours(low, weight, bias):
        loss_fn = cpo.FusedLinearKTOLoss(**OPTIONS, memory_budget=budget)
        given = {"desirable": DESIRABLE, "kl": 0.7, "ref_logps": low.ref_logps}
        return loss_fn(low.hidden, weight, low.labels, bias, **given).loss

    if dtype == torch.float32:
        assert max(errors(ours)) < 1e-5
    else:
        assert all(mine <= theirs + 1e-3 for mine, theirs in zip(errors(ours), errors(naive), strict=True))


@pytest.mark.parametrize("train_head", [True, False])
def test_grad_scaler_with_float16(train_head):
    """Coefficients of 1e-8 and less: scaled by 2^16 and back, float16 gradients keep three digits."""
    truth = sample(length=33, hidden=48)
    truth = truth.to(torch.float16).to(torch.float64)

    def grads(batch, scale):
        weight, bias, leaves = head_of(batch, train_head)
        loss_fn = cpo.FusedLinearKTOLoss(beta=1e-4)
        given = {"desirable": DESIRABLE, "kl": 0.5, "ref_logps": batch.ref_logps, "num_sequences": 1000}
        loss = loss_fn(batch.hidden, weight, batch.labels, bias, **given).loss
        return [g.double() / scale for g in torch.autograd.grad(loss * scale, leaves)]

    assert_close(grads(truth.to(torch.float16), 65536.0), grads(truth, 1.0), 3e-3)


def test_autocast_casts_as_a_linear_layer_would():
    batch = sample(dtype=torch.float32)
    loss_fn = cpo.FusedLinearKTOLoss()
    given = {"desirable": DESIRABLE, "ref_logps": batch.ref_logps}
    low = batch.to(torch.bfloat16)
    want = loss_fn(low.hidden, low.weight, low.labels, low.bias, kl=0.3, **given).loss
    with torch.autocast("cpu", torch.bfloat16):
        seen = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, kl=0.3, **given).loss
        kl = loss_fn.kl(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps - 9)
    assert torch.equal(seen, want) and kl.dtype == torch.float32
    assert torch.equal(kl, loss_fn.kl(low.hidden, low.weight, low.labels, low.bias, ref_logps=batch.ref_logps - 9))
    (got,) = torch.autograd.grad(seen, batch.weight)
    assert got.dtype == torch.float32 and torch.equal(got, torch.autograd.grad(want, low.weight)[0].float())


# ---------------------------------------------------------------- layouts, references, the reference point


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", ["one_chunk", "two", "pieces"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("own", [True, False], ids=["same head", "own head"])
def test_ref_hidden_equals_ref_logps(own, average, budget, train_head):
    batch, ref = sample(), sample(seed=9)
    weight, bias, leaves = head_of(batch, train_head)
    ref.labels.copy_(batch.labels)
    if own:
        ref.weight, ref.bias = batch.weight, batch.bias
    # Near enough to the policy that no loss is saturated.
    ref.hidden = (batch.hidden.detach() + 0.1 * ref.hidden.detach()).requires_grad_()
    ref_logps = true_seq_logps(ref).detach()
    ref_logps = ref_logps / batch.lengths() if average else ref_logps
    loss_fn = cpo.FusedLinearKTOLoss(beta=0.3, memory_budget=BUDGETS[budget], average_log_prob=average)
    given = {"desirable": DESIRABLE, "kl": 0.2}
    want = loss_fn(batch.hidden, weight, batch.labels, bias, ref_logps=ref_logps, **given)
    heads = {} if own else {"ref_weight": ref.weight, "ref_bias": ref.bias}
    seen = loss_fn(batch.hidden, weight, batch.labels, bias, ref_hidden=ref.hidden, **heads, **given)
    assert_close(seen[:-3], want[:-3], 1e-10)  # not the shares of a filter: NaN
    grads = (torch.autograd.grad(out.loss, leaves, retain_graph=True) for out in (seen, want))
    assert_close(*grads)
    assert torch.autograd.grad(seen.loss, ref.hidden, allow_unused=True) == (None,)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_the_reference_point(shift, average):
    """max(0, mean(L - ref)), without a gradient, from log-probs or from hidden states under the policy's own head."""
    batch, other = sample(), sample(seed=4)
    batch.ref_logps = true_seq_logps(batch).detach() - shift * torch.tensor([1.0, 2, -1, 3, 1, 1])
    lengths = batch.lengths()
    ref_logps = batch.ref_logps / lengths if average else batch.ref_logps
    loss_fn = cpo.FusedLinearKTOLoss(average_log_prob=average, memory_budget=7 * ROW)
    heads = batch.hidden, batch.weight, batch.labels, batch.bias
    kl = loss_fn.kl(*heads, ref_logps=ref_logps)
    difference = (true_seq_logps(batch) - batch.ref_logps).detach() / (lengths if average else 1)
    assert kl.shape == () and not kl.requires_grad
    assert kl.item() == pytest.approx(max(0.0, difference.mean().item())) and (kl > 0) == (shift > 0)
    packed = batch.hidden.flatten(0, 1), batch.weight, batch.labels.flatten(), batch.bias
    assert loss_fn.kl(*packed, ref_logps=ref_logps, cu_seqlens=torch.arange(7) * 9).item() == pytest.approx(kl.item())
    theirs = true_seq_logps(type(batch)(other.hidden, batch.weight, batch.bias, batch.labels, batch.ref_logps))
    difference = (true_seq_logps(batch) - theirs).detach() / (lengths if average else 1)
    seen = loss_fn.kl(*heads, ref_hidden=other.hidden)
    assert seen.item() == pytest.approx(max(0.0, difference.mean().item()))


def test_a_reference_point_gets_no_gradient():
    batch, kl = sample(), torch.tensor(0.3, requires_grad=True)
    given = {"desirable": DESIRABLE, "ref_logps": batch.ref_logps, "kl": kl}
    for train_head in (True, False):
        weight, bias, _ = head_of(batch, train_head)
        loss = cpo.FusedLinearKTOLoss()(batch.hidden, weight, batch.labels, bias, **given).loss
        assert torch.autograd.grad(loss, kl, allow_unused=True) == (None,)


def own_part(rank):
    """The reference point over both processes: 2 sequences here, 4 there; of a process without any; below 0."""
    batch, part = sample(), [slice(0, 2), slice(2, 6)][rank]
    loss_fn, points = cpo.FusedLinearKTOLoss(), []
    for rows, shift in ((part, -4), ([slice(0), slice(6)][rank], -4), (part, 4)):
        given = {"ref_logps": batch.ref_logps[rows] + shift, "group": dist.group.WORLD}
        points.append(loss_fn.kl(batch.hidden[rows], batch.weight, batch.labels[rows], batch.bias, **given))
    return points


@pytest.mark.distributed
def test_the_reference_point_over_processes():
    batch = sample()
    want = (true_seq_logps(batch) - batch.ref_logps + 4).mean().item()
    assert want > 0
    for points in run_processes(own_part, 2):
        assert [point.item() for point in points] == pytest.approx([want, want, 0.0])


@pytest.mark.parametrize("train_head", [True, False])
def test_packed_layout_equals_padded(train_head):
    batch = sample()
    weight, bias, _ = head_of(batch, train_head)
    loss_fn = cpo.FusedLinearKTOLoss()
    given = {"desirable": DESIRABLE, "kl": 0.1, "ref_logps": batch.ref_logps}
    padded = loss_fn(batch.hidden, weight, batch.labels, bias, **given)
    keep = batch.labels.flatten() != -100
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), batch.lengths().cumsum(0)])
    rows, labels = batch.hidden.flatten(0, 1)[keep], batch.labels.flatten()[keep]
    packed = loss_fn(rows, weight, labels, bias, cu_seqlens=offsets, **given)
    torch.testing.assert_close(padded, packed, rtol=0, atol=0, equal_nan=True)


def test_accumulated_micro_batches_equal_one_batch():
    batch = sample()
    loss_fn = cpo.FusedLinearKTOLoss(**OPTIONS)

    def loss(rows, **count):
        given = {"desirable": DESIRABLE[rows], "kl": 0.1, "ref_logps": batch.ref_logps[rows], **count}
        return loss_fn(batch.hidden[rows], batch.weight, batch.labels[rows], batch.bias, **given).loss

    whole, parts = loss(slice(None)), loss(slice(0, 2), num_sequences=6) + loss(slice(2, 6), num_sequences=6)
    assert relative_error(parts, whole) < 1e-14
    assert_close(torch.autograd.grad(parts, batch.leaves), torch.autograd.grad(whole, batch.leaves))


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_of_responses(kind, train_head):
    batch = sample()
    weight, bias, leaves = head_of(batch, train_head)
    desirable = torch.full((6,), kind)
    given = {"desirable": desirable, "kl": 0.4, "ref_logps": batch.ref_logps}
    out = cpo.FusedLinearKTOLoss(**OPTIONS)(batch.hidden, weight, batch.labels, bias, **given)
    want = reference.kto_loss(true_seq_logps(batch), batch.ref_logps, desirable, 0.4, **OPTIONS).mean()
    assert relative_error(out.loss, want) < 1e-12
    assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, leaves))
    there, absent = out.desirable_reward, out.undesirable_reward
    there, absent = (there, absent) if kind else (absent, there)
    assert there.isfinite() and absent.isnan() and out.margin.isnan()


@pytest.mark.parametrize("impl", EVERY_BACKEND)
@pytest.mark.parametrize("filters", [{}, {"filter_eps": 0.01}, {"filter_eps": 0.01, "filter_head_grad": True}])
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("own", [False, True], ids=["ref_logps", "ref_hidden"])
def test_no_labels_and_no_sequences(own, train_head, filters, impl):
    batch = sample()
    weight, bias, leaves = head_of(batch, train_head)
    loss_fn = cpo.FusedLinearKTOLoss(impl=impl, **filters)
    for rows, length in ((6, 9), (6, 0), (0, 9)):
        hidden = batch.hidden[:rows, :length]
        labels = torch.full((rows, length), -100)
        ref = {"ref_hidden": hidden.detach()} if own else {"ref_logps": torch.zeros(rows)}
        out = loss_fn(hidden, weight, labels, bias, desirable=DESIRABLE[:rows], kl=0.0, **ref)
        assert out.loss.item() == (0.5 if rows else 0.0)  # log-ratios of 0
        grads = torch.autograd.grad(out.loss, leaves)
        assert all(g.isfinite().all() and not g.any() for g in grads)


def test_saved_gradients_and_second_derivatives():
    batch = sample()
    given = {"desirable": DESIRABLE, "kl": 0.1, "ref_logps": batch.ref_logps}
    for train_head in (True, False):
        weight, bias, leaves = head_of(batch, train_head)
        loss = cpo.FusedLinearKTOLoss()(batch.hidden, weight, batch.labels, bias, **given).loss
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(loss, leaves, create_graph=True)
        loss.backward(retain_graph=True)
        first = [leaf.grad.clone() for leaf in leaves]
        (loss * -2).backward()
        assert_close([leaf.grad for leaf in leaves], [-g for g in first], 1e-14)
        batch.hidden.grad = None


@pytest.mark.parametrize("train_head", [True, False])
def test_two_runs_give_the_same_bits(train_head):
    batch = sample(length=33).to(torch.bfloat16)
    weight, bias, leaves = head_of(batch, train_head)
    loss_fn, runs = cpo.FusedLinearKTOLoss(memory_budget=40 * 101 * 2), []
    for _ in range(2):
        given = {"desirable": DESIRABLE, "kl": 0.1, "ref_logps": batch.ref_logps}
        out = loss_fn(batch.hidden, weight, batch.labels, bias, **given)
        runs.append([*out, *torch.autograd.grad(out.loss, leaves)])
    torch.testing.assert_close(*runs, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- Liger's


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_ligers_fused_kto(bias, average):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    batch = sample(dtype=torch.float32, bias=bias)
    ref_hidden = (batch.hidden * 0.9).detach()
    kl = torch.tensor(0.3)
    their_fn = chunked.LigerFusedLinearKTOLoss(
        beta=0.3, compiled=False, use_ref_model=True, average_log_prob=average, chunk_size=2
    )
    theirs, (good, bad, *_, good_reward, bad_reward) = their_fn(
        batch.hidden, batch.weight, batch.labels, batch.bias, DESIRABLE, ref_hidden, batch.weight.detach(),
        None if batch.bias is None else batch.bias.detach(), kl,
    )  # fmt: skip
    want = torch.autograd.grad(theirs, batch.leaves)
    loss_fn = cpo.FusedLinearKTOLoss(beta=0.3, average_log_prob=average)
    given = {"desirable": DESIRABLE, "kl": kl, "ref_hidden": ref_hidden}
    out = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, **given)
    assert_close([out.loss, *torch.autograd.grad(out.loss, batch.leaves)], [theirs, *want], 2e-5)
    sums = [x[kind].sum() for x in (out.seq_logps, out.rewards) for kind in (DESIRABLE, ~DESIRABLE)]
    assert_close(sums, [good, bad, good_reward, bad_reward], 2e-5)


# ---------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, "beta must be positive and finite, got 0.0"),
        ({"beta": "0.1"}, "beta must be a number, got str '0.1'"),
        ({"desirable_weight": -1.0}, "desirable_weight must be >= 0 and finite, got -1.0"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight must be >= 0 and finite, got nan"),
        ({"loss_type": "sigmoid"}, "one of kto, apo_zero_unpaired, got 'sigmoid': losses of pairs are"),
        ({"loss_type": ["kto"]}, r"one of kto, apo_zero_unpaired, got \['kto'\]"),
        ({"average_log_prob": 1}, "average_log_prob must be True or False, got 1"),
        ({"filter_eps": 2.0}, r"filter_eps must be None, 'auto' or a number in \(0, 1\), got 2.0"),
        ({"impl": "gpu"}, "impl"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cpo.FusedLinearKTOLoss(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"desirable": None}, "desirable must be a tensor, got NoneType"),
        ({"desirable": DESIRABLE.long()}, r"desirable must be bool, got torch.int64: use desirable.bool\(\)"),
        ({"desirable": DESIRABLE[:3]}, r"desirable must have shape \[6\], got \[3\]"),
        ({"kl": None}, r"needs kl, its reference point: see the method kl\(\), or give kl=0.0"),
        ({"kl": torch.zeros(6)}, r"kl must be one number, got shape \[6\]"),
        ({"kl": float("inf")}, "kl must be finite, got inf"),
        ({"kl": "0"}, "kl must be a number or tensor, got str '0'"),
        ({"ref_logps": None}, r"give ref_logps or ref_hidden; ref_logps=torch.zeros\(S\) for no reference model"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps must have shape \[6\], got \[3\]"),
        ({"ref_logps": torch.zeros(6, 9)}, r"shape \[6\], got \[6, 9\]: sum the token log-probs"),
        ({"ref_hidden": torch.zeros(6, 9, 24)}, "ref_logps or ref_hidden, not both"),
        ({"ref_weight": torch.zeros(101, 24)}, "only apply with ref_hidden"),
        ({"num_sequences": 0}, "num_sequences must be positive, got 0: leave it out to divide by S"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "packed hidden"),
        ({"labels": torch.full((6, 9), 101)}, "label 101 is out of range"),
    ],
)
def test_misuse_names_the_value(change, message):
    batch = sample(dtype=torch.float32)
    given = {"labels": batch.labels, "desirable": DESIRABLE, "kl": 0.1, "ref_logps": batch.ref_logps, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        cpo.FusedLinearKTOLoss()(batch.hidden, batch.weight, **given)


def test_a_reference_point_that_would_be_ignored():
    batch, loss_fn = sample(dtype=torch.float32), cpo.FusedLinearKTOLoss(loss_type="apo_zero_unpaired")
    heads, ref = (batch.hidden, batch.weight, batch.labels), {"ref_logps": batch.ref_logps}
    with pytest.raises(ValueError, match="'apo_zero_unpaired' has no reference point: remove kl"):
        loss_fn(*heads, desirable=DESIRABLE, kl=0.0, **ref)
    with pytest.raises(ValueError, match=re.escape("has no reference point: remove kl()")):
        loss_fn.kl(*heads, **ref)
    kto = cpo.FusedLinearKTOLoss()
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup, got str 'world'"):
        kto.kl(*heads, **ref, group="world")
    with pytest.raises(ValueError, match="not be empty"):
        kto.kl(batch.hidden[:0], batch.weight, batch.labels[:0], ref_logps=batch.ref_logps[:0])


def test_repr():
    assert repr(cpo.FusedLinearKTOLoss()) == "FusedLinearKTOLoss(beta=0.1, loss_type='kto')"
    shown = repr(cpo.FusedLinearKTOLoss(0.2, 2, softcap=30.0, impl="cpu"))
    assert shown == "FusedLinearKTOLoss(beta=0.2, desirable_weight=2.0, loss_type='kto', softcap=30.0, impl='cpu')"
