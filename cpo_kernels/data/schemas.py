"""Published data sets by schema name (`layout: ultrafeedback`), as functions from a row to a record.

layout         data set                      objectives, on the published scale
ultrafeedback  openbmb/UltraFeedback         instruction_following, honesty, truthfulness, helpfulness: 1 to 5
ultrasafety    openbmb/UltraSafety           harmlessness: 0 or 1
helpsteer      nvidia/HelpSteer2, HelpSteer  helpfulness, correctness, coherence, complexity, verbosity: 0 to 4
pku_saferlhf   PKU-Alignment/PKU-SafeRLHF    harmlessness: 1 for a safe answer; mildness: 3 - severity, 0 to 3;
                                             helpfulness, safety: 1 for the better of the two answers, else 0
hh_rlhf        Anthropic/hh-rlhf             at most one objective: its high for chosen, its low for rejected
helpsteer3     nvidia/HelpSteer3             the same, by the sign of overall_preference (-3 to 3; below 0: response1)

A source rates those objectives of the config that its rows contain; the others stay unrated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cpo_kernels.data.fields import conversation, get, objects_of, prompt_of, rating_of, text_of
from cpo_kernels.data.layouts import OVERALL
from cpo_kernels.data.records import Message, Prompt, Record, Response, short
from cpo_kernels.objectives import Objective

Scale = dict[str, Objective]  # the objectives of the config by name
MISSING = ("N/A", "")  # texts that mean a missing rating


@dataclass(frozen=True)
class Schema:
    objectives: tuple[str, ...]
    convert: Callable[[dict[str, Any], Scale], Record]
    apart: bool = False  # ratings compare the answers of one row: rows of the same prompt are not merged


def _ratings(raw: dict[str, Any], scale: Scale) -> dict[str, float]:
    numbers = {name: rating_of(value, scale[name], MISSING) for name, value in raw.items() if name in scale}
    return {name: number for name, number in numbers.items() if number is not None}


# ---------------------------------------------------------------- UltraFeedback, UltraSafety


def _completions(row: dict[str, Any], scale: Scale, aspects: tuple[str, ...]) -> Record:
    responses = []
    for completion in objects_of(row, "completions"):
        annotations = get(completion, "annotations")
        raw = {name: _annotation(annotations, name) for name in aspects if name in scale}
        responses.append(Response(text_of(completion, "response"), _ratings(raw, scale)))
    return Record(prompt_of(row, "instruction"), tuple(responses))


def _annotation(annotations: Any, name: str) -> Any:
    """The rating of an aspect: {aspect: {Rating: "4"}}, or a list of such objects with one entry (UltraSafety)."""
    aspect = annotations.get(name) if isinstance(annotations, dict) else None
    if isinstance(aspect, list) and len(aspect) == 1:
        aspect = aspect[0]
    if not isinstance(aspect, dict) or "Rating" not in aspect:
        raise ValueError(f"annotations.{name} must hold a Rating, got {short(aspect)}")
    return aspect["Rating"]


ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


# ---------------------------------------------------------------- HelpSteer, HelpSteer2

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")  # between the turns of HelpSteer2's longer prompts


def _helpsteer(row: dict[str, Any], scale: Scale) -> Record:
    raw = {name: get(row, name) for name in ATTRIBUTES if name in scale}
    return Record(_turns(text_of(row, "prompt")), (Response(text_of(row, "response"), _ratings(raw, scale)),))


def _turns(text: str) -> Prompt:
    first, *rest = TURN.split(text)
    if not rest:
        return prompt_of({"prompt": text}, "prompt")
    later = zip(rest[::2], rest[1::2], strict=True)
    return conversation((("user", first), *((role.lower(), turn) for role, turn in later)), "prompt")


# ---------------------------------------------------------------- PKU-SafeRLHF

SAFETY = ("harmlessness", "mildness", "helpfulness", "safety")


def _saferlhf(row: dict[str, Any], scale: Scale) -> Record:
    better, safer = (_choice(row, f"{name}_response_id") for name in ("better", "safer"))
    responses = []
    for i in (0, 1):
        raw: dict[str, Any] = {"helpfulness": int(i == better), "safety": int(i == safer)}
        safe = get(row, f"is_response_{i}_safe")
        if not isinstance(safe, bool):
            raise ValueError(f"field 'is_response_{i}_safe' must be true or false, got {short(safe)}")
        raw["harmlessness"] = int(safe)
        if "mildness" in scale:
            severity = rating_of(get(row, f"response_{i}_severity_level"), None)
            raw["mildness"] = None if severity is None else 3 - severity
        responses.append(Response(text_of(row, f"response_{i}"), _ratings(raw, scale)))
    return Record(prompt_of(row, "prompt"), tuple(responses))


def _choice(row: dict[str, Any], field: str) -> int:
    value: int = get(row, field)
    if value not in (0, 1) or isinstance(value, bool):
        raise ValueError(f"field {field!r} must be 0 or 1, got {short(value)}")
    return value


# ---------------------------------------------------------------- HH-RLHF

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh(row: dict[str, Any], scale: Scale) -> Record:
    chosen, rejected = (_transcript(text_of(row, field), field) for field in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last answer")
    return _preferred(conversation(chosen[:-1], "chosen"), (chosen[-1][1], rejected[-1][1]), 1, scale)


def _preferred(prompt: Prompt, texts: tuple[str, str], sign: float, scale: Scale) -> Record:
    """Two answers: the first is better (sign > 0), the second (< 0), or neither."""
    name = next(iter(scale), OVERALL)
    low, high = (scale[name].low, scale[name].high) if scale else (0.0, 1.0)
    levels = (low if sign < 0 else high, low if sign > 0 else high)
    return Record(prompt, tuple(Response(text, {name: level}) for text, level in zip(texts, levels, strict=True)))


def _transcript(text: str, field: str) -> tuple[Message, ...]:
    """The messages of a transcript; consecutive turns of one speaker become one message."""
    before, *rest = SPEAKER.split(text)
    messages: list[Message] = []
    for speaker, said in zip(rest[::2], rest[1::2], strict=True):
        role, said = HH_ROLES[speaker], said.strip()
        if messages and messages[-1][0] == role:
            said = f"{messages.pop()[1]}\n\n{said}"
        messages.append((role, said))
    if before.strip() or len(messages) < 2 or messages[-1][0] != "assistant":
        raise ValueError(
            f"field {field!r} must consist of Human and Assistant turns and end with the answer; got {short(text)}"
        )
    return tuple(messages)


# ---------------------------------------------------------------- HelpSteer3


def _helpsteer3(row: dict[str, Any], scale: Scale) -> Record:
    preference = rating_of(get(row, "overall_preference"), Objective("overall_preference", -3, 3))
    if preference is None:
        raise ValueError("field 'overall_preference' is empty; give -3 to 3, below 0 if response1 is better")
    texts = (text_of(row, "response1"), text_of(row, "response2"))
    return _preferred(prompt_of(row, "context"), texts, -preference, scale)


SCHEMAS = {
    "ultrafeedback": Schema(ASPECTS, lambda row, scale: _completions(row, scale, ASPECTS)),
    "ultrasafety": Schema(("harmlessness",), lambda row, scale: _completions(row, scale, ("harmlessness",))),
    "helpsteer": Schema(ATTRIBUTES, _helpsteer),
    "pku_saferlhf": Schema(SAFETY, _saferlhf, apart=True),
    "hh_rlhf": Schema((), _hh, apart=True),
    "helpsteer3": Schema((), _helpsteer3, apart=True),
}
