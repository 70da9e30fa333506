"""Gradients of token log-probs on the live columns of the vocabulary, with one mean column in place of the others.

A trained model's softmax is nearly 0 in most columns. With g_tv = dlogp_t / du_tv = (onehot - softmax)_tv * dz/du and a
set C of consecutive rows,

    live  A = {v : |g_tv| >= eps * scale for some t in C, or v is a label of C}
    tail  tau_t = sum_{v not in A} g_tv,   q_v = sum_{t in C} g_tv / sum_{t in C} tau_t  for v not in A
    g    ~= g_A + tau q^T

This preserves the sum of every row and, within a set, of every column. The formula is ours; Cut Cross Entropy (Wijmans
et al. 2024, arXiv 2411.09009, section 4.3) drops the tail.
"""

import torch
from torch import Tensor

from cpo_kernels.reference.tokens import _z, anchored


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
    """live [sets, vocab_size] bool, tail_columns [sets, vocab_size], row_sums [N], of s_tv = softmax_tv * dz/du.

    logits [N, V], labels [N], lse [N] of the whole vocabulary; set k holds rows [k * set_rows, (k + 1) * set_rows).
    tail_columns are the sums of s_tv over a set, 0 where live; row_sums are those over the vocabulary. A label outside
    [0, vocab_size) belongs to another shard of the vocabulary. Ignored rows do not count, nor do rows whose lse is not
    finite; the row_sums of the latter are NaN. anchors [2, N]: see `token_logps_fwd`.
    """
    logits = anchored(logits, labels, anchors, ignore_index)
    softmax, slopes, counted = _softmax(logits, labels, lse, ignore_index, scale, softcap, vocab_size)
    sizes, here = softmax * slopes, (labels >= 0) & (labels < vocab_size) & counted  # [N, vocab_size], [N]
    starts = range(0, logits.shape[0], set_rows)
    live = logits.new_zeros((len(starts), vocab_size), dtype=torch.bool)
    tail_columns = sizes.new_zeros(live.shape)
    for k, low in enumerate(starts):
        rows = slice(low, low + set_rows)
        live[k] = sizes[rows].amax(0) >= eps * scale
        live[k, labels[rows][here[rows]]] = True
        tail_columns[k] = torch.where(live[k], 0.0, sizes[rows].sum(0))
    row_sums = sizes.sum(1).masked_fill(~counted & (labels != ignore_index), torch.nan)
    return live, tail_columns, row_sums


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
    """[g_A, tau] of every set, [n_k, a_k + 1] each in row order, concatenated, in the dtype of logits.

    columns [sum_k a_k] holds the live columns of set k in [offsets_k, offsets_k+1), offsets [sets + 1] on the host; the
    rest as in `live_columns`. tau_t = sum_{v in A} s_tv - row_sums_t.
    """
    u = anchored(logits, labels, anchors, ignore_index)
    softmax, slopes, counted = _softmax(u, labels, lse, ignore_index, scale, softcap, vocab_size)
    sizes = softmax * slopes
    onehot = torch.zeros_like(softmax)
    row = ((labels >= 0) & (labels < vocab_size) & counted).nonzero().squeeze(1)
    onehot[row, labels[row]] = 1.0
    g = (onehot - softmax) * slopes
    parts = []
    for k, low in enumerate(range(0, logits.shape[0], set_rows)):
        rows, set_columns = slice(low, low + set_rows), columns[offsets[k] : offsets[k + 1]]
        tau = (sizes[rows][:, set_columns].sum(1) - row_sums[rows]).clamp(max=0)
        parts.append(torch.cat([g[rows][:, set_columns], tau[:, None]], 1).to(logits.dtype).flatten())
    return torch.cat(parts) if parts else logits.new_empty(0)


def live_sum(tail: Tensor, tails: Tensor, made: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """Rows of dW [v, H]: sum_k tail_kv tails_k + sum_k made_k of the sets k that have column v, rounded once.

    tail [sets, v]: q of the sets; tails [sets, H]: sum_t c_t tau_t x_t; made [sum_k a_k, H]: g_A^T (c X) of one set
    after the other; columns [sum_k a_k] in [0, v) and offsets [sets + 1] on the host as in `live_grads`.
    """
    total = tail.to(tails.dtype).t() @ tails
    for low, high in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        total[columns[low:high]] += made[low:high].to(tails.dtype)
    return total.to(made.dtype)


def _softmax(
    logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, scale: float, softcap: float, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax and dz/du [N, vocab_size], and the rows that count [N]; softmax is 0 in the others."""
    z = _z(logits.detach(), scale, softcap, vocab_size)
    counted = (labels != ignore_index) & torch.isfinite(lse)
    softmax = torch.exp(z - lse[:, None]).masked_fill(~counted[:, None], 0.0)
    slopes = scale * (1 - (z / softcap) ** 2) if softcap else torch.full_like(z, scale)
    return softmax, slopes, counted
