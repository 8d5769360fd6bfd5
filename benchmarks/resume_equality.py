"""Resume equality: at random positions the batches behind a restored position equal those of a run that was not interrupted.

Every combination of {streaming, random access, tokenised beforehand} x {0, 2 tokenising threads} x {packed, padded} x
{1 source, mixture of 2}: tokens, labels, order, epochs and the number of documents behind the position.
"""

import json
import random
import tempfile
from itertools import product
from typing import Any

import torch
from _bench import TEXT, arguments, bar, finish, table
from _data import make_data

KINDS = {
    "streaming": ["dataset.streaming=true", "dataset.shuffle_buffer_size=300"],
    "random access": ["dataset.streaming=false"],
    "tokenised": ["dataset.streaming=false", "dataset.pre_tokenize=true", "dataset.num_proc=1"],
}
SOURCES = {
    "1 source": [f"dataset.path={TEXT}"],
    "mixture": [
        f"dataset.mixture=[{{path: '{TEXT / 'train.txt'}', weight: 3}}, {{path: '{TEXT / 'validation.txt'}'}}]"
    ],
}
BASE = ["dataset.max_seq_length=128", "trainer.per_device_train_batch_size=16", "dataset.validation_split=null"]
NUM_BATCHES, NUM_BEHIND = 250, 3  # more than two epochs


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) and a.epoch == b.epoch


def measure(words: list[str], folder: str, num_positions: int) -> tuple[int, int]:
    """(positions at which all was equal, documents read twice or left out)."""
    whole = make_data(*words, folder=folder).train
    positions = sorted(random.Random(0).sample(range(NUM_BATCHES), num_positions))
    batches, states, counts = [], {}, {}
    for number in range(NUM_BATCHES + NUM_BEHIND):
        if number in positions:
            state, arrays = whole.state_dict()
            states[number] = json.dumps(state), arrays
        batches.append(next(whole))
        counts[number] = num_documents(whole)
    whole.close()
    num_equal = wrong = 0
    for position, (state, arrays) in states.items():
        resumed = make_data(*words, folder=folder).train
        resumed.load_state_dict(json.loads(state), arrays)
        behind = [next(resumed) for _ in range(NUM_BEHIND)]
        num_equal += all(equal(a, b) for a, b in zip(behind, batches[position:], strict=False))
        wrong += abs(num_documents(resumed) - counts[position + NUM_BEHIND - 1])
        resumed.close()
    return num_equal, wrong


def num_documents(loader: Any) -> int:
    """Documents behind the last batch used."""
    return sum(
        source["cut"]["num_documents"] for shard in loader.position["shards"].values() for source in shard["sources"]
    )


def main() -> None:
    options = arguments(__doc__, positions={"type": int, "default": 20})
    count = 4 if options.quick else options.positions
    rows, total, found, wrong = [("kind", "processes", "rows", "sources", "equal", "documents off")], 0, 0, 0
    for kind, workers, packed, sources in product(KINDS, ("0", "2"), ("true", "false"), SOURCES):
        if kind == "tokenised" and workers == "2":
            continue  # nothing is left to tokenise
        words = [f"dataset.num_workers={workers}", f"datacollator.pack_sequences={packed}"]
        with tempfile.TemporaryDirectory() as folder:
            num_equal, num_wrong = measure([*BASE, *KINDS[kind], *SOURCES[sources], *words], folder, count)
        how = "packed" if packed == "true" else "padded"
        rows.append((kind, workers, how, sources, f"{num_equal} of {count}", str(num_wrong)))
        total, found, wrong = total + count, found + num_equal, wrong + num_wrong
    table(rows)
    bar("resume_equality", found / total, 1.0)
    bar("documents_read_twice_or_lost", wrong, 0, at_most=True)
    finish()


if __name__ == "__main__":
    main()
