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
from cpo_kernels.extras import explained
from cpo_kernels.training.keys import SourceConfig

BUILDERS = {".json": "json", ".parquet": "parquet"}
Row = tuple[str, dict[str, Any] | DataError]  # `file:line` or `source:row`, and what stands there


def read_rows(source: SourceConfig, quiet: bool = True) -> Iterator[Row]:
    """The first `source.rows` rows, under a progress bar. Raises DataError where a file is damaged beyond one row."""
    rows, total = _open(source)
    if source.rows is not None:
        rows, total = islice(rows, source.rows), min(total or source.rows, source.rows)
    try:
        yield from tqdm(rows, f"read {Path(source.path).name}", total, disable=quiet, unit=" rows", leave=False)
    except ValueError as error:  # not of one row: those come as values
        raise DataError(f"{source.path}: {error}") from None


def source_files(source: SourceConfig, key: str = "data") -> list[str]:
    """The paths of a source. Raises FileNotFoundError where it is not there, which the message calls `key`."""
    path = source.path
    if not path:
        raise ValueError(f"{key}.path is empty: give a file, a folder or a hub name")
    files = sorted(glob.glob(path, recursive=True)) if "*" in path else [path]
    if not files or (_is_local(path) and not all(Path(file).is_file() for file in files)):
        raise FileNotFoundError(f"{key}: data file {path!r} does not exist")
    return files


def _is_local(path: str) -> bool:
    return Path(path).suffix in (".jsonl", ".csv", *BUILDERS)


def _open(source: SourceConfig) -> tuple[Iterable[Row], int | None]:
    path, suffix, files = source.path, Path(source.path).suffix, source_files(source)
    if _is_local(path):
        _refuse(source, ["subset", "data_dir", "split", *([] if suffix in BUILDERS else ["streaming"])])
    if suffix in (".jsonl", ".csv"):
        read = _read_csv if suffix == ".csv" else read_jsonl
        return ((f"{file}:{line}", row) for file in files for line, row in read(file)), None
    rows = _load(source, files)
    try:
        total = len(rows)
    except TypeError:  # a stream
        total = None
    return ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1)), total


def _refuse(source: SourceConfig, names: list[str]) -> None:
    """Keys that a source of this kind would ignore."""
    plain = SourceConfig(source.path)
    if given := [name for name in names if getattr(source, name) != getattr(plain, name)]:
        raise ValueError(f"source {source.path}: this kind of source has no {', '.join(given)}")


def _load(source: SourceConfig, files: list[str]) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise explained(error, f"the source {source.path}") from None
    path, keep = source.path, {"split": source.split, "streaming": source.streaming}
    try:
        if Path(path).suffix in BUILDERS:
            return datasets.load_dataset(BUILDERS[Path(path).suffix], data_files=files, **keep)
        if not any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(path, source.subset, data_dir=source.data_dir, **keep)
        saved = datasets.load_from_disk(path)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{path}: {error.__cause__ or error}") from None
    _refuse(source, ["subset", "data_dir", "streaming", *([] if isinstance(saved, dict) else ["split"])])
    if isinstance(saved, dict) and source.split not in saved:
        raise ValueError(f"source {path} has no split {source.split!r}, but {', '.join(saved)}")
    return saved[source.split] if isinstance(saved, dict) else saved


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
