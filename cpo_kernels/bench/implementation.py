"""Families of implementations that compute the same thing from the same tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.environment import installed

BETA = 0.1  # of every preference loss
# Name -> tensor, as many of the truth's names as the implementation computes.
Outcome = dict[str, Tensor]


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Step:
    """An implementation's step, which may contain `repeats` runs of what is timed; `prepare` runs before it,
    untimed. held: what `run` reads without a reference to it, as a CUDA graph reads its inputs."""

    run: Callable[[], Outcome]
    prepare: Callable[[], None] = nothing
    repeats: int = 1
    held: Any = None


@dataclass(frozen=True)
class Implementation:
    """`build` makes the step from the family's tensors; `refuses` says why it cannot run a workload, '' if it can.

    traffic: logits that it reads and writes, in multiples of N * V; 0 if the family does not count them.
    bare: whether it is a part of the work alone, whose outcome is empty; every other one is compared with the truth.
    """

    label: str
    build: Callable[[Any], Step]
    package: str = ""
    refuses: Callable[[Any, torch.device], str] = lambda workload, device: ""
    traffic: float = 0.0
    bare: bool = False

    def why_not(self, workload: Any, device: torch.device) -> str:
        if self.package and not installed(self.package):
            return f"{self.package} is not installed"
        return self.refuses(workload, device)


@dataclass(frozen=True)
class Family:
    """Implementations and what they have in common.

    floor: the implementation that the others are compared with, '' for none.
    tensors: (workload, device) -> what every implementation builds its step from; the same values in every process.
    truth: the same outcome in float32 or better, by the simplest method that fits in memory.
    limits: maximum relative error of each name in the truth.
    apart: whether implementations of a workload are in memory one at a time: then each turn starts a new process and
        runs once untimed.
    """

    workload: type
    tensors: Callable[[Any, torch.device], Any]
    implementations: Mapping[str, Implementation]
    floor: str
    truth: Callable[[Any], Outcome]
    limits: Callable[[Any], Mapping[str, float]]
    apart: Callable[[Any], bool] = lambda workload: False


def gpu_only(workload: Any, device: torch.device) -> str:
    return "" if device.type == "cuda" else f"needs an NVIDIA GPU, this is {device.type}"
