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
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from neobert.cli import data as cli_data
from neobert.cli import embed as cli_embed
from neobert.cli import evaluate as cli_evaluate
from neobert.cli import export as cli_export
from neobert.cli import glue as cli_glue
from neobert.cli.options import OVERRIDES, WITH_OVERRIDES, ConfigFile, NumProcesses, start_processes
from neobert.cli.options import layers as _layers
from neobert.errors import ConfigError, Problem, UserError, disk_error, print_notes
from neobert.ranks import launched_ranks

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


@app.command(context_settings=WITH_OVERRIDES, options_metavar="[--nproc N] " + OVERRIDES)
def run(context: typer.Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
    """Run what the file's `task` says.

    Keys can be set behind the file, as --section.key value or section.key=value; the last one wins. Further YAML files
    directly behind the first one are laid over it.

    \b
    Examples:
      neobert run configs/pretraining/quickstart.yaml --trainer.max_steps 100 optimizer.lr=3e-4
      neobert run base.yaml mine.yaml --trainer.output_dir runs/second
      neobert run outputs/quickstart/config.yaml --trainer.resume_from_checkpoint latest
      neobert run my.yaml --nproc 2 --trainer.engine fsdp2
      torchrun --nproc-per-node 8 --module neobert run my.yaml
    """
    _run(config, context.args, None, nproc)


@app.command(context_settings=WITH_OVERRIDES, options_metavar="[--nproc N] " + OVERRIDES)
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
    _run(config, context.args, "pretraining", nproc)


@app.command(context_settings=WITH_OVERRIDES, options_metavar="[--nproc N] " + OVERRIDES)
def contrastive(context: typer.Context, config: ConfigFile, nproc: NumProcesses = None) -> None:
    """Train sentence embeddings on your pairs, from a pretrained encoder.

    \b
    Example:
      neobert contrastive configs/contrastive/small.yaml --dataset.path pairs.jsonl \\
          --contrastive.pretrained_checkpoint_dir runs/first
    """
    _run(config, context.args, "contrastive", nproc)


@app.command(context_settings=WITH_OVERRIDES, options_metavar="[OPTIONS] " + OVERRIDES)
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
    code = cli_glue.run_glue(config, context.args, tasks, seeds, predict, nproc)
    if code:
        raise typer.Exit(code)


def _run(first: Path, words: list[str], task: str | None, nproc: int | None) -> None:
    from neobert.config.load import load_config
    from neobert.config.ready import check_ready

    loaded = load_config(*_layers(first, words), task)
    if loaded.config.task == "mteb":
        raise typer.Exit(cli_evaluate.run_mteb(*_layers(first, words), None))
    check_ready(loaded)
    command = [{None: "run", "pretraining": "pretrain"}.get(task, task or ""), str(first), *words]
    code = start_processes(loaded.config, nproc, command)
    if code is not None:
        raise typer.Exit(code)
    from importlib import import_module

    from neobert.insight.report import write_report

    finished = import_module(f"neobert.tasks.{loaded.config.task}.task").run(loaded)
    if finished.is_main:
        write_report(finished.folder)
    if finished.exit_code:
        raise typer.Exit(finished.exit_code)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write [RUN/report.html].")] = None,
) -> None:
    """A run as one self-contained HTML page: loss, learning rate, throughput, step times.

    \b
    Example:
      neobert report outputs/quickstart
    """
    from neobert.insight.report import write_report

    print(write_report(run_folder, output))


@config_app.command("check", context_settings=WITH_OVERRIDES)
def config_check(context: typer.Context, config: ConfigFile) -> None:
    """Check a file: all problems at once, each with its line, and what a run would not find. Takes a moment.

    \b
    Example:
      neobert config check my.yaml
    """
    from neobert.config.load import load_config
    from neobert.config.ready import check_ready

    loaded = load_config(*_layers(config, context.args))
    print_notes(loaded.warnings)
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
    from neobert.config.load import load_config

    loaded = load_config(*_layers(config, context.args))
    print_notes(loaded.warnings)
    print(show_config(loaded.config, loaded.origins))


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
    from neobert.config.reference import known_keys

    keys = known_keys().values()
    if as_json:
        defaults = {"default": _plain}
        print(json.dumps([info.as_json() for info in keys], indent=1, **defaults))
        return
    for info in keys:
        choices = f" ({', '.join(info.choices)})" if info.choices else ""
        print(f"{info.key}: {info.type} = {json.dumps(info.default, default=_plain)}{choices}\n    {info.help}")


def _plain(value: Any) -> Any:
    return value.model_dump()


@app.command("data", context_settings=WITH_OVERRIDES, options_metavar="[--rows N] [--documents N] " + OVERRIDES)
def data(
    context: typer.Context,
    config: ConfigFile,
    rows: Annotated[int, typer.Option(min=0, max=100, help="Rows to show.")] = 3,
    documents: Annotated[int, typer.Option(min=1, help="Documents to look at for the figures.")] = 2000,
) -> None:
    """What training will see: rows with their documents and masks, lengths, fill, tokens per epoch, share cut.

    \b
    Example:
      neobert data my.yaml --rows 5 dataset.path=corpus/
    """
    cli_data.show_data(*_layers(config, context.args), rows, documents)


@app.command("verify-resume", context_settings=WITH_OVERRIDES, options_metavar="[--steps N] " + OVERRIDES)
def verify_resume(
    context: typer.Context,
    config: ConfigFile,
    steps: Annotated[int, typer.Option(min=4, max=10_000, help="Steps to train.")] = 6,
) -> None:
    """Train a few steps, once in one go and once killed and resumed, and compare tokens, masks and losses.

    Nothing is written to the output folder. Exit code 1 when something differs.

    \b
    Example:
      neobert verify-resume my.yaml dataset.path=corpus/
    """
    if not cli_data.verify_resume(*_layers(config, context.args), steps):
        raise typer.Exit(1)


app.command("tokenize")(cli_data.tokenize)
app.command("fill-mask")(cli_evaluate.fill_mask)
app.command("embed")(cli_embed.embed)
app.command("similarity")(cli_embed.similarity)
app.command("mteb", context_settings=WITH_OVERRIDES, options_metavar="[--model PATH] " + OVERRIDES)(cli_evaluate.mteb)
app.command("pseudo-perplexity")(cli_evaluate.pseudo_perplexity)
app.command("export")(cli_export.export)
app.command("import")(cli_export.import_)
tokenizer_app.command("train")(cli_data.tokenizer_train)


def _quiet_libraries() -> None:
    """Libraries that print progress and advice of their own would garble our output."""
    for name, value in {"TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _allow_open_files() -> None:
    """As many open files as the system lets a process have: a corpus may have thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a hard limit that it does not allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))


def _end(number: int, frame: FrameType | None) -> None:
    """A signal, where nothing better is done about it: exit code 128 + its number, as the shell has it."""
    sys.exit(128 + number)


def _complain(message: str) -> NoReturn:
    """Print what is wrong and exit. What all processes find wrong, the main one says; it is given the time to."""
    number = launched_ranks().rank
    if number:
        time.sleep(3)
    for line in message.splitlines():
        print(f"error: {f'process {number}: ' if number else ''}{line}", file=sys.stderr, flush=True)
    os._exit(2) if number else sys.exit(2)


def _has_lost_peer(error: RuntimeError) -> bool:
    from neobert.training.runtime import is_lost_peer

    return is_lost_peer(error)


def main() -> None:
    """Entry point: user errors become plain lines and exit code 2."""
    _quiet_libraries()
    _allow_open_files()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end)
    try:
        app()
    except UserError as error:
        _complain(str(error))
    except RuntimeError as error:
        if not _has_lost_peer(error):
            raise
        _complain("the connection to another process broke off: it has ended, and its own message says why")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        failed = disk_error(error)
        if failed is None:
            raise
        _complain(str(failed))


if __name__ == "__main__":
    main()
