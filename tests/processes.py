"""A function run by several processes of a gloo group, as ranks of one training."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 180  # until a group that waits for ever is ended


def run_processes(function: Callable[..., Any], world: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """function(rank, *args) in each of `world` processes; what it returns, by rank."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all of them
    context.set_forkserver_preload(["cpo_kernels"])
    with tempfile.TemporaryDirectory() as folder:
        given = [(function, rank, world, folder, args) for rank in range(world)]
        processes = [context.Process(target=_rank, args=a, daemon=True) for a in given]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            processes[rank].kill()
        errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.error")))
        if hung or errors or any(process.exitcode for process in processes):
            codes = [process.exitcode for process in processes]
            raise AssertionError(f"ranks {hung} hung, exit codes {codes}\n{errors}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(function: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
