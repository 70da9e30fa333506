"""The demo's picture: requested against achieved per objective, and the trade-off along which the tags move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpo_kernels.evaluation.controllability import Control

INK, FAINT, OURS = "#30343b", "#c9ccd1", "#1f5fa8"
STYLES = [  # by position: the last model is emphasised
    {"color": "#8a8f98", "marker": "s", "linewidth": 1.6, "linestyle": (0, (4, 2)), "markersize": 5},
    {"color": "#e07b39", "marker": "D", "linewidth": 1.8, "markersize": 5},
    {"color": "#8fb8de", "marker": "o", "linewidth": 1.8, "markersize": 5},
    {"color": OURS, "marker": "o", "linewidth": 2.6, "markersize": 7},
]


def plot_controllability(
    controls: Mapping[str, Mapping[str, Control]],
    trade_off: Mapping[str, Sequence[tuple[str, float, float]]],
    axes_of_trade_off: tuple[str, str],
    path: Path,
    title: str = "",
) -> None:
    """Write a PNG: a panel per objective, and one with the (label, x, y) points of every model in `trade_off`.

    Up to four models, the same in the same order in both; the last is emphasised.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = dict(zip(controls, STYLES[-len(controls) :], strict=True))
    objectives = list(next(iter(controls.values())))
    columns = (len(objectives) + 2) // 2
    figure, grid = plt.subplots(2, columns, figsize=(4.9 * columns, 9.2))
    axes = list(grid.flat)
    for axis, objective in zip(axes, objectives, strict=False):
        _requested_achieved(axis, objective, {name: c[objective] for name, c in controls.items()}, styles)
    _trade_off(axes[len(objectives)], trade_off, axes_of_trade_off, styles)
    for axis in axes[len(objectives) + 1 :]:
        axis.remove()
    for axis in axes[: len(objectives) + 1]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(color=FAINT, labelcolor=INK)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.grid(color="#eef0f2")
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=11, labelcolor=INK)
    figure.suptitle(title, color=INK, x=0.02, ha="left", fontsize=14, fontweight="bold")
    figure.tight_layout(rect=(0, 0.05, 1, 1), h_pad=2.5, w_pad=2.5)
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)


def _requested_achieved(axis: Any, objective: str, controls: Mapping[str, Control], styles: Mapping[str, Any]) -> None:
    for name, control in controls.items():
        x = [level.requested for level in control.levels]
        axis.plot(x, [level.achieved for level in control.levels], label=name, clip_on=False, **styles[name])
    ends = [x[0], x[-1]]
    axis.plot(ends, ends, color="#e3e6ea", linewidth=9, solid_capstyle="round", zorder=0)
    limits = (ends[0] - 0.07 * (ends[1] - ends[0]), ends[1] + 0.07 * (ends[1] - ends[0]))
    axis.set(xticks=x, yticks=x, xlim=limits, ylim=limits, xlabel="requested", ylabel="achieved")
    last, ours = list(controls.items())[-1]
    _title(axis, objective, f"rank correlation of {last} {ours.correlation:.2f}")


def _trade_off(axis: Any, trade_off: Mapping[str, Any], names: Sequence[str], styles: Mapping[str, Any]) -> None:
    for name, points in trade_off.items():
        style = dict(styles[name])
        if len(points) == 1:
            style["markersize"] = 11
        axis.plot([p[1] for p in points], [p[2] for p in points], clip_on=False, **style)
    for label, x, y in list(trade_off.values())[-1]:
        axis.annotate(label, (x, y), xytext=(9, 6), textcoords="offset points", fontsize=9.5, color=OURS)
    axis.set(xlabel=f"{names[0]} achieved", ylabel=f"{names[1]} achieved", xlim=(0.7, 5.3), ylim=(0.7, 5.3))
    axis.set(xticks=range(1, 6), yticks=range(1, 6))
    _title(axis, "where nobody knows the answer", f"at the points: {names[0]}, {names[1]} requested")


def _title(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, color=INK, fontweight="bold", loc="left", pad=22)
    axis.text(0, 1.03, below, transform=axis.transAxes, color="#6b7280", fontsize=9.5)
