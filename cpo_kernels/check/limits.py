"""Every bound of `cpo-kernels check`.

A relative bound b on a value x of the oracle allows |error| <= b * (|x| + floor); the floor is 1 where none is named.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Of token log-probs, lse and (four times that) extras; and of gradients, with the floors below."""

    logp: float
    grad: float


# 16-bit gradients are rounded once, which costs at most 2^-8 (bfloat16) or 2^-11 (float16) of a value.
TOKENS = {
    torch.float64: Tolerance(1e-13, 1e-11),
    torch.float32: Tolerance(2e-6, 1e-5),
    torch.bfloat16: Tolerance(2e-6, 2**-8),
    torch.float16: Tolerance(2e-6, 2**-11),
}
# exp2 of a GPU is an approximation.
TOKENS_ON_GPU = {
    torch.float64: Tolerance(1e-13, 1e-11),
    torch.float32: Tolerance(1e-5, 1e-5),
    torch.bfloat16: Tolerance(1e-5, 2**-8),
    torch.float16: Tolerance(1e-5, 5e-4),
}
GRAD_FLOOR = 1e-30  # values that the dtype cannot hold round to something near 0
GRAD_FLOOR_FLOAT16 = 2.0**-14  # below it float16 is subnormal
LABEL_FLOOR = 0.1  # at the label, where 1 - softmax may cancel
LOWEST_LOGP = 1e-4  # of a row that holds only the lowest number

# 16 bit: our error against float64 over naive PyTorch's in the same dtype.
NAIVE_RATIO = 1 + 1e-3
NAIVE_SLACK = 1e-3  # relative to the result: of a GPU, and of losses from hidden states

# Of a sum in dtype: eps(dtype) of the sum for its rounding, and so many eps(float64) of the sum of |terms|.
SUM_EPS64 = 32

PREFERENCE = {torch.float64: 1e-11, torch.float32: 1e-5}
PREFERENCE_FAR = 1e-9  # sequence log-probs far from the reference
PREFERENCE_SHARED = 1e-13  # a sum of gradients against the gradient of the sum

# From hidden states: relative to the largest value of a result; 16 bit is compared with naive PyTorch instead.
HEAD = {torch.float64: 1e-10, torch.float32: 1e-5}
GRAPH = {torch.bfloat16: 2**-7, torch.float32: 1e-5}  # a replayed graph: products by another algorithm
