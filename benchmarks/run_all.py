"""Run every benchmark and write what they printed to RESULTS.md. `--quick` is passed on."""

import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    pages, failed = [], False
    for path in sorted(HERE.glob("*.py")):
        if path.name.startswith("_") or path.name == Path(__file__).name:
            continue
        print(f"== {path.name}", flush=True)
        result = subprocess.run([sys.executable, str(path), *sys.argv[1:]], capture_output=True, text=True, check=False)
        print(result.stdout + result.stderr[-2000:], flush=True)
        failed |= result.returncode != 0
        pages.append(f"## {path.name}\n\n```\n{result.stdout.rstrip()}\n```\n")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "numpy"))
    head = f"# Benchmark results\n\n{date.today()}, {platform.machine()} with {os.cpu_count()} cores{_amx()}, {packages}.\n"
    (HERE / "RESULTS.md").write_text(head + "\n" + "\n".join(pages))
    sys.exit(failed)


def _amx() -> str:
    import torch

    return ", AMX" if torch.cpu._is_amx_tile_supported() else ""


if __name__ == "__main__":
    main()
