"""Where a run stands: how many steps it has, what its checkpoints hold, and how it continues from one.

The position of the data is in rows and documents, so batch size, accumulation, number of processes and engine may change. What
a number of processes changes by itself is kept: the rows of a step stay as many, by accumulation, where that divides. A run of
`max_steps: -1` ends with its data, whatever its steps are; the number of steps is counted for its learning rate.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from neobert.checkpoints.format import Tensors, load_data, load_optimizer, load_rank_optimizer
from neobert.config.schema import Config
from neobert.config.yaml_file import read_yaml
from neobert.data.mlm.pipeline import join_positions
from neobert.errors import CheckpointError
from neobert.optim.build import load_optimizer_state
from neobert.optim.sharding import from_rows, local_rows
from neobert.training.loop import TrainState
from neobert.training.run_folder import OpenRun, enter_run
from neobert.training.runtime import Runtime, load_partition


class Batches(Protocol):
    """A source of microbatches whose position can be saved: `position` is that after the last one used."""

    @property
    def position(self) -> Any: ...

    def next_step(self, accumulation: int, /) -> list[Any]: ...  # of `Batch`

    def state_dict(self, position: Any = None, /) -> tuple[dict[str, Any], dict[str, Any]]: ...

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, Any], /) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Storage:
    """How a task's model goes into a checkpoint, as whole tensors that training does not write to and config.json, and
    comes back. `save_beside` writes the tokenizer and what else belongs to the model into the folder.
    """

    content: Callable[[], tuple[Tensors, dict[str, Any]]]
    load: Callable[[Path], None]
    save_beside: Callable[[Path], None]


# --- how long a run is -----------


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


def keep_saved_size(config: Config, opened: OpenRun, num_processes: int) -> tuple[Config, StepSize]:
    """The configuration and the step of a run that goes on. Where only the number of processes is another, accumulation keeps
    the rows of a step, and where `dataset.num_shards` is not set, the data stays dealt to as many shards.
    """
    asked = step_size(config, num_processes)
    if opened.checkpoint is None:
        return config, asked
    shards = load_data(opened.checkpoint)[0].get("fingerprint", {}).get("lanes")
    if config.dataset.num_shards is None and shards not in (None, num_processes):
        config = config.with_keys(dataset={"num_shards": shards})
    before = saved_step_size(opened.checkpoint, opened.saved)
    rows = before.rows_per_step
    if asked.rows_per_step == rows:
        return config, asked
    in_use = rows // (before.rows_per_device * before.num_processes)
    is_unchanged = asked.rows_per_device == before.rows_per_device and asked.accumulation in (
        before.accumulation,
        in_use,
    )
    accumulation, rest = divmod(rows, asked.rows_per_device * num_processes)
    if not is_unchanged or rest:
        opened.messages.append(f"a step has {asked.rows_per_step} rows from here on; it had {rows}")
        return config, asked
    opened.messages.append(
        f"a step keeps its {rows} rows on {num_processes} processes instead of {before.num_processes}: "
        f"trainer.gradient_accumulation_steps is {accumulation}"
    )
    return config.with_keys(trainer={"gradient_accumulation_steps": accumulation}), replace(asked, rows_per_step=rows)


# --- continue -----------


def continue_run(
    opened: OpenRun,
    runtime: Runtime,
    storage: Storage,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    model: nn.Module,
) -> TrainState:
    """Where the run is: at its beginning, or exactly where its checkpoint was saved. `model` as it is called.

    What is in the way in the output folder is moved aside: the run begins. Raises CheckpointError and ConfigError.
    """
    state, folder, saved = TrainState(), opened.checkpoint, opened.saved
    if folder is None:
        opened.messages.extend(runtime.on_main(lambda: enter_run(opened)))
        return state
    check_engine(folder, saved, runtime)
    with runtime.open_weights(model):
        storage.load(folder)
    try:
        if runtime.zero_stage:
            load_partition(optimizer, load_rank_optimizer(folder, runtime.rank))
        else:
            load_by_name(folder, optimizer)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}; was another optimizer used?") from None
    ranks = [runtime.rank] if saved["world_size"] == runtime.world_size else list(range(saved["world_size"]))
    positions = [load_data(folder, rank) for rank in ranks]
    batches.load_state_dict(*(positions[0] if len(positions) == 1 else join_positions(positions)))
    before = saved_step_size(folder, saved).rows_per_step
    state.load_state_dict({"num_rows": saved["step"] * before, **saved})
    opened.messages.extend(runtime.on_main(lambda: enter_run(opened)))
    opened.messages.append(f"resuming from {folder}: step {state.step:,}, {state.num_tokens:,} tokens seen")
    return state


def check_engine(folder: Path, saved: dict[str, Any], runtime: Runtime) -> None:
    """ZeRO 1 to 3 cut the optimizer's state at places that depend on the stage and the number of processes: it fits no other.

    Raises CheckpointError.
    """
    cut = {"saved": (saved.get("zero_stage", 0), saved["world_size"]), "now": (runtime.zero_stage, runtime.world_size)}
    if cut["saved"] != cut["now"] and (cut["saved"][0] or cut["now"][0]):
        words = {
            when: f"ZeRO {stage} on {count} processes" if stage else f"whole matrices on {count}"
            for when, (stage, count) in cut.items()
        }
        raise CheckpointError(
            f"{folder}: the optimizer's state was saved for {words['saved']}, and this run has {words['now']}: ZeRO's pieces "
            "cannot be put together in another way. Resume as it was saved (DDP, FSDP2 and ZeRO 0 can be changed)"
        )


def load_by_name(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state, of each parameter the rows that this process holds. Raises ValueError."""
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }

    def rows_of(path: str) -> slice | None:
        parameter = parameters.get(path.rpartition("/")[0])
        return None if parameter is None else local_rows(parameter)

    parts = load_optimizer(folder, rows_of)
    placed = {
        path: from_rows(rows, parameters[name]) if (name := path.rpartition("/")[0]) in parameters else rows
        for path, rows in parts.items()
    }
    load_optimizer_state(optimizer, placed)
