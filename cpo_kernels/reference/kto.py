"""KTO, the loss of unpaired responses."""

import torch
from torch import Tensor

from cpo_kernels.checks import check_types


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
    `kto_kl`; with kl = 0 it is TRL's apo_zero_unpaired (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7 of single
    responses).

    Raises TypeError or ValueError for other shapes, and for log-probs that are not float32 or float64.
    """
    check_types("a tensor", seq_logps=seq_logps, ref_logps=ref_logps, desirable=desirable)
    for name, tensor in {"ref_logps": ref_logps, "desirable": desirable}.items():
        if seq_logps.dim() != 1 or tensor.shape != seq_logps.shape:
            raise ValueError(f"{name} {list(tensor.shape)} and seq_logps {list(seq_logps.shape)} must both be [S]")
    _check_floats(seq_logps=seq_logps, ref_logps=ref_logps)
    check_types("a number", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    check_kto(desirable, kl)
    kl = kl if isinstance(kl, Tensor) else float(kl)
    u = beta * (seq_logps - ref_logps - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-u), undesirable_weight * torch.sigmoid(u))


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's reference point `[]`: max(0, mean(L - ref)) over mismatched prompts and responses, no gradient.

    kl_logps, ref_kl_logps: float32 or float64 of one shape, not empty; others raise TypeError or ValueError.
    Source: see `kto_loss`.
    """
    check_types("a tensor", kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    _check_floats(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    if kl_logps.shape != ref_kl_logps.shape or not kl_logps.numel():
        raise ValueError(
            f"kl_logps {list(kl_logps.shape)} and ref_kl_logps {list(ref_kl_logps.shape)} must have one shape, and not "
            "be empty"
        )
    return (kl_logps - ref_kl_logps).detach().mean().clamp(min=0)


def check_kto(desirable: Tensor, kl: Tensor | float) -> None:
    """Raise TypeError or ValueError unless `desirable` is bool and `kl` one number."""
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {desirable.dtype}: use desirable.bool()")
    check_types("a number or tensor", kl=kl)
    if isinstance(kl, Tensor) and kl.dim():
        raise ValueError(f"kl must be one number, got shape {list(kl.shape)}: see kto_kl")


def _check_floats(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64 (16-bit sums are off by nats), got {tensor.dtype}")
