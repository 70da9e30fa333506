"""A process for one implementation: it loads one workload after another and runs steps on request."""

import contextlib
import gc
import logging
import multiprocessing
import os
import sys
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch

from cpo_kernels.bench.families import FAMILIES
from cpo_kernels.bench.implementation import Step
from cpo_kernels.bench.measure import Clock, differences, peak_bytes, project


class Failed(Exception):
    """Why an implementation has no result."""


class Serving:
    """The commands of the parent, run in the implementation's process; implementation `truth` is the family's truth."""

    def __init__(self, family: str, implementation: str, device: torch.device) -> None:
        self.family, self.implementation, self.device = FAMILIES[family], implementation, device
        self.clock = Clock(device)
        self.step: Step

    def load(self, workload: dict[str, Any]) -> None:
        tensors = self.family.tensors(self.family.workload(**workload), self.device)
        if self.implementation == "truth":
            self.step = Step(lambda: self.family.truth(tensors))
        else:
            self.step = self.family.implementations[self.implementation].build(tensors)

    def first(self) -> float:
        """Seconds of the first step, including compilation and first touch of memory."""
        self.step.prepare()
        start = time.perf_counter()
        self.step.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def keep(self, path: str) -> None:
        torch.save(project(self.step.run()), path)
        self.release()

    def check(self, path: str) -> dict[str, float]:
        self.step.prepare()
        errors = differences(project(self.step.run()), torch.load(path))
        self.release()
        return errors

    def memory(self) -> int | None:
        peak = peak_bytes(self.step, self.device)
        self.release()
        return peak

    def turn(self, seconds: float) -> float:
        median = self.clock.turn(self.step, seconds)
        self.release()
        return median

    def unload(self) -> None:
        del self.step
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # the next workload is not a second shape of this one
        gc.collect()
        self.release()

    def release(self) -> None:
        """Release cached memory: the others run on the same device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def serve(connection: Any, family: str, implementation: str, device: str, threads: int) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(threads)
    serving = Serving(family, implementation, torch.device(device))
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(serving, command)(*arguments)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answer = False, f"{type(error).__name__}: {lines[0][:300]}"
        connection.send(answer)


class Worker:
    """The parent's side. `ask` waits at most `limit_s` seconds; `load` restarts a process that hung or died."""

    def __init__(self, family: str, implementation: str, device: str, threads: int) -> None:
        self.arguments = (family, implementation, device, threads)
        self.process: Any = None
        self.loading = False

    def start(self) -> None:
        if self.process is not None and self.process.is_alive():
            return
        # A fork server imports torch once for all processes. CUDA does not survive a fork.
        context: Any = multiprocessing.get_context("forkserver" if self.arguments[2] == "cpu" else "spawn")
        context.set_forkserver_preload([__name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.arguments))
        self.process.start()
        theirs.close()

    def ask(self, command: str, *arguments: Any, limit_s: float) -> Any:
        if self.process is None:
            self.start()
        self.send(command, *arguments)
        return self.answer(command, limit_s)

    def send(self, command: str, *arguments: Any) -> None:
        with contextlib.suppress(OSError):  # its process died: `answer` reports it
            self.connection.send((command, arguments))

    def answer(self, command: str, limit_s: float) -> Any:
        try:
            if not self.connection.poll(max(limit_s, 0)):
                self.stop()
                raise Failed(f"no answer to {command!r} within {limit_s:.0f} s")
            good, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.stop()
            killed = " (killed: out of memory?)" if code == -9 else ""
            raise Failed(f"its process died at {command!r} with status {code}{killed}") from None
        if not good:
            raise Failed(answer)
        return answer

    def begin_load(self, workload: Any) -> None:
        """Send `load` without waiting for its answer, which the next `load` returns: several processes load at once."""
        self.start()
        self.send("load", asdict(workload))
        self.loading = True

    def load(self, workload: Any, limit_s: float) -> None:
        if self.loading:
            self.loading = False
            self.answer("load", limit_s)
            return
        self.start()
        self.ask("load", asdict(workload), limit_s=limit_s)

    def dismiss(self) -> None:
        """Let an idle process end by itself."""
        if self.process is not None:
            self.connection.close()

    def stop(self, limit_s: float = 0) -> None:
        """Dismiss it, and kill it if it is still there after `limit_s` seconds."""
        if self.process is not None:
            self.dismiss()
            self.process.join(limit_s)
            self.process.kill()
            self.process.join()
            self.process, self.loading = None, False
