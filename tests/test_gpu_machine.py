"""The tests themselves where torch sees a GPU: what makes CPU tensors for Triton still runs, in its interpreter."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tests_of_triton_run_where_a_gpu_is_seen():
    """`make test` on such a machine failed in every test that names triton: "takes GPU tensors"."""
    files = ["tests/parity/test_triton.py", "tests/ops/test_ops.py"]
    chosen = "layouts/float32 or pairs or backend_by_name"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.pretend_gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    run = subprocess.run([*command, "-rA", *files, "-k", chosen], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert run.stdout.count("PASSED") >= 12 and "SKIPPED" not in run.stdout
