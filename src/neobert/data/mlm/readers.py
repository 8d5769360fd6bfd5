"""The order of documents: readers that hand out blocks and know their position.

Both readers have the same shape: `read()` gives the next block of documents, an empty list at the end of an epoch;
`next_epoch()` starts the next one; `state_dict()` is the position after the last block, as plain JSON. Data ranks take
every `world`-th document.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from neobert.data.files.documents import (
    BLOCK_CHARACTERS,
    BLOCK_DOCUMENTS,
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


@dataclass
class CorpusReader:
    """Blocks of a corpus in a new order each epoch (`seed` None: always its own order)."""

    corpus: Corpus
    seed: int | None
    ranks: Ranks = field(default_factory=Ranks)
    skips: SkippedRows = field(default_factory=SkippedRows)
    epoch: int = 0
    position: int = 0  # documents of this epoch that all ranks together have passed

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint + ("" if self.seed is not None else "/ordered")

    def read(self) -> list[Any]:
        block: list[Any] = []
        num_characters, size, world = 0, len(self.corpus), self.ranks.world_size
        step = (FETCH_TOKENS if self.corpus.is_tokenized else FETCH_TEXTS) * world
        while self.position < size and len(block) < BLOCK_DOCUMENTS and num_characters < BLOCK_CHARACTERS:
            indices = np.arange(self.position + self.ranks.rank, min(size, self.position + step), world)
            self.position = min(size, self.position + step)
            if self.seed is not None:
                indices = permute(indices, size, hash_key(self.seed, self.epoch))
            for document in self.corpus.fetch(indices) if len(indices) else []:
                if isinstance(document, Unusable):
                    self.skips.add(document)
                    continue
                block.append(document)
                num_characters += len(document)
        return block

    def next_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "skips": self.skips.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.skips.load_state_dict(state["skips"])


@dataclass
class StreamReader:
    """Blocks of documents in the order of the files. Documents of other ranks are passed over without parsing them."""

    files: Files
    ranks: Ranks = field(default_factory=Ranks)
    skips: SkippedRows = field(default_factory=SkippedRows)
    epoch: int = 0
    num_read: int = 0  # documents of this epoch passed by this reader, of all ranks

    def __post_init__(self) -> None:
        self.position = self.files.start
        self._texts = self._read_texts()

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.files)

    def read(self) -> list[str]:
        return take_block(self._texts)

    def _read_texts(self) -> Iterator[str]:
        """The texts of this rank from `position` on, which is after the row of the last one that was taken."""
        for row, begin, after in stream(self.files, self.position, self.files.stop):
            self.position = after
            is_mine = self.num_read % self.ranks.world_size == self.ranks.rank
            self.num_read += 1
            if not is_mine:
                continue
            text = read_text(self.files, row, begin)
            if isinstance(text, Unusable):
                self.skips.add(text)
            else:
                yield text

    def next_epoch(self) -> None:
        self.epoch, self.num_read, self.position = self.epoch + 1, 0, self.files.start
        self._texts = self._read_texts()

    def state_dict(self) -> dict[str, Any]:
        counts = {"epoch": self.epoch, "num_read": self.num_read}
        return {**counts, **self.position._asdict(), "skips": self.skips.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.num_read = state["epoch"], state["num_read"]
        self.position, self._texts = Position(state["file"], state["offset"]), self._read_texts()
        self.skips.load_state_dict(state["skips"])


@dataclass
class RememberedReader:
    """A reader that is read many times: its first `limit` tokens are tokenised once and kept. For evaluations."""

    inner: CorpusReader | StreamReader
    encode: Callable[[list[Any]], list[Ids]]
    limit: int = 50_000_000
    blocks: list[list[Ids]] = field(default_factory=list)
    num_tokens: int = 0
    next_block: int = 0  # of those that are remembered

    def __post_init__(self) -> None:
        self._after = self.inner.state_dict()  # what is remembered
        self.ranks, self.skips = self.inner.ranks, self.inner.skips

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    @property
    def epoch(self) -> int:
        return self.inner.epoch

    def read(self) -> list[Any]:
        if self.next_block < len(self.blocks):
            self.next_block += 1
            return self.blocks[self.next_block - 1]
        block: list[Any] = self.inner.read()
        block = self.encode(block) if block and isinstance(block[0], str) else block
        if block and self.num_tokens < self.limit and self.next_block == len(self.blocks):
            self.blocks.append(block)
            self.next_block += 1
            self.num_tokens += sum(map(len, block))
            self._after = self.inner.state_dict()
        return block

    def next_epoch(self) -> None:
        self.inner.next_epoch()

    def again(self) -> "RememberedReader":
        """At the beginning again, with what is remembered."""
        self.inner.load_state_dict(self._after)
        self.next_block = 0
        return self

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("an evaluation is not resumed")


Reader = CorpusReader | StreamReader | RememberedReader


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
