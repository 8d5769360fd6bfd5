"""Rows of contrastive training, read from files into memory, and what they are: anchor and positive, text and label, two texts
and a score. `find_roles` tells by the names of the columns, or by what the user says; `PAIR_SETS` knows public sets. A text
that occurs several times is kept and tokenised once, and its number says whether two texts are the same.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from neobert.data.files.documents import SkippedRows
from neobert.data.files.rows import Unusable, first_with_columns, place, records, why_no_text
from neobert.data.files.splits import Choice, slice_bounds
from neobert.data.hashing import draw_share
from neobert.data.tokenizer import Ids
from neobert.errors import DataError

POSITIVE_SHARE = 0.8  # of the highest score: from here on two texts are a positive pair
TEXTS_AT_ONCE = 4096

# --- columns -----------

Kind = Literal["pairs", "labels", "scores", "texts"]

# Kind -> roles that such a row needs.
NEEDED: dict[Kind, tuple[str, ...]] = {
    "pairs": ("anchor", "positive"), "scores": ("text1", "text2", "score"), "labels": ("text", "label"), "texts": ("text",),
}  # fmt: skip
WAYS = "; or ".join(", ".join(needed) for needed in NEEDED.values())
ROLES = ("anchor", "positive", "negative", "text", "label", "text1", "text2", "score")

# Names of columns that are understood by themselves, most specific first; all of a line have to be there.
USUAL: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("pairs", ("anchor", "positive")), ("pairs", ("query", "positive")), ("pairs", ("query", "pos")),
    ("pairs", ("query", "answer")), ("pairs", ("question", "answer")),
    ("scores", ("sentence1", "sentence2", "score")), ("scores", ("text1", "text2", "score")),
    ("scores", ("sentence1", "sentence2", "label")), ("pairs", ("sentence1", "sentence2")), ("pairs", ("text1", "text2")),
    ("labels", ("text", "label")), ("labels", ("sentence", "label")), ("texts", ("text",)),
)  # fmt: skip
NEGATIVES = ("negative", "negatives", "neg")  # and negative_1, negative_2, ...


@dataclass(frozen=True)
class Roles:
    """What a source's rows are, and the column of every role; `negatives` may be several columns."""

    kind: Kind
    columns: dict[str, str]
    negatives: tuple[str, ...] = ()

    @property
    def describe(self) -> str:
        """As `anchor -> title, positive -> body`."""
        found = {**self.columns, **({"negative": ", ".join(self.negatives)} if self.negatives else {})}
        return ", ".join(role if role == column else f"{role} = {column}" for role, column in found.items())


class PairSet(NamedTuple):
    """A public set: its name on the hub, its configuration there, and the columns of its roles."""

    repository: str
    config: str | None
    columns: dict[str, str]


def _set(name: str, config: str | None, *columns: str) -> PairSet:
    roles = NEEDED["scores"] if columns[-1] == "score" else ROLES
    return PairSet(f"sentence-transformers/{name}", config, dict(zip(roles, columns, strict=False)))


PAIR_SETS: dict[str, PairSet] = {
    "all-nli": _set("all-nli", "triplet", "anchor", "positive", "negative"),
    "altlex": _set("altlex", None, "text", "simplified"),
    "agnews": _set("agnews", None, "title", "description"),
    "amazon-qa": _set("amazon-qa", None, "query", "answer"),
    "ccnews": _set("ccnews", None, "title", "article"),
    "coco-captions": _set("coco-captions", None, "caption1", "caption2"),
    "codesearchnet": _set("codesearchnet", None, "comment", "code"),
    "eli5": _set("eli5", None, "question", "answer"),
    "flickr30k-captions": _set("flickr30k-captions", None, "caption1", "caption2"),
    "gooaq": _set("gooaq", None, "question", "answer"),
    "hotpotqa": _set("hotpotqa", "triplet", "anchor", "positive", "negative"),
    "msmarco": _set("msmarco-bm25", "triplet", "query", "positive", "negative"),
    "natural-questions": _set("natural-questions", None, "query", "answer"),
    "npr": _set("npr", None, "title", "body"),
    "paq": _set("paq", None, "query", "answer"),
    "quora-duplicates": _set("quora-duplicates", "triplet", "anchor", "positive", "negative"),
    "s2orc": _set("s2orc", "title-abstract-pair", "title", "abstract"),
    "sentence-compression": _set("sentence-compression", None, "text", "simplified"),
    "simple-wiki": _set("simple-wiki", None, "text", "simplified"),
    "specter": _set("specter", "triplet", "anchor", "positive", "negative"),
    "squad": _set("squad", None, "question", "answer"),
    "stackexchange-duplicates": _set("stackexchange-duplicates", "title-title-pair", "title1", "title2"),
    "stsb": _set("stsb", None, "sentence1", "sentence2", "score"),
    "trivia-qa": _set("trivia-qa", None, "query", "answer"),
    "wikihow": _set("wikihow", None, "summary", "text"),
    "xsum": _set("xsum", None, "summary", "article"),
}


def find_roles(names: list[str], wanted: dict[str, str], path: str, key: str = "dataset.columns") -> Roles:
    """What the rows with these columns are; `wanted` (role -> column) decides where it says something. Raises DataError."""
    there = f"{path} has the columns {', '.join(names)}"
    for role, column in wanted.items():
        if role not in ROLES:
            raise DataError(f"{key}: no role {role!r}; there are: {', '.join(ROLES)}")
        if column not in names:
            raise DataError(f"{key}: {role}: no column {column!r}; {there}")
    if wanted:
        for kind, needed in NEEDED.items():
            if set(needed) <= set(wanted) and not set(wanted) - set(needed) - {"negative"}:
                return _roles(kind, {role: wanted[role] for role in needed}, names, wanted.get("negative"))
        raise DataError(f"{key}: {', '.join(wanted)} do not make a row; {WAYS}")
    for kind, usual in USUAL:
        if set(usual) <= set(names):
            return _roles(kind, dict(zip(NEEDED[kind], usual, strict=True)), names, None)
    if len(names) == 1:
        return Roles("texts", {"text": names[0]})
    raise DataError(f"{key}: {there}, and none of the usual ones; say what they are: {WAYS}")


def _roles(kind: Kind, columns: dict[str, str], names: list[str], negative: str | None) -> Roles:
    found = [name for name in names if name in NEGATIVES] + [name for name in names if name.startswith("negative_")]
    found = [name for name in found if name not in columns.values()] if negative is None else [negative]
    return Roles(kind, columns, tuple(found) if kind == "pairs" else ())


# --- rows of files -----------


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
        if len(self.rows) < 2:
            raise DataError(f"dataset.validation_split: {self.name} has one row, which cannot be split")
        drawn = draw_share(len(self.rows), share, seed)
        rest, held = (replace(self, rows=[self.rows[number] for number in numbers]) for numbers in drawn)
        return rest, held

    def first(self, most: int | None) -> "Examples":
        """The first rows; None: all of them."""
        return replace(self, rows=self.rows[:most])


def read_examples(
    splits: dict[str, list[str]], chosen: Choice, roles: Roles, name: str, skips: SkippedRows
) -> Examples:
    """The rows of a split, or of a slice of it. Raises DataError with `name`, also when none can be used."""
    split, begin, end = chosen
    rows = [example for path in splits[split] for example in _read_file(path, roles, skips)]
    if (begin, end) != (None, None):
        first, last = slice_bounds(begin, end, len(rows), name)
        rows = rows[first:last]
    if not rows:
        why = "; ".join(f"{number:,} {reason}, first {skips.first[reason]}" for reason, number in skips.counts.items())
        raise DataError(f"{name}: no row that can be used{f': {why}' if why else ''}")
    return Examples(roles, rows, name)


def roles_of(paths: list[str], wanted: dict[str, str], key: str) -> Roles:
    """What the rows of all files are. Raises DataError."""
    first, columns = first_with_columns(paths)
    return find_roles(list(columns), wanted, first, key)


def _read_file(path: str, roles: Roles, skips: SkippedRows) -> Iterator[Example]:
    for row, offset in records(path):
        for found in [row] if isinstance(row, Unusable) else _examples(row, roles, path, offset):
            if isinstance(found, Unusable):
                skips.add(found)
            else:
                yield found


def _examples(row: dict[str, Any], roles: Roles, path: str, offset: int) -> Iterator[Example | Unusable]:
    """The examples of a row, one for each of its positives, or why there is none. Raises DataError for a label or score."""
    if missing := [column for column in roles.columns.values() if column not in row]:
        yield Unusable(f"no column {missing[0]!r}", path, offset)
        return
    cells = {role: row[column] for role, column in roles.columns.items()}
    if roles.kind == "pairs":
        negatives = [text for column in roles.negatives for text in _texts(row.get(column))]
        for positive in _texts(cells["positive"]) or [None]:
            texts = [("anchor", cells["anchor"]), ("positive", positive), *(("negative", text) for text in negatives)]
            reason = _why_unusable(texts)
            yield Unusable(reason, path, offset) if reason else Example(cells["anchor"], positive, tuple(negatives))
    elif reason := _why_unusable([(role, cell) for role, cell in cells.items() if role.startswith("text")]):
        yield Unusable(reason, path, offset)
    elif roles.kind == "scores":
        score, column = _number(cells["score"]), roles.columns["score"]
        if score is None or not math.isfinite(score):
            raise DataError(f"{place(path, offset)}: {column} is {cells['score']!r}, and a score is a number")
        yield Example(cells["text1"], cells["text2"], (), score)
    else:
        label = _label(cells["label"], roles.columns["label"], path, offset) if roles.kind == "labels" else None
        yield Example(cells["text"], cells["text"], (), label)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _label(value: Any, column: str, path: str, offset: int) -> str:
    """A class as text. Raises DataError for what is no class."""
    number = None if isinstance(value, bool) else _number(value)
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


def _why_unusable(texts: list[tuple[str, Any]]) -> str:
    """Why the first text, by role, that cannot be used cannot, or nothing."""
    for role, text in texts:
        if reason := why_no_text(text):
            return {"no text": f"without {role}", "not text": f"whose {role} is not text"}.get(reason, reason)
    return ""


# --- rows to train on -----------


@dataclass(frozen=True)
class Ragged:
    """Arrays of different lengths, one after the other."""

    values: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(rows: Sequence[Sequence[int] | np.ndarray], dtype: type) -> "Ragged":
        ends = np.cumsum([0, *map(len, rows)])[1:]
        return Ragged(np.concatenate([np.zeros(0, dtype), *(np.asarray(row, dtype) for row in rows)]), ends)

    def pick(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The arrays with these numbers."""
        return [self.values[self.ends[number - 1] if number else 0 : self.ends[number]] for number in numbers]


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
    """The rows that make positive pairs, and messages on the others. Raises DataError when nothing can be told apart."""
    rows, kind, name, messages = examples.rows, examples.roles.kind, examples.name, []
    if kind == "scores":
        least = POSITIVE_SHARE * max(row.value for row in rows) if min_score is None else min_score
        kept = [row for row in rows if row.value >= least]
        counts = f"{len(kept):,} of {len(rows):,}"
        messages = [f"{name}: {counts} pairs have a score of at least {least:g} and are positives"]
        rows = kept
        if not rows:
            raise DataError(f"{name}: no score of at least {least:g}; lower contrastive.min_score")
    if kind == "labels":
        sizes = Counter(row.value for row in rows)
        if len(sizes) == 1:
            raise DataError(f"{name}: one class only, {next(iter(sizes))!r}; there is nothing to tell its texts from")
        kept = [row for row in rows if sizes[row.value] > 1]
        if alone := len(rows) - len(kept):
            messages = [f"{name}: {alone:,} texts are alone in their class and left out"]
        rows = kept
    keys = {row.value for row in rows} if kind == "labels" else {row.positive for row in rows}
    if len({row.anchor for row in rows}) < 2 or (len(keys) < 2 and not any(row.negatives for row in rows)):
        what = "classes of two texts or more" if kind == "labels" else "different texts"
        raise DataError(f"{name}: its {len(rows):,} rows have no two {what}, so there is nothing to tell apart")
    return rows, messages


def build_table(rows: list[Example], encode: Callable[[list[str]], list[Ids]]) -> PairTable:
    """Rows with their texts as the token ids that `encode` gives."""
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    anchors = np.array([number(row.anchor) for row in rows])
    positives = np.array([number(row.positive) for row in rows])
    negatives = Ragged.of([[number(text) for text in row.negatives] for row in rows], np.int64)
    is_labelled = rows[0].value is not None and rows[0].anchor is rows[0].positive
    labels: dict[str, int] = {}
    keys = np.array([labels.setdefault(row.value, len(labels)) for row in rows]) if is_labelled else positives
    return PairTable(Ragged.of(encode(list(numbers)), np.int32), anchors, positives, negatives, keys, is_labelled)


def encode_texts(
    hf_tokenizer: Any, texts: list[str], max_length: int, truncate: bool, name: str, show_bar: bool = False
) -> list[Ids]:
    """Token ids with special tokens, at most `max_length`. Raises DataError for a longer text where `truncate` is off."""
    out: list[Ids] = []
    cut = {"truncation": True, "max_length": max_length} if truncate else {}
    begins = range(0, len(texts), TEXTS_AT_ONCE)
    for begin in tqdm(begins, f"tokenising {name}", unit_scale=TEXTS_AT_ONCE, disable=not show_bar, leave=False):
        some = texts[begin : begin + TEXTS_AT_ONCE]
        encoded = hf_tokenizer(some, padding=False, return_attention_mask=False, return_token_type_ids=False, **cut)
        out += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    if not truncate and (longest := max(map(len, out), default=0)) > max_length:
        text = texts[next(i for i, ids in enumerate(out) if len(ids) > max_length)]
        raise DataError(
            f"{name}: a text has {longest} tokens, at most {max_length} are allowed: {text[:40]!r}...; raise "
            "dataset.max_seq_length, or set tokenizer.truncation: true"
        )
    return out
