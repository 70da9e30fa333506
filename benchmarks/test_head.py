"""pytest-benchmark over the same subjects: `pytest benchmarks --benchmark-enable`; a tiny head runs in every test run.

Figures that are quoted come from `python -m benchmarks.run`: there the subjects take turns in processes of their own.
"""

import os

import pytest
import torch

from benchmarks.subjects import HEADS, SUBJECTS, Shape, Workload, why_missing

# Small enough for CI; CPO_BENCH_HEAD=qwen2.5-0.5b runs the workload of the project's bar.
TINY = Shape(hidden=64, vocab=1999, pairs=2, length=16, prompt=8)
NAME = os.environ.get("CPO_BENCH_HEAD")
SHAPE = Shape(*HEADS[NAME], pairs=4, length=128, prompt=64) if NAME else TINY


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_head(benchmark, name, dtype, frozen):
    if reason := why_missing(name):
        pytest.skip(reason)
    if name in ("cce", "liger") and not NAME:
        pytest.skip("compiles for seconds: set CPO_BENCH_HEAD")
    workload = Workload(SHAPE, dtype, frozen)
    step = SUBJECTS[name](workload)
    loss, dx, dw = benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    assert (dw is None) == frozen and dx.isfinite().all()
    if name == "ours":
        want, want_dx, _ = SUBJECTS["naive"](Workload(SHAPE, torch.float32, frozen))()
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(loss.float(), want.float(), rtol=tolerance, atol=tolerance)
        assert (dx.float() - want_dx).norm() < tolerance * want_dx.norm()
