"""What rows of text mean to contrastive training: which columns are anchor and positive, text and label, two texts and a score.

`find_roles` reads it from the names of the columns, or from what the user says of them; `PAIR_SETS` knows public sets.
"""

from dataclasses import dataclass
from typing import Literal

from neobert.errors import DataError

Kind = Literal["pairs", "labels", "scores", "texts"]

# Kind -> roles that such a row needs.
NEEDED: dict[Kind, tuple[str, ...]] = {
    "pairs": ("anchor", "positive"), "scores": ("text1", "text2", "score"), "labels": ("text", "label"), "texts": ("text",),
}  # fmt: skip
ROLES = ("anchor", "positive", "negative", "text", "label", "text1", "text2", "score")

# Names of columns that are understood without being told, most specific first; all of a line have to be there.
USUAL: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("pairs", ("anchor", "positive")),
    ("pairs", ("query", "positive")),
    ("pairs", ("query", "pos")),
    ("pairs", ("query", "answer")),
    ("pairs", ("question", "answer")),
    ("scores", ("sentence1", "sentence2", "score")),
    ("scores", ("text1", "text2", "score")),
    ("scores", ("sentence1", "sentence2", "label")),
    ("pairs", ("sentence1", "sentence2")),
    ("pairs", ("text1", "text2")),
    ("labels", ("text", "label")),
    ("labels", ("sentence", "label")),
    ("texts", ("text",)),
)
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


@dataclass(frozen=True)
class PairSet:
    """A public set: its place on the hub, its configuration there, and the columns of its roles."""

    repository: str
    config: str | None
    columns: dict[str, str]


def _set(name: str, config: str | None, *columns: str) -> PairSet:
    roles = NEEDED["scores"] if columns[-1] == "score" else ("anchor", "positive", "negative")
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
    """What the rows with these columns are; `wanted` (role -> column) decides where it says something.

    Raises DataError naming `path` and what to set.
    """
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
        raise DataError(f"{key}: {', '.join(wanted)} do not make a row; {_ways()}")
    for kind, usual in USUAL:
        if set(usual) <= set(names):
            return _roles(kind, dict(zip(NEEDED[kind], usual, strict=True)), names, None)
    if len(names) == 1:
        return Roles("texts", {"text": names[0]})
    raise DataError(f"{key}: {there}, and none of the usual ones; say what they are: {_ways()}")


def _ways() -> str:
    return "; or ".join(", ".join(needed) for needed in NEEDED.values())


def _roles(kind: Kind, columns: dict[str, str], names: list[str], negative: str | None) -> Roles:
    if kind != "pairs":
        return Roles(kind, columns)
    if negative is not None:
        return Roles(kind, columns, (negative,))
    numbered = [name for name in names if name.startswith("negative_")]
    found = [name for name in names if name in NEGATIVES] + numbered
    return Roles(kind, columns, tuple(name for name in found if name not in columns.values()))
