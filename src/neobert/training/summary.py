"""What a run says of itself: what runs and why at the start, metrics and trackers, where things are at the end."""

import os
from pathlib import Path
from typing import Any

from neobert.config.explain import plain_json, show_config
from neobert.config.schema import Config, known_keys
from neobert.ranks import Ranks
from neobert.training.hooks import Outputs
from neobert.training.loop import TrainState
from neobert.training.metrics import Console, Sinks, Stopwatch, build_trackers, duration, wandb_run_id
from neobert.training.run_folder import OpenRun


def print_configuration(config: Config, origins: dict[str, str]) -> None:
    """`debug: true`: all keys with their values, those that the task filled in too, and where each was set."""
    if config.debug:
        print(show_config(config, origins))


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


def open_outputs(config: Config, opened: OpenRun, ranks: Ranks, step: int, max_steps: int) -> Outputs:
    """Where a run reports from `step` on: metrics.jsonl, the trackers that `trainer.report_to` and `wandb.enabled` ask for, and
    the console; nowhere in other processes than the main one.
    """
    console = Console(max_steps, step, ranks.is_main and not config.trainer.disable_tqdm)
    if not ranks.is_main:
        return Outputs(Sinks(Path(os.devnull), 0, []), console)
    names = list(dict.fromkeys([*config.trainer.report_to, *(["wandb"] if config.wandb.enabled else [])]))
    wandb = config.wandb.model_dump(include={"entity", "name", "tags", "mode", "dir", "resume"})
    if "wandb" in names:
        Path(config.wandb.dir).mkdir(parents=True, exist_ok=True)
        wandb["id"] = wandb_run_id(opened.folder, opened.goes_on and config.wandb.resume != "never")
    flat = {key: plain_json(config.value_of(key)) for key in known_keys() if "muon_config." not in key}
    trackers = build_trackers(names, config.wandb.project, opened.folder / "trackers", flat, wandb)
    return Outputs(Sinks(opened.folder / "metrics.jsonl", step, trackers), console)
