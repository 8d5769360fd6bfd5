"""SIGTERM in a step, in an evaluation, and while a checkpoint is written: how long until the run is saved, in steps.

A step takes about a second, in four microbatches, and an evaluation longer, so that a run that waited for more than the step in
progress would show. The time is from the signal to the checkpoint under its final name, which includes writing it.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _bench import TEXT, TOKENIZER, arguments, bar, finish, table

from neobert.checkpoints.format import list_steps, verify_checkpoint
from neobert.training.metrics import read_metrics

WORDS = [
    "model.hidden_size=128", "model.num_hidden_layers=4", "model.num_attention_heads=2", "model.intermediate_size=512",
    "dataset.max_seq_length=256", "dataset.num_workers=0", f"dataset.path={TEXT}", f"tokenizer.path={TOKENIZER}",
    "dataset.streaming=false", "datacollator.pack_sequences=true", "trainer.per_device_train_batch_size=8",
    "trainer.gradient_accumulation_steps=4", "trainer.logging_steps=1", "trainer.max_steps=1000", "trainer.eval_steps=3",
    "trainer.per_device_eval_batch_size=8", "trainer.mixed_precision=no",
]  # fmt: skip
PHASES: dict[str, tuple[int, Callable[[Path], bool] | float]] = {  # (behind this step, a condition or steps to wait)
    "step": (1, 0.5),
    "evaluation": (3, 0.5),
    "saving": (4, lambda root: bool(list(root.glob(".*.tmp")))),
}


def stop(phase: str) -> tuple[float, float]:
    """(seconds from the signal to the saved checkpoint, seconds of a step)."""
    behind, when = PHASES[phase]
    with tempfile.TemporaryDirectory() as name:
        out, config = Path(name) / "out", Path(name) / "config.yaml"
        config.write_text("task: pretraining\n")
        words = [*WORDS, f"trainer.output_dir={out}", f"trainer.save_steps={4 if phase == 'saving' else 1000}"]
        words += ["trainer.eval_steps=1000"] if phase == "saving" else []
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "neobert", "run", str(config), *words], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(rf"step {behind}/", line):
                break
        rows = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"]
        step_seconds = statistics.fmean(row["step_seconds"] for row in rows)
        if isinstance(when, float):
            time.sleep(when * step_seconds)
        else:
            while not when(out / "checkpoints"):
                time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        begin, root = time.perf_counter(), out / "checkpoints"
        wanted = behind if phase == "evaluation" else behind + 1
        while wanted not in list_steps(root):
            time.sleep(0.002)
            if process.poll() is not None and wanted not in list_steps(root):
                sys.exit(f"{phase}: the run ended without a checkpoint of step {wanted}: {list_steps(root)}")
        seconds = time.perf_counter() - begin
        process.stdout.read()
        if process.wait() != 128 + signal.SIGTERM:
            sys.exit(f"{phase}: exit code {process.returncode}")
        verify_checkpoint(root / str(wanted))
        return seconds, step_seconds


def main() -> None:
    options = arguments(__doc__)
    rows, worst = [("signal in", "saved after, s", "a step, s", "steps")], 0.0
    for phase in list(PHASES)[:1] if options.quick else PHASES:
        seconds, step = stop(phase)
        rows.append((phase, f"{seconds:.2f}", f"{step:.2f}", f"{seconds / step:.2f}"))
        worst = max(worst, seconds / step)
    table(rows)
    bar("signal_stop_steps", worst, 1.5, at_most=True)
    finish()


if __name__ == "__main__":
    main()
