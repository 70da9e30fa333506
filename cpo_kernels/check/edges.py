"""Cases of `cpo-kernels check`: labels out of range, equal bits of two runs, offsets beyond 2^31 elements."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cpo_kernels import checks, library, reference
from cpo_kernels.check.compare import GPU_BACKENDS, Backend, Case, Findings, Skip, need_memory, short, threads
from cpo_kernels.check.preference import NAMES, make_batch, typed, without
from cpo_kernels.check.tokens import DTYPES, IGNORE, Rows, check_gradient, make_rows


def label_cases() -> Iterator[Case]:
    """A label out of range: an error on the CPU; on a GPU NaN for that token, and the rest as without it."""
    for dtype in DTYPES:

        def run(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
            rows = make_rows(backend, 7, 300, dtype, seed=9, label_limit=290)
            if backend.name not in GPU_BACKENDS or checks.checks_enabled():
                refuses_bad_labels(backend, findings, rows)
                return
            good = rows.labels.clone()
            rows.labels[[0, 3, 4, 6]] = torch.tensor([300, -1, 2**40, 290], device=backend.device)  # 290: padding
            args, bad = (IGNORE, 1.0, 0.0, 290), [0, 3, 4, 6]
            rest = [1, 2, 5]
            for fused in (False, True):
                op = backend.kernels.token_logps_fused_ if fused else backend.kernels.token_logps_fwd
                (_, x), (_, y) = rows.copy(), rows.copy()
                got, want = op(x, rows.labels, *args, True), op(y, good, *args, True)
                name = "fused_" if fused else "fwd"
                findings.require(f"{name} logp of a label out of range is not NaN", got[0][bad].isnan().all())
                findings.same(f"{name} logp of the other rows", got[0][rest], want[0][rest])
                findings.same(f"{name} gradient of the other rows", x[rest], y[rest])
            (_, x), (_, y) = rows.copy(), rows.copy()
            grad = torch.linspace(-1, 1, 7, dtype=want[1].dtype, device=backend.device)
            backend.kernels.token_logps_bwd_(x, rows.labels, want[1], grad, *args)
            backend.kernels.token_logps_bwd_(y, good, want[1], grad, *args)
            findings.same("bwd_ gradient of the other rows", x[rest], y[rest])

        yield Case(f"labels/{short(dtype)}/out-of-range", run, dtype == torch.bfloat16)
    yield Case("labels/float64/sequences-out-of-range", wrong_pairs)
    yield Case("labels/float32/offsets-out-of-range", wrong_offsets)


def wrong_pairs(backend: Backend, findings: Findings) -> None:
    """Pairs of sequences that do not exist: an error on the CPU; on a GPU NaN for the loss and those pairs."""
    batch = without(make_batch(6), "lengths")
    wrong = batch["pairs"].clone()
    wrong[4], wrong[7], wrong[9] = torch.tensor([[5, 7], [-1, 6], [2**62, -(2**63)]])
    if backend.name not in GPU_BACKENDS:
        given = {**batch, "pairs": wrong}
        findings.refuses(
            "pairs of no sequence", lambda: backend.kernels.preference(*given.values()), "holds sequence 7"
        )
        return
    bad, rest = [4, 7, 9], [p for p in range(len(wrong)) if p not in (4, 7, 9)]
    for name in ("sigmoid", "aot", "aot_unpaired"):
        given = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in typed(batch, name).items()}
        clean = backend.kernels.preference(*given.values())
        loss, losses, grad, *metrics, order, counts = backend.kernels.preference(
            *{**given, "pairs": wrong.to(backend.device)}.values()
        )
        findings.require(f"{name}: the loss is not NaN", loss.isnan())
        findings.require(f"{name}: pairs of no sequence do not count", (order[bad] == 1).all() and counts[0] >= 3)
        if name != "aot_unpaired":  # whose two sides come from different pairs
            findings.require(f"{name}: losses of such pairs are not NaN", losses[bad].isnan().all())
            findings.require(f"{name}: gradients of their other sequences are not NaN", grad[[5, 6]].isnan().all())
        if name == "sigmoid":
            for what, after, before in zip(NAMES[1:7], (losses, grad, *metrics, order), clean[1:7], strict=True):
                if what != "gradient":
                    findings.same(f"{what} of the other pairs", after[rest], before[rest])


def wrong_offsets(backend: Backend, findings: Findings) -> None:
    """Offsets outside the tokens: an error on the CPU; on a GPU NaN for only that sequence."""
    logps = torch.randn(10, generator=torch.Generator().manual_seed(1)).to(backend.device)
    cu = torch.tensor([-1, 3, 2, 7, 11, 2**62, 10], device=backend.device)
    if backend.name not in GPU_BACKENDS:
        findings.refuses("offsets", lambda: backend.kernels.sequence_sum(logps, cu, logps[:0], False), "-1 to 10")
        return
    got = backend.kernels.sequence_sum(logps, cu, logps[:0], False)
    outside = got.isnan().tolist()
    findings.require(f"sums are NaN at {outside}", outside == [True, True, False, True, True, True])
    findings.close("sum", got[2], logps[2:7].double().sum(), backend.tolerance(torch.float32).logp)


def refuses_bad_labels(backend: Backend, findings: Findings, rows: Rows) -> None:
    for bad in (300, -1, 290):
        rows.labels[4] = bad
        call = partial(backend.kernels.token_logps_fwd, rows.logits, rows.labels, IGNORE, 1.0, 0.0, 290, False)
        findings.refuses(f"label {bad} outside [0, 290)", call, str(bad))


def repeat_cases() -> Iterator[Case]:
    for dtype in DTYPES:

        def run(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
            for count, width in ((33, 9_001), (33, 9_000), (2, 50_001)):
                for number in backend.thread_counts:
                    with threads(number):
                        same_bits(backend, findings, make_rows(backend, count, width, dtype, seed=7))
            if backend.on_gpu:  # a race between the warps of a row is rare
                many_times(backend, findings, make_rows(backend, 1100, 50_257, dtype, seed=8), 100)

        yield Case(f"same-bits/{short(dtype)}/token_logps", run, dtype == torch.bfloat16)


def same_bits(backend: Backend, findings: Findings, rows: Rows) -> None:
    options = (IGNORE, 1.0, 0.0, rows.width)
    grad = torch.linspace(-1, 1, len(rows.labels), dtype=library.acc_dtype(rows.storage.dtype), device=backend.device)

    def once() -> list[Tensor]:
        (_, fused), (_, bwd) = rows.copy(), rows.copy()
        results = [*backend.kernels.token_logps_fused_(fused, rows.labels, *options, True), fused]
        backend.kernels.token_logps_bwd_(bwd, rows.labels, results[1], grad, *options)
        return [*results, bwd, *backend.kernels.token_logps_fwd(rows.logits, rows.labels, *options, True)]

    first = once()
    names = ("logp", "lse", "extras", "gradient", "bwd_", "fwd logp", "fwd lse", "fwd extras")
    for name, a, b in zip(names, once(), first, strict=True):
        findings.same(f"{name} of a second run", a, b)
    if backend.name in GPU_BACKENDS and rows.width * rows.storage.element_size() % 16:
        return  # their lanes start at a row's first 16-byte boundary
    flipped = backend.kernels.token_logps_fwd(rows.logits.flip(0).contiguous(), rows.labels.flip(0), *options, False)
    findings.same("logp with the rows in another order", flipped[0].flip(0), first[5])


def many_times(backend: Backend, findings: Findings, rows: Rows, times: int) -> None:
    def once() -> Tensor:
        _, logits = rows.copy()
        backend.kernels.token_logps_fused_(logits, rows.labels, IGNORE, 1.0, 0.0, rows.width, False)
        return logits

    first = once()
    for _ in range(times):
        findings.same("gradient of another run", once(), first)


def address_cases() -> Iterator[Case]:
    """Offsets beyond 2^31 elements."""

    def strided(backend: Backend, findings: Findings) -> None:
        """Three rows 2^30 + 8 elements apart in memory that nothing touches between them."""
        stride, count = 2**30 + 8, 3
        need_memory(backend, 2 * stride * (count - 1))
        filled = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # or all of it is filled
        try:
            storage = torch.empty(stride * (count - 1) + 64, dtype=torch.bfloat16, device=backend.device)
        except RuntimeError as error:
            raise Skip(f"needs 4 GiB of address space: {error}") from error
        finally:
            torch.use_deterministic_algorithms(filled, warn_only=True)
        logits = storage.as_strided((count, 64), (stride, 1))
        rows = make_rows(backend, count, 64, torch.bfloat16, seed=9)
        logits.copy_(rows.logits)
        got = backend.kernels.token_logps_fused_(logits, rows.labels, IGNORE, 1.0, 0.0, 64, False)
        want = backend.kernels.token_logps_fused_(rows.logits, rows.labels, IGNORE, 1.0, 0.0, 64, False)
        findings.same("logp", got[0], want[0])
        findings.same("gradient", logits, rows.logits)

    def many(backend: Backend, findings: Findings) -> None:
        """N * V > 2^31 with every row full: the first, the last and the rows around 2^31 against the oracle."""
        width, count = 131_072, 2**31 // 131_072 + 9
        need_memory(backend, 2 * width * count + (1 << 30))
        logits = torch.empty(count, width, dtype=torch.bfloat16, device=backend.device)
        generator = torch.Generator(backend.device).manual_seed(10)
        logits.normal_(0, 4, generator=generator)
        labels = torch.randint(0, width, (count,), device=backend.device, generator=generator)
        chosen = torch.tensor([0, 1, count - 10, count - 9, count - 8, count - 2, count - 1], device=backend.device)
        part = logits[chosen].double()
        tolerance = backend.tolerance(torch.bfloat16)
        want = reference.token_logps_fused_(part, labels[chosen], IGNORE, 1.0, 0.0, width, False)
        logp, lse, _ = backend.kernels.token_logps_fwd(logits, labels, IGNORE, 1.0, 0.0, width, False)
        findings.close("fwd logp", logp[chosen], want[0], tolerance.logp)
        findings.require("fwd left a row unwritten", not logp.isnan().any() and not lse.isnan().any())
        backend.kernels.token_logps_fused_(logits, labels, IGNORE, 1.0, 0.0, width, False)
        check_gradient(findings, "fused_", logits[chosen], part, labels[chosen], width, tolerance.grad)

    yield Case("beyond-2^31/bfloat16/row-stride", strided)
    yield Case("beyond-2^31/bfloat16/elements", many)


def edge_cases() -> Iterator[Case]:
    for cases in (label_cases, repeat_cases, address_cases):
        yield from cases()
