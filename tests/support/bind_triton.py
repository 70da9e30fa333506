"""Every Triton launcher through Triton's own JIT for sm_90, as far as a machine without a GPU goes.

`python -m tests.support.bind_triton` binds the arguments of each launch, compiles what it asks for and launches
nothing. The interpreter of the other tests binds nothing: annotations, None arguments, alignment keys and what the
compiler does not take are seen here only. Prints a line of JSON for each launch: the kernel, its specialisation, and
how many approximate logarithms, asynchronous copies and 16-byte accesses its PTX holds. PYTHONPATH may name another
Triton.
"""

import contextlib
import itertools
import json
import os
import re
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cpo_kernels import kernels
from cpo_kernels.check.preference import OPTION_SETS, make_batch, typed, without
from cpo_kernels.kernels import live_matmul
from cpo_kernels.kernels.preference import MANY_SEQUENCES, MAX_LOSSES
from cpo_kernels.reference import LOSS_TYPES

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WIDE_ROW = 40_000  # more than 64 KiB in 16 bit: fused_ has another launch shape there


class StubDriver:
    """An H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launches(what: str):
    """Compiles what is launched inside, and prints it as `what`."""
    real = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = real(self, *args, grid=grid, warmup=True, **options)
        ptx = made.asm["ptx"]
        shown = {
            "what": what,
            "kernel": self.fn.__name__,
            "specialisation": made.hash,
            "lg2.approx": ptx.count("lg2.approx"),
            "cp.async": len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
            "wide": len(re.findall(r"\b(?:ld|st)\.global\S*\.v4\.b32\b|\b(?:ld|st)\.global\S*\.v2\.b64\b", ptx)),
        }
        print(json.dumps(shown), flush=True)
        return made

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = real


def rows(count: int, width: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """[count, width], `offset` elements off a 16-byte boundary."""
    storage = torch.zeros(count * width + 64, dtype=dtype)
    start = (-storage.data_ptr() % 16) // dtype.itemsize + offset
    return storage[start : start + count * width].view(count, width)


def anchors(logits: Tensor, offset: int = 0) -> Tensor:
    """[2, N] of zeros, `offset` elements off a 16-byte boundary."""
    return rows(2, logits.shape[0], torch.promote_types(logits.dtype, torch.float32), offset)


def token_ops(what: str, logits: Tensor, softcap: float, extras: bool, given: Tensor | None = None) -> None:
    labels = torch.zeros(logits.shape[0], dtype=torch.int64)
    acc = torch.zeros(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    head = (-100, 1.0, softcap, logits.shape[1])
    with launches(f"{what} fwd"):
        kernels.token_logps_fwd(logits, labels, *head, extras, given)
    with launches(f"{what} fused"):
        kernels.token_logps_fused_(logits, labels, *head, extras, given)
    if not extras:
        with launches(f"{what} bwd"):
            kernels.token_logps_bwd_(logits, labels, acc, acc, *head, given)
        with launches(f"{what} bwd entropies"):
            kernels.token_logps_bwd_(logits, labels, acc, acc, *head, given, anchors(logits))


def all_token_ops() -> None:
    """bfloat16 with every combination of edges and options, the others with none and all; whole rows and split ones."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for edges, softcap, extras in itertools.product((False, True), repeat=3):
            if dtype != torch.bfloat16 and len({edges, softcap, extras}) > 1:
                continue
            options = " edges" * edges + " softcap" * softcap + " extras" * extras
            many, few = (64, 1024 + edges), (1, 65_536 + edges)
            for what, shape in (("rows", many), ("split", few)):
                logits = rows(*shape, dtype)
                token_ops(f"{name} {what}{options}", logits, 30.0 * softcap, extras)
                token_ops(f"{name} {what}{options} anchors", logits, 30.0 * softcap, extras, anchors(logits))
        token_ops(f"{name} wide rows", rows(64, WIDE_ROW, dtype), 0.0, False)
        token_ops(f"{name} rows off 16 bytes", rows(64, 1024, dtype, offset=1), 0.0, False)
        logits = rows(64, 1024, dtype)
        token_ops(f"{name} rows anchors off 16 bytes", logits, 0.0, False, anchors(logits, offset=1))


def all_live_ops() -> None:
    """Rows on 16-byte boundaries and rows off them, with and without a softcap."""
    for dtype, width, softcap in itertools.product(DTYPES, (1024, 1025), (0.0, 30.0)):
        logits = rows(64, width, dtype)
        labels, offsets = torch.zeros(64, dtype=torch.int64), torch.tensor([0, 5, 5])
        lse = torch.zeros(64, dtype=torch.promote_types(dtype, torch.float32))
        name = f"{str(dtype).removeprefix('torch.')} {width}" + " softcap" * (softcap > 0)
        head = (-100, 1.0, softcap, width)
        for options, given in (("", None), (" anchors", anchors(logits))):
            with launches(f"live_columns {name}{options}"):
                kernels.live_columns(logits, labels, lse, 2.0**-12, 32, *head, given)
            with launches(f"live_grads {name}{options}"):
                kernels.live_grads(logits, labels, lse, lse, torch.arange(5), offsets, 32, *head, given)


def all_live_sums() -> None:
    """Rows of dW on 16-byte boundaries and off them."""
    for dtype, width in itertools.product(DTYPES, (512, 513)):
        tails = torch.zeros(2, width, dtype=torch.promote_types(dtype, torch.float32))
        tail, made = rows(2, 1023, dtype), rows(5, width, dtype)
        with launches(f"live_sum {str(dtype).removeprefix('torch.')} {width}"):
            kernels.live_sum(tail, tails, made, torch.arange(5), torch.tensor([0, 5, 5]))


def all_live_products() -> None:
    """Rows of g on 16-byte boundaries (8 numbers) and off them."""
    for dtype, live in itertools.product(DTYPES, (7, 5)):
        name = f"{str(dtype).removeprefix('torch.')} {live} live"
        offsets, ids = torch.tensor([0, live, 2 * live]), torch.arange(2 * live) % live
        g, matrix = torch.zeros(256 * (live + 1), dtype=dtype), torch.zeros(256, 512, dtype=dtype)
        dw = torch.zeros(256, 512, dtype=torch.promote_types(dtype, torch.float32))
        labels, factors = torch.zeros(256, dtype=torch.int64), dw[:, 0].contiguous()
        for given, grads in (("", factors[:0]), (" labels", factors)):
            with launches(f"live_dx {name}{given}"):
                live_matmul.live_dx(g, ids, offsets, 128, matrix, dw[:2], factors, labels[: len(grads)], grads)
        with launches(f"live_dw_ {name}"):
            live_matmul.live_dw_(g, ids, offsets, 128, matrix, dw)


def preference(what: str, batch: dict[str, Any]) -> None:
    with launches(what):
        kernels.preference(*batch.values())


def all_preferences() -> None:
    absent = ("scores", "conditions", "objectives", "pair_weights", "pair_betas", "margins")
    for name in LOSS_TYPES:
        preference(name, typed(make_batch(dtype=torch.float32), name))
        preference(f"{name} bare", without(typed(make_batch(dtype=torch.float32), name), *absent))
    for options in OPTION_SETS:
        preference(f"sigmoid {options}", typed(make_batch(), "sigmoid", **options))
    plain = [i for i, row in enumerate(LOSS_TYPES.values()) if not row.couples_batch][:MAX_LOSSES]
    preference("a list", {**make_batch(), "loss_types": plain, "loss_weights": [1.0] * len(plain)})
    preference("many sequences", make_batch(sequences=MANY_SEQUENCES + 1, count=3))
    for dtype, weighted, average in itertools.product((torch.float32, torch.float64), (False, True), (False, True)):
        logps = torch.zeros(100, dtype=dtype)
        with launches(f"sequence_sum {dtype} weighted={weighted} average={average}"):
            kernels.sequence_sum(logps, torch.tensor([0, 7, 100]), logps if weighted else logps[:0], average)


if __name__ == "__main__":
    triton.runtime.driver.set_active(StubDriver())
    print(json.dumps({"triton": triton.__version__}))
    all_token_ops()
    all_live_ops()
    all_live_sums()
    all_live_products()
    all_preferences()
