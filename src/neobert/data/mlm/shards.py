"""Several sources in one run: which source a row comes from is a function of its index in the run.

Row i belongs to the source in whose share of the unit interval `frac(offset + i * golden ratio)` falls (Weyl's sequence: any
run of n rows is within about log(n) / n of the weights, also every 2nd or 8th row, which is what a data rank sees). A shard is
one of the equal parts that the corpus is dealt to; data ranks own whole shards.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from neobert.data.hashing import GOLDEN, hash_keys
from neobert.data.mlm.packing import Row
from neobert.data.mlm.row_source import RowSource, SourceState

Exhausted = Literal["repeat", "drop", "stop"]


@dataclass(frozen=True)
class ShardState:
    """The position of a shard behind a row."""

    num_rows: int
    dry: tuple[int, ...]
    sources: tuple[SourceState, ...]


@dataclass
class Shard:
    """The rows of one of `world` equal parts of the corpus: of one source, or drawn from several by weight.

    When a source has no more rows: `drop` goes on with the others, `stop` ends the shard. With `repeat` a source begins
    again by itself (its number of epochs is not limited).
    """

    index: int
    world: int
    sources: list[RowSource]
    weights: list[float] = field(default_factory=lambda: [1.0])
    exhausted: Exhausted = "drop"
    seed: int = 0
    num_rows: int = 0  # handed out since the run began
    dry: set[int] = field(default_factory=set)

    def next(self) -> Row | None:
        """The next row with its index in the run; None when there is no more."""
        index, source = self._next_index, self._next_source()
        row = None if source is None else source.next()
        if row is None:
            return None
        self.num_rows += 1
        return Row(row.pieces, row.epoch, index, row.ends_batch)

    def is_done(self) -> bool:
        """Whether there is no more row. Reads on where it has to; no row is taken."""
        return self._next_source() is None

    @property
    def _next_index(self) -> int:
        return self.num_rows * self.world + self.index

    def _next_source(self) -> RowSource | None:
        """The source of the next row; those that are found without rows are dry from now on."""
        while len(self.dry) < len(self.sources):
            number = self._choose(self._next_index)
            if self.sources[number].has_next():
                return self.sources[number]
            self.dry = set(range(len(self.sources))) if self.exhausted == "stop" else self.dry | {number}
        return None

    def _choose(self, index: int) -> int:
        """The source of a row, among those that are not dry."""
        if len(self.sources) == 1:
            return 0
        weights = [0.0 if number in self.dry else weight for number, weight in enumerate(self.weights)]
        return int(choose_sources(np.array([index]), weights, self.seed)[0])

    @property
    def epoch(self) -> int:
        """The epoch that every source has got to."""
        alive = [source.epoch for number, source in enumerate(self.sources) if number not in self.dry]
        return min(alive) if alive else max(source.epoch for source in self.sources)

    def snapshot(self) -> ShardState:
        return ShardState(self.num_rows, tuple(sorted(self.dry)), tuple(source.snapshot() for source in self.sources))

    def restore(self, state: ShardState) -> None:
        self.num_rows, self.dry = state.num_rows, set(state.dry)
        for source, saved in zip(self.sources, state.sources, strict=True):
            source.restore(saved)


def choose_sources(indices: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """The source number of every row index, in proportion to `weights`."""
    places = indices.astype(np.uint64) * GOLDEN + hash_keys(seed, 0x313)
    ends = np.cumsum(weights) / np.sum(weights)
    last = int(np.flatnonzero(weights)[-1])
    return np.minimum(np.searchsorted(ends, places / 2.0**64, side="right"), last)
