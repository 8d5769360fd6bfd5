"""`task: mteb`: a model evaluated by the MTEB library, task by task, in that library's own format.

    <output_dir>/mteb/
      results/<model>/<revision>/<task>.json    what the library writes and its tools read
      <model>.json  <model>.md                  scores, averages, prompts and settings

A run that was stopped goes on with the tasks that have no result. A revision names weights and settings, so results of other
weights are not taken for these. A task whose data cannot be had is named, and the others go on.
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neobert.checkpoints.format import STATE, find_checkpoint
from neobert.checkpoints.hf import model_folder
from neobert.config.load import Loaded
from neobert.config.schema import Config
from neobert.errors import CheckpointError, ConfigError, Problem, UserError, print_notes
from neobert.files import write_json, write_text
from neobert.inference.embed import Embedder, load_embedder
from neobert.tasks.mteb.table import Score, summarize, to_markdown, to_terminal
from neobert.training.choices import describe_arithmetic
from neobert.training.runtime import build_runtime

TOKENS_OF_A_TEXT = 128  # that `mteb_batch_size` counts


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated. `settings`: what scores depend on besides its weights."""

    name: str
    folder: Path
    embedder: Embedder
    settings: dict[str, Any]


def check_mteb() -> None:
    """Raises UserError when the library is not installed."""
    if find_spec("mteb") is None:
        raise UserError("task: mteb needs the mteb library: pip install 'neobert[mteb]'")


def run(loaded: Loaded, model: str | None = None) -> int:
    """Evaluate as configured; `model` instead of the run in `trainer.output_dir`.

    Returns the exit code: 2 when a task could not run. Raises UserError for what can be seen before the first task.
    """
    check_mteb()
    config = loaded.config
    print_notes(loaded.warnings)
    from neobert.tasks.mteb.tasks import check_prompts, choose_tasks

    tasks = choose_tasks(config.mteb_task_type, config.mteb_local_tasks)
    check_prompts(config.mteb_prompts, tasks)
    subject = load_subject(config, model)
    output = Path(config.trainer.output_dir) / "mteb"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(Problem("trainer.output_dir", f"cannot write to {output}: {error.strerror}")) from None
    print(f"model       {subject.folder}")
    print(f"device      {subject.embedder.runtime.describe}")
    print(f"settings    {', '.join(f'{name} {value}' for name, value in subject.settings.items())}")
    print(
        f"tasks       {len(tasks)}: {', '.join(task.metadata.name for task in tasks[:8])}{', ...' if tasks[8:] else ''}"
    )
    summary = evaluate(subject, tasks, output, config.mteb_overwrite_results)
    print("\n" + to_terminal(summary))
    print(f"table       {output / file_name(subject)}.md, {output / file_name(subject)}.json")
    return 2 if summary["not_run"] else 0


def load_subject(config: Config, model: str | None) -> Subject:
    """The model, ready to embed. Raises CheckpointError."""
    folder = model_folder(model) if model is not None else _own_checkpoint(config)
    pooling = config.mteb_pooling if config.is_set("mteb_pooling") else None
    length = config.tokenizer.max_length if config.is_set("tokenizer.max_length") else None
    size = config.mteb_batch_size * TOKENS_OF_A_TEXT if config.is_set("mteb_batch_size") else None
    asked = config.trainer
    runtime = build_runtime(
        use_cpu=asked.use_cpu, mixed_precision=asked.mixed_precision, tf32=asked.tf32, trains=False
    ).alone()
    embedder = load_embedder(str(folder), pooling, length, size, runtime)
    found, chosen = embedder.settings, embedder.model.contrastive.settings.pooling
    if found.similarity not in ("cosine", "dot"):
        raise CheckpointError(f"{folder}: similarity_fn_name {found.similarity!r} is not computed by MTEB's encoders")
    arithmetic = describe_arithmetic(runtime.dtype, runtime.device.type, runtime.tf32)
    # What most models have at its default is left out, so that results of before are found again.
    unusual = {
        "similarity": found.similarity != "cosine" and found.similarity,
        "default_prompt": found.default_prompt,
        "arithmetic": arithmetic != "float32" and arithmetic,
    }
    settings = {
        "pooling": {"avg": "mean"}.get(chosen, chosen),
        "normalize": found.normalize is not False,
        "max_length": embedder.max_length,
        "prompts": {**found.prompts, **config.mteb_prompts},
        **{name: value for name, value in unusual.items() if value},
    }  # fmt: skip
    return Subject(_name(model, folder), folder, embedder, settings)


def _own_checkpoint(config: Config) -> Path:
    """What `pretrained_checkpoint` names of the run in `trainer.output_dir`."""
    try:
        return find_checkpoint(config.pretrained_checkpoint, Path(config.trainer.output_dir) / "checkpoints")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; train one, or name a model with --model") from None


def _name(model: str | None, folder: Path) -> str:
    """`org/name` of the hub as it is; of a folder `local/<run>-<step>` or `local/<folder>`."""
    if model is not None and not Path(model).exists():
        return model
    folder = find_checkpoint(str(folder)) if not (folder / "config.json").is_file() else folder
    full = folder.resolve()
    if (full / STATE).is_file() and full.parent.name == "checkpoints":
        return f"local/{full.parent.parent.name}-{full.name}"
    return f"local/{full.name}"


def evaluate(subject: Subject, tasks: list[Any], output: Path, overwrite: bool) -> dict[str, Any]:
    """Run what has no result yet; writes the summary after every task, and returns it."""
    import mteb
    from mteb.cache import ResultCache
    from mteb.results import TaskResult

    from neobert.tasks.mteb.model import EncoderForMTEB, build_meta, weights_identity
    from neobert.tasks.mteb.tasks import drop_unusable, network_errors, reason_of

    meta = build_meta(
        subject.name, weights_identity(subject.embedder.settings.folder), subject.settings, subject.embedder
    )
    encoder = EncoderForMTEB(subject.embedder, meta, subject.settings["prompts"])
    cache = ResultCache(output)
    scores: list[Score] = []
    not_run: list[dict[str, str]] = []
    summary: dict[str, Any] = {}
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
        except network_errors() as error:
            not_run.append({"name": name, "reason": reason_of(error)})
            print(f"[{number}/{len(tasks)}] {name}: not run: {not_run[-1]['reason']}", flush=True)
        else:
            scores.append(Score.of(task, TaskResult.from_disk(path), encoder.prompts_of(task.metadata)))
            how = "had a result" if was_there else f"{time.perf_counter() - begin:.1f} s"
            print(f"[{number}/{len(tasks)}] {name}: {100 * scores[-1].score:.2f} ({how})", flush=True)
        summary = summarize(meta.name, meta.revision, subject.settings, scores, not_run, len(tasks))
        write_json(output / f"{file_name(subject)}.json", summary)
        write_text(output / f"{file_name(subject)}.md", to_markdown(summary) + "\n")
    return summary


def file_name(subject: Subject) -> str:
    """Of the summaries of a model, without suffix."""
    return subject.name.replace("/", "__")
