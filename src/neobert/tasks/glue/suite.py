"""`neobert glue CONFIG --tasks .. --seeds ..`: one run per task and seed, and a table of them.

    <output_dir>/<task>/seed-<n>/     a run each: result.json when it has come to its end
    <output_dir>/results.json  results.md  submission/

A suite that was stopped goes on: finished runs stand, a run in progress resumes from its checkpoint, exactly. Of a finished
run only the weights of its result are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from neobert.checkpoints.format import list_steps
from neobert.checkpoints.initial_weights import find_initial_weights
from neobert.checkpoints.retention import prune, strip_checkpoint
from neobert.config.load import Loaded, load_config
from neobert.data.labelled.tasks import TASKS
from neobert.errors import ConfigError, Problem, print_notes
from neobert.files import write_json, write_text
from neobert.tasks.glue import task as glue
from neobert.tasks.glue.data import find_all_files
from neobert.tasks.glue.metrics import check_metrics
from neobert.tasks.glue.predict import FOLDER, write_predictions
from neobert.tasks.glue.table import summarize, to_markdown, to_terminal
from neobert.training.run import main_prints_only, start_runtime
from neobert.training.run_folder import hold_folder
from neobert.training.runtime import Runtime

TRANSFERRED = ("rte", "mrpc", "stsb")  # from mnli, with glue.transfer_from_task


@dataclass(frozen=True)
class Planned:
    """One run of a suite."""

    task: str
    seed: int
    folder: Path
    loaded: Loaded


def run_suite(
    files: list[str],
    overrides: list[str],
    tasks: list[str],
    num_seeds: int,
    predict: bool,
    after_run: Callable[[Path], object] = lambda folder: None,
) -> int:
    """Run what is missing, then write the table. `after_run` is called with the folder of each run, in the main process.

    Returns the exit code. Raises UserError, for what can be seen beforehand before anything is trained.
    """
    check_metrics()
    base = load_config(files, overrides, "glue")
    runtime = start_runtime(base.config)
    with main_prints_only(runtime):
        print_notes(base.warnings if runtime.is_main else [])
        plan, output = make_plan(base, files, overrides, tasks, num_seeds), Path(base.config.trainer.output_dir)
        check_plan(plan)
        with hold_folder(output, runtime):
            results, code = run_plan(plan, runtime, after_run)
            if not code:
                runtime.on_main(lambda: write_table(results, output))
                if predict:
                    runtime.on_main(lambda: predict_best(plan, results, output / FOLDER, runtime))
    runtime.close()
    return code


def run_plan(
    plan: list[Planned], runtime: Runtime, after_run: Callable[[Path], object]
) -> tuple[list[dict[str, Any]], int]:
    """(results, exit code) of the runs, up to the first one that was stopped."""
    results: list[dict[str, Any]] = []
    for number, one in enumerate(plan, 1):
        result = runtime.on_main(partial(finished_result, one, runtime))
        if result is None:
            print(f"\n=== {number} of {len(plan)}: {one.task}, seed {one.seed} ===", flush=True)
            finished = glue.run(one.loaded)
            runtime.on_main(partial(after_run, one.folder))
            if finished.exit_code:
                print(f"\n{len(results)} of {len(plan)} runs are finished; the same command goes on with the rest")
                return results, finished.exit_code
            result = runtime.on_main(partial(take_result, one))
        results.append(result)
    return results, 0


def take_result(one: Planned) -> dict[str, Any]:
    """What a run came to; only its weights are kept."""
    result = glue.read_result(one.folder)
    assert result is not None
    keep_weights_only(one.folder, result["step"])
    return result


def write_table(results: list[dict[str, Any]], output: Path) -> None:
    """results.json, results.md, and the same on the console."""
    summary = summarize(results)
    write_json(output / "results.json", summary)
    write_text(output / "results.md", to_markdown(summary))
    print("\n" + to_terminal(summary) + f"\ntable       {output / 'results.md'}, {output / 'results.json'}")


def make_plan(base: Loaded, files: list[str], overrides: list[str], tasks: list[str], num_seeds: int) -> list[Planned]:
    """The runs in their order; those that transfer come behind the mnli they start from."""
    glue_config, output = base.config.glue, Path(base.config.trainer.output_dir)
    transfer = glue_config.transfer_from_task
    if transfer and "mnli" not in tasks:
        problem = "a suite transfers from mnli to rte, mrpc and stsb, and --tasks has no mnli"
        raise ConfigError(Problem("glue.transfer_from_task", problem))
    ordered = sorted(tasks, key=lambda name: transfer and name in TRANSFERRED)
    plan = []
    for task in ordered:
        for seed in range(base.config.seed, base.config.seed + num_seeds):
            folder = output / task / f"seed-{seed}"
            words = [
                f"glue.task_name={task}", f"glue.num_labels={TASKS[task].num_labels}", f"seed={seed}",
                f"trainer.output_dir={folder}", "trainer.resume_from_checkpoint=latest",
                f"glue.transfer_from_task={str(transfer and task in TRANSFERRED).lower()}",
            ]  # fmt: skip
            if transfer and task in TRANSFERRED:
                donor = output / "mnli" / f"seed-{seed}"
                words += [f"glue.pretrained_checkpoint_dir={donor}", "glue.pretrained_checkpoint=latest"]
            loaded = load_config(files, [*overrides, *words], "glue")
            plan.append(Planned(task, seed, folder, replace(loaded, warnings=[])))  # the suite gives them once
    return plan


def check_plan(plan: list[Planned]) -> None:
    """Find at once what would stop a run hours later: metrics, files, weights. Raises UserError."""
    for one in {planned.task: planned for planned in plan}.values():
        config = one.loaded.config
        glue.check_best_metric(config, TASKS[one.task])
        find_all_files(config, TASKS[one.task])
        if not config.glue.transfer_from_task:
            find_initial_weights(config)


def finished_result(one: Planned, runtime: Runtime) -> dict[str, Any] | None:
    """The result of a run that was finished before, under the same protocol. Raises ConfigError when it was another."""
    result = glue.read_result(one.folder)
    if result is None:
        return None
    start = find_initial_weights(one.loaded.config)
    task = TASKS[one.task]
    now = glue.protocol(glue.settle(one.loaded.config, task, start, {}), start, runtime)
    changed = [name for name, value in now.items() if result["protocol"].get(name) != value]
    if changed:
        was, is_now = result["protocol"].get(changed[0]), now[changed[0]]
        problem = (
            f"{one.folder} was run with {changed[0]} {was}, not {is_now}; choose another folder, or remove that one"
        )
        raise ConfigError(Problem("trainer.output_dir", problem))
    print(f"{one.task}, seed {one.seed}: finished, score {result['score']:.4f}")
    keep_weights_only(one.folder, result["step"])
    return result


def keep_weights_only(folder: Path, step: int) -> None:
    """Of a finished run keep the checkpoint of its result, without what resuming needs."""
    root = folder / "checkpoints"
    if step in list_steps(root):
        strip_checkpoint(root / str(step))
        prune(root, 1, {step}, keep_newest=False)


def predict_best(plan: list[Planned], results: list[dict[str, Any]], output: Path, runtime: Runtime) -> None:
    """The submission of every task, by the seed that scored best on the evaluation split."""
    for task in dict.fromkeys(one.task for one in plan):
        pairs = [(r["score"], one) for one, r in zip(plan, results, strict=True) if one.task == task]
        best = max(pairs, key=lambda pair: pair[0])[1]
        write_predictions(best.loaded.config, best.folder, output, runtime.alone())
