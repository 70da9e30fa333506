"""The negative log-likelihood of a head: loss, dX and dW in one forward pass (strategy nll, 3 matrix products)."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.checks import check_types
from cpo_kernels.head.chunk import Chunk
from cpo_kernels.head.grads import HeadGrads, WeightGrad, fake_head_grads, scaled_grads
from cpo_kernels.head.inputs import (
    Execution,
    HeadConfig,
    HeadInputs,
    HeadTensors,
    Needs,
    check_index,
    head_inputs,
    labelled_rows,
)
from cpo_kernels.head.live import no_sums, over_shards
from cpo_kernels.head.strategy import chunks
from cpo_kernels.head.token_logps import token_logps_of
from cpo_kernels.library import functional_op
from cpo_kernels.ops.token_logps import HeadOptions


class NLLArgs(NamedTuple):
    """Arguments of `linear_nll_op` besides the head's tensors."""

    row_index: Tensor  # [n] positions of the rows, or [0]
    token_weights: Tensor  # [M] or [0]
    options: HeadOptions
    num_tokens: float  # < 0: counted
    needs: Needs
    execution: Execution


class NLL(NamedTuple):
    loss: Tensor  # []
    filter_sums: Tensor  # [3] of `Found.filter_sums`; 0 without a filter
    grads: HeadGrads


def _fake_nll(tensors: HeadTensors, args: NLLArgs) -> NLL:
    acc = library.acc_dtype(tensors.hidden.dtype)
    return NLL(tensors.hidden.new_empty((), dtype=acc), no_sums(tensors.hidden), fake_head_grads(tensors, args.needs))


@functional_op("linear_nll", fake=_fake_nll, waits=True)
def linear_nll_op(tensors: HeadTensors, args: NLLArgs) -> NLL:
    options, needs = args.options, args.needs
    rows = labelled_rows(tensors, options.ignore_index, args.row_index)
    count = rows.x.shape[0]
    step = args.execution.step(count, adds_dw=needs.dw)
    head = args.execution.head(tensors, rows.labels, options, min(step, count))
    labelled = rows.labels != options.ignore_index
    weights = labelled.to(library.acc_dtype(rows.x.dtype))
    if args.token_weights.numel():
        weights = torch.where(labelled, rows.gather(args.token_weights), 0.0)
    coef = -weights / (args.num_tokens if args.num_tokens >= 0 else labelled.sum().clamp(min=1))
    sums = WeightGrad(head, len(chunks(count, step)), needs)
    dx = torch.empty_like(rows.x) if needs.dx else rows.x.new_empty(0)
    of_dx, loss = torch.empty_like(coef), coef.new_zeros((), dtype=torch.float64)
    filter_sums = no_sums(dx)
    for low, high in chunks(count, step):
        part = slice(low, high)
        chunk = Chunk(head, (rows.x[part], rows.labels[part], False, None), args.execution, needs.dx)
        loss += torch.dot(coef[part].double(), chunk.logps.logp.double())
        of_dx[part], live = chunk.grads(coef[part], dx[part], sums)
        filter_sums += live
    filtered = args.execution.filter_eps > 0 and needs.dx
    filter_sums = over_shards(head, filter_sums) if filtered else filter_sums
    grads = sums.result(dx, of_dx).scattered(rows, tensors.hidden.shape[0])
    return NLL(loss.to(coef.dtype), filter_sums, grads)


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, args: NLLArgs
    ) -> tuple[Tensor, Tensor]:
        loss, filter_sums, grads = linear_nll_op(HeadTensors(hidden, weight, bias, labels), args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(filter_sums)
        return loss, filter_sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_grads(ctx, grad_loss), None, None


def nll_of(
    inputs: HeadInputs,
    impl: str,
    token_weights: Tensor | None = None,
    num_tokens: float | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From validated inputs, token_weights [M] in `acc_dtype`: the loss (differentiable) and filter_sums [3]."""
    if not inputs.needs.head or inputs.keeps_live_sets:
        logp, *_, filter_sums = token_logps_of(inputs, False, impl, index)
        labelled = inputs.tensors.labels != inputs.options.ignore_index
        total = (logp if token_weights is None else logp * torch.where(labelled, token_weights, 0.0)).sum()
        return -total / (labelled.sum().clamp(min=1) if num_tokens is None else num_tokens), filter_sums
    acc = library.acc_dtype(inputs.tensors.hidden.dtype)
    weights = inputs.tensors.hidden.new_empty(0, dtype=acc) if token_weights is None else token_weights
    index = inputs.tensors.labels.new_empty(0) if index is None else index
    divisor = -1.0 if num_tokens is None else num_tokens
    args = NLLArgs(index, weights, inputs.options, divisor, inputs.needs, inputs.execution(impl))
    loss, filter_sums = _LinearNLL.apply(*inputs.tensors, args)
    return loss, filter_sums


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
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
) -> Tensor:
    """Mean negative log-likelihood of the labels, -sum_t m_t logp_t / num_tokens, the loss of CPSFT.

    3 matrix products with a trained head, 2 with a frozen one, 1 without gradients.

    Args:
        token_weights: [...] weights m_t, treated as constants (no gradient); 1 if None.
        num_tokens: the divisor; None counts the labels of this call. Give the global number of labelled tokens under
            gradient accumulation or with several processes.
        hidden, weight, labels, bias and the rest: see `linear_token_logps`. With filter_eps the trainer logs the share
            of live columns; it is not part of the result.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 if no position has a label.

    Raises:
        TypeError, ValueError: as `linear_token_logps`; also token_weights whose shape is not that of labels, and
            num_tokens <= 0.
    """
    config = HeadConfig(ignore_index, softcap, scale, vocab_size, memory_budget, filter_eps, filter_head_grad)
    inputs = head_inputs(hidden, weight, labels, bias, config, vocab_shards)
    dispatch.resolve_impl(impl, hidden.device)
    check_index(index, labels, ignore_index)
    check_types("a tensor", optional=True, token_weights=token_weights)
    check_types("a number", optional=True, num_tokens=num_tokens)
    if num_tokens is not None and not 0 < num_tokens < float("inf"):
        raise ValueError(f"num_tokens must be positive and finite, got {num_tokens}: omit it to count the labels")
    if token_weights is not None:
        if token_weights.shape != labels.shape:
            raise ValueError(f"token_weights must have shape {tuple(labels.shape)}, got {tuple(token_weights.shape)}")
        token_weights = token_weights.detach().reshape(-1).to(library.acc_dtype(inputs.tensors.hidden.dtype))
    return nll_of(inputs, impl, token_weights, num_tokens, index)[0]
