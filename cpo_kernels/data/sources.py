"""From sources of any layout to records, and the split of records by prompt."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpo_kernels.data.fields import has, is_empty
from cpo_kernels.data.layouts import LAYOUTS, OVERALL, TELLING, layout_of
from cpo_kernels.data.records import DataError, Record, check_text, prompt_text
from cpo_kernels.data.rows import Row, read_rows
from cpo_kernels.data.schemas import SCHEMAS
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import DataConfig, FieldMap, SourceConfig


def load_records(
    sources: Sequence[SourceConfig | str | Path],
    data: DataConfig,
    objectives: Sequence[Objective],
    report: dict[str, Any],
    quiet: bool = True,
) -> list[Record]:
    """The records of `sources`; see `records_of`."""
    given = [s if isinstance(s, SourceConfig) else SourceConfig(path=str(s)) for s in sources]
    tables = [Table(s.path, s.layout or data.layout, read_rows(s, quiet)) for s in given]
    return records_of(tables, data, objectives, report)


@dataclass(frozen=True)
class Table:
    """Rows of one layout."""

    name: str
    layout: str
    rows: Iterable[Row]


def records_of(
    tables: Sequence[Table], data: DataConfig, objectives: Sequence[Objective], report: dict[str, Any]
) -> list[Record]:
    """The records of `tables`. A broken row raises DataError (place, reason); with `data.on_bad_line: skip` it is left
    out, counted in report["bad_lines"] and its reason kept. Informative columns that nothing reads are counted in
    report["unread_columns"]."""
    layouts = [table.layout for table in tables]
    named = [key for key, value in vars(data.fields).items() if value != getattr(FieldMap(), key)]
    if named and layouts and not set(layouts) & set(LAYOUTS):
        raise ValueError(
            f"data.fields.{named[0]}: layout {layouts[0]} has fixed columns; data.fields is only for "
            f"{', '.join(LAYOUTS)}"
        )
    _check_objectives(layouts, objectives)
    records: dict[Any, Record] = {}
    for table in tables:
        convert, apart = _converter(table.layout, data, objectives)
        columns: Counter[str] = Counter()
        for place, row in table.rows:
            try:
                record = _record(row, convert, place)
            except DataError as error:
                if data.on_bad_line == "error":
                    raise
                count_bad_line(report, error)
                continue
            assert isinstance(row, dict)  # else `_record` would have raised
            columns.update({name: int(not is_empty(value)) for name, value in row.items()})
            columns.update({name: 0 for name in (data.fields.system, data.fields.input) if name and has(row, name)})
            key = place if apart else record.prompt
            if key in records:
                there = records[key].responses
                # a response of several pairs is one response
                more = [r for r in record.responses if table.layout != "rated_pairs" or r not in there]
                record = replace(records[key], responses=(*there, *more))
            records[key] = record
        if table.layout in LAYOUTS and columns:
            _check_columns(columns, data.fields, table.name, report)
    if not records:
        bad = report.get("bad_line_reasons")
        raise ValueError(
            f"no records in {', '.join(table.name for table in tables) or 'data.train: it names no file'}"
            + (f"; bad rows skipped: {report['bad_lines']}, the first: {bad[0]}" if bad else "")
        )
    return list(records.values())


def count_bad_line(report: dict[str, Any], error: DataError) -> None:
    report["bad_lines"] = report.get("bad_lines", 0) + 1
    report.setdefault("bad_line_reasons", []).append(str(error))


def notes(report: dict[str, Any]) -> list[str]:
    """What a user should know about the rows that were read, one line per note."""
    lines = []
    if "bad_lines" in report:
        lines.append(f"bad rows skipped: {report['bad_lines']}; the first: {report['bad_line_reasons'][0]}")
    for name, rows in report.get("unread_columns", {}).items():
        lines.append(
            f"column {name!r} of {rows} rows is not read: use it in data.fields (system, input, ...) or add it to "
            "data.fields.ignore"
        )
    if moved := report.get("train", report.get("drawn", {})).get("moved_boundaries"):
        lines.append(
            f"{moved} prompts end in tokens that depend on the response: these tokens are trained as part of it, as "
            "in TRL"
        )
    return lines


def _record(row: dict[str, Any] | DataError, convert: Callable[[dict[str, Any]], Record], place: str) -> Record:
    """The record of a row, with its place. Texts that cannot be encoded raise here."""
    if isinstance(row, DataError):
        raise row
    try:
        record = convert(row)
        for text in (prompt_text(record.prompt), *(r.text + r.extra for r in record.responses)):
            check_text(text)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None
    return Record(record.prompt, tuple(replace(r, place=place) for r in record.responses), place)


def _check_columns(columns: Counter[str], fields: FieldMap, path: str, report: dict[str, Any]) -> None:
    """Raise for named columns that no row has; count informative columns that nothing names."""
    for key in ("system", "input"):
        name = getattr(fields, key)
        if name is not None and name not in columns:
            raise ValueError(f"data.fields.{key}: no row of {path} has {name!r}; columns: {', '.join(columns)}")
    rules = [rule["field"] if isinstance(rule, dict) else rule for rule in (fields.ratings or {}).values()]
    named = [x for x in vars(fields).values() if isinstance(x, str)]
    taken = {name.partition(".")[0] for name in (*named, *rules)} | set(fields.ignore)
    for name in TELLING:
        if name not in taken and columns[name]:
            counts = report.setdefault("unread_columns", {})
            counts[name] = counts.get(name, 0) + columns[name]


def _converter(
    layout: str, data: DataConfig, objectives: Sequence[Objective]
) -> tuple[Callable[[dict[str, Any]], Record], bool]:
    """(row to record, whether rows of one prompt are kept apart because ratings compare only within a row)."""
    if layout in LAYOUTS:
        return layout_of(layout, data.fields, objectives), layout == "pairs"
    if layout not in SCHEMAS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join([*LAYOUTS, *SCHEMAS])}")
    schema, scale = SCHEMAS[layout], {o.name: o for o in objectives}
    return lambda row: schema.convert(row, scale), schema.apart


def _check_objectives(layouts: Sequence[str], objectives: Sequence[Objective]) -> None:
    """Published schemas only: some source must rate each objective."""
    whole = [layout for layout in layouts if layout in ("hh_rlhf", "helpsteer3")]
    if whole and len(objectives) > 1:
        raise ValueError(
            f"{whole[0]} gives which answer is better, but not on which of {', '.join(o.name for o in objectives)}: "
            "train with a single objective, or convert the data to layout records with ratings of the right one"
        )
    rated = [SCHEMAS[layout].objectives for layout in layouts if layout in SCHEMAS]
    if len(rated) < len(layouts) or not all(rated):
        return
    available = {name for names in rated for name in names}
    for o in objectives:
        if o.name not in available:
            raise ValueError(
                f"objectives: {', '.join(layouts)} does not rate {o.name!r}; it rates {', '.join(sorted(available))}"
            )


def split_by_prompt(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out): round(share * prompts) prompts are held out, at least one if share > 0. The split depends on
    the set of prompts and the seed, not on the order of the records."""
    if not 0 <= share < 1:
        raise ValueError(f"eval_share must be in [0, 1), got {share}")
    prompts = sorted({record.prompt for record in records}, key=prompt_text)
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, round(share * len(prompts)))] if share else [])
    if len(held_out) == len(prompts):
        raise ValueError(f"eval_share {share} leaves no prompt to train on: there are only {len(prompts)}")
    return (
        [record for record in records if record.prompt not in held_out],
        [record for record in records if record.prompt in held_out],
    )


def check_rated(records: Sequence[Record], objectives: Sequence[Objective], name: str) -> None:
    """Raise ValueError for an objective that no response is rated on, such as one whose name is mistyped."""
    rated = {objective for record in records for r in record.responses for objective in r.ratings}
    for o in objectives:
        if o.name not in rated:
            raise ValueError(
                f"{name} has no rating of {o.name!r}; it rates {', '.join(sorted(rated)) or 'nothing'}: correct the "
                "objective's name, or leave it out"
            )


def overall_objective(records: Sequence[Record]) -> Objective:
    """The objective of pairs if the config names none; its scale is the range of the scores."""
    scores = [score for record in records for response in record.responses for score in response.ratings.values()]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    return Objective(OVERALL, low, high if high > low else low + 1.0)
