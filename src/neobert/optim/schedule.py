"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warmup from 0, then a decay to `floor` at `decay_end`, then the floor. Steps count from 0."""

    name: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    decay_end: int
    floor: float = 0.0  # ratio of the peak
    num_cycles: float = 0.5


def lr_scale(step: int, schedule: Schedule) -> float:
    """Ratio of the peak learning rate for the update number `step` (the first is 0)."""
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    if step >= schedule.decay_end:
        return schedule.floor
    progress = (step - schedule.warmup_steps) / max(1, schedule.decay_end - schedule.warmup_steps)
    if schedule.name == "linear":
        return 1.0 - (1.0 - schedule.floor) * progress
    wave = 0.5 * (1.0 + math.cos(math.pi * 2.0 * schedule.num_cycles * progress))
    return schedule.floor + (1.0 - schedule.floor) * wave


def build_schedule(
    name: Literal["cosine", "linear", "constant"],
    num_steps: int,
    *,
    warmup_steps: int,
    warmup_percent: float | None,
    total_steps: int | None,
    decay_steps: int | None,
    decay_percent: float | None,
    final_lr_ratio: float,
    num_cycles: float,
) -> Schedule:
    """The schedule of a run of `num_steps`. Percentages are of `total_steps` and win over absolute steps.

    A warmup longer than the run is allowed: the rate then never gets to its peak. Raises ValueError when a decay that was
    asked for ends before the warmup does.
    """
    total = total_steps or num_steps
    warmup = round(total * warmup_percent / 100) if warmup_percent is not None else warmup_steps
    end = round(total * decay_percent / 100) if decay_percent is not None else decay_steps or total
    if warmup >= end and (decay_steps or decay_percent):
        raise ValueError(f"the decay ends at step {end}, before the warmup of {warmup} steps is over; lower the warmup")
    return Schedule(name, warmup, end, final_lr_ratio, num_cycles)
