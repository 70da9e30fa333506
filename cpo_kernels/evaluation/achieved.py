"""Metrics of scored answers: control per objective, operating points, and which of two models answers better.

`entries` are one model's `{"condition": {objective: level}, "scores": [questions][K], ...}`, NaN where not scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.evaluation.controllability import controllability
from cpo_kernels.evaluation.pareto import hypervolume, pareto_front
from cpo_kernels.evaluation.statistics import summary
from cpo_kernels.objectives import Objective, value_gap

Entry = Mapping[str, Any]
TIE = 1e-6  # the tie_margin of the loss


def requested_achieved(entries: Sequence[Entry], column: int, name: str) -> list[tuple[float, float]]:
    """(requested, achieved) of every scored answer whose condition names the objective."""
    return [
        (entry["condition"][name], scores[column])
        for entry in entries
        if name in entry["condition"]
        for scores in entry["scores"]
        if not math.isnan(scores[column])
    ]


def judged_scores(entries: Sequence[Entry], objectives: Sequence[Objective]) -> dict[str, Any]:
    """Control of every objective, mean scores per condition with their Pareto front, and its hypervolume.

    The hypervolume is a share of the box from `low` to `high` of all objectives: 1 is the best of everything at once.
    `unscored` counts the answers without a score, if any.
    """
    control = {}
    for column, o in enumerate(objectives):
        pairs = requested_achieved(entries, column, o.name)
        if pairs:
            requested, achieved = zip(*pairs, strict=True)
            control[o.name] = controllability(requested, achieved).json()
    points = [_means(entry["scores"]) for entry in entries]
    whole = [i for i, point in enumerate(points) if not any(map(math.isnan, point))]
    result: dict[str, Any] = {"control": control, "points": points, "front": [], "hypervolume": math.nan}
    if unscored := sum(any(map(math.isnan, scores)) for entry in entries for scores in entry["scores"]):
        result["unscored"] = unscored
    if whole:
        kept = torch.tensor([points[i] for i in whole], dtype=torch.float64)
        low = torch.tensor([o.low for o in objectives], dtype=torch.float64)
        span = torch.tensor([o.high for o in objectives], dtype=torch.float64) - low
        result["front"] = [i for i, front in zip(whole, pareto_front(kept).tolist(), strict=True) if front]
        result["hypervolume"] = hypervolume((kept - low) / span, [0.0] * len(objectives))
    return result


def _means(scores: Sequence[Sequence[float]]) -> list[float]:
    return torch.tensor(scores, dtype=torch.float64).nanmean(0).tolist()


def win_rates(models: Mapping[str, Sequence[Entry]], objectives: Sequence[Objective]) -> list[dict[str, Any]]:
    """For every pair of models, how often the answer of `a` is worth more than that of `b` for the same request.

    Worth is R(y) under the condition of the request (`objectives.value`); ties count half. The mean is taken over a
    question's conditions, then over questions, with a 95% interval by bootstrap over questions. Requests with
    conditions and the one without tags are reported separately.
    """
    rows = []
    for a, b in combinations(models, 2):
        for asked in ("conditions", "no tags"):
            wins = [
                _wins(x["scores"], y["scores"], x["condition"], objectives)
                for x, y in zip(models[a], models[b], strict=True)
                if bool(x["condition"]) == (asked == "conditions")
            ]
            if wins:
                by_question = torch.stack(wins).nanmean(0).tolist()  # [conditions, questions] -> [questions]
                rows.append({"a": a, "b": b, "asked": asked} | summary(by_question))
    return rows


def _wins(a: Any, b: Any, condition: Mapping[str, float], objectives: Sequence[Objective]) -> Tensor:
    """`[questions]`: 1 if `a` is worth more, 1/2 for a tie, NaN if there is nothing to compare."""
    levels = torch.tensor([condition.get(o.name, math.nan) for o in objectives], dtype=torch.float64)
    gap = value_gap(torch.tensor(a), torch.tensor(b), levels, objectives)
    wins = torch.where(gap.abs() <= TIE, 0.5, (gap > 0).double())
    return torch.where(gap.isnan(), torch.nan, wins)
