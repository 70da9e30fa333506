"""docs/results/filtered_training.json as tables and a picture; `python -m benchmarks.plot` writes both."""

from __future__ import annotations

import math
import statistics
from typing import Any

from cpo_kernels.environment import processor
from cpo_kernels.training.losses import FILTER_METRICS

Result = dict[str, Any]
PARTS = ("demo", "smollm2")


def sections(content: Result) -> dict[str, str]:
    """Name of a table in the docs -> its text."""
    return {f"filtered training, {name}": table(content[name]) if name in content else "not measured" for name in PARTS}


def percent(share: float) -> str:
    """Two significant digits."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{share:.0%}"


def table(part: Result) -> str:
    """One part as Markdown."""
    exact, settings, env = part["variants"][0], part["settings"], part["environment"]
    *_, last = exact["off"]
    lines = [
        "| | live columns | tail | exact rows | loss error: median, maximum | held-out loss, accuracy | "
        f"{' | '.join(f'{at}: body, head' for at in exact['off'])} | {last}: head's rows, in the data and others |",
        "|---" * (7 + len(exact["off"])) + "|",
    ]
    for row in part["variants"]:
        gaps = [abs(a - b) for a, b in zip(row["losses"], exact["losses"], strict=True)]
        cells = [percent(row[name]) if name in row else "" for name in FILTER_METRICS]
        cells.append("" if row is exact else f"{statistics.median(gaps):.1e}, {max(gaps):.1e}")
        cells.append(f"{row['held_out']['loss']:.4f}, {row['held_out']['accuracy']:.1%}")
        shown = [*((off, ("body", "head")) for off in row["off"].values()), (row["off"][last], ("in_data", "others"))]
        cells += ["" if row is exact else ", ".join(percent(off[g]) for g in names) for off, names in shown]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if number != "not installed")
    return "\n".join(lines) + (
        f"\n\n{settings['model']}, {settings['training']['max_steps']} steps, learning rate "
        f"{settings['training']['lr']:g}, {settings['held_out_pairs']} held-out pairs. {processor(env)}, "
        f"Python {env['python']}, {versions}; {env['date'][:10]}, commit {env['commit']}."
    )


def figure(content: Result) -> Any:
    """For each part the loss of every step, and how far it is from the exact one's."""
    from matplotlib import pyplot as plt

    made, axes = plt.subplots(len(content), 2, figsize=(12.5, 3 * len(content)), squeeze=False)
    for (left, right), (name, part) in zip(axes, content.items(), strict=True):
        exact = part["variants"][0]["losses"]
        for row in part["variants"]:
            steps = range(1, len(exact) + 1)
            gaps = [abs(a - b) or math.nan for a, b in zip(row["losses"], exact, strict=True)]
            left.plot(steps, row["losses"], linewidth=1)
            right.semilogy(steps, gaps, linewidth=1, label=row["variant"])
        left.set(xlabel="step", ylabel=f"{name}: loss")
        right.set(xlabel="step", ylabel="distance from the loss of float32")
        right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))  # eps may differ
    return made
