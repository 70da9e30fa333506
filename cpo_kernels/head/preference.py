"""A trainable head under a known preference loss: loss, dX and dW in one forward pass (pairs, deferred, two_pass).

`pairs` puts whole groups of linked pairs into one chunk: the chunk's sequence log-probs give the loss and the
coefficient dL/dL_s of each of its sequences while onehot - softmax is still there, so dX and dW need no second look at
the logits (3 products). Where a group does not fit the budget, or the loss couples all pairs, `two_pass` computes all
log-probs first and makes the logits again with known coefficients (4 products). `deferred` spares one pair that: where
dL/dL_rejected = -dL/dL_chosen = -c, dW = c * (sum over chosen rows - sum over rejected rows), and c may come last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.batch_plan import Layout, Part, Tables, to_device
from cpo_kernels.head.grads import WeightGrad, fake_known_loss, known_loss_grads
from cpo_kernels.head.inputs import Head, HeadInputs, Rows, gather_rows, labelled_index
from cpo_kernels.head.matmul import product
from cpo_kernels.head.recompute import second_pass
from cpo_kernels.ops.preference import PreferenceArgs, wpo_weights
from cpo_kernels.ops.token_logps import HeadOptions


@library.functional_op("linear_preference", waits=True)
def linear_preference_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    ref_hidden: Tensor,
    args: PreferenceArgs,
    options: HeadOptions,
    use_weighting: bool,
    couples_pairs: bool,
    opposite: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    row_limit: int,
    plan_host: Tensor,
    plan_index: Tensor,
    plan_tables: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [M, H], labels [M] of sequences end to end; args.lengths [S] labelled rows of each.

    ref_hidden [M, H] goes through the same head, or is [0] where ref_logps are given. The three plan tensors are those
    of `BatchPlan`, or all [0].

    Returns loss [], losses [P], seq_logps [S], chosen_rewards, rejected_rewards, value_gap [P], order [P], counts [3],
    then what backward scales: dX unscaled [M, H], coefficients [M], dW up to a power of two, db in float32, power [].
    """
    lengths, pairs = args.lengths, args.pairs
    if not args.scores.numel():
        args = args.with_divisors(pairs.shape[0])  # no ratings, no ties
    kernels, acc = dispatch.kernels(impl, weight), library.acc_dtype(hidden.dtype)
    if plan_host.numel():
        layout, index = Layout.unpack(plan_host), plan_index
    else:
        several = args.needs_counts and hidden.shape[0] > row_limit  # several chunks: each divides by the batch's count
        counts = args.counted(kernels, acc) if several else lengths.new_empty(0)
        known = torch.cat([counts, lengths, pairs.flatten()]).tolist()  # the host waits here, and nowhere else
        if several:
            args, known = args.with_divisors(*known[:2]), known[2:]
        layout = Layout.of(known[: len(lengths)], known[len(lengths) :], row_limit, couples_pairs, opposite)
        index = labelled_index(labels, options.ignore_index, layout.num_rows)
        plan_tables = to_device(layout.tables(), hidden.device)
    tables = Tables(layout, plan_tables)
    if len(layout.chunks) > 1:
        if args.needs_counts:
            args = args.with_divisors(*args.counted(kernels, acc).tolist())
        index = index.index_select(0, tables.order)
    rows = gather_rows(hidden, labels, index, layout.num_rows == hidden.shape[0] and len(layout.chunks) == 1)
    ref = rows.gather(ref_hidden) if ref_hidden.numel() else None
    weights = rows.gather(token_weights) if token_weights.numel() else token_weights
    run = _Pass(rows, ref, weights, args, layout, tables, use_weighting, (need_dx, need_dw, need_db))
    max_rows = layout.max_rows
    if ref is not None:
        max_rows = max(max_rows, min(2 * max_rows, row_limit))
    head = Head(weight, bias, options, max_rows, impl)
    outputs, seq_logps, coef = getattr(run, layout.strategy)(head)
    loss, losses, _, *metrics = outputs
    dx = rows.scatter(run.dx, hidden.shape[0]) if need_dx else run.dx
    coef = rows.scatter(coef, hidden.shape[0])
    return loss, losses, seq_logps, *metrics, dx, coef, *run.head_grads


Outputs = tuple[tuple[Tensor, ...], Tensor, Tensor]  # of the preference kernel, seq_logps [s], coefficients of rows [n]


def narrow(args: PreferenceArgs, tables: Tables, part: Part) -> PreferenceArgs:
    """Only this chunk's sequences and pairs, renumbered."""
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


class _Pass:
    """One run over the rows, by the strategy of that name."""

    def __init__(
        self,
        rows: Rows,
        ref: Tensor | None,
        token_weights: Tensor,
        args: PreferenceArgs,
        layout: Layout,
        tables: Tables,
        weighted: bool,
        needs: tuple[bool, ...],
    ) -> None:
        self.rows, self.ref, self.token_weights, self.args = rows, ref, token_weights, args
        self.layout, self.tables, self.weighted, self.needs = layout, tables, weighted, needs
        self.acc = library.acc_dtype(rows.x.dtype)
        self.dx: Tensor  # [n, H] without coefficients
        self.head_grads: tuple[Tensor, Tensor, Tensor]  # dW up to a power of two, db, power

    def preference(self, head: Head, index: int, logp: Tensor, extra: Tensor, ref_logp: Tensor) -> Outputs:
        """The loss of chunk `index` from the log-probs of its rows."""
        part = self.layout.parts[index]
        args = narrow(self.args, self.tables, part) if len(self.layout.chunks) > 1 else self.args
        weights = self.token_weights[part.rows] if self.token_weights.numel() else self.token_weights
        offsets = self.tables.offsets(part, index)

        def total(values: Tensor, by: Tensor) -> Tensor:
            return head.kernels.sequence_sum(values, offsets, by, False)

        seq_logps = total(logp, weights)
        if self.ref is not None:
            args = args._replace(ref_logps=total(ref_logp, weights))
        wpo = seq_logps.new_empty(0, dtype=torch.float64)
        if self.weighted:
            wpo = wpo_weights(total(logp - extra[1], weights[:0]), args.lengths, args.pairs)
        outputs = args.run(head.kernels, seq_logps, wpo)
        coef = outputs[2].index_select(0, self.tables.segments[part.rows])
        return outputs, seq_logps, coef * weights if weights.numel() else coef

    def ref_of(self, part: slice) -> Tensor | None:
        return None if self.ref is None else self.ref[part]

    def pairs(self, head: Head) -> Outputs:
        parts = self.layout.parts
        sums = WeightGrad(head.weight, abs(head.options.scale), len(parts), *self.needs[1:])
        self.dx = torch.empty_like(self.rows.x) if self.needs[0] else self.rows.x.new_empty(0)
        seen: list[Outputs] = []
        for k, part in enumerate(parts):
            x, labels = self.rows.x[part.rows], self.rows.labels[part.rows]
            g, logp, _, extra, ref_logp = head.fused(x, labels, self.weighted, self.ref_of(part.rows))
            seen.append(self.preference(head, k, logp, extra, ref_logp))
            if self.needs[0]:
                product(g, head.weight, self.dx[part.rows])
            sums.add(g, x, seen[-1][2])
        self.head_grads = sums.result()
        return seen[0] if len(seen) == 1 else self.merge(seen)

    def merge(self, seen: list[Outputs]) -> Outputs:
        """Chunk results back in the caller's order of pairs and sequences; losses and counts add up."""

        def place(parts: Sequence[Tensor], places: Tensor) -> Tensor:
            return torch.cat(list(parts)).index_select(0, places)

        merged = []
        for k, parts in enumerate(zip(*(outputs for outputs, _, _ in seen), strict=True)):
            if k in (0, 7):  # loss, counts
                merged.append(torch.stack(parts).sum(0))
            else:
                merged.append(place(parts, self.tables.slots if k == 2 else self.tables.pair_places))
        seq_logps = place([s for _, s, _ in seen], self.tables.slots)
        return tuple(merged), seq_logps, torch.cat([c for _, _, c in seen])

    def deferred(self, head: Head) -> Outputs:
        first = torch.arange(1, -2, -2, device=head.weight.device, dtype=self.acc)  # 1, -1
        sign = first.new_zeros(len(self.layout.lengths)).index_add_(0, self.args.pairs[0], first)  # [S]
        sign = sign.index_select(0, self.tables.segments)  # [n]
        sign = sign * self.token_weights if self.token_weights.numel() else sign
        parts = self.layout.row_chunks
        sums = WeightGrad(head.weight, abs(head.options.scale), len(parts), *self.needs[1:])
        self.dx = torch.empty_like(self.rows.x) if self.needs[0] else self.rows.x.new_empty(0)
        seen = []
        for p in parts:
            x, labels = self.rows.x[p], self.rows.labels[p]
            g, logp, _, extra, ref_logp = head.fused(x, labels, self.weighted, self.ref_of(p))
            seen.append((logp, extra, ref_logp))
            if self.needs[0]:
                product(g, head.weight, self.dx[p])
            if p is parts[-1]:
                outputs = self.preference(head, 0, *(torch.cat(c, dim=-1) for c in zip(*seen, strict=True)))
                sums.scale = outputs[0][2].index_select(0, self.args.pairs[0, :1])
            sums.add(g, x, sign[p])
        self.head_grads = sums.result()
        return outputs

    def two_pass(self, head: Head) -> Outputs:
        x, labels = self.rows.x, self.rows.labels
        parts = self.layout.row_chunks
        first = [head.forward(x[p], labels[p], self.weighted, self.ref_of(p)) for p in parts]
        logp, lse, extra, ref_logp = (torch.cat(columns, dim=-1) for columns in zip(*first, strict=True))
        outputs = self.preference(head, 0, logp, extra, ref_logp)
        self.dx, dw, db, power = second_pass(head, x, labels, lse, outputs[2], *self.needs)
        self.head_grads = dw, db, power
        return outputs


@torch.library.register_fake("cpo_kernels::linear_preference")
def _(hidden, weight, bias, labels, token_weights, ref_hidden, ref_logps, lengths, pairs, *rest):
    acc = library.acc_dtype(hidden.dtype)
    seq_logps = hidden.new_empty(lengths.shape[0], dtype=acc)
    loss, losses, _, *metrics = library.fake_preference(seq_logps, pairs)
    return loss, losses, seq_logps, *metrics, *fake_known_loss(hidden, weight, *rest[-8:-5])


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, ref_hidden, args, flags, plan, impl):
        outputs = linear_preference_op(
            hidden, weight, bias, labels, token_weights, ref_hidden, *args, *flags, *plan, impl
        )
        ctx.save_for_backward(*outputs[8:])
        ctx.mark_non_differentiable(*outputs[1:8])
        return outputs[:8]

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return *known_loss_grads(ctx, grad_loss), *(None,) * 7


def linear_preference(
    inputs: HeadInputs,
    token_weights: Tensor,
    ref_hidden: Tensor,
    args: PreferenceArgs,
    use_weighting: bool,
    couples_pairs: bool,
    opposite: bool,
    plan: tuple[Tensor, Tensor, Tensor],
    impl: str,
) -> tuple[Tensor, ...]:
    """(loss, losses, seq_logps, chosen_rewards, rejected_rewards, value_gap, order, counts); loss is differentiable."""
    i = inputs
    flags = (*i.options, use_weighting, couples_pairs, opposite, *i.needs, i.row_limit)
    return _LinearPreference.apply(
        i.hidden, i.weight, i.bias, i.labels, token_weights, ref_hidden, args, flags, plan, i.backend(impl)
    )
