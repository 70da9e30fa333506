"""The method's claims: CPO against its baselines, on the generated world or on human ratings, on several seeds.

    python -m benchmarks.claims --seeds 5 --out docs/results/claims.json           # everything, about 90 minutes
    python -m benchmarks.claims --just 3 --minutes 2.5                             # go on with seed 3 for a while
    python -m benchmarks.claims --study truthfulqa --data truthfulqa_ratings.jsonl --seeds 1

A line of RUN/seed-S.jsonl is one method's measurements; a killed run goes on where it was. Where a method has several
settings (learning rate, NLL, for those without conditions the start), the one that is worth most on SEARCH_SEED counts,
which is none of the seeds. One thread: the same bits on every run of one machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.claims import methods
from benchmarks.claims.lab import Lab, Setting, State
from benchmarks.claims.methods import numbers
from benchmarks.claims.rated_lab import RatedBudget, RatedLab
from benchmarks.claims.world_lab import Budget, WorldLab
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.evaluation.pareto import hypervolume
from cpo_kernels.files import atomic_text
from cpo_kernels.objectives import Objective
from cpo_kernels.training.rundir import versions

SEARCH_SEED = 100

# name -> its data and model, its budget, its files
STUDIES: dict[str, tuple[type[Lab], type, str]] = {
    "world": (WorldLab, Budget, "claims"),
    "truthfulqa": (RatedLab, RatedBudget, "claims_truthfulqa"),
}


class Point(NamedTuple):
    """One way to run a method: a model, and the request that it gets (None: no tags)."""

    label: str
    state: State
    request: Mapping[str, float] | None = None


Choices = dict[str, Setting]  # method -> its setting, for those that have one by now


def _start(lab: Lab, setting: Setting, chosen: Choices) -> State:
    return methods.sft(lab, chosen["sft"], setting.start)


def _requests(lab: Lab, state: State) -> list[Point]:
    return [Point(request_text(r), state, r) for r in lab.requests]


def _sft(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return [Point("", methods.sft(lab, setting))]


def _dpo_sum(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return [Point("", methods.dpo(lab, _start(lab, setting, chosen), [o.weight for o in lab.objectives], setting))]


def _dpo_single(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    start = _start(lab, setting, chosen)
    return [Point(o.name, methods.single(lab, start, i, setting)) for i, o in enumerate(lab.objectives)]


def _modpo(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    start = _start(lab, setting, chosen)
    return [Point(numbers(w), methods.modpo(lab, start, w, setting)) for w in lab.weights]


def _soup(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    start = _start(lab, setting, chosen)
    return [Point(numbers(w), methods.soup(lab, start, w, setting)) for w in lab.weights]


def _cpsft(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return _requests(lab, methods.cpsft(lab, setting))


def _ric(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return _requests(lab, methods.ric(lab, methods.cpsft(lab, chosen["cpsft"]), setting))


def _cpo(lab: Lab, setting: Setting, chosen: Choices) -> list[Point]:
    return _requests(lab, methods.cpo(lab, methods.cpsft(lab, chosen["cpsft"]), setting))


# method -> its operating points
METHODS: dict[str, Callable[[Lab, Setting, Choices], list[Point]]] = {
    "sft": _sft,
    "cpsft": _cpsft,
    "cpo": _cpo,
    "ric": _ric,
    "dpo_sum": _dpo_sum,
    "dpo_single": _dpo_single,
    "soup": _soup,
    "modpo": _modpo,
}


# ------------------------------------------------------------------------------------------------------- measurement


def measure(lab: Lab, points: Sequence[Point]) -> dict[str, Any]:
    """Mean ratings at every operating point over the held-out questions, and what follows from them."""
    rows, scores = [], []
    for point in points:
        asked = [(record.prompt, point.request) for record in lab.held_out]
        answers = greedy_answers(lab.model(point.state), lab.template, asked, lab.max_new_tokens, lab.batch_size)
        scores.append(lab.scores(answers))
        columns = [[v for v in column if not math.isnan(v)] for column in zip(*scores[-1], strict=True)]
        means = [sum(column) / len(column) for column in columns]
        rows.append({"label": point.label, "scores": means} | lab.extras(answers, scores[-1]))
    measured = {
        "points": rows,
        "hypervolume": share_of_box([row["scores"] for row in rows], lab.objectives),
        "best": {o.name: max(row["scores"][i] for row in rows) for i, o in enumerate(lab.objectives)},
    }
    if points[0].request is not None:
        measured["correlation"] = lab.correlation(lab.model(points[0].state), scores)
    return measured


def share_of_box(points: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> float:
    """Hypervolume above the lowest ratings, as a share of the box up to the highest."""
    return hypervolume(points, [o.low for o in objectives]) / math.prod(o.high - o.low for o in objectives)


def worth(row: Mapping[str, Any], objectives: Sequence[Objective]) -> float:
    """What a setting is chosen by: hypervolume, and for DPO on one objective each the mean of the best scores."""
    if row["method"] != "dpo_single":
        return row["hypervolume"]
    return sum((row["best"][o.name] - o.low) / (o.high - o.low) for o in objectives) / len(objectives)


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


def described(budget: Any) -> dict[str, Any]:
    """The budget in files that others read: of its data name and hash, not where it lies."""
    kept = asdict(budget)
    if "data" in kept:
        file = Path(kept["data"])
        kept["data"] = {"file": file.name, "blake2b": blake2b(file.read_bytes(), digest_size=16).hexdigest()}
    return kept


class Run:
    """The run directory of a study: one file of rows and one folder of models a seed."""

    def __init__(self, folder: Path, study: type[Lab], budget: Any, methods: Sequence[str] = tuple(METHODS)):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.study, self.budget, self.methods = folder, study, budget, methods
        plan = {"budget": described(budget), "requests": study.requests, "weights": study.weights}
        plan |= {"settings": study.settings, "levels": study.levels}
        plan |= {"own_ratings": study.own_ratings, "asked_for": study.asked_for, "on_pairs": study.on_pairs}
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
            lab = self.lab(seed)
            started = time.perf_counter()
            measured = measure(lab, METHODS[method](lab, setting, chosen))
            seconds = round(time.perf_counter() - started, 1)
            self.rows(seed).add({"method": method, "setting": list(setting)} | measured | {"seconds": seconds})
            yield f"seed {seed} {method} {setting}: {measured['hypervolume']:.3f}, {seconds} s"

    def lab(self, seed: int) -> Lab:
        """The seed's Lab; only the last one is held."""
        if seed not in self.labs:
            self.labs = {seed: self.study(seed, self.budget, self.folder / f"models-{seed}")}
        return self.labs[seed]

    def missing(self, seeds: Sequence[int]) -> Iterator[tuple[int, str, Setting, Choices]]:
        for method in self.methods:
            for setting in self.searched(method):
                if self.rows(SEARCH_SEED).get(method, setting) is None:
                    yield SEARCH_SEED, method, setting, self.chosen()
        chosen = self.chosen()
        for seed in seeds:
            for method in self.methods:
                if self.rows(seed).get(method, chosen[method]) is None:
                    yield seed, method, chosen[method], chosen

    def searched(self, method: str) -> list[Setting]:
        """The settings to choose from: none where there is one."""
        settings = self.study.settings[method]
        return settings if len(settings) > 1 else []

    def chosen(self) -> Choices:
        """Per method the setting that is worth most; the first of equal ones. Without those yet to be searched."""
        found = {}
        for method in METHODS:
            rows = [row for row in self.rows(SEARCH_SEED).rows if row["method"] == method]
            if not self.searched(method):
                found[method] = self.study.settings[method][0]
            elif len(rows) == len(self.searched(method)):
                found[method] = Setting(*max(rows, key=self.worth)["setting"])
        return found

    def worth(self, row: Mapping[str, Any]) -> float:
        return worth(row, self.study.objectives)

    def results(self, seeds: Sequence[int]) -> dict[str, Any]:
        chosen = self.chosen()
        searched = [row for row in self.rows(SEARCH_SEED).rows if row["method"] in self.methods]
        measured = {m: [self.rows(s).get(m, chosen[m]) for s in seeds] for m in self.methods}
        seconds = sum(row["seconds"] for rows in measured.values() for row in rows if row)
        search = [{k: row[k] for k in ("method", "setting")} | {"worth": self.worth(row)} for row in searched]
        return {
            "seeds": list(seeds),
            "budget": described(self.budget),
            "judge": self.lab(seeds[0]).judge(),
            "search": {"seed": SEARCH_SEED, "tried": search, "chosen": {m: list(chosen[m]) for m in self.methods}},
            "seconds": round(seconds + sum(row["seconds"] for row in searched)),
            "versions": versions(),
            "methods": {
                m: [{k: v for k, v in row.items() if k not in ("method", "setting", "seconds")} for row in rows if row]
                for m, rows in measured.items()
            },
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="world", help="data and model (default %(default)s)")
    parser.add_argument("--data", help="truthfulqa: file of TruthfulQA's rated answers")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N - 1 (default %(default)s)")
    parser.add_argument("--just", type=int, nargs="+", help="measure these seeds only, and write no results")
    parser.add_argument("--minutes", type=float, default=0, help="start no measurement after so long, write no results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="with --just: only these")
    parser.add_argument("--run", type=Path, help="run directory (default runs/claims, runs/claims_truthfulqa)")
    parser.add_argument(
        "--out", type=Path, help="default docs/results/claims.json, docs/results/claims_truthfulqa.json"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.monotonic()
    study, budget, name = STUDIES[args.study]
    if (args.study == "truthfulqa") != bool(args.data):
        parser.error("--study truthfulqa needs --data FILE, the generated world has none")
    run = Run(args.run or Path("runs") / name, study, budget(args.data) if args.data else budget(), args.methods)
    for line in run.work(args.just or range(args.seeds)):
        print(line, flush=True)
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            print("time is up: run again to go on")
            return 0
    if not args.just:
        results = run.results(range(args.seeds))
        out = args.out or Path("docs/results") / f"{name}.json"
        atomic_text(json.dumps(results, indent=1) + "\n", out)
        print(f"wrote {out}")
    return 0
