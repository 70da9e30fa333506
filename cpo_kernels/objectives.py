"""Objectives, the value R(y) of a response under conditions, and the condition tags of a prompt.

Controllable Preference Optimization (Guo et al. 2024, arXiv 2402.19085) rates a response on several
objectives (helpfulness, honesty, ...). A condition requests one level of an objective; a rated response is worth more
the closer it comes to that level. On an objective without a condition, a higher rating is better.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import checks

_NAME = r"[^\W\d]\w*(?:[ -]\w+)*"  # a letter first; words joined by single spaces or hyphens
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Objective:
    """One rated quality of a response.

    `low` and `high` are the ends of the rating scale. Ratings and conditions outside raise an error, samplers draw
    between them; they never rescale a rating. `weight` is omega >= 0 and `strength` is lambda >= 0 in `value`.

    Raises ValueError for a name that a tag cannot hold, low >= high, a negative weight or strength, and a number that
    is not finite.
    """

    name: str
    low: float
    high: float
    weight: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(_NAME, self.name):
            raise ValueError(
                f"objective name {self.name!r} cannot be used in a tag: start with a letter or '_', then use "
                "letters, digits, '_', and single inner spaces or hyphens"
            )
        for key in ("low", "high", "weight", "strength"):
            number = getattr(self, key)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"objective {self.name!r}: {key} must be a finite number, got {number!r}")
        if not self.low < self.high:
            raise ValueError(f"objective {self.name!r}: low must be below high, got {self.low} and {self.high}")
        for key in ("weight", "strength"):
            if getattr(self, key) < 0:
                raise ValueError(f"objective {self.name!r}: {key} must be >= 0, got {getattr(self, key)}")


def objectives_tensor(objectives: Sequence[Objective] | Tensor) -> Tensor:
    """The weights omega (row 0) and strengths lambda (row 1) of K objectives: float64 `[2, K]`."""
    if isinstance(objectives, Tensor):
        if objectives.dim() != 2 or objectives.shape[0] != 2:
            raise ValueError(f"a tensor of objectives must have shape [2, K], got {[*objectives.shape]}")
        return objectives.to(torch.float64)
    if not isinstance(objectives, Sequence) or not all(isinstance(o, Objective) for o in objectives):
        hint = ": put it in a list" if isinstance(objectives, Objective) else ""
        raise TypeError(f"objectives must be a list of Objective, got {objectives!r:.80}{hint}")
    names = [objective.name for objective in objectives]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"objective {name!r} is given {names.count(name)} times; names must be unique")
    rows = [[o.weight for o in objectives], [o.strength for o in objectives]]
    return torch.tensor(rows, dtype=torch.float64)


def check_scale(name: str, values: Tensor, objectives: Sequence[Objective] | Tensor) -> None:
    """Raise ValueError for a value of `values` [..., K] outside [low, high] of its objective; NaN (none)
    passes.

    The ends are rounded as the values are (at most to float32): a float32 rating of 0.1 is not above a `high` of 0.1.
    Objectives given as a tensor have no ends: only infinities raise. GPU values are checked only under
    CPO_KERNELS_CHECK=1.
    """
    if not checks.may_read(values):
        return
    wrong = values.isinf()
    if not isinstance(objectives, Tensor):
        dtype = values.dtype if values.dtype in (torch.float16, torch.bfloat16) else torch.float32
        ends = torch.tensor([[o.low, o.high] for o in objectives], dtype=torch.float64, device=values.device)
        low, high = ends.to(dtype).unbind(1)  # [K]
        wrong = wrong | (values.to(dtype) < low) | (values.to(dtype) > high)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        got = f"{name}: {values[tuple(place)].item()} at {place}"
        if isinstance(objectives, Tensor):
            raise ValueError(f"{got} is not finite; NaN means none")
        o = objectives[place[-1]]
        raise ValueError(
            f"{got} is outside [{o.low:g}, {o.high:g}], the range of objective {o.name!r} (NaN means none): "
            "correct the value, or set the objective's low and high to the range of your data"
        )


def value(
    scores: Tensor | Sequence[Any], conditions: Tensor | Sequence[Any] | None, objectives: Sequence[Objective] | Tensor
) -> Tensor:
    """R(y) = sum_i w_i g_i(y) / sum_i w_i over the objectives that y is rated on.

    g_i = -lambda_i |P_i(y) - c_i| where objective i is conditioned, g_i = P_i(y) where it is not
    (Guo et al. 2024).

    Args:
        scores: ratings P `[..., K]`; NaN = not rated: the objective is left out of both sums. 0 is a valid rating.
        conditions: c `[..., K]`, broadcast against `scores`; NaN = not conditioned; None = no conditions.
        objectives: K `Objective`s, or their `[2, K]` tensor of weights and strengths (then ratings have no range).

    Returns:
        float64 `[...]`; NaN where no objective with positive weight is rated.

    Raises:
        TypeError, ValueError: wrong shape or type; a rating or condition outside its objective's scale (on a GPU only
            under CPO_KERNELS_CHECK=1).

    >>> helpful, honest = Objective("helpfulness", 1, 5), Objective("honesty", 1, 5)
    >>> value([4, 2], [5, float("nan")], [helpful, honest])
    tensor(0.5000, dtype=torch.float64)
    """
    scores, conditions, weight, strength = _prepare(scores, conditions, objectives)
    check_scale("scores", scores, objectives)
    check_scale("conditions", conditions, objectives)
    return _weighted_mean(_gains(scores, conditions, strength), weight, ~scores.isnan())


def value_gap(
    scores_a: Tensor | Sequence[Any],
    scores_b: Tensor | Sequence[Any],
    conditions: Tensor | Sequence[Any] | None,
    objectives: Sequence[Objective] | Tensor,
) -> Tensor:
    """Delta R = R(a) - R(b) over the objectives rated on both sides: float64 `[...]`, NaN where none is.

    A rating missing on either side drops its objective for both, so a response is never preferred because it is rated
    on an objective with a larger scale. Arguments as for `value`, except that ratings may be outside their scale, as
    scores of a scorer can be.
    """
    scores_a, conditions, weight, strength = _prepare(scores_a, conditions, objectives)
    scores_b = _ratings("scores_b", scores_b).to(scores_a.device)
    _check_width("scores_b", scores_b, weight)
    difference = _gains(scores_a, conditions, strength) - _gains(scores_b, conditions, strength)
    return _weighted_mean(difference, weight, ~(scores_a.isnan() | scores_b.isnan()))


def _prepare(
    scores: Any, conditions: Any, objectives: Sequence[Objective] | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = _ratings("scores", scores)
    weight, strength = objectives_tensor(objectives).to(scores.device)  # [K], [K]
    if conditions is None:
        conditions = scores.new_full(weight.shape, math.nan)
    conditions = _ratings("conditions", conditions).to(scores.device)
    _check_width("scores", scores, weight)
    _check_width("conditions", conditions, weight)
    try:
        torch.broadcast_shapes(scores.shape, conditions.shape)
    except RuntimeError:
        raise ValueError(
            f"conditions {[*conditions.shape]} do not broadcast against scores {[*scores.shape]}"
        ) from None
    return scores, conditions, weight, strength


def _ratings(name: str, values: Tensor | Sequence[Any]) -> Tensor:
    if not isinstance(values, (Tensor, Sequence)) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name} must be numbers, one per objective, got {values!r:.80}")
    if isinstance(values, Tensor) and values.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {values.layout}")
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers, NaN for none, got {values!r:.80}: {error}") from None


def _check_width(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] != weight.shape[0]:
        raise ValueError(f"{name} must be [..., {weight.shape[0]}] (one column per objective), got {[*tensor.shape]}")


def _gains(scores: Tensor, conditions: Tensor, strength: Tensor) -> Tensor:
    return torch.where(conditions.isnan(), scores, -strength * (scores - conditions).abs())


def _weighted_mean(gains: Tensor, weight: Tensor, rated: Tensor) -> Tensor:
    """sum(w g) / sum(w) over the rated objectives; 0 / 0 = NaN where none is rated."""
    weight = torch.where(rated, weight, 0.0)
    return torch.where(weight > 0, weight * gains, 0.0).sum(-1) / weight.sum(-1)


@dataclass(frozen=True)
class TagTemplate:
    """Condition tags as ordinary text before a prompt: `<helpfulness: 5> <honesty: 3> `.

    `pattern` is one tag with `{name}` and `{value}`, including its trailing separator; the paper's figure has
    `"< {name}: {value} > "`. `parse` reads back exactly what `render` writes: whole numbers are written without ".0",
    others with `repr`. A pattern that cannot guarantee this raises ValueError.

    >>> tags = TagTemplate([Objective("helpfulness", 1, 5), Objective("honesty", 1, 5)])
    >>> tags.render({"honesty": 3, "helpfulness": 5}) + "Who was Ada?"
    '<helpfulness: 5> <honesty: 3> Who was Ada?'
    >>> tags.parse("<honesty: 2.5> Who was Ada?")
    ({'honesty': 2.5}, 'Who was Ada?')
    """

    objectives: Sequence[Objective]
    pattern: str = "<{name}: {value}> "
    _by_name: dict[str, Objective] = field(init=False, repr=False, compare=False)
    _tag: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        objectives_tensor(self.objectives)  # names differ
        object.__setattr__(self, "objectives", tuple(self.objectives))
        object.__setattr__(self, "_by_name", {o.name: o for o in self.objectives})
        object.__setattr__(self, "_tag", _compile(self.pattern, self._by_name))
        for pick in ("low", "high"):
            conditions = {o.name: getattr(o, pick) for o in self.objectives}
            try:
                parsed = self.parse(self.render(conditions))
            except ValueError as error:
                raise ValueError(f"tag pattern {self.pattern!r} cannot be parsed back: {error}") from error
            if parsed != (conditions, ""):
                raise ValueError(
                    f"tag pattern {self.pattern!r} cannot be parsed back: {conditions} became "
                    f"{parsed[0]} and text {parsed[1]!r}"
                )

    def render(self, conditions: Mapping[str, float | None]) -> str:
        """The tags of `conditions` in the order of `objectives`; None and NaN mean not conditioned."""
        for name in conditions:
            self._objective(name)
        text = ""
        for name in self._by_name:
            level = conditions.get(name)
            if level is None or level != level:
                continue
            text += self.pattern.format(name=name, value=format_number(self._in_range(name, level)))
        return text

    def parse(self, text: str) -> tuple[dict[str, float], str]:
        """The conditions that `text` starts with, and the text after them.

        Raises ValueError for an objective that is not in `objectives`, a level outside [low, high] or not a number,
        and an objective tagged twice. A prompt that itself starts with text of a tag's form is read as a tag.
        """
        conditions: dict[str, float] = {}
        position = 0
        while match := self._tag.match(text, position):
            name, level = match["name"], match["value"]
            if name not in self._by_name and not re.fullmatch(_NUMBER, level):
                break  # text that merely looks like a tag
            self._objective(name)
            if not re.fullmatch(_NUMBER, level):
                raise ValueError(f"tag {match[0]!r}: the level {level!r} is not a number")
            if name in conditions:
                raise ValueError(f"tag {match[0]!r}: objective {name!r} is conditioned twice")
            conditions[name] = self._in_range(name, float(level))
            position = match.end()
        return conditions, text[position:]

    def _objective(self, name: str) -> Objective:
        if name not in self._by_name:
            raise ValueError(f"unknown objective {name!r}; known: {', '.join(self._by_name) or 'none'}")
        return self._by_name[name]

    def _in_range(self, name: str, level: float) -> float:
        objective = self._objective(name)
        if isinstance(level, (bool, str)):
            raise ValueError(f"condition {name}: the level must be a number, got {level!r}")
        if not objective.low <= level <= objective.high:
            raise ValueError(f"condition {name}: {level} is outside [{objective.low}, {objective.high}]")
        return float(level)


def format_number(number: float) -> str:
    """Shortest text that `float` reads back exactly: '5' for 5.0, '2.5' for 2.5, '1e+22' for 1e22."""
    number = float(number)
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


def _compile(pattern: str, by_name: Mapping[str, Objective]) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"tag pattern must be a string, got {pattern!r:.80}")
    try:
        pieces = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"tag pattern {pattern!r} is not a format string: {error}") from error
    fields = [name for _, name, _, _ in pieces if name is not None]
    if sorted(fields) != ["name", "value"] or any(spec or conversion for _, _, spec, conversion in pieces):
        raise ValueError(
            f"tag pattern {pattern!r} must contain {{name}} and {{value}} once each, without format specifiers"
        )
    texts = [text for text, *_ in pieces[1:]] + [""]
    after = {field: text for (_, field, _, _), text in zip(pieces, texts, strict=True)}
    if re.match(r"[\d.+\-eE]|\Z", after["value"]) or re.match(r"\w|\Z", after["name"]):
        raise ValueError(
            f"tag pattern {pattern!r} cannot be parsed back: {{value}} must be followed by a character that "
            "cannot occur in a number, {name} by one that cannot occur in a name"
        )
    names = "|".join(re.escape(name) for name in sorted(by_name, key=len, reverse=True))
    groups = {"name": f"(?P<name>{names}|{_NAME})" if names else f"(?P<name>{_NAME})"}
    groups["value"] = rf"(?P<value>{_NUMBER}|[^\s<>]+?)"
    return re.compile("".join(re.escape(text) + groups.get(name or "", "") for text, name, _, _ in pieces))
