"""Gradients of the head from recomputed logits, one vocab tile at a time (two_pass, recompute).

Once the log-sum-exp of every row is known, tiles of columns are independent: Z_s = X W_s^T, G_s = onehot - softmax,

    dW_s = G_s^T (c * X)      complete after one product, written once
    dX  += G_s W_s            [n, H], accumulated in float32

Chunks of rows would accumulate dW instead, [V, H] in float32 for every chunk; V is larger than n unless a batch has
more labelled tokens than the vocabulary has words. On two cores in bfloat16, in multiples of the time of 3 products
(medians of 3 in one run): 896 x 151936 with n = 520 takes 1.27 by columns and 1.55 by rows, with n = 6000 1.18 and
1.24; 576 x 49152 with n = 4096 takes 1.24 and 1.32.
"""

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import columns_bwd_, columns_here, logit_and_slope
from cpo_kernels.head.grads import HeadGrads, scale_rows, sum_powers
from cpo_kernels.head.inputs import Head, Logits, Needs
from cpo_kernels.head.label_remainder import add_remainder, label_remainder, product_dx
from cpo_kernels.head.matmul import add_product
from cpo_kernels.head.strategy import ALIGN, chunks, even_rows


def vocab_tiles(num_rows: int, num_columns: int, elements: int) -> list[slice]:
    """Even tiles of columns with num_rows * columns <= elements, but at least one column each. Where possible, their
    width is a multiple of ALIGN, so that the rows of a tile are aligned for the kernels' widest loads."""
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
    """The gradients of sum_t coef_t logp_t: x [n, H], labels, lse and coef [n], lacks [n] or [0]; lse is that of the
    whole vocabulary.

    entropies [2, n]: coefficients e_t and values of the entropies H_t, to add the gradient of sum_t e_t H_t. The
    returned coefficients are those by which the rows of dx are yet to be multiplied.
    kept [n, V]: the logits of the first pass. They are overwritten, and no logits are computed again.
    """
    weight, acc = head.weight, library.acc_dtype(x.dtype)
    options = head.options
    kernels, first, count = columns_here(head.kernels, options.vocab_size)
    most = (head.buffer if kept is None else kept).shape[0] * weight.shape[0]  # without row padding
    parts = vocab_tiles(x.shape[0], weight.shape[0], most)
    of_logp, coef, entropies = _within_range(coef, entropies, x.dtype)
    power, db_power = sum_powers(coef, x, abs(options.scale) * (1 if entropies is None else 8))
    scaled = scale_rows(x, coef / power) if x.dtype == torch.float16 else x
    anchors = head.anchors(x, labels, lacks)
    dx = x.new_empty(x.shape if needs.dx else 0, dtype=x.dtype if len(parts) == 1 else acc)
    if not parts or count <= 0:  # a rank that holds no rows of the weight, or only padding
        dx.zero_()
    logp, e = None, x.new_zeros(x.shape[0], dtype=torch.float64)
    if anchors is not None and entropies is None:
        logp = logit_and_slope(anchors[1], options.scale, options.softcap)[0] - lse
    dw = dispatch.prefer_huge_pages(torch.empty_like(weight)) if needs.dw else weight.new_empty(0)
    db = weight.new_empty(weight.shape[0] if needs.db else 0, dtype=acc)
    for part in parts:
        g = head.columns(x, part, anchors) if kept is None else kept
        width = min(count - part.start, g.shape[1])  # without padding, whose rows of the weight may hold anything
        columns_bwd_(
            kernels, g, labels, lse, of_logp, options.ignore_index, options.scale, options.softcap,
            first + part.start, width, anchors, entropies,
        )  # fmt: skip
        if needs.dw:
            add_product(dw[part], g.t(), scaled, first=True)
        if needs.db:
            db[part] = torch.mv(g.t(), (coef / db_power).to(g.dtype)).to(acc) * db_power
        if needs.dx and width > 0:
            if logp is not None and len(parts) == 1:
                product_dx(head, Logits(g, anchors), labels, logp, of_logp, dx)
                continue
            if logp is not None:
                e += label_remainder(head, Logits(g, anchors), labels, logp, of_logp, part)[0]
            add_product(dx, g[:, :width], weight[part][:width], part.start == 0)
    if needs.dx and logp is not None and len(parts) > 1:
        add_remainder(head, labels, e, dx)
    return HeadGrads(dx.to(x.dtype), coef, dw, db, power)


def _within_range(coef: Tensor, entropies: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """The coefficients multiplied into g, the remaining ones, and what g includes of the entropies.

    g takes all coefficients: one rounding fewer than multiplying the rows of x, and as many multiplications. float16
    does not have the range for that, so there g keeps the magnitude of onehot - softmax; |p (log p + H)| < 4.
    """
    ones = torch.ones_like(coef)
    if dtype != torch.float16:
        return coef, ones, entropies
    if entropies is None:
        return ones, coef, None
    size = torch.maximum(coef.abs(), entropies[0].abs())
    some = torch.where(size > 0, size, 1.0)
    return coef / some, size, torch.stack([entropies[0] / some, entropies[1]])
