"""Large tensors of the CPU in huge pages.

glibc maps every allocation from 32 MiB on anew and unmaps it when it is freed, so each step of a training loop faults
every page of its logits and of dW again: 32,000 pages of 4 KiB for 128 MiB, 0.1 of the time of the three products of
1383 x 576 x 49,152 in bfloat16. In pages of 2 MiB `linear_nll` of that size took 0.88 of its time (one core). Linux
gives them where it is asked to (`madvise`, the default of most distributions).
"""

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE = 32 << 20  # bytes: the largest threshold of glibc


@cache
def _madvise() -> Any:
    """libc's function; None on a system without huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape)`, in huge pages where it is large, on a CPU, and the system has them."""
    out = like.new_empty(shape, dtype=dtype)
    size = out.numel() * out.element_size()
    if size >= LARGE and out.device.type == "cpu" and (madvise := _madvise()):
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(start, out.data_ptr() + size - start, mmap.MADV_HUGEPAGE)  # advice: a kernel without them refuses it
    return out
