"""How long a checkpoint holds training: saved in the background against saved at once.

The same run twice, of a model of 256 x 6 with a vocabulary of 8,192 (about 30 MB of weights, 100 MB with optimizer state) or
`--width 768` (about 370 MB), in turn. The stall is what the run itself reports: seconds of the phase `save`, in which the loop
stands still. The length of the steps behind a save shows what the background thread takes from training.
"""

import json
import statistics
import tempfile
from pathlib import Path

from _bench import TEXT, TOKENIZER, arguments, bar, finish, neobert, run, table

SAVE_STEPS = 8


def words(width: int, steps: int, background: bool, folder: str) -> list[object]:
    return [
        "model.hidden_size=" + str(width), "model.num_hidden_layers=6", f"model.num_attention_heads={width // 64}",
        f"model.intermediate_size={4 * width}", "dataset.max_seq_length=256", f"dataset.path={TEXT}",
        f"tokenizer.path={TOKENIZER}", "dataset.streaming=false", "datacollator.pack_sequences=true", "trainer.logging_steps=1",
        f"trainer.max_steps={steps}", f"trainer.save_steps={SAVE_STEPS}", "trainer.save_total_limit=1",
        "trainer.eval_steps=1000000", "trainer.eval_max_batches=1", "trainer.save_model=false",
        f"trainer.save_in_background={str(background).lower()}", f"trainer.output_dir={folder}",
        "trainer.per_device_train_batch_size=8", "scheduler.warmup_steps=1",
    ]  # fmt: skip


def measure(width: int, steps: int, background: bool) -> tuple[list[float], float]:
    """(seconds that each checkpoint held training, seconds of a step in the median)."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text("task: pretraining\n")
        run(neobert("run", config, *words(width, steps, background, folder)))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    # the row of a step is written before it is saved, so the next row has the seconds
    stalls = [row["save_seconds"] for row in train if row["step"] % SAVE_STEPS == 1 and row["step"] > 1]
    return stalls, statistics.fmean(row["step_seconds"] for row in train[SAVE_STEPS:])


def main() -> None:
    options = arguments(__doc__, width={"type": int, "default": 256})
    repeats, steps = (1, 2 * SAVE_STEPS + 1) if options.quick else (3, 3 * SAVE_STEPS + 1)
    stalls: dict[bool, list[float]] = {True: [], False: []}
    lengths: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for background in stalls:
            found, length = measure(options.width, steps, background)
            stalls[background] += found
            lengths[background].append(length)
    held = {background: statistics.median(found) for background, found in stalls.items()}
    rows = [("saving", "holds training, s", "mean step, s")]
    for background, name in ((True, "in the background"), (False, "at once")):
        rows.append((name, f"{held[background]:.3f}", f"{statistics.median(lengths[background]):.3f}"))
    table(rows)
    bar("checkpoint_stall", held[True] / held[False], 0.25, at_most=True)
    finish()


if __name__ == "__main__":
    main()
