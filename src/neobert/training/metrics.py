"""What a run says while it goes: meters, a step-time breakdown, and two sinks, metrics.jsonl and the console."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neobert.files import write_text

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


class MetricsFile:
    """metrics.jsonl: one JSON object a line, written at once. What lies behind `step`, where the run starts, is cut off."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.is_file():
            kept = [row for row in read_metrics(path) if row.get("step", 0) <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, row: dict[str, Any]) -> None:
        """Raises OSError when the disk is full."""
        rest = (json.dumps(row) + "\n").encode()
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Console:
    """Lines on stdout; on a terminal also a progress bar on stderr, below them."""

    def __init__(self, num_steps: int, start: int, show_bar: bool):
        self._bar = None
        if show_bar and sys.stderr.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=start,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.05,
                leave=False,
                file=sys.stderr,
            )

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step(self, loss: float | None, tokens_per_second: float | None) -> None:
        """Move the bar by one step."""
        if self._bar is not None:
            if loss is not None and tokens_per_second is not None:
                self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def perplexity(loss: float) -> float:
    """e^loss, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def duration(seconds: float) -> str:
    """`3 s`, `4 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
