"""A run directory: what ran, on what, and how it went.

config.yaml  versions.json  data.json  metrics.jsonl  eval_records.jsonl  checkpoints/  reference/  model/
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from cpo_kernels.data.records import Record, write_records
from cpo_kernels.training.config import Config, config_keys, write_config

# keys that may change between a run and its continuation
FREE = {"run_dir", "cache_dir"} | {
    f"training.{name}"
    for name in ("eval_every", "checkpoint_every", "keep", "resume", "overwrite", "save_model", "progress")
}


class RunDir:
    """Writes on the main process only; with `run_dir: null` keeps the metrics in memory and writes nothing."""

    def __init__(self, config: Config, is_main: bool):
        self.path = Path(config.run_dir) if config.run_dir else None
        self.metrics: list[dict[str, Any]] = []
        self.writes = self.path is not None and is_main
        if self.path is None:
            if config.training.resume or config.training.checkpoint_every:
                raise ValueError("training.resume and training.checkpoint_every need a run_dir")
            return
        if config.training.resume and (self.folder / "config.yaml").exists():
            self._check_same(config)
        elif (self.folder / "config.yaml").exists() and is_main:
            if not config.training.overwrite:
                raise ValueError(
                    f"run_dir {self.path} holds a run: set training.resume or training.overwrite, or another run_dir"
                )
            for name in ("metrics.jsonl", "data.json", "eval_records.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "model"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            write_config(config, self.path / "config.yaml")
            self.json("versions.json", versions())

    def _check_same(self, config: Config) -> None:
        old = yaml.safe_load((self.folder / "config.yaml").read_text())
        new = dataclasses.asdict(config)
        for name, _, _ in config_keys():
            before, now = old, new
            for part in name.split("."):
                before, now = before.get(part), now[part]
            if before != now and name not in FREE:
                raise ValueError(f"cannot resume {self.path}: {name} was {before!r} and is {now!r} now")

    @property
    def folder(self) -> Path:
        assert self.path is not None, "this run has no run_dir"
        return self.path

    def save_data(self, report: dict[str, Any], eval_records: Sequence[Record]) -> None:
        """What the data held and what was left out; the held-out records, for the evaluation."""
        self.json("data.json", report)
        if self.writes:
            write_records(eval_records, self.folder / "eval_records.jsonl")

    def json(self, name: str, value: Any) -> None:
        if self.writes:
            (self.folder / name).write_text(json.dumps(value, indent=2) + "\n")

    def log(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the metrics after `step`: the run goes on from there."""
        file = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.metrics = [row for row in rows if row["step"] <= step]
        if self.writes:
            file.write_text("".join(json.dumps(row) + "\n" for row in self.metrics))


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("cpo-kernels", "torch", "transformers", "accelerate", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    found["threads"] = torch.get_num_threads()
    return found
