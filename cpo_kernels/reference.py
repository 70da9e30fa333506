"""The oracle: every op and every loss in plain PyTorch, any floating dtype, differentiable by autograd.

Read top-down: 1 token log-probs, 2 sequence log-probs and token weights, 3 the loss types (`LOSS_TYPES`:
formula, source and the options each honours), 4 the preference op, 5 KTO. It is the only place allowed to be
slow.

The functions named as in `ops.py` (`token_logps_fwd`, `token_logps_bwd_`, `token_logps_fused_`,
`sequence_sum`, `preference`) have the kernels' signatures: tensors that are absent have 0 elements, results
are not differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import objectives as _objectives

# ---------------------------------------------------------------- 1. token log-probs


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
) -> tuple[Tensor, Tensor, Tensor]:
    """logits `[N, V]`, labels `[N]` -> logp `[N]`, lse `[N]`, extras `[4, N]` or `[0]`; 0 at ignored rows."""
    options = (ignore_index, softcap, scale, vocab_size)
    logits = logits.detach()
    logp = token_logps(logits, labels, *options)
    lse = torch.logsumexp(_z(logits, scale, softcap, vocab_size), -1)
    lse = torch.where(labels == ignore_index, 0.0, lse)
    return logp, lse, token_extras(logits, labels, *options) if extras else logp.new_empty(0)


def token_logps_bwd_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
) -> None:
    """Overwrites logits `[N, V]` with grad_t * (onehot - softmax) * scale * (1 - tanh^2), rounded once.

    Rows that are ignored and columns from `vocab_size` on become 0. softmax = exp(z - lse) is as exact as lse is:
    to |lse| eps, relatively.
    """
    softmax = torch.exp(_z(logits.detach(), scale, softcap, vocab_size) - lse[:, None])
    _write_grad_(logits, labels, softmax, grad, ignore_index, scale, softcap)


def _write_grad_(
    logits: Tensor,
    labels: Tensor,
    softmax: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    vocab_size = softmax.shape[1]
    ignored = labels == ignore_index
    dz = -softmax
    dz.scatter_add_(1, labels.masked_fill(ignored, 0)[:, None], torch.ones_like(dz[:, :1]))
    dz *= grad[:, None] * scale
    if softcap:
        dz *= 1 - (_z(logits.detach(), scale, softcap, vocab_size) / softcap) ** 2
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_logps_fwd`, and logits overwritten with (onehot - softmax) * scale * (1 - tanh^2)."""
    logp, lse, extra = token_logps_fwd(logits, labels, ignore_index, scale, softcap, vocab_size, extras)
    softmax = torch.softmax(_z(logits.detach(), scale, softcap, vocab_size), -1)
    _write_grad_(logits, labels, softmax, torch.ones_like(lse), ignore_index, scale, softcap)
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

    Ignored rows take no part in any arithmetic, so whatever they hold (NaN too) cannot leak into a gradient.
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


# ---------------------------------------------------------------- 2. sequences


def sequence_logps(
    token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None = None, average: bool = False
) -> Tensor:
    """L_s = sum_{t in s} m_t logp_t, summed in float64, in the dtype of `token_logps`; differentiable.

    token_logps `[N]`, cu_seqlens `[S + 1]` (sequence s is `[cu[s], cu[s + 1])`), token_weights m `[N]` ->
    `[S]`. `average` divides by the number of tokens; a sequence without tokens gives 0.
    """
    weighted = token_logps.double() if token_weights is None else token_logps.double() * token_weights.double()
    lengths = cu_seqlens.diff().to(weighted.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=weighted.device), lengths)  # [N]
    total = weighted.new_zeros(len(lengths)).index_add(0, sequence, weighted)
    if average:
        total = total / lengths.clamp(min=1)
    return total.to(token_logps.dtype)


def sequence_sum(token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor, average: bool) -> Tensor:
    """Kernel-shaped `sequence_logps`."""
    weights = token_weights if token_weights.numel() else None
    return sequence_logps(token_logps.detach(), cu_seqlens, weights, average)


def ld_token_weights(cu_seqlens: Tensor, pairs: Tensor, ld_alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """LD-DPO's token weights `[N]`: 1 up to the length of the pair's shorter response, `ld_alpha` after it.

    Liu et al. 2024 (arXiv 2409.06411), as TRL's `ld_alpha`. The weights belong to a pair; a response that
    stands in pairs with different shared lengths would need several, which raises. A response
    in no pair keeps weight 1.
    """
    lengths = cu_seqlens.diff()
    shared = lengths.clone()
    shortest = lengths[pairs].amin(1, keepdim=True).expand(-1, 2)  # [P, 2]
    shared[pairs] = shortest
    if bool((shared[pairs] != shortest).any()):
        pair = int((shared[pairs] != shortest).any(1).nonzero()[0])
        raise ValueError(
            f"ld_alpha: pair {pair} {pairs[pair].tolist()} shares a response with a pair of another shared "
            "length; ld_alpha needs every response to have one shared length"
        )
    position = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    position = position - torch.repeat_interleave(cu_seqlens[:-1], lengths)
    one = torch.ones((), dtype=dtype, device=cu_seqlens.device)
    return torch.where(position < torch.repeat_interleave(shared, lengths), one, ld_alpha)


def wpo_pair_weights(token_logps: Tensor, log_sum_sq: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """WPO's weight of each pair, float64 `[P]`, without gradient:

        w(y) = exp( mean_t (logp_t - log sum_v p_{t,v}^2) ),   pair weight = w(a) * w(b)

    Zhou et al. 2024 (arXiv 2406.11827) eq. 2 with sampled alignment, as TRL's `use_weighting`.
    """
    aligned = token_logps.detach().double() - log_sum_sq.detach().double()
    return sequence_logps(aligned, cu_seqlens, average=True).exp()[pairs].prod(1)


# ---------------------------------------------------------------- 3. loss types

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# Order in which `preference` takes its options, with the values that loss.py offers by default.
OPTION_DEFAULTS: dict[str, float] = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "tau": 0.0,  # soft target q = sigmoid(|gap| / tau); 0 = hard
    "margin": 0.0,  # gamma of gamma * |gap|
    "tie_margin": 1e-6,
    "f_divergence": 0,  # index into F_DIVERGENCES
    "f_alpha": 0.5,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "alphapo_alpha": 0.25,
    "nll_alpha": 1.0,
    "modpo_weight": 1.0,
}
OPTIONS = tuple(OPTION_DEFAULTS)

# exp(80) is finite in float32: exponents of forward_kl, alpha_divergence and alphapo stop here, gradient 0
# beyond.
MAX_EXPONENT = 80.0
# orpo's mean log-prob is kept below 0, where the odds are finite (a response without tokens has mean 0).
MAX_ORPO_LOGP = -1e-12


@dataclass
class Pairs:
    """n non-tied pairs, chosen and rejected already told apart. Every tensor is `[n]`."""

    chosen: Tensor  # L_w
    rejected: Tensor  # L_l
    chosen_ref: Tensor
    rejected_ref: Tensor
    beta: Tensor
    gap: Tensor  # |Delta R|; inf where there are no scores
    options: Mapping[str, float]
    chosen_length: Tensor | None = None  # tokens, at least 1
    rejected_length: Tensor | None = None
    chosen_margin: Tensor | float = 0.0  # MODPO's w_{-k} . m(y)
    rejected_margin: Tensor | float = 0.0
    nll_scale: Tensor | float | None = None  # number of pairs / number of chosen tokens

    def set_lengths(self, chosen: Tensor, rejected: Tensor, num_pairs: float) -> None:
        self.chosen_length, self.rejected_length = chosen.clamp(min=1), rejected.clamp(min=1)
        self.nll_scale = num_pairs / float(chosen.sum().clamp(min=1))

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.chosen_ref

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.rejected_ref

    @property
    def chosen_score(self) -> Tensor:
        return f_score(self.chosen_ratio, self.options["f_divergence"], self.options["f_alpha"])

    @property
    def rejected_score(self) -> Tensor:
        return f_score(self.rejected_ratio, self.options["f_divergence"], self.options["f_alpha"])

    @property
    def delta(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        if self.chosen_length is None or self.rejected_length is None:
            raise ValueError("this loss type divides by the number of tokens: give the lengths of the sequences")
        return chosen / self.chosen_length, rejected / self.rejected_length

    def nll(self) -> Tensor:
        if self.nll_scale is None:
            raise ValueError("the NLL term divides by the number of chosen tokens: give the lengths of the sequences")
        return -self.chosen * self.nll_scale

    def soft_logistic(self, u: Tensor) -> Tensor:
        """-q log sigmoid(v) - (1 - q) log sigmoid(-v) with v = u - margin |gap|.

        q = sigmoid(|gap| / tau), or 1 - label_smoothing without tau. The margin is ODPO's offset (Amini
        et al. 2024, arXiv 2402.10571); label smoothing is conservative DPO's (Mitchell 2023).
        """
        v = u - self.offset()
        tau = self.options["tau"]
        q = torch.sigmoid(self.gap / tau) if tau else 1 - self.options["label_smoothing"]
        return -q * F.logsigmoid(v) - (1 - q) * F.logsigmoid(-v)

    def offset(self) -> Tensor | float:
        margin = self.options["margin"]
        return margin * self.gap if margin else 0.0


def f_score(ratio: Tensor, f_divergence: float, alpha: float) -> Tensor:
    """f'(e^ratio) up to constants that cancel in a pair, ratio = log pi - log pi_ref.

    reverse_kl: ratio;  forward_kl: 1 - e^-ratio;  js_divergence: log 2 + log sigmoid(ratio);
    alpha_divergence: (e^((alpha - 1) ratio) - 1) / (alpha - 1), which is `ratio` at alpha = 1.
    f-DPO, Wang et al. 2023 (arXiv 2309.16240).
    """
    name = F_DIVERGENCES[int(f_divergence)]
    if name == "forward_kl":
        return -torch.expm1((-ratio).clamp(max=MAX_EXPONENT))
    if name == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if name == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * ratio).clamp(max=MAX_EXPONENT)) / (alpha - 1)
    return ratio


def _sigmoid(p: Pairs) -> Tensor:
    """-log sigmoid(beta delta), delta = s(r_w) - s(r_l), r = L - ref, s = `f_score`.

    DPO, Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; under conditions the CDPO loss of Guo et al. 2024.
    Soft targets and margin: `Pairs.soft_logistic`.
    """
    return p.soft_logistic(p.beta * p.delta)


def _hinge(p: Pairs) -> Tensor:
    """relu(1 - (beta delta - margin |gap|)).

    SLiC-HF's loss, Zhao et al. 2023 (arXiv 2305.10425), on DPO's rewards.
    """
    return torch.relu(1 - (p.beta * p.delta - p.offset()))


def _ipo(p: Pairs) -> Tensor:
    """(s_w / n_w - s_l / n_l - 1 / (2 beta))^2.

    IPO, Azar et al. 2023 (arXiv 2310.12036) eq. 17, with scores per token as in TRL.
    """
    chosen, rejected = p.per_token(p.chosen_score, p.rejected_score)
    return (chosen - rejected - 1 / (2 * p.beta)) ** 2


def _exo_pair(p: Pairs) -> Tensor:
    """KL(q || p): sum over {w, l} of q (log q - log p), q = sigmoid(+-beta delta), p = (1 - eps, eps).

    EXO, Ji et al. 2024 (arXiv 2402.00856) eq. 16; eps = label_smoothing > 0.
    """
    eps, u = p.options["label_smoothing"], p.beta * p.delta
    return torch.sigmoid(u) * (F.logsigmoid(u) - math.log1p(-eps)) + torch.sigmoid(-u) * (
        F.logsigmoid(-u) - math.log(eps)
    )


def _nca_pair(p: Pairs) -> Tensor:
    """-log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2.

    NCA, Chen et al. 2024 (arXiv 2402.05369).
    """
    chosen, rejected = p.beta * p.chosen_ratio, p.beta * p.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _robust(p: Pairs) -> Tensor:
    """(-(1 - e) log sigmoid(beta delta) + e log sigmoid(-beta delta)) / (1 - 2 e), e = label_smoothing < 1/2.

    Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    eps, u = p.options["label_smoothing"], p.beta * p.delta
    return (-(1 - eps) * F.logsigmoid(u) + eps * F.logsigmoid(-u)) / (1 - 2 * eps)


def _bco_pair(p: Pairs) -> Tensor:
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l).

    BCO, Jung et al. 2024 (arXiv 2404.04656), without its reward shift.
    """
    return -F.logsigmoid(p.beta * p.chosen_ratio) - F.logsigmoid(-p.beta * p.rejected_ratio)


def _sppo_hard(p: Pairs) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

    SPPO, Wu et al. 2024 (arXiv 2405.00675) eq. 4.7, hard labels.
    """
    return (p.chosen_ratio - 0.5 / p.beta) ** 2 + (p.rejected_ratio + 0.5 / p.beta) ** 2


def _smoothed(u: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(u) - eps * F.logsigmoid(-u)


def _aot(p: Pairs) -> Tensor:
    """-log sigmoid(beta d_k), d = sort(L_w - L_l) - sort(ref_w - ref_l) over the batch.

    Smoothed by label_smoothing. AOT, Melnyk et al. 2024 (arXiv 2406.05882), paired. The k-th loss stands
    at the pair that holds the k-th smallest policy ratio; equal ratios keep their order.
    """
    policy, order = (p.chosen - p.rejected).sort(stable=True)
    ref = (p.chosen_ref - p.rejected_ref).sort(stable=True).values
    losses = _smoothed(p.beta * (policy - ref), p.options["label_smoothing"])
    return losses.new_empty(losses.shape).scatter(0, order, losses)


def _aot_unpaired(p: Pairs) -> Tensor:
    """-log sigmoid(beta d_k), d = sort(r_w) - sort(r_l) over the batch.

    Smoothed by label_smoothing. AOT, Melnyk et al. 2024 (arXiv 2406.05882), unpaired. The k-th loss
    stands at the pair that holds the k-th smallest chosen ratio; equal ratios keep their order.
    """
    chosen, order = p.chosen_ratio.sort(stable=True)
    rejected = p.rejected_ratio.sort(stable=True).values
    losses = _smoothed(p.beta * (chosen - rejected), p.options["label_smoothing"])
    return losses.new_empty(losses.shape).scatter(0, order, losses)


def _apo_zero(p: Pairs) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l).

    APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266) eq. 7.
    """
    return torch.sigmoid(-p.beta * p.chosen_ratio) + torch.sigmoid(p.beta * p.rejected_ratio)


def _apo_down(p: Pairs) -> Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)).

    APO-down, D'Oosterlinck et al. 2024 (arXiv 2408.06266) eq. 8.
    """
    return torch.sigmoid(p.beta * p.chosen_ratio) + torch.sigmoid(-p.beta * (p.chosen_ratio - p.rejected_ratio))


def _discopop(p: Pairs) -> Tensor:
    """-(1 - m) log sigmoid(u) + m e^-u, u = beta delta, m = sigmoid(u / discopop_tau).

    DiscoPOP, Lu et al. 2024 (arXiv 2406.08414) eq. 5; m e^-u is formed as one exponential, which stays
    finite.
    """
    u = p.beta * p.delta
    v = u / p.options["discopop_tau"]
    return -torch.sigmoid(-v) * F.logsigmoid(u) + torch.exp(F.logsigmoid(v) - u)


def _sft(p: Pairs) -> Tensor:
    """-L_w (number of pairs) / (number of chosen tokens): the mean over pairs is the NLL per chosen token."""
    return p.nll()


def _sigmoid_norm(p: Pairs) -> Tensor:
    """-log sigmoid(beta (s_w / n_w - s_l / n_l)).

    Length-normalised DPO, Lambert et al. 2024 (Tulu 3, arXiv 2411.15124).
    """
    chosen, rejected = p.per_token(p.chosen_score, p.rejected_score)
    return p.soft_logistic(p.beta * (chosen - rejected))


def _simpo(p: Pairs) -> Tensor:
    """-log sigmoid(beta (L_w / n_w - L_l / n_l) - simpo_gamma).

    SimPO, Meng et al. 2024 (arXiv 2405.14734) eq. 6.
    """
    chosen, rejected = p.per_token(p.chosen, p.rejected)
    return p.soft_logistic(p.beta * (chosen - rejected) - p.options["simpo_gamma"])


def _orpo(p: Pairs) -> Tensor:
    """-beta log sigmoid(o_w - o_l) + nll_alpha NLL(y_w), log odds o = a - log(1 - e^a), a = L / n.

    ORPO, Hong et al. 2024 (arXiv 2403.07691) eqs. 4-7. The NLL is of the response alone (TRL adds the
    prompt's).
    """
    chosen, rejected = (a.clamp(max=MAX_ORPO_LOGP) for a in p.per_token(p.chosen, p.rejected))
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -p.beta * F.logsigmoid(log_odds) + _weighted_nll(p)


def _log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a) for a < 0 (Maechler 2012: the branch changes at -log 2)."""
    near = a > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(torch.where(near, -1.0, a))))


def _weighted_nll(p: Pairs) -> Tensor | float:
    return p.options["nll_alpha"] * p.nll() if p.options["nll_alpha"] else 0.0


def _contrastive_cpo(p: Pairs) -> Tensor:
    """-log sigmoid(beta (L_w - L_l)) + nll_alpha NLL(y_w).

    *Contrastive* Preference Optimization, Xu et al. 2024 (arXiv 2401.08417).
    """
    return p.soft_logistic(p.beta * (p.chosen - p.rejected)) + _weighted_nll(p)


def _alphapo(p: Pairs) -> Tensor:
    """-log sigmoid(beta (r_w - r_l) - simpo_gamma), r = (1 - e^(-a L / n)) / a.

    a = alphapo_alpha; at 0, r = L / n. AlphaPO, Gupta et al. 2025 (arXiv 2501.03884).
    """
    alpha = p.options["alphapo_alpha"]
    chosen, rejected = p.per_token(p.chosen, p.rejected)
    if alpha:
        chosen, rejected = (
            -torch.expm1((-alpha * mean).clamp(max=MAX_EXPONENT)) / alpha for mean in (chosen, rejected)
        )
    return p.soft_logistic(p.beta * (chosen - rejected) - p.options["simpo_gamma"])


def _modpo(p: Pairs) -> Tensor:
    """-log sigmoid((beta (r_w - r_l) - (m_w - m_l)) / modpo_weight).

    m(y) = the weighted rewards of the other objectives. MODPO, Zhou et al. 2023 (arXiv 2310.03708).
    """
    margin = p.chosen_margin - p.rejected_margin
    return -F.logsigmoid((p.beta * (p.chosen_ratio - p.rejected_ratio) - margin) / p.options["modpo_weight"])


@dataclass(frozen=True)
class LossType:
    """What a loss type computes, what it needs, and the options it honours."""

    losses: Callable[[Pairs], Tensor] = field(repr=False)
    honours: frozenset[str]
    needs_reference: bool = True
    needs_lengths: bool = False
    averaged: bool = False  # reference-free reward is beta * L / n instead of beta * L
    couples_batch: bool = False  # sorts over the batch: the loss of one pair depends on all

    @property
    def formula(self) -> str:
        """Formula and source."""
        return self.losses.__doc__ or ""


_REWEIGHTED = frozenset({"pair_weights", "use_weighting"})
_PAIRWISE = _REWEIGHTED | {"pair_betas", "ld_alpha"}
_SOFT = frozenset({"label_smoothing", "tau", "margin"})
_FREE = {"needs_reference": False, "needs_lengths": True}

# The index of a name in this table is its number in the kernels.
LOSS_TYPES: dict[str, LossType] = {
    "sigmoid": LossType(_sigmoid, _PAIRWISE | _SOFT | {"f_divergence"}),
    "hinge": LossType(_hinge, _PAIRWISE | {"margin", "f_divergence"}),
    "ipo": LossType(_ipo, _PAIRWISE | {"f_divergence"}, needs_lengths=True),
    "exo_pair": LossType(_exo_pair, _PAIRWISE | {"label_smoothing", "f_divergence"}),
    "nca_pair": LossType(_nca_pair, _PAIRWISE),
    "robust": LossType(_robust, _PAIRWISE | {"label_smoothing", "f_divergence"}),
    "bco_pair": LossType(_bco_pair, _PAIRWISE),
    "sppo_hard": LossType(_sppo_hard, _PAIRWISE),
    "aot": LossType(_aot, frozenset({"label_smoothing", "ld_alpha"}), couples_batch=True),
    "aot_unpaired": LossType(_aot_unpaired, frozenset({"label_smoothing", "ld_alpha"}), couples_batch=True),
    "apo_zero": LossType(_apo_zero, _PAIRWISE),
    "apo_down": LossType(_apo_down, _PAIRWISE),
    "discopop": LossType(_discopop, _PAIRWISE | {"f_divergence", "discopop_tau"}),
    "sft": LossType(_sft, frozenset({"pair_weights"}), **_FREE),
    "sigmoid_norm": LossType(_sigmoid_norm, _PAIRWISE | _SOFT | {"f_divergence"}, needs_lengths=True),
    "simpo": LossType(_simpo, _REWEIGHTED | _SOFT | {"pair_betas", "simpo_gamma"}, averaged=True, **_FREE),
    "orpo": LossType(_orpo, _REWEIGHTED | {"pair_betas", "nll_alpha"}, averaged=True, **_FREE),
    "contrastive_cpo": LossType(_contrastive_cpo, _REWEIGHTED | _SOFT | {"pair_betas", "nll_alpha"}, **_FREE),
    "alphapo": LossType(
        _alphapo, _REWEIGHTED | _SOFT | {"pair_betas", "simpo_gamma", "alphapo_alpha"}, averaged=True, **_FREE
    ),
    "modpo": LossType(_modpo, _PAIRWISE | {"modpo_weight", "margins"}),
}

# Options that shape the preference term: every type of a list must honour them, `sft` (which has none)
# excepted.
_TERM_OPTIONS = frozenset({"tau", "margin", "f_divergence", "pair_betas"})
# Options that change the log-probs or the weight of a pair: every type of a list must honour them.
_PAIR_OPTIONS = frozenset({"pair_weights", "use_weighting", "ld_alpha"})


def check_options(loss_types: Sequence[str], given: Iterable[str], label_smoothing: float = 0.0) -> None:
    """Raises ValueError for an option that `loss_types` would ignore, or that they need and did not get.

    given: names of the options that the caller sets to other than "off". An option of one type alone
    (simpo_gamma, nll_alpha, ...) and label_smoothing must be honoured by at least one type of the list, an
    option that concerns every pair by all of them.
    """
    given = set(given)
    for name in loss_types:
        if name not in LOSS_TYPES:
            raise ValueError(f"unknown loss_type {name!r}; one of {', '.join(LOSS_TYPES)}")
    if not loss_types:
        raise ValueError("loss_type is an empty list")
    known = frozenset().union(*(loss.honours for loss in LOSS_TYPES.values()))
    for option in sorted(given):
        if option not in known:
            raise ValueError(f"unknown option {option!r}; one of {', '.join(sorted(known))}")
        deaf = [name for name in loss_types if option not in LOSS_TYPES[name].honours]
        if option in _TERM_OPTIONS and set(deaf) != set(loss_types):
            deaf = [name for name in deaf if name != "sft"]
        if deaf and (option in _TERM_OPTIONS | _PAIR_OPTIONS or len(deaf) == len(loss_types)):
            able = [name for name, loss in LOSS_TYPES.items() if option in loss.honours]
            raise ValueError(
                f"{option} has no meaning for loss_type {', '.join(map(repr, deaf))}; it works with {', '.join(able)}"
            )
    if {"tau", "label_smoothing"} <= given:
        raise ValueError("tau and label_smoothing both set the soft target: give one of them")
    if not 0 <= label_smoothing < 1 or ("robust" in loss_types and label_smoothing >= 0.5):
        raise ValueError(f"label_smoothing must be in [0, 1), below 0.5 for 'robust'; got {label_smoothing}")
    if "exo_pair" in loss_types and not label_smoothing > 0:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (its paper uses 1e-3), got 0")


def pair_loss(
    loss_type: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float | Tensor = 0.1,
    gap: Tensor | None = None,
    chosen_margins: Tensor | float = 0.0,
    rejected_margins: Tensor | float = 0.0,
    **options: float,
) -> Tensor:
    """The losses `[n]` of n pairs whose chosen side is known, differentiable, in the dtype of the log-probs.

    options are those of `OPTIONS` (f_divergence as its index). See `LOSS_TYPES[loss_type].formula`.
    """
    zero = torch.zeros_like(chosen_logps)
    pairs = Pairs(
        chosen=chosen_logps,
        rejected=rejected_logps,
        chosen_ref=zero if ref_chosen_logps is None else ref_chosen_logps,
        rejected_ref=zero if ref_rejected_logps is None else ref_rejected_logps,
        beta=zero + beta,
        gap=zero + math.inf if gap is None else gap,
        options={**OPTION_DEFAULTS, **options},
        chosen_margin=chosen_margins,
        rejected_margin=rejected_margins,
    )
    if chosen_lengths is not None and rejected_lengths is not None:
        pairs.set_lengths(chosen_lengths, rejected_lengths, len(chosen_logps))
    return LOSS_TYPES[loss_type].losses(pairs)


# ---------------------------------------------------------------- 4. preference


def preference(
    seq_logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    scores: Tensor,
    conditions: Tensor,
    objectives: Tensor,
    pair_weights: Tensor,
    pair_betas: Tensor,
    margins: Tensor,
    loss_types: Sequence[int],
    loss_weights: Sequence[float],
    options: Sequence[float],
    num_pairs: float,
    chosen_tokens: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chosen or rejected by Delta R, the loss of every pair, and its gradient: all in float64.

        loss = sum_p w_p sum_j loss_weights[j] l_j(p) / num_pairs   over the pairs that are no tie

    seq_logps L `[S]`, ref_logps `[S]`, lengths `[S]`, pairs `[P, 2]`, scores `[S, K]`, conditions `[P, K]`,
    objectives `[2, K]` (weights, strengths), pair_weights and pair_betas `[P]`, margins `[S]`; only seq_logps
    and pairs must have elements. loss_types are indices into LOSS_TYPES, options the values of OPTIONS.
    A pair is a tie unless |Delta R| > tie_margin; without scores the first of each pair is chosen. num_pairs
    < 0: the number of non-ties here. chosen_tokens < 0: the tokens of the chosen responses here.

    Returns loss `[]`, losses `[P]`, grad `[S]` = d loss / d seq_logps, chosen_rewards and rejected_rewards
    `[P]`, value_gap `[P]` (NaN: unrated, inf: no scores), order `[P]` int8 (+1 first chosen, -1 second, 0 a
    tie), counts `[3]` int64 (non-ties, ties with the unrated, unrated). Rewards are beta (L - ref), or beta L
    (beta L / n if a type is `averaged`) where no type needs a reference; a tie reports its first response as
    chosen.
    """
    types = [list(LOSS_TYPES.values())[index] for index in loss_types]
    option = dict(zip(OPTIONS, options, strict=True))
    gap = _value_gap(scores, conditions, objectives, pairs)
    decided = gap.abs() > option["tie_margin"]
    order = torch.where(decided, gap.sign(), 0.0).to(torch.int8)
    live = decided.nonzero().squeeze(1)  # [n]
    winner, loser = torch.where((order < 0)[:, None], pairs.flip(1), pairs).unbind(1)  # [P], [P]
    beta = pair_betas.double() if pair_betas.numel() else torch.full_like(gap, option["beta"])
    divisor = (num_pairs if num_pairs >= 0 else len(live)) or 1.0  # no pairs: loss and gradient are 0

    def at(values: Tensor, index: Tensor, missing: float = 0.0) -> Tensor:
        return values.double()[index] if values.numel() else torch.full_like(gap[: len(index)], missing)

    with torch.inference_mode(False), torch.enable_grad():
        logps = seq_logps.detach().to(torch.float64, copy=True).requires_grad_()
        won, lost = winner[live], loser[live]
        batch = Pairs(
            chosen=logps[won],
            rejected=logps[lost],
            chosen_ref=at(ref_logps, won),
            rejected_ref=at(ref_logps, lost),
            beta=beta[live],
            gap=gap[live].abs(),
            options=option,
            chosen_margin=at(margins, won),
            rejected_margin=at(margins, lost),
        )
        if lengths.numel() or not len(live):
            batch.set_lengths(lengths[won], lengths[lost], divisor)
        if chosen_tokens >= 0:
            batch.nll_scale = divisor / max(chosen_tokens, 1.0)
        per_pair = torch.zeros_like(batch.gap)
        for kind, weight in zip(types, loss_weights, strict=True):
            per_pair = per_pair + weight * kind.losses(batch)
        per_pair = per_pair * at(pair_weights, live, missing=1.0)
        (grad,) = torch.autograd.grad(per_pair.sum() / divisor, logps)
    losses = torch.zeros_like(gap).index_put((live,), per_pair.detach())

    reward = seq_logps.detach().double()
    if any(kind.needs_reference for kind in types):
        reward = reward - (ref_logps.double() if ref_logps.numel() else 0.0)
    elif any(kind.averaged for kind in types):
        reward = reward / lengths.clamp(min=1)
    unrated = int(gap.isnan().sum())
    counts = torch.tensor([len(live), len(gap) - len(live), unrated], device=pairs.device)
    floats = (losses.sum() / divisor, losses, grad, beta * reward[winner], beta * reward[loser], gap)
    return (*(x.to(seq_logps.dtype) for x in floats), order, counts)  # type: ignore[return-value]


def _value_gap(scores: Tensor, conditions: Tensor, objectives: Tensor, pairs: Tensor) -> Tensor:
    """Delta R of the first minus the second of each pair: float64 `[P]`, +inf without scores."""
    if not scores.numel():
        return torch.full(pairs.shape[:1], math.inf, dtype=torch.float64, device=pairs.device)
    a, b = scores.double()[pairs].unbind(1)  # [P, K] each
    return _objectives.value_gap(a, b, conditions if conditions.numel() else None, objectives)


# ---------------------------------------------------------------- 5. KTO


def kto_loss(
    seq_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO's losses `[S]` of unpaired responses, r = L - ref:

        desirable_weight   (1 - sigmoid(beta (r - kl)))   where `desirable`
        undesirable_weight (1 - sigmoid(beta (kl - r)))   elsewhere

    Ethayarajh et al. 2024 (arXiv 2402.01306) eq. 7. seq_logps, ref_logps `[S]`, desirable bool `[S]`, kl from
    `kto_kl`.
    """
    u = beta * (seq_logps - ref_logps - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-u), undesirable_weight * torch.sigmoid(u))


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's reference point: max(0, mean(L - ref)) over mismatched prompts and responses, no gradient."""
    return (kl_logps - ref_kl_logps).detach().mean().clamp(min=0)
