"""The gradient of some columns of the logits: those of a rank or of a slab, while a row's label may be elsewhere."""

from typing import Any

import torch
from torch import Tensor


def columns_of(labels: Tensor, ignore_index: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Labels [n] as columns of [first, first + count), -1 where ignored; and which of them are there.

    A label from elsewhere gets a column that stands in for it: the row's log-sum-exp needs none in particular.
    """
    column = labels - first
    here = (column >= 0) & (column < count) & (labels != ignore_index)
    return column.clamp(0, max(count - 1, 0)).masked_fill(labels == ignore_index, -1), here


def columns_bwd_(
    kernels: Any,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    first: int,
    count: int,
) -> None:
    """`token_logps_bwd_` of logits [n, v], columns from `first` on of a wider vocabulary; `count` are no padding."""
    if count <= 0:
        logits.zero_()
        return
    column, here = columns_of(labels, ignore_index, first, count)
    row, place = torch.arange(logits.shape[0], device=logits.device), column.clamp(min=0)
    z = logits[row, place].double() * scale
    slope = torch.full_like(z, scale)
    if softcap:
        z, slope = softcap * torch.tanh(z / softcap), scale / torch.cosh(z / softcap).square()
    kernels.token_logps_bwd_(logits, column, lse, grad, -1, scale, softcap, count)
    # Where the label is elsewhere, its stand-in has got the 1 of onehot - softmax. (index_put_: on a CPU scatter_ of
    # 16 bit copies the logits twice, 122 ms for 4096 x 24576.)
    wrong = ~here & (labels != ignore_index)
    share = (-grad * slope * torch.exp(z - lse)).to(logits.dtype)
    logits.index_put_((row, place), torch.where(wrong, share, logits[row, place]))
