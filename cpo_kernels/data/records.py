"""A record: one prompt and its responses, each with a dict of ratings. JSONL in and out.

{"prompt": "Who was Ada?", "responses": [{"text": "A mathematician.", "ratings": {"honesty": 5}}, ...]}

A prompt is a text, or the messages of a conversation that ends with the one to answer:
{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, ...], "responses": ...}

Other keys of a message (`tool_calls`, `name`, ...) are passed to the chat template. So are the columns `tools` and
`chat_template_kwargs` of a row, stored as a first message of the role `options`.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = tuple[str, ...]  # role and text; then, where a message has other keys, those as JSON
Prompt = str | tuple[Message, ...]
ROLES = ("system", "user", "assistant", "tool", "developer")
OPTIONS = "options"
RENDERED = ("tools", "chat_template_kwargs")  # its keys: columns of TRL's formats that the chat template gets
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class DataError(ValueError):
    """A row that cannot be used, with file, line or row number, and reason."""


@dataclass(frozen=True)
class Response:
    text: str
    ratings: dict[str, float] = field(default_factory=dict)  # a missing rating is left out, never 0 or NaN
    extra: str = ""  # the other keys of the assistant's message, as JSON
    place: str = field(default="", compare=False)  # file and line that it comes from


@dataclass(frozen=True)
class Record:
    prompt: Prompt
    responses: tuple[Response, ...]
    place: str = field(default="", compare=False)  # file and line of its first row


def prompt_text(prompt: Prompt) -> str:
    """The prompt as plain text, for display and sorting."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{role}: {' '.join(filter(None, said))}" for role, *said in prompt)


def prompt_json(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [message_json(*message) for message in prompt]


def message_json(role: str, text: str, extra: str = "") -> dict[str, Any]:
    return {"role": role, "content": text} | (json.loads(extra) if extra else {})


def prompt_columns(prompt: Prompt) -> dict[str, Any]:
    """The prompt as columns of a row with TRL's names: `prompt`, and `tools` and `chat_template_kwargs` if present."""
    messages = prompt_json(prompt)
    options = messages.pop(0) if isinstance(messages, list) and messages[0]["role"] == OPTIONS else {}
    return {"prompt": messages} | {name: x for name, x in options.items() if name not in ("role", "content")}


def _opener(path: str | Path) -> Callable[..., Any]:
    return OPENERS.get(Path(path).suffix.lower(), open)


def suffix_of(path: str | Path) -> str:
    """The file's extension in lower case, without that of its compression."""
    name = Path(path).name.lower()
    return Path(name[: -len(packed)] if (packed := Path(name).suffix) in OPENERS else name).suffix


def open_text(path: str | Path, **keys: Any) -> Any:
    """The file as text (UTF-8, with or without a byte order mark), decompressed if its name ends in .gz, .bz2 or
    .xz."""
    return _opener(path)(path, "rt", encoding="utf-8-sig", **keys)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(line number, object) of every non-blank line; a line that is not a JSON object yields a DataError instead."""
    with _opener(path)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield number, _object(line)
            except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
                yield number, DataError(f"{path}:{number}: {error}")


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}: save the file as UTF-8") from None
    hint = "; name a file that holds one JSON array .json" if text.startswith("[") else ""
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{error}: each line must be one complete JSON object, got {short(text)}{hint}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__} {short(text)}{hint}")
    return row


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 10) : error.end + 10]
        raise ValueError(
            f"{short(near)} holds half of a surrogate pair, which is not a character: fix the text"
        ) from None


def write_records(records: Sequence[Record], path: str | Path) -> None:
    """Write `records` so that data.layout: records reads them back."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            responses = [{"text": response_json(r), "ratings": r.ratings} for r in record.responses]
            row = prompt_columns(record.prompt) | {"responses": responses}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def response_json(response: Response) -> Any:
    """The response's text, or the assistant's message if that has other keys."""
    return message_json("assistant", response.text, response.extra) if response.extra else response.text
