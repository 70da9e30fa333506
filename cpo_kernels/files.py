"""Atomic file writes: a process that is killed while writing leaves the old file or the new one, never a part."""

import os
from pathlib import Path


def atomic_text(text: str, path: Path) -> None:
    """Write a whole file, or leave the old one untouched."""
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
