"""Documents in their order: a reader hands out blocks of them and knows its position; a segmenter cuts them into pieces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Any, Literal

import numpy as np

from neobert.data.files.documents import (
    Corpus,
    Files,
    Position,
    SkippedRows,
    fingerprint,
    read_text,
    stream,
    take_block,
)
from neobert.data.files.rows import Unusable
from neobert.data.hashing import hash_key, permute
from neobert.data.tokenizer import Ids
from neobert.ranks import Ranks

FETCH_TEXTS, FETCH_TOKENS = 16, 1024  # documents at a time: texts may be long, pieces of tokens are not

Text = Files | Corpus  # a stream, or random access
LongDocuments = Literal["split", "truncate", "drop"]


@dataclass
class Reader:
    """Blocks of documents, of which a rank takes every `world_size`-th: files in their order, a corpus in a new order each
    epoch (`seed` None: always its own order). Documents of other ranks are passed over without parsing them.
    """

    text: Text
    seed: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    skips: SkippedRows = field(default_factory=SkippedRows)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.go_to(self.epoch)

    @cached_property
    def fingerprint(self) -> str:
        if isinstance(self.text, Files):
            return fingerprint(self.text)
        return self.text.fingerprint + ("" if self.seed is not None else "/ordered")

    @property
    def is_stream(self) -> bool:
        return isinstance(self.text, Files)

    def go_to(self, epoch: int, position: tuple[int, ...] | None = None) -> None:
        """Read an epoch from a position on, or from its beginning: how many documents come before, of all ranks; of files also
        the number of a file and the offset of a row.
        """
        start = (0, *self.text.start) if isinstance(self.text, Files) else (0,)
        self.epoch, self.position = epoch, start if position is None else position
        # The rest of the epoch, one by one; `position` is after the last one taken.
        self.documents = self._streamed(self.text) if isinstance(self.text, Files) else self._fetched(self.text)

    def read(self) -> list[Any]:
        """The next block of documents, texts or token ids; an empty list at the end of an epoch. Raises DataError."""
        if not isinstance(self.text, Files) and self.text.is_tokenized:
            return list(islice(self.documents, FETCH_TOKENS))
        return take_block(self.documents)

    def next_epoch(self) -> None:
        self.go_to(self.epoch + 1)

    def _streamed(self, files: Files) -> Iterator[str]:
        first, *where = self.position
        for number, (row, begin, after) in enumerate(stream(files, Position(*where), files.stop), first):
            if number % self.ranks.world_size == self.ranks.rank:
                document, self.position = read_text(files, row, begin), (number + 1, *after)
                if isinstance(document, Unusable):
                    self.skips.add(document)
                else:
                    yield document

    def _fetched(self, corpus: Corpus) -> Iterator[Any]:
        size, world, rank = len(corpus), self.ranks.world_size, self.ranks.rank
        step = (FETCH_TOKENS if corpus.is_tokenized else FETCH_TEXTS) * world
        for first in range(self.position[0] + rank, size, step):
            numbers = np.arange(first, min(size, first + step), world)
            indices = numbers if self.seed is None else permute(numbers, size, hash_key(self.seed, self.epoch))
            for after, document in zip((numbers - rank + world).tolist(), corpus.fetch(indices), strict=True):
                self.position = (after,)
                if isinstance(document, Unusable):
                    self.skips.add(document)
                else:
                    yield document

    @property
    def _names(self) -> tuple[str, ...]:
        """What the numbers of a position are called in a checkpoint."""
        return ("num_read", *Position._fields) if self.is_stream else ("position",)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last block, as plain JSON."""
        position = dict(zip(self._names, self.position, strict=True))
        return {"epoch": self.epoch, **position, "skips": self.skips.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.go_to(state["epoch"], tuple(state[name] for name in self._names))
        self.skips.load_state_dict(state["skips"])


@dataclass
class RememberedReader(Reader):
    """A reader that is read many times: its first `limit` tokens are tokenised once and kept. For evaluations."""

    encode: Callable[[list[Any]], list[Ids]] = field(kw_only=True)
    limit: int = 50_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._blocks: list[list[Ids]] = []
        self._num_tokens, self._next_block = 0, 0  # of those that are remembered
        self._after = self.state_dict()

    def read(self) -> list[Any]:
        if self._next_block < len(self._blocks):
            self._next_block += 1
            return self._blocks[self._next_block - 1]
        block = super().read()
        block = self.encode(block) if block and isinstance(block[0], str) else block
        if block and self._num_tokens < self.limit and self._next_block == len(self._blocks):
            self._blocks.append(block)
            self._next_block += 1
            self._num_tokens += sum(map(len, block))
            self._after = self.state_dict()
        return block

    def again(self) -> "RememberedReader":
        """At the beginning again, with what is remembered."""
        self.load_state_dict(self._after)
        self._next_block = 0
        return self


class Pieces:
    """A tokenised corpus by pieces of at most `room` tokens, so that shuffling takes long documents apart."""

    is_tokenized = True

    def __init__(self, corpus: Any, room: int):
        counts = -(-np.maximum(corpus.lengths, 1) // room)
        self.corpus, self.room = corpus, room
        self.ends = np.cumsum(counts)
        self.fingerprint = corpus.fingerprint

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def fetch(self, indices: np.ndarray) -> list[Any]:
        documents = np.searchsorted(self.ends, indices, side="right")
        begins = self.ends[documents - 1] * (documents > 0)
        offsets = (indices - begins) * self.room
        ids = self.corpus.fetch(documents)
        return [one[offset : offset + self.room] for one, offset in zip(ids, offsets, strict=True)]


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
