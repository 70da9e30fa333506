"""A record: one prompt and its responses, each with a dict of ratings. JSONL in and out.

{"prompt": "Who was Ada?", "responses": [{"text": "A mathematician.", "ratings": {"honesty": 5}}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A line that cannot be read: file, line number and reason."""


@dataclass(frozen=True)
class Response:
    text: str
    ratings: dict[str, float] = field(default_factory=dict)  # a missing rating is left out, never 0 or NaN


@dataclass(frozen=True)
class Record:
    prompt: str
    responses: tuple[Response, ...]


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(line number, object) of every line that is not blank; a line that is no JSON object comes as its DataError."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, got {type(row).__name__}")
                yield number, row
            except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
                yield number, DataError(f"{path}:{number}: {error}")


def write_records(records: Sequence[Record], path: str | Path) -> None:
    """Write `records` in the layout that data.layout: records reads back."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            responses = [{"text": r.text, "ratings": r.ratings} for r in record.responses]
            file.write(json.dumps({"prompt": record.prompt, "responses": responses}, ensure_ascii=False) + "\n")
