"""Which MTEB tasks a configuration names, and what to do with results and data that are not there."""

import difflib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

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
    from neobert.tasks.mteb.local import find_local_tasks  # which imports this module

    own = find_local_tasks(local) if local is not None else []
    if chosen == "all" or chosen in TYPES:
        tasks = own if local is not None else list(mteb.get_benchmark(ENGLISH).tasks)
        found = [task for task in tasks if chosen == "all" or task.metadata.type == TYPES[chosen]]
        if not found:
            problem = f"{chosen}: no such task in {local}; there are: {', '.join(_names(own))}"
            raise ConfigError(Problem("mteb_task_type", problem))
        return found
    with suppress(KeyError):
        return list(mteb.get_benchmark(chosen).tasks)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return [_named(name, own) for name in names or [chosen]]


def _named(name: str, own: list[AbsTask]) -> AbsTask:
    for task in own:
        if task.metadata.name == name:
            return task
    with suppress(KeyError):
        return mteb.get_task(name)
    hint = _near(name, [*TYPES, *_names(own), *(benchmark.name for benchmark in mteb.get_benchmarks())])
    there = ", ".join(["all", *TYPES, *_names(own), "names of tasks as STS12"])
    problem = f"no task, type or benchmark {name!r}{hint or '.'} There are: {there}, and benchmarks as {ENGLISH}"
    raise ConfigError(Problem("mteb_task_type", problem))


def _names(tasks: list[AbsTask]) -> list[str]:
    return [task.metadata.name for task in tasks]


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_prompts(prompts: dict[str, str], tasks: list[AbsTask]) -> None:
    """Raises ConfigError for a prompt that no text would ever get."""
    names = {*_names(tasks), *(task.metadata.type for task in tasks)}
    known = {"query", "document", *names, *(f"{name}-{side}" for name in names for side in ("query", "document"))}
    problems = [
        Problem(
            f"mteb_prompts.{name}", f"names no task that runs{_near(name, sorted(known))}; types are as {TYPES['sts']}"
        )
        for name in prompts
        if name not in known
    ]
    if problems:
        raise ConfigError(*problems)


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

    from_hub = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return (ConnectionError, FileNotFoundError, DatasetsError, *from_hub)


def reason_of(error: Exception) -> str:
    """Why a task did not run, in one line."""
    return f"its data is not on this machine, and the hub was not reached: {first_line(error)}"
