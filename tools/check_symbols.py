"""Does a compiled extension ask for nothing that torch TARGET lacks?

    python tools/check_symbols.py LIBRARY_OR_WHEEL... [--target 2.10] [--include DIR]

Lists what the libraries take from libtorch, and fails where a name is not declared by torch's C shims for the target
version, is a C++ name of libtorch (no stable ABI), is left undefined by our own sources, or belongs to the CUDA runtime
(which is linked statically). The shims tell the age of their newer functions themselves; for the rest, --include names
the headers of the target torch (.../site-packages/torch/include) instead of those of the torch that is installed here.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SHIMS = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")
WRONG = (
    (re.compile(r"_ZNK?(2at|3c10|5torch|6caffe2)"), "is a C++ name of libtorch, which changes between versions"),
    (re.compile(r"_ZNK?3cpo"), "is left undefined by our own sources"),
    (re.compile(r"cu(da)?[A-Z]|__cuda"), "belongs to the CUDA runtime or driver, which must not be asked for by name"),
)


def declared(include: Path, target: str) -> set[str]:
    """The C functions of torch's shims that the target version has."""
    major, minor = (int(part) for part in target.split(".")[:2])
    source = "\n".join(f"#include <{shim}>" for shim in SHIMS)
    command = [*os.environ.get("CXX", "c++").split(), "-E", "-P", "-xc++", "-std=c++17", "-", f"-I{include}"]
    command += [f"-DTORCH_TARGET_VERSION={(major << 56) | (minor << 48)}ULL", "-DUSE_CUDA"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def undefined(library: Path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return sorted({line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines() if line})


def faults(symbols: list[str], known: set[str], target: str) -> list[str]:
    found = [f"{name} {why}" for name in symbols for pattern, why in WRONG if pattern.match(name)]
    newer = [name for name in symbols if re.match(r"(aoti_)?torch_", name) and name not in known]
    return found + [f"{name} is not in the stable ABI of torch {target}" for name in newer]


def libraries(path: Path, folder: Path) -> list[Path]:
    if path.suffix != ".whl":
        return [path]
    with zipfile.ZipFile(path) as wheel:
        return [Path(wheel.extract(name, folder)) for name in wheel.namelist() if name.endswith(".so")]


def installed_include() -> Path:
    import torch

    return Path(torch.__file__).parent / "include"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="LIBRARY_OR_WHEEL")
    parser.add_argument("--target", default="2.10")
    parser.add_argument("--include", type=Path, help="torch's headers; default: those of the torch installed here")
    args = parser.parse_args()
    known, wrong = declared(args.include or installed_include(), args.target), []
    with tempfile.TemporaryDirectory() as folder:
        for library in [found for path in args.paths for found in libraries(path, Path(folder))]:
            symbols = undefined(library)
            taken = [name for name in symbols if re.match(r"(aoti_)?torch_|_?Py", name)]
            print(f"{library.name}: {len(taken)} names of libtorch and libpython\n  " + "\n  ".join(taken))
            wrong += [f"{library.name}: {fault}" for fault in faults(symbols, known, args.target)]
    print("\n".join(wrong) if wrong else f"nothing newer than torch {args.target}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
