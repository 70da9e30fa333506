"""docs/results/claims.json as tables and a picture; `python -m benchmarks.plot` writes both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cpo_kernels.demo.world import OBJECTIVES
from cpo_kernels.evaluation.pareto import pareto_front

Result = dict[str, Any]
NAMES = [o.name for o in OBJECTIVES]
# method -> name, models trained after SFT or CPSFT for its operating points, colour, marker
METHODS = {
    "cpo": ("CPO", 1, "#1f5fa8", "o"),
    "cpsft": ("CPSFT alone", 1, "#8fb8de", "o"),
    "ric": ("Rewards-in-Context style", 1, "#2a9d8f", "v"),
    "modpo": ("MODPO", 10, "#c0504d", "s"),
    "soup": ("Rewarded Soups", 3, "#e07b39", "D"),
    "dpo_single": ("DPO, one objective each", 3, "#8a6bb8", "^"),
    "dpo_sum": ("DPO, summed rating", 1, "#30343b", "P"),
    "sft": ("SFT", 1, "#8a8f98", "X"),
}
OURS = "cpo"
INK = "#30343b"
# Quantile 0.975 of Student's t by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
HARMLESS = 0.9  # least share of harmful requests refused in the first panel


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of one value a seed, and half the width of its 95% interval (Student's t)."""
    n = len(values)
    if n - 1 not in T:
        raise ValueError(f"an interval needs 2 to {max(T) + 1} values, got {n}")
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, T[n - 1] * math.sqrt(variance / n)


def text(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def column(content: Result, method: str, key: str, name: str = "") -> list[float]:
    """One measure of a method, a value a seed."""
    return [row[key][name] if name else row[key] for row in content["methods"][method]]


def differences(content: Result, method: str, key: str, name: str = "") -> list[float]:
    """CPO minus the method, seed by seed."""
    ours, theirs = column(content, OURS, key, name), column(content, method, key, name)
    return [a - b for a, b in zip(ours, theirs, strict=True)]


# ------------------------------------------------------------------------------------------------------------- tables


def sections(content: Result) -> dict[str, str]:
    """Name of a table in docs/results.md -> its text; `content` is empty where nothing was measured."""
    if not content:
        return dict.fromkeys(("claims", "claims paired", "claims targets", "claims setting"), "not measured")
    return {
        "claims": table(content),
        "claims paired": paired(content),
        "claims targets": targets(content),
        "claims setting": setting(content),
    }


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def label(method: str) -> str:
    return f"**{METHODS[method][0]}**" if method == OURS else METHODS[method][0]


def volume_target(gaps: Mapping[str, tuple[float, float]]) -> str:
    """`gaps`: method -> CPO's hypervolume less its own, and the lower end of that difference's interval."""
    below = [METHODS[m][0] for m, (mean, _) in gaps.items() if mean <= 0]
    unclear = [METHODS[m][0] for m, (mean, low) in gaps.items() if mean > 0 and low <= 0]
    verdict = f"missed against {', '.join(below)}" if below else "met"
    if unclear:
        verdict += f"; not clear of zero against {', '.join(unclear)}"
    return f"- Hypervolume above every baseline's: {verdict}."


def best_target(name: str, high: float, difference: str) -> str:
    """`high`: the upper end of the interval of CPO's best score less that of DPO on single objectives."""
    verdict = "met" if high >= 0 else "missed"
    return f"- Best {name} at least that of DPO on single objectives, within the interval: {verdict} ({difference})."


def table(content: Result) -> str:
    heads = ["method", "models", "hypervolume", *(f"best {name}" for name in NAMES)]
    heads += ["rank correlation, " + ", ".join(NAMES), "well formed"]
    lines = []
    for method, (_, models, _, _) in METHODS.items():
        rows = content["methods"][method]
        cells = [
            label(method),
            str(models),
            text(column(content, method, "hypervolume"), 3),
        ]
        cells += [text(column(content, method, "best", name)) for name in NAMES]
        asked = "correlation" in rows[0]
        cells.append(", ".join(text(column(content, method, "correlation", n), 3) for n in NAMES) if asked else "-")
        shares = [sum(p["well_formed"] for p in row["points"]) / len(row["points"]) for row in rows]
        lines.append([*cells, f"{sum(shares) / len(shares):.0%}"])
    return markdown(heads, lines)


def paired(content: Result) -> str:
    lines = []
    for method in (m for m in METHODS if m != OURS):
        cells = [label(method), text(differences(content, method, "hypervolume"), 3, "+")]
        lines.append([*cells, *(text(differences(content, method, "best", name), 2, "+") for name in NAMES)])
    return markdown(["CPO minus", "hypervolume", *(f"best {name}" for name in NAMES)], lines)


def targets(content: Result) -> str:
    """Each target, and whether it is met."""
    gaps = {}
    for method in (m for m in METHODS if m != OURS):
        mean, half = interval(differences(content, method, "hypervolume"))
        gaps[method] = mean, mean - half
    lines = [volume_target(gaps)]
    for name in NAMES:
        mean, half = interval(differences(content, "dpo_single", "best", name))
        lines.append(best_target(name, mean + half, f"{mean:+.3f} ± {half:.3f}"))
    for name in NAMES:
        mean, _ = interval(column(content, OURS, "correlation", name))
        verdict = "met" if mean >= 0.9 else "missed"
        lines.append(f"- Rank correlation of requested and achieved {name} at least 0.9: {verdict} ({mean:.3f}).")
    return "\n".join(lines)


def setting(content: Result) -> str:
    budget, search, versions = content["budget"], content["search"], content["versions"]
    starts = {"": "", "best": " from SFT on the best answers", "all": " from SFT on all answers"}
    chosen = "; ".join(
        f"{METHODS[m][0]} {lr:g}" + (f" with NLL × {nll:g}" if nll else "") + starts[start]
        for m, (lr, nll, start) in search["chosen"].items()
    )
    tried = {m: len([row for row in search["tried"] if row["method"] == m]) for m in search["chosen"]}
    counts = ", ".join(f"{METHODS[m][0]} {n}" for m, n in tried.items())
    return (
        f"Seeds {', '.join(map(str, content['seeds']))}. A Llama of {budget['num_layers']} layers, hidden size "
        f"{budget['hidden_size']}, on a world of {budget['people']} people, {budget['prompts']} questions with four "
        f"rated answers each; {budget['supervised_steps']} supervised steps of {budget['responses']} answers, then "
        f"{budget['preference_steps']} steps. Every point: {budget['questions']} held-out questions, greedy answers. "
        f"Settings tried on seed {search['seed']}: {counts}. Chosen learning rates: {chosen}. "
        f"{content['seconds'] / 60:.0f} minutes of one thread on a shared machine, including the search; torch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )


# ------------------------------------------------------------------------------------------------------------ picture


def figure(content: Result) -> Any:
    """Operating points in two planes, mean over seeds with 95% intervals, and the hypervolume of each method."""
    from matplotlib import pyplot as plt

    made, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5), width_ratios=(1.25, 1.25, 1))
    for method in reversed(METHODS):
        points = means(content, method)
        _plane(left, points[points[:, 2, 0] >= HARMLESS], 0, 1, method)
        _plane(middle, points, 0, 2, method)
    order = sorted(METHODS, key=lambda m: interval(column(content, m, "hypervolume"))[0])
    for y, method in enumerate(order):
        _, _, colour, marker = METHODS[method]
        mean, half = interval(column(content, method, "hypervolume"))
        right.errorbar(mean, y, xerr=half, color=colour, marker=marker, markersize=8, capsize=3)
    right.set_yticks(range(len(order)), [METHODS[m][0] for m in order])
    right.yaxis.tick_right()
    left.set(xlabel="helpfulness", ylabel="honesty")
    middle.set(xlabel="helpfulness", ylabel="share of harmful requests refused", ylim=(-0.04, 1.04))
    right.set(xlabel="share of the box of ratings", ylim=(-0.5, len(order) - 0.5))
    titles = (
        f"where {HARMLESS:.0%} of harmful requests are refused",
        "every operating point",
        "hypervolume of the points",
    )
    for axis, title in zip((left, middle, right), titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axis.grid(color="#eef0f2")
    made.suptitle(
        f"Mean ratings over {len(content['seeds'])} seeds with 95% intervals; lines join a method's best points in the "
        "plane",
        color=INK,
        fontsize=11,
    )
    return made


def means(content: Result, method: str) -> torch.Tensor:
    """[points, objectives, 2]: mean over seeds and half the width of its interval."""
    rows = content["methods"][method]
    return torch.tensor(
        [
            [interval([row["points"][i]["scores"][k] for row in rows]) for k in range(len(NAMES))]
            for i in range(len(rows[0]["points"]))
        ]
    )


def _plane(axis: Any, points: torch.Tensor, x: int, y: int, method: str) -> None:
    _, _, colour, marker = METHODS[method]
    strength = {"alpha": 1.0, "linewidth": 2.4} if method == OURS else {"alpha": 0.8, "linewidth": 1.2}
    _, _, bars = axis.errorbar(
        points[:, x, 0], points[:, y, 0], xerr=points[:, x, 1], yerr=points[:, y, 1], color=colour, marker=marker,
        linestyle="none", markersize=6, elinewidth=0.8, alpha=strength["alpha"],
    )  # fmt: skip
    for bar in bars:
        bar.set_alpha(0.35)
    front = points[pareto_front(points[:, (x, y), 0])] if len(points) else points
    front = front[front[:, x, 0].argsort()]
    axis.plot(front[:, x, 0], front[:, y, 0], color=colour, **strength)
