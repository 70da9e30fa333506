"""The preference loss that a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpo_kernels.head.strategy import budget_rows
from cpo_kernels.losses.fused import FusedLinearCPOLoss
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import Config

# set elsewhere in a recipe, or by the model
NO_OPTIONS = {"objectives": "objectives", "beta": "loss.beta", "loss_type": "loss.type", "loss_weights": "loss.weights"}
NO_OPTIONS |= {name: f"loss.{name}" for name in ("filter_eps", "filter_head_grad")}
NO_OPTIONS |= dict.fromkeys(("ignore_index", "softcap", "scale", "vocab_size"), "the model")


def filter_options(config: Config) -> dict[str, Any]:
    return {"filter_eps": config.loss.filter_eps, "filter_head_grad": config.loss.filter_head_grad}


def preference_loss(config: Config, objectives: Sequence[Objective], **head: Any) -> FusedLinearCPOLoss:
    """The loss of `config.loss`. Raises ValueError or TypeError for impossible options."""
    loss = config.loss
    for name in loss.options:
        if name in NO_OPTIONS:
            raise ValueError(f"loss.options: {name} comes from {NO_OPTIONS[name]}; remove it here")
    keys = {"loss_weights": loss.weights, **filter_options(config), **loss.options, **head}
    try:
        budget_rows(1, torch.float32, torch.device("cpu"), loss.options.get("memory_budget"))
        return FusedLinearCPOLoss(objectives or None, loss.beta, loss.type, **keys)
    except (TypeError, ValueError) as error:
        raise type(error)(f"loss: {error}") from None
