"""`preference_loss` fused with the head: from hidden states to the loss and all gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpo_kernels import checks, library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.batch_plan import BatchPlan, Layout
from cpo_kernels.checks import DTYPES, check_labels, check_types
from cpo_kernels.head.inputs import HeadInputs, head_inputs
from cpo_kernels.head.preference import linear_preference
from cpo_kernels.head.strategy import budget_rows
from cpo_kernels.head.token_logps import token_logps_of
from cpo_kernels.losses.inputs import PairInputs, check_pairs, default_pairs, kernel_args
from cpo_kernels.losses.options import LossOptions
from cpo_kernels.losses.preference import PreferenceOutput, output
from cpo_kernels.objectives import Objective
from cpo_kernels.ops.preference import PreferenceArgs, preference, wpo_weights
from cpo_kernels.ops.sequence_logps import SequenceLogps, check_cu_seqlens, sequence_logps_op
from cpo_kernels.reference.sequences import ld_token_weights


class FusedLinearCPOLoss(nn.Module):
    """`preference_loss` from hidden states: the head's log-probs, the loss and all gradients, logits never stored.

    With a trainable head 3 matrix products where a group of linked pairs fits the memory budget (else 4), with a frozen
    one 2, without gradients 1; on labelled rows alone. See `explain` for the plan of a shape.

    Args:
        objectives, beta, loss_type, **options: see `preference_loss` and `LossOptions`.
        ignore_index, softcap, scale, vocab_size, memory_budget, impl: see `linear_token_logps`.

    Raises:
        TypeError, ValueError: an unknown option, or one that the loss type would ignore; in the call wrong dtypes,
            shapes, devices or, on the CPU, values.
        RuntimeError: a backend asked for by name that is not there; double backward.

    Example:
        >>> loss_fn = FusedLinearCPOLoss(beta=0.1)
        >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(16, 8, requires_grad=True)
        >>> out = loss_fn(hidden, weight, torch.randint(16, (2, 3)), ref_logps=torch.zeros(2))
        >>> out.loss.backward()
    """

    def __init__(
        self,
        objectives: Sequence[Objective] | None = None,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        ignore_index: int = -100,
        softcap: float | None = None,
        scale: float = 1.0,
        vocab_size: int | None = None,
        memory_budget: int | None = None,
        impl: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = LossOptions.of({"objectives": objectives, "beta": beta, "loss_type": loss_type, **options})
        self.head = (ignore_index, softcap, scale, vocab_size, memory_budget)
        dispatch.check_impl(impl)
        self.impl = impl

    def extra_repr(self) -> str:
        """The options that differ from their defaults, beta and loss type in any case."""
        names = ("ignore_index", "softcap", "scale", "vocab_size", "memory_budget", "impl")
        given = zip(names, (*self.head, self.impl), (-100, None, 1.0, None, None, "auto"), strict=True)
        return ", ".join([self.options.shown(), *(f"{name}={x!r}" for name, x, default in given if x != default)])

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        pairs: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        scores: Tensor | None = None,
        conditions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        pair_weights: Tensor | None = None,
        pair_betas: Tensor | None = None,
        margins: Tensor | None = None,
        num_pairs: float | None = None,
        chosen_tokens: float | None = None,
        plan: BatchPlan | None = None,
        vocab_shards: VocabShards | None = None,
    ) -> PreferenceOutput:
        """hidden [S, T, H] with labels [S, T], or packed [N, H] and [N] with cu_seqlens [S + 1]; both already shifted.

        ref_hidden has the layout of `hidden` and goes through `ref_weight` (`weight` if None) and `ref_bias` (`bias` if
        both are None); where that is the policy's own head, one product serves both. `plan` comes from the method of
        that name, holds the pairs, and keeps the host from waiting for a GPU. DTensors, and vocab_shards (of weight and
        ref_weight): see `linear_token_logps`. The rest: see `preference_loss`.
        """
        inputs = head_inputs(hidden, weight, labels, bias, *self.head, vocab_shards)
        check_types("a tensor", optional=True, pairs=pairs, ref_hidden=ref_hidden, cu_seqlens=cu_seqlens)
        dispatch.resolve_impl(self.impl, hidden.device)
        cu_seqlens = sequence_offsets(hidden, labels, cu_seqlens)
        lengths = label_counts(inputs.labels, cu_seqlens, inputs.options.ignore_index)
        num_sequences = lengths.shape[0]
        own_weight = weight if ref_weight is None else ref_weight
        own_bias = bias if ref_weight is None and ref_bias is None else ref_bias
        shared = ref_hidden is not None and own_weight is weight and own_bias is bias
        if plan is not None:
            check_plan(plan, inputs, lengths, pairs)
            pairs = plan.pairs
            num_pairs = plan.num_pairs if num_pairs is None else num_pairs
            if chosen_tokens is None and self.options.averages_tokens:
                chosen_tokens = plan.chosen_tokens
        elif pairs is None:
            pairs = default_pairs(num_sequences, hidden.device)
        acc = library.acc_dtype(inputs.hidden.dtype)
        token_weights = inputs.hidden.new_empty(0, dtype=acc)
        if self.options.ld_alpha is not None:
            token_weights = _ld_weights_op(
                inputs.labels, cu_seqlens, lengths, pairs, self.options.ld_alpha, inputs.options.ignore_index
            ).to(acc)
        ref_rows = None
        if ref_hidden is not None:
            if ref_logps is not None:
                raise ValueError("give ref_logps or ref_hidden, not both")
            if ref_hidden.shape[:-1] != hidden.shape[:-1]:
                raise ValueError(
                    f"ref_hidden must have shape {list(hidden.shape[:-1])} + [H], got {list(ref_hidden.shape)}"
                )
            if shared:  # already in the dtype of the products
                own_weight, own_bias = inputs.weight, inputs.bias if inputs.bias.numel() else None
            with torch.no_grad():
                shards = inputs.shards if shared else vocab_shards
                ref = head_inputs(ref_hidden, own_weight, labels, own_bias, *self.head, shards)
                if shared:
                    ref_rows, ref_logps = ref.hidden, token_weights.new_zeros(num_sequences)  # filled with the policy's
                else:
                    ref_token_logps, *_ = token_logps_of(ref, False, self.impl, None if plan is None else plan.index)
                    ref_logps = sequence_logps_op(
                        ref_token_logps, cu_seqlens, token_weights.to(ref_token_logps.dtype), False, self.impl
                    )
        elif ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias have a meaning with ref_hidden only")
        divisors = num_pairs, chosen_tokens
        given = PairInputs(pairs, ref_logps, scores, conditions, pair_weights, pair_betas, margins, *divisors)
        args = kernel_args(self.options, given, num_sequences, lengths, token_weights)
        if not inputs.train_head:
            return self.from_token_logps(inputs, cu_seqlens, lengths, token_weights, args, plan, ref_rows)
        none = labels.new_empty(0)
        loss, losses, seq_logps, *metrics = linear_preference(
            inputs,
            token_weights,
            inputs.hidden.new_empty(0) if ref_rows is None else ref_rows,
            args,
            self.options.use_weighting,
            self.options.couples_pairs,
            self.options.opposite,
            (none.cpu(), none, none) if plan is None else (plan.host, plan.index, plan.tables),
            self.impl,
        )
        return output(loss, losses, seq_logps, metrics)

    def from_token_logps(
        self,
        inputs: HeadInputs,
        cu_seqlens: Tensor,
        lengths: Tensor,
        token_weights: Tensor,
        args: PreferenceArgs,
        plan: BatchPlan | None,
        ref_rows: Tensor | None,
    ) -> PreferenceOutput:
        """Strategies `frozen` and `forward`: dX is kept per token, so any loss may follow."""
        weighted = self.options.use_weighting
        index = None if plan is None else plan.index
        logp, extra, ref_logp = token_logps_of(inputs, weighted, self.impl, index, ref_rows)
        seq_logps = SequenceLogps.apply(logp, cu_seqlens, token_weights, False, self.impl)
        if ref_rows is not None:
            args = args._replace(ref_logps=sequence_logps_op(ref_logp, cu_seqlens, token_weights, False, self.impl))
        if weighted:
            aligned = (logp - extra[1]).detach()
            sums = sequence_logps_op(aligned, cu_seqlens, aligned.new_empty(0), False, self.impl)
            args = args.weighted(wpo_weights(sums, lengths, args.pairs))
        loss, losses, *metrics = preference(seq_logps, args, self.impl)
        return output(loss, losses, seq_logps, metrics)

    def plan(
        self,
        labels: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        pairs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scores: Tensor | None = None,
        conditions: Tensor | None = None,
        device: str | torch.device = "cuda",
        all_positions: bool = False,
    ) -> BatchPlan:
        """What the loss must know of a batch on the host, from the collator's CPU tensors; `.to(device)` before use.

        With it nothing between the hidden states and `loss.backward()` waits for a GPU. Without it the loss copies
        lengths and pairs from the device once.

        Args:
            labels, pairs, cu_seqlens, scores, conditions: as in the call, on the CPU. Scores and conditions are needed
                where a trainable head takes several chunks: how many pairs are no ties is the divisor of each. They
                are checked here, where that makes no GPU wait.
            vocab_size: rows of the head's weight; of a sharded head, of its largest shard.
            dtype: of the head's products (autocast's, under autocast).
            device: where the loss will run.
            all_positions: every position counts as a row, labelled or not: labels may then change from one replay of a
                CUDA graph to the next, at the price of the products of the ignored ones.
        """
        given = {"pairs": pairs, "cu_seqlens": cu_seqlens, "scores": scores, "conditions": conditions}
        check_types("a tensor", labels=labels)
        check_types("a tensor", optional=True, **given)
        check_types("an integer", vocab_size=vocab_size)
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        for name, tensor in ({"labels": labels} | given).items():
            if tensor is not None and tensor.device.type != "cpu":
                raise ValueError(f"a plan is made from CPU tensors, got {name} on {tensor.device}")
        check_labels(labels, labels.shape, "labels", labels.device)
        ignore_index, memory_budget = self.head[0], self.head[4]
        limit = budget_rows(vocab_size, dtype, torch.device(device), memory_budget)
        offsets = sequence_offsets(labels, labels, cu_seqlens)
        flat = labels.reshape(-1)
        lengths = label_counts(flat, offsets, ignore_index)
        pairs = default_pairs(lengths.shape[0], labels.device) if pairs is None else pairs
        check_pairs(pairs, lengths.shape[0], labels.device)
        num_pairs = chosen_tokens = None
        if scores is not None or self.options.objectives is None:
            plain = LossOptions(self.options.objectives, loss_type="sft", tie_margin=self.options.tie_margin)
            rated = PairInputs(pairs, scores=scores, conditions=conditions)
            zeros = torch.zeros(lengths.shape[0], dtype=torch.float64)
            args = kernel_args(plain, rated, len(zeros), lengths, zeros)  # checks the ratings, on a CPU
            if not all_positions:
                order, counts = preference(zeros, args, "auto")[-2:]
                chosen = pairs.gather(1, (order < 0).long()[:, None]).squeeze(1)
                num_pairs = max(1.0, float(counts[0]))
                chosen_tokens = max(1.0, float((lengths[chosen] * (order != 0)).sum()))
        rows = offsets.diff() if all_positions else lengths
        flat_pairs = pairs.flatten().tolist()
        layout = Layout.of(rows.tolist(), flat_pairs, limit, self.options.couples_pairs, self.options.opposite)
        index = torch.arange(len(flat)) if all_positions else (flat != ignore_index).nonzero().squeeze(1)
        divisors = num_pairs, chosen_tokens
        return BatchPlan(layout, layout.pack(), index, layout.tables(), pairs, len(flat), *divisors, all_positions)


def check_plan(plan: BatchPlan, inputs: HeadInputs, lengths: Tensor, pairs: Tensor | None) -> None:
    """The plan's numbers are host values: comparing them waits for nothing."""
    num_sequences = lengths.shape[0]
    if pairs is not None:
        raise ValueError("give pairs or plan, not both: the plan holds the pairs it was made with")
    positions = inputs.labels.shape[0]
    if (plan.num_positions, len(plan.layout.lengths)) != (positions, num_sequences):
        raise ValueError(
            f"the plan was made for {len(plan.layout.lengths)} sequences in {plan.num_positions} positions, got "
            f"{num_sequences} in {positions}: make one for each batch"
        )
    if plan.index.device != inputs.labels.device:
        raise ValueError(f"the plan is on {plan.index.device} and labels on {inputs.labels.device}: use plan.to(...)")
    if not plan.all_positions and checks.may_read(inputs.labels):
        labelled = (inputs.labels != inputs.options.ignore_index).nonzero().squeeze(1)
        if lengths.tolist() != plan.layout.lengths or not torch.equal(labelled, plan.index):
            raise ValueError(
                f"the plan was made for {plan.layout.lengths} labelled positions a sequence, the labels have "
                f"{lengths.tolist()}, or others: make it from the labels of this call, or with all_positions=True"
            )
    if plan.layout.row_limit != inputs.row_limit:
        raise ValueError(
            f"the plan was made for chunks of {plan.layout.row_limit} rows, this head takes {inputs.row_limit}: give "
            f"plan() its vocab_size {inputs.width}, dtype {inputs.weight.dtype}, device {inputs.weight.device.type!r}"
        )


def sequence_offsets(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S + 1] offsets of the sequences in the flattened rows: given for packed input, multiples of T for padded."""
    if labels.dim() == 2 and cu_seqlens is None:
        num_sequences, length = labels.shape
        return torch.arange(num_sequences + 1, device=hidden.device) * length
    if labels.dim() == 1 and cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, labels.shape[0])
        return cu_seqlens.to(hidden.device)
    raise ValueError(
        "give padded hidden [S, T, H] with labels [S, T], or packed hidden [N, H] with labels [N] and cu_seqlens "
        f"[S + 1]; got labels {list(labels.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
    )


def label_counts(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """[S] labelled rows of each sequence."""
    labelled = (labels != ignore_index).long()
    before = torch.cat([labelled.new_zeros(1), labelled.cumsum(0)])
    return before[cu_seqlens].diff()


@library.functional_op("ld_token_weights")
def _ld_weights_op(
    labels: Tensor, cu_seqlens: Tensor, lengths: Tensor, pairs: Tensor, ld_alpha: float, ignore_index: int
) -> Tensor:
    """LD-DPO's token weights [M] over the full layout: `ld_alpha` past the pair's shorter length, 1 elsewhere."""
    if checks.may_read(labels):
        ld_token_weights(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), pairs, ld_alpha)  # raises on conflicts
    shared = lengths.clone()
    shared[pairs] = lengths[pairs].amin(1, keepdim=True).expand(-1, 2)
    labelled = labels != ignore_index
    rank = labelled.cumsum(0)  # 1 for the first label of the batch
    before = torch.cat([rank.new_zeros(1), rank])[cu_seqlens[:-1]]  # [S] labels before each sequence
    last = (before + shared).repeat_interleave(cu_seqlens.diff(), output_size=labels.shape[0])
    return torch.where(labelled & (rank > last), ld_alpha, torch.ones_like(rank, dtype=torch.float64))


@torch.library.register_fake("cpo_kernels::ld_token_weights")
def _(labels, cu_seqlens, lengths, pairs, ld_alpha, ignore_index):
    return labels.new_empty(labels.shape, dtype=torch.float64)
