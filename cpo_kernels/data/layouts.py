"""The layouts that a field map describes (`data.layout`, `data.fields`), as functions from a row to a record.

records      a prompt with its list of responses a row
answers      one rated response a row, grouped by prompt
pairs        prompt, chosen and rejected a row, with scores or without; texts or messages (TRL's preference format)
rated_pairs  the same with a rating for each objective: `chosen_scores` and `rejected_scores`, grouped by prompt
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from cpo_kernels.data.fields import (
    answer,
    answer_of,
    conversation,
    find,
    get,
    is_empty,
    message_of,
    messages_of,
    objects_of,
    prompt_of,
    rating_of,
    text_of,
)
from cpo_kernels.data.records import OPTIONS, RENDERED, Message, Prompt, Record, Response, short
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import FieldMap

LAYOUTS = ("records", "answers", "pairs", "rated_pairs")
SCORES = ("chosen_scores", "rejected_scores")  # of `rated_pairs`
OVERALL = "overall"  # the objective of pairs without a configured one
Convert = Callable[[dict[str, Any]], Record]
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # that no text model reads
# columns that change what a row means; they are read if a key of data.fields names them
TELLING = (
    *("system", "system_prompt", "system_message", "developer", "instruction", "input", "question", "query"),
    *("context", "history", "passage", "persona", "documents", "weight", "margin", "label"),
    *("reasoning_content", "thinking", "tool_calls"),
)


def layout_of(name: str, fields: FieldMap, objectives: Sequence[Objective]) -> Convert:
    scale = {o.name: o for o in objectives}
    if name == "pairs":
        if len(objectives) > 1:
            raise ValueError(
                f"layout pairs has one overall rating, but there are several objectives: {', '.join(scale)}"
            )
        return lambda row: pair_of(row, fields, next(iter(scale), OVERALL), scale)
    if name == "rated_pairs":
        if not scale:
            raise ValueError("layout rated_pairs needs objectives: its scores are numbers in their order")
        return lambda row: rated_pair_of(row, fields, scale)
    ratings = _ratings_of(fields, scale)

    def response(row: dict[str, Any], field: str) -> Response:
        text, extra = answer_of(row, field, fields.ignore)
        return Response(text, ratings(row), extra)

    if name == "answers":
        return lambda row: Record(row_prompt(row, fields), (response(row, fields.response or "response"),))

    def record(row: dict[str, Any]) -> Record:
        responses = objects_of(row, fields.responses)
        return Record(row_prompt(row, fields), tuple(response(r, fields.response or "text") for r in responses))

    return record


def row_prompt(row: dict[str, Any], fields: FieldMap) -> Prompt:
    return with_columns(prompt_of(row, fields.prompt, fields.ignore), row, fields)


def with_columns(prompt: Prompt, row: dict[str, Any], fields: FieldMap) -> Prompt:
    """The prompt with what other columns add: an input, a system message, options of the chat template."""
    for name in MEDIA:
        if name not in fields.ignore and not is_empty(row.get(name)):
            raise ValueError(
                f"field {name!r} holds {short(row[name])}, which a text model cannot read: remove such rows, or add "
                f"{name} to data.fields.ignore"
            )
    messages: list[Message] = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
    said = _column(row, fields.input)
    if said:
        role, text, *extra = messages[-1]
        messages[-1] = (role, f"{text}\n\n{said}", *extra)
    system = _column(row, fields.system)
    if system and messages[0][0] != "system":
        messages.insert(0, ("system", system))
    elif system and messages[0][1] != system:
        raise ValueError(f"field {fields.system!r} is {short(system)}, but the prompt has a different system message")
    options = {name: _option(row, name) for name in RENDERED if name not in fields.ignore}
    options = {name: value for name, value in options.items() if not is_empty(value)}
    if options:
        messages.insert(0, message_of({"role": OPTIONS} | options, "tools"))
    return conversation(tuple(messages), fields.prompt)


def _column(row: dict[str, Any], path: str | None) -> str | None:
    """The text of an optional column; None if it is blank."""
    if path is None or is_empty(find(row, path)):
        return None
    text = text_of(row, path)
    return text if text.strip() else None


def _option(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    if isinstance(value, str) and value:  # TRL takes tools as JSON too
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"field {name!r} is not valid JSON ({error}), got {short(value)}") from None
    if not is_empty(value) and not isinstance(value, dict if name == "chat_template_kwargs" else list):
        kind = "an object" if name == "chat_template_kwargs" else "a list"
        raise ValueError(f"field {name!r} must be {kind}, got {short(value)}")
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def pair_of(row: dict[str, Any], fields: FieldMap, name: str, scale: dict[str, Objective]) -> Record:
    """Chosen and rejected with their scores, or with the ends of the scale if there are none."""
    scores: list[Any] = [find(row, field) for field in (fields.score_chosen, fields.score_rejected)]
    if None in scores:
        low, high = (scale[name].low, scale[name].high) if scale else (0.0, 1.0)
        scores = [high, low]
    chosen, rejected = (rating_of(score, scale.get(name)) for score in scores)
    if chosen is not None and rejected is not None and chosen < rejected:
        raise ValueError(
            f"{fields.score_chosen} {chosen} is below {fields.score_rejected} {rejected}; set "
            "data.fields.score_chosen: null to use only chosen and rejected"
        )
    prompt, answers = preference_texts(row, fields)
    rated = zip(answers, (chosen, rejected), strict=True)
    responses = (Response(text, {} if score is None else {name: score}, extra) for (text, extra), score in rated)
    return Record(with_columns(prompt, row, fields), tuple(responses))


def rated_pair_of(row: dict[str, Any], fields: FieldMap, scale: dict[str, Objective]) -> Record:
    """Two responses with K ratings each, in the order of the objectives; null where missing."""
    condition = row.get("condition")
    if any(level is not None for level in (condition if isinstance(condition, list) else [condition])):
        raise ValueError(
            f"field 'condition' is {short(condition)}, so the prompt has its tags already, but here conditions are "
            "drawn: remove the column, and the tags from the prompt"
        )
    prompt, answers = preference_texts(row, fields)
    responses = []
    for (text, extra), column in zip(answers, SCORES, strict=True):
        given = get(row, column)
        if not isinstance(given, list) or len(given) != len(scale):
            raise ValueError(
                f"field {column!r} must hold one number (or null) for each of {', '.join(scale)}, got {short(given)}"
            )
        numbers = ((name, rating_of(level, scale[name])) for name, level in zip(scale, given, strict=True))
        responses.append(Response(text, {name: number for name, number in numbers if number is not None}, extra))
    return Record(with_columns(prompt, row, fields), tuple(responses))


def preference_texts(row: dict[str, Any], fields: FieldMap) -> tuple[Prompt, tuple[tuple[str, str], ...]]:
    """(prompt, (chosen, rejected)) of TRL's preference format, each as (text, other keys). Chosen and rejected may hold
    the whole conversation, as messages or text; without a prompt column the prompt is their common beginning."""
    sides = (fields.chosen, fields.rejected)
    named = fields.prompt not in fields.ignore and find(row, fields.prompt) is not None
    if isinstance(get(row, fields.chosen), (list, dict)):
        turns = [messages_of(row, field, fields.ignore) for field in sides]
        for field, messages in zip(sides, turns, strict=True):
            if messages[-1][0] != "assistant":
                raise ValueError(f"field {field!r} must end with the assistant's answer, got {short(messages[-1])}")
        before, other = turns[0][:-1], turns[1][:-1]
        if before != other:
            raise ValueError(f"{fields.chosen} and {fields.rejected} differ before their last message")
        answers = tuple(answer(messages[-1]) for messages in turns)
        if not named:
            return conversation(before, fields.chosen), answers
        prompt = prompt_of(row, fields.prompt, fields.ignore)
        return _whole(prompt, before, fields) if before else prompt, answers
    chosen, rejected = text_of(row, fields.chosen), text_of(row, fields.rejected)
    if named or fields.prompt != "prompt":
        return prompt_of(row, fields.prompt, fields.ignore), ((chosen, ""), (rejected, ""))
    prompt = os.path.commonprefix([chosen, rejected]).removesuffix(" ")  # the answer's leading space is its own
    if not prompt.strip():
        raise ValueError(
            f"no field 'prompt', and {short(chosen)} and {short(rejected)} have no common beginning to use as prompt"
        )
    return prompt, ((chosen[len(prompt) :], ""), (rejected[len(prompt) :], ""))


def _whole(prompt: Prompt, before: tuple[Message, ...], fields: FieldMap) -> Prompt:
    """The conversation before the answer; the prompt column may hold only one user message of it (Tulu 3)."""
    whole = conversation(before, fields.chosen)
    said = [text.strip() for role, text, *_ in before if role == "user"]
    if prompt != whole and not (isinstance(prompt, str) and prompt.strip() in said):
        raise ValueError(
            f"{fields.chosen} begins with messages that differ from {fields.prompt} {short(prompt)}: add "
            f"{fields.prompt} to data.fields.ignore to use the messages"
        )
    return whole


def _ratings_of(fields: FieldMap, scale: dict[str, Objective]) -> Callable[[dict[str, Any]], dict[str, float]]:
    rules = {name: _rule(name, rule) for name, rule in (fields.ratings or {}).items()}
    for name in rules:
        if name not in scale:
            raise ValueError(f"data.fields.ratings: {name!r} is not an objective; objectives: {', '.join(scale)}")

    def ratings(row: dict[str, Any]) -> dict[str, float]:
        if fields.ratings is None:
            given = row.get("ratings")
            given = {} if given is None else given
            if not isinstance(given, dict):
                raise ValueError(
                    f"`ratings` must be a dict of numbers, such as {{{next(iter(scale), OVERALL)}: 1}}, got "
                    f"{short(given)}; set data.fields.ratings to read other fields"
                )
            values = {name: given.get(name) for name in scale}
        else:
            values = {name: rule(row) for name, rule in rules.items()}
        numbers = ((name, rating_of(value, scale[name])) for name, value in values.items())
        return {name: number for name, number in numbers if number is not None}

    return ratings


def _rule(name: str, rule: Any) -> Callable[[dict[str, Any]], Any]:
    """How to read objective `name`: a field, a threshold on a field, or a map of a field's values."""
    if isinstance(rule, str):
        return lambda row: get(row, rule)
    shapes = ({"field", "threshold", "above", "below"}, {"field", "map"})
    numbers = [rule.get(k, 0) for k in ("threshold", "above", "below")] if isinstance(rule, dict) else []
    right = isinstance(rule, dict) and set(rule) in shapes and isinstance(rule["field"], str)
    right = right and isinstance(rule.get("map", {}), dict) and all(type(n) in (int, float) for n in numbers)
    if not right:
        raise ValueError(
            f"data.fields.ratings.{name}: write a field, {{field, threshold, above, below}} "
            f"(above: from the threshold on) or {{field, map}}, got {rule!r}"
        )
    if "map" in rule:
        table = {str(key): value for key, value in rule["map"].items()}

        def mapped(row: dict[str, Any]) -> Any:
            value = get(row, rule["field"])
            if str(value) not in table:
                raise ValueError(f"field {rule['field']!r}: {value!r} is not in the map {', '.join(table)}")
            return table[str(value)]

        return mapped

    def thresholded(row: dict[str, Any]) -> Any:
        number = rating_of(get(row, rule["field"]), None)
        return None if number is None else rule["above"] if number >= rule["threshold"] else rule["below"]

    return thresholded
