"""Gradients of the head: dW and db accumulated over chunks, coefficients of rows, what a fused loss saves for backward.

Multiplication by coefficients is done in float32. Coefficients become 16-bit values only after division by a power of
two that keeps them in range.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.head.inputs import Head, HeadTensors, Needs, Rows
from cpo_kernels.head.matmul import add_product, add_to_halves, adds_products, product
from cpo_kernels.head.strategy import chunks
from cpo_kernels.library import refuse_double_backward

# Elements that a CPU multiplies at a time: torch holds the products in float32 before it rounds them. 8,192 rows of 576
# in bfloat16 took 2.1 ms, with 2^20 elements 3.0, as one product 34 (two cores).
BLOCK = 2**18
WEIGHT_TILE = 8192  # rows of dW per product when several 16-bit chunks are accumulated


def is_batched(*grads: Tensor) -> bool:
    """Under is_grads_batched=True, which runs backward once for all incoming gradients: none can be read or written."""
    return any(is_legacy_batchedtensor(grad) or is_batchedtensor(grad) for grad in grads)


def multiply(values: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """values [n, H] * factor, [n, 1] or a single number, in `dtype`, by default that of `values`: multiplied in float32
    (float64 for float64) and rounded once. Not differentiable."""
    dtype = dtype or values.dtype
    if torch.compiler.is_compiling() or is_batched(factor):
        return (values * factor.to(library.acc_dtype(values.dtype))).to(dtype)
    made, factors = torch.empty_like(values, dtype=dtype), factor.view(-1, 1)
    if values.device.type != "cpu":
        return torch.mul(values, factors, out=made)  # one pass, no float32 copy
    for low, high in chunks(len(values), max(1, BLOCK * len(values) // max(1, values.numel()))):
        rows = slice(low, high)
        torch.mul(values[rows], factors[rows] if len(factors) > 1 else factors, out=made[rows])
    return made


def scale_rows(dx: Tensor, coef: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Row t of dx times coef_t, in `dtype`, by default that of dx."""
    return multiply(dx, coef[:, None], dtype)


def restore(value: Tensor, factor: Tensor) -> Tensor:
    """value * factor. On a CPU, where reading the factor is free, a factor of 1 skips the pass over V*H elements."""
    readable = factor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched(factor)
    if readable and float(factor) == 1.0:
        return value
    return multiply(value, factor)


def power_of_two(top: Tensor) -> Tensor:
    """top [] -> the power of two P with top / P in [2^14, 2^15); 1 if top is 0.

    For float16, where coefficients of 1e-3 lose bits, those of 5e-8 become zero, and a sum over thousands of rows
    exceeds 65504. The GradScaler's factor is not yet known in the forward pass. bfloat16 has the range of float32.
    """
    return torch.where(top > 0, torch.exp2((torch.floor(torch.log2(top)) - 14).clamp(min=-126)), torch.ones_like(top))


def sum_powers(coef: Tensor, x: Tensor, steepest: float) -> tuple[Tensor, Tensor]:
    """(P for dW, P for db); both are 1 unless the dtype is float16. coef [n] in float32, x [n, H].

    In float16 they keep coef * x / P and G^T (coef * x / P) below 2^15, and for db coef / P and G^T (coef / P), given
    |G| <= steepest.
    """
    if x.dtype != torch.float16 or not x.numel():
        return coef.new_ones(()), coef.new_ones(())
    size = coef.abs() * max(1.0, steepest)
    return power_of_two((size * x.abs().amax(1)).sum()), power_of_two(size.sum())


class InputGrads(NamedTuple):
    """Gradients of hidden, weight and bias; one that is not needed has shape [0]."""

    dx: Tensor
    dw: Tensor
    db: Tensor


class HeadGrads(NamedTuple):
    """The gradients of a loss that is known in the forward pass, as saved for backward to scale."""

    dx: Tensor  # [M, H], or [0]
    coef: Tensor  # [M], factors by which the rows of dx are yet to be multiplied
    dw: Tensor  # [V, H] divided by `power`, or [0]
    db: Tensor  # [V] in float32, or [0]
    power: Tensor  # [], a power of two

    def scattered(self, rows: Rows, size: int) -> "HeadGrads":
        """Scatter the projected rows [n] into the full layout [size]."""
        dx = rows.scatter(self.dx, size) if self.dx.dim() == 2 else self.dx
        return self._replace(dx=dx, coef=rows.scatter(self.coef, size))


class WeightGrad:
    """dW = sum over chunks of G^T X, db = sum of G^T 1, with dW stored divided by `power`.

    A single chunk is one matmul in the weight's dtype. Several chunks are accumulated in float32 (float64 for float64),
    because a bfloat16 accumulator biases training. Where the device has 16-bit matmuls into float32, the matmul itself
    accumulates.

    scale [1]: factor on both sums, set before the last of several chunks is added; None for 1.
    """

    scale: Tensor | None = None

    def __init__(self, head: Head, num_chunks: int, needs: Needs) -> None:
        weight, acc = head.weight, library.acc_dtype(head.weight.dtype)
        self.dtype, self.needs = weight.dtype, needs
        # The CPU's own matmul adds to float32 in two halves, of which the upper is dW in the end: 3,072 rows of
        # 576 x 49,152 in four chunks took 0.96 of the time, and 54 MiB less, than with a float32 sum.
        own = num_chunks > 1 and dispatch.own_matmuls(head.kernels, weight) is not None
        dtype = self.dtype if num_chunks == 1 or own else acc
        shape = weight.shape if needs.dw else (0,)
        self.dw = dispatch.prefer_huge_pages(weight.new_empty(shape, dtype=dtype))
        self.low = dispatch.prefer_huge_pages(weight.new_empty(shape, dtype=torch.int16)) if own else None
        if num_chunks == 0:
            self.dw.zero_()
        self.db = weight.new_zeros(weight.shape[0] if needs.db else 0, dtype=acc)
        self.power = weight.new_ones((), dtype=acc)
        self.added, self.num_chunks, self.steepest = 0, num_chunks, abs(head.options.scale)  # the largest |dz/du|

    def add(self, g: Tensor, x: Tensor, left: Tensor) -> None:
        """g [n, V] and the factors left [n] of the rows of x [n, H]: 1 in bfloat16, where g has them all (`Chunk`)."""
        power, db_power = sum_powers(left, x, self.steepest)
        if self.needs.db:
            self.db += torch.mv(g.t(), (left / db_power).to(g.dtype)).to(self.db.dtype) * db_power
        if not self.needs.dw:
            return
        scaled = x if x.dtype == torch.bfloat16 else scale_rows(x, left / power)  # [n, H]
        if self.low is not None:
            last = self.added == self.num_chunks - 1
            factor = float(self.scale) if last and self.scale is not None else 1.0
            add_to_halves(self.dw, self.low, g.t(), scaled, self.added == 0, last, factor)
        elif adds_products(self.dw, g):
            add_product(self.dw, g.t(), scaled, self.added == 0)
            self.power = power  # 1 except in float16, which takes this branch only with a single chunk
        else:
            self.add_tiles(g, scaled, power)
        self.added += 1

    def add_tiles(self, g: Tensor, scaled: Tensor, power: Tensor) -> None:
        """Accumulate by vocab tiles: a tile of the 16-bit product is still in the cache when it is added.

        832 x 896 x 151936 in bfloat16 took 208 ms with the addition, against 228 ms as one product without it (2 cores,
        medians of 5 in one run). The last addition also rounds to 16 bit.
        """
        last = self.added == self.num_chunks - 1 and g.dtype == torch.bfloat16
        rounded = torch.empty_like(self.dw, dtype=g.dtype) if last else self.dw
        for low in range(0, g.shape[1], WEIGHT_TILE):
            tile = slice(low, low + WEIGHT_TILE)
            made = product(g[:, tile].t(), scaled, self.dw.new_empty(self.dw[tile].shape, dtype=g.dtype))
            if g.dtype == torch.float16:
                made = made.float() * power
            if last:
                total = self.dw[tile] + made
                rounded[tile] = total if self.scale is None else total * self.scale
            elif self.added:
                self.dw[tile] += made
            else:
                self.dw[tile] = made
        self.dw = rounded

    def result(self, dx: Tensor, coef: Tensor) -> HeadGrads:
        """The gradients, with dW / power in the weight's dtype."""
        if self.scale is not None:
            self.db *= self.scale
        if self.dw.dtype != self.dtype and self.dtype == torch.bfloat16 and self.scale is not None:
            self.dw = torch.mul(self.dw, self.scale, out=torch.empty_like(self.dw, dtype=self.dtype))
        elif self.dw.dtype == library.acc_dtype(self.dtype) and self.scale is not None:
            self.dw *= self.scale
        if self.dw.dtype != self.dtype and self.dw.numel():
            if self.dtype == torch.float16:
                self.power = power_of_two(self.dw.abs().amax())
                self.dw /= self.power
            self.dw = self.dw.to(self.dtype)
        return HeadGrads(dx, coef, self.dw, self.db, self.power)


def fake_grads(tensors: HeadTensors, needs: Needs) -> InputGrads:
    return InputGrads(*(t.new_empty(t.shape if need else 0) for t, need in zip(tensors[:3], needs, strict=True)))


def fake_head_grads(tensors: HeadTensors, needs: Needs) -> HeadGrads:
    hidden, acc = tensors.hidden, library.acc_dtype(tensors.hidden.dtype)
    dx, dw, db = fake_grads(tensors, needs)
    coef, power = hidden.new_empty(hidden.shape[0], dtype=acc), hidden.new_empty((), dtype=acc)
    return HeadGrads(dx, coef, dw, db.to(acc), power)


def scaled_grads(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias: the saved `HeadGrads` times the incoming gradient.

    Saved tensors are not modified. If the incoming gradient is 1, the saved dW itself is returned, or a copy if the
    graph is retained: the caller may write to what he gets.
    """
    refuse_double_backward()
    grads, needs = HeadGrads(*ctx.saved_tensors), Needs(*ctx.needs_input_grad[:3])
    dw = restore(grads.dw, grads.power * grad_loss) if needs.dw else None
    if dw is grads.dw and torch._C._autograd._get_current_graph_task_keep_graph():
        dw = dw.clone()
    return (
        scale_rows(grads.dx, grads.coef * grad_loss) if needs.dx else None,
        dw,
        (grads.db * grad_loss).to(grads.dw.dtype) if needs.db else None,
    )
