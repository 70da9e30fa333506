"""Conditions, responses and pairs of every prompt, drawn once from the seed when the data is prepared.

Samplers of a condition (Guo et al. 2024 draw `attained`; their data leaves the tags of the best level out):
    attained   the ratings of one random response of the prompt
    best       the highest level of every objective
    grid       every objective's level at random
    none       nothing asked: no tags, and a higher R is better
`cpsft` may only show a response under the ratings that it really has, so there a sampler chooses the response that
fits its condition best, and the tags are that response's ratings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, cycle, islice
from typing import Any

import torch

from cpo_kernels.data.records import Prompt, Record, Response
from cpo_kernels.objectives import Objective, value, value_gap
from cpo_kernels.training.config import ConditionsConfig, MixConfig

SAMPLERS = ("attained", "best", "grid", "none")
Condition = dict[str, float]


@dataclass(frozen=True)
class Group:
    """One prompt under one condition: the responses that are run once each, and the non-tie pairs among them."""

    prompt: Prompt
    tags: Condition  # what the prompt shows; empty for a best-on-everything condition whose tags are stripped
    condition: Condition  # what R judges by
    responses: tuple[Response, ...]
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass
class Draws:
    """What `Sampler` prepares. A unit is the groups that stay in one batch: all conditions of one drawn prompt."""

    units: list[tuple[Group, ...]]
    counts: dict[str, int] = field(default_factory=dict)  # groups, pairs, ties, unrated, ...


def ratings_row(ratings: Condition, objectives: Sequence[Objective]) -> list[float]:
    """[K] levels in the order of `objectives`, NaN where there is none."""
    return [ratings.get(o.name, math.nan) for o in objectives]


def prepare(
    stage: str,
    records: Sequence[Record],
    objectives: Sequence[Objective],
    config: ConditionsConfig,
    seed: int,
    tie_margin: float = 1e-6,
) -> Draws:
    """The units of `stage`, in a fixed order that depends on `seed` alone."""
    sampler = Sampler(records, objectives, config, random.Random(seed), tie_margin)
    draws = {"cpsft": sampler.cpsft, "sft": sampler.sft, "cdpo": sampler.cdpo, "dpo": sampler.dpo}[stage]()
    if not draws.units:
        raise ValueError(f"stage {stage}: nothing to train on in {len(records)} records; counts: {draws.counts}")
    return draws


class Sampler:
    def __init__(
        self,
        records: Sequence[Record],
        objectives: Sequence[Objective],
        config: ConditionsConfig,
        rng: random.Random,
        tie_margin: float,
    ):
        self.records, self.objectives, self.config = records, objectives, config
        self.rng, self.tie_margin = rng, tie_margin
        self.names = [o.name for o in objectives]
        self._check()
        rated = [r.ratings for record in records for r in record.responses]
        self.levels = {name: sorted({r[name] for r in rated if name in r}) for name in self.names}

    # ---------------------------------------------------------------- stages

    def cpsft(self) -> Draws:
        """Every rated response once (or rating classes equally often), under its own ratings."""
        every = [(record, r) for record in self.records for r in record.responses if r.ratings]
        draws = Draws([], {"unrated": sum(len(r.responses) for r in self.records) - len(every)})
        quotas = _quotas(len(every), [entry.share for entry in self.config.mixture])
        for entry, quota in zip(self.config.mixture, quotas, strict=True):
            if entry.sampler == "attained":
                chosen = self._by_class(every, quota)
            else:
                chosen = [self._fitting(record, entry) for record in self._cycled(self.records, quota)]
            names = self._names(entry)
            for record, response in chosen:
                condition = {name: response.ratings[name] for name in names if name in response.ratings}
                draws.units.append((Group(record.prompt, self._tags(condition), condition, (response,)),))
        return draws

    def sft(self) -> Draws:
        """No tags: the best responses of every prompt by the unconditioned R, or all."""
        units: list[tuple[Group, ...]] = []
        for record in self.records:
            kept = self._best(record.responses, {}) if self.config.sft_responses == "best" else record.responses
            units += [(Group(record.prompt, {}, {}, (response,)),) for response in kept]
        return Draws(units)

    def cdpo(self) -> Draws:
        """`draws` times every prompt: its responses, `per_prompt` conditions, and the pairs under each."""
        return self._preference(self._conditions)

    def dpo(self) -> Draws:
        """No tags: pairs ordered by the unconditioned R."""
        return self._preference(lambda responses: [{}])

    def _preference(self, conditions: Any) -> Draws:
        draws = Draws([], {"groups": 0, "pairs": 0, "ties": 0, "groups_without_pairs": 0})
        for record in self.records:
            for _ in range(self.config.draws):
                responses = self._spread(record.responses)
                unit = []
                for condition in conditions(responses):
                    pairs = self._pairs(responses, condition)
                    draws.counts["ties"] += math.comb(len(responses), 2) - len(pairs)
                    if self.config.pairs is not None and len(pairs) > self.config.pairs:
                        pairs = sorted(self.rng.sample(pairs, self.config.pairs))
                    if pairs:
                        unit.append(Group(record.prompt, self._tags(condition), condition, responses, tuple(pairs)))
                    draws.counts["groups" if pairs else "groups_without_pairs"] += 1
                    draws.counts["pairs"] += len(pairs)
                if unit:
                    draws.units.append(tuple(unit))
        return draws

    # ---------------------------------------------------------------- conditions

    def _conditions(self, responses: tuple[Response, ...]) -> list[Condition]:
        """Up to `per_prompt` different conditions; fewer where the samplers have no more to offer."""
        found: list[Condition] = []
        for _ in range(8 * self.config.per_prompt):
            entry = self.rng.choices(self.config.mixture, [entry.share for entry in self.config.mixture])[0]
            condition = self._condition(entry, responses)
            if condition not in found:
                found.append(condition)
            if len(found) == self.config.per_prompt:
                break
        return found

    def _condition(self, entry: MixConfig, responses: Sequence[Response]) -> Condition:
        names = self._names(entry)
        if entry.sampler == "attained":
            rated = [r for r in responses if r.ratings]
            if not rated:
                return {}
            ratings = self.rng.choices(rated, self._response_weights(rated))[0].ratings
            return {name: ratings[name] for name in names if name in ratings}
        if entry.sampler == "best":
            return {o.name: o.high for o in self.objectives if o.name in names}
        if entry.sampler == "grid":
            values = entry.values or self.levels
            return {name: float(self.rng.choice(values[name])) for name in names if values.get(name)}
        return {}

    def _tags(self, condition: Condition) -> Condition:
        best = condition == {o.name: o.high for o in self.objectives}
        return {} if best and self.rng.random() < self.config.strip_best else condition

    def _names(self, entry: MixConfig) -> list[str]:
        if entry.sampler == "none":
            return []
        return self.names if entry.objectives is None else entry.objectives

    # ---------------------------------------------------------------- responses and pairs

    def _pairs(self, responses: Sequence[Response], condition: Condition) -> list[tuple[int, int]]:
        pairs = list(combinations(range(len(responses)), 2))
        if not pairs:
            return []
        scores = torch.tensor([ratings_row(r.ratings, self.objectives) for r in responses], dtype=torch.float64)
        first, second = torch.tensor(pairs).unbind(1)
        row = ratings_row(condition, self.objectives)
        gaps = value_gap(scores[first], scores[second], row, self.objectives)  # NaN: no objective rated on both
        return [pair for pair, gap in zip(pairs, gaps.tolist(), strict=True) if abs(gap) > self.tie_margin]

    def _best(self, responses: Sequence[Response], condition: Condition) -> list[Response]:
        """The responses of highest R under `condition`; all of them where none is rated."""
        scores = [ratings_row(r.ratings, self.objectives) for r in responses]
        row = ratings_row(condition, self.objectives)
        worth = [-math.inf if w != w else w for w in value(scores, row, self.objectives).tolist()]
        return [r for r, w in zip(responses, worth, strict=True) if w >= max(worth) - self.tie_margin]

    def _fitting(self, record: Record, entry: MixConfig) -> tuple[Record, Response]:
        rated = [r for r in record.responses if r.ratings] or list(record.responses)
        return record, self.rng.choice(self._best(rated, self._condition(entry, rated)))

    def _spread(self, responses: Sequence[Response]) -> tuple[Response, ...]:
        """`responses` of the prompt's: one of each rating class in turn, a class of weight w < 1 in a share w of the
        turns, so that pairs that are no ties stand among few responses."""
        wanted = self.config.responses
        if wanted is None or wanted >= len(responses):
            return tuple(responses)
        classes: dict[tuple, list[Response]] = {}
        for response in self.rng.sample(list(responses), len(responses)):
            classes.setdefault(self._class(response), []).append(response)
        weights = {c: self._weight(c) for c in classes}
        top = max(weights.values()) or 1.0
        chosen: list[Response] = []
        while len(chosen) < wanted and any(left and weights[c] for c, left in classes.items()):
            for c in self.rng.sample(list(classes), len(classes)):
                if classes[c] and len(chosen) < wanted and self.rng.random() < weights[c] / top:
                    chosen.append(classes[c].pop())
        return tuple(chosen)

    def _by_class(self, items: list[tuple[Record, Response]], quota: int) -> list[tuple[Record, Response]]:
        """`quota` items: every item in turn, or with `balance` every rating class by its weight."""
        if not self.config.balance:
            return list(self._cycled(items, quota))
        classes: dict[tuple, list[tuple[Record, Response]]] = {}
        for item in items:
            classes.setdefault(self._class(item[1]), []).append(item)
        shares = [self._weight(c) for c in classes]
        counts = _quotas(quota, shares)
        return [item for c, n in zip(classes.values(), counts, strict=True) for item in self._cycled(c, n)]

    def _cycled(self, items: Sequence[Any], count: int) -> Iterator[Any]:
        return islice(cycle(self.rng.sample(list(items), len(items))), count)

    def _class(self, response: Response) -> tuple:
        return tuple(response.ratings.get(name) for name in self.names)

    def _weight(self, ratings: tuple) -> float:
        given = dict(zip(self.names, ratings, strict=True))
        for entry in self.config.class_weights:
            if all(given[name] == level for name, level in entry.items() if name != "weight"):
                return float(entry["weight"])
        return 1.0

    def _response_weights(self, responses: Sequence[Response]) -> list[float]:
        if not self.config.balance:
            return [1.0] * len(responses)
        classes = [self._class(r) for r in responses]
        weights = [self._weight(c) / classes.count(c) for c in classes]
        return weights if any(weights) else [1.0] * len(responses)

    def _check(self) -> None:
        config, known = self.config, ", ".join(self.names)
        if not config.mixture or any(entry.share < 0 for entry in config.mixture) or not _shares(config):
            raise ValueError(f"conditions.mixture needs shares >= 0 that are not all 0, got {config.mixture}")
        for entry in config.mixture:
            if entry.sampler not in SAMPLERS:
                raise ValueError(f"conditions.mixture: sampler {entry.sampler!r} is none of {', '.join(SAMPLERS)}")
            for name in [*(entry.objectives or []), *(entry.values or {})]:
                if name not in self.names:
                    raise ValueError(f"conditions.mixture: {name!r} is no objective; objectives: {known}")
        for weight in config.class_weights:
            if "weight" not in weight or not float(weight["weight"]) >= 0 or set(weight) - {"weight", *self.names}:
                raise ValueError(f"conditions.class_weights: write {{objective: level, weight: w >= 0}}, got {weight}")
        for name, least in (("per_prompt", 1), ("draws", 1), ("responses", 2), ("pairs", 1)):
            number = getattr(config, name)
            if number is not None and number < least:
                raise ValueError(f"conditions.{name} must be at least {least}, got {number}")
        if not 0 <= config.strip_best <= 1:
            raise ValueError(f"conditions.strip_best must be in [0, 1], got {config.strip_best}")


def _shares(config: ConditionsConfig) -> float:
    return sum(entry.share for entry in config.mixture)


def _quotas(total: int, shares: Sequence[float]) -> list[int]:
    """`total` split by `shares`; the largest remainders get what rounding down leaves."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
