"""Every Triton launcher bound and compiled by Triton's own JIT, with no GPU; see bind_triton.py.

TRITON_SITE=FOLDER runs it with the Triton installed there (`make compile-check` does, with the oldest that GPU machines
have) in place of the one in this environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpo_kernels.reference import LOSS_TYPES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launches():
    """What was launched -> rows, one for each kernel."""
    folders = [os.environ.get("TRITON_SITE", ""), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.bind_triton"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    made = {}
    for line in lines[1:]:
        made.setdefault(line["what"], []).append(line)
    return made


def test_every_launcher_compiles(launches):
    kernels = {row["kernel"] for rows in launches.values() for row in rows}
    assert kernels == {
        "scan_kernel", "combine_kernel", "write_kernel", "sequence_sum_kernel", "preference_kernel",
        "aot_values_kernel", "aot_terms_kernel", "prepare_kernel", "scan_sets_kernel", "gather_kernel",
        "sum_sets_kernel", "dx_kernel", "pack_kernel", "dw_kernel",
    }  # fmt: skip
    for name, row in LOSS_TYPES.items():
        assert "preference_kernel" in {r["kernel"] for r in launches[name]}
        assert ("aot_terms_kernel" in {r["kernel"] for r in launches[name]}) == row.couples_batch
        assert launches[name][-1]["specialisation"] != launches[f"{name} bare"][-1]["specialisation"]  # None arguments


def test_logarithms_are_exact_ones(launches):
    """log1p and log-sum-exp correct what a rounded logarithm leaves (Kahan): lg2.approx is wrong by more near 1."""
    approximate = [what for what, rows in launches.items() if any(row["lg2.approx"] for row in rows)]
    assert not approximate


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_rows_off_16_bytes_have_a_variant_with_wide_accesses(launches, dtype):
    """Triton compiles by alignment: one that takes any base pointer moved two bytes at a time and spilled 150 words."""
    for op in ("fwd", "fused", "bwd"):
        (aligned,), (off,) = launches[f"{dtype} rows {op}"], launches[f"{dtype} rows off 16 bytes {op}"]
        assert off["specialisation"] != aligned["specialisation"]
        assert off["wide"] == aligned["wide"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_anchors_and_entropies_are_variants_that_keep_the_wide_accesses(launches, dtype):
    """One for anchors that start anywhere, as those of a chunk do."""
    for op in ("fwd", "fused", "bwd", "bwd entropies"):
        (plain,), (anchored,) = launches[f"{dtype} rows {op}"], launches[f"{dtype} rows anchors {op}"]
        (off,) = launches[f"{dtype} rows anchors off 16 bytes {op}"]
        assert plain["specialisation"] != anchored["specialisation"] == off["specialisation"]
        assert plain["wide"] == anchored["wide"] > 0
    (plain,), (entropies,) = launches[f"{dtype} rows bwd"], launches[f"{dtype} rows bwd entropies"]
    assert plain["specialisation"] != entropies["specialisation"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_anchors_change_the_sweep_of_live_columns_under_a_softcap_only(launches, dtype):
    """Without one the constant of a row is in its shift."""
    for options, same in (("", True), (" softcap", False)):
        _, plain = launches[f"live_columns {dtype} 1024{options}"]
        _, anchored = launches[f"live_columns {dtype} 1024{options} anchors"]
        assert plain["kernel"] == anchored["kernel"] == "scan_sets_kernel"
        assert (plain["specialisation"] == anchored["specialisation"]) == same
        assert plain["wide"] == anchored["wide"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_live_columns_reads_aligned_rows_in_wide_accesses(launches, dtype):
    scan = {width: launches[f"live_columns {dtype} {width}"][-1] for width in (1024, 1025)}
    assert scan[1024]["wide"] > scan[1025]["wide"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_live_sum_moves_aligned_rows_in_wide_accesses(launches, dtype):
    (aligned,), (off,) = (launches[f"live_sum {dtype} {width}"] for width in (512, 513))
    assert aligned["wide"] > off["wide"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_live_products_copy_both_sides_asynchronously(launches, dtype):
    """Rows of g that keep to 16 bytes; off them g goes through registers."""
    (aligned,), (off,) = launches[f"live_dx {dtype} 7 live"], launches[f"live_dx {dtype} 5 live"]
    pack, product = launches[f"live_dw_ {dtype} 7 live"]
    assert aligned["cp.async"] > off["cp.async"] > 0
    assert product["kernel"] == "dw_kernel" and product["cp.async"] > 0
