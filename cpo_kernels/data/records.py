"""A record: one prompt and its responses, each with a dict of ratings. JSONL in and out.

{"prompt": "Who was Ada?", "responses": [{"text": "A mathematician.", "ratings": {"honesty": 5}}, ...]}

A prompt is a text, or the messages of a conversation that ends with the user's:
{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, ...], "responses": ...}
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = tuple[str, str]  # role (system, user or assistant) and text
Prompt = str | tuple[Message, ...]
ROLES = ("system", "user", "assistant")


class DataError(ValueError):
    """A row that cannot be read: file, line or row number, and reason."""


@dataclass(frozen=True)
class Response:
    text: str
    ratings: dict[str, float] = field(default_factory=dict)  # a missing rating is left out, never 0 or NaN


@dataclass(frozen=True)
class Record:
    prompt: Prompt
    responses: tuple[Response, ...]


def prompt_text(prompt: Prompt) -> str:
    """The prompt on its own, for people and for sorting."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{role}: {text}" for role, text in prompt)


def prompt_json(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [{"role": role, "content": text} for role, text in prompt]


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(line number, object) of every line that is not blank; a line that is no JSON object comes as its DataError."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
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
            row = {"prompt": prompt_json(record.prompt), "responses": responses}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
