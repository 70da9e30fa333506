"""Token log-probs over logits [N, V] in Triton: scan a row once, and write its gradient in place.

y is the logit, or tanh(scale * logit / softcap) under a softcap, and z = nat * y. A row is swept in tiles [LANES, VEC]
of 16-byte vectors. Each lane keeps its own running maximum and sums, rescaled once per vector of VEC columns: 1.1 exp2
per column instead of 2. (At 16 exp2 per cycle a second one would cost an H100 more time than reading 16-bit logits.)
Lanes, and programs that share a row, are combined once, in a fixed order: results are bitwise reproducible.

Rows need no alignment: the columns before the first 16-byte boundary and after the last are the edges, each fewer than
VEC.

Relative logits (`anchors`): y is computed from the logit as stored. The constant of the row is added at the end or,
under a softcap, before tanh. The label's term in the row's sums is replaced by the exact one at the end.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels import checks, library
from cpo_kernels.checks import check_label_range
from cpo_kernels.kernels import tuning

ACC_TYPES = {"fp32": tl.float32, "fp64": tl.float64}
LOG2E = math.log2(math.e)
MAX_PIECES = tl.constexpr(tuning.MAX_PIECES)
STATS = tl.constexpr(5)  # numbers per piece of a row, as returned by _scan


# ------------------------------------------------------------------------------------------------- one column at a time


@triton.jit
def _cap(x, inner, offset):
    """tanh(u) and 1 - tanh(u)^2 for u = inner * x + offset (None: 0), from t = e^-2|u|; for |u| < 1/4, where 1 - t
    cancels, tanh is an odd polynomial."""
    u = x * inner
    if offset is not None:
        u += offset
    t = tl.exp2(tl.abs(u) * -2.8853900817779268)
    r = 1.0 / (1.0 + t)
    y = (1.0 - t) * r
    y = tl.where(u < 0, -y, y)
    if u.dtype != tl.float64:  # which has digits to spare
        s = u * u
        p = 0.021869488536155203 + s * -0.008863235529902197  # 62/2835, -1382/155925
        p = 0.13333333333333333 + s * (-0.05396825396825397 + s * p)
        y = tl.where(s < 0.0625, u + u * s * (-0.3333333333333333 + s * p), y)
    return y, 4.0 * t * r * r


@triton.jit
def _one_minus_exp(x):
    """1 - e^x for x <= 0 without cancellation: the rounding of e^x divides out (Kahan)."""
    e = tl.exp(x)
    near = (1.0 - e) * (x / tl.log(e))
    return tl.where(e == 1.0, -x, tl.where(x < -1.0, 1.0 - e, near))


@triton.jit
def _y_of(x, inner, offset, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x, _ = _cap(x, inner, offset)
    return x


@triton.jit
def _anchors(anchors, i, rows, inner, counted):
    """(a, inner * a, u of the label), a being the constant subtracted from row i; 0 where not `counted`."""
    a = tl.load(anchors + i, mask=counted, other=0.0)
    return a, inner * a, tl.load(anchors + rows + i, mask=counted, other=0.0)


# ----------------------------------------------------------------------------------------------------- the row's layout


@triton.jit
def _row_start(logits, row, stride, width, VEC: tl.constexpr, EDGES: tl.constexpr):
    """(row pointer, pointer to its first 16-byte boundary, columns before that).

    EDGES: 0 if every row begins and ends on a boundary, 1 if only the base pointer is on one, 2 if not even that.
    """
    start = row * stride
    if EDGES == 0:
        return logits + start, logits + tl.multiple_of(start, VEC), 0
    base = logits
    if EDGES == 2:  # count from the boundary before it: 16-byte accesses need a pointer that is known to be on one
        address = logits.to(tl.int64)
        base = tl.multiple_of((address - address % 16).to(logits.dtype), 16)
        start += address % 16 * VEC // 16
    head = ((VEC - start % VEC) % VEC).to(tl.int32)
    return base + start, base + tl.multiple_of(start + head, VEC), tl.minimum(head, width)


@triton.jit
def _piece(vectors, piece, pieces):
    """Vectors [low, high) of a row of `vectors` that belong to one of `pieces` programs."""
    size = (vectors + pieces - 1) // pieces
    low = tl.minimum(piece * size, vectors)
    return low, tl.minimum(low + size, vectors)


@triton.jit
def _edge_columns(head, columns, VEC: tl.constexpr):
    """[2 VEC] columns outside the vectors, and which of these entries are used."""
    i = tl.arange(0, 2 * VEC)
    rest = head + (columns - head) // VEC * VEC
    column = tl.where(i < head, i, rest + i - head)
    return column, column < columns


# --------------------------------------------------------------------------------------------------------------- scan


@triton.jit
def _raise(m, s, t, q, top, c, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr):
    """Rescale sums relative to the maximum m to sums relative to `top` >= m."""
    step = tl.where(m == float("-inf"), 0.0, m - tl.where(top == float("-inf"), 0.0, top))
    f = tl.exp2(step * c)
    if EXTRAS:
        # m may be -3e38, if masks use that for -inf, and step * s infinite. Under a softcap m is within [-1, 1].
        if not SOFTCAP:
            step = tl.maximum(step, -1e30)
        t = f * (t + step * s)
        q = f * f * q
    return f * s, t, q


@triton.jit
def _fold(m, s, t, q, u, y, keep, c, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr):
    """Add y [LANES, VEC] to the sums [LANES]; y is -inf where not `keep`."""
    top = tl.maximum(m, tl.max(y, 1))
    s, t, q = _raise(m, s, t, q, top, c, SOFTCAP, EXTRAS)
    d = y - tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = tl.exp2(d * c)
    s += tl.sum(e, 1)
    if EXTRAS:
        t += tl.sum(tl.where(e > 0, e * d, 0.0), 1)
        q += tl.sum(e * e, 1)
        u += tl.sum(tl.where(keep, y, 0.0), 1)
    return top, s, t, q, u


@triton.jit
def _meet(m, s, t, q, u, c, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr):
    """Combine the sums of all lanes, relative to their common maximum."""
    top = tl.max(m, 0)
    s, t, q = _raise(m, s, t, q, top, c, SOFTCAP, EXTRAS)
    return top, tl.sum(s, 0), tl.sum(t, 0), tl.sum(q, 0), tl.sum(u, 0)


@triton.jit
def _scan(
    row, body, head, columns, piece, pieces, c, inner, offset,
    ACC: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    EDGES: tl.constexpr, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """One piece of a row: max y, sum e^{nat (y - max)}, and with EXTRAS sum e (y - max), sum of squares, sum y."""
    low, high = _piece((columns - head) // VEC, piece, pieces)
    lane = tl.arange(0, LANES)
    offsets = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]  # [LANES, VEC]
    m = tl.full([LANES], float("-inf"), ACC)
    s = tl.zeros([LANES], ACC)
    t, q, u = s, s, s
    for first in range(low, high, LANES):
        keep = (first + lane < high)[:, None]
        x = tl.load(body + first * VEC + offsets, mask=keep, other=float("-inf")).to(ACC)
        y = x
        if SOFTCAP:
            y = tl.where(keep, _y_of(x, inner, offset, SOFTCAP), float("-inf"))
        m, s, t, q, u = _fold(m, s, t, q, u, y, keep, c, SOFTCAP, EXTRAS)
    m, s, t, q, u = _meet(m, s, t, q, u, c, SOFTCAP, EXTRAS)
    if EDGES:
        if piece == pieces - 1:
            column, keep = _edge_columns(head, columns, VEC)
            x = tl.load(row + column, mask=keep, other=float("-inf")).to(ACC)
            y = tl.where(keep, _y_of(x, inner, offset, SOFTCAP), float("-inf"))[None, :]
            keep, one = keep[None, :], tl.zeros([1], ACC)
            m1, s1, t1, q1, u1 = _fold(m + one, s + one, t + one, q + one, u + one, y, keep, c, SOFTCAP, EXTRAS)
            m, s, t, q, u = tl.max(m1, 0), tl.sum(s1, 0), tl.sum(t1, 0), tl.sum(q1, 0), tl.sum(u1, 0)
    return m, s, t, q, u


@triton.jit
def _label_y(row, label, columns, inner, offset, ACC: tl.constexpr, SOFTCAP: tl.constexpr):
    """y of the label's logit as stored; NaN if the label is out of range."""
    inside = (label >= 0) & (label < columns)
    x = tl.load(row + label, mask=inside, other=float("nan")).to(ACC)
    return _y_of(x, inner, offset, SOFTCAP)


@triton.jit
def _exchange(m, s, t, q, u, y, exact, c, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr):
    """Replace the term of y in a row's sums by that of `exact`. Rounding cannot change the sign of what remains."""
    top = tl.maximum(m, exact)
    s, t, q = _raise(m, s, t, q, top, c, SOFTCAP, EXTRAS)
    base = tl.where(top == float("-inf"), 0.0, top)
    d, d_exact = y - base, exact - base
    e, e_exact = tl.exp2(d * c), tl.exp2(d_exact * c)
    s -= e
    s = tl.where(s < 0, 0.0, s) + e_exact  # keeps NaN, unlike tl.maximum
    if EXTRAS:
        t -= tl.where(e > 0, e * d, 0.0)
        t = tl.where(t > 0, 0.0, t) + tl.where(e_exact > 0, e_exact * d_exact, 0.0)
        q -= e * e
        q = tl.where(q < 0, 0.0, q) + e_exact * e_exact
        u = tl.where(y == float("-inf"), u, u - y) + exact
    return top, s, t, q, u


@triton.jit
def _store_row(
    logp_out, lse_out, extra_out, i, rows, logp, lse, entropy, log_sum_sq, mean, top1, EXTRAS: tl.constexpr
):  # fmt: skip
    tl.store(logp_out + i, logp)
    tl.store(lse_out + i, lse)
    if EXTRAS:
        tl.store(extra_out + i, entropy)
        tl.store(extra_out + rows + i, log_sum_sq)
        tl.store(extra_out + 2 * rows + i, mean)
        tl.store(extra_out + 3 * rows + i, top1)


@triton.jit
def _finish(
    logp_out, lse_out, extra_out, i, rows, columns, m, s, t, q, u, y_label, a, exact, nat, c, inner,
    SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Store the results of a row from its sums; returns its log-prob, largest y, and the factor 1 / sum of its softmax.
    a, exact: see _anchors."""
    stored, top = y_label, m
    if a is not None:
        y_label = _y_of(exact, inner, None, SOFTCAP)
        if not SOFTCAP:
            y_label -= a
        m, s, t, q, u = _exchange(m, s, t, q, u, stored, y_label, c, SOFTCAP, EXTRAS)
    log_sum = tl.log(s)
    label_is_number = stored == stored
    logp = nat * (y_label - m) - log_sum
    lse = tl.where(label_is_number, nat * m + log_sum, float("nan"))
    top1 = tl.where((stored == top) & (s == s), 1.0, 0.0)
    entropy, log_sum_sq = log_sum - nat * (t / s), tl.log(q) - 2.0 * log_sum
    mean = nat * u / columns
    if a is not None:
        if not SOFTCAP:
            lse, mean = lse + nat * a, mean + nat * a
    _store_row(logp_out, lse_out, extra_out, i, rows, logp, lse, entropy, log_sum_sq, mean, top1, EXTRAS)
    return logp, m, tl.where(label_is_number, 1.0 / s, float("nan"))


# --------------------------------------------------------------------------------------------------------------- write


@triton.jit
def _gradient(x, column, columns, label, shift, factor, tilt, at_label, c, inner, offset, SOFTCAP: tl.constexpr):
    """(factor + tilt (y - shift)) e^{nat (y - shift)}, times 1 - tanh^2 under a softcap; `at_label` in the label's
    column. tilt: None for 0."""
    y = x
    if SOFTCAP:
        y, slope = _cap(x, inner, offset)
    d = y - shift
    if tilt is None:
        g = factor * tl.exp2(d * c)
    else:
        e = tl.exp2(d * c)
        g = tl.where(e == 0, 0.0, (factor + tilt * d) * e)  # d may be -inf
    if SOFTCAP:
        g *= slope
    g = tl.where(column == label, at_label, g)
    return tl.where(column < columns, g, 0.0)


@triton.jit
def _write(
    row, body, head, width, columns, label, piece, pieces, shift, factor, tilt, at_label, c, inner, offset,
    ACC: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    EDGES: tl.constexpr, SOFTCAP: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """Overwrite one piece of a row with its gradient (zeros if CLEAR), last column first: the columns scanned last are
    still in the cache."""
    low, high = _piece((width - head) // VEC, piece, pieces)
    lane = tl.arange(0, LANES)
    offsets = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]  # [LANES, VEC]
    label = label.to(tl.int32)  # one comparison per column; if it is out of range, the whole row is NaN
    OUT: tl.constexpr = row.dtype.element_ty
    if EDGES:
        if piece == pieces - 1:
            edge, inside = _edge_columns(head, width, VEC)
            ge = tl.zeros([2 * VEC], ACC)
            if not CLEAR:
                xe = tl.load(row + edge, mask=inside, other=0.0).to(ACC)
                ge = _gradient(xe, edge, columns, label, shift, factor, tilt, at_label, c, inner, offset, SOFTCAP)
            tl.store(row + edge, ge.to(OUT), mask=inside)
    tiles = (high - low + LANES - 1) // LANES
    for i in range(0, tiles):
        first = low + (tiles - 1 - i) * LANES
        keep = (first + lane < high)[:, None]
        g = tl.zeros([LANES, VEC], ACC)
        if not CLEAR:
            x = tl.load(body + first * VEC + offsets, mask=keep, other=0.0).to(ACC)
            column = head + first * VEC + offsets
            g = _gradient(x, column, columns, label, shift, factor, tilt, at_label, c, inner, offset, SOFTCAP)
        tl.store(body + first * VEC + offsets, g.to(OUT), mask=keep)


@triton.jit
def _at_label(
    row, label, columns, exact, logp, grad, of_entropy, entropy, inner, ACC: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """grad (1 - p) - of_entropy p (log p + entropy) in the label's column, times 1 - tanh^2 under a softcap.
    of_entropy: None for 0."""
    g = grad * _one_minus_exp(logp)
    if of_entropy is not None:
        p = tl.exp(logp)
        g -= tl.where(p == 0, 0.0, of_entropy * p * (logp + entropy))
    if SOFTCAP:
        if exact is None:
            exact = tl.load(row + label, mask=(label >= 0) & (label < columns), other=0.0).to(ACC)
        _, slope = _cap(exact, inner, None)
        g *= slope
    return g


# -------------------------------------------------------------------------------------------------------------- kernels

# One compilation for all numbers of rows and alignments of the labels, which change from chunk to chunk.
# anchors and entropies [2, rows] are None if absent; Triton compiles a separate kernel for that.
GENERAL: dict[str, Any] = {
    "do_not_specialize": ["rows", "ignore_index"],
    "do_not_specialize_on_alignment": ["labels", "anchors", "entropies"],
}


@triton.jit(**GENERAL)
def scan_kernel(
    logits, labels, anchors, logp_out, lse_out, extra_out, stats, stride, rows, width, columns, pieces, ignore_index,
    nat: "fp64", c: "fp64", inner: "fp64", scale: "fp64",
    ACC: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, SOFTCAP: tl.constexpr,
    EXTRAS: tl.constexpr, SPLIT: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """fwd: a row's log-probs. WRITE (fused_): then overwrite it by its gradient. SPLIT: the sums of one piece of it."""
    i = tl.program_id(0).to(tl.int64)
    piece = 0
    if SPLIT:
        piece = (i % pieces).to(tl.int32)
        i = i // pieces
    nat, c, inner = tl.full([], nat, ACC), tl.full([], c, ACC), tl.full([], inner, ACC)
    label = tl.load(labels + i)
    row, body, head = _row_start(logits, i, stride, width, VEC, EDGES)
    if label == ignore_index:
        if not SPLIT:
            _store_row(logp_out, lse_out, extra_out, i, rows, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, EXTRAS)
        if WRITE:
            _write(row, body, head, width, columns, label, 0, 1, nat, nat, None, nat, c, inner, None,
                   ACC, LANES, VEC, EDGES, SOFTCAP, True)  # fmt: skip
    else:
        a, offset, exact = None, None, None
        if anchors is not None:
            a, offset, exact = _anchors(anchors, i, rows, inner, True)
        # Read before the scan, whose barrier holds back the warps that overwrite it; in combine_kernel for split rows.
        y_label = nat
        if not SPLIT:
            y_label = _label_y(row, label, columns, inner, offset, ACC, SOFTCAP)
        m, s, t, q, u = _scan(row, body, tl.minimum(head, columns), columns, piece, pieces, c, inner, offset,
                              ACC, LANES, VEC, EDGES, SOFTCAP, EXTRAS)  # fmt: skip
        if SPLIT:
            at = stats + tl.program_id(0).to(tl.int64) * STATS
            tl.store(at, m)
            tl.store(at + 1, s)
            if EXTRAS:
                tl.store(at + 2, t)
                tl.store(at + 3, q)
                tl.store(at + 4, u)
        else:
            if anchors is not None:
                if not WRITE:  # read again: keeping it through the scan caused a spill, under a softcap with extras
                    _, _, exact = _anchors(anchors, i, rows, inner, True)
            logp, m, factor = _finish(logp_out, lse_out, extra_out, i, rows, columns, m, s, t, q, u, y_label, a, exact,
                                      nat, c, inner, SOFTCAP, EXTRAS)  # fmt: skip
            if WRITE:
                grad = tl.full([], scale, ACC)
                at_label = _at_label(row, label, columns, exact, logp, grad, None, None, inner, ACC, SOFTCAP)
                shift = tl.where(m == float("-inf"), 0.0, m)
                if EDGES:
                    tl.debug_barrier()  # every warp has read the edges, which come after the scan's own barrier
                _write(row, body, head, width, columns, label, 0, 1, shift, -grad * factor, None, at_label, c, inner,
                       offset, ACC, LANES, VEC, EDGES, SOFTCAP, False)  # fmt: skip


@triton.jit(**GENERAL)
def combine_kernel(
    logits, labels, anchors, stats, logp_out, lse_out, extra_out, shifts, stride, rows, columns, pieces, ignore_index,
    nat: "fp64", c: "fp64", inner: "fp64", ACC: tl.constexpr, SOFTCAP: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """A row's log-probs from the sums of its pieces, and the shift and factor [2, rows] of its softmax."""
    i = tl.program_id(0).to(tl.int64)
    nat, c, inner = tl.full([], nat, ACC), tl.full([], c, ACC), tl.full([], inner, ACC)
    label = tl.load(labels + i)
    if label == ignore_index:
        _store_row(logp_out, lse_out, extra_out, i, rows, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, EXTRAS)
    else:
        piece = tl.arange(0, MAX_PIECES)
        keep = piece < pieces
        at = stats + (i * pieces + piece) * STATS
        m = tl.load(at, mask=keep, other=float("-inf"))
        s = tl.load(at + 1, mask=keep, other=0.0)
        t, q, u = s, s, s
        if EXTRAS:
            t = tl.load(at + 2, mask=keep, other=0.0)
            q = tl.load(at + 3, mask=keep, other=0.0)
            u = tl.load(at + 4, mask=keep, other=0.0)
        a, offset, exact = None, None, None
        if anchors is not None:
            a, offset, exact = _anchors(anchors, i, rows, inner, True)
        y_label = _label_y(logits + i * stride, label, columns, inner, offset, ACC, SOFTCAP)
        m, s, t, q, u = _meet(m, s, t, q, u, c, SOFTCAP, EXTRAS)
        _, m, factor = _finish(logp_out, lse_out, extra_out, i, rows, columns, m, s, t, q, u, y_label, a, exact,
                               nat, c, inner, SOFTCAP, EXTRAS)  # fmt: skip
        tl.store(shifts + i, tl.where(m == float("-inf"), 0.0, m))
        tl.store(shifts + rows + i, factor)


@triton.jit(**GENERAL)
def write_kernel(
    logits, labels, anchors, entropies, lse, grads, logps, shifts, stride, rows, width, columns, pieces, ignore_index,
    nat: "fp64", c: "fp64", inner: "fp64", scale: "fp64",
    ACC: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, SOFTCAP: tl.constexpr,
    FROM_LSE: tl.constexpr,
):  # fmt: skip
    """A piece of a row's gradient: bwd_ from lse and incoming gradient, fused_ (split rows) from combine_kernel."""
    i = tl.program_id(0).to(tl.int64)
    piece = (i % pieces).to(tl.int32)
    i = i // pieces
    nat, c, inner, grad = tl.full([], nat, ACC), tl.full([], c, ACC), tl.full([], inner, ACC), tl.full([], scale, ACC)
    label = tl.load(labels + i)
    row, body, head = _row_start(logits, i, stride, width, VEC, EDGES)
    if label == ignore_index:
        _write(row, body, head, width, columns, label, piece, pieces, nat, nat, None, nat, c, inner, None,
               ACC, LANES, VEC, EDGES, SOFTCAP, True)  # fmt: skip
    else:
        a, offset, exact = None, None, None
        if anchors is not None:
            a, offset, exact = _anchors(anchors, i, rows, inner, True)
        of_entropy, entropy, tilt = None, None, None
        # The label's logit is read by the one thread that uses it, before that thread overwrites it.
        if FROM_LSE:
            lse_i = tl.load(lse + i)
            if entropies is not None:
                of_entropy, entropy = grad * tl.load(entropies + i), tl.load(entropies + rows + i)
            grad *= tl.load(grads + i)
            if exact is None:
                y_label = _label_y(row, label, columns, inner, None, ACC, SOFTCAP)
            else:
                y_label = _y_of(exact, inner, None, SOFTCAP)
            logp = nat * y_label - lse_i
            if a is not None:
                if not SOFTCAP:
                    lse_i -= nat * a
            shift = lse_i / nat
            rest = nat * shift - lse_i  # rounding error of the division
            factor = grad
            if entropies is not None:
                factor += of_entropy * (entropy + rest)
                tilt = of_entropy * (-nat * tl.exp(rest))
            factor *= -tl.exp(rest)
        else:
            logp = tl.load(logps + i)
            shift = tl.load(shifts + i)
            factor = -grad * tl.load(shifts + rows + i)
        at_label = _at_label(row, label, columns, exact, logp, grad, of_entropy, entropy, inner, ACC, SOFTCAP)
        _write(row, body, head, width, columns, label, piece, pieces, shift, factor, tilt, at_label, c, inner,
               offset, ACC, LANES, VEC, EDGES, SOFTCAP, False)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- launches


class _Rows:
    """Layout, options and flags of logits [N, V] that the launches share."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        scale: float,
        softcap: float,
        vocab_size: int,
        anchors: Tensor | None,
    ) -> None:
        self.logits, self.labels = logits, labels.contiguous()
        self.anchors = None if anchors is None else anchors.contiguous()
        self.rows, self.width = logits.shape
        self.columns, self.ignore_index, self.stride = vocab_size, ignore_index, logits.stride(0)
        self.vec = 16 // logits.element_size()
        nat = softcap or scale
        self.nat, self.scale, self.inner = nat, scale, scale / softcap if softcap else 0.0
        edges = bool(self.stride % self.vec or self.width % self.vec or vocab_size % self.vec)
        self.acc = library.acc_dtype(logits.dtype)
        self.flags = {
            "ACC": ACC_TYPES["fp64" if self.acc == torch.float64 else "fp32"],
            "VEC": self.vec,
            "EDGES": 2 if logits.data_ptr() % 16 else int(edges),
            "SOFTCAP": softcap > 0,
        }
        if checks.checks_enabled():
            check_label_range(labels, ignore_index, vocab_size)

    @property
    def lean(self) -> bool:
        return not self.flags["SOFTCAP"] and self.acc != torch.float64

    def pieces(self, launch: tuning.Launch) -> int:
        return tuning.splits(self.rows, self.columns // self.vec, launch.vectors, self.logits.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.logits.device)

    def numbers(self, pieces: int) -> tuple[Any, ...]:
        """stride, rows, width, columns, pieces, ignore_index, nat, c, inner, scale."""
        shape = (self.stride, self.rows, self.width, self.columns, pieces, self.ignore_index)
        return *shape, self.nat, self.nat * LOG2E, self.inner, self.scale

    def write(
        self, pieces: int, from_lse: bool, lse: Tensor, grads: Tensor, logps: Tensor, shifts: Tensor,
        entropies: Tensor | None = None,
    ) -> None:  # fmt: skip
        launch = tuning.WRITE
        write_kernel[(self.rows * pieces,)](
            self.logits, self.labels, self.anchors, entropies, lse, grads, logps, shifts, *self.numbers(pieces),
            **self.flags, LANES=launch.vectors, FROM_LSE=from_lse, **tuning.options(launch),
        )  # fmt: skip


def _forward(rows: _Rows, extras: bool, write: bool) -> tuple[Tensor, Tensor, Tensor]:
    logp, lse = rows.empty(rows.rows), rows.empty(rows.rows)
    extra = rows.empty(4, rows.rows) if extras else rows.empty(0)
    if not rows.rows:
        return logp, lse, extra
    with torch.cuda.device_of(rows.logits):
        pieces = rows.pieces(tuning.SCAN)
        split = pieces > 1
        launch = tuning.SCAN
        if write and not split:
            launch = tuning.fused(rows.columns * rows.logits.element_size(), rows.lean and not extras)
        stats = rows.empty(rows.rows * pieces * STATS.value) if split else logp
        scan_kernel[(rows.rows * pieces,)](
            rows.logits, rows.labels, rows.anchors, logp, lse, extra, stats, *rows.numbers(pieces),
            **rows.flags, LANES=launch.vectors, EXTRAS=extras, SPLIT=split, WRITE=write and not split,
            **tuning.options(launch),
        )  # fmt: skip
        if split:
            shifts = rows.empty(2, rows.rows)
            combine_kernel[(rows.rows,)](
                rows.logits, rows.labels, rows.anchors, stats, logp, lse, extra, shifts, rows.stride, rows.rows,
                rows.columns, pieces, rows.ignore_index, rows.nat, rows.nat * LOG2E, rows.inner,
                ACC=rows.flags["ACC"], SOFTCAP=rows.flags["SOFTCAP"], EXTRAS=extras, **tuning.options(tuning.COMBINE),
            )  # fmt: skip
            if write:
                rows.write(pieces, False, lse, lse, logp, shifts)
    return logp, lse, extra


def token_logps_fwd(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    extras: bool,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V], labels [N] -> logp [N], lse [N], extra [4, N] or [0]; 0 at ignored rows. See `library`."""
    return _forward(_Rows(logits, labels, ignore_index, scale, softcap, vocab_size, anchors), extras, False)


def token_logps_fused_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    extras: bool,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """fwd, and the logits overwritten with (onehot - softmax) * scale * (1 - tanh^2)."""
    return _forward(_Rows(logits, labels, ignore_index, scale, softcap, vocab_size, anchors), extras, True)


def token_logps_bwd_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    anchors: Tensor | None = None,
    entropies: Tensor | None = None,
) -> None:
    """Overwrites the logits with [grad_t (onehot - p) - entropies_0t p (log p + entropies_1t)] * scale * (1 - tanh^2),
    p = e^(z - lse)."""
    rows = _Rows(logits, labels, ignore_index, scale, softcap, vocab_size, anchors)
    if rows.rows:
        with torch.cuda.device_of(logits):
            lse = lse.contiguous()
            of_entropy = None if entropies is None else entropies.contiguous()
            rows.write(rows.pieces(tuning.WRITE), True, lse, grad.contiguous(), lse, lse, of_entropy)
