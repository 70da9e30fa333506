"""The requests to models: conditions one by one, or every combination of levels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from cpo_kernels.data.layouts import row_prompt
from cpo_kernels.data.records import DataError, Record, check_text, open_text, prompt_text
from cpo_kernels.data.rows import DAMAGED, damaged, holds_rows, read_rows
from cpo_kernels.objectives import Objective, TagTemplate
from cpo_kernels.recipe.keys import FieldMap, SourceConfig

MOST = 200  # limit on combinations of a default grid


def parse_condition(text: str, tags: TagTemplate) -> dict[str, float]:
    """Parse `honesty=5,helpfulness=1` into a dict, in the order of the objectives."""
    given = {}
    for part in text.split(","):
        name, equals, level = part.partition("=")
        if name.strip() in given:
            raise ValueError(f"--condition {text!r}: {name.strip()} is given twice")
        given[name.strip()] = _number(level, f"--condition {text!r}: write objective=level,objective=level")
    return tags.parse(tags.render(given))[0]


def levels(objective: Objective) -> list[float]:
    """The integers of the scale if there are at most five, else five equidistant levels."""
    low, high = objective.low, objective.high
    if float(low).is_integer() and float(high).is_integer() and high - low < 5:
        return [float(level) for level in range(int(low), int(high) + 1)]
    return [low + (high - low) * i / 4 for i in range(5)]


def condition_grid(objectives: Sequence[Objective], chosen: Sequence[str] = ()) -> list[dict[str, float]]:
    """Every combination of levels, the last objective varying fastest.

    `chosen` are strings such as `honesty=1,3,5`: the levels of that objective. If any is given, objectives without one
    show no tag; else every objective has `levels`.
    """
    axes = {} if chosen else {o.name: levels(o) for o in objectives}
    by_name = {o.name: o for o in objectives}
    for text in chosen:
        name, _, given = text.partition("=")
        name = name.strip()
        if name not in by_name:
            raise ValueError(f"--grid {text!r}: unknown objective {name!r}; known: {', '.join(by_name) or 'none'}")
        if name in axes:
            raise ValueError(f"--grid {text!r}: {name} is given twice; write all its levels in one: {name}=1,3,5")
        wrong = f"--grid {text!r}: write objective=level,level,..."
        axes[name] = [_number(level, wrong) for level in given.split(",")]
        low, high = by_name[name].low, by_name[name].high
        for level in axes[name]:
            if not low <= level <= high:
                raise ValueError(f"--grid {text!r}: {level:g} is outside [{low:g}, {high:g}]")
    ordered = {o.name: axes[o.name] for o in objectives if o.name in axes}
    grid = [dict(zip(ordered, combination, strict=True)) for combination in product(*ordered.values())]
    if not chosen and len(grid) > MOST:
        raise ValueError(f"{len(grid)} combinations of levels: choose with --grid objective=level,level or --condition")
    return grid


def _number(text: str, wrong: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(wrong) from None


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for a given count below 1."""
    for name in names:
        number = getattr(args, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def parse_objective(text: str) -> Objective:
    """Parse `honesty:1:5` into an Objective."""
    name, *ends = text.split(":")
    wrong = f"--objective {text!r}: write name:low:high"
    if len(ends) != 2:
        raise ValueError(wrong)
    return Objective(name, _number(ends[0], wrong), _number(ends[1], wrong))


def read_prompts(path: str | Path) -> list[Record]:
    """Prompts without rated responses: a file of rows with `prompt` (a text or messages), or a text file with one per
    line."""
    if holds_rows(str(path)):
        records = []
        for place, row in read_rows(SourceConfig(str(path))):
            if isinstance(row, DataError):
                raise row
            try:
                record = Record(row_prompt(row, FieldMap()), (), place)
                check_text(prompt_text(record.prompt))
                records.append(record)
            except ValueError as error:
                raise DataError(f"{place}: {error}") from None
    else:
        try:
            with open_text(path) as file:
                lines = enumerate(file.read().split("\n"), 1)
        except DAMAGED as error:
            raise damaged(str(path), error) from None
        records = [Record(line.strip(), (), f"{path}:{number}") for number, line in lines if line.strip()]
    if not records:
        raise ValueError(f"{path} has no prompts")
    return records
