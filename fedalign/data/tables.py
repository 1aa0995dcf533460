"""Rows of a JSONL, CSV or Parquet file, each with the place it came from.

The source of a row is "file:line" for text files (for a quoted CSV cell that runs over several
lines, the line where the row starts) and "file:row N" for Parquet, both counted from 1.  Strictness
is on purpose: NaN and repeated keys in JSON, and CSV rows of the wrong width, are bad rows.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fedalign.data.rejects import Rejects
from fedalign.errors import DataError

SUFFIXES = (".jsonl", ".csv", ".parquet")


class Row(NamedTuple):
    """One row: where it is, its number from 0 over all files (bad rows count), its values."""

    source: str
    number: int
    values: dict[str, Any]


def rows(path: Path, rejects: Rejects | None = None) -> Iterator[Row]:
    """Yield the rows of a file, or of all data files of a folder in the order of their names.

    Raises ``DataError`` for a missing path, an unknown kind of file, an unreadable file, and
    (unless ``rejects`` skips them) a malformed row.
    """
    rejects = rejects or Rejects()
    number = 0
    for file in data_files(path):
        read = _READERS[_kind(file)]
        try:
            for source, values in read(file):
                if isinstance(values, DataError):
                    with rejects.at(source):
                        raise values
                else:
                    yield Row(source, number, values)
                number += 1
        except (OSError, EOFError) as error:
            raise DataError(f"{file}: cannot be read: {error}") from None


def data_files(path: Path) -> list[Path]:
    """Return the data files at ``path``: the file itself, or those in the folder, sorted."""
    if path.is_dir():
        found = sorted(f for f in path.iterdir() if f.is_file() and _kind(f))
        if not found:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this folder.")
        return found
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder. Check data.path.")
    if not _kind(path):
        raise DataError(
            f"{path}: cannot read this kind of file. Give {', '.join(SUFFIXES)} "
            "(.jsonl and .csv also gzipped, as .jsonl.gz)."
        )
    return [path]


def parse_json(text: str) -> Any:
    """Parse JSON strictly: NaN, Infinity and repeated keys are ``DataError``."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
        if "\\ud" in text.lower():  # An escape may be half a character, which no text can hold.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} at character {error.pos + 1}.") from None
    except UnicodeEncodeError:
        raise DataError("not valid text: a lone surrogate escape (half a character).") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"not valid JSON: {error}.") from None
    return value


def _no_constant(name: str) -> NoReturn:
    raise DataError(f"{name} is not a number that JSON allows; shares and scores must be finite.")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise DataError(f"key '{key}' appears twice in one object.")
        out[key] = value
    return out


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] in ([".jsonl"], [".csv"]):
        return suffixes[-2]
    return suffixes[-1] if suffixes[-1:] and suffixes[-1] in SUFFIXES else ""


# Readers yield (source, values or the error of that row): a generator cannot go on after it raises.
_Parsed = Iterator[tuple[str, "dict[str, Any] | DataError"]]


def _lines(path: Path) -> Iterator[str]:
    """Yield decoded lines; bytes that are not UTF-8 become an error naming the line."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as f:
        for n, raw in enumerate(f, start=1):
            try:
                yield raw.decode("utf-8-sig" if n == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{n}: not UTF-8 text ({error.reason}).") from None


def _jsonl(path: Path) -> _Parsed:
    for n, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        source = f"{path}:{n}"
        try:
            value = parse_json(line)
        except DataError as error:
            yield source, error
            continue
        if isinstance(value, dict):
            yield source, value
        else:
            yield source, DataError(f"a row must be a JSON object, not {type(value).__name__}.")


def _csv(path: Path) -> _Parsed:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    while True:
        source = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # After a broken quote nothing tells where the next row starts.
            yield source, DataError(f"not valid CSV: {error}; the rest of the file is not read.")
            return
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = [c.strip() for c in cells]
            if len(set(header)) != len(header):
                raise DataError(f"{source}: two columns have the same name.")
        elif len(cells) != len(header):
            yield source, DataError(f"{len(cells)} cells for {len(header)} columns.")
        else:
            # An empty CSV cell is a value that is not given.
            yield source, {k: v for k, v in zip(header, cells, strict=True) if v != ""}


def _parquet(path: Path) -> _Parsed:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            n = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist(maps_as_pydicts="strict"):
                    n += 1
                    yield f"{path}:row {n}", values
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
