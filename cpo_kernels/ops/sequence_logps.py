"""Sequence log-probs from token log-probs: the op, its autograd, the public function."""

from typing import Any

import torch
from torch import Tensor

from cpo_kernels import checks
from cpo_kernels.backends import dispatch
from cpo_kernels.checks import check_types
from cpo_kernels.library import fake_sequence_sum, functional_op, refuse_double_backward, refuse_transforms


@functional_op("sequence_logps", fake=lambda token_logps, cu_seqlens, *_: fake_sequence_sum(token_logps, cu_seqlens))
def sequence_logps_op(
    token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor, average: bool, impl: str
) -> Tensor:
    return dispatch.kernels(impl, token_logps).sequence_sum(token_logps, cu_seqlens, token_weights, average)


class SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor, average: bool, impl: str
    ) -> Tensor:
        ctx.save_for_backward(cu_seqlens, token_weights)
        ctx.average, ctx.num_tokens = average, token_logps.shape[0]
        return sequence_logps_op(token_logps, cu_seqlens, token_weights, average, impl)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        cu_seqlens, token_weights = ctx.saved_tensors
        counts = cu_seqlens.diff()
        if ctx.average:
            grad = grad / counts.clamp(min=1)
        grad = grad.repeat_interleave(counts, output_size=ctx.num_tokens)
        return (grad * token_weights if token_weights.numel() else grad), None, None, None, None


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    check_types("a tensor", cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int64 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be int64 of shape [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if not checks.may_read(cu_seqlens):
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}, got {cu_seqlens.tolist()}"
        )


def sequence_logps(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None = None,
    average: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Sequence log-prob L_s = sum_{t in s} m_t logp_t, summed in float64 and stored in the input's dtype.

    Args:
        token_logps: [N] float32 or float64, sequences end to end.
        cu_seqlens: [S + 1] int64 offsets: sequence s holds tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1.
        token_weights: [N] weights m_t, treated as constants (no gradient); 1 if None.
        average: divide by the number of tokens of the sequence, including ignored ones (where `token_logps` gives 0);
            an empty sequence gives 0.

    Returns:
        [S] in the dtype of `token_logps`.

    Raises:
        TypeError, ValueError: wrong dtype or shape, or (on the CPU) offsets that do not rise from 0 to N.
        RuntimeError: a backend requested by name that is not available; double backward.
    """
    refuse_transforms()
    check_types("a tensor", token_logps=token_logps)
    check_types("a tensor", optional=True, token_weights=token_weights)
    if token_logps.dim() != 1 or token_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"token_logps must be float32 or float64 of shape [N], got {token_logps.dtype} {tuple(token_logps.shape)}"
        )
    check_cu_seqlens(cu_seqlens, token_logps.shape[0])
    if token_weights is None:
        token_weights = token_logps.new_empty(0)
    elif token_weights.shape != token_logps.shape:
        raise ValueError(f"token_weights must have shape {tuple(token_logps.shape)}, got {tuple(token_weights.shape)}")
    weights = token_weights.detach().to(token_logps.dtype)
    seq_logps: Tensor = SequenceLogps.apply(token_logps, cu_seqlens, weights, average, impl)
    return seq_logps
