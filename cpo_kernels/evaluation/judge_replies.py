"""The scores in what a judge model replied."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cpo_kernels.objectives import Objective

NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))(?:\s*(?:/|out of|of)\s*(\d+\.?\d*))?"  # 4, 4/5, 4 out of 5
THOUGHTS = re.compile(r".*</think(?:ing)?>", re.S)  # reasoning that a server leaves in the reply


class NoScore(ValueError):
    """A reply without the scores that were asked for; `final`: asking again gives the same."""

    def __init__(self, problem: str, final: bool = False):
        super().__init__(problem)
        self.final = final


def parse_scores(reply: str, objectives: Sequence[Objective]) -> list[float]:
    """The scores in the first JSON object of the reply that holds one for every objective, itself or in an object
    within it; of a single objective also a reply that is a number and nothing else. null is NaN, not rated."""
    text = THOUGHTS.sub("", reply)
    found = next((scores for o in _objects(text) if (scores := _holder(o, objectives)) is not None), None)
    if found is None and len(objectives) == 1 and re.fullmatch(NUMBER, text.strip()):
        found = {_key(objectives[0].name): text}
    if found is None:
        names = ", ".join(o.name for o in objectives)
        raise NoScore(f"the judge's reply holds no JSON object with {names}: {reply[:200]!r}")
    return [_score(found[_key(o.name)], o, reply) for o in objectives]


def _objects(text: str) -> Iterator[Any]:
    """Every JSON object of the text that stands in no other, in order."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        end = place + 1
        try:
            found, end = decoder.raw_decode(text, place)
            yield found
        except (ValueError, RecursionError):  # a brace of prose
            pass
        place = text.find("{", end)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _holder(found: Any, objectives: Sequence[Objective]) -> dict[str, Any] | None:
    """The object with a key for every objective: `found`, or the first within it."""
    if isinstance(found, dict):
        named = {_key(name): value for name, value in found.items()}
        if all(_key(o.name) in named for o in objectives):
            return named
        found = list(found.values())
    if not isinstance(found, list):
        return None
    return next((scores for o in found if (scores := _holder(o, objectives)) is not None), None)


def _score(value: Any, objective: Objective, reply: str) -> float:
    """A number; as text, also as a share of the scale's high end (4/5, 4 out of 5); or the one score of an object."""
    if isinstance(value, dict):
        named = {_key(name): x for name, x in value.items()}
        known = [named[name] for name in ("score", "rating", "value", _key(objective.name)) if name in named]
        numbers = [x for x in value.values() if isinstance(x, (int, float)) and not isinstance(x, bool)]
        value = (known or (numbers if len(numbers) == 1 else [value]))[0]
    if isinstance(value, str) and (match := re.fullmatch(NUMBER, value.strip())):
        value = float(match[1]) if match[2] is None or float(match[2]) == objective.high else value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NoScore(f"the judge's score of {objective.name} is no number: {reply[:200]!r}")
    if not objective.low <= value <= objective.high:
        scale = f"[{objective.low:g}, {objective.high:g}]"
        raise NoScore(f"the judge's score of {objective.name} is outside {scale}: {reply[:200]!r}")
    return float(value)
