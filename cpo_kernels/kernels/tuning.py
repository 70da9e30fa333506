"""Launch shapes of the token kernels: warps, vectors in flight, and how many programs share a row.

A program sweeps a row in tiles of `vectors` 16-byte vectors. None of these numbers has been measured on a GPU yet. Each
states its derivation, and `benchmarks/results/compile` has the register counts that result.
"""

from functools import cache
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    warps: int  # of 32 threads
    vectors: int  # 16-byte vectors of a tile
    registers: int = 0  # limit per thread; 0 leaves it to ptxas, which may spill a word to gain occupancy


# Bytes in flight: 4.3 TB/s over 132 multiprocessors at a latency of about 0.8 us is 26 kB each. With 64 registers per
# thread, four programs of 8 warps share a multiprocessor: four 16-byte loads per thread are 64 kB in flight, two are
# 32 kB. A program that writes a row also holds its gradient; it stays within 64 registers with two loads.
SCAN = Launch(warps=8, vectors=1024)
WRITE = Launch(warps=8, vectors=512)
COMBINE = Launch(warps=2, vectors=0)


def fused(row_bytes: int, lean: bool) -> Launch:
    """Launch of fused_: few rows at a time, so that the second sweep of a row finds it in the L2 cache (50 MB on an
    H200).

    With 64 registers per thread a multiprocessor holds 1024 threads. With 8 or 32 warps per program, 132
    multiprocessors hold 528 or 132 rows: 35 MB at the row sizes given here (for 32 warps, 128,256 columns in 16 bit).
    Kernels that are not `lean` (with a softcap, extras or float64) need up to 128 registers: half the threads.
    """
    if row_bytes <= 64 << 10:
        return Launch(warps=8, vectors=512) if lean else Launch(warps=8, vectors=512, registers=168)
    return Launch(warps=32, vectors=2048) if lean else Launch(warps=16, vectors=1024, registers=128)


class Tile(NamedTuple):
    """A block of rows x columns (of the vocabulary, or live columns of a set) in flight."""

    warps: int
    rows: int
    block: int
    registers: int = 0
    depth: int = 0  # inner dimension of one step of a matmul
    stages: int = 0


# A warp sweeps 512 columns of one row: 16 numbers per thread, whose maxima and sums take 32 registers, and five
# shuffles for the row's sum. With 96 registers, the 20 warps of a multiprocessor always have 32 bytes per lane in
# flight, 20 kB: 4.1 TB/s at a latency of 0.65 us. A program of 128 rows reads 128 kB.
LIVE_SCAN = {"fp32": Tile(warps=4, rows=4, block=512), "fp64": Tile(warps=4, rows=4, block=256)}
# Eight loads of one number per thread; four rows share the reads of the column indices, four times as wide as a logit.
LIVE_GATHER = Tile(warps=4, rows=4, block=256)
LIVE_PREPARE = Tile(warps=4, rows=1, block=128)
# 16 rows of dW, 128 numbers each: 16 float32 per thread. Reads `made` and writes dW once; not measured.
LIVE_SUM = Tile(warps=4, rows=16, block=128)
LIVE_PACK = Tile(warps=4, rows=16, block=128)


def live_product(itemsize: int, rows: int, aligned: bool = True) -> Tile:
    """Tile of the matmuls with live columns, for sets of `rows` rows.

    16 bit: 128 x 256 sums take 128 registers of the threads of 8 warps. Triton counts one stage for each of two
    dependent loads (a column's index, its row) and one for the product. With five stages, two steps of depth 64, 96 kB,
    are in flight besides the current one, which fits Hopper (148 kB); GPUs without wgmma keep one step fewer (99 kB, of
    the 99 KiB of an RTX 4090). If g is read one number at a time, into registers, the tile is a quarter of that.
    float32 and float64 use few tensor cores or none: they are for parity, not speed.
    """
    few = max(16, 1 << (min(rows, 128) - 1).bit_length())
    if itemsize == 2:
        return Tile(8, few, 256, depth=64, stages=5) if aligned else Tile(8, few, 128, depth=32, stages=5)
    return Tile(4, min(few, 32), 64, depth=16, stages=2)


def options(launch: Launch | Tile, amd: bool = bool(torch.version.hip)) -> dict[str, Any]:
    """Triton's launch options: warps (64 threads each on AMD GPUs of this family, so half as many), fma, registers."""
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
PROGRAMS = 8  # programs per multiprocessor from which on rows are not split
INTERPRETED = 4  # multiprocessors assumed under the interpreter


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def splits(rows: int, vectors: int, tile: int, device: torch.device) -> int:
    """Programs that share a row of `vectors` vectors: 1 if the rows alone fill the device; each has at least a tile."""
    wanted = -(-PROGRAMS * multiprocessors(device) // max(rows, 1))
    return max(1, min(wanted, vectors // tile, MAX_PIECES))
