"""What a run reports while it goes: a step-time breakdown, metrics.jsonl, the console; and tables of the results of several."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neobert.errors import UserError, disk_error, first_line
from neobert.files import write_json, write_text

PHASES = ("data", "compute", "optimizer", "evaluate", "save")


@dataclass
class Stopwatch:
    """Seconds by phase: since `lap()` was last called, and in all."""

    lap_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    total_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.lap_seconds[name] += seconds
            self.total_seconds[name] += seconds

    def lap(self) -> dict[str, float]:
        lap, self.lap_seconds = self.lap_seconds, dict.fromkeys(PHASES, 0.0)
        return lap

    @property
    def data_fraction(self) -> float:
        """Share of the step time that was spent waiting for data."""
        step = sum(self.total_seconds[name] for name in ("data", "compute", "optimizer"))
        return self.total_seconds["data"] / step if step else 0.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Outputs:
    """Where a run reports: metrics.jsonl at `path`, one JSON object a line, written at once; every tracker; lines on stdout
    and, on a terminal, a progress bar on stderr below them. Records after `step`, where the run starts, are removed.
    """

    def __init__(self, path: Path, trackers: list[Any], step: int, num_steps: int, show_bar: bool):
        self.path, self.trackers = path, trackers
        self.failure: UserError | None = None  # of a write; all processes of a run end together on it
        if path.is_file():
            kept = [record for record in read_metrics(path) if record.get("step", 0) <= step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        look: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.05, "leave": False}
        # `disable` None: a bar on a terminal only
        self._bar = tqdm(total=num_steps, initial=step, file=sys.stderr, disable=None if show_bar else True, **look)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl; trackers get its numbers as `<kind>/<name>` at its step."""
        kind, step, rest = record["kind"], record["step"], (json.dumps(record) + "\n").encode()
        numbers = {f"{kind}/{name}": value for name, value in record.items() if isinstance(value, int | float)}
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            for tracker in self.trackers:
                tracker.log(numbers, step=step)
        except OSError as error:
            self.failure = disk_error(error, self.path) or UserError(f"{self.path}: {first_line(error)}")

    @property
    def has_bar(self) -> bool:
        return not self._bar.disable

    def line(self, text: str) -> None:
        """Print a line."""
        if self.has_bar:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step(self, loss: float, tokens_per_second: float | None) -> None:
        """Move the bar by one step; the loss of a step that is not read yet is NaN."""
        if tokens_per_second is not None and not math.isnan(loss):
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        for tracker in self.trackers:
            tracker.finish()


def perplexity(loss: float) -> float:
    """e^loss, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def write_table(folder: Path, name: str, summary: dict[str, Any], markdown: list[str]) -> str:
    """Write the results of several runs as `<name>.json` and `<name>.md`; returns the line that names both files."""
    table, data = folder / f"{name}.md", folder / f"{name}.json"
    write_json(data, summary)
    write_text(table, "\n".join(markdown).rstrip("\n") + "\n")
    return f"table       {table}, {data}"


def duration(seconds: float) -> str:
    """`3 s`, `4 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
