"""Requested against achieved: the scores of generated text, per objective, as its tag varies and the others stay fixed.

A sweep asks every question once for every level of one objective. A model that ignores the tag achieves the same score
at every level: its rank correlation is 0 and its line is flat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpo_kernels.evaluation.statistics import spearman


@dataclass(frozen=True)
class Level:
    requested: float
    achieved: float  # mean score
    exact: float  # share of answers that score what was requested
    answers: int


@dataclass(frozen=True)
class Control:
    """One objective's sweep for one model."""

    levels: list[Level]
    correlation: float  # Spearman, over answers
    error: float  # mean |achieved - requested|
    monotonicity: float  # share of neighbouring levels whose mean does not fall

    def numbers(self) -> tuple[str, str, str]:
        """Rank correlation, mean error and monotonicity as text; for a single level only the error."""
        error = f"{self.error:.2f}"
        if len(self.levels) < 2:
            return "-", error, "-"
        return f"{self.correlation:.2f}", error, f"{self.monotonicity:.0%}"

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Control:
        return cls(**{**fields, "levels": [Level(**level) for level in fields["levels"]]})


def controllability(requested: Sequence[float], achieved: Sequence[float]) -> Control:
    """How achieved scores follow requested levels; both `[answers]`."""
    if len(requested) != len(achieved) or not requested:
        raise ValueError(
            f"need at least one request and one score per request, got {len(achieved)} scores for {len(requested)} "
            "requests"
        )
    levels = []
    for level in sorted(set(requested)):
        scores = [a for r, a in zip(requested, achieved, strict=True) if r == level]
        exact = sum(a == level for a in scores) / len(scores)
        levels.append(Level(level, sum(scores) / len(scores), exact, len(scores)))
    error = sum(abs(r - a) for r, a in zip(requested, achieved, strict=True)) / len(requested)
    steps = [b.achieved >= a.achieved for a, b in zip(levels, levels[1:], strict=False)]
    return Control(levels, spearman(requested, achieved), error, sum(steps) / len(steps) if steps else math.nan)


def control_table(controls: Mapping[str, Mapping[str, Control]]) -> str:
    """{model: {objective: Control}} as one text table per objective: a row per model, a column per level; - where a
    model has no score at that level."""
    width = max(map(len, controls))
    blocks = []
    for objective in next(iter(controls.values())):
        levels = sorted({level.requested for c in controls.values() for level in c[objective].levels})
        head = "".join(f"{f'ask {level:g}':>8}" for level in levels)
        rows = [f"{objective:<{max(width, 12)}}{head}{'rank corr.':>13}{'mean error':>12}{'monotone':>10}"]
        for name, by_objective in controls.items():
            control = by_objective[objective]
            achieved = {level.requested: f"{level.achieved:.2f}" for level in control.levels}
            cells = "".join(f"{achieved.get(level, '-'):>8}" for level in levels)
            correlation, error, monotone = control.numbers()
            rows.append(f"{name:<{max(width, 12)}}{cells}{correlation:>13}{error:>12}{monotone:>10}")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)
