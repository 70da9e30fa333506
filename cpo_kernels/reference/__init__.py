"""The oracle: every op and every loss in plain PyTorch, any floating dtype, differentiable by autograd.

The functions named as in `library.py` (`token_logps_fwd`, `token_logps_bwd_`, `token_logps_fused_`, `live_columns`,
`live_grads`, `live_sum`, `sequence_sum`, `preference`) are the backend `reference`: they have the kernels' signatures,
absent tensors have 0 elements, and results are not differentiable. Only this package may be slow.
"""

from cpo_kernels.reference.kto import kto_kl, kto_loss
from cpo_kernels.reference.live_columns import live_columns, live_grads, live_sum
from cpo_kernels.reference.loss_types import LOSS_TYPES
from cpo_kernels.reference.pairs import pair_loss, preference
from cpo_kernels.reference.sequences import ld_token_weights, sequence_logps, sequence_sum, wpo_pair_weights
from cpo_kernels.reference.tokens import (
    linear_token_logps,
    token_extras,
    token_logps,
    token_logps_bwd_,
    token_logps_fused_,
    token_logps_fwd,
)

__all__ = [
    "LOSS_TYPES",
    "kto_kl",
    "kto_loss",
    "ld_token_weights",
    "linear_token_logps",
    "live_columns",
    "live_grads",
    "live_sum",
    "pair_loss",
    "preference",
    "sequence_logps",
    "sequence_sum",
    "token_extras",
    "token_logps",
    "token_logps_bwd_",
    "token_logps_fused_",
    "token_logps_fwd",
    "wpo_pair_weights",
]
