"""Documents into rows, with an exact position: of one source, and of a shard, which draws rows from its sources.

    reader -> tokenise -> cut into pieces -> shuffle buffer (streams) -> rows -> shard

Threads only tokenise blocks of documents, and their results are taken in the order of the blocks. So the position is small: the
reader's after the last block taken, the pieces in the shuffle buffer, the open rows, and the rows that are ready.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from neobert.data.batch import State
from neobert.data.hashing import choose_sources, hash_keys
from neobert.data.mlm.readers import Reader, Segmenter, TruncationStats
from neobert.data.tokenizer import Ids, TextTokenizer, tokenizing_threads
from neobert.errors import DataError

MAX_OPEN = 64  # rows
Exhausted = Literal["repeat", "drop", "stop"]


@dataclass(frozen=True)
class Row:
    """One training row before masking: its pieces with special tokens, its epoch, its index in the whole run."""

    pieces: tuple[Ids, ...]
    epoch: int
    index: int = -1
    ends_batch: bool = False  # the microbatch that it is in is not filled up

    @property
    def ids(self) -> Ids:
        """All of its tokens."""
        return self.pieces[0] if len(self.pieces) == 1 else np.concatenate(self.pieces)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.pieces))


@dataclass
class Packer:
    """Rows of several pieces, by best fit over a bounded number of open rows; `add` returns the rows that a piece closed.

    A piece goes into the fullest open row it fits in, or, where that would leave a gap too small for anything, into one with
    more room; beyond `max_open` rows the fullest is closed. 64 open rows fill more than 99 % of 512-token rows, with prose as
    with texts of 65 tokens. They are part of the position.
    """

    row_length: int  # 0: no packing, every piece is a row
    max_open: int = MAX_OPEN
    _open: dict[int, tuple[list[Ids], int]] = field(default_factory=dict)  # (pieces, epoch) by number, oldest first
    _rooms: list[tuple[int, int]] = field(default_factory=list)  # (tokens that still fit, number), sorted
    _next: int = 0

    def add(self, piece: Ids, epoch: int) -> list[Row]:
        index = self._find_room(len(piece))
        if index < len(self._rooms):
            room, number = self._rooms.pop(index)
        else:
            room, number = self.row_length, self._next
            self._next += 1
            self._open[number] = ([], epoch)
        self._open[number][0].append(piece)
        room -= len(piece)
        if room <= 2:  # no piece is shorter than [CLS] token [SEP]
            return [self._close(number)]
        insort(self._rooms, (room, number))
        return [self._close(self._rooms.pop(0)[1])] if len(self._open) > self.max_open else []

    def _find_room(self, length: int) -> int:
        """The index in `_rooms` of the row that a piece goes into; after the last for a new row."""
        rooms, best = self._rooms, bisect_left(self._rooms, (length, -1))
        if best == len(rooms) or rooms[best][0] <= length + 2 or 4 * length > self.row_length:
            return best
        spacious = bisect_left(rooms, (length + min(32, self.row_length // 16), -1))
        return best if spacious == len(rooms) >= self.max_open else spacious

    def flush(self) -> list[Row]:
        """Close all open rows, packed anew with the longest pieces first, so that few of the last rows are half empty."""
        rows = self.state_dict()
        epoch = max((row.epoch for row in rows), default=0)
        self.load_state_dict([])
        tail = Packer(self.row_length, max_open=len(rows) + 1)
        pieces = sorted((piece for row in rows for piece in row.pieces), key=len, reverse=True)
        closed = [row for piece in pieces for row in tail.add(piece, epoch)]
        return [*closed, *(tail._close(number) for number in list(tail._open))]

    def _close(self, number: int) -> Row:
        pieces, epoch = self._open.pop(number)
        return Row(tuple(pieces), epoch)

    def state_dict(self) -> list[Row]:
        """The open rows, oldest first; shares the arrays, which nobody writes to."""
        return [Row(tuple(pieces), epoch) for pieces, epoch in self._open.values()]

    def load_state_dict(self, rows: Sequence[Row]) -> None:
        self._open = {number: (list(row.pieces), row.epoch) for number, row in enumerate(rows)}
        self._rooms = sorted((self.row_length - row.num_tokens, number) for number, row in enumerate(rows))
        self._next = len(rows)


@dataclass
class ShuffleBuffer:
    """Holds `size` pieces; each new one replaces another, chosen by a hash of (seed, epoch, its number), which moves on. `size`
    <= 1: no shuffling.
    """

    size: int
    seed: int
    pieces: list[Ids] = field(default_factory=list)
    num_seen: int = 0

    def exchange(self, pieces: list[Ids], epoch: int) -> list[Ids]:
        """Put pieces in, and take out those that they replace."""
        if self.size <= 1:
            return pieces
        numbers = np.arange(self.num_seen + 1, self.num_seen + 1 + len(pieces))
        slots = (hash_keys(self.seed, epoch, numbers) % np.uint64(self.size)).tolist()
        self.num_seen += len(pieces)
        out = []
        for piece, slot in zip(pieces, slots, strict=True):
            own = piece.copy()  # a view would keep its whole neighbourhood in memory
            if len(self.pieces) < self.size:
                self.pieces.append(own)
            else:
                out.append(self.pieces[slot])
                self.pieces[slot] = own
        return out

    def drain(self, epoch: int) -> list[Ids]:
        """All pieces, shuffled: an epoch ends with every document used."""
        order = np.argsort(hash_keys(self.seed, epoch, -1, np.arange(len(self.pieces))), kind="stable")
        out = [self.pieces[number] for number in order]
        self.pieces, self.num_seen = [], 0
        return out


@dataclass
class Workers:
    """The threads that tokenise for a pipeline, started when the first text comes. `count` 0: none."""

    tokenizer: TextTokenizer
    count: int = 0
    prefetch_factor: int = 2  # blocks in flight per source and thread
    persistent: bool = True
    pool: ThreadPoolExecutor | None = None

    def submit(self, documents: list[Any]) -> Future[list[Ids]] | list[Ids]:
        """Token ids of a block, now or later. Documents that are token ids already pass."""
        if not documents or not isinstance(documents[0], str):
            return documents
        if not self.count:
            return self.tokenizer.encode(documents)
        if self.pool is None:
            self.pool = tokenizing_threads(self.count)
        return self.pool.submit(self.tokenizer.encode, documents)

    def close(self, cancel: bool = True) -> None:
        """Stop the threads; without `cancel` they finish the blocks in flight. Another text starts new ones."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=cancel)
            self.pool = None


@dataclass
class RowSource:
    """Rows of one source for one shard, endlessly, or for `num_epochs`."""

    reader: Reader
    workers: Workers
    segmenter: Segmenter
    packer: Packer
    buffer: ShuffleBuffer
    name: str = ""
    num_epochs: int | None = None
    group: int | None = None  # pack so many pieces by themselves, and end the microbatch after them
    min_rows: int = 1  # that the first epoch must give; 0: none needed
    ready: deque[Row] = field(default_factory=deque)
    cut: TruncationStats = field(default_factory=TruncationStats)
    epoch: int = 0  # of the newest row handed out
    num_rows: int = 0  # handed out since the run began
    num_packed: int = 0  # pieces since the last group

    def __post_init__(self) -> None:
        self._blocks = self._tokenized()
        self._after = self.reader.state_dict()  # the last block taken
        self._frozen: State | None = None  # what of the position stays the same until the next block

    def has_next(self) -> bool:
        """Whether there is another row, for which blocks are read. Raises DataError."""
        while not self.ready:
            block = next(self._blocks, None)
            if block is None:
                return False
            self._add(*block)
        return True

    def take(self) -> Row:
        """The next row, when there is one."""
        row = self.ready.popleft()
        self.epoch = max(self.epoch, row.epoch)
        self.num_rows += 1
        return row

    def _add(self, documents: list[Ids], epoch: int, after: State) -> None:
        """Bring a block of documents into rows; an empty block ends an epoch."""
        pieces = self.segmenter.pieces(documents, self.cut)
        for piece in self.buffer.exchange(pieces, epoch) if documents else self.buffer.drain(epoch):
            self.ready.extend(self.packer.add(piece, epoch))
            if self.group is not None:
                self.num_packed += 1
                if self.num_packed == self.group:
                    self._flush()
        if not documents:
            self._flush()  # a row holds documents of one epoch
            self._check_epoch(epoch)
        self._after, self._frozen = after, None

    def _flush(self) -> None:
        self.ready.extend(self.packer.flush())
        if self.group is not None and self.ready:
            self.ready.append(replace(self.ready.pop(), ends_batch=True))
            self.num_packed = 0

    def _check_epoch(self, epoch: int) -> None:
        """Raises DataError when the first epoch gave too little: an empty corpus would be read for ever."""
        found = self.num_rows + len(self.ready)
        if epoch > 0 or found >= self.min_rows:
            return
        of, ranks = f" ({self.name})" if self.name else "", self.reader.ranks
        why = self.reader.skips.describe(self.cut.num_empty, " ({})")
        if not found and ranks.world_size > 1:
            raise DataError(
                f"reader {ranks.rank + 1} of {ranks.world_size} of the corpus{of} is empty{why}: documents are dealt to as "
                "many readers as there are processes (or dataset.num_shards); use fewer, or add text"
            )
        if not found:
            raise DataError(f"the corpus{of} is empty: no document has any text{why}")
        raise DataError(
            f"the corpus{of} fills {found} row{'s' if found > 1 else ''}, fewer than one microbatch of {self.min_rows}{why}; "
            "lower trainer.per_device_train_batch_size, shorten the rows, or add text"
        )

    def _tokenized(self) -> Iterator[tuple[list[Ids], int, State]]:
        """(token ids of a block, epoch, position after it) in order; with workers, several are in flight. An empty block ends
        an epoch; its position is the next epoch's.
        """
        pending: deque[tuple[Future[list[Ids]] | list[Ids], int, State]] = deque()
        num_ahead = self.workers.count * self.workers.prefetch_factor
        while self.num_epochs is None or self.reader.epoch < self.num_epochs:
            documents, epoch = self.reader.read(), self.reader.epoch
            if not documents:
                self.reader.next_epoch()
            pending.append((self.workers.submit(documents), epoch, self.reader.state_dict()))
            while len(pending) > num_ahead or (pending and not documents):
                block, epoch, after = pending.popleft()
                yield (block if isinstance(block, list) else block.result()), epoch, after
            if not documents and not self.workers.persistent:
                self.workers.close(cancel=False)

    def state_dict(self) -> State:
        """The position after the last row; shares its arrays, and costs a few microseconds between blocks."""
        if self._frozen is None:
            self._frozen = {
                "reader": self._after, "num_seen": self.buffer.num_seen, "num_packed": self.num_packed,
                "cut": dict(vars(self.cut)), "buffer": tuple(self.buffer.pieces),
                "open_rows": tuple(self.packer.state_dict()),
            }  # fmt: skip
        return {**self._frozen, "epoch": self.epoch, "num_rows": self.num_rows, "ready": tuple(self.ready)}

    def load_state_dict(self, state: State) -> None:
        """Continue after `state`; reads nothing again."""
        self.reader.load_state_dict(state["reader"])
        self._blocks, self._after, self._frozen = self._tokenized(), state["reader"], None
        self.buffer.pieces, self.buffer.num_seen = list(state["buffer"]), state["num_seen"]
        self.packer.load_state_dict(state["open_rows"])
        self.ready = deque(state["ready"])
        self.epoch, self.num_rows, self.num_packed = state["epoch"], state["num_rows"], state["num_packed"]
        self.cut = TruncationStats(**state["cut"])

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same."""
        return {
            "source": self.reader.fingerprint, "streaming": self.reader.is_stream,
            "piece_length": self.segmenter.max_length, "long_documents": self.segmenter.policy,
            "row_length": self.packer.row_length or None, "shuffle_buffer_size": self.buffer.size, "group": self.group,
        }  # fmt: skip


@dataclass
class Shard:
    """The rows of one of `world` equal parts of the corpus, dealt document by document: of one source, or drawn from several
    by weight, as a function of a row's index in the run. When a source has no more rows, `drop` goes on with the others, `stop`
    ends the shard; with `repeat` a source has no end.
    """

    index: int
    world: int
    sources: list[RowSource]
    weights: list[float] = field(default_factory=lambda: [1.0])
    exhausted: Exhausted = "drop"
    seed: int = 0
    num_rows: int = 0  # handed out since the run began
    ended: set[int] = field(default_factory=set)  # sources without any more rows

    def next(self) -> Row | None:
        """The next row with its index in the run; None when there is no more."""
        source, index = self.next_source(), self._next_index()
        if source is None:
            return None
        self.num_rows += 1
        return replace(source.take(), index=index)

    def _next_index(self) -> int:
        return self.num_rows * self.world + self.index

    def next_source(self) -> RowSource | None:
        """The source of the next row, None when there is no more: reads on where it has to, takes no row."""
        while len(self.ended) < len(self.sources):
            number = 0
            if len(self.sources) > 1:
                weights = [0.0 if n in self.ended else weight for n, weight in enumerate(self.weights)]
                number = int(choose_sources(np.array([self._next_index()]), weights, self.seed)[0])
            if self.sources[number].has_next():
                return self.sources[number]
            self.ended = set(range(len(self.sources))) if self.exhausted == "stop" else self.ended | {number}
        return None

    @property
    def epoch(self) -> int:
        """The epoch that every source has got to."""
        alive = [source.epoch for number, source in enumerate(self.sources) if number not in self.ended]
        return min(alive) if alive else max(source.epoch for source in self.sources)

    def state_dict(self) -> State:
        """The position after the last row."""
        sources = [source.state_dict() for source in self.sources]
        return {"num_rows": self.num_rows, "dry": sorted(self.ended), "sources": sources}

    def load_state_dict(self, state: State) -> None:
        self.num_rows, self.ended = state["num_rows"], set(state["dry"])
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
