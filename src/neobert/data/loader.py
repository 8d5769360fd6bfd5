"""From documents to masked batches, with a position that is exact at every batch.

    reader -> tokenise -> cut into pieces -> shuffle buffer (streams) -> rows -> microbatches -> mask -> queue -> training

Everything behind the tokeniser runs in one background thread, in one order, whatever the number of tokenising processes:
those are pure functions of a block of text, and their results are taken in the order of the blocks. So the position is
small and exact: where the reader stands behind the last block taken, the pieces in the shuffle buffer, the open rows, and
the rows not yet handed out. Each batch in the queue carries the position behind itself (lists that share arrays: tens of
microseconds), so what was prefetched and not used is simply read again after a resume, and nothing else is.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neobert.data.batch import Batch, Collator
from neobert.data.masking import hash_key
from neobert.data.order import CorpusReader, StreamReader
from neobert.data.packing import Cut, OnePerRow, Packer, Row, Segmenter
from neobert.data.tokenizer import Ids, TextTokenizer
from neobert.data.workers import encode_in_worker, start_workers, wait_for_worker
from neobert.errors import CheckpointError, DataError

FORMAT = 1
QUEUE_BATCHES = 4


@dataclass
class ShuffleBuffer:
    """Holds `size` pieces; each new piece takes the place of a random one, which moves on. `size` <= 1: no shuffling.

    The choice is a hash of (seed, epoch, number of the piece), so the state is the content and a counter.
    """

    size: int
    seed: int
    pieces: list[Ids] = field(default_factory=list)
    num_seen: int = 0

    def add(self, piece: Ids, epoch: int) -> list[Ids]:
        if self.size <= 1:
            return [piece]
        self.num_seen += 1
        if len(self.pieces) < self.size:
            self.pieces.append(piece)
            return []
        slot = int(hash_key(self.seed, epoch, self.num_seen)[0]) % self.size
        out, self.pieces[slot] = self.pieces[slot], piece
        return [out]

    def drain(self, epoch: int) -> list[Ids]:
        """All pieces, shuffled: an epoch ends with every document handed out."""
        order = np.argsort(hash_key(self.seed, epoch, -1, np.arange(len(self.pieces))), kind="stable")
        out = [self.pieces[number] for number in order]
        self.pieces, self.num_seen = [], 0
        return out


@dataclass(frozen=True)
class Snapshot:
    """The position behind a batch. Arrays are shared with the running pipeline, which never writes to them."""

    reader: dict[str, int]
    buffer: tuple[Ids, ...]
    num_seen: int
    open_rows: list[tuple[tuple[Ids, ...], int]]
    ready: tuple[Row, ...]
    num_rows: int
    cut: tuple[int, int, int]


@dataclass
class Pipeline:
    """Rows and microbatches of one data rank, endlessly, or for `num_epochs`."""

    reader: CorpusReader | StreamReader
    tokenizer: TextTokenizer
    segmenter: Segmenter
    rows: Packer | OnePerRow
    collator: Collator
    batch_size: int
    shuffle_size: int = 0
    seed: int = 0
    num_epochs: int | None = None
    keep_short_batch: bool = True  # the last, short microbatch of the last epoch
    flush_every_block: bool = False  # close open rows after each block (`enforce_full_packed_batches: false`)
    num_workers: int = 0
    prefetch_factor: int = 2
    persistent_workers: bool = True
    training: bool = True  # an epoch must fill a batch
    cut: Cut = field(default_factory=Cut)

    def __post_init__(self) -> None:
        self.buffer = ShuffleBuffer(self.shuffle_size, self.seed)
        self.ready: deque[Row] = deque()
        self.num_rows = 0  # handed out by this rank since the run began
        self._behind = self.reader.state_dict()
        self._pool: ProcessPoolExecutor | None = None

    def batches(self) -> Iterator[tuple[Batch, Snapshot]]:
        """Masked microbatches, each with the position behind it."""
        yield from self._full_batches()  # what a restored position holds
        for documents, epoch, behind in self._tokenized():
            rows: list[Row] = []
            for document in documents:
                for piece in self.segmenter(document, self.cut):
                    for shuffled in self.buffer.add(piece, epoch):
                        rows += self.rows.add(shuffled, epoch)
            if not documents:  # the end of an epoch
                for piece in self.buffer.drain(epoch):
                    rows += self.rows.add(piece, epoch)
                self._check_epoch(epoch, rows)
            if self.flush_every_block or (not documents and self._is_last(epoch)):
                rows += self.rows.flush()
            self.ready.extend(rows)
            self._behind = behind
            yield from self._full_batches()
        if self.ready and self.keep_short_batch:
            yield self._next_batch(len(self.ready))

    def _full_batches(self) -> Iterator[tuple[Batch, Snapshot]]:
        while len(self.ready) >= self.batch_size:
            yield self._next_batch(self.batch_size)

    def _is_last(self, epoch: int) -> bool:
        return self.num_epochs is not None and epoch + 1 >= self.num_epochs

    def count_batches(self) -> int:
        """Batches of all epochs, by a pass over the data that masks nothing."""
        self.collator = lambda rows: None  # type: ignore[assignment,return-value]
        return sum(1 for _ in self.batches())

    def _check_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Raises DataError when the first epoch gave too little: an empty corpus would be read for ever."""
        if epoch > 0 or not self.training:
            return
        found = self.num_rows + len(self.ready) + len(rows) + len(self.rows.snapshot())
        if not found:
            raise DataError("the corpus is empty: no document has any text")
        if found < self.batch_size:
            raise DataError(
                f"the corpus fills {found} row{'s' if found > 1 else ''}, fewer than one microbatch of {self.batch_size}; "
                "lower trainer.per_device_train_batch_size, shorten the rows, or add text"
            )

    def _next_batch(self, size: int) -> tuple[Batch, Snapshot]:
        rank = self.reader.rank
        rows = []
        for _ in range(size):
            row = self.ready.popleft()
            rows.append(Row(row.pieces, row.epoch, self.num_rows * rank.world + rank.index))
            self.num_rows += 1
        return self.collator(rows), self.snapshot()

    # --- tokenising -----------

    def _blocks(self) -> Iterator[tuple[list[Any], int, dict[str, int]]]:
        """(documents, epoch, position behind them); an empty block ends an epoch, its position is the next epoch's."""
        while self.num_epochs is None or self.reader.epoch < self.num_epochs:
            documents, epoch = self.reader.read(), self.reader.epoch
            if not documents:
                self.reader.next_epoch()
            yield documents, epoch, self.reader.state_dict()

    def _tokenized(self) -> Iterator[tuple[list[Ids], int, dict[str, int]]]:
        """The blocks in order, tokenised; with workers, several are in flight."""
        pending: deque[tuple[Future[list[Ids]] | list[Ids], int, dict[str, int]]] = deque()
        limit = self.num_workers * self.prefetch_factor
        try:
            for documents, epoch, behind in self._blocks():
                pending.append((self._submit(documents), epoch, behind))
                while len(pending) > limit or (pending and not documents):
                    yield self._take(pending.popleft())
                if not documents and not self.persistent_workers:
                    self.close()
            while pending:
                yield self._take(pending.popleft())
        finally:
            self.close()

    def _submit(self, documents: list[Any]) -> "Future[list[Ids]] | list[Ids]":
        if not documents or not isinstance(documents[0], str):
            return documents
        if not self.num_workers:
            return self.tokenizer.encode(documents)
        if self._pool is None:
            self._pool = start_workers(self.num_workers, self.tokenizer)
        return self._pool.submit(encode_in_worker, documents)

    @staticmethod
    def _take(entry: Any) -> Any:
        result, epoch, behind = entry
        return (result if isinstance(result, list) else wait_for_worker(result)), epoch, behind

    def close(self) -> None:
        """End the tokenising processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    # --- position -----------

    def snapshot(self) -> Snapshot:
        """The position behind the last batch that `batches` yielded."""
        cut = (self.cut.num_documents, self.cut.num_tokens, self.cut.num_cut)
        return Snapshot(
            self._behind,
            tuple(self.buffer.pieces),
            self.buffer.num_seen,
            self.rows.snapshot(),
            tuple(self.ready),
            self.num_rows,
            cut,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue behind `snapshot`; reads nothing again."""
        self.reader.load_state_dict(snapshot.reader)
        self._behind = snapshot.reader
        self.buffer.pieces, self.buffer.num_seen = list(snapshot.buffer), snapshot.num_seen
        self.rows.restore(snapshot.open_rows)
        self.ready = deque(snapshot.ready)
        self.num_rows = snapshot.num_rows
        self.cut.num_documents, self.cut.num_tokens, self.cut.num_cut = snapshot.cut

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same."""
        return {
            "format": FORMAT,
            "source": self.reader.fingerprint,
            "streaming": isinstance(self.reader, StreamReader),
            "tokenizer": self.tokenizer.fingerprint,
            "seed": self.seed,
            "world_size": self.reader.rank.world,
            "piece_length": self.segmenter.max_length,
            "long_documents": self.segmenter.policy,
            "row_length": getattr(self.rows, "row_length", None),
            "shuffle_buffer_size": self.shuffle_size,
        }


class Loader:
    """Batches of a pipeline, prepared ahead in a background thread. `state_dict()` is the position behind the last used."""

    def __init__(self, pipeline: Pipeline, pin_memory: bool = False):
        self.pipeline = pipeline
        self._pin = pin_memory
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
        """Stop the thread and its processes."""
        self._stop.set()
        self._thread.shutdown()
        self.pipeline.close()

    def state_dict(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(JSON, arrays) of the position behind the last batch that was used."""
        s = self._snapshot
        arrays: dict[str, np.ndarray] = {}
        _write_pieces(arrays, "buffer", list(s.buffer), self.pipeline.tokenizer.dtype)
        state: dict[str, Any] = {
            "fingerprint": self.pipeline.fingerprint(),
            "reader": s.reader,
            "num_seen": s.num_seen,
            "num_rows": s.num_rows,
            "cut": list(s.cut),
        }
        for name, rows in (("open_rows", s.open_rows), ("ready", [(row.pieces, row.epoch) for row in s.ready])):
            _write_pieces(
                arrays, name, [piece for pieces, _ in rows for piece in pieces], self.pipeline.tokenizer.dtype
            )
            state[name] = [[len(pieces), epoch] for pieces, epoch in rows]
        return state, arrays

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continue behind a saved position. Raises CheckpointError when the data is not the same."""
        assert self._running is None, "restore before the first batch"
        check_fingerprint(state["fingerprint"], self.pipeline.fingerprint())
        rows = {name: _read_rows(arrays, name, state[name]) for name in ("open_rows", "ready")}
        self._snapshot = Snapshot(
            reader=state["reader"],
            buffer=tuple(_read_pieces(arrays, "buffer")),
            num_seen=state["num_seen"],
            open_rows=rows["open_rows"],
            ready=tuple(Row(pieces, epoch) for pieces, epoch in rows["ready"]),
            num_rows=state["num_rows"],
            cut=tuple(state["cut"]),
        )
        self.pipeline.restore(self._snapshot)


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises CheckpointError naming what differs between a saved position and this run's data."""
    changed = [
        f"{name} (was {saved.get(name)}, is {current[name]})" for name in current if saved.get(name) != current[name]
    ]
    if changed:
        raise CheckpointError(
            f"the data position of the checkpoint does not fit this run: changed {', '.join(changed)}. "
            "Restore it, or start a new run from these weights"
        )


def _write_pieces(arrays: dict[str, np.ndarray], name: str, pieces: list[Ids], dtype: type) -> None:
    arrays[f"{name}.ids"] = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    arrays[f"{name}.lengths"] = np.array([len(piece) for piece in pieces], dtype=np.int64)


def _read_pieces(arrays: dict[str, np.ndarray], name: str) -> list[Ids]:
    return np.split(arrays[f"{name}.ids"], np.cumsum(arrays[f"{name}.lengths"]))[:-1]


def _read_rows(arrays: dict[str, np.ndarray], name: str, shape: list[list[int]]) -> list[tuple[tuple[Ids, ...], int]]:
    pieces = iter(_read_pieces(arrays, name))
    return [(tuple(next(pieces) for _ in range(count)), epoch) for count, epoch in shape]


def build_steps(batches: Iterator[Batch], accumulation: int) -> Callable[[], list[Batch]]:
    """A function that fetches the microbatches of one optimizer step; fewer, or none, at the end of the data."""

    def fetch() -> list[Batch]:
        return [batch for _, batch in zip(range(accumulation), batches, strict=False)]

    return fetch
