"""Cases of `cpo-kernels check`: the token log-prob ops of a backend against the float64 oracle."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_kernels import reference
from cpo_kernels.check.compare import Backend, Case, Seen, need_memory, relative_error, short

IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)
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
    values = torch.randn(rows, width, generator=generator) * spread
    storage[:, offset : offset + width] = values.to(dtype)
    labels = torch.randint(0, label_limit or width, (rows,), generator=generator)
    labels[2::3] = IGNORE
    return Rows(storage.to(backend.device), offset, width, labels.to(backend.device))


def check_token_ops(
    backend: Backend,
    seen: Seen,
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
    tolerance = backend.tolerance(dtype)
    exact = rows.logits.double()
    want_logp, want_lse, want_extra = reference.token_logps_fwd(exact, *options, True)

    storage, logits = rows.copy()
    logp, lse, extra = kernels.token_logps_fwd(logits, *options, True)
    seen.same("fwd wrote its input", storage, rows.storage)
    seen.close("fwd logp", logp, want_logp, tolerance.logp)
    seen.close("fwd lse", lse, want_lse, tolerance.logp)
    seen.close("fwd extras", extra[:3], want_extra[:3], 4 * tolerance.logp)
    seen.same("fwd is_top1", extra[3].double(), want_extra[3])
    plain = kernels.token_logps_fwd(logits, *options, False)
    seen.same("fwd logp without extras", plain[0], logp)
    seen.require("fwd without extras returned some", plain[2].numel() == 0)

    want = exact.clone()
    reference.token_logps_fused_(want, *options, False)
    storage, fused = rows.copy()
    fused_logp, fused_lse, fused_extra = kernels.token_logps_fused_(fused, *options, True)
    seen.close("fused_ logp", fused_logp, want_logp, tolerance.logp)
    seen.close("fused_ lse", fused_lse, want_lse, tolerance.logp)
    seen.close("fused_ extras", fused_extra[:3], want_extra[:3], 4 * tolerance.logp)
    check_gradient(seen, "fused_", fused, want, labels, vocab_size, tolerance.grad)
    seen.require("fused_ wrote outside its rows", rows.outside(storage).isnan().all())

    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1), dtype=lse.dtype).to(backend.device)
    want = exact.clone()
    reference.token_logps_bwd_(want, labels, want_lse, upstream.double(), IGNORE, scale, softcap, vocab_size)
    storage, grad = rows.copy()
    kernels.token_logps_bwd_(grad, labels, lse, upstream, IGNORE, scale, softcap, vocab_size)
    check_gradient(seen, "bwd_", grad, want, labels, vocab_size, tolerance.grad * loose, upstream.abs().clamp(min=1))
    seen.require("bwd_ wrote outside its rows", rows.outside(storage).isnan().all())


def check_gradient(
    seen: Seen,
    what: str,
    actual: Tensor,
    expected: Tensor,
    labels: Tensor,
    vocab_size: int,
    tolerance: float,
    size: Tensor | None = None,
) -> None:
    """Relative error per element; at the label, where 1 - softmax may cancel, relative to 0.1 * size [N] at least."""
    seen.require(f"{what} padded columns are not 0", not actual[:, vocab_size:].any())
    seen.require(f"{what} ignored rows are not 0", not actual[labels == IGNORE].any())
    # Values that the dtype cannot hold (below 1e-30, or subnormal in float16) round to something near 0.
    floor = torch.full_like(expected, 2.0**-14 if actual.dtype == torch.float16 else 1e-30)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    floor[kept, labels[kept]] = 0.1 if size is None else 0.1 * size[kept].double()
    seen.close(what, actual, expected, tolerance, floor)


# ------------------------------------------------------------------------------------------------- token log-probs


def size_cases() -> Iterator[Case]:
    for (rows, width, quick), dtype in itertools.product(SIZES, DTYPES):

        def run(backend: Backend, seen: Seen, rows: int = rows, width: int = width, dtype: torch.dtype = dtype) -> None:
            if rows * width > 2**25:
                need_memory(backend, 12 * 8 * rows * width)  # a dozen copies in float64
            check_token_ops(backend, seen, make_rows(backend, rows, width, dtype, seed=width))

        yield Case(f"sizes/{short(dtype)}/N={rows},V={width}", run, quick)


def layout_cases() -> Iterator[Case]:
    """Row strides, rows at odd addresses, a padded vocabulary whose padding is infinite and must not be looked at."""
    layouts = (
        (0, 777, 0, 613), (1, 777, 0, 613), (9, 777, 0, 613), (9, 777, 3, 700), (5, 4104, 8, 4095),
        (3, 4104, 3, 4101),  # every row off a 16-byte boundary
    )  # fmt: skip
    for (rows, stride, offset, vocab), dtype in itertools.product(layouts, DTYPES):

        def run(
            backend: Backend, seen: Seen, rows: int = rows, stride: int = stride, offset: int = offset,
            vocab: int = vocab, dtype: torch.dtype = dtype,
        ) -> None:  # fmt: skip
            width = min(700, stride - offset) if stride < 1000 else stride - offset
            made = make_rows(backend, rows, width, dtype, seed=rows, stride=stride, offset=offset, label_limit=vocab)
            made.logits[:, vocab:] = math.inf
            check_token_ops(backend, seen, made, vocab_size=vocab)

        name = f"layouts/{short(dtype)}/N={rows},stride={stride},offset={offset},vocab_size={vocab}"
        yield Case(name, run, rows == 9)


def option_cases() -> Iterator[Case]:
    """Scale and softcap; where tanh saturates, 1 - tanh^2 of the oracle itself cancels, so inputs stay below that."""
    for (scale, softcap, spread), dtype in itertools.product(
        ((1.0, 5.0, 4.0), (0.0625, 0.0, 4.0), (1.7, 30.0, 4.0), (0.3, 0.5, 0.4)), DTYPES
    ):

        def run(
            backend: Backend, seen: Seen, scale: float = scale, softcap: float = softcap, spread: float = spread,
            dtype: torch.dtype = dtype,
        ) -> None:  # fmt: skip
            shapes = [(4, 1111, 1111), (4, 20_001, 19_997)]  # one piece of a row, and several
            if backend.on_gpu:
                shapes.append((1100, 50_257, 50_250))
            for count, width, vocab in shapes:
                rows = make_rows(backend, count, width, dtype, seed=2, spread=spread, label_limit=vocab)
                check_token_ops(backend, seen, rows, scale, softcap, vocab, loose=2.0)

        yield Case(f"options/{short(dtype)}/scale={scale},softcap={softcap}", run, scale == 1.7)


def extreme_cases() -> Iterator[Case]:
    for dtype in DTYPES:

        def extreme(backend: Backend, seen: Seen, dtype: torch.dtype = dtype) -> None:
            rows = make_rows(backend, 7, 5000, dtype, seed=4)
            x, low, high = rows.logits, -1e4, 1e4
            rows.labels[:] = torch.tensor([0, 4999, 17, 4990, 30, 4100, 77])
            x[0] = low  # all strongly negative: a maximum that starts at 0 gives NaN
            x[1] = low
            x[1, 4999] = high  # the label, in the last column, has everything
            x[2] = low
            x[2, 3000] = high  # another column has everything
            x[3, :4500] = -math.inf  # a masked vocabulary that starts with whole tiles of nothing
            x[4, ::2] = -math.inf
            x[4, 30] = 0.5
            x[5] *= 30  # sums must be raised from tile to tile
            x[6] = torch.linspace(-90, 90, 5000)
            # lse at 1e4 rounds to 5e-4 in float32, and the softmax rebuilt from it in bwd_ carries that.
            check_token_ops(backend, seen, rows, loose=1.0 if dtype == torch.float64 else 100.0)
            logp, lse, _ = backend.kernels.token_logps_fwd(x, rows.labels, IGNORE, 1.0, 0.0, 5000, False)
            seen.require("fwd logp of a label that has everything is not 0", logp[1] == 0)
            seen.require("fwd lse of a label that has everything is not its logit", lse[1] == x[1, 4999].to(lse.dtype))

        def split(backend: Backend, seen: Seen, dtype: torch.dtype = dtype) -> None:
            width = 2 * 16384 + 77
            rows = make_rows(backend, 2, width, dtype, seed=3, label_limit=2 * 16384)
            rows.labels[:] = torch.tensor([31_000, 25_000])
            rows.logits[0, 10_000:30_000] = -math.inf
            rows.logits[1, :20_000] = -math.inf  # a first piece of nothing
            check_token_ops(backend, seen, rows, vocab_size=width - 3)

        def lowest(backend: Backend, seen: Seen, dtype: torch.dtype = dtype) -> None:
            """Whole tiles, and whole pieces of split rows, of the most negative number, which masks use for -inf."""
            width, lowest = 70_000, torch.finfo(dtype).min
            rows = make_rows(backend, 5, width, dtype, seed=8)
            x, labels, options = rows.logits, rows.labels, (IGNORE, 1.0, 0.0, width)
            x[0, :4096] = lowest
            x[1, :40_000] = lowest
            x[2, 20_000:] = lowest
            x[3, :8192] = max(-3e10, lowest)
            x[4, :33_000] = x[4, 36_000:] = lowest
            labels[:] = torch.tensor([width - 1, 50_000, 17, 9_000, 35_000])
            tolerance = backend.tolerance(dtype)
            (_, exact), (_, fused), (_, grad) = rows.copy(), rows.copy(), rows.copy()
            exact = exact.double()
            want = reference.token_logps_fwd(exact, labels, *options, True)
            reference.token_logps_fused_(exact, labels, *options, False)
            logp, lse, extra = backend.kernels.token_logps_fwd(x, labels, *options, True)
            seen.close("fwd logp", logp, want[0], tolerance.logp)
            seen.close("fwd lse", lse, want[1], tolerance.logp)
            # Not the mean of z, whose sum overflows.
            seen.close("fwd entropy and sum of squares", extra[:2], want[2][:2], 4 * tolerance.logp)
            backend.kernels.token_logps_fused_(fused, labels, *options, False)
            check_gradient(seen, "fused_", fused, exact, labels, width, tolerance.grad)
            backend.kernels.token_logps_bwd_(grad, labels, lse, torch.ones_like(lse), *options)
            check_gradient(seen, "bwd_", grad, exact, labels, width, tolerance.grad)
            x[0, 5] = math.nan  # in a tile of nothing else, and still seen
            x[1] = lowest
            logp = backend.kernels.token_logps_fwd(x, labels, *options, False)[0]
            equal = (logp[1] + math.log(width)).abs() < 1e-4
            seen.require("fwd logp of a row of only the lowest is neither NaN nor right", equal or logp[1].isnan())
            seen.require("fwd logp is not NaN where a row holds NaN", logp[0].isnan())
            seen.require("fwd logp is NaN where no row holds NaN", not logp[2:].isnan().any())

        def not_finite(backend: Backend, seen: Seen, dtype: torch.dtype = dtype) -> None:
            rows = make_rows(backend, 5, 300, dtype, seed=5)
            x = rows.logits
            rows.labels[:] = torch.tensor([3, 4, 5, 6, IGNORE])
            x[0, 299] = math.nan  # in the tail
            x[1, 0] = math.nan
            x[1, 1:] = -math.inf
            x[2] = -math.inf
            x[3, 7] = math.inf
            x[4] = math.nan  # ignored: must not leak
            logp, _, extra = backend.kernels.token_logps_fwd(x, rows.labels, IGNORE, 1.0, 0.0, 300, True)
            seen.require("fwd logp of a row with NaN, +inf or only -inf is not NaN", logp[:4].isnan().all())
            seen.require("fwd of an ignored row is not 0", logp[4] == 0 and not extra[:, 4].any())
            backend.kernels.token_logps_fused_(x, rows.labels, IGNORE, 1.0, 0.0, 300, False)
            seen.require("fused_ of a row with NaN, +inf or only -inf holds no NaN", x[:4].isnan().any(1).all())
            seen.require("fused_ of an ignored row is not 0", not x[4].any())

        yield Case(f"extreme/{short(dtype)}/large-and-masked", extreme, True)
        yield Case(f"extreme/{short(dtype)}/masked-pieces", split)
        yield Case(f"extreme/{short(dtype)}/masked-with-the-lowest", lowest)
        yield Case(f"extreme/{short(dtype)}/not-finite", not_finite, True)


def naive_cases() -> Iterator[Case]:
    """16 bit: the error against float64 is no larger than that of PyTorch in the same dtype, plus 1e-3 relative."""
    for dtype in LOW_PRECISION:

        def run(backend: Backend, seen: Seen, dtype: torch.dtype = dtype) -> None:
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
                bound = relative_error(theirs, truth, 2) + 1e-3
                seen.measured(f"{name} against naive", relative_error(ours, truth, 2), bound)

        yield Case(f"against-naive/{short(dtype)}/token_logps", run, True)


def token_cases() -> Iterator[Case]:
    for cases in (size_cases, layout_cases, option_cases, extreme_cases, naive_cases):
        yield from cases()
