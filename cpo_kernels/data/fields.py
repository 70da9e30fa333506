"""Reading one row: fields by path, texts, prompts, ratings; each error names the field and the value."""

from __future__ import annotations

import difflib
from typing import Any

from cpo_kernels.data.records import ROLES, Message, Prompt
from cpo_kernels.objectives import Objective

_MISSING = object()


def get(row: dict, path: str) -> Any:
    """`a.b` reads row["a"]["b"]."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    if value is _MISSING:
        near = difflib.get_close_matches(path, list(row), n=1)
        raise ValueError(f"no field {path!r}{f', did you mean {near[0]!r}?' if near else ''}; fields: {', '.join(row)}")
    return value


def find(row: dict, path: str | None) -> Any:
    """Like `get`; None where there is no such field."""
    value: Any = row
    for name in path.split(".") if path else ():
        value = value.get(name) if isinstance(value, dict) else None
    return value if path else None


def text_of(row: dict, path: str) -> str:
    value = get(row, path)
    if not isinstance(value, str):
        raise ValueError(f"field {path!r} must be a text, got {short(value)}")
    return value


def objects_of(row: dict, path: str) -> list[dict]:
    value = get(row, path)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"field {path!r} must be a list of objects, got {short(value)}")
    return value


def prompt_of(row: dict, path: str) -> Prompt:
    """A text, or messages that end with the user's."""
    if isinstance(get(row, path), list):
        return conversation(messages_of(row, path), path)
    text = text_of(row, path)
    if not text.strip():
        raise ValueError(f"field {path!r} is empty: a prompt needs a text (a response may be empty)")
    return text


def conversation(messages: tuple[Message, ...], path: str) -> Prompt:
    """The prompt that these messages are; one message of the user is its text alone."""
    if not messages or messages[-1][0] != "user" or not messages[-1][1].strip():
        last = messages[-1] if messages else None
        raise ValueError(f"field {path!r}: a prompt must end with what the user says, got {short(last)}")
    return messages[0][1] if len(messages) == 1 else messages


def messages_of(row: dict, path: str) -> tuple[Message, ...]:
    found = []
    for message in objects_of(row, path):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"field {path!r}: write {{role: {' | '.join(ROLES)}, content: text}}, got {short(message)}"
            )
        found.append((role, content))
    return tuple(found)


def rating_of(value: Any, objective: Objective | None, missing: tuple[str, ...] = ()) -> float | None:
    """A rating as a float; None where it is missing: null, NaN, or one of the texts in `missing`. 0 is a rating."""
    if value is None or (isinstance(value, str) and value.strip() in missing):
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


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
