"""Every public function, every argument, wrong values: a right answer or one clear error that names the argument.

`CALLS` holds a valid call of each public function; each argument is then replaced by each value of `WRONG`. What the
call then returns must be of the right dtype, what it raises a ValueError or TypeError that names an argument.
"""

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cpo_kernels as cpo
from tests.support.heads import make_batch

BATCH = make_batch(dtype=torch.float32)
OBJECTIVES = [cpo.Objective("helpfulness", 1, 5), cpo.Objective("honesty", 1, 5)]
SCORES = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 1.0], [2.0, 2.0]])
CONDITIONS = torch.tensor([[1.0, 5.0], [2.0, 2.0]])
PAIRS = torch.tensor([[0, 2], [1, 3]])
LOGITS = torch.randn(4, 9, 101, generator=torch.Generator().manual_seed(0))
HEAD = {"hidden": BATCH.hidden, "weight": BATCH.weight, "labels": BATCH.labels, "bias": BATCH.bias}
HEAD_OPTIONS = {"ignore_index": -100, "softcap": 5.0, "scale": 0.5, "vocab_size": 101, "memory_budget": 4000}
RATED = {"pairs": PAIRS, "ref_logps": BATCH.ref_logps, "scores": SCORES, "conditions": CONDITIONS}
RATED |= {"pair_weights": torch.ones(2), "pair_betas": torch.ones(2), "num_pairs": 2.0}
OPTIONS = {"objectives": OBJECTIVES, "beta": 0.1, "loss_type": "sigmoid", "tie_margin": 0.1, "margin": 0.1}
OPTIONS |= {"f_divergence": "reverse_kl", "loss_weights": [1.0], "label_smoothing": 0.1}
UNPAIRED = {"desirable": torch.tensor([True, False, True, True]), "kl": 0.5, "ref_logps": BATCH.ref_logps}
KTO_OPTIONS = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.6, "loss_type": "kto"}
KTO_OPTIONS |= {"average_log_prob": False}


def fused(**given):
    own = {name: given.pop(name) for name in list(given) if name in OPTIONS | HEAD_OPTIONS | {"impl": 0}}
    return cpo.FusedLinearCPOLoss(**own)(**given).loss


def fused_kto(**given):
    own = {name: given.pop(name) for name in list(given) if name in KTO_OPTIONS | HEAD_OPTIONS | {"impl": 0}}
    return cpo.FusedLinearKTOLoss(**own)(**given).loss


CALLS = {
    "token_logps": (
        cpo.token_logps,
        {"logits": LOGITS, "labels": BATCH.labels, "ignore_index": -100, "softcap": 5.0, "scale": 0.5,
         "vocab_size": 101, "impl": "auto"},
        (4, 9),
    ),
    "sequence_logps": (
        cpo.sequence_logps,
        {"token_logps": LOGITS[0, 0, :9], "cu_seqlens": torch.tensor([0, 4, 9]), "token_weights": torch.ones(9)},
        (2,),
    ),
    "linear_token_logps": (
        cpo.linear_token_logps,
        {**HEAD, **HEAD_OPTIONS, "index": (BATCH.labels.flatten() != -100).nonzero().squeeze(1), "impl": "auto"},
        (4, 9),
    ),
    "linear_nll": (
        cpo.linear_nll,
        {**HEAD, **HEAD_OPTIONS, "token_weights": torch.ones(4, 9), "num_tokens": 20.0, "impl": "auto"},
        (),
    ),
    "preference_loss": (
        lambda **given: cpo.preference_loss(**given).loss,
        {"seq_logps": BATCH.ref_logps + 0.5, **RATED, **OPTIONS, "lengths": BATCH.lengths(), "impl": "auto"},
        (),
    ),
    "FusedLinearCPOLoss": (fused, {**HEAD, **HEAD_OPTIONS, **RATED, **OPTIONS, "impl": "auto"}, ()),
    "FusedLinearKTOLoss": (
        fused_kto,
        {**HEAD, **HEAD_OPTIONS, **UNPAIRED, **KTO_OPTIONS, "num_sequences": 3.0, "impl": "auto"},
        (),
    ),
    "FusedLinearKTOLoss.kl": (
        cpo.FusedLinearKTOLoss().kl,
        {**HEAD, "ref_hidden": BATCH.hidden.detach() + 1, "cu_seqlens": None, "group": None},
        (),
    ),
    "kto_loss": (
        cpo.kto_loss,
        {"seq_logps": BATCH.ref_logps, "ref_logps": BATCH.ref_logps + 1, "kl": 0.5,
         "desirable": torch.tensor([True, False, True, True])},
        (4,),
    ),
    "kto_kl": (cpo.kto_kl, {"kl_logps": BATCH.ref_logps, "ref_kl_logps": BATCH.ref_logps + 1}, ()),
    "value": (cpo.value, {"scores": SCORES, "conditions": SCORES, "objectives": OBJECTIVES}, (4,)),
    "explain": (
        cpo.explain,
        {"num_tokens": 10, "hidden_size": 8, "vocab_size": 100, "dtype": torch.bfloat16, "device": "cpu",
         "loss": "preference", "group_tokens": 5, "memory_budget": 1000},
        None,
    ),
    "Objective": (cpo.Objective, {"name": "a", "low": 0, "high": 1, "weight": 1.0, "strength": 1.0}, None),
    "TagTemplate": (cpo.TagTemplate, {"objectives": OBJECTIVES, "pattern": "<{name}: {value}> "}, None),
}  # fmt: skip
NUMBERS = [math.nan, math.inf, -math.inf, 0, -1, 2**62, 1e300, True]
WRONG = [None, "text", b"bytes", [], [1, 2, 3], {}, object(), 1j, *NUMBERS]


def changed(tensor):
    """Other dtypes, shapes, devices and values of a tensor."""
    dtypes = (torch.float16, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64)
    yield from (tensor.detach().to(dtype) for dtype in dtypes if dtype != tensor.dtype)
    yield from (tensor[None], tensor[:0], tensor[:1], tensor[..., :1], torch.cat([tensor, tensor]), tensor.flatten())
    yield from (tensor.new_empty(()), tensor.detach().to("meta"), tensor.detach().to_sparse())
    values = (math.nan, math.inf, -math.inf, 1e30) if tensor.is_floating_point() else (-(2**62), 2**62, -7, 10**6)
    yield from (torch.full_like(tensor, value) for value in values)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_valid(name):
    function, valid, shape = CALLS[name]
    out = function(**valid)
    assert shape is None or (out.shape == shape and bool(out.isfinite().all()))
    if isinstance(out, torch.Tensor) and out.requires_grad:
        out.sum().backward()


def test_shapes_without_values():
    """Under FakeTensorMode, as make_fx and estimates of memory use it, nothing is read."""
    with FakeTensorMode():
        hidden, weight = torch.zeros(4, 9, 24, requires_grad=True), torch.zeros(101, 24)
        labels = torch.zeros(4, 9, dtype=torch.int64)
        assert cpo.linear_token_logps(hidden, weight, labels).shape == (4, 9)
        assert cpo.token_logps(torch.zeros(4, 9, 101), labels).shape == (4, 9)


def names_an_argument(message, valid, name):
    """The argument, or another one that does not fit to it any more; a pair or label by its number."""
    return any(word in message for word in (name, *valid, "pair 0", "label "))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", CALLS)
def test_wrong_values(function):
    call, valid, shape = CALLS[function]
    raised = 0
    for name, value in valid.items():
        for wrong in [*WRONG, *(changed(value) if isinstance(value, torch.Tensor) else [torch.zeros(3)])]:
            try:
                out = call(**{**valid, name: wrong})
            except (ValueError, TypeError) as error:
                assert names_an_argument(str(error), valid, name), f"{name}={wrong!r:.60}: {error}"
                raised += 1
            except RuntimeError as error:  # a kernel's own check, or torch's where a meta tensor is copied
                assert re.search("label|impl=|meta tensor|evice", str(error)), f"{name}={wrong!r:.60}: {error}"
                raised += 1
            else:
                assert shape is None or out.dtype in (torch.float32, torch.float64), f"{name}={wrong!r:.60}"
    assert raised > 10
