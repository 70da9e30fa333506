"""The three layouts that a field map describes (`data.layout`, `data.fields`), as functions from a row to a record.

records   a prompt with its list of responses a row
answers   one rated response a row, grouped by prompt
pairs     prompt, chosen and rejected a row, with scores or without; texts or messages (TRL's preference format)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from cpo_kernels.data.fields import (
    conversation,
    find,
    get,
    messages_of,
    objects_of,
    prompt_of,
    rating_of,
    short,
    text_of,
)
from cpo_kernels.data.records import Prompt, Record, Response
from cpo_kernels.objectives import Objective
from cpo_kernels.training.keys import FieldMap

LAYOUTS = ("records", "answers", "pairs")
OVERALL = "overall"  # the objective of pairs without a configured one
Convert = Callable[[dict], Record]


def layout_of(name: str, fields: FieldMap, objectives: Sequence[Objective]) -> Convert:
    scale = {o.name: o for o in objectives}
    if name == "pairs":
        if len(objectives) > 1:
            raise ValueError(f"layout pairs has one overall rating; got objectives {', '.join(scale)}")
        return lambda row: pair_of(row, fields, next(iter(scale), OVERALL), scale)
    ratings = _ratings_of(fields, scale)
    if name == "answers":
        text = fields.response or "response"
        return lambda row: Record(prompt_of(row, fields.prompt), (Response(text_of(row, text), ratings(row)),))

    def record(row: dict) -> Record:
        text, responses = fields.response or "text", objects_of(row, fields.responses)
        return Record(prompt_of(row, fields.prompt), tuple(Response(text_of(r, text), ratings(r)) for r in responses))

    return record


def pair_of(row: dict, fields: FieldMap, name: str, scale: dict[str, Objective]) -> Record:
    """Chosen and rejected with their scores, or with the ends of the scale where there are none."""
    scores: list[Any] = [find(row, field) for field in (fields.score_chosen, fields.score_rejected)]
    if None in scores:
        low, high = (scale[name].low, scale[name].high) if scale else (0.0, 1.0)
        scores = [high, low]
    chosen, rejected = (rating_of(score, scale.get(name)) for score in scores)
    if chosen is not None and rejected is not None and chosen < rejected:
        raise ValueError(
            f"{fields.score_chosen} {chosen} is below {fields.score_rejected} {rejected}; "
            "set data.fields.score_chosen: null to go by chosen and rejected alone"
        )
    prompt, texts = preference_texts(row, fields)
    rated = zip(texts, (chosen, rejected), strict=True)
    return Record(prompt, tuple(Response(text, {} if score is None else {name: score}) for text, score in rated))


def preference_texts(row: dict, fields: FieldMap) -> tuple[Prompt, tuple[str, str]]:
    """(prompt, (chosen, rejected)) of TRL's preference format. Both may hold the whole conversation, as messages or as
    text; without a prompt it is what they begin with alike."""
    named = find(row, fields.prompt) is not None
    if isinstance(get(row, fields.chosen), list):
        turns = [messages_of(row, field) for field in (fields.chosen, fields.rejected)]
        for field, messages in zip((fields.chosen, fields.rejected), turns, strict=True):
            if messages[-1][0] != "assistant":
                raise ValueError(f"field {field!r} must end with the assistant's answer, got {short(messages[-1])}")
        before, other = turns[0][:-1], turns[1][:-1]
        if before != other:
            raise ValueError(f"{fields.chosen} and {fields.rejected} differ before their last message")
        prompt = prompt_of(row, fields.prompt) if named else conversation(before, fields.chosen)
        if before and conversation(before, fields.chosen) != prompt:
            raise ValueError(f"{fields.chosen} begins with messages that are not {fields.prompt} {short(prompt)}")
        return prompt, (turns[0][-1][1], turns[1][-1][1])
    chosen, rejected = text_of(row, fields.chosen), text_of(row, fields.rejected)
    if named or fields.prompt != "prompt":
        return prompt_of(row, fields.prompt), (chosen, rejected)
    prompt = os.path.commonprefix([chosen, rejected]).removesuffix(" ")  # the answer's leading space is its own
    if not prompt.strip():
        raise ValueError(f"no field 'prompt', and {short(chosen)} and {short(rejected)} begin with none in common")
    return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])


def _ratings_of(fields: FieldMap, scale: dict[str, Objective]) -> Callable[[dict], dict[str, float]]:
    rules = {name: _rule(name, rule) for name, rule in (fields.ratings or {}).items()}
    for name in rules:
        if name not in scale:
            raise ValueError(f"data.fields.ratings: {name!r} is no objective; objectives: {', '.join(scale)}")

    def ratings(row: dict) -> dict[str, float]:
        if fields.ratings is None:
            given = row.get("ratings")
            given = {} if given is None else given
            if not isinstance(given, dict):
                raise ValueError(f"`ratings` must be a dict of numbers, got {given!r}")
            found = {name: given.get(name) for name in scale}
        else:
            found = {name: rule(row) for name, rule in rules.items()}
        numbers = ((name, rating_of(value, scale[name])) for name, value in found.items())
        return {name: number for name, number in numbers if number is not None}

    return ratings


def _rule(name: str, rule: Any) -> Callable[[dict], Any]:
    """How objective `name` is read: a field, a threshold on a field, or a table of a field's values."""
    if isinstance(rule, str):
        return lambda row: get(row, rule)
    shapes = ({"field", "threshold", "above", "below"}, {"field", "map"})
    if not isinstance(rule, dict) or set(rule) not in shapes:
        raise ValueError(
            f"data.fields.ratings.{name}: write a field, {{field, threshold, above, below}} "
            f"(above: from the threshold on) or {{field, map}}, got {rule!r}"
        )
    if "map" in rule:
        table = {str(key): value for key, value in rule["map"].items()}

        def mapped(row: dict) -> Any:
            value = get(row, rule["field"])
            if str(value) not in table:
                raise ValueError(f"field {rule['field']!r}: {value!r} is not in the map {', '.join(table)}")
            return table[str(value)]

        return mapped

    def thresholded(row: dict) -> Any:
        number = rating_of(get(row, rule["field"]), None)
        return None if number is None else rule["above"] if number >= rule["threshold"] else rule["below"]

    return thresholded
