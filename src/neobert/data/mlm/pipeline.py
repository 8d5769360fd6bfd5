"""From rows to masked batches, with a position that is exact at every batch.

    RowSource (one per source) -> Shard (draws rows from its sources) -> microbatches -> mask -> queue -> training

Everything behind the tokeniser runs in one background thread, in one order, whatever the number of tokenising threads.
Each batch in the queue carries the position behind itself (tuples that share arrays: tens of microseconds), so what was
prefetched and not used is read again after a resume, and nothing else is.

The corpus is dealt to `world` shards, document by document. A rank owns the shards whose number is its own modulo the number
of ranks, and takes its batches from them in turn: so a run may go on with any number of ranks that divides the shards. A shard
that has ended gives empty batches until all shards of its rank have; then the loader ends, and the training loop fills up with
empty batches (`Loader.empty_batch`) while other ranks have some.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neobert.data.batch import Batch, Collator
from neobert.data.files.documents import SkippedRows
from neobert.data.mlm.packing import Row, TruncationStats
from neobert.data.mlm.row_source import Workers
from neobert.data.mlm.shards import Shard
from neobert.data.mlm.state import FORMAT, Saved, Snapshot, read_snapshot, write_snapshot
from neobert.data.tokenizer import Ids
from neobert.errors import CheckpointError

QUEUE_BATCHES = 4


@dataclass
class Pipeline:
    """Microbatches of one data rank, endlessly, or until its shards end."""

    shards: list[Shard]
    workers: Workers
    collator: Collator
    batch_size: int
    seed: int = 0
    fill_last: bool = False  # a lane's last, short microbatch is filled up with empty rows

    def __post_init__(self) -> None:
        self.num_done = 0

    def batches(self) -> Iterator[tuple[Batch, Snapshot]]:
        """Masked microbatches, each with the position behind it."""
        for rows in self._microbatches():
            yield self.collator(rows, self.epoch), self.snapshot()

    def _microbatches(self) -> Iterator[list[Row]]:
        """The rows of the microbatches; shards take turns, those that have ended with empty rows."""
        while self.num_done % len(self.shards) or not all(shard.is_done() for shard in self.shards):
            rows = self._take(self.shards[self.num_done % len(self.shards)])
            if not rows or self.fill_last:
                rows += self._empty_rows()[len(rows) :]
            self.num_done += 1
            yield rows

    @property
    def epoch(self) -> int:
        """The epoch that all of these shards have got to."""
        return min(shard.epoch for shard in self.shards)

    def _take(self, shard: Shard) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < self.batch_size and (row := shard.next()) is not None:
            rows.append(row)
            if row.ends_batch:
                break
        return rows

    def _empty_rows(self) -> list[Row]:
        """A batch of [CLS] [SEP]: nothing in it can be masked."""
        tokenizer = self.workers.tokenizer
        ids: Ids = np.array([tokenizer.cls_id, tokenizer.sep_id], dtype=tokenizer.dtype)
        return [Row((ids,), 0, 0)] * self.batch_size

    def empty_batch(self) -> Batch:
        """A batch without targets."""
        return self.collator(self._empty_rows(), self.epoch)

    def set_num_rows(self, num_rows: int) -> None:
        """How many rows the whole run has, which rates of masking that change depend on."""
        self.collator = replace(self.collator, masker=replace(self.collator.masker, num_rows=num_rows))

    def count_batches(self) -> int:
        """Batches that are left, by a pass over the data that masks nothing."""
        count = sum(1 for _ in self._microbatches())
        self.workers.close()
        return count

    # --- position -----------

    def snapshot(self) -> Snapshot:
        """The position behind the last batch that `batches` yielded."""
        return Snapshot(tuple(shard.snapshot() for shard in self.shards), self.num_done)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue behind `snapshot`; reads nothing again."""
        self.num_done = snapshot.num_batches
        for shard, state in zip(self.shards, snapshot.shards, strict=True):
            shard.restore(state)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same."""
        first = self.shards[0]
        sources = [source.fingerprint() for source in first.sources]
        mixture = [[source["source"], weight] for source, weight in zip(sources, first.weights, strict=True)]
        return {
            "format": FORMAT,
            **sources[0],
            "tokenizer": self.workers.tokenizer.fingerprint,
            "seed": self.seed,
            "lanes": first.world,
            "mixture": [*mixture, first.exhausted] if len(sources) > 1 else None,
        }


class Loader:
    """Batches of a pipeline, prepared ahead in a background thread. `state_dict()` is the position behind the last used."""

    def __init__(self, pipeline: Pipeline, pin_memory: bool = False):
        self.pipeline = pipeline
        self._pin = pin_memory
        self.observe: Callable[[Batch, int], None] | None = None  # called with every batch used and its number, from 1
        self._snapshot = pipeline.snapshot()
        self._queue: queue.Queue[tuple[Batch, Snapshot] | None] = queue.Queue(QUEUE_BATCHES)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._running: Future[None] | None = None
        self._stop = threading.Event()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises StopIteration behind the last epoch, and what the pipeline raised."""
        if self._running is None:
            self._running = self._thread.submit(self._run)
        item = self._queue.get()
        if item is None:
            self._queue.put(None)  # asked again, it says the same
            self._running.result()
            raise StopIteration
        batch, self._snapshot = item
        if self.observe is not None:
            self.observe(batch, self._snapshot.num_batches)
        return batch

    def _run(self) -> None:
        try:
            for batch, snapshot in self.pipeline.batches():
                if not self._put((batch.pin_memory() if self._pin else batch, snapshot)):
                    return
        finally:
            self._put(None)

    def _put(self, item: tuple[Batch, Snapshot] | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        """Stop the threads."""
        self._stop.set()
        self._thread.shutdown()
        self.pipeline.workers.close()

    @property
    def position(self) -> Snapshot:
        """Behind the last batch that was used."""
        return self._snapshot

    def state_dict(self, position: Snapshot | None = None) -> Saved:
        """(JSON, arrays) of a `position`, or of that behind the last batch that was used."""
        pipeline = self.pipeline
        numbers = [shard.index for shard in pipeline.shards]
        return write_snapshot(
            position or self._snapshot, numbers, pipeline.fingerprint(), pipeline.workers.tokenizer.dtype
        )

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continue behind a saved position. Raises CheckpointError when the data is not the same."""
        assert self._running is None, "restore before the first batch"
        numbers = [shard.index for shard in self.pipeline.shards]
        self._snapshot = read_snapshot((state, arrays), numbers, self.pipeline.fingerprint())
        self.pipeline.restore(self._snapshot)

    def describe_used(self) -> list[str]:
        """What was passed over and cut in the documents behind the last batch used; empty when nothing was."""
        cut, skips, found = TruncationStats(), SkippedRows(), []
        for source in (source for shard in self._snapshot.shards for source in shard.sources):
            for name, number in vars(source.cut).items():
                setattr(cut, name, getattr(cut, name) + number)
            for reason, number in source.reader["skips"]["counts"].items():
                skips.counts[reason] = skips.counts.get(reason, 0) + number
                skips.first.setdefault(reason, source.reader["skips"]["first"].get(reason, ""))
        if cut.num_cut:
            found.append(f"cut: {cut.share:.1%} of the tokens, in {cut.num_long:,} of {cut.num_documents:,} documents")
        if skipped := skips.describe(cut.num_empty):
            found.append(skipped)
        return found


def shards_of(rank: int, num_ranks: int, num_shards: int) -> list[int]:
    """The shards of a rank. Raises CheckpointError when they cannot be shared equally."""
    if num_shards % num_ranks:
        raise CheckpointError(
            f"the data is dealt to {num_shards} shards, which {num_ranks} processes cannot share equally: "
            f"use a number of processes that divides {num_shards}"
        )
    return list(range(rank, num_shards, num_ranks))


def build_steps(batches: Iterator[Batch], accumulation: int) -> Callable[[], list[Batch]]:
    """A function that fetches the microbatches of one optimizer step; fewer, or none, at the end of the data."""

    def fetch() -> list[Batch]:
        return [batch for _, batch in zip(range(accumulation), batches, strict=False)]

    return fetch
