"""The output folder of a run: made, checked for being writable, and cleared of an earlier run with care."""

import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neobert import __version__
from neobert.errors import CheckpointError, ConfigError, Problem
from neobert.training.checkpoint import clean_leftovers, find_checkpoint, list_steps, write_json
from neobert.training.runtime import Runtime

SHARED_SECONDS = 30.0  # in which a network file system shows a new file
RUN_FILES = (
    "checkpoints",
    "metrics.jsonl",
    "report.html",
    "config.yaml",
    "environment.json",
    "trackers",
    "wandb.json",
    "result.json",
    "submission",
)
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy", "pyarrow", "pydantic")


def prepare_run_folder(output_dir: str, resume: str | None, overwrite: bool) -> tuple[Path, Path | None, list[str]]:
    """(the folder, the checkpoint to resume from or None, what to tell the user).

    A run that is already there is moved to `previous/` when a new one starts over it, so that a forgotten
    `resume_from_checkpoint` costs nothing; with `overwrite` false it is an error. Raises ConfigError when the folder
    cannot be written.
    """
    folder = Path(output_dir)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(Problem("trainer.output_dir", f"cannot write to {folder}: {error.strerror}")) from None
    clean_leftovers(folder / "checkpoints")
    if resume is not None:
        return (folder, *_resume_point(folder, resume))
    if not list_steps(folder / "checkpoints") and not (folder / "metrics.jsonl").exists():
        return folder, None, []
    if not overwrite:
        raise ConfigError(
            Problem(
                "trainer.overwrite_output_dir",
                f"{folder} holds a run; continue it with trainer.resume_from_checkpoint: latest, choose another "
                "trainer.output_dir, or set overwrite_output_dir: true",
            )
        )
    _move_aside(folder)
    return (
        folder,
        None,
        [
            f"the run that was in {folder} is now in {folder / 'previous'} (to continue it instead: resume_from_checkpoint)"
        ],
    )


def open_run_folder(
    output_dir: str, resume: str | None, overwrite: bool, runtime: Runtime
) -> tuple[Path, Path | None, list[str]]:
    """What `prepare_run_folder` gives in the main process, in all of them, which must see the same folder."""
    found = runtime.on_main(lambda: prepare_run_folder(output_dir, resume, overwrite))
    if runtime.world_size > 1:
        check_shared(found[0], runtime)
    return found


def check_shared(folder: Path, runtime: Runtime) -> None:
    """Raises ConfigError, in all processes, where one of them, on another machine, has another folder of this name."""
    name = runtime.on_main(lambda: _probe(folder))
    end = time.monotonic() + SHARED_SECONDS
    while not (folder / name).is_file() and time.monotonic() < end:
        time.sleep(0.1)
    missing = int(runtime.all_sum(not (folder / name).is_file())[0])
    runtime.on_main(lambda: (folder / name).unlink())
    if missing:
        raise ConfigError(
            Problem(
                "trainer.output_dir",
                f"{missing} of {runtime.world_size} processes do not see {folder} of process 0; several machines need a file "
                "system that all of them share",
            )
        )


def _probe(folder: Path) -> str:
    name = f".shared.{os.getpid()}"
    (folder / name).write_text("")
    return name


def _resume_point(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    try:
        return find_checkpoint(resume, folder / "checkpoints"), []
    except CheckpointError:
        if resume != "latest":
            raise
        return None, [f"resume_from_checkpoint: latest, and no checkpoint in {folder} yet: starting from the beginning"]


def _move_aside(folder: Path) -> None:
    previous = folder / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for name in RUN_FILES:
        if (folder / name).exists():
            os.replace(folder / name, previous / name)
    (folder / "checkpoints").mkdir()


def write_run_files(folder: Path, config_yaml: str, facts: dict[str, Any]) -> None:
    """config.yaml (loads to the same configuration) and environment.json (versions, machine, what was derived)."""
    (folder / "config.yaml").write_text(config_yaml)
    environment = {
        "neobert": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **json.loads(json.dumps(facts)),
    }
    write_json(folder / "environment.json", environment)
