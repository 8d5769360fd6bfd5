"""What a document is in each kind of file, and where the next one begins.

| kind | a document | its position |
|---|---|---|
| .txt (.gz, .zst) | a line with something in it | byte offset in the text |
| .jsonl (.gz, .zst), .json with an object a line | a line | byte offset in the text |
| .json with one array, or one object that holds one | an element | number |
| .csv (.gz, .zst) | a record | byte offset in the text |
| .parquet, folder of `save_to_disk` | a row | number |

`stream` yields raw cells with the position behind each, so that a resumed run seeks instead of re-reading, and so that a data
rank can pass over the documents of other ranks without parsing them; `read_text` makes text of a cell. Plain text files
and tables are entered at any position directly; a compressed file is decompressed up to it (about 200 MB/s), and a .json
array is parsed as a whole. A path may be a URL that `fsspec` opens (`hf://…` for the hub).
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from neobert.errors import DataError

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"

Cell = Any  # a line as bytes, or the value in the text column of a table


class Position(NamedTuple):
    """Behind a document of a stream: file number, and the offset (bytes or rows, see above) where the next one begins."""

    file: int = 0
    offset: int = 0


START = Position()


class Unusable(NamedTuple):
    """A row that holds no text that can be trained on."""

    reason: str
    path: str
    offset: int

    @property
    def where(self) -> str:
        return place(self.path, self.offset)


@dataclass
class Skips:
    """Rows that were passed over, by reason. With `refuse` the first one raises DataError."""

    refuse: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # reason -> where it was met first

    def add(self, row: Unusable) -> None:
        if self.refuse:
            raise DataError(f"{row.where}: {row.reason} (dataset.bad_rows: skip passes over such rows)")
        if row.reason not in self.counts:
            self.first[row.reason] = row.where
        self.counts[row.reason] = self.counts.get(row.reason, 0) + 1

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {"counts": dict(self.counts), "first": dict(self.first)}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        self.counts, self.first = dict(state["counts"]), dict(state["first"])


def kind_of(path: str) -> str | None:
    """The kind of file that a name says, without its compression; None when we read no such file."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in COMPRESSED and len(suffixes) > 1 and suffixes[-2] != ".parquet":
        suffixes = suffixes[:-1]
    kind = suffixes[-1].lower() if suffixes else ""
    return {".ndjson": ".jsonl"}.get(kind, kind) if kind in KINDS else None


def is_compressed(path: str) -> bool:
    return path.endswith(COMPRESSED)


def is_table(path: str) -> bool:
    """Whether documents are numbered rows: parquet, or a `save_to_disk` folder."""
    return kind_of(path) in (".parquet", None)


def is_seekable_text(path: str) -> bool:
    """Whether a byte offset is reached at once, and any line can be one's first."""
    return not is_compressed(path) and kind_of(path) != ".csv" and layout_of(path) == "lines"


@lru_cache(maxsize=100_000)
def layout_of(path: str) -> str:
    """How a file is laid out: `lines`, `csv`, `array` (one JSON value) or `table`."""
    kind = kind_of(path)
    if kind != ".json":
        return {".csv": "csv", ".txt": "lines", ".jsonl": "lines"}.get(kind or "", "table")
    with named(path), open_binary(path) as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(BOM)
    try:
        return "lines" if isinstance(json.loads(first), dict) else "array"
    except ValueError:
        return "array"


# --- opening -----------


def open_binary(path: str) -> Any:
    """The decompressed bytes of a file or URL."""
    if "://" in path:
        import fsspec

        compression = {".gz": "gzip"}.get(Path(path).suffix)
        raw = fsspec.open(path, "rb", compression=compression).open()
    else:
        raw = gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # noqa: SIM115
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 2**20)
    return raw


@contextmanager
def named(path: str) -> Iterator[None]:
    """Errors of reading become a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read: {reason}") from None


def open_table(path: str) -> Any:
    """The `ParquetFile` of a file, or the Arrow table of a `save_to_disk` folder; both have `.schema`. Raises DataError."""
    with named(path):
        if path.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.ParquetFile(open_binary(path) if "://" in path else path)
        from datasets import load_from_disk

        try:
            return load_from_disk(path).with_format("arrow").data.table
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def table_schema(table: Any) -> Any:
    """The Arrow schema of what `open_table` gives."""
    return getattr(table, "schema_arrow", None) or table.schema


# --- streams -----------


@dataclass(frozen=True)
class Files:
    """Files in reading order, and the text column of their rows (None: plain text).

    `start` and `stop` bound a stream of them; `rows` are the same bounds as numbers of rows. A `save_to_disk` folder counts
    as one file.
    """

    paths: tuple[str, ...]
    column: str | None
    start: Position = START
    stop: Position | None = None
    rows: tuple[int, int | None] = (0, None)


def stream(files: Files, start: Position, stop: Position | None = None) -> Iterator[tuple[Cell, Position, Position]]:
    """(cell, where it begins, position behind it) from `start` on, `stop` excluded. Raises DataError naming the file."""
    for number in range(start.file, len(files.paths)):
        path, offset = files.paths[number], start.offset if number == start.file else 0
        if stop is not None and (number, offset) >= stop:
            return
        end = stop.offset if stop is not None and stop.file == number else None
        for cell, begin, behind in cells(path, files.column, offset):
            if end is not None and begin >= end:
                return
            yield cell, Position(number, begin), Position(number, behind)


def cells(path: str, column: str | None, offset: int) -> Iterator[tuple[Cell, int, int]]:
    """(cell, where it begins, where the next begins) of one file. Raises DataError naming it."""
    with named(path):
        layout = layout_of(path)
        if layout == "lines":
            yield from _line_cells(path, offset)
        elif layout == "csv":
            yield from _csv_cells(path, str(column), offset)
        elif layout == "array":
            for number, row in enumerate(read_array(path)[offset:], offset):
                yield row.get(column) if isinstance(row, dict) else row, number, number + 1
        else:
            yield from _table_cells(path, str(column), offset)


def lines(path: str, offset: int) -> Iterator[tuple[bytes, int, int]]:
    """(line, where it begins, where the next begins)."""
    with open_binary(path) as file:
        skip_to(file, offset)
        for line in file:
            behind = offset + len(line)
            yield line if offset else line.removeprefix(BOM), offset, behind
            offset = behind


def skip_to(file: Any, offset: int) -> None:
    """Go to a byte offset, by decompressing up to it where that is the only way."""
    if isinstance(file, gzip.GzipFile) or not isinstance(file, io.BufferedReader) or file.seekable():
        file.seek(offset)
        return
    while offset and (chunk := file.read(min(offset, 2**22))):
        offset -= len(chunk)


def _line_cells(path: str, offset: int) -> Iterator[tuple[Cell, int, int]]:
    return ((line, begin, behind) for line, begin, behind in lines(path, offset) if not line.isspace())


def _csv_cells(path: str, column: str, offset: int) -> Iterator[tuple[Cell, int, int]]:
    header, begin = csv_header(path)
    if column not in header:
        raise DataError(f"{path}: no column {column!r}; there are: {', '.join(header)}")
    place = header.index(column)
    for record, start, behind in csv_records(path, max(begin, offset)):
        yield record[place] if place < len(record) else None, start, behind


def csv_records(path: str, position: int) -> Iterator[tuple[list[str], int, int]]:
    """(cells, where the record begins, where it ends) from byte `position` on."""
    csv.field_size_limit(2**31 - 1)
    behind = position

    def text_lines() -> Iterator[str]:  # the reader takes exactly the lines of one record, so `behind` is behind it
        nonlocal behind
        for line, _, after in lines(path, position):
            behind = after
            yield line.decode("utf-8", "surrogateescape")

    begin = position
    for record in csv.reader(text_lines()):
        if record:
            yield record, begin, behind
        begin = behind


def csv_header(path: str) -> tuple[list[str], int]:
    """(names of the columns, where the first record begins)."""
    behind = 0

    def text_lines() -> Iterator[str]:
        nonlocal behind
        for line, _, after in lines(path, 0):
            behind = after
            yield line.decode("utf-8", "replace")

    return next(csv.reader(text_lines()), []), behind


def read_array(path: str) -> list[Any]:
    """The elements of a .json file that holds one array, or one object with one array in it."""
    with named(path), open_binary(path) as file:
        raw = file.read()
    try:
        value = json.loads(raw.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected an array of objects with columns")
    return value


def _table_cells(path: str, column: str, start: int) -> Iterator[tuple[Cell, int, int]]:
    row = 0
    for length, chunk in _column_chunks(path, column):
        if row + length > start:
            for values in chunk():  # 1,000 rows at a time, so that memory stays flat
                skip = max(0, min(len(values), start - row))
                for number, value in enumerate(values.slice(skip).to_pylist(), row + skip):
                    yield value, number, number + 1
                row += len(values)
        else:
            row += length


def _column_chunks(path: str, column: str) -> Iterator[tuple[int, Any]]:
    """(number of rows, function that reads them): row groups of a parquet file, record batches of a saved folder."""
    table = open_table(path)
    names = table_schema(table).names
    if column not in names:
        raise DataError(f"{path}: no column {column!r}; there are: {', '.join(names)}")
    if path.endswith(".parquet"):
        for group in range(table.num_row_groups):
            yield (
                table.metadata.row_group(group).num_rows,
                lambda group=group: (
                    batch.column(0) for batch in table.iter_batches(1000, row_groups=[group], columns=[column])
                ),
            )
    else:
        for chunk in table.column(column).chunks:
            yield len(chunk), lambda chunk=chunk: (chunk.slice(at, 1000) for at in range(0, len(chunk), 1000))


# --- text -----------


def read_text(path: str, column: str | None, cell: Cell, offset: int) -> str | Unusable:
    """The text of a cell, or why there is none. Raises DataError when a line is not JSON at all."""
    value = cell
    if isinstance(cell, bytes):
        try:
            value = cell.decode("utf-8").strip() if column is None else parse_row(cell, path, offset).get(column)
        except UnicodeDecodeError:
            return Unusable("not UTF-8", path, offset)
    if value is None:
        return Unusable("no text", path, offset)
    if not isinstance(value, str):
        return Unusable("not text", path, offset)
    if not value or value.isspace():
        return Unusable("no text", path, offset)
    if not value.isascii():
        try:
            value.encode()  # lone surrogates: from JSON escapes, or from bytes of a CSV that are not UTF-8
        except UnicodeEncodeError:
            return Unusable("not UTF-8", path, offset)
    return value


def parse_row(line: bytes, path: str, offset: int) -> dict[str, Any]:
    """One line of a .jsonl file. Raises DataError naming file and line, UnicodeDecodeError."""
    row = parse_line(line, path, offset)
    if not isinstance(row, dict):
        raise DataError(f"{place(path, offset)}: expected an object with columns")
    return row


def parse_line(line: bytes, path: str, offset: int) -> Any:
    """Any JSON value of a line. Raises as `parse_row`."""
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place(path, offset)}: not JSON: {error}") from None


def place(path: str, offset: int) -> str:
    """`file:line` of a byte of a text file, `file: row n` of a table (from 0); slow, for messages."""
    if layout_of(path) not in ("lines", "csv"):
        return f"{path}: row {offset}"
    number = 1
    with open_binary(path) as file:
        while offset > 0 and (chunk := file.read(min(offset, 2**22))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return f"{path}:{number}"
