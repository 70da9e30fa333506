"""The demo's picture: requested against achieved per objective, and the trade-off that the tags move along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cpo_kernels.evaluation.controllability import Control

INK, FAINT = "#30343b", "#c9ccd1"
STYLES = [  # by position: the last model is the one to look at
    {"color": "#8a8f98", "marker": "s", "linewidth": 1.6, "linestyle": (0, (4, 2)), "markersize": 5},
    {"color": "#e07b39", "marker": "D", "linewidth": 1.8, "markersize": 5},
    {"color": "#8fb8de", "marker": "o", "linewidth": 1.8, "markersize": 5},
    {"color": "#1f5fa8", "marker": "o", "linewidth": 2.6, "markersize": 7},
]


def plot_controllability(
    controls: Mapping[str, Mapping[str, Control]],
    trade_off: Mapping[str, Sequence[tuple[str, float, float]]],
    axes_of_trade_off: tuple[str, str],
    path: Path,
    title: str = "",
) -> None:
    """Write a PNG: a panel per objective, and one with the (label, x, y) points of every model in `trade_off`.

    Up to four models, the same ones in the same order in both; the last is drawn strongest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = dict(zip(controls, STYLES[-len(controls) :], strict=True))
    objectives = list(next(iter(controls.values())))
    figure, axes = plt.subplots(1, len(objectives) + 1, figsize=(4.1 * (len(objectives) + 1), 4.6))
    for axis, objective in zip(axes, objectives, strict=False):
        for name, by_objective in controls.items():
            control = by_objective[objective]
            x = [level.requested for level in control.levels]
            label = f"{name}  \N{GREEK SMALL LETTER RHO} = {control.correlation:.2f}"
            axis.plot(x, [level.achieved for level in control.levels], label=label, clip_on=False, **styles[name])
        ends = [x[0], x[-1]]
        axis.plot(ends, ends, color=FAINT, linewidth=6, solid_capstyle="round", zorder=0)
        margin = 0.06 * (ends[1] - ends[0])
        axis.set(
            xticks=x, yticks=x, xlim=(ends[0] - margin, ends[1] + margin), ylim=(ends[0] - margin, ends[1] + margin)
        )
        axis.set(xlabel=f"{objective} requested", ylabel=f"{objective} achieved")
        axis.set_title(objective, color=INK, fontweight="bold", loc="left")
        axis.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), handlelength=2.4)
    _trade_off(axes[-1], trade_off, axes_of_trade_off, styles)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(color=FAINT, labelcolor=INK)
        axis.grid(color="#eef0f2")
        axis.set_axisbelow(True)
    if title:
        figure.suptitle(title, color=INK, x=0.012, ha="left", fontsize=13)
    figure.tight_layout(w_pad=2.2)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _trade_off(axis, trade_off, names, styles) -> None:
    for name, points in trade_off.items():
        x, y = [p[1] for p in points], [p[2] for p in points]
        style = dict(styles[name]) if len(points) > 1 else dict(styles[name], markersize=10)
        axis.plot(x, y, label=name, clip_on=False, **style)
    for label, x, y in list(trade_off.values())[-1]:
        axis.annotate(label, (x, y), xytext=(7, 6), textcoords="offset points", fontsize=8.5, color="#1f5fa8")
    axis.set(xlabel=f"{names[0]} achieved", ylabel=f"{names[1]} achieved", xlim=(0.75, 5.25), ylim=(0.75, 5.4))
    axis.set(xticks=range(1, 6), yticks=range(1, 6))
    axis.set_title("where nobody knows the answer", color=INK, fontweight="bold", loc="left")
    axis.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.17))
