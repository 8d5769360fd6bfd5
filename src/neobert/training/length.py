"""How many rows a step has and how many steps a run has, also where a resumed run has other steps than it was begun with.

The position of the data is in rows and documents, so batch size, accumulation and number of processes may change. What a
number of processes changes by itself is kept: the rows of a step stay as many, by accumulation, where that divides. A run of
`max_steps: -1` ends with its data, whatever its steps are; the number of steps is counted for its learning rate.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.config.yaml_file import read_yaml
from neobert.training.loop import TrainState


@dataclass(frozen=True)
class StepSize:
    """Rows of a step: of one microbatch in one process, and of all; `accumulation` is what the configuration says."""

    rows_per_device: int
    accumulation: int
    num_processes: int
    rows_per_step: int


def step_size(config: Config, num_processes: int) -> StepSize:
    """What the configuration asks for."""
    rows, accumulation = config.trainer.per_device_train_batch_size, config.trainer.gradient_accumulation_steps
    return StepSize(rows, accumulation, num_processes, rows * accumulation * num_processes)


def saved_step_size(checkpoint: Path, saved: dict[str, Any]) -> StepSize:
    """That of the run that wrote a checkpoint, also of versions that did not save it."""
    if "step_size" in saved:
        return StepSize(**saved["step_size"])
    trainer, world = read_yaml(checkpoint / "config.yaml").values["trainer"], saved["world_size"]
    rows, accumulation = trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]
    return StepSize(rows, accumulation, world, rows * accumulation * world)


def keep_step_size(config: Config, before: StepSize, num_processes: int) -> tuple[Config, StepSize, list[str]]:
    """(the configuration with the accumulation that keeps the rows of a step, its step size, what to tell the user).

    Kept where another number of processes would change it. What the user changed is done as asked.
    """
    asked = step_size(config, num_processes)
    if asked.rows_per_step == before.rows_per_step:
        return config, asked, []
    in_use = before.rows_per_step // (before.rows_per_device * before.num_processes)
    is_unchanged = asked.rows_per_device == before.rows_per_device and asked.accumulation in (
        before.accumulation,
        in_use,
    )
    accumulation, rest = divmod(before.rows_per_step, asked.rows_per_device * num_processes)
    if not is_unchanged or rest:
        return config, asked, [f"a step has {asked.rows_per_step} rows from here on; it had {before.rows_per_step}"]
    trainer = config.trainer.model_copy(update={"gradient_accumulation_steps": accumulation})
    kept = StepSize(asked.rows_per_device, asked.accumulation, num_processes, before.rows_per_step)
    note = (
        f"a step keeps its {before.rows_per_step} rows on {num_processes} processes instead of {before.num_processes}: "
        f"trainer.gradient_accumulation_steps is {accumulation}"
    )
    return config.model_copy(update={"trainer": trainer}), kept, [note]


@dataclass(frozen=True)
class Length:
    """Steps of a run from its beginning, those of another size included. `shift`: by how many steps it would be further had
    all been as they are now; the learning rate of a run that is measured in epochs follows the rows.
    """

    num_steps: int
    shift: float = 0.0

    @property
    def schedule_steps(self) -> int:
        """Of the learning-rate schedule."""
        return round(self.num_steps - self.shift)

    def state_dict(self, config: Config, size: StepSize) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"step_size": asdict(size), "num_steps": self.num_steps, "num_epochs": config.trainer.num_train_epochs}


def plan_length(
    config: Config, size: StepSize, state: TrainState, saved: dict[str, Any], count_left: Callable[[], int]
) -> Length:
    """Of `max_steps`, or where that is -1 of `num_train_epochs`, whose steps `count_left` counts from where the run is; what
    a checkpoint says of the same steps is taken from it.
    """
    if config.trainer.max_steps >= 0:
        return Length(config.trainer.max_steps)
    shift = state.step - state.num_rows / size.rows_per_step
    known = Length(saved.get("num_steps", -1), shift)
    if all(saved.get(name) == value for name, value in known.state_dict(config, size).items()):
        return known
    return Length(state.step + count_left(), shift)
