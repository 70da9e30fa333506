"""Matmuls of the head. On CPUs without 16-bit matmul instructions they are computed in float32, one tile at a time.

Without such instructions torch multiplies element by element. In bfloat16, with 128 rows, H = 576 and 49,152 columns,
X W^T took 1.2 s, G W 15 s and G^T X 2.2 s on one core with AVX2, against 0.16, 0.16 and 0.24 s in float32 tiles.
(float16 behaves alike; both were measured beside other work.)
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch

TILE = 2048  # along the longest side: 7 MB of float32 at H = 896; X W^T took 164 ms, against 216 ms with 8192

WIDE = 1024  # columns of dW beyond which it is left to torch with AMX too


@cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which computes torch's 16-bit matmuls, has instructions for this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():  # then the ops below do not exist
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    multiplies: bool = getattr(torch.ops.mkldnn, supported)()
    return multiplies


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast matmuls in this dtype on this CPU."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    return bool(torch.backends.mkldnn.enabled) and _onednn_multiplies(dtype)


def by_tiles(a: Tensor) -> bool:
    """Whether matmuls of `a` are computed in float32 tiles."""
    return a.device.type == "cpu" and not cpu_multiplies(a.dtype)


def tile_bytes(rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of float32 that a tiled matmul of `rows` rows holds: `[rows, H]`, a tile and its part of the result."""
    if device.type != "cpu" or cpu_multiplies(dtype):
        return 0
    return 4 * (rows * hidden_size + TILE * (rows + hidden_size))


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, lacks: Tensor | None = None) -> Tensor:
    """out [m, n] = a [m, k] @ b [k, n] + bias [n] - lacks [m], rounded once to the dtype of `out`.

    lacks: values that this dtype represents exactly. With a bias as well, the sum is rounded a second time. On two
    cores with AVX-512 and bfloat16, X W^T of 1024 x 576 x 49,152 takes 1.14 times as long with `lacks`: 0.05 to fill
    `out`, the rest to read it. What lies between two rows of `out` may then be overwritten.
    """
    if by_tiles(a):
        return _in_float32(a, b, out, bias, lacks, add=False)
    if lacks is not None:
        _fill_rows(out, lacks.to(a.dtype).neg_())
        torch.addmm(out, a, b, out=out)
        return out if bias is None else out.add_(bias)
    if bias is not None:
        return torch.addmm(bias, a, b, out=out)
    return torch.mm(a, b, out=out)


def _fill_rows(out: Tensor, values: Tensor) -> None:
    """out [n, m] = values [n] in every column, written as numbers of 8 bytes where rows begin on such: torch copies a
    broadcast column element by element."""
    item = out.element_size()
    width = -(-out.shape[1] * item // 8) * 8 // item  # whole numbers, perhaps with elements between two rows
    fits = out.stride(1) == 1 and out.stride(0) >= width and (out.data_ptr() | out.stride(0) * item) % 8 == 0
    if not fits:
        out.copy_(values[:, None])
        return
    wide = values[:, None].expand(-1, 8 // item).contiguous().view(torch.int64)
    out.as_strided((len(out), width), out.stride()).view(torch.int64).copy_(wide)


@cache
def multiplies_into_float32(device: torch.device) -> bool:
    """Whether torch.addmm(..., out_dtype=float32) adds a bfloat16 product to a float32 matrix in place here.

    Tested once per device, with sums that bfloat16 cannot represent. CUDA supports it; the CPU and some ROCm builds
    raise.
    """
    if device.type == "cpu":
        return False
    a = torch.full((16, 16), 1.0, device=device, dtype=torch.bfloat16)
    sums = torch.full((16, 16), 1025.0, device=device)
    try:
        torch.addmm(sums, a.t(), a, out_dtype=torch.float32, out=sums)
        return bool((sums == 1041.0).all() and (torch.mm(a.t(), a, out_dtype=torch.float32) == 16.0).all())
    except (RuntimeError, TypeError):
        return False


def adds_products(total: Tensor, a: Tensor) -> bool:
    """Whether a matmul in the dtype of `a` can accumulate into `total` itself."""
    into_float32 = a.dtype == torch.bfloat16 and (by_tiles(a) or multiplies_into_float32(a.device))
    return a.dtype == total.dtype or into_float32


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b, first; else total += a @ b.

    On a CPU without the kernels' own matmuls, a bfloat16 product is rounded before it is added to float32: its error is
    that of the summand, which may be larger than the total.
    """
    kind: Any = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    if _own_adds(total, a, b):
        rounded = total.dtype == a.dtype
        torch.ops.cpo_kernels.add_product_(total, total.new_empty(0, dtype=torch.int16), a, b, first, rounded, 1.0)
    elif first and a.dtype == total.dtype:
        product(a, b, total)
    elif by_tiles(a):
        _in_float32(a, b, total, None, None, add=not first)
    elif not adds_products(total, a):
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif first:
        torch.mm(a, b, **kind, out=total)
    else:
        torch.addmm(total, a, b, **kind, out=total)


def _own_adds(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """Where torch rounds before it adds, and where tiles are faster than torch: 1,024 rows of 576 x 49,152 took 0.5 of
    its time for dX and 0.75 to 0.82 for dW (AMX, two cores; medians of 25 pairs, in four runs). Of wide results every
    part brings the rows of a into tiles again: 256 rows with H = 896 took 0.96, dW with H = 4096 1.1 to 1.3, dX 0.92.
    """
    tiles_pay = a.stride(1) == 1 or b.shape[1] <= WIDE
    fits = b.stride(1) == 1 and 1 in a.stride() and total.is_contiguous() and own_sums(total.device, a.dtype)
    if total.dtype == a.dtype:
        return fits and dispatch.cpu_has_tiles() and tiles_pay
    return fits and total.dtype == torch.float32


def own_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CPU's own matmul adds products of this dtype to float32."""
    return device.type == "cpu" and dtype == torch.bfloat16 and dispatch.cpu_multiplies_bf16()


def add_to_halves(
    high: Tensor, low: Tensor, a: Tensor, b: Tensor, first: bool, last: bool = False, factor: float = 1.0
) -> None:
    """As `add_product`, where `own_sums`, to float32 in two halves: high, bfloat16, and low, int16, hold the upper and
    lower 16 bits. last: `high` becomes the sum times `factor`, rounded."""
    torch.ops.cpo_kernels.add_product_(high, low, a, b, first, last, factor)


def _in_float32(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, lacks: Tensor | None, add: bool) -> Tensor:
    m, k, n = *a.shape, b.shape[1]
    if k > max(m, n, TILE):  # tiles along the inner dimension
        total = out.float() if add else out
        if total.dtype != torch.float32:
            total = a.new_empty(m, n, dtype=torch.float32)
        for low in range(0, k, TILE):
            part = slice(low, low + TILE)
            torch.addmm(total, a[:, part].float(), b[part].float(), beta=int(add or low > 0), out=total)
        _put(out, total, bias, lacks, add=False)
    elif m > n:
        right = b.float()
        for low in range(0, m, TILE):
            part = slice(low, low + TILE)
            _put(out[part], a[part].float() @ right, bias, None if lacks is None else lacks[part], add)
    else:
        left = a.float()
        for low in range(0, n, TILE):
            part = slice(low, low + TILE)
            _put(out[:, part], left @ b[:, part].float(), None if bias is None else bias[part], lacks, add)
    return out


def _put(out: Tensor, made: Tensor, bias: Tensor | None, lacks: Tensor | None, add: bool) -> None:
    made = made if bias is None else made + bias.float()
    made = made if lacks is None else made - lacks[:, None].float()
    if add:
        out += made
    elif made is not out:
        out.copy_(made)
