"""Matrix products of the head. Where a CPU has no 16-bit products they are made in float32, a tile at a time.

Without instructions for a dtype torch multiplies one element after the other: for 128 x 576 by 49152 columns of
bfloat16 X W^T took 1.2 s, G W 15 s and G^T X 2.2 s on one core with AVX2, and 0.16, 0.16 and 0.24 s in tiles of float32
(float16 alike; both beside other work).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

TILE = 2048  # of the longest side, 7 MB of float32 at H = 896; X W^T took 164 ms, with 8192 216 ms


@cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which makes torch's 16-bit products, has instructions for them on this CPU."""
    if not torch.backends.mkldnn.is_available():  # the ops below are missing then
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    multiplies: bool = getattr(torch.ops.mkldnn, supported)()
    return multiplies


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast matrix products of this dtype on this CPU."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    return bool(torch.backends.mkldnn.enabled) and _onednn_multiplies(dtype)


def by_tiles(a: Tensor) -> bool:
    """Whether products of `a` go through float32."""
    return a.device.type == "cpu" and not cpu_multiplies(a.dtype)


def tile_bytes(rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Float32 held by a product of `rows` of the head where it goes by tiles: `[rows, H]`, a tile and its part."""
    if device.type != "cpu" or cpu_multiplies(dtype):
        return 0
    return 4 * (rows * hidden_size + TILE * (rows + hidden_size))


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, lacks: Tensor | None = None) -> Tensor:
    """out [m, n] = a [m, k] @ b [k, n] + bias [n] - lacks [m], rounded once to the dtype of `out`.

    lacks: numbers of that dtype. With a bias too, the sum is rounded a second time. On two cores with AVX-512 and
    bfloat16 X W^T of 1024 x 576 x 49,152 takes 1.14 times as long with it: 0.05 to fill `out`, the rest to read it.
    """
    if by_tiles(a):
        return _in_float32(a, b, out, bias, lacks, add=False)
    if lacks is not None:
        torch.addmm(lacks.to(a.dtype).neg_()[:, None], a, b, out=out)
        return out if bias is None else out.add_(bias)
    if bias is not None:
        return torch.addmm(bias, a, b, out=out)
    return torch.mm(a, b, out=out)


@cache
def multiplies_into_float32(device: torch.device) -> bool:
    """Whether torch.addmm(..., out_dtype=float32) adds a bfloat16 product to a float32 matrix in place here.

    Asked of the device once, with numbers whose sums bfloat16 cannot hold: CUDA has it, the CPU and some ROCm builds
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
    """Whether products of matrices in the dtype of `a` add up in `total` by themselves."""
    into_float32 = a.dtype == torch.bfloat16 and (by_tiles(a) or multiplies_into_float32(a.device))
    return a.dtype == total.dtype or into_float32


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b, first; else total += a @ b."""
    kind: Any = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    if first and a.dtype == total.dtype:
        product(a, b, total)
    elif by_tiles(a):
        _in_float32(a, b, total, None, None, add=not first)
    elif not adds_products(total, a):
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif first:
        torch.mm(a, b, **kind, out=total)
    else:
        torch.addmm(total, a, b, **kind, out=total)


def _in_float32(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, lacks: Tensor | None, add: bool) -> Tensor:
    m, k, n = *a.shape, b.shape[1]
    if k > max(m, n, TILE):  # a sum over tiles
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
