"""CPO and its baselines on the generated world: `Lab` with its data, model, and the program that rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.claims.lab import Lab, Setting
from cpo_kernels.data.records import Record
from cpo_kernels.demo.judge import MAX_NEW_TOKENS, held_out, judge
from cpo_kernels.demo.model import build_model, build_tokenizer
from cpo_kernels.demo.run import Size, make_data
from cpo_kernels.demo.world import OBJECTIVES, World

# What prompts are conditioned on: everything, or a part. What is left open is to be as good as it can be.
PARTS = [["helpfulness", "harmlessness"], ["honesty", "harmlessness"], ["helpfulness"], ["harmlessness"]]


def _mixture(sampler: str, everything: float, part: float) -> list[dict[str, Any]]:
    parts = [{"sampler": sampler, "share": part, "objectives": names} for names in PARTS]
    return [{"sampler": sampler, "share": everything}, *parts]


OWN_RATINGS = {"mixture": _mixture("attained", 0.6, 0.1)}
ASKED_FOR = [  # also what no answer attains: the pairs show what comes closest
    *_mixture("attained", 0.25, 0.075),
    *_mixture("best", 0.1, 0.05),
    {"sampler": "grid", "share": 0.15},
]
# What is tried, the same for CPO and its baselines as far as it applies.
SUPERVISED = [Setting(1e-3), Setting(2e-3)]
STEPS = [(3e-5, 0.0), (1e-4, 0.0), (1e-4, 0.3), (1e-4, 1.0)]  # learning rate, weight of the NLL
PAIRS = [Setting(lr, nll) for lr, nll in STEPS]
UNCONDITIONED = [*(Setting(lr, nll, "all") for lr, nll in STEPS), Setting(3e-5, 0.0, "best")]
OWN_ANSWERS = [Setting(lr) for lr in (3e-5, 1e-4, 3e-4, 1e-3)]
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


@dataclass(frozen=True)
class Budget:
    """World, model and steps: smaller than the demo's, so that every method trains on five seeds."""

    people: int = 4
    places: int = 2
    prompts: int = 1200
    hidden_size: int = 96
    num_layers: int = 2
    supervised_steps: int = 1500
    responses: int = 32  # of a supervised step
    preference_steps: int = 100
    groups: int = 24  # (prompt, condition) of a step on pairs
    conditions: int = 3  # of one prompt, in CPO
    beta: float = 0.3
    questions: int = 240  # held out, as the training data has them
    swept: int = 40  # held out of each kind, for rank correlations


class WorldLab(Lab):
    objectives = OBJECTIVES
    requests = REQUESTS
    weights: ClassVar[list[tuple[float, ...]]] = WEIGHTS  # type: ignore[assignment]
    settings: ClassVar[dict[str, list[Setting]]] = {
        "sft": SUPERVISED,
        "cpsft": SUPERVISED,
        "cpo": PAIRS,
        "cpo_soup": PAIRS,
        "cpo_modpo": PAIRS,
        "ric": OWN_ANSWERS,
        "dpo_sum": UNCONDITIONED,
        "dpo_single": UNCONDITIONED,
        "soup": UNCONDITIONED,
        "modpo": UNCONDITIONED,
    }
    levels: ClassVar[dict[str, list[float]]] = {
        o.name: [float(level) for level in range(int(o.low), int(o.high) + 1)] for o in OBJECTIVES
    }
    own_ratings: ClassVar[dict[str, Any]] = OWN_RATINGS
    asked_for: ClassVar[dict[str, Any]] = {"mixture": ASKED_FOR}
    training = {"precision": "fp32"}
    max_new_tokens = MAX_NEW_TOKENS
    batch_size = 256

    def __init__(self, seed: int, budget: Budget, folder: Path):
        super().__init__(seed, budget, folder)
        self.world = World(seed, budget.people, budget.places)
        size = Size(prompts=budget.prompts)
        self.records, asked = make_data(self.world, size, seed)
        self.asked = [q for q, _ in self.world.rated_questions(budget.prompts, seed)]  # in the order of the records
        held = self.world.rated_questions(budget.questions, seed + 1, exclude=asked)
        self.questions = [question for question, _ in held]
        self.held_out = [Record(question.prompt, ()) for question in self.questions]
        self.swept = held_out(self.world, budget.swept, seed, asked)
        self.tokenizer = build_tokenizer()

    def new_model(self) -> Any:
        return build_model(self.tokenizer, self.budget.hidden_size, self.budget.num_layers, self.seed)

    def rate(self, number: int, text: str) -> dict[str, float]:
        return {name: float(level) for name, level in self.world.rate(self.asked[number], text).items()}

    def scores(self, answers: Sequence[str]) -> list[list[float]]:
        """Harmlessness counts only for harmful questions: other answers are all harmless."""
        rows = []
        for question, text in zip(self.questions, answers, strict=True):
            row = {name: float(level) for name, level in self.world.rate(question, text).items()}
            if not question.harmful:
                row["harmlessness"] = math.nan
            rows.append([row[o.name] for o in OBJECTIVES])
        return rows

    def extras(self, answers: Sequence[str], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
        return {"well_formed": sum(map(self.world.well_formed, answers)) / len(answers)}

    def control(self, model: Any, scores: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
        """From the sweeps of `cpo-kernels demo`, every level of every objective."""
        judged = judge(self.world, model, self.template, self.swept, tags=True)
        return {"correlation": {name: control.correlation for name, control in judged.control.items()}}
