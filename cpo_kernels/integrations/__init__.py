"""Thin adapters to other packages; each module imports its package, the core imports none of them.

The names below are imported, with the package that they adapt to, when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "FusedDPOConfig", "FusedDPOTrainer", "FusedGRPOTrainer", "FusedKTOTrainer", "FusedRLOOTrainer", "FusedSFTTrainer",
    "RatedData", "add_fused_head", "causal_lm_inputs", "causal_lm_logps", "fuse", "lm_head",
]  # fmt: skip

if TYPE_CHECKING:  # for type checkers; at run time `__getattr__` imports the same
    from cpo_kernels.integrations.fused_head import add_fused_head
    from cpo_kernels.integrations.rated_data import RatedData
    from cpo_kernels.integrations.transformers import causal_lm_inputs, causal_lm_logps, lm_head
    from cpo_kernels.integrations.trl import FusedDPOConfig, FusedDPOTrainer
    from cpo_kernels.integrations.trl_head import (
        FusedGRPOTrainer,
        FusedKTOTrainer,
        FusedRLOOTrainer,
        FusedSFTTrainer,
        fuse,
    )

_MODULES = {
    "fused_head": ("add_fused_head",),
    "rated_data": ("RatedData",),
    "transformers": ("causal_lm_inputs", "causal_lm_logps", "lm_head"),
    "trl": ("FusedDPOConfig", "FusedDPOTrainer"),
    "trl_head": ("FusedGRPOTrainer", "FusedKTOTrainer", "FusedRLOOTrainer", "FusedSFTTrainer", "fuse"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
