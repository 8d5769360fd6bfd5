"""Rows of contrastive training, read from files into memory: pairs with negatives, texts with labels, two texts with a score.

A text that occurs several times is held and tokenised once, and its number says whether two texts are the same.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from neobert.data.files.documents import SkippedRows
from neobert.data.files.rows import Unusable, place, records, why_no_text
from neobert.data.files.splits import column_names, slice_bounds
from neobert.data.hashing import hash_key, permute
from neobert.data.pairs.columns import Roles, find_roles
from neobert.data.tokenizer import Ids
from neobert.errors import DataError

POSITIVE_SHARE = 0.8  # of the highest score: from here on two texts are a positive pair
TEXTS_AT_ONCE = 4096
HELD_OUT_KEY = 0x5411


class Example(NamedTuple):
    """One row. `value` is a label or a score; a labelled text has no positive of its own."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class Examples:
    """The rows of one split of a source."""

    roles: Roles
    rows: list[Example]
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def hold_out(self, share: float, seed: int) -> "tuple[Examples, Examples]":
        """(the rest, `share` of the rows drawn by `seed`)."""
        size = len(self.rows)
        if size < 2:
            raise DataError(f"dataset.validation_split: {self.name} has one row, which cannot be split")
        places = permute(np.arange(size), size, hash_key(seed, HELD_OUT_KEY))
        cut = max(1, round(size * share))
        held, rest = ([self.rows[i] for i in np.sort(part)] for part in (places[:cut], places[cut:]))
        return Examples(self.roles, rest, self.name), Examples(self.roles, held, self.name)


def read_examples(
    paths: Sequence[str],
    roles: Roles,
    name: str,
    skips: SkippedRows,
    bounds: tuple[str | None, str | None] = (None, None),
) -> Examples:
    """All rows of `paths`, or the slice of them that `bounds` says. Raises DataError, also when none can be used."""
    rows = [example for path in paths for example in _read_file(path, roles, skips)]
    if bounds != (None, None):
        first, last = slice_bounds(*bounds, len(rows), name)
        rows = rows[first:last]
    if not rows:
        told = "; ".join(f"{number:,} {reason}, first {skips.first[reason]}" for reason, number in skips.counts.items())
        raise DataError(f"{name}: no row that can be used{f': {told}' if told else ''}")
    return Examples(roles, rows, name)


def roles_of(paths: Sequence[str], wanted: dict[str, str], key: str) -> Roles:
    """What the rows of all files are. Raises DataError."""
    first = next((path for path in paths if column_names(path, strings_only=False)), None)
    if first is None:
        raise DataError(f"{paths[0]}: empty file")
    return find_roles(column_names(first, strings_only=False), wanted, first, key)


def _read_file(path: str, roles: Roles, skips: SkippedRows) -> Iterator[Example]:
    read = {"pairs": _pairs, "scores": _scored, "labels": _labelled, "texts": _labelled}[roles.kind]
    for row, offset in records(path):
        if isinstance(row, Unusable):
            skips.add(row)
            continue
        if missing := [column for column in roles.columns.values() if column not in row]:
            skips.add(Unusable(f"no column {missing[0]!r}", path, offset))
            continue
        for found in read(row, roles, path, offset):
            if isinstance(found, Unusable):
                skips.add(found)
            else:
                yield found


def _pairs(row: dict[str, Any], roles: Roles, path: str, offset: int) -> Iterator[Example | Unusable]:
    anchor, positives = row[roles.columns["anchor"]], row[roles.columns["positive"]]
    negatives = [text for column in roles.negatives for text in _texts(row.get(column))]
    for positive in _texts(positives) or [None]:
        reason = _wrong(anchor, "anchor") or _wrong(positive, "positive")
        reason = reason or next((told for text in negatives if (told := _wrong(text, "negative"))), "")
        if reason:
            yield Unusable(reason, path, offset)
        else:
            yield Example(anchor, positive, tuple(negatives))


def _scored(row: dict[str, Any], roles: Roles, path: str, offset: int) -> Iterator[Example | Unusable]:
    first, second = row[roles.columns["text1"]], row[roles.columns["text2"]]
    value = row[roles.columns["score"]]
    reason = _wrong(first, "text1") or _wrong(second, "text2")
    if reason:
        yield Unusable(reason, path, offset)
        return
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{place(path, offset)}: {roles.columns['score']} is {value!r}, and a score is a number")
    yield Example(first, second, (), score)


def _labelled(row: dict[str, Any], roles: Roles, path: str, offset: int) -> Iterator[Example | Unusable]:
    text = row[roles.columns["text"]]
    if reason := _wrong(text, "text"):
        yield Unusable(reason, path, offset)
    elif roles.kind == "texts":
        yield Example(text, text)
    else:
        yield Example(text, text, (), _label(row[roles.columns["label"]], roles.columns["label"], path, offset))


def _label(value: Any, column: str, path: str, offset: int) -> str:
    """A class as text. Raises DataError for what is no class."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is not None and not number.is_integer():
        raise DataError(
            f"{place(path, offset)}: {column} is {value!r}, a score where a label is expected (a whole number or a name); "
            "rows with a score have two texts: dataset.columns: {text1: ..., text2: ..., score: ...}"
        )
    if number is None and not (isinstance(value, str | bool) and str(value).strip()):
        raise DataError(f"{place(path, offset)}: {column} is {value!r}, and a label is a whole number or a name")
    return str(value) if number is None else str(int(number))


def _texts(value: Any) -> list[Any]:
    """The texts of a cell that holds one or a list of them; none of an empty cell."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _wrong(text: Any, role: str) -> str:
    """Why a text cannot be used, or nothing."""
    reason = why_no_text(text)
    return {"no text": f"without {role}", "not text": f"whose {role} is not text"}.get(reason, reason)


# --- rows to train on -----------


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one behind the other."""

    values: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(rows: Sequence[Sequence[int] | np.ndarray], dtype: type) -> "Ragged":
        ends = np.cumsum([0, *map(len, rows)])[1:]
        return Ragged(np.concatenate([np.zeros(0, dtype), *(np.asarray(row, dtype) for row in rows)]), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.values[self.ends[number - 1] if number else 0 : self.ends[number]]


@dataclass(frozen=True)
class PairTable:
    """Rows by numbers of texts. `keys` say which rows have the same positive, or the same label; of a labelled text the
    positive is drawn anew in every epoch among the others of its class.
    """

    texts: Ragged  # token ids
    anchors: np.ndarray
    positives: np.ndarray
    negatives: Ragged
    keys: np.ndarray
    is_labelled: bool

    def __len__(self) -> int:
        return len(self.anchors)


def training_rows(examples: Examples, min_score: float | None) -> tuple[list[Example], list[str]]:
    """The rows that make positive pairs, and notes on the others. Raises DataError when nothing can be told apart."""
    rows, kind, name, notes = examples.rows, examples.roles.kind, examples.name, []
    if kind == "scores":
        least = POSITIVE_SHARE * max(row.value for row in rows) if min_score is None else min_score
        kept = [row for row in rows if row.value >= least]
        notes = [f"{name}: {len(kept):,} of {len(rows):,} pairs have a score of at least {least:g} and are positives"]
        rows = kept
        if not rows:
            raise DataError(f"{name}: no score of at least {least:g}; lower contrastive.min_score")
    if kind == "labels":
        sizes = Counter(row.value for row in rows)
        if len(sizes) == 1:
            raise DataError(f"{name}: one class only, {next(iter(sizes))!r}; there is nothing to tell its texts from")
        kept = [row for row in rows if sizes[row.value] > 1]
        if alone := len(rows) - len(kept):
            notes = [f"{name}: {alone:,} texts are alone in their class and left out"]
        rows = kept
    keys = {row.value for row in rows} if kind == "labels" else {row.positive for row in rows}
    if len({row.anchor for row in rows}) < 2 or (len(keys) < 2 and not any(row.negatives for row in rows)):
        what = "classes of two texts or more" if kind == "labels" else "different texts"
        raise DataError(f"{name}: its {len(rows):,} rows have no two {what}, so there is nothing to tell apart")
    return rows, notes


def build_table(
    rows: list[Example], hf_tokenizer: Any, max_length: int, truncate: bool, name: str, show_bar: bool = False
) -> PairTable:
    """Rows with their texts tokenised. Raises DataError for longer texts where `truncate` is off."""
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    anchors = np.array([number(row.anchor) for row in rows])
    positives = np.array([number(row.positive) for row in rows])
    negatives = Ragged.of([[number(text) for text in row.negatives] for row in rows], np.int64)
    is_labelled = rows[0].value is not None and rows[0].anchor is rows[0].positive
    labels: dict[str, int] = {}
    keys = np.array([labels.setdefault(row.value, len(labels)) for row in rows]) if is_labelled else positives
    ids = encode_texts(hf_tokenizer, list(numbers), max_length, truncate, name, show_bar)
    return PairTable(Ragged.of(ids, np.int32), anchors, positives, negatives, keys, is_labelled)


def encode_texts(
    hf_tokenizer: Any, texts: list[str], max_length: int, truncate: bool, name: str, show_bar: bool = False
) -> list[Ids]:
    """Token ids with special tokens, at most `max_length`. Raises DataError for a longer text where `truncate` is off."""
    out: list[Ids] = []
    cut = {"truncation": True, "max_length": max_length} if truncate else {}
    begins = range(0, len(texts), TEXTS_AT_ONCE)
    for begin in tqdm(begins, f"tokenising {name}", unit_scale=TEXTS_AT_ONCE, disable=not show_bar, leave=False):
        encoded = hf_tokenizer(
            texts[begin : begin + TEXTS_AT_ONCE],
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            **cut,
        )["input_ids"]
        out += [np.array(ids, dtype=np.int32) for ids in encoded]
    if not truncate and (longest := max(map(len, out), default=0)) > max_length:
        text = texts[next(i for i, ids in enumerate(out) if len(ids) > max_length)]
        raise DataError(
            f"{name}: a text has {longest} tokens, at most {max_length} are allowed: {text[:40]!r}...; raise "
            "dataset.max_seq_length, or set tokenizer.truncation: true"
        )
    return out
