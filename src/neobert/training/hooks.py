"""What happens between steps: logging, evaluation, checkpoints.

Checkpoints are written while training goes on. The loop makes a copy of what one holds, which takes as long as copying it in
memory takes; a thread writes it, in each process, and the threads talk to each other over a connection of their own. One is
written at a time: the next one waits. The price is memory for one more copy of weights and optimizer state, on the CPU.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neobert.checkpoints.format import Content, ProcessGroup, prune, save_checkpoint, write_pointer
from neobert.config.sections import TrainerConfig
from neobert.errors import ConfigError, Problem, UserError, first_line, print_notes
from neobert.optim.qk_clip import clip_metrics
from neobert.training.loop import Hook, Interrupt, StepResult, TrainState
from neobert.training.metrics import Console, Sinks, Stopwatch, duration
from neobert.training.runtime import Runtime, total_norm

SMALLER_IS_BETTER = ("loss", "perplexity")
LOGGED = ("grad_norm", "weight_norm", "accuracy", "alignment", "uniformity")  # printed where they are known


@dataclass(frozen=True)
class Outputs:
    """Where a run reports: its metrics and trackers, the console, and the times that both print."""

    metrics: Sinks
    console: Console
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def close(self) -> None:
        self.console.close()
        self.metrics.close()


@dataclass
class Log:
    """Sums of the steps since the last line, and the line. The loss is summed in the state, which is saved; times are those of
    this process.
    """

    trainer: TrainerConfig
    model: nn.Module
    out: Outputs
    max_steps: int
    debug: bool
    more: Callable[[], dict[str, float]] = dict
    window: list[StepResult] = field(default_factory=list)  # of this process
    last_rate: float | None = None

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        if result is not None:
            self.window.append(result)
            one = {
                "loss": result.loss * result.num_targets,
                "targets": result.num_targets,
                "correct": result.num_correct,
            }
            state.logged = {name: state.logged.get(name, 0) + value for name, value in one.items()}
        is_due = result is None or state.step % self.trainer.logging_steps == 0 or state.step == self.max_steps
        if self.window and (is_due or self.debug):
            self._write(state)
        if result is not None:
            self.out.console.step(result.loss, self.last_rate)

    def _write(self, state: TrainState) -> None:
        (window, self.window), (sums, state.logged) = (self.window, []), (state.logged, {})
        seconds = self.out.stopwatch.lap()
        step_seconds = seconds["data"] + seconds["compute"] + seconds["optimizer"]
        loss = sums["loss"] / max(1, sums["targets"])
        self.last_rate = sum(one.num_tokens for one in window) / max(step_seconds, 1e-9)
        row: dict[str, Any] = {
            "kind": "train",
            "step": state.step,
            "epoch": state.epoch,
            "loss": loss,
            "lr": window[-1].lr,
            "num_tokens": state.num_tokens,
            "tokens_per_second": self.last_rate,
            "step_seconds": step_seconds / len(window),
            **{f"{name}_seconds": value for name, value in seconds.items()},
        }
        if self.trainer.log_grad_norm:
            row["grad_norm"] = window[-1].grad_norm
        if self.trainer.log_weight_norms:
            row["weight_norm"] = weight_norm(self.model)
        if self.trainer.log_train_accuracy:
            row["accuracy"] = sums["correct"] / max(1, sums["targets"])
        row |= self.more()
        row |= clip_metrics([one.clip for one in window if one.clip is not None])
        self.out.metrics.write(row)
        if not self.out.console.has_bar or self.debug:
            left = (self.max_steps - state.step) * step_seconds / len(window)
            extras = "".join(f"  {name} {row[name]:.3f}" for name in LOGGED if name in row)
            if row.get("qk_clipped_heads"):
                extras += f"  largest logit {row['qk_max_logit']:.1f}, {row['qk_clipped_heads']} heads clipped"
            self.out.console.line(
                f"step {state.step:,}/{self.max_steps:,}  loss {loss:.4f}  lr {row['lr']:.2e}{extras}  "
                f"{self.last_rate:,.0f} tokens/s  {duration(left)} left"
            )


@torch.no_grad()
def weight_norm(model: nn.Module) -> float:
    """Euclidean norm of all weights."""
    return float(total_norm(model.parameters()))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: `run` gives its values (None: it was broken off), `headline` is a line of them, `default` the name of the
    one that decides which is best.
    """

    run: Callable[[], dict[str, float] | None]
    headline: Callable[[dict[str, float]], str]
    default: str


@dataclass
class Evaluate:
    """Runs the evaluation when it is due, keeps track of the best, and asks for a stop when it no longer improves."""

    trainer: TrainerConfig
    evaluation: Evaluation
    runtime: Runtime
    out: Outputs
    interrupt: Interrupt
    last_step: int = -1
    improved: bool = False
    values: dict[str, float] = field(default_factory=dict)

    def __call__(self, state: TrainState, due: bool) -> None:
        self.improved = False
        if due and self.last_step != state.step:
            self.run(state)

    def run(self, state: TrainState, loaded: int | None = None) -> None:
        """Evaluate, and compare with the best so far; or evaluate again the weights that were `loaded`, those of an earlier
        step, which has been compared and has its row.
        """
        self.last_step = step = state.step if loaded is None else loaded
        self.improved = False
        with self.out.stopwatch.phase("evaluate"):
            values = self.evaluation.run()
        state.is_evaluation_open = values is None
        if values is None:
            self.interrupt.act(state, self.runtime)
            return
        self.values = values
        if loaded is None:
            self._compare(state, values)
            self.out.metrics.write(
                {"kind": "eval", "step": step, **{f"eval_{name}": value for name, value in values.items()}}
            )
        best = "  best so far" if self.improved else ""
        self.out.console.line(f"evaluation at step {step:,}: {self.evaluation.headline(values)}{best}")

    def _compare(self, state: TrainState, values: dict[str, float]) -> None:
        name = (self.trainer.metric_for_best_model or self.evaluation.default).removeprefix("eval_")
        if name not in values:
            raise ConfigError(
                Problem("trainer.metric_for_best_model", f"no metric {name!r}; there are: {', '.join(values)}")
            )
        larger = self.trainer.greater_is_better and name not in SMALLER_IS_BETTER
        value, best = values[name], state.best_metric
        self.improved = best is None or (value > best if larger else value < best)
        if self.improved:
            state.best_metric, state.best_step, state.num_evaluations_without_gain = value, state.step, 0
        else:
            state.num_evaluations_without_gain += 1
        patience = self.trainer.early_stopping
        if patience and state.num_evaluations_without_gain >= patience:
            state.stop_reason = f"no better {name} in {patience} evaluations"


@dataclass
class Saver:
    """Saves below `root`, in the background or not. `num_saved` checkpoints took `write_seconds` to write."""

    root: Path
    group: ProcessGroup
    in_background: bool = True
    before: Callable[[], None] = lambda: None  # of every save, in the main process; may raise UserError
    num_saved: int = 0
    write_seconds: float = 0.0
    _running: Future[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="save"))

    def submit(self, content: Content, after: Callable[[], None]) -> None:
        """Write a checkpoint, whose tensors nobody changes any more; then the main process calls `after`. Raises what `wait`
        raises.
        """
        self.wait()
        self._running = self._thread.submit(self._save, content, after)
        if not self.in_background:
            self.wait()

    def then(self, work: Callable[[], object]) -> None:
        """Do something in the background, after the save that is being written; if that fails, so does this. What the disk does
        not let it do is left undone, with a note.
        """
        before = self._running

        def do() -> None:
            if before is not None:
                before.result()
            try:
                work()
            except OSError as error:
                print_notes([f"{self.root}: {first_line(error)}"])

        self._running = self._thread.submit(do)

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
        n = self.num_saved
        how = "in the background, " if self.in_background else ""
        return [
            f"saving: {self.write_seconds / n:.2f} s a checkpoint, {how}which held training for {blocked_seconds / n:.2f} s"
        ]

    def close(self) -> None:
        """End the thread; a save that is being written is finished."""
        self._thread.shutdown()


@dataclass
class Save:
    """Writes checkpoints when they are due and removes the oldest beyond the limit."""

    trainer: TrainerConfig
    saver: Saver
    content: Callable[[TrainState], Content]
    stopwatch: Stopwatch
    last_step: int = -1
    has_spare: bool = True  # checkpoints beyond the limit, until the newest is known to be good

    def run(self, state: TrainState) -> None:
        if self.last_step == state.step:
            return
        best = state.best_step
        with self.stopwatch.phase("save"):
            self.saver.submit(self.content(state), lambda: self._point_at(best))
        self.last_step, self.has_spare = state.step, True

    def _point_at(self, best: int | None) -> None:
        """When a checkpoint is whole: point at the best one."""
        root = self.saver.root
        if best is not None and (root / str(best)).is_dir():
            write_pointer(root, "best", best)

    def prune(self, state: TrainState) -> None:
        """Once the loss after the newest checkpoint is known to be finite: remove the oldest beyond the limit."""
        if self.has_spare and self.saver.group.rank == 0 and self.trainer.save_total_limit is not None:
            root, keep = self.saver.root, self.trainer.save_total_limit
            protected = {self.last_step, self.last_step if state.best_step is None else state.best_step}
            self.saver.then(lambda: prune(root, keep, protected))
        self.has_spare = False


def finish_evaluation(evaluate: Evaluate, save: Save, state: TrainState) -> None:
    """An evaluation that a signal broke off is made up for when the run goes on, and the checkpoint saved with its result."""
    evaluate.run(state)
    if not state.is_evaluation_open:
        save.last_step = -1
        save.run(state)


def step_hooks(
    trainer: TrainerConfig, log: Log, evaluate: Evaluate | None, save: Save, max_steps: int, epoch: int
) -> list[Hook]:
    """The hooks of a run in their order: log, evaluate, save. `epoch` is the one the run starts in."""
    last_epoch = epoch

    def evaluate_and_save(state: TrainState, result: StepResult | None) -> None:
        nonlocal last_epoch
        new_epoch, last_epoch = state.epoch > last_epoch, state.epoch  # its first batch has been used
        is_last = result is None or state.step == max_steps
        save.prune(state)
        if evaluate is not None:
            by_steps = trainer.eval_strategy == "steps" and state.step % trainer.eval_steps == 0
            evaluate(state, by_steps or (trainer.eval_strategy == "epoch" and new_epoch) or is_last)
        if state.is_evaluation_open:
            return  # the run ends here, with a checkpoint
        improved = evaluate is not None and evaluate.improved
        due = {"steps": state.step % trainer.save_steps == 0, "epoch": new_epoch, "best": improved, "no": False}
        if due[trainer.save_strategy] or (trainer.load_best_model_at_end and improved):
            save.run(state)

    return [log, evaluate_and_save]
