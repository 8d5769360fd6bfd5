"""The data of a pretraining run: from the configuration to opened sources, to loaders, and to lines of the summary."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path

from neobert.config.schema import Config
from neobert.config.sections import DatasetConfig
from neobert.data.batch import Batch, RowLayout
from neobert.data.files.documents import Corpus, Files, SkippedRows, fingerprint, hold_out, num_bytes, open_corpus
from neobert.data.files.splits import find_hub_splits, find_splits, hold_out_head
from neobert.data.files.token_store import TokenStore, is_token_store, tokenize_files
from neobert.data.mlm.pipeline import Collator, MaskedLoader, Masker, shards_of
from neobert.data.mlm.readers import LongDocuments, Pieces, Reader, RememberedReader, Segmenter, Text
from neobert.data.mlm.row_source import Packer, RowSource, Shard, ShuffleBuffer, Workers
from neobert.data.tokenizer import TextTokenizer, cores
from neobert.errors import DataError
from neobert.ranks import Ranks
from neobert.tasks.encoder import row_layout

EVAL_SEED = 0  # evaluation masks are the same in every run, so that losses compare across seeds

BatchPass = Callable[[], Iterator[Batch]]


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
    folder = Path(dataset.pre_tokenize_output or output_dir / "tokenized")
    if not dataset.mixture:
        return [_open_source(config, tokenizer, folder)]
    sources = []
    for number, entry in enumerate(dataset.mixture):
        own = config.model_copy(update={"dataset": entry.laid_over(dataset)})
        try:
            source = _open_source(own, tokenizer, folder / f"{number:02d}")
        except DataError as error:
            raise DataError(f"dataset.mixture, entry {number}: {error}") from None
        line, name = f"{entry.weight:g} parts of {entry.path or entry.name}: ", f"entry {number} of dataset.mixture"
        sources.append(replace(source, describe=line + source.describe, name=name, weight=entry.weight))
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
        return _random_access(config, store, evaluation, made)

    def opened(files: Files) -> Corpus:
        return open_corpus(files, fingerprint(files), dataset.load_all_from_disk, dataset.cache_dir)

    train = opened(train_files)
    line = f"{len(train):,} documents, {describe_size(train_files)}"
    return _random_access(config, train, None if eval_files is None else opened(eval_files), line)


def find_files(dataset: DatasetConfig) -> tuple[Files, Files | None]:
    """The files of a local path, or of a dataset of the hub when no path is given or it does not exist."""
    named = dataset.name not in ("", type(dataset).model_fields["name"].default)
    is_there = os.path.exists(dataset.path) or has_magic(dataset.path)
    wanted = (dataset.text_column, dataset.train_split, dataset.eval_split)
    if dataset.path and (is_there or not named):
        return find_splits(dataset.path, *wanted)
    where = (dataset.cache_dir, dataset.force_redownload)
    return find_hub_splits(dataset.name, dataset.config, dataset.streaming, *wanted, *where)


def _tokenize(config: Config, tokenizer: TextTokenizer, folder: Path, files: Files) -> tuple[TokenStore, str]:
    """The tokens of the files, made where they are missing, and how they came to be there."""
    dataset, count = config.dataset, min(config.dataset.num_proc, cores())
    if dataset.force_redownload and is_token_store(folder):
        shutil.rmtree(folder)
    show_bar = not config.trainer.disable_tqdm and os.isatty(2)
    made, _ = tokenize_files(files, tokenizer, folder, count, show_bar, refuse=dataset.bad_rows == "refuse")
    how = f", tokenised by {_threads(count)} into" if made else ", tokens found in"
    return TokenStore(folder, dataset.load_all_from_disk), how


def _open_store(config: Config, tokenizer: TextTokenizer) -> CorpusSource:
    """The tokens that `dataset.path` holds already."""
    dataset, path = config.dataset, Path(config.dataset.path)
    for key, split in (("train_split", "train"), ("eval_split", "validation")):
        if getattr(dataset, key) not in (None, split):
            where = f"dataset.{key}: {getattr(dataset, key)!r}"
            raise DataError(f"{where}, but of a folder of tokens it is {split!r}, whole")
    folders = [path if is_token_store(path) else path / "train"]
    folders += [path / "validation"] if is_token_store(path / "validation") else []
    stores = [TokenStore(folder, dataset.load_all_from_disk) for folder in folders]
    for store in stores:
        store.check_tokenizer(tokenizer)
    return _random_access(config, stores[0], stores[1] if len(stores) > 1 else None, " in")


def _random_access(config: Config, train: Corpus, evaluation: Corpus | None, line: str) -> CorpusSource:
    """Holds out `validation_split`, and takes long documents apart for shuffling where lengths are known. `line` describes the
    source; of tokens it says how they came into their folder.
    """
    dataset, skipped = config.dataset, ""
    in_memory = ", held in memory" if dataset.load_all_from_disk else ""
    if isinstance(train, TokenStore):
        skipped = train.manifest.describe_skipped(" ({})")
        line = f"{train.manifest.counts}{line} {train.folder}"
    line = f"{line}{in_memory}{skipped}"
    if dataset.validation_split is not None and dataset.eval_split is None and not dataset.streaming:
        if len(train) < 2:
            raise DataError("dataset.validation_split: one document cannot be split")
        train, evaluation = hold_out(train, dataset.validation_split, config.seed)
    if not len(train):
        raise DataError(f"dataset.path: {dataset.path or dataset.name}: no document in it{skipped}")
    if train.is_tokenized and long_documents(config) == "split":
        train = Pieces(train, piece_length(config) - 2)
    return CorpusSource(train, evaluation, line)


def build_reader(config: Config, text: Text, ranks: Ranks) -> Reader:
    """A reader of one shard, in the order that the configuration asks for."""
    seed = config.seed if config.dataset.shuffle_buffer_size > 1 else None
    return Reader(text, seed, ranks, SkippedRows(config.dataset.bad_rows == "refuse"))


# --- loaders -----------


@dataclass(frozen=True)
class PretrainingData:
    """The training loader, evaluation batches (a new pass at each call) if any, and lines for the summary."""

    train: MaskedLoader
    evaluation: BatchPass | None
    count_left: Callable[[], int]  # microbatches from where `train` stands to the end of its data, by reading it
    row_length: int  # tokens, padding included, at most
    describe: list[str]


def build_data(
    config: Config, tokenizer: TextTokenizer, ranks: Ranks, output_dir: Path, on_cuda: bool
) -> PretrainingData:
    """Open the corpus, tokenised if asked for; call it in the first rank first, the others find its files. Raises DataError."""
    sources = open_sources(config, tokenizer, output_dir)
    messages = [source.describe for source in sources]
    if config.dataset.pin_memory and not on_cuda:
        messages.append("dataset.pin_memory is for CUDA; this run has none")
    loader = _training_loader(config, tokenizer, sources, ranks, config.dataset.pin_memory and on_cuda)

    def count_left() -> int:
        counting = _training_loader(config, tokenizer, sources, ranks)
        counting.go_to(loader.position)
        return counting.count_batches()

    count = loader.workers.count
    how = f"tokenised by {_threads(count)}" if count else "tokenised as it is read"
    messages[0] += "; tokenised beforehand" if all(source.is_tokenized for source in sources) else f"; {how}"
    messages += [_describe_rows(config), _describe_evaluation(sources)]
    row_length = loader.collator.layout.row_length or piece_length(config)
    return PretrainingData(loader, _evaluation_pass(config, tokenizer, sources), count_left, row_length, messages)


def _training_loader(
    config: Config, tokenizer: TextTokenizer, sources: list[CorpusSource], ranks: Ranks, pin_memory: bool = False
) -> MaskedLoader:
    """Documents to masked batches of a rank."""
    dataset, trainer = config.dataset, config.trainer
    num_shards, batch_size = dataset.num_shards or ranks.world_size, trainer.per_device_train_batch_size
    count = 0 if all(source.is_tokenized for source in sources) else min(dataset.num_workers, cores())
    workers = Workers(tokenizer, count, dataset.prefetch_factor or 2, dataset.persistent_workers)
    num_epochs = None  # without end
    if trainer.max_steps < 0:
        num_epochs = trainer.num_train_epochs
    elif dataset.mixture and dataset.mixture_exhausted != "repeat":
        num_epochs = 1
    min_rows = batch_size if num_shards == len(sources) == 1 else 1
    weights = [source.weight for source in sources]

    def shard(number: int) -> Shard:
        readers = [build_reader(config, source.train, Ranks(number, num_shards)) for source in sources]
        opened = zip(readers, sources, strict=True)
        rows = [_row_source(config, workers, reader, num_epochs, min_rows, source) for reader, source in opened]
        return Shard(number, num_shards, rows, weights, dataset.mixture_exhausted, config.seed)

    num_rows = max(0, trainer.max_steps) * trainer.gradient_accumulation_steps * batch_size * ranks.world_size
    return MaskedLoader(
        [shard(number) for number in shards_of(ranks, num_shards)], workers,
        build_collator(config, tokenizer, config.seed, num_rows), batch_size, config.seed,
        fill_last=config.datacollator.pack_sequences and trainer.enforce_full_packed_batches, pin_memory=pin_memory,
    )  # fmt: skip


def build_segmenter(config: Config, tokenizer: TextTokenizer) -> Segmenter:
    """Documents to pieces with their special tokens."""
    return Segmenter(piece_length(config), long_documents(config), tokenizer.cls_id, tokenizer.sep_id)


def _row_source(
    config: Config, workers: Workers, reader: Reader, num_epochs: int | None, min_rows: int, source: CorpusSource | None
) -> RowSource:
    """The rows of `source`, or of what is evaluated (None)."""
    packed, trainer = config.datacollator.pack_sequences, config.trainer
    batch_size = trainer.per_device_train_batch_size if source else trainer.per_device_eval_batch_size
    num_shuffled = config.dataset.shuffle_buffer_size if source and config.dataset.streaming else 0
    return RowSource(
        reader, workers, build_segmenter(config, workers.tokenizer), Packer(config.row_length if packed else 0),
        ShuffleBuffer(num_shuffled, config.seed), source.name if source else "", num_epochs,
        group=batch_size if packed and not trainer.enforce_full_packed_batches else None, min_rows=min_rows,
    )  # fmt: skip


def _evaluation_pass(config: Config, tokenizer: TextTokenizer, sources: list[CorpusSource]) -> BatchPass | None:
    """A function that gives all evaluation batches; text is tokenised the first time only."""
    used = [(source.evaluation, source.weight) for source in sources if source.evaluation is not None]
    if not used:
        return None
    refuse = config.dataset.bad_rows == "refuse"
    readers = [RememberedReader(text, skips=SkippedRows(refuse), encode=tokenizer.encode) for text, _ in used]

    def batches() -> Iterator[Batch]:
        workers = Workers(tokenizer)
        rows = [_row_source(config, workers, reader.again(), 1, 0, None) for reader in readers]
        shard = Shard(0, 1, rows, [weight for _, weight in used], "drop", EVAL_SEED)
        collator = build_collator(config, tokenizer, EVAL_SEED, None)
        with closing(MaskedLoader([shard], workers, collator, config.trainer.per_device_eval_batch_size)) as loader:
            yield from loader

    return batches


def build_collator(config: Config, tokenizer: TextTokenizer, seed: int, num_rows: int | None) -> Collator:
    """Rows to masked batches. `num_rows`: of the whole run; None for evaluation, whose rate is constant."""
    asked = config.datacollator
    ids = (tokenizer.mask_id, tokenizer.special_ids, tokenizer.num_real)
    final = None if num_rows is None else asked.mlm_probability_final
    masker = Masker(seed, asked.mlm_probability, asked.mask_all, *ids, final, num_rows or 0)
    if asked.pack_sequences:
        return Collator(masker, RowLayout(tokenizer.pad_id, True, config.row_length))
    return Collator(masker, row_layout(config, tokenizer.pad_id, piece_length(config)))


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


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _describe_rows(config: Config) -> str:
    longer = f"longer documents: {long_documents(config)}"
    if config.datacollator.pack_sequences:
        return f"packed rows of {config.row_length} tokens; {longer}"
    how = "all of that length" if config.tokenizer.padding == "max_length" else "as long as the longest of their batch"
    return f"one document a row, at most {piece_length(config)} tokens, {how}; {longer}"


def _describe_evaluation(sources: list[CorpusSource]) -> str:
    texts = [source.evaluation for source in sources if source.evaluation is not None]
    if not texts:
        none = "no split named validation or test (or set dataset.validation_split with streaming: false)"
        return f"no evaluation: {none}"
    parts = [describe_size(text) if isinstance(text, Files) else f"{len(text):,} documents" for text in texts]
    return f"evaluated on {', '.join(parts)}"
