"""The Triton backend: the kernels of `library.SCHEMAS` on NVIDIA and AMD GPUs, or interpreted on CPU tensors."""

from cpo_kernels.kernels.live_columns import live_columns, live_grads, live_sum
from cpo_kernels.kernels.preference import preference, sequence_sum
from cpo_kernels.kernels.token_logps import token_logps_bwd_, token_logps_fused_, token_logps_fwd

__all__ = [
    "live_columns",
    "live_grads",
    "live_sum",
    "preference",
    "sequence_sum",
    "token_logps_bwd_",
    "token_logps_fused_",
    "token_logps_fwd",
]
