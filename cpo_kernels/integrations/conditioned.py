"""The conditioned multi-objective loss inside TRL's DPOTrainer, with the metrics of `DPOTrainer._compute_loss`."""

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.losses.inputs import default_pairs
from cpo_kernels.ops.sequence_logps import sequence_logps
from cpo_kernels.reference.pairs import chosen_rejected

RATING_KEYS = {"scores", "conditions"}
NOT_OF_THE_MODEL = RATING_KEYS | {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


def conditioned_loss(trainer: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """Rows are [chosen column; rejected column]; the value under the condition decides which of a pair is preferred.

    The loss is the mean over the non-tied pairs of the batches of all processes; accumulation averages these
    means, as TRL averages its own.
    """
    if missing := RATING_KEYS - inputs.keys():
        raise ValueError(f"the batch has no {', '.join(sorted(missing))}: let your data_collator pass them on")
    kwargs = {key: value for key, value in inputs.items() if key not in NOT_OF_THE_MODEL}
    kwargs["use_cache"] = False
    if trainer.aux_loss_enabled:
        kwargs["output_router_logits"] = True
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    outputs = model(**kwargs, labels=labels, fused_lm_head=True)
    mask = inputs["completion_mask"][:, 1:]  # [2P, T]
    width = mask.shape[1]  # prompt learning puts virtual tokens in front
    logps = outputs.log_probs[:, -width:]
    lengths = mask.sum(1)
    weights = None if trainer.ld_alpha is None else ld_weights(mask, lengths, trainer.ld_alpha).reshape(-1)
    offsets = torch.arange(len(mask) + 1, device=mask.device) * width
    seq_logps = sequence_logps(logps.reshape(-1), offsets, weights, impl=trainer.cpo_loss.impl)  # [2P]

    ref_logps = None
    if trainer.cpo_loss.options.needs_reference:
        if trainer.precompute_ref_logps:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            reference = trainer.model if trainer.ref_model is None else trainer.ref_model
            ref_logps = torch.cat(trainer.compute_ref_log_probs(reference, inputs))
    wpo = None
    if trainer.use_weighting:  # exp of the mean of logp - log sum p^2 over either response (arXiv 2406.11827)
        aligned = ((logps - outputs.log_sum_sq_probs[:, -width:]) * mask).detach().sum(1) / lengths.clamp(min=1)
        wpo = aligned.exp().view(2, -1).prod(0)
    out = trainer.cpo_loss(
        seq_logps,
        ref_logps=ref_logps,
        scores=inputs["scores"],
        conditions=inputs["conditions"],
        lengths=lengths,
        pair_weights=wpo,
    )
    loss = out.loss * share_of_pairs(trainer, out.num_pairs)
    mode = "train" if trainer.model.training else "eval"
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * outputs.aux_loss
        aux_loss = trainer.accelerator.gather_for_metrics(outputs.aux_loss).mean().item()
        trainer._metrics[mode]["aux_loss"].append(aux_loss)
    log_metrics(trainer, mode, inputs, outputs, out, mask)
    if not return_outputs:
        return loss
    with torch.no_grad():  # as TRL: the logits for compute_metrics
        return loss, model(**kwargs)


def share_of_pairs(trainer: Any, num_pairs: Tensor) -> Tensor:
    """This process's pairs over the processes' mean: the weight that makes the average of losses one over pairs."""
    here = num_pairs.float()
    mean = trainer.accelerator.reduce(here, "mean")
    return torch.where(here > 0, here / mean, 0.0)


def ld_weights(mask: Tensor, lengths: Tensor, ld_alpha: float) -> Tensor:
    """[2P, T]: `ld_alpha` past the pair's shorter length, else 1 (LD-DPO, arXiv 2409.06411)."""
    shared = lengths.view(2, -1).amin(0).repeat(2)
    return torch.where(mask.cumsum(1) > shared[:, None], ld_alpha, 1.0)


def log_metrics(trainer: Any, mode: str, inputs: dict[str, Any], outputs: Any, out: Any, mask: Tensor) -> None:
    """TRL's metrics with `chosen` for what the value prefers, over the non-tied pairs; and how many those are.

    Sums and counts of all processes are added before dividing.
    """
    live, order = (out.order != 0).double(), out.order
    num_pairs, width = len(order), mask.shape[1]
    chosen, rejected = chosen_rejected(default_pairs(2 * num_pairs, mask.device), order)
    tokens = {"all": mask, "chosen": mask[chosen] * live[:, None], "rejected": mask[rejected] * live[:, None]}

    def per_token(values: Tensor, rows: Tensor | None, side: str) -> tuple[Tensor, Tensor]:
        values = values[:, -width:].detach().double()
        values = values if rows is None else values[rows]
        return (values * tokens[side]).sum(), tokens[side].sum()

    def per_pair(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(live > 0, values.double(), 0.0).sum(), live.sum()

    total = live.new_tensor(num_pairs)
    sums = {
        "entropy": per_token(outputs.entropy, None, "all"),
        "logits/chosen": per_token(outputs.mean_logits, chosen, "chosen"),
        "logits/rejected": per_token(outputs.mean_logits, rejected, "rejected"),
        "mean_token_accuracy": per_token(outputs.is_top1, chosen, "chosen"),
        "rewards/chosen": per_pair(out.chosen_rewards),
        "rewards/rejected": per_pair(out.rejected_rewards),
        "rewards/accuracies": per_pair(out.chosen_rewards > out.rejected_rewards),
        "rewards/margins": per_pair(out.chosen_rewards - out.rejected_rewards),
        "logps/chosen": per_pair(out.seq_logps[chosen]),
        "logps/rejected": per_pair(out.seq_logps[rejected]),
        "value_gap": per_pair(out.value_gap.abs()),
        "ties": (total - live.sum(), total),
        "unrated": (out.num_unrated.double(), total),
        "num_tokens": (inputs["attention_mask"].sum().double(), total),
    }
    table = torch.stack([torch.stack([s.double(), n.double()]) for s, n in sums.values()])  # [metrics, 2]
    table = trainer.accelerator.gather(table[None]).sum(0)
    metrics = trainer._metrics[mode]
    for name, (value, count) in zip(sums, table.tolist(), strict=True):
        if name == "num_tokens":
            if mode == "train":
                trainer._total_train_tokens += int(value) // trainer._tp_size
            metrics[name] = [trainer._total_train_tokens]
        elif count:
            metrics[name].append(value / count)
