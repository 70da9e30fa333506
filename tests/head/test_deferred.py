"""One pair beyond the memory budget, in 3 products: dW is scaled when the coefficient of the pair is known."""

import pytest
import torch

import cpo_kernels as cpo
from cpo_kernels import LOSS_TYPES, Objective
from cpo_kernels.head import inputs
from cpo_kernels.losses.options import LossOptions
from tests.support.heads import BACKENDS, LOW_PRECISION, make_batch, relative_error, true_seq_logps

ROW = 101 * 8
OBJECTIVES = [Objective("helpfulness", 1, 5, weight=2.0, strength=0.5), Objective("honesty", 1, 5)]
RATED = {"scores": torch.tensor([[1.0, 2.0], [4.0, 2.0]]), "conditions": torch.tensor([[4.0, float("nan")]])}
CASES = [
    {},
    {"loss_type": "hinge"},
    {"loss_type": "exo_pair", "label_smoothing": 0.1},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "discopop"},
    {"loss_type": "aot"},
    {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.3, 0.7]},
    {"tau": 0.6, "objectives": OBJECTIVES},
    {"margin": 0.4, "objectives": OBJECTIVES},
    {"ld_alpha": 0.3},
    {"use_weighting": True},
]


def one_pair(dtype=torch.float64, **keys):
    batch = make_batch(2, 15, dtype=dtype, **keys)
    return batch, batch.ref_logps


def options_of(name, **more):
    smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    return LossOptions(loss_type=name, **smoothing, **more)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_table_says_whose_coefficients_are_opposite(name):
    """Both gradients of 64 pairs of different lengths, by the oracle."""
    g = torch.Generator().manual_seed(1)
    logps = -40 * torch.rand(128, generator=g, dtype=torch.float64)
    logps.requires_grad_()
    lengths = torch.randint(1, 30, (128,), generator=g)
    keys = (
        {"ref_logps": -40 * torch.rand(128, generator=g, dtype=torch.float64)}
        if LOSS_TYPES[name].needs_reference
        else {}
    )
    if name == "modpo":
        keys["margins"] = torch.linspace(-1, 1, 128, dtype=torch.float64)
    if LOSS_TYPES[name].needs_lengths:
        keys["lengths"] = lengths
    smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    out = cpo.preference_loss(logps, loss_type=name, impl="reference", **keys, **smoothing)
    (grad,) = torch.autograd.grad(out.loss, logps)
    first, second = grad.view(2, 64)
    assert torch.allclose(first, -second, rtol=1e-12, atol=0) == LOSS_TYPES[name].opposite == options_of(name).opposite
    if "f_divergence" in LOSS_TYPES[name].honours:
        assert not options_of(name, f_divergence="js_divergence").opposite


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_loss_and_gradients(impl, case, rows):
    batch, ref_logps = one_pair()
    rated = RATED if "objectives" in case else {}
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=rows * ROW, impl=impl, **case)
    assert loss_fn.plan(batch.labels, 101, torch.float64, device="cpu", **rated).layout.strategy == "deferred"
    frozen = cpo.FusedLinearCPOLoss(impl="reference", **case)  # another strategy, through the oracle's kernels
    want = frozen(batch.hidden, batch.weight.detach(), batch.labels, batch.bias.detach(), ref_logps=ref_logps, **rated)
    seen = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=ref_logps, **rated)
    for name, value in zip(seen._fields, seen, strict=True):
        assert relative_error(value.double().nan_to_num(), getattr(want, name).double().nan_to_num()) < 1e-10, name
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    one_chunk = cpo.FusedLinearCPOLoss(impl="reference", **case)
    whole = one_chunk(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=ref_logps, **rated)
    truth = torch.autograd.grad(whole.loss, batch.leaves, upstream)
    assert any(t.any() for t in truth)
    for _ in range(2):  # nothing saved is written
        grads = torch.autograd.grad(seen.loss, batch.leaves, upstream, retain_graph=True)
        for g, t in zip(grads, truth, strict=True):
            assert relative_error(g, t) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_tie_has_no_gradient_and_ratings_turn_the_pair(dtype):
    """In bfloat16 dW's sum takes its coefficient, 0 for the tie, with the last chunk."""
    batch, ref_logps = one_pair(dtype, bias=False)
    bound = 1e-11 if dtype == torch.float64 else 2e-2
    loss_fn = cpo.FusedLinearCPOLoss(OBJECTIVES, memory_budget=4 * ROW)
    tied = {"scores": torch.ones(2, 2)}
    for rated, order in ((tied, 0), (RATED, -1)):
        seen = loss_fn(batch.hidden, batch.weight, batch.labels, ref_logps=ref_logps, **rated)
        want = cpo.preference_loss(
            true_seq_logps(batch), ref_logps=ref_logps, objectives=OBJECTIVES, impl="reference", **rated
        )
        assert seen.order.tolist() == [order]
        for g, t in zip(*(torch.autograd.grad(o.loss, batch.leaves) for o in (seen, want)), strict=True):
            assert relative_error(g, t) < bound and bool(g.any()) == bool(order)


def test_a_sequence_in_no_pair_counts_for_nothing():
    batch = make_batch(3, 15)
    pairs = torch.tensor([[2, 0]])
    seen = cpo.FusedLinearCPOLoss(memory_budget=4 * ROW)(
        batch.hidden, batch.weight, batch.labels, batch.bias, pairs=pairs, ref_logps=batch.ref_logps
    )
    want = cpo.preference_loss(true_seq_logps(batch), pairs, batch.ref_logps, impl="reference")
    for g, t in zip(*(torch.autograd.grad(o.loss, batch.leaves) for o in (seen, want)), strict=True):
        assert relative_error(g, t) < 1e-11


@pytest.mark.parametrize("bias", [True, False])
def test_three_products(monkeypatch, bias):
    """The reference of the same head is a fourth, on its own rows."""
    batch, ref_logps = one_pair(torch.float32, bias=bias)
    ref = make_batch(2, 15, dtype=torch.float32, bias=bias, seed=4).hidden.detach()
    count, mm, addmm = [0], torch.mm, torch.addmm

    def counting(a, b, **kwargs):
        count[0] += a.shape[0] * a.shape[1] * b.shape[1]
        return mm(a, b, **kwargs)

    def adding(c, a, b, **kwargs):
        count[0] += a.shape[0] * a.shape[1] * b.shape[1]
        return addmm(c, a, b, **kwargs)

    monkeypatch.setattr(inputs.torch, "mm", counting)
    monkeypatch.setattr(inputs.torch, "addmm", adding)
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=5 * 101 * 4)
    for keys, products in (({"ref_logps": ref_logps}, 3), ({"ref_hidden": ref}, 4)):
        count[0] = 0
        loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, **keys).loss.backward()
        assert count[0] == products * int(batch.lengths().sum()) * 24 * 101


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_sixteen_bit_is_no_worse_than_naive(dtype, scale):
    """A coefficient of 1e-3 and a GradScaler's factor: root mean square over 4 batches of 5 chunks."""
    errors = {"dx": [0.0, 0.0], "dw": [0.0, 0.0]}
    for seed in range(4):
        batch = make_batch(2, 40, hidden=64, vocab=501, dtype=dtype, bias=False, seed=seed)
        exact = batch.to(torch.float64)
        keys = {"ref_logps": true_seq_logps(exact).detach().float() + torch.tensor([-3.0, 2.0])}
        truth = cpo.preference_loss(
            true_seq_logps(exact), beta=1e-3, impl="reference", ref_logps=keys["ref_logps"].double()
        )
        want = torch.autograd.grad(truth.loss * scale, exact.leaves)
        loss_fn = cpo.FusedLinearCPOLoss(beta=1e-3, memory_budget=16 * 501 * 2)
        ours = torch.autograd.grad(loss_fn(batch.hidden, batch.weight, batch.labels, **keys).loss * scale, batch.leaves)
        labels = batch.labels.clamp(min=0)[..., None]
        logps = torch.log_softmax((batch.hidden @ batch.weight.t()).float(), -1).gather(-1, labels).squeeze(-1)
        naive = cpo.preference_loss((logps * (batch.labels != -100)).sum(1), beta=1e-3, impl="reference", **keys)
        theirs = torch.autograd.grad(naive.loss * scale, batch.leaves)
        for name, t, a, b in zip(errors, want, ours, theirs, strict=True):
            for k, seen in enumerate((a, b)):
                errors[name][k] += float((seen.double() - t).norm() / t.norm()) ** 2 / 4
    for name, (ours, naive) in errors.items():
        assert ours**0.5 <= naive**0.5 + 1e-3, (name, ours**0.5, naive**0.5)


def test_what_is_not_opposite_or_not_alone_takes_two_passes():
    batch = make_batch(4, 15)
    labels = batch.labels
    for sequences, options in ((4, {}), (2, {"loss_type": "ipo"}), (2, {"f_divergence": "js_divergence"})):
        plan = cpo.FusedLinearCPOLoss(memory_budget=ROW, **options).plan(
            labels[:sequences], 101, torch.float64, device="cpu"
        )
        assert plan.layout.strategy == "two_pass"
    plan = cpo.explain(4096, 896, 151936, one_pair=True)
    assert (plan.strategy, plan.products) == ("deferred", 3)
    assert plan.extra_bytes > 4 * 896 * 151936  # the float32 dW
    assert cpo.explain(512, 896, 151936, one_pair=True).strategy == "pairs"
