"""SIGKILL at uniformly random times of a run that trains, evaluates and saves: nothing of it stays, everything in its folder is
readable, and resumed it equals the run that was not killed, to the bit.

A trial is a run that is killed once, at a time drawn uniformly over the length of an uninterrupted run, from its first
instruction on; then it is resumed. Compared are the final weights and every loss of training and evaluation. The run has what
carries state: a mixture of two streams, tokenising threads, MuonClip whose clip acts, dropout, a masking rate that falls, a
schedule with three phases, checkpoints written in the background.

With `--nproc 2` it is the launcher with two processes (gloo), and SIGKILL hits the launcher, one process, or all of them.
Trials are forks of a process that has imported everything, so that most of their time is training.
"""

import json
import os
import random
import signal
import sys
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

from neobert.checkpoints.format import list_steps, verify_checkpoint
from neobert.config.load import load_config
from neobert.errors import CheckpointError
from neobert.ranks import end_with_launcher
from neobert.tasks.pretraining import task as pretraining
from neobert.training.processes import Launch, launch

STEPS, PATIENCE_SECONDS = 36, 30.0
WORDS = [
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=128",
    "model.dropout_prob=0.1", "model.max_position_embeddings=128", "dataset.max_seq_length=64", "dataset.num_workers=1",
    "dataset.streaming=true", "dataset.shuffle_buffer_size=200", f"tokenizer.path={TOKENIZER}",
    "datacollator.pack_sequences=true", "datacollator.mlm_probability=0.3", "datacollator.mlm_probability_final=0.15",
    "optimizer.name=muonclip", "optimizer.muon_config.clipping_threshold=0.0001", "optimizer.muon_config.clipping_interval=2",
    "scheduler.name=wsd", "scheduler.warmup_steps=5", "scheduler.wsd_decay_percent=30",
    "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1", "trainer.eval_steps=4", "trainer.eval_max_batches=4",
    "trainer.per_device_eval_batch_size=4", "optimizer.lr=1e-3", "trainer.save_steps=3",
    "trainer.save_total_limit=2", "trainer.resume_from_checkpoint=latest",
    "trainer.use_cpu=true", "trainer.disable_tqdm=true",
]  # fmt: skip


def words(folder: Path, steps: int = STEPS) -> list[str]:
    """The overrides of the run in a folder."""
    mixture = f"dataset.mixture=[{{path: {TEXT}, weight: 2}}, {{path: {TEXT}/validation.txt, weight: 1}}]"
    return [*WORDS, mixture, f"trainer.output_dir={folder}", f"trainer.max_steps={steps}"]


def run(folder: Path, nproc: int, steps: int = STEPS) -> int:
    """Train, from the newest checkpoint where there is one; returns the exit status."""

    def train() -> None:
        end_with_launcher()
        assert not pretraining.run(load_config([], words(folder, steps))).exit_code

    work = ending_at_once(train)
    return launch(work, Launch(nproc), True) if nproc > 1 else work()


def kill(pid: int, victim: str) -> float:
    """SIGKILL to the launcher (or the only process), to one of its processes, or to all; the seconds until none is left."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if victim == "process" else []
    begin = time.perf_counter()
    if victim == "all":
        os.killpg(pid, signal.SIGKILL)
    else:
        os.kill(int(random.choice(children)) if children else pid, signal.SIGKILL)
    while alive(pid) and time.perf_counter() - begin < 2 * PATIENCE_SECONDS:
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    for left in alive(pid):
        os.kill(left, signal.SIGKILL)
    os.waitpid(pid, 0)
    return seconds


def alive(group: int) -> list[int]:
    """The processes of a process group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def outcome(folder: Path, steps: int = STEPS) -> tuple[bytes, dict[tuple[str, int], float]]:
    """Final weights, and the losses by kind and step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {(row["kind"], row["step"]): row.get("loss", row.get("eval_loss")) for row in rows}
    return (folder / f"checkpoints/{steps}/model.safetensors").read_bytes(), losses


def look(folder: Path, steps: int = STEPS) -> tuple[bool, str]:
    """(whether every checkpoint in a folder is whole, what the run was at)."""
    root = folder / "checkpoints"
    if (root / str(steps)).is_dir():
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


def whole_run(nproc: int, steps: int = STEPS) -> tuple[float, tuple[bytes, dict[tuple[str, int], float]]]:
    """(seconds, outcome) of the run that nobody kills. Its clip has to act."""
    with tempfile.TemporaryDirectory() as name:
        complete(Path(name), partial(run, Path(name) / "warm", nproc, steps))
        seconds = complete(Path(name), partial(run, Path(name) / "whole", nproc, steps))
        rows = [json.loads(line) for line in (Path(name) / "whole/metrics.jsonl").read_text().splitlines()]
        assert sum(row.get("qk_clipped_heads", 0) for row in rows) > steps
        return seconds, outcome(Path(name) / "whole", steps)


def main() -> None:
    options = arguments(
        __doc__,
        kills={"type": int, "default": 100},
        nproc={"type": int, "default": 1},
        steps={"type": int, "default": STEPS},
        seed={"type": int, "default": 0},
    )
    kills = 10 // options.nproc if options.quick else options.kills
    nproc, steps, draw = options.nproc, options.steps, random.Random(options.seed)
    victims = ["launcher", "process", "all"] if nproc > 1 else ["all"]
    seen: Counter[tuple[str, str]] = Counter()
    num_readable = num_equal = num_left = 0
    longest = 0.0
    seconds, wanted = whole_run(nproc, steps)
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as name:
            folder, victim = Path(name) / "out", draw.choice(victims)
            pid, at_second = fork(Path(name), partial(run, folder, nproc, steps)), draw.uniform(0, seconds)
            time.sleep(at_second)
            until_none = kill(pid, victim)
            longest = max(longest, until_none)
            readable, at = look(folder, steps)
            seen[at, victim if nproc > 1 else "process"] += 1
            num_readable += readable
            left = [path.name for path in (Path(name) / "tmp").glob("*")]
            num_left += bool(left)
            complete(Path(name), partial(run, folder, nproc, steps))
            equal = outcome(folder, steps) == wanted
            num_equal += equal
            facts = [f"{victim} killed after {at_second:.2f} s, {at}", f"none left after {until_none:.1f} s", *left]
            print(", ".join([*facts, "equal" if equal else "DIFFERENT"]), file=sys.stderr)
    table([("killed while", "killed", "times"), *((*which, str(count)) for which, count in seen.most_common())])
    print(f"{kills} kills over {seconds:.2f} s of {steps} steps; {num_equal} equal to the bit, {num_readable} readable")
    name = "crash_test" if nproc == 1 else f"crash_test_{nproc}"
    bar(f"{name}_equal", num_equal / kills, 1.0)
    bar(f"{name}_readable", num_readable / kills, 1.0)
    bar(f"{name}_seconds_until_none_is_left", longest, PATIENCE_SECONDS, at_most=True)
    bar(f"{name}_left_temporary_files", num_left, 0, at_most=True)
    finish()


if __name__ == "__main__":
    main()
