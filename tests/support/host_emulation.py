"""Builds programs from the CUDA kernel sources as plain C++ (tests/host_cuda), and runs them under the sanitizers."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.check.compare import Backend

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17",
    "-DCPO_HOST_CUDA",
    "-Itests/host_cuda",
    "-pthread",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
)
# Fibers are switched by longjmp between stacks, which fortified C libraries refuse.
LIBRARY_FLAGS = ("-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE")


def compile_host(source: str, target: Path, *flags: str, root: Path = ROOT) -> Path:
    subprocess.run([COMPILER, *FLAGS, *flags, source, "-o", target], cwd=root, check=True)
    return target


def run_sanitized(source: str, target: Path, sanitizer: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """Builds a program of real threads with thread or address,undefined, and runs it."""
    flags = ("-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DCPO_HOST_THREADS")
    program = compile_host(source, target, *flags, root=root)
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


def broken_copy(folder: Path, file: str, there: str, instead: str) -> Path:
    """A copy of the sources in which csrc/cuda/<file> has `instead` for `there`."""
    for part in ("csrc", "tests/host_cuda"):
        shutil.copytree(ROOT / part, folder / part)
    changed = folder / "csrc" / "cuda" / file
    text = changed.read_text()
    assert there in text, f"{file} has no {there!r}"
    changed.write_text(text.replace(there, instead))
    return folder


def bites(source: str, folder: Path, sanitizer: str, file: str, there: str, instead: str) -> bool:
    """Whether the program of a broken copy fails under the sanitizer."""
    done = run_sanitized(source, folder / "main", sanitizer, root=broken_copy(folder, file, there, instead))
    return done.returncode != 0 and bool(re.search("ThreadSanitizer|AddressSanitizer|runtime error", done.stderr))


class HostBackend(Backend):
    """A backend of `cpo-kernels check` with the kernels of the host emulation: a GPU's rules on CPU tensors."""

    def __init__(self, kernels: Any) -> None:
        super().__init__("cuda", torch.device("cpu"))
        self._kernels = kernels

    @property
    def kernels(self) -> Any:
        return self._kernels
