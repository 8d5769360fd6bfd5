"""`neobert verify-resume`: a run that is killed and resumed against one that is not, on the user's own configuration.

Three processes train in a temporary folder: one to the end; one that saves a checkpoint half-way and kills itself
(SIGKILL) in the second step after it; one that resumes. Every microbatch leaves checksums of its tokens and labels.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.config.load import load_config
from neobert.errors import UserError


@dataclass
class Recorder:
    """Writes checksums of every batch to a file; ends the process at once when it is shown batch `kill_at`."""

    path: Path
    kill_at: int | None

    def __call__(self, batch: Any, number: int) -> None:
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        ids, labels = (zlib.crc32(x.numpy().tobytes()) for x in (batch.input_ids, batch.labels))
        with open(self.path, "a") as file:
            file.write(json.dumps({"number": number, "ids": ids, "labels": labels}) + "\n")


def verify(files: list[str], overrides: list[str], num_steps: int) -> bool:
    """Whether the resumed run equals the uninterrupted one; prints what was compared. Raises UserError."""
    config = load_config(files, overrides, "pretraining").config
    half, micro = num_steps // 2, config.trainer.gradient_accumulation_steps
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as name:
        folder = Path(name)
        overrides = [*overrides, *_settings(config, folder, num_steps, half)]
        print(f"uninterrupted: {num_steps} steps", flush=True)
        _train(files, overrides, folder / "whole", None, resume=False)
        print(f"killed in step {half + 2}, two steps after the checkpoint of step {half}", flush=True)
        _train(files, overrides, folder / "broken", (half + 1) * micro + 1, resume=False)
        killed = _batches(folder / "broken")
        print("resumed\n", flush=True)
        _train(files, overrides, folder / "broken", None, resume=True)
        return _compare(folder, killed, num_steps, half, micro)


def _settings(config: Any, folder: Path, num_steps: int, half: int) -> list[str]:
    """Overrides that make a run short and quiet, and leave alone what it reads."""
    tokens = config.dataset.pre_tokenize and not config.dataset.pre_tokenize_output
    return [
        f"trainer.max_steps={num_steps}", f"trainer.save_steps={half}", "trainer.save_strategy=steps",
        "trainer.eval_steps=1000000", "trainer.eval_strategy=steps", "trainer.eval_max_batches=1",
        "trainer.early_stopping=0", "trainer.load_best_model_at_end=false", "trainer.metric_for_best_model=null",
        "trainer.report_to=[]", "wandb.enabled=false", "trainer.disable_tqdm=true", "trainer.save_total_limit=null",
        "trainer.overwrite_output_dir=true",
        "trainer.save_in_background=false",  # or the kill might come before the checkpoint is whole
        *([f"dataset.pre_tokenize_output={folder / 'tokenized'}"] if tokens else []),
    ]  # fmt: skip


def _train(files: list[str], overrides: list[str], folder: Path, kill_at: int | None, resume: bool) -> None:
    folder.mkdir(exist_ok=True)
    more = [f"trainer.output_dir={folder / 'out'}", f"trainer.resume_from_checkpoint={'latest' if resume else 'null'}"]
    job = json.dumps([files, [*overrides, *more], str(folder), kill_at])
    command = [sys.executable, "-m", __spec__.name, job]
    with open(folder / "log", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code == 2 and (folder / "error").is_file():
        raise UserError((folder / "error").read_text())
    if code != (0 if kill_at is None else -signal.SIGKILL):
        last = (folder / "log").read_text().splitlines()[-15:]
        raise UserError("\n".join([f"the run ended with exit code {code}; its last lines:", *last]))


def _child(files: list[str], overrides: list[str], folder: str, kill_at: int | None) -> None:
    from neobert.tasks.pretraining import task as pretraining

    try:
        pretraining.run(load_config(files, overrides), Recorder(Path(folder) / "batches.jsonl", kill_at))
    except UserError as error:
        (Path(folder) / "error").write_text(str(error))
        sys.exit(2)


def _batches(folder: Path) -> list[dict[str, int]]:
    path = folder / "batches.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _compare(folder: Path, killed: list[dict[str, int]], num_steps: int, half: int, micro: int) -> bool:
    """Print one line per step, and whether all of them are equal."""
    whole = {one["number"]: one for one in _batches(folder / "whole")}
    resumed = _batches(folder / "broken")[len(killed) :]
    losses = [_losses(folder / name / "out/metrics.jsonl") for name in ("whole", "broken")]
    before, after = ({one["number"]: one for one in part} for part in (killed, resumed))
    all_equal = list(after) == list(range(half * micro + 1, num_steps * micro + 1))
    print("step           tokens     masks      loss       resumed")
    for step in range(1, num_steps + 1):
        numbers = range((step - 1) * micro + 1, step * micro + 1)
        part = before if step <= half else after
        same = {
            name: all(number in part and part[number][name] == whole[number][name] for number in numbers)
            for name in ("ids", "labels")
        }
        a, b = (found.get(step) for found in losses)
        shown = ["equal" if is_same else "DIFFERENT" for is_same in (same["ids"], same["labels"], a == b)]
        logged = [f"{'-' if loss is None else format(loss, '.6f'):<9}" for loss in (a, b)]
        mark = "" if step <= half else "  resumed"
        print("  ".join([f"{step:>4}{mark:<9}", f"{shown[0]:<9}", f"{shown[1]:<9}", *logged, shown[2]]))
        all_equal = all_equal and all(same.values()) and a == b
    print(f"\n{'resume is exact: every token, mask and loss is equal' if all_equal else 'resume is NOT exact'}")
    return all_equal


def _losses(path: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


if __name__ == "__main__":
    _child(*json.loads(sys.argv[1]))
