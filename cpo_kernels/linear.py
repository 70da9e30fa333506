"""The language-model head: token log-probs, their gradients and the NLL from hidden states.

Logits of one chunk of rows exist at a time. Products go to the vendor's library, the kernels of `ops` do everything
between them in place. Rows without a label are dropped before the first product. `planner` names the strategies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import ops
from cpo_kernels.checks import check_types
from cpo_kernels.ops import functional_op, refuse_double_backward
from cpo_kernels.planner import budget_rows, chunks, even_rows
from cpo_kernels.sharded import VocabShards, local_head

WEIGHT_SLAB = 8192  # vocabulary rows of dW accumulated at a time when several chunks add up in 16 bit


@dataclass
class Rows:
    """The rows of a batch that are projected, in the order in which the chunks take them."""

    index: Tensor  # [n] positions in the full layout
    x: Tensor  # [n, H]
    labels: Tensor  # [n]
    full: bool  # every position is a row, in order: index is the identity

    def gather(self, values: Tensor) -> Tensor:
        """[M, ...] -> [n, ...]"""
        return values.contiguous() if self.full else values.index_select(0, self.index)

    def scatter(self, values: Tensor, size: int) -> Tensor:
        """[n, ...] -> [size, ...] with zeros at the positions that are not rows."""
        if self.full:
            return values
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, self.index, values)


def gather_rows(hidden: Tensor, labels: Tensor, index: Tensor, full: bool) -> Rows:
    if full:
        return Rows(index, hidden.contiguous(), labels, True)
    return Rows(index, hidden.index_select(0, index), labels.index_select(0, index), False)


def labelled_index(labels: Tensor, ignore_index: int, count: int) -> Tensor:
    """[count] positions of the labels; their number is known, so the host does not wait for it."""
    return torch.nonzero_static(labels != ignore_index, size=count).squeeze(1)


def labelled_rows(hidden: Tensor, labels: Tensor, ignore_index: int, index: Tensor) -> Rows:
    """The rows at `index` [n]; where that is [0] the labelled ones, whose number the host waits for."""
    if not index.numel():
        index = (labels != ignore_index).nonzero().squeeze(1)
    return gather_rows(hidden, labels, index, index.shape[0] == labels.shape[0])


def power_of_two(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two below max|values| where `dtype` is float16, else 1: bfloat16 has float32's range.

    Coefficients of 1e-3 would flush to zero in float16, and the GradScaler's factor is not known in the forward pass.
    """
    one = values.new_ones(())
    if dtype != torch.float16 or not values.numel():
        return one
    top = values.abs().amax()
    return torch.where(top > 0, torch.exp2(torch.floor(torch.log2(top))), one)


@cache
def multiplies_into_float32(device: torch.device) -> bool:
    """Whether torch.addmm(..., out_dtype=float32) adds a bfloat16 product to a float32 matrix in place here.

    Asked of the device once, with numbers whose sums bfloat16 cannot hold: CUDA has it, the CPU and some ROCm builds
    raise.
    """
    if device.type == "cpu":
        return False
    a = torch.full((16, 16), 1.0, device=device, dtype=torch.bfloat16)
    sums = torch.full((16, 16), 1025.0, device=device)
    try:
        torch.addmm(sums, a.t(), a, out_dtype=torch.float32, out=sums)
        return bool((sums == 1041.0).all() and (torch.mm(a.t(), a, out_dtype=torch.float32) == 16.0).all())
    except (RuntimeError, TypeError):
        return False


class WeightGrad:
    """dW = sum over chunks of G^T (c * x), db = sum of G^T c, with dW kept divided by `power`.

    One chunk is one product in the weight's dtype. Several chunks add up in float32 (float64 for float64): a bfloat16
    accumulator biases training. Where the device multiplies 16 bit into float32 the product itself adds.
    """

    def __init__(self, weight: Tensor, num_chunks: int, need_dw: bool, need_db: bool) -> None:
        acc = ops.acc_dtype(weight.dtype)
        self.dtype, self.single, self.need_dw, self.need_db = weight.dtype, num_chunks == 1, need_dw, need_db
        dtype = self.dtype if self.single else acc
        self.dw = weight.new_empty(weight.shape if need_dw else 0, dtype=dtype)
        if num_chunks == 0:
            self.dw.zero_()
        self.db = weight.new_zeros(weight.shape[0] if need_db else 0, dtype=acc)
        self.power = weight.new_ones((), dtype=acc)
        self.first = True

    def add(self, g: Tensor, x: Tensor, coef: Tensor) -> None:
        """g [n, V] = (onehot - softmax) * dz/du, x [n, H], coef [n] in float32."""
        power = power_of_two(coef, g.dtype)
        coef = coef / power
        if self.need_db:
            self.db += torch.mv(g.t(), coef.to(g.dtype)).to(self.db.dtype) * power
        if not self.need_dw:
            return
        scaled = scale_rows(x, coef)  # [n, H]
        if g.dtype == self.dw.dtype:
            if self.first:
                torch.mm(g.t(), scaled, out=self.dw)
                self.power = power
            else:
                torch.addmm(self.dw, g.t(), scaled, out=self.dw)
        elif g.dtype == torch.bfloat16 and multiplies_into_float32(g.device):
            if self.first:
                torch.mm(g.t(), scaled, out_dtype=torch.float32, out=self.dw)
            else:
                torch.addmm(self.dw, g.t(), scaled, out_dtype=torch.float32, out=self.dw)
        else:
            # A slab of the 16-bit product stays in the cache until it is added: 832 x 896 x 151936 in bfloat16 took
            # 208 ms with the addition, 228 ms as one product without it (2 cores, medians of 5 in one run).
            for low in range(0, g.shape[1], WEIGHT_SLAB):
                slab = slice(low, low + WEIGHT_SLAB)
                product = torch.mm(g[:, slab].t(), scaled)
                if g.dtype == torch.float16:
                    product = product.float() * power
                self.dw[slab].copy_(product) if self.first else self.dw[slab].add_(product)
        self.first = False

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dW / power in the weight's dtype, db in float32, power."""
        if self.dw.dtype != self.dtype and self.dw.numel():
            self.power = power_of_two(self.dw, self.dtype)
            self.dw = (self.dw / self.power if self.dtype == torch.float16 else self.dw).to(self.dtype)
        return self.dw, self.db, self.power


class Head:
    """One head during one op: makes the logits of a chunk in a buffer of `max_rows` that all chunks share."""

    def __init__(self, weight: Tensor, bias: Tensor, options: Sequence[Any], max_rows: int, impl: str) -> None:
        self.weight, self.bias, self.options = weight, bias, tuple(options)
        self.kernels = ops.kernels(impl, weight)
        self.buffer = weight.new_empty(max_rows, weight.shape[0])

    def logits(self, x: Tensor) -> Tensor:
        """[n, H] -> [n, V], valid until the next call."""
        out = self.buffer[: x.shape[0]]
        if self.bias.numel():
            return torch.addmm(self.bias, x, self.weight.t(), out=out)
        return torch.mm(x, self.weight.t(), out=out)

    def with_reference(self, x: Tensor, labels: Tensor, ref: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [n, V] of x, and log-probs [n] of a reference model's rows through the same head ([0] without).

        One product for both where the buffer holds them: few rows do not fill the device, many do by themselves.
        """
        n = x.shape[0]
        if ref is None:
            return self.logits(x), self.weight.new_empty(0, dtype=ops.acc_dtype(self.weight.dtype))
        if 2 * n <= self.buffer.shape[0]:
            both = self.logits(torch.cat([x, ref]))
            return both[:n], self.kernels.token_logps_fwd(both[n:], labels, *self.options, False)[0]
        ref_logp = self.kernels.token_logps_fwd(self.logits(ref), labels, *self.options, False)[0]
        return self.logits(x), ref_logp

    def forward(self, x: Tensor, labels: Tensor, extras: bool = False, ref: Tensor | None = None) -> tuple[Tensor, ...]:
        """(logp, lse, extra, ref_logp)"""
        z, ref_logp = self.with_reference(x, labels, ref)
        return *self.kernels.token_logps_fwd(z, labels, *self.options, extras), ref_logp

    def fused(self, x: Tensor, labels: Tensor, extras: bool = False, ref: Tensor | None = None) -> tuple[Tensor, ...]:
        """(g, logp, lse, extra, ref_logp) with g = (onehot - softmax) * dz/du in the buffer."""
        g, ref_logp = self.with_reference(x, labels, ref)
        return g, *self.kernels.token_logps_fused_(g, labels, *self.options, extras), ref_logp

    def again(self, x: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
        """g from logits made a second time, with the log-sum-exp of the first."""
        g = self.logits(x)
        self.kernels.token_logps_bwd_(g, labels, lse, torch.ones_like(lse), *self.options)
        return g


def multiply(values: Tensor, factor: Tensor) -> Tensor:
    """values * factor in the dtype of `values`, multiplied in float32 (float64) and rounded once."""
    if values.device.type == "cpu" or torch.compiler.is_compiling():
        return (values * factor.to(ops.acc_dtype(values.dtype))).to(values.dtype)
    return torch.mul(values, factor.view(-1, 1), out=torch.empty_like(values))  # one pass, no float32 copy


def scale_rows(dx: Tensor, coef: Tensor) -> Tensor:
    """Row t of dx times coef_t."""
    return multiply(dx, coef[:, None])


# ------------------------------------------------------------------------------- log-probs: forward, frozen, recompute


@functional_op("linear_token_logps")
def linear_token_logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    index: Tensor,
    ref_hidden: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    extras: bool,
    want_dx: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [M, H], labels [M], index [n] of the rows or [0], ref_hidden [M, H] or [0].

    Returns logp [M], lse [M], extra [4, M] or [0], dx [M, H] or [0] (for an incoming gradient of 1) and ref_logp [M]
    or [0], the log-probs of ref_hidden through the same head.
    """
    acc, size, shared = ops.acc_dtype(hidden.dtype), hidden.shape[0], ref_hidden.numel() > 0
    rows = labelled_rows(hidden, labels, ignore_index, index)
    count = rows.x.shape[0]
    step = even_rows(count, row_limit)
    max_rows = min(2 * step, row_limit) if shared and count else min(step, count)
    head = Head(weight, bias, (ignore_index, scale, softcap, vocab_size), max_rows, impl)
    logp, lse = (rows.x.new_empty(count, dtype=acc) for _ in range(2))
    ref_x, ref_logp = (rows.gather(ref_hidden) if shared else None), logp.new_empty(count if shared else 0)
    extra = rows.x.new_empty((count, 4) if extras else (0,), dtype=acc)
    dx = torch.empty_like(rows.x) if want_dx else rows.x.new_empty(0)
    for low, high in chunks(count, step):
        part = slice(low, high)
        inputs = rows.x[part], rows.labels[part], extras, None if ref_x is None else ref_x[part]
        if want_dx:
            g, logp[part], lse[part], seen, ref_part = head.fused(*inputs)
            torch.mm(g, weight, out=dx[part])
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
    acc, size = ops.acc_dtype(hidden.dtype), hidden.shape[0]
    extra = hidden.new_empty((4, size) if extras else (0,), dtype=acc)
    dx = hidden.new_empty(hidden.shape if want_dx else (0,))
    logp, lse = (hidden.new_empty(size, dtype=acc) for _ in range(2))
    return logp, lse, extra, dx, hidden.new_empty(ref_hidden.shape[0], dtype=acc)


@functional_op("linear_token_logps_backward")
def linear_token_logps_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    index: Tensor,
    lse: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The vector-Jacobian product of `linear_token_logps` from recomputed logits."""
    size = hidden.shape[0]
    rows = labelled_rows(hidden, labels, ignore_index, index)
    count = rows.x.shape[0]
    lse, grad = rows.gather(lse), rows.gather(grad)
    step = even_rows(count, row_limit)
    head = Head(weight, bias, (ignore_index, scale, softcap, vocab_size), min(step, count), impl)
    sums = WeightGrad(weight, len(chunks(count, step)), need_dw, need_db)
    dx = torch.empty_like(rows.x) if need_dx else rows.x.new_empty(0)
    for low, high in chunks(count, step):
        part = slice(low, high)
        g = head.again(rows.x[part], rows.labels[part], lse[part])
        if need_dx:
            dx[part] = scale_rows(torch.mm(g, weight), grad[part])
        sums.add(g, rows.x[part], grad[part])
    dw, db, power = sums.result()
    return rows.scatter(dx, size) if need_dx else dx, _restore(dw, power), db.to(weight.dtype)


@torch.library.register_fake("cpo_kernels::linear_token_logps_backward")
def _(hidden, weight, bias, labels, index, lse, grad, i, s, c, v, need_dx, need_dw, need_db, row_limit, impl):
    return _fake_grads(hidden, weight, need_dx, need_dw, need_db)


def _fake_grads(hidden: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, need_db: bool):
    return (
        hidden.new_empty(hidden.shape if need_dx else (0,)),
        weight.new_empty(weight.shape if need_dw else (0,)),
        weight.new_empty(weight.shape[0] if need_db else 0),
    )


def _restore(value: Tensor, factor: Tensor) -> Tensor:
    """value * factor without the pass over V*H where the factor is 1: free to know on the CPU."""
    if not torch.compiler.is_compiling() and factor.device.type == "cpu" and float(factor) == 1.0:
        return value
    return multiply(value, factor)


class _LinearTokenLogps(torch.autograd.Function):
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


# ------------------------------------------------------------------------------------------------------------- the NLL


@functional_op("linear_nll")
def linear_nll_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    index: Tensor,
    token_weights: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    num_tokens: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], dX unscaled [M, H], its coefficients [M], dW up to a power of two, db in float32, that power []."""
    size = hidden.shape[0]
    rows = labelled_rows(hidden, labels, ignore_index, index)
    count = rows.x.shape[0]
    step = even_rows(count, row_limit)
    head = Head(weight, bias, (ignore_index, scale, softcap, vocab_size), min(step, count), impl)
    labelled = rows.labels != ignore_index
    weights = labelled.to(ops.acc_dtype(hidden.dtype))
    if token_weights.numel():
        weights = torch.where(labelled, rows.gather(token_weights), 0.0)
    coef = -weights / (num_tokens if num_tokens > 0 else labelled.sum().clamp(min=1))
    sums = WeightGrad(weight, len(chunks(count, step)), need_dw, need_db)
    dx = torch.empty_like(rows.x) if need_dx else rows.x.new_empty(0)
    loss = coef.new_zeros((), dtype=torch.float64)
    for low, high in chunks(count, step):
        part = slice(low, high)
        g, logp, *_ = head.fused(rows.x[part], rows.labels[part])
        loss += torch.dot(coef[part].double(), logp.double())
        if need_dx:
            torch.mm(g, weight, out=dx[part])
        sums.add(g, rows.x[part], coef[part])
    dx = rows.scatter(dx, size) if need_dx else dx
    return loss.to(coef.dtype), dx, rows.scatter(coef, size), *sums.result()


@torch.library.register_fake("cpo_kernels::linear_nll")
def _(hidden, weight, bias, labels, index, token_weights, i, s, c, v, n, need_dx, need_dw, need_db, row_limit, impl):
    acc = ops.acc_dtype(hidden.dtype)
    return hidden.new_empty((), dtype=acc), *fake_known_loss(hidden, weight, need_dx, need_dw, need_db)


def fake_known_loss(
    hidden: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of what `known_loss_grads` takes: dX, coefficients, dW, db, power."""
    acc = ops.acc_dtype(hidden.dtype)
    dx, dw, db = _fake_grads(hidden, weight, need_dx, need_dw, need_db)
    return dx, hidden.new_empty(hidden.shape[0], dtype=acc), dw, db.to(acc), hidden.new_empty((), dtype=acc)


def known_loss_grads(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a loss whose dX (unscaled), coefficients, dW and db were made in the forward pass.

    Nothing that was saved is written; where the incoming gradient is 1 the saved dW itself is the result, which
    autograd copies only if the graph is retained.
    """
    refuse_double_backward()
    dx, coef, dw, db, power = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    return (
        scale_rows(dx, coef * grad_loss) if need_dx else None,
        _restore(dw, power * grad_loss) if need_dw else None,
        (db * grad_loss).to(dw.dtype) if need_db else None,
    )


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


# ---------------------------------------------------------------------------------------------------------- public door


@dataclass(frozen=True)
class HeadInputs:
    """Checked inputs of the head, flattened to rows, and what of them wants a gradient."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H], with shards this rank's rows of it
    bias: Tensor  # [V] or [0]
    labels: Tensor  # [M]
    options: ops.HeadOptions
    row_limit: int
    width: int  # columns of logits for which row_limit was made: V, or the largest shard's
    shards: VocabShards | None

    def home(self, impl: str) -> str:
        """Where the kernels of this head are."""
        return impl if self.shards is None else self.shards.home(impl)

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        tensors = (self.hidden, self.weight, self.bias)
        return tuple(torch.is_grad_enabled() and t.requires_grad for t in tensors)  # type: ignore[return-value]

    @property
    def train_head(self) -> bool:
        return self.needs[1] or self.needs[2]


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
    memory_budget: int | None,
    vocab_shards: VocabShards | None = None,
) -> HeadInputs:
    """Check once, at the door; under autocast cast as F.linear would."""
    ops.refuse_transforms()
    check_types("a tensor", hidden=hidden, weight=weight, labels=labels)
    check_types("a tensor", optional=True, bias=bias)
    hidden, weight, bias, shards = local_head(hidden, weight, bias, vocab_shards)
    if weight.dim() != 2 or (weight.shape[0] == 0 and shards is None):
        raise ValueError(f"weight must have shape [V, H] with V >= 1, got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., H] with H = {weight.shape[1]}, the width of weight "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    ops.check_labels(labels, hidden.shape[:-1], "hidden", hidden.device)
    device = hidden.device.type
    named = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        ops.check_dtype(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: move one of them")
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        named = {n: t if t.dtype == torch.float64 else t.to(dtype) for n, t in named.items()}
    if len({t.dtype for t in named.values()}) != 1:
        dtypes = ", ".join(f"{n} {t.dtype}" for n, t in named.items())
        raise TypeError(f"hidden, weight and bias must share one dtype, got {dtypes}: cast them or use autocast")
    weight = named["weight"]
    width = weight.shape[0] if shards is None else max(shards.rows)
    return HeadInputs(
        named["hidden"].reshape(-1, weight.shape[1]),
        weight,
        named.get("bias", weight.new_empty(0)),
        labels.reshape(-1),
        ops.head_options(shards.vocab_size if shards else width, ignore_index, softcap, scale, vocab_size),
        budget_rows(width, weight.dtype, weight.device, memory_budget),
        width,
        shards,
    )


def token_logps_of(
    inputs: HeadInputs,
    extras: bool,
    impl: str,
    index: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    function: type[_LinearTokenLogps] = _LinearTokenLogps,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable logp [M], extra [4, M] or [0], and ref_logp [M] or [0], of checked inputs."""
    i = inputs
    index = i.labels.new_empty(0) if index is None else index
    ref_hidden = i.weight.new_empty(0) if ref_hidden is None else ref_hidden
    flags = (i.options, extras, i.needs[0], i.train_head, i.row_limit, i.home(impl))
    return function.apply(i.hidden, i.weight, i.bias, i.labels, index, ref_hidden, *flags)


def check_index(index: Tensor | None, labels: Tensor) -> None:
    if index is None:
        return
    check_types("a tensor", index=index)
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != labels.device:
        raise ValueError(
            f"index must be int64 of shape [n] on {labels.device}, got {index.dtype} {list(index.shape)} on "
            f"{index.device}"
        )
    if torch.compiler.is_compiling() or not (index.device.type == "cpu" or ops.checks_enabled()):
        return
    if bool(((index < 0) | (index >= labels.numel())).any()):
        raise ValueError(f"index must lie in [0, {labels.numel()}), got {int(index.min())} to {int(index.max())}")


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
        RuntimeError: a home asked for by name that is not there; double backward.
    """
    head = (ignore_index, softcap, scale, vocab_size, memory_budget)
    inputs = head_inputs(hidden, weight, labels, bias, *head, vocab_shards)
    ops.resolve_impl(impl, hidden.device)
    check_index(index, labels)
    logp, extra, _ = token_logps_of(inputs, extras, impl, index)
    shape = labels.shape
    return (logp.view(shape), ops.token_extras(extra, shape)) if extras else logp.view(shape)


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
        token_weights: [...] weights m_t, 1 if None.
        num_tokens: the divisor, for gradient accumulation or several processes the global number of labelled tokens;
            None counts the labels of this call.
        hidden, weight, labels, bias and the rest: see `linear_token_logps`.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 where nothing is labelled.
    """
    head = (ignore_index, softcap, scale, vocab_size, memory_budget)
    inputs = head_inputs(hidden, weight, labels, bias, *head, vocab_shards)
    ops.resolve_impl(impl, hidden.device)
    check_index(index, labels)
    check_types("a tensor", optional=True, token_weights=token_weights)
    check_types("a number", optional=True, num_tokens=num_tokens)
    if num_tokens is not None and not num_tokens > 0:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}: leave it out to count the labels")
    acc = ops.acc_dtype(inputs.hidden.dtype)
    if token_weights is None:
        weights = inputs.hidden.new_empty(0, dtype=acc)
    elif token_weights.shape != labels.shape:
        raise ValueError(f"token_weights must have shape {tuple(labels.shape)}, got {tuple(token_weights.shape)}")
    else:
        weights = token_weights.detach().reshape(-1).to(acc)
    if not inputs.train_head:
        logp, *_ = token_logps_of(inputs, False, impl, index)
        counted = (inputs.labels != inputs.options.ignore_index).sum().clamp(min=1)
        total = (logp * weights if token_weights is not None else logp).sum()
        return -total / (counted if num_tokens is None else num_tokens)
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
        i.home(impl),
    )
