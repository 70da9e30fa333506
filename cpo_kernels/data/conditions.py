"""Conditions, responses and pairs of every prompt, drawn from the seed before training: once, or once per epoch.

Samplers of a condition (Guo et al. 2024 use `attained`; their data omits the tags of the best level):
    attained   the ratings of one random response of the prompt
    best       the highest level of every objective
    grid       a random level of every objective
    none       no condition: no tags, and a higher R is better
`cpsft` may show a response only under its actual ratings. There a sampler chooses the response that fits its condition
best, and the tags are that response's ratings.

A mixture draws every prompt under one of its entries, by `share`. Or each entry draws prompts in random order until it
has `count` pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from cpo_kernels.data.classes import RatingClasses, quotas
from cpo_kernels.data.records import Prompt, Record, Response
from cpo_kernels.objectives import Objective, value, value_gap
from cpo_kernels.recipe.keys import ConditionsConfig, MixConfig

SAMPLERS = ("attained", "best", "grid", "none")
Condition = dict[str, float]


@dataclass(frozen=True)
class Group:
    """One prompt under one condition: its responses, each run once, and the non-tied pairs among them."""

    prompt: Prompt
    tags: Condition  # shown in the prompt; empty for a best-on-everything condition whose tags are stripped
    condition: Condition  # used by R
    responses: tuple[Response, ...]
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass
class Draws:
    """Result of `Sampler`. A unit is a set of groups that stay in one batch: all conditions of one drawn prompt."""

    units: list[tuple[Group, ...]]
    counts: dict[str, int] = field(default_factory=dict)  # groups, pairs, ties, unrated, ...


def ratings_row(ratings: Condition, objectives: Sequence[Objective]) -> list[float]:
    """[K] levels in the order of `objectives`, NaN for missing ones."""
    return [ratings.get(o.name, math.nan) for o in objectives]


def prepare(
    stage: str,
    records: Sequence[Record],
    objectives: Sequence[Objective],
    config: ConditionsConfig,
    seed: int,
    tie_margin: float = 1e-6,
    may_be_empty: bool = False,
) -> Draws:
    """The units of `stage`, in a fixed order that depends only on `seed`."""
    sampler = Sampler(records, objectives, config, random.Random(seed), tie_margin)
    draws = {"cpsft": sampler.cpsft, "sft": sampler.sft, "cdpo": sampler.cdpo, "dpo": sampler.dpo}[stage]()
    if not draws.units and not may_be_empty:
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
        check(config, objectives)
        self.classes = RatingClasses(self.names, config, rng)
        rated = [r.ratings for record in records for r in record.responses]
        self.levels = {name: sorted({r[name] for r in rated if name in r}) for name in self.names}

    # ---------------------------------------------------------------- stages

    def cpsft(self) -> Draws:
        """Every rated response once (or every rating class equally often), under its own ratings."""
        mixture, every = self.config.mixture, [(record, r) for record in self.records for r in record.responses]
        rated = sum(bool(r.ratings) for _, r in every)
        draws = Draws([], {"unrated": len(every) - rated})
        numbers = [entry.count or 0 for entry in mixture]
        if not counted(self.config):
            numbers = quotas(rated, [entry.share for entry in mixture])
        for entry, number in zip(mixture, numbers, strict=True):
            if entry.sampler == "attained":
                fitting = [(record, r) for record, r in every if self._fits(entry, r)]
                chosen = self.classes.draw(fitting, self._available(draws, entry, number, len(fitting)))
            else:
                records = [record for record in self.records if self._applies(entry, record.responses)]
                number = self._available(draws, entry, number, len(records))
                chosen = [self._best_fitting(record, entry) for record in self.classes.cycled(records, number)]
            names = self._names(entry)
            for record, response in chosen:
                condition = {name: response.ratings[name] for name in names if name in response.ratings}
                tags = self._tags(condition, record.responses)
                draws.units.append((Group(record.prompt, tags, condition, (response,)),))
        return draws

    def sft(self) -> Draws:
        """No tags: the best responses of every prompt by the unconditioned R, or all."""
        units: list[tuple[Group, ...]] = []
        for record in self.records:
            kept = self._best(record.responses, {}) if self.config.sft_responses == "best" else record.responses
            units += [(Group(record.prompt, {}, {}, (response,)),) for response in kept]
        return Draws(units)

    def cdpo(self) -> Draws:
        """Every prompt `draws` times, with its responses, `per_prompt` conditions and the pairs under each. Or every
        entry of the mixture until it has its count of pairs."""
        return self._counted() if counted(self.config) else self._preference(self._conditions)

    def dpo(self) -> Draws:
        """No tags: pairs ordered by the unconditioned R."""
        return self._preference(lambda responses: [{}])

    def _preference(self, conditions: Callable[[tuple[Response, ...]], list[Condition]]) -> Draws:
        draws = Draws([], {"groups": 0, "pairs": 0, "ties": 0, "groups_without_pairs": 0})
        for record in self.records:
            for _ in range(self.config.draws):
                responses = self.classes.spread(record.responses)
                groups = [self._group(draws, record, responses, c, None) for c in conditions(responses)]
                if unit := tuple(group for group in groups if group):
                    draws.units.append(unit)
        return draws

    def _counted(self) -> Draws:
        draws = Draws([], {"groups": 0, "pairs": 0, "ties": 0, "groups_without_pairs": 0, "short": 0})
        for entry in self.config.mixture:
            wanted = entry.count or 0
            for record in self.rng.sample(list(self.records), len(self.records)):
                if wanted == 0:
                    break
                responses = self.classes.spread(record.responses)
                if not self._applies(entry, responses):
                    continue
                group = self._group(draws, record, responses, self._condition(entry, responses), wanted)
                if group:
                    draws.units.append((group,))
                    wanted -= len(group.pairs)
            draws.counts["short"] += wanted
        return draws

    def _group(
        self, draws: Draws, record: Record, responses: tuple[Response, ...], condition: Condition, most: int | None
    ) -> Group | None:
        """The prompt under this condition with at most `most` pairs, None if there are none. Counts both in `draws`."""
        pairs = self._pairs(responses, condition)
        draws.counts["ties"] += math.comb(len(responses), 2) - len(pairs)
        limits = [limit for limit in (self.config.pairs, most) if limit is not None]
        if limits and len(pairs) > min(limits):
            pairs = sorted(self.rng.sample(pairs, min(limits)))
        draws.counts["groups" if pairs else "groups_without_pairs"] += 1
        draws.counts["pairs"] += len(pairs)
        tags = self._tags(condition, record.responses) if pairs else {}
        return Group(record.prompt, tags, condition, responses, tuple(pairs)) if pairs else None

    # ---------------------------------------------------------------- conditions

    def _conditions(self, responses: tuple[Response, ...]) -> list[Condition]:
        """Up to `per_prompt` different conditions, fewer if the samplers run out."""
        entries = [entry for entry in self.config.mixture if self._applies(entry, responses)]
        shares = [entry.share for entry in entries]
        conditions: list[Condition] = []
        for _ in range(8 * self.config.per_prompt if any(shares) else 0):
            condition = self._condition(self.rng.choices(entries, shares)[0], responses)
            if condition not in conditions:
                conditions.append(condition)
            if len(conditions) == self.config.per_prompt:
                break
        return conditions

    def _condition(self, entry: MixConfig, responses: Sequence[Response]) -> Condition:
        names = self._names(entry)
        if entry.sampler == "attained":
            fitting = [r for r in responses if self._fits(entry, r)]
            ratings = self.rng.choices(fitting, self.classes.weights(fitting))[0].ratings
            return {name: ratings[name] for name in names if name in ratings}
        if entry.sampler == "best":
            return {o.name: o.high for o in self.objectives if o.name in names}
        if entry.sampler == "grid":
            values = entry.values or self.levels
            return {name: float(self.rng.choice(values[name])) for name in names if values.get(name)}
        return {}

    def _applies(self, entry: MixConfig, responses: Sequence[Response]) -> bool:
        free = entry.sampler != "attained" and not entry.rated and not entry.levels
        return free or any(self._fits(entry, r) for r in responses)

    def _fits(self, entry: MixConfig, response: Response) -> bool:
        """Whether the entry may draw this response's ratings, or a prompt that has it."""
        needed = entry.objectives if entry.rated is None else entry.rated
        levels = entry.levels or {}
        return (
            bool(response.ratings)
            and all(name in response.ratings for name in needed or ())
            and all(response.ratings.get(name) == level for name, level in levels.items())
        )

    def _available(self, draws: Draws, entry: MixConfig, wanted: int, there: int) -> int:
        """`wanted`; if the entry has a count, no response is used twice and the shortfall is counted."""
        if entry.count is None:
            return wanted if there else 0
        draws.counts["short"] = draws.counts.get("short", 0) + max(0, wanted - there)
        return min(wanted, there)

    def _tags(self, condition: Condition, responses: Sequence[Response]) -> Condition:
        """The tags of a condition. A share of the conditions that request the best on everything that the prompt's
        responses are rated on gets none."""
        rated = {name for r in responses for name in r.ratings}
        best = condition == {o.name: o.high for o in self.objectives if o.name in rated}
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
        """The responses with the highest R under `condition`; all of them if none is rated."""
        scores = [ratings_row(r.ratings, self.objectives) for r in responses]
        row = ratings_row(condition, self.objectives)
        worth = [-math.inf if w != w else w for w in value(scores, row, self.objectives).tolist()]
        return [r for r, w in zip(responses, worth, strict=True) if w >= max(worth) - self.tie_margin]

    def _best_fitting(self, record: Record, entry: MixConfig) -> tuple[Record, Response]:
        rated = [r for r in record.responses if r.ratings] or list(record.responses)
        return record, self.rng.choice(self._best(rated, self._condition(entry, rated)))


def counted(config: ConditionsConfig) -> bool:
    return any(entry.count is not None for entry in config.mixture)


def check(config: ConditionsConfig, objectives: Sequence[Objective]) -> None:
    mixture, scale = config.mixture, {o.name: o for o in objectives}
    names, choices = list(scale), ", ".join(scale)
    if not any(entry.share for entry in mixture):
        raise ValueError(f"conditions.mixture: at least one share must be above 0, got {mixture}")
    counts = [entry.count for entry in mixture]
    if counted(config) and None in counts:
        raise ValueError(f"conditions.mixture: give every entry a count or none, got {counts}")
    if counted(config) and (config.per_prompt, config.draws) != (1, 1):
        raise ValueError(
            f"conditions.mixture draws by count, which ignores per_prompt {config.per_prompt} and draws "
            f"{config.draws}: leave both at 1"
        )
    for entry in mixture:
        if entry.sampler not in SAMPLERS:
            raise ValueError(f"conditions.mixture: sampler {entry.sampler!r} is not one of {', '.join(SAMPLERS)}")
        for name in [*(entry.objectives or []), *(entry.values or {}), *(entry.levels or {}), *(entry.rated or [])]:
            if name not in names:
                raise ValueError(f"conditions.mixture: {name!r} is not an objective; objectives: {choices}")
        for name, levels in (entry.values or {}).items():
            if not isinstance(levels, list) or not levels or not all(_is_level(x, scale[name]) for x in levels):
                raise ValueError(f"conditions.mixture: values of {name} must be a list of its levels, got {levels!r}")
        for name, level in (entry.levels or {}).items():
            if not _is_level(level, scale[name]):
                raise ValueError(f"conditions.mixture: levels of {name} must be one of its levels, got {level!r}")
    for weight in config.class_weights:
        right = type(weight.get("weight")) in (int, float) and 0 <= weight["weight"] < math.inf
        right = right and not set(weight) - {"weight", *names}
        if not right or not all(_is_level(x, scale[name]) for name, x in weight.items() if name != "weight"):
            raise ValueError(f"conditions.class_weights: write {{objective: level, weight: w >= 0}}, got {weight}")
    if config.class_weights and not config.balance and config.responses is None:
        raise ValueError(
            "conditions.class_weights only matter when conditions.balance or conditions.responses draws by class: "
            "set one of them, or remove the weights"
        )


def _is_level(value: object, objective: Objective) -> bool:
    return type(value) in (int, float) and objective.low <= float(value) <= objective.high  # type: ignore[arg-type]
