"""Texts with labels: tokenised once, then batches in an order that is a function of (seed, epoch).

A batch of all processes together is drawn at once; of W processes number r trains every W-th row of it, from row r on. So W
processes with B rows each have the batches of one process with W*B rows. The position is a number: how many batches were used.
Batches are put together ahead by threads, which changes nothing but time. With `group_by_length` rows of similar length come
together (chunks of 50 batches are sorted, their batches shuffled), so that padding is small where padding costs.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch

from neobert.data.batch import Batch, RowLayout
from neobert.data.loader import Loader, Saved, require_same
from neobert.data.tokenizer import Ids, tokenizing_threads
from neobert.errors import DataError
from neobert.ranks import Ranks

CHUNK_BATCHES = 50
ROWS_PER_THREAD = 20_000  # fewer are not worth another thread


@dataclass(frozen=True)
class Rows:
    """Tokenised rows: ids, segment numbers where the tokenizer has them (else None), and labels (None: not known).

    Labels are float64: numbers of classes, or values where `is_regression`.
    """

    ids: list[Ids]
    segments: list[Ids] | None
    labels: np.ndarray | None
    is_regression: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))

    def first(self, most: int | None) -> "Rows":
        """The first rows; None: all of them."""
        segments = None if self.segments is None else self.segments[:most]
        labels = None if self.labels is None else self.labels[:most]
        return Rows(self.ids[:most], segments, labels, self.is_regression)

    def batch(self, chosen: np.ndarray, layout: RowLayout, epoch: int = 0, ends_epoch: bool = False) -> Batch:
        """The rows numbered `chosen`; labels as int64 classes or float32 values."""
        dtype = torch.float32 if self.is_regression else torch.int64
        return layout.batch(
            [self.ids[i] for i in chosen],
            None if self.segments is None else [self.segments[i] for i in chosen],
            labels=None if self.labels is None else torch.from_numpy(self.labels[chosen]).to(dtype),
            num_targets=len(chosen),
            epoch=epoch,
            ends_epoch=ends_epoch,
        )


def tokenize_rows(
    hf_tokenizer: Any,
    texts: tuple[list[str], ...],
    labels: np.ndarray | None,
    max_length: int,
    truncate: bool,
    num_proc: int,
    what: str,
    is_regression: bool = False,
) -> Rows:
    """One or two columns of text as rows of at most `max_length` tokens, special tokens included.

    Of a pair the longer text is cut first. Raises DataError for longer rows where `truncate` is off.
    """
    num_proc = min(num_proc, -(-len(texts[0]) // ROWS_PER_THREAD))
    limit = max_length if truncate else None
    if num_proc > 1:
        bounds = np.linspace(0, len(texts[0]), num_proc + 1).astype(int)
        parts = [tuple(column[a:b] for column in texts) for a, b in pairwise(bounds)]
        with tokenizing_threads(num_proc) as pool:  # a tokenizer each, as its limit is part of it
            done = list(pool.map(lambda part: _encode(copy.deepcopy(hf_tokenizer), part, limit), parts))
    else:
        done = [_encode(hf_tokenizer, texts, limit)]
    ids = [row for part, _ in done for row in part]
    segments = [row for _, part in done for row in part]
    for number, row in enumerate(ids, 1):
        if len(row) > max_length:
            raise DataError(
                f"{what}: row {number} has {len(row)} tokens, glue.max_seq_length is {max_length}; raise that, or set "
                "tokenizer.truncation: true"
            )
    return Rows(ids, segments or None, labels, is_regression)


def _encode(hf_tokenizer: Any, texts: tuple[list[str], ...], limit: int | None) -> tuple[list[Ids], list[Ids]]:
    cut = {"truncation": "longest_first", "max_length": limit} if limit else {}
    encoded = hf_tokenizer(*texts, padding=False, return_attention_mask=False, **cut)
    ids = [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]
    return ids, [np.array(row, dtype=np.int8) for row in encoded.get("token_type_ids", [])]


class EpochLoader(Loader[int]):
    """Batches of all rows, epoch after epoch, in an order drawn by (seed, epoch); the last batch of an epoch may be short.

    A position is the number of batches used.
    """

    def __init__(
        self,
        rows: Rows,
        layout: RowLayout,
        ranks: Ranks,
        batch_size: int,
        seed: int,
        group_by_length: bool,
        num_workers: int,
        fingerprint: dict[str, Any],
    ):
        """`batch_size`: of this process."""
        super().__init__(0, num_workers, num_ahead=2 * num_workers)
        self.rows, self.layout, self.ranks, self.seed = rows, layout, ranks, seed
        self.batch_size = batch_size * ranks.world_size
        self.group_by_length = group_by_length
        self.fingerprint = {
            **fingerprint, "rows": len(rows), "tokens": rows.num_tokens, "batch_size": self.batch_size, "seed": seed,
            "group_by_length": group_by_length,
        }  # fmt: skip
        self._order: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def order(self, epoch: int) -> list[np.ndarray]:
        """The rows of every batch of an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, self._draw(np.random.default_rng((self.seed, epoch))))
        return self._order[1]

    def _draw(self, random: np.random.Generator) -> list[np.ndarray]:
        order, size = random.permutation(len(self.rows)), self.batch_size
        if not self.group_by_length:
            return _cut(order, size)
        lengths = np.array([len(row) for row in self.rows.ids])
        chunks = _cut(order, size * CHUNK_BATCHES)
        batches = [b for chunk in chunks for b in _cut(chunk[np.argsort(-lengths[chunk], kind="stable")], size)]
        whole, short = [b for b in batches if len(b) == size], [b for b in batches if len(b) < size]
        return [whole[i] for i in random.permutation(len(whole))] + short

    def jobs(self) -> Iterator[Callable[[], tuple[Batch, int]]]:
        for number in count(self.position):
            epoch, index = divmod(number, self.batches_per_epoch)
            is_last = index + 1 == self.batches_per_epoch
            yield partial(self._build, self.order(epoch)[index], epoch + is_last, is_last, number + 1)

    def _build(self, chosen: np.ndarray, epoch: int, is_last: bool, position: int) -> tuple[Batch, int]:
        own = chosen[self.ranks.rank :: self.ranks.world_size]
        if len(own):
            return self.rows.batch(own, self.layout, epoch, is_last), position
        return self.rows.batch(chosen[:1], self.layout, epoch, is_last).without_targets(), position

    def state_dict(self, position: int | None = None) -> Saved:
        return {"num_used": self.position if position is None else position, "fingerprint": self.fingerprint}, {}

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        require_same(state.get("fingerprint", {}), self.fingerprint)
        self.position = state["num_used"]


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_order(rows: Rows, layout: RowLayout, ranks: Ranks, batch_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """All rows once, longest first (little padding): (their numbers, batch). Processes take batches in turn, and all get
    equally many: the last ones may come without numbers.
    """
    batches = _cut(np.argsort([-len(row) for row in rows.ids], kind="stable"), batch_size)
    for first in range(0, len(batches), ranks.world_size):
        has_one = first + ranks.rank < len(batches)
        chosen = batches[first + ranks.rank if has_one else first]
        yield chosen if has_one else chosen[:0], rows.batch(chosen, layout)
