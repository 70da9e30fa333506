"""Evaluate one model on one list of prompts and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpo_kernels.data.records import Prompt, Record
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.achieved import judged_scores
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.evaluation.greedy import NO_COMMENT, changed_answers, greedy_classes
from cpo_kernels.evaluation.likelihood import fitted, relative_accuracy, score_answers
from cpo_kernels.evaluation.scorers import Scorer, checked
from cpo_kernels.objectives import Objective


def evaluate(
    model: Any,
    template: PromptTemplate,
    records: Sequence[Record],
    conditions: Sequence[Mapping[str, float]],
    *,
    tags: bool = True,
    rows: str = "shared",
    max_new_tokens: int = 50,
    batch_size: int = 64,
    no_comment: str = NO_COMMENT,
    generate: bool = True,
    likelihood: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """A model's answers and its likelihoods of rated answers, JSON-ready: an entry per condition, then one without
    tags.

    Likelihoods and matching need rated responses in `records`. With `tags` false the model gets the bare prompt,
    whatever is requested.
    """
    for record in records:  # a row on which the template fails is named before any work
        template.encode(record.prompt, {}, record.responses, record.place)
    objectives = template.tags.objectives
    rated = any(record.responses for record in records)
    asked: list[Mapping[str, float]] = [*conditions, {}]
    entries: list[dict[str, Any]] = [{"condition": dict(condition)} for condition in asked]
    result: dict[str, Any] = {"questions": len(records), "conditions": entries}
    if likelihood and rated:
        fit = fitted(records, conditions)
        candidates = sorted({i for classes in fit for i in classes} - {-1})  # the others have no answer to compare
        fit = [[candidates.index(i) if i >= 0 else -1 for i in classes] for classes in fit]
        scores = score_answers(
            model, template, records, [conditions[i] for i in candidates] if tags else [{}], rows=rows
        )
        scores = scores if tags else [score.expand(len(candidates), -1) for score in scores]
        for i, relative in zip(candidates, relative_accuracy(scores, fit, len(candidates)), strict=True):
            entries[i]["relative_accuracy"] = relative
    if generate:
        tagged = asked if tags else [{}]
        requests: list[tuple[Prompt, Mapping[str, float]]] = [(r.prompt, c) for c in tagged for r in records]
        texts = greedy_answers(model, template, requests, max_new_tokens, batch_size, progress)
        answers = [texts[i : i + len(records)] for i in range(0, len(texts), len(records))]
        answers = answers if tags else answers * len(asked)
        for entry, given in zip(entries, answers, strict=True):
            entry["answers"] = given
            if rated:
                entry |= greedy_classes(given, records, objectives, no_comment)
        if rated:
            result["changed"] = changed_answers(answers[:-1], conditions)
    return result


def score(
    result: Mapping[str, Any], prompts: Sequence[str], objectives: Sequence[Objective], scorer: Scorer
) -> dict[str, Any]:
    """Add a score of every answer, and their metrics (`achieved.judged_scores`), to what `evaluate` returned."""
    entries = [dict(entry) for entry in result["conditions"]]
    pairs = [pair for entry in entries for pair in zip(prompts, entry["answers"], strict=True)]
    different = list(dict.fromkeys(pairs))  # a model that ignores a tag repeats itself
    scores = checked(scorer(*zip(*different, strict=True)), len(different), len(objectives), scorer)
    by_pair = dict(zip(different, scores.tolist(), strict=True))
    for entry in entries:
        entry["scores"] = [by_pair[pair] for pair in zip(prompts, entry["answers"], strict=True)]
    return {**result, "conditions": entries} | judged_scores(entries, objectives)
