"""Which MTEB tasks a configuration names, and what to do with results and data that are not there."""

import difflib
import json
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks.abstask import AbsTask

from neobert.errors import ConfigError, Problem, first_line, print_notes

ENGLISH = "MTEB(eng, v1)"  # the 56 tasks of the original leaderboard, which the reference and its paper evaluate
LOCAL = "local/"  # where the data of local tasks is said to be
TYPES = {
    "classification": "Classification",
    "clustering": "Clustering",
    "pair_classification": "PairClassification",
    "reranking": "Reranking",
    "retrieval": "Retrieval",
    "sts": "STS",
    "summarization": "Summarization",
}


def choose_tasks(chosen: str, local: str | None) -> list[AbsTask]:
    """`all`, a type, names separated by commas, or a benchmark; among the tasks of `local`, where that is set.

    Raises ConfigError with what there is.
    """
    if local is not None:
        from neobert.tasks.mteb.local import find_local_tasks

        own = find_local_tasks(local)
    else:
        own = []
    if chosen == "all" or chosen in TYPES:
        tasks = own if local is not None else list(mteb.get_benchmark(ENGLISH).tasks)
        found = [task for task in tasks if chosen == "all" or task.metadata.type == TYPES[chosen]]
        if not found:
            raise ConfigError(
                Problem("mteb_task_type", f"{chosen}: no such task in {local}; there are: {_listed(own)}")
            )
        return found
    if (benchmark := _benchmark(chosen)) is not None:
        return list(benchmark.tasks)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return [_named(name, own) for name in names]


def _benchmark(name: str) -> Any:
    try:
        return mteb.get_benchmark(name)
    except KeyError:
        return None


def _named(name: str, own: list[AbsTask]) -> AbsTask:
    for task in own:
        if task.metadata.name == name:
            return task
    try:
        return mteb.get_task(name)
    except KeyError:
        known = [*TYPES, *(task.metadata.name for task in own), *(b.name for b in mteb.get_benchmarks())]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            Problem(
                "mteb_task_type",
                f"no task, type or benchmark {name!r}{hint or '.'} There are: all, {', '.join(TYPES)}, "
                f"{_listed(own) + ', ' if own else ''}names of tasks as STS12, and benchmarks as {ENGLISH}",
            )
        ) from None


def _listed(tasks: list[AbsTask]) -> str:
    return ", ".join(task.metadata.name for task in tasks)


def check_prompts(prompts: dict[str, str], tasks: list[AbsTask]) -> None:
    """Raises ConfigError for a prompt that no text would ever get."""
    names = {*(task.metadata.name for task in tasks), *(task.metadata.type for task in tasks)}
    known = {"query", "document", *names, *(f"{name}-{side}" for name in names for side in ("query", "document"))}
    problems = [
        Problem(f"mteb_prompts.{name}", f"names no task that runs{_near(name, known)}; types are as {TYPES['sts']}")
        for name in prompts
        if name not in known
    ]
    if problems:
        raise ConfigError(*problems)


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def drop_unusable(path: Path, task: AbsTask) -> None:
    """Delete a result that was cut off in the middle of writing, or that belongs to other data: its task runs again.

    The library keeps results of tasks whose data has changed when no split is missing; of local tasks data does change.
    """
    if not path.is_file():
        return
    dataset, reason = task.metadata.dataset, ""
    try:
        found = json.loads(path.read_text()).get("dataset_revision")
    except ValueError:
        reason = "was cut off"
    else:
        if dataset["path"].startswith(LOCAL) and found != dataset["revision"]:
            reason = "is of other data"
    if reason:
        print_notes([f"{path} {reason}; its task runs again"])
        path.unlink()


def network_errors() -> tuple[type[Exception], ...]:
    """What loading a task's data raises when the hub cannot be reached, or does not have it (for us)."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return (
        ConnectionError,
        FileNotFoundError,
        DatasetsError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )


def reason_of(error: Exception) -> str:
    """One line."""
    text = first_line(error)
    return f"its data is not on this machine, and the hub was not reached: {text}"
