"""Fused log-prob and preference-loss kernels for Controllable Preference Optimization and every DPO-type loss."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "LOSS_TYPES",
    "CPOLoss",
    "FusedLinearCPOLoss",
    "FusedLinearKTOLoss",
    "KTOOutput",
    "LossOptions",
    "Objective",
    "Plan",
    "PreferenceOutput",
    "TagTemplate",
    "TokenExtras",
    "VocabShards",
    "explain",
    "kto_kl",
    "kto_loss",
    "linear_nll",
    "linear_token_logps",
    "preference_loss",
    "sequence_logps",
    "token_logps",
    "value",
]

if TYPE_CHECKING:  # for type checkers and the API reference; at run time `__getattr__` imports the same
    from cpo_kernels.backends.vocab_parallel import VocabShards
    from cpo_kernels.head.nll import linear_nll
    from cpo_kernels.head.strategy import Plan, explain
    from cpo_kernels.head.token_logps import linear_token_logps
    from cpo_kernels.losses.fused import FusedLinearCPOLoss
    from cpo_kernels.losses.kto import FusedLinearKTOLoss, KTOOutput
    from cpo_kernels.losses.options import LossOptions
    from cpo_kernels.losses.preference import CPOLoss, PreferenceOutput, preference_loss
    from cpo_kernels.objectives import Objective, TagTemplate, value
    from cpo_kernels.ops.sequence_logps import sequence_logps
    from cpo_kernels.ops.token_logps import TokenExtras, token_logps
    from cpo_kernels.reference.kto import kto_kl, kto_loss
    from cpo_kernels.reference.loss_types import LOSS_TYPES

# Where each public name is defined. All are imported, and torch with them, at the first use of any: the command
# line prints its help without torch, in 0.1 s instead of 2 s.
_MODULES = {
    "backends.vocab_parallel": ("VocabShards",),
    "head.nll": ("linear_nll",),
    "head.strategy": ("Plan", "explain"),
    "head.token_logps": ("linear_token_logps",),
    "losses.fused": ("FusedLinearCPOLoss",),
    "losses.kto": ("FusedLinearKTOLoss", "KTOOutput"),
    "losses.options": ("LossOptions",),
    "losses.preference": ("CPOLoss", "PreferenceOutput", "preference_loss"),
    "objectives": ("Objective", "TagTemplate", "value"),
    "ops.sequence_logps": ("sequence_logps",),
    "ops.token_logps": ("TokenExtras", "token_logps"),
    "reference.kto": ("kto_kl", "kto_loss"),
    "reference.loss_types": ("LOSS_TYPES",),
}


def __getattr__(name: str) -> Any:
    """Import all public names at once, so that every op is registered with torch from the first use on."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module, names in _MODULES.items():
        namespace = importlib.import_module(f"cpo_kernels.{module}")
        globals().update({each: getattr(namespace, each) for each in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
