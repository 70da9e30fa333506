"""Token log-probs of materialised logits: the ops, their autograd, the public function."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from cpo_kernels import checks
from cpo_kernels.backends import dispatch
from cpo_kernels.checks import check_dtype, check_label_range, check_labels, check_types
from cpo_kernels.library import (
    TokenLogps,
    fake_token_logps,
    functional_op,
    refuse_double_backward,
    refuse_transforms,
)


class HeadOptions(NamedTuple):
    """From u = x W^T + b to logits: z = softcap * tanh(scale * u / softcap), columns >= vocab_size are -inf."""

    ignore_index: int
    scale: float
    softcap: float  # 0.0: off
    vocab_size: int


class TokenExtras(NamedTuple):
    """Per-token statistics of the distribution, shaped like the labels; 0 at ignored positions.

    The entropy H is differentiable, dH/dz_v = -p_v (log p_v + H); the others are not.
    """

    entropy: Tensor  # H = -sum_v p_v log p_v, nats
    log_sum_sq_probs: Tensor  # log sum_v p_v^2
    mean_logit: Tensor  # mean of z_v over the columns below vocab_size
    is_top1: Tensor  # bool: no logit is larger than the label's


def head_options(
    width: int, ignore_index: int, softcap: float | None, scale: float, vocab_size: int | None
) -> HeadOptions:
    check_types("a number", scale=scale)
    check_types("a number", optional=True, softcap=softcap)
    check_types("an integer", ignore_index=ignore_index)
    check_types("an integer", optional=True, vocab_size=vocab_size)
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a positive number, or None for no cap, got {softcap}")
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if vocab_size is not None and not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must lie in [1, {width}], the number of logit columns, got {vocab_size}")
    return HeadOptions(int(ignore_index), float(scale), softcap or 0.0, width if vocab_size is None else vocab_size)


@functional_op("token_logps", fake=lambda logits, labels, options, extras, impl: fake_token_logps(logits, extras))
def token_logps_op(logits: Tensor, labels: Tensor, options: HeadOptions, extras: bool, impl: str) -> TokenLogps:
    return TokenLogps(*dispatch.kernels(impl, logits).token_logps_fwd(logits, labels, *options, extras))


@functional_op("token_logps_backward", fake=lambda logits, *_: logits.new_empty(logits.shape))
def token_logps_backward_op(
    logits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, entropies: Tensor, options: HeadOptions, impl: str
) -> Tensor:
    """entropies [2, N] or [0]: see `reference.token_logps_bwd_`."""
    dlogits = logits.clone(memory_format=torch.contiguous_format)
    given = entropies if entropies.numel() else None
    dispatch.kernels(impl, logits).token_logps_bwd_(dlogits, labels, lse, grad.contiguous(), *options, None, given)
    return dlogits


def entropy_grads(like: Tensor, grad: Tensor | None, of_entropy: Tensor | None, entropy: Tensor) -> tuple[Tensor, ...]:
    """Incoming gradients of log-probs [N] and entropies [1, N] (None if there is none) in the kernels' form: grad [N],
    and entropies [2, N] or [0]."""
    grad = torch.zeros_like(like) if grad is None else grad
    return grad, grad.new_empty(0) if of_entropy is None else torch.cat([of_entropy, entropy])


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, options: HeadOptions, extras: bool, impl: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp, lse, extra = token_logps_op(logits, labels, options, extras, impl)
        entropy, rest = split_entropy(extra)
        ctx.save_for_backward(logits, labels, lse, entropy)
        ctx.options, ctx.impl = options, impl
        ctx.mark_non_differentiable(rest)
        ctx.set_materialize_grads(False)
        return logp, entropy, rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        logits, labels, lse, entropy = ctx.saved_tensors
        grad, entropies = entropy_grads(lse, grad, of_entropy, entropy)
        dlogits = token_logps_backward_op(logits, labels, lse, grad, entropies, ctx.options, ctx.impl)
        return dlogits, None, None, None, None


def split_entropy(extra: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable first row of extra [4, N], and the other rows; both are [0] if extra is [0]."""
    return extra[:1].clone(), extra[1:].clone()


def token_extras(extra: Tensor, shape: Sequence[int]) -> TokenExtras:
    """`TokenExtras` from the kernels' rows [4, N], the first of which is differentiable."""
    entropy, *rest = (row.view(shape) for row in extra)
    log_sum_sq_probs, mean_logit, is_top1 = (row.detach() for row in rest)
    return TokenExtras(entropy, log_sum_sq_probs, mean_logit, is_top1 > 0.5)


@overload
def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int = ..., softcap: float | None = ..., scale: float = ...,
    vocab_size: int | None = ..., extras: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int = ..., softcap: float | None = ..., scale: float = ...,
    vocab_size: int | None = ..., *, extras: Literal[True], impl: str = ...,
) -> tuple[Tensor, TokenExtras]: ...  # fmt: skip
@overload
def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int = ..., softcap: float | None = ..., scale: float = ...,
    vocab_size: int | None = ..., extras: bool = ..., impl: str = ...,
) -> Tensor | tuple[Tensor, TokenExtras]: ...  # fmt: skip
def token_logps(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
    extras: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, TokenExtras]:
    """Log-prob of each label: logp_t = z_{t,y_t} - logsumexp_v z_{t,v}, z = softcap * tanh(scale * logits / softcap).

    Args:
        logits: [..., V] in float32, bfloat16, float16 or float64.
        labels: [...] int64; positions equal to `ignore_index` give exactly 0 and no gradient.
        softcap: cap of the logits (Gemma 2); None for no cap.
        scale: factor on the logits (Cohere, Granite), applied before the cap.
        vocab_size: columns from this index on are padding and count as -inf; None for no padding.
        extras: also return `TokenExtras` (entropy, log sum p^2, mean logit, is_top1).
        impl: the backend, see `cpo_kernels.backends.dispatch`; a backend requested by name never falls back.

    Returns:
        [...] float32 (float64 for float64 logits); with `extras` a pair of it and `TokenExtras`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, option, or (on the CPU) a label outside [0, vocab_size).
        RuntimeError: a backend requested by name that is not available; double backward.

    Examples:
        >>> token_logps(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor([-1.3863,  0.0000])
    """
    refuse_transforms()
    check_types("a tensor", logits=logits, labels=labels)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    shape = logits.shape[:-1]
    if labels.is_floating_point() and labels.shape != shape:
        swapped = not logits.is_floating_point() and labels.shape[:-1] == logits.shape
        raise TypeError(
            f"labels must be int64 of shape {tuple(shape)} to match logits {tuple(logits.shape)}, got {labels.dtype} "
            f"{tuple(labels.shape)}: "
            + ("logits and labels are swapped" if swapped else "for hidden states and a weight use linear_token_logps")
        )
    check_dtype("logits", logits)
    check_labels(labels, shape, "logits", logits.device)
    options = head_options(logits.shape[-1], ignore_index, softcap, scale, vocab_size)
    dispatch.resolve_impl(impl, logits.device)
    if checks.may_read(labels):
        check_label_range(labels, options.ignore_index, options.vocab_size)
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    logp, *parts = _TokenLogps.apply(rows, labels.reshape(-1), options, extras, impl)
    return (logp.view(shape), token_extras(torch.cat(parts), shape)) if extras else logp.view(shape)
