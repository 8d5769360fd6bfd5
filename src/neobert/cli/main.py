"""The `neobert` command: parse, call, exit code. Heavy imports happen inside the commands, so `--help` is instant.

Exit codes: 0 done, 2 something the user can repair (one line per problem on stderr), 128 + n stopped by signal n.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from neobert.cli import OVERRIDES, WITH_OVERRIDES, ConfigFile, NumProcesses, data, layers, models
from neobert.errors import ConfigError, Problem, UserError, disk_error, print_notes
from neobert.ranks import launched_ranks

if TYPE_CHECKING:
    from neobert.config.load import Loaded

Command = TypeVar("Command", bound=Callable[..., Any])
app = typer.Typer(
    name="neobert",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train your own text encoder: raw text in; tokenizer, masked-LM pretraining, a checkpoint that transformers loads.",
    epilog="First steps:  neobert tokenizer train TEXT... -o tokenizer   |   neobert pretrain CONFIG   |   "
    'neobert fill-mask CHECKPOINT "some [MASK] text"',
)
config_app = typer.Typer(no_args_is_help=True, help="Look at and check configurations, without training.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Make tokenizers.")
app.add_typer(config_app, name="config")
app.add_typer(tokenizer_app, name="tokenizer")


def with_overrides(options: str, name: str | None = None) -> Callable[[Command], Command]:
    """Registers a command that takes a configuration file and, after it, overrides of any key."""
    return app.command(name, context_settings=WITH_OVERRIDES, options_metavar=f"{options} {OVERRIDES}")


@with_overrides("[--nproc N]")
def run(context: typer.Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
    """Run what the file's `task` says.

    Keys can be set after the file, as --section.key value or section.key=value; the last one wins. Further YAML files
    directly after the first one are laid over it.

    \b
    Examples:
      neobert run configs/pretraining/quickstart.yaml --trainer.max_steps 100 optimizer.lr=3e-4
      neobert run base.yaml mine.yaml --trainer.output_dir runs/second
      neobert run outputs/quickstart/config.yaml --trainer.resume_from_checkpoint latest
      neobert run my.yaml --nproc 2 --trainer.engine fsdp2
      torchrun --nproc-per-node 8 --module neobert run my.yaml
    """
    _run("run", None, config, context.args, nproc)


@with_overrides("[--nproc N]")
def pretrain(context: typer.Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
    """Masked-LM pretraining on your text.

    Stop with Ctrl-C at any time: a checkpoint is written. Go on with --trainer.resume_from_checkpoint latest.

    \b
    Examples:
      neobert pretrain configs/pretraining/quickstart.yaml
      neobert pretrain configs/pretraining/quickstart.yaml --dataset.path corpus/ \\
          --tokenizer.path tokenizer/ --trainer.output_dir runs/first
      neobert pretrain my.yaml --trainer.resume_from_checkpoint latest --trainer.max_steps 20000
    """
    _run("pretrain", "pretraining", config, context.args, nproc)


@with_overrides("[--nproc N]")
def contrastive(context: typer.Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
    """Train sentence embeddings on your pairs, from a pretrained encoder.

    \b
    Example:
      neobert contrastive configs/contrastive/small.yaml --dataset.path pairs.jsonl \\
          --contrastive.pretrained_checkpoint_dir runs/first
    """
    _run("contrastive", "contrastive", config, context.args, nproc)


@with_overrides("[OPTIONS]")
def glue(
    context: typer.Context,
    config: ConfigFile,
    nproc: NumProcesses = None,
    tasks: Annotated[
        str | None, typer.Option(help="`all`, or names: cola,rte. A suite: one run per task and seed.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=1000, help="Runs per task, from `seed` up.")] = None,
    predict: Annotated[bool, typer.Option("--predict", help="Write the files that GLUE's server takes.")] = False,
) -> None:
    """Fine-tune on GLUE: one task, or a suite over tasks and seeds with a table.

    A suite that was stopped goes on with the runs that are missing. Its table is on the terminal and in
    results.md and results.json of trainer.output_dir.

    \b
    Examples:
      neobert glue configs/glue/small.yaml --glue.task_name rte
      neobert glue configs/glue/small.yaml --tasks all --seeds 5 --dataset.path glue/
      neobert glue outputs/glue-small/config.yaml --predict
    """
    from neobert.config.load import load_config

    files, overrides = layers(config, context.args)
    loaded = load_config(files, overrides, "glue")
    is_suite = tasks is not None or seeds is not None
    names = parse_tasks(tasks or loaded.config.glue.task_name) if is_suite else []
    if is_suite or not predict:
        given = {"--tasks": tasks, "--seeds": seeds}
        options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
        options += ["--predict"] if predict else []
        _start(loaded, ["glue", str(config), *context.args, *options], nproc)
    elif nproc is not None:
        raise ConfigError(Problem("--nproc", "one process predicts; leave it out"))
    if is_suite:
        from neobert.insight.report import write_report
        from neobert.tasks.glue.suite import run_suite

        raise typer.Exit(run_suite(files, overrides, names, seeds or 1, predict, write_report))
    if predict:
        from neobert.tasks.glue.predict import predict_run

        predict_run(loaded.config)
    else:
        _train(loaded)


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


def _run(command: str, task: str | None, first: Path, arguments: list[str], nproc: int | None) -> None:
    """Run a file of `task`, or, where that is None, of whatever task it says."""
    from neobert.config.load import load_config

    loaded = load_config(*layers(first, arguments), task)
    if loaded.config.task == "mteb":
        models.evaluate_mteb(loaded)
    else:
        _start(loaded, [command, str(first), *arguments], nproc)
        _train(loaded)


def _start(loaded: "Loaded", command: list[str], nproc: int | None) -> None:
    """Check what a run needs. Where `--nproc` or a file of Accelerate ask for several processes, run `neobert <command>` in
    them and exit as they do.
    """
    from neobert.config.ready import check_ready

    check_ready(loaded)
    config = loaded.config
    if nproc is not None or config.accelerate_config_file is not None:
        from neobert.training.processes import launch, plan_launch

        plan, notes = plan_launch(config, nproc)
        print_notes(notes)
        if plan is not None:
            raise typer.Exit(launch(command, plan, config.trainer.use_cpu))


def _train(loaded: "Loaded") -> None:
    """Train in this process, and write the report of the run."""
    from importlib import import_module

    from neobert.insight.report import write_report

    finished = import_module(f"neobert.tasks.{loaded.config.task}.task").run(loaded)
    if finished.is_main:
        write_report(finished.folder)
    if finished.exit_code:
        raise typer.Exit(finished.exit_code)


@config_app.command("check", context_settings=WITH_OVERRIDES)
def config_check(context: typer.Context, config: ConfigFile) -> None:
    """Check a file: all problems at once, each with its line, and what a run would not find. Takes a moment.

    \b
    Example:
      neobert config check my.yaml
    """
    from neobert.config.ready import check_ready

    loaded = _load_and_warn(config, context)
    check_ready(loaded)
    print(f"{config}: ok ({loaded.config.task}, {len(loaded.origins)} keys set)")


@config_app.command("show", context_settings=WITH_OVERRIDES)
def config_show(context: typer.Context, config: ConfigFile) -> None:
    """The whole configuration that a file comes to, defaults included; what was set says where.

    \b
    Example:
      neobert config show my.yaml --trainer.max_steps 100
    """
    from neobert.config.explain import show_config

    loaded = _load_and_warn(config, context)
    print(show_config(loaded.config, loaded.origins))


def _load_and_warn(config: Path, context: typer.Context) -> "Loaded":
    from neobert.config.load import load_config

    loaded = load_config(*layers(config, context.args))
    print_notes(loaded.warnings)
    return loaded


@config_app.command("explain")
def config_explain(key: Annotated[str, typer.Argument(metavar="KEY", help="Dotted, as trainer.max_steps.")]) -> None:
    """What a key means: type, default, bounds, what it changes, and the rules it takes part in.

    \b
    Example:
      neobert config explain scheduler.warmup_percent
    """
    from neobert.config.explain import explain_key

    print(explain_key(key))


@config_app.command("diff")
def config_diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="YAML file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="YAML file.")],
) -> None:
    """What differs between two files once they are resolved: key: value in A -> value in B.

    \b
    Example:
      neobert config diff runs/first/config.yaml runs/second/config.yaml
    """
    from neobert.config.explain import diff_configs
    from neobert.config.load import load_config

    for line in diff_configs(load_config([str(a)]).config, load_config([str(b)]).config):
        print(line)


@config_app.command("schema")
def config_schema() -> None:
    """The JSON Schema of a configuration, for editors that complete and check YAML."""
    from neobert.config.schema import Config

    print(json.dumps(Config.model_json_schema(), indent=1))


@config_app.command("new")
def config_new(
    task: Annotated[str, typer.Argument(metavar="TASK", help="pretraining, glue, contrastive or mteb.")],
) -> None:
    """A commented starter file.

    \b
    Example:
      neobert config new pretraining > my.yaml
    """
    from neobert.config.explain import STARTERS, starter_file

    if task not in STARTERS:
        raise ConfigError(Problem("TASK", f"must be one of {', '.join(STARTERS)}, got {task!r}"))
    print(starter_file(task), end="")


@config_app.command("keys")
def config_keys(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list with type, default, bounds and help.")] = False,
) -> None:
    """Every key with its type, default and meaning.

    \b
    Example:
      neobert config keys | grep warmup
    """
    from neobert.config.explain import plain_json
    from neobert.config.schema import known_keys

    keys = known_keys().values()
    if as_json:
        print(plain_json([info.as_json() for info in keys], indent=1))
        return
    for info in keys:
        choices = f" ({', '.join(info.choices)})" if info.choices else ""
        print(f"{info.key}: {info.type} = {plain_json(info.default)}{choices}\n    {info.help}")


COMMANDS: tuple[tuple[str, Callable[..., None], str | None], ...] = (
    ("report", models.report, None),
    ("data", data.data, "[--rows N] [--documents N]"),
    ("verify-resume", data.verify_resume, "[--steps N]"),
    ("tokenize", data.tokenize, None),
    ("fill-mask", models.fill_mask, None),
    ("embed", models.embed, None),
    ("similarity", models.similarity, None),
    ("mteb", models.mteb, "[--model PATH]"),
    ("pseudo-perplexity", models.pseudo_perplexity, None),
    ("export", models.export, None),
    ("import", models.import_, None),
)
for name, command, options in COMMANDS:
    (with_overrides(options, name) if options else app.command(name))(command)
tokenizer_app.command("train")(data.tokenizer_train)


def _prepare_process() -> None:
    """Libraries that print progress and advice of their own would garble our output; a corpus may have thousands of files."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a hard limit that it does not allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """A signal, where nothing better is done about it: exit code 128 + its number, as the shell has it."""
    sys.exit(128 + number)


def _fail(message: str) -> NoReturn:
    """Print what is wrong and exit. The main process is given the time to print first what all processes find."""
    number = launched_ranks().rank
    if number:
        time.sleep(3)
    for line in message.splitlines():
        print(f"error: {f'process {number}: ' if number else ''}{line}", file=sys.stderr, flush=True)
    if number:
        os._exit(2)
    sys.exit(2)


def main() -> None:
    """Entry point: user errors become plain lines and exit code 2."""
    _prepare_process()
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except RuntimeError as error:
        from neobert.training.runtime import is_lost_peer

        if not is_lost_peer(error):
            raise
        _fail("the connection to another process broke off: it has ended, and its own message says why")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        failed = disk_error(error)
        if failed is None:
            raise
        _fail(str(failed))


if __name__ == "__main__":
    main()
