"""What a run says of itself on the console: what runs and why at the start, where things are at the end."""

import math
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.optim.schedule import Schedule
from neobert.tasks.pretraining.data import PretrainingData
from neobert.training.length import Length
from neobert.training.loop import TrainState
from neobert.training.metrics import Stopwatch, duration
from neobert.training.runtime import Runtime


def describe_run(
    config: Config,
    model: NeoBERTForMaskedLM,
    runtime: Runtime,
    data: PretrainingData,
    length: Length,
    schedule: Schedule,
    lines: dict[str, str],
) -> dict[str, Any]:
    """What runs, as it was derived from the configuration and the machine; `lines` are those of its parts."""
    trainer, m = config.trainer, model.config
    num_parameters = sum(p.numel() for p in model.parameters())
    in_vocabulary = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    row_length = data.row_length
    rows = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * runtime.world_size
    norm = "nGPT" if m.ngpt else "RMSNorm" if m.rms_norm else "LayerNorm"
    kinds = f"{'RoPE' if m.rope else 'learned positions'}, {norm}, {m.hidden_act}"
    shape = f"{m.num_hidden_layers} layers x {m.hidden_size} wide x {m.num_attention_heads} heads"
    begin, end = round(schedule.decay_start + length.shift), round(schedule.decay_end + length.shift)
    decay = f"peak until {begin:,}, " if schedule.name == "wsd" else ""
    span = f"warmup {schedule.warmup_steps:,}, {decay}floor from step {end:,}"
    epochs = f"{trainer.num_train_epochs} epochs are " if trainer.max_steps < 0 else ""
    masks = "all [MASK]" if config.datacollator.mask_all else "80/10/10"
    return {
        "model": f"{shape}, {kinds}",
        "parameters": f"{num_parameters:,} ({num_parameters - in_vocabulary:,} without embeddings and decoder)",
        "vocabulary": f"{m.vocab_size:,} tokens, {config.tokenizer.path or config.tokenizer.name}",
        "data": data.describe,
        "masking": f"{_rates(config)} of the tokens, {masks}",
        "step": f"{rows} rows x {row_length} = {rows * row_length:,} tokens"
        + (
            f" in {trainer.gradient_accumulation_steps} microbatches" if trainer.gradient_accumulation_steps > 1 else ""
        ),
        "run": f"{epochs}{length.num_steps:,} steps, {length.num_steps * rows * row_length:,} tokens",
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {schedule.name}, {span}",
        "device": runtime.describe,
        "processes": runtime.describe_engine,
        **lines,
        "loss": "logits at masked positions only" if trainer.masked_logits_only_loss else "logits at all positions",
        "ln(vocabulary)": f"{math.log(m.vocab_size):.3f}, the loss of a uniform guess",
    }


def _rates(config: Config) -> str:
    first, last = config.datacollator.mlm_probability, config.datacollator.mlm_probability_final
    return f"{first:.0%}" if last is None else f"{first:.0%}, linearly to {last:.0%} at the end,"


def print_summary(facts: dict[str, Any], notes: list[str], folder: Path) -> None:
    """One block at the start: what runs, on what, and why."""
    for note in notes:
        print(f"note: {note}")
    for name, value in {**facts, "output": str(folder)}.items():
        lines = value if isinstance(value, list) else [value]
        print(f"{name:<15} {lines[0]}")
        for line in lines[1:]:
            print(f"{'':<15} {line}")
    print(flush=True)


def print_end(
    state: TrainState,
    num_steps: int,
    folder: Path,
    stopwatch: Stopwatch,
    last_saved: int,
    best_loaded: int | None,
    notes: list[str],
    next_command: str,
) -> None:
    """Where things are and what to type next; `{checkpoint}` in `next_command` is the one that the run ended with."""
    seconds = stopwatch.total_seconds
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
    last = folder / "checkpoints" / str(last_saved if best_loaded is None else best_loaded)
    if last_saved >= 0:
        best = f" (best: step {state.best_step:,})" if state.best_step is not None else ""
        best = best if best_loaded is None else f" (the best; the last is step {last_saved:,}, where resuming goes on)"
        print(f"checkpoint  {last}{best}")
    print(f"metrics     {folder / 'metrics.jsonl'}")
    print(f"report      {folder / 'report.html'}")
    if last_saved >= 0:
        commands = [next_command.format(checkpoint=last)] if next_command else []
        if state.step < num_steps:
            commands.append(f"neobert run {folder / 'config.yaml'} --trainer.resume_from_checkpoint latest")
        for number, command in enumerate(commands):
            print(f"{'' if number else 'next':<11} {command}")
