"""Atomic file writes: a process that is killed while writing leaves the old file or the new one, never a part."""

import os
from pathlib import Path


def atomic_text(text: str, path: Path) -> None:
    """Write a whole file, or leave the old one untouched."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs may share a cache
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)


def check_folder(folder: Path, key: str) -> None:
    """Raise OSError if `folder`, given as `key`, cannot be made or written. Makes nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{key} {folder}: {there} is a file: name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{key} {folder}: {there} cannot be written: name another folder")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
