"""Cases of `cpo-kernels check`: live_columns, live_grads and live_sum of a backend, and Triton's products with them."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels import library, reference
from cpo_kernels.check.compare import Backend, Case, Findings, Skip, short
from cpo_kernels.check.tokens import DTYPES, IGNORE


class Shape(NamedTuple):
    rows: int
    vocab: int
    set_rows: int
    softcap: float = 0.0
    scale: float = 1.0
    eps: float = 2.0**-8
    padding: int = 0  # columns behind the vocabulary, NaN
    gap: int = 0  # numbers between rows, NaN
    spread: float = 4.0
    anchored: bool = False


SHAPES = {
    "no rows": Shape(0, 300, 4),
    "one number": Shape(1, 1, 1),
    "one row": Shape(1, 700, 128),
    "one column": Shape(5, 1, 2),
    "fewer rows than a set": Shape(7, 300, 128),
    "last set short, odd sizes": Shape(131, 777, 64, padding=7),
    "sets of 3, more than one tile": Shape(10, 1537, 3, padding=1),
    "rows off 16 bytes": Shape(9, 1031, 4, gap=3),
    "aligned": Shape(16, 1024, 8, gap=16),
    "softcap": Shape(33, 600, 16, softcap=5.0, scale=1.3, padding=24),
    "scale": Shape(12, 520, 5, scale=0.5),
    "large scale": Shape(12, 520, 5, scale=3.0),
    "everything is live": Shape(12, 600, 6, eps=0.0),
    "only labels are live": Shape(12, 600, 6, eps=2.0),
    "sets of one row": Shape(6, 300, 1, eps=2.0**-12),
    "flat rows": Shape(12, 600, 6, spread=0.01),
    "relative logits": Shape(131, 777, 64, padding=7, anchored=True),
    "relative logits, aligned": Shape(16, 1024, 8, gap=16, scale=0.5, anchored=True),
    "relative logits, softcap": Shape(33, 600, 16, softcap=5.0, scale=1.3, padding=24, anchored=True),
}


class LiveRows(NamedTuple):
    logits: Tensor
    labels: Tensor
    lse: Tensor
    anchors: Tensor | None


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> LiveRows:
    """logits with NaN beside the vocabulary, labels (some ignored, some of another shard), lse (one NaN, one -inf)."""
    generator = torch.Generator().manual_seed(0)
    width = shape.vocab + shape.padding
    logits = torch.full((shape.rows, width + shape.gap), math.nan, dtype=dtype)[:, :width]
    values = torch.randn(shape.rows, shape.vocab, generator=generator, dtype=torch.float64) * shape.spread
    labels = torch.randint(shape.vocab, (shape.rows,), generator=generator)
    logits[:, : shape.vocab] = values
    if shape.rows > 4:
        logits[0, : shape.vocab : 3] = -math.inf
        logits[3, : shape.vocab] = -1e4
        logits[4, : shape.vocab] = -1e4
        logits[4, shape.vocab // 2] = 1e4
        labels[1::5] = IGNORE
    if shape.rows > 6:
        labels[5], labels[4] = shape.vocab + 50, -1  # of other shards
        logits[0, labels[0]] = -math.inf
    anchors = None
    u = logits[:, : shape.vocab].double()
    if shape.anchored:
        lacks = torch.randint(-4, 5, (shape.rows,), generator=generator).double()
        column = labels.clamp(0, shape.vocab - 1).masked_fill(labels == IGNORE, 0)
        at_label = u.gather(1, column[:, None]).squeeze(1) * 1.001 + lacks
        u = u + lacks[:, None]
        here = ((labels >= 0) & (labels < shape.vocab)).nonzero().squeeze(1)
        u[here, labels[here]] = at_label[here]
        anchors = torch.stack([lacks, at_label]).to(library.acc_dtype(dtype)).to(device)
    z = u * shape.scale
    if shape.softcap:
        z = shape.softcap * torch.tanh(z / shape.softcap)
    lse = z.logsumexp(1).to(library.acc_dtype(dtype))
    if shape.rows > 6:
        lse[2] = math.nan
    if shape.rows > 9:
        lse[9] = -math.inf
    if device.type == "cpu":
        return LiveRows(logits, labels, lse, anchors)
    storage = torch.full((shape.rows, width + shape.gap), math.nan, dtype=dtype, device=device)  # keeps the gap
    storage[:, :width] = logits.to(device)
    return LiveRows(storage[:, :width], labels.to(device), lse.to(device), anchors)


def places(live: Tensor) -> tuple[Tensor, Tensor]:
    """columns, and offsets on the host, as `live_grads` takes them."""
    offsets = torch.zeros(live.shape[0] + 1, dtype=torch.int64)
    offsets[1:] = live.sum(1).cumsum(0)
    return live.nonzero()[:, 1], offsets


def run_live(kernels: Any, shape: Shape, rows: LiveRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """live, tail, row_sums, and g of the columns that the backend itself took for live."""
    head: Any = (IGNORE, shape.scale, shape.softcap, shape.vocab)
    *given, anchors = rows
    live, tail, row_sums = kernels.live_columns(*given, shape.eps, shape.set_rows, *head, anchors)
    g = kernels.live_grads(*given, row_sums, *places(live), shape.set_rows, *head, anchors)
    return live, tail, row_sums, g


def check_live(backend: Backend, findings: Findings, shape: Shape, dtype: torch.dtype) -> None:
    rows = make(shape, dtype, backend.device)
    oracle: Any = reference  # whose arguments mypy cannot count behind stars
    head: Any = (IGNORE, shape.scale, shape.softcap, shape.vocab)
    live, tail, row_sums, g = run_live(backend.kernels, shape, rows)
    exact: Any = (rows.logits.double(), rows.labels, rows.lse.double())
    exact_anchors = None if rows.anchors is None else rows.anchors.double()
    tolerance = max(backend.tolerance(dtype).logp, 1e-12)  # of sums up to `scale`

    def wanted(eps: float) -> tuple[Tensor, Tensor, Tensor]:
        made: tuple[Tensor, Tensor, Tensor] = oracle.live_columns(
            *exact, eps, shape.set_rows, *head, anchors=exact_anchors
        )
        return made

    surely, at_most = wanted(shape.eps * (1 + 10 * tolerance))[0], wanted(shape.eps * (1 - 10 * tolerance))[0]
    findings.require("live: a column is missing", not bool((surely & ~live).any()))
    findings.require("live: a column too many", not bool((live & ~at_most).any()))
    _, want_tail, want_sums = wanted(shape.eps)
    findings.require("live columns have a tail", not bool(tail[live].any()))
    findings.close("tail_columns", tail[~at_most], want_tail[~at_most], 10 * tolerance, 0.1 * shape.scale)
    findings.close("row_sums", row_sums, want_sums, 10 * tolerance, 0.1 * shape.scale)
    want = oracle.live_grads(*exact, row_sums.double(), *places(live), shape.set_rows, *head, anchors=exact_anchors)
    unit = max(backend.tolerance(dtype).grad, 10 * tolerance)
    if backend.name == "triton" and not backend.on_gpu and dtype == torch.bfloat16:
        unit *= 2  # the interpreter rounds toward zero
    findings.require("dtypes", (tail.dtype, row_sums.dtype, g.dtype) == (rows.lse.dtype, rows.lse.dtype, dtype))
    findings.close("g", g, want, unit, tolerance * shape.scale / unit)
    for name, first, again in zip(
        ("live", "tail", "row_sums", "g"),
        (live, tail, row_sums, g),
        run_live(backend.kernels, shape, rows),
        strict=True,
    ):
        findings.same(f"{name} a second time", again, first)


def check_sum(backend: Backend, findings: Findings, dtype: torch.dtype) -> None:
    """Rows of dW, rounded once: within 2 eps of them, and of the sum of their terms' sizes in the type of the sums.

    tail with rows of its own stride; odd widths, and wide ones; sets that hold no column, and no sets.
    """
    generator = torch.Generator().manual_seed(2)
    for sets, vocab, width in ((1, 1, 1), (3, 50, 33), (5, 131, 64), (2, 70, 7), (4, 70, 520), (3, 9, 301), (0, 9, 40)):
        live = torch.rand(sets, vocab, generator=generator) < 0.3
        live[:1] &= sets != 2
        columns, offsets = places(live.to(backend.device))

        def random(*size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, generator=generator).to(kind).to(backend.device)

        tail, tails = random(sets, vocab + 5)[:, :vocab], random(sets, width, kind=library.acc_dtype(dtype))
        made = random(len(columns), width)
        got = backend.kernels.live_sum(tail, tails, made, columns, offsets)
        want = reference.live_sum(tail.double(), tails.double(), made.double(), columns, offsets)
        findings.require("dtype", got.dtype == dtype)
        sizes = reference.live_sum(tail.abs().double(), tails.abs().double(), made.abs().double(), columns, offsets)
        eps, acc_eps = torch.finfo(dtype).eps, torch.finfo(tails.dtype).eps
        findings.close("rows of dW", got, want, 2 * eps, (sizes * acc_eps / eps).clamp(min=1e-9))
        findings.same("rows of dW a second time", backend.kernels.live_sum(tail, tails, made, columns, offsets), got)


class Product(NamedTuple):
    rows: int
    vocab: int
    hidden: int
    set_rows: int
    share: float  # of live columns
    aligned: bool = False  # 7 live columns modulo 8


PRODUCTS = {
    "sets of 32, odd sizes": Product(70, 301, 41, 32, 0.3),
    "rows of 16 bytes": Product(70, 301, 48, 32, 0.3, aligned=True),
    "one row": Product(1, 9, 8, 128, 0.5),
    "more rows a set than a tile": Product(150, 60, 24, 140, 0.5),
    "more sets than bits of a key": Product(70, 40, 16, 1, 0.2),
    "nothing is live": Product(10, 40, 16, 4, 0.0),
    "everything is": Product(10, 200, 300, 4, 1.0),
    "no rows": Product(0, 40, 16, 4, 0.5),
}
PRODUCT_TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}


def check_products(backend: Backend, findings: Findings, shape: Product, dtype: torch.dtype) -> None:
    """live_dx and live_dw_ against products of the float64 values of what they are given."""
    if backend.name != "triton":
        raise Skip("the products with live columns are Triton's")
    if dtype == torch.bfloat16 and not backend.on_gpu:
        raise Skip("Triton's interpreter takes the bits of bfloat16 for integers in products")
    from cpo_kernels.kernels.live_matmul import live_dw_, live_dx

    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(backend.device)

    acc = library.acc_dtype(dtype)
    sets = -(-shape.rows // shape.set_rows)
    live = torch.rand(sets, shape.vocab, generator=generator) < shape.share
    if sets > 2:
        live[1] = False
    if shape.aligned:
        missing = 7 - live.sum(1, keepdim=True) % 8
        live |= (~live) & ((~live).cumsum(1) <= missing)
    columns, offsets = places(live.to(backend.device))
    x, weight = random(shape.rows, shape.hidden), random(shape.vocab, shape.hidden)
    tail, coef, known = (random(*size).to(acc) for size in ((sets, shape.hidden), (shape.rows,), (shape.rows,)))
    labels = torch.randint(-1, shape.vocab, (shape.rows,), generator=generator).to(backend.device)  # -1: none
    parts = [random(len(rows), int(live[k].sum()) + 1) for k, rows in enumerate(x.split(shape.set_rows)) if len(rows)]
    g = torch.cat([part.flatten() for part in parts]) if parts else x.new_empty(0)
    ids, tolerance = columns.split(offsets.diff().tolist()), PRODUCT_TOLERANCES[dtype]
    dw = random(shape.vocab, shape.hidden).to(acc)
    want_dx, want_dw, again = torch.empty_like(x, dtype=torch.float64), dw.double().clone(), dw.clone()
    for k, part in enumerate(parts):
        rows = slice(k * shape.set_rows, (k + 1) * shape.set_rows)
        want_dx[rows] = part.double() @ torch.cat([weight[ids[k]].double(), tail[k : k + 1].double()])
        want_dw[ids[k]] += part[:, :-1].double().T @ x[rows].double()
    known = 1000 * known  # so that what its rounding takes is seen beside the sums
    lost = torch.where(labels >= 0, known.double() - known.to(dtype).double(), 0.0)
    with_labels = want_dx + lost[:, None] * weight[labels.clamp(min=0)].double()
    for given, want in (((labels, known), with_labels), ((labels[:0], known[:0]), want_dx)):
        dx = live_dx(g, columns, offsets, shape.set_rows, weight, tail, coef, *given)
        want = coef[:, None].double() * want
        findings.close("dx", dx, want, tolerance, float(want.abs().max()) if shape.rows else 1.0)
    live_dw_(g, columns, offsets, shape.set_rows, x, dw)
    findings.close("dw", dw, want_dw, max(1e-13, min(tolerance, 1e-5)), float(want_dw.abs().max()))
    live_dw_(g, columns, offsets, shape.set_rows, x, again)
    findings.same("dw a second time", again, dw)


def live_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, shape in SHAPES.items():
            run = partial(check_live, shape=shape, dtype=dtype)
            yield Case(f"live/{short(dtype)}/{name}", run, quick=dtype in (torch.bfloat16, torch.float32))
        yield Case(f"live/{short(dtype)}/sum", partial(check_sum, dtype=dtype), quick=dtype == torch.bfloat16)
        for name, product in PRODUCTS.items():
            run_product = partial(check_products, shape=product, dtype=dtype)
            yield Case(f"live products/{short(dtype)}/{name}", run_product, quick=dtype == torch.bfloat16)
