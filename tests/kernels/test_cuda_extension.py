"""The CUDA extension without a GPU: it builds, links, loads beside a stand-in for libtorch_cuda, registers every op,
and checks its arguments. The kernels themselves run in tests/parity.
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
from cpo_kernels.check.errors import error_cases
from cpo_kernels.check.preference import make_batch
from tests.support.host_emulation import HostBackend
from tests.support.parity import parametrize, passes

ROOT = Path(__file__).parents[2]
BUILD = (
    "import sys; from pathlib import Path; from tools.compile_table.cuda_table import build; build(Path(sys.argv[1]))"
)
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'

pytestmark = [
    pytest.mark.slow,
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


@parametrize([case for case in error_cases() if "writes" not in case.name])
def test_errors(case, extension):
    """What would be written is checked last, after the device, and runs on GPUs."""
    passes(HostBackend(CudaKey()), case)


def test_tensors_that_are_not_on_the_gpu(extension):
    with pytest.raises(RuntimeError, match="preference: seq_logps must be a CUDA tensor"):
        CudaKey().preference(*make_batch().values())
    with pytest.raises(RuntimeError, match="sequence_sum: token_logps must be a CUDA tensor"):
        CudaKey().sequence_sum(torch.zeros(5), torch.tensor([0, 5]), torch.empty(0), False)
