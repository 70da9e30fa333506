"""Greedy answers compared with human-rated ones: no-comment answers, ratings of matches, and what a tag changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from cpo_kernels.data.records import Record
from cpo_kernels.evaluation.statistics import summary
from cpo_kernels.objectives import Objective

NO_COMMENT = r"\bno comment\b"  # searched in the normalised answer


def normalise(text: str) -> str:
    """Lower case, words only: two answers match if they differ only in case, punctuation and blanks."""
    return " ".join(
        re.findall(r"[^\W_]+", text.casefold().replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", ""))
    )


def greedy_classes(
    answers: Sequence[str], records: Sequence[Record], objectives: Sequence[Objective], no_comment: str = NO_COMMENT
) -> dict[str, Any]:
    """Classify answers, one per record, under one condition.

    `no_comment`: share of no-comment answers. `matched`: share whose normalised text is a rated answer of the record.
    `ratings`: per objective, the mean human rating of the matched ones (averaged over several rated copies).
    `best`: per objective, the share of the matched ones that is rated `objective.high`.
    All with 95% intervals by question.
    """
    if len(answers) != len(records):
        raise ValueError(f"need one answer per record, got {len(answers)} for {len(records)}")
    kinds, matched = [], []
    ratings: dict[str, list[float]] = {o.name: [] for o in objectives}
    best: dict[str, list[float]] = {o.name: [] for o in objectives}
    for answer, record in zip(answers, records, strict=True):
        text = normalise(answer)
        kinds.append(float(re.search(no_comment, text) is not None))
        same = [r for r in record.responses if normalise(r.text) == text]
        matched.append(float(bool(same)))
        for o in objectives:
            given = [r.ratings[o.name] for r in same if o.name in r.ratings]
            ratings[o.name].append(_mean(given))
            best[o.name].append(_mean([float(rating == o.high) for rating in given]))
    return {
        "no_comment": summary(kinds),
        "matched": summary(matched),
        "ratings": {name: summary(values) for name, values in ratings.items()},
        "best": {name: summary(values) for name, values in best.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def changed_answers(
    answers: Sequence[Sequence[str]], conditions: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """For every two conditions that differ in a single objective: the share of questions whose answer changes.

    `answers` is `[conditions][questions]`; changes of case and punctuation do not count.
    """
    rows = []
    for a, b in combinations(range(len(conditions)), 2):
        names = [n for n in {**conditions[a], **conditions[b]} if conditions[a].get(n) != conditions[b].get(n)]
        if len(names) == 1:
            changes = [float(normalise(x) != normalise(y)) for x, y in zip(answers[a], answers[b], strict=True)]
            row = {"objective": names[0], "from": dict(conditions[a]), "to": dict(conditions[b])}
            rows.append(row | {"changed": summary(changes)})
    return rows
