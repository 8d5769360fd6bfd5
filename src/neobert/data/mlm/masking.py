"""Masked-LM corruption as a pure function of (seed, epoch, row index).

No generator is kept: every token's random number is a hash of its row's key and its place in the row, so a replayed or
resumed row is masked exactly as before, on any number of ranks. All rows of a batch are hashed at once (about 10 ns per
token).
"""

from dataclasses import dataclass

import numpy as np

from neobert.data.hashing import GOLDEN, hash_keys, mix

IGNORED = -100


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

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """(which ids may be selected, by id; ids for random replacement)."""
        maskable = np.ones(max([self.num_real, *self.special_ids]) + 1, dtype=bool)
        maskable[list(self.special_ids)] = False
        return maskable, np.flatnonzero(maskable[: self.num_real])

    def __post_init__(self) -> None:
        maskable, replacements = self.tables()
        object.__setattr__(self, "_maskable", maskable)
        object.__setattr__(self, "_replacements", replacements)

    def __call__(self, ids_BT: np.ndarray, epochs_B: np.ndarray, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corrupted ids and labels (-100: not selected), both int64, B x T.

        Each token that is not special is selected with the probability of its row; of the selected, 80 % become [MASK],
        10 % a random token, 10 % stay (arXiv 1810.04805), or all become [MASK] with `mask_all`.
        """
        keys_B = hash_keys(self.seed, epochs_B, rows_B)
        places_T = np.arange(1, ids_BT.shape[1] + 1, dtype=np.uint64) * GOLDEN
        bits = mix(keys_B[:, None] + places_T[None, :])
        # 32 bits choose whether a token is selected, 16 what becomes of it, and a second hash the random replacement.
        threshold_B = np.round(self.rate(rows_B) * 2**32).astype(np.uint64) << np.uint64(32)
        selected = bits < threshold_B[:, None]
        selected &= self._maskable[ids_BT]  # type: ignore[attr-defined]
        labels = np.where(selected, ids_BT, np.int64(IGNORED))
        inputs = ids_BT.astype(np.int64)
        if self.mask_all:
            inputs[selected] = self.mask_id
            return inputs, labels
        choice = (bits[selected] & np.uint64(0xFFFF)).astype(np.float64) / 2**16
        replacements = self._replacements  # type: ignore[attr-defined]
        random_ids = replacements[mix(bits[selected]) % np.uint64(len(replacements))]
        inputs[selected] = np.select([choice < 0.8, choice < 0.9], [self.mask_id, random_ids], labels[selected])
        return inputs, labels
