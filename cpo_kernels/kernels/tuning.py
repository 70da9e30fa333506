"""Launch shapes of the token kernels: warps, vectors in flight, and how many programs share a row.

A program sweeps a row in tiles of `vectors` 16-byte vectors. None of the numbers was measured on a GPU yet; each says
what it is derived from, and `benchmarks/results/compile` holds the registers that they lead to.
"""

from functools import cache
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    warps: int  # of 32 threads
    vectors: int  # 16-byte vectors of a tile
    registers: int = 0  # of a thread at most; 0: as ptxas likes, which may spill a word for the sake of occupancy


# Bytes in flight: 4.3 TB/s over 132 multiprocessors at about 0.8 us is 26 kB each. At 64 registers a thread four
# programs of 8 warps share a multiprocessor: four 16-byte loads a thread are 64 kB in flight, two 32 kB.
# What writes a row also holds its gradient, and keeps to 64 registers with two.
SCAN = Launch(warps=8, vectors=1024)
WRITE = Launch(warps=8, vectors=512)
COMBINE = Launch(warps=2, vectors=0)


def fused(row_bytes: int, lean: bool) -> Launch:
    """Few rows at a time, so that the second sweep of a row finds it in the L2 cache (50 MB on an H200).

    At 64 registers a multiprocessor holds 1024 threads: with 8 or 32 warps a program 132 of them hold 528 or 132 rows,
    35 MB at the row sizes given here (the second: 128,256 columns in 16 bit). What is not `lean` (a softcap, extras,
    float64) needs up to 128 registers: half the threads.
    """
    if row_bytes <= 64 << 10:
        return Launch(warps=8, vectors=512) if lean else Launch(warps=8, vectors=512, registers=168)
    return Launch(warps=32, vectors=2048) if lean else Launch(warps=16, vectors=1024, registers=128)


class Tile(NamedTuple):
    """A block of rows x columns (of the vocabulary, or of a set's live ones) in flight."""

    warps: int
    rows: int
    block: int
    registers: int = 0
    depth: int = 0  # of a product's step
    stages: int = 0


# A warp sweeps 512 columns of one row: 16 numbers a thread, whose largest and sum it keeps in 32 registers, and five
# shuffles for the row's sum. At 96 registers 20 warps of a multiprocessor have 32 bytes a lane in flight all the time,
# 20 kB: 4.1 TB/s at 0.65 us. A program of 128 rows reads 128 kB.
LIVE_SCAN = {"fp32": Tile(warps=4, rows=4, block=512), "fp64": Tile(warps=4, rows=4, block=256)}
# Eight loads of one number a thread; four rows share the reads of the columns' numbers, four times as wide as theirs.
LIVE_GATHER = Tile(warps=4, rows=4, block=256)
LIVE_PREPARE = Tile(warps=4, rows=1, block=128)
# 16 rows of dW, 128 numbers each: 16 float32 a thread. Reads made and writes dW once; not measured.
LIVE_SUM = Tile(warps=4, rows=16, block=128)
LIVE_PACK = Tile(warps=4, rows=16, block=128)


def live_product(itemsize: int, rows: int, aligned: bool = True) -> Tile:
    """Of the products with live columns, for sets of `rows`.

    16 bit: 128 x 256 sums are 128 registers of 8 warps. Triton counts a stage for each of two loads that follow each
    other (a column's number, its row) and for the product: with five, two steps of 64, 96 kB, are in flight beside the
    one at work, which Hopper holds (148 kB); GPUs without wgmma keep one less (99 kB, of the 99 KiB of an RTX 4090).
    A quarter of it where g is read one number at a time, into registers. float32 and float64 run without tensor cores
    or few: for parity, not speed.
    """
    few = max(16, 1 << (min(rows, 128) - 1).bit_length())
    if itemsize == 2:
        return Tile(8, few, 256, depth=64, stages=5) if aligned else Tile(8, few, 128, depth=32, stages=5)
    return Tile(4, min(few, 32), 64, depth=16, stages=2)


def options(launch: Launch | Tile, amd: bool = bool(torch.version.hip)) -> dict[str, Any]:
    """What Triton takes: warps as it counts them (one of an AMD GPU of this family has 64 threads), fma, registers."""
    options: dict[str, Any] = {
        "num_warps": max(1, launch.warps // 2) if amd else launch.warps,
        "enable_fp_fusion": True,
    }
    if launch.registers and not amd:
        options["maxnreg"] = launch.registers
    if isinstance(launch, Tile) and launch.stages:
        options["num_stages"] = 2 if amd else launch.stages  # AMD: 64 kB of shared memory, the next step in registers
    return options


MAX_PIECES = 64  # of a row
PROGRAMS = 8  # programs a multiprocessor that a launch should have before rows are no longer split
INTERPRETED = 4  # multiprocessors that the interpreter plays


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def splits(rows: int, vectors: int, tile: int, device: torch.device) -> int:
    """Programs that share a row of `vectors` vectors: 1 where rows fill it by themselves; each has a tile at least."""
    wanted = -(-PROGRAMS * multiprocessors(device) // max(rows, 1))
    return max(1, min(wanted, vectors // tile, MAX_PIECES))
