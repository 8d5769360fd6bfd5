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
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neobert.data.batch import Batch, Loader
from neobert.errors import DataError, UserError
from neobert.model.unpadding import unpad
from neobert.optim.qk_clip import ClipReport, QKClip
from neobert.training.metrics import Stopwatch
from neobert.training.runtime import Runtime


@dataclass
class StepResult:
    """One optimizer step, over all processes. `loss`, the mean over `num_targets`, and what else the device computed are not
    known before `read`; `clip` is the report of the QK-clip.
    """

    step: int
    num_targets: int
    num_tokens: int
    lr: float
    values: Tensor  # float64: sum of the losses, targets that were the likeliest token, norm of the gradient
    losses: list[Tensor]  # of the microbatches of this process
    clip: ClipReport | None = None
    loss: float = math.nan
    num_correct: int = 0
    grad_norm: float = math.nan

    def fill_in(self, values: Sequence[float]) -> None:
        loss_sum, num_correct, self.grad_norm = values
        self.loss, self.num_correct = loss_sum / self.num_targets, int(num_correct)


@dataclass
class TrainState:
    """How far a run has come, the same in all processes. All but the last three is saved; `position` is, with the data."""

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
    unread: list[tuple[StepResult, dict[str, Any]]] = field(default_factory=list)  # each with the state before it

    def state_dict(self) -> dict[str, Any]:
        left_out = ("stop_reason", "position", "unread")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

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
        before = {name: value for name, value in state.__dict__.items() if name not in ("logged", "unread")}
        result = train_step(setup, window, state.step)
        state.unread.append((result, before))
        state.step += 1
        state.num_tokens += result.num_tokens
        state.num_rows += setup.rows_per_step
        state.epoch = max(state.epoch, window.epoch)
        if not setup.runtime.reads_late:
            read(setup, state)
        if window.is_interrupted or (setup.runtime.world_size == 1 and setup.interrupt.wanted):
            setup.interrupt.act(state, setup.runtime)
        for hook in hooks:
            hook(state, result)


def read(setup: Setup, state: TrainState, *more: Tensor, until: int | None = None) -> list[list[float]]:
    """Bring what the steps since the last call (`until`: up to that step) computed from the device to their results and to
    `state.logged`, and the values of `more` tensors: in one copy, the one wait for the device. All processes call it at the
    same step.

    Raises UserError for a step whose loss or gradient is not finite, which was not made, nor any after it; `state` is then
    that before it.
    """
    unread = [one for one in state.unread if until is None or one[0].step <= until]
    state.unread = state.unread[len(unread) :]
    with setup.stopwatch.phase("compute"):  # where the device is faster than the host, it is waited for here
        found = to_host([*(result.values for result, _ in unread), *more])
    for (result, before), values in zip(unread, found[: len(unread)], strict=True):
        result.fill_in(values)
        if not all(map(math.isfinite, values)):
            state.__dict__.update(before)
            state.unread = []
            refuse(setup, result)
        one = {"loss": values[0], "targets": result.num_targets, "correct": result.num_correct}
        state.logged = {name: state.logged.get(name, 0) + value for name, value in one.items()}
    return found[len(unread) :]


def to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of all tensors, in one copy."""
    if not tensors:
        return []
    flat: list[float] = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).tolist()
    rest = iter(flat)
    return [list(itertools.islice(rest, tensor.numel())) for tensor in tensors]


@dataclass(frozen=True)
class Window:
    """The microbatches of a step, on the device, as many in every process; the numbers and the epoch are those of all
    processes. `is_interrupted`: one of several wants the interrupt to be acted on.
    """

    micro: Sequence[Batch]
    num_targets: int
    num_tokens: int
    epoch: int
    is_interrupted: bool = False


def fetch_window(fetch: Callable[[], Sequence[Batch]], setup: Setup) -> Window | None:
    """The next window; None when the data of all processes has ended. Raises, in all of them, what `fetch` raised in one."""
    micro, error = list[Batch](), None
    try:
        micro = list(fetch())
    except (UserError, OSError) as failure:
        error = failure if isinstance(failure, UserError) else DataError(f"the data cannot be read: {failure}")
    targets, tokens = sum(batch.num_targets for batch in micro), sum(batch.num_tokens for batch in micro)
    epoch, runtime = micro[-1].epoch if micro else 0, setup.runtime
    found = runtime.gather(error is not None, len(micro), targets, tokens, epoch, setup.interrupt.wanted)
    failed, counts, all_targets, all_tokens, epochs, wanted = zip(*found, strict=True)
    if any(failed):
        raise runtime.first_error(error)
    count = int(max(counts))
    if not count:
        return None
    if len(micro) < count:
        assert setup.empty_batch is not None, "all processes have as many microbatches"
        micro = [*micro, *(setup.empty_batch() for _ in range(count - len(micro)))]
    epoch = int(min(epoch for number, epoch in zip(counts, epochs, strict=True) if number))
    is_interrupted = runtime.world_size > 1 and any(wanted)
    micro = [batch.to(runtime.device) for batch in micro]
    return Window(micro, int(sum(all_targets)), int(sum(all_tokens)), epoch, is_interrupted)


def prepare_batches(model: Any, batches: Loader) -> None:
    """Let the loader lay batches out for a model of ours that attends by a kernel of variable lengths: in its threads, so
    that no step asks the device for anything.
    """
    if getattr(model.model, "attention_kernel", "sdpa") == "sdpa":
        return

    def prepare(batch: Batch) -> Batch:
        lengths, pad_id = batch.document_lengths, model.config.pad_token_id
        found = unpad(batch.input_ids, batch.attention_mask, lengths, batch.labels, pad_id)
        laid_out = replace(batch, attention_mask=None, **found)
        return laid_out.pin_memory() if batch.input_ids.is_pinned() else laid_out

    batches.prepare = prepare


def train_step(setup: Setup, window: Window, step: int) -> StepResult:
    """One update from the microbatches of one accumulation window. A loss or gradient that is not finite raises UserError
    before the update; where the runtime reads late, the device leaves out this update and all after it, and `read` raises.
    """
    num_targets = max(1, window.num_targets)
    runtime, optimizer, stopwatch = setup.runtime, setup.optimizer, setup.stopwatch
    with stopwatch.phase("compute"):
        losses, sums = accumulate(setup, window.micro, step, num_targets)
        runtime.sum_on_device(sums)
    with stopwatch.phase("optimizer"):
        norm = runtime.clip(setup.model, setup.gradient_clipping)
        lr = setup.lr(step)
        values = torch.cat([sums, norm.double()[None]])
        result = StepResult(step + 1, num_targets, window.num_tokens, lr, values, losses)
        if runtime.reads_late:
            is_bad, before = (~values.isfinite().all()).float(), getattr(optimizer, "found_inf", None)
            optimizer.found_inf = is_bad if before is None else torch.maximum(before, is_bad)  # type: ignore
        else:
            result.fill_in(numbers := values.tolist())
            if not all(map(math.isfinite, numbers)):
                refuse(setup, result)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        setup.interrupt.is_updating = True
        optimizer.step()
        setup.after_update()
        optimizer.zero_grad(set_to_none=True)
        result.clip = None if setup.clip is None else setup.clip.apply(step + 1, getattr(optimizer, "found_inf", None))
        setup.interrupt.is_updating = False
    return result


def accumulate(setup: Setup, micro: Sequence[Batch], step: int, num_targets: int) -> tuple[list[Tensor], Tensor]:
    """Forward and backward of all microbatches: their losses, and (sum of those, correct guesses) in float64."""
    model, runtime, losses = setup.model, setup.runtime, list[Tensor]()
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for number, batch in enumerate(micro):
        position = setup.seed, step, number, runtime.rank  # so that randomness depends on it, not on history
        torch.manual_seed(random.Random(repr(position)).getrandbits(63))
        if setup.clip is not None:
            setup.clip.prepare(step + 1, is_last_microbatch=batch is micro[-1])
        with runtime.sync_gradients(model, on=batch is micro[-1]):
            with runtime.autocast():
                output = model(**batch.inputs(), **setup.model_inputs)
            runtime.backward(model, output.loss_sum * (runtime.world_size / num_targets))
        losses.append(output.loss_sum.detach())
        sums += torch.stack([losses[-1].double(), output.num_correct.double()])
    return losses, sums


def refuse(setup: Setup, result: StepResult) -> NoReturn:
    """Raise the UserError of a step whose loss or gradient is not finite; the optimizer has not written."""
    setup.optimizer.zero_grad(set_to_none=True)
    what, value, micro = "gradient", result.grad_norm, len(result.losses) - 1
    if not math.isfinite(result.loss):
        bad = [number for number, (loss,) in enumerate(to_host(result.losses)) if not math.isfinite(loss)]
        first = min(bad, default=len(result.losses))
        what, value = "loss", result.loss * result.num_targets
        micro = len(result.losses) - int(setup.runtime.all_max(len(result.losses) - first)[0])
    raise UserError(
        f"the {what} became {value} at step {result.step}, microbatch {micro}, whose update was not made; go on from a "
        "checkpoint with a lower optimizer.lr, a longer warmup or trainer.gradient_clipping"
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
    sums, is_interrupted = torch.zeros(3, dtype=torch.float64, device=runtime.device), False
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
            sums[0] += output.loss_sum
            sums[1] += output.num_correct
            sums[2] += batch.num_targets
    model.train()
    total, num_correct, num_targets = runtime.sum_on_device(sums).tolist()
    if is_interrupted or not num_targets:
        return None if is_interrupted else {}
    return {"loss": total / num_targets, "accuracy": num_correct / num_targets, "num_targets": int(num_targets)}
