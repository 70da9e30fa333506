"""Token log-probs of a head, and their gradient for any loss that follows (strategies forward, frozen, recompute).

Logits of one chunk of rows exist at a time. `strategy` names the strategies.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.head.grads import InputGrads, fake_grads, restore, scale_rows
from cpo_kernels.head.inputs import (
    Execution,
    HeadConfig,
    HeadInputs,
    HeadTensors,
    Needs,
    RowLogps,
    check_index,
    head_inputs,
    labelled_rows,
)
from cpo_kernels.head.live import (
    LiveSets,
    LiveTensors,
    fake_live_tensors,
    filtered_chunk,
    joined,
    live_head_grads,
    no_live_tensors,
    no_sums,
    over_shards,
)
from cpo_kernels.head.matmul import product
from cpo_kernels.head.recompute import second_pass
from cpo_kernels.head.relative import is_relative
from cpo_kernels.head.strategy import chunks, even_rows
from cpo_kernels.library import fake_token_logps, functional_op, refuse_double_backward
from cpo_kernels.ops.token_logps import HeadOptions, TokenExtras, entropy_grads, split_entropy, token_extras


class TokenArgs(NamedTuple):
    """What `linear_token_logps_op` takes beside the head's tensors."""

    row_index: Tensor  # [n] positions of the rows, or [0]
    ref_hidden: Tensor  # [M, H] or [0]
    options: HeadOptions
    extras: bool
    want_dx: bool
    keep_live: bool  # the live sets too, from which backward makes dW and db
    execution: Execution


class HeadLogps(NamedTuple):
    logps: RowLogps  # at all positions
    dx: Tensor  # [M, H] for an incoming gradient of 1, or [0]
    filter_sums: Tensor  # [3] of `LiveSets.sums`; 0 without a filter
    live: LiveTensors


def _fake_forward(tensors: HeadTensors, args: TokenArgs) -> HeadLogps:
    hidden = tensors.hidden
    logp, lse, extra = fake_token_logps(hidden, args.extras)
    dx = hidden.new_empty(hidden.shape if args.want_dx else 0)
    live = fake_live_tensors(hidden) if args.keep_live else no_live_tensors(hidden)
    lacks = logp.new_empty(logp.shape if is_relative(hidden.dtype) else 0)
    logps = RowLogps(logp, lse, extra, logp.new_empty(args.ref_hidden.shape[0]), lacks)
    return HeadLogps(logps, dx, no_sums(hidden), live)


@functional_op("linear_token_logps", fake=_fake_forward, waits=True)
def linear_token_logps_op(tensors: HeadTensors, args: TokenArgs) -> HeadLogps:
    execution, size, shared = args.execution, tensors.hidden.shape[0], args.ref_hidden.numel() > 0
    row_limit, eps = execution.row_limit, execution.filter_eps
    rows = labelled_rows(tensors, args.options.ignore_index, args.row_index)
    count = rows.x.shape[0]
    step = execution.step(count)
    max_rows = min(2 * step, row_limit) if shared and count else min(step, count)
    head = args.execution.head(tensors, args.options, max_rows)
    ref_x = rows.gather(args.ref_hidden) if shared else None
    dx = torch.empty_like(rows.x) if args.want_dx else rows.x.new_empty(0)
    parts: list[RowLogps] = []
    filtered = eps > 0 and (args.want_dx or args.keep_live)
    filter_sums, live = no_sums(rows.x), list[LiveSets]()
    for low, high in chunks(count, step) or [(0, 0)]:
        part = slice(low, high)
        inputs = rows.x[part], rows.labels[part], args.extras, None if ref_x is None else ref_x[part]
        if filtered:
            _, logps, sets = filtered_chunk(head, inputs, eps, execution.set_rows, dx[part], whole=False)
            filter_sums += sets.sums(inputs[1], args.options)
            live += [sets] if args.keep_live else []
        elif args.want_dx:
            g, logps = head.fused(*inputs)
            product(g, tensors.weight, dx[part])
        else:
            logps = head.forward(*inputs)
        parts.append(logps)
    logp, lse, extra, ref_logp, lacks = RowLogps.joined(parts)
    extra = rows.scatter(extra.t(), size).t().contiguous() if args.extras else extra
    dx = rows.scatter(dx, size) if args.want_dx else dx
    ref_logp = rows.scatter(ref_logp, size) if shared else ref_logp
    lacks = rows.scatter(lacks, size) if is_relative(rows.x.dtype) else lacks
    logps = RowLogps(rows.scatter(logp, size), rows.scatter(lse, size), extra, ref_logp, lacks)
    filter_sums = over_shards(head, filter_sums) if filtered else filter_sums
    return HeadLogps(logps, dx, filter_sums, joined(live, rows.x))


class BackwardArgs(NamedTuple):
    """What `linear_token_logps_backward_op` takes beside the head's tensors."""

    row_index: Tensor  # [n] positions of the rows, or [0]
    lse: Tensor  # [M]
    lacks: Tensor  # [M] or [0]
    grad: Tensor  # [M]
    entropies: Tensor  # [2, M] incoming gradients of the entropies, and the entropies; or [0]
    options: HeadOptions
    needs: Needs
    live: LiveTensors  # of the forward pass, where it kept them
    from_live: bool
    execution: Execution


@functional_op("linear_token_logps_backward", fake=lambda tensors, args: fake_grads(tensors, args.needs), waits=True)
def linear_token_logps_backward_op(tensors: HeadTensors, args: BackwardArgs) -> InputGrads:
    """The vector-Jacobian product of `linear_token_logps` from recomputed logits, or of the head from live sets."""
    execution, needs = args.execution, args.needs
    rows = labelled_rows(tensors, args.options.ignore_index, args.row_index)
    lse, grad = rows.gather(args.lse), rows.gather(args.grad)
    lacks = rows.gather(args.lacks) if args.lacks.numel() else args.lacks
    head = execution.head(tensors, args.options, even_rows(rows.x.shape[0], execution.row_limit))
    if args.from_live:
        sets = LiveSets.of(args.live, rows.x.shape[0], execution.set_rows)
        grads = live_head_grads(head, sets, rows.x, rows.labels, lse, lacks, grad, needs.dw, needs.db)
    else:
        entropies = rows.gather(args.entropies.t()).t().contiguous() if args.entropies.numel() else None
        grads = second_pass(head, rows.x, rows.labels, lse, lacks, grad, needs, entropies)
    dx = rows.scatter(scale_rows(grads.dx, grads.coef), tensors.hidden.shape[0]) if needs.dx else grads.dx
    return InputGrads(dx, restore(grads.dw, grads.power), grads.db.to(tensors.weight.dtype))


class LinearTokenLogps(torch.autograd.Function):
    """`frozen` and filtered heads keep dX for an incoming gradient of 1; `recompute` makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, args: TokenArgs
    ) -> tuple[Tensor, ...]:
        tensors = HeadTensors(hidden, weight, bias, labels)
        logps, dx, filter_sums, live = linear_token_logps_op(tensors, args)
        ctx.args = args.options, args.execution, args.keep_live
        ctx.made_dx, ctx.extras = args.want_dx, args.extras
        entropy, extra = split_entropy(logps.extra)
        for_head = (hidden, weight, bias, args.row_index, logps.lse, logps.lacks, entropy, *live)
        only_dx = args.want_dx and not any(ctx.needs_input_grad[1:3]) and not args.extras
        ctx.save_for_backward(dx, labels, *(() if only_dx else for_head))
        rest = extra, logps.ref_logp, filter_sums, *live  # torch.compile must see tensors of unknown sizes
        ctx.mark_non_differentiable(*rest, *([] if args.extras else [entropy]))
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return logps.logp, entropy, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """An entropy that has a gradient makes the logits again for everything, whatever was made in forward."""
        refuse_double_backward()
        of_entropy = of_entropy if ctx.extras else None  # torch.compile gives zeros for it
        if grad is None and of_entropy is None:
            return (None,) * 5
        made_dx, labels, *saved = ctx.saved_tensors
        ignored = labels == ctx.args[0].ignore_index  # whatever comes for them, NaN too
        grad, of_entropy = (g if g is None else g.masked_fill(ignored, 0.0) for g in (grad, of_entropy))
        needs, made = Needs(*ctx.needs_input_grad[:3]), ctx.made_dx and of_entropy is None
        grads: list[Tensor | None] = [None, None, None]
        if needs.dx and made and grad is not None:
            grads[0] = scale_rows(made_dx, grad)
        if needs.head or not made:
            options, execution, from_live = ctx.args
            needs = needs._replace(dx=needs.dx and not made)
            hidden, weight, bias, index, lse, lacks, entropy, *live = saved
            grad, entropies = entropy_grads(lse, grad, of_entropy, entropy)
            from_live = from_live and of_entropy is None
            args = BackwardArgs(
                index, lse, lacks, grad, entropies, options, needs, LiveTensors(*live), from_live, execution
            )
            out = linear_token_logps_backward_op(HeadTensors(hidden, weight, bias, labels), args)
            grads = [g if need else made for g, need, made in zip(out, needs, grads, strict=True)]
        return *grads, None, None


def token_logps_of(
    inputs: HeadInputs,
    extras: bool,
    impl: str,
    index: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    function: type[LinearTokenLogps] = LinearTokenLogps,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable logp [M], extra [4, M] (its first row too) or [0], ref_logp [M] or [0] and filter_sums [3], of
    checked inputs."""
    tensors, needs = inputs.tensors, inputs.needs
    index = tensors.labels.new_empty(0) if index is None else index
    ref_hidden = tensors.weight.new_empty(0) if ref_hidden is None else ref_hidden
    want_dx = needs.dx and (not needs.head or inputs.filter_eps > 0)
    if extras and torch.compiler.is_compiling():  # its backward has a gradient of the entropy, of zeros perhaps
        want_dx = False
    execution = inputs.execution(impl)
    args = TokenArgs(index, ref_hidden, inputs.options, extras, want_dx, inputs.keeps_live_sets, execution)
    logp, entropy, extra, ref_logp, filter_sums, *_ = function.apply(*tensors, args)
    return logp, torch.cat([entropy, extra]), ref_logp, filter_sums


@overload
def linear_token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = ..., ignore_index: int = ...,
    softcap: float | None = ..., scale: float = ..., vocab_size: int | None = ..., extras: Literal[False] = ...,
    index: Tensor | None = ..., memory_budget: int | None = ..., impl: str = ...,
    vocab_shards: VocabShards | None = ..., filter_eps: float | Literal["auto"] | None = ...,
    filter_head_grad: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = ..., ignore_index: int = ...,
    softcap: float | None = ..., scale: float = ..., vocab_size: int | None = ..., *, extras: Literal[True],
    index: Tensor | None = ..., memory_budget: int | None = ..., impl: str = ...,
    vocab_shards: VocabShards | None = ..., filter_eps: float | Literal["auto"] | None = ...,
    filter_head_grad: bool = ...,
) -> tuple[Tensor, TokenExtras]: ...  # fmt: skip
@overload
def linear_token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = ..., ignore_index: int = ...,
    softcap: float | None = ..., scale: float = ..., vocab_size: int | None = ..., extras: bool = ...,
    index: Tensor | None = ..., memory_budget: int | None = ..., impl: str = ...,
    vocab_shards: VocabShards | None = ..., filter_eps: float | Literal["auto"] | None = ...,
    filter_head_grad: bool = ...,
) -> Tensor | tuple[Tensor, TokenExtras]: ...  # fmt: skip
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
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
) -> Tensor | tuple[Tensor, TokenExtras]:
    """Token log-probs from hidden states: logp_t = z_{t,y_t} - logsumexp_v z_{t,v}, z = softcap(scale * (x W^T + b)).

    The logits never exist as a whole. The gradient is the true vector-Jacobian product for any upstream gradient: with
    2 products where weight and bias are frozen, 4 where they train (the fused losses and `linear_nll` need 3).

    Args:
        hidden: [..., H], already shifted: position t predicts label t.
        weight: [V, H], in the dtype of `hidden` (under autocast both are cast).
        labels: [...] int64; positions equal to `ignore_index` give exactly 0, no gradient and cost nothing.
        bias: [V] or None.
        softcap, scale, vocab_size, extras, impl: see `token_logps`.
        index: [n] int64, the positions in `labels.flatten()` that carry a label, in order. A collator knows them; left
            out, they are looked for, which on a GPU needs a host-device synchronisation. Other positions among them are
            treated as ignored ones, so all positions serve a CUDA graph whose labels change.
        memory_budget: bytes of logits held at a time, 320 MiB on a CPU and 1 GiB on a GPU by default.
        vocab_shards: weight [V_r, H] and bias [V_r] are this rank's rows, hidden and labels are the same on every rank
            of the group, and so is the result. DTensors say this themselves: hidden Replicate, or Shard over tokens
            (sequence parallel), with weight Shard(0) on the same mesh; labels are whole. A DTensor weight under plain
            hidden states is gathered, once, and its gradient averaged over the mesh, as FSDP2 does.
        filter_eps: None for exact gradients. A number: the gradient of `hidden` is multiplied out only in the columns
            of the vocabulary where some of 128 consecutive rows has |onehot - softmax| >= filter_eps (times `scale`,
            and tanh's slope under a softcap), and the rest of them as one mean column; log-probs stay exact. "auto"
            takes 2^-15 in bfloat16, where the error of dX on real text grows to 1.07 times that of exact gradients, and
            exact gradients in the other dtypes. See `reference.live_columns`.
        filter_head_grad: filter the gradients of weight and bias as well: 1.2 to 1.3 products in all, where a trained
            model leaves 5 to 10% of the columns live. Rows of the weight that are never live get a gradient that is
            right on average only, and Adam divides by its size.

    Returns:
        [...] float32 (float64 for float64 input), or a pair of it and `TokenExtras`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; on the CPU also a label outside [0, vocab_size).
        RuntimeError: a backend asked for by name that is not there; double backward.
    """
    config = HeadConfig(ignore_index, softcap, scale, vocab_size, memory_budget, filter_eps, filter_head_grad)
    inputs = head_inputs(hidden, weight, labels, bias, config, vocab_shards)
    dispatch.resolve_impl(impl, hidden.device)
    check_index(index, labels)
    logp, extra, *_ = token_logps_of(inputs, extras, impl, index)
    shape = labels.shape
    return (logp.view(shape), token_extras(extra, shape)) if extras else logp.view(shape)
