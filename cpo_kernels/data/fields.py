"""Read one row: fields by path, texts, prompts, ratings. Each error names the field and the value."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from cpo_kernels.data.records import OPTIONS, RENDERED, ROLES, Message, Prompt, short
from cpo_kernels.objectives import Objective

_MISSING = object()


def get(row: dict[str, Any], path: str) -> Any:
    """`a.b` reads row["a"]["b"]."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    if value is _MISSING:
        near = difflib.get_close_matches(path, list(row), n=1)
        raise ValueError(f"no field {path!r}{f', did you mean {near[0]!r}?' if near else ''}; fields: {', '.join(row)}")
    return value


def has(row: dict[str, Any], path: str) -> bool:
    try:
        get(row, path)
    except ValueError:
        return False
    return True


def find(row: dict[str, Any], path: str | None) -> Any:
    """Like `get`, but None if there is no such field."""
    value: Any = row
    for name in path.split(".") if path else ():
        value = value.get(name) if isinstance(value, dict) else None
    return value if path else None


def text_of(row: dict[str, Any], path: str) -> str:
    value = get(row, path)
    if not isinstance(value, str):
        raise ValueError(f"field {path!r} must be a string, got {short(value)}")
    return value


def objects_of(row: dict[str, Any], path: str) -> list[dict[str, Any]]:
    return objects(get(row, path), path)


def objects(value: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"field {path!r} must be a list of objects, got {short(value)}")
    return value


def prompt_of(row: dict[str, Any], path: str, ignored: Sequence[str] = ()) -> Prompt:
    """A text, or messages that end with the user's (or with what a tool returned)."""
    if isinstance(get(row, path), list):
        return conversation(messages_of(row, path, ignored), path)
    text = text_of(row, path)
    if not text.strip():
        raise ValueError(f"field {path!r} is empty: a prompt needs text (only a response may be empty)")
    return text


def conversation(messages: tuple[Message, ...], path: str) -> Prompt:
    """These messages as a prompt; a single user message becomes its text."""
    if not messages or messages[-1][0] not in ("user", "tool") or not messages[-1][1].strip():
        last = messages[-1] if messages else None
        raise ValueError(f"field {path!r}: a prompt must end with a user message, got {short(last)}")
    if all(message[0] != "user" for message in messages):
        raise ValueError(f"field {path!r}: a prompt needs a user message, got {short(messages)}")
    return messages[0][1] if len(messages) == 1 and len(messages[0]) == 2 else messages


def messages_of(row: dict[str, Any], path: str, ignored: Sequence[str] = ()) -> tuple[Message, ...]:
    """The messages of a conversation; a single message need not be in a list."""
    value = get(row, path)
    entries = objects([value] if isinstance(value, dict) else value, path)
    return tuple(message_of(message, path, ignored) for message in entries)


def message_of(message: dict[str, Any], path: str, ignored: Sequence[str] = ()) -> Message:
    """Role, text and the message's other keys, which the chat template must render."""
    role = str(message.get("role"))
    extra = {name: x for name, x in message.items() if name not in ("role", "content", *ignored) and not is_empty(x)}
    content = message.get("content")
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if isinstance(content, list) and content:
        raise ValueError(f"field {path!r}: only content parts of type text are supported, got {short(content)}")
    content = "" if extra and is_empty(content) else content
    options = role == OPTIONS and not content and bool(extra) and not set(extra) - set(RENDERED)
    if not (options or role in ROLES) or not isinstance(content, str):
        raise ValueError(f"field {path!r}: write {{role: {' | '.join(ROLES)}, content: text}}, got {short(message)}")
    return (role, content, _json(extra, path)) if extra else (role, content)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def answer_of(row: dict[str, Any], path: str, ignored: Sequence[str] = ()) -> tuple[str, str]:
    """(text, other keys of the message as JSON) of a response: a text or one assistant message."""
    value = get(row, path)
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, (dict, list)):
        raise ValueError(f"field {path!r} must be a string, got {short(value)}")
    messages = messages_of(row, path, ignored)
    if len(messages) != 1 or messages[0][0] != "assistant":
        raise ValueError(f"field {path!r} must be a string or one assistant message, got {short(value)}")
    return answer(messages[0])


def answer(message: Message) -> tuple[str, str]:
    return message[1], message[2] if len(message) > 2 else ""


def is_empty(value: Any) -> bool:
    """Whether a field is empty."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _json(value: Any, path: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)  # in the order of the row, which the template writes
    except TypeError as error:
        raise ValueError(f"field {path!r}: {error}, in {short(value)}") from None


def rating_of(value: Any, objective: Objective | None, missing: tuple[str, ...] = ()) -> float | None:
    """A rating as a float; None if it is missing: null, NaN, or one of the texts in `missing`. 0 is a valid rating."""
    if value is None or (isinstance(value, str) and value.strip() in missing):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"rating {value!r} is not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"rating {value!r} is not a number (data.fields.ratings can map it to null)") from None
    if number != number:
        return None
    if abs(number) == float("inf"):
        raise ValueError(f"rating {value!r} is not a finite number")
    if objective and not objective.low <= number <= objective.high:
        raise ValueError(f"rating {number:g} of {objective.name} is outside [{objective.low:g}, {objective.high:g}]")
    return number
