"""The preference losses through every door against the oracle: fused with a trainable or frozen head, and alone."""

import itertools
import math
import re
from dataclasses import fields
from functools import partial

import pytest
import torch

import cpo_kernels as cpo
from cpo_kernels import LOSS_TYPES, Objective, reference
from cpo_kernels.losses.options import ALSO, OTHER_NAMES
from tests.support.heads import BACKENDS, make_batch, relative_error, true_seq_logps

ROW = 101 * 8  # bytes of one row of float64 logits of the default batch
OBJECTIVES = [Objective("helpfulness", 1, 5, weight=2.0, strength=0.5), Objective("honesty", 1, 5)]
NAN = float("nan")

# Loss types whose defaults raise need their option; the others run on defaults. One list with weights.
CASES = [
    *[{"loss_type": t} for t in LOSS_TYPES if t != "exo_pair"],
    {"loss_type": "exo_pair", "label_smoothing": 0.05},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": "sigmoid", "f_divergence": "js_divergence"},
    {"loss_type": "sigmoid", "f_divergence": "alpha_divergence", "f_alpha": 0.7},
    {"loss_type": "sigmoid", "tau": 0.7},
    {"loss_type": "hinge", "margin": 0.3},
]


def ratings(num_sequences, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(1, 6, (num_sequences, 2), generator=g).double()
    conditions = torch.randint(1, 6, (num_sequences // 2, 2), generator=g).double()
    conditions[0, 1] = NAN
    return {"scores": scores, "conditions": conditions}


def call_args(case, batch, rated):
    """(loss arguments, tensors) of a case."""
    types = [case["loss_type"]] if isinstance(case["loss_type"], str) else case["loss_type"]
    tensors = ratings(len(batch.labels)) if rated else {}
    if any(LOSS_TYPES[t].needs_reference for t in types):
        tensors["ref_logps"] = batch.ref_logps
    if "modpo" in types:
        tensors["margins"] = torch.linspace(-1, 1, len(batch.labels), dtype=torch.float64)
    return {"objectives": OBJECTIVES if rated else None, **case}, tensors


def true_loss(case, batch, rated, token_weights=None):
    """The oracle's loss, differentiable in hidden, weight and bias."""
    options, tensors = call_args(case, batch, rated)
    seq_logps = true_seq_logps(batch, token_weights)
    return cpo.preference_loss(seq_logps, lengths=batch.lengths(), impl="reference", **tensors, **options)


BUDGETS = pytest.mark.parametrize("budget", [None, 34 * ROW, 3 * ROW], ids=["one_chunk", "chunks", "two_pass"])


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
@BUDGETS
def test_fused_loss_and_gradients(case, budget, impl):
    check_loss_and_gradients(case, budget, impl)


@pytest.mark.parametrize("case", [CASES[0], {"loss_type": "aot"}, {"loss_type": ["simpo", "sft"]}], ids=str)
@pytest.mark.parametrize("budget", [None, 34 * ROW, 9 * ROW], ids=["one_chunk", "chunks", "two_pass"])
def test_fused_loss_and_gradients_in_triton(case, budget):
    """The kernels' own tests go through every type and option; here each strategy, seconds in the interpreter."""
    plan = cpo.FusedLinearCPOLoss(memory_budget=budget).plan(make_batch(8).labels, 101, torch.float64, device="cpu")
    assert plan.layout.strategy == ("two_pass" if budget == 9 * ROW else "pairs")
    check_loss_and_gradients(case, budget, "triton")


def check_loss_and_gradients(case, budget, impl):
    batch = make_batch(8)
    options, tensors = call_args(case, batch, rated=True)
    want = true_loss(case, batch, rated=True)
    upstream = torch.tensor(-1.3, dtype=torch.float64)
    want_grads = torch.autograd.grad(want.loss, batch.leaves, upstream)
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=budget, impl=impl, **options)
    for train_head in (True, False):
        weight, bias = (t if train_head else t.detach() for t in (batch.weight, batch.bias))
        seen = loss_fn(batch.hidden, weight, batch.labels, bias, **tensors)
        leaves = batch.leaves if train_head else batch.leaves[:1]
        grads = torch.autograd.grad(seen.loss, leaves, upstream)
        for name, value in zip(seen._fields, seen, strict=True):
            truth = getattr(want, name).double()
            finite = truth.isfinite()
            assert torch.equal(value.double()[~finite].isnan(), truth[~finite].isnan()), name
            assert relative_error(value[finite], truth[finite]) < 1e-10, name
            assert name == "loss" or not value.requires_grad, name
        for g, w in zip(grads, want_grads, strict=False):
            assert relative_error(g, w) < 1e-10


@pytest.mark.parametrize(
    "loss_type, impl", [*itertools.product(["sigmoid", "ipo", "sft", "aot"], BACKENDS), ("sigmoid", "triton")]
)
def test_gradcheck(loss_type, impl):
    """In Triton's interpreter along random directions, not for each element."""
    batch, fast = make_batch(4, 3, 4, 7, seed=2), impl == "triton"
    loss_fn = cpo.FusedLinearCPOLoss(loss_type=loss_type, impl=impl)
    ref = batch.ref_logps if LOSS_TYPES[loss_type].needs_reference else None

    def fused(hidden, weight, bias):
        return loss_fn(hidden, weight, batch.labels, bias, ref_logps=ref).loss

    torch.autograd.gradcheck(fused, batch.leaves, fast_mode=fast)
    seq_logps = true_seq_logps(batch).detach().requires_grad_()
    alone = cpo.CPOLoss(loss_type=loss_type, impl=impl)
    torch.autograd.gradcheck(lambda x: alone(x, ref_logps=ref, lengths=batch.lengths()).loss, seq_logps)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", [None, 20 * ROW])
def test_four_responses_give_six_pairs(train_head, budget):
    """Two prompts with four responses each: every response stands in three pairs; conditions per sequence."""
    batch = make_batch(8)
    pairs = torch.combinations(torch.arange(4))
    pairs = torch.cat([pairs, pairs + 4]).flip(1)
    scores = ratings(8)["scores"]
    scores[1, 0] = scores[6, 1] = NAN
    conditions = torch.tensor([[5.0, NAN], [1.0, 3.0]]).repeat_interleave(4, 0)
    kwargs = {"pairs": pairs, "scores": scores, "conditions": conditions, "ref_logps": batch.ref_logps}
    want = cpo.preference_loss(true_seq_logps(batch), objectives=OBJECTIVES, impl="reference", **kwargs)
    weight, bias = (t if train_head else t.detach() for t in (batch.weight, batch.bias))
    loss_fn = cpo.FusedLinearCPOLoss(OBJECTIVES, memory_budget=budget)
    seen = loss_fn(batch.hidden, weight, batch.labels, bias, **kwargs)
    leaves = batch.leaves if train_head else batch.leaves[:1]
    assert relative_error(seen.loss, want.loss) < 1e-12
    assert torch.equal(seen.order, want.order) and seen.order.unique().numel() > 1
    truth = torch.autograd.grad(want.loss, batch.leaves)
    for g, w in zip(torch.autograd.grad(seen.loss, leaves), truth, strict=False):
        assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("budget", [None, 20 * ROW, 9 * ROW, 1], ids=["one_chunk", "two", "each", "two_pass"])
def test_sequences_without_pair_or_label(budget):
    """Sequences 1 and 4 stand in no pair, 2 holds no label: log-probs of all, gradients of only the paired."""
    batch = make_batch(6)
    batch.labels[2] = -100
    pairs = torch.tensor([[5, 0], [3, 2]])
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=budget)
    seen = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, pairs=pairs, ref_logps=batch.ref_logps)
    truth = true_seq_logps(batch)
    want = cpo.preference_loss(truth, pairs, batch.ref_logps, impl="reference")
    assert relative_error(seen.seq_logps, truth) < 1e-12 and seen.seq_logps[2] == 0
    grads = torch.autograd.grad(seen.loss, batch.leaves)
    for g, w in zip(grads, torch.autograd.grad(want.loss, batch.leaves), strict=True):
        assert relative_error(g, w) < 1e-12
    assert not grads[0][[1, 2, 4]].any()


def test_no_pairs_at_all():
    batch = make_batch(2)
    pairs = torch.empty(0, 2, dtype=torch.int64)
    for weight in (batch.weight, batch.weight.detach()):
        out = cpo.FusedLinearCPOLoss()(batch.hidden, weight, batch.labels, pairs=pairs, ref_logps=batch.ref_logps)
        assert out.loss.item() == 0 and not torch.autograd.grad(out.loss, batch.hidden)[0].any()


def test_the_loss_orients_and_drops_ties_by_hand():
    """R by hand: pair 0 under (5, 1) prefers the second, pair 1 ties, pair 2 is not rated on both sides."""
    seq_logps = torch.tensor([-1.0, -2.0, -3.0, -2.5, -1.0, -4.0], dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    scores = torch.tensor([[1.0, 1], [5, 3], [4, 2], [4, 2], [NAN, NAN], [2, 2]])
    objectives = [Objective("helpfulness", 1, 5, weight=3.0), Objective("honesty", 1, 5, strength=2.0)]
    out = cpo.preference_loss(
        seq_logps, pairs, torch.zeros(6), scores, torch.tensor([[5.0, 1.0]] * 3), objectives, beta=0.5
    )
    assert out.value_gap[0].item() == pytest.approx((3 * -4 + 0) / 4 - (0 + 2 * -2) / 4)
    assert out.value_gap[1].item() == 0 and out.value_gap[2].isnan()
    assert out.order.tolist() == [-1, 0, 0]
    assert [int(n) for n in (out.num_pairs, out.num_ties, out.num_unrated)] == [1, 2, 1]
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(0.5)))  # beta * d = 0.5 * (-2 - -1)
    assert out.accuracy.item() == 0.0 and out.margin.item() == pytest.approx(-0.5)
    (grad,) = torch.autograd.grad(out.loss, seq_logps)
    slope = 0.5 / (1 + math.exp(-0.5))
    assert grad.tolist() == pytest.approx([slope, -slope, 0, 0, 0, 0])


def test_only_ties_give_zero_loss_and_gradient():
    batch = make_batch()
    scores = torch.ones(4, 2)
    out = cpo.FusedLinearCPOLoss(OBJECTIVES)(
        batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps, scores=scores
    )
    assert out.loss.item() == 0 and int(out.num_pairs) == 0 and int(out.num_ties) == 2
    assert not any(g.any() for g in torch.autograd.grad(out.loss, batch.leaves[:2]))


def test_packed_layout_equals_padded():
    batch = make_batch(4, 9)
    cu_seqlens = torch.tensor([0, 9, 18, 27, 36])
    loss_fn = cpo.FusedLinearCPOLoss()
    padded = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps)
    packed = loss_fn(
        batch.hidden.view(36, -1), batch.weight, batch.labels.view(36), batch.bias,
        ref_logps=batch.ref_logps, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    assert torch.equal(padded.loss, packed.loss)
    # Dropping the prompts from the packed rows changes nothing either.
    keep = batch.labels.view(36) != -100
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), batch.lengths().cumsum(0)])
    short = loss_fn(
        batch.hidden.view(36, -1)[keep], batch.weight, batch.labels.view(36)[keep], batch.bias,
        ref_logps=batch.ref_logps, cu_seqlens=offsets,
    )  # fmt: skip
    assert torch.equal(padded.seq_logps, short.seq_logps)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", [None, 3 * ROW])
def test_ref_hidden_equals_ref_logps(train_head, budget):
    batch, ref = make_batch(), make_batch(hidden=16, seed=9)
    ref.labels.copy_(batch.labels)
    ref_logps = true_seq_logps(ref).detach()
    weight = batch.weight if train_head else batch.weight.detach()
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=budget)
    want = loss_fn(batch.hidden, weight, batch.labels, ref_logps=ref_logps)
    seen = loss_fn(batch.hidden, weight, batch.labels, ref_hidden=ref.hidden, ref_weight=ref.weight, ref_bias=ref.bias)
    assert relative_error(seen.loss, want.loss) < 1e-12
    assert torch.autograd.grad(seen.loss, ref.leaves, allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", [None, 12 * ROW])
def test_ld_alpha_and_wpo_weighting(train_head, budget):
    batch = make_batch(8)
    lengths = batch.lengths()
    shared = torch.minimum(lengths[:4], lengths[4:]).repeat(2)[:, None]
    place = (batch.labels != -100).cumsum(1)
    weights = torch.where(place > shared, 0.3, torch.ones(1, dtype=torch.float64))
    weight, bias = (t if train_head else t.detach() for t in (batch.weight, batch.bias))
    leaves = batch.leaves if train_head else batch.leaves[:1]

    seen = cpo.FusedLinearCPOLoss(ld_alpha=0.3, memory_budget=budget)(
        batch.hidden, weight, batch.labels, bias, ref_logps=batch.ref_logps
    )
    want = cpo.preference_loss(true_seq_logps(batch, weights), ref_logps=batch.ref_logps, impl="reference")
    assert (weights == 0.3).any() and relative_error(seen.loss, want.loss) < 1e-12
    for g, w in zip(torch.autograd.grad(seen.loss, leaves), torch.autograd.grad(want.loss, batch.leaves), strict=False):
        assert relative_error(g, w) < 1e-12

    seen = cpo.FusedLinearCPOLoss(use_weighting=True, memory_budget=budget)(
        batch.hidden, weight, batch.labels, bias, ref_logps=batch.ref_logps
    )
    logits = batch.hidden @ batch.weight.t() + batch.bias
    logps = reference.token_logps(logits, batch.labels)
    aligned = (logps - (2 * logits.log_softmax(-1)).logsumexp(-1)) * (batch.labels != -100)
    wpo = (aligned.sum(1) / lengths).exp().detach()
    want = cpo.preference_loss(
        logps.sum(1), ref_logps=batch.ref_logps, pair_weights=wpo[:4] * wpo[4:], impl="reference"
    )
    assert relative_error(seen.loss, want.loss) < 1e-12
    for g, w in zip(torch.autograd.grad(seen.loss, leaves), torch.autograd.grad(want.loss, batch.leaves), strict=False):
        assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("loss_type", ["sigmoid", "orpo", ["sigmoid", "sft"]])
def test_accumulated_micro_batches_equal_one_batch(loss_type):
    """`num_pairs` and `chosen_tokens` are the global counts."""
    batch = make_batch(8)
    tensors = ratings(8)
    loss_fn = cpo.FusedLinearCPOLoss(OBJECTIVES, loss_type=loss_type)
    if loss_type == "orpo":
        batch.ref_logps = None
    whole = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps, **tensors)
    want = torch.autograd.grad(whole.loss, batch.leaves[1:])
    total, ref_logps, scores = 0.0, batch.ref_logps, tensors["scores"]
    won = torch.where(whole.order > 0, torch.arange(4), torch.arange(4, 8))[whole.order != 0]
    chosen_tokens = None if loss_type == "sigmoid" else float(batch.lengths()[won].sum())
    for half in range(2):
        rows = torch.tensor([2 * half, 2 * half + 1, 2 * half + 4, 2 * half + 5])
        out = loss_fn(
            batch.hidden[rows], batch.weight, batch.labels[rows], batch.bias,
            ref_logps=None if ref_logps is None else ref_logps[rows],
            scores=scores[rows], conditions=tensors["conditions"][2 * half : 2 * half + 2],
            num_pairs=float(whole.num_pairs), chosen_tokens=chosen_tokens,
        )  # fmt: skip
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item())
    for leaf, w in zip(batch.leaves[1:], want, strict=True):
        assert relative_error(leaf.grad, w) < 1e-12


@pytest.mark.parametrize("train_head", [True, False])
def test_grad_scaler_with_float16(train_head):
    """beta 1e-4 makes coefficients of 5e-5: scaled by 2^16 and back, float16 gradients keep three digits."""
    truth = make_batch(4, 33, 48, 101, bias=False)
    loss_fn = cpo.FusedLinearCPOLoss(beta=1e-4)

    def grads(batch, scale):
        weight = batch.weight if train_head else batch.weight.detach()
        loss = loss_fn(batch.hidden, weight, batch.labels, ref_logps=batch.ref_logps).loss
        leaves = (batch.hidden, batch.weight)[: 1 + train_head]
        return [g.double() / scale for g in torch.autograd.grad(loss * scale, leaves)]

    for seen, want in zip(grads(truth.to(torch.float16), 65536.0), grads(truth, 1.0), strict=True):
        assert relative_error(seen, want) < 3e-3


def test_seq_logps_keep_the_precision_of_long_sums():
    """200 float32 log-probs near -40: the float64 sum stored once, not a float32 running sum."""
    logps = -40 * torch.rand(200, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 0, 199, 200])
    sums = cpo.sequence_logps(logps, cu_seqlens)
    assert sums.tolist() == [0.0, float(logps[:199].double().sum().float()), float(logps[199])]
    means = cpo.sequence_logps(logps, cu_seqlens, average=True)
    assert means[0] == 0 and means[1] == (logps[:199].double().sum() / 199).float()
    leaf = logps.clone().requires_grad_()
    weights = torch.rand(200)
    upstream = torch.randn(3)
    (grad,) = torch.autograd.grad(cpo.sequence_logps(leaf, cu_seqlens, weights), leaf, upstream)
    assert torch.equal(grad, upstream[1:].repeat_interleave(torch.tensor([199, 1])) * weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "dpo"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"betta": 0.1}, "unknown option 'betta'; did you mean 'beta'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing does not apply to loss_type 'ipo'"),
        ({"loss_type": "bco_pair", "f_divergence": "forward_kl"}, "f_divergence does not apply"),
        ({"f_divergence": "kl"}, "f_divergence must be one of.*got 'kl'"),
        ({"f_alpha": 0.7}, "f_alpha only applies with"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting does not apply"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "one number per loss type"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"use_weighting": "no"}, "use_weighting must be True or False, got 'no'"),
        ({"ld_alpha": 2.0}, r"ld_alpha must be in \[0, 1\], got 2.0"),
        ({"simpo_gamma": 1.0}, "simpo_gamma does not apply to loss_type 'sigmoid'"),
        ({"objectives": []}, "objectives is empty"),
        ({"objectives": [OBJECTIVES[0], OBJECTIVES[0]]}, "is given 2 times; names must be unique"),
        ({"tie_margin": NAN}, "tie_margin must be finite, got nan"),
        ({"margin": NAN}, "margin must be finite, got nan"),
        ({"beta": float("inf")}, "beta must be finite, got inf"),
        ({"loss_weights": [NAN]}, "loss_weights must be finite, got nan"),
    ],
)
def test_options_that_would_be_ignored_raise(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cpo.FusedLinearCPOLoss(**options)
    with pytest.raises((ValueError, TypeError), match=message):
        cpo.CPOLoss(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logps": None}, "needs ref_logps"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps must have shape \[4\], got \[3\]"),
        ({"scores": torch.ones(4, 2)}, "scores and objectives go together: objectives are missing"),
        ({"conditions": torch.ones(2, 2)}, "conditions needs scores: give"),
        ({"pairs": torch.zeros(2, 3, dtype=torch.int64)}, r"int64 of shape \[P, 2\]"),
        ({"pairs": torch.tensor([[0, 1]]).int()}, r"got torch.int32 \(1, 2\): use pairs.long\(\)"),
        ({"ref_logps": torch.zeros(4, 9)}, r"shape \[4\], got \[4, 9\]: sum the token log-probs"),
        ({"pairs": torch.tensor([[0, 1], [0, 4]])}, r"pair 1 is \[0, 4\].*in \[0, 4\)"),
        ({"pairs": torch.tensor([[2, 2]])}, r"pair 0 is \[2, 2\]"),
        ({"pair_weights": torch.tensor([1.0, NAN])}, r"pair_weights must be finite, got nan at \[1\]"),
        ({"pair_betas": torch.tensor([-0.1, 1.0])}, r"pair_betas must be positive and finite, got -0.1.* at \[0\]"),
        ({"pair_betas": torch.tensor([0.0, 1.0])}, "pair_betas must be positive and finite, got 0.0"),
        ({"pair_weights": torch.ones(3)}, r"pair_weights must have shape \[2\], got \[3\]"),
        ({"num_pairs": 0.0}, "num_pairs must be positive and finite, got 0.0"),
        ({"num_pairs": float("inf")}, "num_pairs must be positive and finite, got inf"),
        ({"chosen_tokens": 5.0}, "chosen_tokens does not apply to loss_type sigmoid"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "packed hidden"),
        ({"ref_hidden": torch.zeros(4, 9, 24)}, "ref_logps or ref_hidden, not both"),
        ({"ref_weight": torch.zeros(101, 24)}, "only apply with ref_hidden"),
        ({"margins": torch.ones(4)}, "margins does not apply"),
    ],
)
def test_misuse_names_the_value(change, message):
    batch = make_batch(dtype=torch.float32)
    kwargs = {"ref_logps": batch.ref_logps, **change}
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        cpo.FusedLinearCPOLoss()(batch.hidden, batch.weight, batch.labels, **kwargs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scores": [[1.0, 2.0]] * 4}, r"scores must be a tensor, got list .*: use torch.tensor\(scores\)"),
        ({"scores": 3.0}, "scores must be a tensor, got float 3.0"),
        ({"ref_logps": [0.0] * 4}, r"ref_logps must be a tensor, got list .*: use torch.tensor\(ref_logps\)"),
        ({"pairs": [[0, 1]]}, r"pairs must be a tensor, got list \[\[0, 1\]\]: use torch.tensor\(pairs\)"),
        ({"scores": {"helpfulness": 3}}, "scores must be a tensor, got dict"),
        ({"scores": torch.ones(4)}, r"scores must have shape \[4, 2\], got \[4\]"),
        (
            {"conditions": torch.ones(2)},
            r"conditions must have shape \[3, 2\] or \[4, 2\], got \[2\]: use cond.*\(3, 2\)",
        ),
        (
            {"conditions": torch.ones(1, 2)},
            r"got \[1, 2\]: use conditions.expand\(3, 2\) for the same condition in every pair",
        ),
        ({"conditions": torch.ones(3)}, r"conditions must have shape \[3, 2\] or \[4, 2\], got \[3\]$"),
    ],
)
def test_misuse_of_ratings_names_the_value(change, message):
    pairs = torch.tensor([[0, 1], [2, 3], [0, 3]])
    given = {"pairs": pairs, "ref_logps": torch.zeros(4), "scores": torch.ones(4, 2), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        cpo.preference_loss(torch.zeros(4), objectives=OBJECTIVES, **given)
    with pytest.raises((ValueError, TypeError), match=message):
        batch = make_batch(dtype=torch.float32)
        cpo.FusedLinearCPOLoss(OBJECTIVES)(batch.hidden, batch.weight, batch.labels, **given)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("dpo", "DPO is 'sigmoid'"),
        ("DPO_loss", "DPO is 'sigmoid'"),
        ("cpo", "'contrastive_cpo', Controllable is 'sigmoid' with objectives"),
        ("CDPO", "'sigmoid' with objectives"),
        ("kto_pair", "cpo_kernels.FusedLinearKTOLoss"),
        ("kto", "cpo_kernels.kto_loss"),
        ("dpop", "['sigmoid', 'sft']"),
        ("odpo", "'sigmoid' with margin"),
        ("wpo", "use_weighting"),
        ("robust-dpo", "'robust'"),
        ("slic", "'hinge'"),
        ("simpo_", "did you mean 'simpo'?"),
        ("SIGMOID", "did you mean 'sigmoid'?"),
        (" sigmoid ", "did you mean 'sigmoid'?"),
        ("logsigmoid", "did you mean 'sigmoid'?"),
        ("ipo_pair", "did you mean 'ipo'?"),
        ("exo", "did you mean 'exo_pair'?"),
        ("apo", "did you mean 'apo_zero' or 'apo_down'?"),
        ("zzz", "'zzz'; one of sigmoid, hinge"),
        ("", "''; one of sigmoid, hinge"),
    ],
)
def test_an_unknown_loss_type_names_what_it_may_be(name, hint):
    for door in (cpo.CPOLoss, cpo.FusedLinearCPOLoss, cpo.LossOptions):
        for given in (name, ["sigmoid", name]):
            with pytest.raises(ValueError, match=re.escape(hint)) as error:
                door(loss_type=given)
            assert f"unknown loss_type {name!r}; " in str(error.value)


def test_other_names_of_loss_types_name_types_that_are_there():
    for name, text in OTHER_NAMES.items():
        assert name not in LOSS_TYPES
        words = set(re.findall(r"'(\w+)'", text)) | set(re.findall(r"with (\w+)", text))
        assert words and words <= {*LOSS_TYPES, *(f.name for f in fields(cpo.LossOptions))}, text
    assert set(ALSO.values()) <= OTHER_NAMES.keys()


HIDDEN, WEIGHT, LABELS = torch.randn(4, 9, 24), torch.randn(101, 24), torch.randint(101, (4, 9))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (WEIGHT, HIDDEN, LABELS),
            "got hidden (101, 24), weight (4, 9, 24), labels (4, 9), which fit (weight, hidden, labels)",
        ),
        ((WEIGHT, HIDDEN.flatten(0, 1), LABELS.flatten()), "which fit (weight, hidden, labels)"),
        ((LABELS, WEIGHT, HIDDEN), "which fit (labels, weight, hidden)"),
        ((HIDDEN, LABELS, WEIGHT), "which fit (hidden, labels, weight)"),
        ((WEIGHT, LABELS, HIDDEN), "which fit (weight, labels, hidden)"),
        ((LABELS, HIDDEN, WEIGHT), "which fit (labels, hidden, weight)"),
        ((HIDDEN, WEIGHT.t(), LABELS), "got (24, 101), which is [H, V]: use weight.t()"),
        ((HIDDEN[:, :-1], WEIGHT, LABELS), "hidden[:, :-1] and labels[:, 1:]"),
        ((HIDDEN, WEIGHT, LABELS[:, 1:]), "hidden[:, :-1] and labels[:, 1:]"),
        ((HIDDEN[0, :-1], WEIGHT, LABELS[0]), "hidden[:-1] and labels[1:]"),
        ((HIDDEN, WEIGHT, LABELS.float()), "labels must be int64, got torch.float32: use labels.long()"),
        ((HIDDEN, WEIGHT, LABELS[:3]), "labels must have shape (4, 9) to match hidden, got (3, 9)"),
    ],
)
def test_the_order_of_a_heads_arguments(arguments, message):
    kto = partial(cpo.FusedLinearKTOLoss(), desirable=LABELS[:, 0] > 50, kl=0.0, ref_logps=torch.zeros(4))
    doors = [cpo.FusedLinearCPOLoss(loss_type="simpo"), cpo.linear_nll, cpo.linear_token_logps, kto]
    for door in doors:
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            door(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.randint(101, (4, 9)), torch.randn(4, 9, 101)), "logits and labels are swapped"),
        ((HIDDEN, WEIGHT, LABELS), "for hidden states and a weight use linear_token_logps"),
        ((WEIGHT, HIDDEN, LABELS), "for hidden states and a weight use linear_token_logps"),
        ((torch.randn(4, 8, 101), LABELS), "logits[:, :-1] and labels[:, 1:]"),
        ((torch.randn(4, 9, 101), LABELS.float()), "labels must be int64, got torch.float32"),
    ],
)
def test_the_order_of_arguments_of_token_logps(arguments, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        cpo.token_logps(*arguments)


def test_value_gap_options_need_ratings():
    for options in ({"tau": 1.0}, {"margin": 0.5}):
        with pytest.raises(ValueError, match="needs scores: give"):
            cpo.preference_loss(torch.zeros(2), ref_logps=torch.zeros(2), **options)


def test_pairs_with_two_conditions_are_refused():
    batch = make_batch()
    conditions = torch.tensor([[1.0, 1], [2, 2], [1, 1], [3, 2]])
    with pytest.raises(ValueError, match=r"pair 1 \[1, 3\] have different conditions \[2.0, 2.0\] and \[3.0, 2.0\]"):
        cpo.FusedLinearCPOLoss(OBJECTIVES)(
            batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps,
            scores=torch.ones(4, 2), conditions=conditions,
        )  # fmt: skip


@pytest.mark.parametrize("number", [-float("inf"), float("inf"), 5.01, 0.0, 1e300, -3])
@pytest.mark.parametrize("name", ["scores", "conditions"])
def test_ratings_outside_their_scale_are_refused(name, number):
    """At every door, and by a plan before the step that it is for; NaN stays "none"."""
    scores, conditions = torch.full((4, 2), NAN).double(), torch.full((4, 2), NAN).double()
    tensors = {"scores": scores, "conditions": conditions}
    tensors[name][1::2, 1] = number
    batch = make_batch(dtype=torch.float32)
    loss, fused = cpo.CPOLoss(OBJECTIVES), cpo.FusedLinearCPOLoss(OBJECTIVES)
    inputs = (batch.hidden, batch.weight, batch.labels)
    planned = dict(vocab_size=101, dtype=torch.float32, device="cpu")
    doors = [
        lambda: cpo.preference_loss(torch.zeros(4), ref_logps=torch.zeros(4), objectives=OBJECTIVES, **tensors),
        lambda: loss(torch.zeros(4), ref_logps=torch.zeros(4), **tensors),
        lambda: fused(*inputs, ref_logps=batch.ref_logps, **tensors),
        lambda: fused.plan(batch.labels, **planned, **tensors),
        lambda: fused.plan(batch.labels, **planned, **tensors, all_positions=True),
        lambda: cpo.value(scores, conditions, OBJECTIVES),
    ]
    for door in doors:
        message = rf"{name}: {re.escape(str(float(number)))} at \[1, 1\] is outside \[1, 5\], .* objective 'honesty'"
        with pytest.raises(ValueError, match=message):
            door()
        tensors[name][1::2, 1] = 5.0
        door()
        tensors[name][1::2, 1] = number


def test_the_ends_of_a_scale_are_rounded_as_its_ratings_are():
    """0.1 and 0.7 are other numbers in 16, 32 and 64 bit; whole numbers and truth values are ratings as well."""
    tenths = [cpo.Objective("a", 0.1, 0.7)]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        scores = torch.tensor([[0.1], [0.7]], dtype=dtype)
        for given in (scores, scores.double() if dtype == torch.float32 else scores):
            out = cpo.preference_loss(torch.zeros(2), ref_logps=torch.zeros(2), scores=given, objectives=tenths)
            assert out.order.tolist() == [-1]
    for scores in (torch.tensor([[0], [1]]), torch.tensor([[False], [True]])):
        harmless = [cpo.Objective("harmlessness", 0, 1)]
        out = cpo.preference_loss(torch.zeros(2), ref_logps=torch.zeros(2), scores=scores, objectives=harmless)
        assert out.order.tolist() == [-1]


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match="lengths must be >= 0, got -3"):
        cpo.preference_loss(torch.zeros(2), loss_type="simpo", lengths=torch.tensor([4, -3]))


def test_conditions_of_as_many_pairs_as_sequences():
    """Three responses of two prompts and all their pairs: [6, K] is one row a pair, as the docstring says."""
    scores = torch.tensor([[1.0], [2], [3], [1], [2], [3]])
    levels = torch.tensor([[1.0], [1], [1], [5], [5], [5]])  # of the sequences
    pairs = torch.tensor([[0, 1], [3, 4], [0, 2], [3, 5], [1, 2], [4, 5]])
    helpful = [cpo.Objective("helpfulness", 1, 5)]
    given = dict(pairs=pairs, ref_logps=torch.zeros(6), scores=scores, objectives=helpful)
    out = cpo.preference_loss(torch.zeros(6), conditions=levels[pairs[:, 0]], **given)
    assert out.order.tolist() == [1, -1, 1, -1, 1, -1]


def test_odd_number_of_sequences_needs_pairs():
    with pytest.raises(ValueError, match="but 3 is odd"):
        cpo.preference_loss(torch.zeros(3), ref_logps=torch.zeros(3))


def test_16_bit_sequence_log_probs_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        cpo.preference_loss(torch.zeros(2, dtype=torch.bfloat16), ref_logps=torch.zeros(2))
