"""Documents of files: as a stream with a position, and by number.

`stream` yields raw rows with the position after each, so that a resumed run seeks instead of re-reading, and a rank
passes over the documents of others without parsing them. `open_corpus` gives random access, for a new order of all
documents in every epoch: lines of plain text are found by an index of their offsets (16 bytes a line, one scan at about
1 GB/s); tables are memory-mapped; what has no such access (compressed files, .csv, .json arrays) is written once as a
table below `dataset.cache_dir`.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from neobert.data.files.opening import kind_of, named, open_table
from neobert.data.files.rows import Lines, Raw, Unusable, is_seekable_text, layout_of, parse_row, raw_rows, why_no_text
from neobert.data.hashing import draw_share
from neobert.errors import DataError

BLOCK_DOCUMENTS, BLOCK_CHARACTERS = 256, 1_000_000  # a block ends with the document that reaches one of them
WHOLE_HASH_BYTES = 2**28  # corpora up to this size are fingerprinted whole, larger ones by samples
SAMPLE_BYTES, NUM_SAMPLES = 65536, 16


class Position(NamedTuple):
    """After a document of a stream: file number, and the offset (bytes or rows) where the next one begins."""

    file: int = 0
    offset: int = 0


@dataclass
class SkippedRows:
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

    def describe(self, num_empty: int = 0, form: str = "{}") -> str:
        """`3 rows passed over: 2 no text, 1 not UTF-8, first at file:line`, put into `form`; empty when there are none.

        `num_empty` counts documents that have text but no token.
        """
        counts = self.counts | ({"no token": num_empty} if num_empty else {})
        if not counts:
            return ""
        total, reasons = sum(counts.values()), ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        where = f", first at {next(iter(self.first.values()))}" if self.first else ""
        return form.format(f"{total:,} row{'s' if total != 1 else ''} passed over: {reasons}{where}")

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {"counts": dict(self.counts), "first": dict(self.first)}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        self.counts, self.first = dict(state["counts"]), dict(state["first"])


@dataclass(frozen=True)
class Files:
    """Files in reading order, and the text column of their rows (None: plain text).

    `start` and `stop` bound a stream of them; `rows` are the same bounds as numbers of rows. A saved dataset is one file.
    """

    paths: tuple[str, ...]
    column: str | None
    start: Position = field(default_factory=Position)
    stop: Position | None = None
    rows: tuple[int, int | None] = (0, None)


def stream(files: Files, start: Position, stop: Position | None = None) -> Iterator[tuple[Raw, Position, Position]]:
    """(row, where it begins, position after it) from `start` on, `stop` excluded. Raises DataError naming the file."""
    columns = None if files.column is None else [files.column]
    for number in range(start.file, len(files.paths)):
        path, offset = files.paths[number], start.offset if number == start.file else 0
        if stop is not None and (number, offset) >= stop:
            return
        end = stop.offset if stop is not None and stop.file == number else None
        for row, begin, after in raw_rows(path, offset, columns):
            if end is not None and begin >= end:
                return
            yield row, Position(number, begin), Position(number + 1) if after is None else Position(number, after)


def read_text(files: Files, raw: Raw, begin: Position) -> str | Unusable:
    """The text of a row that begins there, or why there is none."""
    path = files.paths[begin.file]
    row = parse_row(raw, path, begin.offset, is_text=files.column is None)
    if isinstance(row, Unusable):
        return row
    text: Any = row.get(files.column or "text")
    return Unusable(reason, path, begin.offset) if (reason := why_no_text(text)) else text


def read_all(files: Files) -> Iterator[tuple[str | Unusable, Position]]:
    """(text or why there is none, where its row begins) of all rows in order. Raises DataError."""
    return ((read_text(files, row, begin), begin) for row, begin, _ in stream(files, files.start, files.stop))


def texts_of(files: Files, skips: SkippedRows) -> Iterator[str]:
    """All texts in order; rows without text are counted in `skips`. Raises DataError."""
    for text, _ in read_all(files):
        if isinstance(text, Unusable):
            skips.add(text)
        else:
            yield text


def take_block(texts: Iterator[str]) -> list[str]:
    """The next texts, as many as are tokenised together; an empty list at their end."""
    block: list[str] = []
    num_characters = 0
    for text in texts:
        block.append(text)
        num_characters += len(text)
        if len(block) == BLOCK_DOCUMENTS or num_characters >= BLOCK_CHARACTERS:
            break
    return block


def blocks_of(texts: Iterator[str]) -> Iterator[list[str]]:
    """All texts, by as many as are tokenised together."""
    return iter(partial(take_block, texts), [])


# --- what is in the files -----------


def num_bytes(files: Files) -> int:
    """Size on disk; 0 for files of the hub that are read from there."""
    return sum(entry.stat().st_size for entry in _local_files(files))


def fingerprint(files: Files) -> str:
    """Hash of names, sizes and content: all of it up to 256 MB, beyond that the ends and 16 samples in between of each file.

    URLs of the hub name a revision, which is a hash already.
    """
    digest = hashlib.sha256(repr((files.column, files.rows)).encode())
    digest.update("".join(path for path in files.paths if "://" in path).encode())
    whole = num_bytes(files) <= WHOLE_HASH_BYTES
    for entry in _local_files(files):
        size = entry.stat().st_size
        digest.update(f"{entry.name}:{size}".encode())
        with named(str(entry)), open(entry, "rb") as file:
            if whole or size <= SAMPLE_BYTES * NUM_SAMPLES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for number in range(NUM_SAMPLES + 1):
                file.seek((size - SAMPLE_BYTES) * number // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _local_files(files: Files) -> Iterator[Path]:
    for path in (Path(path) for path in files.paths if "://" not in path):
        yield from sorted(path.rglob("*.arrow")) if path.is_dir() else [path]


# --- random access -----------


class Corpus(Protocol):
    """Documents by number. `fingerprint` changes when their content or order does."""

    fingerprint: str
    is_tokenized: bool

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> list[Any]:
        """Documents (text, token ids, or `Unusable`) in the order asked for."""


def open_corpus(files: Files, fingerprint: str, in_memory: bool = False, cache_dir: str | None = None) -> Corpus:
    """Random access to the rows of `files`; `in_memory` reads them all at once."""
    if in_memory:
        texts = [text for text, _ in read_all(files)]
        return _TextCorpus(fingerprint, len(texts), lambda indices: [texts[i] for i in indices])
    if all(layout_of(path) == "table" and kind_of(path) != ".arrow" for path in files.paths):
        corpus = _table_of(files, fingerprint, cache_dir)
    elif all(is_seekable_text(path) for path in files.paths):
        corpus = _lines_of(files, fingerprint)
    else:
        return _cached(files, fingerprint, cache_dir)
    chosen = range(len(corpus))[slice(*files.rows)]
    return corpus if len(chosen) == len(corpus) else Subset(corpus, chosen)


def seek(first: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the part, index in it) of every index of a whole whose parts begin at `first`."""
    numbers = np.searchsorted(first, indices, side="right") - 1
    return numbers, indices - first[numbers]


class Subset:
    """Documents of a corpus by their numbers there; `name` tells this choice of them from others in the fingerprint."""

    def __init__(self, corpus: Corpus, indices: np.ndarray | range, name: str = ""):
        self.corpus: Any = corpus  # of tokens: it has `lengths` too
        self.indices, self.fingerprint, self.is_tokenized = indices, corpus.fingerprint + name, corpus.is_tokenized

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.corpus.lengths[self._of(np.arange(len(self)))])

    def fetch(self, indices: np.ndarray) -> list[Any]:
        return list(self.corpus.fetch(self._of(indices)))

    def _of(self, indices: np.ndarray) -> np.ndarray:
        return self.indices.start + indices if isinstance(self.indices, range) else self.indices[indices]


def hold_out(corpus: Corpus, share: float, seed: int) -> tuple[Subset, Subset]:
    """(the rest, the `share` of the documents that `seed` draws)."""
    rest, drawn = draw_share(len(corpus), share, seed)
    return Subset(corpus, rest, f"/{share}/{seed}/rest"), Subset(corpus, drawn, f"/{share}/{seed}/first")


@dataclass
class _TextCorpus:
    """Rows of files, as many as `size`, that `fetch` reads by their numbers."""

    fingerprint: str
    size: int
    fetch: Callable[[np.ndarray], list[str | Unusable]]
    is_tokenized = False

    def __len__(self) -> int:
        return self.size


def _lines_of(files: Files, fingerprint: str) -> _TextCorpus:
    """Lines of files, found by an index of where they begin and end."""
    parts = [Lines(path) for path in files.paths]
    first = np.cumsum([0, *map(len, parts)])

    def fetch(indices: np.ndarray) -> list[str | Unusable]:
        found = zip(*(array.tolist() for array in seek(first, indices)), strict=True)
        rows = ((number, *parts[number].read(line)) for number, line in found)
        return [read_text(files, raw, Position(number, begin)) for number, raw, begin in rows]

    return _TextCorpus(fingerprint, int(first[-1]), fetch)


def _table_of(files: Files, fingerprint: str, cache_dir: str | None) -> _TextCorpus:
    """Rows of parquet files or of a `save_to_disk` folder, memory-mapped through `datasets`."""
    from datasets import Dataset, load_from_disk

    column = str(files.column)
    rows: Any = None  # while all files are empty
    sizes = [open_table(path).num_rows for path in files.paths]  # names the file when it cannot be read
    first = np.cumsum([0, *sizes])
    if kind_of(files.paths[0]) != ".parquet":
        rows = load_from_disk(files.paths[0]).select_columns([column])
    elif full := [path for path, size in zip(files.paths, sizes, strict=True) if size]:
        rows = Dataset.from_parquet(full, cache_dir=cache_dir, columns=[column])

    def fetch(indices: np.ndarray) -> list[str | Unusable]:
        positions = zip(*(array.tolist() for array in seek(first, indices)), strict=True)
        texts = zip(rows[indices.tolist()][column], positions, strict=True)
        return [read_text(files, {column: text}, Position(*position)) for text, position in texts]

    return _TextCorpus(fingerprint, int(first[-1]), fetch)


def _cached(files: Files, fingerprint: str, cache_dir: str | None) -> _TextCorpus:
    """Rows of files without random access, written once to an Arrow file by `datasets`, and memory-mapped."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    columns = Features({"text": Value("large_string"), "reason": Value("string"), "place": Value("int64")})

    def generate() -> Iterator[dict[str, Any]]:
        """Each row's text, or the reason that it has none, with its position in one number."""
        for found, begin in read_all(files):
            text, reason = (None, found.reason) if isinstance(found, Unusable) else (found, None)
            yield {"text": text, "reason": reason, "place": (begin.file << 40) + begin.offset}

    try:
        rows = Dataset.from_generator(generate, columns, cache_dir, fingerprint=fingerprint)
    except DatasetGenerationError as error:  # wraps what our generator raised
        raise error.__cause__ or error from None

    def fetch(indices: np.ndarray) -> list[str | Unusable]:
        found = rows[indices.tolist()]
        return [
            text if text is not None else Unusable(reason, files.paths[code >> 40], code & (2**40 - 1))
            for text, reason, code in zip(found["text"], found["reason"], found["place"], strict=True)
        ]

    return _TextCorpus(fingerprint, len(rows), fetch)
