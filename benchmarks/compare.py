"""What got slower or faster between two results files: `python -m benchmarks.compare OLD NEW`; exit 1 if ours did.

Compared is the ratio to the floor of the same round, which drift does not touch, else the time. Not compared are times
of other machines, nor 16-bit ratios where the CPU's vector instructions differ: the floor is 30 times slower without
16-bit products, ours is not. A change counts where the ranges over all rounds do not meet and the medians differ by
more than 3%.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from cpo_kernels.bench.report import title
from cpo_kernels.environment import differing

LEAST = 1.03
WORKLOAD = (
    "family", "head", "hidden", "vocab", "softcap", "groups", "responses", "length", "prompt", "dtype", "mode",
    "reference", "rows", "pairs", "objectives", "model",
)  # fmt: skip
INSTRUCTIONS = ("cpu_capability", "cpu_amx", "cpu_limits")
HARDWARE = ("cpu", *INSTRUCTIONS, "gpu", "threads")


class Change(NamedTuple):
    what: str
    implementation: str
    factor: float  # new over old
    unit: str


def rows(report: dict[str, Any]) -> dict[tuple[Any, ...], tuple[str, str, dict[str, Any]]]:
    """(workload, implementation) -> (title, implementation, row) of what was measured."""
    found = {}
    for result in report["workloads"]:
        key = tuple(result.get(name) for name in WORKLOAD)
        for name, row in result["subjects"].items():
            if "median_s" in row:
                found[(*key, name)] = (title(result), name, row)
    return found


def measure(row: dict[str, Any], by_ratio: bool) -> tuple[float, float, float]:
    """(low, median, high)."""
    if by_ratio:
        return row["ratio_spread"][0], row["ratio"], row["ratio_spread"][1]
    return row["min_s"], row["median_s"], row["max_s"]


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], int]:
    """Changes beyond noise, the largest first, and how many rows were compared."""
    before, after = rows(old), rows(new)
    same, same_cpu = (not differing(old["environment"], new["environment"], k) for k in (HARDWARE, INSTRUCTIONS))
    found, compared = [], 0
    for key in before.keys() & after.keys():
        what, implementation, row = after[key]
        # The floor's ratio to itself says nothing.
        by_ratio = all("ratio" in r and r["ratio_spread"] != [1.0, 1.0] for r in (row, before[key][2]))
        is_16_bit = key[WORKLOAD.index("dtype")] in ("bfloat16", "float16")
        if (not by_ratio and not same) or (is_16_bit and not same_cpu):
            continue
        compared += 1
        low, median, high = measure(row, by_ratio)
        old_low, old_median, old_high = measure(before[key][2], by_ratio)
        factor = median / old_median
        if (low > old_high and factor > LEAST) or (high < old_low and factor < 1 / LEAST):
            found.append(Change(what, implementation, factor, "ratio to the floor" if by_ratio else "time"))
    return sorted(found, key=lambda c: -abs(c.factor - 1)), compared


def is_ours(change: Change) -> bool:
    return change.implementation.startswith(("ours", "forward_", "backward_", "fused_", "preference_", "loop"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    found, compared = changes(old, new)
    for c in found:
        print(f"{'slower' if c.factor > 1 else 'faster'} {c.factor:.2f}x ({c.unit}): {c.implementation}: {c.what}")
    slower = [c for c in found if c.factor > 1 and is_ours(c)]
    print(f"{compared} rows compared, {len(found)} changed beyond noise, {len(slower)} of ours slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
