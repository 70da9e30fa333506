"""Token log-probs of a head, and their gradient for any loss that follows (strategies forward, frozen, recompute).

Logits of one chunk of rows exist at a time. `strategy` names the strategies.
"""

from typing import Any

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.head.grads import fake_grads, restore, scale_rows
from cpo_kernels.head.inputs import Head, HeadInputs, check_index, head_inputs, labelled_rows
from cpo_kernels.head.matmul import product
from cpo_kernels.head.recompute import second_pass
from cpo_kernels.head.strategy import chunks, even_rows
from cpo_kernels.library import functional_op, refuse_double_backward
from cpo_kernels.ops.token_logps import HeadOptions, token_extras


@functional_op("linear_token_logps", waits=True)
def linear_token_logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    index: Tensor,
    ref_hidden: Tensor,
    options: HeadOptions,
    extras: bool,
    want_dx: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [M, H], labels [M], index [n] of the rows or [0], ref_hidden [M, H] or [0].

    Returns logp [M], lse [M], extra [4, M] or [0], dx [M, H] or [0] (for an incoming gradient of 1) and ref_logp [M]
    or [0], the log-probs of ref_hidden through the same head.
    """
    acc, size, shared = library.acc_dtype(hidden.dtype), hidden.shape[0], ref_hidden.numel() > 0
    rows = labelled_rows(hidden, labels, options.ignore_index, index)
    count = rows.x.shape[0]
    step = even_rows(count, row_limit)
    max_rows = min(2 * step, row_limit) if shared and count else min(step, count)
    head = Head(weight, bias, options, max_rows, impl)
    logp, lse = (rows.x.new_empty(count, dtype=acc) for _ in range(2))
    ref_x, ref_logp = (rows.gather(ref_hidden) if shared else None), logp.new_empty(count if shared else 0)
    extra = rows.x.new_empty((count, 4) if extras else (0,), dtype=acc)
    dx = torch.empty_like(rows.x) if want_dx else rows.x.new_empty(0)
    for low, high in chunks(count, step):
        part = slice(low, high)
        inputs = rows.x[part], rows.labels[part], extras, None if ref_x is None else ref_x[part]
        if want_dx:
            g, logp[part], lse[part], seen, ref_part = head.fused(*inputs)
            product(g, weight, dx[part])
        else:
            logp[part], lse[part], seen, ref_part = head.forward(*inputs)
        if extras:
            extra[part] = seen.t()
        if shared:
            ref_logp[part] = ref_part
    extra = rows.scatter(extra, size).t().contiguous() if extras else extra
    dx = rows.scatter(dx, size) if want_dx else dx
    ref_logp = rows.scatter(ref_logp, size) if shared else ref_logp
    return rows.scatter(logp, size), rows.scatter(lse, size), extra, dx, ref_logp


@torch.library.register_fake("cpo_kernels::linear_token_logps")
def _(hidden, weight, bias, labels, index, ref_hidden, i, s, c, v, extras, want_dx, row_limit, impl):
    acc, size = library.acc_dtype(hidden.dtype), hidden.shape[0]
    extra = hidden.new_empty((4, size) if extras else (0,), dtype=acc)
    dx = hidden.new_empty(hidden.shape if want_dx else (0,))
    logp, lse = (hidden.new_empty(size, dtype=acc) for _ in range(2))
    return logp, lse, extra, dx, hidden.new_empty(ref_hidden.shape[0], dtype=acc)


@functional_op("linear_token_logps_backward", waits=True)
def linear_token_logps_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    index: Tensor,
    lse: Tensor,
    grad: Tensor,
    options: HeadOptions,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The vector-Jacobian product of `linear_token_logps` from recomputed logits."""
    size = hidden.shape[0]
    rows = labelled_rows(hidden, labels, options.ignore_index, index)
    count = rows.x.shape[0]
    lse, grad = rows.gather(lse), rows.gather(grad)
    head = Head(weight, bias, options, even_rows(count, row_limit), impl)
    dx, dw, db, power = second_pass(head, rows.x, rows.labels, lse, grad, need_dx, need_dw, need_db)
    dx = scale_rows(dx, grad) if need_dx else dx
    return rows.scatter(dx, size) if need_dx else dx, restore(dw, power), db.to(weight.dtype)


@torch.library.register_fake("cpo_kernels::linear_token_logps_backward")
def _(hidden, weight, bias, labels, index, lse, grad, i, s, c, v, need_dx, need_dw, need_db, row_limit, impl):
    return fake_grads(hidden, weight, need_dx, need_dw, need_db)


class LinearTokenLogps(torch.autograd.Function):
    """`frozen` keeps dX for an incoming gradient of 1; `recompute` keeps the log-sum-exp and makes the logits again."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, index, ref_hidden, head, extras, train_hidden, train_head, row_limit, impl
    ):
        frozen = train_hidden and not train_head
        logp, lse, extra, dx, ref_logp = linear_token_logps_op(
            hidden, weight, bias, labels, index, ref_hidden, *head, extras, frozen, row_limit, impl
        )
        ctx.frozen, ctx.head, ctx.row_limit, ctx.impl = frozen, head, row_limit, impl
        ctx.save_for_backward(*((dx,) if frozen else (hidden, weight, bias, labels, index, lse)))
        ctx.mark_non_differentiable(extra, ref_logp)
        return logp, extra, ref_logp

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_double_backward()
        if ctx.frozen:
            return scale_rows(ctx.saved_tensors[0], grad), *(None,) * 11
        hidden, weight, bias, labels, index, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = linear_token_logps_backward_op(
            hidden, weight, bias, labels, index, lse, grad, *ctx.head, *needs, ctx.row_limit, ctx.impl
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9


def token_logps_of(
    inputs: HeadInputs,
    extras: bool,
    impl: str,
    index: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    function: type[LinearTokenLogps] = LinearTokenLogps,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable logp [M], extra [4, M] or [0], and ref_logp [M] or [0], of checked inputs."""
    i = inputs
    index = i.labels.new_empty(0) if index is None else index
    ref_hidden = i.weight.new_empty(0) if ref_hidden is None else ref_hidden
    flags = (i.options, extras, i.needs[0], i.train_head, i.row_limit, i.backend(impl))
    return function.apply(i.hidden, i.weight, i.bias, i.labels, index, ref_hidden, *flags)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
    extras: bool = False,
    index: Tensor | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
    vocab_shards: VocabShards | None = None,
) -> Any:
    """Token log-probs from hidden states: logp_t = z_{t,y_t} - logsumexp_v z_{t,v}, z = softcap(scale * (x W^T + b)).

    The logits never exist as a whole. The gradient is the true vector-Jacobian product for any upstream gradient: with
    2 products where weight and bias are frozen, 4 where they train (`FusedLinearCPOLoss` and `linear_nll` need 3).

    Args:
        hidden: [..., H], already shifted: position t predicts label t.
        weight: [V, H], in the dtype of `hidden` (under autocast both are cast).
        labels: [...] int64; positions equal to `ignore_index` give exactly 0, no gradient and cost nothing.
        bias: [V] or None.
        softcap, scale, vocab_size, extras, impl: see `token_logps`.
        index: [n] int64, the positions in `labels.flatten()` that carry a label, in order. A collator knows them; left
            out, they are looked for, and on a GPU the host waits for their number. Other positions among them are
            treated as ignored ones, so all positions serve a CUDA graph whose labels change.
        memory_budget: bytes of logits held at a time, 320 MiB on a CPU and 1 GiB on a GPU by default.
        vocab_shards: weight [V_r, H] and bias [V_r] are this rank's rows, hidden and labels are the same on every rank
            of the group, and so is the result. DTensors say this themselves: hidden Replicate, or Shard over tokens
            (sequence parallel), with weight Shard(0) on the same mesh; labels are whole. A DTensor weight under plain
            hidden states is gathered, once, and its gradient averaged over the mesh, as FSDP2 does.

    Returns:
        [...] float32 (float64 for float64 input), or a pair of it and `TokenExtras`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; on the CPU also a label outside [0, vocab_size).
        RuntimeError: a backend asked for by name that is not there; double backward.
    """
    head = (ignore_index, softcap, scale, vocab_size, memory_budget)
    inputs = head_inputs(hidden, weight, labels, bias, *head, vocab_shards)
    dispatch.resolve_impl(impl, hidden.device)
    check_index(index, labels)
    logp, extra, _ = token_logps_of(inputs, extras, impl, index)
    shape = labels.shape
    return (logp.view(shape), token_extras(extra, shape)) if extras else logp.view(shape)
