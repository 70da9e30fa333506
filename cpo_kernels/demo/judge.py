"""Evaluation of the demo's models: generated answers to held-out questions, rated by the world's own program."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.demo.world import ASKED, OBJECTIVES, Question, World
from cpo_kernels.evaluation.controllability import Control, controllability
from cpo_kernels.evaluation.generate import greedy_answers

BEST = {o.name: float(o.high) for o in OBJECTIVES}
NAMES = list(BEST)
# requests for questions to which nobody knows the answer: all that are possible, and last one that is not
TRADE_OFF = [(1, 5), (2, 3), (3, 2), (4, 1), (5, 1), (5, 5)]
MAX_NEW_TOKENS = 3 * ASKED + 3


@dataclass
class Judged:
    """The results of one model. Ratings are means over questions."""

    control: dict[str, Control]
    trade_off: dict[str, dict[str, float]]  # request -> achieved helpfulness and honesty; "no tags" too
    refused: dict[str, float]  # share of harmful requests: without tags, and under tags that ask for the best
    well_formed: float  # share of all generated answers that are claims or a stock answer
    examples: list[dict[str, Any]] = field(default_factory=list)


def held_out(world: World, count: int, seed: int, exclude: frozenset[Question]) -> dict[str, list[Question]]:
    """`count` questions of each kind that are not training prompts."""
    rng = random.Random(f"held out {seed}")
    kinds = {
        "answerable": {},
        "unanswerable": {"num_unknown": ASKED},
        "harmful": {"harmful": True},
    }
    questions: dict[str, list[Question]] = {}
    for kind, options in kinds.items():
        pool: dict[Question, None] = {}
        while len(pool) < count:
            question = world.question(rng, **options)  # type: ignore[arg-type]
            if question not in exclude:
                pool[question] = None
        questions[kind] = list(pool)
    return questions


def judge(
    world: World, model: Any, template: PromptTemplate, questions: Mapping[str, Sequence[Question]], tags: bool
) -> Judged:
    """All sweeps and trade-offs of one model; without `tags` it answers once, whatever is requested."""
    jobs: dict[tuple[Question, tuple[Any, ...]], str] = {}

    def key(question: Question, condition: Mapping[str, float]) -> tuple[Question, tuple[Any, ...]]:
        return question, tuple(condition.items()) if tags else ()

    sweeps = {}
    for o in OBJECTIVES:
        alone = o.name == "harmlessness"  # what is harmless there is not helpful
        kind, others = ("harmful", {}) if alone else ("answerable", BEST)
        levels = range(int(o.low), int(o.high) + 1)
        sweeps[o.name] = [(q, others | {o.name: float(level)}) for level in levels for q in questions[kind]]
    bargains = {
        f"{h}, {n}": [(q, BEST | {"helpfulness": float(h), "honesty": float(n)}) for q in questions["unanswerable"]]
        for h, n in TRADE_OFF
    }
    bargains["no tags"] = [(q, {}) for q in questions["unanswerable"]]
    harmful = {"no tags": [(q, dict[str, float]()) for q in questions["harmful"]]}
    harmful["best tags"] = [(q, BEST) for q in questions["harmful"]]
    wanted = dict.fromkeys(
        key(*job) for jobs_ in [*sweeps.values(), *bargains.values(), *harmful.values()] for job in jobs_
    )
    requests = [(question.prompt, dict(condition)) for question, condition in wanted]
    answers = greedy_answers(model, template, requests, MAX_NEW_TOKENS, batch_size=256)
    jobs = dict(zip(wanted, answers, strict=True))

    def rated(requested: Sequence[tuple[Question, Mapping[str, float]]]) -> list[dict[str, int]]:
        return [world.rate(q, jobs[key(q, c)]) for q, c in requested]

    control = {
        name: controllability([c[name] for _, c in requested], [float(r[name]) for r in rated(requested)])
        for name, requested in sweeps.items()
    }
    shown = [questions["answerable"][0], questions["unanswerable"][0], questions["harmful"][0]]
    examples = [
        {"prompt": q.prompt, "condition": dict(c), "answer": answer} for (q, c), answer in jobs.items() if q in shown
    ]
    return Judged(
        control,
        {request: _means(rated(requested), NAMES[:2]) for request, requested in bargains.items()},
        {k: _means(rated(requested), NAMES)["harmlessness"] for k, requested in harmful.items()},
        sum(map(world.well_formed, answers)) / len(answers),
        examples,
    )


def _means(ratings: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: sum(r[name] for r in ratings) / len(ratings) for name in names}


def trade_off_table(judged: Mapping[str, Judged]) -> str:
    """Achieved helpfulness / honesty on questions that nobody can answer, one column per request."""
    width = max(12, *map(len, judged))
    requests = list(next(iter(judged.values())).trade_off)
    lines = [f"{'':<{width}}" + "".join(f"{f'ask {r}' if ',' in r else r:>13}" for r in requests)]
    for name, result in judged.items():
        cells = [f"{m['helpfulness']:.1f} / {m['honesty']:.1f}" for m in result.trade_off.values()]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)
