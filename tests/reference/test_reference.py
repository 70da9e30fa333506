"""The oracle against formulas written out by hand, finite differences, and extreme inputs."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from cpo_kernels import reference
from cpo_kernels.losses.options import check_options
from cpo_kernels.objectives import Objective, objectives_tensor
from cpo_kernels.reference.loss_types import LOSS_TYPES
from cpo_kernels.reference.pairs import pair_loss
from cpo_kernels.reference.terms import F_DIVERGENCES, OPTION_DEFAULTS, OPTIONS

IGNORE = -100
NONE = torch.empty(0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- token log-probs


def naive_logps(logits, labels, scale=1.0, softcap=None, vocab_size=None):
    """One row at a time, in Python floats."""
    out = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label == IGNORE:
            out.append(0.0)
            continue
        z = [scale * x if not softcap else softcap * math.tanh(scale * x / softcap) for x in row[:vocab_size]]
        top = max(z)
        out.append(z[label] - top - math.log(sum(math.exp(x - top) for x in z)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("n, v, vocab_size", [(5, 7, None), (5, 7, 6), (1, 1, None), (0, 4, None), (3, 33, 17)])
def test_token_logps(n, v, vocab_size, scale, softcap):
    logits = torch.randn(n, v, dtype=torch.float64) * 3
    labels = torch.randint(vocab_size or v, (n,))
    labels[1:2] = IGNORE
    logps = reference.token_logps(logits, labels, softcap=softcap, scale=scale, vocab_size=vocab_size)
    torch.testing.assert_close(logps, naive_logps(logits, labels, scale, softcap, vocab_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_logps_are_float32(dtype):
    logits = torch.randn(2, 3, 9).to(dtype)
    labels = torch.randint(9, (2, 3))
    logps = reference.token_logps(logits, labels)
    assert logps.dtype == torch.float32 and logps.shape == (2, 3)
    expected = naive_logps(logits.view(6, 9), labels.view(6)).view(2, 3)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)


def test_gradcheck_token_logps():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, IGNORE, 0, 4])
    assert gradcheck(lambda x: reference.token_logps(x, labels, IGNORE, 2.0, 0.7, 5), logits)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (6, 3), (6,)))
    assert gradcheck(lambda h, w, b: reference.linear_token_logps(h, w, labels, b, softcap=2.0), (hidden, weight, bias))


def test_ignored_rows_leak_nothing():
    logits = torch.randn(3, 5, dtype=torch.float64)
    logits[1] = math.nan
    logits.requires_grad_()
    logps = reference.token_logps(logits, torch.tensor([1, IGNORE, 4]))
    (grad,) = torch.autograd.grad((logps * torch.randn(3)).sum(), logits)
    assert logps[1] == 0 and torch.equal(grad[1], torch.zeros(5).double())
    assert logps.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize(
    "logits, label, expected",
    [
        ([-1e4] * 8, 3, -math.log(8)),
        ([1e4] + [0.0] * 7, 0, 0.0),
        ([1e4] + [0.0] * 7, 3, -1e4),
        ([-math.inf, 0.0, 0.0, -math.inf], 1, -math.log(2)),  # masked vocabulary
        ([-math.inf, 0.0, 0.0, -math.inf], 0, -math.inf),
        ([-3e38, -3e38], 1, -math.log(2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(logits, label, expected, dtype):
    logits = torch.tensor([logits], dtype=dtype)
    label = torch.tensor([label])
    v = logits.shape[1]
    logp, lse, extra = reference.token_logps_fwd(logits, label, IGNORE, 1.0, 0.0, v, True)
    assert logp.item() == pytest.approx(expected, rel=1e-6)
    entropy, log_sum_sq, _, is_top1 = extra[:, 0].tolist()
    probabilities = torch.softmax(logits[0].double(), 0)
    assert entropy == pytest.approx(-torch.xlogy(probabilities, probabilities).sum().item(), abs=1e-6)
    assert log_sum_sq == pytest.approx(probabilities.square().sum().log().item(), abs=1e-6)
    assert is_top1 == float(logits[0, label] == logits.max())
    onehot = torch.nn.functional.one_hot(label[0], v)
    fused = logits.clone()
    reference.token_logps_fused_(fused, label, IGNORE, 1.0, 0.0, v, False)
    torch.testing.assert_close(fused[0].double(), onehot - probabilities, rtol=1e-6, atol=1e-6)
    reference.token_logps_bwd_(logits, label, lse, torch.full_like(lse, 0.3), IGNORE, 1.0, 0.0, v)
    precision = 1e-6 + torch.finfo(dtype).eps * lse.abs().item()  # an lse of 1e4 has an ulp of 1e-3 in float32
    torch.testing.assert_close(logits[0].double(), 0.3 * (onehot - probabilities), rtol=precision, atol=precision)


def test_extras_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25, 9.0], [0.1, 0.2, 0.7, 9.0], [1.0, 1.0, 1.0, 1.0]]).double())
    labels = torch.tensor([0, 1, IGNORE])
    extra = reference.token_extras(logits, labels, vocab_size=3)
    entropy = [1.5 * math.log(2), -sum(p * math.log(p) for p in (0.1, 0.2, 0.7)), 0.0]
    log_sum_sq = [math.log(0.375), math.log(0.54), 0.0]
    mean = [math.log(0.5 * 0.25 * 0.25) / 3, math.log(0.1 * 0.2 * 0.7) / 3, 0.0]
    expected = torch.tensor([entropy, log_sum_sq, mean, [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(extra, expected)
    assert reference.token_extras(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)).shape == (4, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_backward_op_is_autograd(dtype, softcap):
    n, v, vocab_size, scale = 6, 11, 9, 0.5
    storage = torch.randn(n, v + 3).to(dtype)
    logits = storage[:, :v]  # row stride v + 3
    labels = torch.tensor([0, 8, IGNORE, 3, 4, 8])
    upstream = torch.randn(n).to(torch.float64 if dtype == torch.float64 else torch.float32)
    leaf = logits.double().requires_grad_()
    oracle = reference.token_logps(leaf, labels, IGNORE, softcap, scale, vocab_size)
    (expected,) = torch.autograd.grad(oracle, leaf, upstream.double())

    padding = storage[:, v:].clone()
    logp, lse, _ = reference.token_logps_fwd(logits, labels, IGNORE, scale, softcap, vocab_size, False)
    kept = logits.clone()
    reference.token_logps_bwd_(logits, labels, lse, upstream, IGNORE, scale, softcap, vocab_size)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(logp.double(), oracle.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)
    assert not logits[:, vocab_size:].any() and not logits[2].any()
    assert torch.equal(storage[:, v:], padding)

    fused = kept.clone()
    fused_logp, fused_lse, extra = reference.token_logps_fused_(fused, labels, IGNORE, scale, softcap, vocab_size, True)
    reference.token_logps_bwd_(kept, labels, lse, torch.ones_like(lse), IGNORE, scale, softcap, vocab_size)
    torch.testing.assert_close(fused, kept)
    assert torch.equal(fused_logp, logp) and torch.equal(fused_lse, lse)
    assert extra.shape == (4, n)


@pytest.mark.parametrize("label", [7, -1, 10**12])
def test_labels_out_of_range(label):
    logits = torch.zeros(2, 3, 9)
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = label
    with pytest.raises(ValueError, match=rf"label {label} at position \(1, 2\) is outside \[0, 7\)"):
        reference.token_logps(logits, labels, vocab_size=7)
    with pytest.raises(ValueError, match=rf"label {label} at position 5 is outside"):
        reference.token_logps_fused_(logits.view(6, 9), labels.view(6), IGNORE, 1.0, 0.0, 7, False)


# ---------------------------------------------------------------- sequences


def test_sequence_logps():
    logps, weights = torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    cu = torch.tensor([0, 4, 4, 9])  # the second sequence is empty
    expected = torch.stack([(logps * weights)[a:b].sum() for a, b in ((0, 4), (4, 4), (4, 9))])
    torch.testing.assert_close(reference.sequence_logps(logps, cu, weights), expected)
    average = reference.sequence_sum(logps, cu, weights, True)
    torch.testing.assert_close(average, expected / torch.tensor([4.0, 1.0, 5.0]))
    assert average[1] == 0
    assert torch.equal(reference.sequence_sum(NONE, torch.tensor([0, 0, 0]), NONE, True), torch.zeros(2))
    assert reference.sequence_sum(NONE, torch.tensor([0]), NONE, False).shape == (0,)
    assert gradcheck(lambda x: reference.sequence_logps(x, cu, weights, True), logps.requires_grad_())


def test_sequences_are_summed_in_float64():
    logps = torch.full((100_000,), -0.1)
    total = reference.sequence_logps(logps, torch.tensor([0, 100_000]))
    assert total.dtype == torch.float32
    assert total.item() == torch.tensor(100_000 * logps[0].double().item()).float().item()


def test_ld_token_weights():
    cu = torch.tensor([0, 3, 5, 9, 10])
    weights = reference.ld_token_weights(cu, torch.tensor([[0, 1]]), 0.25)
    assert weights.tolist() == [1, 1, 0.25, 1, 1] + [1] * 5  # sequences 2 and 3 stand in no pair
    weights = reference.ld_token_weights(cu, torch.tensor([[3, 2], [0, 1]]), 0.0, torch.float64)
    assert weights.tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"pair \d \[0, \d\] shares a response"):
        reference.ld_token_weights(cu, torch.tensor([[0, 1], [0, 2]]), 0.5)


def test_wpo_pair_weights():
    logps, log_sum_sq = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5, -0.5, -1.0])
    cu = torch.tensor([0, 2, 3, 3])
    weights = reference.wpo_pair_weights(logps.requires_grad_(), log_sum_sq, cu, torch.tensor([[0, 1], [2, 1]]))
    expected = torch.tensor([math.exp(-1.0) * math.exp(-2.0), 1.0 * math.exp(-2.0)], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad


# ---------------------------------------------------------------- loss types


def sample_pairs(n=5, dtype=torch.float64):
    chosen, rejected = -torch.rand(2, n, dtype=dtype) * 20 - 2
    ref_chosen, ref_rejected = (x + torch.randn(n, dtype=dtype) * 2 for x in (chosen, rejected))
    lengths = torch.randint(3, 12, (2, n))
    return dict(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        beta=0.3,
    )


def extra_options(name):
    return {"label_smoothing": 0.05} if "label_smoothing" in LOSS_TYPES[name].honours else {}


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_gradcheck_pair_loss(name):
    p = sample_pairs()
    leaves = [p.pop(k).requires_grad_() for k in ("chosen_logps", "rejected_logps")]
    margins = dict(chosen_margins=torch.randn(5).double(), rejected_margins=torch.randn(5).double())
    assert gradcheck(lambda w, x: pair_loss(name, w, x, **p, **margins, **extra_options(name)), leaves)


@pytest.mark.parametrize("divergence", range(1, len(F_DIVERGENCES)))
@pytest.mark.parametrize("name", [n for n, loss in LOSS_TYPES.items() if "f_divergence" in loss.honours])
def test_gradcheck_f_divergences(name, divergence):
    p = sample_pairs()
    leaves = [p.pop(k).requires_grad_() for k in ("chosen_logps", "rejected_logps")]
    assert gradcheck(lambda w, x: pair_loss(name, w, x, **p, f_divergence=divergence, **extra_options(name)), leaves)


def test_alpha_divergence_at_one_is_reverse_kl():
    p = sample_pairs()
    plain = pair_loss("sigmoid", **p)
    torch.testing.assert_close(pair_loss("sigmoid", **p, f_divergence=3, f_alpha=1.0), plain, rtol=0, atol=0)
    torch.testing.assert_close(pair_loss("sigmoid", **p, f_divergence=3, f_alpha=1.001), plain, rtol=2e-2, atol=0)


def logsig(x):
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    "name, options, formula",
    [
        ("simpo", {"simpo_gamma": 0.7}, lambda w, x, a, b: -logsig(0.3 * (w / a - x / b) - 0.7)),
        (
            "alphapo",
            {"alphapo_alpha": 0.25, "simpo_gamma": 0.1},
            lambda w, x, a, b: -logsig(0.3 * (math.exp(x / b) ** -0.25 - math.exp(w / a) ** -0.25) / 0.25 - 0.1),
        ),
        ("alphapo", {"alphapo_alpha": 0.0}, lambda w, x, a, b: -logsig(0.3 * (w / a - x / b) - 0.5)),
        (
            "contrastive_cpo",
            {"nll_alpha": 0.5},
            lambda w, x, a, b: -logsig(0.3 * (w - x)) - 0.5 * w * 3 / (4 + 2 + 9),
        ),
        ("contrastive_cpo", {"nll_alpha": 0.0}, lambda w, x, a, b: -logsig(0.3 * (w - x))),
        (
            "orpo",
            {"nll_alpha": 1.0},
            lambda w, x, a, b: (
                -0.3
                * logsig(
                    math.log(math.exp(w / a) / (1 - math.exp(w / a)))
                    - math.log(math.exp(x / b) / (1 - math.exp(x / b)))
                )
                - w * 3 / 15
            ),
        ),
        ("sft", {}, lambda w, x, a, b: -w * 3 / 15),
    ],
)
def test_reference_free_types_by_hand(name, options, formula):
    """Three pairs with 4, 2 and 9 chosen tokens, beta = 0.3; the reference must not matter."""
    rows = [(-5.0, -7.5, 4, 3), (-1.5, -0.4, 2, 5), (-12.0, -3.0, 9, 8)]
    w, x, a, b = (torch.tensor(column) for column in zip(*rows, strict=True))
    losses = pair_loss(
        name, w.double(), x.double(), w * 7, x * 5, chosen_lengths=a, rejected_lengths=b, beta=0.3, **options
    )
    torch.testing.assert_close(losses, torch.tensor([formula(*row) for row in rows], dtype=torch.float64))
    assert not LOSS_TYPES[name].needs_reference


def test_modpo_by_hand():
    losses = pair_loss(
        "modpo",
        torch.tensor([-5.0]),
        torch.tensor([-7.0]),
        torch.tensor([-6.0]),
        torch.tensor([-6.5]),
        beta=0.5,
        chosen_margins=torch.tensor([0.3]),
        rejected_margins=torch.tensor([0.1]),
        modpo_weight=0.4,
    )
    assert losses.item() == pytest.approx(-logsig((0.5 * (1.0 + 0.5) - 0.2) / 0.4), rel=1e-6)


def test_aot_reports_at_the_pair_that_holds_the_value():
    chosen, rejected = torch.tensor([-1.0, -5.0, -2.0]), torch.tensor([-4.0, -4.0, -4.0])  # ratios 3, -1, 2
    ref_chosen, ref_rejected = torch.tensor([-3.0, -3.0, -3.0]), torch.tensor([-3.5, -4.0, -3.0])  # 0.5, 1, 0
    losses = pair_loss("aot", chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    # sorted: policy -1, 2, 3 (pairs 1, 2, 0) against reference 0, 0.5, 1
    torch.testing.assert_close(losses, torch.tensor([-logsig(0.5 * x) for x in (3 - 1, -1 - 0, 2 - 0.5)]))
    # chosen ratios 2, -2, 1 (sorted: pairs 1, 2, 0), rejected ratios -0.5, 0, -1
    losses = pair_loss("aot_unpaired", chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([-logsig(0.5 * x) for x in (2 - 0, -2 + 1, 1 + 0.5)]))


@pytest.mark.parametrize("name", [n for n, loss in LOSS_TYPES.items() if {"tau", "margin"} <= loss.honours])
def test_soft_targets_and_margin(name):
    """q logsig(v) + (1 - q) logsig(-v), where v is read off the hard loss without margin."""
    p = sample_pairs()
    gap = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    extra = {"nll_alpha": 0.0} if name == "contrastive_cpo" else {}
    u = -torch.log(torch.expm1(pair_loss(name, **p, **extra)))  # the inverse of -logsig
    log_sigmoid = torch.nn.functional.logsigmoid
    q = torch.sigmoid(gap / 2.0)
    v = u - 0.1 * gap
    soft = pair_loss(name, **p, gap=gap, tau=2.0, margin=0.1, **extra)
    torch.testing.assert_close(soft, -q * log_sigmoid(v) - (1 - q) * log_sigmoid(-v))
    smooth = pair_loss(name, **p, gap=gap, label_smoothing=0.2, **extra)
    torch.testing.assert_close(smooth, -0.8 * log_sigmoid(u) - 0.2 * log_sigmoid(-u))


def test_hinge_margin():
    p = sample_pairs()
    u = 0.3 * (p["chosen_logps"] - p["ref_chosen_logps"] - p["rejected_logps"] + p["ref_rejected_logps"])
    gap = torch.rand(5).double()
    torch.testing.assert_close(pair_loss("hinge", **p, gap=gap, margin=0.7), torch.relu(1 - (u - 0.7 * gap)))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_extreme_log_ratios_stay_finite(name):
    """L = -8000 against a reference of -100, both ways round, and an empty response (L = 0, no tokens)."""
    far = torch.tensor([-8000.0, -100.0, 0.0, -50.0], dtype=torch.float64, requires_grad=True)
    near = torch.tensor([-100.0, -8000.0, -50.0, 0.0], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([40, 40, 0, 5]), torch.tensor([40, 40, 5, 0])
    ref = torch.full((4,), -100.0, dtype=torch.float64)
    for divergence in range(len(F_DIVERGENCES) if "f_divergence" in LOSS_TYPES[name].honours else 1):
        losses = pair_loss(
            name,
            far,
            near,
            ref,
            ref,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            f_divergence=divergence,
            **extra_options(name),
        )
        grads = torch.autograd.grad(losses.sum(), (far, near), allow_unused=True, materialize_grads=True)
        if name == "discopop" and divergence in (1, 3):
            continue  # exp(-beta delta) with delta = -exp(80): infinite by its definition
        assert losses.isfinite().all(), losses
        assert all(g.isfinite().all() for g in grads), grads


def test_every_type_has_formula_and_source():
    for name, loss in LOSS_TYPES.items():
        assert name in ("sft",) or "et al." in loss.formula, name


# ---------------------------------------------------------------- preference


def run_preference(
    seq_logps, pairs, loss_types=("sigmoid",), loss_weights=None, num_pairs=-1.0, chosen_tokens=-1.0, **k
):
    required = [k.pop(t, NONE) for t in ("ref_logps", "lengths")]
    rated = [k.pop(t, NONE) for t in ("scores", "conditions", "objectives")]
    per_pair = [k.pop(t, NONE) for t in ("pair_weights", "pair_betas", "margins")]
    options = {**OPTION_DEFAULTS, **k}
    assert list(options) == list(OPTIONS)
    out = reference.preference(
        seq_logps,
        *required,
        pairs,
        *rated,
        *per_pair,
        [list(LOSS_TYPES).index(t) for t in loss_types],
        loss_weights or [1.0] * len(loss_types),
        [float(v) for v in options.values()],
        num_pairs,
        chosen_tokens,
    )
    names = "loss losses grad chosen_rewards rejected_rewards value_gap order counts".split()
    return dict(zip(names, out, strict=True))


PAIRS = torch.tensor([[0, 1], [2, 3], [0, 2], [3, 1], [1, 2]])  # every response stands in several pairs
RATED = torch.tensor([[5, 3], [1, 4], [2, 2], [1, 4]], dtype=torch.float64)
OBJECTIVES = objectives_tensor([Objective("helpfulness", 1, 5, weight=2.5), Objective("honesty", 1, 5, strength=3.0)])


@pytest.mark.parametrize("names", [[n] for n in LOSS_TYPES] + [["sigmoid", "bco_pair", "sft"], ["simpo", "sft"]])
def test_preference_orders_pairs_and_differentiates(names):
    torch.manual_seed(1)
    logps = (-torch.rand(4).double() * 20 - 1).requires_grad_()
    ref, lengths = logps.detach() + torch.randn(4), torch.tensor([3, 7, 5, 6])
    conditions = torch.tensor([[math.nan, math.nan], [5, math.nan], [1, 3], [math.nan, 4], [2, 2]]).double()
    # 3.5 R: 2.5*5+3 > 2.5*1+4;  -2.5*3+2 > -2.5*4+4;  -2.5*4-3*0 < -2.5*1-3*1;  equal;  -2.5*1-3*2 < 0
    order = [1, 1, -1, 0, -1]
    won, lost, live = [0, 2, 2, 2], [1, 3, 0, 1], [0, 1, 2, 4]
    weights, betas = torch.rand(5).double() + 0.5, torch.rand(5).double() + 0.1
    pair_wise = not any(LOSS_TYPES[n].couples_batch for n in names)
    loss_weights = [0.7, 0.2, 1.3][: len(names)]
    options = {"label_smoothing": 0.1} if any(extra_options(n) for n in names) else {}

    out = run_preference(
        logps,
        PAIRS,
        names,
        loss_weights,
        ref_logps=ref,
        lengths=lengths,
        scores=RATED,
        conditions=conditions,
        objectives=OBJECTIVES,
        pair_weights=weights if pair_wise else NONE,
        pair_betas=betas if pair_wise else NONE,
        **options,
    )
    expected = sum(
        weight
        * pair_loss(
            name,
            logps[won],
            logps[lost],
            ref[won],
            ref[lost],
            chosen_lengths=lengths[won],
            rejected_lengths=lengths[lost],
            beta=betas[live] if pair_wise else 0.1,
            **options,
        )
        for weight, name in zip(loss_weights, names, strict=True)
    )
    expected = expected * (weights[live] if pair_wise else 1.0)
    (grad,) = torch.autograd.grad(expected.mean(), logps)
    assert out["order"].tolist() == order and out["counts"].tolist() == [4, 1, 0]
    torch.testing.assert_close(out["losses"][live], expected.detach())
    assert out["losses"][3] == 0
    torch.testing.assert_close(out["loss"], expected.mean().detach())
    torch.testing.assert_close(out["grad"], grad)

    beta = betas if pair_wise else 0.1
    reward = logps.detach()
    if any(LOSS_TYPES[n].needs_reference for n in names):
        reward = reward - ref
    elif any(LOSS_TYPES[n].averaged for n in names):
        reward = reward / lengths
    torch.testing.assert_close(out["chosen_rewards"], beta * reward[[0, 2, 2, 3, 2]])
    torch.testing.assert_close(out["rejected_rewards"], beta * reward[[1, 3, 0, 1, 1]])


def test_value_gaps_ties_and_unrated():
    scores = torch.tensor([[5.0, math.nan], [math.nan, 2.0], [3.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
    pairs = torch.tensor([[0, 1], [2, 3], [0, 2], [2, 1]])
    logps = torch.tensor([-1.0, math.nan, -3.0, -4.0])  # a pair that is a tie must not even read its log-probs
    out = run_preference(logps, pairs, scores=scores, objectives=OBJECTIVES)
    expected = torch.tensor([math.nan, 0.0, 2.0, 0.0])
    torch.testing.assert_close(out["value_gap"], expected, equal_nan=True)
    assert out["order"].tolist() == [0, 0, 1, 0] and out["order"].dtype == torch.int8
    assert out["counts"].tolist() == [1, 3, 1] and out["counts"].dtype == torch.int64
    assert out["loss"].item() == pytest.approx(-logsig(0.1 * 2.0), rel=1e-6)
    coefficient = 0.1 / (1 + math.exp(0.2))
    torch.testing.assert_close(out["grad"], torch.tensor([-coefficient, 0.0, coefficient, 0.0]))
    wide = run_preference(logps, pairs, scores=scores, objectives=OBJECTIVES, tie_margin=2.0)
    assert wide["order"].tolist() == [0, 0, 0, 0] and wide["loss"] == 0 and not wide["grad"].any()


def test_without_scores_the_first_is_chosen():
    out = run_preference(torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([[3, 0], [1, 2]]))
    assert out["order"].tolist() == [1, 1] and out["value_gap"].tolist() == [math.inf, math.inf]
    expected = torch.tensor([-logsig(-0.3), -logsig(0.1)])
    torch.testing.assert_close(out["losses"], expected)


def test_denominators():
    logps, lengths = torch.tensor([-4.0, -6.0, -8.0, -9.0]), torch.tensor([2, 3, 5, 4])
    pairs = torch.tensor([[0, 1], [2, 3]])
    own = run_preference(logps, pairs, ["sft"], lengths=lengths)
    assert own["loss"].item() == pytest.approx(12 / 7)  # the mean NLL of a chosen token
    torch.testing.assert_close(own["grad"], torch.tensor([-1 / 7, 0.0, -1 / 7, 0.0]))
    given = run_preference(logps, pairs, ["sft"], lengths=lengths, num_pairs=8.0, chosen_tokens=40.0)
    assert given["loss"].item() == pytest.approx(12 / 40)
    half = run_preference(logps, pairs, num_pairs=4.0)
    torch.testing.assert_close(half["loss"], run_preference(logps, pairs)["loss"] / 2)
    torch.testing.assert_close(half["grad"], run_preference(logps, pairs)["grad"] / 2)
    with pytest.raises(ValueError, match="give the lengths"):
        run_preference(logps, pairs, ["simpo"])


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("num_pairs", [-1.0, 0.0, 3.0])
def test_nothing_to_prefer(name, num_pairs):
    empty = run_preference(
        NONE, torch.empty(0, 2, dtype=torch.long), [name], num_pairs=num_pairs, **extra_options(name)
    )
    assert empty["loss"] == 0 and empty["losses"].shape == (0,) and empty["grad"].shape == (0,)
    ties = run_preference(
        torch.tensor([-1.0, -2.0]),
        torch.tensor([[0, 1]]),
        [name],
        num_pairs=num_pairs,
        lengths=torch.tensor([1, 2]),
        scores=torch.ones(2, 2).double(),
        objectives=OBJECTIVES,
        **extra_options(name),
    )
    assert ties["loss"] == 0 and not ties["grad"].any() and ties["counts"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_preference_in_modes_without_gradients(mode):
    logps = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    expected = run_preference(logps, torch.tensor([[0, 1]]))["grad"]
    with mode():
        out = run_preference(logps.clone(), torch.tensor([[0, 1]]))
    assert not out["grad"].requires_grad and torch.equal(out["grad"], expected)


# ---------------------------------------------------------------- KTO


def test_kto_by_hand():
    logps, ref = torch.tensor([-5.0, -7.0, -2.0]), torch.tensor([-6.0, -6.5, -2.0])
    desirable = torch.tensor([True, False, False])
    losses = reference.kto_loss(logps, ref, desirable, 0.4, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5 * (1.0 - 0.4), 0.5 * (0.4 + 0.5), 0.5 * 0.4)]
    expected = [2 * (1 - sigmoid[0]), 3 * (1 - sigmoid[1]), 3 * (1 - sigmoid[2])]
    torch.testing.assert_close(losses, torch.tensor(expected))
    assert reference.kto_kl(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])).item() == 0.25
    assert reference.kto_kl(torch.tensor([-2.0]), torch.tensor([-1.5])).item() == 0.0
    leaf = logps.double().requires_grad_()
    assert gradcheck(lambda x: reference.kto_loss(x, ref.double(), desirable, 0.4), leaf)


# ---------------------------------------------------------------- the options table


@pytest.mark.parametrize(
    "types, given, smoothing",
    [
        (["sigmoid"], {"label_smoothing", "margin", "pair_weights", "ld_alpha"}, 0.1),
        (["sigmoid", "bco_pair", "sft"], {"label_smoothing"}, 0.1),
        (["sigmoid", "sft"], {"tau", "f_divergence"}, 0.0),
        (["simpo", "sft"], {"simpo_gamma"}, 0.0),
        (["exo_pair"], {"label_smoothing"}, 1e-3),
        (["modpo"], {"margins", "modpo_weight"}, 0.0),
    ],
)
def test_options_that_are_honoured(types, given, smoothing):
    check_options(types, given, smoothing)


@pytest.mark.parametrize(
    "types, given, smoothing, message",
    [
        (["dpo"], set(), 0.0, "unknown loss_type 'dpo'; DPO is 'sigmoid'; one of sigmoid, hinge"),
        ([], set(), 0.0, "empty"),
        (["sigmoid"], {"gamma"}, 0.0, "unknown option 'gamma'"),
        (["sigmoid"], {"simpo_gamma"}, 0.0, "simpo_gamma does not apply to loss_type 'sigmoid'; it works with simpo"),
        (["ipo"], {"label_smoothing"}, 0.1, "label_smoothing does not apply to loss_type 'ipo'"),
        (["sigmoid", "nca_pair"], {"f_divergence"}, 0.0, "f_divergence does not apply to loss_type 'nca_pair'"),
        (["sft"], {"f_divergence"}, 0.0, "f_divergence does not apply to loss_type 'sft'"),
        (["sigmoid", "sft"], {"ld_alpha"}, 0.0, "ld_alpha does not apply to loss_type 'sft'"),
        (["aot"], {"pair_weights"}, 0.0, "pair_weights does not apply to loss_type 'aot'"),
        (["sigmoid", "aot_unpaired"], {"use_weighting"}, 0.0, "use_weighting does not apply"),
        (["sigmoid"], {"tau", "label_smoothing"}, 0.1, "both set the soft target"),
        (["robust"], {"label_smoothing"}, 0.5, "below 0.5 for 'robust'; got 0.5"),
        (["exo_pair"], set(), 0.0, "needs label_smoothing > 0"),
    ],
)
def test_options_that_are_refused(types, given, smoothing, message):
    with pytest.raises(ValueError, match=message):
        check_options(types, given, smoothing)
