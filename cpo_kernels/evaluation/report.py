"""One HTML file that shows an evaluation, without network or scripts, and its pictures as PNG files beside it. The
markup is the Jinja template `report.html`."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpo_kernels.data.fields import prompt_of
from cpo_kernels.data.records import prompt_text
from cpo_kernels.evaluation.controllability import Control
from cpo_kernels.evaluation.tables import percent, unscored
from cpo_kernels.extras import install_line

PROMPTS, CONDITIONS = 6, 12  # shown as samples


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        line = install_line("matplotlib")
        raise ValueError(f"--report draws with matplotlib, which is not installed: {line}")


def write_report(everything: Mapping[str, Any], folder: Path) -> Path:
    """`folder/report.html` and `folder/figures/*.png`; `everything` is what `cpo-kernels eval` saves."""
    from jinja2 import Environment, PackageLoader

    results = everything["results"]
    first = next(iter(results.values()))
    sections: dict[str, Any] = _pictures(everything, folder / "figures") | {
        "glance": _glance(results, everything["objectives"]),
        "wins": _wins(everything.get("win_rates", [])),
        "relative": _relative(results),
        "samples": _samples(everything),
        "meaning": True,
    }
    environment = Environment(loader=PackageLoader("cpo_kernels.evaluation", "."), autoescape=True, trim_blocks=True)
    html = environment.get_template("report.html").render(
        models=list(results),
        questions=first["questions"],
        requests=len(first["conditions"]),
        versions=everything["versions"],
        sections=sections,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


def _pictures(everything: Mapping[str, Any], folder: Path) -> dict[str, list[dict[str, str]]]:
    """{section: pictures as data URLs}; the light ones are also saved in `folder`."""
    from cpo_kernels.evaluation import figures

    results, objectives = everything["results"], everything["objectives"]
    panels: list[figures.Panel] = []
    if all("control" in result for result in results.values()):
        panels += figures.control_panels(results, objectives)
        panels += figures.trade_off_panels(results, objectives)
    metrics = {m: Path(r.get("run", "")) / "metrics.jsonl" for m, r in results.items() if r["stage"] != "base"}
    curves = {name: _rows(file) for name, file in metrics.items() if file.exists()}
    panels += figures.training_panels(curves, {name: results[name]["stage"] for name in curves})
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[dict[str, str]]] = {}
    for panel in panels:
        light, dark = panel.png(figures.LIGHT), panel.png(figures.DARK)
        (folder / (re.sub(r"[^\w.-]+", "-", panel.name) + ".png")).write_bytes(light)
        pictures.setdefault(panel.group, []).append({"light": _data(light), "dark": _data(dark), "alt": panel.alt})
    return pictures


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _glance(results: Mapping[str, Any], objectives: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not all("control" in result for result in results.values()):
        return {}
    control = [
        [f"{o['name']}, {model}", *Control.from_json(c).numbers()]
        for o in objectives
        for model, result in results.items()
        if (c := result["control"].get(o["name"]))
    ]
    volumes = []
    for model, result in results.items():
        volume = "-" if result["hypervolume"] != result["hypervolume"] else f"{result['hypervolume']:.1%}"
        volumes.append([model, volume, f"{len(result['front'])} of {len(result['points'])}"])
    return {"control": control, "volumes": volumes, "unscored": unscored(results).splitlines()}


def _wins(win_rates: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    """(head, rows) of a square table of models, for each kind of request."""
    models = list(dict.fromkeys(name for row in win_rates for name in (row["a"], row["b"])))
    tables = []
    for asked in dict.fromkeys(row["asked"] for row in win_rates):
        cells = {(m, m): "" for m in models}
        for r in win_rates:
            if r["asked"] == asked:
                cells[r["a"], r["b"]] = percent(r)
                cells[r["b"], r["a"]] = percent({"mean": 1 - r["mean"], "low": 1 - r["high"], "high": 1 - r["low"]})
        title = "Requests with conditions" if asked == "conditions" else "The request without tags"
        rows = [[a, *(cells[a, b] for b in models)] for a in models]
        tables.append(([title, *(f"against {b}" for b in models)], rows))
    return tables


def _relative(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [_asked(entries[0]["condition"]), *(percent(e.get("relative_accuracy")) for e in entries)]
        for entries in zip(*(result["conditions"] for result in results.values()), strict=True)
        if any("relative_accuracy" in entry for entry in entries)
    ]


def _samples(everything: Mapping[str, Any]) -> dict[str, Any]:
    """Answers side by side: a block per prompt, a row per condition, a (model, answer, scores) per model."""
    results, prompts = everything["results"], everything.get("prompts")
    first = next(iter(results.values()))["conditions"]
    if not prompts or "answers" not in first[0]:
        return {}
    shown = _shown_conditions([entry["condition"] for entry in first])
    blocks = []
    for place in spread(len(prompts), PROMPTS):
        rows = []
        for row in shown:
            entries = {model: result["conditions"][row] for model, result in results.items()}
            answers = [
                (m, e["answers"][place], _scores(e, place, everything["objectives"])) for m, e in entries.items()
            ]
            rows.append((_asked(first[row]["condition"]), answers))
        blocks.append({"prompt": prompt_text(prompt_of({"prompt": prompts[place]}, "prompt")), "rows": rows})
    note = f"{len(blocks)} of {len(prompts)} prompts, {len(shown)} of {len(first)} requests."
    return {"note": note, "blocks": blocks}


def _asked(condition: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {level:g}" for name, level in condition.items()) or "no tags"


def _scores(entry: Mapping[str, Any], place: int, objectives: Sequence[Mapping[str, Any]]) -> str:
    if "scores" not in entry:
        return ""
    pairs = zip(objectives, entry["scores"][place], strict=True)
    return ", ".join(f"{o['name']} {'-' if score != score else format(score, '.3g')}" for o, score in pairs)


def _shown_conditions(conditions: Sequence[Mapping[str, float]]) -> list[int]:
    """All, or of many those with only lowest and highest levels; the request without tags is always among them."""
    if len(conditions) <= CONDITIONS:
        return list(range(len(conditions)))
    levels: dict[str, list[float]] = {}
    for condition in conditions:
        for name, level in condition.items():
            levels.setdefault(name, []).append(level)
    tagged = [i for i, condition in enumerate(conditions) if condition]
    ends = [i for i in tagged if all(x in (min(levels[n]), max(levels[n])) for n, x in conditions[i].items())]
    kept = ends or tagged
    bare = [i for i, condition in enumerate(conditions) if not condition]
    return [kept[i] for i in spread(len(kept), CONDITIONS - len(bare))] + bare


def spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly, both ends among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
