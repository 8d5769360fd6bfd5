"""One of several processes is killed: how long until all have ended, is the culprit named, is the last checkpoint whole.

`neobert run --nproc 4` on this machine; SIGKILL hits each of the processes in turn, in the middle of training. The others wait
in a collective, find the connection closed, and are ended by the launcher.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _bench import TEXT, TOKENIZER, arguments, bar, finish, table

from neobert.checkpoints.format import list_steps, verify_checkpoint

WORDS = [
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=128",
    "model.max_position_embeddings=128", "dataset.max_seq_length=64", "dataset.num_workers=0", f"dataset.path={TEXT}",
    "dataset.streaming=false", f"tokenizer.path={TOKENIZER}", "trainer.per_device_train_batch_size=2",
    "trainer.logging_steps=1", "trainer.max_steps=1000000", "trainer.save_steps=5", "trainer.eval_steps=1000000",
]  # fmt: skip


def rank_of(pid: int) -> int | None:
    """The rank of a process that the launcher started; None for others."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
    return int(ranks[0].removeprefix(b"RANK=")) if ranks else None


def kill_one(num_processes: int, victim: int, engine: str) -> tuple[float, bool]:
    """(seconds from the kill until all processes have ended, whether it was named and the newest checkpoint is whole)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text("task: pretraining\n")
        command = [sys.executable, "-u", "-m", "neobert", "run", str(folder / "config.yaml"), *WORDS]
        process = subprocess.Popen(
            [*command, f"trainer.engine={engine}", f"trainer.output_dir={folder / 'out'}", "--nproc", str(num_processes)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        root = folder / "out/checkpoints"
        while len(list_steps(root)) < 2:
            if process.poll() is not None:
                sys.exit(process.stderr.read() if process.stderr else "")
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pids = {rank: int(pid) for pid in children if (rank := rank_of(int(pid))) is not None}
        begin = time.perf_counter()
        os.kill(pids[victim], signal.SIGKILL)
        _, errors = process.communicate()
        seconds = time.perf_counter() - begin
        named = f"process {victim} of {num_processes} (pid {pids[victim]}) was killed by SIGKILL" in errors
        gone = not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
        verify_checkpoint(root / str(list_steps(root)[-1]))
        return seconds, named and gone


def main() -> None:
    options = arguments(__doc__, processes={"type": int, "default": 4})
    cases = [(victim, "ddp") for victim in range(options.processes)] + [(1, "fsdp2")]
    rows, longest, num_named = [("killed", "engine", "seconds until all have ended")], 0.0, 0
    cases = cases[:1] if options.quick else cases
    for victim, engine in cases:
        seconds, named = kill_one(options.processes, victim, engine)
        rows.append((f"process {victim}", engine, f"{seconds:.1f}"))
        longest, num_named = max(longest, seconds), num_named + named
    table(rows)
    bar("rank_death_seconds", longest, 30.0, at_most=True)
    bar("rank_death_named", num_named / len(cases), 1.0)
    finish()


if __name__ == "__main__":
    main()
