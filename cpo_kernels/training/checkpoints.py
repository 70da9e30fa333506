"""Atomic checkpoints without pickle: safetensors and JSON.

checkpoints/step-000200/
  model.safetensors      trainable parameters, float32
  optimizer.safetensors  the optimizer's tensors of every parameter
  state.json             step, tokens, the optimizer's scalars, what a resumed run must share

Tensors are saved unsharded, so a run may resume with more or fewer processes. No random state is saved: that of a step
follows from seed, step and rank.
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

from cpo_kernels import files

Named = Sequence[tuple[str, nn.Parameter]]
FILES = ("model.safetensors", "optimizer.safetensors")
State = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, dict[str, Any]]]


def training_state(named: Named, optimizer: torch.optim.Optimizer, keep: bool = True) -> State:
    """(parameters, the optimizer's tensors, its scalars) by name, unsharded; empty if `keep` is false. A collective
    call if they are sharded."""
    parameters: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    addresses: set[int] = set()
    for name, p in named:
        values = {"": p.detach()} | optimizer.state[p]
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                numbers.setdefault(name, {})[key] = value
                continue
            if hasattr(value, "full_tensor"):
                value = value.full_tensor()
                value = value.cpu() if keep else value
            if not keep:
                continue
            if not key:
                parameters[name] = value.contiguous()
            else:  # a tensor that parameters share is copied
                tensors[f"{name}.{key}"] = value.clone() if value.data_ptr() in addresses else value.contiguous()
                addresses.add(value.data_ptr())
    return parameters, tensors, numbers


def save_checkpoint(folder: Path, tensors: State, state: dict[str, Any], keep: int) -> None:
    """Write folder/step-N of state["step"], then delete all but the newest `keep`. Raises OSError if it cannot be
    written; earlier checkpoints stay."""
    path = folder / f"step-{state['step']:06d}"
    *parts, numbers = tensors
    try:
        with atomic_folder(path) as temporary:
            for name, file in zip(FILES, parts, strict=True):
                save_file(file, temporary / name)
            (temporary / "state.json").write_text(json.dumps(state | {"optimizer": numbers}))
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; earlier checkpoints are intact: free space and resume") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit())


def load_checkpoint(
    path: Path, named: Named, optimizer: torch.optim.Optimizer, expect: dict[str, Any]
) -> dict[str, Any]:
    """Load parameters and optimizer in place and return the saved state. Raises ValueError if a key of `expect` differs
    or a file is truncated or missing, before anything is loaded."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        parameters, moments = (load_file(path / name) for name in FILES)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} is incomplete ({error}): delete it to resume from the one before, or from the start"
        ) from None
    for key, value in expect.items():
        if state.get(key) != value:
            raise ValueError(f"{path}: {key} was {state.get(key)!r} and is now {value!r}; resume with the same one")
    if parameters.keys() != {name for name, _ in named}:
        differ = sorted(parameters.keys() ^ {name for name, _ in named})
        raise ValueError(f"{path} has different parameters than this model trains: {', '.join(differ[:3])} ...")
    by_parameter: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in state["optimizer"].items()}
    for full, value in moments.items():
        name, _, key = full.rpartition(".")
        by_parameter.setdefault(name, {})[key] = value
    with torch.no_grad():
        for name, p in named:
            p.copy_(like(p, parameters[name]))
            values = by_parameter.get(name, {})
            optimizer.state[p] = {k: like(p, v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return state


def like(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """`value` on the parameter's device, sharded like the parameter if it has its shape. Every rank has read the whole
    tensor, so nothing is sent."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class atomic_folder:  # noqa: N801 - used as a function
    """Context manager: a temporary folder that replaces `folder` once it is complete and on disk."""

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
            files.fsync(path)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.temporary, self.folder)
        files.fsync(self.folder.parent)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
