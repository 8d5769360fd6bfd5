"""A run as one HTML page with its pictures inside: loss, learning rate, throughput, step time."""

import html
import io
import json
from pathlib import Path
from typing import Any

import yaml

from neobert.errors import DataError
from neobert.files import write_text
from neobert.training.metrics import duration, read_metrics

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


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write `<folder>/report.html` (or `output`) and return its path. Raises DataError when there is nothing to show."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{folder}: not the output folder of a run (no metrics.jsonl)")
    rows = read_metrics(path)
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    environment = (
        json.loads((folder / "environment.json").read_text()) if (folder / "environment.json").is_file() else {}
    )
    page = PAGE.format(
        title=html.escape(f"NeoBERT run: {folder.resolve().name}"),
        subtitle=html.escape(
            f"{environment.get('command', '')} · torch {environment.get('packages', {}).get('torch', '?')}"
        ),
        figures="".join(
            f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
            for name, value in _figures(train, evaluations)
        ),
        plots="".join(_plots(train, evaluations)),
        facts=_facts(environment),
        config=html.escape(_changed_keys(folder / "config.yaml")),
    )
    target = output or folder / "report.html"
    write_text(target, page)
    return target


def _figures(train: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not train:
        return [("steps logged", "0")]
    seconds = sum(row["data_seconds"] + row["compute_seconds"] + row["optimizer_seconds"] for row in train)
    figures = [
        ("steps", f"{train[-1]['step']:,}"),
        ("tokens", f"{train[-1]['num_tokens']:,}"),
        ("training time", duration(seconds)),
    ]
    figures.append(("last training loss", f"{train[-1]['loss']:.3f}"))
    with_loss = [row for row in evaluations if "eval_loss" in row]
    scored = [row for row in evaluations if "eval_score" in row]
    if with_loss:
        best = min(with_loss, key=lambda row: row["eval_loss"])
        figures.append((f"best held-out loss (step {best['step']:,})", f"{best['eval_loss']:.3f}"))
    elif scored:
        best = max(scored, key=lambda row: row["eval_score"])
        figures.append((f"best held-out score (step {best['step']:,})", f"{best['eval_score']:.4f}"))
    waiting = sum(row["data_seconds"] for row in train) / max(seconds, 1e-9)
    middle = sorted(row["tokens_per_second"] for row in train)[len(train) // 2]
    return [*figures, ("tokens per second, median", f"{middle:,.0f}"), ("waiting for data", f"{waiting:.2%}")]


def _plots(train: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[str]:
    steps = [row["step"] for row in train]
    phases = ("data", "compute", "optimizer", "evaluate", "save")
    windows = [now - before for before, now in zip([0, *steps], steps, strict=False)]
    per_step = {
        name: [1e3 * row[f"{name}_seconds"] / max(1, w) for row, w in zip(train, windows, strict=True)]
        for name in phases
    }
    loss = [("training", steps, [row["loss"] for row in train], BLUE)]
    if with_loss := [row for row in evaluations if "eval_loss" in row]:
        held_out = [row["eval_loss"] for row in with_loss]
        loss.append(("held out", [row["step"] for row in with_loss], held_out, ORANGE))
    scored = [row for row in evaluations if "eval_score" in row]
    scores = [("", [row["step"] for row in scored], [row["eval_score"] for row in scored], ORANGE)]
    return [
        _line_plot("Loss", "nats per target", loss),
        *([_line_plot("Held-out score", "", scores)] if scored else []),
        _line_plot("Learning rate", "", [("", steps, [row["lr"] for row in train], BLUE)]),
        _line_plot(
            "Throughput", "real tokens per second", [("", steps, [row["tokens_per_second"] for row in train], BLUE)]
        ),
        _stack_plot("Where the time goes", "milliseconds per step", steps, per_step),
    ]


def _new_figure(title: str, unit: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "neobert"
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line_plot(title: str, unit: str, series: list[tuple[str, list[int], list[float], str]]) -> str:
    figure, axes = _new_figure(title, unit)
    for name, x, y, colour in series:
        axes.plot(x, y, label=name, color=colour, linewidth=1.6, marker="o" if len(x) < 25 else None, markersize=3)
    if len(series) > 1:
        axes.legend(frameon=False)
    if title in ("Throughput", "Learning rate"):
        axes.set_ylim(bottom=0)
    return _svg(figure)


def _stack_plot(title: str, unit: str, steps: list[int], series: dict[str, list[float]]) -> str:
    figure, axes = _new_figure(title, unit)
    shown = {name: values for name, values in series.items() if any(values)}
    if steps and shown:
        axes.stackplot(steps, list(shown.values()), labels=list(shown), alpha=0.85)
        axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
    return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<div>{text[text.index('<svg') :]}</div>"


def _facts(environment: dict[str, Any]) -> str:
    skipped = ("packages", "command")
    rows = []
    for name, value in environment.items():
        if name not in skipped:
            text = "\n".join(value) if isinstance(value, list) else str(value)
            rows.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text).replace(chr(10), '<br>')}</td></tr>")
    return "".join(rows)


def _changed_keys(path: Path) -> str:
    from neobert.config.legacy import ABSENT, apply_legacy, look
    from neobert.config.schema import known_keys

    values = yaml.safe_load(path.read_text()) if path.is_file() else {}
    apply_legacy(values, {}, [])
    left_out = ("config_path", "optimizer.muon_config")
    found = {key: look(values, key) for key in known_keys() if key not in left_out}
    changed = {key: value for key, value in found.items() if value not in (ABSENT, known_keys()[key].default)}
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in changed.items())
