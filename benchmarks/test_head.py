"""pytest-benchmark over the same subjects: `pytest benchmarks --benchmark-enable`; a tiny head runs in every test run.

Figures that are quoted come from `python -m benchmarks.run`: there the subjects take turns in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_run_writes_a_results_file(tmp_path):
    """The command behind the quoted figures, on the small head with 4 labelled rows a pair."""
    out = tmp_path / "cpu.json"
    sizes = ["--head", "smollm2-135m", "--pairs", "1", "--length", "4", "--prompt", "2", "--rounds", "2"]
    subjects = ["--subjects", "ours", "naive_unmasked", "--dtypes", "float32", "--out", str(out)]
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-m", "benchmarks.run", *sizes, *subjects], cwd=root, check=True)
    report = json.loads(out.read_text())
    assert [w["frozen"] for w in report["workloads"]] == [False, True] and report["environment"]["versions"]["torch"]
    for workload in report["workloads"]:
        assert workload["labelled"] == 4 and list(workload["subjects"]) == ["products", "ours", "naive_unmasked"]
        for row in workload["subjects"].values():
            assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["peak_bytes"] > 0
