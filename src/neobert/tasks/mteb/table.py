"""The table of an MTEB run. Averages are the leaderboard's: over tasks, and over the means of the types of task."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """A task's main score, from 0 to 1, and the prompts that its texts got."""

    name: str
    type: str
    metric: str
    score: float
    prompts: dict[str, str]

    @staticmethod
    def of(task: Any, result: Any, prompts: dict[str, str]) -> "Score":
        """From the library's task and its result: the mean over its splits and subsets, as the library computes it."""
        metadata = task.metadata
        return Score(metadata.name, metadata.type, metadata.main_score, float(result.get_score()), prompts)


def averages(scores: list[Score]) -> dict[str, Any]:
    """`mean_task`, `mean_task_type`, and the mean of every type."""
    by_type: dict[str, list[float]] = {}
    for one in scores:
        by_type.setdefault(one.type, []).append(one.score)
    means = {kind: statistics.fmean(values) for kind, values in sorted(by_type.items())}
    return {
        "mean_task": statistics.fmean(one.score for one in scores) if scores else None,
        "mean_task_type": statistics.fmean(means.values()) if means else None,
        "types": means,
    }


def summarize(
    model: str | None,
    revision: str | None,
    settings: dict[str, Any],
    scores: list[Score],
    not_run: list[dict[str, str]],
    num_tasks: int,
) -> dict[str, Any]:
    """<model>.json."""
    from importlib.metadata import version

    return {
        "model": model,
        "revision": revision,
        "mteb": version("mteb"),
        "settings": settings,
        "num_tasks": num_tasks,
        "tasks": [asdict(one) for one in sorted(scores, key=lambda one: (one.type, one.name))],
        "averages": averages(scores),
        "not_run": not_run,
    }


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [("task", "type", "metric", "score")]
    rows += [(one["name"], one["type"], one["metric"], f"{100 * one['score']:.2f}") for one in summary["tasks"]]
    means = summary["averages"]
    if means["mean_task"] is not None:
        rows += [(f"mean of {kind}", "", "", f"{100 * value:.2f}") for kind, value in means["types"].items()]
        rows.append((f"mean over tasks{_share(summary)}", "", "", f"{100 * means['mean_task']:.2f}"))
        rows.append((f"mean over types{_share(summary)}", "", "", f"{100 * means['mean_task_type']:.2f}"))
    return rows


def _share(summary: dict[str, Any]) -> str:
    """An average of fewer tasks than were asked for says so: it is not comparable."""
    done = len(summary["tasks"])
    return "" if done == summary["num_tasks"] else f" ({done} of {summary['num_tasks']} tasks)"


def to_terminal(summary: dict[str, Any]) -> str:
    """Columns, and what could not run."""
    rows = _rows(summary)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"not run: {one['name']}: {one['reason']}" for one in summary["not_run"])])


def to_markdown(summary: dict[str, Any]) -> str:
    """The table with its settings."""
    head, *rows = _rows(summary)
    lines = [
        f"# MTEB: {summary['model']}", "", f"Revision {summary['revision']}, mteb {summary['mteb']}.", "",
        f"| {' | '.join(head)} |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), "",
        *(f"- not run: {one['name']}: {one['reason']}" for one in summary["not_run"]), "",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in summary["settings"].items()), "",
    ]  # fmt: skip
    for one in summary["tasks"]:
        lines += [f"- prompt of {one['name']}, {kind}: `{text}`" for kind, text in one["prompts"].items()]
    return "\n".join(lines).rstrip("\n")
