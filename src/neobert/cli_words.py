"""What the commands share: the configuration file and the words behind it."""

from pathlib import Path
from typing import Annotated

import typer

OVERRIDES = "[--SECTION.KEY VALUE]..."
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; every key: neobert config keys.")]
NumProcesses = Annotated[
    int | None, typer.Option("--nproc", min=1, max=1024, help="Processes on this machine [1, or as launched].")
]


def layers(first: Path, words: list[str]) -> tuple[list[str], list[str]]:
    """(YAML files, overrides): files that directly follow the first one are laid over it."""
    count = 0
    while count < len(words) and words[count].endswith((".yaml", ".yml")) and not words[count].startswith("-"):
        count += 1
    return [str(first), *words[:count]], words[count:]
