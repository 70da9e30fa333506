"""The method's claims on the generated world: CPO against its baselines, on several seeds.

    python -m benchmarks.claims --seeds 5 --out docs/results/claims.json           # everything, about an hour
    python -m benchmarks.claims --just 3 --minutes 2.5                             # go on with seed 3 for a while

A line of RUN/seed-S.jsonl is one method's measurements; a killed run goes on where it was. The learning rate of every
method, and for those without conditions the start, is the candidate that is worth most on SEARCH_SEED, which is none
of the seeds. One thread: the same bits on every run of one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import claims_report
from cpo_kernels.demo import methods
from cpo_kernels.demo.judge import MAX_NEW_TOKENS, judge
from cpo_kernels.demo.lab import Budget, Lab, Setting, State
from cpo_kernels.demo.methods import NAMES, numbers, one_hot
from cpo_kernels.demo.world import OBJECTIVES
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.evaluation.pareto import hypervolume
from cpo_kernels.training.checkpoints import atomic_text
from cpo_kernels.training.rundir import versions

SEARCH_SEED = 100
# What is tried, the same for CPO and its baselines as far as it applies.
SUPERVISED = [Setting(1e-3), Setting(2e-3)]
STEPS = [(1e-5, 0.0), (3e-5, 0.0), (1e-4, 0.0), (1e-4, 0.3)]  # learning rate, weight of the NLL
PAIRS = [Setting(lr, nll) for lr, nll in STEPS]
UNCONDITIONED = [*(Setting(lr, nll, "all") for lr, nll in STEPS), Setting(3e-5, 0.0, "best")]
OWN_ANSWERS = [Setting(lr) for lr in (3e-5, 1e-4, 3e-4, 1e-3)]
LOWEST = [float(o.low) for o in OBJECTIVES]
WEIGHTS = [(a / 3, b / 3, (3 - a - b) / 3) for a in range(3, -1, -1) for b in range(3 - a, -1, -1)]  # 10
# As many requests: the best of everything, the best of some with the others open, and less of one than the best.
REQUESTS: list[dict[str, float]] = [
    {},
    {"helpfulness": 5, "honesty": 5, "harmlessness": 1},
    {"helpfulness": 5, "harmlessness": 1},
    {"honesty": 5, "harmlessness": 1},
    {"harmlessness": 1},
    {"helpfulness": 5, "honesty": 4, "harmlessness": 1},
    {"helpfulness": 5, "honesty": 3, "harmlessness": 1},
    {"helpfulness": 4, "honesty": 5, "harmlessness": 1},
    {"helpfulness": 5},
    {"helpfulness": 5, "harmlessness": 0},
]


class Point(NamedTuple):
    """One way to run a method: a model, and the request that it gets (None: no tags)."""

    label: str
    state: State
    request: Mapping[str, float] | None = None


Choices = dict[str, Setting]  # method -> its setting, for those before it in METHODS


def _start(lab: Lab, setting: Setting, chosen: Choices) -> State:
    return methods.sft(lab, chosen["sft"], setting.start)


def _requests(state: State) -> list[Point]:
    return [Point(request_text(r), state, r) for r in REQUESTS]


def _sft(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return [Point("", methods.sft(lab, setting))]


def _dpo_sum(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return [Point("", methods.dpo(lab, _start(lab, setting, chosen), [o.weight for o in OBJECTIVES], setting))]


def _dpo_single(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    start = _start(lab, setting, chosen)
    return [Point(name, methods.dpo(lab, start, one_hot(i), setting)) for i, name in enumerate(NAMES)]


def _modpo(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    start = _start(lab, setting, chosen)
    return [Point(numbers(w), methods.modpo(lab, start, w, setting)) for w in WEIGHTS]


def _soup(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    start = _start(lab, setting, chosen)
    return [Point(numbers(w), methods.soup(lab, start, w, setting)) for w in WEIGHTS]


def _cpsft(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return _requests(methods.cpsft(lab, setting))


def _ric(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return _requests(methods.ric(lab, methods.cpsft(lab, chosen["cpsft"]), setting))


def _cpo(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return _requests(methods.cpo(lab, methods.cpsft(lab, chosen["cpsft"]), setting))


# method -> its operating points, and the settings to choose from
METHODS: dict[str, tuple[Callable[[Lab, Setting, Choices], list[Point]], list[Setting]]] = {
    "sft": (_sft, SUPERVISED),
    "cpsft": (_cpsft, SUPERVISED),
    "cpo": (_cpo, PAIRS),
    "ric": (_ric, OWN_ANSWERS),
    "dpo_sum": (_dpo_sum, UNCONDITIONED),
    "dpo_single": (_dpo_single, UNCONDITIONED),
    "soup": (_soup, UNCONDITIONED),
    "modpo": (_modpo, UNCONDITIONED),
}


# ------------------------------------------------------------------------------------------------------- measurement


def measure(lab: Lab, points: Sequence[Point]) -> dict[str, Any]:
    """Mean ratings at every operating point over the held-out questions, and what follows from them."""
    rows = []
    for point in points:
        model = lab.model(point.state)
        asked = [(question.prompt, point.request) for question in lab.questions]
        answers = greedy_answers(model, lab.template, asked, MAX_NEW_TOKENS, batch_size=256)
        ratings = [lab.world.rate(q, text) for q, text in zip(lab.questions, answers, strict=True)]
        harmful = [r["harmlessness"] for q, r in zip(lab.questions, ratings, strict=True) if q.harmful]
        scores = [sum(r[name] for r in ratings) / len(ratings) for name in NAMES[:2]]
        well_formed = sum(map(lab.world.well_formed, answers)) / len(answers)
        rows.append(
            {"label": point.label, "scores": [*scores, sum(harmful) / len(harmful)], "well_formed": well_formed}
        )
    measured = {
        "points": rows,
        "hypervolume": share_of_box([row["scores"] for row in rows]),
        "best": {name: max(row["scores"][i] for row in rows) for i, name in enumerate(NAMES)},
    }
    if points[0].request is not None:
        judged = judge(lab.world, lab.model(points[0].state), lab.template, lab.swept, tags=True)
        measured["correlation"] = {name: control.correlation for name, control in judged.control.items()}
    return measured


def share_of_box(points: Sequence[Sequence[float]]) -> float:
    """Hypervolume above the lowest ratings, as a share of the box up to the highest."""
    volume = 1.0
    for o in OBJECTIVES:
        volume *= o.high - o.low
    return hypervolume(points, LOWEST) / volume


def worth(row: Mapping[str, Any]) -> float:
    """What a setting is chosen by: hypervolume, and for DPO on one objective each the mean of the three best scores."""
    if row["method"] != "dpo_single":
        return row["hypervolume"]
    return sum((row["best"][o.name] - o.low) / (o.high - o.low) for o in OBJECTIVES) / len(OBJECTIVES)


def request_text(request: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {level:g}" for name, level in request.items()) or "no tags"


# --------------------------------------------------------------------------------------------------------------- runs


class Rows:
    """Finished measurements of one seed, a JSON line each. A line that a kill cut short is dropped."""

    def __init__(self, path: Path):
        self.path, self.rows = path, list[dict[str, Any]]()
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            atomic_text(whole, path)
        self.rows = [json.loads(line) for line in whole.splitlines()]

    def get(self, method: str, setting: Setting) -> dict[str, Any] | None:
        for row in self.rows:
            if (row["method"], row["setting"]) == (method, list(setting)):
                return row
        return None

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


class Run:
    """The run directory: one Lab and one file of rows a seed."""

    def __init__(self, folder: Path, budget: Budget, methods: Sequence[str] = tuple(METHODS)):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.budget, self.methods = folder, budget, methods
        plan = {"budget": asdict(budget), "requests": REQUESTS, "weights": WEIGHTS, "settings": settings_json()}
        plan = json.loads(json.dumps(plan))
        if (folder / "plan.json").exists() and json.loads((folder / "plan.json").read_text()) != plan:
            raise ValueError(f"{folder} holds a run of another plan (plan.json): give another --run")
        atomic_text(json.dumps(plan, indent=1), folder / "plan.json")
        self.labs: dict[int, Lab] = {}

    def rows(self, seed: int) -> Rows:
        return Rows(self.folder / f"seed-{seed}.jsonl")

    def work(self, seeds: Sequence[int]) -> Iterator[str]:
        """Measure what is missing; yields a line after each measurement."""
        for seed, method, setting, chosen in self.missing(seeds):
            if seed not in self.labs:
                self.labs = {seed: Lab(seed, self.budget, self.folder / f"models-{seed}")}
            started = time.perf_counter()
            measured = measure(self.labs[seed], METHODS[method][0](self.labs[seed], setting, chosen))
            seconds = round(time.perf_counter() - started, 1)
            self.rows(seed).add({"method": method, "setting": list(setting)} | measured | {"seconds": seconds})
            yield f"seed {seed} {method} {setting}: {measured['hypervolume']:.3f}, {seconds} s"

    def missing(self, seeds: Sequence[int]) -> Iterator[tuple[int, str, Setting, Choices]]:
        for method in self.methods:
            for setting in METHODS[method][1]:
                if self.rows(SEARCH_SEED).get(method, setting) is None:
                    yield SEARCH_SEED, method, setting, self.chosen()
        chosen = self.chosen()
        for seed in seeds:
            for method in self.methods:
                if self.rows(seed).get(method, chosen[method]) is None:
                    yield seed, method, chosen[method], chosen

    def chosen(self) -> Choices:
        """Per searched method the setting that is worth most; the first of equal ones."""
        found = {}
        for method in self.methods:
            rows = [row for row in self.rows(SEARCH_SEED).rows if row["method"] == method]
            if len(rows) == len(METHODS[method][1]):
                best = max(rows, key=worth)
                found[method] = Setting(*best["setting"])
        return found

    def results(self, seeds: Sequence[int]) -> dict[str, Any]:
        chosen = self.chosen()
        searched = [row for row in self.rows(SEARCH_SEED).rows if row["method"] in self.methods]
        measured = {m: [self.rows(s).get(m, chosen[m]) for s in seeds] for m in self.methods}
        seconds = sum(row["seconds"] for rows in measured.values() for row in rows if row)
        search = [{k: row[k] for k in ("method", "setting")} | {"worth": worth(row)} for row in searched]
        return {
            "seeds": list(seeds),
            "budget": asdict(self.budget),
            "search": {"seed": SEARCH_SEED, "tried": search, "chosen": {m: list(s) for m, s in chosen.items()}},
            "seconds": round(seconds + sum(row["seconds"] for row in searched)),
            "versions": versions(),
            "methods": {
                m: [{k: v for k, v in row.items() if k not in ("method", "setting", "seconds")} for row in rows if row]
                for m, rows in measured.items()
            },
        }


def settings_json() -> dict[str, list[list[Any]]]:
    return {method: [list(setting) for setting in settings] for method, (_, settings) in METHODS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N - 1 (default %(default)s)")
    parser.add_argument("--just", type=int, nargs="+", help="measure these seeds only, and write no results")
    parser.add_argument("--minutes", type=float, default=0, help="start no measurement after so long, write no results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="with --just: only these")
    parser.add_argument("--run", type=Path, default=Path("runs/claims"), help="run directory (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/claims.json"), help="default %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.monotonic()
    run = Run(args.run, Budget(), args.methods)
    for line in run.work(args.just or range(args.seeds)):
        print(line, flush=True)
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            print("time is up: run again to go on")
            return 0
    if not args.just:
        results = run.results(range(args.seeds))
        atomic_text(json.dumps(results, indent=1) + "\n", args.out)
        print(claims_report.table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
