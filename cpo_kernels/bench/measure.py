"""Time, memory and error of one step, in the process of its implementation."""

import ctypes
import statistics
import time

import torch
from torch import Tensor

from cpo_kernels.bench.implementation import Outcome, Step

CYCLES = 2e9  # a second, of a GPU's clock at most: what sleeps so many cycles sleeps a second at least
LONGEST_SLEEP_S = 0.02


class Clock:
    """Seconds of a step: on a GPU between two device events, after its L2 cache was overwritten.

    The device sleeps while the host queues the step between its events, so the time is that of the device's work
    without the 20 to 30 us that Python takes before a launch. The sleep is twice the shortest queueing time so far,
    up to
    LONGEST_SLEEP_S: a step that takes the host longer synchronises with the device, or is host-bound for users too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self.other = torch.empty(2 * l2, dtype=torch.int8, device=device)

    def time(self, step: Step, queued_s: float = 0.0) -> tuple[float, float]:
        """(seconds of one run, seconds until the host had queued the step); queued_s: the latter for earlier steps."""
        step.prepare()
        if self.device.type != "cuda":
            start = time.perf_counter()
            step.run()
            seconds = time.perf_counter() - start
            return seconds / step.repeats, seconds
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.zero_()
        torch.cuda._sleep(int(CYCLES * min(2 * queued_s, LONGEST_SLEEP_S)))
        begin.record()
        start = time.perf_counter()
        step.run()
        queued_s = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / step.repeats, queued_s

    def turn(self, step: Step, seconds: float) -> float:
        """Median of as many runs as fill `seconds`; the first of several is dropped, its caches are cold."""
        times: list[float] = []
        queued: list[float] = []
        start = time.perf_counter()
        least = 2 if self.device.type == "cuda" else 1  # the first allocates what the turn before gave back
        while len(times) < least or time.perf_counter() - start < seconds:
            taken, host_s = self.time(step, min(queued, default=0.0))
            times.append(taken)
            queued.append(host_s)
        return statistics.median(times[1:] or times)


def resident_kib(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Peak memory of one step beyond what is allocated before it; None if the system does not report it."""
    step.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step.run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = resident_kib("VmRSS")
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")  # reset the high-water mark
    except OSError:
        return None
    result = step.run()
    peak = resident_kib("VmHWM")
    del result
    return (peak - before) * 1024


def project(outcome: Outcome) -> dict[str, Tensor]:
    """The tensor on the CPU in float32; a matrix [..., n] is replaced by its product with one random vector [n].

    |(A - B) v| estimates |A - B| in the Frobenius norm, is zero only for A = B, and needs 1/n of the memory.
    """
    projections = {}
    for name, tensor in outcome.items():
        tensor = tensor.detach()
        if tensor.dim() > 1:
            v = torch.randn(tensor.shape[-1], generator=torch.Generator().manual_seed(1)).to(tensor.device)
            rows = tensor.reshape(-1, tensor.shape[-1]).split(4096)
            tensor = torch.cat([part.float() @ v for part in rows])
        projections[name] = tensor.float().cpu()
    return projections


def differences(outcome: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """|outcome - truth| / |truth| in the 2-norm for every name that both have; for seq_logps the rms of
    outcome - truth, in nats; inf for NaN."""
    errors = {}
    for name in outcome.keys() & truth.keys():
        a, b = outcome[name].double().flatten(), truth[name].double().flatten()
        if a.shape != b.shape:
            raise ValueError(f"{name} has {a.numel()} elements instead of {b.numel()}")
        error = (a - b).norm() / (a.numel() ** 0.5 if name == "seq_logps" else b.norm().clamp(min=1e-30))
        errors[name] = float(error.nan_to_num(nan=float("inf")))
    return errors
