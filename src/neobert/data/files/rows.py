"""The reader of rows: what a row is in each kind of file, and where the next one begins.

| kind | a row | its position |
|---|---|---|
| .txt | a line with something in it | byte offset in the text |
| .jsonl, .ndjson, .json with an object a line | a line | byte offset in the text |
| .json with one array, or one object that holds one | an element | number |
| .csv; .tsv, where quotes are part of the text | a record | byte offset in the text |
| .parquet, .arrow, folder of `save_to_disk` | a row | number |

All of these but tables may be compressed (.gz, .zst). Text is UTF-8, with or without a byte order mark; lines end at line
feeds only. A path may be a URL that `fsspec` opens (`hf://…` for the hub).

`raw_rows` yields rows from any position on: plain text and tables are entered there directly, a compressed file is
decompressed up to it (about 200 MB/s), and a .json array is parsed as a whole. Lines are yielded as bytes, so that a reader
that wants every N-th of them need not parse the others. `records` yields parsed rows. A row that cannot be used is an
`Unusable` with the reason; a file that cannot be read is a DataError with its name.
"""

import csv
import gzip
import io
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from neobert.data.files.opening import is_compressed, kind_of, named, open_binary, open_table
from neobert.errors import DataError

BOM = b"\xef\xbb\xbf"
LEAVE_IT = "leave the files as they are until the run has ended"
MAX_OPEN_FILES = 256  # whose lines are read by number, at a time
HEAD_BYTES = 1024  # looked at to recognise UTF-16
FIRST_ROWS = 20  # looked at to find the columns of a text format
DAMAGE = (EOFError, zlib.error, OSError)  # what a damaged compressed file raises; an OSError then has no errno

Row = dict[str, Any]


class Unusable(NamedTuple):
    """A row that cannot be used, or the rest of a file."""

    reason: str
    path: str
    offset: int

    @property
    def where(self) -> str:
        return place(self.path, self.offset)


Raw = bytes | Row | Unusable
Rows = Iterator[tuple[Raw, int, int]]  # a row, where it begins, where the next begins


def is_seekable_text(path: str) -> bool:
    """Whether a byte offset is reached at once, and any line can be one's first."""
    return not is_compressed(path) and layout_of(path) == "lines"


@lru_cache(maxsize=100_000)
def layout_of(path: str) -> str:
    """How a file is laid out: `lines`, `csv`, `array` (one JSON value) or `table`."""
    kind = kind_of(path)
    if kind != ".json":
        return {".csv": "csv", ".tsv": "csv", ".txt": "lines", ".jsonl": "lines"}.get(kind or "", "table")
    with named(path):
        first = next((line for line, _, _ in lines(path, 0) if line.strip()), b"")
    try:
        return "lines" if isinstance(json.loads(first), dict) else "array"
    except (ValueError, RecursionError):
        return "array"


def raw_rows(path: str, offset: int = 0, columns: list[str] | None = None) -> Iterator[tuple[Raw, int, int | None]]:
    """(row, where it begins, where the next begins) from `offset` on; of tables those `columns` only.

    A compressed file that is damaged further on yields an Unusable for its rest, and None as the next position. Raises
    DataError.
    """
    after, read = offset, {"lines": _text_rows, "csv": _csv_rows, "array": _array_rows, "table": _table_rows}
    with named(path):
        try:
            for row, begin, after in read[layout_of(path)](path, offset, columns):
                yield row, begin, after
        except DAMAGE as error:
            is_damage = is_compressed(path) and not getattr(error, "errno", None)
            if not is_damage or not (after or isinstance(error, EOFError)):
                raise
            yield Unusable("the rest of a compressed file that is damaged or cut short", path, after), after, None


def _text_rows(path: str, offset: int, columns: list[str] | None) -> Rows:
    return (found for found in lines(path, offset) if not found[0].isspace())


def _array_rows(path: str, offset: int, columns: list[str] | None) -> Rows:
    """The elements of one array, or of the only array in one object."""
    with named(path), open_binary(path) as file:
        raw = file.read()
    refuse_utf16(raw[:HEAD_BYTES], path)
    try:
        value = json.loads(raw.removeprefix(BOM)) if raw.strip() else []
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected an array of objects with columns")
    for number, row in enumerate(value[offset:], offset):
        yield to_columns(row, path, number), number, number + 1


def count_rows(path: str) -> int:
    """Rows of a file; tables know it, plain text is scanned, the rest is read once."""
    if layout_of(path) == "table":
        return open_table(path).num_rows
    if is_seekable_text(path) and "://" not in path:
        return len(line_spans(path))
    return sum(1 for _ in raw_rows(path))


def records(path: str) -> Iterator[tuple[Row | Unusable, int]]:
    """(row, where it begins) of all rows of a file. Raises DataError."""
    is_text = kind_of(path) == ".txt"
    return ((parse_row(raw, path, begin, is_text), begin) for raw, begin, _ in raw_rows(path))


def usable_records(path: str) -> Iterator[tuple[Row, int]]:
    """As `records`, where every row counts: raises DataError for one that cannot be used, too."""
    for row, begin in records(path):
        if isinstance(row, Unusable):
            raise DataError(f"{row.where}: {row.reason}")
        yield row, begin


def text_in(row: Row, column: str, path: str, offset: int) -> str:
    """The text in a column of a row that begins there; it may be empty. Raises DataError naming file and row."""
    text = row.get(column)
    if not isinstance(text, str):
        raise DataError(f"{place(path, offset)}: {column} is {text!r}, not a text")
    if not is_utf8(text):
        raise DataError(f"{place(path, offset)}: {column} is not UTF-8")
    return text


def lines(path: str, offset: int) -> Iterator[tuple[bytes, int, int]]:
    """(line, where it begins, where the next begins), also of empty ones. Raises DataError for UTF-16, and a shortened file."""
    with open_binary(path) as file:
        is_plain = "://" not in path and not is_compressed(path)
        size = os.fstat(file.fileno()).st_size if is_plain else 0
        skip_to(file, offset)
        start = offset
        if not offset:
            refuse_utf16(file.peek(HEAD_BYTES)[:HEAD_BYTES], path)
        for line in file:
            after = offset + len(line)
            yield line if offset else line.removeprefix(BOM), offset, after
            offset = after
        if is_plain and (start > size or offset < size):
            raise DataError(f"{path}: became shorter while it was read; {LEAVE_IT}")


def line_spans(path: str, chunk: int = 2**26) -> np.ndarray:
    """Begin and end of every line that is not white space: int64, lines x 2. Reads by chunks. Raises DataError for UTF-16."""
    with named(path):
        raw = np.memmap(path, dtype=np.uint8, mode="r") if os.path.getsize(path) else np.zeros(0, np.uint8)
    refuse_utf16(raw[:HEAD_BYTES].tobytes(), path)
    starts = range(0, len(raw), chunk)
    ends = [np.flatnonzero(raw[start : start + chunk] == ord("\n")) + start + 1 for start in starts]
    bounds = np.concatenate([[0], *ends, [len(raw)]])
    if bounds[-2] == len(raw):  # a line feed at the end, or no text at all
        bounds = bounds[:-1]
    spans = np.stack([bounds[:-1], bounds[1:]], axis=1)
    space = raw[spans[:, 0]] <= ord(" ")  # only these can be blank
    blank = [line for line in np.flatnonzero(space) if raw[slice(*spans[line])].tobytes().isspace()]
    return np.delete(spans, blank, axis=0)


class Lines:
    """The lines of a file that are not white space, by number, as long as nobody changes it."""

    def __init__(self, path: str):
        self.path, self.spans, self.inode = path, line_spans(path), os.stat(path).st_ino

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, number: int) -> tuple[bytes, int]:
        """(line, where it begins). Raises DataError, also for a file that has changed."""
        begin, end = self.spans[number].tolist()
        with named(self.path):
            line = os.pread(_open_file(self.path, self.inode).fileno(), end - begin, begin)
        if len(line) < end - begin:
            raise DataError(f"{self.path}: became shorter while it was read; {LEAVE_IT}")
        return line if begin else line.removeprefix(BOM), begin


class _OpenFile(io.FileIO):
    """A file that is closed when it is forgotten."""

    def __del__(self) -> None:
        self.close()


@lru_cache(MAX_OPEN_FILES)
def _open_file(path: str, inode: int) -> _OpenFile:
    """The file that was indexed. Raises DataError when another one has its name now."""
    file = _OpenFile(path)
    if os.fstat(file.fileno()).st_ino != inode:
        raise DataError(f"{path}: was replaced while it was read; {LEAVE_IT}")
    return file


def check_encoding(path: str) -> None:
    """Raises DataError when a text file cannot be read, or is UTF-16."""
    with named(path), open_binary(path) as file, suppress(EOFError):  # cut short: the reader says so
        refuse_utf16(file.read(HEAD_BYTES), path)


def refuse_utf16(head: bytes, path: str) -> None:
    """Raises DataError when a text begins as UTF-16 does: with its byte order mark, or with zeros in every second byte."""
    halves = (head[::2], head[1::2]) if len(head) >= 16 else ()
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or any(half.count(0) * 2 > len(half) for half in halves):
        raise DataError(f"{path}: looks like UTF-16, and text is read as UTF-8; convert it: iconv -f UTF-16 -t UTF-8")


def skip_to(file: Any, offset: int) -> None:
    """Go to a byte offset of a file that was just opened, by decompressing up to it where that is the only way.

    That is done in the pieces in which lines are read: how much of a damaged file can be read depends on them.
    """
    if not isinstance(file, gzip.GzipFile) and (not isinstance(file, io.BufferedReader) or file.seekable()):
        file.seek(offset)
        return
    while offset and (ahead := file.peek(1)):
        offset -= len(file.read(min(offset, len(ahead))))


def _csv_rows(path: str, offset: int, columns: list[str] | None) -> Rows:
    header, first = csv_header(path)
    _require(columns if header else None, header, path)
    for record, begin, after in _csv_records(path, max(first, offset)):
        yield dict(zip(header, record, strict=False)), begin, after


def _require(columns: list[str] | None, names: list[str], path: str) -> None:
    if missing := [name for name in columns or [] if name not in names]:
        raise DataError(f"{path}: no column {missing[0]!r}; there are: {', '.join(names)}")


def csv_header(path: str) -> tuple[list[str], int]:
    """(names of the columns, where the first record begins)."""
    return next(((header, after) for header, _, after in _csv_records(path, 0)), ([], 0))


def _csv_records(path: str, position: int) -> Iterator[tuple[list[str], int, int]]:
    """(cells, where the record begins, where it ends) from byte `position` on."""
    begin = end = position

    def text_lines() -> Iterator[str]:  # the reader takes exactly the lines of one record, so `end` is its end
        nonlocal end
        for line, _, after in lines(path, position):
            end = after
            yield line.decode("utf-8", "surrogateescape")

    csv.field_size_limit(2**31 - 1)
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind_of(path) == ".tsv" else {}
    for record in csv.reader(text_lines(), **form):
        if record:
            yield record, begin, end
        begin = end


def _table_rows(path: str, start: int, columns: list[str] | None) -> Rows:
    """1,000 rows at a time, so that memory stays flat."""
    table = open_table(path)
    _require(columns, table.schema.names, path)
    if kind_of(path) == ".parquet":
        first = bisect_right(table.starts, start, lo=1) - 1  # the group that has row `start`
        groups, row = list(range(first, len(table.starts) - 1)), table.starts[first]
        batches = table.source.iter_batches(1000, row_groups=groups, columns=columns) if groups else []
    else:
        wanted, row = table.source.select(columns) if columns else table.source, start
        batches = wanted.slice(start).to_batches(1000)
    for batch in batches:
        skip = max(0, min(len(batch), start - row))
        for number, record in enumerate(batch.slice(skip).to_pylist(), row + skip):
            yield record, number, number + 1
        row += len(batch)


def parse_row(raw: Raw, path: str, offset: int, is_text: bool) -> Row | Unusable:
    """A row as columns: of plain text `text`, of a .jsonl what its line holds."""
    if not isinstance(raw, bytes):
        return raw
    try:
        if is_text:
            return {"text": raw.decode().strip()}
        return to_columns(json.loads(raw.decode("utf-8", "surrogatepass")), path, offset)
    except UnicodeDecodeError:
        return Unusable("not UTF-8", path, offset)
    except (ValueError, RecursionError):
        return Unusable("not JSON", path, offset)


def to_columns(value: Any, path: str, offset: int) -> Row | Unusable:
    """A JSON value as columns; a list of texts is anchor, positive and negatives, as in the hub's older pair files."""
    if isinstance(value, list) and len(value) > 1:
        return dict(zip(("anchor", "positive", "negatives"), (value[0], value[1], value[2:]), strict=True))
    if isinstance(value, dict):
        return value
    return Unusable("expected an object with columns, or a list of texts", path, offset)


def why_no_text(value: Any) -> str:
    """Why a cell holds no text that can be used; empty when it does. An empty string is no text."""
    if value is None or (isinstance(value, str) and (not value or value.isspace())):
        return "no text"
    if not isinstance(value, str):
        return "not text"
    return "" if value.isascii() or is_utf8(value) else "not UTF-8"


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogates: from JSON's escapes, or from bytes of a .csv that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def place(path: str, offset: int) -> str:
    """`file:line` of a byte of a text file, `file: row n` of a table (from 0); slow, for messages."""
    if layout_of(path) not in ("lines", "csv"):
        return f"{path}: row {offset}"
    number = 1
    with named(path), open_binary(path) as file:
        while offset > 0 and (chunk := file.read(min(offset, 2**22))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return f"{path}:{number}"


def first_with_columns(paths: Sequence[str]) -> tuple[str, dict[str, bool]]:
    """The first file that is not empty, and its columns. Raises DataError when all are empty."""
    for path in paths:
        if columns := columns_of(path):
            return path, columns
    raise DataError(f"{paths[0]}: empty file")


def columns_of(path: str) -> dict[str, bool]:
    """The columns of a file in order, and whether there is text in each; none of an empty file. Raises DataError."""
    with named(path):
        layout = layout_of(path)
        if layout == "table":
            types = {f.name: str(f.type).removeprefix("dictionary<values=") for f in open_table(path).schema}
            return {name: kind.startswith(("string", "large_string")) for name, kind in types.items()}
        if layout == "csv":
            return dict.fromkeys(csv_header(path)[0], True)
        rows: list[Row] = []
        bad: Unusable | None = None
        for row, _ in records(path):
            if not isinstance(row, Unusable):
                rows.append(row)
            else:
                bad = bad or row
            if len(rows) == FIRST_ROWS:
                break
    if not rows and bad is not None:
        raise DataError(f"{bad.where}: {bad.reason}, and no row after it can be used")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: any(isinstance(row.get(name), str) for row in rows) for name in names}
