"""Shared by the benchmarks: subprocesses, medians, tables, and the closing line of a bar."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "examples/quickstart/text"
TOKENIZER = ROOT / "examples/quickstart/tokenizer"
QUICKSTART = ROOT / "configs/pretraining/quickstart.yaml"

_missed: list[str] = []


def arguments(description: str | None, **more: dict) -> argparse.Namespace:
    """The command line every benchmark has (`--quick`), and its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, noisier")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def run(command: Iterable[object], **environment: str) -> str:
    """Run a command offline and return what it printed; its errors end the benchmark."""
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr[-2000:]}")
    return result.stdout


def neobert(*words: object) -> list[object]:
    """The command line of our own command, in this environment."""
    return [sys.executable, "-m", "neobert", *words]


@contextmanager
def weights_or_own(weights: str | None, quick: bool) -> Iterator[str]:
    """The run's folder that was named, or that of a small encoder which is trained for a minute."""
    if weights is not None:
        yield weights
        return
    with tempfile.TemporaryDirectory() as folder:
        run(
            neobert("pretrain", QUICKSTART, f"trainer.output_dir={folder}", f"trainer.max_steps={40 if quick else 300}")
        )
        yield folder


def alternate(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Medians of measurements that are taken in turn, so that a machine that drifts slows all of them."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, measure in runs.items():
            measured[name].append(measure())
    return {name: statistics.median(values) for name, values in measured.items()}


def table(rows: list[tuple[str, ...]]) -> None:
    """Columns, left-aligned, first row as heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def bar(name: str, figure: float, want: float, at_most: bool = False) -> None:
    """The closing line of one bar."""
    met = figure <= want if at_most else figure >= want
    print(f"bar {name} figure={figure:.4g} want{'<=' if at_most else '>='}{want:g} {'ok' if met else 'SHORT'}")
    if not met:
        _missed.append(name)


def finish() -> None:
    """Exit status 1 when a bar was missed."""
    sys.exit(1 if _missed else 0)
