"""The backward pass over kept live sets: dX, dW and db for any coefficients, from 2 L products (strategy `live`)."""

from typing import Any

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import columns_bwd_, columns_here, logit_and_slope
from cpo_kernels.head.grads import HeadGrads, scale_rows, sum_powers
from cpo_kernels.head.inputs import Head, Logits, Needs
from cpo_kernels.head.label_remainder import add_remainder, label_remainder, product_dx
from cpo_kernels.head.live import TAIL_UNIT, LiveDx, LiveSets, adds_by_index
from cpo_kernels.head.matmul import add_product, product
from cpo_kernels.head.strategy import chunks, even_rows

FEW_SETS = 12  # up to which `live_sum` adds the tails; with more sets tail^T tails is a matrix product
LABEL_ROWS = 1024  # rows in float32 at a time
TILE_ELEMENTS = 2**23  # elements of the sets' products added at a time: 2^20 to 2^22 took 1.1 to 3 times as long


def live_backward(
    head: Head, sets: LiveSets, x: Tensor, labels: Tensor, lse: Tensor, lacks: Tensor, coef: Tensor, needs: Needs
) -> HeadGrads:
    """The gradients of sum_t coef_t logp_t; x [n, H], labels, lse and coef [n], lacks [n] or [0]. The returned
    coefficients are those by which the rows of dx are yet to be multiplied.

    The logits of rows in exact sets are recomputed, in tiles of columns from which all three gradients are computed.
    """
    weight, acc, width = head.weight, library.acc_dtype(x.dtype), sets.tail.shape[1]
    power, db_power = sum_powers(coef, x, abs(head.options.scale))
    # float16 does not have the range for coefficients.
    of_dx, left = (None, coef) if x.dtype == torch.float16 else (coef, torch.ones_like(coef))
    dx = torch.empty_like(x) if needs.dx else x.new_empty(0)
    db = weight.new_zeros(weight.shape[0] if needs.db else 0, dtype=acc)
    if not sets.exact:  # no rows
        return HeadGrads(dx, left, weight.new_zeros(weight.shape if needs.dw else 0), db, power)
    exact = _ExactRows(head, x, labels, lse, lacks, coef, sets)
    tau = torch.cat([g[:, -1].to(acc) * (not e) for g, e in zip(sets.grads(), sets.exact, strict=True)]) / TAIL_UNIT
    bias_coef = coef / db_power
    if needs.dx:
        live_dx = LiveDx(head, x.shape[0])
        live_dx.add(sets, dx, of_dx)
        live_dx.write()
    if needs.db:
        db[:width] = _live_db(sets, tau, bias_coef)
    dw = _dw_of(head, sets, exact, x, coef, power, tau) if needs.dw else None
    most = dw.most_columns if dw else width if exact.index.numel() else 0
    for low, high in chunks(width, even_rows(width, min(most, exact.most_columns()))) if most else ():
        g = exact.grads(low, high)  # [m, high - low]
        if needs.dx:
            exact.add_dx(g, low, high)
        if needs.db:
            db[low:high] += torch.mv(g.t(), (exact.left / db_power).to(x.dtype)).to(acc)
        if dw:
            dw.add(g, low, high)
    if needs.dx and exact.index.numel():
        dx[exact.index] = exact.finished_dx(of_dx is not None)
    return HeadGrads(dx, left, dw.made.to(x.dtype) if dw else weight.new_empty(0), db * db_power, power)


def _live_db(sets: LiveSets, tau: Tensor, coef: Tensor) -> Tensor:
    """db [width] but for exact sets; tau of all rows / TAIL_UNIT and coef [n]."""
    rows = [sets.rows(k) for k in range(len(sets.exact))]
    db = sets.tail.t().to(tau.dtype) @ torch.stack([torch.dot(tau[r], coef[r]) for r in rows])
    for g, columns, r in zip(sets.grads(), sets.columns_of(), rows, strict=True):
        db[columns] += torch.mv(g[:, :-1].t(), coef[r].to(g.dtype)).to(tau.dtype)
    return db


def _dw_of(
    head: Head, sets: LiveSets, exact: "_ExactRows", x: Tensor, coef: Tensor, power: Tensor, tau: Tensor
) -> "_OwnDw | _IndexedDw | _TiledDw":
    of_tails = tau * (coef / power)
    rows = [sets.rows(k) for k in range(len(sets.exact))]
    tails = torch.stack([of_tails[r] @ x[r].to(tau.dtype) for r in rows])  # [sets, H]
    if dispatch.own_matmuls(head.kernels, head.weight):
        return _OwnDw(head, sets, exact, x, coef, tails)
    if adds_by_index(head.kernels):
        return _IndexedDw(head, sets, exact, x, coef, power, tails)
    return _TiledDw(head, sets, exact, scale_rows(x, coef / power), power, tails)


class _OwnDw:
    """By the CPU's own matmul, which keeps the sums of its rows in the cache over all sets. Exact rows come after."""

    def __init__(self, head: Head, sets: LiveSets, exact: "_ExactRows", x: Tensor, coef: Tensor, tails: Tensor) -> None:
        kernels: Any = head.kernels
        labels = sets.label_columns.index_fill(0, exact.index, -1), sets.label_grads
        args = (*sets.places, sets.set_rows, x, coef, sets.tail, tails, *labels)
        self.made = kernels.live_dw(*args, len(head.weight))  # [V, H]
        self.x = exact.x
        self.most_columns = sets.tail.shape[1] if exact.index.numel() else 0

    def add(self, g: Tensor, low: int, high: int) -> None:
        add_product(self.made[low:high], g.t(), self.x, first=False)


class _IndexedDw:
    """By kernels that add into a float32 dW by index."""

    def __init__(
        self, head: Head, sets: LiveSets, exact: "_ExactRows", x: Tensor, coef: Tensor, power: Tensor, tails: Tensor
    ) -> None:
        kernels: Any = head.kernels
        self.made = tails.new_zeros(head.weight.shape)  # [V, H]
        width, scaled = sets.tail.shape[1], scale_rows(x, coef / power)
        torch.mm(sets.tail.t().to(tails.dtype), tails, out=self.made[:width])
        kernels.live_dw_(*sets.places, sets.set_rows, scaled, self.made[:width])
        self._add_label_remainders(sets, exact, x, coef / power, scaled)
        self.scaled = exact.scaled(power)
        self.most_columns = width if exact.index.numel() else 0

    def _add_label_remainders(
        self, sets: LiveSets, exact: "_ExactRows", x: Tensor, coef: Tensor, scaled: Tensor
    ) -> None:
        """What the labels' products lack of c_t g_t x_t, where g_t is known before rounding. On a GPU `index_put_`
        sorts, and adds up the rows of one label in the same order every time."""
        if not sets.label_grads.numel():
            return
        columns = sets.label_columns.index_fill(0, exact.index, -1)
        kept, acc = (columns >= 0)[:, None], self.made.dtype
        for low, high in chunks(len(x), LABEL_ROWS):
            rows = slice(low, high)
            g = sets.label_grads[rows, None]
            lost = g * coef[rows, None] * x[rows].to(acc) - g.to(x.dtype).to(acc) * scaled[rows].to(acc)
            lost = torch.where(kept[rows], lost, 0.0)
            self.made.index_put_((columns[rows].clamp(min=0),), lost, accumulate=True)

    def add(self, g: Tensor, low: int, high: int) -> None:
        self.made[low:high] += g.t() @ self.scaled


class _TiledDw:
    """By vocab tiles: the products g_A^T (c X) of all sets for a tile by the vendor's library, then `live_sum`."""

    def __init__(
        self, head: Head, sets: LiveSets, exact: "_ExactRows", scaled: Tensor, power: Tensor, tails: Tensor
    ) -> None:
        self.head, self.sets, self.tails = head, sets, tails
        self.scaled = [scaled[sets.rows(k)] for k in range(len(sets.exact))]
        self.exact_scaled = exact.scaled(power)
        self.grads, self.columns = sets.grads(), sets.columns_of()
        self.made = scaled.new_empty(head.weight.shape)  # [V, H]
        self.made[sets.tail.shape[1] :] = 0
        # for which the products of all sets have about TILE_ELEMENTS elements
        vocab, hidden = head.weight.shape
        self.most_columns = max(1, TILE_ELEMENTS * vocab // (max(1, len(sets.columns)) * hidden))

    def add(self, g: Tensor, low: int, high: int) -> None:
        ends = torch.tensor([low, high], device=g.device)
        spans = [torch.searchsorted(columns, ends).tolist() for columns in self.columns]
        parts = [
            (live[:, start:end], x, columns[start:end] - low)
            for live, x, columns, (start, end) in zip(self.grads, self.scaled, self.columns, spans, strict=True)
        ]
        every = torch.arange(high - low, device=g.device)
        parts.append((g, self.exact_scaled, every[: (high - low) * (len(g) > 0)]))
        tail, tails = self.sets.tail[:, low:high], self.tails
        if len(tails) > FEW_SETS:
            parts.append((tail, tails.to(g.dtype), every))
            tail, tails = tail[:0], tails[:0]
        self.made[low:high] = _sum_of_sets(self.head, tail, tails, parts)


def _sum_of_sets(head: Head, tail: Tensor, tails: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Rows of dW: the products g^T x of every part at its columns, and tail^T tails."""
    counts = [len(columns) for *_, columns in parts]
    made = tail.new_empty(sum(counts), tails.shape[1])
    for (g, x, columns), part in zip(parts, made.split(counts), strict=True):
        if len(columns):
            product(g.t(), x, part)
    more = len(parts) - len(tail)  # parts without a tail
    tail, tails = (torch.cat([t, t.new_zeros(more, t.shape[1])]) for t in (tail, tails))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return head.kernels.live_sum(tail, tails, made, torch.cat([columns for *_, columns in parts]), offsets)


class _ExactRows:
    """The rows of exact sets, whose logits are recomputed. g has their coefficients in bfloat16, and `left` are those
    that it does not have."""

    def __init__(
        self, head: Head, x: Tensor, labels: Tensor, lse: Tensor, lacks: Tensor, coef: Tensor, sets: LiveSets
    ) -> None:
        index = torch.cat([torch.arange(0), *(torch.arange(r.start, r.stop) for r in sets.exact_rows())])
        self.head, self.index = head, index.to(x.device)
        self.x, self.labels, self.lse, coef = (t.index_select(0, self.index) for t in (x, labels, lse, coef))
        ones = torch.ones_like(coef)
        self.of_g, self.left = (coef, ones) if x.dtype == torch.bfloat16 else (ones, coef)
        self.kernels, self.first, self.width = columns_here(head.kernels, head.options.vocab_size)
        self.anchors = head.anchors(self.x, self.labels, lacks.index_select(0, self.index) if lacks.numel() else lacks)
        self.dx = torch.zeros_like(self.x, dtype=library.acc_dtype(x.dtype))  # [m, H], without `left`
        self.lost = torch.zeros_like(self.lse, dtype=torch.float64)  # see `label_remainder`

    def scaled(self, power: Tensor) -> Tensor:
        """[m, H] what g is multiplied with for dW / power."""
        return self.x if self.x.dtype == torch.bfloat16 else scale_rows(self.x, self.left / power)

    def most_columns(self) -> int:
        """Columns that the head's buffer holds for all rows, and whose products have about TILE_ELEMENTS elements."""
        weight = self.head.weight
        if not self.index.numel():
            return max(1, weight.shape[0])
        return max(1, min(self.head.buffer.numel() // self.index.numel(), TILE_ELEMENTS // weight.shape[1]))

    def grads(self, low: int, high: int) -> Tensor:
        """g [m, high - low] in some columns."""
        if not self.index.numel():
            return self.x.new_empty(0, high - low)
        options, g = self.head.options, self.head.columns(self.x, slice(low, high), self.anchors)
        columns_bwd_(
            self.kernels, g, self.labels, self.lse, self.of_g, options.ignore_index, options.scale, options.softcap,
            self.first + low, high - low, self.anchors,
        )  # fmt: skip
        return g

    def add_dx(self, g: Tensor, low: int, high: int) -> None:
        if not self.index.numel():
            return
        logits = Logits(g, self.anchors)
        if self.anchors is None:
            add_product(self.dx, g, self.head.weight[low:high], first=False)
            return
        options = self.head.options
        logp = logit_and_slope(self.anchors[1], options.scale, options.softcap)[0] - self.lse
        if high - low == self.width:
            made = torch.empty_like(self.x)
            product_dx(self.head, logits, self.labels, logp, self.of_g, made)
            self.dx += made
            return
        add_product(self.dx, g, self.head.weight[low:high], first=False)
        self.lost += label_remainder(self.head, logits, self.labels, logp, self.of_g, slice(low, high))[0]

    def finished_dx(self, complete: bool) -> Tensor:
        """complete: with all coefficients, else those in `left` are missing."""
        if self.anchors is not None:
            add_remainder(self.head, self.labels, self.lost, self.dx)
        return (self.dx * self.left[:, None] if complete else self.dx).to(self.x.dtype)
