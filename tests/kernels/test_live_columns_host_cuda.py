"""The CUDA kernels of live columns on the CPU (tests/host_cuda), against the reference in float64."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from cpo_kernels import library
from cpo_kernels.check.live import SHAPES, live_cases, make, run_live
from cpo_kernels.check.run import run_case
from tests.support.host_emulation import (
    COMPILER,
    LIBRARY_FLAGS,
    HostBackend,
    address,
    bites,
    broken_copy,
    compile_host,
    run_sanitized,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of live_columns_ops.cpp
CASES = {case.name: case for case in live_cases() if case.group == "live"}
OPS, MAIN = (f"tests/host_cuda/live_columns_{name}.cpp" for name in ("ops", "main"))


class Call(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("dtype", "rows", "stride", "width", "columns", "ignore", "set_rows", "seed")),
        *((n, ctypes.c_double) for n in ("scale", "softcap", "eps")),
        *((n, ctypes.c_void_p) for n in ("logits", "labels", "lse", "anchors")),
    ]


class SumCall(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("dtype", "stride", "sets", "columns", "width", "seed")]


def host_kernels(host_library, seed=0):
    """The ops of the host emulation, with the signatures of library.py; outputs begin as numbers that are wrong."""

    def call(logits, labels, lse, eps, set_rows, ignore_index, scale, softcap, vocab_size, anchors=None):
        shape = (logits.shape[0], logits.stride(0), logits.shape[1], vocab_size, ignore_index, set_rows, seed)
        pointers = map(address, (logits, labels, lse, anchors))
        return ctypes.byref(Call(DTYPES.index(logits.dtype), *shape, scale, softcap, eps, *pointers))

    def pointers(*tensors):
        return [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    def live_columns(logits, labels, lse, eps, set_rows, *head):
        rows, sets, acc = logits.shape[0], -(-logits.shape[0] // set_rows), library.acc_dtype(logits.dtype)
        live = torch.full((sets, head[3]), 255, dtype=torch.uint8)
        tail, sums = torch.full((sets, head[3]), torch.nan, dtype=acc), torch.full((rows,), 99.0, dtype=acc)
        if not rows:
            return live.bool(), tail, sums
        arguments = call(logits, labels, lse, eps, set_rows, *head)
        host_library.host_live_columns(arguments, *pointers(live, tail, sums))
        assert live.max() <= 1, "a flag was left unwritten"
        return live.bool(), tail, sums

    def live_grads(logits, labels, lse, row_sums, columns, offsets, set_rows, *head):
        if not len(logits):
            return logits.new_empty(0)
        counts = offsets.diff() + 1
        rows = torch.full_like(counts, set_rows)
        rows[-1] = logits.shape[0] - set_rows * (len(counts) - 1)
        out = torch.full((int((rows * counts).sum()),), 77.0, dtype=logits.dtype)
        arguments = call(logits, labels, lse, 0.0, set_rows, *head)
        host_library.host_live_grads(arguments, *pointers(row_sums, columns, offsets, out))
        return out

    def live_sum(tail, tails, made, columns, offsets):
        out = made.new_full((tail.shape[1], tails.shape[1]), torch.nan)
        sizes = (tail.stride(0), *tail.shape, tails.shape[1], seed)
        arguments = ctypes.byref(SumCall(DTYPES.index(made.dtype), *sizes))
        host_library.host_live_sum(arguments, *pointers(tail, tails, made, columns, offsets, out))
        return out

    return SimpleNamespace(live_columns=live_columns, live_grads=live_grads, live_sum=live_sum)


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    return ctypes.CDLL(compile_host(OPS, tmp_path_factory.mktemp("host_cuda") / "ops.so", *LIBRARY_FLAGS))


@pytest.mark.parametrize("name", CASES)
def test_check_cases(name, host_library):
    result = run_case(HostBackend(host_kernels(host_library, seed=len(name))), CASES[name])
    assert result["status"] == "passed", result["wrong"][:3] or result["reason"]


def run(kernels, name, dtype):
    return run_live(kernels, SHAPES[name], make(SHAPES[name], dtype, torch.device("cpu")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_order_of_threads_gives_the_same_bits(dtype, host_library):
    first, *others = (run(host_kernels(host_library, s), "last set short, odd sizes", dtype) for s in range(3))
    for other in others:
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, other, strict=True))


def test_a_missing_barrier_changes_what_fibers_compute(tmp_path):
    root = broken_copy(tmp_path, "live_columns.cuh", "  sync_block();\n", "")
    broken = ctypes.CDLL(compile_host(OPS, tmp_path / "ops.so", *LIBRARY_FLAGS, root=root))
    tails = [run(host_kernels(broken, seed), "aligned", torch.float32)[1] for seed in range(4)]
    assert torch.stack(tails).isnan().any()  # shared memory that was not written yet


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers(sanitizer, tmp_path):
    done = run_sanitized(MAIN, tmp_path / "main", sanitizer)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "sanitizer, there, instead",
    [
        ("thread", "  sync_block();\n", ""),
        ("address,undefined", "column < columns ? widened", "column <= columns ? widened"),
        ("address,undefined", "j + e * kWarp < count ? ids", "j + e * kWarp <= count ? ids"),
        ("address,undefined", "kPer - 1) < columns", "0) < columns"),
        ("address,undefined", "low < end && ids", "ids"),
        ("address,undefined", "v < columns ? widened(tail", "v <= columns ? widened(tail"),
        ("address,undefined", "x[e] = column < width", "x[e] = column <= width"),
        ("address,undefined", "if (v + r >= columns) return;", ""),
        ("address,undefined", "0) >= width) return;", "0) > width) return;"),
    ],
)
def test_sanitizers_bite(sanitizer, there, instead, tmp_path):
    assert bites(MAIN, tmp_path, sanitizer, "live_columns.cuh", there, instead)
