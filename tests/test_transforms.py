"""torch.func's transforms are refused by every public function; what they can run is the reference."""

import pytest
import torch
from torch import func
from torch.fx.experimental import proxy_tensor

import cpo_kernels as cpo
from cpo_kernels import reference
from tests.support.heads import make_batch, relative_error

BATCH = make_batch()
HIDDEN, WEIGHT, LABELS = BATCH.hidden.detach(), BATCH.weight.detach(), BATCH.labels
REF = {"ref_logps": BATCH.ref_logps}
OFFSETS = torch.tensor([0, 4, 9])
FUNCTIONS = {
    "token_logps": (lambda x: cpo.token_logps(x @ WEIGHT.t(), LABELS), HIDDEN),
    "sequence_logps": (lambda x: cpo.sequence_logps(x, OFFSETS), HIDDEN[0, :, 0]),
    "linear_token_logps": (lambda x: cpo.linear_token_logps(x, WEIGHT, LABELS), HIDDEN),
    "linear_nll": (lambda x: cpo.linear_nll(x, WEIGHT, LABELS), HIDDEN),
    "preference_loss": (lambda x: cpo.preference_loss(x, ref_logps=BATCH.ref_logps).loss, BATCH.ref_logps),
    "FusedLinearCPOLoss": (
        lambda x: cpo.FusedLinearCPOLoss()(x, WEIGHT, LABELS, ref_logps=BATCH.ref_logps).loss,
        HIDDEN,
    ),
    "FusedLinearKTOLoss": (
        lambda x: cpo.FusedLinearKTOLoss()(x, WEIGHT, LABELS, desirable=LABELS[:, 0] > 50, kl=0.0, **REF).loss,
        HIDDEN,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
def test_refused(name, transform):
    function, x = FUNCTIONS[name]
    function(x)
    with pytest.raises(RuntimeError, match="does not run under torch.func .*cpo_kernels.reference"):
        if transform == "jvp":
            func.jvp(function, (x,), (x,))
        else:
            kwargs = {"in_dims": 0} if transform == "vmap" else {}
            given = x[None] if transform == "vmap" else x
            getattr(func, transform)(lambda t: function(t).sum(), **kwargs)(given)


def test_the_reference_runs_under_grad():
    x = HIDDEN.clone().requires_grad_()
    (want,) = torch.autograd.grad(cpo.linear_token_logps(x, WEIGHT, LABELS).square().sum(), x)
    seen = func.grad(lambda t: reference.linear_token_logps(t, WEIGHT, LABELS).square().sum())(HIDDEN)
    assert relative_error(seen, want) < 1e-12


@pytest.mark.parametrize("traced", [func.vmap, lambda f: lambda x: proxy_tensor.make_fx(f)(x)(x)])
def test_value_is_plain_pytorch(traced):
    objectives, ratings = [cpo.Objective("a", 0, 1), cpo.Objective("b", 0, 1)], torch.rand(3, 2)
    assert torch.equal(traced(lambda x: cpo.value(x, None, objectives))(ratings), cpo.value(ratings, None, objectives))
