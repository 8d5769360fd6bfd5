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

from neobert.checkpoints.format import Content, ProcessGroup, save_checkpoint
from neobert.config.sections import TrainerConfig
from neobert.errors import ConfigError, Problem, UserError, first_line, print_notes
from neobert.optim.qk_clip import clip_metrics
from neobert.training.loop import StepResult, TrainState
from neobert.training.metrics import Outputs, Stopwatch, duration
from neobert.training.parts import Parts
from neobert.training.runtime import total_norm

SMALLER_IS_BETTER = ("loss", "perplexity")
LOGGED = ("grad_norm", "weight_norm", "accuracy", "alignment", "uniformity")  # printed where they are known


@dataclass
class Log:
    """Sums of the steps since the last line, and the line. The loss is summed in the state, which is saved."""

    parts: Parts
    stopwatch: Stopwatch
    out: Outputs
    max_steps: int
    window: list[StepResult] = field(default_factory=list)  # of this process
    last_rate: float | None = None

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        if result is not None:
            self.window.append(result)
            loss_sum = result.loss * result.num_targets
            one = {"loss": loss_sum, "targets": result.num_targets, "correct": result.num_correct}
            state.logged = {name: state.logged.get(name, 0) + value for name, value in one.items()}
        trainer = self.parts.config.trainer
        is_due = result is None or state.step % trainer.logging_steps == 0 or state.step == self.max_steps
        if self.window and (is_due or self.parts.config.debug):
            self._write(state)
        if result is not None:
            self.out.step(result.loss, self.last_rate)

    def _write(self, state: TrainState) -> None:
        (window, self.window), (sums, state.logged) = (self.window, []), (state.logged, {})
        trainer, seconds = self.parts.config.trainer, self.stopwatch.lap()
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
        if trainer.log_grad_norm:
            row["grad_norm"] = window[-1].grad_norm
        if trainer.log_weight_norms:
            row["weight_norm"] = weight_norm(self.parts.model)
        if trainer.log_train_accuracy:
            row["accuracy"] = sums["correct"] / max(1, sums["targets"])
        row |= self.parts.log_metrics() | clip_metrics([one.clip for one in window if one.clip is not None])
        self.out.write(row)
        if not self.out.has_bar or self.parts.config.debug:
            left = (self.max_steps - state.step) * step_seconds / len(window)
            extras = "".join(f"  {name} {row[name]:.3f}" for name in LOGGED if name in row)
            if row.get("qk_clipped_heads"):
                extras += f"  largest logit {row['qk_max_logit']:.1f}, {row['qk_clipped_heads']} heads clipped"
            self.out.line(
                f"step {state.step:,}/{self.max_steps:,}  loss {loss:.4f}  lr {row['lr']:.2e}{extras}  "
                f"{self.last_rate:,.0f} tokens/s  {duration(left)} left"
            )


@torch.no_grad()
def weight_norm(model: nn.Module) -> float:
    """Euclidean norm of all weights."""
    return float(total_norm(model.parameters()))


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
