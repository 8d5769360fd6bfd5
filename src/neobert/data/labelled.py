"""Texts with labels: the GLUE tasks as one table, their rows from files, tokenised once, and batches of them.

A local folder holds `<task>/<split>` in files that `files/rows` reads (also `<split>-00000-of-00001.parquet`, as the hub names
them), with the columns of the table and `label`: the number of a label, or its name. A batch of all W processes is drawn at
once, as a function of (seed, epoch); number r trains every W-th row of it, from row r on. The position is how many batches were
used. With `group_by_length` chunks of 50 batches are sorted by length and their batches shuffled, which saves padding.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from neobert.data.batch import Batch, Loader, RowLayout, State
from neobert.data.files.opening import KINDS, kind_of
from neobert.data.files.rows import place, text_in, usable_records
from neobert.data.files.splits import hub_splits
from neobert.data.tokenizer import Ids, tokenizing_threads
from neobert.errors import DataError
from neobert.ranks import Ranks

CHUNK_BATCHES = 50
ROWS_PER_THREAD = 20_000  # fewer are not worth another thread

# --- tasks -----------

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


# --- rows of files -----------


@dataclass(frozen=True)
class Source:
    """Where the tasks are: a folder, or a dataset of the hub (read from its cache when offline)."""

    path: str = ""
    name: str = REPOSITORY
    cache_dir: str | None = None
    force_download: bool = False

    def __str__(self) -> str:
        return self.path or self.name


class Split(NamedTuple):
    """The rows of a split: one or two columns of text, and labels: int64 classes, float64 values of a regression, or None."""

    texts: tuple[list[str], ...]
    labels: np.ndarray | None


def read_split(source: Source, task: GlueTask, split: str, with_labels: bool = True) -> Split:
    """The rows of `split`. Raises DataError for what is missing or wrong, with file and row."""
    paths, wanted = find_files(source, task.name, split), [*task.columns, *(["label"] if with_labels else [])]
    texts: tuple[list[str], ...] = tuple([] for _ in task.columns)
    labels: list[float] = []
    for path in paths:
        for row, begin in usable_records(path):
            if missing := [column for column in wanted if column not in row]:
                raise DataError(f"{place(path, begin)}: no column {missing[0]!r}; it has: {', '.join(map(str, row))}")
            for column, into in zip(task.columns, texts, strict=True):
                into.append(text_in(row, column, path, begin))
            if with_labels:
                labels.append(_label(row["label"], task, path, begin))
    if not texts[0]:
        raise DataError(f"{paths[0]}: the split {split} of {task.name} is empty")
    return Split(texts, np.array(labels, dtype=np.int64 if task.labels else np.float64) if with_labels else None)


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
    pattern = rf"(?i){re.escape(split)}(-\d+-of-\d+)?\.\w+(\.gz|\.zst)?"
    names = sorted(path.name for path in folder.iterdir())
    paths = [name for name in names if re.fullmatch(pattern, name) and kind_of(name) not in (None, ".txt")]
    if not paths:
        raise DataError(f"{folder}: no file {split} ({', '.join(KINDS[1:])}); it has: {', '.join(names) or 'nothing'}")
    if len({kind_of(path) for path in paths}) > 1:
        raise DataError(f"{folder}: {split} is there twice: {', '.join(paths)}")
    return [str(folder / path) for path in paths]


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


# --- tokenised rows -----------


@dataclass(frozen=True)
class Rows:
    """Tokenised rows: ids, segment numbers where the tokenizer has them (else None), and labels as in `Split`."""

    ids: list[Ids]
    segments: list[Ids] | None
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))

    def first(self, most: int | None) -> "Rows":
        """The first rows; None: all of them."""
        segments = None if self.segments is None else self.segments[:most]
        labels = None if self.labels is None else self.labels[:most]
        return replace(self, ids=self.ids[:most], segments=segments, labels=labels)

    def batch(self, chosen: np.ndarray, layout: RowLayout, epoch: int = 0, ends_epoch: bool = False) -> Batch:
        """The rows numbered `chosen`; labels as int64 classes or float32 values."""
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen])
        if labels is not None and labels.is_floating_point():
            labels = labels.float()
        segments = None if self.segments is None else [self.segments[i] for i in chosen]
        facts = {"labels": labels, "num_targets": len(chosen), "epoch": epoch, "ends_epoch": ends_epoch}
        return layout.batch([self.ids[i] for i in chosen], segments, **facts)


def tokenize_rows(hf_tokenizer: Any, split: Split, max_length: int, truncate: bool, num_proc: int, what: str) -> Rows:
    """The rows of a split, at most `max_length` tokens with special tokens; of a pair the longer text is cut first. Raises
    DataError for longer rows where `truncate` is off.
    """

    def encode(part: tuple[list[str], ...], tokenizer: Any) -> Any:
        cut = {"truncation": "longest_first", "max_length": max_length} if truncate else {}
        return tokenizer(*part, padding=False, return_attention_mask=False, **cut)

    texts = split.texts
    num_proc = min(num_proc, -(-len(texts[0]) // ROWS_PER_THREAD))
    if num_proc > 1:
        bounds = np.linspace(0, len(texts[0]), num_proc + 1).astype(int)
        parts = [tuple(column[a:b] for column in texts) for a, b in pairwise(bounds)]
        with tokenizing_threads(num_proc) as pool:  # a tokenizer each, as its limit is part of it
            encoded = list(pool.map(lambda part: encode(part, copy.deepcopy(hf_tokenizer)), parts))
    else:
        encoded = [encode(texts, hf_tokenizer)]
    ids = [np.array(row, dtype=np.int32) for part in encoded for row in part["input_ids"]]
    segments = [np.array(row, dtype=np.int8) for part in encoded for row in part.get("token_type_ids", [])]
    for number, row in enumerate(ids, 1):
        if len(row) > max_length:
            long = f"row {number} has {len(row)} tokens, glue.max_seq_length is {max_length}"
            raise DataError(f"{what}: {long}; raise that, or set tokenizer.truncation: true")
    return Rows(ids, segments or None, split.labels)


# --- batches -----------


class EpochLoader(Loader):
    """Batches of all rows, epoch after epoch, in an order drawn by (seed, epoch); the last batch of an epoch may be short."""

    def __init__(
        self, rows: Rows, layout: RowLayout, ranks: Ranks, batch_size: int, seed: int, group_by_length: bool,
        num_workers: int, fingerprint: dict[str, Any],
    ):  # fmt: skip
        """`batch_size`: of this process."""
        self.rows, self.layout, self.ranks, self.seed = rows, layout, ranks, seed
        self.batch_size, self.group_by_length = batch_size * ranks.world_size, group_by_length
        facts = {"rows": len(rows), "tokens": rows.num_tokens, "batch_size": self.batch_size, "seed": seed}
        self.fingerprint = {**fingerprint, **facts, "group_by_length": group_by_length}
        super().__init__({"num_used": 0}, num_workers, num_ahead=2 * num_workers)
        self.order = lru_cache(maxsize=1)(self._draw)  # the rows of every batch of an epoch

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def _draw(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng((self.seed, epoch))
        order, size = random.permutation(len(self.rows)), self.batch_size
        if not self.group_by_length:
            return _cut(order, size)
        lengths = np.array([len(row) for row in self.rows.ids])
        chunks = _cut(order, size * CHUNK_BATCHES)
        batches = [b for chunk in chunks for b in _cut(chunk[np.argsort(-lengths[chunk], kind="stable")], size)]
        whole, short = [b for b in batches if len(b) == size], [b for b in batches if len(b) < size]
        return [whole[i] for i in random.permutation(len(whole))] + short

    def jobs(self) -> Iterator[Callable[[], tuple[Batch, State]]]:
        for number in count(self.position["num_used"]):
            epoch, index = divmod(number, self.batches_per_epoch)
            is_last = index + 1 == self.batches_per_epoch
            yield partial(self._build, self.order(epoch)[index], epoch + is_last, is_last, {"num_used": number + 1})

    def _build(self, chosen: np.ndarray, epoch: int, is_last: bool, position: State) -> tuple[Batch, State]:
        own = chosen[self.ranks.rank :: self.ranks.world_size]
        batch = self.rows.batch(own if len(own) else chosen[:1], self.layout, epoch, is_last)
        return batch if len(own) else batch.without_targets(), position


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_order(rows: Rows, layout: RowLayout, ranks: Ranks, batch_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """All rows once, longest first (little padding): (their numbers, batch). Processes take batches in turn, and all get
    equally many: the last ones may come without numbers.
    """
    batches = _cut(np.argsort([-len(row) for row in rows.ids], kind="stable"), batch_size)
    for first in range(0, len(batches), ranks.world_size):
        has_one = first + ranks.rank < len(batches)
        chosen = batches[first + ranks.rank if has_one else first]
        yield chosen if has_one else chosen[:0], rows.batch(chosen, layout)
