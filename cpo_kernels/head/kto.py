"""A head under KTO: loss, dX and dW in one forward pass (3 products).

Given its reference point, KTO's loss is a sum over single sequences. A chunk of whole sequences gives the coefficient
dL/dL_s of each while their logits are still there. Only the rows of a sequence longer than a chunk are projected
once more, for its log-prob (4 products).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.batch_plan import Group, pack_groups
from cpo_kernels.head.chunk import Chunk
from cpo_kernels.head.grads import HeadGrads, WeightGrad, fake_head_grads, scaled_grads
from cpo_kernels.head.inputs import Execution, HeadTensors, Needs, RowLogps, gather_rows, labelled_index
from cpo_kernels.head.live import no_sums, over_shards
from cpo_kernels.head.strategy import SumLimit, chunks, even_rows
from cpo_kernels.library import functional_op
from cpo_kernels.ops.token_logps import HeadOptions
from cpo_kernels.reference.kto import kto_loss


class KTOArgs(NamedTuple):
    """What `kto_loss` takes beside seq_logps [S]."""

    ref_logps: Tensor  # [S] in float64
    desirable: Tensor  # [S] bool
    kl: Tensor  # [] in float64
    beta: float
    desirable_weight: float
    undesirable_weight: float

    def losses(self, seq_logps: Tensor) -> Tensor:
        """[S] in float64."""
        return kto_loss(seq_logps.double(), *self)

    def rewards(self, seq_logps: Tensor) -> Tensor:
        """beta (L - ref), [S] in float64."""
        return self.beta * (seq_logps.double() - self.ref_logps)

    def slopes(self, seq_logps: Tensor) -> Tensor:
        """dloss_s / dL_s, [S] in float64."""
        u = self.rewards(seq_logps) - self.beta * self.kl
        slopes = self.beta * torch.sigmoid(u) * torch.sigmoid(-u)
        return torch.where(self.desirable, -self.desirable_weight * slopes, self.undesirable_weight * slopes)


class LinearKTOArgs(NamedTuple):
    """What `linear_kto` takes beside the head's tensors, whose rows are sequences end to end."""

    loss: KTOArgs
    lengths: Tensor  # [S] labelled rows of each sequence
    ref_hidden: Tensor  # [M, H] to go through the same head; [0] where loss.ref_logps are given
    average: bool  # log-probs per labelled token
    num_sequences: float  # < 0: counted
    options: HeadOptions
    needs: Needs
    execution: Execution


class LinearKTO(NamedTuple):
    loss: Tensor  # []
    losses: Tensor  # [S]
    seq_logps: Tensor  # [S]
    rewards: Tensor  # [S]
    filter_sums: Tensor  # [3] of `Found.filter_sums`; 0 without a filter
    grads: HeadGrads


def _fake_linear_kto(tensors: HeadTensors, args: LinearKTOArgs) -> LinearKTO:
    acc, hidden, size = library.acc_dtype(tensors.hidden.dtype), tensors.hidden, args.lengths.shape[0]
    losses, seq_logps, rewards = (hidden.new_empty(size, dtype=acc) for _ in range(3))
    loss, grads = hidden.new_empty((), dtype=acc), fake_head_grads(tensors, args.needs)
    return LinearKTO(loss, losses, seq_logps, rewards, no_sums(hidden), grads)


@functional_op("linear_kto", fake=_fake_linear_kto, waits=True)
def linear_kto_op(tensors: HeadTensors, args: LinearKTOArgs) -> LinearKTO:
    options, execution, size = args.options, args.execution, tensors.hidden.shape[0]
    lengths = args.lengths.tolist()  # The host waits here, and nowhere else.
    count = args.num_sequences if args.num_sequences > 0 else max(len(lengths), 1)
    index = labelled_index(tensors.labels, options.ignore_index, sum(lengths))
    rows = gather_rows(tensors, index, index.shape[0] == size)
    ref = rows.gather(args.ref_hidden) if args.ref_hidden.numel() else None
    parts = whole_sequences(lengths, execution, args.needs.dw)
    max_rows = max((chunk.stop - chunk.start for part in parts for chunk in part.chunks), default=0)
    if ref is not None:
        max_rows = execution.rows_with_reference(max_rows)
    head = execution.head(tensors, rows.labels, options, max_rows)
    acc = library.acc_dtype(rows.x.dtype)
    seq_logps, coef, of_dx = (rows.x.new_zeros(n, dtype=acc) for n in (len(lengths), sum(lengths), sum(lengths)))
    ref_logps = args.loss.ref_logps.clone()
    offsets = torch.cat([args.lengths.new_zeros(1), args.lengths.cumsum(0)])
    sums = WeightGrad(head, sum(len(part.chunks) for part in parts), args.needs)
    dx = torch.empty_like(rows.x) if args.needs.dx else rows.x.new_empty(0)
    filter_sums = no_sums(dx)

    def inputs(chunk: slice, ref: Tensor | None) -> tuple[Tensor, Tensor, bool, Tensor | None]:
        return rows.x[chunk], rows.labels[chunk], False, None if ref is None else ref[chunk]

    for part in parts:
        own, once = part.sequences, len(part.chunks) == 1
        if once:
            made = Chunk(head, inputs(part.rows, ref), execution, args.needs.dx)
            logps = made.logps
        else:
            logps = RowLogps.joined([head.forward(*inputs(chunk, ref))[1] for chunk in part.chunks])
        bounds = offsets[own.start : own.stop + 1] - part.rows.start
        seq_logps[own] = head.kernels.sequence_sum(logps.logp, bounds, coef[:0], args.average)
        if ref is not None:
            ref_logps[own] = head.kernels.sequence_sum(logps.ref_logp, bounds, coef[:0], args.average).double()
        loss = args.loss._replace(ref_logps=ref_logps[own], desirable=args.loss.desirable[own])
        slopes = loss.slopes(seq_logps[own]) / count
        slopes = slopes / args.lengths[own].clamp(min=1) if args.average else slopes
        coef[part.rows] = slopes.to(acc).repeat_interleave(args.lengths[own], output_size=len(logps.logp))
        for chunk in part.chunks:
            if not once:
                made = Chunk(head, inputs(chunk, None), execution, args.needs.dx)
            of_dx[chunk], live = made.grads(coef[chunk], dx[chunk], sums)
            filter_sums += live
    if execution.filter_eps > 0 and args.needs.dx:
        filter_sums = over_shards(head, filter_sums)
    loss = args.loss._replace(ref_logps=ref_logps)
    losses, rewards = loss.losses(seq_logps), loss.rewards(seq_logps).to(acc)
    grads = sums.result(dx, of_dx).scattered(rows, size)
    return LinearKTO((losses.sum() / count).to(acc), losses.to(acc), seq_logps, rewards, filter_sums, grads)


class Part(NamedTuple):
    """Consecutive sequences, their rows, and the chunks of these: several only of one longer sequence."""

    sequences: slice
    rows: slice
    chunks: list[slice]


def whole_sequences(lengths: list[int], execution: Execution, adds_dw: bool) -> list[Part]:
    """As many whole sequences as fit a chunk, in order."""
    parts: list[Part] = []
    row, most = 0, execution.limits.budget
    longest = max((length for length in lengths if length <= most), default=0)
    limit = (execution.limits.sum if adds_dw else SumLimit(most, 0)).of(sum(lengths), longest)
    for group in pack_groups([Group([s], [], length) for s, length in enumerate(lengths)], limit):
        rows = slice(row, row + group.num_rows)
        step = group.num_rows if group.num_rows <= limit else even_rows(group.num_rows, most)
        pieces = [slice(row + low, row + high) for low, high in chunks(group.num_rows, max(step, 1))]
        parts.append(Part(slice(group.sequences[0], group.sequences[-1] + 1), rows, pieces or [rows]))
        row = rows.stop
    return parts


class _LinearKTO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, args: LinearKTOArgs
    ) -> tuple[Tensor, ...]:
        *results, grads = linear_kto_op(HeadTensors(hidden, weight, bias, labels), args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_grads(ctx, grad_loss), None, None


def linear_kto(tensors: HeadTensors, args: LinearKTOArgs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, which is differentiable, losses [S], seq_logps [S], rewards [S] and filter_sums [3]."""
    loss, losses, seq_logps, rewards, filter_sums = _LinearKTO.apply(*tensors, args)
    return loss, losses, seq_logps, rewards, filter_sums
