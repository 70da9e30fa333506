"""Rows of a data source: JSONL line by line, everything else through `datasets`.

answers.jsonl                     read here, so that one broken line costs one line
answers.json .parquet .csv        local files; data/*.parquet is all of them. Every field of a CSV file is a text
some/folder, openbmb/UltraSafety  what `datasets.load_dataset` or `load_from_disk` makes of it
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpo_kernels.data.records import DataError, read_jsonl
from cpo_kernels.training.keys import SourceConfig

BUILDERS = {".json": "json", ".parquet": "parquet"}
Row = tuple[str, dict[str, Any] | DataError]  # `file:line` or `source:row`, and what stands there


def read_rows(source: SourceConfig, quiet: bool = True) -> Iterator[Row]:
    """The first `source.rows` rows, under a progress bar."""
    rows, total = _open(source)
    if source.rows is not None:
        rows, total = islice(rows, source.rows), min(total or source.rows, source.rows)
    yield from tqdm(rows, f"read {Path(source.path).name}", total, disable=quiet, unit=" rows", leave=False)


def _open(source: SourceConfig) -> tuple[Iterable[Row], int | None]:
    path = source.path
    files = sorted(glob.glob(path, recursive=True)) if "*" in path else [path]
    suffix = Path(path).suffix
    local = suffix in (".jsonl", ".csv", *BUILDERS)
    if not files or (local and not all(Path(file).is_file() for file in files)):
        raise FileNotFoundError(f"data file {path!r} does not exist")
    if local and (source.subset or source.split != "train" or (source.streaming and suffix not in BUILDERS)):
        given = [
            name for name in ("subset", "split", "streaming") if getattr(source, name) not in (None, "train", False)
        ]
        raise ValueError(f"{path}: a {suffix} file has no {', '.join(given)}")
    if suffix in (".jsonl", ".csv"):
        read = _read_csv if suffix == ".csv" else read_jsonl
        return ((f"{file}:{line}", row) for file in files for line, row in read(file)), None
    rows = _load(source, files)
    try:
        total = len(rows)
    except TypeError:  # a stream
        total = None
    return ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1)), total


def _load(source: SourceConfig, files: list[str]) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{source.path}: this source needs `datasets`: pip install datasets") from None
    path, keep = source.path, {"split": source.split, "streaming": source.streaming}
    if Path(path).suffix in BUILDERS:
        return datasets.load_dataset(BUILDERS[Path(path).suffix], data_files=files, **keep)
    if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(path)
        return saved[source.split] if isinstance(saved, dict) else saved
    return datasets.load_dataset(path, source.subset, **keep)


def _read_csv(path: str) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(line number, row); an empty field is None."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                counted = f"{len(row) - (None in row)} fields" if None in row else f"{len(row)} fields, some missing"
                yield reader.line_num, DataError(f"{path}:{reader.line_num}: the header has {counted}")
            else:
                yield reader.line_num, {name: value or None for name, value in row.items()}
