"""The recipe of a run: a task brings its parts, `run_task` does what all runs share.

A task's `build(context)` opens its data and builds its model, and returns `Parts`. What comes before (the configuration is
checked, the output folder opened, so that refusals come before any work) and after (engine, optimizer, checkpoint, length,
schedule, summary, the loop with its hooks, the end) is here, once. examples/own_task is a task in a file of its own.
"""

import math
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neobert.checkpoints.format import Content, list_steps, verify_checkpoint, write_pointer
from neobert.config.load import Loaded, dump_config
from neobert.config.ready import check_ready
from neobert.config.schema import Config
from neobert.errors import CheckpointError, ConfigError, Problem, UserError, first_line, print_notes
from neobert.optim.build import local_parts, optimizer_state
from neobert.training import optimizer as optimizers
from neobert.training import resume
from neobert.training.hooks import (
    Evaluate,
    Evaluation,
    Log,
    Outputs,
    Save,
    Saver,
    finish_evaluation,
    step_hooks,
    weight_norm,
)
from neobert.training.loop import Interrupt, StepResult, StepSettings, TrainState, train
from neobert.training.processes import main_prints_only, start_runtime, stop_signals
from neobert.training.resume import Batches, Length, StepSize, Storage
from neobert.training.run_folder import OpenRun, open_run, write_run_files
from neobert.training.runtime import Runtime, own_partition
from neobert.training.summary import open_outputs, print_configuration, print_end, print_summary

__all__ = ["Batches", "Context", "Evaluation", "Finished", "Length", "Parts", "Storage", "run_task"]


@dataclass(frozen=True)
class Context:
    """What a task builds its parts with: the configuration as it was loaded, this process, and the folder of the run."""

    loaded: Loaded
    runtime: Runtime
    interrupt: Interrupt
    opened: OpenRun

    @property
    def config(self) -> Config:
        return self.loaded.config

    def print_configuration(self, config: Config) -> None:
        """With `debug: true`, `config` as the task has filled it in."""
        print_configuration(config, self.loaded.origins)

    def check_evaluation(self, has_data: bool) -> None:
        """Raises ConfigError for keys that act on evaluations, in a run that has no evaluation data."""
        trainer = self.config.trainer
        asked = {
            "trainer.save_strategy": trainer.save_strategy == "best",
            "trainer.early_stopping": trainer.early_stopping > 0,
            "trainer.load_best_model_at_end": trainer.load_best_model_at_end,
            "trainer.metric_for_best_model": trainer.metric_for_best_model is not None,
        }
        why = (
            "needs evaluation data: a split named validation or test, or dataset.validation_split with streaming: false"
        )
        problems = [Problem(dotted, why) for dotted, is_asked in asked.items() if is_asked]
        if problems and not has_data:
            raise ConfigError(*problems)


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


@dataclass(frozen=True)
class Parts:
    """What a task brings to a run.

    `config` has what the task filled in, and is saved. `model(**batch.inputs(), **model_inputs)` gives `loss_sum` and
    `num_correct`. `evaluation` is built for the model as it is called. Functions that return numbers for the log, or evaluate,
    are called by all processes.
    """

    config: Config
    model: Any  # an nn.Module with a `config`
    batches: Batches
    storage: Storage
    count_left: Callable[[], int] = lambda: 0  # steps from where the data stands to its end, for max_steps: -1
    num_steps: int | None = None  # of the run, where the task decides it
    size: StepSize | None = None  # where it is not what the configuration asks for
    blocks: Iterable[nn.Module] = ()  # that FSDP2 splits one by one
    evaluation: Callable[[nn.Module], Evaluation] | None = None
    model_inputs: dict[str, Any] = field(default_factory=dict)
    after_update: Callable[[], None] = lambda: None
    empty_batch: Callable[[], Any] | None = None  # where the data of processes ends at different steps
    ends_with_data: bool = False  # whatever the number of steps
    set_num_rows: Callable[[int], None] = lambda num_rows: None  # gets the rows of the whole run before it begins
    facts: dict[str, Any] = field(default_factory=dict)  # lines of the summary, before those of all runs
    describe_length: Callable[[int], str] = "{:,} steps".format
    more_facts: dict[str, Any] = field(default_factory=dict)  # and after them
    messages: list[str] = field(default_factory=list)
    log_metrics: Callable[[], dict[str, float]] = dict  # what the task adds to the rows of the log
    end_messages: Callable[[], list[str]] = list
    on_finish: Callable[[Finished], None] | None = None  # in the main process, after the end, with values
    next_command: str = ""


def run_task(loaded: Loaded, build: Callable[[Context], Parts]) -> Finished:
    """Run a task whose parts `build` makes; the main process alone prints. Raises UserError."""
    check_ready(loaded)
    interrupt = Interrupt()
    with stop_signals(interrupt):
        runtime = start_runtime(loaded.config)
        with main_prints_only(runtime), open_run(loaded.config, runtime) as opened:
            print_notes(loaded.warnings if runtime.is_main else [])
            context = Context(loaded, runtime, interrupt, opened)
            finished = assemble(context, build(context)).run()
        runtime.close()
    return finished


def assemble(context: Context, parts: Parts) -> "Run":
    """The run of these parts, where it begins or where its checkpoint was saved; prints the summary. Raises UserError."""
    config, runtime, opened = parts.config, context.runtime, context.opened
    context.check_evaluation(parts.evaluation is not None)
    model = runtime.distribute(parts.model, parts.blocks)
    optimizer = optimizers.build_run_optimizer(config, parts.model, runtime.dtype)
    clip, clip_line = optimizers.build_clip(config, parts.model)
    model, optimizer = runtime.wrap_deepspeed(model, optimizer)
    state = resume.continue_run(opened, runtime, parts.storage, optimizer, parts.batches, model)
    size = parts.size or resume.step_size(config, runtime.world_size)
    if parts.num_steps is None:
        length = resume.plan_length(config, size, state, opened.saved, parts.count_left)
    else:
        length = Length(parts.num_steps)
    parts.set_num_rows(state.num_rows + (length.num_steps - state.step) * size.rows_per_step)
    schedule, warnings = optimizers.build_run_schedule(config, length.schedule_steps)
    facts = {
        **parts.facts,
        "run": parts.describe_length(length.num_steps),
        "optimizer": optimizers.describe_optimizer(config, schedule, length.shift),
        **clip_line,
        "device": runtime.describe,
        "processes": runtime.describe_engine,
        **parts.more_facts,
    }
    runtime.on_main(lambda: write_run_files(opened.folder, dump_config(config), facts))
    print_summary(facts, [*parts.messages, *opened.messages, *warnings], opened.folder)
    settings = StepSettings(
        seed=config.seed,
        lr=optimizers.learning_rate(config, schedule, length.shift),
        gradient_clipping=config.trainer.gradient_clipping,
        after_update=parts.after_update,
        model_inputs=parts.model_inputs,
        clip=clip,
        interrupt=context.interrupt,
        empty_batch=parts.empty_batch,
        rows_per_step=size.rows_per_step,
    )
    evaluation = None if parts.evaluation is None else parts.evaluation(model)
    return Run(context, parts, model, optimizer, settings, length, size, state, evaluation)


@dataclass
class Run:
    """A run that is put together; `run` trains. `model` is as it is called."""

    context: Context
    parts: Parts
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: StepSettings
    length: Length
    size: StepSize
    state: TrainState
    evaluation: Evaluation | None

    def run(self) -> Finished:
        """Train, save, go back to the best weights where that is asked for, and print where things are. Raises UserError."""
        opened, runtime, interrupt = self.context.opened, self.context.runtime, self.context.interrupt
        trainer, state, max_steps = self.parts.config.trainer, self.state, self.length.num_steps
        if trainer.early_stopping and state.num_evaluations_without_gain >= trainer.early_stopping:
            state.stop_reason = "it had stopped early when it was saved"
        self.forget_lost_best()
        out = open_outputs(self.parts.config, opened, runtime, state.step, max_steps)
        log = Log(trainer, self.parts.model, out, max_steps, self.parts.config.debug, self.parts.log_metrics)
        evaluate = None
        if self.evaluation is not None:
            evaluate = Evaluate(trainer, self.evaluation, runtime, out, interrupt)
        save = self.build_save(out)
        interrupt.failure = lambda: out.metrics.failure or save.saver.failure()
        state.position = self.parts.batches.position
        hooks = [self.keep_position, *step_hooks(trainer, log, evaluate, save, max_steps, state.epoch)]
        fetch = partial(self.parts.batches.next_step, trainer.gradient_accumulation_steps)
        try:
            interrupt.start()
            if state.is_evaluation_open and evaluate is not None:
                finish_evaluation(evaluate, save, state)
            try:
                train(
                    self.model, self.optimizer, fetch, runtime, self.settings, state,
                    None if self.parts.ends_with_data else max_steps, hooks, out.stopwatch,
                )  # fmt: skip
            except (RuntimeError, OSError) as error:
                self.end_broken_step(error, out)
            is_stopped = runtime.all_max(interrupt.signal)[0] > 0
            if trainer.save_model or is_stopped:
                save.run(state)
            save.saver.wait()
            if not is_stopped:
                save.prune(state)
            best = None if is_stopped or evaluate is None else self.load_best(save.saver.root, evaluate)
            interrupt.act(state, runtime)
        except UserError as error:
            save_whole_step(state, save, error)
            raise
        finally:
            out.close()
            self.parts.batches.close()
            save.saver.close()
        messages = [*self.parts.end_messages(), *save.saver.describe(out.stopwatch.total_seconds["save"])]
        command = self.parts.next_command
        print_end(state, max_steps, opened.folder, out.stopwatch, save.last_step, best, messages, command)
        step = state.step if best is None else best
        values = evaluate.values if evaluate is not None and evaluate.last_step == step else {}
        code = 128 + interrupt.signal if interrupt.signal else 0
        return self.finish(
            Finished(opened.folder, state, step, out.stopwatch.data_fraction, code, values, runtime.is_main)
        )

    def build_save(self, out: Outputs) -> Save:
        """What writes checkpoints; one of this folder that the run goes on from is not written again."""
        config, opened, runtime = self.parts.config, self.context.opened, self.context.runtime
        check_lock = (lambda: None) if opened.lock is None else opened.lock.check
        root, group = opened.folder / "checkpoints", runtime.process_group()
        saver = Saver(root, group, config.trainer.save_in_background, check_lock)
        return Save(config.trainer, saver, self.content, out.stopwatch, self.state.step if opened.goes_on else -1)

    def content(self, state: TrainState) -> Content:
        """Everything a checkpoint of the last whole step holds; copies, so that training can go on.

        Raises CheckpointError, in all processes, for weights that are not finite: there is nothing to go on from in them.
        """
        parts, runtime = self.parts, self.context.runtime
        if not math.isfinite(weight_norm(parts.model)):
            raise CheckpointError(f"the weights of step {state.step} are not finite and are not saved")
        weights, model_config = parts.storage.content()
        optimizer, first_rows = own_partition(self.optimizer), dict[str, int]()
        if optimizer is None:
            optimizer, first_rows = local_parts(optimizer_state(self.optimizer), runtime.is_main)
        return Content(
            step=state.step,
            weights=weights,
            model_config=model_config,
            save_beside=parts.storage.save_beside,
            config_yaml=dump_config(parts.config),
            optimizer=optimizer,
            first_rows=first_rows,
            data=parts.batches.state_dict(state.position),
            state={
                **state.state_dict(),
                **self.length.state_dict(parts.config, self.size),
                "world_size": runtime.world_size,
                "engine": runtime.engine,
                "zero_stage": runtime.zero_stage,
                "metadata": parts.config.pretraining_metadata,
            },
        )

    def keep_position(self, state: TrainState, result: StepResult | None) -> None:
        """The first hook of a step: what is saved from now on comes after it."""
        state.position = self.parts.batches.position

    def end_broken_step(self, error: RuntimeError | OSError, out: Outputs) -> None:
        """A signal to all processes of a job also ends the compiler that a step waits for: that is no error of the run.

        Returns where the last whole step is to be saved; raises `error` where no signal had come, and SystemExit.
        """
        number = self.context.interrupt.signal
        if not number:
            raise error
        if self.state.step and self.context.runtime.world_size == 1:
            out.console.line(f"note: step {self.state.step + 1:,} was broken off by the signal: {first_line(error)}")
            return
        what = "the last checkpoint stays" if self.state.step else "nothing had to be saved"
        out.console.line(f"stopped by {signal.Signals(number).name} in step {self.state.step + 1:,}; {what}")
        sys.exit(128 + number)

    def forget_lost_best(self) -> None:
        """With `load_best_model_at_end`, a best checkpoint that is not in the folder cannot be what the run ends with: the next
        evaluation begins a new search.
        """
        root, best = self.context.opened.folder / "checkpoints", self.state.best_step
        if best is None or not self.parts.config.trainer.load_best_model_at_end:
            return
        if not self.context.runtime.on_main(lambda: best in list_steps(root)):
            self.state.best_step = self.state.best_metric = None

    def load_best(self, root: Path, evaluate: Evaluate) -> int | None:
        """`load_best_model_at_end`: go back to the weights of the best evaluation, which `latest` then means, and return their
        step. None where they are those of the last step, or cannot be had any more.
        """
        best, runtime, console = self.state.best_step, self.context.runtime, evaluate.out.console
        if not self.parts.config.trainer.load_best_model_at_end or best in (None, self.state.step):
            return None
        if damage := runtime.on_main(lambda: _damage(root / str(best))):
            console.line(f"note: the best checkpoint is lost ({damage}): these are the weights of the last step")
            return None
        with runtime.open_weights(self.model):
            self.parts.storage.load(root / str(best))
        runtime.on_main(lambda: write_pointer(root, "latest", best))
        console.line(f"loading the best checkpoint, step {best:,}")
        evaluate.run(self.state, loaded=best)
        return best

    def finish(self, finished: Finished) -> Finished:
        """What the task does with a run that came to its end. It gets values: where there are none, it is evaluated now."""
        on_finish, runtime = self.parts.on_finish, self.context.runtime
        if finished.exit_code or on_finish is None or self.evaluation is None:
            return finished
        values = finished.values or self.evaluation.run()
        if values is None:
            return replace(finished, exit_code=128 + int(runtime.all_max(self.context.interrupt.signal)[0]))
        result = replace(finished, values=values)
        runtime.on_main(lambda: on_finish(result))
        return result


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
