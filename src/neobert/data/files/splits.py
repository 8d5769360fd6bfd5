"""Where text comes from: which files, which split, which part of it, which column.

`find_splits` answers for a local path; `hub.find_hub_splits` for a dataset of the hub. A split may be named with a slice,
as in `datasets`: `train[:1%]`, `train[1000:]`, `train[-5%:]`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any

from neobert.data.files.corpus import line_spans, open_bytes
from neobert.data.files.documents import Files, Position, stream
from neobert.data.files.rows import (
    HEAD_BYTES,
    KINDS,
    Unusable,
    csv_header,
    is_compressed,
    kind_of,
    layout_of,
    named,
    num_table_rows,
    open_binary,
    open_table,
    raw_rows,
    records,
    refuse_utf16,
    table_schema,
)
from neobert.errors import DataError

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
WHOLE_HASH_BYTES = 2**28  # corpora up to this size are fingerprinted whole, larger ones by samples
SAMPLE_BYTES, NUM_SAMPLES = 65536, 16
STRINGS = ("string", "large_string", "string_view")
FIRST_ROWS = 20  # looked at to find the columns of a text format
HELD_OUT_SHARE, HELD_OUT_DOCUMENTS = 0.01, 1000

_SLICE = re.compile(r"^(?P<name>[^\[\]]+?)(?:\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?$")


def find_splits(
    path: str, text_column: str | None, train_split: str | None, eval_split: str | None
) -> tuple[Files, Files | None]:
    """(training files, evaluation files or None) below `path`. Raises DataError naming what is missing."""
    return choose_splits(local_splits(path), path, text_column, train_split, eval_split)


def local_splits(path: str) -> dict[str, list[str]]:
    """The files of every split below a path. Raises DataError when there are none."""
    return _saved_splits(Path(path)) if is_saved_dataset(path) else _file_splits(path)


def choose_splits(
    splits: dict[str, list[str]], source: str, text_column: str | None, train_split: str | None, eval_split: str | None
) -> tuple[Files, Files | None]:
    """The two splits among those found in `source`, cut to their slices. Raises DataError naming what is missing."""
    usual = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    train, begin, end = parse_slice(train_split, "dataset.train_split") if train_split else (usual, None, None)
    if train is None or train not in splits:
        wanted = f"no split {train!r}" if train else "no split named train"
        raise DataError(f"dataset.train_split: {wanted} in {source}; there are: {', '.join(splits)}")
    training = _slice_rows(_files(splits[train], text_column), begin, end, f"dataset.train_split: {train_split}")
    if eval_split:
        evaluation, begin, end = parse_slice(eval_split, "dataset.eval_split")
        if evaluation not in splits:
            raise DataError(f"dataset.eval_split: no split {evaluation!r} in {source}; there are: {', '.join(splits)}")
        files = _files(splits[evaluation], text_column)
        return training, _slice_rows(files, begin, end, f"dataset.eval_split: {eval_split}")
    found = next((name for name in EVAL_NAMES if name in splits and name != train), None)
    return training, None if found is None else _files(splits[found], text_column)


def is_saved_dataset(path: str) -> bool:
    """Whether `datasets`' `save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def _saved_splits(path: Path) -> dict[str, list[str]]:
    listed = path / "dataset_dict.json"
    if not listed.is_file():
        return {"train": [str(path)]}
    try:
        return {name: [str(path / name)] for name in json.loads(listed.read_text())["splits"]}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{listed}: not what save_to_disk writes, a list of splits") from None


def _file_splits(path: str) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for file in _find_files(path):
        parts = Path(file).relative_to(_root(path)).parts[::-1]
        split = next((name for name in map(_split_named, parts) if name), "train")
        splits.setdefault(split, []).append(file)
    for name, files in splits.items():
        kinds = sorted({str(kind_of(file)) for file in files})
        if len(kinds) > 1:
            raise DataError(
                f"dataset.path: {path}: split {name} mixes {' and '.join(kinds)}; name one kind, as '{path}/*{kinds[0]}'"
            )
    return splits


def _split_named(part: str) -> str | None:
    """The split that the name of a file or a folder begins with, as a word."""
    word = re.split(r"[-_.]", part.lower(), maxsplit=1)[0]
    return "train" if word in TRAIN_NAMES else word if word in EVAL_NAMES else None


def _root(path: str) -> Path:
    """The folder below which names of folders count: of a glob, all before its first wildcard."""
    if os.path.isdir(path):
        return Path(path)
    parts = Path(path).parts
    return Path(*takewhile(lambda part: not has_magic(part), parts[:-1]))


def _find_files(path: str) -> list[str]:
    if not path:
        raise DataError("dataset.path: not set; give a file, a folder or a glob")
    if os.path.isdir(path):
        return _files_below(path)
    found = [path] if os.path.isfile(path) else sorted(glob(path, recursive=True))
    if "**" in path:  # which matches folders along with what is in them
        found = [file for file in found if not os.path.isdir(file)]
    if not found:
        raise DataError(f"dataset.path: nothing at {path!r} (looked in {Path.cwd()})")
    for file in found:
        _require_file(file)
    return found


def _files_below(folder: str) -> list[str]:
    """Files of our kinds, in linked folders too; hidden files and folders are left out, as on the hub."""
    found, seen = [], set()
    with named(folder):
        for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            is_new = os.path.realpath(root) not in seen  # links may go round in circles
            seen.add(os.path.realpath(root))
            folders[:] = [name for name in sorted(folders) if is_new and not name.startswith(".")]
            paths = [os.path.join(root, name) for name in names if is_new and not name.startswith(".")]
            found += [path for path in paths if kind_of(path)]
    if not found:
        raise DataError(f"dataset.path: no {', '.join(KINDS)} file in the folder {folder}")
    if saved := [parent for parent in sorted({os.path.dirname(path) for path in found}) if is_saved_dataset(parent)]:
        raise DataError(f"dataset.path: {folder} has folders of save_to_disk in it; name one, as {saved[0]}")
    for path in found:
        _require_file(path)
    return sorted(str(Path(path)) for path in found)


def _raise(error: OSError) -> None:
    raise error


def _require_file(path: str) -> None:
    """Raises DataError for what a glob or a folder lists and nobody can read."""
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; name it alone, or match the files in it, as {path}/*")
    if not os.path.exists(path):
        raise DataError(f"{path}: is a link to nothing")
    if kind_of(path) is None or not os.path.isfile(path):
        raise DataError(
            f"{path}: not a kind of file that can be read; these can: {', '.join(KINDS)}, text also as .gz or .zst"
        )


# --- columns -----------


def _files(paths: list[str], text_column: str | None) -> Files:
    """The files with their text column. All that are local are looked into: raises DataError naming one that cannot be read or
    has no such column. Empty ones are passed over.
    """
    local = [path for path in paths if "://" not in path]
    if kind_of(paths[0]) == ".txt":
        for path in local:
            with named(path), open_binary(path) as file, suppress(EOFError):  # cut short: the reader says so
                refuse_utf16(file.read(HEAD_BYTES), path)
        return Files(tuple(paths), None)
    first = next((path for path in paths if column_names(path, strings_only=False)), paths[0])
    column = find_column(first, text_column)
    for path in local:
        names = column_names(path, strings_only=False) if path != first else []
        if names and column not in names:
            raise DataError(f"{path}: no column {column!r}, which {first} has; there are: {', '.join(names)}")
    return Files(tuple(paths), column)


def find_column(path: str, wanted: str | None) -> str | None:
    """The text column of a table: `wanted`, or `text`, or the only column that holds strings. None for plain text."""
    if kind_of(path) == ".txt":
        return None
    columns = column_names(path, strings_only=wanted is None)
    if not columns and not column_names(path, strings_only=False):
        raise DataError(f"{path}: empty file")
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"dataset.text_column: no column {wanted!r} in {path}; there are: {', '.join(columns)}")
        return wanted
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    if not columns:
        raise DataError(f"{path}: no column with text")
    raise DataError(f"dataset.text_column: not set, and {path} has several: {', '.join(columns)}")


def column_names(path: str, strings_only: bool) -> list[str]:
    """The columns of a file in order, those of text only if asked; none of an empty file. Raises DataError."""
    with named(path):
        layout = layout_of(path)
        if layout == "table":
            return [
                field.name for field in table_schema(open_table(path)) if not strings_only or _is_string(field.type)
            ]
        if layout == "csv":
            return csv_header(path)[0]
        rows, bad = _first_rows(path)
    if not rows and bad is not None:
        raise DataError(f"{bad.where}: {bad.reason}, and no row behind it can be used")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not strings_only:
        return names
    return [name for name in names if any(isinstance(row.get(name), str) for row in rows)]


def _is_string(kind: Any) -> bool:
    """Whether an Arrow type is text, as it is or by numbers of a dictionary."""
    return str(getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind) in STRINGS


def _first_rows(path: str) -> tuple[list[dict[str, Any]], Unusable | None]:
    """(the first rows that can be used, the first that cannot)."""
    rows: list[dict[str, Any]] = []
    bad: Unusable | None = None
    for row, _ in records(path):
        if isinstance(row, Unusable):
            bad = bad or row
        else:
            rows.append(row)
        if len(rows) == FIRST_ROWS:
            break
    return rows, bad


# --- parts of a split -----------


def parse_slice(spec: str, key: str) -> tuple[str, str | None, str | None]:
    """`train[10:20%]` -> ("train", "10", "20%")."""
    match = _SLICE.match(spec.strip())
    if match is None:
        raise DataError(f"{key}: {spec!r} is no split; write a name, or a slice as train[:1%] or train[1000:]")
    return match["name"], match["begin"], match["end"]


def _slice_rows(files: Files, begin: str | None, end: str | None, what: str) -> Files:
    """The rows of a slice; percentages are rounded to the nearest row, as `datasets` does."""
    if begin is None and end is None:
        return files
    counts = [part for part in (begin, end) if part is not None and ("%" in part or part.startswith("-"))]
    return part_of(files, *slice_bounds(begin, end, count_rows(files) if counts else None, what))


def slice_bounds(begin: str | None, end: str | None, total: int | None, what: str) -> tuple[int, int | None]:
    """First row of a slice and the one behind its last; `total` rows are only needed where it counts from the end or in
    percent. Raises DataError for a slice without rows.
    """

    def number(part: str) -> int:
        value = int(part.rstrip("%"))
        if total is None:
            return value
        value = round(total * value / 100) if part.endswith("%") else value
        return min(total, max(0, value + total if part.startswith("-") else value))

    first = number(begin) if begin is not None else 0
    last = number(end) if end is not None else None
    if last is not None and last <= first:
        raise DataError(f"{what}: no row in it")
    return first, last


def part_of(files: Files, first: int, last: int | None) -> Files:
    """Rows `first` to `last` (excluded) of whole files."""
    stop = None if last is None else find_row(files, last)
    return replace(files, rows=(first, last), start=find_row(files, first), stop=stop)


def count_rows(files: Files) -> int:
    """Rows of all files; tables know it, plain text is scanned, the rest is read once."""
    return sum(_count_in(path) for path in files.paths)


def _count_in(path: str) -> int:
    layout = layout_of(path)
    if layout == "table":
        return num_table_rows(open_table(path))
    if layout == "lines" and not is_compressed(path) and "://" not in path:
        return len(line_spans(open_bytes(path)))
    return sum(1 for _ in raw_rows(path))


def find_row(files: Files, row: int) -> Position:
    """The position of a row, counted over all files; behind the last one when there are fewer."""
    for number, path in enumerate(files.paths):
        if layout_of(path) == "table":
            count = _count_in(path)
            if row < count:
                return Position(number, row)
            row -= count
            continue
        for _, begin, _ in raw_rows(path):
            if row == 0:
                return Position(number, begin)
            row -= 1
    return Position(len(files.paths), 0)


def hold_out_head(files: Files, num_bytes: int) -> tuple[Files, Files | None]:
    """(the rest, what is held out): documents from the head, until they are 1 % of the text or 1,000; None for a corpus of one.

    Both are ranges of the same files, so nothing that is evaluated is trained on.
    """
    budget, used, first = num_bytes * HELD_OUT_SHARE, 0, files.start
    for count, (row, begin, _) in enumerate(stream(files, files.start, files.stop)):
        if count and (used >= budget or count == HELD_OUT_DOCUMENTS):
            rows = files.rows[0] + count
            return (
                replace(files, start=begin, rows=(rows, files.rows[1])),
                replace(files, start=first, stop=begin, rows=(files.rows[0], rows)),
            )
        text = row.get(files.column or "") if isinstance(row, dict) else row
        used += len(text) if isinstance(text, str | bytes) else 0
    return files, None


# --- what is in the files -----------


def num_bytes(files: Files) -> int:
    """Size on disk; 0 for files of the hub that are read from there."""
    return sum(entry.stat().st_size for entry in _entries(files))


def fingerprint(files: Files) -> str:
    """Hash of names, sizes and content: all of it up to 256 MB, beyond that the ends and 16 places in between of each file.

    URLs of the hub name a revision, which is a hash already.
    """
    digest = hashlib.sha256(repr((files.column, files.rows)).encode())
    digest.update("".join(path for path in files.paths if "://" in path).encode())
    whole = num_bytes(files) <= WHOLE_HASH_BYTES
    for entry in _entries(files):
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


def _entries(files: Files) -> Iterator[Path]:
    for path in map(Path, (path for path in files.paths if "://" not in path)):
        yield from sorted(path.rglob("*.arrow")) if path.is_dir() else [path]
