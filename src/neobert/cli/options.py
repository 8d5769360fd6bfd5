"""Arguments and options that several commands take: the configuration file with its overrides, and texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

if TYPE_CHECKING:
    from neobert.config.load import Loaded

OVERRIDES = "[--SECTION.KEY VALUE]..."
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
TEXT_HELP = ".txt, .jsonl, .json, .csv, .tsv (.gz, .zst), .parquet or .arrow files, folders or globs."
TextColumn = Annotated[str | None, Option(help="Column with the text, if there are several.")]
ConfigFile = Annotated[Path, Argument(metavar="CONFIG", help="YAML file; every key: neobert config keys.")]


def layers(first: Path, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(YAML files, overrides): files that directly follow the first one are laid over it."""
    count = 0
    while count < len(arguments) and arguments[count].endswith((".yaml", ".yml")) and arguments[count][0] != "-":
        count += 1
    return [str(first), *arguments[:count]], arguments[count:]


def load(first: Path, arguments: list[str], task: str | None = None) -> "Loaded":
    """The configuration that a command line gives, of `task` where that is not None. Raises ConfigError."""
    from neobert.config.load import load_config

    return load_config(*layers(first, arguments), task)
