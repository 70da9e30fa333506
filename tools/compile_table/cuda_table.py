"""What nvcc makes of every CUDA kernel, without a GPU: `python -m tools.compile_table.cuda_table [--check]`.

Builds the CUDA extension as setup.py does, for TORCH_CUDA_ARCH_LIST or setup.py's default, reads the machine code of
each target, and writes a table per target to benchmarks/results/compile, so that a change shows in review. Fails where
a kernel spills or uses local memory, where a loop over logits makes an access of less than 16 bytes, and where the
linked extension asks for what torch 2.10 lacks (tools/check_symbols.py). --check compares with the kept tables instead
of writing them, where the same nvcc made them. Needs nvcc, and triton for its disassembler; 3 minutes on two cores.
"""

import argparse
import collections
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from distutils.core import run_setup  # setuptools' own copy, like what setup.py runs
from pathlib import Path

from tools.compile_table.triton_table import TABLES, TOOLS, differences, read_nvidia_kernel, run

ROOT = Path(__file__).parent.parent.parent
COLUMNS = ("kernel", "registers", "spills", "local_bytes", "shared_bytes", "loop_loads", "loop_stores")
WIDE = re.compile(r"(scan|write|fused)_kernel<")  # their loops go over logits


def build(folder: Path) -> Path:
    """The CUDA extension, linked, in a folder that has none of its objects yet."""
    os.environ["CPO_KERNELS_CUDA"] = "1"
    os.chdir(ROOT)
    distribution = run_setup("setup.py", stop_after="init")
    distribution.ext_modules = [e for e in distribution.ext_modules if e.name.endswith("_C_cuda")]
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "objects")
    command.ensure_finalized()
    command.run()
    return next((folder / "lib").rglob("_C_cuda*.so"))


def machine_code(library: Path, folder: Path) -> dict[str, list[Path]]:
    """The files of each target: one for each source."""
    subprocess.run(
        [TOOLS / "cuobjdump", "-xelf", "all", library.resolve()], cwd=folder, check=True, capture_output=True
    )
    files = collections.defaultdict(list)
    for path in sorted(folder.glob("*.cubin")):
        files[path.suffixes[-2].removeprefix(".")].append(path)
    return files


def read(file: Path) -> list[dict[str, object]]:
    usage = dict(re.findall(r"Function (\S+):\s+(.*)", run("cuobjdump", "--dump-resource-usage", str(file))))
    sections = re.split(r"^//-+ \.text\.(\S+) -+$", run("nvdisasm", "-c", str(file)), flags=re.MULTILINE)[1:]
    kernels = zip(sections[::2], sections[1::2], strict=True)
    return [{"kernel": name, **read_nvidia_kernel(usage[name], sass)} for name, sass in kernels]


def readable(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Kernels by their C++ names, e.g. fused_kernel<BFloat16 512 false false>, in alphabetic order."""
    mangled = "\n".join(str(row["kernel"]) for row in rows)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    for row, name in zip(rows, names, strict=True):
        row["kernel"] = re.sub(r"^void |cpo::cuda::|\(.*", "", name).replace(",", "")
    return sorted(rows, key=lambda row: str(row["kernel"]))


def faults(row: dict[str, object]) -> list[str]:
    found = [f"{row[key]} {key}" for key in ("spills", "local_bytes") if row[key]]
    if WIDE.match(str(row["kernel"])):
        moved = f"{row['loop_loads']} {row['loop_stores']}".split()
        narrow = [width for width in moved if not width.startswith("128x")]
        found += [f"narrow accesses in a loop: {' '.join(narrow)}"] if narrow else []
        found += [] if moved else ["no access in a loop"]
    return [f"{row['kernel']}: {fault}" for fault in found]


def table(rows: list[dict[str, object]], version: str) -> str:
    out = io.StringIO()
    out.write(f"# nvcc {version}\n")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: the CUDA kernels cannot be compiled. It comes with the CUDA toolkit")
        return 1
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        library = build(Path(name))
        symbols = subprocess.run([sys.executable, ROOT / "tools" / "check_symbols.py", library], capture_output=True)
        if symbols.returncode:
            wrong += symbols.stdout.decode().splitlines()[-1:]
        files = machine_code(library, Path(name))
        rows = {target: readable([row for file in of for row in read(file)]) for target, of in files.items()}
    version = re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)[1]
    for target in sorted(rows, key=lambda name: int(name.removeprefix("sm_"))):
        wrong += [f"{target} {fault}" for row in rows[target] for fault in faults(row)]
        path, text = TABLES / f"cuda-{target}.csv", table(rows[target], version)
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists():
            wrong.append(f"{path.relative_to(ROOT)} does not exist: run this without --check")
        elif path.read_text().splitlines()[0] == text.splitlines()[0]:
            wrong += [f"{target} {line}" for line in differences(path.read_text(), text)]
        print(f"{target}: {len(rows[target])} kernels")
    print("\n".join(wrong) if wrong else "as planned")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
