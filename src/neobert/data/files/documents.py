"""Documents of files as a stream: raw rows with the position after each, so that a resumed run seeks instead of re-reading, and
so that a data rank can pass over the documents of other ranks without parsing them; `read_text` makes text of a row.

What a row is in each kind of file, and what its position is, stands in `row_files`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from neobert.data.files.rows import Raw, Unusable, parse_row, raw_rows, why_no_text
from neobert.errors import DataError


class Position(NamedTuple):
    """After a document of a stream: file number, and the offset (bytes or rows) where the next one begins."""

    file: int = 0
    offset: int = 0


START = Position()


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

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {"counts": dict(self.counts), "first": dict(self.first)}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        self.counts, self.first = dict(state["counts"]), dict(state["first"])


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
    reason = why_no_text(text)
    return Unusable(reason, path, begin.offset) if reason else text
