"""Files of any schema to records, through a field map; and the split of records by prompt.

Three layouts (`data.layout`): `records`, a prompt with its list of responses a row; `answers`, one rated response a
row, grouped by prompt; `pairs`, prompt, chosen and rejected a row, with scores or without.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpo_kernels.data.records import DataError, Record, Response, read_jsonl
from cpo_kernels.objectives import Objective
from cpo_kernels.training.config import DataConfig, FieldMap

_MISSING = object()
OVERALL = "overall"  # the objective of pairs without a configured one


def load_records(
    paths: Sequence[str | Path], data: DataConfig, objectives: Sequence[Objective], report: dict[str, Any]
) -> list[Record]:
    """The records of `paths`. Raises DataError (file, line, reason) on a broken line, or with
    `data.on_bad_line: skip` leaves it out, counts it in report["bad_lines"] and keeps its reason."""
    convert = _converter(data, objectives)
    records: dict[Any, Record] = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"data file {str(path)!r} does not exist")
        for line, row in read_jsonl(path):
            try:
                if isinstance(row, DataError):
                    raise row
                try:
                    record = convert(row)
                except ValueError as error:
                    raise DataError(f"{path}:{line}: {error}") from None
            except DataError as error:
                if data.on_bad_line == "error":
                    raise
                report["bad_lines"] = report.get("bad_lines", 0) + 1
                report.setdefault("bad_line_reasons", []).append(str(error))
                continue
            # pairs stay apart: a response is rated against its partner only
            place = (str(path), line) if data.layout == "pairs" else record.prompt
            earlier = records[place].responses if place in records else ()
            records[place] = Record(record.prompt, earlier + record.responses)
    if not records:
        raise ValueError(f"no records in {', '.join(map(str, paths)) or 'data.train: it names no file'}")
    return list(records.values())


def split_by_prompt(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out): round(share * prompts) prompts are held out, at least one if share > 0. Depends on the set
    of prompts and the seed, not on the order of the records."""
    if not 0 <= share < 1:
        raise ValueError(f"eval_share must be in [0, 1), got {share}")
    prompts = sorted({record.prompt for record in records})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, round(share * len(prompts)))] if share else [])
    if len(held_out) == len(prompts):
        raise ValueError(f"eval_share {share} leaves no prompt to train on; there are {len(prompts)}")
    return (
        [record for record in records if record.prompt not in held_out],
        [record for record in records if record.prompt in held_out],
    )


def _converter(data: DataConfig, objectives: Sequence[Objective]) -> Callable[[dict], Record]:
    fields, scale = data.fields, {o.name: o for o in objectives}
    if data.layout == "pairs":
        if len(objectives) > 1:
            raise ValueError(f"layout pairs has one overall rating; got objectives {', '.join(scale)}")
        return lambda row: _pair(row, fields, next(iter(scale), OVERALL), scale)
    rules = {name: _rule(name, rule) for name, rule in (fields.ratings or {}).items()}
    for name in rules:
        if name not in scale:
            raise ValueError(f"data.fields.ratings: {name!r} is no objective; objectives: {', '.join(scale)}")

    def ratings(row: dict) -> dict[str, float]:
        if fields.ratings is None:
            given = row.get("ratings", {})
            if not isinstance(given, dict):
                raise ValueError(f"`ratings` must be a dict of numbers, got {given!r}")
            found = {name: given.get(name) for name in scale}
        else:
            found = {name: rule(row) for name, rule in rules.items()}
        numbers = ((name, _rating(value, scale[name])) for name, value in found.items())
        return {name: number for name, number in numbers if number is not None}

    if data.layout == "answers":
        text = fields.response or "response"
        return lambda row: Record(_prompt(row, fields.prompt), (Response(_text(row, text), ratings(row)),))

    def record(row: dict) -> Record:
        responses = _get(row, fields.responses)
        if not isinstance(responses, list) or not all(isinstance(r, dict) for r in responses) or not responses:
            raise ValueError(f"field {fields.responses!r} must be a list of objects, got {_short(responses)}")
        text = fields.response or "text"
        return Record(_prompt(row, fields.prompt), tuple(Response(_text(r, text), ratings(r)) for r in responses))

    return record


def _pair(row: dict, fields: FieldMap, name: str, scale: dict[str, Objective]) -> Record:
    scores: list[Any] = [row.get(field) if field else None for field in (fields.score_chosen, fields.score_rejected)]
    if None in scores:
        low, high = (scale[name].low, scale[name].high) if scale else (0.0, 1.0)
        scores = [high, low]  # without scores the first of a pair is chosen
    chosen, rejected = (_rating(score, scale.get(name)) for score in scores)
    if chosen is not None and rejected is not None and chosen < rejected:
        raise ValueError(
            f"{fields.score_chosen} {chosen} is below {fields.score_rejected} {rejected}; "
            "set data.fields.score_chosen: null to go by chosen and rejected alone"
        )
    pairs = ((fields.chosen, chosen), (fields.rejected, rejected))
    responses = (Response(_text(row, f), {} if score is None else {name: score}) for f, score in pairs)
    return Record(_prompt(row, fields.prompt), tuple(responses))


def _rule(name: str, rule: Any) -> Callable[[dict], Any]:
    """How objective `name` is read: a field, a threshold on a field, or a table of a field's values."""
    if isinstance(rule, str):
        return lambda row: _get(row, rule)
    shapes = ({"field", "threshold", "above", "below"}, {"field", "map"})
    if not isinstance(rule, dict) or set(rule) not in shapes:
        raise ValueError(
            f"data.fields.ratings.{name}: write a field, {{field, threshold, above, below}} "
            f"(above: from the threshold on) or {{field, map}}, got {rule!r}"
        )
    if "map" in rule:
        table = {str(key): value for key, value in rule["map"].items()}

        def mapped(row: dict) -> Any:
            value = _get(row, rule["field"])
            if str(value) not in table:
                raise ValueError(f"field {rule['field']!r}: {value!r} is not in the map {', '.join(table)}")
            return table[str(value)]

        return mapped

    def thresholded(row: dict) -> Any:
        number = _rating(_get(row, rule["field"]), None)
        return None if number is None else rule["above"] if number >= rule["threshold"] else rule["below"]

    return thresholded


def _rating(value: Any, objective: Objective | None) -> float | None:
    """A rating as a float, None where it is missing (null or NaN)."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"rating {value!r} is not a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"rating {value!r} is not a number (data.fields.ratings can map it to null)") from None
    if number != number:
        return None
    if objective and not objective.low <= number <= objective.high:
        raise ValueError(f"rating {number:g} of {objective.name} is outside [{objective.low:g}, {objective.high:g}]")
    return number


def _get(row: dict, path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    if value is _MISSING:
        near = difflib.get_close_matches(path, list(row), n=1)
        raise ValueError(f"no field {path!r}{f', did you mean {near[0]!r}?' if near else ''}; fields: {', '.join(row)}")
    return value


def _text(row: dict, path: str) -> str:
    value = _get(row, path)
    if not isinstance(value, str):
        raise ValueError(f"field {path!r} must be a text, got {_short(value)}")
    return value


def _prompt(row: dict, path: str) -> str:
    text = _text(row, path)
    if not text.strip():
        raise ValueError(f"field {path!r} is empty: a prompt needs a text (a response may be empty)")
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def overall_objective(records: Sequence[Record]) -> Objective:
    """The objective of pairs when the config names none: its scale is the range of the scores."""
    scores = [score for record in records for response in record.responses for score in response.ratings.values()]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    return Objective(OVERALL, low, high if high > low else low + 1.0)
