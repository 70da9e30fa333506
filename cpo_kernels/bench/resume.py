"""Resuming a results file that a time limit or an interrupt cut off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.bench import growth
from cpo_kernels.bench.growth import Growth
from cpo_kernels.bench.side_by_side import TIME_LIMIT, described
from cpo_kernels.environment import differing

SAME = (
    "cpu",
    "cpu_capability",
    "cpu_amx",
    "cpu_limits",
    "gpu",
    "threads",
    "python",
    "versions",
)  # of an environment: what a file that grows must share


class Kept:
    """Results of an earlier run in the file, for --resume."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.workloads: list[dict[str, Any]] = content.get("workloads", [])
        self.growths: list[dict[str, Any]] = content.get("growth", [])

    @classmethod
    def read(cls, out: Path | None, environment: dict[str, Any]) -> Kept:
        if out is None:
            raise ValueError("--resume continues a file: give --out FILE")
        content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        for name in differing(content["environment"], environment, SAME) if content else ():
            there, here = content["environment"].get(name), environment.get(name)
            raise ValueError(f"--resume: {out} was measured with {name} {there}, but this is {here}: start a new file")
        return cls(content)

    def workload(self, wanted: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
        """The result of the same workload and implementations, unless a time limit cut it off."""
        for result in self.workloads:
            if finished(result, names) and same(result, wanted):
                return result
        return None

    def others(self, wanted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results in the file for workloads that are not requested this time."""
        return [r for r in self.workloads if not any(same(r, w) for w in wanted)]

    def growth(self, one: Growth, device: torch.device) -> dict[str, Any] | None:
        wanted = [described("head", w, device) for w in one.workloads()]
        for result in self.growths:
            points = result["points"]
            if [{k: v for k, v in p.items() if k != "subjects"} for p in points] == wanted:
                if all(finished(p, growth.IMPLEMENTATIONS) for p in points):
                    return result
        return None


def same(result: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(result.get(key) == value for key, value in wanted.items())


def finished(result: dict[str, Any], names: Sequence[str]) -> bool:
    rows = result["subjects"]
    return rows.keys() >= set(names) and not any(TIME_LIMIT in row.get("why", "") for row in rows.values())
