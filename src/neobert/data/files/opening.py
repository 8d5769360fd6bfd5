"""Opening files of every kind that is read: plain, compressed, tables, and files of URLs.

A URL is whatever `fsspec` opens (`hf://…`); it is read again from where the connection broke off.
"""

import csv
import errno
import gzip
import io
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from neobert.errors import DataError, first_line, print_notes

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
ATTEMPTS = 6  # of one read, until it is an error
FIRST_WAIT_SECONDS = 1.0  # then twice as long each time: half a minute in all
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # another attempt changes nothing

Result = TypeVar("Result")


def kind_of(path: str) -> str | None:
    """The kind of file that a name says, without its compression; None for a folder, or when we read no such file."""
    *_, before, kind = ("", "", *(suffix.lower() for suffix in Path(path).suffixes))
    if kind in COMPRESSED and before not in TABLES:
        kind = before
    if kind not in KINDS or ("://" not in path and os.path.isdir(path)):
        return None
    return ".jsonl" if kind == ".ndjson" else kind


def is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED)


def open_binary(path: str) -> Any:
    """The decompressed bytes of a file or URL."""
    remote = io.BufferedReader(RemoteFile(path), 2**20) if "://" in path else None
    if path.lower().endswith(".gz"):
        return gzip.open(remote or path)
    raw = remote or open(path, "rb")  # noqa: SIM115
    if path.lower().endswith(".zst"):
        import pyarrow

        raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 2**16)  # reads most of a damaged file
    return raw


@contextmanager
def named(path: str) -> Iterator[None]:
    """Errors of reading become a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None


class Table(NamedTuple):
    """A .parquet or .arrow file, or a folder of `save_to_disk`. `starts`: the first row of every row group, then `num_rows`."""

    source: Any  # a `ParquetFile`, else an Arrow table
    schema: Any
    num_rows: int
    starts: list[int]


def open_table(path: str) -> Table:
    """The table at a path. Raises DataError."""
    import pyarrow

    with named(path):
        kind = kind_of(path)
        if kind == ".parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(open_binary(path) if "://" in path else path)
            sizes = (file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
            return Table(file, file.schema_arrow, file.metadata.num_rows, list(accumulate(sizes, initial=0)))
        if kind == ".arrow":  # `datasets` writes Arrow's stream format, others its file format
            raw = open_binary(path) if "://" in path else pyarrow.memory_map(path)
            try:
                table = pyarrow.ipc.open_stream(raw).read_all()
            except pyarrow.ArrowInvalid:
                raw.seek(0)
                table = pyarrow.ipc.open_file(raw).read_all()
        else:
            from datasets import load_from_disk

            try:
                table = load_from_disk(path).with_format("arrow").data.table
            except (ValueError, KeyError, AttributeError) as error:
                raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
        return Table(table, table.schema, table.num_rows, [0, table.num_rows])


# --- files of URLs -----------


class RemoteFile(io.RawIOBase):
    """The bytes of a URL. A read that fails is tried again, on a new connection, at the same offset.

    Raises OSError when `ATTEMPTS` of them failed, or for a file that is not there.
    """

    def __init__(self, url: str):
        self.url, self._offset = url, 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self._try(lambda file: int(file.size))
        self._offset = offset + (self._offset if whence == io.SEEK_CUR else 0)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        def read(file: Any) -> bytes:
            chunk: bytes = file.read(len(buffer))
            if not chunk and buffer and self._offset < (getattr(file, "size", None) or 0):
                raise OSError("the connection ended early")
            return chunk

        chunk = self._try(read)
        buffer[: len(chunk)] = chunk
        self._offset += len(chunk)
        return len(chunk)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _try(self, action: Callable[[Any], Result]) -> Result:
        import fsspec

        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._file is None:
                    self._file = fsspec.open(self.url, "rb").open()
                if self._file.tell() != self._offset:
                    _go_to(self._file, self._offset)
                return action(self._file)
            except FINAL:
                raise
            except _network_errors() as error:
                self._file, reason = None, first_line(error)
            if attempt < ATTEMPTS:
                what = f"reading on from byte {self._offset:,}, attempt {attempt + 1} of {ATTEMPTS}"
                print_notes([f"{self.url}: {reason}; {what}"])
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise OSError(errno.EIO, f"{reason} ({ATTEMPTS} attempts)")


def _go_to(file: Any, offset: int) -> None:
    """Go to a byte; what a server only sends from the beginning is read up to there."""
    try:
        file.seek(offset)
    except ValueError:  # what fsspec raises
        while (missing := offset - file.tell()) > 0 and file.read(min(missing, 2**20)):
            continue
        if file.tell() != offset:
            raise OSError(f"byte {offset:,} cannot be reached") from None  # another connection begins before it


def _network_errors() -> tuple[type[Exception], ...]:
    """What clients raise; those of a library that was not imported cannot come."""
    found = [("aiohttp", "ClientError"), ("httpx", "HTTPError")]
    return (OSError, *(getattr(sys.modules[module], name) for module, name in found if module in sys.modules))
