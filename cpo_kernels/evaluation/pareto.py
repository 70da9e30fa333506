"""Pareto front and hypervolume of operating points: mean scores `[n, K]` of one model under n conditions, or of n
models. More is better on every objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Points = Tensor | Sequence[Sequence[float]]


def pareto_front(points: Points) -> Tensor:
    """bool `[n]`: the points that no other point dominates, i.e. is at least as good everywhere and better somewhere.

    Equal points are all on the front or none is. Raises ValueError if points are not finite numbers `[n, K]`.

    >>> pareto_front([[1, 5], [3, 3], [2, 3], [3, 3]])
    tensor([ True,  True, False,  True])
    """
    points = _points(points)
    other, own = points[None], points[:, None]  # [1, n, K], [n, 1, K]
    return ~((other >= own).all(-1) & (other > own).any(-1)).any(1)


def hypervolume(points: Points, reference: Sequence[float] | Tensor) -> float:
    """Volume of what lies between `reference` [K] and at least one of the points (Zitzler & Thiele 1998), exactly.

    A point that does not exceed the reference on every objective adds nothing. Computed by slices along the last
    objective, each a hypervolume with one objective fewer: O(n^(K-1) log n), 0.1 s for a front of 100 points with 4
    objectives.

    >>> hypervolume([[1, 5], [3, 3], [2, 3]], reference=[0, 0])
    11.0
    """
    points = _points(points)
    corner = torch.as_tensor(reference, dtype=torch.float64)
    if corner.shape != points.shape[1:] or not corner.isfinite().all():
        raise ValueError(f"reference must be {points.shape[1]} finite numbers, one per objective, got {reference}")
    sides = points - corner
    return _volume([tuple(row) for row in sides[(sides > 0).all(1)].tolist()])


def _volume(sides: list[tuple[float, ...]]) -> float:
    """Volume of the union of the boxes from 0 to each row of `sides`, all positive."""
    if not sides:
        return 0.0
    if len(sides[0]) == 1:
        return max(sides)[0]
    sides = sorted(sides, key=lambda side: side[-1], reverse=True)
    bottoms = [side[-1] for side in sides[1:]] + [0.0]
    total, above = 0.0, list[tuple[float, ...]]()  # `above`: the front of the boxes that reach into this slice
    for side, bottom in zip(sides, bottoms, strict=True):
        base = side[:-1]
        if not any(_covers(other, base) for other in above):
            above = [other for other in above if not _covers(base, other)] + [base]
        if side[-1] > bottom:
            total += (side[-1] - bottom) * _volume(above)
    return total


def _covers(big: tuple[float, ...], small: tuple[float, ...]) -> bool:
    return all(b >= s for b, s in zip(big, small, strict=True))


def _points(points: Points) -> Tensor:
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.dim() != 2 or not points.shape[1] or not points.isfinite().all():
        raise ValueError(f"points must be finite numbers [n, K], a row per point, got {list(points.shape)}: {points}")
    return points
