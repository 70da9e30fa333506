"""Log-probs whose logits nobody reads again are computed without storing them (AMX)."""

import pytest
import torch

import cpo_kernels as cpo
from cpo_kernels.backends import dispatch
from cpo_kernels.head.inputs import Head
from cpo_kernels.head.strategy import UNSTORED_ROWS

amx = pytest.mark.skipif(not dispatch.cpu_has_tiles(), reason="this processor has no AMX")
ORDER = 1e-5  # of the sums, of logits up to 30


def head(rows: int, hidden: int = 64, vocab: int = 1100, seed: int = 0):
    """Hidden states, weight and labels, some of them ignored; logits up to 30, which bfloat16 rounds by 0.1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator).bfloat16()
    weight = (torch.randn(vocab, hidden, generator=generator) * 8 / hidden**0.5).bfloat16()
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::7] = -100
    return x, weight, labels


def exact(x, weight, labels, bias=None, scale=1.0, softcap=None, vocab_size=None):
    z = scale * (x.double() @ weight.double().T + (0 if bias is None else bias.double()))[:, :vocab_size]
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logp = torch.log_softmax(z, 1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return logp.masked_fill(labels == -100, 0.0)


@pytest.fixture
def no_logits(monkeypatch):
    """Storing logits is an error."""

    def stored(*_):
        raise AssertionError("logits were stored")

    monkeypatch.setattr(Head, "columns", stored)


def stored(x, weight, labels, **keys):
    """With gradients and all logits kept."""
    return cpo.linear_token_logps(x, weight.clone().requires_grad_(), labels, **keys).detach()


@amx
@pytest.mark.parametrize("rows", [1, 7, 300, 2 * UNSTORED_ROWS + 5])
def test_they_are_those_of_stored_logits(rows, no_logits, monkeypatch):
    x, weight, labels = head(rows)
    with torch.no_grad():
        got = cpo.linear_token_logps(x.requires_grad_(), weight.requires_grad_(), labels)
    monkeypatch.undo()
    assert got.dtype == torch.float32 and (got <= 0).all()
    assert (got - stored(x.detach(), weight.detach(), labels)).abs().max() < ORDER


@amx
@pytest.mark.parametrize(
    "keys", [{"scale": 0.5}, {"bias": True}, {"vocab_size": 1001}], ids=lambda keys: next(iter(keys))
)
def test_options(keys, no_logits, monkeypatch):
    x, weight, labels = head(90)
    keys, labels = dict(keys), torch.where(labels < 0, labels, labels % 1000)
    if "vocab_size" in keys:
        weight[keys["vocab_size"] :] = torch.nan
    if "bias" in keys:
        keys["bias"] = torch.randn(len(weight), generator=torch.Generator().manual_seed(1)).bfloat16()
    got = cpo.linear_token_logps(x, weight, labels, **keys)
    monkeypatch.undo()
    assert (got - stored(x, weight, labels, **keys)).abs().max() < ORDER
    assert (got - exact(x, weight[: keys.get("vocab_size")], labels, **keys)).abs().max() < 0.1


@amx
@pytest.mark.parametrize("grad", [True, False])
def test_a_saturated_row_has_log_prob_0(grad):
    weight = torch.zeros(600, 64, dtype=torch.bfloat16)
    weight[77, 0] = 30.0
    x = torch.ones(3, 64, dtype=torch.bfloat16) * 8
    weight.requires_grad_(grad)
    assert torch.equal(cpo.linear_token_logps(x, weight, torch.full((3,), 77)), torch.zeros(3))


@amx
def test_two_passes(monkeypatch):
    """The logits of the second pass have the constants of the first."""
    x, weight, labels = head(200)
    grads = []
    for unstored in (True, False):
        if not unstored:
            monkeypatch.setattr(dispatch, "unstored_logps", lambda *_: None)
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        logp = cpo.linear_token_logps(a, b, labels, memory_budget=40 * 1100 * 2)
        logp.backward(torch.linspace(-1, 1, 200))
        grads.append((logp.detach(), a.grad.float(), b.grad.float()))
    for new, old in zip(*grads, strict=True):
        assert (new - old).norm() < 2e-5 * old.norm()


@amx
def test_no_label_at_all():
    x, weight, labels = head(5)
    labels[:] = -100
    assert torch.equal(cpo.linear_token_logps(x, weight, labels), torch.zeros(5))


@amx
@pytest.mark.parametrize("case", ["softcap", "odd hidden size", "extras", "float32", "kept"])
def test_others_store_their_logits(case, monkeypatch):
    x, weight, labels = head(40, hidden=63 if case == "odd hidden size" else 64)
    keys, calls, columns = {"softcap": 20.0} if case == "softcap" else {}, [], Head.columns
    monkeypatch.setattr(Head, "columns", lambda self, *args: calls.append(1) or columns(self, *args))
    if case == "float32":
        x, weight = x.float(), weight.float()
    if case == "kept":
        weight.requires_grad_()
    got = cpo.linear_token_logps(x, weight, labels, extras=case == "extras", **keys)
    got = got[0] if case == "extras" else got
    assert calls
    assert (got.detach() - exact(x, weight.detach(), labels, **keys)).abs().max() < 0.1


def reference_case():
    x, weight, labels = head(120)
    return x.view(4, 30, -1), weight, labels.view(4, 30), head(120, seed=2)[0].view(4, 30, -1)


@amx
def test_a_reference_in_evaluation(no_logits, monkeypatch):
    x, weight, labels, ref = reference_case()
    out = cpo.FusedLinearCPOLoss(beta=0.1)(x, weight, labels, ref_hidden=ref)
    monkeypatch.undo()
    want = cpo.FusedLinearCPOLoss(beta=0.1)(x.clone().requires_grad_(), weight, labels, ref_hidden=ref)
    for name in ("chosen_rewards", "rejected_rewards", "loss"):
        assert (getattr(out, name) - getattr(want, name).detach()).abs().max() < 1e-4


@pytest.mark.parametrize("frozen", [True, False])
def test_a_reference_computed_before(frozen):
    """The loss of the first step is log 2: log-probs do not depend on whether there are gradients."""
    x, weight, labels, _ = reference_case()
    ref = cpo.linear_token_logps(x, weight, labels).sum(1)
    out = cpo.FusedLinearCPOLoss(beta=0.1)(
        x.clone().requires_grad_(), weight.requires_grad_(not frozen), labels, ref_logps=ref
    )
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_policy_that_is_its_reference_has_no_reward(frozen, grad):
    """Rounded alike: the loss of the first step of a training is log 2."""
    x, weight, labels, _ = reference_case()
    with torch.set_grad_enabled(grad):
        out = cpo.FusedLinearCPOLoss(beta=0.1)(
            x.clone().requires_grad_(), weight.requires_grad_(not frozen), labels, ref_hidden=x
        )
    assert not out.chosen_rewards.any() and not out.rejected_rewards.any()


@amx
def test_explain():
    plan = cpo.explain(5000, 896, 151936, train_hidden=False, train_head=False)
    assert (plan.strategy, plan.logits_bytes, plan.num_chunks) == ("forward", 0, 5)
    assert plan.extra_bytes < 20 << 20  # the columns from which the rows' constants come
    assert cpo.explain(5000, 897, 151936, train_hidden=False, train_head=False).logits_bytes > 0


@pytest.mark.parametrize("case", ["no AMX", "float16", "softcap", "odd hidden size"])
def test_whether_there_is_such_an_op(case, monkeypatch):
    monkeypatch.setattr(dispatch, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(dispatch, "cpu_has_tiles", lambda: case != "no AMX")
    weight = torch.empty(9, 7 if case == "odd hidden size" else 8, dtype=torch.bfloat16)
    weight = weight.half() if case == "float16" else weight
    softcap = 3.0 if case == "softcap" else 0.0
    kernels = dispatch.kernels("cpu", weight)
    assert dispatch.unstored_logps(kernels, weight, softcap) is None
    monkeypatch.setattr(dispatch, "cpu_has_tiles", lambda: True)
    assert dispatch.unstored_logps(kernels, torch.empty(9, 8, dtype=torch.bfloat16), 0.0) is kernels
    assert dispatch.unstored_logps(dispatch.kernels("reference", weight), weight, 0.0) is None
