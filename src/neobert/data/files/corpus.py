"""Random access to documents by number, which allows a new order of the whole corpus in every epoch.

Lines of plain text are found by an index of their offsets (16 bytes a line, one scan at about 1 GB/s); tables are
memory-mapped; what has no such access (compressed files, .csv, .json arrays) is written once as a table below
`dataset.cache_dir`, or read into memory.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from neobert.data.files.documents import Files, Position, read_text, stream
from neobert.data.files.rows import (
    BOM,
    HEAD_BYTES,
    LEAVE_IT,
    Unusable,
    is_seekable_text,
    kind_of,
    layout_of,
    named,
    num_table_rows,
    open_table,
    refuse_utf16,
)
from neobert.errors import DataError

MOST_OPEN = 256  # files of text that are open at a time


class Corpus(Protocol):
    """Documents by number. `fingerprint` changes when their content or order does."""

    fingerprint: str
    is_tokenized: bool

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> list[Any]:
        """Documents (text, token ids, or `Unusable`) in the order asked for."""
        ...


def open_corpus(files: Files, fingerprint: str, in_memory: bool = False, cache_dir: str | None = None) -> Corpus:
    """Random access to the rows of `files`; `in_memory` reads them all at once."""
    if in_memory:
        return _TextsInMemory(files, fingerprint)
    if all(layout_of(path) == "table" and kind_of(path) != ".arrow" for path in files.paths):
        corpus: Corpus = _TableCorpus(files, fingerprint, cache_dir)
    elif all(is_seekable_text(path) for path in files.paths):
        corpus = _LineCorpus(files, fingerprint)
    else:
        return _CachedCorpus(files, fingerprint, cache_dir)
    first, last = files.rows
    last = len(corpus) if last is None else min(last, len(corpus))
    return corpus if (first, last) == (0, len(corpus)) else Span(corpus, first, last)


class Span:
    """Rows `first` to `last` (excluded) of a corpus."""

    def __init__(self, corpus: Corpus, first: int, last: int):
        self.corpus, self.first, self.size = corpus, min(first, last), max(0, last - first)
        self.fingerprint, self.is_tokenized = corpus.fingerprint, corpus.is_tokenized

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: np.ndarray) -> list[Any]:
        return self.corpus.fetch(indices + self.first)


class _TextsInMemory:
    is_tokenized = False

    def __init__(self, files: Files, fingerprint: str):
        self.fingerprint = fingerprint
        self.texts = [read_text(files, row, begin) for row, begin, _ in stream(files, files.start, files.stop)]

    def __len__(self) -> int:
        return len(self.texts)

    def fetch(self, indices: np.ndarray) -> list[str | Unusable]:
        return [self.texts[i] for i in indices]


class _LineCorpus:
    """Lines of files, found by an index of where they begin and end."""

    is_tokenized = False

    def __init__(self, files: Files, fingerprint: str):
        self.fingerprint, self.files = fingerprint, files
        self.spans = [_spans_of(path) for path in files.paths]
        self.inodes = [os.stat(path).st_ino for path in files.paths]
        self.first = np.cumsum([0, *map(len, self.spans)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def fetch(self, indices: np.ndarray) -> list[str | Unusable]:
        return [self._text(int(index)) for index in indices]

    def _text(self, index: int) -> str | Unusable:
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        begin, end = self.spans[number][index - self.first[number]].tolist()
        path = self.files.paths[number]
        with named(path):
            line = os.pread(_open_file(path, self.inodes[number]).descriptor, end - begin, begin)
        if len(line) < end - begin:
            raise DataError(f"{path}: became shorter while it was read; {LEAVE_IT}")
        return read_text(self.files, line if begin else line.removeprefix(BOM), Position(number, begin))


class _OpenFile:
    """A descriptor that is closed when it is forgotten."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(MOST_OPEN)
def _open_file(path: str, inode: int) -> _OpenFile:
    """The file that was indexed. Raises DataError when another one has its name now."""
    file = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    if os.fstat(file.descriptor).st_ino != inode:
        raise DataError(f"{path}: was replaced while it was read; {LEAVE_IT}")
    return file


def _spans_of(path: str) -> np.ndarray:
    data = open_bytes(path)
    refuse_utf16(data[:HEAD_BYTES].tobytes(), path)
    return line_spans(data)


def open_bytes(path: str) -> np.ndarray:
    """A file as memory-mapped bytes."""
    with named(path):
        return np.memmap(path, dtype=np.uint8, mode="r") if Path(path).stat().st_size else np.zeros(0, np.uint8)


def line_spans(raw: np.ndarray, chunk: int = 2**26) -> np.ndarray:
    """Begin and end of every line that is not white space: int64, lines x 2. Scans by chunks, so a file may exceed memory."""
    starts = range(0, len(raw), chunk)
    ends = [np.flatnonzero(raw[start : start + chunk] == ord("\n")) + start + 1 for start in starts]
    found = np.concatenate([np.zeros(0, np.int64), *ends])
    if len(raw) and (not len(found) or found[-1] != len(raw)):
        found = np.append(found, len(raw))
    spans = np.stack([np.concatenate([np.zeros(1, np.int64), found[:-1]])[: len(found)], found], axis=1)
    space = raw[spans[:, 0]] <= ord(" ") if len(spans) else np.zeros(0, bool)  # only these can be blank
    blank = [line for line in np.flatnonzero(space) if raw[slice(*spans[line])].tobytes().isspace()]
    return np.delete(spans, blank, axis=0)


class _TableCorpus:
    """Rows of parquet files or of a `save_to_disk` folder, memory-mapped through `datasets`."""

    is_tokenized = False

    def __init__(self, files: Files, fingerprint: str, cache_dir: str | None):
        from datasets import Dataset, load_from_disk

        self.fingerprint, self.files = fingerprint, files
        sizes = [num_table_rows(open_table(path)) for path in files.paths]  # names the file when it cannot be read
        self.ends = np.cumsum(sizes)
        self.rows: Any = []
        if kind_of(files.paths[0]) != ".parquet":
            self.rows = load_from_disk(files.paths[0]).select_columns([files.column])
        elif full := [path for path, size in zip(files.paths, sizes, strict=True) if size]:
            self.rows = Dataset.from_parquet(full, cache_dir=cache_dir, columns=[files.column])

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: np.ndarray) -> list[str | Unusable]:
        column = str(self.files.column)
        texts = self.rows[indices.tolist()][column]
        numbers = np.searchsorted(self.ends, indices, side="right").tolist()
        return [
            read_text(self.files, {column: text}, Position(n, int(i - (self.ends[n - 1] if n else 0))))
            for text, i, n in zip(texts, indices, numbers, strict=True)
        ]


class _CachedCorpus:
    """Rows of files without random access, written once to an Arrow file by `datasets`, and memory-mapped."""

    is_tokenized = False

    def __init__(self, files: Files, fingerprint: str, cache_dir: str | None):
        from datasets import Dataset, Features, Value
        from datasets.exceptions import DatasetGenerationError

        self.fingerprint, self.paths = fingerprint, files.paths
        columns = {"text": Value("large_string"), "reason": Value("string"), "place": Value("int64")}
        try:
            self.rows = Dataset.from_generator(
                _texts_and_places,
                features=Features(columns),
                cache_dir=cache_dir,
                gen_kwargs={"files": files},
                fingerprint=fingerprint,
            )
        except DatasetGenerationError as error:  # wraps what our generator raised
            raise error.__cause__ or error from None

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: np.ndarray) -> list[str | Unusable]:
        rows = self.rows[indices.tolist()]
        columns = zip(rows["text"], rows["reason"], rows["place"], strict=True)
        return [
            text if text is not None else Unusable(reason, self.paths[code >> 40], code & (2**40 - 1))
            for text, reason, code in columns
        ]


def _texts_and_places(files: Files) -> Iterator[dict[str, Any]]:
    for row, begin, _ in stream(files, files.start, files.stop):
        text = read_text(files, row, begin)
        bad = isinstance(text, Unusable)
        yield {
            "text": None if bad else text,
            "reason": text.reason if isinstance(text, Unusable) else None,
            "place": (begin.file << 40) + begin.offset,
        }
