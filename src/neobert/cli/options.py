"""What the commands share: the configuration file with its overrides, and the processes that a run is started in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neobert.errors import print_notes

if TYPE_CHECKING:
    from neobert.config.schema import Config

OVERRIDES = "[--SECTION.KEY VALUE]..."
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
TEXT_HELP = ".txt, .jsonl, .json, .csv, .tsv (.gz, .zst), .parquet or .arrow files, folders or globs."
TextColumn = Annotated[str | None, typer.Option(help="Column with the text, if there are several.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; every key: neobert config keys.")]
NumProcesses = Annotated[
    int | None, typer.Option("--nproc", min=1, max=1024, help="Processes on this machine [1, or as launched].")
]


def layers(first: Path, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(YAML files, overrides): files that directly follow the first one are laid over it."""
    count = 0
    while count < len(arguments) and arguments[count].endswith((".yaml", ".yml")) and arguments[count][0] != "-":
        count += 1
    return [str(first), *arguments[:count]], arguments[count:]


def start_processes(config: "Config", nproc: int | None, command: list[str]) -> int | None:
    """Run `neobert <command>` in the processes that `--nproc` or a file of Accelerate ask for, and return its exit code; None
    where this process is to run it. Raises ConfigError.
    """
    if nproc is None and config.accelerate_config_file is None:
        return None
    from neobert.training.launch import launch, plan_launch

    plan, notes = plan_launch(config, nproc)
    print_notes(notes)
    return None if plan is None else launch(command, plan, config.trainer.use_cpu)
