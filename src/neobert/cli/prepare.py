"""The commands before training: config ..., tokenize, tokenizer train, data, verify-resume."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Exit, Option, Typer

from neobert.cli.options import TEXT_HELP, WITH_OVERRIDES, ConfigFile, TextColumn, layers, load
from neobert.errors import ConfigError, Problem, print_notes

config_app = Typer(no_args_is_help=True, help="Look at and check configurations, without training.")
tokenizer_app = Typer(no_args_is_help=True, help="Make tokenizers.")


@config_app.command("check", context_settings=WITH_OVERRIDES)
def config_check(context: Context, config: ConfigFile) -> None:
    """Check a file: all problems at once, each with its line, and what a run would not find. Takes a moment.

    \b
    Example:
      neobert config check my.yaml
    """
    from neobert.config.ready import check_ready

    loaded = load(config, context.args)
    print_notes(loaded.warnings)
    check_ready(loaded)
    print(f"{config}: ok ({loaded.config.task}, {len(loaded.origins)} keys set)")


@config_app.command("show", context_settings=WITH_OVERRIDES)
def config_show(context: Context, config: ConfigFile) -> None:
    """The whole configuration that a file comes to, defaults included; what was set says where.

    \b
    Example:
      neobert config show my.yaml --trainer.max_steps 100
    """
    from neobert.config.explain import show_config

    loaded = load(config, context.args)
    print_notes(loaded.warnings)
    print(show_config(loaded.config, loaded.origins))


@config_app.command("explain")
def config_explain(key: Annotated[str, Argument(metavar="KEY", help="Dotted, as trainer.max_steps.")]) -> None:
    """What a key means: type, default, bounds, what it changes, and the rules it takes part in.

    \b
    Example:
      neobert config explain scheduler.warmup_percent
    """
    from neobert.config.explain import explain_key

    print(explain_key(key))


@config_app.command("diff")
def config_diff(
    a: Annotated[Path, Argument(metavar="A", help="YAML file.")],
    b: Annotated[Path, Argument(metavar="B", help="YAML file.")],
) -> None:
    """What differs between two files once they are resolved: key: value in A -> value in B.

    \b
    Example:
      neobert config diff runs/first/config.yaml runs/second/config.yaml
    """
    from neobert.config.explain import diff_configs

    for line in diff_configs(load(a, []).config, load(b, []).config):
        print(line)


@config_app.command("schema")
def config_schema() -> None:
    """The JSON Schema of a configuration, for editors that complete and check YAML."""
    from neobert.config.schema import Config

    print(json.dumps(Config.model_json_schema(), indent=1))


@config_app.command("new")
def config_new(task: Annotated[str, Argument(metavar="TASK", help="pretraining, glue, contrastive or mteb.")]) -> None:
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
    as_json: Annotated[bool, Option("--json", help="A JSON list with type, default, bounds and help.")] = False,
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


def tokenize(
    corpus: Annotated[str, Argument(metavar="TEXT", help="File, folder or glob, or a `save_to_disk` folder.")],
    output: Annotated[Path, Option("-o", "--output", help="Folder of the tokens.")],
    tokenizer: Annotated[str, Option("-t", "--tokenizer", help="Folder of a tokenizer, or its name on the hub.")],
    num_proc: Annotated[int | None, Option(min=1, max=1024, help="Threads [one per core].")] = None,
    shard: Annotated[
        str, Option(metavar="I/N", help="Make every N-th shard from the I-th, counted from 1: for array jobs.")
    ] = "1/1",
    split: Annotated[str | None, Option(help="Split, or a slice of one, as train[:10%].")] = None,
    text_column: TextColumn = None,
    refuse: Annotated[bool, Option("--refuse-bad-rows", help="Stop at rows without usable text.")] = False,
) -> None:
    """Tokenise a corpus before training, into a folder that dataset.path takes.

    Started again after a crash, it goes on with the shards that are missing. Machines that share the folder may each
    take a part: they need not start together, nor talk to each other.

    \b
    Examples:
      neobert tokenize corpus/ -t tokenizer -o tokens/train
      neobert tokenize 'corpus/*.jsonl.zst' -t tokenizer -o tokens/train --shard $SLURM_ARRAY_TASK_ID/16
      neobert pretrain CONFIG --dataset.path tokens --dataset.streaming false --tokenizer.path tokenizer
    """
    from neobert.data.files.splits import find_splits
    from neobert.data.files.token_store import tokenize_files
    from neobert.data.tokenizer import cores, load_tokenizer, text_tokenizer

    share = parse_share(shard)
    files = find_splits(corpus, text_column, split, None)[0]
    encoder = text_tokenizer(load_tokenizer(tokenizer, tokenizer if Path(tokenizer).is_dir() else None))
    made, manifest = tokenize_files(files, encoder, output, num_proc or cores(), os.isatty(2), share, refuse)
    print(f"{output}: {made} shard{'s' if made != 1 else ''} made")
    if manifest is None:
        print("not whole yet: the other parts are missing")
        return
    skipped = manifest.describe_skipped()
    counts = f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"
    print(f"whole: {counts}" + (f"; {skipped}" if skipped else ""))


def parse_share(text: str) -> tuple[int, int]:
    """`2/16` -> (2, 16). Raises ConfigError."""
    first, slash, last = text.partition("/")
    if slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(Problem("--shard", f"expected I/N with I from 1 to N, got {text!r}"))


@tokenizer_app.command("train")
def tokenizer_train(
    files: Annotated[list[str], Argument(metavar="TEXT...", help=TEXT_HELP)],
    output: Annotated[Path, Option("-o", "--output", help="Folder of the new tokenizer.")],
    vocab_size: Annotated[int, Option(min=64, max=1_000_000, help="Tokens in the vocabulary.")] = 8192,
    kind: Annotated[Literal["wordpiece", "bpe"], Option(help="WordPiece, or byte-level BPE.")] = "wordpiece",
    cased: Annotated[bool, Option("--cased", help="Keep upper and lower case apart.")] = False,
    text_column: TextColumn = None,
    max_length: Annotated[int, Option(min=8, help="Longest input of the model.")] = 512,
) -> None:
    """Train a tokenizer on your text, with the special tokens that a masked LM needs.

    \b
    Examples:
      neobert tokenizer train corpus/*.txt -o tokenizer --vocab-size 16384
      neobert tokenizer train corpus/ -o tokenizer --kind bpe --cased
    """
    if kind == "bpe" and vocab_size < 261 + 1:
        raise ConfigError(
            Problem("--vocab-size", "byte-level BPE needs at least 262: 256 bytes, 5 special tokens, one more")
        )
    from neobert.data.tokenizer import train_from_files

    size, skips = train_from_files(
        files, text_column, os.isatty(2), output=output, vocab_size=vocab_size, lowercase=not cased, max_length=max_length,
        kind=kind,
    )  # fmt: skip
    note = skips.describe(form="\nnote: {}")
    print(f"{output}: {size:,} tokens{note}")
    print(f"next: neobert pretrain CONFIG --tokenizer.path {output}")


def data(
    context: Context,
    config: ConfigFile,
    rows: Annotated[int, Option(min=0, max=100, help="Rows to show.")] = 3,
    documents: Annotated[int, Option(min=1, help="Documents to look at for the figures.")] = 2000,
) -> None:
    """What training will see: rows with their documents and masks, lengths, fill, tokens per epoch, share cut.

    \b
    Example:
      neobert data my.yaml --rows 5 dataset.path=corpus/
    """
    from neobert.tasks.pretraining.checks import describe_data

    for line in describe_data(load(config, context.args, "pretraining").config, rows, documents):
        print(line)


def verify_resume(
    context: Context, config: ConfigFile, steps: Annotated[int, Option(min=4, max=10_000, help="Steps to train.")] = 6
) -> None:
    """Train a few steps, once in one go and once killed and resumed, and compare tokens, masks and losses.

    Nothing is written to the output folder. Exit code 1 when something differs.

    \b
    Example:
      neobert verify-resume my.yaml dataset.path=corpus/
    """
    from neobert.tasks.pretraining.checks import verify

    if not verify(*layers(config, context.args), steps):
        raise Exit(1)
