"""Results as text for the terminal. `results` is {model: what `run.evaluate` returns}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpo_kernels.evaluation.controllability import Control, control_table
from cpo_kernels.evaluation.likelihood import paired_gain
from cpo_kernels.objectives import Objective

Results = Mapping[str, Mapping[str, Any]]


def rated_table(results: Results, objectives: Sequence[Objective]) -> str:
    """One row per model and condition; percentages, with 95% intervals by question in brackets.

    `n`: questions with a pair to compare. `best NAME`: share of the matched answers rated highest on NAME.
    """
    names = [o.name for o in objectives]
    width = max(5, *map(len, results))
    asked = max(len(short(entry["condition"])) for r in results.values() for entry in r["conditions"])
    lines = [f"{'model':<{width}}  {'condition':<{asked}}  {'relative accuracy':>17}  {'n':>4}  {'no comment':>16}"]
    lines[0] += "  matched" + "".join(f"  {'best ' + name:>{len(name) + 5}}" for name in names)
    for model, result in results.items():
        for entry in result["conditions"]:
            relative = entry.get("relative_accuracy")
            line = f"{model:<{width}}  {short(entry['condition']):<{asked}}  {percent(relative):>17}"
            line += f"  {relative['questions'] if relative else '-':>4}  {percent(entry.get('no_comment')):>16}"
            if "matched" in entry:
                shares = {name: entry["best"][name]["mean"] for name in names}
                line += f"  {entry['matched']['mean']:>7.0%}"
                line += "".join(f"  {'-' if x != x else f'{x:.0%}':>{len(n) + 5}}" for n, x in shares.items())
            lines.append(line)
    models = list(results)
    for before, after in zip(models, models[1:], strict=False):
        for old, new in zip(results[before]["conditions"], results[after]["conditions"], strict=True):
            if "relative_accuracy" in new and "relative_accuracy" in old:
                gain = paired_gain(new["relative_accuracy"], old["relative_accuracy"])
                lines.append(f"{after} over {before}, {short(new['condition'])}: relative {_points(gain)}")
    for model, result in results.items():
        for row in result.get("changed", ()):
            change = f"{row['objective']} alone, {short(row['from'])} -> {short(row['to'])}"
            lines.append(f"{model:<{width}}  {change}: changes {percent(row['changed'])} of the answers")
    return "\n".join(lines)


def score_table(results: Results, objectives: Sequence[Objective], win_rates: Sequence[Mapping[str, Any]]) -> str:
    """Per objective, a row per model and a column per requested level; then hypervolume and win rates."""
    asked = [o.name for o in objectives if all(o.name in r["control"] for r in results.values())]
    controls = {m: {n: Control.from_json(r["control"][n]) for n in asked} for m, r in results.items()}
    blocks = [control_table(controls)] if asked else []
    width = max(12, *map(len, results))
    rows = [f"{'':<{width}}{'hypervolume':>13}{'on the front':>14}"]
    rows += [
        f"{model:<{width}}{r['hypervolume']:13.3f}{len(r['front']):>8} of {len(r['points']):<3}"
        for model, r in results.items()
    ]
    blocks.append("\n".join(rows))
    if win_rates:
        wins = [f"{r['a']} beats {r['b']}, {r['asked']}: {percent(r)} of {r['questions']} questions" for r in win_rates]
        blocks.append("\n".join(wins))
    if missing := unscored(results):
        blocks.append(missing)
    return "\n\n".join(blocks)


def unscored(results: Results) -> str:
    """How many answers of which model lack a score; '' if none does."""
    counts = {
        model: (r.get("unscored", 0), sum(len(e["scores"]) for e in r["conditions"])) for model, r in results.items()
    }
    lines = [
        f"{model}: {n} of {total} answers lack a score and are left out" for model, (n, total) in counts.items() if n
    ]
    return "\n".join(lines)


def short(condition: Mapping[str, float]) -> str:
    return " ".join(f"{name} {level:g}" for name, level in condition.items()) or "no tags"


def percent(value: Mapping[str, float] | None) -> str:
    if value is None or value["mean"] != value["mean"]:
        return "-"
    return f"{value['mean']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:+.1f} points [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
