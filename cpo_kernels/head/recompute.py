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


def second_pass(head: Head, x: Tensor, labels: Tensor, lse: Tensor, coef: Tensor, needs: Needs) -> HeadGrads:
    """The gradients of sum_t coef_t logp_t: x [n, H], labels, lse and coef [n]; lse of the whole vocabulary."""
    weight, acc = head.weight, library.acc_dtype(x.dtype)
    options = head.options
    kernels, first, count = columns_here(head.kernels, options.vocab_size)
    parts = vocab_tiles(x.shape[0], weight.shape[0], head.buffer.shape[0] * weight.shape[0])  # padding of rows apart
    power, db_power = sum_powers(coef, x, abs(options.scale))
    scaled, ones = scale_rows(x, coef / power), torch.ones_like(lse)
    dx = x.new_empty(x.shape if needs.dx else 0, dtype=x.dtype if len(parts) == 1 else acc)
    if not parts:  # a rank that holds no rows of the weight
        dx.zero_()
    dw = torch.empty_like(weight) if needs.dw else weight.new_empty(0)
    db = weight.new_empty(weight.shape[0] if needs.db else 0, dtype=acc)
    for part in parts:
        g = head.columns(x, part)
        columns_bwd_(
            kernels, g, labels, lse, ones, options.ignore_index, options.scale, options.softcap,
            first + part.start, min(count - part.start, g.shape[1]),
        )  # fmt: skip
        if needs.dw:
            product(g.t(), scaled, dw[part])
        if needs.db:
            db[part] = torch.mv(g.t(), (coef / db_power).to(g.dtype)).to(acc) * db_power
        if needs.dx:
            add_product(dx, g, weight[part], part.start == 0)
    return HeadGrads(dx.to(x.dtype), coef, dw, db, power)
