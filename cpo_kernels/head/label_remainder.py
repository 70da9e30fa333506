"""dX = G W without the rounding error of the labels' elements of G = c (onehot - softmax) dz/du.

In most rows of 16-bit G the label's element is the largest, and so is its rounding error

    e_t = c_t (1 - p_{t,y_t}) dz/du - G_{t,y_t}

which is known, since the label's logit is there in float32 (see `head.relative`). A matmul that adds e_t w_{y_t} to its
sums before it rounds them gives dX without that error. On 1,024 rows of SmolLM2 in bfloat16 the error of dX falls from
2.7e-3 to 2.0e-3 with labels of the text, from 2.5e-3 to 2.0e-3 with labels drawn at random; rounding dX alone makes
1.7e-3. A CPU step takes no longer.
"""

import torch
from torch import Tensor

from cpo_kernels.backends.vocab_parallel import columns_here, columns_of
from cpo_kernels.head.inputs import Head, Logits
from cpo_kernels.head.matmul import add_product, product


def add_label_remainder(
    head: Head,
    g: Logits,
    labels: Tensor,
    lse: Tensor,
    coef: Tensor,
    out: Tensor,
    first: bool,
    part: slice = slice(None),
) -> None:
    """out [n, H] = e_t w_{y_t}, first; else out += that; 0 in rows whose label is not among the columns `part`.

    g: G [n, v] in these columns, and the anchors of the logits that it has overwritten. labels and lse [n]; coef [n],
    the factors c in g.
    """
    assert g.anchors is not None
    options, weight = head.options, head.weight[part]
    _, start, count = columns_here(head.kernels, options.vocab_size)
    start, count = start + (part.start or 0), min(count - (part.start or 0), weight.shape[0])
    column, here = columns_of(labels, options.ignore_index, start, count)
    column = column.clamp(min=0)
    z = g.anchors[1].double() * options.scale
    slope = torch.full_like(z, options.scale)
    if cap := options.softcap:
        z, slope = cap * torch.tanh(z / cap), options.scale / torch.cosh(z / cap).square()
    exact = -coef * slope * torch.expm1(z - lse)
    e = torch.where(here, exact - g.z.gather(1, column[:, None])[:, 0], 0.0)
    e = e[:, None].to(out.dtype)
    if not first:
        out.addcmul_(weight.index_select(0, column).to(out.dtype), e)
    elif out.dtype == weight.dtype:
        torch.index_select(weight, 0, column, out=out).mul_(e)
    else:
        out.copy_(weight.index_select(0, column)).mul_(e)


def product_dx(head: Head, g: Logits, labels: Tensor, lse: Tensor, coef: Tensor, out: Tensor) -> None:
    """out [n, H] = the gradient of sum_t coef_t logp_t over one chunk, rounded once; arguments as above."""
    if g.anchors is None:
        product(g.z, head.weight, out)
        return
    add_label_remainder(head, g, labels, lse, coef, out, first=True)
    add_product(out, g.z, head.weight, first=False)
