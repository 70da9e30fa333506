"""The method's claims: CPO against its baselines, on the generated world or on human ratings, on several seeds.

    python -m benchmarks.claims                                             # what docs/results/claims.json lacks
    python -m benchmarks.claims --seeds 3 --methods cpsft cpo --minutes 60  # only seed 3 and these, for an hour
    python -m benchmarks.claims --fresh                                     # everything, about three hours
    python -m benchmarks.claims --study truthfulqa --data truthfulqa_ratings.jsonl

A line of RUN/seed-S.jsonl is one method's measurements. A killed run goes on where it was; on another machine what the
file at --out holds is not measured again, nor are its models needed, but those that other methods start from. Where a
method has several settings (learning rate, NLL, for those without conditions the start), the one that is worth most on
SEARCH_SEED counts, which is none of the seeds. One thread: the same bits on every run of one machine. Several processes
may share a run directory if their seeds differ.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.claims import methods
from benchmarks.claims.lab import SEARCH_SEED, Cost, Lab, Setting, State, models_of
from benchmarks.claims.methods import numbers
from benchmarks.claims.rated_lab import RatedBudget, RatedLab
from benchmarks.claims.world_lab import Budget, WorldLab
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.evaluation.pareto import hypervolume
from cpo_kernels.files import atomic_text
from cpo_kernels.objectives import Objective
from cpo_kernels.training.rundir import versions

# name -> its data and model, its budget, its files, number of seeds
STUDIES: dict[str, tuple[type[Lab], type, str, int]] = {
    "world": (WorldLab, Budget, "claims", 5),
    "truthfulqa": (RatedLab, RatedBudget, "claims_truthfulqa", 3),
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


def _cpo(lab: Lab, setting: Setting, chosen: Choices, equal_to: str = "cpo") -> list[Point]:
    """With as many steps on pairs as all models of the method `equal_to` together."""
    start = methods.cpsft(lab, chosen["cpsft"])
    return _requests(lab, methods.cpo(lab, start, setting, models_of(type(lab), equal_to)))


# method -> its operating points
METHODS: dict[str, Callable[[Lab, Setting, Choices], list[Point]]] = {
    "sft": _sft,
    "cpsft": _cpsft,
    "cpo": _cpo,
    "cpo_soup": partial(_cpo, equal_to="soup"),
    "cpo_modpo": partial(_cpo, equal_to="modpo"),
    "ric": _ric,
    "dpo_sum": _dpo_sum,
    "dpo_single": _dpo_single,
    "soup": _soup,
    "modpo": _modpo,
}


# Where a study has no settings of a method, it gets those chosen for another, which trains such models too.
SHARED = {"cpo_soup": "cpo", "cpo_modpo": "cpo", "modpo": "soup", "dpo_sum": "soup"}


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
        measured |= lab.control(lab.model(points[0].state), scores)
    return measured


def cost(used: Mapping[str, Cost]) -> dict[str, dict[str, float]]:
    """What the models of a method took, those of the supervised stage and those trained from one of them."""
    stages: dict[str, list[Cost]] = {"supervised": [], "further": []}
    for name, spent in used.items():
        stages["supervised" if name.startswith(("sft-", "cpsft-")) else "further"].append(spent)
    return {
        stage: {"models": len(spent)} | {key: sum(getattr(c, key) for c in spent) for key in Cost._fields}
        for stage, spent in stages.items()
    }


def share_of_box(points: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> float:
    """Hypervolume above the lowest ratings, as a share of the box up to the highest."""
    return hypervolume(points, [o.low for o in objectives]) / math.prod(o.high - o.low for o in objectives)


def worth(row: Mapping[str, Any], objectives: Sequence[Objective]) -> float:
    """What a setting is chosen by: hypervolume, and for DPO on one objective each the mean of the best scores."""
    if "worth" in row:  # of an earlier run, whose results keep this only
        return row["worth"]
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
            if row["method"] == method and Setting(*row["setting"]) == setting:
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

    def __init__(self, folder: Path, study: type[Lab], budget: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.study, self.budget = folder, study, budget
        plan = {"budget": described(budget), "requests": study.requests, "weights": study.weights}
        plan |= {"levels": study.levels}
        plan |= {"own_ratings": study.own_ratings, "asked_for": study.asked_for, "on_pairs": study.on_pairs}
        self.plan = json.loads(json.dumps(plan))
        if (folder / "plan.json").exists() and json.loads((folder / "plan.json").read_text()) != self.plan:
            raise ValueError(f"{folder} holds a run of another plan (plan.json): give another --run")
        atomic_text(json.dumps(self.plan, indent=1), folder / "plan.json")
        self.labs: dict[int, Lab] = {}
        self.judges = folder / "judges.json"

    def rows(self, seed: int) -> Rows:
        return Rows(self.folder / f"seed-{seed}.jsonl")

    def take(self, results: Mapping[str, Any]) -> None:
        """Count what `results` of this study hold as measured."""
        if results["plan"] != self.plan:
            raise ValueError("the results at --out are of another plan: give another --out, or --fresh")
        searched = [{"seed": SEARCH_SEED} | row for row in results["search"]["tried"]]
        for row in [*searched, *(row for rows in results["methods"].values() for row in rows)]:
            kept = self.rows(row["seed"])
            if kept.get(row["method"], Setting(*row["setting"])) is None:
                kept.add(row)
        if results["judges"]:
            atomic_text(json.dumps(results["judges"]), self.judges)

    def work(self, seeds: Sequence[int], wanted: Sequence[str] = tuple(METHODS)) -> Iterator[str]:
        """Measure what is missing; yields a line after each measurement."""
        for seed, method, setting, chosen in self.missing(seeds, wanted):
            lab = self.lab(seed)
            lab.used.clear()
            started = time.process_time()
            measured = measure(lab, METHODS[method](lab, setting, chosen))
            seconds = round(time.process_time() - started, 1)
            row = {"method": method, "seed": seed, "setting": list(setting)} | measured
            self.rows(seed).add(row | {"cost": cost(lab.used), "seconds": seconds})
            yield f"seed {seed} {method} {setting}: {measured['hypervolume']:.3f}, {seconds} s"

    def lab(self, seed: int) -> Lab:
        """The seed's Lab; only the last one is held."""
        if seed not in self.labs:
            self.labs = {seed: self.study(seed, self.budget, self.folder / f"models-{seed}")}
            if seed != SEARCH_SEED and not self.judges.exists():
                atomic_text(json.dumps(self.labs[seed].judges()), self.judges)
        return self.labs[seed]

    def missing(self, seeds: Sequence[int], wanted: Sequence[str]) -> Iterator[tuple[int, str, Setting, Choices]]:
        """Of the methods `wanted`, the search first; a method waits until the settings that it needs are chosen."""
        for method in wanted:
            for setting in self.searched(method):
                if self.rows(SEARCH_SEED).get(method, setting) is None:
                    yield SEARCH_SEED, method, setting, self.chosen()
        chosen = self.chosen()
        for seed in (s for s in seeds if s != SEARCH_SEED):
            for method in wanted:
                if self.rows(seed).get(method, chosen[method]) is None:
                    yield seed, method, chosen[method], chosen

    def searched(self, method: str) -> list[Setting]:
        """The settings to choose from: none where there is one, or another method's."""
        settings = self.study.settings.get(method, [])
        return settings if len(settings) > 1 else []

    def chosen(self) -> Choices:
        """Per method the setting that is worth most; the first of equal ones. Without those yet to be searched."""
        found = {}
        for method in sorted(METHODS, key=lambda m: m not in self.study.settings):
            if method not in self.study.settings:
                if SHARED[method] in found:
                    found[method] = found[SHARED[method]]
                continue
            tried = [self.rows(SEARCH_SEED).get(method, setting) for setting in self.searched(method)]
            if not tried:
                found[method] = self.study.settings[method][0]
            elif all(tried):
                best = max((row for row in tried if row), key=self.worth)
                found[method] = Setting(*best["setting"])
        return found

    def worth(self, row: Mapping[str, Any]) -> float:
        return worth(row, self.study.objectives)

    def results(self) -> dict[str, Any]:
        """All that was measured with the chosen settings, whichever run of the program did it."""
        chosen = self.chosen()
        names = sorted((p.stem for p in self.folder.glob("seed-*.jsonl")), key=lambda name: int(name.split("-")[1]))
        rows = [row for name in names for row in Rows(self.folder / f"{name}.jsonl").rows]
        kept = ("method", "setting", "seconds", "cost", "correlation", "likelihood", "hypervolume", "best")
        return {
            "plan": self.plan,
            "judges": json.loads(self.judges.read_text()) if self.judges.exists() else {},
            "search": {
                "seed": SEARCH_SEED,
                "tried": [
                    {k: row[k] for k in kept if k in row} | {"worth": self.worth(row)}
                    for row in rows
                    if row["seed"] == SEARCH_SEED
                ],
                "chosen": {m: list(setting) for m, setting in chosen.items()},
            },
            "versions": versions(),
            "methods": {
                m: [r for r in rows if r["seed"] != SEARCH_SEED and (r["method"], Setting(*r["setting"])) == (m, best)]
                for m, best in chosen.items()
            },
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="world", help="data and model (default %(default)s)")
    parser.add_argument("--data", help="truthfulqa: file of TruthfulQA's rated answers")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 to 4, truthfulqa 0 to 2; 100: the search only")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    parser.add_argument("--minutes", type=float, default=0, help="start no measurement after so long")
    parser.add_argument("--run", type=Path, help="run directory (default runs/claims, runs/claims_truthfulqa)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file at --out holds")
    parser.add_argument(
        "--out", type=Path, help="default docs/results/claims.json, docs/results/claims_truthfulqa.json"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.monotonic()
    study, budget, name, seeds = STUDIES[args.study]
    if (args.study == "truthfulqa") != bool(args.data):
        parser.error("--study truthfulqa needs --data FILE, the generated world has none")
    run = Run(args.run or Path("runs") / name, study, budget(args.data) if args.data else budget())
    out = args.out or Path("docs/results") / f"{name}.json"
    if out.exists() and not args.fresh:
        run.take(json.loads(out.read_text()))
    for line in run.work(args.seeds or range(seeds), args.methods):
        print(line, flush=True)
        atomic_text(json.dumps(run.results(), indent=1) + "\n", out)
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            print("time is up: run again to go on")
            break
    print(f"wrote {out}")
    return 0
