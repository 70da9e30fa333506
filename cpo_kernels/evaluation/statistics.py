"""Rank correlation, and intervals by bootstrap over questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, with mean ranks for ties. 0 if x or y is constant."""
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
    if len(x) < 2:
        return math.nan
    a, b = (_ranks(v) - (len(v) + 1) / 2 for v in (x, y))
    norm = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a @ b).item() / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> Tensor:
    _, place, count = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    ranks: Tensor = (count.cumsum(0) - (count - 1) / 2).double()[place]
    return ranks  # [n], from 1


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, one per question, drawn with replacement.

    NaN is a question without a value, which is dropped; (NaN, NaN) if no question has one.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    sample = torch.tensor([v for v in values if v == v], dtype=torch.float64)
    if not len(sample):
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, 2**20 // len(sample))  # bounds memory
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    draws = (torch.randint(len(sample), (size, len(sample)), generator=generator) for size in sizes)
    means = torch.cat([sample[draw].mean(1) for draw in draws])
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean over questions, its 95% interval, and the number of questions with a value."""
    given = [v for v in values if v == v]
    low, high = bootstrap_interval(given)
    return {"mean": sum(given) / len(given) if given else math.nan, "low": low, "high": high, "questions": len(given)}
