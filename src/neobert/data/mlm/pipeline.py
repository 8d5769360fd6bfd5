"""From rows to masked batches, with a position that is exact at every batch.

Everything after the tokeniser runs in one background thread, in one order, whatever the number of tokenising threads. Each
batch made ahead carries the position after it, which shares arrays with what is running and costs tens of microseconds.
Masks are a function of (seed, epoch, row index, position in the row), so a row that is read again is masked as before.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch

from neobert.data.batch import IGNORED, Batch, Loader, RowLayout, Saved, State
from neobert.data.files.documents import SkippedRows
from neobert.data.hashing import GOLDEN, hash_keys, mix
from neobert.data.mlm.readers import TruncationStats
from neobert.data.mlm.row_source import Row, Shard, Workers
from neobert.data.tokenizer import Ids
from neobert.errors import CheckpointError
from neobert.ranks import Ranks

FORMAT = 2  # of saved positions; their JSON keeps its names
ROWS = ("open_rows", "ready")


# --- masking -----------


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
        ids, packed = [row.ids for row in rows], self.layout.packed
        epochs_B, indices_B = np.array([row.epoch for row in rows]), np.array([row.index for row in rows])
        inputs, labels = self.masker(self.layout.pad(ids, self.layout.pad_id), epochs_B, indices_B)
        T = inputs.shape[1]
        lengths = tuple(n for row in rows for n in (*map(len, row.pieces), T - row.num_tokens) if n)
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(labels), None if packed else self.layout.mask(ids),
            lengths if packed else None, int((labels != IGNORED).sum()), sum(map(len, ids)), epoch,
        )  # fmt: skip


# --- the loader -----------


class MaskedLoader(Loader):
    """Microbatches of one data rank, endlessly, or until its shards end; they are made ahead by one thread.

    A rank owns the shards whose number is its own modulo the number of ranks, and takes its batches from them in turn: so a run
    may go on with any number of ranks that divides the shards. A shard that has ended gives empty batches until all shards of
    its rank have; then the loader ends, and the training loop fills up with `empty_batch` while other ranks have some.
    """

    def __init__(
        self, shards: list[Shard], workers: Workers, collator: Collator, batch_size: int, seed: int = 0,
        fill_last: bool = False, pin_memory: bool = False,
    ):  # fmt: skip
        """`fill_last`: a shard's last, short microbatch is filled up with empty rows."""
        self.shards, self.workers, self.collator, self.batch_size = shards, workers, collator, batch_size
        self.seed, self.fill_last, self.pin_memory, self.num_made = seed, fill_last, pin_memory, 0
        self.observe: Callable[[Batch, int], None] | None = None  # called with every batch used and its number, from 1
        super().__init__(self._made(), num_threads=1)

    def __next__(self) -> Batch:
        batch = super().__next__()
        if self.observe is not None:
            self.observe(batch, self.position["num_batches"])
        return batch

    def jobs(self) -> Iterator[Callable[[], tuple[Batch, State]]]:
        return repeat(self.batches().__next__)

    def batches(self) -> Iterator[tuple[Batch, State]]:
        """Masked microbatches as the thread makes them, each with the position after it."""
        for rows in self._microbatches():
            batch = self.collator(rows, self.epoch)
            yield batch.pin_memory() if self.pin_memory else batch, self._made()

    def _microbatches(self) -> Iterator[list[Row]]:
        """The rows of the microbatches; shards take turns, those that have ended with empty rows."""
        while self.num_made % len(self.shards) or any(shard.next_source() is not None for shard in self.shards):
            shard, rows = self.shards[self.num_made % len(self.shards)], list[Row]()
            while len(rows) < self.batch_size and not (rows and rows[-1].ends_batch):
                row = shard.next()
                if row is None:
                    break
                rows.append(row)
            if not rows or self.fill_last:
                rows += self._empty_rows()[len(rows) :]
            self.num_made += 1
            yield rows

    @property
    def epoch(self) -> int:
        """The epoch that all shards have got to."""
        return min(shard.epoch for shard in self.shards)

    def _empty_rows(self) -> list[Row]:
        """A batch of [CLS] [SEP]: nothing in it can be masked."""
        tokenizer = self.workers.tokenizer
        ids: Ids = np.array([tokenizer.cls_id, tokenizer.sep_id], dtype=tokenizer.dtype)
        return [Row((ids,), 0, 0)] * self.batch_size

    def empty_batch(self) -> Batch:
        """A batch without targets."""
        return self.collator(self._empty_rows(), self.epoch)

    def set_num_rows(self, num_rows: int) -> None:
        """Set how many rows the whole run has, which rates of masking that change depend on."""
        self.collator = replace(self.collator, masker=replace(self.collator.masker, num_rows=num_rows))

    def count_batches(self) -> int:
        """Batches that are left, by a pass over the data that masks nothing."""
        count = sum(1 for _ in self._microbatches())
        self.workers.close()
        return count

    def close(self) -> None:
        super().close()
        self.workers.close()

    def _made(self) -> State:
        """The position after the last batch that was made."""
        return {"num_batches": self.num_made, "shards": {shard.index: shard.state_dict() for shard in self.shards}}

    def go_to(self, position: State) -> None:
        """Continue after `position`; reads nothing again."""
        self.position, self.num_made = position, position["num_batches"]
        for shard in self.shards:
            shard.load_state_dict(position["shards"][shard.index])

    @cached_property
    def fingerprint(self) -> dict[str, Any]:  # type: ignore[override]
        """What must be the same for a position to mean the same. Reads files where they are streamed."""
        first = self.shards[0]
        sources = [source.fingerprint() for source in first.sources]
        mixture = [[source["source"], weight] for source, weight in zip(sources, first.weights, strict=True)]
        facts = {"tokenizer": self.workers.tokenizer.fingerprint, "seed": self.seed, "lanes": first.world}
        mixed = [*mixture, first.exhausted] if len(sources) > 1 else None
        return {"format": FORMAT, **sources[0], **facts, "mixture": mixed}

    def state_dict(self, position: State | None = None) -> Saved:
        position, arrays, shards = position or self.position, dict[str, np.ndarray](), {}
        dtype = self.workers.tokenizer.dtype
        for number, shard in position["shards"].items():
            sources = [_write_source(arrays, f"{number}.{n}.", one, dtype) for n, one in enumerate(shard["sources"])]
            shards[str(number)] = {**shard, "sources": sources}
        turns, rest = divmod(position["num_batches"], len(shards))
        state = {"lanes_per_rank": len(shards), "turns": turns, "rest": rest, "lanes": shards}
        return {"fingerprint": self.fingerprint, **state}, arrays

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        check_fingerprint(state["fingerprint"], self.fingerprint)
        shards = {}
        for number in (shard.index for shard in self.shards):
            shard = state["lanes"].get(str(number))
            if shard is None:
                holds_none = f"the checkpoint holds no position of shard {number}"
                raise CheckpointError(f"{holds_none}; the files of a rank are missing")
            sources = [_read_source(arrays, f"{number}.{n}.", source) for n, source in enumerate(shard["sources"])]
            shards[number] = {**shard, "sources": sources}
        rest = state["rest"] if state["lanes_per_rank"] == len(shards) else 0  # or else with the first shard again
        self.go_to({"num_batches": state["turns"] * len(shards) + rest, "shards": shards})

    def describe_used(self) -> list[str]:
        """What was passed over and cut in the documents up to the last batch used; empty when nothing was."""
        documents, counts, first = Counter[str](), Counter[str](), dict[str, str]()
        for source in (source for shard in self.position["shards"].values() for source in shard["sources"]):
            skips = source["reader"]["skips"]
            documents.update(source["cut"])
            counts.update(skips["counts"])
            first |= {reason: where for reason, where in skips["first"].items() if reason not in first}
        cut = TruncationStats(**documents)
        found = [f"cut: {cut.share:.1%} of the tokens, in {cut.num_long:,} of {cut.num_documents:,} documents"]
        skipped = SkippedRows(counts=counts, first=first).describe(cut.num_empty)
        return [*(found if cut.num_cut else []), *([skipped] if skipped else [])]


def shards_of(ranks: Ranks, num_shards: int) -> list[int]:
    """The shards of a rank. Raises CheckpointError when they cannot be shared equally."""
    if num_shards % ranks.world_size:
        raise CheckpointError(
            f"the data is dealt to {num_shards} shards, which {ranks.world_size} processes cannot share equally: "
            f"use a number of processes that divides {num_shards}"
        )
    return list(range(ranks.rank, num_shards, ranks.world_size))


# --- positions on disk -----------


def join_positions(positions: list[Saved]) -> Saved:
    """What all ranks saved, as one position, from which any number of ranks that divides the shards can go on."""
    if "lanes" not in positions[0][0]:  # the same in all ranks
        return positions[0]
    state = {**positions[0][0], "lanes": {n: shard for one, _ in positions for n, shard in one["lanes"].items()}}
    return state, {name: array for _, arrays in positions for name, array in arrays.items()}


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises CheckpointError naming what differs between a saved position and this run's data."""
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"the data position of the checkpoint has format {saved.get('format')}; this version reads {FORMAT}. "
            "Start a new run from these weights"
        )
    if saved["lanes"] != current["lanes"]:
        raise CheckpointError(
            f"the data was dealt to {saved['lanes']} shards when the checkpoint was written, and {current['lanes']} processes "
            f"cannot share those equally: resume with a number of processes that divides {saved['lanes']}"
        )
    pairs = [(name, saved.get(name), now) for name, now in current.items()]
    if changed := [f"{name} (was {before}, is {now})" for name, before, now in pairs if before != now]:
        raise CheckpointError(
            f"the data position of the checkpoint does not fit this run: changed {', '.join(changed)}. "
            "Restore it, or start a new run from these weights"
        )


def _write_source(arrays: dict[str, np.ndarray], prefix: str, source: State, dtype: type) -> State:
    """Token ids go into arrays; the JSON says how many pieces each row has, and its epoch."""
    rows: dict[str, tuple[Row, ...]] = {name: source[name] for name in ROWS}
    pieces = {name: [piece for row in rows[name] for piece in row.pieces] for name in ROWS}
    for name, found in {"buffer": source["buffer"], **pieces}.items():
        arrays[f"{prefix}{name}.ids"] = np.concatenate(found) if found else np.zeros(0, dtype)
        arrays[f"{prefix}{name}.lengths"] = np.array([len(piece) for piece in found], dtype=np.int64)
    return {
        **{name: value for name, value in source.items() if name != "buffer"},
        **{name: [[len(row.pieces), row.epoch] for row in rows[name]] for name in ROWS},
        "ends": [number for number, row in enumerate(rows["ready"]) if row.ends_batch],
    }


def _read_source(arrays: dict[str, np.ndarray], prefix: str, state: State) -> State:
    def pieces(name: str) -> list[Ids]:
        return np.split(arrays[f"{prefix}{name}.ids"], np.cumsum(arrays[f"{prefix}{name}.lengths"]))[:-1]

    def rows(name: str, ends: list[int]) -> list[Row]:
        rest, counts = iter(pieces(name)), enumerate(state[name])
        return [Row(tuple(islice(rest, count)), epoch, ends_batch=n in ends) for n, (count, epoch) in counts]

    read = {"buffer": pieces("buffer"), "open_rows": rows("open_rows", []), "ready": rows("ready", state["ends"])}
    return {name: value for name, value in state.items() if name != "ends"} | read
