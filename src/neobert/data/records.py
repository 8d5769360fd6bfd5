"""Whole rows of any file that `documents` reads, as mappings of columns, each with its place for messages.

A row of a .jsonl may also be a list of texts (anchor, positive, negatives), as the hub's older pair files have them.
"""

from collections.abc import Iterator
from typing import Any

from neobert.data.documents import (
    csv_header,
    csv_records,
    kind_of,
    layout_of,
    lines,
    named,
    open_table,
    parse_line,
    place,
    read_array,
)
from neobert.errors import DataError

Record = tuple[dict[str, Any], int]  # columns, and the offset that `documents.place` turns into file:line


def records(path: str) -> Iterator[Record]:
    """All rows of a file in order. Raises DataError naming file and row."""
    layout = layout_of(path)
    with named(path):
        if kind_of(path) == ".txt":
            for line, begin, _ in lines(path, 0):
                if not line.isspace():
                    yield {"text": line.decode("utf-8", "surrogateescape").strip()}, begin
        elif layout == "lines":
            yield from _line_records(path)
        elif layout == "csv":
            yield from _csv_records(path)
        elif layout == "array":
            for number, row in enumerate(read_array(path)):
                yield _columns_of(row, path, number), number
        else:
            yield from _table_records(path)


def _line_records(path: str) -> Iterator[Record]:
    for line, begin, _ in lines(path, 0):
        if not line.isspace():
            try:
                row = parse_line(line, path, begin)
            except UnicodeDecodeError:
                yield {}, begin
                continue
            yield _columns_of(row, path, begin), begin


def _columns_of(row: Any, path: str, offset: int) -> dict[str, Any]:
    if isinstance(row, list) and len(row) > 1:
        return dict(zip(("anchor", "positive", "negatives"), (row[0], row[1], row[2:]), strict=True))
    if not isinstance(row, dict):
        raise DataError(f"{place(path, offset)}: expected an object with columns, or a list of texts")
    return row


def _csv_records(path: str) -> Iterator[Record]:
    header, position = csv_header(path)
    for record, begin, _ in csv_records(path, position):
        yield dict(zip(header, record, strict=False)), begin


def _table_records(path: str) -> Iterator[Record]:
    table, row = open_table(path), 0
    batches = table.iter_batches(1000) if path.endswith(".parquet") else table.to_batches(1000)
    for batch in batches:
        for record in batch.to_pylist():
            yield record, row
            row += 1
