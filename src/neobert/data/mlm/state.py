"""A position of the data as JSON and arrays, as a checkpoint holds it, and back. The JSON keeps the names of format 2."""

from typing import Any

import numpy as np

from neobert.data.loader import Saved
from neobert.data.mlm.packing import Row
from neobert.data.tokenizer import Ids
from neobert.errors import CheckpointError

FORMAT = 2

State = dict[
    str, Any
]  # plain data, tuples of rows and token ids, which are shared with what is running and never written to
ROWS = ("open_rows", "ready")


def write_position(position: State, fingerprint: dict[str, Any], dtype: type) -> Saved:
    """The position of `Pipeline.state_dict` as JSON and arrays."""
    arrays: dict[str, np.ndarray] = {}
    shards = {
        str(number): {
            **shard,
            "sources": [_write_source(arrays, f"{number}.{n}.", one, dtype) for n, one in enumerate(shard["sources"])],
        }
        for number, shard in position["shards"].items()
    }
    turns, rest = divmod(position["num_batches"], len(shards))
    state = {"lanes_per_rank": len(shards), "turns": turns, "rest": rest, "lanes": shards}
    return {"fingerprint": fingerprint, **state}, arrays


def read_position(saved: Saved, shard_numbers: list[int], fingerprint: dict[str, Any]) -> State:
    """The position of the given shards. Raises CheckpointError when the data, or its deal to ranks, is not the same."""
    state, arrays = saved
    check_fingerprint(state["fingerprint"], fingerprint)
    shards = {}
    for number in shard_numbers:
        shard = state["lanes"].get(str(number))
        if shard is None:
            raise CheckpointError(
                f"the checkpoint holds no position of shard {number}; the files of a rank are missing"
            )
        sources = [_read_source(arrays, f"{number}.{n}.", one) for n, one in enumerate(shard["sources"])]
        shards[number] = {**shard, "sources": sources}
    rest = state["rest"] if state["lanes_per_rank"] == len(shards) else 0  # or else with the first shard again
    return {"num_batches": state["turns"] * len(shards) + rest, "shards": shards}


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

    source = {name: value for name, value in state.items() if name != "ends"} | {"buffer": pieces("buffer")}
    for name in ROWS:
        rest = iter(pieces(name))
        ends = state["ends"] if name == "ready" else []
        source[name] = [
            Row(tuple(next(rest) for _ in range(count)), epoch, ends_batch=number in ends)
            for number, (count, epoch) in enumerate(state[name])
        ]
    return source
