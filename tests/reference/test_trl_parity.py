"""The oracle against TRL's own trainer code: loss, and gradient for every per-token log-prob.

TRL's `_compute_loss` runs unbound on a stub trainer whose model returns given log-probs; nothing of its arithmetic is
replaced. Ours goes from the same tokens through `sequence_logps` and `preference`. Quirks of TRL 1.16 that are tested
around, each marked where it matters:

- plain `sigmoid` and `sigmoid_norm` ignore label_smoothing (ours honour it);
- `alpha_divergence` has no clamp for float64 and fails (run in float32);
- `sft` with use_weighting writes into an expanded tensor and crashes for more than one pair (refused by ours);
- `hinge` with use_weighting multiplies relu's output in place, so its backward fails;
- ORPO's NLL includes the prompt (the stub hands the response's NLL to both sides).
"""

import os
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cpo_kernels import reference
from cpo_kernels.losses.options import check_options
from cpo_kernels.reference.loss_types import LOSS_TYPES
from cpo_kernels.reference.terms import F_DIVERGENCES, OPTION_DEFAULTS

pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

TRL_TYPES = list(LOSS_TYPES)[:15]
NONE = torch.empty(0)
PAIRS, WIDTH = 4, 9
LENGTHS = torch.tensor([3, 7, 5, 2, 6, 4, 5, 8])  # response tokens of [chosen; rejected]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Model(torch.nn.Module):
    """Returns given log-probs, 0 where a label is ignored, as TRL's fused head does."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs, log_sum_sq_probs=None):
        super().__init__()
        self.log_probs, self.log_sum_sq_probs = log_probs, log_sum_sq_probs

    def forward(self, input_ids, labels, **_):
        labelled = labels[:, 1:] != -100
        return SimpleNamespace(
            log_probs=self.log_probs * labelled,
            log_sum_sq_probs=self.log_sum_sq_probs,
            entropy=torch.zeros_like(self.log_probs),
            mean_logits=torch.zeros_like(self.log_probs),
            is_top1=labelled,
        )


class Accelerator:
    device = torch.device("cpu")

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather


def stub_trainer(model, ref_model, **settings):
    return SimpleNamespace(
        model=model,
        ref_model=ref_model,
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def sample(dtype, pairs=PAIRS):
    """Token log-probs of policy (a leaf) and reference `[2 pairs, WIDTH]`, log sum p^2, and TRL's inputs."""
    lengths = LENGTHS[: 2 * pairs]
    policy = (-3 * torch.rand(2 * pairs, WIDTH, dtype=dtype) - 0.1).requires_grad_()
    ref = policy.detach() + torch.randn(2 * pairs, WIDTH, dtype=dtype)
    log_sum_sq = -torch.rand(2 * pairs, WIDTH, dtype=dtype)
    position = torch.arange(WIDTH + 1)
    mask = (position >= 2) & (position < 2 + lengths[:, None])  # two prompt tokens, then the response, then padding
    input_ids = torch.ones(2 * pairs, WIDTH + 1, dtype=torch.long)
    inputs = {"input_ids": input_ids, "attention_mask": input_ids, "completion_mask": mask.long()}
    return policy, ref, log_sum_sq, inputs


def trl_loss(policy, ref, log_sum_sq, inputs, types, weights, beta=0.3, **settings):
    defaults = dict(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        label_smoothing=0.0,
        use_weighting=False,
    )
    model, ref_model = Model(policy, log_sum_sq), Model(ref)
    trainer = stub_trainer(
        model, ref_model, beta=beta, loss_types=types, loss_weights=weights, **{**defaults, **settings}
    )
    return DPOTrainer._compute_loss(trainer, model, inputs, False), trainer._metrics["train"]


def our_loss(policy, ref, log_sum_sq, inputs, types, weights, beta=0.3, ld_alpha=None, use_weighting=False, **options):
    """The same from packed tokens; returns the loss and the gradient for `policy`."""
    mask = inputs["completion_mask"][:, 1:].bool()
    lengths = mask.sum(1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    pairs = torch.arange(len(lengths)).view(2, -1).T
    token_weights = None if ld_alpha is None else reference.ld_token_weights(cu_seqlens, pairs, ld_alpha, policy.dtype)
    seq_logps = reference.sequence_logps(policy[mask], cu_seqlens, token_weights)
    ref_logps = reference.sequence_logps(ref[mask], cu_seqlens, token_weights)
    wpo = reference.wpo_pair_weights(policy[mask], log_sum_sq[mask], cu_seqlens, pairs) if use_weighting else NONE
    loss, losses, grad, chosen_rewards, rejected_rewards, *_ = reference.preference(
        seq_logps,
        ref_logps,
        lengths,
        pairs,
        *(NONE,) * 3,
        wpo,
        *(NONE,) * 2,
        [list(LOSS_TYPES).index(name) for name in types],
        weights,
        list({**OPTION_DEFAULTS, "beta": beta, **options}.values()),
        -1.0,
        -1.0,
    )
    (token_grad,) = torch.autograd.grad(seq_logps, policy, grad)
    return loss, token_grad, chosen_rewards, rejected_rewards


def assert_parity(data, types, weights, trl_settings=None, our_settings=None):
    theirs, metrics = trl_loss(*data, types, weights, **(trl_settings or {}))
    (their_grad,) = torch.autograd.grad(theirs, data[0])
    ours, our_grad, chosen_rewards, rejected_rewards = our_loss(*data, types, weights, **(our_settings or {}))
    assert their_grad.abs().max() > 1e-4  # a loss that learns nothing would agree with anything
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=1e-6)
    if any(LOSS_TYPES[name].needs_reference for name in types):  # only sft reports beta L here
        assert chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"][0], rel=1e-6)
        assert rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"][0], rel=1e-6)


def smoothing(types):
    """exo_pair must have label_smoothing; the others that TRL smooths get it too."""
    return {"label_smoothing": 0.07} if set(types) & {"exo_pair", "robust", "aot", "aot_unpaired"} else {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TRL_TYPES)
def test_every_type(name, dtype):
    options = smoothing([name])
    assert_parity(sample(dtype), [name], [1.0], options, options)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_trl_drops_label_smoothing(name):
    """Quirk: TRL accepts label_smoothing for these and ignores it; ours without it is the same, with it is not."""
    data = sample(torch.float64)
    assert_parity(data, [name], [1.0], {"label_smoothing": 0.2}, {})
    theirs, _ = trl_loss(*data, [name], [1.0], label_smoothing=0.2)
    assert (our_loss(*data, [name], [1.0], label_smoothing=0.2)[0] - theirs).abs() > 1e-3


@pytest.mark.parametrize(
    "types, weights",
    [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        (["exo_pair", "aot", "apo_zero"], [0.5, 2.0, 0.3]),
        (["ipo", "sigmoid_norm", "nca_pair", "sppo_hard"], [1.0, 0.1, 0.7, 0.01]),
    ],
)
def test_weighted_lists(types, weights):
    options = smoothing(types)
    check_options(types, set(options), options.get("label_smoothing", 0.0))
    assert_parity(sample(torch.float64), types, weights, options, options)


@pytest.mark.parametrize("divergence", F_DIVERGENCES[1:])
@pytest.mark.parametrize("name", [n for n in TRL_TYPES if "f_divergence" in LOSS_TYPES[n].honours])
def test_f_divergences(name, divergence):
    # quirk: TRL's alpha_divergence knows no float64
    data = sample(torch.float32 if divergence == "alpha_divergence" else torch.float64)
    options = smoothing([name])
    theirs = {"f_divergence_type": divergence, "f_alpha_divergence_coef": 0.7}
    ours = {"f_divergence": F_DIVERGENCES.index(divergence), "f_alpha": 0.7}
    assert_parity(data, [name], [1.0], {**theirs, **options}, {**ours, **options})


def test_f_divergences_of_the_table_are_trls():
    """The f-divergence types that TRL's constructor lists, except sft, which has no divergence to choose."""
    honouring = {n for n, loss in LOSS_TYPES.items() if "f_divergence" in loss.honours}
    assert honouring == {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", [n for n in TRL_TYPES if "ld_alpha" in LOSS_TYPES[n].honours])
def test_ld_alpha(name, ld_alpha):
    options = {"ld_alpha": ld_alpha, **smoothing([name])}
    assert_parity(sample(torch.float64), [name], [1.0], options, options)


@pytest.mark.parametrize("name", [n for n in TRL_TYPES if "use_weighting" in LOSS_TYPES[n].honours and n != "hinge"])
def test_use_weighting(name):
    options = {"use_weighting": True, **smoothing([name])}
    assert_parity(sample(torch.float64), [name], [1.0], options, options)


def test_use_weighting_of_hinge():
    """Quirk: TRL's backward fails, so only the loss is compared; the gradient is checked against the formula."""
    data = policy, ref, log_sum_sq, inputs = sample(torch.float64)
    theirs, _ = trl_loss(*data, ["hinge"], [1.0], use_weighting=True)
    ours, our_grad, *_ = our_loss(*data, ["hinge"], [1.0], use_weighting=True)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(theirs, policy)
    mask = inputs["completion_mask"][:, 1:]
    weight = (((policy - log_sum_sq) * mask).sum(1) / mask.sum(1)).detach().exp().view(2, -1).prod(0)
    ratio = ((policy - ref) * mask).sum(1).view(2, -1)
    loss = (weight * torch.relu(1 - 0.3 * (ratio[0] - ratio[1]))).mean()
    torch.testing.assert_close(our_grad, torch.autograd.grad(loss, policy)[0])


def test_use_weighting_of_sft():
    """Quirk: TRL crashes for several pairs; for one pair it weights the NLL, as a plain pair weight does here."""
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        trl_loss(*sample(torch.float64), ["sft"], [1.0], use_weighting=True)
    options = {"use_weighting": True}
    assert_parity(sample(torch.float64, pairs=1), ["sft"], [1.0], options, options)
    with pytest.raises(ValueError, match="use_weighting does not apply to loss_type 'sft'"):
        check_options(["sft"], {"use_weighting"})


# ---------------------------------------------------------------- reference-free types: trl.experimental


def assert_reference_free(name, options, trl_metrics, averaged):
    """`get_batch_loss_metrics` of TRL on given log-probs and token-mean NLL of the chosen responses."""
    policy, _, log_sum_sq, inputs = sample(torch.float64)
    mask = inputs["completion_mask"][:, 1:]

    def forward(model, batch):
        total = (policy * mask).sum(1)
        logps = total / mask.sum(1) if averaged else total
        nll = -total[:PAIRS].sum() / mask[:PAIRS].sum()
        logits = torch.zeros(PAIRS, 1)
        return *logps.chunk(2), logits, logits, nll

    trainer = SimpleNamespace(concatenated_forward=forward, accelerator=Accelerator(), aux_loss_enabled=False, beta=0.3)
    theirs, metrics = trl_metrics(trainer)
    (their_grad,) = torch.autograd.grad(theirs, policy)
    ours, our_grad, chosen_rewards, _ = our_loss(policy, policy.detach(), log_sum_sq, inputs, [name], [1.0], **options)
    assert their_grad.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs.detach().to(ours.dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=1e-6)
    if name != "alphapo":  # TRL reports the transformed reward there, ours stays beta L / n
        assert chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-6)


@pytest.mark.parametrize(
    "name, trl_type, settings, options",
    [
        ("simpo", "simpo", {"simpo_gamma": 0.7}, {"simpo_gamma": 0.7}),
        ("simpo", "simpo", {"simpo_gamma": 0.7, "label_smoothing": 0.1}, {"simpo_gamma": 0.7, "label_smoothing": 0.1}),
        ("alphapo", "simpo", {"simpo_gamma": 0.2, "alpha": 0.25}, {"simpo_gamma": 0.2, "alphapo_alpha": 0.25}),
        ("alphapo", "simpo", {"simpo_gamma": 0.2, "alpha": -0.5}, {"simpo_gamma": 0.2, "alphapo_alpha": -0.5}),
        ("contrastive_cpo", "sigmoid", {"cpo_alpha": 0.6}, {"nll_alpha": 0.6}),
        ("contrastive_cpo", "sigmoid", {"label_smoothing": 0.1}, {"nll_alpha": 0.0, "label_smoothing": 0.1}),
    ],
)
def test_contrastive_cpo_trainer(name, trl_type, settings, options):
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer

    def run(trainer):
        defaults = dict(loss_type=trl_type, alpha=0.0, cpo_alpha=0.0, label_smoothing=0.0)
        vars(trainer).update({**defaults, **settings})
        trainer.cpo_loss = partial(cpo_trainer.cpo_loss, trainer)
        return cpo_trainer.get_batch_loss_metrics(trainer, None, {})

    assert_reference_free(name, options, run, averaged=trl_type == "simpo")


def test_orpo_trainer():
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer

    def run(trainer):
        trainer.odds_ratio_loss = partial(orpo_trainer.odds_ratio_loss, trainer)
        return orpo_trainer.get_batch_loss_metrics(trainer, None, {})

    assert_reference_free("orpo", {}, run, averaged=True)


# ---------------------------------------------------------------- KTO


@pytest.mark.parametrize("shift", [0.5, -0.5])  # a positive reference point, and one clamped to 0
def test_kto_trainer(shift):
    policy, ref, _, inputs = sample(torch.float64)
    kl_policy = ref + shift
    desirable = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    inputs = {**inputs, "label": desirable, "KL_input_ids": inputs["input_ids"] * 2}
    inputs["KL_completion_mask"] = inputs["completion_mask"]
    inputs["KL_attention_mask"] = inputs["attention_mask"]

    class KTOModel(Model):
        def forward(self, input_ids, **kwargs):
            own = self.log_probs
            if input_ids[0, 0] == 2 and own is policy:  # the mismatched responses
                return Model(kl_policy)(input_ids, kwargs["labels"])
            return super().forward(input_ids, **kwargs)

    model, ref_model = KTOModel(policy), KTOModel(ref)
    trainer = stub_trainer(
        model,
        ref_model,
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.3,
        undesirable_weight=0.6,
    )
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, False)
    (their_grad,) = torch.autograd.grad(theirs, policy)

    mask = inputs["completion_mask"][:, 1:]
    seq_logps, ref_logps, kl_logps = ((x * mask).sum(1) for x in (policy, ref, kl_policy))
    kl = reference.kto_kl(kl_logps, ref_logps)
    assert kl.item() == pytest.approx(trainer._metrics["train"]["kl"][0])
    ours = reference.kto_loss(seq_logps, ref_logps, desirable, kl, 0.3, 1.3, 0.6).mean()
    (our_grad,) = torch.autograd.grad(ours, policy)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=1e-6)
