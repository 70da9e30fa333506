"""The two matmuls of the live gradients in Triton. They read rows of the weight by index and add into rows of dW.

Estimates for H = 4096, V = 128,256, n = 8192 rows in 64 sets of 128, 13% live (measured on SmolLM2's rows at
eps = 2^-14), 16 bit, H100; the exact products take 10.9 ms each.

    dX   1.1 TFLOP. A copy of W_A for each set would write and read 2 x 8.7 GB, so rows are read by index. All sets walk
         the vocabulary together (set numbers change fastest in the grid), so a row of W is read from HBM once for all
         sets. L2 is the limit: 128 x 256 tiles at 85 FLOP per byte read 13 GB, 2.4 ms at 5.5 TB/s.
    dW   1.1 TFLOP too, but adding each set's rows into a float32 dW moves 64 x 0.13 V H 8 bytes = 35 GB: 12 ms, more
         than the exact product. So a program owns rows of dW, accumulates them in registers over all sets, and writes
         them once. In vocabulary order, 99% of the pairs (set, 128 columns) contain a live column; with the columns
         sorted by the sets in which they are live, in Gray code order, 34% do (93 and 21% at 2^-12). Those blocks are
         packed with zeros in between, 0.7 GB: 2.9 TFLOP, 6.2 ms by L2, plus 1.8 ms for packing and for reading and
         writing dW.

benchmarks/roofline.py computes these numbers. Deterministic: sums in the order of sets and rows, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.kernels import tuning
from cpo_kernels.kernels.token_logps import ACC_TYPES

PRODUCT = {
    "do_not_specialize": ["rows", "set_rows", "sets", "blocks", "steps", "tiles"],
    "do_not_specialize_on_alignment": ["ids"],
}
KEY_BITS = 63


@triton.jit
def _write_dx(
    dx, row, inside, first, hidden, acc, weight, weight_stride, tail_row, tau, factor, label, lost, BN: tl.constexpr
):
    """dx [BM, BN columns from `first`] = factor (acc + tau tail_row + lost w_label)."""
    n = first + tl.arange(0, BN)
    keep = inside[:, None] & (n < hidden)[None, :]
    acc += tau[:, None] * tl.load(tail_row + n, mask=n < hidden, other=0.0).to(acc.dtype)[None, :]
    at = weight + label[:, None] * weight_stride + n[None, :]
    acc += lost[:, None] * tl.load(at, mask=keep & (label >= 0)[:, None], other=0.0).to(acc.dtype)
    tl.store(dx + row[:, None] * hidden + n[None, :], (factor[:, None] * acc).to(dx.dtype.element_ty), mask=keep)


@triton.jit(**PRODUCT)
def dx_kernel(
    g, ids, offsets, weight, tail_rows, coef, labels, label_grads, dx, rows, set_rows, sets, blocks, hidden,
    weight_stride,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """A tile [BM rows of a set, BN of H] of coef ([g_A, tau] [W_A; tail_row] + what rounding took from the labels' g).
    ALIGNED: rows of g are whole 16-byte pieces."""
    program = tl.program_id(0)
    k = (program % sets).to(tl.int64)
    low = (program // sets % blocks * BM).to(tl.int64)
    m = tl.arange(0, BM)
    n = program // sets // blocks * BN + tl.arange(0, BN)
    inside = (low + m < set_rows) & (k * set_rows + low + m < rows)
    first = tl.load(offsets + k)
    count = tl.load(offsets + k + 1) - first
    stride, start = count + 1, set_rows * (first + k)
    if ALIGNED:
        stride, start = tl.multiple_of(stride, 8), tl.multiple_of(start, 8)
    block = g + start + low * stride
    lines = m * stride.to(tl.int32)  # offsets within a tile are 32-bit, addresses of tiles 64-bit
    acc = tl.zeros([BM, BN], ACC)
    for j in range(0, count.to(tl.int32), BK):
        place = j + tl.arange(0, BK)
        column = tl.load(ids + first + place, mask=place < count, other=0)
        # Includes tau, which is multiplied by a row of zeros, so that whole 16-byte pieces are read.
        a = tl.load(
            block + lines[:, None] + place[None, :], mask=inside[:, None] & (place < stride)[None, :], other=0.0
        )
        at = weight + column[:, None] * weight_stride + n[None, :]
        b = tl.load(at, mask=(place < count)[:, None] & (n < hidden)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    row = k * set_rows + low + m
    tau = tl.load(block + lines + count, mask=inside, other=0.0).to(ACC)
    factor = tl.load(coef + row, mask=inside, other=0.0)
    label, lost = tl.full([BM], -1, tl.int64), tl.zeros([BM], ACC)
    if LABELS:
        label = tl.load(labels + row, mask=inside, other=-1)
        value = tl.load(label_grads + row, mask=inside, other=0.0)
        lost = value - value.to(g.dtype.element_ty).to(ACC)
    # In halves: the weight's rows need registers besides the sums.
    left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
    first, tail_row = program // sets // blocks * BN, tail_rows + k * hidden
    _write_dx(dx, row, inside, first, hidden, left, weight, weight_stride, tail_row, tau, factor, label, lost, BN // 2)
    first += BN // 2
    _write_dx(dx, row, inside, first, hidden, right, weight, weight_stride, tail_row, tau, factor, label, lost, BN // 2)


@triton.jit(**PRODUCT)
def pack_kernel(
    g, offsets, block_sets, block_tiles, places, packed, rows, set_rows, tiles, BM: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """One block [set_rows, BV]: the gradients of a set in a tile's columns, 0 in those that are not live."""
    block = tl.program_id(0).to(tl.int64)
    k, tile = tl.load(block_sets + block), tl.load(block_tiles + block)
    v = tl.arange(0, BV)
    place = tl.load(places + (k * tiles + tile) * BV + v)
    first = tl.load(offsets + k)
    stride = tl.load(offsets + k + 1) - first + 1
    for low in range(0, set_rows, BM):
        within = low + tl.arange(0, BM)
        keep = ((within < set_rows) & (k * set_rows + within < rows))[:, None] & (place >= 0)[None, :]
        line = g + set_rows * (first + k) + within * stride
        x = tl.load(line[:, None] + place[None, :], mask=keep, other=0.0)
        at = packed + (block * set_rows + within)[:, None] * BV + v[None, :]
        tl.store(at, x, mask=(within < set_rows)[:, None])


@triton.jit
def _add_rows(dw, column, inside, first, hidden, acc, BV: tl.constexpr, BN: tl.constexpr):
    n = first + tl.arange(0, BN)
    at = dw + column[:, None] * hidden + n[None, :]
    keep = inside[:, None] & (n < hidden)[None, :]
    tl.store(at, tl.load(at, mask=keep, other=0.0) + acc.to(dw.dtype.element_ty), mask=keep)


@triton.jit(**PRODUCT)
def dw_kernel(
    packed, x, dw, order, tile_starts, tile_blocks, tile_sets, rows, set_rows, steps, hidden, columns,
    ACC: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw [BV columns, BN of H] += the tile's blocks times their sets' rows of x."""
    hidden_tiles = tl.cdiv(hidden, BN)
    tile = tl.program_id(0) // hidden_tiles
    first = tl.program_id(0) % hidden_tiles * BN
    n = first + tl.arange(0, BN)
    begin = tl.load(tile_starts + tile)
    end = tl.load(tile_starts + tile + 1)
    if begin == end:
        return
    v, r = tl.arange(0, BV), tl.arange(0, BK)
    acc = tl.zeros([BV, BN], ACC)
    for i in range((begin * steps).to(tl.int32), (end * steps).to(tl.int32)):
        block = tl.load(tile_blocks + i // steps)
        low = (i % steps * BK).to(tl.int64)
        row = tl.load(tile_sets + i // steps) * set_rows + low
        left = tl.minimum(set_rows - low, rows - row).to(tl.int32)
        a = tl.load(packed + (block * set_rows + low) * BV + (r[:, None] * BV + v[None, :]),
                    mask=(r < left)[:, None], other=0.0)  # fmt: skip
        b = tl.load(x + row * hidden + (r[:, None] * hidden + n[None, :]),
                    mask=(r < left)[:, None] & (n < hidden)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee", out_dtype=ACC)
    column = tl.load(order + tile * BV + v, mask=tile * BV + v < columns, other=0)
    # In halves: the values read from dw need registers besides the sums.
    left_acc, right_acc = acc.reshape(BV, 2, BN // 2).permute(0, 2, 1).split()
    _add_rows(dw, column, tile * BV + v < columns, first, hidden, left_acc, BV, BN // 2)
    _add_rows(dw, column, tile * BV + v < columns, first + BN // 2, hidden, right_acc, BV, BN // 2)


def live_dx(
    g: Tensor, columns: Tensor, offsets: Tensor, set_rows: int, weight: Tensor, tail_rows: Tensor, coef: Tensor,
    label_columns: Tensor, label_grads: Tensor,
) -> Tensor:  # fmt: skip
    """dx [n, H] in the dtype of g: coef_t ([g_A, tau] [W[columns]; tail_row] + e_t w_{y_t}), rounded once.

    g, columns, offsets [sets + 1] (host) as in `live_grads`; weight [V, H] in the dtype of g; tail_rows [sets, H] and
    coef [n] in float32 (float64 for float64). label_columns [n], -1 for none, and label_grads [n]: g of the labels
    before rounding, which took e_t from it; or [0].

    It is fastest if the number of live columns of each set is 7 modulo 8, so that the rows of g are 16-byte aligned;
    add columns that are not live to get there (a larger A is as correct). Otherwise g is read one number at a time.
    """
    rows, hidden = len(coef), weight.shape[1]
    set_rows = min(set_rows, max(rows, 1))
    dx = g.new_empty(rows, hidden)
    if not dx.numel():
        return dx
    aligned = g.data_ptr() % 16 == 0 and not bool(((offsets.diff() + 1) % 8).any())
    tile = tuning.live_product(g.dtype.itemsize, set_rows, aligned)
    sets, blocks = len(offsets) - 1, -(-set_rows // tile.rows)
    with torch.cuda.device_of(g):
        dx_kernel[(sets * blocks * -(-hidden // tile.block),)](
            g, columns.contiguous(), offsets.to(g.device, non_blocking=True), weight, tail_rows.contiguous(),
            coef.contiguous(), label_columns.contiguous(), label_grads.contiguous(), dx, rows, set_rows, sets, blocks,
            hidden, weight.stride(0), ACC=_acc(g), BM=tile.rows, BN=tile.block, BK=tile.depth, ALIGNED=aligned,
            LABELS=label_columns.numel() > 0, **tuning.options(tile),
        )  # fmt: skip
    return dx


def live_dw_(g: Tensor, columns: Tensor, offsets: Tensor, set_rows: int, scaled_x: Tensor, dw: Tensor) -> None:
    """dw [V, H] (float32; float64 for float64) += g_A^T scaled_x over all sets; scaled_x [N, H] in the dtype of g.

    The number of blocks needs a host-device synchronisation. They take g.itemsize * N V bytes times their share (see
    above).
    """
    rows, hidden = scaled_x.shape
    if not (rows and hidden and len(columns)):
        return
    set_rows = min(set_rows, rows)
    tile = tuning.live_product(g.dtype.itemsize, 128)
    offsets = offsets.to(g.device, non_blocking=True)
    places, order, active = _tiles(columns, offsets, dw.shape[0], tile.rows)
    tiles = active.shape[1]
    block_sets, block_tiles = active.nonzero(as_tuple=True)
    number = (active.flatten().cumsum(0) - 1).view_as(active)
    tile_sets = active.T.nonzero()[:, 1]
    tile_blocks = number.T[active.T]
    tile_starts = torch.cat([number.new_zeros(1), active.sum(0).cumsum(0)])
    packed = g.new_empty(len(block_sets), set_rows, tile.rows)
    scaled_x, steps = scaled_x.contiguous(), -(-set_rows // tile.depth)
    with torch.cuda.device_of(g):
        pack_kernel[(len(block_sets),)](
            g, offsets, block_sets, block_tiles, places, packed, rows, set_rows, tiles,
            BM=tuning.LIVE_PACK.rows, BV=tile.rows, **tuning.options(tuning.LIVE_PACK),
        )  # fmt: skip
        dw_kernel[(tiles * -(-hidden // tile.block),)](
            packed, scaled_x, dw, order, tile_starts, tile_blocks, tile_sets, rows, set_rows, steps, hidden,
            dw.shape[0], ACC=_acc(g), BV=tile.rows, BN=tile.block, BK=tile.depth, **tuning.options(tile),
        )  # fmt: skip


def _acc(g: Tensor) -> tl.dtype:
    return ACC_TYPES["fp64" if library.acc_dtype(g.dtype) == torch.float64 else "fp32"]


def _tiles(columns: Tensor, offsets: Tensor, vocab: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of `size` columns that are live in nearly the same sets.

    places [sets, tiles * size] int32: the index of each column of the tiles among the live ones of a set, or -1;
    order [vocab]: the columns of the tiles; active [sets, tiles]. Neighbours in Gray code differ in one set; with more
    than 63 sets, one bit represents several.
    """
    sets, device = len(offsets) - 1, columns.device
    each = torch.arange(len(columns), device=device)
    of = torch.searchsorted(offsets[1:], each, right=True)
    places = torch.full((sets, vocab), -1, dtype=torch.int32, device=device)
    places[of, columns] = (each - offsets[of]).int()
    share = -(-sets // KEY_BITS)
    bits = torch.nn.functional.pad(places >= 0, (0, 0, 0, -sets % share)).view(-1, share, vocab).any(1)
    key = (bits.long() << torch.arange(len(bits), device=device)[:, None]).sum(0)
    for shift in (1, 2, 4, 8, 16, 32):
        key ^= key >> shift
    order = key.argsort(descending=True, stable=True)
    places = torch.nn.functional.pad(places[:, order], (0, -vocab % size), value=-1)
    return places, order, (places >= 0).view(sets, -1, size).any(2)
