"""One subject in one process, driven over stdin: "step" runs a step, "memory" measures its peak, "check" its result."""

import ctypes
import json
import sys
import time

import torch

from benchmarks.subjects import SUBJECTS, Shape, Workload, ours


def status_kib(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


def peak_bytes(step) -> int:
    """Peak resident memory of one step beyond what is resident before it (the inputs)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status_kib("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # reset the high-water mark
    result = step()
    peak = status_kib("VmHWM")
    del result
    return (peak - before) * 1024


def relative_difference(seen, truth) -> float:
    if seen is None or truth is None:
        return 0.0
    return float((seen.float() - truth.float()).norm() / truth.float().norm())


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(arguments["threads"])
    workload = Workload(Shape(**arguments["shape"]), getattr(torch, arguments["dtype"]), arguments["frozen"])
    step = SUBJECTS[name](workload)
    for line in sys.stdin:
        command, start = line.strip(), time.perf_counter()
        if command == "step":
            step()
            answer = time.perf_counter() - start
        elif command == "memory":
            answer = peak_bytes(step)
        elif command == "check":
            # dX direction against ours; the floor and a loss without reference compute something else.
            _, seen, _ = step()
            answer = relative_difference(seen, ours(workload)()[1])
        else:
            raise ValueError(f"unknown command {command!r}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
