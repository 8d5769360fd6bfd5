"""The command `glue`: one run, a suite, or predictions. Registered in `cli.py`."""

from pathlib import Path

from neobert.cli.options import layers, start_processes
from neobert.errors import ConfigError, Problem


def run_glue(
    first: Path, words: list[str], tasks: str | None, seeds: int | None, predict: bool, nproc: int | None
) -> int:
    """Returns the exit code. Raises UserError."""
    from neobert.config.load import load_config
    from neobert.config.ready import check_ready

    files, overrides = layers(first, words)
    loaded = load_config(files, overrides, "glue")
    names = parse_tasks(tasks or loaded.config.glue.task_name) if tasks is not None or seeds is not None else []
    if names or not predict:
        check_ready(loaded)
        given = {"--tasks": tasks, "--seeds": seeds}
        options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
        command = ["glue", str(first), *words, *options, *(["--predict"] if predict else [])]
        code = start_processes(loaded.config, nproc, command)
        if code is not None:
            return code
    elif nproc is not None:
        raise ConfigError(Problem("--nproc", "one process predicts; leave it out"))
    from neobert.insight.report import write_report
    from neobert.tasks.glue import predict as glue_predict
    from neobert.tasks.glue import suite as glue_suite
    from neobert.tasks.glue import task as glue

    if names:
        return glue_suite.run_suite(files, overrides, names, seeds or 1, predict, write_report)
    if predict:
        glue_predict.predict_run(loaded.config)
        return 0
    finished = glue.run(loaded)
    if finished.is_main:
        write_report(finished.folder)
    return finished.exit_code


def parse_tasks(text: str) -> list[str]:
    """`all` or `cola,rte` -> names in the order of GLUE's table. Raises ConfigError."""
    from neobert.data.labelled.tasks import TASKS

    trained = [task.name for task in TASKS.values() if task.trains]
    names = trained if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in trained:
            hint = "; ax is predicted by mnli's models, with --predict" if name == "ax" else ""
            raise ConfigError(Problem("--tasks", f"no task {name!r}; there are: all, {', '.join(trained)}{hint}"))
    return [name for name in trained if name in names]
