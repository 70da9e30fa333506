"""Statistics of prepared data: conditions, pairs and how many conflict, ratings, lengths.

A pair is conflicting if one objective rates its first response higher and another one its second: which is better
depends on the condition. It is turned if the condition in its prompt reverses the order without a condition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.data.conditions import Condition, Draws, Group, ratings_row
from cpo_kernels.data.packing import Unit
from cpo_kernels.data.records import Record
from cpo_kernels.objectives import Objective, format_number, value_gap

Statistics = dict[str, Any]
SHOWN = 20  # conditions listed in the table


def statistics(
    records: Sequence[Record], draws: Draws, units: Sequence[Unit], objectives: Sequence[Objective]
) -> Statistics:
    """JSON-ready counts of the records, of what was drawn from them, and of its tokens."""
    groups = [group for unit in draws.units for group in unit]
    conditions: dict[str, dict[str, int]] = {}
    totals = Counter(pairs=0, conflicting=0, turned=0)
    for group in groups:
        entry = conditions.setdefault(condition_name(group.condition), {"groups": 0, "pairs": 0, "without_tags": 0})
        counts = pair_counts(group, objectives)
        for name, count in {"groups": 1, "pairs": len(group.pairs), "without_tags": int(not group.tags)}.items():
            entry[name] += count
        totals.update(counts)
    return {
        "records": {
            "prompts": len({record.prompt for record in records}),
            "responses": sum(len(record.responses) for record in records),
            "ratings": {o.name: rating_counts(records, o.name) for o in objectives},
        },
        "drawn": dict(draws.counts),
        "pairs": dict(totals),
        "conditions": dict(sorted(conditions.items(), key=lambda item: -max(item[1]["pairs"], item[1]["groups"]))),
        "tokens": token_counts(units),
    }


def condition_name(condition: Condition) -> str:
    return ", ".join(f"{name} {format_number(level)}" for name, level in condition.items()) or "none"


def pair_counts(group: Group, objectives: Sequence[Objective]) -> dict[str, int]:
    if not group.pairs:
        return {}
    first, second = pair_scores(group, objectives)
    higher, lower = (first > second).any(1), (first < second).any(1)  # NaN is neither
    free = value_gap(first, second, None, objectives)
    turned = int((pair_gaps(group, objectives) * free < 0).sum())
    return {"pairs": len(group.pairs), "conflicting": int((higher & lower).sum()), "turned": turned}


def pair_gaps(group: Group, objectives: Sequence[Objective]) -> Tensor:
    """[P] R(first) - R(second) under the group's condition."""
    return value_gap(*pair_scores(group, objectives), ratings_row(group.condition, objectives), objectives)


def pair_scores(group: Group, objectives: Sequence[Objective]) -> tuple[Tensor, Tensor]:
    """Ratings of the first and of the second response of every pair, [P, K] each."""
    scores = torch.tensor([ratings_row(r.ratings, objectives) for r in group.responses], dtype=torch.float64)
    first, second = zip(*group.pairs, strict=True)
    return scores[list(first)], scores[list(second)]


def rating_counts(records: Sequence[Record], name: str) -> dict[str, int]:
    """How often each level occurs, and how many responses have none."""
    given = Counter(r.ratings[name] for record in records for r in record.responses if name in r.ratings)
    missing = sum(len(record.responses) for record in records) - given.total()
    return {format_number(level): count for level, count in sorted(given.items())} | {"missing": missing}


def token_counts(units: Sequence[Unit]) -> dict[str, Any]:
    """Lengths, and the tokens that a pass over the data runs through the model, with and without shared prompts."""
    groups = [group for unit in units for group in unit]
    alone, shared = (sum(sum(g.rows(kind)) for g in groups) for kind in ("packed", "shared"))
    prompts = [len(g.prompt) for g in groups]
    responses = [len(r) for g in groups for r in g.responses]
    share = sum(len(g.prompt) * len(g.responses) for g in groups) / max(1, alone)
    lengths = {"prompt": _spread(prompts), "response": _spread(responses)}
    return lengths | {"alone": alone, "shared": shared, "prompt_share": share}


def _spread(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    at = {"least": 0.0, "median": 0.5, "p95": 0.95, "most": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in at.items()}


def table(values: Statistics) -> str:
    """The statistics as text."""
    records, pairs, tokens = values["records"], values["pairs"], values["tokens"]
    lines = [f"prompts: {records['prompts']:,}, responses: {records['responses']:,}"]
    for name, counts in records["ratings"].items():
        lines.append(f"  {name}: " + ", ".join(f"{level} x {count:,}" for level, count in counts.items()))
    lines.append(
        "drawn: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in values["drawn"].items())
    )
    if pairs["pairs"]:
        shares = [f"{name} {pairs[name] / pairs['pairs']:.1%}" for name in ("conflicting", "turned")]
        lines.append(f"pairs: {pairs['pairs']:,}, of which {', '.join(shares)}")
    conditions = values["conditions"]
    width = max(map(len, [*conditions, "condition"]))
    lines.append(f"  {'condition':<{width}} {'groups':>9} {'pairs':>9} {'without tags':>13}")
    for name, counts in list(conditions.items())[:SHOWN]:
        numbers = f"{counts['groups']:>9,} {counts['pairs']:>9,} {counts['without_tags']:>13,}"
        lines.append(f"  {name:<{width}} {numbers}")
    if len(conditions) > SHOWN:
        lines.append(f"  and {len(conditions) - SHOWN} more")
    for name in ("prompt", "response"):
        lines.append(f"{name} tokens: " + ", ".join(f"{at} {n:,}" for at, n in tokens[name].items()))
    saved = tokens["alone"] / max(1, tokens["shared"])
    lines.append(
        f"tokens per pass: {tokens['alone']:,} ({tokens['prompt_share']:.0%} prompt), {tokens['shared']:,} with "
        f"shared prompts: {saved:.2f} times fewer"
    )
    return "\n".join(lines)
