"""The negative log-likelihood of a head: loss, dX and dW in one forward pass (strategy nll, 3 products)."""

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.checks import check_types
from cpo_kernels.head.grads import WeightGrad, fake_known_loss, known_loss_grads
from cpo_kernels.head.inputs import Head, check_index, head_inputs, labelled_rows
from cpo_kernels.head.matmul import product
from cpo_kernels.head.strategy import chunks, even_rows
from cpo_kernels.head.token_logps import token_logps_of
from cpo_kernels.library import functional_op
from cpo_kernels.ops.token_logps import HeadOptions


@functional_op("linear_nll", waits=True)
def linear_nll_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    index: Tensor,
    token_weights: Tensor,
    options: HeadOptions,
    num_tokens: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], dX unscaled [M, H], its coefficients [M], dW up to a power of two, db in float32, that power []."""
    size = hidden.shape[0]
    rows = labelled_rows(hidden, labels, options.ignore_index, index)
    count = rows.x.shape[0]
    step = even_rows(count, row_limit)
    head = Head(weight, bias, options, min(step, count), impl)
    labelled = rows.labels != options.ignore_index
    weights = labelled.to(library.acc_dtype(hidden.dtype))
    if token_weights.numel():
        weights = torch.where(labelled, rows.gather(token_weights), 0.0)
    coef = -weights / (num_tokens if num_tokens > 0 else labelled.sum().clamp(min=1))
    sums = WeightGrad(weight, abs(options.scale), len(chunks(count, step)), need_dw, need_db)
    dx = torch.empty_like(rows.x) if need_dx else rows.x.new_empty(0)
    loss = coef.new_zeros((), dtype=torch.float64)
    for low, high in chunks(count, step):
        part = slice(low, high)
        g, logp, *_ = head.fused(rows.x[part], rows.labels[part])
        loss += torch.dot(coef[part].double(), logp.double())
        if need_dx:
            product(g, weight, dx[part])
        sums.add(g, rows.x[part], coef[part])
    dx = rows.scatter(dx, size) if need_dx else dx
    return loss.to(coef.dtype), dx, rows.scatter(coef, size), *sums.result()


@torch.library.register_fake("cpo_kernels::linear_nll")
def _(hidden, weight, bias, labels, index, token_weights, i, s, c, v, n, need_dx, need_dw, need_db, row_limit, impl):
    acc = library.acc_dtype(hidden.dtype)
    return hidden.new_empty((), dtype=acc), *fake_known_loss(hidden, weight, need_dx, need_dw, need_db)


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, index, token_weights, head, num_tokens, needs, row_limit, impl):
        loss, *saved = linear_nll_op(
            hidden, weight, bias, labels, index, token_weights, *head, num_tokens, *needs, row_limit, impl
        )
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return *known_loss_grads(ctx, grad_loss), *(None,) * 8


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
    token_weights: Tensor | None = None,
    num_tokens: float | None = None,
    index: Tensor | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
    vocab_shards: VocabShards | None = None,
) -> Tensor:
    """Mean negative log-likelihood of the labels, -sum_t m_t logp_t / num_tokens: the loss of CPSFT, in 3 products.

    Args:
        token_weights: [...] weights m_t, 1 if None; constants, they get no gradient.
        num_tokens: the divisor, for gradient accumulation or several processes the global number of labelled tokens;
            None counts the labels of this call.
        hidden, weight, labels, bias and the rest: see `linear_token_logps`.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 where nothing is labelled.

    Raises:
        TypeError, ValueError: as `linear_token_logps`; token_weights of another shape than labels, num_tokens <= 0.
    """
    head = (ignore_index, softcap, scale, vocab_size, memory_budget)
    inputs = head_inputs(hidden, weight, labels, bias, *head, vocab_shards)
    dispatch.resolve_impl(impl, hidden.device)
    check_index(index, labels)
    check_types("a tensor", optional=True, token_weights=token_weights)
    check_types("a number", optional=True, num_tokens=num_tokens)
    if num_tokens is not None and not num_tokens > 0:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}: leave it out to count the labels")
    acc = library.acc_dtype(inputs.hidden.dtype)
    if token_weights is None:
        weights = inputs.hidden.new_empty(0, dtype=acc)
    elif token_weights.shape != labels.shape:
        raise ValueError(f"token_weights must have shape {tuple(labels.shape)}, got {tuple(token_weights.shape)}")
    else:
        weights = token_weights.detach().reshape(-1).to(acc)
    if not inputs.train_head:
        logp, *_ = token_logps_of(inputs, False, impl, index)
        labelled = inputs.labels != inputs.options.ignore_index
        total = (logp if token_weights is None else logp * torch.where(labelled, weights, 0.0)).sum()
        return -total / (labelled.sum().clamp(min=1) if num_tokens is None else num_tokens)
    i = inputs
    return _LinearNLL.apply(
        i.hidden,
        i.weight,
        i.bias,
        i.labels,
        i.labels.new_empty(0) if index is None else index,
        weights,
        i.options,
        num_tokens or -1.0,
        i.needs,
        i.row_limit,
        i.backend(impl),
    )
