"""Gradients of the head on the live columns of the vocabulary: `filter_eps`.

A set is SET_ROWS consecutive rows of a chunk. Its gradient g = dlogp / du is split by `reference.live_columns` into the
columns A in which some row reaches eps, and tau q^T for the rest, so that with coefficients c_t

    dX_t = c_t (g_{t,A} W_A + tau_t (q^T W))        dW_A += g_A^T (c X),   dW += q (sum_t c_t tau_t x_t)^T

A trained model leaves 5 to 15% of the columns live, and both products shrink to that share. The forward product is
complete: log-probs are exact. A set with too many live columns is exact: all its columns are multiplied, and its logits
are recomputed in backward if dW is filtered too. That pass is in `live_backward`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import ShardedKernels, all_gather, columns_here, columns_of, logit_and_slope
from cpo_kernels.head.grads import scale_rows
from cpo_kernels.head.inputs import Execution, Head, HeadInputs, Logits, RowLogps
from cpo_kernels.head.label_remainder import product_dx, product_from
from cpo_kernels.head.matmul import product
from cpo_kernels.head.strategy import HELD
from cpo_kernels.ops.token_logps import HeadOptions

LIVE_LIMIT = 0.5  # share of live columns beyond which a set is exact
TAIL_UNIT = 1024.0  # q is stored as 1024 q: float16 keeps its small elements, and 1024 q W is finite if |q W| < 64


class LiveTensors(NamedTuple):
    """`LiveSets` in a form that passes through an op."""

    g: Tensor
    columns: Tensor
    offsets: Tensor  # [sets + 1] int64 on the host
    exact: Tensor  # [sets] bool on the host
    tail: Tensor
    label_columns: Tensor
    label_grads: Tensor


def no_live_tensors(like: Tensor) -> LiveTensors:
    ids = like.new_empty(0, dtype=torch.int64)
    host = torch.empty(0, dtype=torch.int64)
    none = like.new_empty(0, dtype=library.acc_dtype(like.dtype))
    return LiveTensors(like.new_empty(0), ids, host, host.bool(), like.new_empty(0, 0), ids.clone(), none)


def fake_live_tensors(like: Tensor) -> LiveTensors:
    """Of data-dependent sizes."""
    context = torch.library.get_ctx()
    elements, ids, sets, width, rows = (context.new_dynamic_size() for _ in range(5))
    host = torch.empty(sets + 1, dtype=torch.int64, device="cpu")
    exact = torch.empty(sets, dtype=torch.bool, device="cpu")
    columns = like.new_empty(ids, dtype=torch.int64)
    labels = like.new_empty(rows, dtype=torch.int64), like.new_empty(rows, dtype=library.acc_dtype(like.dtype))
    return LiveTensors(like.new_empty(elements), columns, host, exact, like.new_empty(sets, width), *labels)


def set_sizes(num_rows: int, set_rows: int, count: int) -> list[int]:
    """Rows of each of `count` sets."""
    return [min(set_rows, num_rows - k * set_rows) for k in range(count)]


@dataclass(frozen=True)
class LiveSets:
    """The gradients of some rows, set by set."""

    g: Tensor  # [g_A, tau] of all sets, concatenated, [n_k, a_k + 1] each
    columns: Tensor  # [sum a_k], ascending within a set
    offsets: list[int]  # set k has columns[offsets[k] : offsets[k + 1]]
    exact: list[bool]  # sets with too many live columns: they have none here
    tail: Tensor  # [sets, V] TAIL_UNIT * q
    label_columns: Tensor  # [n], -1 for a row without a label here; [0] unless logits are relative
    label_grads: Tensor  # [n] g of the labels before rounding, or [0]
    num_rows: int
    set_rows: int

    @classmethod
    def of(cls, tensors: LiveTensors, num_rows: int, set_rows: int) -> "LiveSets":
        g, columns, offsets, exact, tail, label_columns, label_grads = tensors
        labels = label_columns, label_grads
        return cls(g, columns, offsets.tolist(), exact.tolist(), tail, *labels, num_rows, set_rows)

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """g, columns and offsets, as arguments of Triton's matmuls."""
        return self.g, self.columns, torch.tensor(self.offsets)

    def rows(self, k: int) -> slice:
        return slice(k * self.set_rows, min((k + 1) * self.set_rows, self.num_rows))

    def sizes(self) -> list[int]:
        return set_sizes(self.num_rows, self.set_rows, len(self.exact))

    def columns_of(self) -> list[Tensor]:
        """[a_k] of every set."""
        return list(self.columns.split([high - low for low, high in zip(self.offsets, self.offsets[1:], strict=False)]))

    def grads(self) -> list[Tensor]:
        """[n_k, a_k + 1] of every set."""
        shapes = [(n, len(columns) + 1) for n, columns in zip(self.sizes(), self.columns_of(), strict=True)]
        parts = self.g.split([n * width for n, width in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def sums(self, labels: Tensor, options: HeadOptions) -> Tensor:
        """[3] sums over labelled rows: share of live columns (1 in exact sets), probability of the tail, exact rows."""
        width = max(1, self.tail.shape[1])
        shares = [[1.0 if e else len(c) / width, float(e)] for c, e in zip(self.columns_of(), self.exact, strict=True)]
        of_sets = torch.tensor(shares, dtype=torch.float32).view(-1, 2)
        set_of = torch.arange(self.num_rows, device=labels.device) // self.set_rows
        of_rows = of_sets.to(labels.device, non_blocking=True).index_select(0, set_of)  # without a synchronisation
        live, exact = (of_rows * (labels != options.ignore_index)[:, None]).sum(0)
        taus = [g[:, -1].abs().sum(dtype=torch.float32) for g, e in zip(self.grads(), self.exact, strict=True) if not e]
        tail = torch.stack(taus).sum() / options.scale if taus else torch.zeros_like(live)
        return torch.stack([live, tail, exact])


class KeptSets:
    """The live sets of the chunks of `num_rows` rows, with each g behind the one before in one buffer: a `torch.cat` at
    the end took 12 of 430 ms on 3,072 rows of SmolLM2 (two cores), and held them twice."""

    def __init__(self, like: Tensor, num_rows: int) -> None:
        self.like, self.num_rows, self.rows = like, num_rows, 0
        self.parts: list[LiveSets] = []
        self.g, self.used = like.new_empty(0), 0

    def room(self, rows: int, size: int) -> Tensor:
        """[size] for the g of the next `rows` rows. Every chunk but the last has a whole number of sets."""
        low, high = self.used, self.used + size
        self.rows += rows
        if high > self.g.numel():
            # What all rows need if they are like those so far, and more for those that are not: memory of a CPU that is
            # never written costs nothing.
            more = 2.0 if self.like.device.type == "cpu" else 1.25
            wanted = high if self.rows == self.num_rows else int(high * self.num_rows / self.rows * more)
            larger = dispatch.prefer_huge_pages(self.like.new_empty(wanted))
            larger[:low] = self.g[:low]
            self.g = larger
        self.used = high
        return self.g[low:high]

    def add(self, sets: LiveSets) -> None:
        """sets.g: from `room`."""
        self.parts.append(replace(sets, g=sets.g.new_empty(0)))  # a view would keep a buffer that has been outgrown

    def tensors(self) -> LiveTensors:
        parts = self.parts
        if not parts:
            return no_live_tensors(self.like)
        offsets = [0]
        for part in parts:
            offsets += [offsets[-1] + offset for offset in part.offsets[1:]]
        return LiveTensors(
            self.g[: self.used] if self.g.device.type == "cpu" else self.g[: self.used].clone(),
            torch.cat([part.columns for part in parts]),
            torch.tensor(offsets),
            torch.tensor([exact for part in parts for exact in part.exact], dtype=torch.bool),
            torch.cat([part.tail for part in parts]),
            torch.cat([part.label_columns for part in parts]),
            torch.cat([part.label_grads for part in parts]),
        )


def adds_by_index(kernels: Any) -> bool:
    """Whether the kernels read rows of W by index and add into a float32 dW by index: Triton's do. The CPU's own
    (`dispatch.own_matmuls`) compute all of dW. Else copies of W_A go to the vendor's library."""
    return hasattr(kernels, "live_dw_")


def live_sets(
    head: Head,
    logits: Logits,
    labels: Tensor,
    lse: Tensor,
    eps: float,
    set_rows: int,
    room: Callable[[int, int], Tensor] | None = None,
) -> LiveSets:
    """Split the gradient of a chunk's logits, without changing them. One host-device synchronisation reads all |A|.

    room(rows, size): [size], where g is to be.
    """
    options, (z, anchors) = head.options, logits
    live, tail, row_sums = head.kernels.live_columns(z, labels, lse, eps, set_rows, *options, anchors)
    counts = live.sum(1).tolist()
    exact = [count > LIVE_LIMIT * live.shape[1] for count in counts]
    if adds_by_index(head.kernels) and z.element_size() == 2:  # 7 modulo 8 columns, and tau: 16-byte rows of g
        missing = [min((7 - count) % 8, live.shape[1] - count) for count in counts]
        more = ~live & ((~live).cumsum(1) <= torch.tensor(missing, device=live.device)[:, None])
        live, tail = live | more, tail.masked_fill(more, 0.0)
        counts = [count + added for count, added in zip(counts, missing, strict=True)]  # no second synchronisation
    if any(exact):
        live[torch.tensor(exact, device=live.device)] = False
    offsets = [0]
    for count, whole in zip(counts, exact, strict=True):
        offsets.append(offsets[-1] + (0 if whole else count))
    columns = torch.nonzero_static(live, size=offsets[-1])[:, 1].contiguous()
    args = z, labels, lse, row_sums, columns, torch.tensor(offsets), set_rows, *options, anchors
    kernels: Any = head.kernels
    if room is None:
        g = kernels.live_grads(*args)
    else:
        sizes = set_sizes(z.shape[0], set_rows, len(counts))
        widths = [high - low + 1 for low, high in zip(offsets, offsets[1:], strict=False)]
        g = room(z.shape[0], sum(n * width for n, width in zip(sizes, widths, strict=True)))
        if dispatch.writes_live_grads(kernels, z):
            kernels.live_grads_(*args, g)
        else:
            g.copy_(kernels.live_grads(*args))
    total = tail.sum(1, keepdim=True)
    q = (tail / torch.where(total > 0, total, 1.0) * TAIL_UNIT).to(z.dtype)  # 1 / total may not be finite
    return LiveSets(g, columns, offsets, exact, q, *_label_grads(head, anchors, labels, lse), z.shape[0], set_rows)


def _label_grads(head: Head, anchors: Tensor | None, labels: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`label_columns` and `label_grads` of a chunk. g of a row's label is (1 - p) dz/du."""
    if anchors is None:
        return labels.new_empty(0), lse.new_empty(0)
    options = head.options
    column, here = columns_of(labels, options.ignore_index, *columns_here(head.kernels, options.vocab_size)[1:])
    z, slope = logit_and_slope(anchors[1], options.scale, options.softcap)
    value = -torch.expm1(z - lse.double()) * slope
    here = here & torch.isfinite(value)
    return torch.where(here, column, -1), torch.where(here, value, 0.0).to(lse.dtype)


class DxPart(NamedTuple):
    """Rows of dX that lack the product with their sets' tails."""

    sets: LiveSets
    dx: Tensor  # [n, H], where they go
    coef: Tensor | None  # [n], factors of the rows; None for 1
    sums: Tensor | None = None  # [n, H] in float32, the products with the live columns, if they are computed by then
    tau: Tensor | None = None  # [n]; sets.g is then empty

    @property
    def held(self) -> int:
        """Elements of 16 bit."""
        return self.sets.g.numel() + self.sets.tail.numel() + (0 if self.sums is None else 2 * self.sums.numel())


class LiveDx:
    """Computes dX [n, H] of the sum of the log-probs for all sets given to `add`, except for rows of exact sets.

    q^T W reads the whole weight: it takes 6 ms for 2 sets and 7 ms for 11 (V = 49,152, H = 576, one core). So `write`
    runs once for several chunks, when what is held for it is as large as a chunk of logits, or HELD. The CPU's own
    matmul computes the products with the live columns at once, and what is held is their sums.
    """

    def __init__(self, head: Head) -> None:
        self.head, self.own = head, dispatch.own_matmuls(head.kernels, head.weight)
        self.parts: list[DxPart] = []
        self.g = head.weight.new_empty(0)

    @property
    def room(self) -> Callable[[int, int], Tensor] | None:
        """For `live_sets`, if g is not needed after `add`: one buffer for all chunks. With blocks of their own, of
        different sizes and with sums between them, a frozen head needed 125 MiB for 3,202 rows of 576 x 49,152 in place
        of 91 to 98."""
        return self._room if self.own else None

    def _room(self, rows: int, size: int) -> Tensor:
        if size > self.g.numel():
            self.g = self.g.new_empty(0)  # freed first
            self.g = self.head.weight.new_empty(size * 5 // 4)
        return self.g[:size]

    def add(self, sets: LiveSets, dx: Tensor, coef: Tensor | None = None) -> None:
        """coef [n]: factors of the rows of dX; None for 1."""
        if not sets.exact:  # no rows
            return
        part = DxPart(sets, dx, coef)
        if self.own:
            args = *sets.places, sets.set_rows, self.head.weight, sets.label_columns, sets.label_grads
            sums = self.own.live_sums(*args, sets.num_rows)
            tau = torch.cat([g[:, -1] for g in sets.grads()]).to(sums.dtype)
            part = DxPart(replace(sets, g=sets.g.new_empty(0)), dx, coef, sums, tau)
        self.parts.append(part)
        if sum(part.held for part in self.parts) > min(self.head.buffer.numel(), HELD):
            self.write()

    def write(self) -> None:
        parts, self.parts = self.parts, []
        if not parts:
            return
        tails = [part.sets.tail for part in parts]
        weight = self.head.weight[: tails[0].shape[1]]
        q = tails[0] if len(tails) == 1 else torch.cat(tails)
        means = product(q, weight, weight.new_empty(len(q), weight.shape[1])) / TAIL_UNIT  # [sets, H]
        for part, mean in zip(parts, means.split([len(tail) for tail in tails]), strict=True):
            if part.sums is not None:
                self.finish(part, mean)
            elif adds_by_index(self.head.kernels):
                self.by_index(part.sets, mean, part.dx, part.coef)
            else:
                self.by_copies(part.sets, mean, part.dx, part.coef)

    def finish(self, part: DxPart, means: Tensor) -> None:
        assert part.sums is not None and part.tau is not None
        for k, exact in enumerate(part.sets.exact):
            if exact:
                continue
            rows = part.sets.rows(k)
            dx = part.sums[rows].addr_(part.tau[rows], means[k].to(part.sums.dtype))
            part.dx[rows] = dx if part.coef is None else dx.mul_(part.coef[rows, None])

    def by_index(self, sets: LiveSets, means: Tensor, dx: Tensor, coef: Tensor | None) -> None:
        kernels: Any = self.head.kernels
        weight, acc = self.head.weight, library.acc_dtype(dx.dtype)
        coef = weight.new_ones(sets.num_rows, dtype=acc) if coef is None else coef
        args = *sets.places, sets.set_rows, weight, means.to(acc), coef, sets.label_columns, sets.label_grads
        made = kernels.live_dx(*args)
        for rows in exact_rows(sets):
            made[rows] = dx[rows]
        dx.copy_(made)

    def by_copies(self, sets: LiveSets, means: Tensor, dx: Tensor, coef: Tensor | None) -> None:
        weight, columns_of_sets = self.head.weight, sets.columns_of()
        buffer = weight.new_empty(max(len(columns) for columns in columns_of_sets) + 1, weight.shape[1])
        for k, (live, columns) in enumerate(zip(sets.grads(), columns_of_sets, strict=True)):
            if sets.exact[k]:
                continue
            rows, weights = sets.rows(k), buffer[: len(columns) + 1]  # W_A, and the mean of the other rows
            torch.index_select(weight, 0, columns, out=weights[:-1])
            weights[-1] = means[k]
            if sets.label_grads.numel():  # with what the rounding of the labels' g takes away
                lost = sets.label_grads[rows] - sets.label_grads[rows].to(weight.dtype)
                product_from(weight, sets.label_columns[rows].clamp(min=0), lost, live, weights, dx[rows])
            else:
                product(live, weights, dx[rows])
            if coef is not None:
                dx[rows] = scale_rows(dx[rows], coef[rows])


def filtered_chunk(
    head: Head,
    inputs: tuple[Tensor, Tensor, bool, Tensor | None],
    execution: Execution,
    dx: Tensor,
    live_dx: LiveDx,
    kept: KeptSets | None = None,
) -> tuple[RowLogps, Tensor]:
    """The log-probs of a chunk and the sums [3] of its live sets. Unless dx is [0], dX [n, H] of the log-probs' sum is
    written to it: rows of exact sets here, all others by `live_dx.write`.

    inputs: the arguments of `Head.forward`. kept: receives the live sets.
    """
    labels, room = inputs[1], live_dx.room if kept is None else kept.room
    logits, logps = head.forward(*inputs)
    sets = live_sets(head, logits, labels, logps.lse, execution.filter_eps, execution.set_rows, room)
    if dx.numel():
        for rows in exact_rows(sets):
            part = logits.rows(rows)
            g, lse = part.z.clone(), logps.lse[rows]  # the logits may be kept for backward
            ones = torch.ones_like(lse)
            head.kernels.token_logps_bwd_(g, labels[rows], lse, ones, *head.options, part.anchors)
            product_dx(head, part._replace(z=g), labels[rows], logps.logp[rows], ones, dx[rows])
        live_dx.add(sets, dx)
    if kept is not None:
        kept.add(sets)
    return logps, sets.sums(labels, head.options)


def no_sums(like: Tensor) -> Tensor:
    return like.new_zeros(3, dtype=torch.float32)


class FilterShares(NamedTuple):
    """Means over the labelled rows where a gradient is filtered; NaN elsewhere. See `PreferenceOutput`."""

    live_share: Tensor  # []
    tail_mass: Tensor  # []
    exact_share: Tensor  # []


def filter_shares(inputs: HeadInputs, sums: Tensor) -> FilterShares:
    """From filter_sums [3], of all rows of the call."""
    if not inputs.filters:
        return FilterShares(*torch.full_like(sums, torch.nan).unbind(0))
    labelled = (inputs.tensors.labels != inputs.options.ignore_index).sum()
    return FilterShares(*(sums / labelled.clamp(min=1)).unbind(0))


def over_shards(head: Head, sums: Tensor) -> Tensor:
    """`LiveSets.sums` of the whole vocabulary: shares are weighted by the ranks' columns, tails are added."""
    kernels = head.kernels
    if not isinstance(kernels, ShardedKernels):
        return sums
    shares = [columns / head.options.vocab_size for columns in kernels.columns(head.options.vocab_size)]
    weights = torch.tensor([[share, 1.0, share] for share in shares], dtype=sums.dtype)
    return (all_gather(sums, kernels.group) * weights.to(sums.device, non_blocking=True)).sum(0)


def exact_rows(sets: LiveSets) -> list[slice]:
    """The rows of exact sets, adjacent sets merged."""
    runs: list[slice] = []
    for k, exact in enumerate(sets.exact):
        rows = sets.rows(k)
        if exact and runs and runs[-1].stop == rows.start:
            runs[-1] = slice(runs[-1].start, rows.stop)
        elif exact:
            runs.append(rows)
    return runs
