"""A training step of each trainer of TRL that asks for a fused head: TRL's head against ours, all else the same.

The batch holds tokens: GRPO and RLOO get completions and advantages, so that generation is not timed. The model is
where it started: every ratio to old log-probs is 1, and the references of DPO and KTO are given.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpo_kernels.bench.implementation import BETA, Family, Implementation, Outcome, Step
from cpo_kernels.bench.training_step import Batch, TrainingStep, apart, limits
from cpo_kernels.bench.trl_steps import WITH_TRL, arguments, pair_inputs, step, word_tokenizer

TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")


@dataclass(frozen=True)
class TrainerStep(TrainingStep):
    """trainer: one of TRAINERS. KTO calls every other response good; DPO takes the pairs of a group."""

    trainer: str = "sft"


def labelled(rows: list[tuple[tuple[int, ...], tuple[int, ...]]], device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask and completion_mask [S, T] of prompts and responses, padded on the right."""
    kinds = {
        "input_ids": [p + r for p, r in rows],
        "attention_mask": [(1,) * len(p + r) for p, r in rows],
        "completion_mask": [(0,) * len(p) + (1,) * len(r) for p, r in rows],
    }
    return {
        name: pad_sequence([torch.tensor(row) for row in kind], batch_first=True).to(device)
        for name, kind in kinds.items()
    }


def advantages(b: Batch) -> Tensor:
    """[S], of both signs, no two alike."""
    return torch.linspace(1.0, -0.5, len(b.input_ids), device=b.device)


def good(b: Batch) -> Tensor:
    """[S], KTO's labels."""
    return torch.arange(len(b.input_ids), device=b.device) % 2 == 0


def rows_of(b: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(prompt, response) for prompt, responses in b.groups for response in responses]


def sft_inputs(b: Batch, made: Any) -> dict[str, Any]:
    return {"input_ids": b.input_ids, "attention_mask": b.mask, "labels": b.labels}


def dpo_inputs(b: Batch, made: Any) -> dict[str, Any]:
    return dict(pair_inputs(b))


def kto_inputs(b: Batch, made: Any) -> dict[str, Any]:
    """With the mismatched pairs of KTO's KL term: the response of the row before."""
    rows = rows_of(b)
    mismatched = labelled([(p, rows[i - 1][1]) for i, (p, _) in enumerate(rows)], b.device)
    inputs: dict[str, Any] = labelled(rows, b.device) | {f"KL_{name}": value for name, value in mismatched.items()}
    inputs |= {"label": good(b), "ref_logps": b.ref_logps}
    return inputs | {"ref_KL_logps": made.compute_ref_log_probs(b.model, inputs)[1]}


def sampled_inputs(b: Batch, made: Any) -> dict[str, Any]:
    """Prompts padded on the left, completions on the right; old log-probs by the trainer's own head (RLOO)."""
    inputs: dict[str, Any] = {"advantages": advantages(b)}
    for k, (name, side) in enumerate((("prompt", "left"), ("completion", "right"))):
        tokens = [torch.tensor(row[k]) for row in rows_of(b)]
        for kind, values in (("ids", tokens), ("mask", [torch.ones_like(t) for t in tokens])):
            padded = pad_sequence(values, batch_first=True, padding_side=side)
            inputs[f"{name}_{kind}"] = padded.to(b.device)
    whole = [torch.cat([inputs[f"{part}_{kind}"] for part in ("prompt", "completion")], 1) for kind in ("ids", "mask")]
    mask = inputs["completion_mask"]
    with torch.no_grad():
        logps = made._get_per_token_logps_and_entropies(b.model, *whole, mask.shape[1])[0]
    return inputs | {"old_logps": (logps * mask).sum(1), "num_items_in_batch": mask.sum()}


INPUTS: dict[str, Callable[[Batch, Any], dict[str, Any]]] = {
    "sft": sft_inputs, "dpo": dpo_inputs, "kto": kto_inputs, "grpo": sampled_inputs, "rloo": sampled_inputs,
}  # fmt: skip
GIVEN = {"beta": BETA, "precompute_ref_log_probs": True}
SAMPLED = {"beta": 0.0, "num_generations": 2, "per_device_train_batch_size": 2, "temperature": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {"sft": {}, "dpo": GIVEN, "kto": GIVEN, "grpo": SAMPLED, "rloo": SAMPLED}
DATA: dict[str, list[Any]] = {
    "prompt": ["a ", "b "], "completion": ["a", "b"], "chosen": ["a", "b"], "rejected": ["b", "a"],
    "label": [True, False],
}  # fmt: skip
COLUMNS = {
    "sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt",), "rloo": ("prompt",),
}  # fmt: skip


def trainer(fused: bool, **options: Any) -> Callable[[Batch], Step]:
    """options: of `fuse`."""

    def build(b: Batch) -> Step:
        import datasets
        import trl

        from cpo_kernels.integrations.trl_head import fuse

        workload: TrainerStep = b.workload  # type: ignore[assignment]
        name = workload.trainer
        args = getattr(trl, f"{name.upper()}Config")(**arguments(b), **SETTINGS[name])
        rewards = (
            {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
            if INPUTS[name] is sampled_inputs
            else {}
        )
        with fuse(**options) if fused else nullcontext():
            made = getattr(trl, f"{name.upper()}Trainer")(
                model=b.model,
                args=args,
                train_dataset=datasets.Dataset.from_dict({column: DATA[column] for column in COLUMNS[name]}),
                processing_class=word_tokenizer(),
                **rewards,
            )
        made._prepare_inputs = lambda inputs: inputs  # generates nothing
        return step(b, made, INPUTS[name](b, made))

    return build


def truth(b: Batch) -> Outcome:
    """Full logits in float32."""
    name, logps, tokens = b.workload.trainer, b.seq_logps(), (b.labels[:, 1:] != -100).sum(1)  # type: ignore[attr-defined]
    d = logps - b.ref_logps
    if name == "sft":
        loss = -logps.sum() / tokens.sum()
    elif name == "dpo":
        loss = -F.logsigmoid(BETA * (d[b.pairs[:, 0]] - d[b.pairs[:, 1]])).mean()
    elif name == "kto":  # the policy is the reference: the KL term is 0
        loss = (1 - torch.sigmoid(BETA * torch.where(good(b), d, -d))).mean()
    elif name == "grpo":  # a ratio per token
        ratios = tokens + logps - logps.detach()
        loss = -(advantages(b) * ratios).sum() / tokens.sum()
    else:  # a ratio per sequence
        loss = -(advantages(b) * (1 + logps - logps.detach())).mean()
    (dw,) = torch.autograd.grad(loss, b.head)
    return {"loss": loss.detach(), "dw": dw}


IMPLEMENTATIONS = {
    "trl_head": Implementation("TRL's head", trainer(fused=False), refuses=WITH_TRL),
    "fused_head": Implementation("**our head** (`fuse()`)", trainer(fused=True), refuses=WITH_TRL),
    "fused_filtered": Implementation(
        "our head, both gradients filtered", trainer(fused=True, filter_eps="auto", filter_head_grad=True),
        refuses=WITH_TRL,
    ),
}  # fmt: skip
FAMILY = Family(TrainerStep, Batch, IMPLEMENTATIONS, "trl_head", truth, limits, apart)
