"""Relative logits: 16-bit logits lack a constant of their row, and the logits of the labels are in float32.

A row's log-probs do not change by a constant. A product that adds -s_t before it rounds (`addmm`, whose sums are
float32) stores z - s, which is small where the softmax has its mass, and so is its rounding. With the label's logit
from a product of its own, n H multiplications,

    log p_t = z_{t,y_t} - s_t - logsumexp_v (z_tv - s_t)

On 3,072 rows of SmolLM2-135M-Instruct (|z| up to 42) in bfloat16 the error of a log-prob is 5e-4 (rms), of absolute
logits 2.6e-2. s_t is the largest logit of a few columns: the labels of the chunk, and the first of the vocabulary,
where tokenizers have frequent tokens. The exact maximum gives 3.4e-4; the first columns alone 9e-4, and the labels
alone 5e-4, but 1.2e-2 where labels are drawn at random (with the first columns 4e-3).

A second pass knows the log-sum-exp and lacks that.
"""

import torch
from torch import Tensor

from cpo_kernels import library

FIRST_COLUMNS = 512  # the first of the vocabulary that are looked at, and no more than a 64th of it
LABEL_SHARE = 32  # labels that are looked at: no more than a 32nd of the vocabulary
ROWS = 1024  # whose label logits are made at a time: 6 bytes of H numbers each


def is_relative(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def label_logits(x: Tensor, weight: Tensor, bias: Tensor, columns: Tensor) -> Tensor:
    """x_t . w_{y_t} + b_{y_t} [n] in float32: x [n, H], columns [n]."""
    out = x.new_empty(x.shape[0], dtype=library.acc_dtype(x.dtype))
    for low in range(0, x.shape[0], ROWS):
        rows = slice(low, low + ROWS)
        out[rows] = weight.index_select(0, columns[rows]).to(out.dtype).mul_(x[rows]).sum(1)
    return out + bias.index_select(0, columns) if bias.numel() else out


def _columns_to_look_at(columns: Tensor, count: int) -> Tensor:
    """Labels, evenly from the chunk, and the first of `count` columns."""
    labels = columns[:: -(-columns.shape[0] // (-(-count // LABEL_SHARE)))]
    if labels.device.type == "cpu":  # elsewhere the host would wait for their number
        labels = labels.unique()
    return torch.cat([torch.arange(min(FIRST_COLUMNS, -(-count // 64)), device=labels.device), labels])


def anchors(x: Tensor, weight: Tensor, bias: Tensor, columns: Tensor, count: int) -> Tensor:
    """[2, n]: what the logits of each row shall lack, a number of the dtype of x, and the logit of its label.

    x [n, H]; columns [n] of the labels in [0, count), the columns that are no padding.
    """
    at_label = label_logits(x, weight, bias, columns)
    few = _columns_to_look_at(columns, count)
    some = x @ weight.index_select(0, few).t()
    if bias.numel():
        some += bias.index_select(0, few)
    return torch.stack([rounded(torch.maximum(some.amax(1).to(at_label.dtype), at_label), x.dtype), at_label])


def anchors_of_lse(
    x: Tensor, weight: Tensor, bias: Tensor, columns: Tensor, lse: Tensor, scale: float, softcap: float
) -> Tensor:
    """The same where the log-sum-exp [n] is known."""
    inner = lse if not softcap else softcap * torch.atanh((lse / softcap).clamp(-0.999, 0.999))
    return torch.stack([rounded(inner / scale, x.dtype), label_logits(x, weight, bias, columns)])


def rounded(lacks: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where it is not finite, as where all columns are masked."""
    lacks = lacks.to(dtype).to(lacks.dtype)
    return torch.where(torch.isfinite(lacks), lacks, 0.0)
