"""Gradients of the head from logits made a second time, a vocab tile at a time (two_pass, recompute).

With the log-sum-exp of every row known, a tile of columns needs no other: Z_s = X W_s^T, G_s = onehot - softmax,

    dW_s = G_s^T (c * X)      whole in one product, written once
    dX  += G_s W_s            [n, H], added in float32

By rows it is dW that adds up, [V, H] in float32 for every chunk; V is larger than n unless a batch labels more tokens
than the vocabulary has words. On two cores in bfloat16, times of 3 products, medians of 3 in one run: n = 520 of
896 x 151936 by columns 1.27, by rows 1.55; n = 6000 1.18 and 1.24; 4096 of 576 x 49152 1.24 and 1.32.
"""

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends.vocab_parallel import columns_bwd_, columns_here
from cpo_kernels.head.grads import HeadGrads, scale_rows, sum_powers
from cpo_kernels.head.inputs import Head, Needs
from cpo_kernels.head.matmul import add_product, product
from cpo_kernels.head.strategy import ALIGN, chunks, even_rows


def vocab_tiles(num_rows: int, num_columns: int, elements: int) -> list[slice]:
    """Even tiles of columns, of which num_rows * columns <= elements; at least one column at a time, and multiples of
    ALIGN where there are that many: rows of a tile begin where the kernels' widest loads may."""
    most = max(1, elements // max(num_rows, 1))
    if most < ALIGN or most >= num_columns:
        step = even_rows(num_columns, most)
    else:
        step = -(-even_rows(num_columns, most // ALIGN * ALIGN) // ALIGN) * ALIGN
    return [slice(low, high) for low, high in chunks(num_columns, step)]


def second_pass(
    head: Head,
    x: Tensor,
    labels: Tensor,
    lse: Tensor,
    lacks: Tensor,
    coef: Tensor,
    needs: Needs,
    entropies: Tensor | None = None,
    kept: Tensor | None = None,
) -> HeadGrads:
    """The gradients of sum_t coef_t logp_t: x [n, H], labels, lse and coef [n], lacks [n] or [0]; lse of the whole
    vocabulary.

    entropies [2, n]: coefficients e_t and values of the entropies H_t, for the gradient of sum_t e_t H_t as well. The
    coefficients that come back are those that rows of dx still lack.
    kept [n, V]: the logits of the first pass, which are overwritten in place of being computed a second time.
    """
    weight, acc = head.weight, library.acc_dtype(x.dtype)
    options = head.options
    kernels, first, count = columns_here(head.kernels, options.vocab_size)
    most = (head.buffer if kept is None else kept).shape[0] * weight.shape[0]  # padding of rows apart
    parts = vocab_tiles(x.shape[0], weight.shape[0], most)
    of_logp, coef, entropies = _within_range(coef, entropies, x.dtype)
    power, db_power = sum_powers(coef, x, abs(options.scale) * (1 if entropies is None else 8))
    scaled = scale_rows(x, coef / power) if x.dtype == torch.float16 else x
    anchors = head.anchors(x, labels, lacks)
    dx = x.new_empty(x.shape if needs.dx else 0, dtype=x.dtype if len(parts) == 1 else acc)
    if not parts:  # a rank that holds no rows of the weight
        dx.zero_()
    dw = torch.empty_like(weight) if needs.dw else weight.new_empty(0)
    db = weight.new_empty(weight.shape[0] if needs.db else 0, dtype=acc)
    for part in parts:
        g = head.columns(x, part, anchors) if kept is None else kept
        columns_bwd_(
            kernels, g, labels, lse, of_logp, options.ignore_index, options.scale, options.softcap,
            first + part.start, min(count - part.start, g.shape[1]), anchors, entropies,
        )  # fmt: skip
        if needs.dw:
            product(g.t(), scaled, dw[part])
        if needs.db:
            db[part] = torch.mv(g.t(), (coef / db_power).to(g.dtype)).to(acc) * db_power
        if needs.dx:
            add_product(dx, g, weight[part], part.start == 0)
    return HeadGrads(dx.to(x.dtype), coef, dw, db, power)


def _within_range(coef: Tensor, entropies: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """The coefficients that g takes, those that are left, and what g takes of the entropies.

    g takes all of them, one rounding less than with rows of x that are multiplied and as many multiplications. But
    float16 has not their range: there g stays of the size of onehot - softmax; |p (log p + H)| < 4.
    """
    ones = torch.ones_like(coef)
    if dtype != torch.float16:
        return coef, ones, entropies
    if entropies is None:
        return ones, coef, None
    size = torch.maximum(coef.abs(), entropies[0].abs())
    some = torch.where(size > 0, size, 1.0)
    return coef / some, size, torch.stack([entropies[0] / some, entropies[1]])
