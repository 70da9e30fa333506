"""One HTML file that shows an evaluation, without network or scripts, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cpo_kernels.data.fields import prompt_of
from cpo_kernels.data.records import prompt_text
from cpo_kernels.evaluation.controllability import Control
from cpo_kernels.evaluation.tables import percent, unscored
from cpo_kernels.extras import install_line

PROMPTS, CONDITIONS = 6, 12  # shown as samples

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #24282e; --soft: #626a75; --line: #e1e4e8; --card: #f6f8fa;
  --accent: #1f5fa8 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1b1e23; --ink: #dfe3e8; --soft: #9aa3ae; --line: #363c45; --card: #23272e; --accent: #79b0f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 1080px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem }
p { margin: .3rem 0 .8rem; max-width: 46rem } .soft, caption { color: var(--soft) } a { color: var(--accent) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0 }
.scroll { overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 600; white-space: normal }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)) }
.panels.heat { grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)) }
figure { margin: 0 } img { width: 100%; height: auto; display: block }
details { border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; padding: .5rem .8rem }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap }
.samples { width: 100%; margin-top: .6rem; table-layout: fixed }
.samples th, .samples td { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere }
.answer { white-space: pre-wrap; max-height: 14rem; overflow-y: auto } .empty { color: var(--soft); font-style: italic }
.scores { color: var(--soft); font-size: .82rem }
dt { font-weight: 600; margin-top: .5rem } dd { margin: 0; max-width: 46rem }
@media (max-width: 640px) {
  th, td { padding-right: .45rem } table { font-size: .85rem }
  .samples, .samples tbody, .samples tr, .samples td { display: block; width: 100% } .samples thead { display: none }
  .samples td { border: 0; padding: .2rem 0 } .samples tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  .samples td[data-model]::before { content: attr(data-model); color: var(--soft); font-size: .82rem; display: block } }
"""

SECTIONS = {
    "glance": ("At a glance", ""),
    "control": (
        "Requested and achieved",
        "One line per model: the mean score of its answers to each requested level, over all prompts and all levels of "
        "the other objectives. On the pale band, what was achieved is what was requested.",
    ),
    "heat": ("How the answers spread", "Each column: the answers to one requested level."),
    "front": (
        "Trade-offs",
        "Each dot: the mean scores of one condition. Large dots and the steps: those that no other dot of the model "
        "beats on both objectives. Further up and to the right is better.",
    ),
    "wins": ("Model against model", "How often the row's model gives the better answer to the same request."),
    "relative": ("By likelihood", "Relative accuracy on human-rated answers, 95% intervals by question."),
    "samples": ("Samples", ""),
    "training": ("Training", "Lines: training steps. Dots: held-out prompts."),
}
MEANINGS = {
    "rank correlation": "Spearman's, between the requested level and the score of every answer: 1 follows the order of "
    "the requests exactly, 0 ignores them.",
    "mean error": "Mean distance between requested level and score, over answers.",
    "monotone": "Share of neighbouring levels at which the mean score does not fall. A model that ignores the request "
    "has 100% here too: read it beside the rank correlation.",
    "hypervolume": "Share of the box between the lowest and the highest score of all objectives that lies below the "
    "mean scores of some condition; 100% would be the best of everything at once.",
    "win rate": "Share of questions for which the first model's answer is worth more under the condition asked, ties "
    "half; 95% interval by bootstrap over questions. An answer is worth the weighted mean of minus its distance from "
    "the requested level where there is a request, and of its score where there is none.",
    "relative accuracy": "For two human-rated answers that fit different conditions: does the likelihood of the "
    "fitting one rise when the tags ask for it? 50% is chance.",
}


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        line = install_line("matplotlib")
        raise ValueError(f"--report draws with matplotlib, which is not installed: {line}")


def write_report(everything: Mapping[str, Any], folder: Path) -> Path:
    """`folder/report.html` and `folder/figures/*.png`; `everything` is what `cpo-kernels eval` saves."""
    results, objectives = everything["results"], everything["objectives"]
    bodies = {
        "glance": _glance(results, objectives) if all("control" in result for result in results.values()) else "",
        "wins": _wins(everything.get("win_rates", [])),
        "relative": _relative(results),
        "samples": _samples(everything),
    }
    for group, pictures in _pictures(everything, folder / "figures").items():
        bodies[group] = f'<div class="panels {group}">{"".join(pictures)}</div>'
    parts = []
    for key, (title, text) in SECTIONS.items():
        if bodies.get(key):
            parts.append((key, title, (f'<p class="soft">{text}</p>' if text else "") + bodies[key]))
    meanings = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in MEANINGS.items())
    parts.append(("meaning", "What the numbers mean", f"<dl>{meanings}</dl>"))
    html = _page(everything, parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


def _page(everything: Mapping[str, Any], parts: Sequence[tuple[str, str, str]]) -> str:
    results, versions = everything["results"], everything["versions"]
    first = next(iter(results.values()))
    models = ", ".join(escape(name) for name in results)
    facts = f"{len(results)} models ({models}), " if len(results) > 1 else f"{models}, "
    facts += f"{first['questions']} prompts under {len(first['conditions'])} requests (one without tags). "
    facts += f"cpo-kernels {escape(str(versions.get('cpo-kernels')))}, torch {escape(str(versions.get('torch')))}."
    nav = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in parts)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>Evaluation: {models}</title>'
        f"<style>{STYLE}</style></head><body><h1>Does the model follow what is asked?</h1>"
        f'<p class="soft">{facts}</p><nav>{nav}</nav>{body}</body></html>\n'
    )


def _pictures(everything: Mapping[str, Any], folder: Path) -> dict[str, list[str]]:
    """{section: <figure> elements}; the light ones are saved in `folder` as well."""
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
    pictures: dict[str, list[str]] = {}
    for panel in panels:
        light, dark = panel.png(figures.LIGHT), panel.png(figures.DARK)
        (folder / (re.sub(r"[^\w.-]+", "-", panel.name) + ".png")).write_bytes(light)
        pictures.setdefault(panel.group, []).append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
            f'<img src="{_data(light)}" alt="{escape(panel.alt)}"></picture></figure>'
        )
    return pictures


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _glance(results: Mapping[str, Any], objectives: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for o in objectives:
        for model, result in results.items():
            if c := result["control"].get(o["name"]):
                rows.append([f"{o['name']}, {model}", *Control.from_json(c).numbers()])
    volumes = []
    for model, result in results.items():
        volume = "-" if result["hypervolume"] != result["hypervolume"] else f"{result['hypervolume']:.1%}"
        volumes.append([model, volume, f"{len(result['front'])} of {len(result['points'])}"])
    missing = "".join(f'<p class="soft">{escape(line)}</p>' for line in unscored(results).splitlines())
    return (
        _table(["", "rank correlation", "mean error", "monotone"], rows)
        + _table(["", "hypervolume", "on the front"], volumes)
        + missing
    )


def _wins(win_rates: Sequence[Mapping[str, Any]]) -> str:
    """A square table of models for each kind of request."""
    models = list(dict.fromkeys(name for row in win_rates for name in (row["a"], row["b"])))
    blocks = ""
    for asked in dict.fromkeys(row["asked"] for row in win_rates):
        cells = {(m, m): "" for m in models}
        for r in win_rates:
            if r["asked"] == asked:
                cells[r["a"], r["b"]] = percent(r)
                cells[r["b"], r["a"]] = percent({"mean": 1 - r["mean"], "low": 1 - r["high"], "high": 1 - r["low"]})
        title = "Requests with conditions" if asked == "conditions" else "The request without tags"
        rows = [[a, *(cells[a, b] for b in models)] for a in models]
        blocks += _table([title, *(f"against {b}" for b in models)], rows)
    return blocks


def _relative(results: Mapping[str, Any]) -> str:
    rows = []
    for entries in zip(*(result["conditions"] for result in results.values()), strict=True):
        if any("relative_accuracy" in entry for entry in entries):
            rows.append([_asked(entries[0]["condition"]), *(percent(e.get("relative_accuracy")) for e in entries)])
    return _table(["condition", *results], rows) if rows else ""


def _samples(everything: Mapping[str, Any]) -> str:
    """Answers side by side: a block per prompt, a row per condition, a column per model."""
    results, prompts = everything["results"], everything.get("prompts")
    first = next(iter(results.values()))["conditions"]
    if not prompts or "answers" not in first[0]:
        return ""
    rows = _shown_conditions([entry["condition"] for entry in first])
    head = "<th>asked for</th>" + "".join(f"<th>{escape(model)}</th>" for model in results)
    blocks: list[str] = []
    for place in spread(len(prompts), PROMPTS):
        body = ""
        for row in rows:
            body += f"<tr><td><strong>{escape(_asked(first[row]['condition']))}</strong></td>"
            for model, result in results.items():
                entry = result["conditions"][row]
                body += f'<td data-model="{escape(model)}">{_answer(entry, place, everything["objectives"])}</td>'
            body += "</tr>"
        title = escape(prompt_text(prompt_of({"prompt": prompts[place]}, "prompt")))
        table = f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        blocks.append(f"<details{'' if blocks else ' open'}><summary>{title}</summary>{table}</details>")
    text = f"{len(blocks)} of {len(prompts)} prompts, {len(rows)} of {len(first)} requests."
    return f'<p class="soft">{text}</p>' + "".join(blocks)


def _asked(condition: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {level:g}" for name, level in condition.items()) or "no tags"


def _answer(entry: Mapping[str, Any], place: int, objectives: Sequence[Mapping[str, Any]]) -> str:
    text = entry["answers"][place]
    shown = f'<div class="answer">{escape(text)}</div>' if text else '<div class="empty">(empty answer)</div>'
    if "scores" in entry:
        pairs = zip(objectives, entry["scores"][place], strict=True)
        scores = ", ".join(f"{o['name']} {'-' if score != score else format(score, '.3g')}" for o, score in pairs)
        shown += f'<div class="scores">{escape(scores)}</div>'
    return shown


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
