"""tools/check_symbols.py lets the built extension pass, and none that asks for what torch 2.10 lacks."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_symbols.py"
pytestmark = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("c++")), reason="needs binutils and a C++ compiler"
)


def check(*arguments):
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)


def test_the_extension_passes():
    spec = importlib.util.find_spec("cpo_kernels._C")
    if spec is None:
        pytest.skip("the C++ extension is not built")
    done = check(spec.origin)
    assert done.returncode == 0 and "torch_call_dispatcher" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "name, why",
    [
        ("torch_from_blob", "not in the stable ABI of torch 2.10"),  # since 2.11
        ("aoti_torch_never_was", "not in the stable ABI"),
        ("_ZN2at5emptyEv", "C++ name of libtorch"),
        ("_ZN3cpo4cuda10preferenceEv", "left undefined by our own sources"),
        ("cudaLaunchKernelExC", "CUDA runtime"),
    ],
)
def test_a_name_that_must_not_be_asked_for(name, why, tmp_path):
    library = tmp_path / "extension.so"
    source = f'extern "C" int {name}(); int call() {{ return {name}(); }}'
    subprocess.run(["c++", "-shared", "-fPIC", "-xc++", "-", "-o", library], input=source, text=True, check=True)
    done = check(library)
    assert done.returncode == 1 and f"{name} " in done.stdout and why in done.stdout
