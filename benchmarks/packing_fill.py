"""Packing: share of real tokens in the packed rows of one epoch, and whether every microbatch is full.

Measured on long prose and on short texts (about 65 tokens each), at three row lengths.
"""

from _bench import arguments, bar, finish, table
from _data import corpus, make_data

BATCH_SIZE = 8


def fill(name: str, length: int) -> tuple[float, bool]:
    """(share of real tokens, all microbatches full) over one epoch."""
    path, column = corpus(name)
    words = [f"dataset.path={path}", f"dataset.text_column={column or 'null'}", f"dataset.max_seq_length={length}"]
    words += ["datacollator.pack_sequences=true", f"trainer.per_device_train_batch_size={BATCH_SIZE}"]
    data = make_data(*words, "dataset.num_workers=0")
    num_rows, num_tokens, full = 0, 0, True
    for batch in data.train:
        if batch.epoch:
            break
        num_rows += len(batch.input_ids)
        num_tokens += batch.num_tokens
        full &= batch.input_ids.shape == (BATCH_SIZE, length)
    data.train.close()
    return num_tokens / (num_rows * length), full


def main() -> None:
    options = arguments(__doc__)
    lengths = (512, 4096) if options.quick else (512, 1024, 4096)
    measured = {(name, length): fill(name, length) for name in ("prose", "short") for length in lengths}
    rows = []
    for (name, length), (share, full) in measured.items():
        rows.append((name, f"{length:,}", f"{share:.2%}", "all" if full else "NO"))
    table([("texts", "row length", "real tokens", "full microbatches"), *rows])
    for (name, length), (share, _) in measured.items():
        bar(f"packing_fill_{name}_{length}", share, 0.99)
    bar("full_microbatches", min(full for _, full in measured.values()), 1)
    finish()


if __name__ == "__main__":
    main()
