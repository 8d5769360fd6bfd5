"""What the MTEB library gets from us: a model, the tasks that a configuration names, and tasks of one's own data.

Each folder of jsonl below `mteb_local_tasks` is a task of that name, which the library's own code evaluates. Its type follows
from its files and columns (docs/evaluation.md has the table), unless a file task.yaml says `type`; that may also say
`description`, `languages` (as eng-Latn) and `prompt`.
"""

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mteb
import numpy as np
import yaml
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mteb import AbsTask, abstasks
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from tqdm import tqdm

from neobert.data.files.rows import Row, place, text_in, usable_records, why_no_text
from neobert.errors import ConfigError, DataError, Problem, print_notes
from neobert.files import sha256
from neobert.inference.embed import Embedder

ENGLISH = "MTEB(eng, v1)"  # the 56 tasks of the original leaderboard, which the reference and its paper evaluate
LOCAL = "local/"  # what names of the data of local tasks begin with
SPLIT, TASK_FILE = "test", "task.yaml"
# What loading a task's data raises when the hub cannot be reached, or does not have it (for us).
NETWORK_ERRORS = (
    ConnectionError, FileNotFoundError, DatasetsError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A type of task: its name, main score and class in the library, the columns of its rows, attributes of the class."""

    type_name: str
    main_score: str
    base: type[AbsTask]
    columns: tuple[str, ...] = ()
    attributes: dict[str, str] = field(default_factory=dict)


KINDS = {
    "classification": Kind("Classification", "accuracy", abstasks.AbsTaskClassification, ("text", "label")),
    "clustering": Kind(
        "Clustering", "v_measure", abstasks.AbsTaskClustering, ("text", "label"),
        {"input_column_name": "text", "label_column_name": "label"},
    ),
    "pair_classification": Kind(
        "PairClassification", "max_ap", abstasks.AbsTaskPairClassification, ("sentence1", "sentence2", "label"),
        {"label_column_name": "label"},
    ),
    "reranking": Kind("Reranking", "map_at_1000", abstasks.AbsTaskRetrieval, ("query", "positive", "negative")),
    "retrieval": Kind("Retrieval", "ndcg_at_10", abstasks.AbsTaskRetrieval),
    "sts": Kind("STS", "cosine_spearman", abstasks.AbsTaskSTS, ("sentence1", "sentence2", "score")),
}  # fmt: skip
TYPES = {name: kind.type_name for name, kind in KINDS.items()} | {"summarization": "Summarization"}


# --- the model -----------


class EncoderForMTEB(AbsEncoder):
    """`embedder` as an encoder of the library, called `name`; `settings` are what scores depend on besides weights.

    Its prompts are by task name, type of task, or `query` and `document`, as MTEB chooses among them. Texts of a task come at
    once and are sorted by length, so nothing is spent on padding.
    """

    def __init__(self, name: str, settings: dict[str, Any], embedder: Embedder):
        self.embedder, self.prompts, self.model = embedder, settings["prompts"], embedder.model
        # The revision names weights and settings, so that results of others are not mixed in.
        identity = weights_identity(embedder.settings.folder)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        unknown: dict[str, Any] = dict.fromkeys(
            ("loader", "release_date", "languages", "memory_usage_mb", "license", "open_weights", "public_training_code",
             "public_training_data", "training_datasets")
        )  # fmt: skip
        self.mteb_model_meta = ModelMeta(
            name=name,
            revision=f"{identity[:12]}-{digest[:8]}",
            n_parameters=sum(parameter.numel() for parameter in embedder.model.parameters()),
            max_tokens=embedder.max_length,
            embed_dim=embedder.width,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction(embedder.settings.similarity),
            use_instructions=bool(self.prompts),
            **unknown,
        )

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Texts x width, float32. `inputs` gives batches with a list of texts under `text`."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self._prompt(task_metadata, prompt_type)
        with tqdm(total=len(texts), unit="text", disable=not os.isatty(2), leave=False, dynamic_ncols=True) as bar:
            bar.set_description(task_metadata.name)
            return self.embedder.encode(texts, None, bar.update, prompt)

    def prompts_of(self, task_metadata: Any) -> dict[str, str]:
        """The prompts that texts of a task get: of `query` and `document`, or of every `text`."""
        sides: dict[str, PromptType | None] = {"text": None}
        if task_metadata.type in ("Retrieval", "Reranking"):
            sides = {side.value: side for side in (PromptType.query, PromptType.document)}
        return {name: prompt for name, side in sides.items() if (prompt := self._prompt(task_metadata, side))}

    def _prompt(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """As sentence-transformers: a text that is neither query nor document gets the folder's default prompt, if no other."""
        name = get_prompt_name(self.prompts, task_metadata, prompt_type) if self.prompts else None
        default = self.embedder.settings.default_prompt if prompt_type is None else ""
        return self.prompts[name] if name is not None else default


def weights_identity(folder: Path) -> str:
    """A hash of the model's tensors, those of its modules too."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "*/model.safetensors")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(bytes.fromhex(sha256(path)) for path in files)).hexdigest()


# --- the tasks of a configuration -----------


def choose_tasks(chosen: str, local: str | None) -> list[AbsTask]:
    """`all`, a type, names separated by commas, or a benchmark; among the tasks of `local`, where that is set. Raises
    ConfigError with what there is.
    """
    own = {task.metadata.name: task for task in find_local_tasks(local)} if local is not None else {}
    if chosen == "all" or chosen in TYPES:
        tasks = list(mteb.get_benchmark(ENGLISH).tasks) if local is None else list(own.values())
        found = [task for task in tasks if chosen == "all" or task.metadata.type == TYPES[chosen]]
        if not found:
            problem = f"{chosen}: no such task in {local}; there are: {', '.join(own)}"
            raise ConfigError(Problem("mteb_task_type", problem))
        return found
    with suppress(KeyError):
        return list(mteb.get_benchmark(chosen).tasks)
    found = []
    for name in [name.strip() for name in chosen.split(",") if name.strip()] or [chosen]:
        try:
            found.append(own[name] if name in own else mteb.get_task(name))
        except KeyError:
            hint = _near(name, [*TYPES, *own, *(benchmark.name for benchmark in mteb.get_benchmarks())])
            there = ", ".join(["all", *TYPES, *own, "names of tasks as STS12"])
            problem = (
                f"no task, type or benchmark {name!r}{hint or '.'} There are: {there}, and benchmarks as {ENGLISH}"
            )
            raise ConfigError(Problem("mteb_task_type", problem)) from None
    return found


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_prompts(prompts: dict[str, str], tasks: list[AbsTask]) -> None:
    """Raises ConfigError for a prompt that no text would ever get."""
    names = {name for task in tasks for name in (task.metadata.name, task.metadata.type)}
    known = {"query", "document", *names, *(f"{name}-{side}" for name in names for side in ("query", "document"))}
    why = "names no task that runs{}; types are as {}"
    problems = [
        Problem(f"mteb_prompts.{name}", why.format(_near(name, sorted(known)), TYPES["sts"]))
        for name in prompts
        if name not in known
    ]
    if problems:
        raise ConfigError(*problems)


def drop_unusable(path: Path, task: AbsTask) -> None:
    """Delete a result that was cut off in the middle of writing, or that belongs to other data: its task runs again. The
    library keeps results of tasks whose data has changed when no split is missing; of local tasks data does change.
    """
    if not path.is_file():
        return
    dataset, reason = task.metadata.dataset, ""
    try:
        found = json.loads(path.read_text()).get("dataset_revision")
        if dataset["path"].startswith(LOCAL) and found != dataset["revision"]:
            reason = "is of other data"
    except ValueError:
        reason = "was cut off"
    if reason:
        print_notes([f"{path} {reason}; its task runs again"])
        path.unlink()


# --- tasks of one's own data -----------


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
    readers = {"retrieval": _read_retrieval, "reranking": _read_reranking}
    data = readers[name](folder) if name in readers else _read_columns(folder, name)
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob(TASK_FILE)]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    metadata = TaskMetadata(
        name=folder.name,
        description=settings.get("description", f"{name} on {folder.name}"),
        type=kind.type_name,  # type: ignore[arg-type]
        category="t2c" if name in ("classification", "clustering") else "t2t",
        dataset={"path": f"{LOCAL}{folder.name}", "revision": digest.hexdigest()[:16]},
        eval_splits=[SPLIT],
        eval_langs=settings.get("languages", ["eng-Latn"]),
        main_score=kind.main_score,
        prompt=settings.get("prompt"),
    )
    attributes: dict[str, Any] = {"metadata": metadata, **kind.attributes}
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
    if "type" in settings and settings["type"] not in KINDS:
        raise DataError(f"{path}: type {settings['type']!r}; there are: {', '.join(KINDS)}")
    return settings


def _kind_of(folder: Path) -> str:
    """The type of a task by its files and columns."""
    if (folder / "corpus.jsonl").is_file():
        return "retrieval"
    columns = set(read_rows(folder / f"{SPLIT}.jsonl", ())[0])
    with_labels = "classification" if (folder / "train.jsonl").is_file() else "clustering"
    for name in ("reranking", "sts", "pair_classification", with_labels):
        if set(KINDS[name].columns) <= columns:
            return name
    raise DataError(
        f"{folder / SPLIT}.jsonl: columns {', '.join(sorted(columns))} are those of no task; there are: text, label; "
        "sentence1, sentence2, score or label; query, positive, negative"
    )


def read_rows(path: Path, texts: Sequence[str], others: Sequence[str] = ()) -> list[Row]:
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


def _read_columns(folder: Path, name: str) -> DatasetDict:
    """The splits of a task whose rows are texts and a label or score."""
    *texts, value = columns = KINDS[name].columns
    data = DatasetDict()
    for split in ("train", SPLIT) if name == "classification" else (SPLIT,):
        path = folder / f"{split}.jsonl"
        rows = read_rows(path, texts, [value])
        for number, found in enumerate((row[value] for row in rows), 1):
            is_number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
            if name == "sts" and not is_number:
                raise DataError(f"{path}, row {number}: {value} is {found!r}, not a number")
            if name == "pair_classification" and found not in (0, 1):
                raise DataError(f"{path}, row {number}: {value} is {found!r}, not 0 or 1")
        data[split] = Dataset.from_dict({column: [row[column] for row in rows] for column in columns})
    return data


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
    documents, queries, relevant = list[Row](), list[Row](), dict[str, dict[str, int]]()
    for number, row in enumerate(read_rows(path, ("query",), ("positive", "negative"))):
        scores = relevant[str(number)] = dict[str, int]()
        for column, score in (("positive", 1), ("negative", 0)):
            if not isinstance(row[column], list) or not row[column] or any(map(why_no_text, row[column])):
                raise DataError(f"{path}, row {number + 1}: {column} is not a list of texts")
            named = {f"{number}-{column}-{i}": text for i, text in enumerate(row[column])}
            documents += [{"id": name, "text": text} for name, text in named.items()]
            scores |= dict.fromkeys(named, score)
        queries.append({"id": str(number), "text": row["query"]})
    return _retrieval_data(documents, queries, relevant, {query: list(scores) for query, scores in relevant.items()})


def _retrieval_data(
    documents: list[Row], queries: list[Row], relevant: dict[str, dict[str, int]], ranked: Any = None
) -> dict[str, dict[str, Any]]:
    """The data of a retrieval task; `ranked` are the documents of each query that are put in order, None: all."""
    corpus = [{"id": str(row["id"]), "title": row.get("title") or "", "text": row["text"]} for row in documents]
    asked = [{"id": str(row["id"]), "text": row["text"]} for row in queries]
    data = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(asked)}
    return {"default": {SPLIT: {**data, "relevant_docs": relevant, "top_ranked": ranked}}}
