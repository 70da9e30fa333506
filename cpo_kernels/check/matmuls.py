"""Cases of `cpo-kernels check`: the CPU's own matmuls in bfloat16, against float64. Each result is rounded once."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.check.compare import Backend, Case, Findings, Skip, threads
from cpo_kernels.check.live import places

ROUNDING = 2.0**-8  # a unit in the last place, twice what rounding to nearest may take
SUMS = 1e-6  # of the size of the sums, which are float32


def own_matmuls(backend: Backend) -> Any:
    own = dispatch.own_matmuls(backend.kernels, torch.empty(0, dtype=torch.bfloat16, device=backend.device))
    if own is None:
        raise Skip("the CPU kernels' own matmuls need AVX512_BF16")
    return own


def random(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator).bfloat16()


def same_on_any_threads(findings: Findings, what: str, compute: Callable[[], Tensor]) -> Tensor:
    first = compute()
    for count in (1, 3):
        with threads(count):
            findings.same(f"{what} on {count} threads", compute(), first)
    return first


class Logits(NamedTuple):
    rows: int
    hidden: int
    columns: int
    gap: int = 0  # numbers between rows of the result, and before the first
    bias: bool = True
    lacks: bool = True


LOGITS = {
    "one number": Logits(1, 2, 1),
    "no rows": Logits(0, 8, 40),
    "one panel, one group": Logits(64, 64, 32, bias=False),
    "odd sizes": Logits(67, 38, 101),
    "several tasks": Logits(130, 34, 1000, lacks=False),
    "rows off 64 bytes": Logits(70, 16, 300, gap=3),
    "a long sum": Logits(5, 2090, 70, gap=32),
    "nothing to add": Logits(9, 16, 33, bias=False, lacks=False),
    "rows of the weight 2 kB apart": Logits(40, 1024, 70),
    "three parts of the sum": Logits(97, 1500, 600),
}


def check_logits(backend: Backend, findings: Findings, shape: Logits) -> None:
    own, generator = own_matmuls(backend), torch.Generator().manual_seed(0)
    x, weight = random(generator, shape.rows, shape.hidden), random(generator, shape.columns, shape.hidden)
    bias = random(generator, shape.columns) if shape.bias else x.new_empty(0)
    bias[: shape.columns // 3] = -math.inf  # masked
    lacks = 5 * torch.randn(shape.rows, generator=generator) if shape.lacks else torch.empty(0)

    def compute() -> Tensor:
        numbers = torch.full((shape.rows, shape.columns + shape.gap), math.nan, dtype=torch.bfloat16)
        out = numbers[:, shape.gap :]
        own.logits_(x, weight, bias, lacks, out)
        findings.require("a number beside the result was written", bool(numbers[:, : shape.gap].isnan().all()))
        return out

    want, size = x.double() @ weight.double().T, x.abs().double() @ weight.abs().double().T
    want = want + (bias.double() if shape.bias else 0) - (lacks.double()[:, None] if shape.lacks else 0)
    got = same_on_any_threads(findings, "logits", compute)
    findings.close("logits", got, want, ROUNDING, SUMS * (size + 20) / ROUNDING)


def check_odd_hidden_size(backend: Backend, findings: Findings) -> None:
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    nothing = x.new_empty(0)
    call = partial(own_matmuls(backend).logits_, x, x, nothing, nothing.float(), x.new_empty(2, 2))
    findings.refuses("an odd hidden size", call, "hidden size must be even and positive, got 3")


def check_overlapping_rows(backend: Backend, findings: Findings) -> None:
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    nothing = x.new_empty(0)
    call = partial(own_matmuls(backend).logits_, x, x, nothing, nothing.float(), x.new_empty(1, 2).expand(2, 2))
    findings.refuses("overlapping rows", call, "rows of out must not overlap, got row stride 0 for 2 columns")


def unstored(backend: Backend) -> Any:
    own_matmuls(backend)
    if not dispatch.cpu_has_tiles():
        raise Skip("log-probs without stored logits need AMX")
    return backend.kernels


class Unstored(NamedTuple):
    rows: int
    hidden: int
    columns: int
    padding: int = 0  # columns beyond the vocabulary
    bias: bool = False
    scale: float = 1.0
    size: float = 1.0  # of the logits
    gap: int = 0  # numbers between rows of the weight, and before the first


UNSTORED = {
    "one number": Unstored(1, 2, 1),
    "no rows": Unstored(0, 8, 40),
    "one block": Unstored(32, 64, 32),
    "odd sizes": Unstored(67, 38, 101, padding=7, bias=True, scale=0.7),
    "several tasks": Unstored(130, 576, 2100, bias=True, size=8.0),
    "extreme logits": Unstored(40, 64, 700, size=3e4, scale=2.0),
    "a row of the weight off 64 bytes": Unstored(33, 66, 130, gap=3),
    "rows of the weight 2 kB apart": Unstored(40, 1024, 70, size=4.0),
    "three parts of the sum": Unstored(97, 1500, 600, bias=True, size=4.0),
}


def check_unstored(backend: Backend, findings: Findings, shape: Unstored) -> None:
    """As `token_logps_fwd` on stored logits, but for the order of sums."""
    kernels, generator = unstored(backend), torch.Generator().manual_seed(3)
    rows, columns = shape.rows, shape.columns
    x = random(generator, rows, shape.hidden)
    numbers = torch.full((columns + shape.padding, shape.hidden + shape.gap), math.nan, dtype=torch.bfloat16)
    weight = numbers[:, shape.gap :]
    weight[:columns] = random(generator, columns, shape.hidden) * (shape.size / shape.hidden**0.5)
    bias = random(generator, columns + shape.padding) if shape.bias else x.new_empty(0)
    bias[: columns // 3] = -math.inf  # masked
    labels = torch.randint(columns // 3, columns, (rows,), generator=generator)
    lacks = (shape.size * torch.randn(rows, generator=generator)).bfloat16().float()
    exact = (x.float() * weight[labels].float()).sum(1) + (bias[labels].float() if shape.bias else 0.0)
    labels[2::5] = -7  # ignored
    options = -7, shape.scale
    compare_unstored(findings, kernels, (x, weight, bias, labels, *options, columns), torch.stack([lacks, exact]))


def compare_unstored(findings: Findings, kernels: Any, head: tuple[Any, ...], anchors: Tensor, what: str = "") -> None:
    x, weight, bias, labels, ignore_index, scale, columns = head

    def compute() -> Tensor:
        return torch.stack(kernels.linear_token_logps_fwd(*head, anchors))

    got = same_on_any_threads(findings, f"log-probs and log-sum-exp{what}", compute)
    stored = torch.empty(len(x), len(weight), dtype=torch.bfloat16)
    kernels.logits_(x, weight, bias, anchors[0], stored)
    want = kernels.token_logps_fwd(stored, labels, ignore_index, scale, 0.0, columns, False, anchors)
    for name, values, wanted in zip(("log-probs", "log-sum-exp"), got, want, strict=False):
        findings.close(f"{name}{what}", values.nan_to_num(1.5, 2.5, 3.5), wanted.nan_to_num(1.5, 2.5, 3.5), 1e-6)
        findings.same(f"{name}{what}, finite", values.isfinite(), wanted.isfinite())


def check_unstored_infinities(backend: Backend, findings: Findings) -> None:
    kernels = unstored(backend)
    x = torch.zeros(6, 32, dtype=torch.bfloat16)
    x[:, 0] = torch.tensor([1.0, 1.0, math.nan, -1.0, 0.5, 1.0])
    weight = torch.zeros(600, 32, dtype=torch.bfloat16)
    weight[:, 0] = torch.arange(600) % 3
    labels = torch.tensor([2, 1, 2, 5, 599, 3])
    # columns that are masked, the bias of the others, and of one that is no label
    for masked, others, one in itertools.product((0, 590, 600), (0.0, -2e3, 1e10), (0.0, math.inf, 1e30, -1e30)):
        bias = torch.full((600,), others, dtype=torch.bfloat16)
        bias[:masked] = -math.inf
        bias[598] += one
        exact = x[:, 0].float() * weight[labels, 0].float() + bias[labels].float()
        anchors = torch.stack([torch.tensor([0.0, 1.0, 0.0, -2.0, 0.5, 8.0]), exact])
        what = f", {masked} masked, others {others}, one {one}"
        compare_unstored(findings, kernels, (x, weight, bias, labels, -100, 1.0, 600), anchors, what)


def check_unstored_refusals(backend: Backend, findings: Findings) -> None:
    op, x = unstored(backend).linear_token_logps_fwd, torch.zeros(2, 4, dtype=torch.bfloat16)
    none, labels = x.new_empty(0), torch.zeros(2, dtype=torch.int64)
    refusals: dict[str, tuple[tuple[Any, ...], str]] = {
        "an odd hidden size": (
            (x[:, :3], x[:, :3], none, labels, -1, 1.0, 2),
            "hidden size must be even and positive, got 3",
        ),
        "float32": ((x.float(), x, none, labels, -1, 1.0, 2), "x must be bfloat16, got float32"),
        "a label beyond the vocabulary": ((x, x, none, labels + 1, -1, 1.0, 1), "label 1 at row 0 is out of range"),
        "a vocabulary larger than the head": ((x, x, none, labels, -1, 1.0, 3), r"vocab_size must be in \[1, 2\]"),
        "a scale of 0": ((x, x, none, labels, -1, 0.0, 2), "scale must be a positive number, got 0"),
        "a bias of another size": ((x, x, x[0], labels, -1, 1.0, 2), r"bias must have shape \[2\], got \[4\]"),
    }
    for what, (args, pattern) in refusals.items():
        findings.refuses(what, partial(op, *args, torch.zeros(2, 2)), pattern)
    call = partial(op, x, x, none, labels, -1, 1.0, 2, torch.zeros(2, 3))
    findings.refuses("anchors of other rows", call, r"anchors must have shape \[2, 2\], got \[2, 3\]")


class Sets(NamedTuple):
    rows: int
    vocab: int
    hidden: int
    set_rows: int
    share: float  # of live columns, besides the labels
    labels: bool = True


SETS = {
    "odd sizes": Sets(70, 301, 41, 32, 0.3),
    "one row": Sets(1, 9, 8, 128, 0.5),
    "a short last set": Sets(150, 60, 24, 140, 0.5),
    "sets of one row": Sets(70, 40, 16, 1, 0.2),
    "only labels are live": Sets(10, 40, 16, 4, 0.0),
    "nothing is live": Sets(10, 40, 16, 4, 0.0, labels=False),
    "everything is live": Sets(10, 200, 330, 4, 1.0),
    "no rows": Sets(0, 40, 16, 4, 0.5),
    "several tasks": Sets(131, 1300, 700, 64, 0.5),
    "a wide head": Sets(70, 2100, 1090, 32, 0.6),
    "several blocks": Sets(131, 2600, 700, 64, 0.6),
}


def check_live(backend: Backend, findings: Findings, shape: Sets) -> None:
    own, generator = own_matmuls(backend), torch.Generator().manual_seed(1)
    rows, vocab = shape.rows, shape.vocab
    labels = torch.randint(-1, vocab, (rows,), generator=generator)  # -1: none
    set_of = torch.arange(rows) // shape.set_rows
    live = torch.rand(-(-rows // shape.set_rows), vocab, generator=generator) < shape.share
    if shape.labels:
        live[set_of[labels >= 0], labels[labels >= 0]] = True
    columns, offsets = places(live)
    x, weight = random(generator, rows, shape.hidden), random(generator, vocab, shape.hidden)
    tails = torch.randn(len(live), shape.hidden, generator=generator)
    tail, coef = random(generator, len(live), vocab), torch.randn(rows, generator=generator)
    given = (labels, torch.rand(rows, generator=generator)) if shape.labels else (labels[:0], coef[:0])
    stored = random(generator, rows, vocab) * live[set_of]
    if shape.labels:
        here = labels >= 0
        stored[here, labels[here]] = given[1][here].bfloat16()
    tau = random(generator, rows)
    parts = [torch.cat([stored[t, live[set_of[t]]], tau[t : t + 1]]) for t in range(rows)]
    g = torch.cat(parts) if parts else x.new_empty(0)

    exact, scaled = stored.double(), (coef[:, None] * x.float()).bfloat16().double()
    want_dw = tail.double().T @ tails.double() + exact.T @ scaled
    if shape.labels:  # exactly known: the gradients of labels, and the products with them
        exact[here, labels[here]] = given[1][here].double()
        lost = exact[here, labels[here]][:, None] * coef[here, None].double() * x[here].double()
        lost -= stored[here, labels[here]][:, None].double() * scaled[here]
        want_dw.index_add_(0, labels[here], lost)
    want_sums, sets = exact @ weight.double(), (g, columns, offsets, shape.set_rows)

    def sums_of() -> Tensor:
        out = torch.full((rows, shape.hidden), math.nan)
        own.live_sums_(*sets, weight, *given, out)
        return out

    sums = same_on_any_threads(findings, "sums", sums_of)
    findings.close("sums", sums, want_sums, SUMS, exact.abs() @ weight.double().abs() + 1e-3)
    dw = same_on_any_threads(findings, "dW", lambda: own.live_dw(*sets, x, coef, tail, tails, *given, vocab + 3))
    want_dw = torch.nn.functional.pad(want_dw, (0, 0, 0, 3))  # padding
    findings.close("dW", dw, want_dw, ROUNDING, 30 * SUMS / ROUNDING * float(want_dw.abs().max()) if rows else 1.0)


def check_live_of_logits(
    backend: Backend, findings: Findings, shape: Sets, softcap: float = 0.0, relative: bool = True
) -> None:
    """live_sums_of_logits_: what live_grads and live_sums_ make of the same logits, to the bit, for any number of
    threads and any number of sets in `room`; and dX. relative: with anchors."""
    own, generator = own_matmuls(backend), torch.Generator().manual_seed(4)
    rows, vocab = shape.rows, shape.vocab
    logits, weight = 3 * random(generator, rows, vocab + 3), random(generator, vocab, shape.hidden + 2)[:, 2:]
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::7] = -100
    set_of, counted = torch.arange(rows) // shape.set_rows, labels != -100
    live = torch.rand(-(-rows // shape.set_rows), vocab, generator=generator) < shape.share
    if shape.labels:
        live[set_of[counted], labels[counted]] = True
    columns, offsets = places(live)
    head, anchors = (-100, 0.7, softcap, vocab), None
    if relative:
        anchors = torch.stack([torch.zeros(rows), logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].float() + 1e-3])
    _, lse, _ = own.token_logps_fwd(logits, labels, *head, False, anchors)
    lse[2::9] = math.nan
    row_sums = torch.rand(rows, generator=generator) + 0.3
    of_labels = torch.where(counted & lse.isfinite(), labels, -1), torch.rand(rows, generator=generator)
    if not shape.labels:
        of_labels = of_labels[0][:0], of_labels[1][:0]
    sets = columns, offsets, shape.set_rows
    g = own.live_grads(logits, labels, lse, row_sums, *sets, *head, anchors)
    want = torch.full((rows, shape.hidden), math.nan)
    own.live_sums_(g, *sets, weight, *of_labels, want)
    ends = (live.sum(1)[set_of] + 1).cumsum(0) - 1
    taus, none = g[ends].float(), torch.empty(0)
    means, coef = torch.randn(len(live), shape.hidden, generator=generator), torch.randn(rows, generator=generator)
    size = int(live.sum(1).max()) + 1 if rows else 1
    for some in (1, 2, 100):
        room = torch.empty(some * shape.set_rows * size, dtype=torch.bfloat16)

        def compute(
            given: Tensor = none, factors: Tensor = none, dtype: torch.dtype = torch.float32, room: Tensor = room
        ) -> Tensor:
            out, tau = torch.full((rows, shape.hidden), math.nan, dtype=dtype), torch.full((rows,), math.inf)
            args = logits, labels, lse, row_sums, *sets, *head, anchors, weight, *of_labels
            own.live_sums_of_logits_(*args, given, factors, room, out, tau)
            return torch.cat([out, tau[:, None].to(dtype)], 1).nan_to_num(7.0)

        sums = same_on_any_threads(findings, f"sums, {some} sets in room", compute)
        findings.same(f"sums, {some} sets in room", sums, torch.cat([want, taus[:, None]], 1).nan_to_num(7.0))
        if not rows:
            continue
        whole = want.double() + taus[:, None].double() * means[set_of].double()
        for factors in (none, coef):
            scaled = whole * factors[:, None].double() if factors.numel() else whole
            for dtype, unit in ((torch.float32, SUMS), (torch.bfloat16, ROUNDING)):
                dx = same_on_any_threads(findings, "dX", partial(compute, means, factors, dtype))[:, :-1]
                findings.close(f"dX in {dtype}", dx, scaled.nan_to_num(7.0), unit, SUMS / unit * 30)


def check_live_of_logits_refusals(backend: Backend, findings: Findings) -> None:
    own = own_matmuls(backend)
    x, labels, ones = torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64), torch.ones(4)
    sets = torch.tensor([0, 1, 0, 5]), torch.tensor([0, 2, 4]), 2
    none, room, out = torch.empty(0), torch.empty(5, dtype=torch.bfloat16), torch.empty(4, 6)
    weight, of_labels = torch.zeros(6, 6, dtype=torch.bfloat16), (labels[:0], none)

    def call(weight: Tensor = weight, means: Tensor = none, coef: Tensor = none, out: Tensor = out) -> None:
        head = -100, 1.0, 0.0, 6, None
        with threads(64):  # more than sets: their gradients are stored
            own.live_sums_of_logits_(
                x, labels, ones, ones, *sets, *head, weight, *of_labels, means, coef, room, out, torch.empty(4)
            )

    for what, wrong, message in (
        ("too little room", call, "room must hold the gradients of a set, 6 numbers, got 5"),
        ("sums in bfloat16", partial(call, out=out.bfloat16()), "out must be"),
        ("coefficients without means", partial(call, coef=ones), "coef needs means"),
        ("means of other sets", partial(call, means=torch.ones(3, 6)), r"means must have shape \[2, 6\]"),
        ("a weight of fewer words", partial(call, weight=weight[:5]), "weight must have the 6 rows of the vocabulary"),
    ):
        findings.refuses(what, wrong, message)


SUMMANDS = [(1, 1, 1), (3, 5, 7), (70, 301, 41), (300, 513, 130), (5, 1024, 700), (0, 4, 4), (4, 0, 4)]
SUMMANDS += [(2100, 601, 650)]  # so many rows that b is packed once
SUMMANDS += [(601, 300, 1213)]  # several tasks along both


def check_add_product(backend: Backend, findings: Findings) -> None:
    """float32 (+)= a b: a with rows or columns, b with rows of strides of their own, odd inner sizes, several tasks."""
    own, generator = own_matmuls(backend), torch.Generator().manual_seed(2)
    absent = torch.empty(0, dtype=torch.int16)
    for rows, inner, width in SUMMANDS:
        total = torch.randn(rows, width, generator=generator)
        by_rows = random(generator, rows, inner + 3)[:, 1 : inner + 1]
        by_columns = random(generator, inner, rows + 3)[:, 1 : rows + 1].t()
        b = random(generator, inner, width + 5)[:, 2 : width + 2]
        for a, first in itertools.product((by_rows, by_columns), (False, True)):
            before = torch.full_like(total, math.nan) if first else total

            def compute(a: Tensor = a, b: Tensor = b, before: Tensor = before, first: bool = first) -> Tensor:
                got = before.clone()
                own.add_product_(got, absent, a, b, first, False, 1.0)
                return got

            base = torch.zeros_like(total) if first else total
            got, want = same_on_any_threads(findings, "sum", compute), base.double() + a.double() @ b.double()
            size = base.abs().double() + a.abs().double() @ b.abs().double()
            findings.close("sum", got, want, SUMS, (size + 1e-3))

            bits = before.view(torch.int32)
            high, low = (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)
            own.add_product_(high, low, a, b, first, False, 1.0)
            joined = (high.view(torch.int16).int() << 16 | low.int() & 0xFFFF).view(torch.float32)
            findings.same("the sum in halves", joined, got)
            for factor in (1.0, -0.3, 0.0):
                last, low_before = (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)
                own.add_product_(last, low_before, a, b, first, True, factor)
                findings.same(f"the last sum in halves times {factor}", last, (got * factor).bfloat16())

                rounded, whole = before.bfloat16(), before.bfloat16().float()
                own.add_product_(whole, absent, a, b, first, False, 1.0)
                own.add_product_(rounded, absent, a, b, first, True, factor)
                findings.same(f"the rounded sum times {factor}", rounded, (whole * factor).bfloat16())


def check_rounded_sums_are_last(backend: Backend, findings: Findings) -> None:
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    call = partial(own_matmuls(backend).add_product_, x, x.new_empty(0, dtype=torch.int16), x, x, True, False, 1.0)
    findings.refuses("a rounded sum that is not the last", call, "total in bfloat16 without low must be the last sum")


def matmul_cases() -> Iterator[Case]:
    yield Case("own matmuls/add to float32", check_add_product, quick=True)
    yield Case("own matmuls/a rounded sum is the last", check_rounded_sums_are_last)
    for name, logits in LOGITS.items():
        yield Case(f"own matmuls/logits, {name}", partial(check_logits, shape=logits), quick=True)
    yield Case("own matmuls/logits, odd hidden size", check_odd_hidden_size)
    yield Case("own matmuls/logits, overlapping rows", check_overlapping_rows)
    for name, head in UNSTORED.items():
        yield Case(f"own matmuls/unstored logits, {name}", partial(check_unstored, shape=head), quick=True)
    yield Case("own matmuls/unstored logits, infinities", check_unstored_infinities, quick=True)
    yield Case("own matmuls/unstored logits, refusals", check_unstored_refusals)
    for name, sets in SETS.items():
        yield Case(f"own matmuls/live, {name}", partial(check_live, shape=sets), quick=True)
        yield Case(f"own matmuls/live of logits, {name}", partial(check_live_of_logits, shape=sets), quick=True)
    capped = partial(check_live_of_logits, shape=SETS["odd sizes"], softcap=5.0, relative=False)
    yield Case("own matmuls/live of logits, softcap", capped)
    yield Case("own matmuls/live of logits, refusals", check_live_of_logits_refusals)
