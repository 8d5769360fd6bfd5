"""Documents into rows of one length: several to a row (packing), or each piece in its own row.

Packing is best fit over a bounded number of open rows: a piece goes into the fullest open row it fits in, or, where that would
leave a gap too small for anything, into one with more room; beyond `MAX_OPEN` rows the fullest is closed. 64 open rows fill
more than 99 % of 512-token rows, with prose as with texts of 65 tokens. They are part of the position.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np

from neobert.data.tokenizer import Ids

MAX_OPEN = 64
LongDocuments = Literal["split", "truncate", "drop"]


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
class TruncationStats:
    """What the documents came to: their tokens, and those not used because of `truncate` or `drop`."""

    num_tokens: int = 0
    num_cut: int = 0
    num_documents: int = 0
    num_empty: int = 0  # without a single token
    num_long: int = 0  # longer than a piece

    @property
    def share(self) -> float:
        """Share of the tokens that was cut."""
        return self.num_cut / max(1, self.num_tokens)


@dataclass(frozen=True)
class Segmenter:
    """Cuts documents into pieces of at most `max_length` tokens, [CLS] and [SEP] included."""

    max_length: int
    policy: LongDocuments
    cls_id: int
    sep_id: int

    def pieces(self, documents: list[Ids], cut: TruncationStats) -> list[Ids]:
        """Pieces of several documents, laid out 64 at a time, which costs a third. What is left out is counted in `cut`."""
        room, out = self.max_length - 2, list[Ids]()
        lengths = list(map(len, documents))
        cut.num_documents += len(lengths)
        cut.num_tokens += sum(lengths)
        cut.num_empty += lengths.count(0)
        parts = documents
        if 0 in lengths or max(lengths, default=0) > room:
            parts = []
            for document, length in zip(documents, lengths, strict=True):
                kept = {"split": length, "truncate": room, "drop": 0}[self.policy] if length > room else length
                cut.num_long += length > room
                cut.num_cut += length - kept
                parts += [document[start : start + room] for start in range(0, kept, room)]
        for begin in range(0, len(parts), 64):
            group = parts[begin : begin + 64]
            first, last = (np.array([token], dtype=group[0].dtype) for token in (self.cls_id, self.sep_id))
            flat = np.concatenate([part for ids in group for part in (first, ids, last)])
            ends = list(accumulate(len(ids) + 2 for ids in group))
            out += [flat[a:b] for a, b in pairwise([0, *ends])]
        return out


@dataclass
class Packer:
    """Best fit over open rows. `add` takes a piece and returns the rows that it closed."""

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
        """The index in `_rooms` of the row that a piece goes into; after the last for a new row.

        A short piece must not leave a gap that nothing fits into: it closes a row, or leaves room for another piece.
        """
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
