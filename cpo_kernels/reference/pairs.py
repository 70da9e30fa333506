"""The `preference` kernel: which response of a pair is chosen, the loss of every pair, and its gradient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cpo_kernels.objectives import value_gap
from cpo_kernels.reference.loss_types import LOSS_TYPES
from cpo_kernels.reference.terms import OPTION_DEFAULTS, OPTIONS, Pairs


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


def chosen_rejected(pairs: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """[P] chosen and [P] rejected sequences of pairs [P, 2]: the second is chosen where order [P] is -1."""
    chosen, rejected = torch.where((order < 0)[:, None], pairs.flip(1), pairs).unbind(1)
    return chosen, rejected


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
    """Which response is chosen (by Delta R), the loss of every pair, and its gradient, all in float64.

        loss = sum_p w_p sum_j loss_weights[j] l_j(p) / num_pairs   over the non-tied pairs

    seq_logps L `[S]`, ref_logps `[S]`, lengths `[S]`, pairs `[P, 2]`, scores `[S, K]`, conditions `[P, K]`,
    objectives `[2, K]` (weights, strengths), pair_weights and pair_betas `[P]`, margins `[S]`; only seq_logps
    and pairs must have elements. loss_types are indices into LOSS_TYPES, options the values of OPTIONS.
    A pair is a tie unless |Delta R| > tie_margin; without scores the first of each pair is chosen. num_pairs
    < 0: the number of non-tied pairs given. chosen_tokens < 0: the number of tokens of their chosen responses.

    Returns loss `[]`, losses `[P]`, grad `[S]` = d loss / d seq_logps, chosen_rewards and rejected_rewards
    `[P]`, value_gap `[P]` (NaN: unrated, inf: no scores), order `[P]` int8 (+1 first chosen, -1 second, 0 a
    tie), counts `[3]` int64 (non-tied pairs; ties including unrated pairs; unrated pairs). Rewards are
    beta (L - ref), or, if no type needs a reference, beta L (beta L / n if a type is `averaged`); a tie reports
    its first response as chosen.
    """
    types = [list(LOSS_TYPES.values())[index] for index in loss_types]
    option = dict(zip(OPTIONS, options, strict=True))
    gap = _value_gap(scores, conditions, objectives, pairs)
    decided = gap.abs() > option["tie_margin"]
    order = torch.where(decided, gap.sign(), 0.0).to(torch.int8)
    live = decided.nonzero().squeeze(1)  # [n]
    winner, loser = chosen_rejected(pairs, order)
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
    return value_gap(a, b, conditions if conditions.numel() else None, objectives)
