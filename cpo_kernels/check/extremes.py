"""Cases of `cpo-kernels check`: logits of any size, masked vocabularies, NaN and infinities."""

import math
from collections.abc import Iterator

import torch

from cpo_kernels import reference
from cpo_kernels.check import limits
from cpo_kernels.check.compare import Backend, Case, Findings, short, threads
from cpo_kernels.check.tokens import DTYPES, IGNORE, Rows, check_gradient, check_token_ops, make_rows


def masked_with_the_lowest(backend: Backend, findings: Findings, dtype: torch.dtype) -> None:
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
    findings.close("fwd logp", logp, want[0], tolerance.logp)
    findings.close("fwd lse", lse, want[1], tolerance.logp)
    # Not the mean of z, whose sum overflows.
    findings.close("fwd entropy and sum of squares", extra[:2], want[2][:2], 4 * tolerance.logp)
    backend.kernels.token_logps_fused_(fused, labels, *options, False)
    check_gradient(findings, "fused_", fused, exact, labels, width, tolerance.grad)
    backend.kernels.token_logps_bwd_(grad, labels, lse, torch.ones_like(lse), *options)
    check_gradient(findings, "bwd_", grad, exact, labels, width, tolerance.grad)
    x[0, 5] = math.nan  # in a tile of nothing else, and still findings
    x[1] = lowest
    logp = backend.kernels.token_logps_fwd(x, labels, *options, False)[0]
    equal = (logp[1] + math.log(width)).abs() < limits.LOWEST_LOGP
    findings.require("fwd logp of a row of only the lowest is neither NaN nor right", equal or logp[1].isnan())
    findings.require("fwd logp is not NaN where a row holds NaN", logp[0].isnan())
    findings.require("fwd logp is NaN where no row holds NaN", not logp[2:].isnan().any())


def extreme_cases() -> Iterator[Case]:
    for dtype in DTYPES:

        def extreme(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
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
            check_token_ops(backend, findings, rows, loose=1.0 if dtype == torch.float64 else 100.0)
            logp, lse, _ = backend.kernels.token_logps_fwd(x, rows.labels, IGNORE, 1.0, 0.0, 5000, False)
            findings.require("fwd logp of a label that has everything is not 0", logp[1] == 0)
            findings.require(
                "fwd lse of a label that has everything is not its logit", lse[1] == x[1, 4999].to(lse.dtype)
            )

        def split(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
            width = 2 * 16384 + 77
            rows = make_rows(backend, 2, width, dtype, seed=3, label_limit=2 * 16384)
            rows.labels[:] = torch.tensor([31_000, 25_000])
            rows.logits[0, 10_000:30_000] = -math.inf
            rows.logits[1, :20_000] = -math.inf  # a first piece of nothing
            finite = Rows(rows.storage.nan_to_num(neginf=-60), 0, width, rows.labels)
            for count in backend.thread_counts:
                with threads(count):
                    check_token_ops(backend, findings, rows, vocab_size=width - 3)
                    check_token_ops(backend, findings, finite, softcap=20.0, loose=2.0)

        def lowest(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
            for count in backend.thread_counts:
                with threads(count):
                    masked_with_the_lowest(backend, findings, dtype)

        def not_finite(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
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
            findings.require("fwd logp of a row with NaN, +inf or only -inf is not NaN", logp[:4].isnan().all())
            findings.require("fwd of an ignored row is not 0", logp[4] == 0 and not extra[:, 4].any())
            findings.require("fwd entropy and sum of squares of such a row are not NaN", extra[:2, :4].isnan().all())
            # All -inf: every column ties for the top.
            findings.require("fwd is_top1 of such rows is not 0, 0, 1, 0", extra[3].tolist() == [0, 0, 1, 0, 0])
            backend.kernels.token_logps_fused_(x, rows.labels, IGNORE, 1.0, 0.0, 300, False)
            findings.require("fused_ of a row with NaN, +inf or only -inf holds no NaN", x[:4].isnan().any(1).all())
            findings.require("fused_ of a row with NaN or only -inf is not all NaN", x[[0, 2]].isnan().all())
            findings.require("fused_ of an ignored row is not 0", not x[4].any())

        yield Case(f"extreme/{short(dtype)}/large-and-masked", extreme, True)
        yield Case(f"extreme/{short(dtype)}/masked-pieces", split)
        yield Case(f"extreme/{short(dtype)}/masked-with-the-lowest", lowest)
        yield Case(f"extreme/{short(dtype)}/not-finite", not_finite, True)
