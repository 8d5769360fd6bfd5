"""The `neobert` command: parse, call, exit code. Heavy imports happen inside the commands, so `--help` is instant.

Exit codes: 0 done, 2 something the user can repair (one line per problem on stderr), 128 + n stopped by signal n.
"""

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer import Context, Exit, Option
from typer.models import CommandFunctionType as Command

from neobert.cli import models, prepare
from neobert.cli.options import OVERRIDES, WITH_OVERRIDES, ConfigFile, layers, load
from neobert.errors import ConfigError, Problem, UserError, disk_error, print_notes
from neobert.ranks import launched_ranks

if TYPE_CHECKING:
    from neobert.config.load import Loaded

app = typer.Typer(
    name="neobert", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train your own text encoder: raw text in; tokenizer, masked-LM pretraining, a checkpoint that transformers loads.",
    epilog="First steps:  neobert tokenizer train TEXT... -o tokenizer   |   neobert pretrain CONFIG   |   "
    'neobert fill-mask CHECKPOINT "some [MASK] text"',
)  # fmt: skip
app.add_typer(prepare.config_app, name="config")
app.add_typer(prepare.tokenizer_app, name="tokenizer")
NumProcesses = Annotated[
    int | None, Option("--nproc", min=1, max=1024, help="Processes on this machine [1, or as launched].")
]


def with_overrides(options: str) -> Callable[[Command], Command]:
    """Registers a command that takes a configuration file and, after it, overrides of any key."""
    return app.command(context_settings=WITH_OVERRIDES, options_metavar=f"{options} {OVERRIDES}")


@with_overrides("[--nproc N]")
def run(context: Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
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
def pretrain(context: Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
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
def contrastive(context: Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
    """Train sentence embeddings on your pairs, from a pretrained encoder.

    \b
    Example:
      neobert contrastive configs/contrastive/small.yaml --dataset.path pairs.jsonl \\
          --contrastive.pretrained_checkpoint_dir runs/first
    """
    _run("contrastive", "contrastive", config, context.args, nproc)


@with_overrides("[OPTIONS]")
def glue(
    context: Context, config: ConfigFile, nproc: NumProcesses = None,
    tasks: Annotated[str | None, Option(help="`all`, or names: cola,rte. A suite: one run per task and seed.")] = None,
    seeds: Annotated[int | None, Option(min=1, max=1000, help="Runs per task, from `seed` up.")] = None,
    predict: Annotated[bool, Option("--predict", help="Write the files that GLUE's server takes.")] = False,
) -> None:  # fmt: skip
    """Fine-tune on GLUE: one task, or a suite over tasks and seeds with a table.

    A suite that was stopped goes on with the runs that are missing. Its table is on the terminal and in
    results.md and results.json of trainer.output_dir.

    \b
    Examples:
      neobert glue configs/glue/small.yaml --glue.task_name rte
      neobert glue configs/glue/small.yaml --tasks all --seeds 5 --dataset.path glue/
      neobert glue outputs/glue-small/config.yaml --predict
    """
    loaded = load(config, context.args, "glue")
    is_suite = tasks is not None or seeds is not None
    names = parse_tasks(tasks or loaded.config.glue.task_name) if is_suite else []
    if is_suite or not predict:
        given = {"--tasks": tasks, "--seeds": seeds}
        options = [f"{name}={value}" for name, value in given.items() if value is not None]
        options += ["--predict"] if predict else []
        _start(loaded, ["glue", str(config), *context.args, *options], nproc)
    elif nproc is not None:
        raise ConfigError(Problem("--nproc", "one process predicts; leave it out"))
    if is_suite:
        from neobert.insight.report import write_report
        from neobert.tasks.glue.suite import run_suite

        raise Exit(run_suite(*layers(config, context.args), names, seeds or 1, predict, write_report))
    if predict:
        from neobert.tasks.glue.suite import predict_run

        predict_run(loaded.config)
    else:
        _train(loaded)


def parse_tasks(text: str) -> list[str]:
    """`all` or `cola,rte` -> names in the order of GLUE's table. Raises ConfigError."""
    from neobert.data.labelled import TASKS

    trained = [task.name for task in TASKS.values() if task.trains]
    names = trained if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in trained:
            hint = "; ax is predicted by mnli's models, with --predict" if name == "ax" else ""
            raise ConfigError(Problem("--tasks", f"no task {name!r}; there are: all, {', '.join(trained)}{hint}"))
    return [name for name in trained if name in names]


def _run(command: str, task: str | None, first: Path, arguments: list[str], nproc: int | None) -> None:
    """Run a file of `task`, or, where that is None, of whatever task it says."""
    loaded = load(first, arguments, task)
    if loaded.config.task == "mteb":
        models.evaluate_mteb(loaded)
    else:
        _start(loaded, [command, str(first), *arguments], nproc)
        _train(loaded)


def _start(loaded: "Loaded", command: list[str], nproc: int | None) -> None:
    """Check what a run needs. Where several processes are asked for, run `neobert <command>` in them and exit as they do."""
    from neobert.config.ready import check_ready

    check_ready(loaded)
    config = loaded.config
    if nproc is not None or config.accelerate_config_file is not None:
        from neobert.training.processes import launch, plan_launch

        plan, notes = plan_launch(config, nproc)
        print_notes(notes)
        if plan is not None:
            raise Exit(launch(command, plan, config.trainer.use_cpu))


def _train(loaded: "Loaded") -> None:
    """Train in this process, and write the report of the run."""
    from importlib import import_module

    from neobert.insight.report import write_report

    finished = import_module(f"neobert.tasks.{loaded.config.task}.task").run(loaded)
    if finished.is_main:
        write_report(finished.folder)
    if finished.exit_code:
        raise Exit(finished.exit_code)


app.command()(models.report)
with_overrides("[--rows N] [--documents N]")(prepare.data)
with_overrides("[--steps N]")(prepare.verify_resume)
app.command()(prepare.tokenize)
app.command()(models.fill_mask)
app.command()(models.embed)
app.command()(models.similarity)
with_overrides("[--model PATH]")(models.mteb)
app.command()(models.pseudo_perplexity)
app.command()(models.export)
app.command("import")(models.import_)


def _prepare_process() -> None:
    """Libraries that print progress and advice of their own would garble our output; a corpus may have thousands of files.
    Looking for plugins of pydantic, of which our models have none, reads the metadata of every installed package.
    """
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "PYDANTIC_DISABLE_PLUGINS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
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
        if (failed := disk_error(error)) is None:
            raise
        _fail(str(failed))
    finally:  # handlers of Python would interrupt what runs when the interpreter ends
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
