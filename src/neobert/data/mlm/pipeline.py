"""From rows to masked batches, with a position that is exact at every batch.

    RowSource (one per source) -> Shard (draws rows from its sources) -> microbatches -> mask -> training

Everything after the tokeniser runs in one background thread, in one order, whatever the number of tokenising threads.
Each batch made ahead carries the position after it (plain data that shares arrays: tens of microseconds), so what was
prefetched and not used is read again after a resume, and nothing else is.

A rank owns the shards whose number is its own modulo the number of ranks, and takes its batches from them in turn: so a run
may go on with any number of ranks that divides the shards. A shard that has ended gives empty batches until all shards of its
rank have; then the loader ends, and the training loop fills up with empty batches (`Pipeline.empty_batch`) while other ranks
have some.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np

from neobert.data.batch import Batch
from neobert.data.files.documents import SkippedRows
from neobert.data.loader import Loader, Saved
from neobert.data.mlm.masking import Collator
from neobert.data.mlm.packing import Row, TruncationStats
from neobert.data.mlm.row_source import Shard, Workers, describe_skips, first_skip
from neobert.data.mlm.state import FORMAT, State, read_position, write_position
from neobert.data.tokenizer import Ids
from neobert.errors import CheckpointError
from neobert.ranks import Ranks

BATCHES_AHEAD = 4


@dataclass
class Pipeline:
    """Microbatches of one data rank, endlessly, or until its shards end."""

    shards: list[Shard]
    workers: Workers
    collator: Collator
    batch_size: int
    seed: int = 0
    fill_last: bool = False  # a shard's last, short microbatch is filled up with empty rows

    def __post_init__(self) -> None:
        self.num_done = 0

    def batches(self) -> Iterator[tuple[Batch, State]]:
        """Masked microbatches, each with the position after it."""
        for rows in self._microbatches():
            yield self.collator(rows, self.epoch), self.state_dict()

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
        """Set how many rows the whole run has, which rates of masking that change depend on."""
        self.collator = replace(self.collator, masker=replace(self.collator.masker, num_rows=num_rows))

    def count_batches(self) -> int:
        """Batches that are left, by a pass over the data that masks nothing."""
        count = sum(1 for _ in self._microbatches())
        self.workers.close()
        return count

    def state_dict(self) -> State:
        """The position after the last batch that `batches` yielded."""
        return {"num_batches": self.num_done, "shards": {shard.index: shard.state_dict() for shard in self.shards}}

    def load_state_dict(self, state: State) -> None:
        """Continue after `state`; reads nothing again."""
        self.num_done = state["num_batches"]
        for shard in self.shards:
            shard.load_state_dict(state["shards"][shard.index])

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


class PipelineLoader(Loader[State]):
    """Batches of a pipeline, made ahead by one thread."""

    def __init__(self, pipeline: Pipeline, pin_memory: bool = False):
        super().__init__(pipeline.state_dict(), num_threads=1, num_ahead=BATCHES_AHEAD)
        self.pipeline = pipeline
        self._pin = pin_memory
        self.observe: Callable[[Batch, int], None] | None = None  # called with every batch used and its number, from 1

    def __next__(self) -> Batch:
        batch = super().__next__()
        if self.observe is not None:
            self.observe(batch, self.position["num_batches"])
        return batch

    def jobs(self) -> Iterator[Callable[[], tuple[Batch, State]]]:
        batches = self.pipeline.batches()
        pinned = ((batch.pin_memory(), position) for batch, position in batches)
        return repeat((pinned if self._pin else batches).__next__)

    def close(self) -> None:
        super().close()
        self.pipeline.workers.close()

    def state_dict(self, position: State | None = None) -> Saved:
        pipeline = self.pipeline
        return write_position(position or self.position, pipeline.fingerprint(), pipeline.workers.tokenizer.dtype)

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        numbers = [shard.index for shard in self.pipeline.shards]
        self.position = read_position((state, arrays), numbers, self.pipeline.fingerprint())
        self.pipeline.load_state_dict(self.position)

    def describe_used(self) -> list[str]:
        """What was passed over and cut in the documents up to the last batch used; empty when nothing was."""
        counts: Counter[str] = Counter()
        skips, found = SkippedRows(), []
        for source in (source for shard in self.position["shards"].values() for source in shard["sources"]):
            counts.update(source["cut"])
            for reason, number in source["reader"]["skips"]["counts"].items():
                skips.counts[reason] = skips.counts.get(reason, 0) + number
                skips.first.setdefault(reason, source["reader"]["skips"]["first"].get(reason, ""))
        cut = TruncationStats(**counts)
        if cut.num_cut:
            found.append(f"cut: {cut.share:.1%} of the tokens, in {cut.num_long:,} of {cut.num_documents:,} documents")
        if message := describe_skips(skips.counts, cut.num_empty):
            found.append(message + first_skip(skips.first))
        return found


def shards_of(ranks: Ranks, num_shards: int) -> list[int]:
    """The shards of a rank. Raises CheckpointError when they cannot be shared equally."""
    if num_shards % ranks.world_size:
        raise CheckpointError(
            f"the data is dealt to {num_shards} shards, which {ranks.world_size} processes cannot share equally: "
            f"use a number of processes that divides {num_shards}"
        )
    return list(range(ranks.rank, num_shards, ranks.world_size))
