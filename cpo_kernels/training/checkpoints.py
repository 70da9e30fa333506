"""Checkpoints that are whole or absent, and hold no pickle: safetensors and JSON.

checkpoints/step-000200/
  model.safetensors      trainable parameters, float32
  optimizer.safetensors  AdamW's moments and step of every parameter
  state.json             step, tokens, what the run must share with the one that continues it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def save_checkpoint(
    folder: Path, named: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, state: dict, keep: int
) -> None:
    """Write folder/step-N of state["step"], then delete all but the newest `keep`."""
    moments = {f"{name}.{key}": value for name, p in named for key, value in optimizer.state[p].items()}
    rng = {"cpu": torch.get_rng_state()} | {
        f"cuda:{i}": rng for i, rng in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    }
    with atomic_folder(folder / f"step-{state['step']:06d}") as temporary:
        save_file({name: p.detach().contiguous() for name, p in named}, temporary / "model.safetensors")
        save_file({k: v.contiguous() for k, v in moments.items()}, temporary / "optimizer.safetensors")
        save_file(rng, temporary / "rng.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit())


def load_checkpoint(
    path: Path, named: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, expect: dict
) -> dict:
    """Fill parameters and optimizer in place; the saved state. Raises ValueError where a key of `expect` differs."""
    state = json.loads((path / "state.json").read_text())
    for key, value in expect.items():
        if state[key] != value:
            raise ValueError(f"{path}: {key} was {state[key]!r} and is {value!r} now; continue with the same one")
    parameters, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for full, value in moments.items():
        name, _, key = full.rpartition(".")
        by_parameter.setdefault(name, {})[key] = value
    with torch.no_grad():
        for name, p in named:
            p.copy_(parameters[name])
            optimizer.state[p] = {key: value.to(p.device) for key, value in by_parameter[name].items()}
    for device, rng in load_file(path / "rng.safetensors").items():
        if device == "cpu":
            torch.set_rng_state(rng)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(rng, device)
    return state


class atomic_folder:  # noqa: N801 - used as a function
    """Context: a temporary folder that takes the place of `folder` once it is whole and on disk."""

    def __init__(self, folder: Path):
        self.folder, self.temporary = folder, folder.with_name(folder.name + ".tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for path in [*_files(self.temporary), self.temporary]:
            _fsync(path)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.temporary, self.folder)
        _fsync(self.folder.parent)


def atomic_json(value: Any, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    _fsync(temporary)
    os.replace(temporary, path)


def _files(folder: Path) -> Any:
    return (path for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
