"""The GLUE tasks as one table, and their rows from files: a folder of your own, or the hub's layout of `nyu-mll/glue`.

A local folder holds `<task>/<split>.jsonl`, `.parquet`, `.csv`, `.tsv` or another kind of file that `row_files` reads (also
`<split>-00000-of-00001.parquet`, as the hub names them), with the columns of the table and `label`: the number of a label, or
its name.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neobert.data.files.opening import KINDS, kind_of
from neobert.data.files.rows import place, text_in, usable_records
from neobert.data.files.splits import hub_splits
from neobert.errors import DataError

REPOSITORY = "nyu-mll/glue"
NLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class GlueTask:
    """One task. `labels` are empty where it is a regression; `metrics` make up the score; `tests` name the files that
    the benchmark's server takes, by split."""

    name: str
    title: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    evaluation: tuple[str, ...] = ("validation",)
    tests: tuple[tuple[str, str], ...] = ()
    writes_names: bool = False  # whether the server wants names of labels, or their numbers
    largest: float = 0.0  # of a regression

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def trains(self) -> bool:
        return bool(self.evaluation)


PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        GlueTask("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews",),
                 tests=(("test", "CoLA.tsv"),)),
        GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive"), tests=(("test", "SST-2.tsv"),)),
        GlueTask("mrpc", "MRPC", PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"),
                 tests=(("test", "MRPC.tsv"),)),
        GlueTask("stsb", "STS-B", PAIR, (), ("pearson", "spearman"), tests=(("test", "STS-B.tsv"),), largest=5.0),
        GlueTask("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy"),
                 tests=(("test", "QQP.tsv"),)),
        GlueTask("mnli", "MNLI", ("premise", "hypothesis"), NLI,
                 evaluation=("validation_matched", "validation_mismatched"),
                 tests=(("test_matched", "MNLI-m.tsv"), ("test_mismatched", "MNLI-mm.tsv")), writes_names=True),
        GlueTask("qnli", "QNLI", ("question", "sentence"), ("entailment", "not_entailment"),
                 tests=(("test", "QNLI.tsv"),), writes_names=True),
        GlueTask("rte", "RTE", PAIR, ("entailment", "not_entailment"), tests=(("test", "RTE.tsv"),),
                 writes_names=True),
        GlueTask("wnli", "WNLI", PAIR, ("not_entailment", "entailment"), tests=(("test", "WNLI.tsv"),)),
        GlueTask("ax", "AX", ("premise", "hypothesis"), NLI, evaluation=(), tests=(("test", "AX.tsv"),),
                 writes_names=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where the tasks are: a folder, or a dataset of the hub (read from its cache when offline)."""

    path: str = ""
    name: str = REPOSITORY
    cache_dir: str | None = None
    force_download: bool = False

    def __str__(self) -> str:
        return self.path or self.name


@dataclass(frozen=True)
class Split:
    """The rows of a split: one or two columns of text, labels (float64; None where they were not asked for), and ids."""

    texts: tuple[list[str], ...]
    labels: np.ndarray | None
    ids: list[Any]

    def __len__(self) -> int:
        return len(self.ids)


def read_split(source: Source, task: GlueTask, split: str, with_labels: bool = True) -> Split:
    """The rows of `split`. Raises DataError for what is missing or wrong, with file and row."""
    paths = find_files(source, task.name, split)
    texts: tuple[list[str], ...] = tuple([] for _ in task.columns)
    labels: list[float] = []
    ids: list[Any] = []
    for path in paths:
        for row, begin in usable_records(path):
            _check_columns(row, [*task.columns, *(["label"] if with_labels else [])], path, begin)
            for column, into in zip(task.columns, texts, strict=True):
                into.append(text_in(row, column, path, begin))
            if with_labels:
                labels.append(_label(row["label"], task, path, begin))
            ids.append(row.get("idx", len(ids)))
    if not ids:
        raise DataError(f"{paths[0]}: the split {split} of {task.name} is empty")
    return Split(texts, np.array(labels) if with_labels else None, ids)


def has_split(source: Source, task: GlueTask, split: str) -> bool:
    """Whether the split is there."""
    try:
        return bool(find_files(source, task.name, split))
    except DataError:
        return False


def find_files(source: Source, task: str, split: str) -> list[str]:
    """The files of a split. Raises DataError saying what is there instead."""
    if source.path:
        return _local_files(Path(source.path), task, split)
    splits = hub_splits(source.name, task, source.cache_dir, source.force_download)
    if split not in splits:
        raise DataError(f"dataset.name: {source.name} has no split {split!r} of {task}; there are: {', '.join(splits)}")
    return splits[split]


def _local_files(root: Path, task: str, split: str) -> list[str]:
    folder = root / task
    if not folder.is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        found = f"it has {', '.join(there)}" if there else "it has no folders" if root.is_dir() else "no such folder"
        raise DataError(f"dataset.path: {root}: no folder {task!r} with the task's files; {found}")
    pattern = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?\.\w+(\.gz|\.zst)?", re.IGNORECASE)
    found_files = sorted(
        path for path in folder.iterdir() if pattern.fullmatch(path.name) and kind_of(str(path)) not in (None, ".txt")
    )
    if not found_files:
        there = sorted(path.name for path in folder.iterdir())
        kinds = ", ".join(KINDS[1:])
        raise DataError(f"{folder}: no file {split} ({kinds}); it has: {', '.join(there) or 'nothing'}")
    if len({kind_of(str(path)) for path in found_files}) > 1:
        raise DataError(f"{folder}: {split} is there twice: {', '.join(path.name for path in found_files)}")
    return [str(path) for path in found_files]


# --- rows -----------


def _check_columns(row: dict[str, Any], wanted: list[str], path: str, begin: int) -> None:
    if missing := [column for column in wanted if column not in row]:
        raise DataError(f"{place(path, begin)}: no column {missing[0]!r}; it has: {', '.join(map(str, row))}")


def _label(value: Any, task: GlueTask, path: str, begin: int) -> float:
    """A class's number, or a regression's value. Raises DataError when it is neither, or out of range."""
    if value in task.labels:
        return float(task.labels.index(value))
    allowed = f"0 to {task.largest:g}" if task.largest else f"0 to {len(task.labels) - 1} ({', '.join(task.labels)})"
    try:
        label = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{place(path, begin)}: label {value!r}; {task.name} has labels {allowed}") from None
    largest = task.largest or len(task.labels) - 1
    if not 0 <= label <= largest or (task.labels and label != int(label)):
        raise DataError(f"{place(path, begin)}: label {value!r} is out of range; {task.name} has labels {allowed}")
    return label
