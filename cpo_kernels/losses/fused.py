"""`preference_loss` fused with the head: from hidden states to the loss and all gradients."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cpo_kernels import checks
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.batch_plan import BatchPlan, Layout, PlanTensors
from cpo_kernels.checks import DTYPES, check_labels, check_types
from cpo_kernels.head.inputs import HeadConfig, HeadInputs, head_inputs
from cpo_kernels.head.live import filter_shares
from cpo_kernels.head.matmul import own_sums
from cpo_kernels.head.preference import LinearPreferenceArgs, linear_preference
from cpo_kernels.head.strategy import check_filter, limits, rows_of_sum
from cpo_kernels.head.token_logps import token_logps_of
from cpo_kernels.library import PreferenceResult, acc_dtype, functional_op
from cpo_kernels.losses.inputs import PairInputs, check_pairs, default_pairs, kernel_args
from cpo_kernels.losses.options import LossOptions
from cpo_kernels.losses.preference import PreferenceOutput, output
from cpo_kernels.losses.sequences import (
    PolicyHead,
    ReferenceModel,
    label_counts,
    reference_rows,
    sequence_offsets,
)
from cpo_kernels.objectives import Objective
from cpo_kernels.ops.preference import PreferenceArgs, preference, wpo_weights
from cpo_kernels.ops.sequence_logps import SequenceLogps, sequence_logps_op
from cpo_kernels.reference.sequences import ld_token_weights


class _Sequences(NamedTuple):
    """Where the sequences of a batch are, and which of them form pairs."""

    offsets: Tensor  # [S + 1] first position of each
    lengths: Tensor  # [S] labelled positions of each
    pairs: Tensor  # [P, 2]
    token_weights: Tensor  # [M], or [0]: 1
    plan: PlanTensors  # all [0] without a plan


class FusedLinearCPOLoss(nn.Module):
    """`preference_loss` from hidden states: the head's log-probs, the loss and all gradients, without storing logits.

    Matrix products, on labelled rows only: 3 with a trainable head if a group of linked pairs fits the memory budget
    (else 4; 3 for a batch of one pair under most losses), 2 with a frozen head, 1 without gradients. See `explain` for
    the plan of a shape.

    Args:
        objectives, beta, loss_type, **options: see `preference_loss` and `LossOptions`.
        ignore_index, softcap, scale, vocab_size, memory_budget, impl, filter_eps, filter_head_grad: see
            `linear_token_logps`.

    Raises:
        TypeError, ValueError: an unknown option, or one that the loss type would ignore; in the call, wrong dtypes,
            shapes, devices or, on the CPU, values.
        RuntimeError: a backend requested by name that is not available; double backward.

    Examples:
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
        filter_eps: float | Literal["auto"] | None = None,
        filter_head_grad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = LossOptions.of({"objectives": objectives, "beta": beta, "loss_type": loss_type, **options})
        self.head = HeadConfig(ignore_index, softcap, scale, vocab_size, memory_budget, filter_eps, filter_head_grad)
        check_filter(filter_eps, filter_head_grad)
        dispatch.check_impl(impl)
        self.impl = impl

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and always beta and loss type."""
        defaults = inspect.signature(type(self)).parameters
        given = {**self.head._asdict(), "impl": self.impl}
        changed = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name].default]
        return ", ".join([self.options.shown(), *changed])

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
        """hidden [S, T, H] with labels [S, T], or packed [N, H] and [N] with cu_seqlens [S + 1]; labels already
        shifted.

        ref_hidden has the layout of `hidden` and goes through `ref_weight` (`weight` if None) and `ref_bias` (`bias` if
        both are None); if that is the policy's own head, one product serves both. `plan` comes from the method of that
        name. It contains the pairs and avoids a host-device synchronisation. For DTensors and vocab_shards (of weight
        and ref_weight) see `linear_token_logps`, for the rest `preference_loss`.
        """
        inputs = head_inputs(hidden, weight, labels, bias, self.head, vocab_shards)
        check_types("a tensor", optional=True, pairs=pairs, ref_hidden=ref_hidden, cu_seqlens=cu_seqlens)
        dispatch.resolve_impl(self.impl, hidden.device)
        sequences = self.sequences(inputs, sequence_offsets(hidden, labels, cu_seqlens), pairs, plan)
        if plan is not None:
            num_pairs = plan.num_pairs if num_pairs is None else num_pairs
            if chosen_tokens is None and self.options.averages_tokens:
                chosen_tokens = plan.chosen_tokens
        policy = PolicyHead(hidden, weight, labels, bias, vocab_shards)
        reference = ReferenceModel(ref_hidden, ref_weight, ref_bias, ref_logps)
        ref_rows, ref_logps = self.reference(inputs, sequences, policy, reference)
        divisors = num_pairs, chosen_tokens
        given = PairInputs(sequences.pairs, ref_logps, scores, conditions, pair_weights, pair_betas, margins, *divisors)
        lengths, token_weights = sequences.lengths, sequences.token_weights
        args = kernel_args(self.options, given, lengths.shape[0], lengths, token_weights)
        run = self.from_hidden if inputs.needs.head and not inputs.keeps_live_sets else self.from_token_logps
        result, seq_logps, filter_sums = run(inputs, sequences, args, ref_rows)
        return output(result, seq_logps, filter_shares(inputs, filter_sums))

    def sequences(
        self, inputs: HeadInputs, offsets: Tensor, pairs: Tensor | None, plan: BatchPlan | None
    ) -> _Sequences:
        """Lengths, pairs and whatever else the loss needs to know about a batch's sequences."""
        labels, ignore_index = inputs.tensors.labels, inputs.options.ignore_index
        lengths = label_counts(labels, offsets, ignore_index)
        none = labels.new_empty(0)
        tensors = PlanTensors(torch.empty(0, dtype=torch.int64), none, none)
        if plan is not None:
            check_plan(plan, inputs, lengths, pairs)
            pairs, tensors = plan.pairs, plan.tensors
        elif pairs is None:
            pairs = default_pairs(lengths.shape[0], labels.device)
        acc = acc_dtype(inputs.tensors.hidden.dtype)
        token_weights = inputs.tensors.hidden.new_empty(0, dtype=acc)
        if self.options.ld_alpha is not None:
            ld_weights = _ld_weights_op(labels, offsets, lengths, pairs, self.options.ld_alpha, ignore_index)
            token_weights = ld_weights.to(acc)
        return _Sequences(offsets, lengths, pairs, token_weights, tensors)

    def reference(
        self, inputs: HeadInputs, sequences: _Sequences, policy: PolicyHead, given: ReferenceModel
    ) -> tuple[Tensor | None, Tensor | None]:
        """Rows [M, H] for the policy's head, if the reference model has the same head; ref_logps [S]."""
        rows, logps = reference_rows(inputs, policy, given, self.head, self.impl, sequences.plan.row_index)
        weights = sequences.token_weights
        if rows is not None:
            return rows, weights.new_zeros(sequences.lengths.shape)  # filled with the policy's
        if logps is None:
            return None, given.logps
        return None, sequence_logps_op(logps, sequences.offsets, weights.to(logps.dtype), False, self.impl)

    def from_hidden(
        self, inputs: HeadInputs, sequences: _Sequences, args: PreferenceArgs, ref_rows: Tensor | None
    ) -> tuple[PreferenceResult, Tensor, Tensor]:
        """Strategies `pairs`, `deferred` and `two_pass`: loss and gradients in one op."""
        options = self.options
        linear_args = LinearPreferenceArgs(
            sequences.token_weights,
            inputs.tensors.hidden.new_empty(0) if ref_rows is None else ref_rows,
            args,
            options.use_weighting,
            options.couples_pairs,
            options.opposite,
            inputs.options,
            inputs.needs,
            sequences.plan,
            inputs.execution(self.impl),
        )
        return linear_preference(inputs.tensors, linear_args)

    def from_token_logps(
        self, inputs: HeadInputs, sequences: _Sequences, args: PreferenceArgs, ref_rows: Tensor | None
    ) -> tuple[PreferenceResult, Tensor, Tensor]:
        """Strategies `frozen` and `forward`: dX is kept per token, so any loss can follow."""
        weighted, offsets, token_weights = self.options.use_weighting, sequences.offsets, sequences.token_weights
        logp, extra, ref_logp, filter_sums = token_logps_of(
            inputs, weighted, self.impl, sequences.plan.row_index, ref_rows
        )
        seq_logps: Tensor = SequenceLogps.apply(logp, offsets, token_weights, False, self.impl)
        if ref_rows is not None:
            args = args._replace(ref_logps=sequence_logps_op(ref_logp, offsets, token_weights, False, self.impl))
        if weighted:
            aligned = (logp - extra[1]).detach()
            sums = sequence_logps_op(aligned, offsets, aligned.new_empty(0), False, self.impl)
            args = args.weighted(wpo_weights(sums, sequences.lengths, args.pairs))
        return preference(seq_logps, args, self.impl), seq_logps, filter_sums

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
        hidden_size: int | None = None,
    ) -> BatchPlan:
        """What the host must know about a batch, from the collator's CPU tensors; call `.to(device)` before use.

        With a plan there is no host-device synchronisation between the hidden states and `loss.backward()`. Without one
        the loss copies lengths and pairs from the device once.

        Args:
            labels, pairs, cu_seqlens, scores, conditions: as in the call, on the CPU. Scores and conditions are needed
                when a trainable head takes several chunks: the number of non-tied pairs is the divisor of each. They
                are checked here, where that forces no host-device synchronisation.
            vocab_size: rows of the head's weight; for a sharded head, of its largest shard.
            dtype: of the head's products (autocast's, under autocast).
            device: where the loss will run.
            all_positions: treat every position as a row, labelled or not. Labels may then change from one replay of a
                CUDA graph to the next, at the cost of the products on ignored positions.
            hidden_size: H of the head. With it a trainable head takes all rows in one chunk where that needs no more
                memory than several chunks and their sum of dW.
        """
        given = {"pairs": pairs, "cu_seqlens": cu_seqlens, "scores": scores, "conditions": conditions}
        check_types("a tensor", labels=labels)
        check_types("a tensor", optional=True, **given)
        check_types("an integer", vocab_size=vocab_size)
        check_types("an integer", optional=True, hidden_size=hidden_size)
        for name, size in {"vocab_size": vocab_size, "hidden_size": hidden_size}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        for name, tensor in ({"labels": labels} | given).items():
            if tensor is not None and tensor.device.type != "cpu":
                raise ValueError(f"a plan is made from CPU tensors, got {name} on {tensor.device}")
        check_labels(labels, labels.shape, "labels", labels.device)
        place = torch.device(device)
        budget = self.head.memory_budget
        most = limits(vocab_size, hidden_size or 0, dtype, place, budget, own_sums(place, dtype), False)
        offsets = sequence_offsets(labels, labels, cu_seqlens)
        flat = labels.reshape(-1)
        lengths = label_counts(flat, offsets, self.head.ignore_index)
        pairs = default_pairs(lengths.shape[0], labels.device) if pairs is None else pairs
        check_pairs(pairs, lengths.shape[0], labels.device)
        num_pairs = chosen_tokens = None
        if scores is not None or self.options.objectives is None:
            plain = LossOptions(self.options.objectives, loss_type="sft", tie_margin=self.options.tie_margin)
            rated = PairInputs(pairs, scores=scores, conditions=conditions)
            zeros = torch.zeros(lengths.shape[0], dtype=torch.float64)
            args = kernel_args(plain, rated, len(zeros), lengths, zeros)  # checks the ratings, on a CPU
            if not all_positions:
                counts = args.counted(dispatch.kernels("auto", zeros), zeros.dtype)
                num_pairs, chosen_tokens = counts.clamp(min=1).double().tolist()
        rows = offsets.diff() if all_positions else lengths
        flat_pairs = pairs.flatten().tolist()
        flags = self.options.couples_pairs, self.options.opposite
        layout = Layout.of(rows.tolist(), flat_pairs, most.budget, *flags, most.sum)
        index = torch.arange(len(flat)) if all_positions else (flat != self.head.ignore_index).nonzero().squeeze(1)
        divisors = num_pairs, chosen_tokens
        return BatchPlan(layout, layout.pack(), index, layout.tables(), pairs, len(flat), *divisors, all_positions)


def check_plan(plan: BatchPlan, inputs: HeadInputs, lengths: Tensor, pairs: Tensor | None) -> None:
    """Compares host values only: no host-device synchronisation."""
    num_sequences = lengths.shape[0]
    if pairs is not None:
        raise ValueError("give pairs or plan, not both: the plan contains the pairs it was made with")
    positions = inputs.tensors.labels.shape[0]
    if (plan.num_positions, len(plan.layout.lengths)) != (positions, num_sequences):
        raise ValueError(
            f"the plan was made for {len(plan.layout.lengths)} sequences in {plan.num_positions} positions, got "
            f"{num_sequences} in {positions}: make a plan for each batch"
        )
    if plan.index.device != inputs.tensors.labels.device:
        raise ValueError(
            f"the plan is on {plan.index.device} and labels on {inputs.tensors.labels.device}: use plan.to(...)"
        )
    if not plan.all_positions and checks.may_read(inputs.tensors.labels):
        labelled = (inputs.tensors.labels != inputs.options.ignore_index).nonzero().squeeze(1)
        if lengths.tolist() != plan.layout.lengths or not torch.equal(labelled, plan.index):
            raise ValueError(
                f"the plan was made for {plan.layout.lengths} labelled positions per sequence, the labels have "
                f"{lengths.tolist()}, or at other places: make the plan from the labels of this call, or with "
                "all_positions=True"
            )
    weight, limit = inputs.tensors.weight, inputs.limits.budget
    if plan.layout.row_limit != limit:
        raise ValueError(
            f"the plan was made for chunks of {plan.layout.row_limit} rows, this head takes {limit}: give plan() its "
            f"vocab_size {inputs.width}, dtype {weight.dtype}, device {weight.device.type!r}"
        )
    # A plan does not know whether the head is sharded, which then has no own matmul of this CPU in its limits.
    expected = 0, *(rows_of_sum(weight.shape[1], weight.dtype, own) for own in (False, True))
    if plan.layout.sum_limit.more not in expected:
        raise ValueError(f"the plan was made for another hidden_size: give plan() this head's, {weight.shape[1]}")


@functional_op("ld_token_weights", fake=lambda labels, *_: labels.new_empty(labels.shape, dtype=torch.float64))
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
