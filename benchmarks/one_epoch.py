"""`max_steps: -1`, killed at random times and resumed with other steps: every document of both epochs is read once.

A trial is a run in three parts. The first two are killed at a time drawn uniformly over the length of an uninterrupted run, the
second and the third change the batch size, the accumulation or the number of processes. Counted are the rows of the steps that
count: up to the newest checkpoint of a part that was killed, all of the last one. They must be those of the uninterrupted run.
"""

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from _bench import TEXT, TOKENIZER, arguments, bar, finish, table
from _trials import complete, ending_at_once, fork

os.environ |= {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip

import torch
import yaml

from neobert.checkpoints.format import list_steps
from neobert.config.load import load_config
from neobert.ranks import end_with_launcher
from neobert.tasks.pretraining import task as pretraining
from neobert.training.processes import Launch, launch

WORDS = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=48",
    "model.max_position_embeddings=128", "dataset.max_seq_length=64", "dataset.num_workers=0", f"tokenizer.path={TOKENIZER}",
    "dataset.num_shards=2", "dataset.streaming=true", "dataset.shuffle_buffer_size=30", "trainer.max_steps=-1",
    "trainer.num_train_epochs=2", "trainer.eval_steps=1000", "trainer.save_steps=3", "trainer.logging_steps=1",
    "scheduler.warmup_steps=2", "trainer.resume_from_checkpoint=latest", "trainer.use_cpu=true", "trainer.disable_tqdm=true",
]  # fmt: skip
STEPS = {"trainer.per_device_train_batch_size": 2, "trainer.gradient_accumulation_steps": 2}
CHANGES = {
    "the same": (1, {}),
    "batch x 2": (1, {"trainer.per_device_train_batch_size": 4}),
    "batch x 0.5": (1, {"trainer.per_device_train_batch_size": 1}),
    "accumulation x 2": (1, {"trainer.gradient_accumulation_steps": 4}),
    "2 processes": (2, {}),
}


def write_corpus(folder: Path) -> None:
    """200 documents of 20 to 2,000 characters, all different."""
    words, draw = (TEXT / "validation.txt").read_text().split(), random.Random(1)
    starts = draw.sample(range(len(words) - 300), 200)
    lines = [f"{n} " + " ".join(words[at : at + draw.choice([4, 8, 40, 300])]) for n, at in enumerate(starts)]
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(lines))


def train(root: Path, part: int, values: dict[str, int]) -> None:
    """The run, in this process or in this one of several, which notes the rows of every microbatch with their step."""
    end_with_launcher()
    out, rank = root / "out", os.environ.get("RANK", "0")
    first = max(list_steps(out / "checkpoints"), default=0)
    notes, count, accumulation = open(root / f"notes.{part}.{rank}", "w"), 0, 0  # noqa: SIM115, the process ends with it

    def note(batch, number):
        nonlocal count, accumulation
        if not count:
            found = yaml.safe_load((out / "config.yaml").read_text())["trainer"]
            accumulation = found["gradient_accumulation_steps"]  # which may keep the rows of a step
        ids = torch.where(batch.labels == -100, batch.input_ids, batch.labels)
        rows = [row[row > 3].tolist() for row in ids if (row > 3).any()]
        print(json.dumps([first + 1 + count // accumulation, rows]), file=notes, flush=True)
        count += 1

    words = [f"{name}={value}" for name, value in {**STEPS, **values}.items()]
    words += [f"dataset.path={root.parent / 'text'}", f"trainer.output_dir={out}"]
    pretraining.run(load_config([], [*WORDS, *words]), note)


def run(root: Path, part: int, change: str) -> int:
    """A part of a trial; returns the exit status."""
    nproc, values = CHANGES[change]
    work = ending_at_once(lambda: train(root, part, values))
    return launch(work, Launch(nproc), True) if nproc > 1 else work()


def rows_of(root: Path, part: int, last_step: int | None) -> Counter[tuple[int, ...]]:
    """The rows of the steps up to `last_step` that the processes of a part noted."""
    found: Counter[tuple[int, ...]] = Counter()
    for path in root.glob(f"notes.{part}.*"):
        for line in path.read_text().splitlines():
            if not line.endswith("]]"):
                continue  # cut off by the kill: after the newest checkpoint
            step, rows = json.loads(line)
            if last_step is None or step <= last_step:
                found.update(map(tuple, rows))
    return found


def trial(root: Path, draw: random.Random, seconds: float) -> tuple[Counter[tuple[int, ...]], list[str]]:
    """(the rows that count, what was done)."""
    found, told = Counter(), []
    for part in (0, 1):
        change = "the same" if part == 0 else draw.choice(list(CHANGES))
        pid, at = fork(root, partial(run, root, part, change)), draw.uniform(0.1, 1) * seconds
        time.sleep(at)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = max(list_steps(root / "out/checkpoints"), default=0)
        found += rows_of(root, part, step)
        told.append(f"{change}, killed after the checkpoint of step {step}")
    change = draw.choice(list(CHANGES))
    complete(root, partial(run, root, 2, change))
    return found + rows_of(root, 2, None), [*told, change]


def main() -> None:
    options = arguments(__doc__, trials={"type": int, "default": 30}, seed={"type": int, "default": 0})
    trials, draw = 4 if options.quick else options.trials, random.Random(options.seed)
    num_right, rows = 0, [("parts", "rows")]
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name) / "text")
        for whole in ("warm", "whole"):
            seconds = complete(Path(name) / whole, partial(run, Path(name) / whole, 0, "the same"))
        wanted = rows_of(Path(name) / "whole", 0, None)
        for number in range(trials):
            found, told = trial(Path(name) / str(number), draw, seconds)
            num_right += found == wanted
            rows.append(("; ".join(told), "all, once" if found == wanted else "DIFFERENT"))
    table(rows)
    print(f"{sum(wanted.values())} rows in two epochs; {num_right} of {trials} trials read all of them once")
    bar("one_epoch", num_right / trials, 1.0)
    finish()


if __name__ == "__main__":
    main()
