"""From a batch to its loss: the backbone's hidden states at labelled positions, then the fused head."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.data.packing import Batch, Encoded, collate, microbatches
from cpo_kernels.integrations.heads import lm_head
from cpo_kernels.objectives import Objective
from cpo_kernels.training.attention import attention_inputs, check_rows, row_tokens
from cpo_kernels.training.keys import Config

# Means over a step; ties are counted. cpsft and sft: the loss alone. log_ratio: log pi / pi_ref of a response, where
# there is a reference; it estimates the KL divergence only as far as the policy would write these responses itself.
METRICS = ("loss", "chosen_rewards", "rejected_rewards", "accuracy", "margin", "ties", "log_ratio")
WHOLE_STEP = {"aot", "aot_unpaired", "sft", "orpo", "contrastive_cpo"}  # sort over pairs, or average chosen tokens


@dataclass(frozen=True)
class StepTotal:
    """What all micro-batches of a step hold together, on all processes: the divisors of its loss."""

    tokens: int  # with a label
    pairs: int
    responses: int

    @staticmethod
    def of(groups: Sequence[Encoded]) -> StepTotal:
        tokens, pairs = sum(g.labels for g in groups), sum(len(g.pairs) for g in groups)
        return StepTotal(tokens, pairs, sum(len(g.responses) for g in groups))


class StageLoss:
    """The loss of a stage: mean NLL of the labels (cpsft, sft), or the preference loss of the pairs (cdpo, dpo)."""

    def __init__(self, model: Any, config: Config, objectives: Sequence[Objective], device: torch.device):
        self.model, self.head, self.device, self.objectives = model, lm_head(model), device, objectives
        self.bf16 = config.training.precision == "bf16"
        check_rows(model, config.training.rows, config.data.max_tokens)
        self.rows, self.budget = config.training.rows, config.training.tokens_per_microbatch
        self.has_pairs = config.stage in ("cdpo", "dpo")
        self.whole_step = self.has_pairs and not WHOLE_STEP.isdisjoint(config.loss.type)
        if self.has_pairs:
            loss = config.loss
            self.loss_fn = cpo.FusedLinearCPOLoss(
                objectives,
                loss.beta,
                loss.type,
                softcap=self.head.softcap,
                scale=self.head.scale,
                loss_weights=loss.weights,
                **loss.options,
            )
        self.needs_reference = self.has_pairs and self.loss_fn.options.needs_reference
        self.metrics = METRICS[: len(METRICS) if self.needs_reference else -1] if self.has_pairs else METRICS[:1]

    def autocast(self) -> AbstractContextManager:
        """Matrix products in bfloat16; parameters, residual stream, log-probs and loss stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def conditioned(self, groups: Sequence[Encoded]) -> dict[str, int]:
        """How many groups ask for a level of each objective."""
        levels = [[c == c for c in g.condition] for g in groups]
        return {o.name: sum(asked[i] for asked in levels) for i, o in enumerate(self.objectives)}

    def parts(self, groups: Sequence[Encoded]) -> list[list[Encoded]]:
        """`groups` in micro-batches."""
        return list(microbatches(groups, self.budget, self.rows))

    def collate(self, groups: Sequence[Encoded]) -> Batch:
        """One micro-batch on the device, with the plan that spares its loss a wait for a GPU."""
        batch = collate(groups, self.rows, row_tokens(self.model))
        if len(batch.pairs):
            weight = self.head.weight
            batch.plan = self.loss_fn.plan(
                batch.labels,
                weight.shape[0],
                torch.bfloat16 if self.bf16 else weight.dtype,
                batch.pairs,
                batch.cu_seqlens,
                batch.scores,
                batch.conditions,
                self.device,
            )
        return batch.to(self.device)

    def hidden(self, batch: Batch) -> Tensor:
        """[N, H]: the last hidden state at each position that predicts a label."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention_inputs(self.model, batch),
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.rows)

    def seq_logps(self, batch: Batch) -> Tensor:
        """[S] log-probs of the responses, without gradients."""
        head = self.head
        with torch.no_grad(), self.autocast():
            logps = cpo.linear_token_logps(
                self.hidden(batch), head.weight, batch.labels, head.bias, softcap=head.softcap, scale=head.scale
            )
            return cpo.sequence_logps(logps, batch.cu_seqlens.to(logps.device))

    def __call__(self, batch: Batch, total: StepTotal) -> tuple[Tensor, Tensor]:
        """(loss of this batch divided by what the step holds, its part of the step's metrics as float64)."""
        head = self.head
        with self.autocast():
            hidden = self.hidden(batch)
            if not self.has_pairs:
                loss = cpo.linear_nll(
                    hidden,
                    head.weight,
                    batch.labels,
                    head.bias,
                    softcap=head.softcap,
                    scale=head.scale,
                    num_tokens=total.tokens,
                )
                return loss, loss.detach().double().reshape(1)
            out = self.loss_fn(
                hidden,
                head.weight,
                batch.labels,
                bias=head.bias,
                plan=batch.plan,
                ref_logps=batch.ref_logps,
                scores=batch.scores,
                conditions=batch.conditions,
                cu_seqlens=batch.cu_seqlens,
                num_pairs=total.pairs,
            )
        share = len(batch.pairs) / total.pairs
        means = [out.chosen_rewards.mean(), out.rejected_rewards.mean(), out.accuracy, out.margin]
        metrics = [out.loss.detach(), *(share * mean for mean in means), out.num_ties]
        if self.needs_reference:
            metrics.append((out.seq_logps - batch.ref_logps).sum() / total.responses)
        return out.loss, torch.stack([metric.double() for metric in metrics])
