"""The language-model head: token log-probs, their gradients and the NLL from hidden states.

Logits of one chunk of rows exist at a time. Products go to the vendor's library, the kernels of `ops` do everything
between them in place. Rows without a label are dropped before the first product. `planner` names the strategies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import ops
from cpo_kernels.ops import functional_op, refuse_double_backward
from cpo_kernels.planner import budget_rows, chunks, even_rows

WEIGHT_SLAB = 8192  # vocabulary rows of dW accumulated at a time when several chunks add up in 16 bit


@dataclass
class Rows:
    """The labelled rows of a batch, in the order in which the chunks take them."""

    index: Tensor  # [n] positions in the full layout
    x: Tensor  # [n, H]
    labels: Tensor  # [n]
    full: bool  # every position is labelled and in order: index is the identity

    def scatter(self, values: Tensor, size: int) -> Tensor:
        """[n, ...] -> [size, ...] with zeros at the positions that are not rows."""
        if self.full:
            return values
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, self.index, values)


def labelled_rows(hidden: Tensor, labels: Tensor, ignore_index: int, order: Tensor | None = None) -> Rows:
    """Gather the labelled rows; `order` lists them in another order than the layout's."""
    index = (labels != ignore_index).nonzero().squeeze(1) if order is None else order
    if order is None and index.shape[0] == labels.shape[0]:
        return Rows(index, hidden.contiguous(), labels, True)
    return Rows(index, hidden.index_select(0, index), labels.index_select(0, index), False)


def power_of_two(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two below max|values| where `dtype` is float16, else 1: bfloat16 has float32's range.

    Coefficients of 1e-3 would flush to zero in float16, and the GradScaler's factor is not known in the forward pass.
    """
    one = values.new_ones(())
    if dtype != torch.float16 or not values.numel():
        return one
    top = values.abs().amax()
    return torch.where(top > 0, torch.exp2(torch.floor(torch.log2(top))), one)


class WeightGrad:
    """dW = sum over chunks of G^T (c * x), db = sum of G^T c, with dW kept divided by `power`.

    One chunk is one product in the weight's dtype. Several chunks add up in float32 (float64 for float64): a bfloat16
    accumulator biases training.
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
    """One head during one op: makes the logits of a chunk in a buffer that all chunks share."""

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

    def fused(self, x: Tensor, labels: Tensor, extras: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(g, logp, lse, extra) with g = (onehot - softmax) * dz/du in the buffer."""
        g = self.logits(x)
        return g, *self.kernels.token_logps_fused_(g, labels, *self.options, extras)

    def again(self, x: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
        """g from logits made a second time, with the log-sum-exp of the first."""
        g = self.logits(x)
        self.kernels.token_logps_bwd_(g, labels, lse, torch.ones_like(lse), *self.options)
        return g


def scale_rows(dx: Tensor, coef: Tensor) -> Tensor:
    """Row t of dx times coef_t, multiplied in float32 and rounded once."""
    return (dx * coef[:, None]).to(dx.dtype)


# ------------------------------------------------------------------------------- log-probs: forward, frozen, recompute


@functional_op("linear_token_logps")
def linear_token_logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    extras: bool,
    want_dx: bool,
    row_limit: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [M, H] -> logp [M], lse [M], extra [4, M] or [0], dx [M, H] or [0] (for an incoming gradient of 1)."""
    acc, size = ops.acc_dtype(hidden.dtype), hidden.shape[0]
    rows = labelled_rows(hidden, labels, ignore_index)
    count = rows.x.shape[0]
    step = even_rows(count, row_limit)
    head = Head(weight, bias, (ignore_index, scale, softcap, vocab_size), min(step, count), impl)
    logp, lse = (rows.x.new_empty(count, dtype=acc) for _ in range(2))
    extra = rows.x.new_empty((count, 4) if extras else (0,), dtype=acc)
    dx = torch.empty_like(rows.x) if want_dx else rows.x.new_empty(0)
    for low, high in chunks(count, step):
        part = slice(low, high)
        if want_dx:
            g, logp[part], lse[part], seen = head.fused(rows.x[part], rows.labels[part], extras)
            torch.mm(g, weight, out=dx[part])
        else:
            z = head.logits(rows.x[part])
            logp[part], lse[part], seen = head.kernels.token_logps_fwd(z, rows.labels[part], *head.options, extras)
        if extras:
            extra[part] = seen.t()
    extra = rows.scatter(extra, size).t().contiguous() if extras else extra
    return rows.scatter(logp, size), rows.scatter(lse, size), extra, rows.scatter(dx, size) if want_dx else dx


@linear_token_logps_op.register_fake
def _(hidden, weight, bias, labels, i, s, c, v, extras, want_dx, row_limit, impl):
    acc, size = ops.acc_dtype(hidden.dtype), hidden.shape[0]
    extra = hidden.new_empty((4, size) if extras else (0,), dtype=acc)
    dx = hidden.new_empty(hidden.shape if want_dx else (0,))
    return hidden.new_empty(size, dtype=acc), hidden.new_empty(size, dtype=acc), extra, dx


@functional_op("linear_token_logps_backward")
def linear_token_logps_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
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
    rows = labelled_rows(hidden, labels, ignore_index)
    count = rows.x.shape[0]
    lse, grad = (t if rows.full else t.index_select(0, rows.index) for t in (lse, grad))
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


@linear_token_logps_backward_op.register_fake
def _(hidden, weight, bias, labels, lse, grad, i, s, c, v, need_dx, need_dw, need_db, row_limit, impl):
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
    return (value * factor.to(ops.acc_dtype(value.dtype))).to(value.dtype)


class _LinearTokenLogps(torch.autograd.Function):
    """`frozen` keeps dX for an incoming gradient of 1; `recompute` keeps the log-sum-exp and makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, head, extras, train_hidden, train_head, row_limit, impl):
        frozen = train_hidden and not train_head
        logp, lse, extra, dx = linear_token_logps_op(
            hidden, weight, bias, labels, *head, extras, frozen, row_limit, impl
        )
        ctx.frozen, ctx.head, ctx.row_limit, ctx.impl = frozen, head, row_limit, impl
        ctx.save_for_backward(*((dx,) if frozen else (hidden, weight, bias, labels, lse)))
        ctx.mark_non_differentiable(extra)
        return logp, extra

    @staticmethod
    def backward(ctx, grad, _):
        refuse_double_backward()
        if ctx.frozen:
            return scale_rows(ctx.saved_tensors[0], grad), *(None,) * 9
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = linear_token_logps_backward_op(
            hidden, weight, bias, labels, lse, grad, *ctx.head, *needs, ctx.row_limit, ctx.impl
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7


# ------------------------------------------------------------------------------------------------------------- the NLL


@functional_op("linear_nll")
def linear_nll_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
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
    rows = labelled_rows(hidden, labels, ignore_index)
    count = rows.x.shape[0]
    step = even_rows(count, row_limit)
    head = Head(weight, bias, (ignore_index, scale, softcap, vocab_size), min(step, count), impl)
    weights = rows.x.new_ones(count, dtype=ops.acc_dtype(hidden.dtype))
    if token_weights.numel():
        weights *= token_weights if rows.full else token_weights.index_select(0, rows.index)
    coef = -weights / (num_tokens if num_tokens > 0 else max(count, 1))
    sums = WeightGrad(weight, len(chunks(count, step)), need_dw, need_db)
    dx = torch.empty_like(rows.x) if need_dx else rows.x.new_empty(0)
    loss = coef.new_zeros((), dtype=torch.float64)
    for low, high in chunks(count, step):
        part = slice(low, high)
        g, logp, _, _ = head.fused(rows.x[part], rows.labels[part])
        loss += torch.dot(coef[part].double(), logp.double())
        if need_dx:
            torch.mm(g, weight, out=dx[part])
        sums.add(g, rows.x[part], coef[part])
    dx = rows.scatter(dx, size) if need_dx else dx
    return loss.to(coef.dtype), dx, rows.scatter(coef, size), *sums.result()


@linear_nll_op.register_fake
def _(hidden, weight, bias, labels, token_weights, i, s, c, v, n, need_dx, need_dw, need_db, row_limit, impl):
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
    def forward(ctx, hidden, weight, bias, labels, token_weights, head, num_tokens, needs, row_limit, impl):
        loss, *saved = linear_nll_op(
            hidden, weight, bias, labels, token_weights, *head, num_tokens, *needs, row_limit, impl
        )
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return *known_loss_grads(ctx, grad_loss), *(None,) * 7


# ---------------------------------------------------------------------------------------------------------- public door


@dataclass(frozen=True)
class HeadInputs:
    """Checked inputs of the head, flattened to rows, and what of them wants a gradient."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V] or [0]
    labels: Tensor  # [M]
    options: ops.HeadOptions
    row_limit: int

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
) -> HeadInputs:
    """Check once, at the door; under autocast cast as F.linear would."""
    if weight.dim() != 2 or weight.shape[0] == 0:
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
    return HeadInputs(
        named["hidden"].reshape(-1, weight.shape[1]),
        weight,
        named.get("bias", weight.new_empty(0)),
        labels.reshape(-1),
        ops.head_options(weight.shape[0], ignore_index, softcap, scale, vocab_size),
        budget_rows(weight.shape[0], weight.dtype, weight.device, memory_budget),
    )


def token_logps_of(inputs: HeadInputs, extras: bool, impl: str) -> tuple[Tensor, Tensor]:
    """Differentiable logp [M] and extra [4, M] (or [0]) of checked inputs."""
    i = inputs
    return _LinearTokenLogps.apply(
        i.hidden, i.weight, i.bias, i.labels, i.options, extras, i.needs[0], i.train_head, i.row_limit, impl
    )


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
    memory_budget: int | None = None,
    impl: str = "auto",
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
        memory_budget: bytes of logits held at a time, 320 MiB on a CPU and 1 GiB on a GPU by default.

    Returns:
        [...] float32 (float64 for float64 input), or a pair of it and `TokenExtras`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; on the CPU also a label outside [0, vocab_size).
        RuntimeError: a home asked for by name that is not there; double backward.
    """
    inputs = head_inputs(hidden, weight, labels, bias, ignore_index, softcap, scale, vocab_size, memory_budget)
    ops.resolve_impl(impl, hidden.device)
    logp, extra = token_logps_of(inputs, extras, impl)
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
    memory_budget: int | None = None,
    impl: str = "auto",
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
    inputs = head_inputs(hidden, weight, labels, bias, ignore_index, softcap, scale, vocab_size, memory_budget)
    ops.resolve_impl(impl, hidden.device)
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
        logp, _ = token_logps_of(inputs, False, impl)
        counted = (inputs.labels != inputs.options.ignore_index).sum().clamp(min=1)
        total = (logp * weights if token_weights is not None else logp).sum()
        return -total / (counted if num_tokens is None else num_tokens)
    i = inputs
    return _LinearNLL.apply(
        i.hidden,
        i.weight,
        i.bias,
        i.labels,
        weights,
        i.options,
        num_tokens or -1.0,
        i.needs,
        i.row_limit,
        impl,
    )
