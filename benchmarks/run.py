"""Times the head side by side: `python -m benchmarks.run [--rounds 7] [--head qwen2.5-0.5b] [--out FILE]`.

Every subject runs in a process of its own on the same tensors; the processes take turns, one step each, so that what
else the machine does hits all of them alike. The first step (compilation, first touch) is reported apart. Ratios are
medians over rounds of the ratio to `products` in the same round.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.subjects import HEADS, PEER_PACKAGES, SUBJECTS, Shape, why_missing

RESULTS = Path(__file__).parent / "results"


class Subject:
    """A process that runs one step at a time."""

    def __init__(self, name: str, arguments: dict) -> None:
        self.name = name
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.measure", name, json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: str) -> float:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"subject {self.name} died at {command!r}: see its message above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(threads: int) -> dict:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = ["torch", "cpo-kernels", *PEER_PACKAGES.values()]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
    }


def measure(shape: Shape, dtype: str, frozen: bool, names: list[str], rounds: int, threads: int) -> dict:
    arguments = {"shape": asdict(shape), "dtype": dtype, "frozen": frozen, "threads": threads}
    subjects, rows = [], {}
    try:
        for name in names:
            subject = Subject(name, arguments)
            subjects.append(subject)
            rows[name] = {"first_s": subject.ask("step")}
            if name not in ("products", "liger"):
                difference = subject.ask("check")
                if not difference < 0.05:
                    raise RuntimeError(f"{name}: dX is off by {difference:.3f} (relative), a wrong result is not timed")
                rows[name]["dx_difference"] = difference
            rows[name]["peak_bytes"] = subject.ask("memory")
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for subject in subjects:
                times[subject.name].append(subject.ask("step"))
    finally:
        for subject in subjects:
            subject.close()
    for name, seen in times.items():
        ratios = sorted(t / floor for t, floor in zip(seen, times["products"], strict=True))
        rows[name] |= {
            "median_s": statistics.median(seen),
            "min_s": min(seen),
            "max_s": max(seen),
            "ratio_to_products": statistics.median(ratios),
            "ratio_spread": [ratios[0], ratios[-1]],
        }
    return rows


def table(result: dict) -> str:
    """The rows of one workload as a markdown table."""
    lines = ["| subject | median | of the products | first step | peak beyond inputs |", "|---|---|---|---|---|"]
    for name, row in result["subjects"].items():
        if "why" in row:
            lines.append(f"| {name} | not measured: {row['why']} | | | |")
            continue
        low, high = row["ratio_spread"]
        lines.append(
            f"| {name} | {row['median_s'] * 1e3:.0f} ms | {row['ratio_to_products']:.2f}x ({low:.2f} to {high:.2f}) | "
            f"{row['first_s']:.1f} s | {row['peak_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=HEADS, default="qwen2.5-0.5b")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, prompt included")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    args = parser.parse_args()
    shape = Shape(*HEADS[args.head], args.pairs, args.length, args.prompt)
    report = {"environment": environment(args.threads), "workloads": []}
    names = [n for n in SUBJECTS if n in args.subjects or n == "products"]
    missing = {n: {"why": why_missing(n)} for n in names if why_missing(n)}
    for dtype in args.dtypes:
        for frozen in (False, True):
            present = [n for n in names if n not in missing]
            rows = measure(shape, dtype, frozen, present, args.rounds, args.threads)
            result = {
                "head": args.head, "dtype": dtype, "frozen": frozen, **asdict(shape),
                "labelled": shape.labelled, "subjects": {n: missing.get(n) or rows[n] for n in names},
            }  # fmt: skip
            report["workloads"].append(result)
            print(f"\n{args.head}, {dtype}, head {'frozen' if frozen else 'trainable'}, {shape}\n{table(result)}")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
