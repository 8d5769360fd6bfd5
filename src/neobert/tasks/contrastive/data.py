"""The data of a contrastive run, as the configuration says, and its evaluation with sentence-transformers' evaluators:
Spearman's correlation of cosines with scores; MRR@10 and nDCG@10 of finding an anchor's positive among all texts of a set.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from neobert.config.schema import Config
from neobert.config.sections import DatasetConfig
from neobert.data.files.documents import Files, SkippedRows, fingerprint, open_corpus
from neobert.data.files.splits import (
    Choice,
    choose_split,
    find_splits,
    hub_splits,
    local_splits,
    usual_evaluation,
    usual_training,
)
from neobert.data.hashing import hash_key
from neobert.data.mlm.readers import Reader
from neobert.data.pairs.loader import PairLoader, PairSource, Source, TextSource
from neobert.data.pairs.table import (
    PAIR_SETS,
    Examples,
    build_table,
    encode_texts,
    read_examples,
    roles_of,
    training_rows,
)
from neobert.data.tokenizer import Ids, text_tokenizer
from neobert.errors import ConfigError, DataError, Problem, check_installed
from neobert.inference.embed import embed_ids, unit_rows
from neobert.ranks import Ranks
from neobert.tasks.encoder import row_layout
from neobert.training.run import Context, Evaluation

TOP = 10
NAMES = {"ndcg": f"ndcg@{TOP}", "mrr": f"mrr@{TOP}", "spearman": "spearman"}


@dataclass(frozen=True)
class Place:
    """Where a source is, and the files of its splits. `key` names it in messages, `label` in metrics."""

    dataset: DatasetConfig
    splits: dict[str, list[str]]
    key: str
    label: str
    weight: float = 1.0

    @property
    def origin(self) -> str:
        return self.dataset.path or self.dataset.name

    @property
    def name(self) -> str:
        return f"{self.key}: {self.origin}"

    def choose(self, key: str, wanted: str | None, usual: str | None) -> Choice:
        """(split, begin and end of its slice) that `wanted` says, or the usual one. Raises DataError saying what is there."""
        return choose_split(self.splits, wanted, usual, self.origin, f"{self.key}.{key}")


@dataclass(frozen=True)
class OpenSource:
    """A source that is ready to be drawn from; `held_out` rows are evaluated."""

    place: Place
    source: Source
    num_rows: int
    describe: str
    fingerprint: list[Any]
    held_out: Examples | None = None
    messages: list[str] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        return isinstance(self.source, TextSource)


@dataclass(frozen=True)
class ContrastiveData:
    """The training batches, what is evaluated by name, and lines for the summary."""

    train: PairLoader
    sets: dict[str, Examples]
    describe: list[str]
    messages: list[str]


def build_data(config: Config, hf_tokenizer: Any, ranks: Ranks) -> ContrastiveData:
    """Read and tokenise all sources. Raises DataError and ConfigError."""
    trainer = config.trainer
    rows = trainer.per_device_train_batch_size * ranks.world_size
    if rows < 2:
        why = "1 row has no other to be told from; use at least 2 (gradient accumulation does not help: batches are apart)"
        raise ConfigError(Problem("trainer.per_device_train_batch_size", why))
    places = enumerate(find_places(config))
    sources = [open_source(config, hf_tokenizer, place, hash_key(config.seed, number)) for number, place in places]
    weights, mixed = mixture_weights(config, sources)
    pairs = [(weight, one.num_rows) for weight, one in zip(weights, sources, strict=True) if not one.is_text]
    pair_rows = sum(number for _, number in pairs) or sum(one.num_rows for one in sources)
    longest, views = longest_text(config), 2 if config.contrastive.loss_type == "supcon" else 1
    loader = PairLoader(
        [one.source for one in sources], weights, row_layout(config, hf_tokenizer.pad_token_id, longest), ranks,
        trainer.per_device_train_batch_size, config.seed, views,
        batches_per_epoch=math.ceil(pair_rows / rows / (sum(weight for weight, _ in pairs) or 1.0)),
        fingerprint={"sources": [one.fingerprint for one in sources], "tokenizer": text_tokenizer(hf_tokenizer).fingerprint,
                     "max_length": longest, "loss_type": config.contrastive.loss_type},
        ahead=config.dataset.num_workers > 0,
    )  # fmt: skip
    describe = [f"{w:.0%} of the batches: {one.describe}" for w, one in zip(weights, sources, strict=True)]
    held = {one.place.label: one.held_out for one in sources if one.held_out is not None}
    messages = [*mixed, *(message for one in sources for message in one.messages)]
    if any(one.is_text for one in sources) and not config.model.dropout_prob and not config.model.from_hub:
        same = "both passes are the same; 0.1 is usual"
        messages.append(f"plain text makes pairs by dropout, and model.dropout_prob is 0: {same}")
    return ContrastiveData(loader, find_sets(config, held), describe, messages)


def longest_text(config: Config) -> int:
    """Tokens of a text, special tokens included."""
    return min(config.tokenizer.max_length, config.dataset.max_seq_length)


# --- where sources are -----------


def find_places(config: Config) -> list[Place]:
    """The sources of a run."""
    dataset = config.dataset
    if not dataset.mixture:
        return [find_place(dataset, "dataset")]
    places: list[Place] = []
    for number, entry in enumerate(dataset.mixture):
        place = find_place(entry.laid_over(dataset), f"dataset.mixture, entry {number}")
        is_taken = place.label in [other.label for other in places]
        label = f"{place.label}_{number}" if is_taken else place.label
        places.append(replace(place, label=label, weight=entry.weight))
    return places


def find_place(dataset: DatasetConfig, key: str) -> Place:
    """The files of a path, of a public set by its short name, or of any dataset of the hub. Raises DataError."""
    if dataset.path:
        label = Path(dataset.path.rstrip("/*")).name.split(".")[0] or "pairs"
        try:
            return Place(dataset, local_splits(dataset.path), key, label)
        except DataError as error:
            raise DataError(str(error).replace("dataset.path", f"{key}.path", 1)) from None
    if dataset.name in ("", type(dataset).model_fields["name"].default):
        known = ", ".join(PAIR_SETS)
        raise DataError(f"{key}.path: not set; name files of pairs, or a set of the hub in {key}.name, as {known}")
    known_set = PAIR_SETS.get(dataset.name)
    label = dataset.name.split("/")[-1]
    if known_set is not None:
        own = {"config": dataset.config or known_set.config, "columns": dataset.columns or known_set.columns}
        dataset = dataset.model_copy(update={"name": known_set.repository, **own})
    splits = hub_splits(dataset.name, dataset.config, dataset.cache_dir, dataset.force_redownload)
    return Place(dataset, splits, key, label)


# --- opening -----------


def open_source(config: Config, hf_tokenizer: Any, place: Place, seed: int) -> OpenSource:
    """One source, read and tokenised. Raises DataError."""
    dataset = place.dataset
    chosen = place.choose("train_split", dataset.train_split, usual_training(place.splits))
    split, usual = chosen[0], usual_evaluation(place.splits, chosen[0])
    wanted = dataset.columns or ({"text": dataset.text_column} if dataset.text_column else {})
    roles = roles_of(place.splits[split], wanted, f"{place.key}.columns")
    longest, truncate = longest_text(config), config.tokenizer.truncation
    encode = partial(encode_texts, hf_tokenizer, max_length=longest, truncate=truncate, name=place.name)
    skips = SkippedRows(dataset.bad_rows == "refuse")
    if roles.kind == "texts":
        return _open_texts(place, split, roles.columns["text"], seed, encode, skips)
    examples, held_out = read_examples(place.splits, chosen, roles, place.name, skips), None
    if dataset.eval_split is not None or usual is not None:
        chosen = place.choose("eval_split", dataset.eval_split, usual)
        held_out = read_examples(place.splits, chosen, roles, f"{place.key}.eval_split", skips)
    if dataset.validation_split is not None and dataset.eval_split is None and not dataset.streaming:
        examples, held_out = examples.hold_out(dataset.validation_split, config.seed)
    rows, messages = training_rows(examples, config.contrastive.min_score)
    table = build_table(rows, partial(encode, show_bar=not config.trainer.disable_tqdm and os.isatty(2)))
    if skipped := skips.describe():
        messages.append(f"{place.name}: {skipped}")
    what = {"pairs": "pairs", "scores": "pairs with a score", "labels": "labelled texts"}[roles.kind]
    negatives = f", {len(table.negatives.values):,} hard negatives" if len(table.negatives.values) else ""
    line = f"{len(table):,} {what}{negatives}, {len(table.texts.values):,} tokens, {place.origin} ({roles.describe})"
    facts = [fingerprint(Files(tuple(place.splits[split]), None)), roles.describe, dataset.train_split, len(table)]
    held_out = None if roles.kind == "labels" else held_out
    return OpenSource(place, PairSource(table, seed), len(table), line, facts, held_out, messages)


def _open_texts(
    place: Place, split: str, column: str, seed: int, encode: Callable[[list[str]], list[Ids]], skips: SkippedRows
) -> OpenSource:
    dataset, files = place.dataset, Files(tuple(place.splits[split]), column)
    if dataset.path:
        files, _ = find_splits(dataset.path, column, dataset.train_split, dataset.eval_split)
    corpus = open_corpus(files, fingerprint(files), dataset.load_all_from_disk, dataset.cache_dir)
    if not len(corpus):
        raise DataError(f"{place.name}: no text in it")
    line = f"{len(corpus):,} texts of at least {dataset.min_length:,} characters, each its own positive, {place.origin}"
    source = TextSource(Reader(corpus, seed, skips=skips), len(corpus), dataset.min_length, encode, place.name)
    return OpenSource(place, source, len(corpus), line, [corpus.fingerprint, column, dataset.min_length, len(corpus)])


# --- mixing -----------


def mixture_weights(config: Config, sources: list[OpenSource]) -> tuple[list[float], list[str]]:
    """(share of the batches of every source, messages): plain text gets `pretraining_prob` where there are pairs too."""
    dataset = config.dataset
    temperature = dataset.mixture_temperature
    raw = [one.num_rows ** (1 / temperature) if temperature else one.place.weight for one in sources]
    kinds = {one.is_text for one in sources}
    if len(kinds) == 2:
        totals = {kind: sum(w for w, one in zip(raw, sources, strict=True) if one.is_text == kind) for kind in kinds}
        part = {True: dataset.pretraining_prob, False: 1 - dataset.pretraining_prob}
        return [w / totals[one.is_text] * part[one.is_text] for w, one in zip(raw, sources, strict=True)], []
    idle = f"dataset.pretraining_prob {dataset.pretraining_prob:g} has nothing to draw: no source is plain text"
    return [w / sum(raw) for w in raw], [idle] if kinds == {False} and dataset.pretraining_prob else []


# --- evaluation -----------


@dataclass
class SentenceEncoder:
    """What the evaluators need of a model: `encode` and a similarity, which is the cosine."""

    embed: Callable[[list[str]], np.ndarray]  # unit vectors
    similarity_fn_name: str = "cosine"

    def __post_init__(self) -> None:
        self.model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_, **__: None)

    def encode(self, sentences: list[str], **_: Any) -> torch.Tensor:
        return torch.from_numpy(self.embed(list(sentences)))

    encode_query = encode_document = encode

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b.T


def find_sets(config: Config, held_out: dict[str, Examples]) -> dict[str, Examples]:
    """What is evaluated, by name: held-out rows of the sources, then `contrastive.evaluation`. Raises UserError."""
    sets = dict(held_out)
    for number, entry in enumerate(config.contrastive.evaluation):
        key = f"contrastive.evaluation, entry {number}"
        given = {**entry.model_dump(exclude={"split", "label"}), "eval_split": entry.split}
        place = find_place(config.dataset.model_copy(update=given), key)
        usual = next((name for name in ("test", "validation", *place.splits) if name in place.splits), None)
        chosen = place.choose("split", entry.split, usual)
        paths, label = place.splits[chosen[0]], entry.label or place.label
        roles = roles_of(paths, place.dataset.columns, f"{key}.columns")
        if roles.kind not in ("scores", "pairs"):
            raise DataError(f"{key}: {paths[0]} has {roles.kind}; pairs, or two texts and a score, can be evaluated")
        if label in sets:
            taken = f"entry {number}: the name {label!r} is taken; set its label"
            raise ConfigError(Problem("contrastive.evaluation", taken))
        sets[label] = read_examples(place.splits, chosen, roles, key, SkippedRows())
    if sets:
        check_installed("evaluating embeddings needs sentence-transformers", "contrastive", "sentence_transformers")
    return sets


def build_evaluator(examples: Examples, batch_size: int) -> Any:
    """The evaluator of a set. Imports sentence-transformers, which takes seconds."""
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )

    rows = examples.rows
    if examples.roles.kind == "scores":
        return EmbeddingSimilarityEvaluator(
            [row.anchor for row in rows], [row.positive for row in rows], [row.value for row in rows],
            batch_size=batch_size, main_similarity="cosine", similarity_fn_names=["cosine"], name="", write_csv=False,
        )  # fmt: skip
    queries: dict[str, str] = {row.anchor: f"q{number}" for number, row in enumerate(rows)}
    texts = dict.fromkeys(text for row in rows for text in (row.positive, *row.negatives))
    corpus = {text: f"d{number}" for number, text in enumerate(texts)}
    relevant: dict[str, set[str]] = {}
    for row in rows:
        relevant.setdefault(queries[row.anchor], set()).add(corpus[row.positive])
    return InformationRetrievalEvaluator(
        {number: text for text, number in queries.items()}, {number: text for text, number in corpus.items()}, relevant,
        mrr_at_k=[TOP], ndcg_at_k=[TOP], accuracy_at_k=[1], precision_recall_at_k=[TOP], map_at_k=[TOP],
        batch_size=batch_size, write_csv=False, show_progress_bar=False,
    )  # fmt: skip


def evaluate_set(evaluator: Any, model: SentenceEncoder) -> dict[str, float]:
    """`spearman`, or `mrr@10` and `ndcg@10`."""
    values = evaluator(model)
    found = {name: value for key, name in NAMES.items() for full, value in values.items() if key in full}
    return {name: 0.0 if np.isnan(value) else float(value) for name, value in found.items()}


def build_evaluation(
    config: Config, hf_tokenizer: Any, sets: dict[str, Examples], context: Context, model: Any
) -> Evaluation:
    """All sets, and `score`: the mean of Spearman's correlations and nDCG@10s. The processes embed the texts in turn."""
    runtime, interrupt = context.runtime, context.interrupt
    size, most = config.trainer.per_device_eval_batch_size, config.trainer.eval_max_batches
    shortened = {name: examples.first(None if most is None else most * size) for name, examples in sets.items()}
    evaluators: dict[str, Any] = {}

    def embed(texts: list[str]) -> np.ndarray:
        ids = encode_texts(hf_tokenizer, texts, longest_text(config), True, "evaluation")
        return unit_rows(embed_ids(model, ids, hf_tokenizer.pad_token_id, runtime))

    def measure() -> dict[str, float] | None:
        values: dict[str, float] = {}
        model.eval()
        for name, examples in shortened.items():
            if name not in evaluators:
                evaluators[name] = build_evaluator(examples, size)
            for metric, value in evaluate_set(evaluators[name], SentenceEncoder(embed)).items():
                values[f"{name}_{metric}"] = value
            if runtime.all_max(interrupt.wanted)[0]:
                return None
        model.train()
        counted = [value for name, value in values.items() if name.endswith(("_spearman", f"_ndcg@{TOP}"))]
        return {**values, "score": float(np.mean(counted))}

    def headline(values: dict[str, float]) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in values.items())

    return Evaluation(measure, headline, "score")
