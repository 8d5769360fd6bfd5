"""Time to restore a position: opening the data, loading the state, the first batch; shallow and deep in a 12 MB corpus.

Also in an order of 10^9 rows, which is simulated: the corpus hands out the same tokens for every number.
"""

import json
import tempfile
import time
from typing import Any

import numpy as np
from _bench import arguments, bar, finish, table
from _data import corpus, make_data

KINDS = {
    "streaming": ["dataset.streaming=true", "dataset.num_workers=0"],
    "streaming, 2 processes": ["dataset.streaming=true", "dataset.num_workers=2"],
    "random access": ["dataset.streaming=false", "dataset.num_workers=0"],
    "tokenised": ["dataset.streaming=false", "dataset.pre_tokenize=true", "dataset.num_proc=1"],
}
DEPTHS = (0.02, 0.5, 0.95)


def words_for(kind: str) -> list[str]:
    path, column = corpus("12 MB")
    words = [f"dataset.path={path}", f"dataset.text_column={column or 'null'}", "dataset.shuffle_buffer_size=1000"]
    return [*words, *KINDS[kind], "datacollator.pack_sequences=true", "trainer.per_device_train_batch_size=8"]


def measure(kind: str, repeats: int) -> dict[float, float]:
    """Seconds to restore, by depth: the fastest of some repeats, after one that warms caches and imports."""
    words = words_for(kind)
    with tempfile.TemporaryDirectory() as folder:
        loader = make_data(*words, folder=folder).train
        states = save_on_the_way(loader)
        out = {}
        for depth, (state, arrays) in states.items():
            seconds = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                resumed = make_data(*words, folder=folder).train
                resumed.load_state_dict(json.loads(state), arrays)
                next(resumed)
                seconds.append(time.perf_counter() - start)
                resumed.close()
            out[depth] = min(seconds[1:])
    return out


def save_on_the_way(loader: Any) -> dict[float, Any]:
    """The states of one epoch at `DEPTHS`; its number of batches is known from the tokens of the corpus."""
    states = []
    while True:
        batch = next(loader)
        if batch.epoch:
            break
        state, arrays = loader.state_dict() if len(states) % 10 == 0 else (None, None)
        states.append((None if state is None else json.dumps(state), arrays))
    loader.close()
    return {depth: states[round(depth * len(states)) // 10 * 10] for depth in DEPTHS}


class Simulated:
    """A corpus of 10^9 rows of 510 tokens."""

    fingerprint, is_tokenized = "simulated", True
    tokens = np.arange(510, dtype=np.uint16) % 8000 + 5

    def __len__(self) -> int:
        return 10**9

    def fetch(self, indices: np.ndarray) -> list[np.ndarray]:
        return [self.tokens] * len(indices)


def simulated() -> dict[float, float]:
    """Seconds to restore a reader at a depth of 10^9 rows and read a block."""
    from neobert.data.mlm.readers import Reader
    from neobert.ranks import Ranks

    out = {}
    for depth in DEPTHS:
        position = int(depth * 10**9)
        start = time.perf_counter()
        reader = Reader(Simulated(), 0, Ranks(3, 8))
        reader.load_state_dict({"epoch": 0, "position": position, "skips": {"counts": {}, "first": {}}})
        reader.read()
        out[depth] = time.perf_counter() - start
    return out


def main() -> None:
    options = arguments(__doc__)
    kinds = list(KINDS)[::3] if options.quick else list(KINDS)
    measured = {kind: measure(kind, 1 if options.quick else 3) for kind in kinds}
    measured["10^9 rows, simulated"] = simulated()
    rows = [(kind, *(f"{seconds:.3f} s" for seconds in depths.values())) for kind, depths in measured.items()]
    table([("data", *(f"at {depth:.0%}" for depth in DEPTHS)), *rows])
    bar("resume_seconds", max(max(depths.values()) for depths in measured.values()), 1.0, at_most=True)
    growth = max(depths[DEPTHS[-1]] - depths[DEPTHS[0]] for depths in measured.values())
    bar("resume_seconds_growth_with_depth", growth, 0.1, at_most=True)
    finish()


if __name__ == "__main__":
    main()
