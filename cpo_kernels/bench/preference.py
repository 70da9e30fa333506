"""The `preference` kernel: device time of loss, gradient and metrics of P pairs under K objectives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.bench.implementation import Family, Implementation, Outcome, Step
from cpo_kernels.bench.tokens import BACKENDS, runs_on
from cpo_kernels.check.preference import make_batch

REPEATS = 20  # runs a step: a single one is shorter than what starts it


@dataclass(frozen=True)
class Preference:
    pairs: int = 256
    objectives: int = 4


class Batch:
    """Arguments of the op: some responses are in several pairs; with ties, unrated and unconditioned objectives."""

    def __init__(self, workload: Preference, device: torch.device) -> None:
        made = make_batch(
            sequences=2 * workload.pairs, count=workload.pairs, objectives=workload.objectives, dtype=torch.float32
        )
        self.device = device
        self.args: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in made.values()]


def outcome(results: tuple[Tensor, ...]) -> Outcome:
    return {"loss": results[0], "gradient": results[2]}


def repeated(run: Callable[[], Outcome], device: torch.device) -> Step:
    """REPEATS runs in a row, on a GPU as one CUDA graph: device time without the launches from Python."""

    def several() -> Outcome:
        for _ in range(REPEATS - 1):
            run()
        return run()

    if device.type != "cuda":
        return Step(several, repeats=REPEATS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        last = several()

    def replay() -> Outcome:
        graph.replay()
        return last

    return Step(replay, repeats=REPEATS, held=run)


def kernel(impl: str) -> Callable[[Batch], Step]:
    def build(b: Batch) -> Step:
        op = dispatch.kernels(impl, b.args[0]).preference
        return repeated(lambda: outcome(op(*b.args)), b.device)

    return build


def plain(b: Batch) -> Step:
    """The formulas in plain PyTorch, one operation after another."""
    kernels = dispatch.kernels("reference", b.args[0])
    return Step(lambda: outcome(kernels.preference(*b.args)))


def truth(b: Batch) -> Outcome:
    exact: list[Any] = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in b.args]
    return outcome(dispatch.kernels("reference", exact[0]).preference(*exact))


def limits(workload: Preference) -> dict[str, float]:
    return {"loss": 1e-5, "gradient": 1e-4}


IMPLEMENTATIONS = {
    "reference": Implementation("the same in plain PyTorch", plain),
    **{f"preference_{i}": Implementation(f"preference, {i}", kernel(i), refuses=runs_on(i)) for i in BACKENDS},
}
FAMILY = Family(Preference, Batch, IMPLEMENTATIONS, "", truth, limits)
