"""From token sequences to batches: groups of responses, the plan of an epoch, micro-batches under a token budget.

Only labelled positions go to the head: `rows` indexes the hidden states that predict a response's tokens, packed one
response after another (`cu_seqlens`). `training.rows` sets what a row of the batch contains:

    shared   a prompt once for all its responses, which attend only to it and to themselves; end to end with others
    packed   a prompt and one response, end to end with others
    padded   a prompt and one response, then padding

    tokens     p p p p a a b b b q q c        shared: responses a, b of prompt p, response c of prompt q
    positions  0 1 2 3 4 5 4 5 6 0 1 2
    tree       0 0 0 0 0 0 0 0 0 9 9 9
    branch     0 0 0 0 1 1 2 2 2 0 0 1
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.batch_plan import BatchPlan
from cpo_kernels.data.conditions import Draws, ratings_row
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.objectives import Objective


@dataclass(frozen=True)
class Encoded:
    """A Group as tokens and numbers."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]  # each ends with the end token unless it was cut
    pairs: tuple[tuple[int, int], ...]
    scores: tuple[list[float], ...]  # per response, NaN where unrated
    condition: list[float]  # NaN where not conditioned
    ref_logps: tuple[float, ...] = ()
    unit: int = -1  # its place in the prepared data

    def segments(self, kind: str) -> list[tuple[int, ...]]:
        """Lengths of the sequences that this group puts into rows: a prompt and its responses, or the prompt with each
        response (the last token of a response is never an input)."""
        P, inputs = len(self.prompt), [len(r) - 1 for r in self.responses]
        return [(P, *inputs)] if kind == "shared" else [(P + n,) for n in inputs]

    def rows(self, kind: str) -> list[int]:
        """The sums of `segments`."""
        return [sum(lengths) for lengths in self.segments(kind)]

    @property
    def labels(self) -> int:
        return sum(map(len, self.responses))


ROWS = ("shared", "packed", "padded")
ROW_TOKENS = 256  # of a row under a dense mask: longer rows cost attention, shorter ones padding
Unit = tuple[Encoded, ...]  # groups that stay in one step: all conditions of a drawn prompt


@dataclass
class Batch:
    """One forward pass. B rows of T tokens; N labels of S sequences; P pairs; K objectives."""

    input_ids: Tensor  # [B, T], right-padded
    position_ids: Tensor  # [B, T]
    tree: Tensor | None  # [B, T] which prompt with its responses a token belongs to, -1 padding; None: padded rows
    branch: Tensor | None  # [B, T] 0 the prompt, 1.. its responses
    segments: list[tuple[int, ...]]  # those of the groups, end to end
    rows: Tensor  # [N] into B*T: the position that predicts each label
    labels: Tensor  # [N]
    cu_seqlens: Tensor  # [S+1], on the CPU
    pairs: Tensor  # [P, 2]
    scores: Tensor  # [S, K] float64
    conditions: Tensor  # [P, K] float64
    ref_logps: Tensor | None  # [S] float64
    tokens: int  # that are no padding
    plan: BatchPlan | None = None  # of `FusedLinearCPOLoss`

    def to(self, device: torch.device) -> Batch:
        tensors = {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}
        del tensors["cu_seqlens"]  # a host value
        moved: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        if self.plan is not None:
            moved["plan"] = self.plan.to(device)
        return replace(self, **moved)


def encode(
    draws: Draws,
    template: PromptTemplate,
    objectives: Sequence[Objective],
    max_prompt_tokens: int,
    max_tokens: int,
    may_be_empty: bool = False,
) -> list[Unit]:
    """Units as tokens. Groups whose prompt is too long are left out and long responses are truncated; both are counted,
    and so are prompts whose last tokens depend on the response. Raises DataError as `PromptTemplate.encode` does."""
    tokens: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal ones are kept once
    counts = draws.counts
    counts.update(long_prompts=0, cut_responses=0)
    units = []
    for number, unit in enumerate(draws.units):
        encoded = []
        for group in unit:
            prompt, responses, whole = template.encode(group.prompt, group.tags, group.responses)
            room = max_tokens - len(prompt)
            if len(prompt) > max_prompt_tokens or room < 1:
                counts["long_prompts"] += 1
                continue
            if not whole:
                counts["moved_boundaries"] = counts.get("moved_boundaries", 0) + 1
            counts["cut_responses"] += sum(len(response) > room for response in responses)
            prompt, *cut = (tokens.setdefault(ids, ids) for ids in (prompt, *(r[:room] for r in responses)))
            scores = tuple(ratings_row(r.ratings, objectives) for r in group.responses)
            condition = ratings_row(group.condition, objectives)
            encoded.append(Encoded(prompt, tuple(cut), group.pairs, scores, condition, unit=number))
        if encoded:
            units.append(tuple(encoded))
    if not units and not may_be_empty:
        raise ValueError(
            f"every prompt is longer than data.max_prompt_tokens {max_prompt_tokens} or fills data.max_tokens"
        )
    return units


def epoch_steps(units: Sequence[Unit], batch_size: int, window: int, seed: int) -> list[list[Encoded]]:
    """The groups of every optimizer step of one epoch: shuffled, sorted by length within windows of `window` steps,
    then the steps are shuffled. A unit is never split across steps; the last step may be smaller."""
    rng = random.Random(seed)
    order = rng.sample(range(len(units)), len(units))
    size = batch_size * max(1, window)
    steps = []
    for start in range(0, len(order), size):
        part = sorted(order[start : start + size], key=lambda i: max(max(g.rows("packed")) for g in units[i]))
        steps += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(steps)
    return [[group for i in step for group in units[i]] for step in steps]


def microbatches(groups: Sequence[Encoded], budget: int, kind: str, ranks: int = 1) -> Iterator[list[Encoded]]:
    """Groups sorted by length, split into parts of at most about `budget` tokens (including padding, in padded rows),
    at least one per rank. Other rows: equal parts, a multiple of `ranks`, fewer only if a group is larger than a part.
    A group is never split; one above the budget is a part of its own."""
    groups = sorted(groups, key=lambda g: max(g.rows(kind)), reverse=True)
    total = sum(sum(g.rows(kind)) for g in groups)
    if kind == "padded":
        yield from _padded_microbatches(groups, min(budget, math.ceil(total / ranks)))
        return
    parts = ranks * math.ceil(total / budget / ranks)
    before, batches = 0, dict[int, list[Encoded]]()
    for group in groups:
        size = sum(group.rows(kind))
        batches.setdefault(int((before + size / 2) * parts / total), []).append(group)  # where its middle falls
        before += size
    yield from batches.values()


def _padded_microbatches(groups: Sequence[Encoded], budget: int) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    cost = 0
    for group in groups:
        lengths = group.rows("padded")
        more = len(lengths) * max((batch or [group])[0].rows("padded"))
        if batch and cost + more > budget:
            yield batch
            batch, cost = [], 0
            more = len(lengths) * max(lengths)
        batch.append(group)
        cost += more
    if batch:
        yield batch


def fill_rows(lengths: Sequence[int], row_tokens: int) -> list[tuple[int, int]]:
    """(row, offset) of every length, in rows of about `row_tokens` or less; the number of rows minimises padding."""
    least = max(1, sum(lengths) // max(row_tokens, *lengths))
    tries = [_spread(lengths, rows) for rows in range(least, min(len(lengths), 2 * least) + 1)]
    return min(reversed(tries), key=lambda places: _cells(lengths, places))  # of equals the shortest rows


def _spread(lengths: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Longest first, each into the row with the fewest tokens."""
    used = [(0, row) for row in range(rows)]  # a heap
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        start, row = used[0]
        places[i] = (row, start)
        heapreplace(used, (start + lengths[i], row))
    return places


def _cells(lengths: Sequence[int], places: Sequence[tuple[int, int]]) -> int:
    """Rows times tokens of the longest."""
    ends = (start + n for n, (_, start) in zip(lengths, places, strict=True))
    return (1 + max(row for row, _ in places)) * max(ends)


def one_row(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(0, start) for start in accumulate([0, *lengths[:-1]])]


def collate(groups: Sequence[Encoded], kind: str, row_tokens: int | None = ROW_TOKENS) -> Batch:
    """Shapes as in `Batch`; `row_tokens` None puts everything into one row, in order. The padding token is 0: no label
    depends on it."""
    segments = [lengths for g in groups for lengths in g.segments(kind)]
    lengths = [sum(parts) for parts in segments]
    if kind == "padded":
        places = [(row, 0) for row in range(len(lengths))]
    else:
        places = fill_rows(lengths, row_tokens) if row_tokens else one_row(lengths)
    B = 1 + max(row for row, _ in places)
    T = max(start + n for (_, start), n in zip(places, lengths, strict=True))
    input_ids = torch.zeros(B, T, dtype=torch.long)
    position_ids = torch.arange(T).repeat(B, 1)
    tree, branch = torch.full((B, T), -1), torch.zeros(B, T, dtype=torch.long)
    rows: list[int] = []
    labels: list[int] = []
    pairs: list[tuple[int, int]] = []
    seqlens: list[int] = []
    left = iter(zip(places, lengths, strict=True))
    for g in groups:
        pairs += [(len(seqlens) + first, len(seqlens) + second) for first, second in g.pairs]
        P = len(g.prompt)
        for responses in [g.responses] if kind == "shared" else [(r,) for r in g.responses]:
            (row, start), n = next(left)
            inputs, positions, branches = list(g.prompt), list(range(P)), [0] * P
            for number, response in enumerate(responses, 1):
                end = row * T + start + len(inputs)
                rows += [row * T + start + P - 1, *range(end, end + len(response) - 1)]
                labels += response
                seqlens.append(len(response))
                inputs += response[:-1]
                positions += range(P, P + len(response) - 1)
                branches += [number] * (len(response) - 1)
            place = (row, slice(start, start + n))
            input_ids[place], position_ids[place] = torch.tensor(inputs), torch.tensor(positions)
            tree[place], branch[place] = start, torch.tensor(branches)
    references = [ref for g in groups for ref in g.ref_logps]
    return Batch(
        input_ids,
        position_ids,
        None if kind == "padded" else tree,
        None if kind == "padded" else branch,
        segments,
        torch.tensor(rows),
        torch.tensor(labels),
        torch.tensor([0, *accumulate(seqlens)]),
        torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        torch.tensor([s for g in groups for s in g.scores], dtype=torch.float64),
        torch.tensor([g.condition for g in groups for _ in g.pairs], dtype=torch.float64),
        torch.tensor(references, dtype=torch.float64) if references else None,
        sum(lengths),
    )
