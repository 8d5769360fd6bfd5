"""Evaluation and checkpoints at the ends of epochs: processes x lanes x engine, on documents of uneven length.

Six epochs of 24 documents of 20 to 2,000 characters, with `eval_strategy` and `save_strategy: epoch`. In every combination all
processes make the same steps, with six evaluations and six checkpoints. Shards that cannot be dealt equally are refused before
training, in one line.
"""

import json
import os
import random
import tempfile
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

from _bench import TEXT, TOKENIZER, arguments, bar, finish, table

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}

import torch
import torch.distributed as dist

from neobert.checkpoints.format import list_steps
from neobert.config.load import load_config
from neobert.errors import CheckpointError
from neobert.tasks.pretraining import task as pretraining

EPOCHS = 6
PROCESSES, LANES_PER_PROCESS, ENGINES = (1, 2, 3), (1, 2, 4), ("ddp", "fsdp2")
REFUSED = ((2, 1), (2, 3), (3, 4))  # processes, lanes
WORDS = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=48",
    "model.max_position_embeddings=128", "dataset.max_seq_length=64", "dataset.num_workers=0", f"tokenizer.path={TOKENIZER}",
    "dataset.streaming=false", "datacollator.pack_sequences=true", "trainer.per_device_train_batch_size=2",
    "trainer.mixed_precision=no", "trainer.max_steps=-1", f"trainer.num_train_epochs={EPOCHS}", "trainer.logging_steps=1",
    "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch", "trainer.eval_max_batches=2", "trainer.disable_tqdm=true",
    "trainer.save_total_limit=null", "scheduler.warmup_steps=2", "dataset.shuffle_buffer_size=100",
]  # fmt: skip


def write_corpus(folder: Path) -> None:
    words, draw = (TEXT / "validation.txt").read_text().split(), random.Random(1)
    starts = draw.sample(range(len(words) - 300), 24)
    documents = [" ".join(words[start : start + draw.choice([4, 8, 150, 300])]) for start in starts]
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(documents))
    (folder / "validation.txt").write_text("\n".join(documents[:8]))


def run(root: Path, name: str, lanes: int, engine: str) -> int:
    """Train in this process, which may be one of several; returns the number of steps."""
    words = [f"dataset.path={root / 'text'}", f"dataset.num_shards={lanes}", f"trainer.engine={engine}"]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        loaded = load_config([], [*WORDS, *words, f"trainer.output_dir={root / name}"])
        return pretraining.run(loaded).state.step


def work(rank: int, world: int, root: Path, cases: list[tuple[int, str]]) -> None:
    """All runs of one number of processes, and what must be refused."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        dist.init_process_group("gloo", init_method=f"file://{root}/store{world}", rank=rank, world_size=world)
    steps: dict[str, int] = {name_of(world, *case): run(root, name_of(world, *case), *case) for case in cases}
    for lanes in (lanes for processes, lanes in REFUSED if processes == world):
        try:
            run(root, f"refused {world} {lanes}", lanes, "ddp")
        except CheckpointError as error:
            steps[f"refused {world} {lanes}"] = int("cannot share equally" in str(error))
    (root / f"steps {world} {rank}.json").write_text(json.dumps(steps))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def name_of(world: int, lanes: int, engine: str) -> str:
    return f"{world} {lanes} {engine}"


def look(root: Path, world: int, lanes: int, engine: str, steps: list[dict[str, int]]) -> tuple[int, int, bool]:
    """(evaluations, checkpoints, whether all processes made the same steps and evaluated where they saved) of a run."""
    name = name_of(world, lanes, engine)
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if row["kind"] == "eval"]
    saved = list_steps(root / name / "checkpoints")
    same = len({one[name] for one in steps}) == 1 and evaluated == saved and evaluated[-1] == steps[0][name]
    return len(evaluated), len(saved), same


def main() -> None:
    options = arguments(__doc__)
    processes = (1, 2) if options.quick else PROCESSES
    rows, num_right, num_cases, num_refused, num_refusals = (
        [("processes", "lanes", "engine", "steps", "evaluations", "checkpoints", "same")],
        0,
        0,
        0,
        0,
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_corpus(root / "text")
        for world in processes:
            lanes = [world * number for number in (LANES_PER_PROCESS[1:2] if options.quick else LANES_PER_PROCESS)]
            cases = list(product(lanes, ENGINES if world > 1 else ("auto",)))
            torch.multiprocessing.spawn(work, (world, root, cases), nprocs=world)
            steps = [json.loads((root / f"steps {world} {rank}.json").read_text()) for rank in range(world)]
            for case in cases:
                num_evaluations, num_saved, same = look(root, world, *case, steps)
                rows.append(
                    (
                        str(world),
                        str(case[0]),
                        case[1],
                        str(steps[0][name_of(world, *case)]),
                        str(num_evaluations),
                        str(num_saved),
                        "yes" if same else "NO",
                    )
                )
                num_cases, num_right = num_cases + 1, num_right + (num_evaluations == num_saved == EPOCHS and same)
            for name in [f"refused {world} {lanes}" for number, lanes in REFUSED if number == world]:
                num_refusals, num_refused = num_refusals + 1, num_refused + all(one.get(name) for one in steps)
    table(rows)
    bar("epoch_matrix", num_right / num_cases, 1.0)
    bar("unequal_lanes_refused", num_refused / num_refusals, 1.0)
    finish()


if __name__ == "__main__":
    main()
