"""Experiment trackers (Weights & Biases, TensorBoard, trackio, MLflow, ...), through Accelerate's adapters.

Nothing here is imported unless a tracker is asked for: they and Accelerate are the extra `trackers`.
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neobert.errors import ConfigError, Problem, UserError, disk_error, first_line
from neobert.files import write_text
from neobert.training.metrics import MetricsFile

INSTALL = "pip install 'neobert[trackers]'"


class Sinks:
    """Where rows of metrics go: metrics.jsonl, and every tracker."""

    def __init__(self, file: MetricsFile, trackers: list[Any]):
        self.file, self.trackers = file, trackers
        self.failure: UserError | None = None  # of a write; all processes of a run end together on it

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl; trackers get its numbers as `<kind>/<name>` at its step."""
        numbers = {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
        try:
            self.file.write(row)
            for tracker in self.trackers:
                tracker.log(numbers, step=row["step"])
        except OSError as error:
            self.failure = disk_error(error, self.file.path) or UserError(f"{self.file.path}: {first_line(error)}")

    def close(self) -> None:
        self.file.close()
        for tracker in self.trackers:
            tracker.finish()


def build_trackers(
    names: list[str], project: str, logging_dir: Path, config: Mapping[str, Any], wandb: dict[str, Any]
) -> list[Any]:
    """Start the trackers and give each the flat configuration. `wandb` are keyword arguments of `wandb.init`.

    Raises ConfigError for a name that no adapter has, UserError for one that is not installed or cannot start.
    """
    if not names:
        return []
    try:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError:
        raise UserError(f"trainer.report_to: trackers need the extra: {INSTALL}") from None
    PartialState()  # the adapters ask it whether they are on the main process
    trackers = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(Problem("trainer.report_to", f"no tracker {name!r}; there are: {known}"))
        kind = LOGGER_TYPE_TO_CLASS[name]
        extra = wandb if name == "wandb" else {}
        directory = {"logging_dir": str(logging_dir)} if kind.requires_logging_directory else {}
        trackers.append(_start(name, kind, project, {**directory, **extra}))
        trackers[-1].store_init_configuration(dict(config))
    return trackers


def _start(name: str, kind: Any, project: str, settings: dict[str, Any]) -> Any:
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError)
    try:
        if name == "wandb":
            import wandb

            failures += (wandb.errors.Error,)
        tracker = kind(project, **settings)
        tracker.start()
    except ImportError:
        raise UserError(f"{name} is not installed: {INSTALL}") from None
    except failures as error:
        raise UserError(f"{name} cannot start: {str(error).splitlines()[0]}") from None
    return tracker


def wandb_run_id(folder: Path, keep: bool) -> str:
    """The id of the W&B run of an output folder: the one used before where `keep`, else a new one; written down."""
    path = folder / "wandb.json"
    if keep and path.is_file():
        return str(json.loads(path.read_text())["id"])
    identifier = secrets.token_hex(4)
    write_text(path, json.dumps({"id": identifier}) + "\n")
    return identifier
