"""A function run by several processes of a gloo group, as ranks of one training."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 180  # until a group that waits for ever is ended


def run_processes(function: Callable[..., Any], world: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """function(rank, *args) in each of `world` processes; what it returns, by rank."""
    results, codes, errors = _run(function, world, args, seconds)
    if None in codes or any(codes) or errors:
        raise AssertionError(f"exit codes {codes} (None: hung)\n{errors}")
    return results


def exit_codes(function: Callable[..., Any], world: int, *args: Any, seconds: float = SECONDS) -> list[int | None]:
    """How processes that do not live to return end; None for one that hangs."""
    return _run(function, world, args, seconds)[1]


def _run(
    function: Callable[..., Any], world: int, args: tuple[Any, ...], seconds: float
) -> tuple[list[Any], list[int | None], str]:
    """(results, exit codes, tracebacks) by rank."""
    context = multiprocessing.get_context("forkserver")  # imports torch and transformers once for all
    context.set_forkserver_preload(["cpo_kernels.training.loop"])
    with tempfile.TemporaryDirectory() as folder:
        given = [(function, rank, world, folder, args) for rank in range(world)]
        processes = [context.Process(target=_rank, args=a, daemon=True) for a in given]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.error")))
        files = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        return [torch.load(file, weights_only=False) for file in files if file.exists()], codes, errors


def _rank(function: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def as_launched(rank: int, world: int, port: int) -> None:
    """The environment that torchrun gives a rank, for code that asks it (accelerate)."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
