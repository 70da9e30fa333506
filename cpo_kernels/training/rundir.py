"""A run directory: config, versions, data, metrics, model. A killed process leaves every file complete or absent.

config.yaml  versions.json  data.json  metrics.jsonl  eval_records.jsonl  checkpoints/  reference/  tensorboard/  model/
and, while a process is writing, lock
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from cpo_kernels.data.records import Record, write_records
from cpo_kernels.files import atomic_text, check_folder
from cpo_kernels.recipe.config import config_keys, config_text, parse_yaml
from cpo_kernels.recipe.keys import Config
from cpo_kernels.training.trackers import Trackers, check_trackers

# keys that may change on resuming
FREE = {"run_dir", "cache_dir"} | {
    f"training.{name}"
    for name in ("eval_every", "checkpoint_every", "keep", "resume", "overwrite", "save_model", "progress", "trackers")
}


class RunDir:
    """Writes only on the main process. With `run_dir: null` it keeps the metrics in memory and writes nothing."""

    def __init__(self, config: Config, is_main: bool):
        self.config = config
        self.path = Path(config.run_dir) if config.run_dir else None
        self.metrics: list[dict[str, Any]] = []
        self.writes = self.path is not None and is_main
        self.trackers: Trackers | None = None
        self.lock: TextIO | None = None
        check_trackers(config.training.trackers)
        if config.training.resume and config.training.overwrite:
            raise ValueError(
                "training.resume continues the run in run_dir and training.overwrite deletes it: set only one of them"
            )
        for key in ("run_dir", "cache_dir") if is_main else ():
            if folder := getattr(config, key):
                check_folder(Path(folder), key)
        if self.path is None:
            if config.training.resume or config.training.checkpoint_every or config.training.trackers:
                raise ValueError("training.resume, checkpoint_every and trackers need a run_dir")
            return
        if self.writes and (self.folder / "lock").exists():
            self.lock = hold(self.folder / "lock")
        if config.training.resume and (self.folder / "config.yaml").exists():
            self._check_same(config)
            if (self.folder / "model").exists() and not any((self.folder / "checkpoints").glob("step-*")):
                raise ValueError(
                    f"run_dir {self.path} is finished and has no checkpoint to resume from: start it again with "
                    "--overwrite (training.overwrite), or keep it and use another run_dir"
                )
        elif is_main:
            self._check_free()

    def _check_free(self) -> bool:
        """Whether there is a run to replace."""
        there = (self.folder / "config.yaml").exists()
        if there and not self.config.training.overwrite:
            raise ValueError(
                f"run_dir {self.path} already holds a run: give --resume (training.resume), --overwrite or another "
                "run_dir"
            )
        return there

    def begin(self, report: dict[str, Any], eval_records: Sequence[Record]) -> None:
        """Called once data, model and optimizer exist, so an earlier error leaves no run behind and deletes none. An
        earlier run is deleted first, its config.yaml last: a killed process leaves a folder that still says what it
        is."""
        if not self.writes:
            return
        resumed = self.config.training.resume
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock or hold(self.folder / "lock")
        if not resumed and self._check_free():
            for name in ("metrics.jsonl", "data.json", "eval_records.jsonl", "nonfinite.json"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "model", "tensorboard"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        atomic_text(config_text(self.config), self.folder / "config.yaml")
        self.json("versions.json", versions())
        if not resumed or not (self.folder / "data.json").exists():  # a checkpoint may refuse this data yet
            self.save_data(report, eval_records)

    def _check_same(self, config: Config) -> None:
        file = self.folder / "config.yaml"
        old = parse_yaml(file.read_text(encoding="utf-8"), str(file))
        if not isinstance(old, dict):
            raise ValueError(
                f"{file} is damaged: it holds {old!r:.40}, not the keys of the run: restore it, or --overwrite"
            )
        new = dataclasses.asdict(config)
        for name, default, _ in config_keys():
            *sections, last = name.split(".")
            before, now = old, new
            for section in sections:
                before, now = before.get(section, {}), now[section]
            before, now = before.get(last, default), now[last]  # a key that an older version did not have
            if before != now and name not in FREE:
                raise ValueError(f"cannot resume {self.path}: {name} was {before!r} and is now {now!r}")

    @property
    def folder(self) -> Path:
        assert self.path is not None, "this run has no run_dir"
        return self.path

    def save_data(self, report: dict[str, Any], eval_records: Sequence[Record]) -> None:
        """Save what the data contained and left out, and the held-out records for the evaluation."""
        self.json("data.json", report)
        if self.writes:
            write_records(eval_records, self.folder / "eval_records.jsonl")

    def json(self, name: str, value: Any) -> None:
        if self.writes:
            atomic_text(json.dumps(value, indent=2) + "\n", self.folder / name)

    def start(self, step: int) -> None:
        """Drop the metrics of an earlier process after `step`; the run resumes from there."""
        file = self.path and self.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file and file.exists() else []
        try:
            whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may truncate the last one
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): remove the lines that are not JSON") from None
        self.metrics = [row for row in whole if row["step"] <= step] if step else []
        if self.writes:
            atomic_text("".join(json.dumps(row) + "\n" for row in self.metrics), self.folder / "metrics.jsonl")
            self.trackers = Trackers(self.config, self.folder, step)

    def log(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        if self.trackers:
            self.trackers.log(row)

    def close(self) -> None:
        """Release the lock, so that another process may write."""
        if self.trackers:
            self.trackers.close()
        if self.lock:
            (self.folder / "lock").unlink(missing_ok=True)
            self.lock.close()
        self.trackers = self.lock = None


def hold(path: Path) -> TextIO:
    """The file `path`, locked until it is closed or this process ends, however it ends. Raises ValueError if another
    process holds it."""
    while True:
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                warnings.warn(f"{path} cannot be locked ({error}): run one process in this folder", stacklevel=2)
                return file
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ValueError(
                f"run_dir {path.parent}: another process is writing there ({holder}): stop it or use another run_dir"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            return file
        file.close()  # its holder has deleted it in between


def versions() -> dict[str, Any]:
    environment: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("cpo-kernels", "torch", "transformers", "accelerate", "safetensors", "peft", "bitsandbytes"):
        try:
            environment[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            environment[name] = None
    environment["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    environment["threads"] = torch.get_num_threads()
    return environment
