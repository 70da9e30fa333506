"""tools/gpu.sh with an interpreter that only notes what it is asked for: order, shares of the time, what is built."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/usr/bin/env bash
echo "$*" | tr '\\n' ' ' | sed 's/ $//' >> "$CALLS"; echo >> "$CALLS"
case "$*" in
  *"$SLOW"*) sleep 100 ;;
  *get_device_capability*) echo 9.0 ;;
  *dispatch.kernels*) grep -q right cpo_kernels/_C.abi3.so ;;
  *build_ext*) echo right > cpo_kernels/_C.abi3.so ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A tree with the scripts, a source and extensions that were made of it."""
    for folder in ("tools", "csrc", "cpo_kernels", "build/gpu/lib/cpo_kernels", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("gpu.sh", "source_hash.sh"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    (tmp_path / "csrc" / "kernel.cu").write_text("source")
    (tmp_path / "setup.py").write_text("build")
    (tmp_path / "build/gpu/lib/cpo_kernels/_C.abi3.so").write_text("right")
    made_of = subprocess.run([tmp_path / "tools/source_hash.sh"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "build/gpu/sources").write_text(made_of)
    for name in ("python3", "compute-sanitizer"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(tree, *arguments, slow="nothing", total=20, spent=0):
    """(exit status, calls in order, log, seconds); `spent` seconds are over when the script begins."""
    calls = tree / "calls"
    calls.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("DEVICE", "PYTHON", "PACK", "PROCESSES")}
    environment |= {"PATH": f"{tree / 'bin'}:{environment['PATH']}", "CALLS": str(calls), "SLOW": slow}
    environment |= {"TOTAL_S": str(total), "SECONDS": str(spent)}
    command, start = [tree / "tools/gpu.sh", tree / "out", *arguments], time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    log = tree / "out/gpu.log"
    text = log.read_text() if log.exists() else done.stderr
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], text, time.monotonic() - start


def steps(calls):
    """What each call is: check or bench and what of it."""
    words = []
    for call in calls:
        parts = call.split()
        if "check" in parts:
            words.append(f"check {parts[parts.index('--impl') + 1]}" + " quick" * ("--quick" in parts))
        elif "benchmarks.profile" in parts:
            words.append("profile")
        elif "bench" in parts:
            words.append(f"bench {parts[parts.index('--only') + 1]}")
        else:
            words.append("build" if "build_ext" in call else "load")
    return words


def test_the_first_call_brings_what_is_wanted_most(tree):
    status, calls, log, _ = run(tree, "first")
    assert status == 0
    assert steps(calls) == ["load", "check cuda quick", "check triton quick", "bench tokens", "bench head"]
    assert all("--time-limit" in call and f"--out {tree}/out/" in call for call in calls[1:])
    head = calls[-1]
    assert [f"mode={mode}" in head for mode in ("trainable", "frozen", "forward")] == [True] * 3
    wanted = ("ours_triton", "ours_cuda", "ours_two_pass", "products", "naive_unmasked")
    assert all(name in head for name in wanted) and "naive_unmasked" in head
    assert (tree / "cpo_kernels/_C.abi3.so").read_text() == "right"


def test_the_second_call_brings_the_rest(tree):
    status, calls, _, _ = run(tree, "second")
    assert status == 0
    assert steps(calls) == [
        "profile", "check cuda", "check triton", "check cuda", "check cuda",
        "bench head", "bench training_step", "bench growth", "bench cold_start",
    ]  # fmt: skip
    assert [call.split()[1] for call in calls[3:5]] == ["memcheck", "racecheck"]  # CUDA C++ only
    outs = {call.split("--out ")[1].split()[0] for call in calls}
    assert len(outs) + 1 <= 8  # files, with the log


def test_a_step_that_hangs_starves_no_other(tree):
    status, calls, log, seconds = run(tree, "first", slow="--impl triton")
    assert status == 1 and seconds < 15
    assert steps(calls)[-2:] == ["bench tokens", "bench head"]
    assert "== quick-triton: exit 124 after" in log and "== head: exit 0" in log


def test_what_no_time_is_left_for_is_not_begun(tree):
    status, calls, log, seconds = run(tree, "head", "kernels", slow="head", total=5)
    assert status == 1 and seconds < 12
    assert steps(calls) == ["bench head", "bench tokens"]  # head takes its share of 5 s and no more
    status, calls, log, _ = run(tree, "first", total=60, spent=70)
    assert status == 1 and not calls and "head: not begun, 0 s are left of TOTAL_S=60" in log
    status, calls, log, _ = run(tree, "first", total=0)
    assert status == 1 and not calls and "head: not begun, 0 s are left of TOTAL_S=0" in log


@pytest.mark.parametrize("stale", ["sources", "extension", "nothing there"])
def test_extensions_that_do_not_fit_are_compiled_there(tree, stale):
    if stale == "sources":
        (tree / "csrc" / "kernel.cu").write_text("a later source")
    elif stale == "extension":
        (tree / "build/gpu/lib/cpo_kernels/_C.abi3.so").write_text("of another machine")
    else:
        shutil.rmtree(tree / "build")
    _, calls, log, _ = run(tree, "build")
    assert "build" in steps(calls) and "compiling" in log and steps(calls)[-1] == "load"
    assert (tree / "cpo_kernels/_C.abi3.so").read_text().strip() == "right"


@pytest.mark.parametrize("slow", ["dispatch.kernels", "get_device_capability"])
def test_a_build_that_hangs_takes_the_share_of_one_step(tree, slow):
    """Loading what was packed, asking the device, compiling and loading again: together 2 s, and 1 s each after it."""
    if slow == "get_device_capability":
        (tree / "csrc" / "kernel.cu").write_text("a later source")
    _, calls, log, seconds = run(tree, "build", "head", slow=slow, total=8)
    limits = [int(line.split()[-1]) for line in log.splitlines() if line.startswith(("== build", "== compile"))]
    assert seconds < 15 and sorted(limits)[:-1] == [1] * (len(limits) - 1) and max(limits) <= 2
    assert steps(calls)[-1] == "bench head"


@pytest.mark.parametrize("arguments", [(), ("third",), ("head", "heads"), ("first", "check-cuda")])
def test_unknown_steps_run_nothing(tree, arguments):
    status, calls, text, _ = run(tree, *arguments)
    assert status == 2 and not calls and "usage: tools/gpu.sh OUT first|second|STEP..." in text
