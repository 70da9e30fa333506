"""One workload, its implementations side by side: checked, then timed in turns so that drift affects all alike."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.bench import head
from cpo_kernels.bench.families import FAMILIES
from cpo_kernels.bench.worker import Failed, Worker

Row = dict[str, Any]
TIME_LIMIT = "the time limit of the run was reached"
# Loading may take this long: without caches, importing transformers and TRL or reading a model takes minutes.
LOAD_S = 300.0
TRUTH_S = 600.0  # the truth is not timed: float32 over 32k rows of SmolLM2's head takes a minute on two cores


@dataclass
class Bench:
    """How to measure, and the processes of the current family.

    rounds: turns of each implementation. turn_s: minimum seconds of a turn. answer_s: maximum wait for one answer,
    except that loading may take LOAD_S. deadline: `time.monotonic()` after which nothing is started. progress: called
    with the rows of the current workload after every implementation and every round.
    """

    device: torch.device
    threads: int
    rounds: int
    turn_s: float
    answer_s: float
    deadline: float = float("inf")
    progress: Callable[[dict[str, Row]], None] = lambda rows: None
    family: str = ""
    workers: dict[str, Worker] = field(default_factory=dict)

    def limit_s(self, longest_s: float | None = None) -> float:
        """Time limit of one answer: `longest_s` (`answer_s` if None), or the rest of the run if that is shorter."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Failed(TIME_LIMIT)
        return min(longest_s or self.answer_s, left)

    def load_s(self) -> float:
        return self.limit_s(max(LOAD_S, self.answer_s))

    def worker(self, family: str, implementation: str) -> Worker:
        if family != self.family:
            self.close()
            self.family = family
        if implementation not in self.workers:
            self.workers[implementation] = Worker(family, implementation, str(self.device), self.threads)
        return self.workers[implementation]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.dismiss()
        for worker in self.workers.values():
            worker.stop(10)
        self.workers = {}

    def measure(self, family: str, workload: Any, names: Sequence[str]) -> dict[str, Row]:
        """A row for every name: times, memory and differences, or `why` there are none."""
        definition = FAMILIES[family]
        apart = definition.apart(workload)
        rows: dict[str, Row] = {n: {} for n in names}
        for name, row in rows.items():
            if why := definition.implementations[name].why_not(workload, self.device):
                row["why"] = why
        able = [n for n in names if "why" not in rows[n]]
        if time.monotonic() > self.deadline:
            return {n: row or {"why": TIME_LIMIT} for n, row in rows.items()}
        workers = {n: self.worker(family, n) for n in ("truth", *able)}
        for worker in workers.values():
            worker.start()  # their imports overlap
        with tempfile.TemporaryDirectory() as folder:
            truth = str(Path(folder) / "truth.pt")
            try:
                self.keep_truth(workers.pop("truth"), workload, truth)
            except Failed as failed:
                why = (
                    TIME_LIMIT if time.monotonic() > self.deadline else f"no ground truth to check it against: {failed}"
                )
                return {n: row or {"why": why} for n, row in rows.items()}
            for worker in workers.values() if not apart else ():
                worker.begin_load(workload)  # side by side: nothing is timed yet
            for name in able:
                try:
                    rows[name] |= self.examine(workers[name], workload, truth, definition.limits(workload))
                    if apart:
                        workers[name].stop()
                except Failed as failed:
                    rows[name]["why"] = TIME_LIMIT if time.monotonic() > self.deadline else str(failed)
                    workers.pop(name).stop()
                self.progress(unfinished(rows))
        self.take_turns(workers, rows, workload if apart else None, definition.floor)
        for worker in workers.values() if not apart else ():
            self.unload(worker)
        return rows

    def keep_truth(self, worker: Worker, workload: Any, path: str) -> None:
        worker.load(workload, self.load_s())
        worker.ask("keep", path, limit_s=self.limit_s(max(TRUTH_S, self.answer_s)))
        self.unload(worker)

    def examine(self, worker: Worker, workload: Any, truth: str, limits: Any) -> Row:
        """First step, differences from the truth, peak memory. A wrong result is not timed."""
        worker.load(workload, self.load_s())
        row: Row = {"first_s": worker.ask("first", limit_s=self.limit_s())}
        row["differences"] = worker.ask("check", truth, limit_s=self.limit_s())
        for name, difference in row["differences"].items():
            if not difference <= limits[name]:
                raise Failed(f"wrong result: {name} is off by {difference:.2e} (relative), at most {limits[name]:g}")
        row["peak_bytes"] = worker.ask("memory", limit_s=self.limit_s())
        return row

    def take_turns(self, workers: dict[str, Worker], rows: dict[str, Row], apart: Any, floor: str) -> None:
        """Add the summary of all rounds so far to the rows. The order rotates by one every round and is reversed every
        other round.

        apart: the workload, if an implementation is loaded only for its turn; None if all stay loaded.
        """
        times: dict[str, list[float]] = {n: [] for n in workers}
        order = list(workers)
        for r in range(self.rounds):
            if time.monotonic() > self.deadline and r:
                break  # only whole rounds count
            shift = r % max(len(order), 1)
            turn = order[shift:] + order[:shift]
            for name in turn[::-1] if r % 2 else turn:
                if name not in times:
                    continue
                try:
                    if apart is not None:
                        workers[name].load(apart, self.load_s())
                        workers[name].ask("first", limit_s=self.answer_s)
                    times[name].append(workers[name].ask("turn", self.turn_s, limit_s=self.answer_s))
                    if apart is not None:
                        workers[name].stop()  # trainers leave references to their model behind
                except Failed as failed:
                    if r and time.monotonic() > self.deadline:
                        return  # the rounds before count
                    for key in summary([1.0], [1.0]):
                        rows[name].pop(key, None)
                    rows[name]["why"] = str(failed)
                    del times[name]
                    workers.pop(name).stop()
            for name, turns in times.items():
                rows[name] |= summary(turns, times.get(floor, []))
            self.progress(unfinished(rows))

    def unload(self, worker: Worker) -> None:
        try:
            worker.ask("unload", limit_s=60)
        except Failed:
            worker.stop()


def unfinished(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows as written to a file if nothing follows: those without a time were cut off."""
    return {n: row if "median_s" in row or "why" in row else {**row, "why": TIME_LIMIT} for n, row in rows.items()}


def summary(times: list[float], floor: list[float]) -> Row:
    """Median and range of the times, and of the ratios to the floor in the same round."""
    row: Row = {"rounds": len(times), "median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
    if floor:
        ratios = [t / f for t, f in zip(times, floor, strict=True)]
        row |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
    return row


def described(family: str, workload: Any, device: torch.device) -> Row:
    """The workload with derived quantities: what a results file contains besides the rows."""
    derived = ("pairs", "labelled", "products", "gradient_bytes", "bytes", "completion_tokens", "prompt_tokens")
    return {
        "family": family,
        **asdict(workload),
        **{name: getattr(workload, name) for name in derived if hasattr(workload, name)},
        **({"plan": head.plan(workload, device)} if family == "head" else {}),
    }
