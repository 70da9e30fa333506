"""The cases of `cpo-kernels check` as tests."""

from fnmatch import fnmatchcase

import pytest

from cpo_kernels.check.compare import Backend, Case
from cpo_kernels.check.run import all_cases, run_case

NEEDS_GPU = ("no-wait/*", "cuda-graph/*")
# 5 GiB, more than a CPU should touch
NEEDS_MEMORY = ("sizes/*/N=1100,V=50257", "options/*,V=50257", "beyond-2^31/bfloat16/elements")
HEAD = ("linear_token_logps/*", "linear_nll/*", "FusedLinearCPOLoss/*", "FusedLinearKTOLoss/*")
LIVE_PRODUCTS = ("live products/*",)  # Triton's
OWN_MATMULS = ("own matmuls/*",)  # of CPUs with bfloat16 instructions
PREFERENCE = ("sequence_sum/*", "loss-types/*", "far/*", "pairs/*")


def matches(case: Case, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(case.name, pattern) for pattern in patterns)


def cases_but(*left_out: str) -> list[Case]:
    """Every case whose name fits none of the patterns, each of which names some."""
    cases = all_cases()
    for pattern in left_out:
        assert any(matches(case, (pattern,)) for case in cases), f"{pattern!r} names no case"
    return [case for case in cases if not matches(case, left_out)]


def parametrize(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def passes(backend: Backend, case: Case) -> None:
    """A case that is skipped has not passed: what cannot run on a device is left out by name."""
    result = run_case(backend, case)
    assert result["status"] == "passed", result["wrong"][:3] or result["reason"]
