"""Preference losses over sequence log-probs.

CPO here is Controllable Preference Optimization (Guo et al. 2024, arXiv 2402.19085); Contrastive Preference
Optimization (Xu et al. 2024) is loss type "contrastive_cpo".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.checks import check_types
from cpo_kernels.library import PreferenceResult
from cpo_kernels.losses.inputs import PairInputs, kernel_args
from cpo_kernels.losses.options import LossOptions
from cpo_kernels.objectives import Objective
from cpo_kernels.ops.preference import preference


class PreferenceOutput(NamedTuple):
    """Result of a preference loss. Everything but `loss` is detached."""

    loss: Tensor  # [], sum of weight * loss over the non-tied pairs / num_pairs
    losses: Tensor  # [P], 0 for ties
    seq_logps: Tensor  # [S]
    # beta (L - ref) of the response that the loss preferred (of a tie's first); where no type needs a reference beta L,
    # or beta L / n if one averages over tokens (simpo, orpo, alphapo):
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P], of the other
    accuracy: Tensor  # [], share of non-tied pairs whose chosen reward is higher
    margin: Tensor  # [], mean of chosen - rejected reward over the non-tied pairs
    value_gap: Tensor  # [P], R(first) - R(second); NaN if no objective is rated on both sides, inf without scores
    order: Tensor  # [P] int8: +1 if the first of the pair is chosen, -1 if the second, 0 for a tie
    num_pairs: Tensor  # [] int64, non-tied pairs
    num_ties: Tensor  # [] int64, ties, including unrated pairs
    num_unrated: Tensor  # [] int64, pairs without an objective rated on both sides
    # Where filter_eps filters a gradient, means over the labelled rows; NaN elsewhere:
    live_share: Tensor  # [], share of the vocabulary in their set's live columns, 1 for exact sets
    tail_mass: Tensor  # [], probability outside the live columns (under a softcap, times 1 - tanh^2)
    exact_share: Tensor  # [], share of rows in sets with too many live columns, which are exact


def output(
    result: PreferenceResult, seq_logps: Tensor, filter_shares: Sequence[Tensor] | None = None
) -> PreferenceOutput:
    loss, losses, _, chosen, rejected, gap, order, counts = result
    counted = (order != 0).to(chosen.dtype)
    num = counted.sum().clamp(min=1)
    accuracy = ((chosen > rejected) * counted).sum() / num
    margin = (torch.where(order != 0, chosen - rejected, 0.0)).sum() / num
    shares = margin.new_full((3,), torch.nan) if filter_shares is None else filter_shares
    pairs = loss, losses, seq_logps.detach(), chosen, rejected, accuracy, margin, gap, order
    return PreferenceOutput(*pairs, *counts.unbind(0), *shares)


class CPOLoss(nn.Module):
    """`preference_loss` with its options fixed: `CPOLoss(objectives, beta=0.1)(seq_logps, ...)`.

    Arguments and errors: see `preference_loss`. Options are checked on construction, tensors in the call.

    Examples:
        >>> loss_fn = CPOLoss(beta=0.1, loss_type="hinge")
        >>> out = loss_fn(torch.tensor([-5.0, -9.0]), ref_logps=torch.tensor([-6.0, -6.0]))
        >>> out.accuracy
        tensor(1.)
    """

    def __init__(
        self,
        objectives: Sequence[Objective] | None = None,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        impl: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = LossOptions.of({"objectives": objectives, "beta": beta, "loss_type": loss_type, **options})
        dispatch.check_impl(impl)
        self.impl = impl

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and always beta and loss type."""
        return self.options.shown() + ("" if self.impl == "auto" else f", impl={self.impl!r}")

    def forward(
        self,
        seq_logps: Tensor,
        pairs: Tensor | None = None,
        ref_logps: Tensor | None = None,
        scores: Tensor | None = None,
        conditions: Tensor | None = None,
        lengths: Tensor | None = None,
        pair_weights: Tensor | None = None,
        pair_betas: Tensor | None = None,
        margins: Tensor | None = None,
        num_pairs: float | None = None,
        chosen_tokens: float | None = None,
    ) -> PreferenceOutput:
        """See `preference_loss`."""
        library.refuse_transforms()
        check_types("a tensor", seq_logps=seq_logps)
        check_types("a tensor", optional=True, lengths=lengths)
        if seq_logps.dim() != 1 or seq_logps.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "seq_logps must be float32 or float64 of shape [S] (a 16-bit sum is off by whole nats), got "
                f"{seq_logps.dtype} {tuple(seq_logps.shape)}"
            )
        for option in ("ld_alpha", "use_weighting"):
            if getattr(self.options, option):
                raise ValueError(
                    f"{option} needs token log-probs: use FusedLinearCPOLoss, or apply it to seq_logps (ld_alpha) or "
                    "pair_weights (WPO) yourself"
                )
        if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != seq_logps.shape):
            raise ValueError(
                f"lengths must be int64 of shape {list(seq_logps.shape)}, got {lengths.dtype} {list(lengths.shape)}"
            )
        divisors = num_pairs, chosen_tokens
        given = PairInputs(pairs, ref_logps, scores, conditions, pair_weights, pair_betas, margins, *divisors)
        args = kernel_args(self.options, given, seq_logps.shape[0], lengths, seq_logps)
        return output(preference(seq_logps.contiguous(), args, self.impl), seq_logps)


def preference_loss(
    seq_logps: Tensor,
    pairs: Tensor | None = None,
    ref_logps: Tensor | None = None,
    scores: Tensor | None = None,
    conditions: Tensor | None = None,
    objectives: Sequence[Objective] | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    pair_betas: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: float | None = None,
    chosen_tokens: float | None = None,
    impl: str = "auto",
    **options: Any,
) -> PreferenceOutput:
    """Multi-objective conditioned preference loss over sequence log-probs, with the gradient computed in the same pass.

    For each pair the response with the higher value R under the pair's condition is chosen, with
    R(y) = sum_i w_i g_i(y) / sum_i w_i, g_i = -strength_i |P_i(y) - c_i| where c_i is given, else P_i(y); the default
    loss is -log sigmoid(beta * ((L_w - ref_w) - (L_l - ref_l))). Without ratings the first of each pair is chosen.

    Args:
        seq_logps: [S] float32 or float64.
        pairs: [P, 2] int64 indices of sequences; a response may be in many pairs. None pairs the first half of the
            sequences with the second.
        ref_logps: [S], log-probs of the reference model under the same (prompt, condition).
        scores: [S, K] ratings, NaN if missing: an objective that is not rated on both sides is dropped from the pair.
        conditions: [P, K], or [S, K] with equal rows for both responses of a pair; NaN if not conditioned. If P = S
            (three responses of each prompt and all their pairs) they are read as [P, K]: convert conditions of
            sequences with conditions[pairs[:, 0]].
        objectives: the K objectives.
        lengths: [S] int64 numbers of labelled tokens, for the types that average or count tokens.
        pair_weights: [P], factors on the pairs' losses; the divisor stays the number of pairs.
        pair_betas: [P], each in place of `beta`.
        margins: [S], MODPO's weighted other rewards of each response.
        num_pairs: divisor of the loss; default: the number of non-tied pairs in this call. Give the global count under
            gradient accumulation or with several processes.
        chosen_tokens: the same for the terms that average over the tokens of all chosen responses (sft, and the NLL of
            orpo and contrastive_cpo).
        **options: see `LossOptions`.

    Returns:
        `PreferenceOutput`, in the dtype of seq_logps; log-probs are in nats.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device or option; an option that a loss type would ignore; a rating
            or condition outside its objective's [low, high] (for GPU tensors only under CPO_KERNELS_CHECK=1).
        RuntimeError: a backend requested by name that is not available; double backward.

    Source: Guo et al. 2024 (arXiv 2402.19085); each type's own in `LOSS_TYPES[name].formula`.
    """
    loss_fn = CPOLoss(objectives, beta, loss_type, impl, **options)
    tensors = (pairs, ref_logps, scores, conditions, lengths, pair_weights, pair_betas, margins)
    out: PreferenceOutput = loss_fn(seq_logps, *tensors, num_pairs, chosen_tokens)
    return out
