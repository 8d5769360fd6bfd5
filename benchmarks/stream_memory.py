"""Memory while a corpus is streamed that is 100 times the shuffle buffer: resident size over the pass must be flat."""

import tempfile
from pathlib import Path

from _bench import TEXT, arguments, bar, finish, table
from _data import make_data, resident_megabytes

BUFFER_PIECES, PIECE_LENGTH = 1000, 128
NUM_MARKS = 8


def write_corpus(path: Path, num_tokens: int) -> None:
    """The shipped text, again and again, until it has about so many tokens."""
    text = (TEXT / "train.txt").read_text()
    with open(path, "w") as file:
        for _ in range(-(-num_tokens // 200_000)):
            file.write(text + "\n")


def main() -> None:
    options = arguments(__doc__)
    times = 25 if options.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "train.txt", times * BUFFER_PIECES * PIECE_LENGTH)
        data = make_data(
            f"dataset.path={folder}/train.txt", f"dataset.shuffle_buffer_size={BUFFER_PIECES}", "dataset.num_workers=1",
            f"dataset.max_seq_length={PIECE_LENGTH}", "datacollator.pack_sequences=true",
            "trainer.per_device_train_batch_size=64",
        )  # fmt: skip
        resident = []
        for number, batch in enumerate(data.train):
            if batch.epoch:
                break
            if number % 20 == 0:
                resident.append(resident_megabytes())
        data.train.close()
    warm = len(resident) // 10  # the buffer is full, the libraries are loaded
    marks = [resident[warm + (len(resident) - 1 - warm) * n // NUM_MARKS] for n in range(NUM_MARKS + 1)]
    table([tuple(f"at {n / NUM_MARKS:.0%}" for n in range(NUM_MARKS + 1)), tuple(f"{mark:.0f} MB" for mark in marks)])
    bar(f"megabytes_gained_over_{times}_buffers", max(resident[warm:]) - resident[warm], 20, at_most=True)
    finish()


if __name__ == "__main__":
    main()
