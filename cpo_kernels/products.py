"""Matrix products of the head. Where a CPU has no 16-bit products they are made in float32, a slab at a time.

Without instructions for a dtype torch multiplies one element after the other: for 128 x 576 by 49152 columns of
bfloat16 X W^T took 1.2 s, G W 15 s and G^T X 2.2 s on one core with AVX2, and 0.16, 0.16 and 0.24 s in slabs of float32
(float16 alike; both beside other work).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

SLAB = 2048  # of the longest side: in float32 a slab of the weight is 7 MB at H = 896


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrix products of this dtype that torch uses."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def by_slabs(a: Tensor) -> bool:
    """Whether products of `a` go through float32."""
    return a.device.type == "cpu" and not cpu_multiplies(a.dtype)


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """out [m, n] = a [m, k] @ b [k, n] + bias [n], rounded once to the dtype of `out`."""
    if by_slabs(a):
        return _in_float32(a, b, out, bias, add=False)
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
        return not cpu_multiplies(torch.bfloat16)  # in slabs
    a = torch.full((16, 16), 1.0, device=device, dtype=torch.bfloat16)
    sums = torch.full((16, 16), 1025.0, device=device)
    try:
        torch.addmm(sums, a.t(), a, out_dtype=torch.float32, out=sums)
        return bool((sums == 1041.0).all() and (torch.mm(a.t(), a, out_dtype=torch.float32) == 16.0).all())
    except (RuntimeError, TypeError):
        return False


def adds_products(total: Tensor, a: Tensor) -> bool:
    """Whether products of matrices in the dtype of `a` add up in `total` by themselves."""
    return a.dtype == total.dtype or (a.dtype == torch.bfloat16 and multiplies_into_float32(a.device))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b, first; else total += a @ b."""
    kind: Any = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    if first and a.dtype == total.dtype:
        product(a, b, total)
    elif by_slabs(a):
        _in_float32(a, b, total, None, add=not first)
    elif not adds_products(total, a):
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif first:
        torch.mm(a, b, **kind, out=total)
    else:
        torch.addmm(total, a, b, **kind, out=total)


def _in_float32(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, add: bool) -> Tensor:
    m, k, n = *a.shape, b.shape[1]
    if k > max(m, n, SLAB):  # a sum over slabs
        total = out if out.dtype == torch.float32 else torch.empty(m, n)
        for low in range(0, k, SLAB):
            part = slice(low, low + SLAB)
            torch.addmm(total, a[:, part].float(), b[part].float(), beta=int(add or low > 0), out=total)
        _put(out, total, bias, add=False)
    elif m > n:
        right = b.float()
        for low in range(0, m, SLAB):
            part = slice(low, low + SLAB)
            _put(out[part], a[part].float() @ right, bias, add)
    else:
        left = a.float()
        for low in range(0, n, SLAB):
            part = slice(low, low + SLAB)
            _put(out[:, part], left @ b[:, part].float(), None if bias is None else bias[part], add)
    return out


def _put(out: Tensor, product: Tensor, bias: Tensor | None, add: bool) -> None:
    product = product if bias is None else product + bias.float()
    if add:
        out += product
    elif product is not out:
        out.copy_(product)
