"""KTO, the loss of unpaired responses."""

import torch
from torch import Tensor


def kto_loss(
    seq_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO's losses `[S]` of unpaired responses, r = L - ref:

        desirable_weight   (1 - sigmoid(beta (r - kl)))   where `desirable`
        undesirable_weight (1 - sigmoid(beta (kl - r)))   elsewhere

    Ethayarajh et al. 2024 (arXiv 2402.01306) eq. 7. seq_logps, ref_logps `[S]`, desirable bool `[S]`, kl from
    `kto_kl`.
    """
    u = beta * (seq_logps - ref_logps - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-u), undesirable_weight * torch.sigmoid(u))


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's reference point: max(0, mean(L - ref)) over mismatched prompts and responses, no gradient."""
    return (kl_logps - ref_kl_logps).detach().mean().clamp(min=0)
