"""Token log-probs of a head, and their gradient for any loss that follows (forward, frozen, kept, recompute, live).

Only one chunk of logits exists at a time. `strategy` describes the strategies.
"""

from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.head.grads import InputGrads, fake_grads, is_batched, restore, scale_rows
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
from cpo_kernels.head.label_remainder import product_dx
from cpo_kernels.head.live import (
    KeptSets,
    LiveDx,
    LiveSets,
    LiveTensors,
    fake_live_tensors,
    filtered_chunk,
    no_live_tensors,
    no_sums,
    over_shards,
)
from cpo_kernels.head.live_backward import live_backward
from cpo_kernels.head.recompute import second_pass
from cpo_kernels.head.relative import is_relative
from cpo_kernels.head.strategy import UNSTORED_ROWS, even_rows, row_stride
from cpo_kernels.library import fake_token_logps, functional_op, refuse_double_backward
from cpo_kernels.ops.token_logps import HeadOptions, TokenExtras, entropy_grads, split_entropy, token_extras


class TokenArgs(NamedTuple):
    """Arguments of `linear_token_logps_op` besides the head's tensors."""

    row_index: Tensor  # [n] positions of the rows, or [0]
    ref_hidden: Tensor  # [M, H] or [0]
    options: HeadOptions
    extras: bool
    want_dx: bool
    trains_head: bool
    keep_rows: int  # also return the logits for backward, if there are at most that many rows
    keep_live: bool  # also return the live sets, from which backward computes all gradients
    execution: Execution


class HeadLogps(NamedTuple):
    logps: RowLogps  # at all positions
    dx: Tensor  # [M, H] for an incoming gradient of 1, or [0]; see `_empty_dx`
    filter_sums: Tensor  # [3] of `Found.filter_sums`; 0 without a filter
    kept: Tensor  # [n, V] the logits of all rows, or [0, V]
    live: LiveTensors


def _empty_dx(x: Tensor, weight: Tensor, args: TokenArgs) -> Tensor:
    """dX of the rows x [n, H], not yet written, or [0].

    In `Execution.dx_dtype`, but beside a frozen head in 16 bit: its exact dX is rounded twice too, and float32 at all
    positions would be most of the memory (3,202 labelled rows of 8,192 took 69 MiB beyond gradients in place of 58).
    """
    if not args.want_dx:
        return x.new_empty(0)
    return torch.empty_like(x, dtype=args.execution.dx_dtype(weight) if args.trains_head else x.dtype)


def _fake_forward(tensors: HeadTensors, args: TokenArgs) -> HeadLogps:
    hidden = tensors.hidden
    logp, lse, extra = fake_token_logps(hidden, args.extras)
    dx = _empty_dx(hidden, tensors.weight, args)
    live = fake_live_tensors(hidden) if args.keep_live else no_live_tensors(hidden)
    lacks = logp.new_empty(logp.shape if is_relative(hidden.dtype) else 0)
    logps = RowLogps(logp, lse, extra, logp.new_empty(args.ref_hidden.shape[0]), lacks)
    kept = hidden.new_empty(0, tensors.weight.shape[0])  # fake tensors and torch.compile keep none
    return HeadLogps(logps, dx, no_sums(hidden), kept, live)


@functional_op("linear_token_logps", fake=_fake_forward, waits=True)
def linear_token_logps_op(tensors: HeadTensors, args: TokenArgs) -> HeadLogps:
    execution, size, shared = args.execution, tensors.hidden.shape[0], args.ref_hidden.numel() > 0
    rows = labelled_rows(tensors, args.options.ignore_index, args.row_index)
    count = rows.x.shape[0]
    keep, pieces = count <= args.keep_rows, execution.pieces(count)
    max_rows = count if keep else pieces[0].stop
    only_logps = not (keep or args.want_dx or args.keep_live or args.extras)
    if only_logps and execution.skips_logits(tensors.weight, args.options):
        pieces, max_rows = execution.pieces(count, UNSTORED_ROWS), 0
    elif shared:
        max_rows = max(max_rows, min(2 * count, execution.limits.chunk))
    whole = args.execution.head(tensors, rows.labels, args.options, max_rows)
    ref_x = rows.gather(args.ref_hidden) if shared else None
    dx = _empty_dx(rows.x, tensors.weight, args)
    parts: list[RowLogps] = []
    filtered = execution.filter_eps > 0 and (args.want_dx or args.keep_live)
    filter_sums, live, live_dx = no_sums(rows.x), KeptSets(rows.x, count), LiveDx(whole, count)
    for part in pieces:
        inputs = rows.x[part], rows.labels[part], args.extras, None if ref_x is None else ref_x[part]
        head = whole.at(part) if keep and len(pieces) > 1 else whole
        if filtered:
            kept_sets = live if args.keep_live else None
            logps, sums = filtered_chunk(head, inputs, execution, dx[part], live_dx, kept_sets)
            filter_sums += sums
        elif args.want_dx:
            g, logps = head.fused(*inputs)
            product_dx(head, g, inputs[1], logps.logp, torch.ones_like(logps.logp), dx[part])
        elif keep:
            _, logps = head.forward(*inputs)
        else:
            logps = head.logps(*inputs)
        parts.append(logps)
    live_dx.write()
    logp, lse, extra, ref_logp, lacks = RowLogps.joined(parts)
    extra = rows.scatter(extra.t(), size).t().contiguous() if args.extras else extra
    dx = rows.scatter(dx, size) if args.want_dx else dx
    ref_logp = rows.scatter(ref_logp, size) if shared else ref_logp
    lacks = rows.scatter(lacks, size) if is_relative(rows.x.dtype) else lacks
    logps = RowLogps(rows.scatter(logp, size), rows.scatter(lse, size), extra, ref_logp, lacks)
    filter_sums = over_shards(head, filter_sums) if filtered else filter_sums
    kept = whole.rows(count) if keep else whole.buffer.new_empty(0, tensors.weight.shape[0])
    return HeadLogps(logps, dx, filter_sums, kept, live.tensors())


class BackwardArgs(NamedTuple):
    """Arguments of `linear_token_logps_backward_op` besides the head's tensors."""

    row_index: Tensor  # [n] positions of the rows, or [0]
    lse: Tensor  # [M]
    lacks: Tensor  # [M] or [0]
    grad: Tensor  # [M]
    entropies: Tensor  # [2, M] incoming gradients of the entropies, and the entropies; or [0]
    options: HeadOptions
    needs: Needs
    live: LiveTensors  # from the forward pass, if it kept them
    from_live: bool
    execution: Execution


def _head_grads(tensors: HeadTensors, args: BackwardArgs, kept: Tensor | None = None) -> InputGrads:
    """The vector-Jacobian product of `linear_token_logps` from recomputed logits or from kept ones, which are
    overwritten; or from live sets."""
    execution, needs = args.execution, args.needs
    rows = labelled_rows(tensors, args.options.ignore_index, args.row_index)
    lse, grad = rows.gather(args.lse), rows.gather(args.grad)
    lacks = rows.gather(args.lacks) if args.lacks.numel() else args.lacks
    limit = execution.limits.chunk if args.from_live else execution.limits.budget
    most = even_rows(rows.x.shape[0], limit) if kept is None else 0
    head = execution.head(tensors, rows.labels, args.options, most)
    if args.from_live:
        sets = LiveSets.of(args.live, rows.x.shape[0], execution.set_rows)
        grads = live_backward(head, sets, rows.x, rows.labels, lse, lacks, grad, needs)
    else:
        entropies = rows.gather(args.entropies.t()).t().contiguous() if args.entropies.numel() else None
        grads = second_pass(head, rows.x, rows.labels, lse, lacks, grad, needs, entropies, kept)
    dx = rows.scatter(scale_rows(grads.dx, grads.coef), tensors.hidden.shape[0]) if needs.dx else grads.dx
    return InputGrads(dx, restore(grads.dw, grads.power), grads.db.to(tensors.weight.dtype))


@functional_op("linear_token_logps_backward", fake=lambda tensors, args: fake_grads(tensors, args.needs), waits=True)
def linear_token_logps_backward_op(tensors: HeadTensors, args: BackwardArgs) -> InputGrads:
    return _head_grads(tensors, args)


class _Kept:
    """Logits that wait for their backward pass, until they are taken or the graph is freed.

    They are no saved tensors: what is saved must not depend on the bytes held, or torch.utils.checkpoint would find
    other tensors when it runs the forward pass again. There is no lock: the garbage collector may free a graph, and run
    `__del__`, between any two instructions, also of a thread that holds one. Each step on the dict is atomic.
    """

    logits: ClassVar[dict[int, Tensor]] = {}  # by id of their _Kept

    def __init__(self, logits: Tensor) -> None:
        self.logits[id(self)] = logits

    def take(self) -> Tensor | None:
        """The logits, once."""
        return self.logits.pop(id(self), None)

    __del__ = take

    @classmethod
    def bytes(cls, device: torch.device) -> int:
        """Held on the device, over all calls."""
        return sum(t.numel() * t.element_size() for t in list(cls.logits.values()) if t.device == device)


class LinearTokenLogps(torch.autograd.Function):
    """`frozen` heads, and those whose dX only is filtered, save dX for an incoming gradient of 1; `kept` saves the
    logits, `live` the live gradients; `recompute` computes the logits again in backward, and so does a second backward
    of `kept`, whose first one overwrites them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, args: TokenArgs
    ) -> tuple[Tensor, ...]:
        tensors = HeadTensors(hidden, weight, bias, labels)
        logps, dx, filter_sums, kept, live = linear_token_logps_op(tensors, args)
        ctx.args = args.options, args.execution, args.keep_live
        ctx.made_dx, ctx.extras, ctx.dtype = args.want_dx, args.extras, hidden.dtype
        ctx.kept = _Kept(kept) if kept.shape[0] else None
        entropy, extra = split_entropy(logps.extra)
        for_head = (hidden, weight, bias, args.row_index, logps.lse, logps.lacks, entropy, *live)
        only_dx = args.want_dx and not any(ctx.needs_input_grad[1:3]) and not args.extras
        ctx.save_for_backward(dx, labels, *(() if only_dx else for_head))
        rest = extra, logps.ref_logp, filter_sums, *live  # torch.compile must see tensors of unknown sizes
        ctx.mark_non_differentiable(*rest, *([] if args.extras else [entropy]))
        ctx.set_materialize_grads(False)  # None instead of zeros for an output without a gradient
        return logps.logp, entropy, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """If the entropy has a gradient, all gradients come from recomputed logits, whatever forward has saved."""
        refuse_double_backward()
        of_entropy = of_entropy if ctx.extras else None  # torch.compile passes zeros for it
        if grad is None and of_entropy is None:
            return (None,) * 5
        made_dx, labels, *saved = ctx.saved_tensors
        ignored = labels == ctx.args[0].ignore_index  # their incoming gradients are dropped, even NaN
        grad, of_entropy = (g if g is None else g.masked_fill(ignored, 0.0) for g in (grad, of_entropy))
        needs, made = Needs(*ctx.needs_input_grad[:3]), ctx.made_dx and of_entropy is None
        grads: list[Tensor | None] = [None, None, None]
        if needs.dx and made and grad is not None:
            grads[0] = scale_rows(made_dx, grad, ctx.dtype)
        if needs.head or not made:
            options, execution, from_live = ctx.args
            needs = needs._replace(dx=needs.dx and not made)
            hidden, weight, bias, index, lse, lacks, entropy, *live = saved
            grad, entropies = entropy_grads(lse, grad, of_entropy, entropy)
            from_live = from_live and of_entropy is None
            args = BackwardArgs(
                index, lse, lacks, grad, entropies, options, needs, LiveTensors(*live), from_live, execution
            )
            tensors = HeadTensors(hidden, weight, bias, labels)
            kept = ctx.kept.take() if ctx.kept and not is_batched(grad, entropies) else None
            if kept is None:
                out = linear_token_logps_backward_op(tensors, args)
            else:
                with torch.autocast(kept.device.type, enabled=False):
                    out = _head_grads(tensors, args, kept)
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
    """From validated inputs: logp [M] (differentiable), extra [4, M] (its first row differentiable) or [0],
    ref_logp [M] or [0], and filter_sums [3]."""
    tensors, needs = inputs.tensors, inputs.needs
    ref_hidden = tensors.weight.new_empty(0) if ref_hidden is None else ref_hidden
    index = tensors.labels.new_empty(0) if index is None else index
    want_dx = needs.dx and (not needs.head or inputs.filter_eps > 0) and not inputs.keeps_live_sets
    if extras and torch.compiler.is_compiling():  # backward then gets a gradient of the entropy, zeros at times
        want_dx = False
    keep_rows, weight = 0, inputs.tensors.weight
    # torch.compile's graphs cannot know whether kept logits have been overwritten.
    if needs.head and not inputs.keeps_live_sets and not torch.compiler.is_compiling():
        row_bytes = row_stride(inputs.width, weight.dtype, weight.device) * weight.element_size()
        held = _Kept.bytes(weight.device) if inputs.shards is None else 0  # ranks must agree
        keep_rows = max(0, inputs.limits.budget - -(-held // row_bytes))
    execution = inputs.execution(impl)
    kept = keep_rows, inputs.keeps_live_sets
    args = TokenArgs(index, ref_hidden, inputs.options, extras, want_dx, needs.head, *kept, execution)
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

    The gradient is the true vector-Jacobian product for any upstream gradient. It takes 2 matrix products in all if
    weight and bias are frozen and 3 if they are trained, on chunks of logits. Logits of a trained head that exceed
    `memory_budget` are computed twice (4 products), and so are all under torch.compile. `linear_nll` needs 3 for any
    size; `FusedLinearCPOLoss` and `FusedLinearKTOLoss` if the logits of linked pairs, or of a response, fit.

    Args:
        hidden: [..., H], already shifted: position t predicts label t.
        weight: [V, H], in the dtype of `hidden` (under autocast both are cast).
        labels: [...] int64; positions equal to `ignore_index` give exactly 0 and no gradient, and cost nothing.
        bias: [V] or None.
        softcap, scale, vocab_size, extras, impl: see `token_logps`.
        index: [n] int64, the positions in `labels.flatten()` that have a label, in ascending order. A collator knows
            them; computing them here forces a host-device synchronisation on a GPU. Positions without a label may be
            included and count as ignored: for a CUDA graph whose labels change, give all positions.
        memory_budget: bytes of logits held at a time; if the head is trained, also of those that wait for a backward
            pass, over all calls. By default 320 MiB on a CPU and 1 GiB on a GPU; chunks of a frozen head on a CPU are
            smaller.
        vocab_shards: the head is vocabulary-sharded: weight [V_r, H] and bias [V_r] are this rank's rows; hidden,
            labels and the result are the same on every rank of the group. DTensors need no vocab_shards: hidden
            Replicate, or Shard over tokens (sequence parallel), with weight Shard(0) on the same mesh; labels are
            complete. A DTensor weight with plain hidden states is gathered once, and its gradient averaged over the
            mesh, as FSDP2 does.
        filter_eps: None for exact gradients. With a number, the gradient of `hidden` is computed only in the columns of
            the vocabulary where one of 128 consecutive rows has |onehot - softmax| >= filter_eps (under a softcap,
            times 1 - tanh^2); one mean column replaces the others. Log-probs stay exact. "auto" is 2^-15.25 in
            bfloat16, where the error of dX on real text grows to 1.1 times that of exact gradients, and exact gradients
            in other dtypes. See `reference.live_columns`.
        filter_head_grad: filter the gradients of weight and bias as well: 1 + 2 L products in all, with a share L of
            live columns (on real rows of SmolLM2-135M 0.19 at 2^-15.25, 0.07 at 2^-12). Rows of the weight that are
            never live get a gradient that is right on average only, and Adam divides by its magnitude.

    Returns:
        [...] float32 (float64 for float64 input); with `extras` a pair of it and `TokenExtras`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; on the CPU also a label outside [0, vocab_size).
        RuntimeError: a backend requested by name that is not available; double backward.
    """
    config = HeadConfig(ignore_index, softcap, scale, vocab_size, memory_budget, filter_eps, filter_head_grad)
    inputs = head_inputs(hidden, weight, labels, bias, config, vocab_shards)
    dispatch.resolve_impl(impl, hidden.device)
    check_index(index, labels, ignore_index)
    logp, extra, *_ = token_logps_of(inputs, extras, impl, index)
    shape = labels.shape
    return (logp.view(shape), token_extras(extra, shape)) if extras else logp.view(shape)
