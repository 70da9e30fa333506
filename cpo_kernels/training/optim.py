"""AdamW, the learning rate of a step, and peak memory."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence

import torch
from torch import nn

from cpo_kernels.recipe.keys import TrainingConfig
from cpo_kernels.training.adapters import need

Named = Sequence[tuple[str, nn.Parameter]]


BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}


def make_optimizer(named: Named, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or one of bitsandbytes. Weight decay applies only to matrices."""
    matrices = {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": training.weight_decay}
    vectors = {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0}
    betas = (training.betas[0], training.betas[1])
    groups = [g for g in (matrices, vectors) if g["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr, betas=betas, fused=True)
    need("bitsandbytes", f"training.optimizer: {training.optimizer}")
    import bitsandbytes

    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, BITSANDBYTES[training.optimizer])(
        groups, lr=training.lr, betas=betas
    )
    return optimizer


def schedule(step: int, total: int, training: TrainingConfig) -> float:
    """Factor on the peak learning rate at `step` of 0 .. total - 1: a linear warm-up, then the decay towards 0."""
    warmup = round(training.warmup if training.warmup >= 1 else training.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / (total - warmup)
    if training.schedule == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    return left if training.schedule == "linear" else 1.0


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
