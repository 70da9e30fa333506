"""Cases of `cpo-kernels check`: the token log-prob ops of a backend against the float64 oracle."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_kernels import library, reference
from cpo_kernels.check import limits
from cpo_kernels.check.compare import Backend, Case, Findings, Skip, need_memory, relative_error, short

IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)
TRUNCATES = "Triton's interpreter does not round to bfloat16"
# (rows, vocabulary, quick); why each is there
SIZES = (
    (0, 700, True),  # nothing to do
    (1, 1, True),  # a vocabulary of one: log-prob exactly 0
    (5, 2, False),
    (5, 31, True),  # less than one vector of 16-bit elements
    (4, 64, False),
    (5, 65, False),
    (7, 257, True),  # odd
    (4, 4096, True),  # aligned, a whole tile or block
    (3, 4096 + 127, False),
    (5, 9001, False),
    (3, 50257, True),  # GPT-2: rows that start at odd addresses
    (3, 128256, False),  # Llama 3
    (8, 262144, False),  # Gemma: few rows, huge vocabulary
    (1, 262144, True),
    (700, 33, False),  # more rows than processors
    (1100, 50257, False),  # rows that fill a GPU by themselves: not split, several warps or blocks each, edges too
    (70_001, 3, False),  # more rows than a grid's second dimension may have
)


@dataclass
class Rows:
    """Logits as columns [offset, offset + width) of a larger storage that is NaN elsewhere."""

    storage: Tensor  # [N, stride]
    offset: int
    width: int
    labels: Tensor  # [N]
    anchors: Tensor | None = None  # [2, N]

    def copy(self) -> tuple[Tensor, Tensor]:
        """(a new storage, the logits in it)."""
        storage = self.storage.clone()
        return storage, storage[:, self.offset : self.offset + self.width]

    @property
    def logits(self) -> Tensor:
        return self.storage[:, self.offset : self.offset + self.width]

    def outside(self, storage: Tensor) -> Tensor:
        return torch.cat([storage[:, : self.offset], storage[:, self.offset + self.width :]], 1)


def make_rows(
    backend: Backend,
    rows: int,
    width: int,
    dtype: torch.dtype,
    seed: int = 0,
    spread: float = 4.0,
    stride: int | None = None,
    offset: int = 0,
    label_limit: int | None = None,
) -> Rows:
    """Random logits and labels, every third one ignored."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((rows, stride or width), math.nan, dtype=dtype)
    drawn = torch.promote_types(dtype, torch.float32)  # float64 has digits that float32 cannot hold
    values = torch.randn(rows, width, generator=generator, dtype=drawn) * spread
    storage[:, offset : offset + width] = values.to(dtype)
    labels = torch.randint(0, label_limit or width, (rows,), generator=generator)
    labels[2::3] = IGNORE
    return Rows(storage.to(backend.device), offset, width, labels.to(backend.device))


def check_token_ops(
    backend: Backend,
    findings: Findings,
    rows: Rows,
    scale: float = 1.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    loose: float = 1.0,
) -> None:
    """All three token ops. `loose` widens what the rounding of a large lse costs bwd_."""
    kernels, labels, dtype = backend.kernels, rows.labels, rows.storage.dtype
    vocab_size = vocab_size or rows.width
    options = (labels, IGNORE, scale, softcap, vocab_size)
    anchors: Any = () if rows.anchors is None else (rows.anchors,)
    exact_anchors: Any = tuple(a.double() for a in anchors)
    tolerance = backend.tolerance(dtype)
    exact = rows.logits.double()
    want_logp, want_lse, want_extra = reference.token_logps_fwd(exact, *options, True, *exact_anchors)

    storage, logits = rows.copy()
    logp, lse, extra = kernels.token_logps_fwd(logits, *options, True, *anchors)
    findings.same("fwd wrote its input", storage, rows.storage)
    findings.close("fwd logp", logp, want_logp, tolerance.logp)
    findings.close("fwd lse", lse, want_lse, tolerance.logp)
    findings.close("fwd extras", extra[:3], want_extra[:3], 4 * tolerance.logp)
    findings.same("fwd is_top1", extra[3].double(), want_extra[3])
    plain = kernels.token_logps_fwd(logits, *options, False, *anchors)
    findings.same("fwd logp without extras", plain[0], logp)
    findings.require("fwd without extras returned some", plain[2].numel() == 0)

    want = exact.clone()
    reference.token_logps_fused_(want, *options, False, *exact_anchors)
    # On a GPU a kernel of its own to compile; the cases from hidden states run the one without extras there.
    for extras in (True,) if backend.on_gpu else (True, False):
        name = "fused_" if extras else "fused_ without extras"
        storage, fused = rows.copy()
        fused_logp, fused_lse, fused_extra = kernels.token_logps_fused_(fused, *options, extras, *anchors)
        findings.close(f"{name} logp", fused_logp, want_logp, tolerance.logp)
        findings.close(f"{name} lse", fused_lse, want_lse, tolerance.logp)
        if backend.name == "cpu":  # sweeps a row alike in every op
            findings.same(f"{name} logp against fwd", fused_logp, logp)
            findings.same(f"{name} lse against fwd", fused_lse, lse)
        if extras:
            findings.close("fused_ extras", fused_extra[:3], want_extra[:3], 4 * tolerance.logp)
        check_gradient(findings, name, fused, want, labels, vocab_size, tolerance.grad)
        findings.require(f"{name} wrote outside its rows", rows.outside(storage).isnan().all())

    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1), dtype=lse.dtype).to(backend.device)
    want = exact.clone()
    reference.token_logps_bwd_(want, labels, want_lse, upstream.double(), *options[1:], *exact_anchors)
    storage, grad = rows.copy()
    kernels.token_logps_bwd_(grad, labels, lse, upstream, *options[1:], *anchors)
    check_gradient(findings, "bwd_", grad, want, labels, vocab_size, tolerance.grad * loose, upstream.abs())
    findings.require("bwd_ wrote outside its rows", rows.outside(storage).isnan().all())


def check_entropy_gradient(
    backend: Backend, findings: Findings, rows: Rows, scale: float, softcap: float, vocab_size: int, loose: float
) -> None:
    """bwd_ with incoming gradients of the entropies: relative to the size of its terms, which may cancel."""
    kernels, labels = backend.kernels, rows.labels
    options = (IGNORE, scale, softcap, vocab_size)
    exact = rows.logits.double()
    exact_anchors = None if rows.anchors is None else rows.anchors.double()
    _, lse, extra = kernels.token_logps_fwd(rows.logits, labels, *options, True, rows.anchors)
    _, want_lse, want_extra = reference.token_logps_fwd(exact, labels, *options, True, exact_anchors)
    generator = torch.Generator().manual_seed(2)
    upstream, of_entropy = torch.randn(2, len(labels), generator=generator, dtype=lse.dtype).to(backend.device)
    of_entropy[labels == IGNORE] = math.nan
    for name, grad_logp in (("bwd_ of the entropy", torch.zeros_like(upstream)), ("bwd_ of both", upstream)):
        want, size = exact.clone(), exact.clone()
        entropies = torch.stack([of_entropy.double(), want_extra[0]])
        reference.token_logps_bwd_(want, labels, want_lse, grad_logp.double(), *options, exact_anchors, entropies)
        # p (|grad| + |grad_H| (|log p| + H)) * dz/du, and |grad| once more at the label
        ones = torch.ones_like(want_lse)
        reference.token_logps_bwd_(size, labels, want_lse, ones, *options, exact_anchors)
        storage, grad = rows.copy()
        kernels.token_logps_bwd_(
            grad, labels, lse, grad_logp, *options, rows.anchors, torch.stack([of_entropy, extra[0]])
        )
        floor = size.abs() * (grad_logp.abs().double() + of_entropy.abs().double() * (want_extra[0] + 30.0))[:, None]
        check_gradient(
            findings, name, grad, want, labels, vocab_size, backend.tolerance(rows.storage.dtype).grad * loose,
            upstream.abs() + of_entropy.abs(), floor.nan_to_num(),
        )  # fmt: skip
        findings.require(f"{name} wrote outside its rows", rows.outside(storage).isnan().all())


def check_gradient(
    findings: Findings,
    what: str,
    actual: Tensor,
    expected: Tensor,
    labels: Tensor,
    vocab_size: int,
    tolerance: float,
    size: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:
    """Relative error per element; at the label relative to LABEL_FLOOR * size [N] at least, elsewhere to terms [N, V]
    where they may cancel."""
    findings.require(f"{what} padded columns are not 0", not actual[:, vocab_size:].any())
    findings.require(f"{what} ignored rows are not 0", not actual[labels == IGNORE].any())
    smallest = limits.GRAD_FLOOR_FLOAT16 if actual.dtype == torch.float16 else limits.GRAD_FLOOR
    floor = torch.full_like(expected, smallest) if terms is None else terms.clamp(min=smallest)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    at_label = torch.ones_like(floor[:, 0]) if size is None else size.double()
    floor[kept, labels[kept]] = (limits.LABEL_FLOOR * at_label[kept]).clamp(min=smallest)
    findings.close(what, actual, expected, tolerance, floor)


# ------------------------------------------------------------------------------------------------- token log-probs


def size_cases() -> Iterator[Case]:
    for (rows, width, quick), dtype in itertools.product(SIZES, DTYPES):

        def run(
            backend: Backend, findings: Findings, rows: int = rows, width: int = width, dtype: torch.dtype = dtype
        ) -> None:
            if rows * width > 2**25:
                need_memory(backend, 12 * 8 * rows * width)  # a dozen copies in float64
            check_token_ops(backend, findings, make_rows(backend, rows, width, dtype, seed=width))

        yield Case(f"sizes/{short(dtype)}/N={rows},V={width}", run, quick)


def layout_cases() -> Iterator[Case]:
    """Row strides, rows at odd addresses, a padded vocabulary whose padding is infinite and must not be looked at."""
    layouts = (
        (0, 777, 0, 613), (1, 777, 0, 613), (9, 777, 0, 613), (9, 777, 3, 700), (5, 4104, 8, 4095),
        (3, 4104, 3, 4101),  # every row off a 16-byte boundary
    )  # fmt: skip
    for (rows, stride, offset, vocab), dtype in itertools.product(layouts, DTYPES):

        def run(
            backend: Backend,
            findings: Findings,
            rows: int = rows,
            stride: int = stride,
            offset: int = offset,
            vocab: int = vocab,
            dtype: torch.dtype = dtype,
        ) -> None:
            width = min(700, stride - offset) if stride < 1000 else stride - offset
            made = make_rows(backend, rows, width, dtype, seed=rows, stride=stride, offset=offset, label_limit=vocab)
            made.logits[:, vocab:] = math.inf
            check_token_ops(backend, findings, made, vocab_size=vocab)

        name = f"layouts/{short(dtype)}/N={rows},stride={stride},offset={offset},vocab_size={vocab}"
        yield Case(name, run, rows == 9)


def shared_cases() -> Iterator[Case]:
    """Rows, labels and upstream gradients that are one in memory are read; gradients need rows of their own."""
    for dtype in DTYPES:

        def run(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
            row, tolerance = make_rows(backend, 1, 50, dtype, seed=8), backend.tolerance(dtype)
            labels = torch.tensor([7], device=backend.device).expand(4)
            exact, head = row.logits.double().expand(4, 50), (IGNORE, 1.0, 0.0, 50)
            want_logp, want_lse, _ = reference.token_logps_fwd(exact, labels, *head, False)
            logp, lse, _ = backend.kernels.token_logps_fwd(row.logits.expand(4, 50), labels, *head, False)
            findings.close("fwd logp", logp, want_logp, tolerance.logp)
            upstream, want = torch.full_like(lse[:1], -1.5).expand(4), exact.clone()
            reference.token_logps_bwd_(want, labels, want_lse, upstream.double(), *head)
            grad = row.logits.repeat(4, 1)
            backend.kernels.token_logps_bwd_(grad, labels, lse, upstream, *head)
            check_gradient(findings, "bwd_", grad, want, labels, 50, tolerance.grad)

        yield Case(f"layouts/{short(dtype)}/shared", run)


def option_cases() -> Iterator[Case]:
    """Scale and softcap; where tanh saturates, 1 - tanh^2 of the oracle itself cancels, so inputs stay below that."""
    options = ((1.0, 5.0, 4.0), (0.0625, 0.0, 4.0), (1.7, 30.0, 4.0), (0.3, 0.5, 0.4))
    shapes = ((4, 1111, 1111), (4, 20_001, 19_997), (1100, 50_257, 50_250))  # a row in one piece, in several, many rows
    for (scale, softcap, spread), dtype, (count, width, vocab) in itertools.product(options, DTYPES, shapes):

        def run(
            backend: Backend, findings: Findings, scale: float = scale, softcap: float = softcap,
            spread: float = spread, dtype: torch.dtype = dtype, count: int = count,
            width: int = width, vocab: int = vocab,
        ) -> None:  # fmt: skip
            if count * width > 2**25:
                need_memory(backend, 12 * 8 * count * width)
            rows = make_rows(backend, count, width, dtype, seed=2, spread=spread, label_limit=vocab)
            check_token_ops(backend, findings, rows, scale, softcap, vocab, loose=2.0)

        yield Case(f"options/{short(dtype)}/scale={scale},softcap={softcap},V={width}", run, scale == 1.7)


ANCHORED = (
    (0, 300, 300), (5, 31, 31), (1, 1, 1), (4, 40, 33), (4, 1111, 1111), (3, 50_257, 50_250), (5, 9001, 8990),
    (700, 33, 30),
)  # fmt: skip


def anchored_rows(
    backend: Backend, rows: int, width: int, vocab: int, dtype: torch.dtype, seed: int, spread: float
) -> Rows:
    """Logits around 20 that lack about their maximum, in some rows more; those of the labels in float32 or float64."""
    made = make_rows(backend, rows, width, torch.float64, seed=seed, spread=spread, label_limit=vocab)
    u = made.logits.cpu() + 20.0 * spread / 4
    acc = library.acc_dtype(dtype)
    if not rows:
        none = torch.empty(2, 0, dtype=acc, device=backend.device)
        return Rows(u.to(dtype).to(backend.device), 0, width, made.labels, none)
    u[0, 0] += 3 * spread  # a row that one column has nearly to itself: its label
    made.labels[0] = 0
    lacks = u[:, :vocab].amax(1).to(torch.bfloat16).double()
    lacks[1::4] -= 2 * spread
    label = made.labels.cpu().masked_fill(made.labels.cpu() == IGNORE, 0)
    anchors = torch.stack([lacks, u.gather(1, label[:, None]).squeeze(1)]).to(acc).to(backend.device)
    return Rows((u - lacks[:, None]).to(dtype).to(backend.device), 0, width, made.labels, anchors)


def anchored_cases() -> Iterator[Case]:
    """Relative logits with exact ones at the labels, and the gradient of the entropy, with anchors and without."""
    options = ((1.0, 0.0, 4.0), (1.7, 30.0, 4.0), (0.0625, 0.0, 20.0), (0.3, 0.5, 0.4))
    for (scale, softcap, spread), dtype, (count, width, vocab) in itertools.product(options, DTYPES, ANCHORED):

        def run(
            backend: Backend, findings: Findings, scale: float = scale, softcap: float = softcap,
            spread: float = spread, dtype: torch.dtype = dtype, count: int = count,
            width: int = width, vocab: int = vocab,
        ) -> None:  # fmt: skip
            rows = anchored_rows(backend, count, width, vocab, dtype, 3, spread)
            check_token_ops(backend, findings, rows, scale, softcap, vocab, loose=4.0)
            for each in (rows, replace(rows, anchors=None)):
                check_entropy_gradient(backend, findings, each, scale, softcap, vocab, loose=4.0)

        name = f"anchors/{short(dtype)}/scale={scale},softcap={softcap},N={count},V={width}"
        yield Case(name, run, scale == 1.7 and count < 10)


def naive_cases() -> Iterator[Case]:
    """16 bit: the error against float64 is no larger than that of PyTorch in the same dtype."""
    for dtype in LOW_PRECISION:

        def run(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
            if backend.truncates and dtype == torch.bfloat16:
                raise Skip(TRUNCATES)
            rows = make_rows(backend, 8, 3001, dtype, seed=6, spread=3.0)
            labels = rows.labels.masked_fill(rows.labels == IGNORE, 1)
            exact = rows.logits.double()
            want_grad = F.one_hot(labels, 3001) - exact.softmax(-1)
            want = exact.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
            leaf = rows.copy()[1].requires_grad_()
            naive = leaf.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
            (naive_grad,) = torch.autograd.grad(naive.sum(), leaf)
            _, fused = rows.copy()
            logp, _, _ = backend.kernels.token_logps_fused_(fused, labels, IGNORE, 1.0, 0.0, 3001, False)
            for name, ours, theirs, truth in (("logp", logp, naive, want), ("gradient", fused, naive_grad, want_grad)):
                bound = relative_error(theirs, truth, 2)
                bound = bound + limits.NAIVE_SLACK if backend.on_gpu else bound * limits.NAIVE_RATIO
                findings.measured(f"{name} against naive", relative_error(ours, truth, 2), bound)
            worst = relative_error(logp, want), relative_error(naive, want)
            findings.require(f"the largest error of logp is {worst[0]}, of naive {worst[1]}", worst[0] <= worst[1])

        yield Case(f"against-naive/{short(dtype)}/token_logps", run, True)


def token_cases() -> Iterator[Case]:
    for cases in (size_cases, layout_cases, shared_cases, option_cases, anchored_cases, naive_cases):
        yield from cases()
