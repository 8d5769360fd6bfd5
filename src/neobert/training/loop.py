"""The one training loop. Tasks differ in model, batches and hooks, never here.

A step fetches all its microbatches first and counts their targets; every microbatch's loss *sum* is then divided by that
one number. Accumulation, packing and data parallelism are exact by construction, and the last, short window of an epoch
is too.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from neobert.errors import UserError
from neobert.training.metrics import Stopwatch
from neobert.training.runtime import Runtime, seed_everything


class MicroBatch(Protocol):
    """What the loop needs to know of a batch."""

    num_targets: int
    num_tokens: int
    epoch: int

    def inputs(self) -> dict[str, Any]: ...

    def to(self, device: torch.device) -> "MicroBatch": ...


class WeightClip(Protocol):
    """Something that watches forward passes and changes weights after the update. Updates count from 1."""

    def prepare(self, update: int, is_last_microbatch: bool) -> None: ...

    def apply(self, update: int) -> Any: ...


@dataclass
class StepResult:
    """One optimizer step. `loss` is the mean over `num_targets`; `grad_norm` is None where nobody asked for it, `clip` is
    what the weight clip reported.
    """

    loss: float
    num_targets: int
    num_tokens: int
    num_correct: int
    lr: float
    grad_norm: float | None
    clip: Any = None


@dataclass
class TrainState:
    """Where a run is. All of it is saved; nothing else has to be."""

    step: int = 0
    epoch: int = 0
    num_tokens: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    num_evaluations_without_gain: int = 0
    stop_reason: str | None = field(default=None, metadata={"saved": False})

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "stop_reason"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


Hook = Callable[[TrainState, StepResult], None]


@dataclass(frozen=True)
class StepSettings:
    """The numbers a step depends on. `lr(step)` is the learning rate of an update; `after_update` ends it (nGPT)."""

    seed: int
    lr: Callable[[int], float]
    gradient_clipping: float | None = None
    needs_grad_norm: bool = False
    model_inputs: dict[str, Any] = field(default_factory=dict)
    after_update: Callable[[], None] = lambda: None
    clip: WeightClip | None = None


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fetch: Callable[[], list[MicroBatch]],
    runtime: Runtime,
    settings: StepSettings,
    state: TrainState,
    max_steps: int,
    hooks: Iterable[Hook],
    stopwatch: Stopwatch,
) -> None:
    """Train until `max_steps`, the end of the data, or `state.stop_reason`. Hooks run after every step, in order."""
    model.train()
    while state.step < max_steps and state.stop_reason is None:
        with stopwatch.phase("data"):
            micro = fetch()
        if not micro:
            state.stop_reason = "the data ended"
            break
        result = train_step(model, optimizer, micro, runtime, settings, state.step, stopwatch)
        state.step += 1
        state.num_tokens += result.num_tokens
        state.epoch = micro[-1].epoch
        for hook in hooks:
            hook(state, result)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro: list[MicroBatch],
    runtime: Runtime,
    settings: StepSettings,
    step: int,
    stopwatch: Stopwatch,
) -> StepResult:
    """One update from the microbatches of one accumulation window."""
    num_targets = max(1, runtime.all_sum(sum(batch.num_targets for batch in micro)))
    num_correct, total = 0, 0.0
    with stopwatch.phase("compute"):
        for number, batch in enumerate(micro):
            seed_everything(settings.seed, step, number, runtime.rank)
            if settings.clip is not None:
                settings.clip.prepare(step + 1, is_last_microbatch=batch is micro[-1])
            with runtime.sync_gradients(on=batch is micro[-1]):
                with runtime.autocast():
                    output = model(**batch.to(runtime.device).inputs(), **settings.model_inputs)
                runtime.backward(output.loss_sum * (runtime.world_size / num_targets))
            loss_sum = float(output.loss_sum.detach())
            _check_finite(loss_sum, step, number, optimizer)
            total += loss_sum
            num_correct += int(output.num_correct)
    with stopwatch.phase("optimizer"):
        norm = None
        if settings.gradient_clipping is not None or settings.needs_grad_norm:
            norm = float(runtime.clip(model, settings.gradient_clipping))
            _check_finite(norm, step, len(micro) - 1, optimizer, what="gradient")
        lr = settings.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
        settings.after_update()
        optimizer.zero_grad(set_to_none=True)
        report = None if settings.clip is None else settings.clip.apply(step + 1)
    num_tokens = runtime.all_sum(sum(batch.num_tokens for batch in micro))
    return StepResult(total / num_targets, num_targets, num_tokens, num_correct, lr, norm, report)


def _check_finite(value: float, step: int, micro: int, optimizer: torch.optim.Optimizer, what: str = "loss") -> None:
    """Stop before the optimizer writes."""
    if not math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        raise UserError(
            f"the {what} became {value} at step {step + 1}, microbatch {micro}; the weights were not touched. "
            "Resume from the last checkpoint with a lower optimizer.lr, a longer warmup or trainer.gradient_clipping"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[MicroBatch], runtime: Runtime, max_batches: int | None
) -> dict[str, float]:
    """Loss per target, accuracy and number of targets over a data set; leaves the model in training mode."""
    model.eval()
    total, num_correct, num_targets = 0.0, 0, 0
    for number, batch in enumerate(batches):
        if max_batches is not None and number >= max_batches:
            break
        with runtime.autocast():
            output = model(**batch.to(runtime.device).inputs(), count_correct=True)
        total += float(output.loss_sum)
        num_correct += int(output.num_correct)
        num_targets += batch.num_targets
    model.train()
    if not num_targets:
        return {}
    return {"loss": total / num_targets, "accuracy": num_correct / num_targets, "num_targets": num_targets}
