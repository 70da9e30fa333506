"""Relative logits: a constant of the row is subtracted from 16-bit logits, and the labels' logits are in float32.

A constant added to all logits of a row does not change its log-probs. A matmul that adds -s_t before rounding (`addmm`,
whose sums are float32) stores z - s, which is small where the softmax has its mass, and so is its rounding error. With
the label's logit computed separately, n H multiplications,

    log p_t = z_{t,y_t} - s_t - logsumexp_v (z_tv - s_t)

s_t is the mean logit under the softmax of a few columns: labels of the batch, the first of the vocabulary, where
tokenizers have frequent tokens, and some from all over it. Errors of log-probs in bfloat16 (rms) on 3,072 rows of
SmolLM2-135M-Instruct (|z| up to 42) with their labels, with labels drawn at random, and on normal logits of deviation
1:

    absolute logits                          2.6e-2     3.4e-2     1.7e-3
    s: that mean                             6.5e-4     4.8e-3     1.7e-5
    s: the largest of those columns          5.1e-4     4.0e-3     2.7e-5
    s: the mean of all columns               6.4e-4     9.1e-4

The largest logit of a flat row is far from its mass: gradients would be worse than with absolute logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.head.matmul import product
from cpo_kernels.library import Kernels
from cpo_kernels.ops.token_logps import HeadOptions

# Columns from which s_t is computed, of a vocabulary of V: the first min(FIRST, max(FEW_FIRST, V / FIRST_SHARE)); at
# most max(FEW_LABELS, V / LABEL_SHARE) labels; and SPREAD spaced evenly, in case the first and the labels are masked.
# Labels are those of all chunks: with those of the 256 rows of a chunk only, the error of 3,072 rows of SmolLM2 with
# shuffled labels was 3.3e-3 in place of 7.8e-4.
FIRST, FIRST_SHARE, FEW_FIRST = 512, 64, 64
LABEL_SHARE, FEW_LABELS = 32, 256
SPREAD = 64
# Rows at a time: on a CPU their logits in those columns, and their labels' rows of the weight, stay in the cache. A GPU
# takes as many as fit LABEL_BYTES, as every turn is some 15 launches: 32 turns of 256 rows are the likely reason why
# 8,192 rows (4096 x 128,256) took 6 ms longer than the product on an H200 (benchmarks/results/gpu-first-run; not yet
# measured without them).
ROWS = 256
LABEL_BYTES = 32 << 20
GPU_ALIGN = 8  # columns: 16 bytes, the alignment of rows that cuBLAS needs for its full rate


def is_relative(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


class Net(NamedTuple):
    """The columns from which the constants of rows are computed."""

    weight: Tensor  # [few, H]
    bias: Tensor  # [few] or [0]


def make_net(labels: Tensor, weight: Tensor, bias: Tensor, count: int) -> Net:
    """labels [n], n > 0, in [0, count), the columns that are not padding."""
    few = _few_columns(labels, count)
    return Net(weight.index_select(0, few), bias.index_select(0, few) if bias.numel() else bias)


def make_anchors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    net: Net,
    options: HeadOptions,
    kernels: Kernels,
    room: Tensor,
) -> Tensor:
    """[2, n]: the constant to subtract from each row, representable in the dtype of x, and the logit of its label.

    x [n, H]; labels [n], columns that are not padding. room: memory that may be overwritten, flat, in the dtype of x.
    """
    few, own = net.weight.shape[0], dispatch.own_matmuls(kernels, weight) if x.shape[1] % 2 == 0 else None
    step = max(room.numel() // few, 1) if x.device.type != "cpu" else ROWS
    size = min(step, x.shape[0]) * few
    room = room if size <= room.numel() else room.new_empty(size)
    room = room[:size].view(-1, few)
    if own and not bias.numel():  # what follows in one op: 1.0 ms for 256 rows of 576 x 49,152 in place of 1.6
        anchors: Tensor = own.relative_anchors(x, weight, labels, net.weight, options.scale, options.softcap, room)
        return anchors
    parts = []
    for rows in x.split(step):
        u = room[: rows.shape[0]]
        if own:
            own.logits_(rows, net.weight, x.new_empty(0), x.new_empty(0, dtype=torch.float32), u)
        else:
            product(rows, net.weight.t(), u)
        if u.dtype == torch.float16:
            u.clamp_(max=torch.finfo(u.dtype).max)  # of an infinite one the mean would be NaN
        if bias.numel():
            u = u.to(library.acc_dtype(u.dtype)).add_(net.bias)  # rounded to 16 bits it would move the constant
        parts.append(_mean_logit(u, options, kernels))
    lacks = torch.cat(parts)
    at_label = label_logits(x, weight, bias, labels)
    lacks = torch.where(torch.isfinite(lacks), lacks, 0.0)  # not finite if all of those columns are masked
    most = torch.finfo(x.dtype).max / 2  # leaves half of float16's range for the difference
    return torch.stack([lacks.clamp(-most, most).to(x.dtype).to(lacks.dtype), at_label])


def rows_at_a_time(hidden_size: int, device: torch.device) -> int:
    """Rows of the labels that are gathered from the weight, in its dtype and in float32, at a time."""
    return ROWS if device.type == "cpu" else max(ROWS, LABEL_BYTES // (6 * hidden_size))


def label_logits(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """x_t . w_{y_t} + b_{y_t} [n] in float32: x [n, H], labels [n]."""
    step, acc = rows_at_a_time(x.shape[1], x.device), library.acc_dtype(x.dtype)
    turns = zip(x.split(step), labels.split(step), strict=True)
    out = torch.cat([weight.index_select(0, y).to(acc).mul_(rows).sum(1) for rows, y in turns])
    return out + bias.index_select(0, labels) if bias.numel() else out


def anchor_bytes(
    rows: int, chunk_rows: int, hidden_size: int, count: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Copies of the columns; and what is freed before a chunk is written: rows of the labels."""
    if not is_relative(dtype):
        return 0
    few, labelled = net_columns(rows, count), min(chunk_rows, rows_at_a_time(hidden_size, device))
    return hidden_size * (few * dtype.itemsize + labelled * 6)


def net_columns(rows: int, count: int) -> int:
    """Most columns of a `Net`, for `rows` labels in a vocabulary of `count`."""
    return _first(count) + SPREAD + min(rows, _most_labels(count))


def _few_columns(labels: Tensor, count: int) -> Tensor:
    """The first of `count` columns, some spaced evenly over all of them, and labels spaced evenly over those given."""
    labels = labels[:: -(-labels.shape[0] // _most_labels(count))]
    if labels.device.type == "cpu":  # elsewhere their number needs a host-device synchronisation
        labels = labels.unique()
    spread = torch.arange(0, count, -(-count // SPREAD), device=labels.device)
    few = torch.cat([torch.arange(_first(count), device=labels.device), spread, labels])
    return few if labels.device.type == "cpu" else few[: max(len(few) // GPU_ALIGN, 1) * GPU_ALIGN]


def _first(count: int) -> int:
    return min(count, FIRST, max(FEW_FIRST, count // FIRST_SHARE))


def _most_labels(count: int) -> int:
    return max(FEW_LABELS, count // LABEL_SHARE)


def _mean_logit(u: Tensor, options: HeadOptions, kernels: Kernels) -> Tensor:
    """sum_v p_v z_v over u [n, v], mapped back to u: logsumexp z less the entropy. Masked columns have nonzero p under
    a softcap."""
    any_label = torch.zeros(u.shape[0], dtype=torch.int64, device=u.device)
    _, lse, extra = kernels.token_logps_fwd(u, any_label, -1, options.scale, options.softcap, u.shape[1], True)
    mean = lse - extra[0]
    if options.softcap:
        mean = options.softcap * torch.atanh((mean / options.softcap).clamp(-0.999, 0.999))
    return mean / options.scale
