"""Where the text of a pretraining run comes from: from the configuration to opened sources and their readers."""

import os
import shutil
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.config.sections import DatasetConfig
from neobert.data.files.corpus import Corpus, open_corpus
from neobert.data.files.documents import Files, SkippedRows
from neobert.data.files.hub import find_hub_splits
from neobert.data.files.splits import find_splits, fingerprint, hold_out_head, num_bytes
from neobert.data.files.token_store import TokenStore, is_token_store
from neobert.data.files.tokenize_corpus import check_store, cores, open_tokenized
from neobert.data.mlm.packing import LongDocuments
from neobert.data.mlm.readers import CorpusReader, Pieces, Reader, StreamReader, Subset
from neobert.data.mlm.row_source import describe_skips
from neobert.data.tokenizer import TextTokenizer
from neobert.errors import DataError
from neobert.ranks import Ranks

Text = Files | Corpus  # a stream, or random access


@dataclass(frozen=True)
class Source:
    """One source of text, opened. `describe` is its line in the summary."""

    train: Text
    evaluation: Text | None
    describe: str
    name: str = ""
    weight: float = 1.0

    @property
    def is_tokenized(self) -> bool:
        return not isinstance(self.train, Files) and self.train.is_tokenized


def open_sources(config: Config, tokenizer: TextTokenizer, output_dir: Path) -> list[Source]:
    """All sources of a run; tokenises them first if asked for, into `output_dir` by default. Raises DataError."""
    dataset = config.dataset
    if not dataset.mixture:
        return [_open_source(config, dataset, tokenizer, _token_folder(config, output_dir), "")]
    sources = []
    for number, entry in enumerate(dataset.mixture):
        one = entry.laid_over(dataset)
        folder = _token_folder(config, output_dir) / f"{number:02d}"
        try:
            source = _open_source(config, one, tokenizer, folder, f"entry {number} of dataset.mixture")
        except DataError as error:
            raise DataError(f"dataset.mixture, entry {number}: {error}") from None
        told = f"{entry.weight:g} parts of {entry.path or entry.name}: {source.describe}"
        sources.append(Source(source.train, source.evaluation, told, source.name, entry.weight))
    return sources


def _open_source(config: Config, dataset: DatasetConfig, tokenizer: TextTokenizer, folder: Path, name: str) -> Source:
    if is_token_store(dataset.path) or is_token_store(Path(dataset.path) / "train"):
        return _open_store(config, dataset, tokenizer, name)
    train_files, eval_files = find_files(dataset)
    if all("://" not in path for path in train_files.paths) and not num_bytes(train_files):
        raise DataError(f"dataset.path: {', '.join(train_files.paths)}: empty")
    if dataset.streaming:
        if eval_files is None:
            train_files, eval_files = hold_out_head(train_files, num_bytes(train_files) or 10**12)
        return Source(train_files, eval_files, f"streamed: {describe_size(train_files)}", name)
    if dataset.pre_tokenize:
        return _pre_tokenize(config, dataset, tokenizer, folder, train_files, eval_files, name)
    opened = [
        None if files is None else open_corpus(files, fingerprint(files), dataset.load_all_from_disk, dataset.cache_dir)
        for files in (train_files, eval_files)
    ]
    assert opened[0] is not None
    told = f"{len(opened[0]):,} documents, {describe_size(train_files)}{_held(dataset)}"
    return _random_access(config, dataset, opened[0], opened[1], told, name)


def find_files(dataset: DatasetConfig) -> tuple[Files, Files | None]:
    """The files of a local path, or of a dataset of the hub when no path is given or it does not exist."""
    named = dataset.name not in ("", type(dataset).model_fields["name"].default)
    is_there = os.path.exists(dataset.path) or has_magic(dataset.path)
    if dataset.path and (is_there or not named):
        return find_splits(dataset.path, dataset.text_column, dataset.train_split, dataset.eval_split)
    return find_hub_splits(
        dataset.name,
        dataset.config,
        dataset.streaming,
        dataset.text_column,
        dataset.train_split,
        dataset.eval_split,
        dataset.cache_dir,
        dataset.force_redownload,
    )


def _token_folder(config: Config, output_dir: Path) -> Path:
    chosen = config.dataset.pre_tokenize_output
    return Path(chosen) if chosen else output_dir / "tokenized"


def _pre_tokenize(
    config: Config,
    dataset: DatasetConfig,
    tokenizer: TextTokenizer,
    folder: Path,
    train_files: Files,
    eval_files: Files | None,
    name: str,
) -> Source:
    num_proc = min(dataset.num_proc, cores())
    show_bar = not config.trainer.disable_tqdm and os.isatty(2)
    stores: list[TokenStore | None] = []
    how = ""
    for split, files in (("train", train_files), ("validation", eval_files)):
        if files is None:
            stores.append(None)
            continue
        if dataset.force_redownload and is_token_store(folder / split):
            shutil.rmtree(folder / split)
        refuse = dataset.bad_rows == "refuse"
        store, made = open_tokenized(
            files, tokenizer, folder / split, num_proc, show_bar, dataset.load_all_from_disk, refuse
        )
        stores.append(store)
        how = how or (
            f"tokenised by {num_proc} thread{'s' if num_proc > 1 else ''} into" if made else "tokens found in"
        )
    train = stores[0]
    assert train is not None
    return _random_access(config, dataset, train, stores[1], _describe_store(train, how, dataset), name)


def _open_store(config: Config, dataset: DatasetConfig, tokenizer: TextTokenizer, name: str) -> Source:
    path, in_memory = Path(dataset.path), dataset.load_all_from_disk
    for key, name in (("train_split", "train"), ("eval_split", "validation")):
        if getattr(dataset, key) not in (None, name):
            raise DataError(
                f"dataset.{key}: {getattr(dataset, key)!r}, but of a folder of tokens it is {name!r}, whole"
            )
    train = TokenStore(path if is_token_store(path) else path / "train", in_memory)
    evaluation = TokenStore(path / "validation", in_memory) if is_token_store(path / "validation") else None
    for store in (train, evaluation):
        if store is not None:
            check_store(store, tokenizer)
    return _random_access(config, dataset, train, evaluation, _describe_store(train, "in", dataset), name)


def _random_access(config: Config, dataset: DatasetConfig, train: Any, evaluation: Any, told: str, name: str) -> Source:
    """Holds out `validation_split`, and takes long documents apart for shuffling where lengths are known."""
    if dataset.validation_split is not None and dataset.eval_split is None and not dataset.streaming:
        if len(train) < 2:
            raise DataError("dataset.validation_split: one document cannot be split")
        train, evaluation = (Subset(train, dataset.validation_split, config.seed, rest) for rest in (True, False))
    if not len(train):
        told = describe_skips(train.manifest.skipped) if isinstance(train, TokenStore) else ""
        raise DataError(
            f"dataset.path: {dataset.path or dataset.name}: no document in it{f' ({told})' if told else ''}"
        )
    if train.is_tokenized and long_documents(config) == "split":
        train = Pieces(train, piece_length(config) - 2)
    return Source(train, evaluation, told, name)


# --- readers -----------


def build_reader(config: Config, text: Text, ranks: Ranks) -> Reader:
    """A reader of one shard, in the order that the configuration asks for."""
    skips = SkippedRows(config.dataset.bad_rows == "refuse")
    if isinstance(text, Files):
        return StreamReader(text, ranks, skips)
    return CorpusReader(text, config.seed if config.dataset.shuffle_buffer_size > 1 else None, ranks, skips)


def build_eval_reader(config: Config, text: Text) -> CorpusReader | StreamReader:
    """A reader of evaluation text: all of it, in its own order."""
    skips = SkippedRows(config.dataset.bad_rows == "refuse")
    return StreamReader(text, Ranks(), skips) if isinstance(text, Files) else CorpusReader(text, None, Ranks(), skips)


# --- lengths, and words for the summary -----------


def row_length(config: Config) -> int:
    """Tokens of a packed row."""
    return config.row_length


def piece_length(config: Config) -> int:
    """Longest piece of a document, special tokens included."""
    return min(config.tokenizer.max_length, row_length(config))


def long_documents(config: Config) -> LongDocuments:
    """What happens to a document that is longer than a piece."""
    if config.dataset.long_documents:
        return config.dataset.long_documents
    return "truncate" if config.tokenizer.truncation and not config.datacollator.pack_sequences else "split"


def describe_size(files: Files) -> str:
    """`12.3 MB in 4 files`."""
    first, last = files.rows
    part = "" if (first, last) == (0, None) else f", rows {first:,} to {'the end' if last is None else f'{last:,}'}"
    many = f" in {len(files.paths)} files" if len(files.paths) > 1 else f", {files.paths[0]}"
    if "://" in files.paths[0]:
        return f"{len(files.paths):,} files of the hub, {files.paths[0]}{part}"
    size = num_bytes(files)
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e5 else ("kB", 1e3)
    return f"{size / scale:.1f} {unit}{many}{part}"


def _describe_store(store: TokenStore, how: str, dataset: DatasetConfig) -> str:
    manifest = store.manifest
    skipped = describe_skips(manifest.skipped)
    return (
        f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, {how} {store.folder}{_held(dataset)}"
        + (f" ({skipped})" if skipped else "")
    ).replace(" tokens, in ", " tokens in ")


def _held(dataset: DatasetConfig) -> str:
    return ", held in memory" if dataset.load_all_from_disk else ""
