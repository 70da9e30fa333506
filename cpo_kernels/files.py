"""Files that are whole or not there: a process may be killed while it writes one."""

import os
from pathlib import Path


def atomic_text(text: str, path: Path) -> None:
    """Write a file whole, or leave what was there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs may share a cache
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
