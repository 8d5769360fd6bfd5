"""Where text comes from: which files, which split, which part of it, which column.

`find_splits` answers for a local path; `find_hub_splits` for a dataset of the Hugging Face hub, whose files are found by
`datasets`' own rules and read by us, with a position. Online a stream reads them from the hub as it comes to them (`hf://` URLs
that name a revision), and everything else downloads them once; offline both read what the local cache of the hub holds.

A split may be named with a slice, as in `datasets`: `train[:1%]`, `train[1000:]`, `train[-5%:]`.
"""

import json
import os
import re
from dataclasses import replace
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path

from neobert.data.files.documents import Files, Position, stream
from neobert.data.files.opening import KINDS, kind_of, named
from neobert.data.files.rows import check_encoding, columns_of, count_rows, first_with_columns, layout_of, raw_rows
from neobert.errors import DataError, first_line

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
KNOWN = {"refinedweb": ("tiiuae/falcon-refinedweb", "content")}  # short name -> repository and text column
HELD_OUT_SHARE, HELD_OUT_DOCUMENTS = 0.01, 1000

_SLICE = re.compile(r"^(?P<name>[^\[\]]+?)(?:\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?$")

Paths = dict[str, list[str]]  # the files of every split
Choice = tuple[str, str | None, str | None]  # a split, and where its slice begins and ends


def find_splits(
    path: str, text_column: str | None, train_split: str | None, eval_split: str | None
) -> tuple[Files, Files | None]:
    """(training files, evaluation files or None) below `path`. Raises DataError naming what is missing."""
    return _choose_splits(local_splits(path), path, text_column, train_split, eval_split)


def find_hub_splits(
    name: str, config: str | None, streaming: bool, text_column: str | None, train_split: str | None,
    eval_split: str | None, cache_dir: str | None = None, force_download: bool = False,
) -> tuple[Files, Files | None]:  # fmt: skip
    """(training files, evaluation files or None) of a dataset. Raises DataError with what to do, also when offline."""
    repository, column = KNOWN.get(name, (name, None))
    splits = hub_splits(repository, config, cache_dir, force_download, streaming)
    return _choose_splits(splits, f"dataset {repository}", text_column or column, train_split, eval_split)


def _choose_splits(
    splits: Paths, source: str, text_column: str | None, train_split: str | None, eval_split: str | None
) -> tuple[Files, Files | None]:
    def find(wanted: str | None, usual: str | None, key: str) -> tuple[str, Files]:
        name, begin, end = choose_split(splits, wanted, usual, source, key)
        return name, _slice_rows(_with_column(splits[name], text_column), begin, end, f"{key}: {wanted}")

    train, files = find(train_split, usual_training(splits), "dataset.train_split")
    usual = usual_evaluation(splits, train)
    if not eval_split and usual is None:
        return files, None
    return files, find(eval_split, usual, "dataset.eval_split")[1]


def usual_training(splits: Paths) -> str | None:
    """The split to train on where none is named: `train`, or the only one."""
    return "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None


def usual_evaluation(splits: Paths, train: str) -> str | None:
    """The split to evaluate on where none is named."""
    return next((name for name in EVAL_NAMES if name in splits and name != train), None)


def choose_split(splits: Paths, wanted: str | None, usual: str | None, source: str, key: str) -> Choice:
    """The split that `key` names, or the usual one. Raises DataError saying what there is in `source`."""
    name, begin, end = usual, None, None
    if wanted:
        match = _SLICE.match(wanted.strip())  # train[10:20%] -> train, 10, 20%
        if match is None:
            raise DataError(f"{key}: {wanted!r} is no split; write a name, or a slice as train[:1%] or train[1000:]")
        name, begin, end = match.group("name", "begin", "end")
    if name is None or name not in splits:
        what = f"no split {name!r}" if name else "no split named train"
        raise DataError(f"{key}: {what} in {source}; there are: {', '.join(splits)}")
    return name, begin, end


# --- files -----------


def local_splits(path: str) -> Paths:
    """The files of every split below a path. Raises DataError when there are none."""
    if is_saved_dataset(path):
        return _saved_splits(Path(path))
    splits: Paths = {}
    root = Path(path)  # the folder below which names of folders count: of a glob, all before its first wildcard
    if not os.path.isdir(path):
        root = Path(*takewhile(lambda part: not has_magic(part), root.parts[:-1]))
    for file in _find_files(path):
        parts = reversed(Path(file).relative_to(root).parts)
        words = (re.split(r"[-_.]", part.lower(), maxsplit=1)[0] for part in parts)  # that names begin with
        split = next((word for word in words if word in TRAIN_NAMES + EVAL_NAMES), "train")
        splits.setdefault("train" if split in TRAIN_NAMES else split, []).append(file)
    for name, files in splits.items():
        kinds = sorted({str(kind_of(file)) for file in files})
        if len(kinds) > 1:
            hint = f"name one kind, as '{path}/*{kinds[0]}'"
            raise DataError(f"dataset.path: {path}: split {name} mixes {' and '.join(kinds)}; {hint}")
    return splits


def is_saved_dataset(path: str) -> bool:
    """Whether `datasets`' `save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def _saved_splits(path: Path) -> Paths:
    listed = path / "dataset_dict.json"
    if not listed.is_file():
        return {"train": [str(path)]}
    try:
        return {name: [str(path / name)] for name in json.loads(listed.read_text())["splits"]}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{listed}: not what save_to_disk writes, a list of splits") from None


def _find_files(path: str) -> list[str]:
    if not path:
        raise DataError("dataset.path: not set; give a file, a folder or a glob")
    if os.path.isdir(path):
        found = _files_below(path)
    else:
        found = [path] if os.path.isfile(path) else sorted(glob(path, recursive=True))
        if "**" in path:  # which matches folders along with what is in them
            found = [file for file in found if not os.path.isdir(file)]
        if not found:
            raise DataError(f"dataset.path: nothing at {path!r} (looked in {Path.cwd()})")
    for file in found:
        if os.path.isdir(file):
            raise DataError(f"{file}: is a folder; name it alone, or match the files in it, as {file}/*")
        if not os.path.exists(file):
            raise DataError(f"{file}: is a link to nothing")
        if kind_of(file) is None or not os.path.isfile(file):
            kinds = f"{', '.join(KINDS)}, text also as .gz or .zst"
            raise DataError(f"{file}: not a kind of file that can be read; these can: {kinds}")
    return found


def _files_below(folder: str) -> list[str]:
    """Files of our kinds, in linked folders too; hidden files and folders are left out, as on the hub."""

    def refuse(error: OSError) -> None:
        raise error

    found, seen = [], set()
    with named(folder):
        for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            is_new = os.path.realpath(root) not in seen  # links may go round in circles
            seen.add(os.path.realpath(root))
            folders[:] = [name for name in sorted(folders) if is_new and not name.startswith(".")]
            paths = [os.path.join(root, name) for name in names if is_new and not name.startswith(".")]
            found += [str(Path(path)) for path in paths if kind_of(path)]
    if not found:
        raise DataError(f"dataset.path: no {', '.join(KINDS)} file in the folder {folder}")
    if saved := [parent for parent in sorted({os.path.dirname(path) for path in found}) if is_saved_dataset(parent)]:
        raise DataError(f"dataset.path: {folder} has folders of save_to_disk in it; name one, as {saved[0]}")
    return sorted(found)


def hub_splits(
    repository: str, config: str | None, cache_dir: str | None, force_download: bool, streaming: bool = False
) -> Paths:
    """The files of every split of a configuration, downloaded if need be, or URLs. Raises DataError, also when offline."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    offline, source = is_offline_mode(), repository
    try:
        if offline or not streaming:
            source = snapshot_download(
                repository, repo_type="dataset", cache_dir=cache_dir, local_files_only=offline,
                force_download=force_download and not offline,
            )  # fmt: skip
        builder = load_dataset_builder(source, name=config, cache_dir=cache_dir)
    except HFValidationError as error:
        raise DataError(f"dataset.name: {repository!r} is no name of a dataset: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        unreached = f"the hub cannot be reached ({first_line(error)})"
        why = "this machine is offline (HF_HUB_OFFLINE)" if offline else unreached
        missing = f"dataset.name: {repository!r} is not in the local cache of the hub, and {why}"
        raise DataError(f"{missing}; set dataset.path to files of your own, or run once with network") from None
    except (DatasetNotFoundError, HfHubHTTPError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"dataset.name: {repository!r} cannot be loaded: {first_line(error)}") from None
    splits: Paths = {}
    for split, paths in (builder.config.data_files or {}).items():
        # files of the cache are links to blobs without a suffix: keep the name
        names = [str(path if "://" in str(path) else Path(path).absolute()) for path in paths]
        if readable := [name for name in names if kind_of(name)]:
            splits[str(split)] = readable
    if not splits:
        raise DataError(f"dataset.name: {repository!r} has no file of a kind that can be read")
    return splits


# --- columns -----------


def _with_column(paths: list[str], wanted: str | None) -> Files:
    """The files with their text column. Raises DataError naming a local one that cannot be read, or has rows without it."""
    local = [path for path in paths if "://" not in path]
    if kind_of(paths[0]) == ".txt":
        for path in local:
            check_encoding(path)
        return Files(tuple(paths), None)
    first, columns = first_with_columns(paths)
    column = _choose_column(first, columns, wanted)
    for path in local:
        names = columns_of(path) if path != first else {}
        if names and column not in names:
            raise DataError(f"{path}: no column {column!r}, which {first} has; there are: {', '.join(names)}")
    return Files(tuple(paths), column)


def find_column(path: str, wanted: str | None) -> str | None:
    """The text column of a file: `wanted`, or `text`, or the only column that holds strings. None for plain text."""
    return None if kind_of(path) == ".txt" else _choose_column(path, first_with_columns([path])[1], wanted)


def _choose_column(path: str, columns: dict[str, bool], wanted: str | None) -> str:
    texts = [name for name, is_text in columns.items() if is_text]
    choices = [wanted] if wanted is not None else ["text"] if "text" in texts else texts
    if not choices:
        raise DataError(f"{path}: no column with text")
    if len(choices) > 1:
        raise DataError(f"dataset.text_column: not set, and {path} has several: {', '.join(texts)}")
    if choices[0] not in columns:
        raise DataError(f"dataset.text_column: no column {wanted!r} in {path}; there are: {', '.join(columns)}")
    return choices[0]


def _slice_rows(files: Files, begin: str | None, end: str | None, what: str) -> Files:
    if begin is None and end is None:
        return files
    counts = [part for part in (begin, end) if part is not None and ("%" in part or part.startswith("-"))]
    total = sum(map(count_rows, files.paths)) if counts else None
    first, last = slice_bounds(begin, end, total, what)
    stop = None if last is None else _find_row(files, last)
    return replace(files, rows=(first, last), start=_find_row(files, first), stop=stop)


def slice_bounds(begin: str | None, end: str | None, total: int | None, what: str) -> tuple[int, int | None]:
    """First row of a slice and the one after its last. Raises DataError for a slice without rows.

    `total` rows are only needed where it counts from the end, or in percent: to the nearest row, as `datasets` does.
    """

    def number(part: str) -> int:
        value = int(part.rstrip("%"))
        if total is None:
            return value
        value = round(total * value / 100) if part.endswith("%") else value
        return min(total, max(0, value + total if part.startswith("-") else value))

    first, last = 0 if begin is None else number(begin), None if end is None else number(end)
    if last is not None and last <= first:
        raise DataError(f"{what}: no row in it")
    return first, last


def _find_row(files: Files, row: int) -> Position:
    """The position of a row, counted over all files; after the last one when there are fewer."""
    for number, path in enumerate(files.paths):
        if layout_of(path) == "table":
            count = count_rows(path)
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
    budget, used = num_bytes * HELD_OUT_SHARE, 0
    for count, (row, begin, _) in enumerate(stream(files, files.start, files.stop)):
        if count and (used >= budget or count == HELD_OUT_DOCUMENTS):
            cut = files.rows[0] + count
            rest = replace(files, start=begin, rows=(cut, files.rows[1]))
            return rest, replace(files, stop=begin, rows=(files.rows[0], cut))
        text = row.get(files.column or "") if isinstance(row, dict) else row
        used += len(text) if isinstance(text, str | bytes) else 0
    return files, None
