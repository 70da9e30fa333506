"""From a batch to its loss: hidden states of the backbone at labelled positions, then the fused head."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import cpo_kernels as cpo
from cpo_kernels.data.packing import Batch, Encoded, collate, microbatches
from cpo_kernels.head.inputs import HeadConfig, head_inputs
from cpo_kernels.head.live import FilterShares, filter_shares
from cpo_kernels.head.matmul import cpu_multiplies
from cpo_kernels.head.nll import nll_of
from cpo_kernels.integrations.heads import HeadParts, head_layer, lm_head
from cpo_kernels.objectives import Objective, format_number, value_gap
from cpo_kernels.recipe.keys import Config
from cpo_kernels.recipe.loss import filter_options, preference_loss
from cpo_kernels.training.attention import attention_inputs, check_rows, row_tokens

# Means over a step; ties are a count. cpsft and sft have only the loss; losses without a reference have no log_ratio.
#   rewards    beta (log pi - log pi_ref) of the preferred and the other response, over pairs; margin: their difference
#   accuracy   share of the pairs whose preferred response has the higher reward
#   log_ratio  (log pi - log pi_ref) of the responses in the data, nats per token: KL(data || ref) - KL(data || pi). It
#              is not KL(pi || ref), which needs responses drawn from pi.
# With loss.filter_eps, over labelled tokens, of training steps only:
#   live_share   share of the vocabulary whose gradients are exact; 1 in exact sets of rows
#   tail_mass    probability of the rest, which one mean column replaces
#   exact_share  share of the tokens in exact sets
METRICS = ("loss", "chosen_rewards", "rejected_rewards", "accuracy", "margin", "ties", "log_ratio")
FILTER_METRICS = FilterShares._fields


@dataclass(frozen=True)
class StepTotal:
    """Totals over all micro-batches of a step, on all processes: the divisors of its loss."""

    tokens: int  # with a label
    pairs: int
    chosen_tokens: float | None = None  # of the preferred response, summed over pairs; for losses that average them

    @staticmethod
    def of(groups: Sequence[Encoded]) -> StepTotal:
        return StepTotal(sum(g.labels for g in groups), sum(len(g.pairs) for g in groups))


class StageLoss:
    """The loss of a stage: mean NLL of the labels (cpsft, sft), or the preference loss of the pairs (cdpo, dpo)."""

    def __init__(self, model: Any, config: Config, objectives: Sequence[Objective], device: torch.device):
        self.model, self.device, self.objectives = model, device, objectives
        self.bf16 = config.training.precision == "bf16"
        if self.bf16 and device.type == "cpu" and not cpu_multiplies(torch.bfloat16):
            warnings.warn(
                "training.precision bf16: this CPU has no bfloat16 matrix instructions and torch computes the "
                "model's products element by element; fp32 is many times faster here: set training.precision: fp32",
                RuntimeWarning,
                stacklevel=2,
            )
        check_rows(model, config)
        self.rows, self.budget = config.training.rows, config.training.tokens_per_microbatch
        self.has_pairs = config.stage in ("cdpo", "dpo")
        self.loss_fn: Any = None
        if self.has_pairs:
            head = lm_head(model)
            self.loss_fn = preference_loss(config, objectives, softcap=head.softcap, scale=head.scale)
        self.needs_reference = self.has_pairs and self.loss_fn.options.needs_reference
        self.metrics = METRICS[: len(METRICS) if self.needs_reference else -1] if self.has_pairs else METRICS[:1]
        if config.loss.filter_eps is not None:
            self.metrics += FILTER_METRICS
        self.module: Any = StageModule(
            model, self.loss_fn, self.bf16, filter_options(config)
        )  # until `parallel.prepare` wraps it

    @property
    def head(self) -> HeadParts:
        """The current head of the model: sharding replaces parameters."""
        return lm_head(self.model)

    def asked(self, groups: Sequence[Encoded]) -> dict[str, int]:
        """How many groups request each level of an objective, and how many request nothing."""
        counts: Counter[str] = Counter(asked_nothing=0)
        for group in groups:
            levels = [(o.name, c) for o, c in zip(self.objectives, group.condition, strict=True) if c == c]
            counts.update(f"asked_{name}_{format_number(level)}" for name, level in levels)
            counts["asked_nothing"] += not levels
        return dict(sorted(counts.items()))

    def total(self, groups: Sequence[Encoded]) -> StepTotal:
        total = StepTotal.of(groups)
        if not self.has_pairs or not self.loss_fn.options.averages_tokens:
            return total
        rows = [(g, pair) for g in groups for pair in g.pairs]
        first, second = ([g.scores[pair[side]] for g, pair in rows] for side in (0, 1))
        gaps = value_gap(first, second, [g.condition for g, _ in rows], self.objectives).tolist()
        lengths = [len(g.responses[pair[gap < 0]]) for (g, pair), gap in zip(rows, gaps, strict=True)]
        return replace(total, chosen_tokens=float(sum(lengths)))

    def parts(self, groups: Sequence[Encoded], ranks: int = 1) -> list[list[Encoded]]:
        """`groups` in micro-batches, the same number for each rank if possible."""
        return list(microbatches(groups, self.budget, self.rows, ranks))

    def collate(self, groups: Sequence[Encoded]) -> Batch:
        """One micro-batch on the device, with the plan that avoids a host-device synchronisation in its loss."""
        batch = collate(groups, self.rows, row_tokens(self.model))
        if len(batch.pairs):
            weight = self.head.weight
            vocab_size, hidden_size = getattr(weight, "ds_shape", weight.shape)
            batch.plan = self.loss_fn.plan(
                batch.labels,
                vocab_size,
                torch.bfloat16 if self.bf16 else weight.dtype,
                batch.pairs,
                batch.cu_seqlens,
                batch.scores,
                batch.conditions,
                self.device,
                hidden_size=hidden_size,
            )
        return batch.to(self.device)

    def seq_logps(self, batch: Batch) -> Tensor:
        """[S] log-probs of the responses, without gradients."""
        with torch.no_grad():
            logps: Tensor = self.module(batch, None)
            return logps

    def __call__(self, batch: Batch, total: StepTotal) -> tuple[Tensor, Tensor]:
        """(loss of this batch divided by the step's total, its part of the step's metrics as float64)."""
        loss_and_part: tuple[Tensor, Tensor] = self.module(batch, total)
        return loss_and_part


class StageModule(nn.Module):
    """Backbone, head and loss in one forward: DDP, FSDP2 and ZeRO-3 need all of it inside the module that they wrap."""

    def __init__(self, model: Any, loss_fn: Any, bf16: bool, filtered: dict[str, Any]):
        super().__init__()
        self.model, self.loss_fn, self.bf16, self.filtered = model, loss_fn, bf16, filtered
        self._no_split_modules = model._no_split_modules  # what accelerate shards by

    def forward(self, batch: Batch, total: StepTotal | None) -> Any:
        """See `StageLoss`. Without a total, the log-probs of the responses."""
        # matrix products in bfloat16; parameters, residual stream, log-probs and loss stay float32
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.hidden(batch)
            with gathered(head_layer(self.model)):
                head = lm_head(self.model)
                if total is None:
                    return self.log_probs(hidden, head, batch)
                return self.pairs(hidden, head, batch, total) if self.loss_fn else self.nll(hidden, head, batch, total)

    def hidden(self, batch: Batch) -> Tensor:
        """[N, H]: the last hidden state at each position that predicts a label."""
        hidden: Tensor = self.model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention_inputs(self.model, batch),
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.rows)

    def log_probs(self, hidden: Tensor, head: HeadParts, batch: Batch) -> Tensor:
        logps = cpo.linear_token_logps(
            hidden, head.weight, batch.labels, head.bias, softcap=head.softcap, scale=head.scale
        )
        return cpo.sequence_logps(logps, batch.cu_seqlens.to(logps.device))

    def nll(self, hidden: Tensor, head: HeadParts, batch: Batch, total: StepTotal) -> tuple[Tensor, Tensor]:
        config = HeadConfig(-100, head.softcap, head.scale, None, None, **self.filtered)
        inputs = head_inputs(hidden, head.weight, batch.labels, head.bias, config)
        loss, filter_sums = nll_of(inputs, "auto", num_tokens=total.tokens)
        shares = self.shares(filter_shares(inputs, filter_sums), batch, total)
        return loss, torch.stack([metric.double() for metric in [loss.detach(), *shares]])

    def pairs(self, hidden: Tensor, head: HeadParts, batch: Batch, total: StepTotal) -> tuple[Tensor, Tensor]:
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
            chosen_tokens=total.chosen_tokens,
        )
        share = len(batch.pairs) / total.pairs
        means = [out.chosen_rewards.mean(), out.rejected_rewards.mean(), out.accuracy, out.margin]
        metrics = [out.loss.detach(), *(share * mean for mean in means), out.num_ties]
        if batch.ref_logps is not None:
            metrics.append((out.seq_logps - batch.ref_logps).sum() / total.tokens)
        metrics += self.shares(FilterShares(out.live_share, out.tail_mass, out.exact_share), batch, total)
        return out.loss, torch.stack([metric.double() for metric in metrics])

    def shares(self, shares: FilterShares, batch: Batch, total: StepTotal) -> list[Tensor]:
        """This batch's part of FILTER_METRICS; of exact gradients ("auto" in float32) where nothing is filtered."""
        if self.filtered["filter_eps"] is None:
            return []
        labelled = (batch.labels != -100).sum().double() / total.tokens
        return [share.nan_to_num(nan=of_exact) * labelled for share, of_exact in zip(shares, (1, 0, 1), strict=True)]


def gathered(layer: nn.Module) -> AbstractContextManager[Any]:
    """The gathered head weights under ZeRO-3, which shards them outside the layer's own forward."""
    split = [p for p in layer.parameters() if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    import deepspeed

    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(split)
    return whole
