"""The data of a contrastive run: sources opened, tokenised, and mixed as the configuration says; and what is held out."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.config.sections import DatasetConfig
from neobert.data.files.corpus import open_corpus
from neobert.data.files.documents import Files, SkippedRows
from neobert.data.files.hub import hub_files
from neobert.data.files.splits import EVAL_NAMES, find_splits, fingerprint, local_splits, parse_slice
from neobert.data.hashing import hash_key
from neobert.data.mlm.row_source import describe_skips, first_skip
from neobert.data.pairs.columns import PAIR_SETS, Roles
from neobert.data.pairs.loader import PairLoader, PairSource, Source, TextSource
from neobert.data.pairs.table import Examples, build_table, encode_texts, read_examples, roles_of, training_rows
from neobert.data.tokenizer import Ids, text_tokenizer
from neobert.errors import ConfigError, DataError, Problem
from neobert.ranks import Ranks
from neobert.tasks.encoder import row_layout


@dataclass(frozen=True)
class Place:
    """Where a source is, and the files of its splits. `key` names it in messages."""

    dataset: DatasetConfig
    splits: dict[str, list[str]]
    key: str
    label: str

    @property
    def is_local(self) -> bool:
        return bool(self.dataset.path)


@dataclass(frozen=True)
class OpenSource:
    """A source that is ready to be drawn from; `held_out` rows are evaluated."""

    source: Source
    label: str
    is_text: bool
    num_rows: int
    weight: float
    describe: str
    fingerprint: list[Any]
    held_out: Examples | None
    notes: list[str]


@dataclass(frozen=True)
class ContrastiveData:
    """The training batches, what is evaluated by name, and lines for the summary."""

    train: PairLoader
    held_out: dict[str, Examples]
    describe: list[str]
    notes: list[str]
    has_text: bool


def build_data(config: Config, hf_tokenizer: Any, ranks: Ranks) -> ContrastiveData:
    """Read and tokenise all sources. Raises DataError and ConfigError."""
    trainer = config.trainer
    rows = trainer.per_device_train_batch_size * ranks.world_size
    if rows < 2:
        why = "1 row has no other to be told from; use at least 2 (gradient accumulation does not help: batches are apart)"
        raise ConfigError(Problem("trainer.per_device_train_batch_size", why))
    sources = [
        open_source(config, hf_tokenizer, place, weight, number)
        for number, (place, weight) in enumerate(find_places(config))
    ]
    weights, mixed = mixture_weights(config, sources)
    pair_rows = sum(s.num_rows for s in sources if not s.is_text) or sum(s.num_rows for s in sources)
    pair_share = sum(w for w, s in zip(weights, sources, strict=True) if not s.is_text) or 1.0
    per_epoch = math.ceil(pair_rows / rows / pair_share)
    loader = PairLoader(
        [one.source for one in sources],
        weights,
        row_layout(config, hf_tokenizer.pad_token_id, longest_text(config)),
        ranks,
        trainer.per_device_train_batch_size,
        config.seed,
        views=2 if config.contrastive.loss_type == "supcon" else 1,
        batches_per_epoch=per_epoch,
        fingerprint=_fingerprint(config, hf_tokenizer, sources),
        ahead=config.dataset.num_workers > 0,
    )
    describe = [f"{w:.0%} of the batches: {one.describe}" for w, one in zip(weights, sources, strict=True)]
    held = {one.label: one.held_out for one in sources if one.held_out is not None}
    notes = [*mixed, *(note for one in sources for note in one.notes)]
    return ContrastiveData(loader, held, describe, notes, any(one.is_text for one in sources))


def _fingerprint(config: Config, hf_tokenizer: Any, sources: list[OpenSource]) -> dict[str, Any]:
    return {
        "sources": [one.fingerprint for one in sources],
        "tokenizer": text_tokenizer(hf_tokenizer).fingerprint,
        "max_length": longest_text(config),
        "loss_type": config.contrastive.loss_type,
    }


def longest_text(config: Config) -> int:
    """Tokens of a text, special tokens included."""
    return min(config.tokenizer.max_length, config.dataset.max_seq_length)


# --- where sources are -----------


def find_places(config: Config) -> list[tuple[Place, float]]:
    """The sources of a run with their weights."""
    dataset = config.dataset
    if not dataset.mixture:
        return [(find_place(dataset, "dataset"), 1.0)]
    places: list[tuple[Place, float]] = []
    for number, entry in enumerate(dataset.mixture):
        key = f"dataset.mixture, entry {number}"
        place = find_place(entry.laid_over(dataset), key)
        taken = any(place.label == other.label for other, _ in places)
        label = f"{place.label}_{number}" if taken else place.label
        places.append((Place(place.dataset, place.splits, key, label), entry.weight))
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
        found = {
            "name": known_set.repository,
            "config": dataset.config or known_set.config,
            "columns": dataset.columns or known_set.columns,
        }
        dataset = dataset.model_copy(update=found)
    splits = hub_files(dataset.name, dataset.config, dataset.cache_dir, dataset.force_redownload)
    return Place(dataset, splits, key, label)


def choose_split(place: Place, wanted: str | None, usual: str | None, what: str) -> tuple[str, str | None, str | None]:
    """(split, begin and end of its slice). Raises DataError saying what is there."""
    name, begin, end = parse_slice(wanted, what) if wanted else (usual, None, None)
    if name is None or name not in place.splits:
        source = place.dataset.path or place.dataset.name
        raise DataError(f"{what}: no split {name or 'train'!r} in {source}; there are: {', '.join(place.splits)}")
    return name, begin, end


# --- opening -----------


def open_source(config: Config, hf_tokenizer: Any, place: Place, weight: float, number: int) -> OpenSource:
    """One source, read and tokenised. Raises DataError."""
    dataset = place.dataset
    usual = "train" if "train" in place.splits else next(iter(place.splits)) if len(place.splits) == 1 else None
    split, begin, end = choose_split(place, dataset.train_split, usual, f"{place.key}.train_split")
    wanted = dataset.columns or ({"text": dataset.text_column} if dataset.text_column else {})
    roles = roles_of(place.splits[split], wanted, f"{place.key}.columns")
    seed = hash_key(config.seed, number)
    if roles.kind == "texts":
        return _open_texts(config, hf_tokenizer, place, roles, weight, seed)
    skips = SkippedRows(dataset.bad_rows == "refuse")
    name = f"{place.key}: {dataset.path or dataset.name}"
    examples = read_examples(place.splits[split], roles, name, skips, (begin, end))
    held_out = _held_out(place, roles, split, skips)
    if dataset.validation_split is not None and dataset.eval_split is None and not dataset.streaming:
        examples, held_out = examples.hold_out(dataset.validation_split, config.seed)
    rows, notes = training_rows(examples, config.contrastive.min_score)
    show_bar = not config.trainer.disable_tqdm and os.isatty(2)
    table = build_table(rows, hf_tokenizer, longest_text(config), config.tokenizer.truncation, name, show_bar)
    if told := describe_skips(skips.counts, 0):
        notes.append(f"{name}: {told}{first_skip(skips.first)}")
    what = {"pairs": "pairs", "scores": "pairs with a score", "labels": "labelled texts"}[roles.kind]
    negatives = f", {len(table.negatives.values):,} hard negatives" if len(table.negatives.values) else ""
    return OpenSource(
        PairSource(table, seed), place.label, False, len(table), weight,
        f"{len(table):,} {what}{negatives}, {len(table.texts.values):,} tokens, {dataset.path or dataset.name} "
        f"({roles.describe})",
        [fingerprint(Files(tuple(place.splits[split]), None)), roles.describe, dataset.train_split, len(table)],
        held_out if held_out is None or held_out.roles.kind != "labels" else None,
        notes,
    )  # fmt: skip


def _held_out(place: Place, roles: Roles, train: str, skips: SkippedRows) -> Examples | None:
    """The rows of the evaluation split, if there is one."""
    wanted = place.dataset.eval_split
    usual = next((name for name in EVAL_NAMES if name in place.splits and name != train), None)
    if wanted is None and usual is None:
        return None
    split, begin, end = choose_split(place, wanted, usual, f"{place.key}.eval_split")
    return read_examples(place.splits[split], roles, f"{place.key}.eval_split", skips, (begin, end))


def _open_texts(config: Config, hf_tokenizer: Any, place: Place, roles: Roles, weight: float, seed: int) -> OpenSource:
    dataset, column = place.dataset, roles.columns["text"]
    if dataset.path:
        files, _ = find_splits(dataset.path, column, dataset.train_split, dataset.eval_split)
    else:
        split, _, _ = choose_split(place, dataset.train_split, "train", f"{place.key}.train_split")
        files = Files(tuple(place.splits[split]), column)
    corpus = open_corpus(files, fingerprint(files), dataset.load_all_from_disk, dataset.cache_dir)
    name = f"{place.key}: {dataset.path or dataset.name}"
    if not len(corpus):
        raise DataError(f"{name}: no text in it")

    def encode(texts: list[str]) -> list[Ids]:
        return encode_texts(hf_tokenizer, texts, longest_text(config), config.tokenizer.truncation, name)

    source = TextSource(corpus, seed, dataset.min_length, encode, SkippedRows(dataset.bad_rows == "refuse"), name)
    told = f"{len(corpus):,} texts of at least {dataset.min_length:,} characters, each its own positive"
    return OpenSource(
        source, place.label, True, len(corpus), weight, f"{told}, {dataset.path or dataset.name}",
        [corpus.fingerprint, column, dataset.min_length, len(corpus)], None, [],
    )  # fmt: skip


# --- mixing -----------


def mixture_weights(config: Config, sources: list[OpenSource]) -> tuple[list[float], list[str]]:
    """(the share of batches of every source, notes): plain text gets `pretraining_prob` of them where there are pairs too."""
    dataset = config.dataset
    temperature = dataset.mixture_temperature
    raw = [one.num_rows ** (1 / temperature) if temperature else one.weight for one in sources]
    kinds = {one.is_text for one in sources}
    if kinds == {True, False}:
        totals = {kind: sum(w for w, one in zip(raw, sources, strict=True) if one.is_text == kind) for kind in kinds}
        part = {True: dataset.pretraining_prob, False: 1 - dataset.pretraining_prob}
        raw = [w / totals[one.is_text] * part[one.is_text] for w, one in zip(raw, sources, strict=True)]
        return raw, []
    notes = []
    if kinds == {False} and dataset.pretraining_prob:
        notes = [f"dataset.pretraining_prob {dataset.pretraining_prob:g} has nothing to draw: no source is plain text"]
    return [w / sum(raw) for w in raw], notes
