"""SIGKILL at uniformly random times of a run that trains, evaluates and saves: everything in its folder is readable, and
resumed it equals the run that was not killed, to the bit.

A trial is a run that is killed once, at a time drawn uniformly over the length of an uninterrupted run, from its first
instruction on; then it is resumed. Compared are the final weights and every loss of training and evaluation. Trials are forks
of a process that has imported everything, so that most of their time is training.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

from _bench import TEXT, TOKENIZER, arguments, bar, finish, table

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}

from neobert.config.load import load_config
from neobert.errors import CheckpointError
from neobert.tasks import pretraining
from neobert.training.checkpoint import list_steps, verify_checkpoint

STEPS = 40
WORDS = [
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=128",
    "model.dropout_prob=0.1", "model.max_position_embeddings=128", "dataset.max_seq_length=128", "dataset.num_workers=0",
    f"dataset.path={TEXT}", f"tokenizer.path={TOKENIZER}", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1",
    "trainer.eval_steps=4", "trainer.eval_max_batches=4", "trainer.save_steps=3", "scheduler.warmup_steps=5",
    "datacollator.pack_sequences=true", f"trainer.max_steps={STEPS}", "dataset.shuffle_buffer_size=200",
    "trainer.resume_from_checkpoint=latest", "trainer.disable_tqdm=true", "trainer.save_total_limit=2",
]  # fmt: skip


def start(folder: Path) -> int:
    """Train in a fork, from the newest checkpoint where there is one; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            code = pretraining.run(load_config([], [*WORDS, f"trainer.output_dir={folder}"])).exit_code
    finally:
        os._exit(code)


def complete(folder: Path) -> float:
    """Train to the end; returns the seconds it took."""
    begin = time.perf_counter()
    _, status = os.waitpid(start(folder), 0)
    if status:
        sys.exit(f"a run in {folder} ended with status {status}")
    return time.perf_counter() - begin


def outcome(folder: Path) -> tuple[bytes, dict[tuple[str, int], float]]:
    """Final weights, and the losses by kind and step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {(row["kind"], row["step"]): row.get("loss", row.get("eval_loss")) for row in rows}
    return (folder / f"checkpoints/{STEPS}/model.safetensors").read_bytes(), losses


def look(folder: Path) -> tuple[bool, str]:
    """(whether every checkpoint in a folder is whole, what the run was at)."""
    root = folder / "checkpoints"
    if (root / str(STEPS)).is_dir():
        at = "at its end"
    elif list(root.glob(".*.tmp")):
        at = "saving"
    elif not (folder / "metrics.jsonl").is_file():
        at = "starting"
    else:
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        last = rows[-1] if rows else ""
        due = last.startswith('{"kind": "train"') and last.endswith("}") and json.loads(last)["step"] % 4 == 0
        at = "evaluating" if due else "training"
    try:
        for step in list_steps(root):
            verify_checkpoint(root / str(step))
    except CheckpointError:
        return False, at
    return True, at


def main() -> None:
    options = arguments(__doc__, kills={"type": int, "default": 200}, seed={"type": int, "default": 0})
    kills, draw = 10 if options.quick else options.kills, random.Random(options.seed)
    seen: Counter[str] = Counter()
    num_readable = num_equal = 0
    with tempfile.TemporaryDirectory() as name:
        complete(Path(name) / "warm")
        seconds = complete(Path(name) / "whole")
        wanted = outcome(Path(name) / "whole")
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "out"
            pid = start(folder)
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            readable, at = look(folder)
            seen[at] += 1
            num_readable += readable
            complete(folder)
            num_equal += outcome(folder) == wanted
    table([("killed while", "times"), *((at, str(count)) for at, count in seen.most_common())])
    print(f"{kills} kills over {seconds:.2f} s of {STEPS} steps; {num_equal} equal to the bit, {num_readable} readable")
    bar("crash_test_equal", num_equal / kills, 1.0)
    bar("crash_test_readable", num_readable / kills, 1.0)
    finish()


if __name__ == "__main__":
    main()
