"""Where text comes from: local files and saved datasets, each readable in two ways.

`stream(files, column, start)` reads documents one behind the other and knows the position behind each, so a resumed run
seeks instead of re-reading. `open_corpus` gives random access by document number, which allows a new order in every epoch.

A document is a line of a .txt file (empty lines are skipped), a row of a .jsonl or .parquet file, or a row of a folder
written by `datasets`' `save_to_disk`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from neobert.errors import DataError

EVAL_NAMES = ("validation", "valid", "dev", "eval", "test")
FORMATS = (".txt", ".jsonl", ".parquet")


class Corpus(Protocol):
    """Documents by number. `fingerprint` changes when their content or order does."""

    fingerprint: str

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> list[Any]:
        """Documents (text, or token ids) in the order asked for."""
        ...


@dataclass(frozen=True)
class Position:
    """Behind a document of a stream: file number, and the byte offset (text) or row (tables) where the next begins."""

    file: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Files:
    """The files of one split, in reading order; a single `save_to_disk` folder counts as one file."""

    paths: tuple[str, ...]
    column: str | None  # None: plain text

    @property
    def num_bytes(self) -> int:
        return sum(entry.stat().st_size for entry in self._entries())

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes, and the first and last 64 KiB of every file: cheap, and catches what people change."""
        digest = hashlib.sha256(repr(self.column).encode())
        for entry in self._entries():
            size = entry.stat().st_size
            digest.update(f"{entry.name}:{size}".encode())
            with open(entry, "rb") as file:
                digest.update(file.read(65536))
                file.seek(max(0, size - 65536))
                digest.update(file.read(65536))
        return digest.hexdigest()[:16]

    def _entries(self) -> Iterator[Path]:
        for path in map(Path, self.paths):
            yield from sorted(path.rglob("*.arrow")) if path.is_dir() else [path]


def find_splits(
    path: str, text_column: str | None, train_split: str | None, eval_split: str | None
) -> tuple[Files, Files | None]:
    """(training files, evaluation files or None) below `path`. Raises DataError naming what is missing."""
    splits = _saved_splits(Path(path)) if _is_saved_dataset(Path(path)) else _file_splits(path)
    train = train_split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if train is None or train not in splits:
        wanted = f"no split {train!r}" if train else "no split named train"
        raise DataError(f"dataset.train_split: {wanted} in {path}; there are: {', '.join(splits)}")
    evaluation = eval_split or next((name for name in EVAL_NAMES if name in splits and name != train), None)
    if evaluation is not None and evaluation not in splits:
        raise DataError(f"dataset.eval_split: no split {evaluation!r} in {path}; there are: {', '.join(splits)}")
    return tuple(  # type: ignore[return-value]
        None if name is None else Files(tuple(splits[name]), find_column(splits[name][0], text_column))
        for name in (train, evaluation)
    )


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _saved_splits(path: Path) -> dict[str, list[str]]:
    if (path / "dataset_dict.json").is_file():
        return {name: [str(path / name)] for name in json.loads((path / "dataset_dict.json").read_text())["splits"]}
    return {"train": [str(path)]}


def _file_splits(path: str) -> dict[str, list[str]]:
    found = _find_files(path)
    unknown = [file for file in found if Path(file).suffix not in FORMATS]
    if unknown:
        raise DataError(f"{unknown[0]}: not a kind of file that can be read; these can: {', '.join(FORMATS)}")
    splits: dict[str, list[str]] = {}
    names = ("train", *EVAL_NAMES)
    for file in found:
        stem = Path(file).stem.lower()
        split = next(
            (name for name in names if stem == name or stem.startswith((f"{name}-", f"{name}_", f"{name}."))), None
        )
        splits.setdefault(split or "train", []).append(file)
    for name, files in splits.items():
        kinds = sorted({Path(file).suffix for file in files})
        if len(kinds) > 1:
            raise DataError(
                f"dataset.path: {path}: split {name} mixes {' and '.join(kinds)}; name one kind, as '{path}/*{kinds[0]}'"
            )
    return splits


def _find_files(path: str) -> list[str]:
    if not path:
        raise DataError("dataset.path: not set; give a file, a folder or a glob")
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix in FORMATS and file.is_file())
        if not found:
            raise DataError(f"dataset.path: no {', '.join(FORMATS)} file in the folder {path}")
        return found
    found = sorted(glob(path, recursive=True))
    if not found:
        raise DataError(f"dataset.path: nothing at {path!r} (looked in {Path.cwd()})")
    return found


def find_column(path: str, wanted: str | None) -> str | None:
    """The text column of a table: `wanted`, or `text`, or the only column that holds strings. None for plain text."""
    if path.endswith(".txt"):
        return None
    columns = _string_columns(path)
    if wanted is not None:
        if wanted not in columns:
            raise DataError(
                f"dataset.text_column: no column {wanted!r} with text in {path}; there are: {', '.join(columns)}"
            )
        return wanted
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    if not columns:
        raise DataError(f"{path}: no column with text")
    raise DataError(f"dataset.text_column: not set, and {path} has several: {', '.join(columns)}")


def _string_columns(path: str) -> list[str]:
    if path.endswith(".jsonl"):
        first = next(_jsonl_rows(path, 0), None)
        if first is None:
            raise DataError(f"{path}: empty file")
        return [name for name, value in first[0].items() if isinstance(value, str)]
    schema = _open_table(path).schema
    return [field.name for field in schema if str(field.type) in ("string", "large_string", "string_view")]


def _open_table(path: str) -> Any:
    """A parquet file, or the Arrow table of a `save_to_disk` folder; both have `.schema`."""
    import pyarrow

    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet

            return _ParquetTable(pyarrow.parquet.ParquetFile(path))
        from datasets import load_from_disk

        return load_from_disk(path).with_format("arrow").data.table
    except (pyarrow.ArrowInvalid, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


class _ParquetTable:
    def __init__(self, file: Any):
        self.file, self.schema = file, file.schema_arrow


# --- streams -----------


def stream(files: Files, start: Position) -> Iterator[tuple[str, Position]]:
    """Every document behind `start` with the position behind it. Raises DataError naming file and row."""
    for number in range(start.file, len(files.paths)):
        path, offset = files.paths[number], start.offset if number == start.file else 0
        for text, behind in _stream_file(path, files.column, offset):
            yield text, Position(number, behind)


def _stream_file(path: str, column: str | None, offset: int) -> Iterator[tuple[str, int]]:
    if column is None:
        yield from _txt_rows(path, offset)
    elif path.endswith(".jsonl"):
        for row, begin, behind in _jsonl_rows(path, offset):
            yield _text_of(row.get(column), column, path, begin), behind
    else:
        yield from _table_rows(path, column, offset)


def _lines(path: str, offset: int) -> Iterator[tuple[str, int]]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                yield _decode(line, path, offset - len(line)), offset
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(line: bytes, path: str, offset: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{_place(path, offset)}: not UTF-8 text (byte {error.start} of the line is 0x{line[error.start]:02x}); "
            f"convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from None


def _place(path: str, offset: int) -> str:
    """`file:line` of a byte of a text file, `file: row n` of a table; slow, for messages."""
    if not path.endswith((".txt", ".jsonl")):
        return f"{path}: row {offset}"
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(offset, 2**24))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return f"{path}:{number}"


def _parse_row(line: str, path: str, offset: int) -> dict[str, Any]:
    """One line of a .jsonl file."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{_place(path, offset)}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{_place(path, offset)}: expected an object with columns")
    return row


def _txt_rows(path: str, offset: int) -> Iterator[tuple[str, int]]:
    return ((text, behind) for line, behind in _lines(path, offset) if (text := line.strip()))


def _jsonl_rows(path: str, offset: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    """(row, where its line begins, where the next begins)."""
    for line, behind in _lines(path, offset):
        if not line.isspace():
            yield _parse_row(line, path, offset), offset, behind
        offset = behind


def _table_rows(path: str, column: str, start: int) -> Iterator[tuple[str, int]]:
    table, row = _open_table(path), 0
    for chunk in _column_chunks(table, column):
        if row + len(chunk) > start:
            for value in chunk.slice(max(0, start - row)).to_pylist():
                start += 1
                yield _text_of(value, column, path, start - 1), start
        row += len(chunk)


def _column_chunks(table: Any, column: str) -> Iterator[Any]:
    if isinstance(table, _ParquetTable):
        for group in range(table.file.num_row_groups):
            yield from table.file.read_row_group(group, columns=[column]).column(0).chunks
    else:
        yield from table.column(column).chunks


def _text_of(value: Any, column: str, path: str, place: int) -> str:
    """The text in a cell; a missing one is empty. `place` is its byte offset (text files) or row, for messages."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{_place(path, place)}: column {column!r} holds {type(value).__name__}, not text")
    return value


# --- random access -----------


def open_corpus(files: Files, in_memory: bool, cache_dir: str | None) -> Corpus:
    """Random access to the documents of `files`; `in_memory` reads them all at once."""
    if in_memory:
        return _TextsInMemory(files)
    if files.paths[0].endswith((".txt", ".jsonl")):
        return _LineCorpus(files)
    return _TableCorpus(files, cache_dir)


class _TextsInMemory:
    def __init__(self, files: Files):
        self.fingerprint = files.fingerprint
        self.texts = [text for text, _ in stream(files, Position())]

    def __len__(self) -> int:
        return len(self.texts)

    def fetch(self, indices: np.ndarray) -> list[str]:
        return [self.texts[i] for i in indices]


class _LineCorpus:
    """Lines of memory-mapped files, found by an index of their offsets (16 bytes a line, one fast scan to build)."""

    def __init__(self, files: Files):
        self.fingerprint, self.column = files.fingerprint, files.column
        self.paths = [path for path in files.paths if Path(path).stat().st_size]
        self.maps = [np.memmap(path, dtype=np.uint8, mode="r") for path in self.paths]
        self.spans = [_line_spans(data) for data in self.maps]
        self.first = np.cumsum([0, *map(len, self.spans)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def fetch(self, indices: np.ndarray) -> list[str]:
        return [self._text(int(index)) for index in indices]

    def _text(self, index: int) -> str:
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        begin, end = self.spans[number][index - self.first[number]]
        path, line = self.paths[number], self.maps[number][begin:end].tobytes()
        text = _decode(line, path, int(begin))
        if self.column is None:
            return text.strip()
        return _text_of(_parse_row(text, path, int(begin)).get(self.column), self.column, path, int(begin))


def _line_spans(raw: np.ndarray, chunk: int = 2**26) -> np.ndarray:
    """Begin and end of every line with text: int64, lines x 2. Scans by chunks, so that a file may exceed memory."""
    starts = range(0, len(raw), chunk)
    ends = np.concatenate([np.flatnonzero(raw[start : start + chunk] == ord("\n")) + start + 1 for start in starts])
    if not len(ends) or ends[-1] != len(raw):
        ends = np.append(ends, len(raw))
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    short = np.flatnonzero(
        spans[:, 1] - spans[:, 0] < 8
    )  # longer lines of white space give no tokens, which is harmless
    blank = [line for line in short if not raw[slice(*spans[line])].tobytes().strip()]
    return np.delete(spans, blank, axis=0)


class _TableCorpus:
    """Rows of parquet files or of a `save_to_disk` folder, memory-mapped through `datasets`."""

    def __init__(self, files: Files, cache_dir: str | None):
        from datasets import Dataset, load_from_disk

        self.fingerprint, self.column = files.fingerprint, files.column
        self.path = files.paths[0]
        _open_table(self.path)  # names the file when it cannot be read
        if self.path.endswith(".parquet"):
            rows = Dataset.from_parquet(list(files.paths), cache_dir=cache_dir, columns=[files.column])
        else:
            rows = load_from_disk(self.path)
        self.rows = rows.select_columns([files.column])

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: np.ndarray) -> list[str]:
        values = self.rows[indices.tolist()][self.column]
        return [_text_of(v, str(self.column), self.path, int(i)) for v, i in zip(values, indices, strict=True)]
