"""Token log-probs, and the three kernels over logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """logp_t = z_{t,y_t} - logsumexp_v z_{t,v} with z = softcap * tanh(scale * logits / softcap).

    logits `[..., V]`, labels `[...]` -> `[...]` in float32 (float64 for float64 logits). A label
    `ignore_index` gives exactly 0 and no gradient. Columns from `vocab_size` on do not count (padded
    vocabulary). Raises ValueError for a label outside [0, vocab_size).
    """
    rows, row_labels, keep = _labelled_rows(logits, labels, ignore_index, vocab_size)
    z = _z(rows, scale, softcap or 0.0, vocab_size)  # [M, V]
    logps = torch.log_softmax(z, -1).gather(-1, row_labels[:, None]).squeeze(-1)
    return z.new_zeros(keep.shape).masked_scatter(keep, logps).view(labels.shape)


def token_extras(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """`[4, ...]`: entropy, log sum_v p_v^2, mean of z over the vocabulary, 1.0 where the label has the top z.

    Not differentiable; 0 at ignored positions. Arguments as for `token_logps`.
    """
    rows, row_labels, keep = _labelled_rows(logits.detach(), labels, ignore_index, vocab_size)
    z = _z(rows, scale, softcap or 0.0, vocab_size)
    logp = torch.log_softmax(z, -1)  # [M, V]
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    log_sum_sq = torch.logsumexp(2 * logp, -1)
    is_top1 = (z.gather(-1, row_labels[:, None]).squeeze(-1) == z.amax(-1)).to(z.dtype)
    extras = torch.stack([entropy, log_sum_sq, z.mean(-1), is_top1])  # [4, M]
    out = z.new_zeros(4, keep.shape[0]).masked_scatter(keep.expand(4, -1), extras)
    return out.view(4, *labels.shape)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """`token_logps` of logits = hidden @ weight.T + bias, in float32 (float64 for float64 hidden).

    hidden `[..., H]`, weight `[V, H]`, bias `[V]`, labels `[...]` -> `[...]`.
    """
    acc = _acc(hidden.dtype)
    logits = F.linear(hidden.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    return token_logps(logits, labels, ignore_index, softcap, scale, vocab_size)


def token_logps_fwd(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    extras: bool,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits `[N, V]`, labels `[N]` -> logp `[N]`, lse `[N]`, extras `[4, N]` or `[0]`; 0 at ignored rows.

    anchors `[2, N]`: a constant was subtracted from row t of the logits, u_tv = logits_tv + anchors_0t, and the logit
    of its label is u_{t,y_t} = anchors_1t, which need not be rounded to their dtype. is_top1 compares stored logits.
    """
    options = (ignore_index, softcap, scale, vocab_size)
    u = anchored(logits, labels, anchors, ignore_index)
    logp = token_logps(u, labels, *options)
    lse = torch.logsumexp(_z(u, scale, softcap, vocab_size), -1)
    lse = torch.where(labels == ignore_index, 0.0, lse)
    if not extras:
        return logp, lse, logp.new_empty(0)
    extra = token_extras(u, labels, *options)
    extra[3] = token_extras(logits.detach(), labels, *options)[3]
    return logp, lse, extra


def anchored(logits: Tensor, labels: Tensor, anchors: Tensor | None, ignore_index: int) -> Tensor:
    """u `[N, V]` from logits and anchors, see `token_logps_fwd`. A label outside the columns has no effect on u."""
    u = logits.detach()
    if anchors is None:
        return u
    u = u.to(_acc(logits.dtype)) + anchors[0, :, None]
    row = ((labels != ignore_index) & (labels >= 0) & (labels < logits.shape[1])).nonzero().squeeze(1)
    u[row, labels[row]] = anchors[1, row]
    return u


def token_logps_bwd_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    anchors: Tensor | None = None,
    entropies: Tensor | None = None,
) -> None:
    """Overwrites logits `[N, V]` with the gradient of sum_t grad_t logp_t + sum_t entropies_0t H_t, rounded once.

        [grad_t (onehot - p) - entropies_0t p (log p + H_t)] * scale * (1 - tanh^2),   p = exp(z - lse)

    entropies `[2, N]`: incoming gradients of the entropies, and the entropies H_t. Ignored rows and columns from
    `vocab_size` on become 0. p has the error of lse, |lse| eps relatively. anchors: see `token_logps_fwd`.
    """
    u = anchored(logits, labels, anchors, ignore_index)
    logp = _z(u, scale, softcap, vocab_size) - lse[:, None]
    softmax = torch.exp(logp)
    dz = -softmax * grad[:, None]
    if entropies is not None:
        terms = torch.where(softmax > 0, softmax * (logp + entropies[1, :, None]), 0.0)
        dz -= torch.where(entropies[0] != 0, entropies[0], 0.0)[:, None] * terms
    _write_grad_(logits, u, labels, dz, grad, ignore_index, scale, softcap)


def _write_grad_(
    logits: Tensor,
    u: Tensor,
    labels: Tensor,
    dz: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    """Add grad_t at the labels to dz `[N, vocab_size]`, multiply by dz/du, and write the result to logits."""
    vocab_size = dz.shape[1]
    ignored = labels == ignore_index
    dz.scatter_add_(1, labels.masked_fill(ignored, 0)[:, None], grad[:, None].to(dz.dtype))
    dz *= scale
    if softcap:
        dz *= 1 - (_z(u, scale, softcap, vocab_size) / softcap) ** 2
    dz.masked_fill_(ignored[:, None], 0.0)
    with torch.no_grad():
        logits[:, vocab_size:] = 0
        logits[:, :vocab_size] = dz.to(logits.dtype)


def token_logps_fused_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    extras: bool,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_logps_fwd`, and logits overwritten with (onehot - softmax) * scale * (1 - tanh^2)."""
    logp, lse, extra = token_logps_fwd(logits, labels, ignore_index, scale, softcap, vocab_size, extras, anchors)
    u = anchored(logits, labels, anchors, ignore_index)
    dz = -torch.softmax(_z(u, scale, softcap, vocab_size), -1)
    _write_grad_(logits, u, labels, dz, torch.ones_like(lse), ignore_index, scale, softcap)
    return logp, lse, extra


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _z(logits: Tensor, scale: float, softcap: float, vocab_size: int | None) -> Tensor:
    z = logits[..., :vocab_size].to(_acc(logits.dtype)) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def _labelled_rows(
    logits: Tensor, labels: Tensor, ignore_index: int, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The M labelled rows of logits `[M, V]`, their labels `[M]`, and which rows those are `[N]`.

    Ignored rows take no part in any arithmetic, so that no value of theirs, not even NaN, leaks into a gradient.
    """
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    keep = labels != ignore_index
    wrong = (keep & ((labels < 0) | (labels >= vocab_size))).nonzero()
    if len(wrong):
        position = tuple(wrong[0].tolist())
        where = position[0] if len(position) == 1 else position
        raise ValueError(
            f"label {labels[position].item()} at position {where} is outside [0, {vocab_size}) and "
            f"is not ignore_index ({ignore_index})"
        )
    keep = keep.reshape(-1)
    return logits.reshape(-1, logits.shape[-1])[keep], labels.reshape(-1)[keep], keep
