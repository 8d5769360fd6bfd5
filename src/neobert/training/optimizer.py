"""The optimizer, the QK-clip and the learning rate of a run, from its configuration."""

from collections.abc import Callable

import torch
from torch import nn

from neobert.checkpoints.layouts import fused_parts
from neobert.config.schema import Config
from neobert.config.sections import MuonConfig, SchedulerConfig
from neobert.errors import ConfigError, Problem
from neobert.optim.build import GroupRule, OptimizerSettings, Schedule, build_optimizer, lr_scale
from neobert.optim.muon import MuonSettings
from neobert.optim.qk_clip import QKClip, QKClipSettings


def build_run_optimizer(config: Config, model: nn.Module, dtype: torch.dtype | None) -> torch.optim.Optimizer:
    """The optimizer with its groups; Muon's products are computed in `dtype`, as the model's are (None: float32).

    Raises ConfigError for patterns that act on nothing, and for a model without matrices for Muon.
    """
    optimizer, muon = config.optimizer, config.optimizer.muon_config or MuonConfig()
    settings = OptimizerSettings(
        optimizer.name,
        lr=optimizer.lr,
        weight_decay=0.0 if config.model.ngpt else optimizer.weight_decay,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        rules=[GroupRule(**group.model_dump()) for group in optimizer.param_groups],
        muon=MuonSettings(
            momentum=muon.muon_beta,
            weight_decay=0.0 if config.model.ngpt else muon.muon_decay,
            nesterov=muon.nesterov,
            method=muon.orthogonalization,
            num_steps=muon.ns_steps,
            dtype=dtype or torch.float32,
            detect_anomalies=muon.detect_anomalies,
        ),
        fused=fused_parts(getattr(model.config, "model_type", "")),
    )
    try:
        return build_optimizer(model.named_parameters(), settings)
    except ValueError as error:
        dotted = "optimizer.param_groups" if "pattern" in str(error) else "optimizer.name"
        raise ConfigError(Problem(dotted, str(error))) from None


def build_clip(config: Config, model: nn.Module) -> tuple[QKClip | None, dict[str, str]]:
    """The QK-clip of a MuonClip run, and its line of the summary (none for other optimizers). Raises ConfigError."""
    if config.optimizer.name != "muonclip":
        return None, {}
    muon = config.optimizer.muon_config or MuonConfig()
    if not muon.enable_clipping:
        return None, {"QK-clip": "off (optimizer.muon_config.enable_clipping: false)"}
    if config.model.ngpt:
        why = "nGPT normalises queries and keys, so their logits are bounded and their rows have no say in it"
        return None, {"QK-clip": f"off: {why}"}
    settings = QKClipSettings(
        threshold=muon.clipping_threshold,
        alpha=muon.clipping_alpha,
        warmup_steps=muon.clipping_warmup_steps,
        interval=muon.clipping_interval,
        chunk_size=muon.clipping_qk_chunk_size,
        last_microbatch_only=muon.capture_last_microbatch_only,
    )
    pad_id = getattr(model.config, "pad_token_id", None)
    clip = QKClip(model, settings, pad_id=pad_id, mapping=muon.clipping_layers_mapping)
    what = "last microbatch" if settings.last_microbatch_only else "all microbatches"
    after = f" after step {settings.warmup_steps:,}" if settings.warmup_steps else ""
    return clip, {"QK-clip": f"logits above {settings.threshold:g}, every {settings.interval} steps{after}, {what}"}


def build_schedule(s: SchedulerConfig, num_steps: int) -> Schedule:
    """The schedule of a run of `num_steps`, which may end before its warmup does. Percentages are of `total_steps` (None: of
    the run) and win over absolute steps. Raises ConfigError when a decay that was asked for ends before the warmup does.
    """
    total = s.total_steps or num_steps
    warmup = round(total * s.warmup_percent / 100) if s.warmup_percent is not None else s.warmup_steps
    end = round(total * s.decay_percent / 100) if s.decay_percent is not None else s.decay_steps or total
    if warmup >= end and (s.decay_steps or s.decay_percent):
        why = f"the decay ends at step {end}, before the warmup of {warmup} steps is over; lower the warmup"
        raise ConfigError(Problem("scheduler", why))
    start = max(warmup, end - round(total * s.wsd_decay_percent / 100)) if s.name == "wsd" else 0
    return Schedule(s.name, warmup, end, s.final_lr_ratio, s.num_cycles, s.power, start)


def plan_learning_rate(config: Config, num_steps: int, shift: float) -> tuple[Callable[[int], float], str, list[str]]:
    """(the learning rate as a function of the step; optimizer and learning rate in a line; messages) of a run of `num_steps`,
    `shift` of which lie before the first one of its schedule. Raises ConfigError.
    """
    settings, schedule_steps = config.optimizer, round(num_steps - shift)
    schedule = build_schedule(config.scheduler, schedule_steps)
    messages = []
    if config.trainer.max_steps != schedule_steps and schedule.warmup_steps >= schedule_steps:
        peak = settings.lr * lr_scale(schedule_steps - 1, schedule)
        messages.append(
            f"the warmup of {schedule.warmup_steps:,} steps is longer than the run: the learning rate gets to {peak:.2g}, "
            f"not {settings.lr:g} (set scheduler.warmup_steps or warmup_percent)"
        )
    start, end = round(schedule.decay_start + shift), round(schedule.decay_end + shift)
    decay = f"peak until {start:,}, " if schedule.name == "wsd" else ""
    span = f"warmup {schedule.warmup_steps:,}, {decay}floor from step {end:,}"
    line = f"{settings.name}, lr {settings.lr:g}, {schedule.name}, {span}"
    return lambda step: settings.lr * lr_scale(step - shift, schedule), line, messages
