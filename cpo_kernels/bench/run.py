"""`cpo-kernels bench`: ours, naive PyTorch and the baselines side by side on this machine.

cpo-kernels bench --set default --out results.json      # gpu where there is one
cpo-kernels bench --set default --only head --subjects products ours cce --workload head=llama-3-8b,mode=frozen
cpo-kernels bench --list

Every subject runs in a process of its own on the same tensors; the processes take turns in changing order. Results are
checked first: one that is wrong is listed and not timed, and the exit status is 1 if it is ours. The file is written
after every subject and every round; --resume goes on with one that a time limit, a signal or an interrupt cut off.
Ratios are medians over rounds of the ratio to the floor in the same round.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.bench import cold_start, growth, report
from cpo_kernels.bench.families import FAMILIES
from cpo_kernels.bench.resume import Kept
from cpo_kernels.bench.rows import ROWS
from cpo_kernels.bench.sets import SETS, Run, Set
from cpo_kernels.bench.side_by_side import TIME_LIMIT, Bench, described
from cpo_kernels.bench.training_step import TrainingStep
from cpo_kernels.bench.workload import HEADS, MODES, Head, head
from cpo_kernels.environment import check_options, chosen_device, describe
from cpo_kernels.files import atomic_text

PARTS = (*FAMILIES, "growth", "cold_start")
PACKAGES = ("cut-cross-entropy", "liger-kernel", "trl", "transformers")


def parse_workload(text: str) -> Head:
    """`head=qwen2.5-0.5b,groups=8,mode=frozen` -> Head."""
    keys: dict[str, Any] = dict(part.partition("=")[::2] for part in text.split(","))
    name = keys.pop("head", "qwen2.5-0.5b")
    if name not in HEADS:
        raise ValueError(f"--workload: head must be one of {', '.join(HEADS)}, got {name!r}")
    known = {f: t for f, t in Head.__annotations__.items() if f not in ("head", "hidden", "vocab")}
    for key, value in keys.items():
        if key not in known:
            raise ValueError(f"--workload: unknown key {key!r}, known are head, {', '.join(known)}")
        keys[key] = value if known[key] is str else float(value) if key == "softcap" else int(value)
    made = replace(head(name), **keys)
    if made.mode not in MODES or made.reference not in ("given", "computed") or made.responses < 2:
        raise ValueError(f"--workload: no such workload: {made}")
    if made.rows not in ROWS or (made.rows == "real") != bool(made.model and made.data):
        raise ValueError(f"--workload: rows must be random, peaked, or real with model and data, got {made}")
    if not 0 <= made.prompt < made.length:
        raise ValueError(f"--workload: prompt {made.prompt} must be shorter than length {made.length}")
    return made


def chosen_runs(args: argparse.Namespace, known: Set) -> list[Run]:
    runs = [Run("head", parse_workload(text)) for text in args.workload or ()] or list(known.runs)
    made = []
    for run in runs:
        if run.family not in args.only:
            continue
        if args.model and isinstance(run.workload, TrainingStep):
            run = replace(run, workload=replace(run.workload, model=args.model))
        if args.data and isinstance(run.workload, TrainingStep) and run.workload.responses == 2:
            run = replace(run, workload=replace(run.workload, data=args.data))
        if isinstance(run.workload, Head) and run.workload.rows == "peaked" and args.model and args.data:
            run = replace(run, workload=replace(run.workload, rows="real", model=args.model, data=args.data))
        names = [n for n in run.subjects or FAMILIES[run.family].subjects]
        if args.subjects:
            floor = FAMILIES[run.family].floor
            names = [n for n in FAMILIES[run.family].subjects if n in args.subjects or n == floor]
        made.append(replace(run, subjects=tuple(names)))
    return made


def wrong_results(results: Sequence[dict[str, Any]]) -> list[str]:
    """Subjects of ours whose result was wrong: everything that is no baseline and no naive form."""
    found = []
    for result in results:
        for name, row in result["subjects"].items():
            foreign = FAMILIES[result["family"]].subjects[name].package or name.startswith(("naive", "compiled", "trl"))
            if not foreign and row.get("why", "").startswith("wrong result"):
                found.append(f"{report.title(result)}: {name}: {row['why']}")
    return found


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        prog="cpo-kernels bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--set", choices=SETS, default="gpu" if gpu else "default", help="default here: %(default)s")
    made.add_argument("--out", type=Path, metavar="FILE", help="results as JSON, written as they come")
    made.add_argument("--resume", action="store_true", help="keep what the file at --out holds, measure the rest")
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the set")
    subjects = sorted({n for family in FAMILIES.values() for n in family.subjects})
    made.add_argument("--subjects", nargs="+", choices=subjects, metavar="NAME", help="and the floor; see --list")
    made.add_argument("--workload", action="append", metavar="KEY=VALUE,...", help="a head instead of the set's runs")
    made.add_argument(
        "--model",
        metavar="PATH",
        help="model.name of the training step, instead of random weights; with --data also of the set filtered",
    )
    made.add_argument(
        "--data",
        metavar="JSONL",
        help="pairs for the training steps of two responses and the set filtered: {prompt, chosen, rejected} a line",
    )
    made.add_argument("--device", default="cuda" if gpu else "cpu", help="default %(default)s")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    made.add_argument("--rounds", type=int, help="turns of each subject")
    made.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing after this time")
    made.add_argument("--list", action="store_true", help="print the set's workloads and subjects, and stop")
    return made


def load() -> float:
    """Processes that run or wait on this machine, over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return 0.0


def write(out: Path | None, content: dict[str, Any]) -> None:
    if out is not None:
        atomic_text(json.dumps(content, indent=1) + "\n", out)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    check_options(args.out, time_limit=args.time_limit, rounds=args.rounds, threads=args.threads)
    chosen = SETS[args.set]
    device = chosen_device(args.device)
    runs = chosen_runs(args, chosen)
    growths = chosen.growth if "growth" in args.only and not args.workload else ()
    if args.list:
        for run in runs:
            print(f"{report.title(described(run.family, run.workload, device))}\n  {' '.join(run.subjects)}")
        return 0
    deadline = time.monotonic() + (args.time_limit or chosen.limit_s)
    bench = Bench(device, args.threads, args.rounds or chosen.rounds, chosen.turn_s, chosen.subject_s, deadline)
    content: dict[str, Any] = {
        "command": "cpo-kernels bench " + " ".join(given),
        "set": args.set,
        "environment": describe(device, PACKAGES, args.threads) | {"load": load()},
        "workloads": [],
        "growth": [],
        "cold_start": {},
    }
    kept = Kept.read(args.out, content["environment"]) if args.resume else Kept({})
    commit = content["environment"]["commit"]
    content |= kept.content
    if load() > 0.5:
        print(f"load {load()}: other work runs here, times will suffer", file=sys.stderr)
    try:
        found = [kept.workload(described(r.family, r.workload, device), r.subjects) for r in runs]
        others = kept.others([described(r.family, r.workload, device) for r in runs])
        grown = [kept.growth(one, device) for one in growths]
        for k, run in enumerate(runs):
            result = found[k] or described(run.family, run.workload, device) | {"commit": commit, "load": load()}

            def keep(rows: dict[str, Any], k: int = k, result: dict[str, Any] = result) -> None:
                found[k] = result | {"subjects": rows}
                content["workloads"] = [*others, *(known for known in found if known)]
                write(args.out, content)

            if found[k] is None:
                bench.progress = keep
                result["subjects"] = bench.measure(run.family, run.workload, run.subjects)
                keep(result["subjects"])
            print(f"\n{report.title(result)}\n{report.table(result)}", flush=True)
        bench.progress = lambda rows: None
        for k, one in enumerate(growths):

            def grow(known: dict[str, Any], k: int = k) -> None:
                grown[k] = known | {"commit": commit}
                content["growth"] = [result for result in grown if result]
                write(args.out, content)

            if grown[k] is None:
                growth.measure(bench, one, grow)
        if growths:
            print(f"\n{report.growth_table(content['growth'])}", flush=True)
        if "cold_start" in args.only and not args.workload and "first" not in content["cold_start"]:
            left = deadline - time.monotonic()
            wanted = {"why": TIME_LIMIT} if left <= 0 else cold_start.measure(args.device, chosen.cold_starts, left)
            content["cold_start"] = wanted
            print(f"\ncold start\n{report.cold_start_table(wanted)}", flush=True)
            write(args.out, content)
    finally:
        bench.close()
    if args.out:
        print(f"\nwrote {args.out}")
    wrong = wrong_results(content["workloads"])
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
