"""Rating classes: responses with the same ratings on every objective, drawn equally often or by weight."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

from cpo_kernels.data.records import Record, Response
from cpo_kernels.recipe.keys import ConditionsConfig


class RatingClasses:
    def __init__(self, names: Sequence[str], config: ConditionsConfig, rng: random.Random):
        self.names, self.config, self.rng = names, config, rng

    def spread(self, responses: Sequence[Response]) -> tuple[Response, ...]:
        """Choose `conditions.responses` of the prompt's responses: one of each rating class in turn, a class of weight
        w < 1 in a share w of the turns. So even a few responses contain non-tied pairs."""
        wanted = self.config.responses
        if wanted is None or wanted >= len(responses):
            return tuple(responses)
        classes: dict[tuple[Any, ...], list[Response]] = {}
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

    def draw(self, items: Sequence[tuple[Record, Response]], quota: int) -> list[tuple[Record, Response]]:
        """Draw `quota` items: every item in turn, or with `conditions.balance` every rating class by its weight; none
        if all weights are 0."""
        if not self.config.balance:
            return list(self.cycled(items, quota))
        classes: dict[tuple[Any, ...], list[tuple[Record, Response]]] = {}
        for item in items:
            classes.setdefault(self._class(item[1]), []).append(item)
        weights = [self._weight(c) for c in classes]
        counts = quotas(quota, weights) if any(weights) else [0] * len(classes)
        return [item for c, n in zip(classes.values(), counts, strict=True) for item in self.cycled(c, n)]

    def weights(self, responses: Sequence[Response]) -> list[float]:
        """Relative probability that each of a prompt's responses provides the condition."""
        if not self.config.balance:
            return [1.0] * len(responses)
        classes = [self._class(r) for r in responses]
        weights = [self._weight(c) / classes.count(c) for c in classes]
        return weights if any(weights) else [1.0] * len(responses)

    def cycled(self, items: Sequence[Any], count: int) -> Iterator[Any]:
        return islice(cycle(self.rng.sample(list(items), len(items))), count)

    def _class(self, response: Response) -> tuple[Any, ...]:
        return tuple(response.ratings.get(name) for name in self.names)

    def _weight(self, ratings: tuple[Any, ...]) -> float:
        given = dict(zip(self.names, ratings, strict=True))
        for entry in self.config.class_weights:
            if all(given[name] == level for name, level in entry.items() if name != "weight"):
                return float(entry["weight"])
        return 1.0


def quotas(total: int, shares: Sequence[float]) -> list[int]:
    """`total` split by `shares`, rounded by the largest-remainder method."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
