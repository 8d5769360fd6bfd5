"""Where the text of a pretraining run comes from: from the configuration to opened sources and their readers."""

import os
import shutil
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path

from neobert.config.schema import Config
from neobert.config.sections import DatasetConfig
from neobert.data.files.documents import Corpus, Files, SkippedRows, fingerprint, num_bytes, open_corpus
from neobert.data.files.splits import find_hub_splits, find_splits, hold_out_head
from neobert.data.files.token_store import TokenStore, is_token_store, tokenize_files
from neobert.data.mlm.packing import LongDocuments
from neobert.data.mlm.readers import CorpusReader, Pieces, StreamReader, Subset
from neobert.data.tokenizer import TextTokenizer, cores
from neobert.errors import DataError
from neobert.ranks import Ranks

Text = Files | Corpus  # a stream, or random access


@dataclass(frozen=True)
class CorpusSource:
    """One source of text, opened. `describe` is its line in the summary."""

    train: Text
    evaluation: Text | None
    describe: str
    name: str = ""
    weight: float = 1.0

    @property
    def is_tokenized(self) -> bool:
        return not isinstance(self.train, Files) and self.train.is_tokenized


def open_sources(config: Config, tokenizer: TextTokenizer, output_dir: Path) -> list[CorpusSource]:
    """All sources of a run; tokenises them first if asked for, into `output_dir` by default. Raises DataError."""
    dataset = config.dataset
    folder = Path(dataset.pre_tokenize_output) if dataset.pre_tokenize_output else output_dir / "tokenized"
    if not dataset.mixture:
        return [_open_source(config, tokenizer, folder)]
    sources = []
    for number, entry in enumerate(dataset.mixture):
        own = config.model_copy(update={"dataset": entry.laid_over(dataset)})
        try:
            source = _open_source(own, tokenizer, folder / f"{number:02d}")
        except DataError as error:
            raise DataError(f"dataset.mixture, entry {number}: {error}") from None
        line = f"{entry.weight:g} parts of {entry.path or entry.name}: {source.describe}"
        name = f"entry {number} of dataset.mixture"
        sources.append(replace(source, describe=line, name=name, weight=entry.weight))
    return sources


def _open_source(config: Config, tokenizer: TextTokenizer, folder: Path) -> CorpusSource:
    """The source that `config.dataset` names; tokens are in `folder` where they are made first."""
    dataset = config.dataset
    if is_token_store(dataset.path) or is_token_store(Path(dataset.path) / "train"):
        return _open_store(config, tokenizer)
    train_files, eval_files = find_files(dataset)
    if all("://" not in path for path in train_files.paths) and not num_bytes(train_files):
        raise DataError(f"dataset.path: {', '.join(train_files.paths)}: empty")
    if dataset.streaming:
        if eval_files is None:
            train_files, eval_files = hold_out_head(train_files, num_bytes(train_files) or 10**12)
        return CorpusSource(train_files, eval_files, f"streamed: {describe_size(train_files)}")
    if dataset.pre_tokenize:
        store, made = _tokenize(config, tokenizer, folder / "train", train_files)
        evaluation = None if eval_files is None else _tokenize(config, tokenizer, folder / "validation", eval_files)[0]
        return _random_access(config, store, evaluation, _describe_store(config, store, made))

    def opened(files: Files) -> Corpus:
        return open_corpus(files, fingerprint(files), dataset.load_all_from_disk, dataset.cache_dir)

    train = opened(train_files)
    line = f"{len(train):,} documents, {describe_size(train_files)}{_in_memory(config)}"
    return _random_access(config, train, None if eval_files is None else opened(eval_files), line)


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


def _tokenize(config: Config, tokenizer: TextTokenizer, folder: Path, files: Files) -> tuple[TokenStore, str]:
    """The tokens of the files, made where they are missing, and how they came to be there."""
    dataset, count = config.dataset, min(config.dataset.num_proc, cores())
    if dataset.force_redownload and is_token_store(folder):
        shutil.rmtree(folder)
    show_bar = not config.trainer.disable_tqdm and os.isatty(2)
    made, _ = tokenize_files(files, tokenizer, folder, count, show_bar, refuse=dataset.bad_rows == "refuse")
    how = f", tokenised by {count} thread{'s' if count > 1 else ''} into" if made else ", tokens found in"
    return TokenStore(folder, dataset.load_all_from_disk), how


def _open_store(config: Config, tokenizer: TextTokenizer) -> CorpusSource:
    """The tokens that `dataset.path` holds already."""
    dataset, path = config.dataset, Path(config.dataset.path)
    for key, split in (("train_split", "train"), ("eval_split", "validation")):
        if getattr(dataset, key) not in (None, split):
            raise DataError(
                f"dataset.{key}: {getattr(dataset, key)!r}, but of a folder of tokens it is {split!r}, whole"
            )
    folders = [path if is_token_store(path) else path / "train"]
    folders += [path / "validation"] if is_token_store(path / "validation") else []
    stores = [TokenStore(folder, dataset.load_all_from_disk) for folder in folders]
    for store in stores:
        store.check_tokenizer(tokenizer)
    line = _describe_store(config, stores[0], " in")
    return _random_access(config, stores[0], stores[1] if len(stores) > 1 else None, line)


def _random_access(config: Config, train: Corpus, evaluation: Corpus | None, line: str) -> CorpusSource:
    """Holds out `validation_split`, and takes long documents apart for shuffling where lengths are known."""
    dataset = config.dataset
    if dataset.validation_split is not None and dataset.eval_split is None and not dataset.streaming:
        if len(train) < 2:
            raise DataError("dataset.validation_split: one document cannot be split")
        train, evaluation = (Subset(train, dataset.validation_split, config.seed, rest) for rest in (True, False))
    if not len(train):
        skipped = train.manifest.describe_skipped() if isinstance(train, TokenStore) else ""
        why = f" ({skipped})" if skipped else ""
        raise DataError(f"dataset.path: {dataset.path or dataset.name}: no document in it{why}")
    if train.is_tokenized and long_documents(config) == "split":
        train = Pieces(train, piece_length(config) - 2)
    return CorpusSource(train, evaluation, line)


def build_reader(config: Config, text: Text, ranks: Ranks, trains: bool = True) -> CorpusReader | StreamReader:
    """A reader of one shard, in the order that the configuration asks for; text to evaluate is read in its own order."""
    skips = SkippedRows(config.dataset.bad_rows == "refuse")
    if isinstance(text, Files):
        return StreamReader(text, ranks, skips)
    shuffles = trains and config.dataset.shuffle_buffer_size > 1
    return CorpusReader(text, config.seed if shuffles else None, ranks, skips)


# --- lengths, and lines of the summary -----------


def piece_length(config: Config) -> int:
    """Longest piece of a document, special tokens included."""
    return min(config.tokenizer.max_length, config.row_length)


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


def _describe_store(config: Config, store: TokenStore, how: str) -> str:
    manifest, skipped = store.manifest, store.manifest.describe_skipped()
    counts = f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"
    return f"{counts}{how} {store.folder}{_in_memory(config)}" + (f" ({skipped})" if skipped else "")


def _in_memory(config: Config) -> str:
    return ", held in memory" if config.dataset.load_all_from_disk else ""
