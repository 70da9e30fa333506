"""What shared prompts, filtered gradients and kept memory save in the study on human ratings: steps of CPO's second
stage.

    python -m benchmarks.claims.savings --data truthfulqa_ratings.jsonl --out docs/results/claims_savings.json

Trains from the published model with the study's own configuration, its questions and one thread, and takes turns:
prompts shared by their answers, packed or padded rows, `loss.filter_eps: auto` with shared prompts, and shared prompts
with the settings of glibc in docs/machines.md. Each turn is a process of its own, with the same steps, of unequal size.
A figure is the mean over all steps but the first of each turn, with the range of the turns' means. Reference log-probs
are cached before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.lab import SEARCH_SEED, Setting
from benchmarks.claims.rated_lab import RatedBudget, RatedLab
from cpo_kernels.environment import describe, processor
from cpo_kernels.files import atomic_text
from cpo_kernels.training.loop import train

# Freed memory stays in the process (docs/machines.md); glibc reads them when a process starts.
KEEP = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.tcache_count=0"

# training.rows, loss.filter_eps, GLIBC_TUNABLES
KINDS: dict[str, tuple[str, str | None, str]] = {
    "shared": ("shared", None, ""),
    "packed": ("packed", None, ""),
    "padded": ("padded", None, ""),
    "shared, filtered": ("shared", "auto", ""),
    "shared, memory kept": ("shared", None, KEEP),
}


def turn(lab: RatedLab, kind: str, steps: int) -> list[tuple[float, float]]:
    """(seconds, tokens with padding) of every step but the first."""
    rows, eps, _ = KINDS[kind]
    prompts = lab.budget.groups // lab.budget.conditions
    conditions = lab.asked_for | {"per_prompt": lab.budget.conditions}
    training = {"batch_size": prompts, "max_steps": steps, "rows": rows}
    config = lab.config("cdpo", Setting(5e-5), lab.objectives, conditions, training)
    config["loss"] |= {} if eps is None else {"filter_eps": eps}
    records = lab.records[: prompts * steps]
    made = train(config, model=lab.model(), tokenizer=lab.tokenizer, records=records, eval_records=[])
    run = [row for row in made.metrics if "seconds" in row]
    return [
        (row["seconds"], (row["tokens"] - before["tokens"]) / (1 - row["padding"])) for before, row in pairwise(run)
    ]


def turn_of_process(data: str, folder: Path, kind: str, steps: int) -> list[tuple[float, float]]:
    torch.set_num_threads(1)
    return turn(RatedLab(SEARCH_SEED, RatedBudget(data), folder), kind, steps)


def in_new_process(function: Callable[..., Any], *args: Any, tunables: str) -> Any:
    """function(*args), in a process that starts with GLIBC_TUNABLES = tunables."""
    os.environ["GLIBC_TUNABLES"] = tunables
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # raises where the process was killed
        return pool.submit(function, *args).result()


def measure(run: Callable[[str], list[tuple[float, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """run: a turn of a kind."""
    run("shared")  # the reference's log-probs
    taken: dict[str, list[list[tuple[float, float]]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, turns in taken.items():
            turns.append(run(kind))
    measured = {}
    for kind, turns in taken.items():
        seconds = [statistics.mean(row[0] for row in rows) for rows in turns]
        tokens = statistics.mean(row[1] for rows in turns for row in rows)
        measured[kind] = {"seconds": statistics.mean(seconds), "tokens": tokens}
        measured[kind] |= {"low": min(seconds), "high": max(seconds)}
    return measured


def table(content: dict[str, Any]) -> str:
    lines = ["| rows of a step | tokens | seconds a step (range of turns) | × of padded |", "|---|---|---|---|"]
    padded = content["kinds"]["padded"]["seconds"]
    names = {
        "shared": "shared prompts",
        "shared, filtered": 'shared prompts, `filter_eps: "auto"`',
        "shared, memory kept": "shared prompts, freed memory kept",
    }
    for kind, row in content["kinds"].items():
        spread = f"{row['seconds']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        lines.append(f"| {names.get(kind, kind)} | {row['tokens']:,.0f} | {spread} | {row['seconds'] / padded:.2f} |")
    env = content["environment"]
    note = (
        f"{processor(env)}, {content['precision']}, torch {env['versions']['torch']}; {env['date'][:10]}; "
        f"means of {content['steps']} steps."
    )
    return "\n".join([*lines, "", note])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file of TruthfulQA's rated answers")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of a turn, the first not counted (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind (default %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps must be at least 2 and --rounds at least 1, got {args.steps} and {args.rounds}")
    with tempfile.TemporaryDirectory() as folder:

        def run(kind: str) -> list[tuple[float, float]]:
            made: list[tuple[float, float]] = in_new_process(
                turn_of_process, args.data, Path(folder), kind, args.steps, tunables=KINDS[kind][-1]
            )
            return made

        kinds = measure(run, args.rounds)
    content = {
        "kinds": kinds,
        "steps": args.rounds * (args.steps - 1),
        "precision": RatedBudget(args.data).precision,
        "environment": describe(torch.device("cpu"), threads=1),
    }
    atomic_text(json.dumps(content, indent=1) + "\n", args.out)
    print(table(content))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
