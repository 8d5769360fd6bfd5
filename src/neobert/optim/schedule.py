"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "constant", "wsd", "polynomial", "inverse_sqrt"]


@dataclass(frozen=True)
class Schedule:
    """Linear warmup from 0, then a fall to `floor` at `decay_end`, then the floor. Steps count from 0."""

    name: Shape
    warmup_steps: int
    decay_end: int
    floor: float = 0.0  # ratio of the peak
    num_cycles: float = 0.5  # cosine
    power: float = 2.0  # polynomial
    decay_start: int = 0  # wsd: until here the rate stays at the peak


def lr_scale(step: float, schedule: Schedule) -> float:
    """Ratio of the peak learning rate for update `step` (the first is 0; fractions where a run had steps of another size)."""
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    if step >= schedule.decay_end:
        return schedule.floor
    if schedule.name == "inverse_sqrt":
        return max(schedule.floor, math.sqrt((schedule.warmup_steps + 1) / (step + 1)))
    return schedule.floor + (1.0 - schedule.floor) * _height(step, schedule)


def _height(step: float, schedule: Schedule) -> float:
    """From 1 at the peak to 0 at the floor."""
    start = max(schedule.warmup_steps, schedule.decay_start if schedule.name == "wsd" else 0)
    progress = max(0, step - start) / max(1, schedule.decay_end - start)
    match schedule.name:
        case "polynomial":
            return (1.0 - progress) ** schedule.power
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * 2.0 * schedule.num_cycles * progress))
        case _:  # linear, and the last phase of wsd
            return 1.0 - progress


@dataclass(frozen=True)
class ScheduleSettings:
    """The YAML's `scheduler` section. Percentages are of `total_steps` (None: of the run) and win over absolute steps."""

    name: Shape
    warmup_steps: int = 0
    warmup_percent: float | None = None
    total_steps: int | None = None
    decay_steps: int | None = None
    decay_percent: float | None = None
    final_lr_ratio: float = 0.0
    num_cycles: float = 0.5
    power: float = 2.0
    wsd_decay_percent: float = 20.0


def build_schedule(s: ScheduleSettings, num_steps: int) -> Schedule:
    """The schedule of a run of `num_steps`, which may end before its warmup does.

    Raises ValueError when a decay that was asked for ends before the warmup does.
    """
    total = s.total_steps or num_steps
    warmup = round(total * s.warmup_percent / 100) if s.warmup_percent is not None else s.warmup_steps
    end = round(total * s.decay_percent / 100) if s.decay_percent is not None else s.decay_steps or total
    if warmup >= end and (s.decay_steps or s.decay_percent):
        raise ValueError(f"the decay ends at step {end}, before the warmup of {warmup} steps is over; lower the warmup")
    start = max(warmup, end - round(total * s.wsd_decay_percent / 100)) if s.name == "wsd" else 0
    return Schedule(s.name, warmup, end, s.final_lr_ratio, s.num_cycles, s.power, start)
