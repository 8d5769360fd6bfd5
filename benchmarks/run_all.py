"""Run benchmarks, all or those that are named, and put what they printed into RESULTS.md; the other sections stay.

Every section says of which commit and which machine it is. `--quick` is passed on.

    python benchmarks/run_all.py                      all
    python benchmarks/run_all.py attention --quick    one
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "RESULTS.md"


def main() -> None:
    flags = [word for word in sys.argv[1:] if word.startswith("-")]
    wanted = {word.removesuffix(".py") for word in sys.argv[1:]} - set(flags)
    names = [
        path.stem
        for path in sorted(HERE.glob("*.py"))
        if not path.name.startswith("_") and path.stem not in ("run_all", "gpu")
    ]
    if unknown := wanted - set(names):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    failed = False
    for name in names:
        if wanted and name not in wanted:
            continue
        print(f"== {name}.py", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        print(result.stdout + result.stderr[-2000:], flush=True)
        failed |= result.returncode != 0
        write_section(f"{name}.py", result.stdout)
    sys.exit(failed)


def write_section(title: str, printed: str) -> None:
    """Put a section in its place among the others."""
    text = PAGE.read_text() if PAGE.is_file() else "# Benchmark results\n"
    head, *rest = re.split(r"^## ", text, flags=re.M)
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in rest}
    sections[title] = f"{where()}\n\n```\n{printed.rstrip()}\n```"
    PAGE.write_text(head + "\n\n".join(f"## {name}\n\n{sections[name]}" for name in sorted(sections)) + "\n")


def where() -> str:
    """Commit, day, machine and versions of a section."""
    git = ["git", "-C", str(HERE.parent)] if shutil.which("git") else ["false"]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "diff", "--quiet", "HEAD", "--", "src"], capture_output=True, check=False
    ).returncode
    import torch

    amx = "with" if torch.cpu._is_amx_tile_supported() else "without"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores {amx} AMX"
    return f"Commit {commit or 'unknown'}{' and changes' if commit and changed else ''}, {date.today()}, {machine}, {packages}."


if __name__ == "__main__":
    main()
