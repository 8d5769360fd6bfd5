"""What every training task shares: a run put together from its parts, its checkpoints, resuming, and signals.

A task builds model, batches and evaluation, says how its model is stored, and hands all to a `Job`, which trains with the one
loop and the one checkpoint format.
"""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from neobert.checkpoints.format import Content, Tensors, list_steps, verify_checkpoint, write_text_atomic
from neobert.config.deepspeed import read_zero
from neobert.config.explain import plain_json
from neobert.config.load import Loaded, dump_config
from neobert.config.ready import check_ready
from neobert.config.schema import Config, known_keys
from neobert.errors import CheckpointError, ConfigError, Problem, UserError, first_line, print_notes
from neobert.optim.build import local_parts, optimizer_state
from neobert.optim.qk_clip import QKClip
from neobert.optim.schedule import Schedule, ScheduleSettings, build_schedule, lr_scale
from neobert.training.background import Saver
from neobert.training.hooks import Evaluate, Evaluation, Log, Save, finish_evaluation, step_hooks, weight_norm
from neobert.training.length import Length, StepSize
from neobert.training.loop import Interrupt, MicroBatch, StepResult, StepSettings, TrainState, train
from neobert.training.metrics import Console, MetricsFile, Sinks, Stopwatch, build_trackers, wandb_run_id
from neobert.training.run_folder import OpenRun, open_run
from neobert.training.runtime import Runtime, build_runtime, own_partition
from neobert.training.signals import stop_signals
from neobert.training.summary import print_end


class Batches(Protocol):
    """A source of microbatches whose position can be saved: `position` is that behind the last one used."""

    @property
    def position(self) -> Any: ...

    def state_dict(self, position: Any = None) -> tuple[dict[str, Any], dict[str, Any]]: ...

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Storage:
    """How a task's model goes into a checkpoint, as whole tensors that training does not write to and config.json, and
    comes back. `save_beside` writes the tokenizer and what else belongs to the model into the folder.
    """

    content: Callable[[], tuple[Tensors, dict[str, Any]]]
    load: Callable[[Path], None]
    save_beside: Callable[[Path], None]


@dataclass(frozen=True)
class Finished:
    """What a run came to: the weights of `step`, which `values` belong to, if there was an evaluation."""

    folder: Path
    state: TrainState
    step: int
    data_fraction: float
    exit_code: int = 0
    values: dict[str, float] = field(default_factory=dict)
    is_main: bool = True


@dataclass
class Job:
    """The parts of a run, put together; `run` trains. `fetch` gives the microbatches of a step, drawn from `batches`."""

    config: Config
    runtime: Runtime
    model: Any
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    batches: Batches
    fetch: Callable[[], list[MicroBatch]]
    size: StepSize
    length: Length
    measure: Evaluation | None
    storage: Storage
    opened: OpenRun
    state: TrainState
    wrapped: nn.Module  # the model as it is called
    interrupt: Interrupt
    clip: QKClip | None = None
    model_inputs: dict[str, Any] = field(default_factory=dict)
    empty_batch: Callable[[], MicroBatch] | None = None  # where the data of processes ends at different steps
    ends_with_data: bool = False  # whatever the number of steps
    log_metrics: Callable[[], dict[str, float]] = (
        dict  # what the task adds to the rows of the log; all processes call it
    )
    end_notes: Callable[[], list[str]] = list
    on_finish: Callable[[Finished], Finished] = lambda finished: finished  # of a run that came to its end
    next_command: str = ""

    def run(self) -> Finished:
        trainer, max_steps, runtime = self.config.trainer, self.length.num_steps, self.runtime
        if trainer.early_stopping and self.state.num_evaluations_without_gain >= trainer.early_stopping:
            self.state.stop_reason = "it had stopped early when it was saved"
        self.forget_lost_best()
        stopwatch = Stopwatch()
        metrics = self.build_sinks()
        console = Console(max_steps, self.state.step, runtime.is_main and not trainer.disable_tqdm)
        log = Log(trainer, self.model, metrics, console, stopwatch, max_steps, self.config.debug, self.log_metrics)
        opened, lock = self.opened, self.opened.lock
        root = opened.folder / "checkpoints"
        evaluation = None
        if self.measure is not None:
            evaluation = Evaluate(trainer, self.measure, runtime, metrics, console, stopwatch, self.interrupt)
        saver = Saver(
            root, runtime.process_group(), trainer.save_in_background, (lambda: None) if lock is None else lock.check
        )
        save = Save(trainer, saver, self.checkpoint_content, stopwatch, self.state.step if opened.goes_on else -1)
        self.interrupt.failure = lambda: metrics.failure or saver.failure()
        self.state.position = self.batches.position
        hooks = [self.keep_position, *step_hooks(trainer, log, evaluation, save, max_steps, self.state.epoch)]
        try:
            self.interrupt.start()
            if self.state.is_evaluation_open and evaluation is not None:
                finish_evaluation(evaluation, save, self.state)
            try:
                train(
                    self.wrapped, self.optimizer, self.fetch, runtime, self.step_settings(), self.state,
                    None if self.ends_with_data else max_steps, hooks, stopwatch,
                )  # fmt: skip
            except (RuntimeError, OSError) as error:
                self.end_broken_step(error, console)
            stopped_by = int(runtime.all_max(self.interrupt.signal)[0])
            if trainer.save_model or stopped_by:
                save.run(self.state)
            saver.wait()
            if not stopped_by:
                save.prune(self.state)
            ended_with_best = not stopped_by and self.load_best(root, evaluation)
            self.interrupt.act(self.state, runtime)
            stopped_by = self.interrupt.signal
        except UserError as error:
            save_whole_step(self.state, save, error)
            raise
        finally:
            console.close()
            metrics.close()
            self.batches.close()
            saver.close()
        notes = [*self.end_notes(), *saver.describe(stopwatch.total_seconds["save"])]
        best = self.state.best_step if ended_with_best else None
        print_end(self.state, max_steps, opened.folder, stopwatch, save.last_step, best, notes, self.next_command)
        step = self.state.step if best is None else best
        values = evaluation.values if evaluation is not None and evaluation.last_step == step else {}
        code = 128 + stopped_by if stopped_by else 0
        finished = Finished(opened.folder, self.state, step, stopwatch.data_fraction, code, values, runtime.is_main)
        return finished if code else self.on_finish(finished)

    def keep_position(self, state: TrainState, result: StepResult | None) -> None:
        """The first hook of a step: what is saved from now on is behind it."""
        state.position = self.batches.position

    def end_broken_step(self, error: RuntimeError | OSError, console: Console) -> None:
        """A signal to all processes of a job also ends the compiler that a step waits for: that is no error of the run.

        Returns where the last whole step is to be saved; raises `error` where no signal had come, and SystemExit.
        """
        number = self.interrupt.signal
        if not number:
            raise error
        if self.state.step and self.runtime.world_size == 1:
            console.line(f"note: step {self.state.step + 1:,} was broken off by the signal: {first_line(error)}")
            return
        what = "the last checkpoint stays" if self.state.step else "nothing had to be saved"
        console.line(f"stopped by {signal.Signals(number).name} in step {self.state.step + 1:,}; {what}")
        sys.exit(128 + number)

    def step_settings(self) -> StepSettings:
        """The numbers that every step depends on."""
        trainer = self.config.trainer
        return StepSettings(
            seed=self.config.seed,
            lr=lambda step: self.config.optimizer.lr * lr_scale(step - self.length.shift, self.schedule),
            gradient_clipping=trainer.gradient_clipping,
            after_update=self.model.normalize_matrices,
            model_inputs=self.model_inputs,
            clip=self.clip,
            interrupt=self.interrupt,
            empty_batch=self.empty_batch,
            rows_per_step=self.size.rows_per_step,
        )

    def build_sinks(self) -> Sinks:
        """metrics.jsonl and the trackers that `trainer.report_to` and `wandb.enabled` ask for."""
        config = self.config
        if not self.runtime.is_main:
            return Sinks(MetricsFile(Path(os.devnull), 0), [])
        names = list(dict.fromkeys([*config.trainer.report_to, *(["wandb"] if config.wandb.enabled else [])]))
        wandb = config.wandb.model_dump(include={"entity", "name", "tags", "mode", "dir", "resume"})
        if "wandb" in names:
            Path(config.wandb.dir).mkdir(parents=True, exist_ok=True)
            keep = self.opened.goes_on and config.wandb.resume != "never"
            wandb["id"] = wandb_run_id(self.opened.folder, keep)
        flat = {key: plain_json(config.value_of(key)) for key in known_keys() if "muon_config." not in key}
        trackers = build_trackers(names, config.wandb.project, self.opened.folder / "trackers", flat, wandb)
        return Sinks(MetricsFile(self.opened.folder / "metrics.jsonl", self.state.step), trackers)

    def checkpoint_content(self, state: TrainState) -> Content:
        """Everything a checkpoint of the last whole step holds; copies, so that training can go on.

        Raises CheckpointError, in all processes, for weights that are not finite: there is nothing to go on from in them.
        """
        if not math.isfinite(weight_norm(self.model)):
            raise CheckpointError(f"the weights of step {state.step} are not finite and are not saved")
        weights, model_config = self.storage.content()
        parts, first_rows = saved_parts(self.optimizer, self.runtime.is_main)
        return Content(
            step=state.step,
            weights=weights,
            model_config=model_config,
            save_beside=self.storage.save_beside,
            config_yaml=dump_config(self.config),
            optimizer=parts,
            first_rows=first_rows,
            data=self.batches.state_dict(state.position),
            state={
                **state.state_dict(),
                **self.length.state_dict(self.config, self.size),
                "world_size": self.runtime.world_size,
                "engine": self.runtime.engine,
                "zero_stage": self.runtime.zero_stage,
                "metadata": self.config.pretraining_metadata,
            },
        )

    def forget_lost_best(self) -> None:
        """With `load_best_model_at_end`, a best checkpoint that is not in the folder cannot be what the run ends with: the next
        evaluation begins a new search.
        """
        root, best = self.opened.folder / "checkpoints", self.state.best_step
        if best is None or not self.config.trainer.load_best_model_at_end:
            return
        if not self.runtime.on_main(lambda: best in list_steps(root)):
            self.state.best_step = self.state.best_metric = None

    def load_best(self, root: Path, evaluation: Evaluate | None) -> bool:
        """`load_best_model_at_end`: go back to the weights of the best evaluation, which `latest` then means. False where they
        are those of the last step, or cannot be had any more.
        """
        best, state = self.state.best_step, self.state
        if not self.config.trainer.load_best_model_at_end or evaluation is None or best in (None, state.step):
            return False
        if damage := self.runtime.on_main(lambda: _damage(root / str(best))):
            evaluation.console.line(
                f"note: the best checkpoint is lost ({damage}): these are the weights of the last step"
            )
            return False
        with self.runtime.open_weights(self.wrapped):
            self.storage.load(root / str(best))
        self.runtime.on_main(lambda: write_text_atomic(root / "latest", str(best)))
        evaluation.console.line(f"loading the best checkpoint, step {best:,}")
        evaluation.run(state, loaded=best)
        return True


def save_whole_step(state: TrainState, save: Save, error: UserError) -> None:
    """Before a failure that all processes share ends the run: save the last whole step, and let the message say so."""
    root = save.saver.root
    try:
        if not isinstance(error, CheckpointError):  # that is what saving says
            if state.step:
                save.run(state)
            save.saver.wait()
    except CheckpointError as failure:
        error.args = (f"{error}; {failure}",)
    if steps := list_steps(root):
        error.args = (f"{error}; go on from {root / str(steps[-1])}",)


def _damage(checkpoint: Path) -> str:
    """What keeps a checkpoint from being loaded; nothing of a whole one."""
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def run_job(loaded: Loaded, build: Callable[[Runtime, Interrupt, OpenRun], Job]) -> Finished:
    """Start the runtime of this process, open the output folder, build the job and run it; the main process alone prints.

    Raises UserError.
    """
    check_ready(loaded)
    interrupt = Interrupt()
    with stop_signals(interrupt):
        runtime = start_runtime(loaded.config)
        with main_prints_only(runtime), open_run(loaded.config, runtime) as opened:
            finished = build(runtime, interrupt, opened).run()
        runtime.close()
    return finished


@contextmanager
def main_prints_only(runtime: Runtime) -> Iterator[None]:
    """Inside, only the main process prints."""
    if runtime.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def start_runtime(config: Config) -> Runtime:
    """Device, precision and engine of this process, as the configuration and the launcher have it. Raises ConfigError."""
    trainer, asked = config.trainer, read_zero(config, os.environ)
    runtime = build_runtime(
        use_cpu=trainer.use_cpu,
        mixed_precision=trainer.mixed_precision,
        tf32=trainer.tf32,
        engine=trainer.engine,
        zero_options=None if asked is None else asked.options,
    )
    print_notes(asked.notes if asked is not None and runtime.is_main else [])
    return runtime


def saved_parts(optimizer: Any, is_main: bool) -> tuple[Tensors, dict[str, int]]:
    """What this process has to save of the optimizer's state, and the first rows of parts."""
    partition = own_partition(optimizer)
    return local_parts(optimizer_state(optimizer), is_main) if partition is None else (partition, {})


def build_run_schedule(config: Config, num_steps: int) -> tuple[Schedule, list[str]]:
    """The learning-rate schedule of `num_steps`, and what to tell the user of it. Raises ConfigError."""
    try:
        schedule = build_schedule(ScheduleSettings(**config.scheduler.model_dump()), num_steps)
    except ValueError as error:
        raise ConfigError(Problem("scheduler", str(error))) from None
    if config.trainer.max_steps != num_steps and schedule.warmup_steps >= num_steps:
        peak = config.optimizer.lr * lr_scale(num_steps - 1, schedule)
        return schedule, [
            f"the warmup of {schedule.warmup_steps:,} steps is longer than the run: the learning rate gets to {peak:.2g}, "
            f"not {config.optimizer.lr:g} (set scheduler.warmup_steps or warmup_percent)"
        ]
    return schedule, []
