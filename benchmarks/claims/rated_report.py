"""docs/results/claims_truthfulqa.json as tables and a picture; `python -m benchmarks.plot` writes both.

Intervals are over questions: the held-out ones are drawn with replacement, the same draw for every method.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.rated_lab import OBJECTIVES
from benchmarks.claims.report import INK, METHODS, OURS, Result, best_target, label, markdown, volume_target
from cpo_kernels.evaluation.pareto import hypervolume, pareto_front

NAMES = [o.name for o in OBJECTIVES]
LOW = torch.tensor([o.low for o in OBJECTIVES], dtype=torch.float64)
SPAN = torch.tensor([o.high for o in OBJECTIVES], dtype=torch.float64) - LOW
# models trained after SFT or CPSFT where they are not as many as on the generated world
MODELS = {"modpo": 5, "soup": 2, "dpo_single": 2}
RESAMPLES = 1000


def scores(content: Result, method: str) -> Tensor:
    """`[seeds, points, questions, K]`: the rating of every answer, as a share of the way from lowest to highest."""
    rows = content["methods"][method]
    raw = torch.tensor([[p["by_question"] for p in row["points"]] for row in rows], dtype=torch.float64)
    return (raw - LOW) / SPAN


def measures(values: Tensor) -> list[float]:
    """Hypervolume and the best of every objective, means over seeds; `values` as `scores` gives them."""
    means = values.mean(2)  # [seeds, points, K]
    volume = sum(hypervolume(points, [0.0] * len(NAMES)) for points in means) / len(means)
    return [volume, *(LOW + SPAN * means.amax(1).mean(0)).tolist()]


@cache
def draws(questions: int) -> Tensor:
    return torch.randint(questions, (RESAMPLES, questions), generator=torch.Generator().manual_seed(0))


def resampled(values: Tensor) -> Tensor:
    """`[RESAMPLES, 1 + K]`: the measures on other draws of questions."""
    return torch.tensor([measures(values[:, :, draw]) for draw in draws(values.shape[2])])


def interval(samples: Tensor) -> tuple[float, float]:
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return low, high


def text(mean: float, samples: Tensor, digits: int, sign: str = "") -> str:
    low, high = interval(samples)
    return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def sections(content: Result) -> dict[str, str]:
    """Name of a table in docs/results.md -> its text; `content` is empty where nothing was measured."""
    names = ["rated claims", *(f"rated claims {part}" for part in ("setting", "paired", "points", "targets"))]
    if not content:
        return dict.fromkeys(names, "not measured")
    values = {m: scores(content, m) for m in METHODS}
    found = {m: measures(values[m]) for m in METHODS}
    spread = {m: resampled(values[m]) for m in METHODS}
    picture = "![operating points and hypervolume of every method](claims_truthfulqa.png)"
    parts = (
        f"{picture}\n\n{table(content, found, spread)}",
        setting(content),
        paired(found, spread),
        points_table(content),
        targets(content, found, spread),
    )
    return dict(zip(names, parts, strict=True))


def correlations(content: Result, method: str) -> dict[str, float]:
    rows = [row["correlation"] for row in content["methods"][method] if "correlation" in row]
    return {name: sum(row[name] for row in rows) / len(rows) for name in NAMES if rows}


def table(content: Result, found: dict[str, list[float]], spread: dict[str, Tensor]) -> str:
    heads = ["method", "models", "hypervolume", *(f"best {name}" for name in NAMES)]
    heads += ["rank correlation, " + ", ".join(NAMES), "F1 with the nearest answer"]
    rows = []
    for method, (_, models, _, _) in METHODS.items():
        digits = [3] + [2] * len(NAMES)
        cells = [text(found[method][i], spread[method][:, i], digits[i]) for i in range(len(digits))]
        asked = correlations(content, method)
        near = [p["similar"] for row in content["methods"][method] for p in row["points"]]
        cells += [", ".join(f"{value:.2f}" for value in asked.values()) or "-", f"{sum(near) / len(near):.2f}"]
        rows.append([label(method), str(MODELS.get(method, models)), *cells])
    return markdown(heads, rows)


def paired(found: dict[str, list[float]], spread: dict[str, Tensor]) -> str:
    rows = []
    for method in (m for m in METHODS if m != OURS):
        digits = [3] + [2] * len(NAMES)
        gaps = spread[OURS] - spread[method]
        cells = [text(found[OURS][i] - found[method][i], gaps[:, i], digits[i], "+") for i in range(len(digits))]
        rows.append([label(method), *cells])
    return markdown(["CPO minus", "hypervolume", *(f"best {name}" for name in NAMES)], rows)


def points_table(content: Result) -> str:
    rows = []
    for method in METHODS:
        seeds = content["methods"][method]
        for i, point in enumerate(seeds[0]["points"]):
            means = [sum(row["points"][i]["scores"][k] for row in seeds) / len(seeds) for k in range(len(NAMES))]
            rows.append([label(method), point["label"] or "-", *(f"{mean:.2f}" for mean in means)])
    return markdown(["method", "request, or weights of " + ", ".join(NAMES), *NAMES], rows)


def targets(content: Result, found: dict[str, list[float]], spread: dict[str, Tensor]) -> str:
    gaps = {}
    for method in (m for m in METHODS if m != OURS):
        low, _ = interval(spread[OURS][:, 0] - spread[method][:, 0])
        gaps[method] = found[OURS][0] - found[method][0], low
    lines = [volume_target(gaps)]
    for i, name in enumerate(NAMES, 1):
        samples = spread[OURS][:, i] - spread["dpo_single"][:, i]
        difference = text(found[OURS][i] - found["dpo_single"][i], samples, 2, "+")
        lines.append(best_target(name, interval(samples)[1], difference))
    asked = scores(content, OURS)[:, :3]  # (5, 5), (5, 1), (1, 5)
    for k, name in enumerate(NAMES):
        gains = asked[:, 0, :, k] - asked[:, 1 if name == "helpfulness" else 2, :, k]  # of asking for 5 in place of 1
        low = interval(torch.stack([gains[:, draw].mean() for draw in draws(gains.shape[1])]))[0]
        value = correlations(content, OURS)[name]
        verdict = "met" if value > 0 and low > 0 else "missed"
        lines.append(f"- Rank correlation of requested and achieved {name} clearly positive: {verdict} ({value:.2f}).")
    return "\n".join(lines)


def setting(content: Result) -> str:
    budget, versions, judge = content["budget"], content["versions"], content["judge"]
    (questions,) = {len(p["by_question"]) for rows in content["methods"].values() for r in rows for p in r["points"]}
    agreed = "; ".join(f"{name} {kinds['low']:.0%} and {kinds['high']:.0%}" for name, kinds in judge.items())
    settings = "; ".join(
        f"{METHODS[m][0]} {lr:g}" + (f" with NLL × {nll:g}" if nll else "") + (f" from SFT ({start})" if start else "")
        for m, (lr, nll, start) in content["search"]["chosen"].items()
    )
    seeds = content["seeds"]
    return (
        f"{'Seed' if len(seeds) == 1 else 'Seeds'} {', '.join(map(str, seeds))}. {budget['supervised_steps']} "
        f"supervised steps of {budget['responses']} answers, then {budget['preference_steps']} steps; a step on pairs "
        f"has {budget['groups']} groups of six answers, for CPO {budget['groups'] // budget['conditions']} questions "
        f"under {budget['conditions']} conditions each. Every point: {questions} held-out questions, greedy answers. "
        f"Trained in {budget['precision']}; learning rates, chosen without a search: {settings}. "
        f"{content['seconds'] / 60:.0f} minutes of one thread on a shared machine; torch {versions['torch']}, "
        f"transformers {versions['transformers']}. "
        f"The judge, tested on human-rated answers to the held-out questions without their copies, is right about low "
        f"and high ratings: {agreed}."
    )


def figure(content: Result) -> Any:
    """Operating points of every method, and the hypervolume under them."""
    from matplotlib import pyplot as plt

    made, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(1.35, 1))
    for method in reversed(METHODS):
        _, _, colour, marker = METHODS[method]
        points = LOW + SPAN * scores(content, method).mean((0, 2))
        front = points[pareto_front(points)]
        front = front[front[:, 1].argsort()]
        width = 2.4 if method == OURS else 1.2
        left.plot(front[:, 1], front[:, 0], color=colour, linewidth=width)
        left.plot(points[:, 1], points[:, 0], color=colour, marker=marker, linestyle="none", markersize=7)
    values = {m: scores(content, m) for m in METHODS}
    order = sorted(METHODS, key=lambda m: measures(values[m])[0])
    for y, method in enumerate(order):
        _, _, colour, marker = METHODS[method]
        mean, (low, high) = measures(values[method])[0], interval(resampled(values[method])[:, 0])
        right.plot([low, high], [y, y], color=colour, linewidth=1.5)
        right.plot(mean, y, color=colour, marker=marker, markersize=8)
    right.set_yticks(range(len(order)), [METHODS[m][0] for m in order])
    right.yaxis.tick_right()
    left.set(xlabel="helpfulness", ylabel="honesty")
    right.set(xlabel="share of the box of ratings", ylim=(-0.5, len(order) - 0.5))
    for axis, title in ((left, "every operating point"), (right, "hypervolume, 95% over questions")):
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axis.grid(color="#eef0f2")
    made.suptitle("SmolLM2-135M-Instruct, ratings of the nearest human-rated answer", color=INK, fontsize=11)
    return made
