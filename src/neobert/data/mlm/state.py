"""A position of the data as JSON and arrays, as a checkpoint holds it, and back."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neobert.data.mlm.packing import Row, TruncationStats
from neobert.data.mlm.row_source import SourceState
from neobert.data.mlm.shards import ShardState
from neobert.data.tokenizer import Ids
from neobert.errors import CheckpointError

FORMAT = 2

Saved = tuple[dict[str, Any], dict[str, np.ndarray]]  # JSON, arrays


@dataclass(frozen=True)
class Snapshot:
    """The position behind a batch: of every shard of this rank, and whose turn is next."""

    shards: tuple[ShardState, ...]
    num_batches: int


def write_snapshot(snapshot: Snapshot, shard_numbers: list[int], fingerprint: dict[str, Any], dtype: type) -> Saved:
    """As JSON and arrays."""
    arrays: dict[str, np.ndarray] = {}
    shards = {}
    for shard, number in zip(snapshot.shards, shard_numbers, strict=True):
        sources = [_write_source(arrays, f"{number}.{n}.", one, dtype) for n, one in enumerate(shard.sources)]
        shards[str(number)] = {"num_rows": shard.num_rows, "dry": list(shard.dry), "sources": sources}
    turns, rest = divmod(snapshot.num_batches, len(shard_numbers))
    state = {"lanes_per_rank": len(shard_numbers), "turns": turns, "rest": rest, "lanes": shards}
    return {"fingerprint": fingerprint, **state}, arrays


def read_snapshot(saved: Saved, shard_numbers: list[int], fingerprint: dict[str, Any]) -> Snapshot:
    """The position of the given shards. Raises CheckpointError when the data, or its deal to ranks, is not the same."""
    state, arrays = saved
    check_fingerprint(state["fingerprint"], fingerprint)
    missing = [number for number in shard_numbers if str(number) not in state["lanes"]]
    if missing:
        raise CheckpointError(
            f"the checkpoint holds no position of shard {missing[0]}; the files of a rank are missing"
        )
    shards = []
    for number in shard_numbers:
        shard = state["lanes"][str(number)]
        sources = tuple(_read_source(arrays, f"{number}.{n}.", one) for n, one in enumerate(shard["sources"]))
        shards.append(ShardState(shard["num_rows"], tuple(shard["dry"]), sources))
    rest = state["rest"] if state["lanes_per_rank"] == len(shard_numbers) else 0  # or else with the first shard again
    return Snapshot(tuple(shards), state["turns"] * len(shard_numbers) + rest)


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
    changed = [
        f"{name} (was {saved.get(name)}, is {current[name]})" for name in current if saved.get(name) != current[name]
    ]
    if changed:
        raise CheckpointError(
            f"the data position of the checkpoint does not fit this run: changed {', '.join(changed)}. "
            "Restore it, or start a new run from these weights"
        )


def require_same(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises CheckpointError naming the first thing that a position depends on and that is not as it was."""
    for name, value in current.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"cannot continue exactly: {name} was {saved.get(name)}, now {value}; start a new run, or set it as it was"
            )


def _write_source(arrays: dict[str, np.ndarray], prefix: str, s: SourceState, dtype: type) -> dict[str, Any]:
    _write_pieces(arrays, f"{prefix}buffer", list(s.buffer), dtype)
    state: dict[str, Any] = {
        "reader": s.reader,
        "num_seen": s.num_seen,
        "epoch": s.epoch,
        "num_rows": s.num_rows,
        "num_packed": s.num_packed,
        "cut": asdict(s.cut),
    }
    ready = [(row.pieces, row.epoch) for row in s.ready]
    state["ends"] = [number for number, row in enumerate(s.ready) if row.ends_batch]
    for name, rows in (("open_rows", s.open_rows), ("ready", ready)):
        _write_pieces(arrays, prefix + name, [piece for pieces, _ in rows for piece in pieces], dtype)
        state[name] = [[len(pieces), epoch] for pieces, epoch in rows]
    return state


def _read_source(arrays: dict[str, np.ndarray], prefix: str, state: dict[str, Any]) -> SourceState:
    ends = set(state["ends"])
    rows = {name: _read_rows(arrays, prefix + name, state[name]) for name in ("open_rows", "ready")}
    return SourceState(
        reader=state["reader"],
        buffer=tuple(_read_pieces(arrays, f"{prefix}buffer")),
        num_seen=state["num_seen"],
        open_rows=tuple(rows["open_rows"]),
        ready=tuple(Row(*row, ends_batch=number in ends) for number, row in enumerate(rows["ready"])),
        epoch=state["epoch"],
        num_rows=state["num_rows"],
        num_packed=state["num_packed"],
        cut=TruncationStats(**state["cut"]),
    )


def _write_pieces(arrays: dict[str, np.ndarray], name: str, pieces: list[Ids], dtype: type) -> None:
    arrays[f"{name}.ids"] = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    arrays[f"{name}.lengths"] = np.array([len(piece) for piece in pieces], dtype=np.int64)


def _read_pieces(arrays: dict[str, np.ndarray], name: str) -> list[Ids]:
    return np.split(arrays[f"{name}.ids"], np.cumsum(arrays[f"{name}.lengths"]))[:-1]


def _read_rows(arrays: dict[str, np.ndarray], name: str, shape: list[list[int]]) -> list[tuple[tuple[Ids, ...], int]]:
    pieces = iter(_read_pieces(arrays, name))
    return [(tuple(next(pieces) for _ in range(count)), epoch) for count, epoch in shape]
