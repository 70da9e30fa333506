"""The CUDA extension without a GPU: it builds, links, loads beside a stand-in for libtorch_cuda, registers every op,
and checks its arguments. The kernels themselves run in test_host_cuda_*.py.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpo_kernels import library
from tests.kernels import test_kernels

ROOT = Path(__file__).parents[2]
BUILD = (
    "import sys; from pathlib import Path; from tools.compile_table.cuda_table import build; build(Path(sys.argv[1]))"
)
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="this torch has CUDA: cpo-kernels check loads the real one"
    ),
]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """Built for one target, as the number of targets changes no host code."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, env=environment, check=True)
    stub = folder / "libtorch_cuda.so"
    command = ["c++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-xc++", "-", "-o", stub]
    subprocess.run(command, input=STREAM, text=True, check=True)
    ctypes.CDLL(str(stub), ctypes.RTLD_GLOBAL)
    library = next((folder / "lib").rglob("_C_cuda*.so"))
    spec = importlib.util.spec_from_file_location("cpo_kernels._C_cuda", library)
    importlib.util.module_from_spec(spec)
    return library


class CudaKey:
    """Calls the kernels that are registered for CUDA, whatever the device of the tensors."""

    def __getattr__(self, name):
        op, key = getattr(torch.ops.cpo_kernels, name).default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *args: op.redispatch(key, *args)


def test_every_op_is_registered(extension):
    for name in library.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cpo_kernels::{name}", "CUDA")


def test_symbols(extension):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_symbols.py", extension], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def cases_of(test):
    """Its parameters, without those that only a look at the data shows."""
    (mark,) = test.pytestmark
    of_data = ("holds sequence", "with itself", "out of range", "label 45")
    return [case for case in mark.args[1] if not any(words in case[1] for words in of_data)]


@pytest.mark.parametrize("change, message", cases_of(test_kernels.test_preference_errors))
def test_preference_errors(change, message, extension, monkeypatch):
    monkeypatch.setattr(test_kernels, "kernels", CudaKey)
    test_kernels.test_preference_errors(change, message)


@pytest.mark.parametrize("change, message", cases_of(test_kernels.test_errors_name_the_argument))
def test_token_errors(change, message, extension, monkeypatch):
    monkeypatch.setattr(test_kernels, "kernels", CudaKey)
    test_kernels.test_errors_name_the_argument(change, message)


def test_tensors_that_are_not_on_the_gpu(extension):
    none = torch.empty(0)
    with pytest.raises(RuntimeError, match="preference: seq_logps must be a CUDA tensor"):
        CudaKey().preference(*test_kernels.make_batch().values())
    with pytest.raises(RuntimeError, match="sequence_sum: token_logps must be a CUDA tensor"):
        CudaKey().sequence_sum(torch.zeros(5), torch.tensor([0, 5]), none, False)


@pytest.mark.parametrize(
    "logps, cu, weights, message",
    [
        (torch.zeros(5).bfloat16(), torch.tensor([0, 5]), torch.empty(0), "token_logps must be float32 or .* bfloat16"),
        (torch.zeros(5, 1), torch.tensor([0, 5]), torch.empty(0), r"token_logps must have shape \[N\], got \[5, 1\]"),
        (torch.zeros(5), torch.tensor([0, 5]).int(), torch.empty(0), "cu_seqlens must be int64, got int32"),
        (torch.zeros(5), torch.tensor(5), torch.empty(0), r"cu_seqlens must have shape \[S \+ 1\], got \[\]"),
        (torch.zeros(5), torch.tensor([0, 5]), torch.zeros(4), r"token_weights must have shape \[5\], got \[4\]"),
    ],
)
def test_sequence_sum_errors(logps, cu, weights, message, extension):
    with pytest.raises(RuntimeError, match=message):
        CudaKey().sequence_sum(logps, cu, weights, False)
