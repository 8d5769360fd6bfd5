"""The one training loop. Tasks differ in model, batches and hooks, never here.

A step fetches all its microbatches first and counts their targets; every microbatch's loss *sum* is then divided by that one
number: accumulation, packing and data parallelism are exact by construction. With the counts the processes exchange what they
have to agree on before they compute together: how many microbatches the step has (a process whose data is exhausted adds
empty ones), which epoch all have reached, and whether one could not read its data; then all raise that error.
"""

import itertools
import math
import random
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from neobert.data.batch import Batch
from neobert.errors import DataError, UserError
from neobert.optim.qk_clip import ClipReport, QKClip
from neobert.training.metrics import Stopwatch
from neobert.training.runtime import Runtime


@dataclass
class StepResult:
    """One optimizer step, over all processes. `loss` is the mean over `num_targets`, `clip` the report of the QK-clip."""

    loss: float
    num_targets: int
    num_tokens: int
    num_correct: int
    lr: float
    grad_norm: float
    clip: ClipReport | None = None
    is_interrupted: bool = False  # in some process: the interrupt has to be acted on


@dataclass
class TrainState:
    """How far a run has come, the same in all processes. All but the last two is saved; `position` is, with the data."""

    step: int = 0
    epoch: int = 0  # that all shards of all processes have reached
    num_tokens: int = 0
    num_rows: int = 0  # that the steps asked for, of all processes, whether there were as many or not
    best_metric: float | None = None
    best_step: int | None = None
    num_evaluations_without_gain: int = 0
    is_evaluation_open: bool = False  # the evaluation of this step was broken off
    logged: dict[str, float] = field(default_factory=dict)  # sums since the last logged step; replaced, never changed
    stop_reason: str | None = None
    position: Any = field(default=None, compare=False)  # of the data, after the last whole step

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("stop_reason", "position")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, default in self.state_dict().items():
            setattr(self, name, state.get(name, default))


Hook = Callable[[TrainState, StepResult | None], None]  # None: no step was made, the data has ended


class Interrupt:
    """What may end a run from outside, at any moment and in any process: signals, and the failure of a write. Every process
    says whether it is `wanted`; all act on it at the same step, or they would wait for each other forever.
    """

    def __init__(self) -> None:
        self.has_started = False  # before, there is nothing to save; then a signal is acted on after the step
        self.signal = 0  # number of the signal that this process, and after `act` some process, received
        self.is_updating = False  # an update has begun: weights are those of no step
        self.failure: Callable[[], UserError | None] = lambda: None  # of this process

    @property
    def wanted(self) -> bool:
        return self.signal != 0 or self.failure() is not None

    def act(self, state: "TrainState", runtime: Runtime) -> None:
        """Stop after this step, or raise the UserError of the first process that has one. All call it when one wants it."""
        failure = self.failure()
        self.signal, failed = map(int, runtime.all_max(self.signal, failure is not None))
        if self.signal:
            state.stop_reason = f"received {signal.Signals(self.signal).name}"
        if failed:
            raise runtime.first_error(failure)


@dataclass(frozen=True)
class Setup:
    """What a run trains with. `model` is as it is called; `lr(step)` is the learning rate of an update."""

    model: nn.Module
    optimizer: Optimizer
    runtime: Runtime
    lr: Callable[[int], float]
    seed: int = 0
    gradient_clipping: float | None = None
    model_inputs: dict[str, Any] = field(default_factory=dict)
    after_update: Callable[[], None] = lambda: None  # ends every update (nGPT)
    clip: QKClip | None = None
    interrupt: Interrupt = field(default_factory=Interrupt)
    empty_batch: Callable[[], Batch] | None = None  # for a process whose data ends before that of others
    rows_per_step: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


def train(
    setup: Setup, fetch: Callable[[], Sequence[Batch]], state: TrainState, max_steps: int | None, hooks: Sequence[Hook]
) -> None:
    """Train until `max_steps` (None: the end of the data), or `state.stop_reason`. Hooks run after every step, in order, and
    once more when the data has ended.

    Raises UserError, in all processes, for data that cannot be read and for numbers that are not finite; `state` is then
    that of the last whole step.
    """
    setup.model.train()
    first_step = state.step
    while (max_steps is None or state.step < max_steps) and state.stop_reason is None:
        with setup.stopwatch.phase("data"):
            window = fetch_window(fetch, setup)
        if window is None:
            state.stop_reason = None if max_steps is None else "the data ended"
            for hook in hooks if state.step > first_step else []:
                hook(state, None)
            break
        result = train_step(setup, window, state.step)
        state.step += 1
        state.num_tokens += result.num_tokens
        state.num_rows += setup.rows_per_step
        state.epoch = max(state.epoch, window.epoch)
        if result.is_interrupted:
            setup.interrupt.act(state, setup.runtime)
        for hook in hooks:
            hook(state, result)


@dataclass(frozen=True)
class Window:
    """The microbatches of a step, as many in every process; the number of targets and the epoch are those of all processes."""

    micro: Sequence[Batch]
    num_targets: int
    epoch: int


def fetch_window(fetch: Callable[[], Sequence[Batch]], setup: Setup) -> Window | None:
    """The next window; None when the data of all processes has ended. Raises, in all of them, what `fetch` raised in one."""
    micro, error = list[Batch](), None
    try:
        micro = list(fetch())
    except (UserError, OSError) as failure:
        error = failure if isinstance(failure, UserError) else DataError(f"the data cannot be read: {failure}")
    targets, epoch = sum(batch.num_targets for batch in micro), micro[-1].epoch if micro else 0
    found = setup.runtime.gather(error is not None, len(micro), targets, epoch)
    if any(failed for failed, *_ in found):
        raise setup.runtime.first_error(error)
    count = int(max(number for _, number, _, _ in found))
    if not count:
        return None
    if len(micro) < count:
        assert setup.empty_batch is not None, "all processes have as many microbatches"
        micro += [setup.empty_batch() for _ in range(count - len(micro))]
    num_targets = int(sum(targets for _, _, targets, _ in found))
    return Window(micro, num_targets, int(min(epoch for _, number, _, epoch in found if number)))


def train_step(setup: Setup, window: Window, step: int) -> StepResult:
    """One update from the microbatches of one accumulation window."""
    micro, num_targets = window.micro, max(1, window.num_targets)
    runtime, optimizer, stopwatch = setup.runtime, setup.optimizer, setup.stopwatch
    with stopwatch.phase("compute"):
        *mine, bad = _accumulate(setup, micro, step, num_targets)
        sums = runtime.all_sum(*mine, sum(batch.num_tokens for batch in micro), setup.interrupt.wanted)
        loss_sum, num_correct, num_tokens, num_interrupted = sums
        if not math.isfinite(loss_sum):
            first = len(micro) - int(runtime.all_max(len(micro) - bad)[0])
            _refuse(loss_sum, step, first, optimizer)
    with stopwatch.phase("optimizer"):
        norm = float(runtime.clip(setup.model, setup.gradient_clipping))
        if not math.isfinite(norm):
            _refuse(norm, step, len(micro) - 1, optimizer, what="gradient")
        lr = setup.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        setup.interrupt.is_updating = True
        optimizer.step()
        setup.after_update()
        optimizer.zero_grad(set_to_none=True)
        report = None if setup.clip is None else setup.clip.apply(step + 1)
        setup.interrupt.is_updating = False
    counts = num_targets, int(num_tokens), int(num_correct)
    return StepResult(loss_sum / num_targets, *counts, lr, norm, report, num_interrupted > 0)


def _accumulate(setup: Setup, micro: Sequence[Batch], step: int, num_targets: int) -> tuple[float, int, int]:
    """Forward and backward of all microbatches; (sum of the losses, correct guesses, first microbatch whose loss is bad)."""
    total, num_correct, bad = 0.0, 0, len(micro)
    model, runtime = setup.model, setup.runtime
    for number, batch in enumerate(micro):
        position = setup.seed, step, number, runtime.rank  # so that randomness depends on it, not on history
        torch.manual_seed(random.Random(repr(position)).getrandbits(63))
        if setup.clip is not None:
            setup.clip.prepare(step + 1, is_last_microbatch=batch is micro[-1])
        with runtime.sync_gradients(model, on=batch is micro[-1]):
            with runtime.autocast():
                output = model(**batch.to(runtime.device).inputs(), **setup.model_inputs)
            runtime.backward(model, output.loss_sum * (runtime.world_size / num_targets))
        loss_sum = float(output.loss_sum.detach())
        if not math.isfinite(loss_sum):
            bad = min(bad, number)
        total += loss_sum
        num_correct += int(output.num_correct)
    return total, num_correct, bad


def _refuse(value: float, step: int, micro: int, optimizer: Optimizer, what: str = "loss") -> NoReturn:
    """Stop before the optimizer writes."""
    optimizer.zero_grad(set_to_none=True)
    raise UserError(
        f"the {what} became {value} at step {step + 1}, microbatch {micro}, whose update was not made; go on from a checkpoint "
        "with a lower optimizer.lr, a longer warmup or trainer.gradient_clipping"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], runtime: Runtime, max_batches: int | None, interrupt: Interrupt
) -> dict[str, float] | None:
    """Loss per target, accuracy and number of targets over a data set; leaves the model in training mode.

    Processes take batches round-robin. None: broken off, since `interrupt` was wanted in some process. Raises, in all
    processes, the UserError of one that could not read its batches.
    """
    model.eval()
    local, is_interrupted = [0.0, 0.0, 0.0], False
    rest = itertools.islice(batches, max_batches)
    while True:
        some, error = list[Batch](), None  # one batch for each process; at the end fewer
        try:
            some = list(itertools.islice(rest, runtime.world_size))
        except UserError as failure:
            error = failure
        failed, is_over, is_interrupted = map(bool, runtime.all_max(error is not None, not some, interrupt.wanted))
        if failed:
            raise runtime.first_error(error)
        if is_over or is_interrupted:
            break
        has_one = runtime.rank < len(some)
        batch = some[runtime.rank if has_one else 0]  # all call the model together, or none
        with runtime.autocast():
            output = model(**batch.to(runtime.device).inputs(), masked_only=True, count_correct=True)
        if has_one:
            one = float(output.loss_sum), int(output.num_correct), batch.num_targets
            local = [a + b for a, b in zip(local, one, strict=True)]
    model.train()
    total, num_correct, num_targets = runtime.all_sum(*local)
    if is_interrupted or not num_targets:
        return None if is_interrupted else {}
    return {"loss": total / num_targets, "accuracy": num_correct / num_targets, "num_targets": int(num_targets)}
