"""Checkpoints that are whole or absent, and hold no pickle: safetensors and JSON.

checkpoints/step-000200/
  model.safetensors      trainable parameters, float32
  optimizer.safetensors  the optimizer's tensors of every parameter
  rng.safetensors        random states of the CPU and of each GPU
  state.json             step, tokens, the optimizer's plain numbers, what a continuation must share
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

Named = Sequence[tuple[str, nn.Parameter]]
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


def save_checkpoint(folder: Path, named: Named, optimizer: torch.optim.Optimizer, state: dict, keep: int) -> None:
    """Write folder/step-N of state["step"], then delete all but the newest `keep`. Raises OSError where it cannot be
    written; the checkpoints before it stay."""
    path = folder / f"step-{state['step']:06d}"
    moments, numbers = optimizer_state(named, optimizer)
    tensors = ({name: p.detach().contiguous() for name, p in named}, moments, rng_state())
    try:
        with atomic_folder(path) as temporary:
            for name, file in zip(FILES, tensors, strict=True):
                save_file(file, temporary / name)
            (temporary / "state.json").write_text(json.dumps(state | {"optimizer": numbers}))
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; earlier checkpoints are whole: make room and resume") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit())


def load_checkpoint(path: Path, named: Named, optimizer: torch.optim.Optimizer, expect: dict) -> dict:
    """Fill parameters and optimizer in place; the saved state. Raises ValueError where a key of `expect` differs, or
    where a file is cut or missing: before anything is filled."""
    try:
        state = json.loads((path / "state.json").read_text())
        parameters, moments, rng = (load_file(path / name) for name in FILES)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} is not whole ({error}): delete it to go on from the one before, or from the start"
        ) from None
    for key, value in expect.items():
        if state.get(key) != value:
            raise ValueError(f"{path}: {key} was {state.get(key)!r} and is {value!r} now; continue with the same one")
    if parameters.keys() != {name for name, _ in named}:
        differ = sorted(parameters.keys() ^ {name for name, _ in named})
        raise ValueError(f"{path} holds other parameters than this model trains: {', '.join(differ[:3])} ...")
    by_parameter: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in state["optimizer"].items()}
    for full, value in moments.items():
        name, _, key = full.rpartition(".")
        by_parameter.setdefault(name, {})[key] = value
    with torch.no_grad():
        for name, p in named:
            p.copy_(parameters[name])
            values = by_parameter.get(name, {})
            moved = {k: v.to(p.device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            optimizer.state[p] = moved
    for device, saved in rng.items():
        if device == "cpu":
            torch.set_rng_state(saved)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(saved, device)
    return state


def optimizer_state(named: Named, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """(tensors by parameter and name, plain numbers by parameter); a tensor that parameters share is copied."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict] = {}
    seen: set[int] = set()
    for name, p in named:
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                shared = value.data_ptr() in seen
                seen.add(value.data_ptr())
                tensors[f"{name}.{key}"] = value.clone() if shared else value.contiguous()
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def rng_state() -> dict[str, torch.Tensor]:
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state()} | {f"cuda:{i}": state for i, state in enumerate(states)}


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


def atomic_text(text: str, path: Path) -> None:
    """Write a file whole, or leave what was there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _fsync(temporary)
    os.replace(temporary, path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
