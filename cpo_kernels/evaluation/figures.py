"""The report's pictures, one panel each, for a light and for a dark page. Needs matplotlib."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpo_kernels.evaluation.achieved import requested_achieved
from cpo_kernels.evaluation.pareto import pareto_front


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    faint: str
    grid: str
    models: tuple[str, ...]  # safe for colour-blind readers; beyond six the colours repeat
    heat: tuple[str, str]  # share 0, share 1


LIGHT = Theme(
    "#ffffff", "#30343b", "#c9ccd1", "#eef0f2",
    ("#1f5fa8", "#d9711f", "#1b8a6b", "#b0457a", "#7a7f88", "#6d4fc2"), ("#f4f6f9", "#1f5fa8"),
)  # fmt: skip
DARK = Theme(
    "#1b1e23", "#dfe3e8", "#4a505a", "#2a2f37",
    ("#79b0f0", "#f2a15f", "#5cc9a7", "#e58bb6", "#a5abb5", "#b39df3"), ("#23272e", "#79b0f0"),
)  # fmt: skip
MARKERS = "osD^vP"
# metrics.jsonl: what is drawn, and what it means
TRAINING = {
    "nll": "NLL of the responses (cpsft, sft)",
    "loss": "preference loss (cdpo, dpo)",
    "accuracy": "share of pairs in the right order",
    "margin": "reward of chosen minus rejected",
    "log_ratio": "log-ratio to the reference model",
    "grad_norm": "gradient norm",
}


@dataclass(frozen=True)
class Panel:
    """`draw(axis, theme)` draws it; `group` is its section of the report, `alt` its text alternative."""

    group: str
    name: str
    alt: str
    draw: Callable[[Any, Theme], None]
    size: tuple[float, float] = (4.6, 4.2)  # inches

    def png(self, theme: Theme) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, facecolor=theme.paper)
        axis = figure.add_subplot(facecolor=theme.paper)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(theme.faint)
        axis.tick_params(color=theme.faint, labelcolor=theme.ink)
        axis.grid(color=theme.grid)
        axis.set_axisbelow(True)
        self.draw(axis, theme)
        for text in (axis.xaxis.label, axis.yaxis.label):
            text.set_color(theme.ink)
        labels = axis.get_legend_handles_labels()[1]
        if labels:
            axis.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.16),
                ncols=max(1, min(len(labels), 44 // (5 + max(map(len, labels))))),
                frameon=False,
                labelcolor=theme.ink,
                fontsize=9,
            )
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, bbox_inches="tight", facecolor=theme.paper)
        return data.getvalue()


def style(number: int, theme: Theme) -> dict[str, Any]:
    return {"color": theme.models[number % 6], "marker": MARKERS[number % 6]}


def control_panels(results: Mapping[str, Any], objectives: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """Mean achieved over requested with the identity line; then, per model, the distribution of achieved scores."""
    for o in objectives:
        controls = {m: r["control"][o["name"]] for m, r in results.items() if o["name"] in r["control"]}
        if not controls:
            continue

        def curves(axis: Any, theme: Theme, controls: dict[str, Any] = controls, o: Any = o) -> None:
            ends = [o["low"], o["high"]]
            axis.plot(ends, ends, color=theme.grid, linewidth=9, solid_capstyle="round", zorder=0)
            for model, control in controls.items():
                x = [level["requested"] for level in control["levels"]]
                y = [level["achieved"] for level in control["levels"]]
                look = style(list(results).index(model), theme)
                axis.plot(x, y, label=model, clip_on=False, linewidth=2, markersize=6, **look)
            edge = 0.06 * (ends[1] - ends[0])
            axis.set(xlim=(ends[0] - edge, ends[1] + edge), xlabel="requested", ylabel="achieved, mean")
            axis.set_title(o["name"], loc="left", fontweight="bold", color=theme.ink)
            axis.set_xticks(x)

        yield Panel("control", f"control_{o['name']}", f"Requested against achieved {o['name']} of each model", curves)
    for column, o in enumerate(objectives):
        for model, result in results.items():
            pairs = requested_achieved(result["conditions"], column, o["name"])
            if pairs:
                yield _heat_map(model, o, pairs)


def _heat_map(model: str, o: Mapping[str, Any], pairs: Sequence[tuple[float, float]]) -> Panel:
    rows = sorted({requested for requested, _ in pairs})
    values = sorted({achieved for _, achieved in pairs} | set(rows))
    if len(values) > 9:  # a continuous score: eight equal bins over its range
        low, high = values[0], values[-1]
        values = [low + (high - low) * (i + 0.5) / 8 for i in range(8)]
    shares = []
    for row in rows:
        given = [achieved for requested, achieved in pairs if requested == row]
        nearest = [min(values, key=lambda value: abs(value - achieved)) for achieved in given]
        shares.append([nearest.count(value) / len(given) for value in values])

    def draw(axis: Any, theme: Theme) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        axis.grid(False)
        heat = LinearSegmentedColormap.from_list("share", theme.heat)
        axis.imshow(list(zip(*shares, strict=True)), cmap=heat, vmin=0, vmax=1, origin="lower", aspect="auto")
        for x, row in enumerate(shares):
            for y, share in enumerate(row):
                if share >= 0.005:
                    color = theme.paper if share > 0.5 else theme.ink
                    axis.text(x, y, f"{share:.0%}", ha="center", va="center", color=color, fontsize=9)
        axis.set_xticks(range(len(rows)), [f"{x:g}" for x in rows])
        axis.set_yticks(range(len(values)), [f"{x:.3g}" for x in values])
        axis.set(xlabel="requested", ylabel="achieved")
        axis.set_title(f"{o['name']}, {model}", loc="left", fontweight="bold", color=theme.ink, fontsize=11)

    alt = f"{model}: share of answers at each achieved {o['name']}, for each requested one"
    return Panel("heat", f"heat_{o['name']}_{model}", alt, draw, (4.0, 3.4))


def trade_off_panels(results: Mapping[str, Any], objectives: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """Mean scores of every condition, for every pair of objectives; the steps are each model's front in that plane."""
    for a, b in itertools.combinations(range(len(objectives)), 2):
        x, y = objectives[a], objectives[b]

        def draw(axis: Any, theme: Theme, a: Any = a, b: Any = b, x: Any = x, y: Any = y) -> None:
            for number, (model, result) in enumerate(results.items()):
                points = [(p[a], p[b]) for p in result["points"] if p[a] == p[a] and p[b] == p[b]]
                if not points:
                    continue
                look = style(number, theme)
                front = sorted({p for p, on in zip(points, pareto_front(points).tolist(), strict=True) if on})
                axis.step([p[0] for p in front], [p[1] for p in front], where="pre", color=look["color"], linewidth=1.8)
                axis.scatter([p[0] for p in points], [p[1] for p in points], s=16, alpha=0.35, zorder=2, **look)
                axis.scatter([p[0] for p in front], [p[1] for p in front], s=46, label=model, zorder=3, **look)
            axis.set(xlabel=f"{x['name']}, mean", ylabel=f"{y['name']}, mean")
            for set_limits, o in ((axis.set_xlim, x), (axis.set_ylim, y)):
                edge = 0.06 * (o["high"] - o["low"])
                set_limits(o["low"] - edge, o["high"] + edge)
            axis.set_title(f"{x['name']} and {y['name']}", loc="left", fontweight="bold", color=theme.ink)

        alt = f"Operating points and fronts in {x['name']} and {y['name']}"
        yield Panel("front", f"front_{x['name']}_{y['name']}", alt, draw)


def training_panels(curves: Mapping[str, Sequence[Mapping[str, Any]]], stages: Mapping[str, str]) -> Iterator[Panel]:
    """Metrics of each run over its steps; dots are evaluations on held-out prompts."""
    for name, title in TRAINING.items():
        lines = {}
        for model, rows in curves.items():
            supervised = stages[model] in ("cpsft", "sft")
            if name in ("nll", "loss") and supervised != (name == "nll"):
                continue
            metric = "loss" if name == "nll" else name
            train = [(row["step"], row[metric]) for row in rows if metric in row]
            held_out = [(row["step"], row[f"eval_{metric}"]) for row in rows if f"eval_{metric}" in row]
            if train:
                lines[model] = train, held_out
        if not lines:
            continue

        def draw(axis: Any, theme: Theme, lines: dict[str, Any] = lines, title: str = title) -> None:
            for model, (train, held_out) in lines.items():
                color = theme.models[list(curves).index(model) % 6]
                axis.plot(
                    [s for s, _ in train], _smooth([v for _, v in train]), color=color, label=model, linewidth=1.6
                )
                axis.scatter([s for s, _ in held_out], [v for _, v in held_out], color=color, s=36, zorder=3)
            axis.set(xlabel="step")
            axis.set_title(title, loc="left", fontweight="bold", color=theme.ink, fontsize=11)

        yield Panel("training", f"training_{name}", f"Training: {title}", draw)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over 2% of the run, so that a long run is still a line."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
