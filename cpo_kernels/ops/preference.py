"""The `preference` kernel as an op over sequence log-probs: its arguments, its autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.library import Kernels, PreferenceResult, fake_preference, functional_op, refuse_double_backward
from cpo_kernels.reference.pairs import chosen_rejected


class PreferenceArgs(NamedTuple):
    """Arguments of `reference.preference` (and its kernels) besides seq_logps [S]; an absent tensor is [0]."""

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

    def run(self, kernels: Kernels, seq_logps: Tensor) -> PreferenceResult:
        return PreferenceResult(*kernels.preference(seq_logps, *self))

    def weighted(self, weights: Tensor) -> "PreferenceArgs":
        """A copy whose pair weights are multiplied by `weights` [P]."""
        return self._replace(pair_weights=weights * self.pair_weights if self.pair_weights.numel() else weights)

    def counted(self, kernels: Kernels, dtype: torch.dtype) -> Tensor:
        """[2] numbers of non-tied pairs and of labelled tokens of their chosen responses, which depend on ratings."""
        result = self.run(kernels, self.lengths.new_zeros(self.lengths.shape[0], dtype=dtype))
        chosen, _ = chosen_rejected(self.pairs, result.order)
        return torch.stack([result.counts[0], (self.lengths[chosen] * (result.order != 0)).sum()])

    @property
    def needs_counts(self) -> bool:
        return self.num_pairs < 0 or self.chosen_tokens < 0

    def with_divisors(self, num_pairs: float, chosen_tokens: float = -1.0) -> "PreferenceArgs":
        """A copy with the divisors of the whole batch where the caller gave none; a negative one stays unknown."""

        def divisor(own: float, counted: float) -> float:
            return max(float(counted), 1.0) if own < 0 <= counted else own

        return self._replace(
            num_pairs=divisor(self.num_pairs, num_pairs),
            chosen_tokens=divisor(self.chosen_tokens, chosen_tokens),
        )


def wpo_weights(aligned: Tensor, lengths: Tensor, pairs: Tensor) -> Tensor:
    """WPO weight of each pair: exp of the mean of logp - log sum p^2 over a response, multiplied over both responses.

    aligned [S]: the sum of logp - log sum p^2 over each sequence. Source: arXiv 2406.11827.
    """
    return (aligned.double() / lengths.clamp(min=1)).exp()[pairs].prod(1)


@functional_op("preference_loss", fake=lambda seq_logps, args, impl: fake_preference(seq_logps, args.pairs))
def preference_op(seq_logps: Tensor, args: PreferenceArgs, impl: str) -> PreferenceResult:
    return args.run(dispatch.kernels(impl, seq_logps), seq_logps)


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, seq_logps: Tensor, args: PreferenceArgs, impl: str) -> PreferenceResult:
        result = preference_op(seq_logps, args, impl)
        ctx.save_for_backward(result.grad)
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None


def preference(seq_logps: Tensor, args: PreferenceArgs, impl: str) -> PreferenceResult:
    """`preference` with a differentiable loss."""
    return PreferenceResult(*_Preference.apply(seq_logps, args, impl))
