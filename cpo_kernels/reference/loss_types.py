"""The loss types: the formula of each with its source, and the table of what each needs and honours."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_kernels.reference.terms import MAX_EXPONENT, Pairs

# orpo's mean log-prob is kept below 0, where the odds are finite (a response without tokens has mean 0).
MAX_ORPO_LOGP = -1e-12


def _sigmoid(p: Pairs) -> Tensor:
    """-log sigmoid(beta delta), delta = s(r_w) - s(r_l), r = L - ref, s = the score of the f-divergence.

    DPO, Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; under conditions the CDPO loss of Guo et al. 2024.
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
    belongs to the pair that holds the k-th smallest chosen ratio; equal ratios keep their order.
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

    ORPO, Hong et al. 2024 (arXiv 2403.07691) eqs. 4-7. The NLL is only of the response (TRL adds the
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
    opposite: bool = False  # under reverse KL dloss/dL_l = -dloss/dL_w, whatever the log-probs are

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
    "sigmoid": LossType(_sigmoid, _PAIRWISE | _SOFT | {"f_divergence"}, opposite=True),
    "hinge": LossType(_hinge, _PAIRWISE | {"margin", "f_divergence"}, opposite=True),
    "ipo": LossType(_ipo, _PAIRWISE | {"f_divergence"}, needs_lengths=True),
    "exo_pair": LossType(_exo_pair, _PAIRWISE | {"label_smoothing", "f_divergence"}, opposite=True),
    "nca_pair": LossType(_nca_pair, _PAIRWISE),
    "robust": LossType(_robust, _PAIRWISE | {"label_smoothing", "f_divergence"}, opposite=True),
    "bco_pair": LossType(_bco_pair, _PAIRWISE),
    "sppo_hard": LossType(_sppo_hard, _PAIRWISE),
    "aot": LossType(_aot, frozenset({"label_smoothing", "ld_alpha"}), couples_batch=True, opposite=True),
    "aot_unpaired": LossType(_aot_unpaired, frozenset({"label_smoothing", "ld_alpha"}), couples_batch=True),
    "apo_zero": LossType(_apo_zero, _PAIRWISE),
    "apo_down": LossType(_apo_down, _PAIRWISE),
    "discopop": LossType(_discopop, _PAIRWISE | {"f_divergence", "discopop_tau"}, opposite=True),
    "sft": LossType(_sft, frozenset({"pair_weights"}), **_FREE),
    "sigmoid_norm": LossType(_sigmoid_norm, _PAIRWISE | _SOFT | {"f_divergence"}, needs_lengths=True),
    "simpo": LossType(_simpo, _REWEIGHTED | _SOFT | {"pair_betas", "simpo_gamma"}, averaged=True, **_FREE),
    "orpo": LossType(_orpo, _REWEIGHTED | {"pair_betas", "nll_alpha"}, averaged=True, **_FREE),
    "contrastive_cpo": LossType(_contrastive_cpo, _REWEIGHTED | _SOFT | {"pair_betas", "nll_alpha"}, **_FREE),
    "alphapo": LossType(
        _alphapo, _REWEIGHTED | _SOFT | {"pair_betas", "simpo_gamma", "alphapo_alpha"}, averaged=True, **_FREE
    ),
    "modpo": LossType(_modpo, _PAIRWISE | {"modpo_weight", "margins"}, opposite=True),
}
