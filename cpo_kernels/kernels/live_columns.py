"""live_columns and live_grads in Triton: which columns of the vocabulary a set of rows needs, and the gradient there.

Formulas and contracts: cpo_kernels/reference/live_columns.py. s_tv = softmax_tv * dz/du, in units as in token_logps.py.

    prepare  computes the shift and factor of a row, s_tv = factor e^{nat (y - shift)}, once per row instead of once per
             tile, and flags the columns of the labels as live
    scan     a program owns a tile of the vocabulary of one set and sweeps its rows, without atomics or waiting
    gather   a program owns some rows and sweeps the live columns of their set

A row's sum adds those of its tiles in order: results are bitwise reproducible. Rows that do not count have factor 0 and
are not read.

Relative logits (`anchors`): the constant subtracted from a row enters its shift or, under a softcap, is added before
tanh. scan uses the label's logit as stored: its column is live anyway, so only the row's sum needs a correction, which
prepare computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.kernels import tuning
from cpo_kernels.kernels.token_logps import ACC_TYPES, LOG2E, _anchors, _cap, _one_minus_exp, _y_of

GENERAL = {
    "do_not_specialize": ["rows", "set_rows", "tiles", "blocks", "ignore_index"],
    "do_not_specialize_on_alignment": ["labels", "lse", "row_sums", "ids", "anchors"],
}


@triton.jit
def _counts(labels, lse, row, inside, ignore_index):
    """(label, lse, whether the row counts, whether it is ignored) of `row`, where `inside`."""
    label = tl.load(labels + row, mask=inside, other=0)
    value = tl.load(lse + row, mask=inside, other=float("nan"))
    ignored = label == ignore_index
    return label, value, inside & (value - value == 0.0) & ~ignored, ignored


@triton.jit
def _shift_of(lse, a, nat, scale, counted, ACC: tl.constexpr, SOFTCAP: tl.constexpr):
    """(shift, factor), from nat and scale in float64; the rounding error of the shift goes into the factor. (0, 0) for
    a row that does not count."""
    lse = tl.where(counted, lse, 0.0).to(tl.float64)
    if a is not None:
        if not SOFTCAP:
            lse -= nat * a.to(tl.float64)
    shift = (lse / nat).to(ACC)
    return shift, tl.where(counted, scale * tl.exp(nat * shift.to(tl.float64) - lse), 0.0).to(ACC)


@triton.jit
def _size(x, shift, factor, c, inner, offset, SOFTCAP: tl.constexpr):
    """s = factor e^{nat (y - shift)}, times 1 - tanh^2 under a softcap; x = -inf gives 0."""
    if SOFTCAP:
        y, slope = _cap(x, inner, offset)
        s = factor * tl.exp2((y - shift) * c) * slope
    else:
        s = factor * tl.exp2((x - shift) * c)
    return s


@triton.jit(**GENERAL)
def prepare_kernel(
    labels, lse, live, shifts, nan_rows, rows, columns, set_rows, ignore_index, nat: "fp64", scale: "fp64",
    logits, anchors, stride, c: "fp64", inner: "fp64",
    ACC: tl.constexpr, ROWS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Writes shifts [2, rows], followed by inner * a [rows] if there are anchors and a softcap; live = 1 at the labels;
    nan_rows [rows]: NaN for a row whose lse is not finite, else the correction of its sum."""
    c, inner = tl.full([], c, ACC), tl.full([], inner, ACC)
    nat, scale = tl.full([], nat, tl.float64), tl.full([], scale, tl.float64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    label, value, counted, ignored = _counts(labels, lse, row, inside, ignore_index)
    a, offset, exact = None, None, None
    if anchors is not None:
        a, offset, exact = _anchors(anchors, row, rows, inner, counted)
    shift, factor = _shift_of(value, a, nat, scale, counted, ACC, SOFTCAP)
    tl.store(shifts + row, shift, mask=inside)
    tl.store(shifts + rows + row, factor, mask=inside)
    here = counted & (label >= 0) & (label < columns)
    lacks = tl.zeros([ROWS], ACC)
    if a is not None:
        if SOFTCAP:
            tl.store(shifts + 2 * rows + row, offset, mask=inside)
        x = tl.load(logits + row * stride + label, mask=here, other=float("-inf")).to(ACC)
        if not SOFTCAP:
            exact -= a
        lacks = _size(exact, shift, factor, c, inner, None, SOFTCAP)
        lacks = tl.where(here, lacks - _size(x, shift, factor, c, inner, offset, SOFTCAP), 0.0)
    tl.store(nan_rows + row, tl.where(counted | ignored, lacks, float("nan")), mask=inside)
    tl.store(live + row // set_rows * columns + label, tl.full([ROWS], 1, tl.uint8), mask=here)


@triton.jit
def _row_shift(shifts, row, rows, high):
    shift = tl.load(shifts + row, mask=row < high, other=0.0)
    return shift, tl.load(shifts + rows + row, mask=row < high, other=0.0)


@triton.jit
def _row_offset(shifts, row, rows, high):
    return tl.load(shifts + 2 * rows + row, mask=row < high, other=0.0)


@triton.jit
def _row_logits(logits, row, stride, column, inside, factor):
    keep = (factor > 0.0)[:, None] & inside[None, :]
    return tl.load(logits + row[:, None] * stride + column[None, :], mask=keep, other=float("-inf"))


@triton.jit(**GENERAL)
def scan_sets_kernel(
    logits, shifts, live, tail, partial, stride, rows, columns, set_rows, tiles, threshold: "fp64", c: "fp64",
    inner: "fp64", ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """One tile of one set: live (a 1 stays), tail, and the tile's part of the row sums, partial [tiles, N].

    Each of the ROWS rows keeps a maximum of s and a sum of its own, which are reduced once, at the end: each warp
    handles one row of the block.
    """
    threshold, c, inner = tl.full([], threshold, ACC), tl.full([], c, ACC), tl.full([], inner, ACC)
    tile = tl.program_id(0) % tiles
    k = (tl.program_id(0) // tiles).to(tl.int64)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    low = k * set_rows
    high = tl.minimum(low + set_rows, rows)
    tops = tl.zeros([ROWS, BLOCK], ACC)
    sums = tl.zeros([ROWS, BLOCK], ACC)
    row = low + tl.arange(0, ROWS)
    shift, factor = _row_shift(shifts, row, rows, high)
    x = _row_logits(logits, row, stride, column, inside, factor)
    next_shift, next_factor = _row_shift(shifts, row + ROWS, rows, high)
    offset, next_offset = None, None
    if OFFSETS:
        offset = _row_offset(shifts, row, rows, high)
        next_offset = _row_offset(shifts, row + ROWS, rows, high)
    for _ in range(low, high, ROWS):  # logits are prefetched one step ahead, shifts and factors (their mask) two steps
        next_x = _row_logits(logits, row + ROWS, stride, column, inside, next_factor)
        after = _row_shift(shifts, row + 2 * ROWS, rows, high)
        row_offset = None
        if OFFSETS:
            row_offset = tl.expand_dims(offset, 1)
            offset, next_offset = next_offset, _row_offset(shifts, row + 2 * ROWS, rows, high)
        s = _size(x.to(ACC), shift[:, None], factor[:, None], c, inner, row_offset, SOFTCAP)
        tops = tl.maximum(tops, s)
        sums += s
        tl.store(partial + tile.to(tl.int64) * rows + row, tl.sum(s, 1), mask=row < high)
        row += ROWS
        x, shift, factor = next_x, next_shift, next_factor
        next_shift, next_factor = after
    at = k * columns + column
    flag = (tl.load(live + at, mask=inside, other=0) != 0) | (tl.max(tops, 0) >= threshold)
    tl.store(live + at, flag.to(tl.uint8), mask=inside)
    tl.store(tail + at, tl.where(flag, 0.0, tl.sum(sums, 0)), mask=inside)


@triton.jit(**GENERAL)
def gather_kernel(
    logits, labels, lse, row_sums, anchors, ids, offsets, out, stride, rows, columns, set_rows, blocks, ignore_index,
    nat: "fp64", c: "fp64", inner: "fp64", scale: "fp64",
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """[g_A, tau] of ROWS rows of a set. At the label, 1 - softmax is computed without cancellation."""
    c, inner = tl.full([], c, ACC), tl.full([], inner, ACC)
    nat64, scale64 = tl.full([], nat, tl.float64), tl.full([], scale, tl.float64)
    nat, scale = nat64.to(ACC), scale64.to(ACC)
    k = (tl.program_id(0) // blocks).to(tl.int64)
    within = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    row = k * set_rows + within
    inside = (within < set_rows) & (row < rows)
    first = tl.load(offsets + k)
    count = tl.load(offsets + k + 1) - first
    label, value, counted, ignored = _counts(labels, lse, row, inside, ignore_index)
    a, offset, exact = None, None, None
    if anchors is not None:
        a, offset, exact = _anchors(anchors, row, rows, inner, counted)
    shift, factor = _shift_of(value, a, nat64, scale64, counted, ACC, SOFTCAP)
    here = counted & (label >= 0) & (label < columns)
    line = logits + row * stride
    if exact is None:
        u_label = tl.load(line + label, mask=here, other=0.0).to(ACC)
    else:
        u_label = exact
        offset = tl.expand_dims(offset, 1)
    logp = nat * _y_of(u_label, inner, None, SOFTCAP) - value
    at_label, s_label = scale * _one_minus_exp(logp), scale * tl.exp(logp)
    if SOFTCAP:
        _, slope = _cap(u_label, inner, None)
        at_label *= slope
        s_label *= slope
    label = tl.where(here, label, -1)
    target = out + set_rows * (first + k) + within * (count + 1)  # earlier sets have set_rows rows
    OUT: tl.constexpr = out.dtype.element_ty
    sums = tl.zeros([ROWS, BLOCK], ACC)
    for j in range(0, count, BLOCK):
        place = j + tl.arange(0, BLOCK)
        keep = (place < count)[None, :]
        column = tl.load(ids + first + place, mask=place < count, other=0)
        x = tl.load(line[:, None] + column[None, :], mask=counted[:, None] & keep, other=float("-inf")).to(ACC)
        s = _size(x, shift[:, None], factor[:, None], c, inner, offset, SOFTCAP)
        is_label = column[None, :] == label[:, None]
        if exact is None:
            sums += s
        else:
            sums += tl.where(is_label, s_label[:, None], s)
        g = tl.where(is_label, at_label[:, None], 0.0 - s)
        tl.store(target[:, None] + place[None, :], g.to(OUT), mask=inside[:, None] & keep)
    tau = tl.sum(sums, 1) - tl.load(row_sums + row, mask=inside, other=0.0)
    tau = tl.where(tau > 0.0, 0.0, tau)  # keeps NaN, unlike tl.minimum
    tau = tl.where(counted, tau, tl.where(ignored, 0.0, float("nan")))
    tl.store(target + count, tau.to(OUT), mask=inside)


class _Call:
    """Numbers and flags of logits [N, V] that both launches share."""

    def __init__(self, logits: Tensor, scale: float, softcap: float, set_rows: int) -> None:
        self.rows = logits.shape[0]
        self.set_rows = min(set_rows, max(self.rows, 1))
        self.sets = -(-self.rows // self.set_rows)
        self.nat = softcap or scale
        self.c, self.inner = self.nat * LOG2E, scale / softcap if softcap else 0.0
        self.acc = library.acc_dtype(logits.dtype)
        self.kind = "fp64" if self.acc == torch.float64 else "fp32"
        self.flags = {"ACC": ACC_TYPES[self.kind], "SOFTCAP": softcap > 0}


def live_columns(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    eps: float,
    set_rows: int,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """live [sets, vocab_size] bool, tail_columns [sets, vocab_size], row_sums [N]; see the reference."""
    call = _Call(logits, scale, softcap, set_rows)
    launch = tuning.LIVE_SCAN[call.kind]
    tiles = -(-vocab_size // launch.block)
    live = torch.zeros((call.sets, vocab_size), dtype=torch.bool, device=logits.device)
    tail = torch.empty((call.sets, vocab_size), dtype=call.acc, device=logits.device)
    partial = torch.empty((tiles + 1, call.rows), dtype=call.acc, device=logits.device)  # last: nan_rows
    if call.rows:
        relative = (None, None, None) if anchors is None else (logits, anchors.contiguous(), logits.stride(0))
        capped = anchors is not None and softcap > 0
        with torch.cuda.device_of(logits):
            shifts = torch.empty((2 + int(capped), call.rows), dtype=call.acc, device=logits.device)
            flags = live.view(torch.uint8)
            prepare_kernel[(-(-call.rows // tuning.LIVE_PREPARE.block),)](
                labels.contiguous(), lse.contiguous(), flags, shifts, partial[tiles], call.rows, vocab_size,
                call.set_rows, ignore_index, call.nat, scale, *relative, call.c, call.inner, ACC=call.flags["ACC"],
                ROWS=tuning.LIVE_PREPARE.block, SOFTCAP=capped, **tuning.options(tuning.LIVE_PREPARE),
            )  # fmt: skip
            scan_sets_kernel[(tiles * call.sets,)](
                logits, shifts, flags, tail, partial, logits.stride(0), call.rows, vocab_size, call.set_rows, tiles,
                eps * scale, call.c, call.inner, **call.flags, ROWS=launch.rows, BLOCK=launch.block, OFFSETS=capped,
                **tuning.options(launch),
            )  # fmt: skip
    return live, tail, partial.sum(0, dtype=torch.float64).to(call.acc)


def live_grads(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    row_sums: Tensor,
    columns: Tensor,
    offsets: Tensor,
    set_rows: int,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    anchors: Tensor | None = None,
) -> Tensor:
    """[g_A, tau] of every set, flat, in the dtype of logits; offsets [sets + 1] on the host. See the reference."""
    call = _Call(logits, scale, softcap, set_rows)
    if not call.rows:
        return logits.new_empty(0)
    launch = tuning.LIVE_GATHER
    *_, before, end = offsets.tolist()
    missing = call.sets * call.set_rows - call.rows  # rows by which the last set is short
    out = logits.new_empty(call.set_rows * (end + call.sets) - missing * (end - before + 1))
    blocks = -(-call.set_rows // launch.rows)
    with torch.cuda.device_of(logits):
        gather_kernel[(blocks * call.sets,)](
            logits, labels.contiguous(), lse.contiguous(), row_sums.contiguous(),
            None if anchors is None else anchors.contiguous(), columns.contiguous(),
            offsets.to(logits.device, non_blocking=True), out, logits.stride(0), call.rows, vocab_size, call.set_rows,
            blocks, ignore_index, call.nat, call.c, call.inner, scale, **call.flags, ROWS=launch.rows,
            BLOCK=launch.block, **tuning.options(launch),
        )  # fmt: skip
    return out


@triton.jit(**GENERAL)
def sum_sets_kernel(
    tail, tails, made, places, out, stride, columns, width, sets, tiles,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of rows of dW: the sets one after the other, in float32 (float64), rounded once."""
    v = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = (v < columns)[:, None] & (h < width)[None, :]
    total = tl.zeros([ROWS, BLOCK], ACC)
    for _ in range(sets):
        q = tl.load(tail + v, mask=v < columns, other=0.0).to(ACC)
        term = tl.load(tails + h, mask=h < width, other=0.0)
        place = tl.load(places + v, mask=v < columns, other=-1)
        part = tl.load(made + place[:, None] * width + h[None, :], mask=inside & (place >= 0)[:, None], other=0.0)
        total += q[:, None] * term[None, :] + part.to(ACC)
        tail += stride
        tails += width
        places += columns
    tl.store(out + v[:, None] * width + h[None, :], total.to(out.dtype.element_ty), mask=inside)


def live_sum(tail: Tensor, tails: Tensor, made: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """Rows of dW [v, H] from the sets' products; see the reference."""
    (sets, rows), width = tail.shape, tails.shape[1]
    out = made.new_empty(rows, width)
    if not out.numel():
        return out
    launch = tuning.LIVE_SUM
    counts = offsets.diff().to(tail.device, non_blocking=True)
    of_set = torch.arange(sets, device=tail.device).repeat_interleave(counts, output_size=columns.numel())
    places = torch.full((sets, rows), -1, dtype=torch.int64, device=tail.device)  # of each column in `made`
    places[of_set, columns] = torch.arange(columns.numel(), device=tail.device)
    tiles = -(-width // launch.block)
    with torch.cuda.device_of(tail):
        sum_sets_kernel[(-(-rows // launch.rows) * tiles,)](
            tail, tails.contiguous(), made.contiguous(), places, out, tail.stride(0), rows, width, sets, tiles,
            ACC=ACC_TYPES["fp64" if tails.dtype == torch.float64 else "fp32"], ROWS=launch.rows, BLOCK=launch.block,
            **tuning.options(launch),
        )  # fmt: skip
    return out
