"""`neobert data`: what training will see, as lines: figures of the corpus, a histogram of lengths, decoded rows with masks."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neobert.checkpoints.initial_weights import load_named_tokenizer
from neobert.config.schema import Config
from neobert.data.batch import IGNORED, Batch
from neobert.data.files.documents import Files, SkippedRows, num_bytes
from neobert.data.mlm.packing import Segmenter, TruncationStats
from neobert.data.tokenizer import TextTokenizer, text_tokenizer
from neobert.ranks import Ranks
from neobert.tasks.pretraining.data import build_data
from neobert.tasks.pretraining.sources import CorpusSource, build_reader, long_documents, open_sources, piece_length

BAR_WIDTH, SHOWN_TOKENS, FILL_BATCHES = 50, 120, 50


@dataclass
class Sample:
    """The documents that were looked at: tokens of each, what was cut and passed over, and characters read."""

    lengths: list[int] = field(default_factory=list)
    cut: TruncationStats = field(default_factory=TruncationStats)
    skips: SkippedRows = field(default_factory=SkippedRows)
    num_bytes: int = 0
    is_all: bool = False


def describe_data(config: Config, num_rows: int, num_documents: int) -> Iterator[str]:
    """Lines about the data of a run. Raises UserError."""
    hf_tokenizer = load_named_tokenizer(config)
    tokenizer = text_tokenizer(hf_tokenizer)
    folder = Path(config.trainer.output_dir)
    for number, source in enumerate(open_sources(config, tokenizer, folder)):
        sample = _look_at(config, tokenizer, source, num_documents)
        yield from ["", source.describe] if number else [source.describe]
        yield from _figures(source, sample, piece_length(config))
    alone = config.model_copy(update={"dataset": config.dataset.model_copy(update={"num_workers": 0})})
    data = build_data(alone, tokenizer, Ranks(), folder, False)
    yield ""
    yield from data.describe[-2:]
    with closing(data.train) as loader:
        if config.trainer.max_steps < 0 and config.datacollator.mlm_probability_final is not None:
            loader.pipeline.set_num_rows(data.count_left() * loader.pipeline.batch_size)
        batches = [batch for batch, _ in zip(loader, range(FILL_BATCHES), strict=False)]
        shares = [batch.num_tokens / batch.input_ids.numel() for batch in batches]
        targets = sum(batch.num_targets for batch in batches) / max(1, sum(batch.num_tokens for batch in batches))
        yield (
            f"fill: {np.mean(shares):.2%} of the positions hold tokens, {targets:.1%} of those are predicted "
            f"(first {len(batches)} batches)"
        )
    rows = (row for batch in batches for row in _rows(batch))
    for number, (ids, labels, lengths) in zip(range(num_rows), rows, strict=False):
        yield ""
        yield f"row {number}: {len(lengths)} document{'s' if len(lengths) != 1 else ''}, {len(ids)} tokens"
        shown = _decode(ids[:SHOWN_TOKENS], labels[:SHOWN_TOKENS], lengths, hf_tokenizer)
        yield shown + (" …" if len(ids) > SHOWN_TOKENS else "")
    if num_rows:
        yield "\n| stands between documents, {a>b} is a token to predict and what the model sees in its place"


def _look_at(config: Config, tokenizer: TextTokenizer, source: CorpusSource, num_documents: int) -> Sample:
    """Tokenise the first documents in reading order (a random sample, where that is shuffled)."""
    reader, sample = build_reader(config, source.train, Ranks()), Sample()
    segmenter = Segmenter(piece_length(config), long_documents(config), tokenizer.cls_id, tokenizer.sep_id)
    while len(sample.lengths) < num_documents and not sample.is_all:
        block: list[Any] = reader.read()
        sample.is_all = not block
        if block and isinstance(block[0], str):
            sample.num_bytes += sum(len(text.encode()) for text in block)
            block = tokenizer.encode(block)
        sample.lengths += map(len, block)
        segmenter.pieces(block, sample.cut)
    sample.skips = reader.skips
    return sample


def _figures(source: CorpusSource, sample: Sample, longest: int) -> Iterator[str]:
    lengths = np.array(sample.lengths or [0])
    total = int(lengths.sum())
    what = "pieces" if source.is_tokenized else "documents"
    yield f"tokens per epoch: {_tokens_per_epoch(source, sample, total)}"
    yield (
        f"tokens per {what[:-1]}: mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, longest {lengths.max():,} "
        f"({len(sample.lengths):,} {what} looked at{', all of them' if sample.is_all else ''})"
    )
    yield (f"longer than a row of {longest}: {sample.cut.num_long:,}; cut: {sample.cut.share:.1%} of the tokens")
    if skipped := sample.skips.describe(sample.cut.num_empty):
        yield skipped
    yield from _histogram(lengths)


def _tokens_per_epoch(source: CorpusSource, sample: Sample, total: int) -> str:
    if sample.is_all:
        return f"{total:,}"
    if isinstance(source.train, Files):
        size = num_bytes(source.train)
        return f"about {total * size / max(1, sample.num_bytes):,.0f}, by size" if size else "unknown"
    return f"about {total * len(source.train) / len(sample.lengths):,.0f}"


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """A line per power of two."""
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    widest = bins.max()
    for power in range(int(np.flatnonzero(bins)[0]), len(bins)):
        bar = "#" * round(BAR_WIDTH * bins[power] / widest)
        yield f"  <= {2**power:>9,} tokens {bins[power]:>9,}  {bar}".rstrip()


def _rows(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """(ids, labels, lengths of the documents) of every row, without padding."""
    assert batch.labels is not None
    rest = list(batch.document_lengths or ())
    for number, (ids, labels) in enumerate(zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True)):
        lengths: list[int] = []
        while batch.document_lengths is not None and sum(lengths) < len(ids):
            lengths.append(rest.pop(0))
        if batch.attention_mask is not None:
            lengths = [int(batch.attention_mask[number].sum())]
        yield ids[: sum(lengths)], labels[: sum(lengths)], lengths


def _decode(ids: np.ndarray, labels: np.ndarray, lengths: list[int], hf_tokenizer: Any) -> str:
    """Text of a row: runs of tokens that are not predicted, and those that are, one by one."""
    ends = set(np.cumsum(lengths[:-1]).tolist())
    words: list[str] = []
    run: list[int] = []

    def token(number: int) -> str:
        return str(hf_tokenizer.decode([number])).strip()

    def end_run() -> None:
        if run:
            words.append(str(hf_tokenizer.decode(run)).strip())
            run.clear()

    for index, (seen, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        if index in ends:
            end_run()
            words.append("|")
        if label == IGNORED:
            run.append(seen)
            continue
        end_run()
        words.append(f"{{{token(label)}>{'=' if seen == label else token(seen)}}}")
    end_run()
    return " ".join(words)
