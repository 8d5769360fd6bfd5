"""The order of documents: readers that hand out blocks and know their position.

Both readers have the same shape: `read()` gives the next block of documents, an empty list at the end of an epoch;
`next_epoch()` starts the next one; `state_dict()` is the position behind the last block, as plain JSON. Data ranks take
every `world`-th document.

The order of a corpus is a keyed permutation that is computed, not stored (a Feistel network, Luby and Rackoff 1988, with
cycle walking): position i of epoch e is known without the ones before it, for 10^9 documents as for ten.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neobert.data.masking import hash_key, mix
from neobert.data.sources import Corpus, Files, Position, stream
from neobert.data.token_store import TokenStore

BLOCK_DOCUMENTS = 256
BLOCK_CHARACTERS = 1_000_000


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """The keyed permutation of range(size), at `indices`. int64 -> int64."""
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = hash_key(key, np.arange(4))
    out = indices.astype(np.uint64)
    walking = np.ones(len(out), dtype=bool)
    while walking.any():  # the network permutes a power of four; walk until back inside `size`
        left, right = out[walking] >> np.uint64(half), out[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        out[walking] = (left << np.uint64(half)) | right
        walking &= out >= size
    return out.astype(np.int64)


@dataclass
class Rank:
    """Which of `world` equal readers this is."""

    index: int = 0
    world: int = 1


@dataclass
class CorpusReader:
    """Blocks of a corpus in a new order each epoch (`seed` None: always its own order)."""

    corpus: Corpus
    seed: int | None
    rank: Rank = field(default_factory=Rank)
    epoch: int = 0
    position: int = 0  # documents of this epoch that all ranks together have passed

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def read(self) -> list[Any]:
        end = min(len(self.corpus), self.position + BLOCK_DOCUMENTS * self.rank.world)
        places = np.arange(self.position + self.rank.index, end, self.rank.world)
        self.position = end
        if not len(places):
            return []
        if self.seed is not None:
            places = permute(places, len(self.corpus), int(hash_key(self.seed, self.epoch)[0]))
        return self.corpus.fetch(places)

    def next_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


@dataclass
class StreamReader:
    """Blocks of documents in the order of the files."""

    files: Files
    rank: Rank = field(default_factory=Rank)
    epoch: int = 0
    num_read: int = 0  # documents of this epoch passed by this reader, of all ranks
    position: Position = field(default_factory=Position)
    _rows: Iterator[tuple[str, Position]] | None = None

    @property
    def fingerprint(self) -> str:
        return self.files.fingerprint

    def read(self) -> list[str]:
        if self._rows is None:
            self._rows = stream(self.files, self.position)
        block: list[str] = []
        num_characters = 0
        for text, behind in self._rows:
            self.position = behind
            if self.num_read % self.rank.world == self.rank.index:
                block.append(text)
                num_characters += len(text)
            self.num_read += 1
            if len(block) == BLOCK_DOCUMENTS or num_characters >= BLOCK_CHARACTERS:
                break
        return block

    def next_epoch(self) -> None:
        self.epoch, self.num_read, self.position, self._rows = self.epoch + 1, 0, Position(), None

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self.epoch,
            "num_read": self.num_read,
            "file": self.position.file,
            "offset": self.position.offset,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.num_read = state["epoch"], state["num_read"]
        self.position, self._rows = Position(state["file"], state["offset"]), None


class Subset:
    """A share of a corpus, drawn by `seed`: the first `share` of a permutation, or the rest (`complement`)."""

    def __init__(self, corpus: Corpus, share: float, seed: int, complement: bool):
        size = len(corpus)
        cut = max(1, round(size * share))
        places = np.arange(cut, size) if complement else np.arange(cut)
        self.corpus = corpus
        self.indices = np.sort(permute(places, size, int(hash_key(seed, 0x5411)[0])))
        self.fingerprint = f"{corpus.fingerprint}/{share}/{seed}/{'rest' if complement else 'first'}"

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> np.ndarray:
        assert isinstance(self.corpus, TokenStore)
        return self.corpus.lengths[self.indices]

    def fetch(self, indices: np.ndarray) -> list[Any]:
        return self.corpus.fetch(self.indices[indices])


class Pieces:
    """A tokenised corpus by pieces of at most `room` tokens, so that shuffling takes long documents apart."""

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
