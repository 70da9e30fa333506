"""docs/results/claims_truthfulqa.json as tables and a picture; `python -m benchmarks.plot` writes both.

Intervals are over questions: the held-out ones are drawn with replacement, the same draw for every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.rated_lab import OBJECTIVES, RatedLab
from benchmarks.claims.report import (
    INK,
    METHODS,
    OURS,
    Result,
    best_target,
    budgets,
    compared,
    cost,
    label,
    markdown,
    measured,
    measured_baselines,
    models_steps,
    volume_target,
)
from cpo_kernels.evaluation.pareto import pareto_front
from cpo_kernels.evaluation.statistics import spearman, summary

NAMES = [o.name for o in OBJECTIVES]
LOW = torch.tensor([o.low for o in OBJECTIVES], dtype=torch.float64)
SPAN = torch.tensor([o.high for o in OBJECTIVES], dtype=torch.float64) - LOW
JUDGES = {"by_question": "nearest", "by_classifier": "classifier"}  # key of a point's ratings -> the judge
RESAMPLES = 1000
DIGITS = [3] + [2] * len(NAMES)


def scores(content: Result, method: str, judge: str = "by_question", seeds: Sequence[int] | None = None) -> Tensor:
    """`[seeds, points, questions, K]`: the rating of every answer, as a share of the way from lowest to highest."""
    rows = [row for row in content["methods"][method] if seeds is None or row["seed"] in seeds]
    raw = torch.tensor([[p[judge] for p in row["points"]] for row in rows], dtype=torch.float64)
    return (raw - LOW) / SPAN


def volumes(points: Tensor) -> Tensor:
    """Hypervolume above 0 of `[..., points, 2]`, all in [0, 1]: `pareto.hypervolume` of many sets at once."""
    order = points[..., 0].argsort(dim=-1, descending=True)
    widths, heights = (points[..., k].gather(-1, order) for k in range(2))
    ends = torch.cat([widths[..., 1:], torch.zeros_like(widths[..., :1])], -1)
    return ((widths - ends) * heights.cummax(-1).values).sum(-1)


def of_means(means: Tensor) -> Tensor:
    """`[..., 1 + K]`: hypervolume and the best of every objective, means over seeds, from `[..., seeds, points, K]`."""
    return torch.cat([volumes(means).mean(-1, keepdim=True), LOW + SPAN * means.amax(-2).mean(-2)], -1)


def measures(values: Tensor) -> list[float]:
    """`of_means`; `values` as `scores` gives them."""
    made: list[float] = of_means(values.mean(2)).tolist()
    return made


@cache
def draws(questions: int) -> Tensor:
    return torch.randint(questions, (RESAMPLES, questions), generator=torch.Generator().manual_seed(0))


def resampled(values: Tensor) -> Tensor:
    """`[RESAMPLES, 1 + K]`: the measures on other draws of questions."""
    return of_means(values[:, :, draws(values.shape[2])].mean(3).permute(2, 0, 1, 3))


def interval(samples: Tensor) -> tuple[float, float]:
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return low, high


def text(mean: float, samples: Tensor, digits: int, sign: str = "") -> str:
    low, high = interval(samples)
    return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def sections(content: Result) -> dict[str, str]:
    """Name of a table in docs/results.md -> its text; `content` is empty where nothing was measured."""
    parts = ("setting", "search", "classifier", "paired", "cost", "points", "targets")
    names = ["rated claims", *(f"rated claims {part}" for part in parts)]
    if not content:
        return dict.fromkeys(names, "not measured")
    picture = "![operating points and hypervolume of every method](claims_truthfulqa.png)"
    tables = (
        f"{picture}\n\n{table(content)}",
        setting(content),
        search_table(content),
        table(content, "by_classifier"),
        paired(content),
        cost(content, RatedLab),
        points_table(content),
        targets(content),
    )
    return dict(zip(names, tables, strict=True))


def judges(content: Result) -> list[str]:
    """Of JUDGES, those that rated every answer."""
    points = [p for rows in content["methods"].values() for row in rows for p in row["points"]]
    return [judge for judge in JUDGES if all(judge in point for point in points)]


def correlations(content: Result, method: str, judge: str) -> list[float]:
    """Spearman's, per objective, of what is requested, 1 or 5, and achieved, where the other tag is 5; over seeds."""
    values = scores(content, method, judge)[:, :3]  # (5, 5), (5, 1), (1, 5)
    found = []
    for k, name in enumerate(NAMES):
        high, low = values[:, 0, :, k], values[:, 1 if name == "helpfulness" else 2, :, k]
        requested = [1.0] * high.shape[1] + [0.0] * low.shape[1]
        each = [spearman(requested, torch.cat(pair).tolist()) for pair in zip(high, low, strict=True)]
        found.append(sum(each) / len(each))
    return found


def likelihood(content: Result, method: str, name: str) -> dict[str, float]:
    """Mean over seeds and questions of the share of pairs whose log-ratio moves with the tag, with its interval."""
    rows = [row["likelihood"][name] for row in content["methods"][method]]
    return summary([sum(shares) / len(shares) for shares in zip(*rows, strict=True)])


def table(content: Result, judge: str = "by_question") -> str:
    if judge not in judges(content):
        return "Not measured."
    heads = ["method", "models × steps", "seeds", "hypervolume", *(f"best {name}" for name in NAMES)]
    heads += ["rank correlation, " + ", ".join(NAMES)]
    heads += [f"likelihood moves with the tag of {name}" for name in NAMES] if judge == "by_question" else []
    rows = []
    for method in measured(content):
        values = scores(content, method, judge)
        mean, spread = measures(values), resampled(values)
        cells = [label(method), models_steps(content, RatedLab, method), str(len(values))]
        cells += [text(mean[i], spread[:, i], digits) for i, digits in enumerate(DIGITS)]
        row = content["methods"][method][0]
        tagged = "correlation" in row
        cells.append(", ".join(f"{c:.2f}" for c in correlations(content, method, judge)) if tagged else "-")
        if judge == "by_question":
            for name in NAMES:
                found = likelihood(content, method, name) if "likelihood" in row else {}
                lacking = "not measured" if tagged else "-"
                cells.append("{mean:.0%} [{low:.0%}, {high:.0%}]".format(**found) if found else lacking)
        rows.append(cells)
    return markdown(heads, rows)


def gaps(content: Result, ours: str, method: str) -> tuple[list[float], Tensor]:
    """CPO's measures minus the baseline's over the seeds that both have, and the same on other draws of questions."""
    seeds = {row["seed"] for row in content["methods"][ours]} & {row["seed"] for row in content["methods"][method]}
    a, b = (scores(content, m, seeds=sorted(seeds)) for m in (ours, method))
    return [x - y for x, y in zip(measures(a), measures(b), strict=True)], resampled(a) - resampled(b)


def paired(content: Result) -> str:
    rows = []
    for ours, method in compared(content):
        mean, spread = gaps(content, ours, method)
        cells = [text(mean[i], spread[:, i], digits, "+") for i, digits in enumerate(DIGITS)]
        rows.append([f"{label(ours)} minus {label(method)}", *cells])
    return markdown(["difference", "hypervolume", *(f"best {name}" for name in NAMES)], rows)


def points_table(content: Result) -> str:
    rows = []
    for method in measured(content):
        means = [(LOW + SPAN * scores(content, method, judge).mean((0, 2))).tolist() for judge in judges(content)]
        for i, point in enumerate(content["methods"][method][0]["points"]):
            cells = [f"{value:.2f}" for judge in means for value in judge[i]]
            rows.append([label(method), point["label"] or "-", *cells])
    heads = ["method", "request, or weights of " + ", ".join(NAMES), *NAMES]
    others = [f"{name}, by the {JUDGES[judge]}" for judge in judges(content)[1:] for name in NAMES]
    return markdown([*heads, *others], rows)


def targets(content: Result) -> str:
    lines = []
    for budget, pairs in budgets(content).items():
        found = {}
        for method, ours in pairs.items():
            mean, spread = gaps(content, ours, method)
            found[method] = mean[0], interval(spread[:, 0])[0]
        lines.append(volume_target(found, budget, measured_baselines(content)))
    if {OURS, "dpo_single"} <= set(measured(content)):
        mean, spread = gaps(content, OURS, "dpo_single")
        for i, name in enumerate(NAMES, 1):
            lines.append(best_target(name, interval(spread[:, i])[1], text(mean[i], spread[:, i], 2, "+")))
    for k, name in enumerate(NAMES):
        found = [f"{correlations(content, OURS, key)[k]:.2f} by the {JUDGES[key]} judge" for key in judges(content)]
        followed = f"Rank correlation of requested and achieved {name} of generated answers: {', '.join(found)}."
        if "likelihood" in content["methods"][OURS][0]:
            moved = likelihood(content, OURS, name)
            verdict = "met" if moved["low"] > 0.5 else "missed"
            lines.append(
                f"- The likelihood of rated answers moves with the tag of {name}, clear of chance (50%): {verdict} "
                f"({moved['mean']:.0%} [{moved['low']:.0%}, {moved['high']:.0%}]). {followed}"
            )
        else:
            lines.append(f"- {followed}")
    return "\n".join(lines)


def search_table(content: Result) -> str:
    """What was tried on questions that are held out of the training questions, and what it was chosen by."""
    heads = ["method", "setting", "chosen by", "hypervolume", *(f"best {name}" for name in NAMES)]
    heads += ["rank correlation, " + ", ".join(NAMES), *(f"likelihood moves with the tag of {name}" for name in NAMES)]
    rows = []
    order = list(dict.fromkeys(row["method"] for row in content["search"]["tried"]))
    for row in sorted(content["search"]["tried"], key=lambda row: order.index(row["method"])):
        cells = [label(row["method"]), described(row["setting"]), f"{row['worth']:.3f}", f"{row['hypervolume']:.3f}"]
        cells += [f"{row['best'][name]:.2f}" for name in NAMES]
        tagged = "correlation" in row
        cells.append(", ".join(f"{row['correlation'][name]:.2f}" for name in NAMES) if tagged else "-")
        moved = [summary(row["likelihood"][name]) for name in NAMES] if tagged else []
        cells += ["{mean:.0%} [{low:.0%}, {high:.0%}]".format(**found) for found in moved] or ["-"] * len(NAMES)
        rows.append(cells)
    budget = content["plan"]["budget"]
    spent = sum(row["seconds"] for row in content["search"]["tried"])
    note = (
        f"{budget['supervised_steps']} supervised steps of {budget['responses']} answers, then "
        f"{budget['preference_steps']} steps for each model, in {budget['precision']}; {budget['search_questions']} "
        f"training questions held out, seed {content['search']['seed']}; {spent / 60:.0f} minutes of one thread."
    )
    return f"{markdown(heads, rows)}\n\n{note}"


def setting(content: Result) -> str:
    budget, search, versions = content["plan"]["budget"], content["search"], content["versions"]
    (questions,) = {len(p["by_question"]) for rows in content["methods"].values() for r in rows for p in r["points"]}
    agreed = "; ".join(
        f"the {judge} judge "
        + ", ".join(f"{name} {kinds['low']:.0%} and {kinds['high']:.0%}" for name, kinds in found.items())
        for judge, found in content["judges"].items()
    )
    searched = "without a search"
    if search["tried"]:
        searched = f"on {budget['search_questions']} training questions held out for it, seed {search['seed']}"
    return (
        f"{budget['supervised_steps']} supervised steps of {budget['responses']} answers, then "
        f"{budget['preference_steps']} steps for each model; a step on pairs has {budget['groups']} groups of six "
        f"answers, for CPO {budget['groups'] // budget['conditions']} questions under {budget['conditions']} "
        f"conditions each. Every point: {questions} held-out questions, greedy answers. Trained in "
        f"{budget['precision']}. Settings chosen {searched}: "
        f"{'; '.join(f'{METHODS[m][0]} {described(s)}' for m, s in search['chosen'].items())}. "
        f"One thread; torch {versions['torch']}, transformers {versions['transformers']}. "
        f"On answers that people rated low and high the judges are right: {agreed}."
    )


def described(setting: Sequence[Any]) -> str:
    """A `lab.Setting` in words."""
    lr, nll, start, beta, weight = setting
    parts = [f"{lr:g}", f"with NLL × {nll:g}" if nll else "", f"from SFT ({start})" if start else ""]
    parts += [f"β {beta:g}" if beta else "", f"weight of {NAMES[0]} {weight:g}" if weight != 1 else ""]
    return " ".join(filter(None, parts))


def figure(content: Result) -> Any:
    """Operating points of every method, and the hypervolume under them."""
    from matplotlib import pyplot as plt

    made, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(1.35, 1))
    for method in reversed(measured(content)):
        _, colour, marker = METHODS[method]
        points = LOW + SPAN * scores(content, method).mean((0, 2))
        front = points[pareto_front(points)]
        front = front[front[:, 1].argsort()]
        width = 2.4 if method == OURS else 1.2
        left.plot(front[:, 1], front[:, 0], color=colour, linewidth=width)
        left.plot(points[:, 1], points[:, 0], color=colour, marker=marker, linestyle="none", markersize=7)
    values = {m: scores(content, m) for m in measured(content)}
    order = sorted(values, key=lambda m: measures(values[m])[0])
    for y, method in enumerate(order):
        _, colour, marker = METHODS[method]
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
