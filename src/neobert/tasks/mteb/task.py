"""`task: mteb`: a model evaluated by the MTEB library, task by task, in that library's own format.

    <output_dir>/mteb/
      results/<model>/<revision>/<task>.json    what the library writes and its tools read
      <model>.json  <model>.md                  scores, averages, prompts and settings

A run that was stopped goes on with the tasks that have no result. A revision names weights and settings, so results of other
weights are not taken for these. A task whose data cannot be had is named, and the others go on.
"""

import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from neobert.checkpoints.format import STATE
from neobert.checkpoints.locate import download_model, find_checkpoint
from neobert.config.load import Loaded
from neobert.config.schema import Config
from neobert.errors import CheckpointError, ConfigError, Problem, check_installed, first_line, print_notes
from neobert.inference.embed import Embedder, load_embedder
from neobert.training.metrics import markdown_table, write_table
from neobert.training.runtime import build_runtime

TOKENS_OF_A_TEXT = 128  # that `mteb_batch_size` counts

Score = dict[str, Any]  # name, type, metric, score (from 0 to 1) and prompts of a task


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated. `settings`: what scores depend on besides its weights."""

    name: str
    folder: Path
    embedder: Embedder
    settings: dict[str, Any]


def run(loaded: Loaded, model: str | None = None) -> int:
    """Evaluate as configured; `model` instead of the run in `trainer.output_dir`. Returns the exit code: 2 when a task could
    not run. Raises UserError for what can be seen before the first task.
    """
    check_installed("task: mteb needs the mteb library", "mteb", "mteb")
    config = loaded.config
    print_notes(loaded.warnings)
    from neobert.tasks.mteb.library import check_prompts, choose_tasks

    tasks = choose_tasks(config.mteb_task_type, config.mteb_local_tasks)
    check_prompts(config.mteb_prompts, tasks)
    subject = load_subject(config, model)
    output = Path(config.trainer.output_dir) / "mteb"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(Problem("trainer.output_dir", f"cannot write to {output}: {error.strerror}")) from None
    names = [task.metadata.name for task in tasks]
    print(f"model       {subject.folder}")
    print(f"device      {subject.embedder.runtime.describe}")
    print(f"settings    {_listed(subject.settings)}")
    print(f"tasks       {len(tasks)}: {', '.join([*names[:8], *(['...'] if names[8:] else [])])}")
    summary, where = evaluate(subject, tasks, output, config.mteb_overwrite_results)
    print(f"\n{to_terminal(summary)}\n{where}")
    return 2 if summary["not_run"] else 0


def load_subject(config: Config, model: str | None) -> Subject:
    """The model, ready to embed. Raises CheckpointError."""
    asked = config.trainer
    if model is not None:
        folder = download_model(model)
    else:
        try:
            folder = find_checkpoint(config.pretrained_checkpoint, Path(asked.output_dir) / "checkpoints")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; train one, or name a model with --model") from None
    runtime = build_runtime(
        use_cpu=asked.use_cpu, mixed_precision=asked.mixed_precision, tf32=asked.tf32, trains=False
    ).alone()
    embedder = load_embedder(
        str(folder),
        pooling=config.mteb_pooling if config.is_set("mteb_pooling") else None,
        max_length=config.tokenizer.max_length if config.is_set("tokenizer.max_length") else None,
        batch_tokens=config.mteb_batch_size * TOKENS_OF_A_TEXT if config.is_set("mteb_batch_size") else None,
        runtime=runtime,
    )
    found, chosen = embedder.settings, embedder.model.contrastive.settings.pooling
    if found.similarity not in ("cosine", "dot"):
        raise CheckpointError(f"{folder}: similarity_fn_name {found.similarity!r} is not computed by MTEB's encoders")
    # What most models have at its default is left out, so that results of earlier versions are found again.
    usual = {"similarity": "cosine", "default_prompt": "", "arithmetic": "float32"}
    own = {"similarity": found.similarity, "default_prompt": found.default_prompt, "arithmetic": runtime.arithmetic}
    settings = {
        "pooling": "mean" if chosen == "avg" else chosen,
        "normalize": found.normalize is not False,
        "max_length": embedder.max_length,
        "prompts": {**found.prompts, **config.mteb_prompts},
        **{name: value for name, value in own.items() if value != usual[name]},
    }
    if model is not None and not Path(model).exists():
        return Subject(model, folder, embedder, settings)  # org/name of the hub
    full = found.folder.resolve()
    is_step = (full / STATE).is_file() and full.parent.name == "checkpoints"
    name = f"{full.parent.parent.name}-{full.name}" if is_step else full.name
    return Subject(f"local/{name}", folder, embedder, settings)


def evaluate(subject: Subject, tasks: list[Any], output: Path, overwrite: bool) -> tuple[dict[str, Any], str]:
    """Run what has no result yet; writes the summary after every task, and returns it with a line that says where it is."""
    import mteb
    from mteb.cache import ResultCache
    from mteb.results import TaskResult

    from neobert.tasks.mteb.library import NETWORK_ERRORS, EncoderForMTEB, drop_unusable

    encoder: Any = EncoderForMTEB(subject.name, subject.settings, subject.embedder)
    meta, cache = encoder.mteb_model_meta, ResultCache(output)
    scores: list[Score] = []
    not_run: list[dict[str, str]] = []
    for number, task in enumerate(tasks, 1):
        name, begin = task.metadata.name, time.perf_counter()
        path = cache.get_task_result_path(name, meta)
        drop_unusable(path, task)
        was_there = path.is_file() and not overwrite
        try:
            mteb.evaluate(
                encoder, task, cache=cache, co2_tracker=False, show_progress_bar=False,
                overwrite_strategy="always" if overwrite else "only-missing",
                encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
            )  # fmt: skip
        except NETWORK_ERRORS as error:
            reason = f"its data is not on this machine, and the hub was not reached: {first_line(error)}"
            not_run.append({"name": name, "reason": reason})
            result = f"not run: {reason}"
        else:
            scores.append(score_of(task, TaskResult.from_disk(path), encoder.prompts_of(task.metadata)))
            how = "had a result" if was_there else f"{time.perf_counter() - begin:.1f} s"
            result = f"{100 * scores[-1]['score']:.2f} ({how})"
        print(f"[{number}/{len(tasks)}] {name}: {result}", flush=True)
        summary = {
            "model": meta.name,
            "revision": meta.revision,
            "mteb": version("mteb"),
            "settings": subject.settings,
            "num_tasks": len(tasks),
            "tasks": sorted(scores, key=itemgetter("type", "name")),
            "averages": averages(scores),
            "not_run": not_run,
        }
        where = write_table(output, subject.name.replace("/", "__"), summary, to_markdown(summary))
    return summary, where


def score_of(task: Any, result: Any, prompts: dict[str, str]) -> Score:
    """From the library's task and its result: the mean over its splits and subsets, as the library computes it."""
    about = {"name": task.metadata.name, "type": task.metadata.type, "metric": task.metadata.main_score}
    return {**about, "score": float(result.get_score()), "prompts": prompts}


# --- the table -----------


def averages(scores: list[Score]) -> dict[str, Any]:
    """The leaderboard's `mean_task` and `mean_task_type`, the mean over the means of the types of task, and those by type."""
    by_type: dict[str, list[float]] = {}
    for one in scores:
        by_type.setdefault(one["type"], []).append(one["score"])
    means = {kind: statistics.fmean(values) for kind, values in sorted(by_type.items())}
    return {
        "mean_task": statistics.fmean(one["score"] for one in scores) if scores else None,
        "mean_task_type": statistics.fmean(means.values()) if means else None,
        "types": means,
    }


def _rows(summary: dict[str, Any]) -> list[list[str]]:
    """The cells of the table, its head first. An average of fewer tasks than were asked for says so: it is not comparable."""
    tasks, means, num_tasks = summary["tasks"], summary["averages"], summary["num_tasks"]
    rows = [(one["name"], one["type"], one["metric"], one["score"]) for one in tasks]
    if tasks:
        share = "" if len(tasks) == num_tasks else f" ({len(tasks)} of {num_tasks} tasks)"
        rows += [(f"mean of {kind}", "", "", value) for kind, value in means["types"].items()]
        rows.append((f"mean over tasks{share}", "", "", means["mean_task"]))
        rows.append((f"mean over types{share}", "", "", means["mean_task_type"]))
    return [["task", "type", "metric", "score"], *([*cells, f"{100 * score:.2f}"] for *cells, score in rows)]


def to_terminal(summary: dict[str, Any]) -> str:
    """Columns, and what could not run."""
    rows = _rows(summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_not_run(summary)])


def to_markdown(summary: dict[str, Any]) -> list[str]:
    """The lines of <model>.md: the table with its settings and prompts."""
    head, *rows = _rows(summary)
    prompts = [(one["name"], *prompt) for one in summary["tasks"] for prompt in one["prompts"].items()]
    return [
        f"# MTEB: {summary['model']}", "", f"Revision {summary['revision']}, mteb {summary['mteb']}.", "",
        markdown_table(head, rows), "", *(f"- {line}" for line in _not_run(summary)), "",
        f"Settings: {_listed(summary['settings'])}", "",
        *(f"- prompt of {name}, {kind}: `{text}`" for name, kind, text in prompts),
    ]  # fmt: skip


def _not_run(summary: dict[str, Any]) -> list[str]:
    return [f"not run: {one['name']}: {one['reason']}" for one in summary["not_run"]]


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
