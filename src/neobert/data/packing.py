"""Documents into rows of one length: `pack` fills rows with several documents, `pad` gives each piece its own row.

Packing is best fit over a bounded number of open rows: a piece goes into the fullest open row it fits in; when more than
`MAX_OPEN` rows are open the fullest is closed. 64 open rows fill 99 % of 512-token rows with paragraphs of prose. It sits in
the stream, before batching, so that every microbatch is full, and its open rows are part of the position.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

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

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.pieces))


@dataclass
class Cut:
    """Tokens of documents seen and not used, because of `truncate` or `drop`."""

    num_tokens: int = 0
    num_cut: int = 0
    num_documents: int = 0


@dataclass(frozen=True)
class Segmenter:
    """Cuts documents into pieces of at most `max_length` tokens, [CLS] and [SEP] included."""

    max_length: int
    policy: LongDocuments
    cls_id: int
    sep_id: int

    def __call__(self, document: Ids, cut: Cut) -> list[Ids]:
        """Pieces of one document; what is left out is counted in `cut`. An empty document gives none."""
        room = self.max_length - 2
        cut.num_documents += 1
        cut.num_tokens += len(document)
        if len(document) > room and self.policy != "split":
            kept = room if self.policy == "truncate" else 0
            cut.num_cut += len(document) - kept
            document = document[:kept]
        return [self._wrap(document[start : start + room]) for start in range(0, len(document), room)]

    def _wrap(self, ids: Ids) -> Ids:
        piece = np.empty(len(ids) + 2, dtype=ids.dtype)
        piece[0], piece[1:-1], piece[-1] = self.cls_id, ids, self.sep_id
        return piece


@dataclass(eq=False)
class _OpenRow:
    pieces: list[Ids]
    num_tokens: int
    epoch: int  # of its first piece


@dataclass
class Packer:
    """Best fit over open rows. `add` takes a piece and returns the rows that it closed."""

    row_length: int
    max_open: int = MAX_OPEN
    _open: list[_OpenRow] = field(default_factory=list)

    def add(self, piece: Ids, epoch: int) -> list[Row]:
        fits = [row for row in self._open if row.num_tokens + len(piece) <= self.row_length]
        if fits:
            row = max(fits, key=lambda row: row.num_tokens)
            row.pieces.append(piece)
            row.num_tokens += len(piece)
        else:
            row = _OpenRow([piece], len(piece), epoch)
            self._open.append(row)
        if row.num_tokens >= self.row_length - 2:  # no piece is shorter than [CLS] token [SEP]
            return [self._close(row)]
        if len(self._open) > self.max_open:
            return [self._close(max(self._open, key=lambda row: row.num_tokens))]
        return []

    def flush(self) -> list[Row]:
        """Close all open rows, oldest first."""
        return [self._close(row) for row in list(self._open)]

    def _close(self, row: _OpenRow) -> Row:
        self._open.remove(row)
        return Row(tuple(row.pieces), row.epoch)

    def snapshot(self) -> list[tuple[tuple[Ids, ...], int]]:
        """The open rows; shares the arrays, which nobody writes to."""
        return [(tuple(row.pieces), row.epoch) for row in self._open]

    def restore(self, rows: list[tuple[tuple[Ids, ...], int]]) -> None:
        self._open = [_OpenRow(list(pieces), sum(map(len, pieces)), epoch) for pieces, epoch in rows]


@dataclass
class OnePerRow:
    """No packing: every piece is a row. The same interface as `Packer`, and no state."""

    def add(self, piece: Ids, epoch: int) -> list[Row]:
        return [Row((piece,), epoch)]

    def flush(self) -> list[Row]:
        return []

    def snapshot(self) -> list[Any]:
        return []

    def restore(self, rows: list[Any]) -> None:
        assert not rows
