"""`neobert glue CONFIG --tasks .. --seeds ..`: one run per task and seed, and a table of them; and, with `--predict`, the files
that GLUE's server takes, from a finished run.

    <output_dir>/<task>/seed-<n>/     a run each: result.json when it has come to its end
    <output_dir>/results.json  results.md  submission/

A suite that was stopped goes on: finished runs stand, a run in progress resumes from its checkpoint, exactly. Of a finished
run only the weights of its result are kept. The table has mean, spread and every seed, the protocol, and published figures.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neobert.checkpoints.format import STATE, list_steps, prune, strip_checkpoint
from neobert.checkpoints.initial_weights import find_initial_weights
from neobert.config.load import Loaded, load_config
from neobert.config.schema import Config
from neobert.data.labelled import TASKS, GlueTask, find_files, has_split
from neobert.errors import CheckpointError, ConfigError, DataError, Problem, UserError, check_installed, print_notes
from neobert.files import write_text
from neobert.tasks.glue import task as glue
from neobert.tasks.glue.data import check_best_metric, glue_source, predict_split
from neobert.tasks.glue.model import load_finetuned
from neobert.training.metrics import markdown_table, write_table
from neobert.training.processes import started
from neobert.training.run_folder import hold_folder
from neobert.training.runtime import Runtime, build_runtime

FOLDER = "submission"  # of the files that GLUE's server takes
TRANSFERRED = ("rte", "mrpc", "stsb")  # from mnli, with glue.transfer_from_task
TRAINED = [task.name for task in TASKS.values() if task.trains]
HIDDEN = ("optimizer", "scheduler", "weights_identity")  # of the protocol: shown in shorter form, or not at all
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
PUBLISHED_NOTE = (
    "Published figures are development-set figures, one metric a task as their authors chose it (MRPC and QQP: F1 or "
    "accuracy; STS-B: Pearson or Spearman), most of them the best of a search without a spread."
)


Result = dict[str, Any]  # what result.json holds


def run_suite(
    files: list[str], overrides: list[str], tasks: list[str], num_seeds: int, predict: bool,
    after_run: Callable[[Path], object] = lambda folder: None,
) -> int:  # fmt: skip
    """Run what is missing, then write the table. `after_run` is called with the folder of each run, in the main process.
    Returns the exit code. Raises UserError, for what can be seen beforehand before anything is trained.
    """
    check_installed("GLUE's metrics need {}", "glue", "sklearn", "scipy")
    base = load_config(files, overrides, "glue")
    with started(base.config) as runtime:
        print_notes(base.warnings if runtime.is_main else [])
        plan, output = make_plan(base, files, overrides, tasks, num_seeds), Path(base.config.trainer.output_dir)
        for one in {loaded.config.glue.task_name: loaded.config for loaded in plan}.values():
            check_run(one)
        with hold_folder(output, runtime):
            results, code = run_plan(plan, runtime, after_run)
            if not code:
                runtime.on_main(partial(print_table, results, output))
            if not code and predict:
                runtime.on_main(partial(predict_best, plan, results, output / FOLDER, runtime.alone()))
    return code


def make_plan(base: Loaded, files: list[str], overrides: list[str], tasks: list[str], num_seeds: int) -> list[Loaded]:
    """The runs in their order; those that transfer come after the mnli they start from."""
    output, transfer = Path(base.config.trainer.output_dir), base.config.glue.transfer_from_task
    if transfer and "mnli" not in tasks:
        problem = "a suite transfers from mnli to rte, mrpc and stsb, and --tasks has no mnli"
        raise ConfigError(Problem("glue.transfer_from_task", problem))
    plan = []
    for task in sorted(tasks, key=lambda name: transfer and name in TRANSFERRED):
        transfers = transfer and task in TRANSFERRED
        for seed in range(base.config.seed, base.config.seed + num_seeds):
            own = [
                f"glue.task_name={task}", f"glue.num_labels={TASKS[task].num_labels}", f"seed={seed}",
                f"trainer.output_dir={output / task / f'seed-{seed}'}", "trainer.resume_from_checkpoint=latest",
                f"glue.transfer_from_task={str(transfers).lower()}",
            ]  # fmt: skip
            if transfers:
                donor = output / "mnli" / f"seed-{seed}"
                own += [f"glue.pretrained_checkpoint_dir={donor}", "glue.pretrained_checkpoint=latest"]
            loaded = load_config(files, [*overrides, *own], "glue")
            plan.append(replace(loaded, warnings=[]))  # the suite gives them once
    return plan


def check_run(config: Config) -> None:
    """Find at once what would stop a run hours later: metrics, files, weights. Raises UserError."""
    task = TASKS[config.glue.task_name]
    check_best_metric(config, task)
    for split in ("train", *task.evaluation):
        find_files(glue_source(config), task.name, split)
    if not config.glue.transfer_from_task:
        find_initial_weights(config)


def run_plan(plan: list[Loaded], runtime: Runtime, after_run: Callable[[Path], object]) -> tuple[list[Result], int]:
    """(results, exit code) of the runs, up to the first one that was stopped."""
    results: list[Result] = []
    for number, loaded in enumerate(plan, 1):
        config, folder = loaded.config, Path(loaded.config.trainer.output_dir)
        result = runtime.on_main(partial(finished_result, config, runtime))
        if result is None:
            print(f"\n=== {number} of {len(plan)}: {config.glue.task_name}, seed {config.seed} ===", flush=True)
            finished = glue.run(loaded)
            runtime.on_main(partial(after_run, folder))
            if finished.exit_code:
                print(f"\n{len(results)} of {len(plan)} runs are finished; the same command goes on with the rest")
                return results, finished.exit_code
            result = runtime.on_main(partial(glue.read_result, folder))
        assert result is not None
        runtime.on_main(partial(keep_weights_only, folder / "checkpoints", result["step"]))
        results.append(result)
    return results, 0


def finished_result(config: Config, runtime: Runtime) -> Result | None:
    """The result of a run that was finished before, under the same protocol. Raises ConfigError when it was another."""
    folder, task = Path(config.trainer.output_dir), config.glue.task_name
    if (result := glue.read_result(folder)) is None:
        return None
    start = find_initial_weights(config)
    now = glue.protocol(glue.fill_in(config, TASKS[task], start), start, runtime)
    for name, value in now.items():
        if (was := result["protocol"].get(name)) != value:
            problem = f"{folder} was run with {name} {was}, not {value}; choose another folder, or remove that one"
            raise ConfigError(Problem("trainer.output_dir", problem))
    print(f"{task}, seed {config.seed}: finished, score {result['score']:.4f}")
    return result


def keep_weights_only(checkpoints: Path, step: int) -> None:
    """Keep the checkpoint of a finished run's result, without what resuming needs."""
    if step in list_steps(checkpoints):
        strip_checkpoint(checkpoints / str(step))
        prune(checkpoints, 1, {step}, keep_newest=False)


# --- submissions -----------


def predict_best(plan: list[Loaded], results: list[Result], output: Path, runtime: Runtime) -> None:
    """The submission of every task, by the seed that scored best on the evaluation split."""
    best: dict[str, tuple[float, Config]] = {}
    for loaded, result in zip(plan, results, strict=True):
        if result["task"] not in best or result["score"] > best[result["task"]][0]:
            best[result["task"]] = result["score"], loaded.config
    for _, config in best.values():
        write_predictions(config, output, runtime)


def predict_run(config: Config) -> list[Path]:
    """Write the submission files of the run in `trainer.output_dir`. Raises UserError when there is nothing to predict."""
    folder, asked = Path(config.trainer.output_dir), config.trainer
    runtime = build_runtime(use_cpu=asked.use_cpu, mixed_precision=asked.mixed_precision, tf32=asked.tf32, trains=False)
    if not runtime.is_main:
        return []
    alone = runtime.alone()
    with hold_folder(folder, alone) if folder.is_dir() else nullcontext():
        written = write_predictions(config, folder / FOLDER, alone)
    if not written:
        raise DataError(f"{glue_source(config)}: no test split of {config.glue.task_name}: nothing to predict")
    return written


def write_predictions(config: Config, output: Path, runtime: Runtime) -> list[Path]:
    """The submission files of a finished run, for every test split that is there; a model of mnli also predicts ax."""
    run_folder, source = Path(config.trainer.output_dir), glue_source(config)
    result = glue.read_result(run_folder)
    if result is None:
        raise UserError(f"{run_folder}: no result.json, so no finished run of GLUE; train first: neobert glue CONFIG")
    checkpoint = run_folder / "checkpoints" / str(result["step"])
    if not (checkpoint / STATE).is_file():
        raise CheckpointError(f"{checkpoint}: the run kept no checkpoint of its result (trainer.save_model: false?)")
    model, hf_tokenizer, task = load_finetuned(checkpoint)
    model.to(runtime.device)
    written = []
    for one in [task, *([TASKS["ax"]] if task.name == "mnli" else [])]:
        for split, name in one.tests:
            if not has_split(source, one, split):
                print(f"note: no split {split} of {one.name} in {source}: {name} is not written")
                continue
            predicted = predict_split(config, one, split, model, hf_tokenizer, runtime)
            written.append(write_submission(output / name, one, predicted))
            print(f"{output / name}: {len(predicted):,} predictions, by {checkpoint}")
    return written


def write_submission(path: Path, task: GlueTask, predicted: np.ndarray) -> Path:
    """A tab-separated file of index and prediction, one line an example, in the order of the split."""
    if not task.labels:
        lines = [f"{value:.3f}" for value in predicted.clip(0.0, task.largest)]
    else:
        lines = [task.labels[number] if task.writes_names else str(number) for number in predicted]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "index\tprediction\n" + "".join(f"{i}\t{line}\n" for i, line in enumerate(lines)))
    return path


# --- the table -----------


def print_table(results: list[Result], output: Path) -> None:
    """Write results.json and results.md, and print the same."""
    summary = summarize(results)
    where = write_table(output, "results", summary, to_markdown(summary))
    print(f"\n{to_terminal(summary)}\n{where}")


def summarize(results: list[Result]) -> dict[str, Any]:
    """Everything the table says, as data. Figures are fractions, not percent."""
    seeds = list(dict.fromkeys(result["seed"] for result in results))
    by_task: dict[str, list[Result]] = {}
    for result in results:
        by_task.setdefault(result["task"], []).append(result)
    scores = {(result["task"], result["seed"]): result["score"] for result in results}

    def average(tasks: list[str]) -> dict[str, Any]:
        """GLUE's average of the tasks' scores, seed by seed."""
        return spread([statistics.fmean(scores[task, seed] for task in tasks) for seed in seeds] if tasks else [0.0])

    tasks = {
        name: {
            "title": TASKS[name].title,
            "score": spread([run["score"] for run in runs]),
            "score_of": list(TASKS[name].metrics),
            "metrics": {metric: spread([run["metrics"][metric] for run in runs]) for metric in runs[0]["metrics"]},
            "seeds": [run["seed"] for run in runs],
            "steps": [run["step"] for run in runs],
            "transferred_from": runs[0]["transferred_from"],
            "weights": [run["weights"] for run in runs],
            "protocol": runs[0]["protocol"],
        }
        for name, runs in by_task.items()
    }
    return {
        "tasks": tasks,
        "seeds": seeds,
        "average": average(list(by_task)),
        "average_without_wnli": average([name for name in by_task if name != "wnli"]),
        "is_whole": set(by_task) == set(TRAINED),
        "published": {name: {"source": source, "percent": figures} for name, (source, figures) in PUBLISHED.items()},
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of one value), and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": values}


def to_markdown(summary: dict[str, Any]) -> list[str]:
    """The lines of results.md."""
    rows = []
    for name, task in summary["tasks"].items():
        of = " and ".join(task["score_of"]) + (", matched and mismatched" if name == "mnli" else "")
        published = [str(figures.get(name, "")) for _, figures in PUBLISHED.values()]
        seeds = " ".join(f"{100 * value:.2f}" for value in task["score"]["values"])
        rows.append([task["title"], of, _percent(task["score"]), "; ".join(_metrics(task)), seeds, *published])
    return [
        "# GLUE, development set", "",
        markdown_table(["task", "metric", "score", "mean ± sd", "seeds", *PUBLISHED], rows), "",
        *_averages(summary), "",
        "## Protocol", "", *(f"- {line}" for line in protocol_lines(summary)), "",
        "## Published", "", *(f"- {name}: {source}" for name, (source, _) in PUBLISHED.items()), "", PUBLISHED_NOTE,
    ]  # fmt: skip


def to_terminal(summary: dict[str, Any]) -> str:
    """The same in columns of text, without the published figures."""
    lines = [f"{'task':<8}{'score':>16}   {'seeds':<32}metrics"]
    for task in summary["tasks"].values():
        seeds = " ".join(f"{100 * value:.1f}" for value in task["score"]["values"])
        lines.append(f"{task['title']:<8}{_percent(task['score']):>16}   {seeds:<32}{'  '.join(_metrics(task))}")
    return "\n".join([*lines, "", *_averages(summary), *protocol_lines(summary)])


def protocol_lines(summary: dict[str, Any]) -> list[str]:
    """How the scores came about; what differs between tasks names its tasks."""
    tasks, by_line = summary["tasks"], dict[str, dict[str, list[str]]]()
    for name, task in tasks.items():
        protocol, optimizer, scheduler = task["protocol"], task["protocol"]["optimizer"], task["protocol"]["scheduler"]
        percent, steps = scheduler["warmup_percent"], scheduler["warmup_steps"]
        warmup = f"{steps:,} steps of warmup" if percent is None else f"{percent:g} % warmup"
        shown = {key: value for key, value in protocol.items() if key not in HIDDEN and value is not None} | {
            "optimizer": f"{optimizer['name']}, lr {optimizer['lr']:g}, weight decay {optimizer['weight_decay']:g}",
            "schedule": f"{scheduler['name']}, {warmup}",
        }
        for key, value in shown.items():
            by_line.setdefault(key, {}).setdefault(str(value), []).append(name)
    lines = [
        f"{key}: {value}" + (f" ({', '.join(names)})" if len(by_value) > 1 else "")
        for key, by_value in by_line.items()
        for value, names in by_value.items()
    ]
    transferred = ", ".join(name for name, task in tasks.items() if task["transferred_from"])
    lines.append(f"transferred: {f'{transferred} from mnli of the same seed' if transferred else 'nothing'}")
    seeds = ", ".join(map(str, summary["seeds"]))
    return [*lines, f"seeds: {seeds}; they draw the head, the order of the rows and dropout"]


def _averages(summary: dict[str, Any]) -> list[str]:
    average = _percent(summary["average"])
    missing = [name for name in TRAINED if name not in summary["tasks"]]
    if not missing:
        without = f"without WNLI: {_percent(summary['average_without_wnli'])} (eight tasks, as papers print it)"
        return [f"GLUE average: {average} (all nine tasks)", without]
    if missing == ["wnli"]:
        return [f"average: {average} (eight tasks, without WNLI, as papers print it)"]
    return [f"average of these tasks: {average} (not GLUE's: {', '.join(missing)} missing)"]


def _metrics(task: dict[str, Any]) -> list[str]:
    return [f"{name} {_percent(values)}" for name, values in task["metrics"].items() if name not in ("loss", "score")]


def _percent(values: dict[str, Any]) -> str:
    deviation = "" if values["std"] is None else f" ± {100 * values['std']:.2f}"
    return f"{100 * values['mean']:.2f}{deviation}"
