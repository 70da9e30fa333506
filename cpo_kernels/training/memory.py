"""On a CPU: glibc gives every freed block of 32 MiB or more back to the system, and the next step pays for it again.

Logits, activations and gradients are such blocks. The system clears each page when it is first written: 300 MiB took 50
to 90 ms on two cores, a third of a matmul that fills them. Blocks that stay in the process are not cleared again.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, NEVER = -1, -4, -1  # the first two of malloc.h


def keep_freed_memory() -> bool:
    """From now on freed memory stays in the process, as the most that it held at once.

    It cannot be undone: glibc no longer adapts its thresholds once they are set. False where the C library has no
    `mallopt` (macOS, musl): nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: no handle of the process on Windows
        return False
    return all([mallopt(M_MMAP_MAX, 0) == 1, mallopt(M_TRIM_THRESHOLD, NEVER) == 1])
