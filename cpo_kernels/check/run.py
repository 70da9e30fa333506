"""`cpo-kernels check`: runs the cases, here or in processes of their own, and reports them group by group."""

import fnmatch
import json
import math
import multiprocessing
import os
import queue
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cpo_kernels.backends import dispatch
from cpo_kernels.check.arguments import parser
from cpo_kernels.check.compare import Backend, Case, Findings, Skip
from cpo_kernels.environment import check_options, chosen_device, describe
from cpo_kernels.files import atomic_text

SAVE_S = 2.0  # between two writes of the results file
Job = tuple[str, str]  # backend, case
Result = dict[str, Any]


def all_cases() -> list[Case]:
    from cpo_kernels.check import edges, errors, extremes, head, live, matmuls, preference, tokens, waiting

    kernels = (
        tokens.token_cases,
        extremes.extreme_cases,
        edges.edge_cases,
        live.live_cases,
        matmuls.matmul_cases,
        preference.preference_cases,
    )
    others = (errors.error_cases, head.head_cases, waiting.gpu_cases)
    cases = [case for cases in (*kernels, *others) for case in cases()]
    groups = list(dict.fromkeys(case.group for case in cases))
    return sorted(cases, key=lambda case: groups.index(case.group))


# ------------------------------------------------------------------------------------------------------- running cases


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory of new tensors is NaN or the largest integer, so that an output left unwritten shows."""
    deterministic: Any = torch.utils.deterministic  # its switches are properties that mypy does not see
    fill, enabled = deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic.*")
            warnings.filterwarnings("ignore", module="triton.runtime.interpreter")  # numpy on infinities
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill


def run_case(backend: Backend, case: Case) -> Result:
    """Never raises. `fatal`: the GPU takes no more work from this process."""
    findings, start = Findings(), time.perf_counter()
    status, reason, fatal = "passed", "", False
    try:
        with poisoned():
            case.run(backend, findings)
            if backend.on_gpu:
                torch.cuda.synchronize(backend.device)
        if findings.wrong:
            status = "failed"
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception as error:
        status, reason = "crashed", f"{type(error).__name__}: {error}"
        findings.wrong.append(traceback.format_exc(limit=-4))
        fatal = backend.on_gpu and device_lost(backend)
    return {
        "backend": backend.name,
        "case": case.name,
        "status": status,
        "worst": findings.worst,
        "where": findings.where,
        "wrong": findings.wrong,
        "reason": reason,
        "seconds": round(time.perf_counter() - start, 4),
        "fatal": fatal,
    }


def device_lost(backend: Backend) -> bool:
    try:
        torch.cuda.synchronize(backend.device)
    except Exception:
        return True
    return False


def run_here(
    jobs: Sequence[Job], device: str, build: Callable[[], list[Case]], deadline: float = math.inf
) -> Iterator[Result]:
    cases = {case.name: case for case in build()}
    for backend, name in jobs:
        if time.monotonic() > deadline:
            return
        yield run_case(Backend(backend, torch.device(device)), cases[name])


def work(connection: Any, jobs: Sequence[Job], device: str, build: Callable[[], list[Case]]) -> None:
    for result in run_here(jobs, device, build):
        connection.send(result)
        if result["fatal"]:
            os._exit(1)


def run_apart(
    jobs: Sequence[Job], device: str, build: Callable[[], list[Case]], limit_s: float, stop: threading.Event
) -> Iterator[Result]:
    """The same in a process of their own, begun anew after a case that killed it or gave nothing for `limit_s`. `stop`
    ends it."""
    left, context = list(jobs), multiprocessing.get_context("spawn")
    while left and not stop.is_set():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, left, device, build), daemon=True)
        process.start()
        sender.close()
        died, done = "", 0
        while left and not died:
            waiting_since = time.monotonic()
            while not (ready := receiver.poll(0.5)) and not stop.is_set():
                if time.monotonic() - waiting_since > limit_s:
                    break
            if stop.is_set():
                process.kill()
                process.join()
                return
            if not ready:
                process.kill()
                died = f"no result after {limit_s:g} s"
                break
            try:
                result = receiver.recv()
            except EOFError:
                process.join()
                died = f"the process died with status {process.exitcode}"
                break
            left.pop(0)
            done += 1
            yield result
            if result["fatal"]:
                break
        process.join(10 if not died else None)
        process.kill()
        if died:
            count = (
                1 if done or len(left) == len(jobs) else len(left)
            )  # a process that cannot even start is not retried
            for backend, name in left[:count]:
                yield {
                    "backend": backend, "case": name, "status": "crashed", "worst": 0.0, "where": "", "wrong": [],
                    "reason": died, "seconds": 0.0, "fatal": True,
                }  # fmt: skip
            del left[:count]


def run_beside(
    jobs: Sequence[Job],
    device: str,
    build: Callable[[], list[Case]],
    limit_s: float,
    processes: int,
    deadline: float = math.inf,
) -> Iterator[Result]:
    """The same in several processes at once, until `deadline` on the monotonic clock; results in the order in which
    they come."""
    results: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def watch(part: Sequence[Job]) -> None:
        try:
            for result in run_apart(part, device, build, limit_s, stop):
                results.put(result)
            results.put(None)
        except BaseException as error:
            results.put(error)

    parts = [part for part in (jobs[k::processes] for k in range(processes)) if part]
    watchers = [threading.Thread(target=watch, args=(part,), daemon=True) for part in parts]
    for watcher in watchers:
        watcher.start()
    working = len(parts)
    try:
        while working:
            try:
                left = deadline - time.monotonic()
                result = results.get(timeout=max(left, 0.0) if left < threading.TIMEOUT_MAX else None)
            except queue.Empty:
                return
            if isinstance(result, BaseException):
                raise result
            if result is None:
                working -= 1
            else:
                yield result
    finally:
        stop.set()
        for watcher in watchers:
            watcher.join()


# ------------------------------------------------------------------------------------------------------------ reporting


@dataclass
class Group:
    """The line of one backend and group."""

    backend: str
    name: str
    results: list[Result] = field(default_factory=list)

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if r["status"] in ("failed", "crashed")]

    def line(self) -> str:
        ran = [r for r in self.results if r["status"] != "skipped"]
        worst = max(ran, key=lambda r: r["worst"], default=None)
        error = f"worst {worst['worst']:.2f} of tolerance" if worst and worst["where"] else ""
        verdict = "FAIL" if self.failures else "PASS" if ran else "skipped"
        seconds = sum(r["seconds"] for r in self.results)
        return f"{self.backend:9} {self.name:20} {len(ran):4} cases  {error:28} {seconds:6.1f} s  {verdict}"

    def details(self, device: str) -> list[str]:
        lines = []
        for r in self.failures:
            lines.append(f"  {r['case']}: {r['reason'] or r['wrong'][0]}")
            if len(r["wrong"]) > 1:
                lines.append(f"    and {len(r['wrong']) - 1} more")
            lines.append(f"    again: cpo-kernels check --device {device} --impl {r['backend']} --only '{r['case']}'")
        lines += [f"  {r['case']}: skipped: {r['reason']}" for r in self.results if r["status"] == "skipped"]
        return lines


def report(
    results: Iterable[Result], jobs: Sequence[Job], device: str, save: Callable[[list[Result]], None], show: bool
) -> list[Result]:
    """Prints each group as it ends, those cut off last; saves every SAVE_S; `show`: counts on one line of the terminal.
    Results in the order of `jobs`."""

    def key(backend: str, case: str) -> tuple[str, str]:
        return backend, case.partition("/")[0]

    left = Counter(key(*job) for job in jobs)
    groups = {k: Group(*k) for k in left}
    place = {job: i for i, job in enumerate(jobs)}
    record: list[Result] = []
    saved_at = -math.inf

    def save_now() -> None:
        nonlocal saved_at
        record.sort(key=lambda r: place[r["backend"], r["case"]])
        save(record)
        saved_at = time.monotonic()

    width = shutil.get_terminal_size().columns - 1
    try:
        for result in results:
            group = groups[key(result["backend"], result["case"])]
            group.results.append(result)
            record.append(result)
            left[group.backend, group.name] -= 1
            if show:  # one line that the next one overwrites
                line = f"{len(record)} of {len(jobs)}: {result['backend']} {result['case']}"
                print(f"\r{line[:width]:<{width}}\r", end="", file=sys.stderr, flush=True)
            if not left[group.backend, group.name]:
                if show:
                    print(" " * width, end="\r", file=sys.stderr, flush=True)
                print("\n".join([group.line(), *group.details(device)]), flush=True)
            if time.monotonic() - saved_at > SAVE_S:
                save_now()
    finally:
        save_now()
    for k, count in left.items():
        if count:
            cut = groups[k]
            print("\n".join([f"{cut.line()}, {count} not run", *cut.details(device)]), flush=True)
    return record


def counts(results: Iterable[Result]) -> dict[str, int]:
    statuses = Counter(r["status"] for r in results)
    return {status: statuses[status] for status in ("passed", "failed", "crashed", "skipped")}


def backends_on(device: torch.device) -> list[str]:
    """Every backend that runs on this device; not the reference, which is the oracle."""
    wanted = ["cpu"] if device.type == "cpu" else ["triton", "cuda"]
    if device.type == "cpu" and dispatch.triton_interpreted():
        wanted.append("triton")
    backends = [name for name in wanted if not dispatch.missing(name)]
    if not backends:
        raise ValueError(
            f"no kernels to check on {device}: " + "; ".join(f"{n}: {dispatch.missing(n)}" for n in wanted)
        )
    return backends


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(argv))


def run(args: Any) -> int:
    if args.processes < 1 or (args.in_process and args.processes > 1):
        raise ValueError(f"--processes {args.processes}: at least 1, and 1 with --in-process")
    args.device = default_device() if args.device is None else args.device
    check_options(args.out, case_limit=args.case_limit, time_limit=args.time_limit)
    device = chosen_device(args.device)
    chosen = args.impl or backends_on(device)
    for backend in chosen:
        if reason := dispatch.missing(backend):
            raise ValueError(f"--impl {backend} cannot run here: {reason}")
        dispatch.resolve_impl(backend, device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or its products may differ from run to run
    in_set = [c.name for c in all_cases() if c.quick or not args.quick]
    for pattern in args.only:
        if not fnmatch.filter(in_set, pattern):
            raise ValueError(f"--only {pattern!r} names no case{' of --quick' if args.quick else ''}: see --list")
    names = [name for name in in_set if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only)]
    if args.list:
        print("\n".join(names))
        return 0
    print(f"{len(names)} cases on {device}, backends: {', '.join(chosen)}", flush=True)
    start = time.perf_counter()
    deadline = time.monotonic() + (args.time_limit or math.inf)
    jobs = [(h, n) for h in chosen for n in names]
    environment = describe(device) if args.out else {}

    def save(results: list[Result]) -> None:
        if args.out:
            left = len(jobs) - len(results)
            content = {"environment": environment, "counts": counts(results), "left": left, "cases": results}
            atomic_text(json.dumps(content, indent=1) + "\n", args.out)

    if args.in_process:
        running = run_here(jobs, args.device, all_cases, deadline)
    else:
        running = run_beside(jobs, args.device, all_cases, args.case_limit, args.processes, deadline)
    results = report(running, jobs, args.device, save, show=sys.stderr.isatty() and not args.quiet)
    count = counts(results) | {"not run": len(jobs) - len(results)}
    print(", ".join(f"{n} {s}" for s, n in count.items() if n) + f" in {time.perf_counter() - start:.0f} s")
    if args.out:
        print(f"wrote {args.out}")
    return 1 if count["failed"] or count["crashed"] or count["not run"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
