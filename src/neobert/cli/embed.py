"""The commands `embed` and `similarity`. Registered in `cli.py`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

Checkpoint = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="A run's output folder, one of its checkpoints, or an encoder's folder."),
]
PoolingOption = Annotated[
    Literal["avg", "cls", "max"] | None,
    typer.Option(help="How token vectors become one [as the folder says, else avg]."),
]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", metavar="NAME", help="Put this prompt of the folder in front [its default, else none]."),
]


def embed(
    checkpoint: Checkpoint,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Texts: .txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow, or a folder."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write: .npy or .parquet.")],
    column: Annotated[str | None, typer.Option(help="Column of the texts [text, or the only one].")] = None,
    pooling: PoolingOption = None,
    prompt: PromptOption = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Give every vector length 1 [as the folder says, else yes]."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a text; the rest is cut.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens computed at a time [2048 on a CPU, else 32768].")
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16: faster with AMX or CUDA, less exact.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
) -> None:
    """A vector for every text of a file, in the order of its rows.

    Pooling, prompts, length and what follows are as the folder says, as sentence-transformers computes them. A .parquet keeps
    the texts and, where rows have one, their `id`.

    \b
    Example:
      neobert embed outputs/contrastive-small corpus.jsonl --column body -o vectors.npy
    """
    from tqdm import tqdm

    from neobert.errors import print_notes
    from neobert.inference.embed import check_new_file, embed_file, load_embedder
    from neobert.training.runtime import build_runtime

    check_new_file(output, force)
    runtime = build_runtime(use_cpu=False, mixed_precision="bf16" if bf16 else "no", tf32=False, trains=False).alone()
    print_notes(filter(None, [runtime.note]))
    embedder = load_embedder(checkpoint, pooling, max_length, batch_tokens, runtime)
    text = embedder.settings.prompt(prompt)
    with tqdm(unit="text", disable=not sys.stderr.isatty(), leave=False) as bar:
        count, width = embed_file(embedder, file, output, column, normalize, bar.update, text, force)
    print(f"{output}: {count:,} vectors of {width}")


def similarity(
    checkpoint: Checkpoint,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT TEXT...", help="Two texts or more.")],
    pooling: PoolingOption = None,
    prompt: PromptOption = None,
) -> None:
    """Cosine similarity of the first text to each of the others.

    \b
    Example:
      neobert similarity outputs/contrastive-small "packet filter" "a firewall" "a text editor"
    """
    from neobert.errors import UserError
    from neobert.inference.embed import load_embedder

    if len(texts) < 2:
        raise UserError("similarity: give two texts or more")
    if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise UserError(f"similarity: text {empty[0]} is empty")
    embedder = load_embedder(checkpoint, pooling)
    vectors = embedder.encode(texts, normalize=True, prompt=embedder.settings.prompt(prompt))
    for text, value in zip(texts[1:], vectors[1:] @ vectors[0], strict=True):
        print(f"{value:7.4f}  {text}")
