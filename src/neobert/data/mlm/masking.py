"""Rows into masked batches, as a pure function of (seed, epoch, row index).

No generator is kept: every token's random number is a hash of its row's key and its position in the row, so a replayed or
resumed row is masked exactly as before, on any number of ranks. All rows of a batch are hashed at once (about 10 ns per
token).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from neobert.data.batch import IGNORED, Batch, RowLayout
from neobert.data.hashing import GOLDEN, hash_keys, mix
from neobert.data.mlm.packing import Row


@dataclass(frozen=True)
class Masker:
    """How rows are corrupted. With `final_probability` the rate changes linearly with the row index until `num_rows`."""

    seed: int
    probability: float
    mask_all: bool
    mask_id: int
    special_ids: frozenset[int]
    num_real: int
    final_probability: float | None = None
    num_rows: int = 0  # of the whole run, over all ranks

    def rate(self, rows: np.ndarray) -> np.ndarray:
        """The probability at row indices, float64."""
        if self.final_probability is None:
            return np.full(len(rows), self.probability)
        done = np.clip(rows / max(1, self.num_rows), 0.0, 1.0)
        return self.probability + (self.final_probability - self.probability) * done

    @cached_property
    def _maskable(self) -> np.ndarray:
        """Which ids may be selected, by id."""
        maskable = np.ones(max([self.num_real, *self.special_ids]) + 1, dtype=bool)
        maskable[list(self.special_ids)] = False
        return maskable

    @cached_property
    def _replacements(self) -> np.ndarray:
        """The ids for random replacement."""
        return np.flatnonzero(self._maskable[: self.num_real])

    def __call__(self, ids_BT: np.ndarray, epochs_B: np.ndarray, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corrupted ids and labels (-100: not selected), both int64, B x T.

        Each token that is not special is selected with the probability of its row; of the selected, 80 % become [MASK],
        10 % a random token, 10 % stay (arXiv 1810.04805), or all become [MASK] with `mask_all`.
        """
        keys_B = hash_keys(self.seed, epochs_B, rows_B)
        positions_T = np.arange(1, ids_BT.shape[1] + 1, dtype=np.uint64) * GOLDEN
        bits = mix(keys_B[:, None] + positions_T[None, :])
        # 32 bits choose whether a token is selected, 16 what becomes of it, and a second hash the random replacement.
        threshold_B = np.round(self.rate(rows_B) * 2**32).astype(np.uint64) << np.uint64(32)
        selected = bits < threshold_B[:, None]
        selected &= self._maskable[ids_BT]
        labels = np.where(selected, ids_BT, np.int64(IGNORED))
        inputs = ids_BT.astype(np.int64)
        if self.mask_all:
            inputs[selected] = self.mask_id
            return inputs, labels
        choice = (bits[selected] & np.uint64(0xFFFF)).astype(np.float64) / 2**16
        random_ids = self._replacements[mix(bits[selected]) % np.uint64(len(self._replacements))]
        inputs[selected] = np.select([choice < 0.8, choice < 0.9], [self.mask_id, random_ids], labels[selected])
        return inputs, labels


@dataclass(frozen=True)
class Collator:
    """Rows -> masked batch. A packed row of several pieces is padded, too; its padding counts as one more document."""

    masker: Masker
    layout: RowLayout

    def __call__(self, rows: list[Row], epoch: int) -> Batch:
        ids = [row.ids for row in rows]
        ids_BT = self.layout.pad(ids, self.layout.pad_id)
        inputs, labels = self.masker(
            ids_BT, np.array([row.epoch for row in rows]), np.array([row.index for row in rows])
        )
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            None if self.layout.packed else self.layout.mask(ids),
            _document_lengths(rows, ids_BT.shape[1]) if self.layout.packed else None,
            num_targets=int((labels != IGNORED).sum()),
            num_tokens=sum(map(len, ids)),
            epoch=epoch,
        )


def _document_lengths(rows: list[Row], row_length: int) -> tuple[int, ...]:
    """Lengths of all pieces in order, and of the padding at the end of each row, so that they sum to B*T."""
    lengths: list[int] = []
    for row in rows:
        lengths += [len(piece) for piece in row.pieces]
        if row.num_tokens < row_length:
            lengths.append(row_length - row.num_tokens)
    return tuple(lengths)
