"""A trainable head under a known preference loss: loss, dX and dW in one forward pass (strategies pairs, two_pass).

`pairs` puts whole groups of linked pairs into one chunk: the chunk's sequence log-probs give the loss and the
coefficient dL/dL_s of each of its sequences while onehot - softmax is still there, so dX and dW need no second look at
the logits (3 products). Where a group does not fit the budget, or the loss couples all pairs, `two_pass` computes all
log-probs first and makes the logits again with known coefficients (4 products).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import ops
from cpo_kernels.linear import (
    Head,
    HeadInputs,
    Rows,
    WeightGrad,
    fake_known_loss,
    known_loss_grads,
    labelled_rows,
)
from cpo_kernels.planner import chunks, even_rows, preference_strategy


@dataclass
class Chunk:
    """Sequences that are projected together, and the pairs among them."""

    sequences: list[int]
    pairs: list[int]
    num_rows: int = 0


def linked_groups(num_sequences: int, pairs: list[list[int]], lengths: list[int]) -> list[Chunk]:
    """Sequences linked by pairs form a group, a sequence in no pair one of its own; in order of first sequence."""
    parent = list(range(num_sequences))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    groups: dict[int, Chunk] = {}
    for s in range(num_sequences):
        group = groups.setdefault(root(s), Chunk([], []))
        group.sequences.append(s)
        group.num_rows += lengths[s]
    for p, (a, _) in enumerate(pairs):
        groups[root(a)].pairs.append(p)
    return list(groups.values())


def pack_groups(groups: list[Chunk], limit: int) -> list[Chunk]:
    """Fill chunks with whole groups, in order, up to `limit` rows each."""
    packed: list[Chunk] = []
    for group in groups:
        if not packed or packed[-1].num_rows + group.num_rows > limit:
            packed.append(Chunk([], []))
        last = packed[-1]
        last.sequences += group.sequences
        last.pairs += group.pairs
        last.num_rows += group.num_rows
    return packed


@dataclass
class PreferenceArgs:
    """The tensors and numbers of the `preference` kernel, and how to narrow them to one chunk."""

    ref_logps: Tensor
    lengths: Tensor
    pairs: Tensor
    scores: Tensor
    conditions: Tensor
    objectives: Tensor
    pair_weights: Tensor
    pair_betas: Tensor
    margins: Tensor
    loss_types: list[int]
    loss_weights: list[float]
    options: list[float]
    num_pairs: float
    chosen_tokens: float

    def run(self, kernels: Any, seq_logps: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """`weights` [P] or [0] multiplies the pair weights."""
        pair_weights = self.pair_weights
        if weights.numel():
            pair_weights = weights * pair_weights if pair_weights.numel() else weights
        tensors = (self.ref_logps, self.lengths, self.pairs, self.scores, self.conditions, self.objectives)
        numbers = (self.loss_types, self.loss_weights, self.options, self.num_pairs, self.chosen_tokens)
        return kernels.preference(seq_logps, *tensors, pair_weights, self.pair_betas, self.margins, *numbers)

    def narrow(self, chunk: Chunk, num_pairs: float, chosen_tokens: float) -> "PreferenceArgs":
        """Only this chunk's sequences and pairs, renumbered, under the divisors of the whole batch."""
        device = self.pairs.device
        sequences = torch.tensor(chunk.sequences, dtype=torch.int64, device=device)
        pairs = torch.tensor(chunk.pairs, dtype=torch.int64, device=device)
        place = torch.empty_like(self.lengths).index_copy_(0, sequences, torch.arange(len(sequences), device=device))

        def pick(t: Tensor, index: Tensor) -> Tensor:
            return t.index_select(0, index) if t.numel() else t

        return PreferenceArgs(
            pick(self.ref_logps, sequences),
            pick(self.lengths, sequences),
            place[self.pairs[pairs]].view(-1, 2),
            pick(self.scores, sequences),
            pick(self.conditions, pairs),
            self.objectives,
            pick(self.pair_weights, pairs),
            pick(self.pair_betas, pairs),
            pick(self.margins, sequences),
            self.loss_types,
            self.loss_weights,
            self.options,
            num_pairs,
            chosen_tokens,
        )

    def divisors(self, kernels: Any, dtype: torch.dtype) -> tuple[float, float]:
        """Pairs that count and labelled tokens of their chosen sides: known from the ratings alone."""
        zeros = self.lengths.new_zeros(self.lengths.shape[0], dtype=dtype)
        order, counts = self.run(kernels, zeros, zeros[:0])[-2:]
        chosen = self.pairs.gather(1, (order < 0).long()[:, None]).squeeze(1)  # [P]
        tokens = (self.lengths[chosen] * (order != 0)).sum()
        num_pairs = self.num_pairs if self.num_pairs > 0 else float(counts[0])
        return max(num_pairs, 1.0), self.chosen_tokens if self.chosen_tokens > 0 else max(float(tokens), 1.0)


def wpo_weights(logp: Tensor, extra: Tensor, sums: Any, lengths: Tensor, pairs: Tensor) -> Tensor:
    """WPO weight of each pair, exp of the mean of logp - log sum p^2 over either response (arXiv 2406.11827)."""
    mean = sums(logp - extra[1]).double() / lengths.clamp(min=1)
    return mean.exp()[pairs].prod(1)


# ------------------------------------------------------------------------------------------------------------ the op


@ops.functional_op("linear_preference")
def linear_preference_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    scores: Tensor,
    conditions: Tensor,
    objectives: Tensor,
    pair_weights: Tensor,
    pair_betas: Tensor,
    margins: Tensor,
    loss_types: list[int],
    loss_weights: list[float],
    options: list[float],
    num_pairs: float,
    chosen_tokens: float,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    use_weighting: bool,
    couples_pairs: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [M, H], labels [M], sequences at cu_seqlens.

    Returns loss [], losses [P], seq_logps [S], chosen_rewards, rejected_rewards, value_gap [P], order [P], counts [3],
    then what backward scales: dX unscaled [M, H], coefficients [M], dW up to a power of two, db in float32, power [].
    """
    args = PreferenceArgs(
        ref_logps, lengths, pairs, scores, conditions, objectives, pair_weights, pair_betas, margins,
        loss_types, loss_weights, options, num_pairs, chosen_tokens,
    )  # fmt: skip
    counts = lengths.tolist()
    groups = linked_groups(len(counts), pairs.tolist(), counts)
    group_rows = max((g.num_rows for g in groups), default=0)
    strategy = preference_strategy(sum(counts), group_rows, couples_pairs, row_limit)
    plan = pack_groups(groups, row_limit if not couples_pairs else sum(counts)) if strategy == "pairs" else []

    order = None  # the layout's own order serves a single chunk
    if len(plan) > 1:
        spans = (labels != ignore_index).nonzero().squeeze(1).split(counts)
        order = torch.cat([spans[s] for chunk in plan for s in chunk.sequences])
    rows = labelled_rows(hidden, labels, ignore_index, order)
    run = _Pass(rows, args, use_weighting, token_weights, (need_dx, need_dw, need_db))
    head_options = (ignore_index, scale, softcap, vocab_size)
    if strategy == "pairs":
        head = Head(weight, bias, head_options, max((c.num_rows for c in plan), default=0), impl)
        outputs, seq_logps, coef = run.pairs(head, plan)
    else:
        head = Head(weight, bias, head_options, even_rows(rows.x.shape[0], row_limit), impl)
        outputs, seq_logps, coef = run.two_pass(head, even_rows(rows.x.shape[0], row_limit))
    loss, losses, _, *metrics = outputs
    dx = rows.scatter(run.dx, hidden.shape[0]) if need_dx else run.dx
    coef = rows.scatter(coef, hidden.shape[0])
    return loss, losses, seq_logps, *metrics, dx, coef, *run.sums.result()  # type: ignore[return-value]


class _Pass:
    """One run over the rows: what both strategies share."""

    def __init__(
        self, rows: Rows, args: PreferenceArgs, weighted: bool, token_weights: Tensor, needs: tuple[bool, ...]
    ) -> None:
        self.rows, self.args, self.weighted, self.needs = rows, args, weighted, needs
        if token_weights.numel() and not rows.full:
            token_weights = token_weights.index_select(0, rows.index)
        self.token_weights = token_weights
        self.dx = torch.empty_like(rows.x) if needs[0] else rows.x.new_empty(0)
        self.acc = ops.acc_dtype(rows.x.dtype)
        self.sums: WeightGrad

    def preference(
        self, head: Head, args: PreferenceArgs, logp: Tensor, extra: Tensor, part: slice
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """(outputs of the kernel, seq_logps [s], coefficient of each row [n]) for the rows of `part`."""
        weights = self.token_weights[part] if self.token_weights.numel() else self.token_weights
        offsets = torch.cat([args.lengths.new_zeros(1), args.lengths.cumsum(0)])  # [s + 1]

        def total(values: Tensor, by: Tensor = logp[:0]) -> Tensor:
            return head.kernels.sequence_sum(values, offsets, by, False)

        seq_logps = total(logp, weights)
        wpo = wpo_weights(logp, extra, total, args.lengths, args.pairs) if self.weighted else seq_logps[:0].double()
        outputs = args.run(head.kernels, seq_logps, wpo)
        coef = outputs[2].repeat_interleave(args.lengths, output_size=logp.shape[0])
        return outputs, seq_logps, coef * weights if weights.numel() else coef

    def gradients(self, head: Head, g: Tensor, part: slice, coef: Tensor) -> None:
        if self.needs[0]:
            torch.mm(g, head.weight, out=self.dx[part])
        self.sums.add(g, self.rows.x[part], coef)

    def pairs(self, head: Head, plan: list[Chunk]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        self.sums = WeightGrad(head.weight, len(plan), *self.needs[1:])
        if len(plan) == 1:
            g, logp, _, extra = head.fused(self.rows.x, self.rows.labels, self.weighted)
            outputs, seq_logps, coef = self.preference(head, self.args, logp, extra, slice(None))
            self.gradients(head, g, slice(None), coef)
            return outputs, seq_logps, coef
        divisors = self.args.divisors(head.kernels, self.acc)
        seen, low, coefs = [], 0, []
        for chunk in plan:
            part = slice(low, low + chunk.num_rows)
            low = part.stop
            g, logp, _, extra = head.fused(self.rows.x[part], self.rows.labels[part], self.weighted)
            outputs, seq_logps, coef = self.preference(head, self.args.narrow(chunk, *divisors), logp, extra, part)
            seen.append((outputs, seq_logps))
            coefs.append(coef)
            self.gradients(head, g, part, coef)
        return *self.merge(plan, seen), torch.cat(coefs)

    def merge(
        self, plan: list[Chunk], seen: list[tuple[tuple[Tensor, ...], Tensor]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Chunk results back in the caller's order of pairs and sequences; losses and counts add up."""
        sequences = torch.tensor([s for c in plan for s in c.sequences])
        pairs = torch.tensor([p for c in plan for p in c.pairs], dtype=torch.int64)

        def place(parts: list[Tensor], index: Tensor) -> Tensor:
            values = torch.cat(parts)
            return torch.empty_like(values).index_copy_(0, index.to(values.device), values)

        merged = []
        for k in range(8):
            parts = [outputs[k] for outputs, _ in seen]
            if k in (0, 7):  # loss, counts
                merged.append(torch.stack(parts).sum(0))
            else:
                merged.append(place(parts, sequences if k == 2 else pairs))
        return tuple(merged), place([s for _, s in seen], sequences)

    def two_pass(self, head: Head, step: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        x, labels = self.rows.x, self.rows.labels
        parts = [slice(*c) for c in chunks(x.shape[0], step)]
        self.sums = WeightGrad(head.weight, len(parts), *self.needs[1:])
        first = [
            head.kernels.token_logps_fwd(head.logits(x[p]), labels[p], *head.options, self.weighted) for p in parts
        ]
        empty = x.new_empty(0, dtype=self.acc)
        logp, lse = (torch.cat([f[k] for f in first]) if first else empty for k in range(2))
        extra = torch.cat([f[2] for f in first], dim=-1) if first else empty
        outputs, seq_logps, coef = self.preference(head, self.args, logp, extra, slice(None))
        for p in parts:
            self.gradients(head, head.again(x[p], labels[p], lse[p]), p, coef[p])
        return outputs, seq_logps, coef


@linear_preference_op.register_fake
def _(hidden, weight, bias, labels, cu_seqlens, token_weights, ref_logps, lengths, pairs, *rest):
    acc = ops.acc_dtype(hidden.dtype)
    seq_logps = hidden.new_empty(lengths.shape[0], dtype=acc)
    loss, losses, _, *metrics = ops._fake_preference(seq_logps, pairs)
    return loss, losses, seq_logps, *metrics, *fake_known_loss(hidden, weight, *rest[-5:-2])


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, cu_seqlens, token_weights, args, flags, impl):
        outputs = linear_preference_op(hidden, weight, bias, labels, cu_seqlens, token_weights, *args, *flags, impl)
        ctx.save_for_backward(*outputs[8:])
        ctx.mark_non_differentiable(*outputs[1:8])
        return outputs[:8]

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return *known_loss_grads(ctx, grad_loss), *(None,) * 6


def linear_preference(
    inputs: HeadInputs,
    cu_seqlens: Tensor,
    token_weights: Tensor,
    args: tuple[Any, ...],
    use_weighting: bool,
    couples_pairs: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    """(loss, losses, seq_logps, chosen_rewards, rejected_rewards, value_gap, order, counts); loss is differentiable."""
    i = inputs
    flags = (*i.options, use_weighting, couples_pairs, *i.needs, i.row_limit)
    return _LinearPreference.apply(i.hidden, i.weight, i.bias, i.labels, cu_seqlens, token_weights, args, flags, impl)
