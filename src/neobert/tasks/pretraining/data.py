"""The data of a pretraining run: from opened sources to loaders, and what the summary says of them."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from neobert.config.schema import Config
from neobert.data.batch import Batch, RowLayout
from neobert.data.files.documents import Corpus, Files
from neobert.data.mlm.packing import Packer, Segmenter
from neobert.data.mlm.pipeline import Collator, Masker, Pipeline, PipelineLoader, shards_of
from neobert.data.mlm.readers import Reader, RememberedReader
from neobert.data.mlm.row_source import RowSource, Shard, ShuffleBuffer, Workers
from neobert.data.tokenizer import TextTokenizer, cores
from neobert.ranks import Ranks
from neobert.tasks.pretraining.sources import (
    CorpusSource,
    build_reader,
    describe_size,
    long_documents,
    open_sources,
    piece_length,
)

EVAL_SEED = 0  # evaluation masks are the same in every run, so that losses compare across seeds


@dataclass(frozen=True)
class PretrainingData:
    """The training loader, evaluation batches (a new pass at each call) if any, and lines for the summary."""

    train: PipelineLoader
    evaluation: Callable[[], Iterator[Batch]] | None
    count_left: Callable[[], int]  # microbatches from where `train` stands to the end of its data, by reading it
    row_length: int  # tokens, padding included, at most
    describe: list[str]


def build_data(
    config: Config,
    tokenizer: TextTokenizer,
    ranks: Ranks,
    output_dir: Path,
    on_cuda: bool,
    main_first: Callable[[Callable[[], list[CorpusSource]]], list[CorpusSource]] = lambda function: function(),
) -> PretrainingData:
    """Open, and if asked for tokenise, the corpus; the other ranks find what the first one wrote.

    `main_first` calls a function in the first rank, then in the others. Raises DataError.
    """
    sources = main_first(lambda: open_sources(config, tokenizer, output_dir))
    notes = [source.describe for source in sources]
    if config.dataset.pin_memory and not on_cuda:
        notes.append("dataset.pin_memory is for CUDA; this run has none")
    pipeline = _training_pipeline(config, tokenizer, sources, ranks)
    loader = PipelineLoader(pipeline, pin_memory=config.dataset.pin_memory and on_cuda)

    def count_left() -> int:
        counting = _training_pipeline(config, tokenizer, sources, ranks)
        counting.load_state_dict(loader.position)
        return counting.count_batches()

    notes[0] += f"; {_describe_workers(pipeline, sources)}"
    return PretrainingData(
        loader,
        _evaluation_pass(config, tokenizer, sources),
        count_left,
        pipeline.collator.layout.row_length or piece_length(config),
        [*notes, _describe_rows(config), _describe_evaluation([source.evaluation for source in sources])],
    )


def _num_epochs(config: Config) -> int | None:
    """How often a source is read: without end, or as long as `max_steps: -1` or the mixture says."""
    if config.trainer.max_steps < 0:
        return config.trainer.num_train_epochs
    return 1 if config.dataset.mixture and config.dataset.mixture_exhausted != "repeat" else None


def _training_pipeline(config: Config, tokenizer: TextTokenizer, sources: list[CorpusSource], ranks: Ranks) -> Pipeline:
    """Documents to masked batches of a rank."""
    dataset, packed = config.dataset, config.datacollator.pack_sequences
    num_shards = dataset.num_shards or ranks.world_size
    batch_size = config.trainer.per_device_train_batch_size
    is_text = not all(source.is_tokenized for source in sources)
    workers = Workers(
        tokenizer,
        min(dataset.num_workers, cores()) if is_text else 0,
        dataset.prefetch_factor or 2,
        dataset.persistent_workers,
    )
    min_rows = batch_size if num_shards == len(sources) == 1 else 1
    shards = [
        Shard(
            number,
            num_shards,
            [
                _row_source(
                    config,
                    workers,
                    build_reader(config, source.train, Ranks(number, num_shards)),
                    _num_epochs(config),
                    min_rows,
                    source,
                )
                for source in sources
            ],
            [source.weight for source in sources],
            dataset.mixture_exhausted,
            config.seed,
        )
        for number in shards_of(ranks, num_shards)
    ]
    num_rows = (
        max(0, config.trainer.max_steps) * config.trainer.gradient_accumulation_steps * batch_size * ranks.world_size
    )
    return Pipeline(
        shards,
        workers,
        build_collator(config, tokenizer, config.seed, num_rows),
        batch_size,
        config.seed,
        fill_last=packed and config.trainer.enforce_full_packed_batches,
    )


def _row_source(
    config: Config, workers: Workers, reader: Reader, num_epochs: int | None, min_rows: int, source: CorpusSource | None
) -> RowSource:
    packed, tokenizer, training = config.datacollator.pack_sequences, workers.tokenizer, source is not None
    trainer = config.trainer
    batch_size = trainer.per_device_train_batch_size if training else trainer.per_device_eval_batch_size
    return RowSource(
        reader,
        workers,
        Segmenter(piece_length(config), long_documents(config), tokenizer.cls_id, tokenizer.sep_id),
        Packer(config.row_length if packed else 0),
        ShuffleBuffer(config.dataset.shuffle_buffer_size if training and config.dataset.streaming else 0, config.seed),
        source.name if source else "",
        num_epochs,
        group=batch_size if packed and not config.trainer.enforce_full_packed_batches else None,
        min_rows=min_rows,
    )


def _evaluation_pass(
    config: Config, tokenizer: TextTokenizer, sources: list[CorpusSource]
) -> Callable[[], Iterator[Batch]] | None:
    """A function that gives all evaluation batches; text is tokenised the first time only."""
    readers = [
        (
            RememberedReader(build_reader(config, source.evaluation, Ranks(), trains=False), tokenizer.encode),
            source.weight,
        )
        for source in sources
        if source.evaluation is not None
    ]
    if not readers:
        return None

    def batches() -> Iterator[Batch]:
        workers = Workers(tokenizer)
        rows = [_row_source(config, workers, reader.again(), 1, 0, None) for reader, _ in readers]
        pipeline = Pipeline(
            [Shard(0, 1, rows, [weight for _, weight in readers], "drop", EVAL_SEED)],
            workers,
            build_collator(config, tokenizer, EVAL_SEED, None),
            config.trainer.per_device_eval_batch_size,
        )
        with closing(PipelineLoader(pipeline)) as loader:
            yield from loader

    return batches


def build_collator(config: Config, tokenizer: TextTokenizer, seed: int, num_rows: int | None) -> Collator:
    """Rows to masked batches. `num_rows`: of the whole run; None for evaluation, whose rate is constant."""
    datacollator, packed = config.datacollator, config.datacollator.pack_sequences
    masker = Masker(
        seed,
        datacollator.mlm_probability,
        datacollator.mask_all,
        tokenizer.mask_id,
        tokenizer.special_ids,
        tokenizer.num_real,
        None if num_rows is None else datacollator.mlm_probability_final,
        num_rows or 0,
    )
    to_full_length = packed or config.tokenizer.padding == "max_length"
    length = (config.row_length if packed else piece_length(config)) if to_full_length else None
    multiple = None if packed else datacollator.pad_to_multiple_of
    return Collator(masker, RowLayout(tokenizer.pad_id, packed, length, multiple or 1))


# --- words for the summary -----------


def _describe_workers(pipeline: Pipeline, sources: list[CorpusSource]) -> str:
    if all(source.is_tokenized for source in sources):
        return "tokenised beforehand"
    count = pipeline.workers.count
    return f"tokenised by {count} thread{'s' if count > 1 else ''}" if count else "tokenised as it is read"


def _describe_rows(config: Config) -> str:
    longer = f"longer documents: {long_documents(config)}"
    if config.datacollator.pack_sequences:
        return f"packed rows of {config.row_length} tokens; {longer}"
    how = "all of that length" if config.tokenizer.padding == "max_length" else "as long as the longest of their batch"
    return f"one document a row, at most {piece_length(config)} tokens, {how}; {longer}"


def _describe_evaluation(texts: list[Files | Corpus | None]) -> str:
    found = [text for text in texts if text is not None]
    if not found:
        return (
            "no evaluation: no split named validation or test (or set dataset.validation_split with streaming: false)"
        )
    parts = [describe_size(text) if isinstance(text, Files) else f"{len(text):,} documents" for text in found]
    return f"evaluated on {', '.join(parts)}"
