"""live_columns and live_grads of a backend against the reference in float64: rows, options and awkward sizes."""

import math
from typing import Any, NamedTuple

import torch

from cpo_kernels import library, reference

IGNORE = -100


class Case(NamedTuple):
    rows: int
    vocab: int
    set_rows: int
    softcap: float = 0.0
    scale: float = 1.0
    eps: float = 2.0**-8
    padding: int = 0  # columns behind the vocabulary, NaN
    gap: int = 0  # numbers between rows
    spread: float = 4.0


CASES = {
    "one number": Case(1, 1, 1),
    "one row": Case(1, 700, 128),
    "one column": Case(5, 1, 2),
    "fewer rows than a set": Case(7, 300, 128),
    "last set short, odd sizes": Case(131, 777, 64, padding=7),
    "sets of 3, more than one tile": Case(10, 1537, 3, padding=1),
    "rows off 16 bytes": Case(9, 1031, 4, gap=3),
    "aligned": Case(16, 1024, 8, gap=16),
    "softcap": Case(33, 600, 16, softcap=5.0, scale=1.3, padding=24),
    "scale": Case(12, 520, 5, scale=0.5),
    "large scale": Case(12, 520, 5, scale=3.0),
    "everything is live": Case(12, 600, 6, eps=0.0),
    "labels alone are live": Case(12, 600, 6, eps=2.0),
    "sets of one row": Case(6, 300, 1, eps=2.0**-12),
    "flat rows": Case(12, 600, 6, spread=0.01),
}


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits with NaN beside the vocabulary, labels (some ignored, some of another shard), lse (one NaN, one inf)."""
    generator = torch.Generator().manual_seed(seed)
    width = case.vocab + case.padding
    storage = torch.full((case.rows, width + case.gap), math.nan, dtype=dtype)
    logits = storage[:, :width]
    values = torch.randn(case.rows, case.vocab, generator=generator, dtype=torch.float64) * case.spread
    labels = torch.randint(case.vocab, (case.rows,), generator=generator)
    logits[:, : case.vocab] = values
    if case.rows > 4:
        logits[0, : case.vocab : 3] = -math.inf
        logits[3, : case.vocab] = -1e4
        logits[4, : case.vocab] = -1e4
        logits[4, case.vocab // 2] = 1e4
        labels[1::5] = IGNORE
    lse = row_lse(logits, case)
    if case.rows > 6:
        labels[5], labels[4] = case.vocab + 50, -1  # of other shards
        logits[0, labels[0]] = -math.inf
        lse = row_lse(logits, case)
        lse[2] = math.nan
    if case.rows > 9:
        lse[9] = -math.inf
    return logits, labels, lse


def row_lse(logits: torch.Tensor, case: Case) -> torch.Tensor:
    z = logits[:, : case.vocab].double() * case.scale
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    return z.logsumexp(1).to(library.acc_dtype(logits.dtype))


def places(live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """columns and offsets as `live_grads` takes them."""
    offsets = torch.zeros(live.shape[0] + 1, dtype=torch.int64)
    offsets[1:] = live.sum(1).cumsum(0)
    return live.nonzero()[:, 1], offsets


def run(kernels: Any, case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """What both ops give: live, tail, row_sums, g."""
    logits, labels, lse = make(case, dtype, seed)
    head = (IGNORE, case.scale, case.softcap, case.vocab)
    live, tail, row_sums = kernels.live_columns(logits, labels, lse, case.eps, case.set_rows, *head)
    g = kernels.live_grads(logits, labels, lse, row_sums, *places(live), case.set_rows, *head)
    return live, tail, row_sums, g


def check(kernels: Any, case: Case, dtype: torch.dtype, truncates: bool = False) -> None:
    """truncates: 16-bit numbers are rounded toward zero."""
    logits, labels, lse = make(case, dtype)
    exact, head = (logits.double(), labels, lse.double()), (IGNORE, case.scale, case.softcap, case.vocab)
    live, tail, row_sums, g = run(kernels, case, dtype)
    assert live.dtype == torch.bool and tail.dtype == row_sums.dtype == lse.dtype and g.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6

    def reference_at(eps: float) -> tuple[torch.Tensor, ...]:
        return reference.live_columns(*exact, eps, case.set_rows, *head)

    low, high = (reference_at(case.eps * (1 + sign * 10 * tolerance))[0] for sign in (-1, 1))
    assert torch.equal(live & low, live) and torch.equal(live | high, live), "live"  # rounding at eps itself is free
    _, want_tail, want_sums = reference_at(case.eps)
    assert not tail[live].any(), "a tail where live"
    rest = ~live & ~low
    torch.testing.assert_close(tail[rest].double(), want_tail[rest], atol=tolerance, rtol=10 * tolerance)
    torch.testing.assert_close(row_sums.double(), want_sums, atol=tolerance, rtol=10 * tolerance, equal_nan=True)
    want = reference.live_grads(*exact, row_sums.double(), *places(live), case.set_rows, *head)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 10 * tolerance) * (2 if truncates else 1)
    smallest = 1e-12 if dtype == torch.float64 else 1e-6  # tau is a difference of sums up to 1
    torch.testing.assert_close(g.double(), want, atol=smallest, rtol=unit, equal_nan=True)
