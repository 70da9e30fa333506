"""docs/results/claims.json as tables and a picture; `python -m benchmarks.plot` writes both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.claims.lab import Lab, models_of
from benchmarks.claims.world_lab import WorldLab
from cpo_kernels.demo.world import OBJECTIVES
from cpo_kernels.evaluation.pareto import pareto_front

Result = dict[str, Any]
NAMES = [o.name for o in OBJECTIVES]
# method -> name, colour, marker
METHODS = {
    "cpo": ("CPO", "#1f5fa8", "o"),
    "cpo_soup": ("CPO, steps of Soups", "#1f5fa8", "s"),
    "cpo_modpo": ("CPO, steps of MODPO", "#1f5fa8", "D"),
    "cpsft": ("CPSFT alone", "#8fb8de", "o"),
    "ric": ("Rewards-in-Context style", "#2a9d8f", "v"),
    "modpo": ("MODPO", "#c0504d", "s"),
    "soup": ("Rewarded Soups", "#e07b39", "D"),
    "dpo_single": ("DPO, one objective each", "#8a6bb8", "^"),
    "dpo_sum": ("DPO, summed rating", "#30343b", "P"),
    "sft": ("SFT", "#8a8f98", "X"),
}
OURS = "cpo"
# baseline -> CPO with as many steps in total; the others take as many as CPO
EQUAL_TOTAL = {"soup": "cpo_soup", "dpo_single": "cpo_soup", "modpo": "cpo_modpo"}
BASELINES = [m for m in METHODS if not m.startswith(OURS + "_") and m != OURS]
INK = "#30343b"
# Quantile 0.975 of Student's t by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
HARMLESS = 0.9  # least share of harmful requests refused in the first panel


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of one value a seed, and half the width of its 95% interval (Student's t), which one value does not have."""
    n = len(values)
    if n == 1:
        return values[0], math.inf
    if n - 1 not in T:
        raise ValueError(f"an interval needs 1 to {max(T) + 1} values, got {n}")
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, T[n - 1] * math.sqrt(variance / n)


def text(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f} " + (f"± {half:.{digits}f}" if len(values) > 1 else "(one seed)")


def column(content: Result, method: str, key: str, name: str = "") -> list[float]:
    """One measure of a method, a value a seed."""
    return [row[key][name] if name else row[key] for row in content["methods"][method]]


def measured(content: Result) -> list[str]:
    """The methods that have results, in the order of METHODS."""
    return [method for method in METHODS if content["methods"].get(method)]


def differences(content: Result, method: str, key: str, name: str = "", ours: str = OURS) -> list[float]:
    """CPO minus the method, on each seed that both have."""
    theirs = {row["seed"]: row for row in content["methods"][method]}
    both = [(row, theirs[row["seed"]]) for row in content["methods"][ours] if row["seed"] in theirs]
    return [a[key][name] - b[key][name] if name else a[key] - b[key] for a, b in both]


# ------------------------------------------------------------------------------------------------------------- tables


def sections(content: Result) -> dict[str, str]:
    """Name of a table in docs/results.md -> its text; `content` is empty where nothing was measured."""
    names = ["claims", *(f"claims {part}" for part in ("paired", "cost", "targets", "setting"))]
    if not content:
        return dict.fromkeys(names, "not measured")
    parts = (table(content), paired(content), cost(content, WorldLab), targets(content), setting(content))
    return dict(zip(names, parts, strict=True))


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def label(method: str) -> str:
    return f"**{METHODS[method][0]}**" if method.startswith(OURS) and method != "cpsft" else METHODS[method][0]


def steps(content: Result, study: type[Lab], method: str) -> tuple[int, int]:
    """Models trained from SFT or CPSFT for the method's points, and the steps of all of them together."""
    models, each = models_of(study, method), content["plan"]["budget"]["preference_steps"]
    if method in ("sft", "cpsft"):
        return 0, 0
    if method.startswith(OURS + "_"):
        return 1, models_of(study, method.removeprefix(OURS + "_")) * each
    return models, models * each


def cost(content: Result, study: type[Lab]) -> str:
    """What each method's models took, means over the seeds where it was counted."""
    rows = []
    for method in measured(content):
        models, total = steps(content, study, method)
        spent = [row["cost"] for row in content["methods"][method] if row["cost"]]
        cells = [f"{models}", f"{total:,}"]
        for stage in ("supervised", "further"):
            for key, unit, digits in (("tokens", 1e6, 2), ("seconds", 60, 1)):
                values = [c[stage][key] / unit for c in spent]
                cells.append(f"{sum(values) / len(values):.{digits}f}" if values else "not counted")
        rows.append([label(method), *cells])
    heads = ["method", "models after the supervised stage", "their steps", "supervised: million tokens", "minutes"]
    return markdown([*heads, "after it: million tokens", "minutes"], rows)


def volume_target(gaps: Mapping[str, tuple[float, float]], budget: str, of: Sequence[str] = ()) -> str:
    """`gaps`: method -> CPO's hypervolume less its own, and the lower end of that difference's interval. of: methods;
    those without a gap have no CPO of equal steps yet."""
    below = [METHODS[m][0] for m, (mean, _) in gaps.items() if mean <= 0]
    unclear = [METHODS[m][0] for m, (mean, low) in gaps.items() if mean > 0 and low <= 0]
    verdict = f"missed against {', '.join(below)}" if below else "met"
    if unclear:
        verdict += f"; not clear of zero against {', '.join(unclear)}"
    if absent := [METHODS[m][0] for m in of if m not in gaps]:
        verdict += f"; not measured against {', '.join(absent)}"
    return f"- Hypervolume above every baseline's, {budget}: {verdict}."


def best_target(name: str, high: float, difference: str) -> str:
    """`high`: the upper end of the interval of CPO's best score less that of DPO on single objectives."""
    verdict = "met" if high >= 0 else "missed"
    return f"- Best {name} at least that of DPO on single objectives, within the interval: {verdict} ({difference})."


def table(content: Result) -> str:
    heads = ["method", "models × steps", "hypervolume", *(f"best {name}" for name in NAMES)]
    heads += ["rank correlation, " + ", ".join(NAMES), "well formed"]
    lines = []
    for method in measured(content):
        rows = content["methods"][method]
        cells = [
            label(method),
            models_steps(content, WorldLab, method),
            text(column(content, method, "hypervolume"), 3),
        ]
        cells += [text(column(content, method, "best", name)) for name in NAMES]
        asked = "correlation" in rows[0]
        cells.append(", ".join(text(column(content, method, "correlation", n), 3) for n in NAMES) if asked else "-")
        shares = [sum(p["well_formed"] for p in row["points"]) / len(row["points"]) for row in rows]
        lines.append([*cells, f"{sum(shares) / len(shares):.0%}"])
    return markdown(heads, lines)


def models_steps(content: Result, study: type[Lab], method: str) -> str:
    models, total = steps(content, study, method)
    return f"{models} × {total // models}" if models else "-"


def compared(content: Result) -> list[tuple[str, str]]:
    """(CPO, baseline): with equal steps for each model, then with equal steps in total where that is another CPO."""
    pairs = [(OURS, m) for m in BASELINES] + [(ours, m) for m, ours in EQUAL_TOTAL.items()]
    there = measured(content)
    return [pair for pair in pairs if set(pair) <= set(there)]


def paired(content: Result) -> str:
    lines = []
    for ours, method in compared(content):
        cells = [text(differences(content, method, "hypervolume", ours=ours), 3, "+")]
        cells += [text(differences(content, method, "best", name, ours), 2, "+") for name in NAMES]
        lines.append([f"{label(ours)} minus {label(method)}", *cells])
    return markdown(["difference", "hypervolume", *(f"best {name}" for name in NAMES)], lines)


def budgets(content: Result) -> dict[str, dict[str, str]]:
    """Equal in what -> baseline -> the CPO that it is compared with, of those that were measured."""
    there = measured(content)
    pairs = {
        "equal steps for each model": dict.fromkeys(BASELINES, OURS),
        "equal steps in total": {m: EQUAL_TOTAL.get(m, OURS) for m in BASELINES},
    }
    return {k: {m: ours for m, ours in v.items() if {m, ours} <= set(there)} for k, v in pairs.items()}


def measured_baselines(content: Result) -> list[str]:
    return [method for method in BASELINES if method in measured(content)]


def targets(content: Result) -> str:
    """Each target, and whether it is met."""
    lines = []
    for budget, pairs in budgets(content).items():
        gaps = {}
        for method, ours in pairs.items():
            mean, half = interval(differences(content, method, "hypervolume", ours=ours))
            gaps[method] = mean, mean - half
        lines.append(volume_target(gaps, budget, measured_baselines(content)))
    for name in NAMES:
        mean, half = interval(differences(content, "dpo_single", "best", name))
        lines.append(best_target(name, mean + half, f"{mean:+.3f} ± {half:.3f}"))
    for name in NAMES:
        mean, _ = interval(column(content, OURS, "correlation", name))
        verdict = "met" if mean >= 0.9 else "missed"
        lines.append(f"- Rank correlation of requested and achieved {name} at least 0.9: {verdict} ({mean:.3f}).")
    return "\n".join(lines)


def setting(content: Result) -> str:
    budget, search, versions = content["plan"]["budget"], content["search"], content["versions"]
    starts = {"": "", "best": " from SFT on the best answers", "all": " from SFT on all answers"}
    chosen = "; ".join(
        f"{METHODS[m][0]} {lr:g}" + (f" with NLL × {nll:g}" if nll else "") + starts[start]
        for m, (lr, nll, start, *_) in search["chosen"].items()
    )
    tried = {m: len([row for row in search["tried"] if row["method"] == m]) for m in search["chosen"]}
    counts = ", ".join(f"{METHODS[m][0]} {n}" for m, n in tried.items())
    seeds = sorted({row["seed"] for rows in content["methods"].values() for row in rows})
    return (
        f"Seeds {', '.join(map(str, seeds))}. A Llama of {budget['num_layers']} layers, hidden size "
        f"{budget['hidden_size']}, on a world of {budget['people']} people, {budget['prompts']} questions with four "
        f"rated answers each; {budget['supervised_steps']} supervised steps of {budget['responses']} answers, then "
        f"{budget['preference_steps']} steps. Every point: {budget['questions']} held-out questions, greedy answers. "
        f"Settings tried on seed {search['seed']}: {counts}. Chosen learning rates: {chosen}. "
        f"One thread; torch {versions['torch']}, transformers {versions['transformers']}."
    )


# ------------------------------------------------------------------------------------------------------------ picture


def figure(content: Result) -> Any:
    """Operating points in two planes, mean over seeds with 95% intervals, and the hypervolume of each method."""
    from matplotlib import pyplot as plt

    made, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5), width_ratios=(1.25, 1.25, 1))
    for method in reversed(measured(content)):
        points = means(content, method)
        _plane(left, points[points[:, 2, 0] >= HARMLESS], 0, 1, method)
        _plane(middle, points, 0, 2, method)
    order = sorted(measured(content), key=lambda m: interval(column(content, m, "hypervolume"))[0])
    for y, method in enumerate(order):
        _, colour, marker = METHODS[method]
        mean, half = interval(column(content, method, "hypervolume"))
        right.errorbar(
            mean, y, xerr=half if math.isfinite(half) else None, color=colour, marker=marker, markersize=8, capsize=3
        )
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
        "Mean ratings over seeds with 95% intervals; lines join a method's best points in the plane",
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
    _, colour, marker = METHODS[method]
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
