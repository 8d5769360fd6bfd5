"""Which MTEB tasks a configuration names, what to do with results and data that are not there, and tasks of one's own data.

Each folder of jsonl below `mteb_local_tasks` is a task of that name, which the library's own code evaluates. Its type follows
from its files and columns:

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

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mteb
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

from neobert.data.files.rows import Row, place, text_in, usable_records, why_no_text
from neobert.errors import ConfigError, DataError, Problem, first_line, print_notes

ENGLISH = "MTEB(eng, v1)"  # the 56 tasks of the original leaderboard, which the reference and its paper evaluate
LOCAL = "local/"  # what names of the data of local tasks begin with
SPLIT, TASK_FILE = "test", "task.yaml"
TYPES = {
    "classification": "Classification",
    "clustering": "Clustering",
    "pair_classification": "PairClassification",
    "reranking": "Reranking",
    "retrieval": "Retrieval",
    "sts": "STS",
    "summarization": "Summarization",
}


def choose_tasks(chosen: str, local: str | None) -> list[AbsTask]:
    """`all`, a type, names separated by commas, or a benchmark; among the tasks of `local`, where that is set.

    Raises ConfigError with what there is.
    """
    own = find_local_tasks(local) if local is not None else []
    if chosen == "all" or chosen in TYPES:
        tasks = own if local is not None else list(mteb.get_benchmark(ENGLISH).tasks)
        found = [task for task in tasks if chosen == "all" or task.metadata.type == TYPES[chosen]]
        if not found:
            problem = f"{chosen}: no such task in {local}; there are: {', '.join(_names(own))}"
            raise ConfigError(Problem("mteb_task_type", problem))
        return found
    with suppress(KeyError):
        return list(mteb.get_benchmark(chosen).tasks)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return [_named(name, own) for name in names or [chosen]]


def _named(name: str, own: list[AbsTask]) -> AbsTask:
    for task in own:
        if task.metadata.name == name:
            return task
    with suppress(KeyError):
        return mteb.get_task(name)
    hint = _near(name, [*TYPES, *_names(own), *(benchmark.name for benchmark in mteb.get_benchmarks())])
    there = ", ".join(["all", *TYPES, *_names(own), "names of tasks as STS12"])
    problem = f"no task, type or benchmark {name!r}{hint or '.'} There are: {there}, and benchmarks as {ENGLISH}"
    raise ConfigError(Problem("mteb_task_type", problem))


def _names(tasks: list[AbsTask]) -> list[str]:
    return [task.metadata.name for task in tasks]


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_prompts(prompts: dict[str, str], tasks: list[AbsTask]) -> None:
    """Raises ConfigError for a prompt that no text would ever get."""
    names = {*_names(tasks), *(task.metadata.type for task in tasks)}
    known = {"query", "document", *names, *(f"{name}-{side}" for name in names for side in ("query", "document"))}
    problems = [
        Problem(
            f"mteb_prompts.{name}", f"names no task that runs{_near(name, sorted(known))}; types are as {TYPES['sts']}"
        )
        for name in prompts
        if name not in known
    ]
    if problems:
        raise ConfigError(*problems)


def drop_unusable(path: Path, task: AbsTask) -> None:
    """Delete a result that was cut off in the middle of writing, or that belongs to other data: its task runs again.

    The library keeps results of tasks whose data has changed when no split is missing; of local tasks data does change.
    """
    if not path.is_file():
        return
    dataset, reason = task.metadata.dataset, ""
    try:
        found = json.loads(path.read_text()).get("dataset_revision")
    except ValueError:
        reason = "was cut off"
    else:
        if dataset["path"].startswith(LOCAL) and found != dataset["revision"]:
            reason = "is of other data"
    if reason:
        print_notes([f"{path} {reason}; its task runs again"])
        path.unlink()


def network_errors() -> tuple[type[Exception], ...]:
    """What loading a task's data raises when the hub cannot be reached, or does not have it (for us)."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    from_hub = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return (ConnectionError, FileNotFoundError, DatasetsError, *from_hub)


def reason_of(error: Exception) -> str:
    """Why a task did not run, in one line."""
    return f"its data is not on this machine, and the hub was not reached: {first_line(error)}"


# --- tasks of one's own data -----------


@dataclass(frozen=True)
class Kind:
    """How a type of task is made: its main score, its class in the library with attributes, and how its data is read."""

    main_score: str
    base: type[AbsTask]
    read: Callable[[Path], Any]
    attributes: dict[str, Any] = field(default_factory=dict)


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
    name = settings.get("type") or _kind_of(folder)
    kind, digest = KINDS[name], hashlib.sha256()
    data = kind.read(folder)
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob(TASK_FILE)]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    metadata = TaskMetadata(
        name=folder.name,
        description=settings.get("description", f"{name} on {folder.name}"),
        type=TYPES[name],  # type: ignore[arg-type]
        category="t2c" if name in ("classification", "clustering") else "t2t",
        dataset={"path": f"{LOCAL}{folder.name}", "revision": digest.hexdigest()[:16]},
        eval_splits=[SPLIT],
        eval_langs=settings.get("languages", ["eng-Latn"]),
        main_score=kind.main_score,
        prompt=settings.get("prompt"),
    )
    attributes = {"metadata": metadata, **kind.attributes}
    if name == "sts":  # scores are normalised by their range, which changes no correlation; it only has to be one
        scores = data[SPLIT]["score"]
        low = math.floor(min(scores))
        attributes |= {"min_score": low, "max_score": max(math.ceil(max(scores)), low + 1)}
    made: Any = type(folder.name, (_Local, kind.base), attributes)()
    made.dataset, made.data_loaded = data, True
    return cast(AbsTask, made)


class _Local:
    """A task whose data is put in when it is made: there is nothing to load, and unloading would lose it."""

    def load_data(self, *_: Any, **__: Any) -> None: ...

    def unload_data(self) -> None: ...


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


def _kind_of(folder: Path) -> str:
    """The type of a task by its files and columns."""
    if (folder / "corpus.jsonl").is_file():
        return "retrieval"
    columns = set(read_rows(folder / f"{SPLIT}.jsonl", ())[0])
    if {"query", "positive", "negative"} <= columns:
        return "reranking"
    if {"sentence1", "sentence2"} <= columns and columns & {"score", "label"}:
        return "sts" if "score" in columns else "pair_classification"
    if {"text", "label"} <= columns:
        return "classification" if (folder / "train.jsonl").is_file() else "clustering"
    raise DataError(
        f"{folder / SPLIT}.jsonl: columns {', '.join(sorted(columns))} are those of no task; there are: text, label; "
        "sentence1, sentence2, score or label; query, positive, negative"
    )


def read_rows(path: Path, texts: tuple[str, ...], others: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a jsonl file, each with texts in the columns `texts`, and something in `others`. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: missing")
    rows = []
    for row, begin in usable_records(str(path)):
        if missing := [column for column in (*texts, *others) if row.get(column) is None]:
            raise DataError(f"{place(str(path), begin)}: no {', '.join(missing)}")
        for column in texts:
            text_in(row, column, str(path), begin)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _read_labelled(folder: Path, *splits: str) -> DatasetDict:
    return DatasetDict({split: _read_columns(folder / f"{split}.jsonl", ("text",), "label") for split in splits})


def _read_columns(path: Path, texts: tuple[str, ...], value: str) -> Dataset:
    """Text columns and one more, as a data set."""
    rows = read_rows(path, texts, (value,))
    return Dataset.from_dict({column: [row[column] for row in rows] for column in (*texts, value)})


def _read_pairs(folder: Path, value: str, is_valid: Callable[[Any], bool], what: str) -> DatasetDict:
    path = folder / f"{SPLIT}.jsonl"
    data = _read_columns(path, ("sentence1", "sentence2"), value)
    for number, found in enumerate(data[value], 1):
        if not is_valid(found):
            raise DataError(f"{path}, row {number}: {value} is {found!r}, not {what}")
    return DatasetDict({SPLIT: data})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_retrieval(folder: Path) -> dict[str, dict[str, Any]]:
    documents, queries = (read_rows(folder / f"{name}.jsonl", ("text",), ("id",)) for name in ("corpus", "queries"))
    known = {"document_id": {str(row["id"]) for row in documents}, "query_id": {str(row["id"]) for row in queries}}
    relevant: dict[str, dict[str, int]] = {}
    path = folder / "qrels.jsonl"
    for number, row in enumerate(read_rows(path, (), ("query_id", "document_id")), 1):
        for column, ids in known.items():
            if str(row[column]) not in ids:
                raise DataError(f"{path}, row {number}: {column} {row[column]!r} is not in the texts")
        relevant.setdefault(str(row["query_id"]), {})[str(row["document_id"])] = int(row.get("score", 1))
    return _retrieval_data(documents, [row for row in queries if str(row["id"]) in relevant], relevant)


def _read_reranking(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / f"{SPLIT}.jsonl"
    documents, queries, relevant = [], [], {}
    for number, row in enumerate(read_rows(path, ("query",), ("positive", "negative"))):
        scores = {}
        for column, score in (("positive", 1), ("negative", 0)):
            if not isinstance(row[column], list) or not row[column] or any(map(why_no_text, row[column])):
                raise DataError(f"{path}, row {number + 1}: {column} is not a list of texts")
            for i, text in enumerate(row[column]):
                documents.append({"id": f"{number}-{column}-{i}", "text": text})
                scores[documents[-1]["id"]] = score
        queries.append({"id": str(number), "text": row["query"]})
        relevant[str(number)] = scores
    return _retrieval_data(documents, queries, relevant, {query: list(scores) for query, scores in relevant.items()})


def _retrieval_data(
    documents: list[Row],
    queries: list[Row],
    relevant: dict[str, dict[str, int]],
    ranked: dict[str, list[str]] | None = None,
) -> dict[str, dict[str, Any]]:
    corpus = [{"id": str(row["id"]), "title": row.get("title") or "", "text": row["text"]} for row in documents]
    asked = [{"id": str(row["id"]), "text": row["text"]} for row in queries]
    data = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(asked)}
    return {"default": {SPLIT: {**data, "relevant_docs": relevant, "top_ranked": ranked}}}


KINDS = {
    "classification": Kind("accuracy", AbsTaskClassification, lambda folder: _read_labelled(folder, "train", SPLIT)),
    "clustering": Kind(
        "v_measure", AbsTaskClustering, lambda folder: _read_labelled(folder, SPLIT),
        {"input_column_name": "text", "label_column_name": "label"},
    ),
    "pair_classification": Kind(
        "max_ap", AbsTaskPairClassification,
        lambda folder: _read_pairs(folder, "label", lambda value: value in (0, 1), "0 or 1"),
        {"label_column_name": "label"},
    ),
    "reranking": Kind("map_at_1000", AbsTaskRetrieval, _read_reranking),
    "retrieval": Kind("ndcg_at_10", AbsTaskRetrieval, _read_retrieval),
    "sts": Kind("cosine_spearman", AbsTaskSTS, lambda folder: _read_pairs(folder, "score", _is_number, "a number")),
}  # fmt: skip
