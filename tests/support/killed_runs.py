"""Runs that are killed: `python -m tests.support.killed_runs FOLDER` prints JSON of what became of each.

One process imports everything and forks the runs. A run counts events (a file written, a folder replaced or deleted,
an optimizer step, a row of metrics) and sends itself SIGKILL at the one it is told; what it was writing is cut in half.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch

from cpo_kernels import files
from cpo_kernels.training import checkpoints, loop, rundir
from cpo_kernels.training.models import fingerprint
from tests.support import tiny

EVENTS = ("save_file", "fsync", "replace", "rmtree", "update", "log")
STAGE = {"max_steps": 6, "checkpoint_every": 2, "eval_every": 3, "keep": 1, "tokens_per_microbatch": 400}


def watch(kill: tuple[str, int] | None) -> Counter:
    """Count the events of this process, and die at the n-th of a name (or of all, under the name `any`)."""
    counts: Counter = Counter()

    def event(name, cut):
        counts.update([name, "any"])
        if kill and counts[kill[0]] == kill[1] and kill[0] in (name, "any"):
            cut()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name):
        real = getattr(owner, name)

        def wrapped(*args, **keys):
            result = None if name == "replace" else real(*args, **keys)
            event(name, lambda: halve(name, args))
            return real(*args, **keys) if name == "replace" else result

        setattr(owner, name, wrapped)

    owners = (checkpoints, files, checkpoints.os, checkpoints.shutil, loop, rundir.RunDir)
    for owner, name in zip(owners, EVENTS, strict=True):
        wrap(owner, name)
    return counts


def halve(name, args):
    """What is there when a write was interrupted."""
    if name == "save_file":
        os.truncate(args[1], os.path.getsize(args[1]) // 2)
    elif name == "log":
        file = args[0].folder / "metrics.jsonl"
        os.truncate(file, os.path.getsize(file) - 20)


def run(folder: Path, kill: tuple[str, int] | None) -> int:
    """The signal that ended the run, or 0. A whole run leaves its events, metrics and weights in result.json."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            counts = watch(kill)
            config = tiny.config("cdpo", run_dir=str(folder / "run"), training={**STAGE, "resume": True})
            done = loop.train(config, tokenizer=tiny.tokenizer(), records=tiny.records(8))
            result = {"events": counts, "metrics": done.metrics, "weights": fingerprint(done.model)}
            (folder / "result.json").write_text(json.dumps(result))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{folder.name}: a run failed")
    return os.WTERMSIG(status)


def main(folder: Path) -> None:
    def fresh(name):
        (folder / name).mkdir()
        return folder / name

    def result(place):
        return json.loads((place / "result.json").read_text())

    assert run(fresh("whole"), None) == 0
    whole, rng = result(folder / "whole"), random.Random(int.from_bytes(os.urandom(2), "big"))
    report = []
    for name in EVENTS:  # once at each kind of event, most of them inside a checkpoint's writing
        kills = [(name, rng.randint(1, whole["events"][name]))]
        report.append({"kills": kills, "signals": [run(fresh(name), kills[0])]})
    chain = fresh("chain")  # and a run that is killed again and again
    kills = [("any", rng.randint(3, whole["events"]["any"] // 2)) for _ in range(5)]
    report.append({"kills": kills, "signals": [run(chain, kill) for kill in kills]})
    for entry, name in zip(report, [*EVENTS, "chain"], strict=True):
        assert run(folder / name, None) == 0
        entry["result"] = result(folder / name)
    print(json.dumps({"whole": whole, "killed": report}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
