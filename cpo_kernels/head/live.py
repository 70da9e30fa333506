"""Gradients of the head on the live columns of the vocabulary: `filter_eps`.

A set is SET_ROWS consecutive rows of a chunk. Its gradient g = dlogp / du is split by `reference.live_columns` into the
columns A in which some row reaches eps, and tau q^T for the rest, so that with coefficients c_t

    dX_t = c_t (g_{t,A} W_A + tau_t (q^T W))        dW_A += g_A^T (c X),   dW += q (sum_t c_t tau_t x_t)^T

A trained model leaves 5 to 15% of the columns live, and both products shrink to that share. The forward product is
complete: log-probs are exact. A set with too many live columns is exact: all its columns are multiplied, and its logits
are recomputed in backward if dW is filtered too. That pass is in `live_backward`.
"""

from collections.abc import Callable, Iterator
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
from cpo_kernels.head.matmul import add_product
from cpo_kernels.head.strategy import HELD, HELD_SUMS, chunks, sets_at_a_time, stores_live_grads

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


@dataclass(frozen=True)
class LiveColumns:
    """The live columns of some rows, set by set."""

    columns: Tensor  # [sum a_k], ascending within a set
    offsets: list[int]  # set k has columns[offsets[k] : offsets[k + 1]]
    exact: list[bool]  # sets with too many live columns: they have none here
    tail: Tensor  # [sets, V] TAIL_UNIT * q
    num_rows: int
    set_rows: int

    def rows(self, k: int) -> slice:
        return slice(k * self.set_rows, min((k + 1) * self.set_rows, self.num_rows))

    def sizes(self) -> list[int]:
        return [self.rows(k).stop - self.rows(k).start for k in range(len(self.exact))]

    def shapes(self) -> list[tuple[int, int]]:
        """[n_k, a_k + 1] of every set: of its gradients and tau."""
        widths = [high - low + 1 for low, high in zip(self.offsets, self.offsets[1:], strict=False)]
        return list(zip(self.sizes(), widths, strict=True))

    def columns_of(self) -> list[Tensor]:
        """[a_k] of every set."""
        return list(self.columns.split([high - low for low, high in zip(self.offsets, self.offsets[1:], strict=False)]))

    def exact_rows(self) -> list[slice]:
        """The rows of exact sets, adjacent sets merged."""
        runs: list[slice] = []
        for k, exact in enumerate(self.exact):
            rows = self.rows(k)
            if exact and runs and runs[-1].stop == rows.start:
                runs[-1] = slice(runs[-1].start, rows.stop)
            elif exact:
                runs.append(rows)
        return runs

    def part(self, low: int, high: int) -> "tuple[slice, LiveColumns]":
        """Sets [low, high), and their rows."""
        rows = slice(low * self.set_rows, min(high * self.set_rows, self.num_rows))
        first, last = self.offsets[low], self.offsets[high]
        offsets = [offset - first for offset in self.offsets[low : high + 1]]
        sets = self.columns[first:last], offsets, self.exact[low:high], self.tail[low:high]
        return rows, LiveColumns(*sets, rows.stop - rows.start, self.set_rows)


@dataclass(frozen=True)
class LiveSets(LiveColumns):
    """The gradients of the rows there."""

    g: Tensor  # [g_A, tau] of all sets, concatenated, [n_k, a_k + 1] each
    label_columns: Tensor  # [n], -1 for a row without a label here; [0] unless logits are relative
    label_grads: Tensor  # [n] g of the labels before rounding, or [0]

    @classmethod
    def of(cls, tensors: LiveTensors, num_rows: int, set_rows: int) -> "LiveSets":
        g, columns, offsets, exact, tail, label_columns, label_grads = tensors
        sets = columns, offsets.tolist(), exact.tolist(), tail, num_rows, set_rows
        return cls(*sets, g, label_columns, label_grads)

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """g, columns and offsets, as arguments of Triton's matmuls."""
        return self.g, self.columns, torch.tensor(self.offsets)

    def grads(self) -> list[Tensor]:
        """[n_k, a_k + 1] of every set."""
        shapes = self.shapes()
        parts = self.g.split([n * width for n, width in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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


class LabelGrads(NamedTuple):
    """The fields of `LiveSets` with these names."""

    label_columns: Tensor
    label_grads: Tensor

    def rows(self, part: slice) -> "LabelGrads":
        return LabelGrads(self.label_columns[part], self.label_grads[part])


class Found(NamedTuple):
    """What the sets of a chunk are."""

    columns: LiveColumns
    row_sums: Tensor  # [n] sums of s over the rows
    filter_sums: Tensor  # [3] over labelled rows: share of live columns (1 in exact sets), tail's probability, exact
    labels: LabelGrads


def live_columns(head: Head, logits: Logits, labels: Tensor, lse: Tensor, eps: float, set_rows: int) -> Found:
    """Of a chunk's logits. One host-device synchronisation reads all |A|."""
    (z, anchors), options, kernels = logits, head.options, head.kernels
    # What follows in one op: 2.2 ms for 2 sets of 49,152 columns in place of 3.0 (two cores).
    if dispatch.lists_live_columns(kernels, z):
        own: Any = kernels
        most = int(LIVE_LIMIT * options.vocab_size)
        listed = own.list_live_columns(z, labels, lse, eps, set_rows, *options, most, TAIL_UNIT, anchors)
        ids, ends, exact_sets, q, row_sums, sums, *of_labels = listed
        columns = LiveColumns(ids, ends.tolist(), exact_sets.tolist(), q, z.shape[0], set_rows)
        return Found(columns, row_sums, sums, LabelGrads(*of_labels))
    live, tail, row_sums = kernels.live_columns(z, labels, lse, eps, set_rows, *options, anchors)
    width = live.shape[1]
    of_sets, most = live.sum(1), int(LIVE_LIMIT * width)  # compared with a float they would be rounded
    counts, is_exact = of_sets.tolist(), of_sets > most
    exact = [count > most for count in counts]
    if adds_by_index(kernels) and z.element_size() == 2:  # 7 modulo 8 columns, and tau: 16-byte rows of g
        missing = [min((7 - count) % 8, width - count) for count in counts]
        added = torch.tensor(missing, device=live.device)
        more = ~live & ((~live).cumsum(1) <= added[:, None])
        live, tail, of_sets = live | more, tail.masked_fill(more, 0.0), of_sets + added
        counts = [count + m for count, m in zip(counts, missing, strict=True)]  # no second synchronisation
    if any(exact):
        live.masked_fill_(is_exact[:, None], False)
    offsets = [0]
    for count, whole in zip(counts, exact, strict=True):
        offsets.append(offsets[-1] + (0 if whole else count))
    # nonzero takes 0.6 of the time of nonzero_static on a CPU; elsewhere it would be one more synchronisation.
    places = live.nonzero() if live.device.type == "cpu" else torch.nonzero_static(live, size=offsets[-1])
    total = tail.sum(1)
    q = tail.div_(torch.where(total > 0, total, 1.0)[:, None]).mul_(TAIL_UNIT).to(z.dtype)  # 1 / total may be infinite
    columns = LiveColumns(places[:, 1].contiguous(), offsets, exact, q, z.shape[0], set_rows)
    # A row whose log-sum-exp is not finite has no part in its set's tail; its sum is NaN.
    rows = torch.stack([(labels != options.ignore_index).to(torch.float32), (row_sums - row_sums).to(torch.float32)])
    padded = rows.new_zeros(2, len(exact) * set_rows)
    padded[:, : len(labels)] = rows
    labelled, nothing = padded.view(2, -1, set_rows).sum(2)  # [sets]
    share = torch.where(is_exact, labelled, labelled * of_sets / max(1, width))
    tails = (total.to(torch.float32) + nothing).masked_fill(is_exact, 0.0) / options.scale
    sums = torch.stack([share, tails, labelled * is_exact]).sum(1)
    return Found(columns, row_sums, sums, _label_grads(head, anchors, labels, lse))


def _label_grads(head: Head, anchors: Tensor | None, labels: Tensor, lse: Tensor) -> LabelGrads:
    """g of a row's label is (1 - p) dz/du."""
    if anchors is None:
        return LabelGrads(labels.new_empty(0), lse.new_empty(0))
    options = head.options
    column, here = columns_of(labels, options.ignore_index, *columns_here(head.kernels, options.vocab_size)[1:])
    z, slope = logit_and_slope(anchors[1], options.scale, options.softcap)
    value = -torch.expm1(z - lse.double()) * slope
    here = here & torch.isfinite(value) & torch.isfinite(lse)
    return LabelGrads(torch.where(here, column, -1), torch.where(here, value, 0.0).to(lse.dtype))


def live_sets(
    head: Head,
    logits: Logits,
    labels: Tensor,
    lse: Tensor,
    found: Found,
    room: Callable[[int, int], Tensor] | None = None,
    most: int | None = None,
) -> Iterator[tuple[slice, LiveSets]]:
    """The gradients of a chunk's logits, which are not changed: a few sets after another, each time with their rows.

    room(rows, size): [size], where g is to be. most: sets at a time, or all.
    """
    kernels: Any = head.kernels
    columns, row_sums, _, label_grads = found
    count = len(columns.exact)
    for low, high in chunks(count, most or count) if count else [(0, 0)]:
        rows, sets = columns.part(low, high)
        (z, anchors), targets = logits.rows(rows), (labels[rows], lse[rows])
        places = sets.columns, torch.tensor(sets.offsets), sets.set_rows
        args = z, *targets, row_sums[rows], *places, *head.options, anchors
        if room is None:
            g = kernels.live_grads(*args)
        else:
            g = room(sets.num_rows, sum(n * width for n, width in sets.shapes()))
            if dispatch.lists_live_columns(kernels, z):
                kernels.live_grads_(*args, g)
            else:
                g.copy_(kernels.live_grads(*args))
        yield rows, LiveSets(**vars(sets), g=g, **label_grads.rows(rows)._asdict())


class DxPart(NamedTuple):
    """Rows of dX that lack the product with their sets' tails."""

    sets: LiveSets
    dx: Tensor  # [n, H], where they go
    coef: Tensor | None  # [n], factors of the rows; None for 1
    sums: Tensor | None = None  # [n, H] in float32, the products with the live columns, if they are computed; or dx
    tau: Tensor | None = None  # [n]; sets.g and sets.columns are then empty

    @property
    def held(self) -> int:
        """Elements of 16 bit."""
        apart = self.sums is not None and self.sums is not self.dx
        return self.sets.g.numel() + self.sets.tail.numel() + 2 * apart * self.dx.numel()


class LiveDx:
    """Computes dX [n, H] of the sum of the log-probs for all sets given to `add` or `add_logits`, except for rows of
    exact sets, in the head's dtype or in `Execution.dx_dtype`. num_rows: n, or more.

    q^T W reads the whole weight: it takes 6 ms for 2 sets and 7 ms for 11 (V = 49,152, H = 576, one core). So `write`
    runs once for several chunks, when what is held for it is as large as a chunk of logits, or HELD. The CPU's own
    matmul computes the products with the live columns at once, and what is held is their sums; nothing, if all rows
    are given in one call of `add_logits`.
    """

    def __init__(self, head: Head, num_rows: int) -> None:
        self.head, self.own, self.num_rows = head, dispatch.own_matmuls(head.kernels, head.weight), num_rows
        self.parts: list[DxPart] = []
        # Of the parts: blocks, of which what is not written costs nothing. Tensors of each chunk, and the parts of the
        # heap that they left empty, took 5 to 15 MiB of 75 more for 3,202 rows of 576 x 49,152.
        self.sums, self.tails = head.weight.new_empty(0), head.weight.new_empty(0)
        self.g = head.weight.new_empty(0)

    @property
    def held_sets(self) -> int:
        return sum(len(part.sets.exact) for part in self.parts)

    @property
    def most(self) -> int | None:
        """Sets at a time, for `live_sets` of a sharded head."""
        return sets_at_a_time() if self.own else None

    @property
    def room(self) -> Callable[[int, int], Tensor] | None:
        """For `live_sets` of a sharded head, if g is not needed after `add`."""
        return self._room if self.own else None

    def _room(self, rows: int, size: int) -> Tensor:
        """[size], for what `rows` rows have live. One buffer for all chunks: with one for each, of different sizes, a
        frozen head needed 125 MiB for 3,202 rows of 576 x 49,152 in place of 91 to 98."""
        if size > self.g.numel():  # the largest possible at once: what is never written costs nothing
            limit = rows * (int(LIVE_LIMIT * self.head.weight.shape[0]) + 1)
            self.g = self.head.weight.new_empty(max(size, limit))
        return self.g[:size]

    def add(self, sets: LiveSets, dx: Tensor, coef: Tensor | None = None) -> None:
        """coef [n]: factors of the rows of dX; None for 1."""
        if not sets.exact:  # no rows
            return
        if self.own is None:
            self._wait(DxPart(sets, dx, coef))
            return
        sums = self._sums_of(sets, dx)
        args = *sets.places, sets.set_rows, self.head.weight, sets.label_columns, sets.label_grads
        self.own.live_sums_(*args, sums)
        tau = torch.cat([g[:, -1] for g in sets.grads()]).to(sums.dtype)
        self._hold(sets, dx, coef, sums, tau)

    def add_logits(
        self, logits: Logits, labels: Tensor, lse: Tensor, found: Found, dx: Tensor, coef: Tensor | None = None
    ) -> None:
        """As `add` of the live sets of a chunk's logits, by the CPU's own matmul. Unless `stores_live_grads`, their
        gradients are nowhere in memory: 3,202 rows of 576 x 49,152 need 51 MiB in place of 59 with a frozen head (two
        cores). Rows of exact sets may be written too: the caller computes them afterwards."""
        columns, weight = found.columns, self.head.weight
        if not columns.exact:  # no rows
            return
        none, tau = weight.new_empty(0), torch.empty_like(lse)
        sets = LiveSets(**vars(columns), g=none, **found.labels._asdict())
        whole = sets.num_rows == self.num_rows  # then the tails of all sets are known, and dX is written at once
        means, factors = (self._means(sets.tail), coef) if whole else (none.float(), None)
        factors = none.float() if factors is None else factors
        out = dx if whole else self._sums_of(sets, dx)
        room = none
        if stores_live_grads(weight.shape[1], len(sets.exact)):
            sizes, most = [n * width for n, width in sets.shapes()], sets_at_a_time()
            size = max(sum(sizes[low:high]) for low, high in chunks(len(sizes), most))
            room = self._room(min(len(lse), most * sets.set_rows), size)
        places, of_rows = (*sets.places[1:], sets.set_rows), (logits.z, labels, lse, found.row_sums)
        head = *self.head.options, logits.anchors, weight, *found.labels
        self.own.live_sums_of_logits_(*of_rows, *places, *head, means, factors, room, out, tau)
        if not whole:
            self._hold(sets, dx, coef, out, tau)

    def _sums_of(self, sets: LiveSets, dx: Tensor) -> Tensor:
        """[n, H] in float32, where the products of the next sets with the live columns go."""
        count, width = sets.tail.shape
        if not self.tails.numel():
            self.tails = sets.tail.new_empty((-(-self.num_rows // sets.set_rows), width))
        if not self.sums.numel() and dx.dtype != torch.float32:
            self.sums = dx.new_empty((self.num_rows, dx.shape[1]), dtype=torch.float32)
        if self.held_sets + count > len(self.tails):  # chunks that are no whole number of sets have more in all
            self.write()
        low = sum(part.sets.num_rows for part in self.parts)
        return dx if dx.dtype == torch.float32 else self.sums[low : low + sets.num_rows]

    def _hold(self, sets: LiveSets, dx: Tensor, coef: Tensor | None, sums: Tensor, tau: Tensor) -> None:
        first, none = self.held_sets, sets.g.new_empty(0)
        all_rows = sets.num_rows == self.num_rows  # then the part's own tails are one block
        tail = sets.tail if all_rows else self.tails[first : first + len(sets.exact)].copy_(sets.tail)
        rest = replace(sets, g=none, columns=sets.columns.new_empty(0), tail=tail)
        self._wait(DxPart(rest, dx, coef, sums, tau))

    def _wait(self, part: DxPart) -> None:
        self.parts.append(part)
        if sum(part.held for part in self.parts) > min(self.head.buffer.numel(), HELD_SUMS if self.own else HELD):
            self.write()

    def _means(self, q: Tensor) -> Tensor:
        """[sets, H]"""
        weight = self.head.weight[: q.shape[1]]
        means = weight.new_empty((len(q), weight.shape[1]), dtype=torch.float32 if self.own else weight.dtype)
        # By the CPU's own matmul 0.7 of the time of torch's rounded product with AMX, else 0.95 to 1.05 (7 x V x 576).
        add_product(means, q, weight, first=True)
        return means / TAIL_UNIT

    def write(self) -> None:
        count, parts, self.parts = self.held_sets, self.parts, []
        if not parts:
            return
        tails = [part.sets.tail for part in parts]
        means = self._means(tails[0] if len(tails) == 1 else self.tails[:count] if self.own else torch.cat(tails))
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
            if part.coef is not None:
                dx.mul_(part.coef[rows, None])
            if part.sums is not part.dx:
                part.dx[rows] = dx

    def by_index(self, sets: LiveSets, means: Tensor, dx: Tensor, coef: Tensor | None) -> None:
        kernels: Any = self.head.kernels
        weight, acc = self.head.weight, library.acc_dtype(dx.dtype)
        coef = weight.new_ones(sets.num_rows, dtype=acc) if coef is None else coef
        args = *sets.places, sets.set_rows, weight, means.to(acc), coef, sets.label_columns, sets.label_grads
        made = kernels.live_dx(*args)
        for rows in sets.exact_rows():
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
            # With coefficients in float32 until they are multiplied, so that it is rounded once.
            out = dx[rows] if coef is None else torch.empty_like(dx[rows], dtype=library.acc_dtype(dx.dtype))
            if sets.label_grads.numel():  # with what the rounding of the labels' g takes away
                lost = sets.label_grads[rows] - sets.label_grads[rows].to(weight.dtype)
                product_from(weight, sets.label_columns[rows].clamp(min=0), lost, live, weights, out)
            else:
                add_product(out, live, weights, first=True)
            if coef is not None:
                dx[rows] = scale_rows(out, coef[rows], dx.dtype)


def take_sets(
    head: Head,
    logits: Logits,
    labels: Tensor,
    lse: Tensor,
    execution: Execution,
    live_dx: LiveDx,
    dx: Tensor,
    coef: Tensor | None = None,
    kept: KeptSets | None = None,
) -> tuple[list[slice], Tensor]:
    """Gives the live sets of a chunk's logits to `live_dx`, unless dx is [0], and to `kept`. Returns the rows of exact
    sets, whose dX is not written, and `Found.filter_sums`.

    coef [n]: factors of the rows of dX; None for 1.
    """
    found = live_columns(head, logits, labels, lse, execution.filter_eps, execution.set_rows)
    if kept is None and live_dx.own and dispatch.lists_live_columns(head.kernels, logits.z):
        if dx.numel():
            live_dx.add_logits(logits, labels, lse, found, dx, coef)
        return found.columns.exact_rows(), found.filter_sums
    turns = (live_dx.room, live_dx.most) if kept is None else (kept.room, None)
    for rows, sets in live_sets(head, logits, labels, lse, found, *turns):
        if dx.numel():
            live_dx.add(sets, dx[rows], None if coef is None else coef[rows])
        if kept is not None:
            kept.add(sets)
    return found.columns.exact_rows(), found.filter_sums


def filtered_chunk(
    head: Head,
    inputs: tuple[Tensor, Tensor, bool, Tensor | None],
    execution: Execution,
    dx: Tensor,
    live_dx: LiveDx,
    kept: KeptSets | None = None,
) -> tuple[RowLogps, Tensor]:
    """The log-probs of a chunk and the sums [3] of its live sets. Unless dx is [0], dX [n, H] of the log-probs' sum is
    written to it: rows of exact sets here, all others by `live_dx`, once it is told to `write`.

    inputs: the arguments of `Head.forward`. kept: receives the live sets.
    """
    labels = inputs[1]
    logits, logps = head.forward(*inputs)
    exact, sums = take_sets(head, logits, labels, logps.lse, execution, live_dx, dx, kept=kept)
    for rows in exact if dx.numel() else ():
        part = logits.rows(rows)
        g, lse = part.z.clone(), logps.lse[rows]  # the logits may be kept for backward
        ones = torch.ones_like(lse)
        head.kernels.token_logps_bwd_(g, labels[rows], lse, ones, *head.options, part.anchors)
        product_dx(head, part._replace(z=g), labels[rows], logps.logp[rows], ones, dx[rows])
    return logps, sums


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
    """`Found.filter_sums` of the whole vocabulary: shares are weighted by the ranks' columns, tails are added."""
    kernels = head.kernels
    if not isinstance(kernels, ShardedKernels):
        return sums
    shares = [columns / head.options.vocab_size for columns in kernels.columns(head.options.vocab_size)]
    weights = torch.tensor([[share, 1.0, share] for share in shares], dtype=sums.dtype)
    return (all_gather(sums, kernels.group) * weights.to(sums.device, non_blocking=True)).sum(0)
