"""Batches of pairs: each from one source, in an order that is a function of (seed, source, position).

A batch of all processes together, G rows, is drawn at once; process r of W trains rows r*G/W to (r+1)*G/W of it, and knows the
keys of all. So a run may go on with any number of processes that keeps G. Which source a batch comes from is a function of its
number; a source begins again when it has been read. Shapes: B rows of this process, G rows of all.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from neobert.data.batch import Batch, Loader, RowLayout, State
from neobert.data.hashing import choose_sources, hash_key, hash_keys, permute
from neobert.data.mlm.readers import Reader
from neobert.data.pairs.table import PairTable
from neobert.data.tokenizer import Ids
from neobert.errors import DataError
from neobert.ranks import Ranks


class Drawn(NamedTuple):
    """G rows by numbers of texts, whose token ids `encode` gives. Keys as in `ContrastiveLoss.forward`."""

    anchors_G: np.ndarray
    positives_G: np.ndarray
    negatives: list[np.ndarray]
    row_keys_G: np.ndarray
    anchor_keys_G: np.ndarray
    encode: Callable[[np.ndarray], list[Ids]]


class PairSource:
    """The rows of a table, all of them once in every epoch."""

    def __init__(self, table: PairTable, seed: int):
        self.table, self.seed, self.num_used = table, seed, 0
        if table.is_labelled:
            self.members = np.argsort(table.keys, kind="stable")  # rows class by class
            self.sizes = np.bincount(table.keys)
            self.begins = np.cumsum(self.sizes) - self.sizes

    def take(self, count: int) -> Drawn:
        table, used = self.table, np.arange(self.num_used, self.num_used + count)
        self.num_used += count
        epochs, offsets = used // len(table), used % len(table)
        rows = np.empty_like(used)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = permute(offsets[chosen], len(table), hash_key(self.seed, int(epoch)))
        keys, anchors, negatives = table.keys[rows], table.anchors[rows], table.negatives.pick(rows)
        if table.is_labelled:
            positives = table.anchors[self._partners(rows, epochs)]
            return Drawn(anchors, positives, negatives, keys, keys, table.texts.pick)
        return Drawn(anchors, table.positives[rows], negatives, keys, anchors, table.texts.pick)

    def _partners(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """For every row another one of its class, drawn by (seed, epoch, row)."""
        classes = self.table.keys[rows]
        begins, sizes = self.begins[classes], self.sizes[classes]
        own = np.empty(len(self.table), dtype=np.int64)
        own[self.members] = np.arange(len(self.table))
        steps = 1 + (hash_keys(self.seed, epochs, rows) % (sizes - 1).astype(np.uint64)).astype(np.int64)
        return self.members[begins + (own[rows] - begins + steps) % sizes]

    def state_dict(self) -> dict[str, int]:
        return {"num_used": self.num_used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_used = state["num_used"]


@dataclass
class TextSource:
    """Texts of a corpus, each its own positive: two passes with different dropout (SimCSE). Shorter ones are passed over."""

    reader: Reader
    num_texts: int  # of the corpus
    min_length: int
    encode: Callable[[list[str]], list[Ids]]
    name: str
    num_used: int = 0

    def take(self, count: int) -> Drawn:
        texts: list[str] = []
        while len(texts) < count:
            text = next(self.reader.documents, None)
            if text is not None:
                texts += [text] if len(text) >= self.min_length else []
            elif texts or self.num_used:
                self.reader.next_epoch()
            else:
                least = f"{self.min_length:,} characters; lower dataset.min_length"
                raise DataError(f"{self.name}: none of its {self.num_texts:,} texts has {least}")
        self.num_used += count
        different = list(dict.fromkeys(texts))
        if count > 1 and len(different) == 1:
            raise DataError(f"{self.name}: {count:,} texts in a row are all the same; there is nothing to tell apart")
        numbers = {text: number for number, text in enumerate(different)}
        rows, none = np.array([numbers[text] for text in texts]), np.zeros(0, dtype=np.int64)

        def encode(wanted: np.ndarray) -> list[Ids]:
            chosen, indices = np.unique(wanted, return_inverse=True)
            ids = self.encode([different[number] for number in chosen])
            return [ids[index] for index in indices]

        return Drawn(rows, rows, [none] * count, rows, rows, encode)

    def state_dict(self) -> dict[str, int]:
        """`position` counts documents passed, over all epochs."""
        return {"position": self.reader.epoch * self.num_texts + self.reader.position[0], "num_used": self.num_used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        epoch, offset = divmod(state["position"], self.num_texts)
        self.reader.go_to(epoch, (offset,))
        self.num_used = state["num_used"]


Source = PairSource | TextSource  # rows without end, with a position


class PairLoader(Loader):
    """Batches without end, made ahead by a thread, or when they are asked for."""

    def __init__(
        self, sources: Sequence[Source], weights: list[float], layout: RowLayout, ranks: Ranks, batch_size: int, seed: int,
        views: int, batches_per_epoch: int, fingerprint: dict[str, Any], ahead: bool = True,
    ):  # fmt: skip
        """`batch_size`: of this process. `views`: targets per row, 1, or 2 where positives are anchors too."""
        self.sources, self.weights, self.layout, self.ranks, self.seed = sources, weights, layout, ranks, seed
        self.batch_size, self.views, self.batches_per_epoch, self.num_made = batch_size, views, batches_per_epoch, 0
        self.fingerprint = {**fingerprint, "weights": weights, "rows": batch_size * ranks.world_size, "seed": seed}
        super().__init__(self._made(), int(ahead))

    def _made(self) -> State:
        """The position after the last batch that was made."""
        return {"num_batches": self.num_made, "sources": [source.state_dict() for source in self.sources]}

    def jobs(self) -> Iterator[Callable[[], tuple[Batch, State]]]:
        return repeat(self._make)

    def _make(self) -> tuple[Batch, State]:
        number = int(choose_sources(np.array([self.num_made]), self.weights, self.seed)[0])
        B, world, rank = self.batch_size, self.ranks.world_size, self.ranks.rank
        drawn, own = self.sources[number].take(B * world), slice(rank * B, (rank + 1) * B)
        self.num_made += 1
        counts = np.array([len(part) for part in drawn.negatives])
        arrays = {
            "row_keys_G": drawn.row_keys_G, "anchor_keys_G": drawn.anchor_keys_G,
            "negative_keys": np.concatenate(drawn.negatives), "negative_rows": np.repeat(np.arange(B * world), counts),
        }  # fmt: skip
        keys: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        keys["num_negatives"] = tuple(counts.reshape(world, B).sum(1).tolist())
        ids = drawn.encode(np.concatenate([drawn.anchors_G[own], drawn.positives_G[own], *drawn.negatives[own]]))
        epoch = self.num_made // self.batches_per_epoch
        return self.layout.batch(ids, num_targets=self.views * B, epoch=epoch, keys=keys), self._made()

    def steps_left(self, num_epochs: int, accumulation: int) -> int:
        """Steps of `accumulation` batches until the end of so many epochs, each of which is a whole number of steps."""
        num_batches = math.ceil(self.batches_per_epoch / accumulation) * accumulation * num_epochs
        return max(0, math.ceil((num_batches - self.position["num_batches"]) / accumulation))

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state, arrays)
        self.num_made = state["num_batches"]
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)

    def describe_used(self) -> list[str]:
        """What was passed over in plain text so far, what was made ahead included."""
        found = [(source.name, source.reader.skips) for source in self.sources if isinstance(source, TextSource)]
        return [f"{name}: {s.describe()}" for name, s in found if s.counts]
