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

from neobert.data.batch import Batch, Loader, Saved, State
from neobert.data.files.documents import SkippedRows
from neobert.data.mlm.masking import Collator
from neobert.data.mlm.packing import Row, TruncationStats
from neobert.data.mlm.row_source import Shard, Workers
from neobert.data.tokenizer import Ids
from neobert.errors import CheckpointError
from neobert.ranks import Ranks

BATCHES_AHEAD = 4
FORMAT = 2  # of saved positions; their JSON keeps its names
ROWS = ("open_rows", "ready")


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
        if skipped := skips.describe(cut.num_empty):
            found.append(skipped)
        return found


def shards_of(ranks: Ranks, num_shards: int) -> list[int]:
    """The shards of a rank. Raises CheckpointError when they cannot be shared equally."""
    if num_shards % ranks.world_size:
        raise CheckpointError(
            f"the data is dealt to {num_shards} shards, which {ranks.world_size} processes cannot share equally: "
            f"use a number of processes that divides {num_shards}"
        )
    return list(range(ranks.rank, num_shards, ranks.world_size))


# --- positions on disk -----------


def write_position(position: State, fingerprint: dict[str, Any], dtype: type) -> Saved:
    """The position of `Pipeline.state_dict` as JSON and arrays."""
    arrays: dict[str, np.ndarray] = {}
    shards = {
        str(number): {
            **shard,
            "sources": [_write_source(arrays, f"{number}.{n}.", one, dtype) for n, one in enumerate(shard["sources"])],
        }
        for number, shard in position["shards"].items()
    }
    turns, rest = divmod(position["num_batches"], len(shards))
    state = {"lanes_per_rank": len(shards), "turns": turns, "rest": rest, "lanes": shards}
    return {"fingerprint": fingerprint, **state}, arrays


def read_position(saved: Saved, shard_numbers: list[int], fingerprint: dict[str, Any]) -> State:
    """The position of the given shards. Raises CheckpointError when the data, or its deal to ranks, is not the same."""
    state, arrays = saved
    check_fingerprint(state["fingerprint"], fingerprint)
    shards = {}
    for number in shard_numbers:
        shard = state["lanes"].get(str(number))
        if shard is None:
            raise CheckpointError(
                f"the checkpoint holds no position of shard {number}; the files of a rank are missing"
            )
        sources = [_read_source(arrays, f"{number}.{n}.", one) for n, one in enumerate(shard["sources"])]
        shards[number] = {**shard, "sources": sources}
    rest = state["rest"] if state["lanes_per_rank"] == len(shards) else 0  # or else with the first shard again
    return {"num_batches": state["turns"] * len(shards) + rest, "shards": shards}


def join_positions(positions: list[Saved]) -> Saved:
    """What all ranks saved, as one position, from which any number of ranks that divides the shards can go on."""
    if "lanes" not in positions[0][0]:  # the same in all ranks
        return positions[0]
    state = {**positions[0][0], "lanes": {n: shard for one, _ in positions for n, shard in one["lanes"].items()}}
    return state, {name: array for _, arrays in positions for name, array in arrays.items()}


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises CheckpointError naming what differs between a saved position and this run's data."""
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"the data position of the checkpoint has format {saved.get('format')}; this version reads {FORMAT}. "
            "Start a new run from these weights"
        )
    if saved["lanes"] != current["lanes"]:
        raise CheckpointError(
            f"the data was dealt to {saved['lanes']} shards when the checkpoint was written, and {current['lanes']} processes "
            f"cannot share those equally: resume with a number of processes that divides {saved['lanes']}"
        )
    changed = [
        f"{name} (was {saved.get(name)}, is {current[name]})" for name in current if saved.get(name) != current[name]
    ]
    if changed:
        raise CheckpointError(
            f"the data position of the checkpoint does not fit this run: changed {', '.join(changed)}. "
            "Restore it, or start a new run from these weights"
        )


def _write_source(arrays: dict[str, np.ndarray], prefix: str, source: State, dtype: type) -> State:
    """Token ids go into arrays; the JSON says how many pieces each row has, and its epoch."""
    rows: dict[str, tuple[Row, ...]] = {name: source[name] for name in ROWS}
    pieces = {name: [piece for row in rows[name] for piece in row.pieces] for name in ROWS}
    for name, found in {"buffer": source["buffer"], **pieces}.items():
        arrays[f"{prefix}{name}.ids"] = np.concatenate(found) if found else np.zeros(0, dtype)
        arrays[f"{prefix}{name}.lengths"] = np.array([len(piece) for piece in found], dtype=np.int64)
    return {
        **{name: value for name, value in source.items() if name != "buffer"},
        **{name: [[len(row.pieces), row.epoch] for row in rows[name]] for name in ROWS},
        "ends": [number for number, row in enumerate(rows["ready"]) if row.ends_batch],
    }


def _read_source(arrays: dict[str, np.ndarray], prefix: str, state: State) -> State:
    def pieces(name: str) -> list[Ids]:
        return np.split(arrays[f"{prefix}{name}.ids"], np.cumsum(arrays[f"{prefix}{name}.lengths"]))[:-1]

    source = {name: value for name, value in state.items() if name != "ends"} | {"buffer": pieces("buffer")}
    for name in ROWS:
        rest = iter(pieces(name))
        ends = state["ends"] if name == "ready" else []
        source[name] = [
            Row(tuple(next(rest) for _ in range(count)), epoch, ends_batch=number in ends)
            for number, (count, epoch) in enumerate(state[name])
        ]
    return source
