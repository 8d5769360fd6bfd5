"""The table of a GLUE suite: mean, spread and every seed, the protocol, and what others published."""

import statistics
from typing import Any

from neobert.data.labelled.tasks import TASKS

# Development-set figures as their authors give them: one number a task, in percent. RTE, MRPC and STS-B of RoBERTa, NeoBERT and
# ModernBERT start from an MNLI checkpoint.
PUBLISHED = {
    "BERT-base": ("110M; arXiv 2412.13663, table 5, from arXiv 2312.17482, table S3", {
        "cola": 59.0, "sst2": 93.1, "mrpc": 89.5, "stsb": 89.4, "qqp": 91.4, "mnli": 85.4, "qnli": 91.6, "rte": 78.2}),
    "RoBERTa-base": ("125M; arXiv 1907.11692, table 8", {
        "cola": 63.6, "sst2": 94.8, "mrpc": 90.2, "stsb": 91.2, "qqp": 91.9, "mnli": 87.6, "qnli": 92.8, "rte": 78.7}),
    "NeoBERT": ("250M, 4,096 tokens; arXiv 2502.19587", {
        "cola": 66.2, "sst2": 95.6, "mrpc": 93.4, "stsb": 91.8, "qqp": 90.7, "mnli": 89.0, "qnli": 93.7, "rte": 91.3}),
    "ModernBERT-base": ("149M; arXiv 2412.13663, table 5", {
        "cola": 65.1, "sst2": 96.0, "mrpc": 92.2, "stsb": 91.8, "qqp": 92.1, "mnli": 89.1, "qnli": 93.9, "rte": 87.4}),
}  # fmt: skip
HIDDEN = ("optimizer", "scheduler", "weights_identity")  # of the protocol: told in shorter form
TRAINED = [task.name for task in TASKS.values() if task.trains]


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything the table says, as data. Figures are fractions, not percent."""
    tasks = {}
    for name in dict.fromkeys(result["task"] for result in results):
        runs = [result for result in results if result["task"] == name]
        metrics = {metric: spread([run["metrics"][metric] for run in runs]) for metric in runs[0]["metrics"]}
        tasks[name] = {
            "title": TASKS[name].title,
            "score": spread([run["score"] for run in runs]),
            "score_of": list(TASKS[name].metrics),
            "metrics": metrics,
            "seeds": [run["seed"] for run in runs],
            "steps": [run["step"] for run in runs],
            "transferred_from": runs[0]["transferred_from"],
            "weights": [run["weights"] for run in runs],
            "protocol": runs[0]["protocol"],
        }
    seeds = list(dict.fromkeys(result["seed"] for result in results))
    return {
        "tasks": tasks,
        "seeds": seeds,
        "average": average(results, seeds, list(tasks)),
        "average_without_wnli": average(results, seeds, [name for name in tasks if name != "wnli"]),
        "is_whole": set(tasks) == set(TRAINED),
        "published": {
            name: {"source": source, "percent": figures} for name, (source, figures) in PUBLISHED.items()
        },
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of one value), and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": values}


def average(results: list[dict[str, Any]], seeds: list[int], tasks: list[str]) -> dict[str, Any]:
    """GLUE's average of the tasks' scores, seed by seed."""
    scores = {(result["task"], result["seed"]): result["score"] for result in results}
    return (
        spread([statistics.fmean(scores[task, seed] for task in tasks) for seed in seeds]) if tasks else spread([0.0])
    )


def to_markdown(summary: dict[str, Any]) -> str:
    """results.md."""
    names = list(PUBLISHED)
    header = ["task", "metric", "score", "mean ± sd", "seeds", *names]
    lines = ["# GLUE, development set", "", _row(header), _row(["---"] * len(header))]
    for name, task in summary["tasks"].items():
        score = task["score"]
        seeds = " ".join(f"{100 * value:.2f}" for value in score["values"])
        figures = [f"{summary['published'][peer]['percent'].get(name, '')}" for peer in names]
        of = " and ".join(task["score_of"]) + (", matched and mismatched" if name == "mnli" else "")
        parts = [f"{metric} {_percent(task['metrics'][metric])}" for metric in _shown(task)]
        lines.append(_row([task["title"], of, _percent(score), "; ".join(parts), seeds, *figures]))
    lines += ["", *_averages(summary), "", "## Protocol", ""]
    lines += [f"- {line}" for line in protocol_lines(summary)]
    lines += ["", "## Published", ""]
    lines += [f"- {name}: {entry['source']}" for name, entry in summary["published"].items()]
    lines.append(
        "\nPublished figures are development-set figures, one metric a task as their authors chose it (MRPC and QQP: F1 or "
        "accuracy; STS-B: Pearson or Spearman), most of them the best of a search without a spread."
    )
    return "\n".join(lines) + "\n"


def to_terminal(summary: dict[str, Any]) -> str:
    """The same in columns of text, without the published sources."""
    lines = [f"{'task':<8}{'score':>16}   {'seeds':<32}metrics"]
    for task in summary["tasks"].values():
        seeds = " ".join(f"{100 * value:.1f}" for value in task["score"]["values"])
        parts = "  ".join(f"{metric} {_percent(task['metrics'][metric])}" for metric in _shown(task))
        lines.append(f"{task['title']:<8}{_percent(task['score']):>16}   {seeds:<32}{parts}")
    return "\n".join([*lines, "", *_averages(summary), *protocol_lines(summary)])


def protocol_lines(summary: dict[str, Any]) -> list[str]:
    """How the scores came about; what differs between tasks is said by task."""
    lines = []
    protocols = {name: _flat(task["protocol"]) for name, task in summary["tasks"].items()}
    keys = next(iter(protocols.values()))
    for key in keys:
        by_value: dict[str, list[str]] = {}
        for name, flat in protocols.items():
            by_value.setdefault(str(flat[key]), []).append(name)
        only = len(by_value) == 1
        lines += [f"{key}: {value}" + ("" if only else f" ({', '.join(tasks)})") for value, tasks in by_value.items()]
    transferred = [name for name, task in summary["tasks"].items() if task["transferred_from"]]
    lines.append(
        f"transferred: {', '.join(transferred)} from mnli of the same seed" if transferred else "transferred: nothing"
    )
    lines.append(
        f"seeds: {', '.join(map(str, summary['seeds']))}; they draw the head, the order of the rows and dropout"
    )
    return lines


def _flat(protocol: dict[str, Any]) -> dict[str, Any]:
    optimizer, scheduler = protocol["optimizer"], protocol["scheduler"]
    warmup = scheduler["warmup_percent"]
    told = f"{warmup:g} % warmup" if warmup is not None else f"{scheduler['warmup_steps']:,} steps of warmup"
    return {
        **{name: value for name, value in protocol.items() if name not in HIDDEN and value is not None},
        "optimizer": f"{optimizer['name']}, lr {optimizer['lr']:g}, weight decay {optimizer['weight_decay']:g}",
        "schedule": f"{scheduler['name']}, {told}",
    }


def _averages(summary: dict[str, Any]) -> list[str]:
    if summary["is_whole"]:
        return [
            f"GLUE average: {_percent(summary['average'])} (all nine tasks)",
            f"without WNLI: {_percent(summary['average_without_wnli'])} (eight tasks, as papers print it)",
        ]
    missing = [name for name in TRAINED if name not in summary["tasks"]]
    if missing == ["wnli"]:
        return [f"average: {_percent(summary['average'])} (eight tasks, without WNLI, as papers print it)"]
    return [f"average of these tasks: {_percent(summary['average'])} (not GLUE's: {', '.join(missing)} missing)"]


def _shown(task: dict[str, Any]) -> list[str]:
    return [name for name in task["metrics"] if name not in ("loss", "score")]


def _percent(values: dict[str, Any]) -> str:
    deviation = "" if values["std"] is None else f" ± {100 * values['std']:.2f}"
    return f"{100 * values['mean']:.2f}{deviation}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
