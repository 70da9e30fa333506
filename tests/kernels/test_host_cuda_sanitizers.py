"""The CUDA kernels as programs of real threads under the sanitizers, which find nothing, and find what is broken."""

import pytest

from tests.support.host_emulation import COMPILER, bites, run_sanitized

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")]

MAIN = "tests/host_cuda/{}_main.cpp"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("kernels", ["preference", "token_logps"])
def test_sanitizers(kernels, sanitizer, tmp_path):
    done = run_sanitized(MAIN.format(kernels), tmp_path / "main", sanitizer)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "kernels, sanitizer, file, there, instead",
    [
        ("preference", "thread", "preference.cuh", "    sync_block();\n    add_to_rows", "    add_to_rows"),
        ("preference", "thread", "aot_rank.cuh", "    sync_block();\n  }\n", "  }\n"),
        ("preference", "address,undefined", "preference.cuh", "s < in.num_sequences;", "s <= in.num_sequences;"),
        ("preference", "address,undefined", "sequence_sum.cuh", "token < end ?", "token <= end ?"),
        ("token_logps", "thread", "row_sums.h", "  sync_block();\n", ""),
        ("token_logps", "thread", "row_sums.h", "  cluster_arrive();\n  cluster_wait();\n  return", "  return"),
        ("token_logps", "address,undefined", "row.h", "if (k < row.vectors) v[j]", "if (k <= row.vectors) v[j]"),
        ("token_logps", "address,undefined", "row.h", "column < row.columns ?", "column <= row.columns ?"),
        ("token_logps", "address,undefined", "row_gradient.h", "label < p.columns", "label <= p.width"),
    ],
)
def test_sanitizers_bite(kernels, sanitizer, file, there, instead, tmp_path):
    assert bites(MAIN.format(kernels), tmp_path, sanitizer, file, there, instead)
