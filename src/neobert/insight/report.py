"""A run as one HTML page with its pictures inside: loss, learning rate, throughput, step time."""

import html
import io
import json
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from neobert.config.explain import changed_keys
from neobert.errors import DataError
from neobert.files import write_text
from neobert.training.metrics import PHASES, duration, read_metrics

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem; margin-bottom: .2rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
.sub {{ color: #59636e }} .figures {{ display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }}
.figures div {{ border: 1px solid #d1d9e0; border-radius: 6px; padding: .5rem .9rem; min-width: 8rem }}
.figures b {{ display: block; font-size: 1.25rem }} .figures span {{ color: #59636e; font-size: .85rem }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1rem }}
svg {{ width: 100%; height: auto }} table {{ border-collapse: collapse }}
td {{ padding: .2rem .8rem .2rem 0; vertical-align: top }} td:first-child {{ color: #59636e; white-space: nowrap }}
pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto; border-radius: 6px; font-size: .85rem }}
</style></head><body>
<h1>{title}</h1><p class="sub">{subtitle}</p>
<div class="figures">{figures}</div>
<div class="plots">{plots}</div>
<h2>What ran</h2><table>{facts}</table>
<h2>Keys that differ from their defaults</h2><pre>{config}</pre>
</body></html>
"""
BLUE, ORANGE = "#0969da", "#bc4c00"

Records = list[dict[str, Any]]  # of metrics.jsonl
Series = tuple[str, list[int], list[float], str]  # its name, steps, values and colour


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write `<folder>/report.html` (or `output`) and return its path. Raises DataError when there is nothing to show."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{folder}: not the output folder of a run (no metrics.jsonl)")
    records = read_metrics(path)
    train, evaluations = ([one for one in records if one["kind"] == kind] for kind in ("train", "eval"))
    facts, config = folder / "environment.json", folder / "config.yaml"
    environment = json.loads(facts.read_text()) if facts.is_file() else {}
    changed = changed_keys(yaml.safe_load(config.read_text()) if config.is_file() else {})
    keys = [(key, json.dumps(changed[key])) for key in changed if key not in ("config_path", "optimizer.muon_config")]
    command, packages = environment.pop("command", ""), environment.pop("packages", {})
    ran = {name: "\n".join(value) if isinstance(value, list) else str(value) for name, value in environment.items()}
    escape = html.escape
    figures = [f"<div><b>{escape(v)}</b><span>{escape(name)}</span></div>" for name, v in _figures(train, evaluations)]
    rows = [f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in ran.items()]
    page = PAGE.format(
        title=escape(f"NeoBERT run: {folder.resolve().name}"),
        subtitle=escape(f"{command} · torch {packages.get('torch', '?')}"),
        figures="".join(figures),
        plots="".join(f"<div>{plot}</div>" for plot in _plots(train, evaluations)),
        facts="".join(rows).replace("\n", "<br>"),
        config=escape("\n".join(f"{key}: {value}" for key, value in keys)),
    )
    target = output or folder / "report.html"
    write_text(target, page)
    return target


def _figures(train: Records, evaluations: Records) -> list[tuple[str, str]]:
    if not train:
        return [("steps logged", "0")]
    last, waiting = train[-1], sum(one["data_seconds"] for one in train)
    seconds = sum(one["data_seconds"] + one["compute_seconds"] + one["optimizer_seconds"] for one in train)
    best: list[tuple[str, str]] = []
    for name, choose, digits in (("loss", min, 3), ("score", max, 4)):
        values = [(one[f"eval_{name}"], one["step"]) for one in evaluations if f"eval_{name}" in one]
        if values and not best:
            value, step = choose(values, key=itemgetter(0))
            best = [(f"best held-out {name} (step {step:,})", f"{value:.{digits}f}")]
    speeds = sorted(one["tokens_per_second"] for one in train)
    return [
        ("steps", f"{last['step']:,}"),
        ("tokens", f"{last['num_tokens']:,}"),
        ("training time", duration(seconds)),
        ("last training loss", f"{last['loss']:.3f}"),
        *best,
        ("tokens per second, median", f"{speeds[len(train) // 2]:,.0f}"),
        ("waiting for data", f"{waiting / max(seconds, 1e-9):.2%}"),
    ]


def _plots(train: Records, evaluations: Records) -> Iterator[str]:
    """The plots of a run as SVG."""

    def series(name: str, records: Records, key: str, colour: str) -> Series:
        found = [one for one in records if key in one]
        return name, [one["step"] for one in found], [one[key] for one in found], colour

    held_out, scores = (series("held out", evaluations, f"eval_{name}", ORANGE) for name in ("loss", "score"))
    losses = [series("training", train, "loss", BLUE), held_out]
    yield _plot("Loss", "nats per target", losses if held_out[1] else losses[:1])
    if scores[1]:
        yield _plot("Held-out score", "", [scores])
    yield _plot("Learning rate", "", [series("", train, "lr", BLUE)], from_zero=True)
    yield _plot("Throughput", "real tokens per second", [series("", train, "tokens_per_second", BLUE)], from_zero=True)
    steps = [one["step"] for one in train]
    windows = [max(1, now - before) for before, now in zip([0, *steps], steps, strict=False)]
    steps_of = list(zip(train, windows, strict=True))
    times = {name: [1e3 * one[f"{name}_seconds"] / window for one, window in steps_of] for name in PHASES}
    areas = {name: values for name, values in times.items() if any(values)}
    yield _plot("Where the time goes", "milliseconds per step", areas=(steps, areas) if areas else None)


def _plot(
    title: str, unit: str, lines: Sequence[Series] = (), from_zero: bool = False,
    areas: tuple[list[int], dict[str, list[float]]] | None = None,
) -> str:  # fmt: skip
    """SVG of lines, or of named `areas` over steps, one on top of the other."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "neobert"
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=unit)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for name, x, y, colour in lines:
        axes.plot(x, y, label=name, color=colour, linewidth=1.6, marker="o" if len(x) < 25 else None, markersize=3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    if from_zero:
        axes.set_ylim(bottom=0)
    if areas is not None:
        axes.stackplot(areas[0], list(areas[1].values()), labels=list(areas[1]), alpha=0.85)
        axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
