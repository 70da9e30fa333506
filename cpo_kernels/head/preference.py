"""A trainable head under a known preference loss: loss, dX and dW in one forward pass (pairs, deferred, two_pass).

`pairs` puts whole groups of linked pairs into one chunk. The chunk's sequence log-probs give the loss and the
coefficient dL/dL_s of each of its sequences while the logits are still in memory, so that dX and dW need no other
logits (3 products). If a group does not fit the budget, or the loss couples all pairs, `two_pass` computes all
log-probs first and then recomputes the logits with known coefficients (4 products). `deferred` avoids that for a single
pair with dL/dL_rejected = -dL/dL_chosen = -c: there dW = c * (sum over chosen rows - sum over rejected rows), and c can
be applied last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.batch_plan import Layout, Part, PlanTensors, Tables, to_device
from cpo_kernels.head.chunk import Chunk
from cpo_kernels.head.grads import HeadGrads, WeightGrad, fake_head_grads, scale_rows, scaled_grads
from cpo_kernels.head.inputs import Execution, Head, HeadTensors, Needs, RowLogps, Rows, gather_rows, labelled_index
from cpo_kernels.head.live import LiveDx, filtered_chunk, no_sums, over_shards
from cpo_kernels.head.recompute import second_pass
from cpo_kernels.head.strategy import SumLimit
from cpo_kernels.library import PreferenceResult, fake_preference, functional_op
from cpo_kernels.ops.preference import PreferenceArgs, wpo_weights
from cpo_kernels.ops.token_logps import HeadOptions


class LinearPreferenceArgs(NamedTuple):
    """Arguments of `linear_preference` besides the head's tensors, whose rows are the sequences end to end."""

    token_weights: Tensor  # [M] or [0]
    ref_hidden: Tensor  # [M, H], projected by the same head; [0] if ref_logps are given
    loss: PreferenceArgs  # lengths [S]: labelled rows of each sequence
    use_weighting: bool
    couples_pairs: bool
    opposite: bool
    options: HeadOptions
    needs: Needs
    plan: PlanTensors  # all [0] without a plan
    execution: Execution


class LinearPreference(NamedTuple):
    result: PreferenceResult
    seq_logps: Tensor  # [S]
    filter_sums: Tensor  # [3] of `Found.filter_sums`; 0 without a filter
    grads: HeadGrads


def _fake_linear_preference(tensors: HeadTensors, args: LinearPreferenceArgs) -> LinearPreference:
    acc = library.acc_dtype(tensors.hidden.dtype)
    seq_logps = tensors.hidden.new_empty(args.loss.lengths.shape[0], dtype=acc)
    result = fake_preference(seq_logps, args.loss.pairs)
    filter_sums = tensors.hidden.new_empty(3, dtype=torch.float32)
    return LinearPreference(result, seq_logps, filter_sums, fake_head_grads(tensors, args.needs))


@functional_op("linear_preference", fake=_fake_linear_preference, waits=True)
def linear_preference_op(tensors: HeadTensors, args: LinearPreferenceArgs) -> LinearPreference:
    loss, size, row_limit = args.loss, tensors.hidden.shape[0], args.execution.limits.budget
    summed = args.execution.limits.sum if args.needs.dw else SumLimit(row_limit, 0)
    if not loss.scores.numel():
        loss = loss.with_divisors(loss.pairs.shape[0])  # no ratings, no ties
    kernels, acc = args.execution.backend.kernels(tensors.weight), library.acc_dtype(tensors.hidden.dtype)
    if args.plan.host.numel():
        layout, index, tables_on_device = Layout.unpack(args.plan.host), args.plan.row_index, args.plan.tables
    else:
        several = loss.needs_counts and size > summed.rows  # several chunks: each divides by the batch's count
        counts = loss.counted(kernels, acc) if several else loss.lengths.new_empty(0)
        # The only host-device synchronisation.
        numbers = torch.cat([counts, loss.lengths, loss.pairs.flatten()]).tolist()
        if several:
            loss, numbers = loss.with_divisors(*numbers[:2]), numbers[2:]
        num_sequences = len(loss.lengths)
        layout = Layout.of(
            numbers[:num_sequences], numbers[num_sequences:], row_limit, args.couples_pairs, args.opposite, summed
        )
        index = labelled_index(tensors.labels, args.options.ignore_index, layout.num_rows)
        tables_on_device = to_device(layout.tables(), tensors.hidden.device)
    tables = Tables(layout, tables_on_device)
    if len(layout.chunks) > 1:
        if loss.needs_counts:
            loss = loss.with_divisors(*loss.counted(kernels, acc).tolist())
        index = index.index_select(0, tables.order)
    planned = args.options.ignore_index if args.plan.host.numel() else None
    rows = gather_rows(tensors, index, layout.num_rows == size and len(layout.chunks) == 1, planned)
    ref = rows.gather(args.ref_hidden) if args.ref_hidden.numel() else None
    weights = rows.gather(args.token_weights) if args.token_weights.numel() else args.token_weights
    max_rows = layout.max_rows
    if ref is not None:
        max_rows = args.execution.rows_with_reference(max_rows)
    head = args.execution.head(tensors, rows.labels, args.options, max_rows)
    batch = _Batch(head, rows, ref, weights, loss, layout, tables, args.use_weighting, args.needs, args.execution)
    out = STRATEGIES[layout.strategy](batch)
    filtered = args.execution.filter_eps > 0 and args.needs.dx
    sums = over_shards(head, out.filter_sums) if filtered else out.filter_sums
    return out._replace(filter_sums=sums, grads=out.grads.scattered(rows, size))


def narrow(args: PreferenceArgs, tables: Tables, part: Part) -> PreferenceArgs:
    """The arguments of one chunk: its sequences and pairs, renumbered."""
    sequences, pairs = tables.sequences[part.sequences], tables.pair_order[part.pairs]

    def pick(t: Tensor, index: Tensor) -> Tensor:
        return t.index_select(0, index) if t.numel() else t

    return args._replace(
        ref_logps=pick(args.ref_logps, sequences),
        lengths=pick(args.lengths, sequences),
        pairs=tables.local_pairs[part.pairs],
        scores=pick(args.scores, sequences),
        conditions=pick(args.conditions, pairs),
        pair_weights=pick(args.pair_weights, pairs),
        pair_betas=pick(args.pair_betas, pairs),
        margins=pick(args.margins, sequences),
    )


class _Loss(NamedTuple):
    """The loss of a chunk."""

    result: PreferenceResult
    seq_logps: Tensor  # [s]
    coef: Tensor  # [n], of the rows


@dataclass
class _Batch:
    """Input of the strategies: the head, and the rows in the layout's order."""

    head: Head
    rows: Rows
    ref: Tensor | None
    token_weights: Tensor
    args: PreferenceArgs
    layout: Layout
    tables: Tables
    use_weighting: bool
    needs: Needs
    execution: Execution

    def loss(self, index: int, logps: RowLogps) -> _Loss:
        """The loss of chunk `index` from the log-probs of its rows."""
        part = self.layout.parts[index]
        args = narrow(self.args, self.tables, part) if len(self.layout.chunks) > 1 else self.args
        weights = self.token_weights[part.rows] if self.token_weights.numel() else self.token_weights
        offsets = self.tables.offsets(part, index)
        kernels = self.head.kernels

        def total(values: Tensor, by: Tensor) -> Tensor:
            return kernels.sequence_sum(values, offsets, by, False)

        seq_logps = total(logps.logp, weights)
        if self.ref is not None:
            args = args._replace(ref_logps=total(logps.ref_logp, weights))
        if self.use_weighting:
            aligned = total(logps.logp - logps.extra[1], weights[:0])
            args = args.weighted(wpo_weights(aligned, args.lengths, args.pairs))
        result = args.run(kernels, seq_logps)
        coef = result.grad.index_select(0, self.tables.segments[part.rows])
        return _Loss(result, seq_logps, coef * weights if weights.numel() else coef)

    def inputs(self, part: slice) -> tuple[Tensor, Tensor, bool, Tensor | None]:
        """Arguments of `Head.forward` for some rows."""
        ref = None if self.ref is None else self.ref[part]
        return self.rows.x[part], self.rows.labels[part], self.use_weighting, ref

    def sums(self, num_chunks: int) -> tuple[WeightGrad, Tensor]:
        """The accumulator of dW and db, and an uninitialised dX."""
        x = self.rows.x
        dx = torch.empty_like(x) if self.needs.dx else x.new_empty(0)
        return WeightGrad(self.head, num_chunks, self.needs), dx


def _merged(chunks: list[_Loss], tables: Tables) -> _Loss:
    """Chunk results back in the caller's order of pairs and sequences; losses and counts add up."""
    if len(chunks) == 1:
        return chunks[0]
    merged = {}
    for name in PreferenceResult._fields:
        parts = [getattr(chunk.result, name) for chunk in chunks]
        if name in ("loss", "counts"):
            merged[name] = torch.stack(parts).sum(0)
        else:
            merged[name] = torch.cat(parts).index_select(0, tables.slots if name == "grad" else tables.pair_places)
    seq_logps = torch.cat([c.seq_logps for c in chunks]).index_select(0, tables.slots)
    return _Loss(PreferenceResult(**merged), seq_logps, torch.cat([c.coef for c in chunks]))


def _pairs(batch: _Batch) -> LinearPreference:
    parts = batch.layout.parts
    sums, dx = batch.sums(len(parts))
    losses: list[_Loss] = []
    filter_sums = no_sums(dx)
    for k, part in enumerate(parts):
        chunk = Chunk(batch.head, batch.inputs(part.rows), batch.execution, dx.numel() > 0)
        loss = batch.loss(k, chunk.logps)
        of_dx, live = chunk.grads(loss.coef, dx[part.rows], sums)
        losses.append(loss._replace(coef=of_dx))
        filter_sums += live
    result, seq_logps, coef = _merged(losses, batch.tables)
    return LinearPreference(result, seq_logps, filter_sums, sums.result(dx, coef))


def _deferred(batch: _Batch) -> LinearPreference:
    pair, weights = batch.args.pairs[0], batch.token_weights
    signs = torch.arange(1, -2, -2, device=pair.device, dtype=library.acc_dtype(batch.rows.x.dtype))  # 1, -1
    sign = signs.new_zeros(len(batch.layout.lengths)).index_add_(0, pair, signs)  # [S]
    sign = sign.index_select(0, batch.tables.segments)  # [n]
    sign = sign * weights if weights.numel() else sign
    parts = batch.layout.row_chunks
    sums, dx = batch.sums(len(parts))
    logps: list[RowLogps] = []
    of_dx = torch.empty_like(sign)
    filter_sums = no_sums(dx)
    for p in parts:
        chunk = Chunk(batch.head, batch.inputs(p), batch.execution, dx.numel() > 0)
        logps.append(chunk.logps)
        if p is parts[-1]:
            result, seq_logps, _ = batch.loss(0, RowLogps.joined(logps))
            sums.scale = scale = result.grad.index_select(0, pair[:1])
        of_dx[p], live = chunk.grads(sign[p], dx[p], sums)
        filter_sums += live
    return LinearPreference(result, seq_logps, filter_sums, sums.result(dx, of_dx * scale))


def _two_pass(batch: _Batch) -> LinearPreference:
    rows, execution, parts = batch.rows, batch.execution, batch.layout.row_chunks
    filtered, filter_sums = execution.filter_eps > 0 and batch.needs.dx, no_sums(rows.x)
    dx = rows.x.new_empty(0)
    if filtered:
        dx = torch.empty_like(rows.x, dtype=execution.dx_dtype(batch.head.weight))
    chunks: list[RowLogps] = []
    live_dx = LiveDx(batch.head, rows.x.shape[0])
    for p in parts:
        if filtered:  # dX is computed here, and the second pass computes only dW
            logps, sums = filtered_chunk(batch.head, batch.inputs(p), execution, dx[p], live_dx)
            filter_sums += sums
        else:
            logps = batch.head.logps(*batch.inputs(p))
        chunks.append(logps)
    live_dx.write()
    logps = RowLogps.joined(chunks)
    result, seq_logps, coef = batch.loss(0, logps)
    needs = batch.needs._replace(dx=batch.needs.dx and not filtered)
    grads = second_pass(batch.head, rows.x, rows.labels, logps.lse, logps.lacks, coef, needs)
    if filtered and dx.dtype != rows.x.dtype:
        dx, coef = scale_rows(dx, coef, rows.x.dtype), torch.ones_like(coef)
    grads = grads._replace(dx=dx, coef=coef) if filtered else grads
    return LinearPreference(result, seq_logps, filter_sums, grads)


STRATEGIES: dict[str, Callable[[_Batch], LinearPreference]] = {
    "pairs": _pairs,
    "deferred": _deferred,
    "two_pass": _two_pass,
}


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, args: LinearPreferenceArgs
    ) -> tuple[Tensor, ...]:
        result, seq_logps, sums, grads = linear_preference_op(HeadTensors(hidden, weight, bias, labels), args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*result[1:], seq_logps, sums)
        return *result, seq_logps, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_grads(ctx, grad_loss), None, None


def linear_preference(tensors: HeadTensors, args: LinearPreferenceArgs) -> tuple[PreferenceResult, Tensor, Tensor]:
    """The result, whose loss is differentiable, seq_logps [S] and filter_sums [3]."""
    *result, seq_logps, filter_sums = _LinearPreference.apply(*tensors, args)
    return PreferenceResult(*result), seq_logps, filter_sums
