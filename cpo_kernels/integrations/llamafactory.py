"""Our fused head in LLaMA-Factory: the stages pt, sft, dpo and kto of `run_exp`.

    with fuse():                                              # or: fused = fuse(); ...; fused.undo()
        run_exp(args)                                         # llamafactory.train.tuner

Data, losses, optimizers and metrics stay LLaMA-Factory's, computed from our token log-probs: 2 matrix products with a
frozen head (LoRA), 3 with a trainable one (4 if the logits exceed `memory_budget`), on labelled positions only. Where
LLaMA-Factory reads logits for another purpose, the run is refused before the model is loaded.

Written for LLaMA-Factory 0.9.5.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MethodType
from typing import Any

from llamafactory.train import tuner
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.kto.trainer import CustomKTOTrainer
from llamafactory.train.pt.trainer import CustomTrainer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from torch import Tensor

from cpo_kernels.integrations.conditioned import ld_weights
from cpo_kernels.integrations.fused_head import add_fused_head, check_options
from cpo_kernels.integrations.heads import causal_lm, head_layer

# What each pass of KTO takes from the batch: its own tensors, and those that the passes share.
KTO_OWN = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
KTO_SHARED = ("pixel_values", "image_sizes", "image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask")


def compute_loss(self: Any, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own loss, from our head."""
    return type(self).compute_loss(self, model, {**inputs, "fused_lm_head": True}, *args, **kwargs)


def dpo_forward(self: Any, model: Any, batch: Mapping[str, Tensor], is_ref_model: bool = False) -> dict[str, Tensor]:
    """`concatenated_forward`: the logits are their mean over each sequence, of which the trainer logs the mean."""
    out = model(**batch, fused_lm_head=True)
    logps, lengths, pairs = out.log_probs, out.label_mask.sum(1), len(out.log_probs) // 2
    if self.ld_alpha is not None and not is_ref_model:
        logps = logps * ld_weights(out.label_mask, lengths, self.ld_alpha)
    sums = logps.sum(1)
    means = sums / lengths
    chosen, rejected = (means if self.loss_type in ("ipo", "orpo", "simpo") else sums).split(pairs)
    chosen_logits, rejected_logits = out.sequence_mean_logits.split(pairs)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "chosen_logps_avg": means[:pairs],
    }


def kto_forward(self: Any, model: Any, batch: Mapping[str, Tensor], prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """`forward`: the logits are their sum over each sequence, of which the trainer logs the sum."""
    inputs = {name: batch[prefix + name] for name in KTO_OWN if prefix + name in batch}
    inputs |= {name: batch[name] for name in KTO_SHARED if name in batch}
    labels = batch[f"{prefix}labels"]
    out = model(**inputs, labels=labels, fused_lm_head=True)
    logits = out.sequence_mean_logits * labels.shape[1] * head_layer(causal_lm(self.model)).out_features
    sums = out.log_probs.sum(1)
    return logits, sums, sums / out.label_mask.sum(1)


LOGGED = ("log_probs", "sequence_mean_logits")
# Trainer: the method that we replace, ours, the outputs that it needs.
TRAINERS: dict[Any, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    CustomTrainer: ("compute_loss", compute_loss, ("log_probs",)),
    CustomSeq2SeqTrainer: ("compute_loss", compute_loss, ("log_probs",)),
    CustomDPOTrainer: ("concatenated_forward", dpo_forward, LOGGED),
    CustomKTOTrainer: ("forward", kto_forward, LOGGED),
}


def construction(kind: Any, options: Mapping[str, Any]) -> Callable[..., None]:
    """`kind.__init__` that gives the models our head before they are wrapped, and the trainer the method that asks for
    it. So a trainer keeps its head after `undo`."""
    theirs, (name, ours, outputs) = kind.__init__, TRAINERS[kind]

    @functools.wraps(theirs)
    def init(self: Any, *, model: Any, **kwargs: Any) -> None:
        if name != "compute_loss" and getattr(type(self), name) is not getattr(kind, name):
            raise TypeError(f"{type(self).__name__} replaces {kind.__name__}.{name}, which fuse() replaces too")
        models = {id(m): m for m in (model, kwargs.get("ref_model")) if m is not None}
        for m in models.values():
            add_fused_head(causal_lm(m), outputs, **options)
        theirs(self, model=model, **kwargs)
        setattr(self, name, MethodType(ours, self))

    return init


def refuse(training: Any, finetuning: Any) -> None:
    """Raise for what does not go through the trainers of this module, or needs logits."""
    stage = finetuning.stage
    wrong = [] if stage in ("pt", "sft", "dpo", "kto") else [f"stage: {stage}"]
    names = ["use_mca", "use_hyper_parallel"]
    if stage == "sft":
        names += ["use_dft_loss", "use_eaft_loss", "use_asft_loss", "compute_accuracy"]
    wrong += [name for name in names if getattr(finetuning, name, False)]
    if stage in ("pt", "sft") and training.label_smoothing_factor:
        wrong.append("label_smoothing_factor")
    if wrong:
        raise ValueError(f"fuse() cannot serve {', '.join(wrong)}: leave that out, or run without fuse()")


class Fused(ExitStack):
    """An active replacement. `undo()`, or the end of a `with` block, reverts it; trainers keep the heads they got."""

    active = False
    undo = ExitStack.close

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def fuse(**options: Any) -> Fused:
    """From now on the stages pt, sft, dpo and kto train with our head, until `undo()` of the returned object.

    options: softcap, scale, memory_budget, impl, filter_eps, filter_head_grad, as `add_fused_head` takes them.

    Raises:
        ValueError, TypeError: an option; from `run_exp`, before it loads the model, a stage or an argument of
            LLaMA-Factory that needs logits; before training, a model that is not supported (see `heads`).
        RuntimeError: `fuse()` is active already.
    """
    check_options(**options)
    if Fused.active:
        raise RuntimeError("fuse() is active already: undo() it first")
    parse = tuner.get_train_args

    def checked(args: Any = None) -> Any:
        parsed = parse(args)
        refuse(parsed[2], parsed[3])
        return parsed

    def no_ray(*_: Any, **__: Any) -> None:
        raise ValueError("fuse() cannot serve USE_RAY: its workers are other processes. Use torchrun")

    fused = Fused()
    fused.replace(Fused, "active", True)
    fused.replace(tuner, "get_train_args", checked)
    fused.replace(tuner, "_ray_training_function", no_ray)
    for kind in TRAINERS:
        fused.replace(kind, "__init__", construction(kind, options))
    return fused
