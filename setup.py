"""Builds the extensions; everything else about the package is in pyproject.toml.

cpo_kernels._C       CPU kernels, always. Each instruction set is a source file with its own processor flags.
cpo_kernels._C_cuda  CUDA kernels, where torch has CUDA and nvcc is found.

Both use LibTorch's stable ABI and CPython's limited API: one abi3 wheel for torch >= 2.10 and Python >= 3.10.
It compiles as many files at a time as there are cores and prints each with its seconds (`pip install -v` shows that).
CPO_KERNELS_CUDA=0 leaves the CUDA extension out, 1 builds it with a torch without CUDA too, for one that has it.
TORCH_CUDA_ARCH_LIST (e.g. "8.0 9.0") chooses its targets; else all that nvcc knows of CUDA_ARCH_LIST.
"""

import glob
import hashlib
import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

X86 = platform.machine().lower() in ("x86_64", "amd64")
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")]
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
]  # gcc 12 warns about its own intrinsics
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AMX = ["-mamx-tile", "-mamx-bf16"]  # gcc 11, clang 11; an older compiler leaves these kernels out
ISA_FLAGS = {
    "csrc/cpu/token_logps_avx2.cpp": AVX2,
    "csrc/cpu/token_logps_avx512.cpp": AVX512,
    "csrc/cpu/token_logps_avx512bf16.cpp": [*AVX512, "-mavx512bf16", *AMX],
}
HEADERS = glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)
CUDA_ARCH_LIST = "8.0 8.6 8.9 9.0 10.0"  # those that nvcc knows, the newest as PTX too
NVCC_FLAGS = [
    "--threads=0",
    "-std=c++17",
    "-O3",
    "--compiler-options=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
]


def cpu_extension() -> Extension:
    sources = ["csrc/module.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    return Extension(
        "cpo_kernels._C",
        [source for source in sources if X86 or source not in ISA_FLAGS],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=MACROS + ([("CPO_X86", "1")] if X86 else []),
        depends=HEADERS,
        py_limited_api=True,
        language="c++",
    )


def cuda_extension() -> Extension | None:
    wanted = os.environ.get("CPO_KERNELS_CUDA", "")
    if wanted == "0" or (wanted != "1" and not (torch.version.cuda and find_nvcc())):
        return None
    if not find_nvcc():
        raise SystemExit("CPO_KERNELS_CUDA=1 needs nvcc, of the CUDA toolkit, on PATH or under CUDA_HOME")
    return Extension(
        "cpo_kernels._C_cuda",
        ["csrc/module_cuda.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "torch_cuda"],
        define_macros=[*MACROS, ("USE_CUDA", "1")],
        depends=HEADERS,
        py_limited_api=True,
        language="c++",
    )


def find_nvcc() -> str | None:
    backend = cpp_extension.CUDA_HOME
    beside = os.path.join(backend, "bin", "nvcc") if backend else ""
    return beside if os.path.exists(beside) else shutil.which("nvcc")


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows the flags."""
    command = [*compiler, *flags, "-E", "-xc++", os.devnull, "-o", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def default_targets() -> list[str]:
    """compute_100 came with CUDA 12.8."""
    listed = subprocess.check_output([find_nvcc() or "nvcc", "--list-gpu-arch"], text=True).split()
    names = [name for name in CUDA_ARCH_LIST.split() if f"compute_{name.replace('.', '')}" in listed]
    if not names:
        raise SystemExit(f"nvcc compiles for none of {CUDA_ARCH_LIST}: set TORCH_CUDA_ARCH_LIST to what it knows")
    return [*names[:-1], f"{names[-1]}+PTX"]


def nvcc_targets() -> list[str]:
    """-gencode flags of TORCH_CUDA_ARCH_LIST: machine code, and with +PTX what newer GPUs compile when they load it."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or default_targets()
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildExtensions(build_ext):
    """Compiles the files of all extensions side by side, each with its own flags, and skips what is up to date. Objects
    are kept in build/objects, so that pip does not compile again what an earlier install did."""

    def finalize_options(self) -> None:
        chosen = self.build_temp
        super().finalize_options()
        if chosen is None:
            self.build_temp = os.path.join("build", "objects")

    def build_extensions(self) -> None:
        os.makedirs(self.build_temp, exist_ok=True)
        newest_header = max(os.path.getmtime(path) for path in [*HEADERS, __file__])
        # the slowest first: CUDA before C++, long files before short ones
        jobs = [(ext, source) for ext in self.extensions for source in ext.sources]
        jobs.sort(key=lambda job: (job[1].endswith(".cu"), os.path.getsize(job[1])), reverse=True)
        cores = os.cpu_count() or 1
        print(f"{len(jobs)} files to compile, {cores} at a time", flush=True)
        with ThreadPoolExecutor(cores) as pool:
            made = list(pool.map(lambda job: self.compile(*job, newest_header), jobs))
        for ext in self.extensions:
            self.link(ext, [made[jobs.index((ext, source))] for source in ext.sources])

    def link(self, ext: Extension, objects: list[str]) -> None:
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if ext.name.endswith("_C_cuda"):
            self.link_cuda(ext, objects, target)
            return
        self.compiler.link_shared_object(
            objects, target, libraries=ext.libraries, library_dirs=ext.library_dirs, target_lang="c++"
        )

    def link_cuda(self, ext: Extension, objects: list[str], target: str) -> None:
        """By nvcc, with its static runtime: the wheel asks for no library of the CUDA toolkit."""
        folders = list(ext.library_dirs)
        if not torch.version.cuda:  # an empty stand-in under the name that is looked for when the extension is loaded
            folders.append(os.path.join(self.build_temp, "stub"))
            os.makedirs(folders[-1], exist_ok=True)
            stub = os.path.join(folders[-1], "libtorch_cuda.so")
            compiler = os.environ.get("CXX", "c++").split()
            subprocess.check_call(
                [*compiler, "-shared", "-Wl,-soname,libtorch_cuda.so", "-xc++", os.devnull, "-o", stub]
            )
        options = ["-Xlinker", "--no-as-needed", "-Xlinker", "--exclude-libs,ALL"]
        options += [f"-L{folder}" for folder in folders] + [f"-l{name}" for name in ext.libraries]
        subprocess.check_call([find_nvcc() or "nvcc", "-shared", "-nodlink", "-o", target, *objects, *options])

    def compile(self, ext: Extension, source: str, newest_header: float) -> str:
        """The object of a source; its name holds a digest of the command, which names compiler, flags and torch."""
        defines = [f"-D{macro}={value}" for macro, value in ext.define_macros]
        python = [path for path in self.compiler.include_dirs if path]
        includes = [f"-I{path}" for path in python] + [part for path in ext.include_dirs for part in ("-isystem", path)]
        if source.endswith(".cu"):
            command = [find_nvcc() or "nvcc", *NVCC_FLAGS, *nvcc_targets()]
        else:
            compiler = os.environ.get("CXX", "c++").split()
            flags = ISA_FLAGS.get(source, [])
            if AMX[0] in flags and not accepts(compiler, AMX):
                flags = [flag for flag in flags if flag not in AMX]
            command = [*compiler, "-fPIC", *CXX_FLAGS, *flags]
        command += [*defines, *includes, "-c", source]
        digest = hashlib.sha256(" ".join([torch.__version__, *command]).encode()).hexdigest()[:12]
        target = os.path.abspath(os.path.join(self.build_temp, f"{os.path.basename(source)}-{digest}.o"))
        if not self.force and os.path.exists(target):
            if os.path.getmtime(target) > max(newest_header, os.path.getmtime(source)):
                return target
        start = time.perf_counter()
        subprocess.check_call([*command, "-o", target])
        print(f"{source}: {time.perf_counter() - start:.0f} s", flush=True)
        return target


extensions = [cpu_extension(), cuda_extension()]
setup(
    ext_modules=[extension for extension in extensions if extension],
    cmdclass={"build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
