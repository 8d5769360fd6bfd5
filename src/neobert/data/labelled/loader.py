"""Texts with labels: tokenised once, then batches in an order that is a function of (seed, epoch).

Shapes: B rows of this process, T row length.

A batch of all processes together is drawn at once; of W processes number r trains every W-th row of it, from row r on. So W
processes with B rows each have the batches of one process with W*B rows. The position is a number: how many batches were used.
Batches are put together ahead by threads, which changes nothing but time. With `group_by_length` rows of similar length come
together (chunks of 50 batches are sorted, their batches shuffled), so that padding is small where padding costs.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from neobert.data.layout import RowLayout, Share
from neobert.data.mlm.masking import IGNORED
from neobert.data.mlm.state import require_same
from neobert.data.tokenizer import tokenizing_threads
from neobert.errors import DataError

CHUNK_BATCHES = 50
ROWS_PER_THREAD = 20_000  # fewer are not worth another thread

Ids = np.ndarray


@dataclass(frozen=True)
class Rows:
    """Tokenised rows: ids, segment numbers where the tokenizer has them (else None), and labels (None: not known)."""

    ids: list[Ids]
    segments: list[Ids] | None
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))


def tokenize_rows(
    hf_tokenizer: Any,
    texts: tuple[list[str], ...],
    labels: np.ndarray | None,
    max_length: int,
    truncate: bool,
    num_proc: int,
    what: str,
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
    return Rows(ids, segments or None, labels)


def _encode(hf_tokenizer: Any, texts: tuple[list[str], ...], limit: int | None) -> tuple[list[Ids], list[Ids]]:
    cut = {"truncation": "longest_first", "max_length": limit} if limit else {}
    encoded = hf_tokenizer(*texts, padding=False, return_attention_mask=False, **cut)
    ids = [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]
    return ids, [np.array(row, dtype=np.int8) for row in encoded.get("token_type_ids", [])]


@dataclass(frozen=True)
class LabelledBatch:
    """B rows with a label each. Padded (`attention_mask`), or packed one behind the other into one row (lengths)."""

    input_ids: torch.Tensor  # int64, B x T, or 1 x sum of lengths
    token_type_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    document_lengths: tuple[int, ...] | None
    labels: torch.Tensor | None  # B; int64 classes, or float32
    num_targets: int
    num_tokens: int
    epoch: int  # passes over the data that are complete behind this batch
    ends_epoch: bool = False

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        names = ("input_ids", "token_type_ids", "attention_mask", "document_lengths", "labels")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device) -> "LabelledBatch":
        """The same batch on a device."""
        names = ("input_ids", "token_type_ids", "attention_mask", "labels")
        moved = {name: value.to(device) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class LabelCollator(RowLayout):
    """Rows with labels -> batch."""

    is_regression: bool

    def __call__(self, rows: Rows, chosen: np.ndarray, epoch: int = 0, ends_epoch: bool = False) -> LabelledBatch:
        """The rows numbered `chosen`."""
        ids = [rows.ids[i] for i in chosen]
        segments = None if rows.segments is None else [rows.segments[i] for i in chosen]
        labels = None
        if rows.labels is not None:
            labels = torch.from_numpy(rows.labels[chosen]).to(torch.float32 if self.is_regression else torch.int64)
        return LabelledBatch(
            self.arrange(ids, self.pad_id),
            None if segments is None else self.arrange(segments, 0),
            *self.boundaries(ids),
            labels,
            num_targets=len(ids),
            num_tokens=sum(map(len, ids)),
            epoch=epoch,
            ends_epoch=ends_epoch,
        )


class EpochLoader:
    """Batches of all rows, epoch after epoch, in an order drawn by (seed, epoch); the last batch of an epoch may be short.

    `num_workers` threads put batches together ahead; 0: they are made when they are asked for.
    """

    def __init__(
        self,
        rows: Rows,
        collator: LabelCollator,
        share: Share,
        seed: int,
        group_by_length: bool,
        num_workers: int,
        fingerprint: dict[str, Any],
    ):
        self.rows, self.collator, self.share, self.seed = rows, collator, share, seed
        self.batch_size = share.rows * share.world
        self.group_by_length = group_by_length
        self.fingerprint = {
            **fingerprint, "rows": len(rows), "tokens": rows.num_tokens, "batch_size": self.batch_size, "seed": seed,
            "group_by_length": group_by_length,
        }  # fmt: skip
        self.num_used = 0
        self._depth = 2 * num_workers
        self._pool = ThreadPoolExecutor(num_workers, "batches") if num_workers else None
        self._ahead: deque[Future[LabelledBatch]] = deque()
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
        places, size = random.permutation(len(self.rows)), self.batch_size
        if not self.group_by_length:
            return _cut(places, size)
        lengths = np.array([len(row) for row in self.rows.ids])
        chunks = _cut(places, size * CHUNK_BATCHES)
        batches = [b for chunk in chunks for b in _cut(chunk[np.argsort(-lengths[chunk], kind="stable")], size)]
        whole, short = [b for b in batches if len(b) == size], [b for b in batches if len(b) < size]
        return [whole[i] for i in random.permutation(len(whole))] + short

    def __iter__(self) -> Iterator[LabelledBatch]:
        return self

    def __next__(self) -> LabelledBatch:
        if self._pool is None:
            batch = self._build(*self._place(self.num_used))
        else:
            while len(self._ahead) < self._depth:
                self._ahead.append(self._pool.submit(self._build, *self._place(self.num_used + len(self._ahead))))
            batch = self._ahead.popleft().result()
        self.num_used += 1
        return batch

    def _place(self, number: int) -> tuple[np.ndarray, int, bool]:
        """(rows, epochs complete behind it, whether it ends one) of the batch with this number, counted from 0."""
        epoch, index = divmod(number, self.batches_per_epoch)
        is_last = index + 1 == self.batches_per_epoch
        return self.order(epoch)[index], epoch + is_last, is_last

    def _build(self, chosen: np.ndarray, epoch: int, is_last: bool) -> LabelledBatch:
        mine = chosen[self.share.rank :: self.share.world]
        if len(mine):
            return self.collator(self.rows, mine, epoch, is_last)
        return without_targets(self.collator(self.rows, chosen[:1], epoch, is_last))

    def steps_of(self, accumulation: int) -> Callable[[], list[LabelledBatch]]:
        """A function that fetches the microbatches of one optimizer step; an epoch's last step may have fewer."""

        def fetch() -> list[LabelledBatch]:
            micro: list[LabelledBatch] = []
            while len(micro) < accumulation and not (micro and micro[-1].ends_epoch):
                micro.append(next(self))
            return micro

        return fetch

    @property
    def position(self) -> int:
        """Behind the last batch that was used."""
        return self.num_used

    def state_dict(self, position: int | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A `position`, or that behind the last batch that was used."""
        num_used = self.num_used if position is None else position
        return {"num_used": num_used, "fingerprint": self.fingerprint}, {}

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continue behind a saved position. Raises CheckpointError when the data is not the same."""
        require_same(state.get("fingerprint", {}), self.fingerprint)
        self.num_used = state["num_used"]

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _cut(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def without_targets(batch: LabelledBatch) -> LabelledBatch:
    """The same rows, of which nothing is learnt: for a process that the last rows of an epoch do not reach, and that has to
    call the model when the others do.
    """
    assert batch.labels is not None
    ignored = torch.full_like(batch.labels, torch.nan if batch.labels.is_floating_point() else IGNORED)
    return replace(batch, labels=ignored, num_targets=0, num_tokens=0)


def in_order(rows: Rows, collator: LabelCollator, share: Share) -> Iterator[tuple[np.ndarray, LabelledBatch]]:
    """All rows once, longest first (little padding): (places, batch). Processes take batches in turn, and all get equally
    many: the last ones may come without places.
    """
    lengths = np.array([len(row) for row in rows.ids])
    batches = _cut(np.argsort(-lengths, kind="stable"), share.rows)
    for first in range(0, len(batches), share.world):
        has_one = first + share.rank < len(batches)
        chosen = batches[first + share.rank if has_one else first]
        yield chosen if has_one else chosen[:0], collator(rows, chosen)
