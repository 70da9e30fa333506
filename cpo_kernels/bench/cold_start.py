"""From a fresh process to the first gradient: imports, then the first loss and backward of a small head."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

PROGRAM = """
import json, sys, time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
from cpo_kernels import FusedLinearCPOLoss
import_s = time.perf_counter() - start - torch_s
x = torch.randn(2, 16, 64, device=sys.argv[1], requires_grad=True)
w = torch.randn(1999, 64, device=sys.argv[1], requires_grad=True)
y = torch.randint(1999, (2, 16), device=sys.argv[1])
start = time.perf_counter()
FusedLinearCPOLoss()(x, w, y, ref_logps=torch.zeros(2, device=sys.argv[1])).loss.backward()
x.grad.sum().item()
first_s = time.perf_counter() - start
print(json.dumps({"torch_s": torch_s, "import_s": import_s, "first_s": first_s}))
"""


def once(device: str, cache: str, limit_s: float) -> dict[str, float]:
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, device],
        capture_output=True, text=True, timeout=limit_s, env=environment,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1])
    seconds: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return seconds


def measure(device: str, runs: int, limit_s: float) -> dict[str, Any]:
    """The first run compiles the Triton kernels; `again` is the median of `runs` that find them in Triton's cache."""
    with tempfile.TemporaryDirectory() as cache:
        try:
            first = once(device, cache, limit_s)
            rest = [once(device, cache, limit_s) for _ in range(runs)]
        except RuntimeError as error:
            return {"why": str(error)}
        except subprocess.TimeoutExpired:
            return {"why": f"a process took more than {limit_s:.0f} s"}
    return {"runs": runs, "first": first, "again": {k: statistics.median(r[k] for r in rest) for k in first}}
