"""The rows of a data source: JSONL line by line, everything else through `datasets`.

answers.jsonl                     read here, so that a broken line affects only itself
answers.jsonl.gz .csv.gz          the same, compressed; also .bz2 and .xz
answers.json .parquet .csv        local files; data/*.parquet reads all of them. CSV fields are strings
some/folder, openbmb/UltraSafety  through `datasets.load_dataset` or `load_from_disk`
"""

from __future__ import annotations

import csv
import glob
import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpo_kernels.data.records import OPENERS, DataError, open_text, read_jsonl, suffix_of
from cpo_kernels.extras import explained
from cpo_kernels.recipe.keys import SourceConfig

BUILDERS = {".json": "json", ".parquet": "parquet"}
DAMAGED = (ValueError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error, LZMAError)
READ_HERE = (".jsonl", ".ndjson", ".csv")
Row = tuple[str, dict[str, Any] | DataError]  # `file:line` or `source:row`, and the row there


def read_rows(source: SourceConfig, quiet: bool = True) -> Iterator[Row]:
    """The first `source.rows` rows, with a progress bar. Raises DataError if more than a single row is damaged."""
    rows, total = _open(source)
    if source.rows is not None:
        rows, total = islice(rows, source.rows), min(total or source.rows, source.rows)
    try:
        yield from tqdm(rows, f"read {Path(source.path).name}", total, disable=quiet, unit=" rows", leave=False)
    except DAMAGED as error:  # not of a single row: those come as values
        if isinstance(error, DataError):
            raise
        raise damaged(source.path, error) from None


def rows_of(dataset: Iterable[Any], name: str) -> Iterator[Row]:
    """The rows of a `datasets.Dataset` or of a list of dicts, numbered from 0 as it numbers them."""
    for number, row in enumerate(getattr(dataset, "with_format", lambda _: dataset)(None)):
        place = f"{name}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{place} is {row!r:.60}, not an object of columns: give one split of the data set")
        yield place, _without_others_keys(row)


def source_files(source: SourceConfig, key: str = "data") -> list[str]:
    """The paths of a source. Raises FileNotFoundError if it does not exist; the message calls it `key`."""
    path = source.path
    if not path:
        raise ValueError(f"{key}.path is empty: give a file, a folder or a hub name")
    files = sorted(glob.glob(path, recursive=True)) if "*" in path else [path]
    if not files or (holds_rows(path) and not all(Path(file).is_file() for file in files)):
        raise FileNotFoundError(f"{key}: data file {path!r} does not exist")
    if not holds_rows(path) and any(Path(file).is_file() for file in files):
        raise ValueError(
            f"{key}: data file {path!r}: unknown file extension; use one of {', '.join((*READ_HERE, *BUILDERS))}, "
            f"optionally compressed as {', '.join(OPENERS)}"
        )
    return files


def holds_rows(path: str) -> bool:
    """Whether it is the name of a file of rows."""
    return suffix_of(path) in (*READ_HERE, *BUILDERS)


def _open(source: SourceConfig) -> tuple[Iterable[Row], int | None]:
    path, suffix, files = source.path, suffix_of(source.path), source_files(source)
    if holds_rows(path):
        _refuse(source, ["subset", "data_dir", "split", *([] if suffix in BUILDERS else ["streaming"])])
    if suffix in READ_HERE:
        read = _read_csv if suffix == ".csv" else read_jsonl
        return ((f"{file}:{line}", row) for file in files for line, row in read(file)), None
    if holds_rows(path) and (empty := [file for file in files if not Path(file).stat().st_size]):
        raise DataError(f"{empty[0]}: the file is empty")
    rows = _load(source, files)
    try:
        total = len(rows)
    except TypeError:  # a stream
        total = None
    return ((f"{path}:row {number}", _without_others_keys(row)) for number, row in enumerate(rows, 1)), total


def _without_others_keys(value: Any, inside: bool = False) -> Any:
    """`value` without the nulls in tools and tool calls: Arrow gives every object all keys that any row has, and the
    chat template would write them."""
    if isinstance(value, list):
        return [_without_others_keys(item, inside) for item in value]
    if isinstance(value, dict):
        given = value.items() if not inside else ((name, x) for name, x in value.items() if x is not None)
        return {name: _without_others_keys(x, inside or name in ("tools", "tool_calls")) for name, x in given}
    return value


def damaged(path: str, error: BaseException) -> DataError:
    form = "; a .json file must hold a list of objects, or one object per line" if suffix_of(path) == ".json" else ""
    form = "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else form
    return DataError(f"{path}: {error}{form}")


def _refuse(source: SourceConfig, names: list[str]) -> None:
    """Raise ValueError for keys that this kind of source would ignore."""
    plain = SourceConfig(source.path)
    if given := [name for name in names if getattr(source, name) != getattr(plain, name)]:
        raise ValueError(f"source {source.path}: this kind of source does not take {', '.join(given)}")


def _load(source: SourceConfig, files: list[str]) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise explained(error, f"the source {source.path}") from None
    path, keep = source.path, {"split": source.split, "streaming": source.streaming}
    try:
        if suffix := BUILDERS.get(suffix_of(path)):
            return datasets.load_dataset(suffix, data_files=files, **keep)
        if not any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(path, source.subset, data_dir=source.data_dir, **keep)
        saved = datasets.load_from_disk(path)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise damaged(path, error.__cause__ or error) from None
    _refuse(source, ["subset", "data_dir", "streaming", *([] if isinstance(saved, dict) else ["split"])])
    if isinstance(saved, dict) and source.split not in saved:
        raise ValueError(f"source {path} has no split {source.split!r}; splits: {', '.join(saved)}")
    return saved[source.split] if isinstance(saved, dict) else saved


def _read_csv(path: str) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(line number, row); an empty field is None."""
    csv.field_size_limit(sys.maxsize)  # by default a field of more than 131,072 characters is an error
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                counted = (
                    f"{len(row) - (None in row)} fields, the row has more"
                    if None in row
                    else f"{len(row)} fields, the row has fewer"
                )
                yield reader.line_num, DataError(f"{path}:{reader.line_num}: the header has {counted}")
            else:
                yield reader.line_num, {name: value or None for name, value in row.items()}
