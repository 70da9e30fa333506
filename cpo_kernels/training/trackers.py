"""Metrics to TensorBoard and Weights & Biases, in addition to metrics.jsonl."""

from __future__ import annotations

import dataclasses
import importlib.util
import uuid
from pathlib import Path
from typing import Any

from cpo_kernels.extras import install_line
from cpo_kernels.recipe.keys import Config

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Trackers:
    """Logs to all of `training.trackers`; `step` is the row's."""

    def __init__(self, config: Config, folder: Path, step: int):
        names = config.training.trackers
        self.tensorboard: Any = None
        self.wandb: Any = None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if "wandb" in names:
            import wandb

            keys = {"dir": str(folder), "resume": "allow", "config": dataclasses.asdict(config)}
            self.wandb = wandb.init(name=folder.name, id=run_id(folder / "wandb_id", step), **keys)

    def log(self, row: dict[str, Any]) -> None:
        step, numbers = row["step"], {name: x for name, x in row.items() if name != "step"}
        if self.tensorboard:
            for name, x in numbers.items():
                self.tensorboard.add_scalar(name, x, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def run_id(file: Path, step: int) -> str:
    """A unique id of this run, kept in `file` for resuming."""
    if step == 0 or not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()


def check_trackers(names: list[str]) -> None:
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"training.trackers: {name!r} is not one of {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"training.trackers: {name} is not installed: {install_line(PACKAGES[name])}")
