"""How time and memory of the head grow with one size: the fitted exponent against the expected one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpo_kernels.bench.side_by_side import Bench, Row, described
from cpo_kernels.bench.workload import Head

IMPLEMENTATIONS = ("products", "ours", "naive_unmasked")
# Extra memory: chunks have a budget, so it does not follow the tokens; a float32 dW of several chunks follows V and H.
EXPECTED = {
    "groups": {"time": 1.0, "memory": 0.0},
    "length": {"time": 1.0, "memory": 0.0},
    "vocab": {"time": 1.0, "memory": 1.0},
    "hidden": {"time": 1.0, "memory": 1.0},
}


@dataclass(frozen=True)
class Growth:
    """`base` with `over` (a field of Head) at each of `values`; the prompt keeps its share of every length."""

    base: Head
    over: str
    values: tuple[int, ...]

    def workloads(self) -> list[Head]:
        made = []
        for value in self.values:
            keys: dict[str, Any] = {self.over: value}
            if self.over == "length":
                keys["prompt"] = value * self.base.prompt // self.base.length
            made.append(replace(self.base, **keys))
        return made


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of log value over log size by least squares; None for fewer than two points or a value that is not > 0."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def fitted(over: str, points: Sequence[Row]) -> dict[str, Row]:
    """Implementation -> fitted exponents; memory is that of a step beyond inputs and gradients."""
    fits: dict[str, Row] = {}
    for name in IMPLEMENTATIONS:
        with_time = [p for p in points if "median_s" in p["subjects"].get(name, {})]
        sizes = [p[over] for p in with_time]
        with_memory = [p for p in with_time if p["subjects"][name]["peak_bytes"] is not None]
        extra = [p["subjects"][name]["peak_bytes"] - p["gradient_bytes"] for p in with_memory]
        fits[name] = {
            "time": exponent(sizes, [p["subjects"][name]["median_s"] for p in with_time]),
            "memory": exponent([p[over] for p in with_memory], extra),
        }
    return fits


def measure(bench: Bench, growth: Growth, progress: Callable[[Row], None]) -> Row:
    """`progress` gets the result so far after every point."""
    points: list[Row] = []
    result: Row = {}
    for workload in growth.workloads():
        rows = bench.measure("head", workload, IMPLEMENTATIONS)
        points.append(described("head", workload, bench.device) | {"subjects": rows})
        result = {
            "over": growth.over,
            "expected": EXPECTED[growth.over],
            "seen": fitted(growth.over, points),
            "points": points,
        }
        progress(result)
    return result
