"""The head's inputs, validated once, and the logits of one chunk of rows at a time.

Rows without a label are dropped before the first matmul. The vendor's library computes the matmuls, on some CPUs our
own (`dispatch.own_matmuls`); between them the kernels of a backend work in place.
"""

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cpo_kernels import checks, library
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import Backend, VocabShards, columns_here, columns_of
from cpo_kernels.checks import check_dtype, check_head_order, check_label_range, check_labels, check_types
from cpo_kernels.head.matmul import own_sums, product
from cpo_kernels.head.relative import Net, is_relative, label_logits, make_anchors, make_net
from cpo_kernels.head.strategy import (
    SET_ROWS,
    Limits,
    chunks,
    limits,
    resolve_filter,
    row_stride,
    whole_sets,
)
from cpo_kernels.head.vocab_parallel import local_head
from cpo_kernels.library import Kernels
from cpo_kernels.ops.token_logps import HeadOptions, head_options


class HeadConfig(NamedTuple):
    """The options of a head, as the public functions take them. See `linear_token_logps`."""

    ignore_index: int
    softcap: float | None
    scale: float
    vocab_size: int | None
    memory_budget: int | None
    filter_eps: float | str | None = None
    filter_head_grad: bool = False


class HeadTensors(NamedTuple):
    """The inputs of the head, flattened to rows."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]; this rank's rows if the vocabulary is sharded
    bias: Tensor  # [V] or [0]
    labels: Tensor  # [M]


class Needs(NamedTuple):
    """Which gradients are needed: those of hidden, weight, bias."""

    dx: bool
    dw: bool
    db: bool

    @property
    def head(self) -> bool:
        return self.dw or self.db


class Execution(NamedTuple):
    """How a head runs: rows of logits per chunk, the backend, and which gradients are filtered."""

    limits: Limits
    backend: Backend
    filter_eps: float = 0.0  # 0: exact
    filter_head_grad: bool = False

    @property
    def set_rows(self) -> int:
        """Rows that share one set of live columns."""
        return min(SET_ROWS, self.limits.budget)

    def pieces(self, count: int, limit: int | None = None) -> list[slice]:
        """The rows of a chunk in turns of at most `limit` (None: `limits.chunk`): relative logits and live sets hold
        what they need for one piece. 1383 rows of 576 x 49,152 with a filtered dX peaked at 202 MiB in place of 223,
        in the same time."""
        step = whole_sets(count, limit or self.limits.chunk, self.set_rows if self.filter_eps else 0)
        return [slice(low, high) for low, high in chunks(count, step)] or [slice(0, 0)]

    def rows_with_reference(self, max_rows: int) -> int:
        """Rows of the buffer that chunks of `max_rows` rows share with a reference model's, if they are one piece."""
        one = len(self.pieces(max_rows, self.limits.piece)) == 1
        return max(max_rows, min(2 * max_rows, self.limits.budget)) if one else max_rows

    def step(self, count: int, adds_dw: bool) -> int:
        """Rows per chunk; a multiple of `set_rows` if gradients are filtered. adds_dw: dW is summed over chunks."""
        limit = self.limits.sum.of(count) if adds_dw else self.limits.chunk
        return whole_sets(count, limit, self.set_rows if self.filter_eps else 0)

    def dx_dtype(self, weight: Tensor) -> torch.dtype:
        """Of a filtered dX whose coefficients are not known yet: float32 where the CPU's own matmuls compute it, so
        that it is rounded once, after the multiplication by them."""
        own = self.filter_eps > 0 and dispatch.own_matmuls(self.backend.kernels(weight), weight) is not None
        return library.acc_dtype(weight.dtype) if own else weight.dtype

    def skips_logits(self, weight: Tensor, options: HeadOptions) -> bool:
        """Whether log-probs alone are computed without storing logits."""
        return dispatch.unstored_logps(self.backend.kernels(weight), weight, options.softcap) is not None

    def head(self, tensors: HeadTensors, labels: Tensor, options: HeadOptions, max_rows: int) -> "Head":
        """labels: of all rows, of which chunks are computed."""
        kernels = self.backend.kernels(tensors.weight)
        return Head(tensors.weight, tensors.bias, labels, options, max_rows, kernels, self.filter_eps > 0)


@dataclass(frozen=True)
class HeadInputs:
    """Validated inputs of the head."""

    tensors: HeadTensors
    options: HeadOptions
    limits: Limits
    width: int  # columns of logits that the limits assume: V, or those of the largest shard
    shards: VocabShards | None
    filter_eps: float = 0.0  # 0: exact
    filter_head_grad: bool = False

    def execution(self, impl: str) -> Execution:
        return Execution(
            self.limits,
            Backend.of(impl, self.shards),
            self.filter_eps,
            self.filter_head_grad,
        )

    @property
    def keeps_live_sets(self) -> bool:
        """Whether the forward pass keeps the live sets, from which backward computes the gradients of any loss."""
        return self.filter_eps > 0 and self.filter_head_grad and self.needs.head

    @property
    def filters(self) -> bool:
        """Whether a gradient that is needed is filtered."""
        return self.keeps_live_sets or (self.filter_eps > 0 and self.needs.dx)

    @property
    def needs(self) -> Needs:
        wanted = torch.is_grad_enabled()
        return Needs(*(wanted and t.requires_grad for t in self.tensors[:3]))


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    config: HeadConfig,
    vocab_shards: VocabShards | None = None,
) -> HeadInputs:
    """Validate the arguments of a public function and, under autocast, cast them as F.linear would."""
    library.refuse_transforms()
    check_types("a tensor", hidden=hidden, weight=weight, labels=labels)
    check_types("a tensor", optional=True, bias=bias)
    hidden, weight, bias, shards = local_head(hidden, weight, bias, vocab_shards)
    check_head_order(hidden, weight, labels)
    if weight.dim() != 2 or weight.shape[1] == 0 or (weight.shape[0] == 0 and shards is None):
        raise ValueError(f"weight must have shape [V, H] with V and H >= 1, got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., H] with H = {weight.shape[1]}, the width of weight "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_labels(labels, hidden.shape[:-1], "hidden", hidden.device)
    device = hidden.device.type
    named = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        check_dtype(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: move one of them")
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # not on meta tensors
        dtype = torch.get_autocast_dtype(device)
        named = {n: t if t.dtype == torch.float64 else t.to(dtype) for n, t in named.items()}
    if len({t.dtype for t in named.values()}) != 1:
        dtypes = ", ".join(f"{n} {t.dtype}" for n, t in named.items())
        raise TypeError(f"hidden, weight and bias must share one dtype, got {dtypes}: cast them or use autocast")
    weight = named["weight"]
    width = weight.shape[0] if shards is None else max(shards.rows)
    columns = shards.vocab_size if shards else width
    options = head_options(columns, config.ignore_index, config.softcap, config.scale, config.vocab_size)
    if shards is None and checks.may_read(labels):  # sharded ranks first agree on the error, so that none hangs
        check_label_range(labels, options.ignore_index, options.vocab_size)
    rows = named["hidden"].reshape(-1, weight.shape[1])
    tensors = HeadTensors(rows, weight, named.get("bias", weight.new_empty(0)), labels.reshape(-1))
    own = shards is None and own_sums(weight.device, weight.dtype)  # ranks whose CPUs differ take the same chunks
    eps = resolve_filter(config.filter_eps, config.filter_head_grad, weight.dtype)
    place = weight.dtype, weight.device, config.memory_budget
    rows_at_a_time = limits(width, weight.shape[1], *place, own, False)
    inputs = HeadInputs(tensors, options, rows_at_a_time, width, shards, eps, config.filter_head_grad)
    if eps and inputs.needs.dx and not inputs.keeps_live_sets:
        return replace(inputs, limits=limits(width, weight.shape[1], *place, own, True))
    return inputs


def check_index(index: Tensor | None, labels: Tensor, ignore_index: int) -> None:
    """A repeated position would count twice in dW, and a labelled one that is missing would drop out of the loss."""
    if index is None:
        return
    check_types("a tensor", index=index)
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != labels.device:
        raise ValueError(
            f"index must be int64 of shape [n] on {labels.device}, got {index.dtype} {list(index.shape)} on "
            f"{index.device}"
        )
    if not checks.may_read(index):
        return
    if bool(((index < 0) | (index >= labels.numel())).any()):
        raise ValueError(f"index must lie in [0, {labels.numel()}), got {int(index.min())} to {int(index.max())}")
    labels, times = labels.flatten(), torch.bincount(index, minlength=labels.numel())
    if bool((times > 1).any()):
        p = int(times.argmax())
        raise ValueError(f"index holds position {p} {int(times[p])} times: give each position once")
    missing = (times == 0) & (labels != ignore_index)
    if bool(missing.any()):
        p = int(missing.nonzero()[0])
        raise ValueError(f"index lacks position {p}, whose label is {int(labels[p])}: give all positions with a label")


@dataclass
class Rows:
    """The projected rows of a batch, in the order of the chunks."""

    index: Tensor  # [n] positions in the full layout
    x: Tensor  # [n, H]
    labels: Tensor  # [n]
    full: bool  # every position is a row, in order: index is the identity

    def gather(self, values: Tensor) -> Tensor:
        """[M, ...] -> [n, ...]"""
        return values.contiguous() if self.full else values.index_select(0, self.index)

    def scatter(self, values: Tensor, size: int) -> Tensor:
        """[n, ...] -> [size, ...] with zeros at the positions that are not rows."""
        if self.full:
            return values
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, self.index, values)


def gather_rows(tensors: HeadTensors, index: Tensor, full: bool, ignore_index: int | None = None) -> Rows:
    """ignore_index: given if some rows may have no label. Their hidden states, which may hold anything, are zeroed."""
    hidden, labels = tensors.hidden, tensors.labels
    x = hidden.contiguous() if full else hidden.index_select(0, index)
    labels = labels if full else labels.index_select(0, index)
    if ignore_index is not None:
        x = x.masked_fill((labels == ignore_index)[:, None], 0.0)
    return Rows(index, x, labels, full)


def labelled_index(labels: Tensor, ignore_index: int, count: int) -> Tensor:
    """[count] positions of the labels. The caller knows their number, so no host-device synchronisation is needed."""
    return torch.nonzero_static(labels != ignore_index, size=count).squeeze(1)


def labelled_rows(tensors: HeadTensors, ignore_index: int, index: Tensor) -> Rows:
    """The rows at `index` [n]; if that is [0] all labelled rows, which forces a host-device synchronisation."""
    given = index.numel() > 0
    if not given:
        index = (tensors.labels != ignore_index).nonzero().squeeze(1)
    return gather_rows(tensors, index, index.shape[0] == tensors.labels.shape[0], ignore_index if given else None)


class RowLogps(NamedTuple):
    """Results of a chunk of n rows."""

    logp: Tensor  # [n]
    lse: Tensor  # [n]
    extra: Tensor  # [4, n] or [0]
    ref_logp: Tensor  # [n], the log-probs of a reference model's rows through the same head, or [0]
    lacks: Tensor  # [n], the constant subtracted from the 16-bit logits of each row, or [0]

    @classmethod
    def joined(cls, chunks: "list[RowLogps]") -> "RowLogps":
        return chunks[0] if len(chunks) == 1 else cls(*(torch.cat(c, dim=-1) for c in zip(*chunks, strict=True)))


class Logits(NamedTuple):
    """Logits of a chunk, less a constant of each row. See `head.relative`."""

    z: Tensor  # [n, V]
    anchors: Tensor | None  # [2, n]

    @property
    def lacks(self) -> Tensor:
        """[n] for 16-bit logits (0 if this rank has no columns), else [0]."""
        if self.anchors is not None:
            return self.anchors[0]
        size = self.z.shape[0] if is_relative(self.z.dtype) else 0
        return self.z.new_zeros(size, dtype=library.acc_dtype(self.z.dtype))

    def rows(self, part: slice) -> "Logits":
        if part == slice(None) or part == slice(0, self.z.shape[0]):
            return self
        return Logits(self.z[part], None if self.anchors is None else self.anchors[:, part].contiguous())


class Head:
    """One head during one op. It computes the logits of each chunk in one buffer of `max_rows` rows. labels: of all
    rows of the op. filtered: live gradients are held beside the buffer."""

    def __init__(
        self, weight: Tensor, bias: Tensor, labels: Tensor, options: HeadOptions, max_rows: int, kernels: Kernels,
        filtered: bool = False,
    ) -> None:  # fmt: skip
        self.weight, self.bias, self.labels, self.options, self.kernels = weight, bias, labels, options, kernels
        stride = row_stride(weight.shape[0], weight.dtype, weight.device)
        if filtered:
            self.buffer = dispatch.new_block(weight, max_rows, stride)
        else:
            self.buffer = dispatch.prefer_huge_pages(weight.new_empty(max_rows, stride))

    def rows(self, count: int) -> Tensor:
        """[count, V], what the buffer holds of the first rows."""
        return self.buffer[:count, : self.weight.shape[0]]

    def at(self, rows: slice) -> "Head":
        """The same head with these rows of the buffer as its own."""
        if is_relative(self.weight.dtype):
            _ = self.net  # made once for all parts
        part = copy(self)
        part.buffer = self.buffer[rows]
        return part

    @cached_property
    def net(self) -> Net | None:
        """See `relative`; None if this rank has no columns, or the op no rows."""
        _, first, count = columns_here(self.kernels, self.options.vocab_size)
        if count <= 0 or not self.labels.numel():
            return None
        columns = columns_of(self.labels, self.options.ignore_index, first, count)[0].clamp(min=0)
        return make_net(columns, self.weight, self.bias, count)

    def anchors(self, x: Tensor, labels: Tensor, lacks: Tensor | None = None) -> Tensor | None:
        """[2, n] for 16-bit logits; None if no constant is subtracted. lacks [n] or [0]: `RowLogps.lacks` of an earlier
        pass over the same rows, to compute the same logits again (those of the labels but for the order of sums)."""
        kernels, first, count = columns_here(self.kernels, self.options.vocab_size)
        if not is_relative(x.dtype) or not x.shape[0] or count <= 0:
            return None
        columns = columns_of(labels, self.options.ignore_index, first, count)[0].clamp(min=0)
        if lacks is None:
            assert self.net is not None
            weights, room = (self.weight, self.bias), self.buffer.reshape(-1)
            return make_anchors(x, *weights, columns, self.net, self.options, kernels, room)
        return torch.stack([lacks, label_logits(x, self.weight, self.bias, columns)])

    def logits(self, x: Tensor, labels: Tensor) -> Logits:
        """The logits of x [n, H] with labels [n]; valid until the next call."""
        anchors = self.anchors(x, labels)
        return Logits(self.columns(x, slice(None), anchors), anchors)

    def with_reference(self, x: Tensor, labels: Tensor, ref: Tensor | None) -> tuple[Logits, Tensor]:
        """Logits of x, and log-probs [n] of a reference model's rows through the same head ([0] without ref).

        One matmul computes both if the buffer holds them: a few rows do not fill the device, many rows do.
        The rounding of both is the same, so that equal rows have equal log-probs.
        """
        n = x.shape[0]
        if ref is None:
            return self.logits(x, labels), self.weight.new_empty(0, dtype=library.acc_dtype(self.weight.dtype))
        if 2 * n <= self.buffer.shape[0]:
            z, anchors = self.logits(torch.cat([x, ref]), torch.cat([labels, labels]))
            own, others = (None, None) if anchors is None else (part.contiguous() for part in anchors.split(n, 1))
            return Logits(z[:n], own), self.kernels.token_logps_fwd(z[n:], labels, *self.options, False, others)[0]
        z, anchors = self.logits(ref, labels)
        ref_logp = self.kernels.token_logps_fwd(z, labels, *self.options, False, anchors)[0]
        return self.logits(x, labels), ref_logp

    def unstored(self, x: Tensor, labels: Tensor) -> RowLogps | None:
        """Log-probs as from `forward`, to the order of sums, without storing logits; None if they must be stored."""
        ignore_index, scale, softcap, vocab_size = self.options
        own = dispatch.unstored_logps(self.kernels, self.weight, softcap)
        anchors = self.anchors(x, labels) if own else None
        if own is None or anchors is None:  # no AMX, or no rows
            return None
        head = self.weight, self.bias, labels, ignore_index, scale, vocab_size
        logp, lse = own.linear_token_logps_fwd(x, *head, anchors)
        return RowLogps(logp, lse, lse.new_empty(0), lse.new_empty(0), anchors[0].clone())

    def logps(self, x: Tensor, labels: Tensor, extras: bool = False, ref: Tensor | None = None) -> RowLogps:
        """As `forward`, if nothing will read the logits in the buffer."""
        own = None if extras else self.unstored(x, labels)
        if own is None:
            return self.forward(x, labels, extras, ref)[1]
        of_ref = None if ref is None else self.unstored(ref, labels)
        return own if of_ref is None else own._replace(ref_logp=of_ref.logp)

    def forward(
        self, x: Tensor, labels: Tensor, extras: bool = False, ref: Tensor | None = None
    ) -> tuple[Logits, RowLogps]:
        """The logits, valid until the next call, and the log-probs."""
        logits, ref_logp = self.with_reference(x, labels, ref)
        out = self.kernels.token_logps_fwd(logits.z, labels, *self.options, extras, logits.anchors)
        return logits, RowLogps(*out, ref_logp, logits.lacks)

    def fused(
        self, x: Tensor, labels: Tensor, extras: bool = False, ref: Tensor | None = None
    ) -> tuple[Logits, RowLogps]:
        """g = (onehot - softmax) * dz/du in the place of the logits, and the log-probs."""
        logits, ref_logp = self.with_reference(x, labels, ref)
        out = self.kernels.token_logps_fused_(logits.z, labels, *self.options, extras, logits.anchors)
        return logits, RowLogps(*out, ref_logp, logits.lacks)

    def columns(self, x: Tensor, part: slice, anchors: Tensor | None) -> Tensor:
        """Logits [n, v] of x [n, H] in some columns, less the constants in `anchors`. They are in the buffer unless
        even one column of all rows exceeds it."""
        n, weight = x.shape[0], self.weight[part]
        stride = row_stride(weight.shape[0], weight.dtype, weight.device)
        size = n * stride
        flat = self.buffer.view(-1) if size <= self.buffer.numel() else self.buffer.new_empty(size)
        out = flat[:size].view(n, stride)[:, : weight.shape[0]]
        own = dispatch.own_matmuls(self.kernels, weight)
        if own and x.shape[1] % 2 == 0:
            lacks = self.weight.new_empty(0) if anchors is None else anchors[0]
            own.logits_(x, weight, self.bias[part], lacks, out)
            return out
        bias = self.bias[part] if self.bias.numel() else None
        return product(x, weight.t(), out, bias, None if anchors is None else anchors[0])
