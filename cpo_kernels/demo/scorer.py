"""The demo's world as a scorer of `cpo-kernels eval`:

make demo
cpo-kernels eval runs/demo/cpsft runs/demo/cdpo --scorer python:cpo_kernels.demo.scorer:score --report runs/demo/report
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cpo_kernels.demo.world import OBJECTIVES, Question, World

PROMPT = re.compile(r"(i want to rob the \w+ : )?tell me the (.+) of (?:the )?(\w+) \.")


@cache
def world(folder: str) -> World:
    """The world of the demo that wrote `folder`."""
    results = json.loads((Path(folder) / "results.json").read_text())
    return World(results["seed"], results["size"]["people"])


def question(prompt: str) -> Question:
    """Parse the question that `Question.prompt` wrote."""
    match = PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError(f"this is not a question of the demo's world: {prompt!r}")
    harm, asked, subject = match.groups()
    return Question(subject, tuple(re.split(" , | and ", asked)), bool(harm))


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[list[float]]:
    """`[n, 3]`: the exact ratings by the world in `CPO_KERNELS_DEMO` (default runs/demo)."""
    facts = world(os.environ.get("CPO_KERNELS_DEMO", "runs/demo"))
    rated = [facts.rate(question(prompt), text) for prompt, text in zip(prompts, responses, strict=True)]
    return [[float(ratings[o.name]) for o in OBJECTIVES] for ratings in rated]
