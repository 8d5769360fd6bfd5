"""The recipe of a run: a task brings its parts, `run_task` does what all runs share.

A task's `build(context)` opens its data and builds its model, and returns `Parts`. What comes before (the configuration is
checked, the output folder opened, so that refusals come before any work) and after (engine, optimizer, checkpoint, length,
schedule, summary, the loop with its hooks, the end) is here, once. examples/own_task is a task in a file of its own.
"""

import math
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from neobert.checkpoints.format import Content, list_steps, prune, verify_checkpoint, write_pointer
from neobert.config.load import Loaded, dump_config
from neobert.config.ready import check_ready
from neobert.config.sections import TrainerConfig
from neobert.errors import CheckpointError, ConfigError, OutOfMemory, Problem, UserError, first_line, print_notes
from neobert.optim.build import local_parts, optimizer_state
from neobert.training.loop import Hook, Interrupt, Setup, StepResult, TrainState, prepare_batches, read, train
from neobert.training.optimizer import build_clip, build_run_optimizer, plan_learning_rate
from neobert.training.parts import Context, Evaluation, Finished, Parts, Storage
from neobert.training.processes import started, stop_signals
from neobert.training.reporting import Log, open_outputs, print_end, print_summary
from neobert.training.resume import Length, Saver, continue_run, plan_length
from neobert.training.run_folder import open_run, write_run_files
from neobert.training.runtime import own_partition, total_norm

__all__ = ["Context", "Evaluation", "Finished", "Parts", "Storage", "run_task"]
SMALLER_IS_BETTER = ("loss", "perplexity")


def run_task(loaded: Loaded, build: Callable[[Context], Parts]) -> Finished:
    """Run a task whose parts `build` makes; the main process alone prints. Raises UserError."""
    check_ready(loaded)
    interrupt = Interrupt()
    with stop_signals(interrupt), started(loaded.config) as runtime, open_run(loaded.config, runtime) as opened:
        print_notes(loaded.warnings if runtime.is_main else [])
        context = Context(loaded, runtime, interrupt, opened)
        finished = assemble(context, build(context)).run()
    return finished


def assemble(context: Context, parts: Parts) -> "Run":
    """The run of these parts, where it begins or where its checkpoint was saved; prints the summary. Raises UserError."""
    config, runtime, opened = parts.config, context.runtime, context.opened
    context.check_evaluation(parts.evaluation is not None)
    model = runtime.distribute(parts.model, parts.blocks)
    optimizer = build_run_optimizer(config, parts.model, runtime.dtype)
    clip, clip_line = build_clip(config, parts.model)
    model, optimizer = runtime.wrap_deepspeed(model, optimizer)
    state = continue_run(context, parts, model, optimizer)
    length = plan_length(parts, runtime.world_size, state, opened.saved)
    rows_per_step = length.size.rows_per_step
    parts.set_num_rows(state.num_rows + (length.num_steps - state.step) * rows_per_step)
    lr, optimizer_line, warnings = plan_learning_rate(config, length.num_steps, length.shift)
    facts = {
        **parts.facts,
        "run": parts.describe_length(length.num_steps),
        "optimizer": optimizer_line,
        **clip_line,
        "device": runtime.describe,
        "processes": runtime.describe_engine,
        **parts.more_facts,
    }
    runtime.on_main(lambda: write_run_files(opened.folder, dump_config(config), facts))
    print_summary(facts, [*parts.messages, *opened.messages, *warnings], opened.folder)
    prepare_batches(parts.model, parts.batches)
    setup = Setup(
        model,
        optimizer,
        runtime,
        lr,
        seed=config.seed,
        gradient_clipping=config.trainer.gradient_clipping,
        model_inputs=parts.model_inputs,
        after_update=parts.after_update,
        clip=clip,
        interrupt=context.interrupt,
        empty_batch=parts.empty_batch,
        rows_per_step=rows_per_step,
    )
    return Run(context, parts, setup, length, state)


class Run:
    """A run that is put together; `run` trains."""

    def __init__(self, context: Context, parts: Parts, setup: Setup, length: Length, state: TrainState):
        self.context, self.parts, self.setup, self.length, self.state = context, parts, setup, length, state
        config, opened, runtime = parts.config, context.opened, context.runtime
        self.trainer, self.root = config.trainer, opened.folder / "checkpoints"
        self.out = open_outputs(config, opened, runtime, state.step, length.num_steps)
        self.log = Log(parts, setup, self.out, length.num_steps)
        self.evaluation = None if parts.evaluation is None else parts.evaluation(setup.model)
        check_lock = (lambda: None) if opened.lock is None else opened.lock.check
        self.saver = Saver(self.root, runtime.process_group(), config.trainer.save_in_background, check_lock)
        self.last_saved = state.step if opened.goes_on else -1  # what the run goes on from is not written again
        self.has_spare = True  # checkpoints beyond the limit, until the newest is known to be good
        self.last_epoch = state.epoch
        self.last_evaluated, self.values = -1, dict[str, float]()  # of the evaluation of that step

    def run(self) -> Finished:
        """Train, save, go back to the best weights where that is asked for, and print where things are. Raises UserError."""
        parts, trainer, state, interrupt = self.parts, self.trainer, self.state, self.context.interrupt
        runtime, stopwatch, max_steps = self.context.runtime, self.setup.stopwatch, self.length.num_steps
        if trainer.early_stopping and state.num_evaluations_without_gain >= trainer.early_stopping:
            state.stop_reason = "it had stopped early when it was saved"
        self.forget_lost_best()
        interrupt.failure = lambda: self.out.failure or self.saver.failure()
        state.position = parts.batches.position
        fetch = partial(parts.batches.next_step, trainer.gradient_accumulation_steps)
        hooks: list[Hook] = [self.log, self.evaluate_and_save]
        try:
            interrupt.has_started = True
            if state.is_evaluation_open and self.evaluation is not None:
                self.evaluate(self.evaluation)  # a signal had broken it off
                if not state.is_evaluation_open:
                    self.save(again=True)  # with its result
            shortage = None
            try:
                train(self.setup, fetch, state, None if parts.ends_with_data else max_steps, hooks)
                self.read()
            except (RuntimeError, OSError, MemoryError) as error:
                shortage = self.end_broken_step(error)
            if shortage is not None:  # raised here, where nothing holds the tensors of the step any more
                raise shortage
            is_stopped = runtime.all_max(interrupt.signal)[0] > 0
            if trainer.save_model or is_stopped:
                self.save()
            self.saver.wait()
            if not is_stopped:
                self.prune()
            step = state.step if is_stopped or self.evaluation is None else self.load_best(self.evaluation)
            interrupt.act(state, runtime)
        except UserError as error:
            self.save_whole_step(error)
            raise
        finally:
            self.out.close()
            parts.batches.close()
            self.saver.close()
        values = self.values if self.last_evaluated == step else {}
        code = 128 + interrupt.signal if interrupt.signal else 0
        finished = Finished(self.context.opened.folder, state, step, code, values, runtime.is_main)
        messages = [*parts.end_messages(), *self.saver.describe(stopwatch.total_seconds["save"])]
        print_end(finished, stopwatch, max_steps, self.last_saved, messages, parts.next_command)
        return self.finish(finished)

    # --- between steps -----------

    def read(self) -> None:
        """Bring all that steps have computed, with the line of the log that waits for it. Raises UserError as `loop.read`."""
        self.log.flush()
        read(self.setup, self.state)

    def evaluate_and_save(self, state: TrainState, result: StepResult | None) -> None:
        """The last hook: what is due. What is saved from now on comes after this step."""
        trainer, state.position = self.trainer, self.parts.batches.position
        new_epoch, self.last_epoch = state.epoch > self.last_epoch, state.epoch  # its first batch has been used
        if not state.unread:
            self.prune()
        improved = False
        if self.evaluation is not None and self.last_evaluated != state.step:
            by_steps = trainer.eval_strategy == "steps" and state.step % trainer.eval_steps == 0
            is_last = result is None or state.step == self.length.num_steps
            if by_steps or (trainer.eval_strategy == "epoch" and new_epoch) or is_last:
                improved = self.evaluate(self.evaluation)
        if state.is_evaluation_open:
            return  # the run ends here, with a checkpoint
        due = {"steps": state.step % trainer.save_steps == 0, "epoch": new_epoch, "best": improved, "no": False}
        if due[trainer.save_strategy] or (trainer.load_best_model_at_end and improved):
            self.save()

    def evaluate(self, evaluation: Evaluation, loaded: int | None = None) -> bool:
        """Evaluate, and compare with the best so far; or evaluate again the weights that were `loaded`, those of an earlier
        step, which has been compared and has its row. Returns whether this is the best.
        """
        state, is_best = self.state, False
        self.read()
        self.last_evaluated = step = state.step if loaded is None else loaded
        with self.setup.stopwatch.phase("evaluate"):
            values = evaluation.run()
        state.is_evaluation_open = values is None
        if values is None:
            self.context.interrupt.act(state, self.context.runtime)
            return False
        self.values = values
        if loaded is None:
            name = (self.trainer.metric_for_best_model or evaluation.default).removeprefix("eval_")
            is_best = compare_with_best(self.trainer, name, values, state)
            self.out.write({"kind": "eval", "step": step, **{f"eval_{name}": value for name, value in values.items()}})
        best = "  best so far" if is_best else ""
        self.out.line(f"evaluation at step {step:,}: {evaluation.headline(values)}{best}")
        return is_best

    def save(self, again: bool = False) -> None:
        """Write a checkpoint of the last whole step, unless there is one; when it is whole, point at the best one."""
        self.read()
        root, step, best = self.root, self.state.step, self.state.best_step
        if self.last_saved == step and not again:
            return

        def point_at_best() -> None:
            if best is not None and (root / str(best)).is_dir():
                write_pointer(root, "best", best)

        with self.setup.stopwatch.phase("save"):
            self.saver.submit(self.content(), point_at_best)
        self.last_saved, self.has_spare = step, True

    def prune(self) -> None:
        """Once the loss after the newest checkpoint is known to be finite: remove the oldest beyond the limit."""
        keep, best, last = self.trainer.save_total_limit, self.state.best_step, self.last_saved
        if self.has_spare and keep is not None and self.context.runtime.is_main:
            self.saver.then(partial(prune, self.root, keep, {last, last if best is None else best}))
        self.has_spare = False

    def content(self) -> Content:
        """What a checkpoint of the last whole step holds; copies, so that training can go on. Raises CheckpointError, in all
        processes, for weights that are not finite.
        """
        parts, runtime, state = self.parts, self.context.runtime, self.state
        if not math.isfinite(total_norm(parts.model.parameters())):
            raise CheckpointError(f"the weights of step {state.step} are not finite and are not saved")
        weights, model_config = parts.storage.content()
        optimizer, first_rows = own_partition(self.setup.optimizer), dict[str, int]()
        if optimizer is None:
            optimizer, first_rows = local_parts(optimizer_state(self.setup.optimizer), runtime.is_main)
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
                **self.length.state_dict(parts.config),
                "world_size": runtime.world_size,
                "engine": runtime.engine,
                "zero_stage": runtime.zero_stage,
                "metadata": parts.config.pretraining_metadata,
            },
        )

    # --- the end -----------

    def end_broken_step(self, error: RuntimeError | OSError | MemoryError) -> OutOfMemory | None:
        """A signal to all processes of a job also ends the compiler that a step waits for: that is no error of the run. Returns
        where the last whole step is to be saved, with the error to raise if memory ran out; else raises `error` where no signal
        had come, and SystemExit.
        """
        number, step = self.context.interrupt.signal, self.state.step
        if not number:
            if (shortage := self.parts.shortage(error, step + 1, self.context.runtime)) is None:
                raise error
            self.setup.optimizer.zero_grad(set_to_none=True)
            return shortage
        if step and self.context.runtime.world_size == 1:
            self.out.line(f"note: step {step + 1:,} was broken off by the signal: {first_line(error)}")
            return None
        what = "the last checkpoint stays" if step else "nothing had to be saved"
        self.out.line(f"stopped by {signal.Signals(number).name} in step {step + 1:,}; {what}")
        sys.exit(128 + number)

    def save_whole_step(self, error: UserError) -> None:
        """Before a failure that all processes share ends the run: save the last whole step, and let the message say so. Memory
        runs out in one process, while others wait for it in the step; and during an update there is no whole step any more.
        """
        is_split = self.context.runtime.world_size > 1 or self.context.interrupt.is_updating
        try:
            if not isinstance(error, CheckpointError):  # that is what saving says
                if self.state.step and not (is_split and isinstance(error, OutOfMemory)):
                    with suppress(UserError):  # of a step since then, which was not made either
                        self.read()
                    self.save()
                self.saver.wait()
        except CheckpointError as failure:
            error.args = (f"{error}; {failure}",)
        if steps := list_steps(self.root):
            error.args = (f"{error}; go on from {self.root / str(steps[-1])}",)

    def forget_lost_best(self) -> None:
        """A best checkpoint that is gone cannot be what the run ends with: the next evaluation begins a new search."""
        best = self.state.best_step
        if best is None or not self.trainer.load_best_model_at_end:
            return
        if not self.context.runtime.on_main(lambda: best in list_steps(self.root)):
            self.state.best_step = self.state.best_metric = None

    def load_best(self, evaluation: Evaluation) -> int:
        """`load_best_model_at_end`: go back to the weights of the best evaluation, which `latest` then means. Returns the step
        whose weights these are: that of the last, too, where the best cannot be had any more.
        """
        best, last, runtime = self.state.best_step, self.state.step, self.context.runtime
        if not self.trainer.load_best_model_at_end or best is None or best == last:
            return last
        folder = self.root / str(best)
        try:
            runtime.on_main(lambda: verify_checkpoint(folder))
        except CheckpointError as damage:
            self.out.line(f"note: the best checkpoint is lost ({damage}): these are the weights of the last step")
            return last
        with runtime.open_weights(self.setup.model):
            self.parts.storage.load(folder)
        runtime.on_main(lambda: write_pointer(self.root, "latest", best))
        self.out.line(f"loading the best checkpoint, step {best:,}")
        self.evaluate(evaluation, loaded=best)
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


def compare_with_best(trainer: TrainerConfig, name: str, values: dict[str, float], state: TrainState) -> bool:
    """Whether the value `name` is the best so far, which `state` keeps; asks for a stop after too many that are not. Raises
    ConfigError when there is no such value.
    """
    if name not in values:
        why = f"no metric {name!r}; there are: {', '.join(values)}"
        raise ConfigError(Problem("trainer.metric_for_best_model", why))
    value, best, patience = values[name], state.best_metric, trainer.early_stopping
    is_larger_better = trainer.greater_is_better and name not in SMALLER_IS_BETTER
    is_best = best is None or (value > best if is_larger_better else value < best)
    if is_best:
        state.best_metric, state.best_step, state.num_evaluations_without_gain = value, state.step, 0
    else:
        state.num_evaluations_without_gain += 1
    if patience and state.num_evaluations_without_gain >= patience:
        state.stop_reason = f"no better {name} in {patience} evaluations"
    return is_best
