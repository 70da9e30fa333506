"""On a CPU: glibc gives every freed block of 32 MiB or more back to the system, and the next step pays for it again.

Logits, activations and gradients are such blocks. The system clears each page when it is first written: 300 MiB took 50
to 90 ms on two cores, a third of a matmul that fills them. Blocks that stay in the process are not cleared again.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NEVER, MMAP_BLOCKS = -1, 65536  # trim never; glibc's default number of blocks with a mapping of their own
TRIM_BYTES = 128 << 10  # glibc's default


def keep_freed_memory(keep: bool = True) -> bool:
    """Freed memory stays in the process, as the most that it held at once; keep=False restores glibc's defaults.

    False where the C library has no `mallopt` (macOS, musl): nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: no handle of the process on Windows
        return False
    settings = {M_MMAP_MAX: 0 if keep else MMAP_BLOCKS, M_TRIM_THRESHOLD: NEVER if keep else TRIM_BYTES}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
