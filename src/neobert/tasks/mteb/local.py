"""Folders of jsonl as MTEB tasks, so that models are evaluated on one's own data by the library's own code.

Each folder below `mteb_local_tasks` is a task of that name. Its type follows from its files and columns:

| type | files | columns |
|---|---|---|
| classification | train.jsonl, test.jsonl | text, label |
| clustering | test.jsonl alone | text, label |
| sts | test.jsonl | sentence1, sentence2, score |
| pair_classification | test.jsonl | sentence1, sentence2, label (0 or 1) |
| reranking | test.jsonl | query, positive (texts), negative (texts) |
| retrieval | corpus.jsonl, queries.jsonl, qrels.jsonl | id, text (and title); id, text; query_id, document_id (and score) |

A file task.yaml may say `type`, `description`, `languages` (as eng-Latn) and `prompt` instead.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata

from neobert.data.files.rows import is_utf8, place, usable_records, why_no_text
from neobert.errors import DataError
from neobert.tasks.mteb.tasks import LOCAL

Row = dict[str, Any]
SPLIT = "test"
TASK_FILE = "task.yaml"


class _Local:
    """Data is put in when the task is made."""

    def load_data(self, *_: Any, **__: Any) -> None:
        """Nothing: it is there."""

    def unload_data(self) -> None:
        """Nothing: it would be gone."""


class _Classification(_Local, AbsTaskClassification): ...


class _Clustering(_Local, AbsTaskClustering):
    input_column_name = "text"
    label_column_name = "label"


class _STS(_Local, AbsTaskSTS): ...


class _PairClassification(_Local, AbsTaskPairClassification):
    label_column_name = "label"


class _Retrieval(_Local, AbsTaskRetrieval): ...


@dataclass(frozen=True)
class Kind:
    """A type of task: its name in MTEB, its score, its class, and how its data is read."""

    name: str
    mteb_type: str
    main_score: str
    base: type[Any]
    read: Callable[[Path], Any]


def find_local_tasks(folder: str) -> list[AbsTask]:
    """The tasks below a folder, by name. Raises DataError naming file and row."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"mteb_local_tasks: no folder at {folder!r}")
    found = [build_task(path) for path in sorted(root.iterdir()) if path.is_dir() and any(path.glob("*.jsonl"))]
    if not found:
        raise DataError(f"mteb_local_tasks: no task in {folder}; a task is a folder with test.jsonl or corpus.jsonl")
    return found


def build_task(folder: Path) -> AbsTask:
    """The task in a folder, with its data. Raises DataError."""
    settings = _read_settings(folder)
    kind = KINDS[settings["type"]] if "type" in settings else _kind_of(folder)
    data = kind.read(folder)
    metadata = TaskMetadata(
        name=folder.name,
        description=settings.get("description", f"{kind.name} on {folder.name}"),
        type=kind.mteb_type,  # type: ignore[arg-type]
        category="t2c" if kind.name in ("classification", "clustering") else "t2t",
        dataset={"path": f"{LOCAL}{folder.name}", "revision": _revision(folder)},
        eval_splits=[SPLIT],
        eval_langs=settings.get("languages", ["eng-Latn"]),
        main_score=kind.main_score,
        prompt=settings.get("prompt"),
    )
    made = type(folder.name, (kind.base,), {"metadata": metadata, **_range_of(kind, data)})()
    made.dataset, made.data_loaded = data, True
    return made


def _revision(folder: Path) -> str:
    """A hash of the task's files."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob(TASK_FILE)]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _range_of(kind: Kind, data: Any) -> dict[str, Any]:
    """STS normalises scores by their range, which changes no correlation; it only has to be one."""
    if kind.name != "sts":
        return {}
    scores = data[SPLIT]["score"]
    return {"min_score": math.floor(min(scores)), "max_score": max(math.ceil(max(scores)), math.floor(min(scores)) + 1)}


def _read_settings(folder: Path) -> Row:
    path = folder / TASK_FILE
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    known = {"type", "description", "languages", "prompt"}
    if not isinstance(settings, dict) or (unknown := set(settings) - known):
        what = f"unknown: {', '.join(sorted(unknown))}" if isinstance(settings, dict) else "not a mapping"
        raise DataError(f"{path}: {what}; a task has {', '.join(sorted(known))}")
    if settings.get("type", next(iter(KINDS))) not in KINDS:
        raise DataError(f"{path}: type {settings['type']!r}; there are: {', '.join(KINDS)}")
    return settings


def _kind_of(folder: Path) -> Kind:
    if (folder / "corpus.jsonl").is_file():
        return KINDS["retrieval"]
    columns = set(read_rows(folder / f"{SPLIT}.jsonl", ())[0])
    if {"query", "positive", "negative"} <= columns:
        return KINDS["reranking"]
    if {"sentence1", "sentence2"} <= columns and columns & {"score", "label"}:
        return KINDS["sts" if "score" in columns else "pair_classification"]
    if {"text", "label"} <= columns:
        return KINDS["classification" if (folder / "train.jsonl").is_file() else "clustering"]
    raise DataError(
        f"{folder / SPLIT}.jsonl: columns {', '.join(sorted(columns))} are those of no task; there are: text, label; "
        "sentence1, sentence2, score or label; query, positive, negative"
    )


# --- reading -----------


def read_rows(path: Path, texts: tuple[str, ...], others: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a jsonl file, each with texts in the columns `texts`, and something in `others`. Raises DataError naming file
    and row.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing")
    rows = []
    for row, begin in usable_records(str(path)):
        if missing := [column for column in (*texts, *others) if row.get(column) is None]:
            raise DataError(f"{place(str(path), begin)}: no {', '.join(missing)}")
        for column in texts:
            if not isinstance(row[column], str) or not is_utf8(row[column]):
                raise DataError(f"{place(str(path), begin)}: {column} is {row[column]!r}, not a text")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _columns(path: Path, texts: tuple[str, ...], value: str) -> Dataset:
    """Text columns and one more, as a data set."""
    rows = read_rows(path, texts, (value,))
    return Dataset.from_dict({column: [row[column] for row in rows] for column in (*texts, value)})


def _read_classification(folder: Path) -> DatasetDict:
    return DatasetDict({split: _columns(folder / f"{split}.jsonl", ("text",), "label") for split in ("train", SPLIT)})


def _read_clustering(folder: Path) -> DatasetDict:
    return DatasetDict({SPLIT: _columns(folder / f"{SPLIT}.jsonl", ("text",), "label")})


def _read_pairs(value: str, is_valid: Callable[[Any], bool], what: str) -> Callable[[Path], DatasetDict]:
    def read(folder: Path) -> DatasetDict:
        path = folder / f"{SPLIT}.jsonl"
        data = _columns(path, ("sentence1", "sentence2"), value)
        for number, found in enumerate(data[value], 1):
            if not is_valid(found):
                raise DataError(f"{path}, row {number}: {value} is {found!r}, not {what}")
        return DatasetDict({SPLIT: data})

    return read


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_retrieval(folder: Path) -> dict[str, dict[str, Any]]:
    documents = read_rows(folder / "corpus.jsonl", ("text",), ("id",))
    queries = read_rows(folder / "queries.jsonl", ("text",), ("id",))
    known = {"document_id": {str(row["id"]) for row in documents}, "query_id": {str(row["id"]) for row in queries}}
    relevant: dict[str, dict[str, int]] = {}
    path = folder / "qrels.jsonl"
    for number, row in enumerate(read_rows(path, (), ("query_id", "document_id")), 1):
        for column, ids in known.items():
            if str(row[column]) not in ids:
                raise DataError(f"{path}, row {number}: {column} {row[column]!r} is not in the texts")
        relevant.setdefault(str(row["query_id"]), {})[str(row["document_id"])] = int(row.get("score", 1))
    asked = [row for row in queries if str(row["id"]) in relevant]
    return _retrieval_data(documents, asked, relevant, None)


def _read_reranking(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / f"{SPLIT}.jsonl"
    documents, queries, relevant, ranked = [], [], {}, {}
    for number, row in enumerate(read_rows(path, ("query",), ("positive", "negative"))):
        query, candidates = str(number), []
        for column, score in (("positive", 1), ("negative", 0)):
            if not isinstance(row[column], list) or not row[column] or any(map(why_no_text, row[column])):
                raise DataError(f"{path}, row {number + 1}: {column} is not a list of texts")
            candidates += [(f"{number}-{column}-{i}", text, score) for i, text in enumerate(row[column])]
        documents += [{"id": name, "text": text} for name, text, _ in candidates]
        queries.append({"id": query, "text": row["query"]})
        relevant[query] = {name: score for name, _, score in candidates}
        ranked[query] = [name for name, _, _ in candidates]
    return _retrieval_data(documents, queries, relevant, ranked)


def _retrieval_data(
    documents: list[Row], queries: list[Row], relevant: dict[str, dict[str, int]], ranked: dict[str, list[str]] | None
) -> dict[str, dict[str, Any]]:
    corpus = [{"id": str(row["id"]), "title": row.get("title") or "", "text": row["text"]} for row in documents]
    asked = [{"id": str(row["id"]), "text": row["text"]} for row in queries]
    data = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(asked)}
    return {"default": {SPLIT: {**data, "relevant_docs": relevant, "top_ranked": ranked}}}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("classification", "Classification", "accuracy", _Classification, _read_classification),
        Kind("clustering", "Clustering", "v_measure", _Clustering, _read_clustering),
        Kind("pair_classification", "PairClassification", "max_ap", _PairClassification,
             _read_pairs("label", lambda value: value in (0, 1), "0 or 1")),
        Kind("reranking", "Reranking", "map_at_1000", _Retrieval, _read_reranking),
        Kind("retrieval", "Retrieval", "ndcg_at_10", _Retrieval, _read_retrieval),
        Kind("sts", "STS", "cosine_spearman", _STS, _read_pairs("score", _is_number, "a number")),
    )
}  # fmt: skip
