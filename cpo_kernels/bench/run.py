"""`cpo-kernels bench`: run the workloads of a set one after another; print tables and write a results file."""

import argparse
import difflib
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
from cpo_kernels.bench.arguments import parser
from cpo_kernels.bench.families import FAMILIES
from cpo_kernels.bench.resume import Kept
from cpo_kernels.bench.rows import ROWS
from cpo_kernels.bench.sets import SETS, Run, Set
from cpo_kernels.bench.side_by_side import TIME_LIMIT, Bench, described
from cpo_kernels.bench.training_step import TrainingStep
from cpo_kernels.bench.workload import HEADS, MODES, Head, head
from cpo_kernels.environment import check_options, chosen_device, describe
from cpo_kernels.files import atomic_text

PACKAGES = ("cut-cross-entropy", "liger-kernel", "trl", "transformers")


def parse_workload(text: str) -> Head:
    """`head=qwen2.5-0.5b,groups=8,mode=frozen` -> Head."""
    keys: dict[str, Any] = dict(part.partition("=")[::2] for part in text.split(","))
    name = keys.pop("head", "qwen2.5-0.5b")
    if name not in HEADS:
        raise ValueError(f"--workload: head must be one of {', '.join(HEADS)}, got {name!r}")
    fields = {f: t for f, t in Head.__annotations__.items() if f not in ("head", "hidden", "vocab")}
    for key, value in keys.items():
        if key not in fields:
            raise ValueError(f"--workload: unknown key {key!r}; keys: head, {', '.join(fields)}")
        keys[key] = value if fields[key] is str else float(value) if key == "softcap" else int(value)
    made = replace(head(name), **keys)
    if made.mode not in MODES or made.reference not in ("given", "computed") or made.responses < 2:
        raise ValueError(f"--workload: impossible workload: {made}")
    if made.rows not in ROWS or (made.rows == "real") != bool(made.model and made.data):
        raise ValueError(f"--workload: rows must be random, peaked, or real with model and data, got {made}")
    if not 0 <= made.prompt < made.length:
        raise ValueError(f"--workload: prompt {made.prompt} must be shorter than length {made.length}")
    return made


def chosen_runs(args: argparse.Namespace, named_set: Set) -> list[Run]:
    runs = [Run("head", parse_workload(text)) for text in args.workload or ()] or list(named_set.runs)
    made = []
    for run in runs:
        if run.family not in args.only:
            continue
        if args.model and isinstance(run.workload, TrainingStep):
            run = replace(run, workload=replace(run.workload, model=args.model))
        if args.data and isinstance(run.workload, TrainingStep) and run.workload.responses == 2:
            run = replace(run, workload=replace(run.workload, data=args.data))
        peaked = isinstance(run.workload, Head) and run.workload.rows == "peaked"
        if peaked and bool(args.model) != bool(args.data):
            given, missing = ("--model", "--data") if args.model else ("--data", "--model")
            raise ValueError(f"{given} alone gives no rows for the head: also give {missing}, or neither")
        if peaked and args.model:
            run = replace(run, workload=replace(run.workload, rows="real", model=args.model, data=args.data))
        names = [n for n in run.implementations or FAMILIES[run.family].implementations]
        if args.implementations:
            floor = FAMILIES[run.family].floor
            names = [n for n in FAMILIES[run.family].implementations if n in args.implementations or n == floor]
        made.append(replace(run, implementations=tuple(names)))
    return made


def check_implementations(names: Sequence[str]) -> None:
    every = sorted({name for family in FAMILIES.values() for name in family.implementations})
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(every)}"
            raise ValueError(f"--implementations: there is no {name}; {hint}")


def wrong_results(results: Sequence[dict[str, Any]]) -> list[str]:
    """Our implementations with wrong results: everything except baselines and naive forms."""
    messages = []
    for result in results:
        for name, row in result["subjects"].items():
            package = FAMILIES[result["family"]].implementations[name].package
            ours = not package and not name.startswith(("naive", "compiled", "trl"))
            if ours and row.get("why", "").startswith("wrong result"):
                messages.append(f"{report.title(result)}: {name}: {row['why']}")
    return messages


def load() -> float:
    """The machine's load average over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return 0.0


def write(out: Path | None, content: dict[str, Any]) -> None:
    if out is not None:
        atomic_text(json.dumps(content, indent=1) + "\n", out)


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    args.set = args.set or ("gpu" if gpu else "default")
    args.device = ("cuda" if gpu else "cpu") if args.device is None else args.device
    args.threads = torch.get_num_threads() if args.threads is None else args.threads
    check_implementations(args.implementations or ())
    check_options(args.out, time_limit=args.time_limit, rounds=args.rounds, threads=args.threads)
    chosen = SETS[args.set]
    device = chosen_device(args.device)
    runs = chosen_runs(args, chosen)
    growths = chosen.growth if "growth" in args.only and not args.workload else ()
    if args.list:
        for run in runs:
            print(f"{report.title(described(run.family, run.workload, device))}\n  {' '.join(run.implementations)}")
        return 0
    deadline = time.monotonic() + (args.time_limit or chosen.limit_s)
    bench = Bench(device, args.threads, args.rounds or chosen.rounds, chosen.turn_s, chosen.answer_s, deadline)
    content: dict[str, Any] = {
        "command": " ".join(["cpo-kernels", *sys.argv[1:]]),
        "set": args.set,
        "environment": describe(device, PACKAGES, args.threads) | {"load": load()},
        "workloads": [],
        "growth": [],
        "cold_start": {},
    }
    kept = Kept.read(args.out, content["environment"]) if args.resume else Kept({})
    when = {name: content["environment"][name] for name in ("commit", "date")}
    content |= kept.content
    if load() > 0.5:
        print(f"load {load()}: other processes are running here and will distort the times", file=sys.stderr)
    try:
        results = [kept.workload(described(r.family, r.workload, device), r.implementations) for r in runs]
        others = kept.others([described(r.family, r.workload, device) for r in runs])
        grown = [kept.growth(one, device) for one in growths]
        for k, run in enumerate(runs):
            result = results[k] or described(run.family, run.workload, device) | when | {"load": load()}

            def keep(rows: dict[str, Any], k: int = k, result: dict[str, Any] = result) -> None:
                results[k] = result | {"subjects": rows}
                content["workloads"] = [*others, *(result for result in results if result)]
                write(args.out, content)

            if results[k] is None:
                bench.progress = keep
                # The key is "subjects", the word of the files in benchmarks/results: both are read by the same code.
                result["subjects"] = bench.measure(run.family, run.workload, run.implementations)
                keep(result["subjects"])
            print(f"\n{report.title(result)}\n{report.table(result)}", flush=True)
        bench.progress = lambda rows: None
        for k, one in enumerate(growths):

            def grow(result: dict[str, Any], k: int = k) -> None:
                grown[k] = result | when
                content["growth"] = [result for result in grown if result]
                write(args.out, content)

            if grown[k] is None:
                growth.measure(bench, one, grow)
        if growths:
            print(f"\n{report.growth_table(content['growth'])}", flush=True)
        if (
            chosen.cold_starts
            and "cold_start" in args.only
            and not args.workload
            and "first" not in content["cold_start"]
        ):
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
