"""Fused log-prob and preference-loss kernels for Controllable Preference Optimization and every DPO-type loss."""

from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.head.nll import linear_nll
from cpo_kernels.head.strategy import Plan, explain
from cpo_kernels.head.token_logps import linear_token_logps
from cpo_kernels.losses.fused import FusedLinearCPOLoss
from cpo_kernels.losses.options import LossOptions
from cpo_kernels.losses.preference import CPOLoss, PreferenceOutput, preference_loss
from cpo_kernels.objectives import Objective, TagTemplate, value
from cpo_kernels.ops.sequence_logps import sequence_logps
from cpo_kernels.ops.token_logps import TokenExtras, token_logps
from cpo_kernels.reference.kto import kto_kl, kto_loss
from cpo_kernels.reference.loss_types import LOSS_TYPES

__version__ = "0.1.0"

__all__ = [
    "LOSS_TYPES",
    "CPOLoss",
    "FusedLinearCPOLoss",
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
