"""What the host knows about a batch: the rows of each sequence, the sequences linked by pairs, and the chunks.

Chunk sizes, and with them all launches, follow from these numbers. A collator has them on the CPU and puts them in a
`BatchPlan` (`FusedLinearCPOLoss.plan`). Without one the fused loss copies them from the device, which forces one
host-device synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cpo_kernels.head.strategy import SumLimit, chunks, even_rows, preference_strategy


@dataclass
class Group:
    """Sequences that are projected together, and the pairs among them."""

    sequences: list[int]
    pairs: list[int]
    num_rows: int = 0


def linked_groups(pairs: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Group]:
    """Sequences linked by pairs form a group; a sequence without a pair is its own group. In order of first
    sequence."""
    parent = list(range(len(lengths)))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    groups: dict[int, Group] = {}
    for s, length in enumerate(lengths):
        group = groups.setdefault(root(s), Group([], []))
        group.sequences.append(s)
        group.num_rows += length
    for p, (a, _) in enumerate(pairs):
        groups[root(a)].pairs.append(p)
    return list(groups.values())


def pack_groups(groups: Sequence[Group], limit: int) -> list[Group]:
    """Fill chunks with whole groups, in order, up to `limit` rows each (a larger group is one); as many as that takes,
    the largest as small as possible."""
    sizes = [group.num_rows for group in groups]
    count = len(_starts(sizes, limit))
    low, high = max((size for size in sizes if size <= limit), default=0), limit
    while low < high:  # the least limit that takes as many chunks
        middle = (low + high) // 2
        low, high = (middle + 1, high) if len(_starts(sizes, middle)) > count else (low, middle)
    packed = []
    for start, end in pairwise([*_starts(sizes, high), len(sizes)]):
        chunk = Group([], [])
        for group in groups[start:end]:
            chunk.sequences += group.sequences
            chunk.pairs += group.pairs
            chunk.num_rows += group.num_rows
        packed.append(chunk)
    return packed


def _starts(sizes: Sequence[int], limit: int) -> list[int]:
    """The first group of each chunk."""
    starts, room = [], -1
    for index, size in enumerate(sizes):
        if room < size:
            starts.append(index)
            room = limit
        room -= size
    return starts


@dataclass(frozen=True)
class Part:
    """One chunk: slices of the rows, sequences and pairs in the layout's order."""

    rows: slice
    sequences: slice
    pairs: slice


@dataclass(frozen=True)
class Layout:
    """The order in which a trainable head processes the rows of a batch, known on the host.

    `pairs`: chunks are whole groups. `deferred`, `two_pass`: one part for the loss, `row_chunks` for the products.
    """

    lengths: list[int]  # rows of each sequence
    pairs: list[tuple[int, int]]
    row_limit: int
    couples_pairs: bool
    opposite: bool  # the coefficients of a pair's two sequences
    sum_limit: SumLimit

    @cached_property
    def groups(self) -> list[Group]:
        return linked_groups(self.pairs, self.lengths)

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)

    @cached_property
    def largest_group(self) -> int:
        return max((g.num_rows for g in self.groups), default=0)

    @cached_property
    def strategy(self) -> str:
        one_pair = self.opposite and len(self.pairs) == 1
        given = self.num_rows, self.largest_group, self.couples_pairs, one_pair
        return preference_strategy(*given, self.row_limit, self.sum_limit.more)

    @cached_property
    def chunks(self) -> list[Group]:
        if self.strategy == "pairs" and not self.couples_pairs:
            packed = pack_groups(self.groups, self.sum_limit.of(self.num_rows, self.largest_group))
            if len(packed) > 1:
                return packed
        return [Group([*range(len(self.lengths))], [*range(len(self.pairs))], self.num_rows)]

    @cached_property
    def parts(self) -> list[Part]:
        parts, row, sequence, pair = [], 0, 0, 0
        for chunk in self.chunks:
            ends = row + chunk.num_rows, sequence + len(chunk.sequences), pair + len(chunk.pairs)
            parts.append(Part(slice(row, ends[0]), slice(sequence, ends[1]), slice(pair, ends[2])))
            row, sequence, pair = ends
        return parts

    @property
    def row_chunks(self) -> list[slice]:
        """Rows of each product under `deferred` and `two_pass`."""
        step = even_rows(self.num_rows, self.row_limit)
        return [slice(low, high) for low, high in chunks(self.num_rows, step)]

    @property
    def max_rows(self) -> int:
        """Rows of the largest product."""
        slices = [p.rows for p in self.parts] if self.strategy == "pairs" else self.row_chunks
        return max((s.stop - s.start for s in slices), default=0)

    def tables(self) -> Tensor:
        """The device's lookup tables, concatenated on the CPU; `Tables` splits them."""
        order = [s for chunk in self.chunks for s in chunk.sequences]
        pair_order = [p for chunk in self.chunks for p in chunk.pairs]
        rows = torch.arange(self.num_rows).split(self.lengths)
        segments, offsets, local_pairs = [], [], []
        for chunk in self.chunks:
            lengths = torch.tensor([self.lengths[s] for s in chunk.sequences], dtype=torch.int64)
            segments.append(torch.arange(len(lengths)).repeat_interleave(lengths))
            offsets += [torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]
            place = {s: i for i, s in enumerate(chunk.sequences)}
            local_pairs += [place[s] for p in chunk.pairs for s in self.pairs[p]]
        columns = [
            torch.cat([rows[s] for s in order]) if order else torch.empty(0, dtype=torch.int64),
            *segments,
            *offsets,
            torch.tensor(order, dtype=torch.int64),
            torch.tensor(order, dtype=torch.int64).argsort(),
            torch.tensor(pair_order, dtype=torch.int64),
            torch.tensor(pair_order, dtype=torch.int64).argsort(),
            torch.tensor(local_pairs, dtype=torch.int64),
        ]
        return torch.cat(columns)

    def pack(self) -> Tensor:
        """The layout as a CPU tensor, the form in which it passes through an op."""
        pairs = [s for pair in self.pairs for s in pair]
        head = [self.row_limit, int(self.couples_pairs), int(self.opposite), *self.sum_limit, len(self.lengths)]
        return torch.tensor([*head, *self.lengths, *pairs], dtype=torch.int64)

    @classmethod
    def unpack(cls, packed: Tensor) -> Layout:
        row_limit, couples_pairs, opposite, rows, more, num_sequences, *rest = packed.tolist()
        flags = bool(couples_pairs), bool(opposite)
        return cls.of(rest[:num_sequences], rest[num_sequences:], row_limit, *flags, SumLimit(rows, more))

    @classmethod
    def of(
        cls,
        lengths: list[int],
        flat_pairs: list[int],
        row_limit: int,
        couples_pairs: bool,
        opposite: bool,
        sum_limit: SumLimit,
    ) -> Layout:
        pairs = list(zip(flat_pairs[::2], flat_pairs[1::2], strict=True))
        return cls(lengths, pairs, row_limit, couples_pairs, opposite, sum_limit)


class Tables:
    """`Layout.tables` on the device, split. A slot is the position of a sequence in the layout's order."""

    def __init__(self, layout: Layout, values: Tensor) -> None:
        rows, sequences, pairs = layout.num_rows, len(layout.lengths), len(layout.pairs)
        parts = len(layout.chunks)
        sizes = [rows, rows, sequences + parts, sequences, sequences, pairs, pairs, 2 * pairs]
        columns = values.split(sizes)
        self.order = columns[0]  # [n] row of the layout's order -> row in the batch's order
        self.segments = columns[1]  # [n] slot of a row within its chunk
        self._offsets: Tensor = columns[2]
        self.sequences, self.slots = columns[3], columns[4]  # [S] slot -> sequence, and back
        self.pair_order, self.pair_places = columns[5], columns[6]  # [P] likewise
        self.local_pairs = columns[7].view(-1, 2)  # [P, 2] slots within the chunk

    def offsets(self, part: Part, index: int) -> Tensor:
        """[s + 1] first rows of the sequences of chunk `index` within it."""
        low = part.sequences.start + index
        return self._offsets[low : low + part.sequences.stop - part.sequences.start + 1]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; a copy from the CPU is asynchronous."""
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class PlanTensors(NamedTuple):
    """A plan as it passes through an op."""

    host: Tensor  # Layout.pack(), on the CPU
    row_index: Tensor  # [n] positions of the rows in the flattened labels, in the batch's order
    tables: Tensor  # Layout.tables()


@dataclass(frozen=True)
class BatchPlan:
    """What the host must know about a batch for `FusedLinearCPOLoss`. Create it with `FusedLinearCPOLoss.plan`."""

    layout: Layout
    host: Tensor  # see PlanTensors
    index: Tensor
    tables: Tensor
    pairs: Tensor  # [P, 2]
    num_positions: int
    num_pairs: float | None  # divisors of the loss, if known
    chosen_tokens: float | None
    all_positions: bool = False  # labels may change

    @property
    def tensors(self) -> PlanTensors:
        return PlanTensors(self.host, self.index, self.tables)

    def to(self, device: str | torch.device) -> BatchPlan:
        """The plan with its tables on `device`; the copy does not block the host."""
        device = torch.device(device)
        index, tables, pairs = (to_device(t, device) for t in (self.index, self.tables, self.pairs))
        return replace(self, index=index, tables=tables, pairs=pairs)

    def pin_memory(self) -> BatchPlan:
        """Called by a DataLoader with pin_memory=True."""
        index, tables, pairs = (t.pin_memory() for t in (self.index, self.tables, self.pairs))
        return replace(self, index=index, tables=tables, pairs=pairs)
