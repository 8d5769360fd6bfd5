"""Arguments and options that several commands take: the configuration file with its overrides, and texts."""

from pathlib import Path
from typing import Annotated

import typer

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
