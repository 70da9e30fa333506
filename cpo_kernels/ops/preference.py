"""The `preference` kernel as an op over sequence log-probs: its arguments, its autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.library import fake_preference, functional_op, refuse_double_backward


class PreferenceArgs(NamedTuple):
    """What the `preference` kernel takes beside seq_logps [S]; an absent tensor is [0]. See `reference.preference`."""

    ref_logps: Tensor  # [S]
    lengths: Tensor  # [S]
    pairs: Tensor  # [P, 2]
    scores: Tensor  # [S, K]
    conditions: Tensor  # [P, K]
    objectives: Tensor  # [2, K] weights, strengths
    pair_weights: Tensor  # [P]
    pair_betas: Tensor  # [P]
    margins: Tensor  # [S]
    loss_types: list[int]  # indices into LOSS_TYPES
    loss_weights: list[float]
    options: list[float]  # values of OPTIONS
    num_pairs: float  # < 0: counted
    chosen_tokens: float  # < 0: counted

    def run(self, kernels: Any, seq_logps: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """`weights` [P] or [0] multiplies the pair weights."""
        return kernels.preference(seq_logps, *self.weighted(weights))

    def weighted(self, weights: Tensor) -> "PreferenceArgs":
        """With pair weights times `weights` [P]; as they are where that is [0]."""
        if not weights.numel():
            return self
        return self._replace(pair_weights=weights * self.pair_weights if self.pair_weights.numel() else weights)

    def counted(self, kernels: Any, dtype: torch.dtype) -> Tensor:
        """[2] pairs that are no ties, and labelled tokens of their chosen sides: known from the ratings alone."""
        zeros = self.lengths.new_zeros(self.lengths.shape[0], dtype=dtype)
        order, counts = self.run(kernels, zeros, zeros[:0])[-2:]
        chosen = self.pairs.gather(1, (order < 0).long()[:, None]).squeeze(1)  # [P]
        return torch.stack([counts[0], (self.lengths[chosen] * (order != 0)).sum()])

    @property
    def needs_counts(self) -> bool:
        return self.num_pairs < 0 or self.chosen_tokens < 0

    def with_divisors(self, num_pairs: float, chosen_tokens: float = -1.0) -> "PreferenceArgs":
        """The divisors of the whole batch, where the caller gave none; a negative one stays unknown."""

        def known(own: float, counted: float) -> float:
            return max(float(counted), 1.0) if own < 0 <= counted else own

        return self._replace(
            num_pairs=known(self.num_pairs, num_pairs),
            chosen_tokens=known(self.chosen_tokens, chosen_tokens),
        )


def wpo_weights(aligned: Tensor, lengths: Tensor, pairs: Tensor) -> Tensor:
    """WPO weight of each pair, exp of the mean of logp - log sum p^2 over either response (arXiv 2406.11827).

    aligned [S]: the sum of logp - log sum p^2 of each sequence.
    """
    return (aligned.double() / lengths.clamp(min=1)).exp()[pairs].prod(1)


@functional_op("preference_loss")
def preference_op(
    seq_logps: Tensor, args: PreferenceArgs, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return dispatch.kernels(impl, seq_logps).preference(seq_logps, *args)


@torch.library.register_fake("cpo_kernels::preference_loss")
def _(seq_logps, ref_logps, lengths, pairs, *args):
    return fake_preference(seq_logps, pairs)


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seq_logps, args, impl):
        loss, losses, grad, *metrics = preference_op(seq_logps, *args, impl)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses, *metrics)
        return loss, losses, *metrics

    @staticmethod
    def backward(ctx, grad_loss, *_):
        refuse_double_backward()
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None


def preference(seq_logps: Tensor, args: PreferenceArgs, impl: str) -> tuple[Tensor, ...]:
    """Differentiable `preference`: (loss, losses, chosen_rewards, rejected_rewards, value_gap, order, counts)."""
    return _Preference.apply(seq_logps, args, impl)
