"""A head whose vocabulary is sharded over a process group: each rank holds some rows of the weight.

With lse_r over the rows of rank r, and logp_r of a label relative to them,

    lse = log sum_r exp(lse_r),   logp = logp_r + (lse_r - lse) on the rank that holds the label's row

so the ranks exchange two numbers per labelled row (seven with extras): one all-gather per chunk of logits. Every rank
adds them up in the same order and gets bitwise the same result. The gradient of a rank's logits needs only lse. The
ranks' parts of dX are summed once per backward pass; dW and db stay on the rank that holds the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpo_kernels import checks, library
from cpo_kernels.backends import dispatch
from cpo_kernels.checks import check_label_range
from cpo_kernels.library import Kernels

# What a rank sends in place of a label's log-prob, which exceeds 0 by rounding only.
NOT_HERE, REFUSED = math.inf, 2.0


IGNORED = -(2**62)  # an ignore_index that no label of another rank can be mapped to


@dataclass(frozen=True)
class VocabShards:
    """Which rows of the head each rank of a group holds: rank r those after the rows of ranks 0 to r - 1.

    group: a process group whose ranks see the same hidden states and labels (tensor parallelism). A label out of range
        on one rank raises on all ranks. Any other wrong argument (dtype, shape, option) raises before communication: if
        only one rank has it, the others hang in their collective until that process ends or the group times out.
    rows: how many rows each rank holds; 0 is allowed. `VocabShards.of(weight, group)` collects them from the ranks.

    Raises ValueError if rows is not one number >= 0 for each rank, or all of them are 0.

    Examples:
        >>> shards = VocabShards.of(weight, group)                                       # doctest: +SKIP
        >>> logps = linear_token_logps(hidden, weight, labels, vocab_shards=shards)      # doctest: +SKIP
    """

    group: dist.ProcessGroup
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(int(n) for n in self.rows))
        if len(self.rows) != self.group.size():
            raise ValueError(f"rows must hold one number for each of {self.group.size()} ranks, got {list(self.rows)}")
        if min(self.rows) < 0 or not any(self.rows):
            raise ValueError(f"rows must be >= 0 and not all 0, got {list(self.rows)}")

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup) -> VocabShards:
        """From the rows that each rank holds, weight [V_r, H]; a collective with a host-device synchronisation."""
        rows = all_gather(torch.tensor([weight.shape[0]], device=weight.device), group)
        return cls(group, tuple(rows.flatten().tolist()))

    @property
    def vocab_size(self) -> int:
        return sum(self.rows)

    @property
    def start(self) -> int:
        """The first row of this rank."""
        return sum(self.rows[: self.group.rank()])


class Backend(NamedTuple):
    """The kernels of a head, in a form that passes through an op: `impl`, and the process group of a sharded head.

    The group is stored by name: a reference held here would outlive `destroy_process_group`.
    """

    impl: str
    shard_rows: list[int]  # VocabShards.rows, [] for a head that is not sharded
    group: str

    @classmethod
    def of(cls, impl: str, shards: VocabShards | None = None) -> Backend:
        return cls(impl, [], "") if shards is None else cls(impl, list(shards.rows), shards.group.group_name)

    def kernels(self, tensor: Tensor) -> Kernels:
        kernels = dispatch.kernels(self.impl, tensor)
        if not self.shard_rows:
            return kernels
        from torch.distributed import distributed_c10d  # not in every build of torch

        group = distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]
        return ShardedKernels(kernels, VocabShards(group, tuple(self.shard_rows)))


def all_gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] of each rank -> [ranks, ...]"""
    out = values.new_empty(group.size(), *values.shape)
    dist.all_gather(list(out.unbind(0)), values.contiguous(), group=group)
    return out


class ShardedKernels:
    """A backend's kernels for a sharded vocabulary: logits [n, V_r] of this rank, labels of the whole vocabulary."""

    def __init__(self, kernels: Kernels, shards: VocabShards) -> None:
        self.kernels, self.group, self.start = kernels, shards.group, shards.start
        self.rows = shards.rows
        self.sequence_sum, self.preference = kernels.sequence_sum, kernels.preference
        self.live_sum = kernels.live_sum  # acts on this rank's rows, as do the matmuls
        for name in ("logits_", "live_sums_", "live_dx", "live_dw", "live_dw_"):
            if hasattr(kernels, name):
                setattr(self, name, getattr(kernels, name))

    def columns(self, vocab_size: int) -> list[int]:
        """Number of columns of each rank that are not padding."""
        return [
            max(0, min(vocab_size, end) - (end - n)) for end, n in zip(accumulate(self.rows), self.rows, strict=True)
        ]

    def token_logps_fwd(
        self, logits: Tensor, labels: Tensor, ignore_index: int, scale: float, softcap: float, vocab_size: int,
        extras: bool, anchors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        columns = self.columns(vocab_size)
        mine = columns[self.group.rank()]
        column, here = columns_of(labels, ignore_index, self.start, mine)
        if mine:
            if anchors is not None:  # a label of another rank has a stand-in column here, which keeps its own logit
                stored = stored_logits(logits, column, anchors)
                anchors = torch.stack([anchors[0], torch.where(here, anchors[1], stored.to(anchors.dtype))])
            logp, lse, extra = self.kernels.token_logps_fwd(logits, column, -1, scale, softcap, mine, extras, anchors)
        else:
            zeros = logits.new_zeros(labels.shape, dtype=library.acc_dtype(logits.dtype))
            logp, lse, extra = zeros, torch.full_like(zeros, -math.inf), zeros.expand(4, -1)
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
        sent = [lse, torch.where(here, logp, NOT_HERE).masked_fill(wrong, REFUSED)]
        if extras:
            top = logits[:, :mine].amax(1).to(lse.dtype) if mine else torch.full_like(lse, -math.inf)
            top = top if anchors is None else top + anchors[0]
            sent += [*extra, top]
        gathered = all_gather(torch.stack(sent), self.group).double()  # [ranks, 2 or 7, n]
        total = torch.logsumexp(gathered[:, 0], 0)
        share = gathered[:, 0] - total  # log of each rank's share of the probability; -inf if all its logits are
        refused = gathered[:, 1] == REFUSED
        check_refused(refused, labels, ignore_index, vocab_size)
        here = (gathered[:, 1] != NOT_HERE) & ~refused
        logp = torch.where(share == -math.inf, -math.inf, gathered[:, 1] + share)
        logp = torch.where(here, logp, math.inf).amin(0)
        nowhere = ~here.any(0) | refused.any(0)  # NaN, gradients too
        results = [logp.masked_fill(nowhere, math.nan), total.masked_fill(nowhere, math.nan)]
        if extras:
            p, (entropy, log_sum_sq, mean_z, is_top1, top) = share.exp(), gathered[:, 2:].unbind(1)
            first = here & (is_top1 > 0) & (top >= top.amax(0))
            results += [
                torch.where(p > 0, p * (entropy - share), 0.0).sum(0),
                torch.logsumexp(torch.where(p > 0, log_sum_sq + 2 * share, -math.inf), 0),
                sum(mean * count for mean, count in zip(mean_z, columns, strict=True) if count) / vocab_size,
                first.any(0).double(),
            ]
        out = torch.stack(results).masked_fill(labels == ignore_index, 0.0).to(lse.dtype)
        return out[0], out[1], out[2:] if extras else lse.new_empty(0)

    def token_logps_bwd_(
        self, logits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, ignore_index: int, scale: float,
        softcap: float, vocab_size: int, anchors: Tensor | None = None, entropies: Tensor | None = None,
    ) -> None:  # fmt: skip
        mine = self.columns(vocab_size)[self.group.rank()]
        columns_bwd_(
            self.kernels, logits, labels, lse, grad, ignore_index, scale, softcap, self.start, mine, anchors, entropies
        )

    def token_logps_fused_(
        self, logits: Tensor, labels: Tensor, ignore_index: int, scale: float, softcap: float, vocab_size: int,
        extras: bool, anchors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        head = ignore_index, scale, softcap, vocab_size
        logp, lse, extra = self.token_logps_fwd(logits, labels, *head, extras, anchors)
        self.token_logps_bwd_(logits, labels, lse, torch.ones_like(lse), *head, anchors)
        return logp, lse, extra

    def live_columns(
        self,
        logits: Tensor,
        labels: Tensor,
        lse: Tensor,
        eps: float,
        set_rows: int,
        ignore_index: int,
        scale: float,
        softcap: float,
        vocab_size: int,
        anchors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For this rank's columns: each rank has live columns and tails of its own."""
        mine = self.columns(vocab_size)[self.group.rank()]
        if not mine:
            sets = -(-labels.shape[0] // set_rows)
            none = lse.new_empty(sets, 0)
            return none.bool(), none, torch.where(torch.isfinite(lse), 0.0, math.nan)
        here = self.labels_here(labels, ignore_index)
        return self.kernels.live_columns(logits, here, lse, eps, set_rows, IGNORED, scale, softcap, mine, anchors)

    def live_grads(
        self,
        logits: Tensor,
        labels: Tensor,
        lse: Tensor,
        row_sums: Tensor,
        columns: Tensor,
        offsets: Tensor,
        set_rows: int,
        ignore_index: int,
        scale: float,
        softcap: float,
        vocab_size: int,
        anchors: Tensor | None = None,
    ) -> Tensor:
        mine = self.columns(vocab_size)[self.group.rank()]
        if not mine:
            return row_sums.to(logits.dtype)
        here = self.labels_here(labels, ignore_index)
        return self.kernels.live_grads(
            logits, here, lse, row_sums, columns, offsets, set_rows, IGNORED, scale, softcap, mine, anchors
        )

    def labels_here(self, labels: Tensor, ignore_index: int) -> Tensor:
        """[n] labels as columns of this rank: out of range if another rank holds them, IGNORED if ignored."""
        return (labels - self.start).masked_fill(labels == ignore_index, IGNORED)


def columns_here(kernels: Kernels, vocab_size: int) -> tuple[Kernels, int, int]:
    """The kernels for this rank's own columns, the index of the first, and how many are not padding."""
    if not isinstance(kernels, ShardedKernels):
        return kernels, 0, vocab_size
    return kernels.kernels, kernels.start, kernels.columns(vocab_size)[kernels.group.rank()]


def check_refused(refused: Tensor, labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raise on every rank, so that none hangs. refused [ranks, n]: where a rank's label is out of range."""
    if not checks.may_read(labels) or not bool(refused.any()):
        return
    check_label_range(labels, ignore_index, vocab_size)
    rank, row = refused.nonzero()[0].tolist()
    raise ValueError(
        f"the label of row {row} is {int(labels[row])} here and out of range on rank {rank}: labels must be the same "
        "on every rank"
    )


# --------------------------------------------------------------- some columns of a wider vocabulary: a rank's, or fewer


def columns_of(labels: Tensor, ignore_index: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Labels [n] as columns of [first, first + count), -1 where ignored; and which labels lie in that range.

    A label outside of it gets a stand-in column, as the row's log-sum-exp does not depend on the label.
    """
    column = labels - first
    here = (column >= 0) & (column < count) & (labels != ignore_index)
    return column.clamp(0, max(count - 1, 0)).masked_fill(labels == ignore_index, -1), here


def stored_logits(logits: Tensor, column: Tensor, anchors: Tensor | None) -> Tensor:
    """[n] the logits in the columns [n] as stored, plus the constants subtracted from their rows."""
    row = torch.arange(logits.shape[0], device=logits.device)
    stored = logits[row, column.clamp(min=0)]
    return stored if anchors is None else stored + anchors[0]


def logit_and_slope(u: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """z = softcap(scale u) and dz/du in float64."""
    z = u.double() * scale
    if not softcap:
        return z, torch.full_like(z, scale)
    return softcap * torch.tanh(z / softcap), scale / torch.cosh(z / softcap).square()


def columns_bwd_(
    kernels: Kernels,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    first: int,
    count: int,
    anchors: Tensor | None = None,
    entropies: Tensor | None = None,
) -> None:
    """`token_logps_bwd_` of logits [n, v], columns from `first` on of a wider vocabulary; `count` are not padding."""
    if count <= 0:
        logits.zero_()
        return
    column, here = columns_of(labels, ignore_index, first, count)
    row, place = torch.arange(logits.shape[0], device=logits.device), column.clamp(min=0)
    z, slope = logit_and_slope(stored_logits(logits, column, anchors), scale, softcap)
    kernels.token_logps_bwd_(logits, column, lse, grad, -1, scale, softcap, count, anchors, entropies)
    # A stand-in column has received the 1 of onehot - softmax. (index_put_, because scatter_ in 16 bit copies the
    # logits twice on a CPU: 122 ms for 4096 x 24576.)
    wrong = ~here & (labels != ignore_index)
    logp = z - lse
    factor = grad
    if entropies is not None:
        factor = grad + entropies[0] * (logp.clamp(min=-1e3) + entropies[1])  # 0 * -inf stays 0
    share = (-factor * slope * torch.exp(logp)).to(logits.dtype)
    logits.index_put_((row, place), torch.where(wrong, share, logits[row, place]))
