"""Every case of `cpo-kernels check` on a GPU, Triton compiled. The check runs once, in processes of its own: in this
one Triton is interpreted.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from cpo_kernels.backends import dispatch
from cpo_kernels.check.run import all_cases

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
BACKENDS = [impl for impl in ("triton", "cuda") if not dispatch.missing(impl)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("check") / "check.json"
    flags = ["--device", "cuda", "--impl", *BACKENDS, "--processes", "4", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-m", "cpo_kernels.check.run", *flags], env=environment, stdout=subprocess.DEVNULL)
    return {(result["backend"], result["case"]): result for result in json.loads(out.read_text())["cases"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [case.name for case in all_cases()])
def test_case(name, backend, results):
    result = results[backend, name]
    if result["status"] == "skipped":
        pytest.skip(result["reason"])
    assert result["status"] == "passed", result["wrong"][:3] or result["reason"]
