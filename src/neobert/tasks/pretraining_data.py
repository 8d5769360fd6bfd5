"""The data of a pretraining run: from the configuration to loaders, and what the summary says of them."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.data.batch import Batch, Collator
from neobert.data.loader import Loader, Pipeline
from neobert.data.masking import Masker
from neobert.data.order import CorpusReader, Pieces, Rank, StreamReader, Subset
from neobert.data.packing import LongDocuments, OnePerRow, Packer, Segmenter
from neobert.data.prepare import check_store, tokenize_files
from neobert.data.sources import Corpus, Files, find_splits, open_corpus
from neobert.data.token_store import TokenStore, is_token_store
from neobert.data.tokenizer import TextTokenizer
from neobert.errors import DataError

EVAL_SEED = 0  # evaluation masks are the same in every run, so that losses compare across seeds

Reader = CorpusReader | StreamReader


@dataclass(frozen=True)
class PretrainingData:
    """The training loader, evaluation batches (a new pass at each call) if any, and lines for the summary."""

    train: Loader
    evaluation: Callable[[], Iterator[Batch]] | None
    num_steps: int
    describe: list[str]


def build_data(
    config: Config, tokenizer: TextTokenizer, rank: Rank, output_dir: Path, on_cuda: bool
) -> PretrainingData:
    """Open, and if asked for tokenise, the corpus. Raises DataError."""
    train_reader, eval_reader, notes = build_readers(config, tokenizer, rank, output_dir)
    by_epochs = config.trainer.max_steps < 0
    num_epochs = config.trainer.num_train_epochs if by_epochs else None
    num_steps = config.trainer.max_steps
    if config.dataset.pin_memory and not on_cuda:
        notes.append("dataset.pin_memory is for CUDA; this run has none")
    if by_epochs:
        counting = build_pipeline(config, tokenizer, _copy(train_reader), num_epochs, training=True)
        num_steps = -(-counting.count_batches() // config.trainer.gradient_accumulation_steps)
        notes.append(f"{num_epochs} epochs are {num_steps:,} steps")
    pipeline = build_pipeline(config, tokenizer, train_reader, num_epochs, training=True)
    evaluation = None
    if eval_reader is not None:
        evaluation = _evaluation_pass(config, tokenizer, eval_reader)
    workers = (
        f"{pipeline.num_workers} tokenising processes" if pipeline.num_workers else "tokenised in the training process"
    )
    if isinstance(train_reader, CorpusReader) and isinstance(train_reader.corpus, TokenStore | Pieces):
        workers = "tokenised beforehand"
    return PretrainingData(
        Loader(pipeline, pin_memory=on_cuda),
        evaluation,
        num_steps,
        [f"{notes[0]}; {workers}", *notes[1:], _describe_rows(config), _describe_evaluation(eval_reader)],
    )


# --- where documents come from -----------


def build_readers(
    config: Config, tokenizer: TextTokenizer, rank: Rank, output_dir: Path
) -> tuple[Reader, Reader | None, list[str]]:
    """(training reader, evaluation reader or None, lines for the summary)."""
    dataset = config.dataset
    if is_token_store(dataset.path) or is_token_store(Path(dataset.path) / "train"):
        return _store_readers(config, tokenizer, rank, Path(dataset.path))
    train_files, eval_files = find_splits(dataset.path, dataset.text_column, dataset.train_split, dataset.eval_split)
    if not train_files.num_bytes:
        raise DataError(f"dataset.path: {', '.join(train_files.paths)}: empty")
    if dataset.streaming:
        evaluation = StreamReader(eval_files) if eval_files else None
        return StreamReader(train_files, rank), evaluation, [f"streamed: {_size(train_files)}"]
    if dataset.pre_tokenize:
        return _pre_tokenized_readers(config, tokenizer, rank, output_dir, train_files, eval_files)
    train = open_corpus(train_files, dataset.load_all_from_disk, dataset.cache_dir)
    evaluation = open_corpus(eval_files, dataset.load_all_from_disk, dataset.cache_dir) if eval_files else None
    return *_corpus_readers(config, rank, train, evaluation), [
        f"{len(train):,} documents, {_size(train_files)}{_held(config)}"
    ]


def _pre_tokenized_readers(
    config: Config, tokenizer: TextTokenizer, rank: Rank, output_dir: Path, train_files: Files, eval_files: Files | None
) -> tuple[Reader, Reader | None, list[str]]:
    folder = Path(config.dataset.pre_tokenize_output or output_dir / "tokenized")
    num_proc = min(config.dataset.num_proc, os.cpu_count() or 1)
    show_bar = not config.trainer.disable_tqdm and os.isatty(2)
    stores, notes, held = [], [], _held(config)
    for name, files in (("train", train_files), ("validation", eval_files)):
        if files is not None:
            if config.dataset.force_redownload and is_token_store(folder / name):
                shutil.rmtree(folder / name)
            store, made = tokenize_files(
                files, tokenizer, folder / name, num_proc, show_bar, config.dataset.load_all_from_disk
            )
            stores.append(store)
            how = f"tokenised by {num_proc} processes into" if made else "tokens found in"
            notes.append(
                f"{store.manifest.num_documents:,} documents, {store.manifest.num_tokens:,} tokens, {how} {folder / name}{held}"
            )
    return *_corpus_readers(config, rank, stores[0], stores[1] if eval_files else None), notes[:1]


def _store_readers(
    config: Config, tokenizer: TextTokenizer, rank: Rank, path: Path
) -> tuple[Reader, Reader | None, list[str]]:
    in_memory = config.dataset.load_all_from_disk
    train = TokenStore(path if is_token_store(path) else path / "train", in_memory)
    evaluation = TokenStore(path / "validation", in_memory) if is_token_store(path / "validation") else None
    for store in (train, evaluation):
        if store is not None:
            check_store(store, tokenizer)
    note = f"{train.manifest.num_documents:,} documents, {train.manifest.num_tokens:,} tokens in {train.folder}{_held(config)}"
    return *_corpus_readers(config, rank, train, evaluation), [note]


def _corpus_readers(config: Config, rank: Rank, train: Any, evaluation: Any) -> tuple[Reader, Reader | None]:
    """Readers of random-access corpora; holds out `validation_split`, and shuffles by pieces where lengths are known."""
    share = config.dataset.validation_split
    if share is not None:
        if len(train) < 2:
            raise DataError("dataset.validation_split: one document cannot be split")
        train, evaluation = (Subset(train, share, config.seed, rest) for rest in (True, False))
    if not len(train):
        raise DataError(f"dataset.path: {config.dataset.path}: no document in it")
    room = _piece_length(config) - 2
    if _is_tokenized(train) and _long_documents(config) == "split":
        train = Pieces(train, room)
    return CorpusReader(train, config.seed, rank), None if evaluation is None else CorpusReader(evaluation, None)


def _is_tokenized(corpus: Corpus) -> bool:
    return isinstance(corpus.corpus if isinstance(corpus, Subset) else corpus, TokenStore)


# --- what is made of them -----------


def build_pipeline(
    config: Config, tokenizer: TextTokenizer, reader: Reader, num_epochs: int | None, training: bool
) -> Pipeline:
    """Documents to masked batches, as the configuration says."""
    packed, dataset = config.datacollator.pack_sequences, config.dataset
    batch_size = config.trainer.per_device_train_batch_size if training else config.trainer.per_device_eval_batch_size
    is_text = isinstance(reader, StreamReader) or not _is_tokenized(getattr(reader.corpus, "corpus", reader.corpus))
    workers = min(dataset.num_workers, os.cpu_count() or 1) if is_text and training else 0
    segmenter = Segmenter(_piece_length(config), _long_documents(config), tokenizer.cls_id, tokenizer.sep_id)
    return Pipeline(
        reader,
        tokenizer,
        segmenter,
        Packer(_row_length(config)) if packed else OnePerRow(),
        build_collator(config, tokenizer, config.seed if training else EVAL_SEED),
        batch_size,
        shuffle_size=dataset.shuffle_buffer_size if training and dataset.streaming else 0,
        seed=config.seed,
        num_epochs=num_epochs,
        keep_short_batch=not (training and packed and config.trainer.enforce_full_packed_batches),
        flush_every_block=packed and not config.trainer.enforce_full_packed_batches,
        num_workers=workers,
        prefetch_factor=dataset.prefetch_factor or 2,
        persistent_workers=dataset.persistent_workers,
        training=training,
    )


def build_collator(config: Config, tokenizer: TextTokenizer, seed: int) -> Collator:
    """Rows to masked batches."""
    datacollator, packed = config.datacollator, config.datacollator.pack_sequences
    masker = Masker(
        seed,
        datacollator.mlm_probability,
        datacollator.mask_all,
        tokenizer.mask_id,
        tokenizer.special_ids,
        tokenizer.num_real,
    )
    to_full_length = packed or config.tokenizer.padding == "max_length"
    row_length = (_row_length(config) if packed else _piece_length(config)) if to_full_length else None
    return Collator(masker, tokenizer.pad_id, packed, row_length, datacollator.pad_to_multiple_of or 1)


def _evaluation_pass(config: Config, tokenizer: TextTokenizer, reader: Reader) -> Callable[[], Iterator[Batch]]:
    def batches() -> Iterator[Batch]:
        with closing(Loader(build_pipeline(config, tokenizer, _copy(reader), 1, training=False))) as loader:
            yield from loader

    return batches


def _copy(reader: Reader) -> Reader:
    if isinstance(reader, StreamReader):
        return StreamReader(reader.files, reader.rank)
    return CorpusReader(reader.corpus, reader.seed, reader.rank)


def _row_length(config: Config) -> int:
    return config.datacollator.max_length or config.dataset.max_seq_length


def _piece_length(config: Config) -> int:
    return min(config.tokenizer.max_length, _row_length(config))


def _long_documents(config: Config) -> LongDocuments:
    if config.dataset.long_documents:
        return config.dataset.long_documents
    return "truncate" if config.tokenizer.truncation and not config.datacollator.pack_sequences else "split"


def _describe_rows(config: Config) -> str:
    if config.datacollator.pack_sequences:
        return f"packed rows of {_row_length(config)} tokens; longer documents: {_long_documents(config)}"
    how = "all of that length" if config.tokenizer.padding == "max_length" else "as long as the longest of their batch"
    return f"one document a row, at most {_piece_length(config)} tokens, {how}; longer documents: {_long_documents(config)}"


def _describe_evaluation(reader: Reader | None) -> str:
    if reader is None:
        return (
            "no evaluation: no split named validation or test (or set dataset.validation_split with streaming: false)"
        )
    if isinstance(reader, StreamReader):
        return f"evaluated on {_size(reader.files)}"
    return f"evaluated on {len(reader.corpus):,} documents"


def _held(config: Config) -> str:
    return ", held in memory" if config.dataset.load_all_from_disk else ""


def _size(files: Files) -> str:
    size = files.num_bytes
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e5 else ("kB", 1e3)
    many = f" in {len(files.paths)} files" if len(files.paths) > 1 else f", {files.paths[0]}"
    return f"{size / scale:.1f} {unit}{many}"
