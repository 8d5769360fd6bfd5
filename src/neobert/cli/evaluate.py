"""The commands that look at trained models: `fill-mask`, `pseudo-perplexity`, `mteb`. Registered in `cli.py`."""

import os
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any

import typer

from neobert.cli.data import TEXT_HELP
from neobert.cli.options import ConfigFile, layers
from neobert.errors import UserError, print_notes

Checkpoint = Annotated[
    str, typer.Argument(help="A run's output folder, <output_dir>/checkpoints/<step>, or an exported folder.")
]


def fill_mask(
    checkpoint: Checkpoint,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Sentences with [MASK].")],
    top: Annotated[int, typer.Option(min=1, max=1000, help="Candidates per mask.")] = 5,
) -> None:
    """What a trained model expects in place of [MASK].

    \b
    Example:
      neobert fill-mask outputs/quickstart "The President of the United [MASK] spoke to Congress."
    """
    from neobert.inference.fill_mask import fill_masks, format_guesses

    for guesses in fill_masks(checkpoint, texts, top):
        print(format_guesses(guesses))


def pseudo_perplexity(
    checkpoint: Checkpoint,
    source: Annotated[
        str, typer.Argument(metavar="TEXT", help=TEXT_HELP[:-1] + "; or the name of a dataset on the hub.")
    ],
    max_length: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a piece, two special ones included [what the model takes].")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Texts to read at most [all].")] = None,
    split: Annotated[str | None, typer.Option(help="Split, or a slice of one, as validation[:100].")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text, if there are several.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens computed at a time [4096 on a CPU, else 32768].")
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16: faster with AMX or CUDA, less exact.")
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write as well.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
) -> None:
    """How well a masked language model predicts text: every token is masked once and predicted from the rest.

    Texts that are longer than the model takes are cut into pieces. The table has a line for every length of piece.

    \b
    Examples:
      neobert pseudo-perplexity outputs/quickstart examples/quickstart/text/validation.txt --limit 100
      neobert pseudo-perplexity exported/mine corpus.jsonl --text-column body -o perplexity.json
    """
    from tqdm import tqdm

    from neobert.data.files.documents import SkippedRows
    from neobert.data.tokenizer import text_tokenizer
    from neobert.files import write_json
    from neobert.inference import pseudo_perplexity as pppl
    from neobert.inference.embed import check_new_file

    if output is not None:
        check_new_file(output, force)
    model, hf_tokenizer, runtime = _load_on_runtime(checkpoint, bf16)
    longest = model.config.max_position_embeddings
    if max_length is not None and max_length > longest:
        raise UserError(f"--max-length: {max_length}, but the model takes {longest} tokens")
    files = _find_files(source, text_column, split)
    tokenizer, skips = text_tokenizer(hf_tokenizer), SkippedRows()
    pieces, num_texts = pppl.read_pieces(files, tokenizer, (max_length or longest) - 2, limit, skips)
    total = sum(map(len, pieces))
    with tqdm(total=total, unit="token", disable=not os.isatty(2), leave=False, dynamic_ncols=True) as bar:
        result = pppl.pseudo_perplexity(model, tokenizer, pieces, batch_tokens, bar.update, runtime.autocast)
    print_notes(filter(None, [skips.describe()]))
    print(pppl.format_result(result, num_texts))
    if output is not None:
        write_json(output, {"texts": num_texts, **result.as_json()})


def _load_on_runtime(checkpoint: str, bf16: bool) -> tuple[Any, Any, Any]:
    """(masked language model, tokenizer, the runtime on whose device it is). Raises CheckpointError."""
    from neobert.checkpoints.load import load_pretrained, place_model
    from neobert.training.runtime import build_runtime

    model, hf_tokenizer = load_pretrained(checkpoint)
    runtime = build_runtime(use_cpu=False, mixed_precision="bf16" if bf16 else "no", tf32=False, trains=False)
    place_model(model, runtime)
    print_notes(filter(None, [runtime.note]))
    return model, hf_tokenizer, runtime


def _find_files(source: str, text_column: str | None, split: str | None) -> Any:
    """The files of a path, a glob or a dataset of the hub. Raises DataError."""
    from neobert.data.files.splits import find_hub_splits, find_splits

    is_name = not Path(source).exists() and source.count("/") <= 1 and not Path(source).suffix and not has_magic(source)
    if is_name:
        return find_hub_splits(source, None, False, text_column, split, None)[0]
    return find_splits(source, text_column, split, None)[0]


def mteb(
    context: typer.Context,
    config: ConfigFile,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint, exported folder, encoder or hub name [the run in trainer.output_dir]."),
    ] = None,
) -> None:
    """Evaluate a model on MTEB tasks, or on tasks of your own, with a table of scores.

    Started again, it goes on with the tasks that have no result. Exit code 2 when a task could not run.

    \b
    Examples:
      neobert mteb configs/mteb/small.yaml --mteb_task_type sts
      neobert mteb configs/mteb/small.yaml --model exported/mine --mteb_local_tasks my_tasks/
    """
    if code := run_mteb(*layers(config, context.args), model):
        raise typer.Exit(code)


def run_mteb(files: list[str], overrides: list[str], model: str | None, task: str | None = "mteb") -> int:
    """Of `mteb`, and of `run` with such a file. Returns the exit code. Raises UserError."""
    import logging
    import warnings

    from neobert.config.load import load_config
    from neobert.tasks.mteb import task as task_mteb

    logging.getLogger("mteb").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mteb")
    return task_mteb.run(load_config(files, overrides, task), model)
