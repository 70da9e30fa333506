"""Evaluation by likelihood: does a tag move probability to the answers whose human ratings fit it?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.data.packing import Encoded
from cpo_kernels.data.records import Record, Response
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.statistics import summary
from cpo_kernels.recipe.keys import Config, DataConfig, TrainingConfig
from cpo_kernels.training.losses import StageLoss

Condition = Mapping[str, float]


def fits(response: Response, condition: Condition) -> bool:
    """Whether the response's ratings equal the condition on every objective that it names."""
    return all(response.ratings.get(name) == level for name, level in condition.items())


@torch.no_grad()
def score_answers(
    model: Any,
    template: PromptTemplate,
    records: Sequence[Record],
    conditions: Sequence[Condition],
    tokens_per_batch: int = 4096,
    rows: str = "shared",
) -> list[Tensor]:
    """log p(answer | prompt with the condition's tags), a `[conditions, answers]` float32 tensor per record.

    Always in float32: bfloat16 adds about 0.8 nat of noise to a sequence, more than small tag effects. `rows` as in
    `training.rows`.
    """
    device = next(model.parameters()).device
    groups, place = [], {}
    for number, record in enumerate(records):
        for row, condition in enumerate(conditions):
            prompt, answers, _ = template.encode(record.prompt, condition, record.responses, record.place)
            for start in range(0, len(answers), 8):
                groups.append(Encoded(prompt, answers[start : start + 8], (), (), []))
                place[id(groups[-1])] = number, row, start
    data = DataConfig(max_tokens=max((max(g.rows("padded")) for g in groups), default=1))
    training = TrainingConfig(precision="fp32", rows=rows, tokens_per_microbatch=tokens_per_batch)
    scorer = StageLoss(model, Config(stage="cpsft", data=data, training=training), [], device)
    if scorer.head.weight.dtype != torch.float32:
        raise TypeError(f"score in float32; the model is {scorer.head.weight.dtype}: call model.float() first")
    scores = [torch.full((len(conditions), len(record.responses)), math.nan) for record in records]
    was_training = model.training
    model.eval()
    for batch_groups in scorer.parts(groups):
        sums = iter(scorer.seq_logps(scorer.collate(batch_groups)).tolist())
        for group in batch_groups:
            number, row, start = place[id(group)]
            for column in range(start, start + len(group.responses)):
                scores[number][row, column] = next(sums)
    model.train(was_training)
    return scores


def relative_accuracy(
    scores: Sequence[Tensor], fit: Sequence[Sequence[int]], num_conditions: int
) -> list[dict[str, Any]]:
    """Relative accuracy of every condition c1, with a 95% interval by bootstrap over questions.

    For answers y1, y2 of one question that fit c1 and c2: does

        log p(y1 | c1) - log p(y2 | c1)  >  log p(y1 | c2) - log p(y2 | c2) ?

    Equality counts one half, so a model that ignores its tags gets 50%, whichever answers it prefers (plain ranking
    accuracy would reward that). Averaged over pairs, then over the other conditions c2, then over questions.

    Args:
        scores: per question, log p `[conditions, answers]`.
        fit: per question, the condition that each answer fits, or -1.

    Returns:
        per condition: mean, interval, number of questions with a pair, and the value of every question (NaN without a
        pair).
    """
    results = []
    for first in range(num_conditions):
        values = []
        for score, classes in zip(scores, fit, strict=True):
            shares = []
            for second in range(num_conditions):
                y1 = [i for i, c in enumerate(classes) if c == first]
                y2 = [i for i, c in enumerate(classes) if c == second]
                if second == first or not y1 or not y2:
                    continue
                change = score[first].double() - score[second].double()  # [answers], c2 -> c1
                rise = change[y1][:, None] - change[y2][None, :]  # [y1, y2]
                shares.append(((rise > 0).double() + 0.5 * (rise == 0).double()).mean().item())
            values.append(sum(shares) / len(shares) if shares else math.nan)
        results.append(summary(values) | {"by_question": values})
    return results


def paired_gain(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """Gain of `after` over `before` on the same questions: mean difference, 95% interval by question."""
    pairs = zip(after["by_question"], before["by_question"], strict=True)
    return summary([a - b for a, b in pairs])  # NaN where a question has no pair to compare


def rating_conditions(records: Sequence[Record], names: Sequence[str], least: float = 0.03) -> list[dict[str, float]]:
    """The combinations of ratings that at least a share `least` of all answers has, best first."""
    rated = [r.ratings for record in records for r in record.responses if all(n in r.ratings for n in names)]
    classes = [tuple(ratings[n] for n in names) for ratings in rated]
    kept = [c for c in set(classes) if classes.count(c) >= least * len(classes)]
    return [dict(zip(names, c, strict=True)) for c in sorted(kept, key=lambda c: (-sum(c), [-x for x in c]))]


def fitted(records: Sequence[Record], conditions: Sequence[Condition]) -> list[list[int]]:
    """Per record, the first condition that each answer fits, or -1."""
    return [
        [next((i for i, c in enumerate(conditions) if fits(r, c)), -1) for r in record.responses] for record in records
    ]
