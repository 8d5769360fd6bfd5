"""What a run says of itself: what runs and why at the start, the log of its steps, where things are at the end.

Trackers (Weights & Biases, TensorBoard, trackio, MLflow, ...) run through Accelerate's adapters. They and Accelerate are the
extra `trackers`, of which nothing is imported unless a tracker is asked for.
"""

import json
import math
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neobert.config.explain import plain_json
from neobert.config.schema import Config, known_keys
from neobert.errors import ConfigError, Problem, UserError
from neobert.files import write_text
from neobert.optim.qk_clip import clip_metrics, stack_reports
from neobert.ranks import Ranks
from neobert.training.loop import Setup, StepResult, TrainState, read
from neobert.training.metrics import Outputs, Stopwatch, duration
from neobert.training.parts import Finished, Parts
from neobert.training.run_folder import OpenRun
from neobert.training.runtime import total_norm

INSTALL = "pip install 'neobert[trackers]'"
LOGGED = ("grad_norm", "weight_norm", "accuracy", "alignment", "uniformity")  # printed where they are known


def print_summary(facts: dict[str, Any], notes: list[str], folder: Path) -> None:
    """One block at the start: what runs, on what, and why."""
    for note in notes:
        print(f"note: {note}")
    for name, value in {**facts, "output": str(folder)}.items():
        for number, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{'' if number else name:<15} {line}")
    print(flush=True)


@dataclass
class Log:
    """Sums of the steps since the last line, and the line. The loss is summed in the state, which is saved."""

    parts: Parts
    setup: Setup
    out: Outputs
    max_steps: int
    window: list[StepResult] = field(default_factory=list)  # of this process
    last_rate: float | None = None
    open_line: Callable[[], None] | None = None  # of a step whose numbers may still be computed

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Write the line of this step where one is due; where the runtime reads late, when the next step has been started, so
        that the device never has nothing to do.
        """
        self.flush()
        if result is not None:
            self.window.append(result)
        trainer, is_last = self.parts.config.trainer, result is None or state.step == self.max_steps
        if self.window and (is_last or state.step % trainer.logging_steps == 0 or self.parts.config.debug):
            self._begin(state)
            if is_last or not self.setup.runtime.reads_late:
                self.flush()
        if result is not None:
            self.out.step(result.loss, self.last_rate)

    def flush(self) -> None:
        """Write the line that is open."""
        write, self.open_line = self.open_line, None
        if write is not None:
            write()

    def _begin(self, state: TrainState) -> None:
        """Take down what a line says of this moment."""
        window, self.window = self.window, []
        metrics = self.parts.log_metrics()
        if self.parts.config.trainer.log_weight_norms:
            metrics = {"weight_norm": total_norm(self.parts.model.parameters()), **metrics}
        clips = stack_reports([one.clip for one in window if one.clip is not None])
        now = {"step": state.step, "epoch": state.epoch, "num_tokens": state.num_tokens}
        self.open_line = partial(self._write, state, window, metrics, clips, now)

    def _write(
        self,
        state: TrainState,
        window: list[StepResult],
        metrics: dict[str, Tensor],
        clips: Tensor,
        now: dict[str, int],
    ) -> None:
        more = [*metrics.values(), *([clips] if len(clips) else [])]
        found, trainer = read(self.setup, state, *more, until=now["step"]), self.parts.config.trainer
        values = {name: value for name, (value,) in zip(metrics, found, strict=False) if math.isfinite(value)}
        sums, state.logged, seconds = state.logged, {}, self.setup.stopwatch.lap()
        step_seconds = seconds["data"] + seconds["compute"] + seconds["optimizer"]
        loss = sums["loss"] / max(1, sums["targets"])
        self.last_rate = sum(one.num_tokens for one in window) / max(step_seconds, 1e-9)
        row: dict[str, Any] = {
            "kind": "train",
            **now,
            "loss": loss,
            "lr": window[-1].lr,
            "tokens_per_second": self.last_rate,
            "step_seconds": step_seconds / len(window),
            **{f"{name}_seconds": value for name, value in seconds.items()},
        }
        if trainer.log_grad_norm:
            row["grad_norm"] = window[-1].grad_norm
        if trainer.log_train_accuracy:
            row["accuracy"] = sums["correct"] / max(1, sums["targets"])
        row |= values
        if len(clips):
            row |= clip_metrics(torch.tensor(found[-1], dtype=torch.float64).view(clips.shape))
        self.out.write(row)
        if not self.out.has_bar or self.parts.config.debug:
            left = (self.max_steps - now["step"]) * step_seconds / len(window)
            extras = "".join(f"  {name} {row[name]:.3f}" for name in LOGGED if name in row)
            if row.get("qk_clipped_heads"):
                extras += f"  largest logit {row['qk_max_logit']:.1f}, {row['qk_clipped_heads']} heads clipped"
            self.out.line(
                f"step {now['step']:,}/{self.max_steps:,}  loss {loss:.4f}  lr {row['lr']:.2e}{extras}  "
                f"{self.last_rate:,.0f} tokens/s  {duration(left)} left"
            )


def print_end(
    finished: Finished, stopwatch: Stopwatch, num_steps: int, last_saved: int, notes: list[str], next_command: str
) -> None:
    """Where things are and what to type next; `{checkpoint}` in `next_command` is the one that the run ended with."""
    state, folder, seconds = finished.state, finished.folder, stopwatch.total_seconds
    trained = sum(seconds[name] for name in ("data", "compute", "optimizer"))
    print()
    if state.stop_reason:
        print(f"stopped at step {state.step:,}: {state.stop_reason}")
    print(
        f"trained {state.step:,} steps, {state.num_tokens:,} tokens; this time {duration(trained)} of training, "
        f"{duration(seconds['evaluate'])} of evaluation, {duration(seconds['save'])} of saving"
    )
    print(f"waiting for data: {stopwatch.data_fraction:.2%} of the step time")
    for note in notes:
        print(note)
    is_last = finished.step == state.step
    checkpoint = folder / "checkpoints" / str(last_saved if is_last else finished.step)
    if last_saved >= 0:
        best = f" (best: step {state.best_step:,})" if state.best_step is not None else ""
        best = best if is_last else f" (the best; the last is step {last_saved:,}, where resuming goes on)"
        print(f"checkpoint  {checkpoint}{best}")
    print(f"metrics     {folder / 'metrics.jsonl'}")
    print(f"report      {folder / 'report.html'}")
    if last_saved >= 0:
        commands = [next_command.format(checkpoint=checkpoint)] if next_command else []
        if state.step < num_steps:
            commands.append(f"neobert run {folder / 'config.yaml'} --trainer.resume_from_checkpoint latest")
        for number, command in enumerate(commands):
            print(f"{'' if number else 'next':<11} {command}")


# --- metrics and trackers -----------


def open_outputs(config: Config, opened: OpenRun, ranks: Ranks, step: int, max_steps: int) -> Outputs:
    """Where a run reports from `step` on: metrics.jsonl, the trackers that `trainer.report_to` and `wandb.enabled` ask for, and
    the console; nowhere in other processes than the main one. Raises ConfigError and UserError for trackers that cannot start.
    """
    if not ranks.is_main:
        return Outputs(Path(os.devnull), [], 0, max_steps, False)
    names = list(dict.fromkeys([*config.trainer.report_to, *(["wandb"] if config.wandb.enabled else [])]))
    trackers = build_trackers(names, config, opened) if names else []
    return Outputs(opened.folder / "metrics.jsonl", trackers, step, max_steps, not config.trainer.disable_tqdm)


def build_trackers(names: list[str], config: Config, opened: OpenRun) -> list[Any]:
    """Start trackers and give each the flat configuration. Raises ConfigError for a name that no adapter has, UserError for one
    that is not installed or cannot start.
    """
    try:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError:
        raise UserError(f"trainer.report_to: trackers need the extra: {INSTALL}") from None
    PartialState()  # the adapters ask it whether they are on the main process
    flat = {key: plain_json(config.value_of(key)) for key in known_keys() if "muon_config." not in key}
    trackers = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(Problem("trainer.report_to", f"no tracker {name!r}; there are: {known}"))
        kind = LOGGER_TYPE_TO_CLASS[name]
        directory = {"logging_dir": str(opened.folder / "trackers")} if kind.requires_logging_directory else {}
        failures: tuple[type[Exception], ...] = (OSError, RuntimeError)
        try:
            if name == "wandb":
                import wandb

                failures += (wandb.errors.Error,)
                directory |= wandb_arguments(config, opened)
            tracker = kind(config.wandb.project, **directory)
            tracker.start()
        except ImportError:
            raise UserError(f"{name} is not installed: {INSTALL}") from None
        except failures as error:
            raise UserError(f"{name} cannot start: {str(error).splitlines()[0]}") from None
        tracker.store_init_configuration(dict(flat))
        trackers.append(tracker)
    return trackers


def wandb_arguments(config: Config, opened: OpenRun) -> dict[str, Any]:
    """Those of `wandb.init`. The id is the one used before where the run goes on, else a new one, which is written down."""
    settings, path = config.wandb, opened.folder / "wandb.json"
    Path(settings.dir).mkdir(parents=True, exist_ok=True)
    if opened.goes_on and settings.resume != "never" and path.is_file():
        identifier = str(json.loads(path.read_text())["id"])
    else:
        identifier = secrets.token_hex(4)
        write_text(path, json.dumps({"id": identifier}) + "\n")
    return {**settings.model_dump(include={"entity", "name", "tags", "mode", "dir", "resume"}), "id": identifier}
