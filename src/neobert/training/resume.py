"""Where a run stands: how many steps it has, how its checkpoints are written, and how it continues from one.

The position of the data is in rows and documents, so batch size, accumulation, number of processes and engine may change. What
a number of processes changes by itself is kept: the rows of a step stay as many, by accumulation, where that divides. A run of
`max_steps: -1` ends with its data, whatever its steps are; the number of steps is counted for its learning rate.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neobert.checkpoints.format import (
    Content,
    ProcessGroup,
    load_data,
    load_optimizer,
    load_rank_optimizer,
    save_checkpoint,
)
from neobert.config.schema import Config
from neobert.config.yaml_file import read_yaml
from neobert.data.mlm.pipeline import join_positions
from neobert.errors import CheckpointError, UserError, first_line, print_notes
from neobert.optim.build import load_optimizer_state, members
from neobert.optim.sharding import from_rows, local_rows
from neobert.training.loop import TrainState
from neobert.training.parts import Context, Parts, StepSize
from neobert.training.run_folder import OpenRun, enter_run
from neobert.training.runtime import Runtime, load_partition

# --- how long a run is -----------


def step_size(trainer: Mapping[str, Any], num_processes: int) -> StepSize:
    """What the section `trainer` of a configuration asks for."""
    rows, accumulation = trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]
    return StepSize(rows, accumulation, num_processes, rows * accumulation * num_processes)


def saved_step_size(checkpoint: Path, saved: dict[str, Any]) -> StepSize:
    """That of the run that wrote a checkpoint, also of versions that did not save it."""
    if "step_size" in saved:
        return StepSize(**saved["step_size"])
    return step_size(read_yaml(checkpoint / "config.yaml").values["trainer"], saved["world_size"])


@dataclass(frozen=True)
class Length:
    """Steps of a run from its beginning, those of another size included. `shift`: by how many steps it would be further had
    all been of `size`; the learning rate of a run that is measured in epochs follows the rows.
    """

    num_steps: int
    size: StepSize
    shift: float = 0.0

    def state_dict(self, config: Config) -> dict[str, Any]:
        """What a checkpoint says of it."""
        epochs = config.trainer.num_train_epochs
        return {"step_size": asdict(self.size), "num_steps": self.num_steps, "num_epochs": epochs}


def plan_length(parts: Parts, num_processes: int, state: TrainState, saved: dict[str, Any]) -> Length:
    """Of the task, or of `max_steps`, or where that is -1 of `num_train_epochs`, whose steps the task counts from where the run
    is; what a checkpoint says of the same steps is taken from it.
    """
    trainer = parts.config.trainer
    size = parts.size or step_size(vars(trainer), num_processes)
    if parts.num_steps is not None or trainer.max_steps >= 0:
        return Length(trainer.max_steps if parts.num_steps is None else parts.num_steps, size)
    shift = state.step - state.num_rows / size.rows_per_step
    known = Length(saved.get("num_steps", -1), size, shift)
    if all(saved.get(name) == value for name, value in known.state_dict(parts.config).items()):
        return known
    return Length(state.step + parts.count_left(), size, shift)


def keep_saved_size(config: Config, opened: OpenRun, num_processes: int) -> tuple[Config, StepSize]:
    """The configuration and the step of a run that goes on. Where only the number of processes is another, accumulation keeps
    the rows of a step, and where `dataset.num_shards` is not set, the data stays dealt to as many shards.
    """
    asked = step_size(vars(config.trainer), num_processes)
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
    is_same_accumulation = asked.accumulation in (before.accumulation, in_use)
    accumulation, rest = divmod(rows, asked.rows_per_device * num_processes)
    if asked.rows_per_device != before.rows_per_device or not is_same_accumulation or rest:
        opened.messages.append(f"a step has {asked.rows_per_step} rows from here on; it had {rows}")
        return config, asked
    opened.messages.append(
        f"a step keeps its {rows} rows on {num_processes} processes instead of {before.num_processes}: "
        f"trainer.gradient_accumulation_steps is {accumulation}"
    )
    return config.with_keys(trainer={"gradient_accumulation_steps": accumulation}), replace(asked, rows_per_step=rows)


# --- continue -----------


def continue_run(context: Context, parts: Parts, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Where the run is: at its beginning, or exactly where its checkpoint was saved. `model` as it is called.

    What is in the way in the output folder is moved aside: the run begins. Raises CheckpointError and ConfigError.
    """
    state, opened, runtime = TrainState(), context.opened, context.runtime
    folder, saved = opened.checkpoint, opened.saved
    if folder is not None:
        check_engine(folder, saved, runtime)
        with runtime.open_weights(model):
            parts.storage.load(folder)
        try:
            if runtime.zero_stage:
                load_partition(optimizer, load_rank_optimizer(folder, runtime.rank))
            else:
                load_by_name(folder, optimizer)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}; was another optimizer used?") from None
        ranks = [runtime.rank] if saved["world_size"] == runtime.world_size else list(range(saved["world_size"]))
        positions = [load_data(folder, rank) for rank in ranks]
        parts.batches.load_state_dict(*(positions[0] if len(positions) == 1 else join_positions(positions)))
        state.load_state_dict({"num_rows": saved["step"] * saved_step_size(folder, saved).rows_per_step, **saved})
    opened.messages.extend(runtime.on_main(lambda: enter_run(opened)))
    if folder is not None:
        opened.messages.append(f"resuming from {folder}: step {state.step:,}, {state.num_tokens:,} tokens seen")
    return state


def check_engine(folder: Path, saved: dict[str, Any], runtime: Runtime) -> None:
    """ZeRO 1 to 3 cut the optimizer's state at places that depend on the stage and the number of processes: it fits no other.

    Raises CheckpointError.
    """
    cuts = [(saved.get("zero_stage", 0), saved["world_size"]), (runtime.zero_stage, runtime.world_size)]
    if cuts[0] != cuts[1] and (cuts[0][0] or cuts[1][0]):
        before, now = (f"ZeRO {stage} on {n} processes" if stage else f"whole matrices on {n}" for stage, n in cuts)
        raise CheckpointError(
            f"{folder}: the optimizer's state was saved for {before}, and this run has {now}: ZeRO's pieces cannot be put "
            "together in another way. Resume as it was saved (DDP, FSDP2 and ZeRO 0 can be changed)"
        )


def load_by_name(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state, of each parameter the rows that this process holds. Raises ValueError."""
    parameters = {name: parameter for name, (parameter, _) in members(optimizer).items()}

    def of(path: str) -> nn.Parameter | None:
        return parameters.get(path.rpartition("/")[0])

    saved = load_optimizer(folder, lambda path: None if (one := of(path)) is None else local_rows(one))
    placed = {path: rows if (one := of(path)) is None else from_rows(rows, one) for path, rows in saved.items()}
    load_optimizer_state(optimizer, placed)


# --- save -----------


@dataclass
class Saver:
    """Saves below `root`. `num_saved` checkpoints took `write_seconds` to write.

    Checkpoints are written while training goes on. The loop makes a copy of what one holds, which takes as long as copying it
    in memory takes; a thread writes it, in each process, and the threads talk to each other over a connection of their own.
    One is written at a time. The price is memory for one more copy of weights and optimizer state, on the CPU.
    """

    root: Path
    group: ProcessGroup
    in_background: bool = True
    before: Callable[[], None] = lambda: None  # of every save, in the main process; may raise UserError
    num_saved: int = 0
    write_seconds: float = 0.0
    _running: Future[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="save"))

    def submit(self, content: Content, after: Callable[[], None]) -> None:
        """Write a checkpoint, whose tensors nobody changes any more; then the main process calls `after`. Raises as `wait`."""
        self.wait()
        self._running = self._thread.submit(self._save, content, after)
        if not self.in_background:
            self.wait()

    def then(self, work: Callable[[], object]) -> None:
        """Do something in the background, after the save that is being written; if that fails, so does this. What the disk does
        not let it do is left undone, with a note.
        """

        def do(before: Future[None] | None) -> None:
            if before is not None:
                before.result()
            try:
                work()
            except OSError as error:
                print_notes([f"{self.root}: {first_line(error)}"])

        self._running = self._thread.submit(do, self._running)

    def _save(self, content: Content, after: Callable[[], None]) -> None:
        start = time.perf_counter()
        save_checkpoint(self.root, content, self.group, self.before, after)
        self.write_seconds += time.perf_counter() - start
        self.num_saved += 1

    def failure(self) -> UserError | None:
        """The error that the last save has ended in, which `wait` raises."""
        error = self._running.exception() if self._running is not None and self._running.done() else None
        if error is not None and not isinstance(error, UserError):
            raise error
        return error

    def wait(self) -> None:
        """Until the last save is on the disk. Raises CheckpointError when it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def describe(self, blocked_seconds: float) -> list[str]:
        """What saving cost, for the end of a run that waited for so long."""
        if not self.num_saved:
            return []
        a_write, a_wait = self.write_seconds / self.num_saved, blocked_seconds / self.num_saved
        how = "in the background, " if self.in_background else ""
        return [f"saving: {a_write:.2f} s a checkpoint, {how}which held training for {a_wait:.2f} s"]

    def close(self) -> None:
        """End the thread; a save that is being written is finished."""
        self._thread.shutdown()
