"""Parse the scores in a judge model's reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cpo_kernels.objectives import Objective

NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))(?:\s*(?:/|out of|of)\s*(\d+\.?\d*))?"  # 4, 4/5, 4 out of 5
# reasoning that a server leaves in the reply: its begin and end marks
THOUGHT = r"think|thinking|thoughts?|reasoning|analysis|reflection"
BEGIN = re.compile(rf"\s*(?:<(?:{THOUGHT})>|\[THINK\]|<\|channel\|>analysis)", re.I)
END = re.compile(rf"</(?:{THOUGHT})>|\[/THINK\]|<\|channel\|>final(?:<\|message\|>)?", re.I)
SCORE_KEYS = ("score", "rating", "value", "points", "grade", "stars", "level", "number")


class NoScore(ValueError):
    """A reply without the requested scores; `final`: asking again would give the same."""

    def __init__(self, problem: str, final: bool = False):
        super().__init__(problem)
        self.final = final


def parse_scores(reply: str, objectives: Sequence[Objective]) -> list[float]:
    """The scores in the reply's first JSON object that has one for every objective, directly or in an object inside it.
    For a single objective, a reply that is just a number also counts. null is NaN, not rated. Objects in the model's
    reasoning before its answer are ignored."""
    ends = [match.end() for match in END.finditer(reply)]
    answer = ends[-1] if ends else len(reply) if BEGIN.match(reply) else 0  # truncated reasoning has no answer
    # an object may contain such a mark as text: those that end before it are reasoning
    objects = (value for value, end in _objects(reply) if end > answer)
    by_name = next((scores for o in objects if (scores := _holder(o, objectives)) is not None), None)
    text = reply[answer:]
    if by_name is None and len(objectives) == 1 and re.fullmatch(NUMBER, text.strip()):
        by_name = {objectives[0].name: text}
    if by_name is None:
        names = ", ".join(o.name for o in objectives)
        raise NoScore(f"the judge's reply has no JSON object with {names}: {reply[:200]!r}")
    return [_score(_named(by_name, o.name), o, reply) for o in objectives]


def _objects(text: str) -> Iterator[tuple[Any, int]]:
    """(object, end position) of every top-level JSON object in the text, in order."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        end = place + 1
        try:
            value, end = decoder.raw_decode(text, place)
            yield value, end
        except ValueError:  # a brace of prose
            pass
        except RecursionError:  # thousands of open braces: each next one would recurse as deep
            return
        place = text.find("{", end)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _named(by_name: dict[str, Any], name: str) -> Any:
    """The value under `name`, or else under the most similar name."""
    return by_name[name] if name in by_name else {_key(key): value for key, value in by_name.items()}[_key(name)]


def _holder(value: Any, objectives: Sequence[Objective]) -> dict[str, Any] | None:
    """The object with a key for every objective: `value`, or the first one inside it."""
    if isinstance(value, dict):
        if {_key(o.name) for o in objectives} <= {_key(name) for name in value}:
            return value
        value = list(value.values())
    if not isinstance(value, list):
        return None
    return next((scores for o in value if (scores := _holder(o, objectives)) is not None), None)


def _score(value: Any, objective: Objective, reply: str) -> float:
    """A number; a string with a number, also relative to the scale's high end (4/5, 4 out of 5); or an object's only
    score."""
    if isinstance(value, dict):
        named = {_key(name): x for name, x in value.items()}
        value = next((named[name] for name in (*SCORE_KEYS, _key(objective.name)) if name in named), value)
    if isinstance(value, str) and (match := re.fullmatch(NUMBER, value.strip())):
        value = float(match[1]) if match[2] is None or float(match[2]) == objective.high else value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NoScore(f"the judge's score of {objective.name} is not a number: {reply[:200]!r}")
    if not objective.low <= value <= objective.high:
        scale = f"[{objective.low:g}, {objective.high:g}]"
        raise NoScore(f"the judge's score of {objective.name} is outside {scale}: {reply[:200]!r}")
    return float(value)
