"""The commands about data: tokenize, data, verify-resume, tokenizer train."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from neobert.cli import TEXT_HELP, ConfigFile, TextColumn, layers
from neobert.errors import ConfigError, Problem


def tokenize(
    corpus: Annotated[str, typer.Argument(metavar="TEXT", help="File, folder or glob, or a `save_to_disk` folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the tokens.")],
    tokenizer: Annotated[str, typer.Option("-t", "--tokenizer", help="Folder of a tokenizer, or its name on the hub.")],
    num_proc: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads [one per core].")] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Make every N-th shard from the I-th, counted from 1: for array jobs.")
    ] = "1/1",
    split: Annotated[str | None, typer.Option(help="Split, or a slice of one, as train[:10%].")] = None,
    text_column: TextColumn = None,
    refuse: Annotated[bool, typer.Option("--refuse-bad-rows", help="Stop at rows without usable text.")] = False,
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
    print(f"whole: {manifest.counts}{manifest.describe_skipped('; {}')}")


def parse_share(text: str) -> tuple[int, int]:
    """`2/16` -> (2, 16). Raises ConfigError."""
    first, slash, last = text.partition("/")
    if slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(Problem("--shard", f"expected I/N with I from 1 to N, got {text!r}"))


def tokenizer_train(
    files: Annotated[list[str], typer.Argument(metavar="TEXT...", help=TEXT_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new tokenizer.")],
    vocab_size: Annotated[int, typer.Option(min=64, max=1_000_000, help="Tokens in the vocabulary.")] = 8192,
    kind: Annotated[Literal["wordpiece", "bpe"], typer.Option(help="WordPiece, or byte-level BPE.")] = "wordpiece",
    cased: Annotated[bool, typer.Option("--cased", help="Keep upper and lower case apart.")] = False,
    text_column: TextColumn = None,
    max_length: Annotated[int, typer.Option(min=8, help="Longest input of the model.")] = 512,
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
    from neobert.config.load import load_config
    from neobert.tasks.pretraining.checks import describe_data

    loaded = load_config(*layers(config, context.args), "pretraining")
    for line in describe_data(loaded.config, rows, documents):
        print(line)


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
    from neobert.tasks.pretraining.checks import verify

    if not verify(*layers(config, context.args), steps):
        raise typer.Exit(1)
