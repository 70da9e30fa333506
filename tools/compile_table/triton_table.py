"""What the compiler makes of every Triton kernel without a GPU: `python -m tools.compile_table.triton_table [--check]`.

Compiles each specialisation that a user can reach for sm_80, sm_90, sm_100 and gfx942, reads the machine code, and
writes a table per target to benchmarks/results/compile, so that a change shows in review. Fails where a kernel spills,
uses local memory, needs more registers than its planned occupancy allows, where a loop that should move 16 bytes
at a time moves fewer, or where a barrier is missing. --check compares with the kept tables instead of writing them.
"""

import argparse
import collections
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # before the kernels are imported; tests, which import this file, need the interpreter
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cpo_kernels.kernels import tuning
from tools.compile_table.variants import variants

TABLES = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "compile"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COLUMNS = ("kernel", "warps", "registers", "spills", "local_bytes", "shared_bytes", "loop_loads", "loop_stores")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# 32-bit registers of a multiprocessor; AMD: 512 vector registers for each of 64 lanes of 4 units.
REGISTERS = {"cuda": 65536, "hip": 131072}


def run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def widths(instructions: list[str]) -> str:
    """'128x4 32x1': how many accesses of how many bits."""
    seen = collections.Counter(instructions)
    return " ".join(f"{bits}x{count}" for bits, count in sorted(seen.items(), key=lambda x: -int(x[0])))


def loops(code: list[tuple[str, str]]) -> set[int]:
    """Indices of instructions inside a loop; code is (label defined here or '', instruction)."""
    places = {label: i for i, (label, _) in enumerate(code) if label}
    inside: set[int] = set()
    for i, (_, instruction) in enumerate(code):
        target = re.search(r"\bBRA\S*\s.*`\((\S+)\)|\bs_c?branch\S*\s+(\S+)", instruction)
        at = places.get((target[1] or target[2]) if target else "", i + 1)
        if at <= i:
            inside |= set(range(at, i + 1))
    return inside


def accesses(code: list[tuple[str, str]], pattern: str, bits) -> list[str]:
    inside = loops(code)
    found = ((i, re.search(pattern, text)) for i, (_, text) in enumerate(code))
    return [bits(match) for i, match in found if match and i in inside]


def parse(text: str, label: str, instruction: str) -> list[tuple[str, str]]:
    code, pending = [], ""
    for line in text.splitlines():
        if match := re.match(label, line):
            pending = match[1]
        elif re.search(instruction, line):
            code.append((pending, line))
            pending = ""
    return code


def nvidia_width(access: re.Match) -> str:
    return next((bits for bits in ("128", "64", "16", "8") if re.search(rf"\.[US]?{bits}\b", access[0])), "32")


def read_nvidia_kernel(usage: str, sass: str) -> dict[str, object]:
    """The columns of one kernel: its line of cuobjdump --dump-resource-usage, and its code from nvdisasm -c."""
    registers, stack, shared, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups()
    code = parse(sass, r"^(\.L_x_\d+):", r"/\*[0-9a-f]{4,}\*/\s+\S")
    return {
        "registers": int(registers),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "local_bytes": int(stack) + int(local),
        "shared_bytes": int(shared),
        "loop_loads": widths(accesses(code, r"\bLDG[.\w]*", nvidia_width)),
        "loop_stores": widths(accesses(code, r"\bSTG[.\w]*", nvidia_width)),
    }


def read_nvidia(compiled) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        sass = run("nvdisasm", "-c", file.name)
    return read_nvidia_kernel(usage, sass) | {"barriers": len(re.findall(r"\bBAR\.SYNC", sass))}


def read_amd(compiled) -> dict[str, object]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    code = parse(text, r"^(\.LBB\w+):", r"^\s+[a-z]\w+_\w+")
    size = {
        "dwordx4": "128",
        "dwordx3": "96",
        "dwordx2": "64",
        "dword": "32",
        "ushort": "16",
        "short": "16",
        "ubyte": "8",
        "byte": "8",
    }

    def bits(match) -> str:
        return size[match[1].removesuffix("_d16_hi")]

    access = r"\b(?:global|buffer|flat)_{}_(dwordx\d|dword|u?short(?:_d16_hi)?|u?byte)\b"
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"),  # scalar registers spill into lanes of vector registers, not into memory
        "local_bytes": field("private_segment_fixed_size"),
        "shared_bytes": field("group_segment_fixed_size"),
        "loop_loads": widths(accesses(code, access.format("load"), bits)),
        "loop_stores": widths(accesses(code, access.format("store"), bits)),
        "barriers": len(re.findall(r"\bs_barrier\b", text)),
    }


def compile_row(job: tuple[str, int]) -> tuple[str, dict[str, object], list[str]]:
    """(target, row of the table, what is wrong with it)."""
    name, index = job
    variant, target = variants()[index], TARGETS[name]
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(n),): value for n, value in variant.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned},
    )
    options = tuning.options(variant.launch, amd=target.backend == "hip")
    compiled = triton.compile(source, target=target, options=options)
    read = read_nvidia(compiled) if target.backend == "cuda" else read_amd(compiled)
    row = {"kernel": variant.label, "warps": options["num_warps"], **read}
    wrong = [f"{row[key]} {key}" for key in ("spills", "local_bytes") if row[key]]
    limit = REGISTERS[target.backend] // (32 * max(variant.resident_warps, variant.launch.warps))
    if variant.resident_warps and row["registers"] > limit:
        wrong.append(f"{row['registers']} registers, {limit} for {variant.resident_warps} resident warps")
    narrow = [w for w in f"{row['loop_loads']} {row['loop_stores']}".split() if not w.startswith("128x")]
    if variant.wide and narrow:
        wrong.append(f"narrow accesses in a loop: {' '.join(narrow)}")
    return name, row, [f"{name} {variant.label}: {w}" for w in wrong]


def table(rows: list[dict[str, object]]) -> str:
    out = io.StringIO()
    out.write(f"# triton {triton.__version__}\n")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def unguarded(rows: list[dict[str, object]]) -> list[str]:
    """Kernels that overwrite a row whose edges they read after the scan's barriers: without one more barrier than the
    kernel without edges has, a warp may read what another one has written."""
    barriers = {str(row["kernel"]): int(str(row["barriers"])) for row in rows}
    edged = [name for name in barriers if name.startswith("fused ") and " edges" in name]
    return [
        f"{name}: no barrier between the edges and the write"
        for name in edged
        if barriers[name] <= barriers.get(name.replace(" edges", "").replace(" off 16 bytes", ""), -1)
    ]


def differences(kept: str, seen: str) -> list[str]:
    old, new = (dict(line.split(",", 1) for line in text.splitlines()[1:]) for text in (kept, seen))
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    return [f"{n}: was {old.get(n, 'absent')}, is {new.get(n, 'absent')}" for n in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", default="", help="kernels whose label holds this")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    chosen = [i for i, v in enumerate(variants()) if args.only in v.label]
    rows: dict[str, list] = {name: [] for name in args.targets}
    wrong: list[str] = []
    with ProcessPoolExecutor(args.processes) as pool:
        for name, row, seen in pool.map(compile_row, [(t, i) for t in args.targets for i in chosen], chunksize=8):
            rows[name].append(row)
            wrong += seen
    for name in args.targets:
        path, text = TABLES / f"triton-{name}.csv", table(rows[name])
        wrong += [f"{name} {line}" for line in unguarded(rows[name])]
        if not args.check and not args.only:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif args.check and path.read_text().splitlines()[0] == text.splitlines()[0]:
            kept = [line for i, line in enumerate(path.read_text().splitlines()) if i < 2 or args.only in line]
            wrong += [f"{name} {line}" for line in differences("\n".join(kept), text)]
        print(f"{name}: {len(rows[name])} kernels" + ("" if not args.only else "\n" + text))
    print("\n".join(wrong) if wrong else "as planned")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
