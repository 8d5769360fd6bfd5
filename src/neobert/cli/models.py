"""The commands about runs and trained models: report, fill-mask, embed, similarity, mteb, pseudo-perplexity, export, import."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Context, Exit, Option

from neobert.cli.options import TEXT_HELP, ConfigFile, TextColumn, load
from neobert.errors import UserError, print_notes

if TYPE_CHECKING:
    from neobert.config.load import Loaded

# Arguments and options are tables, laid out by hand.
# fmt: off
Checkpoint = Annotated[str,
    Argument(help="A run's output folder, <output_dir>/checkpoints/<step>, or an exported folder.")]
EncoderFolder = Annotated[str,
    Argument(metavar="CHECKPOINT", help="A run's output folder, one of its checkpoints, or an encoder's folder.")]
PoolingOption = Annotated[Literal["avg", "cls", "max"] | None,
    Option(help="How token vectors become one [as the folder says, else avg].")]
PromptOption = Annotated[str | None,
    Option("--prompt", metavar="NAME", help="Put this prompt of the folder in front [its default, else none].")]
Bf16 = Annotated[bool, Option("--bf16", help="Compute in bfloat16: faster with AMX or CUDA, less exact.")]
Force = Annotated[bool, Option("--force", help="Replace an output that is there.")]
Replace = Annotated[bool, Option("--replace", help="Put it in the place of an earlier result in OUT.")]
Tolerance = Annotated[float | None,
    Option(min=0, help="Largest difference that is allowed [1e-5; ONNX 1e-4]; it is kept with the result.")]
# fmt: on


def report(
    run_folder: Annotated[Path, Argument(metavar="RUN", help="Output folder of a run.")],
    output: Annotated[Path | None, Option("-o", "--output", help="File to write [RUN/report.html].")] = None,
) -> None:
    """A run as one self-contained HTML page: loss, learning rate, throughput, step times.

    \b
    Example:
      neobert report outputs/quickstart
    """
    from neobert.insight.report import write_report

    print(write_report(run_folder, output))


def fill_mask(
    checkpoint: Checkpoint,
    texts: Annotated[list[str], Argument(metavar="TEXT...", help="Sentences with [MASK].")],
    top: Annotated[int, Option(min=1, max=1000, help="Candidates per mask.")] = 5,
) -> None:
    """What a trained model expects in place of [MASK].

    \b
    Example:
      neobert fill-mask outputs/quickstart "The President of the United [MASK] spoke to Congress."
    """
    from neobert.inference.masked_lm import fill_masks

    for guesses in fill_masks(checkpoint, texts, top):
        print(guesses)


def pseudo_perplexity(
    checkpoint: Checkpoint,
    source: Annotated[str, Argument(metavar="TEXT", help=TEXT_HELP[:-1] + "; or the name of a dataset on the hub.")],
    max_length: Annotated[int | None,
        Option(min=3, help="Tokens of a piece, two special ones included [what the model takes].")] = None,
    limit: Annotated[int | None, Option(min=1, help="Texts to read at most [all].")] = None,
    split: Annotated[str | None, Option(help="Split, or a slice of one, as validation[:100].")] = None,
    text_column: TextColumn = None,
    batch_tokens: Annotated[int | None,
        Option(min=1, help="Tokens computed at a time [4096 on a CPU, else 32768].")] = None,
    bf16: Bf16 = False,
    output: Annotated[Path | None, Option("-o", "--output", help="JSON file to write as well.")] = None,
    force: Force = False,
) -> None:  # fmt: skip
    """How well a masked language model predicts text: every token is masked once and predicted from the rest.

    Texts that are longer than the model takes are cut into pieces. The table has a line for every length of piece.

    \b
    Examples:
      neobert pseudo-perplexity outputs/quickstart examples/quickstart/text/validation.txt --limit 100
      neobert pseudo-perplexity exported/mine corpus.jsonl --text-column body -o perplexity.json
    """
    from neobert.files import write_json
    from neobert.inference.embed import check_new_file
    from neobert.inference.masked_lm import predict_corpus

    if output is not None:
        check_new_file(output, force)
    result, num_texts = predict_corpus(checkpoint, source, split, text_column, max_length, limit, batch_tokens, bf16)
    print(f"{result}\n{num_texts:,} texts; perplexities are of tokens of this tokenizer")
    if output is not None:
        write_json(output, {"texts": num_texts, **result.as_json()})


def mteb(
    context: Context, config: ConfigFile,
    model: Annotated[str | None,
        Option(help="Checkpoint, exported folder, encoder or hub name [the run in trainer.output_dir].")] = None,
) -> None:  # fmt: skip
    """Evaluate a model on MTEB tasks, or on tasks of your own, with a table of scores.

    Started again, it goes on with the tasks that have no result. Exit code 2 when a task could not run.

    \b
    Examples:
      neobert mteb configs/mteb/small.yaml --mteb_task_type sts
      neobert mteb configs/mteb/small.yaml --model exported/mine --mteb_local_tasks my_tasks/
    """
    evaluate_mteb(load(config, context.args, "mteb"), model)


def evaluate_mteb(loaded: "Loaded", model: str | None = None) -> None:
    """What `mteb` does, and `run` with a file of that task. Raises UserError, and Exit with the exit code."""
    import logging
    import warnings

    from neobert.tasks.mteb import task

    logging.getLogger("mteb").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mteb")
    if code := task.run(loaded, model):
        raise Exit(code)


def embed(
    checkpoint: EncoderFolder,
    file: Annotated[str,
        Argument(metavar="FILE", help="Texts: .txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow, or a folder.")],
    output: Annotated[Path, Option("-o", "--output", help="File to write: .npy or .parquet.")],
    column: Annotated[str | None, Option(help="Column of the texts [text, or the only one].")] = None,
    pooling: PoolingOption = None, prompt: PromptOption = None,
    normalize: Annotated[bool | None,
        Option("--normalize/--no-normalize", help="Give every vector length 1 [as the folder says, else yes].")] = None,
    max_length: Annotated[int | None, Option(min=8, help="Tokens of a text; the rest is cut.")] = None,
    batch_tokens: Annotated[int | None,
        Option(min=1, help="Tokens computed at a time [2048 on a CPU, else 32768].")] = None,
    bf16: Bf16 = False, force: Force = False,
) -> None:  # fmt: skip
    """A vector for every text of a file, in the order of its rows.

    Pooling, prompts, length and what follows are as the folder says, as sentence-transformers computes them. A .parquet keeps
    the texts and, where rows have one, their `id`.

    \b
    Example:
      neobert embed outputs/contrastive-small corpus.jsonl --column body -o vectors.npy
    """
    from tqdm import tqdm

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
    checkpoint: EncoderFolder,
    texts: Annotated[list[str], Argument(metavar="TEXT TEXT...", help="Two texts or more.")],
    pooling: PoolingOption = None, prompt: PromptOption = None,
) -> None:  # fmt: skip
    """Cosine similarity of the first text to each of the others.

    \b
    Example:
      neobert similarity outputs/contrastive-small "packet filter" "a firewall" "a text editor"
    """
    from neobert.inference.embed import load_embedder

    if len(texts) < 2:
        raise UserError("similarity: give two texts or more")
    if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise UserError(f"similarity: text {empty[0]} is empty")
    embedder = load_embedder(checkpoint, pooling)
    vectors = embedder.encode(texts, normalize=True, prompt=embedder.settings.prompt(prompt))
    for text, value in zip(texts[1:], vectors[1:] @ vectors[0], strict=True):
        print(f"{value:7.4f}  {text}")


def export(
    checkpoint: Annotated[str, Argument(help="A run's output folder, or <output_dir>/checkpoints/<step>.")],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write.")],
    sentence_transformers: Annotated[bool,
        Option("--sentence-transformers", help="Also what SentenceTransformer(OUT) reads; embedding models always do."),
    ] = False,
    onnx: Annotated[bool, Option("--onnx", help="Also OUT/onnx/model.onnx, any batch size and length.")] = False,
    pooling: Annotated[str | None,
        Option(help="With --sentence-transformers: mean, cls or max [as trained, else mean].")] = None,
    normalize: Annotated[bool, Option("--normalize/--no-normalize", help="Embeddings of length 1.")] = True,
    prompt: Annotated[list[str] | None, Option("--prompt", metavar="NAME=TEXT",
        help="With --sentence-transformers: a prompt, as query='query: '. Repeat.")] = None,
    tolerance: Tolerance = None, replace: Replace = False,
) -> None:  # fmt: skip
    """A checkpoint as a folder that every Hugging Face tool loads, with the same numbers.

    With RoPE, RMSNorm and SwiGLU it becomes transformers' own EuroBERT; other variants ship their code. The folder is loaded in
    a clean process and compared with the trained model on real text before it gets its name; the differences are printed and
    kept in OUT/export.json and in the model card.

    \b
    Examples:
      neobert export outputs/quickstart exported/quickstart
      neobert export outputs/quickstart exported/embedder --sentence-transformers --prompt query='query: '
      neobert export outputs/quickstart/checkpoints/800 exported/graph --onnx
    """
    from neobert.export.write import Wanted, export_model
    from neobert.inference.sentence_transformers import Embedding, parse_pooling

    embedding, prompts = None, dict[str, str]()
    if sentence_transformers:
        for one in prompt or []:
            name, equals, text = one.partition("=")
            if not (name and equals):
                raise UserError(f"--prompt: expected NAME=TEXT, got {one!r}")
            prompts[name] = text
        embedding = Embedding(parse_pooling(pooling) if pooling else None, normalize, prompts)
    elif pooling is not None or prompt or not normalize:
        raise UserError("--pooling, --prompt and --no-normalize: have no effect without --sentence-transformers")
    export_model(checkpoint, out, Wanted(embedding, onnx, tolerance), replace)
    print(f"exported    {out}")


def import_(
    source: Annotated[str,
        Argument(help="Folder of a published NeoBERT, of a EuroBERT, or of what `neobert export` wrote.")],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write.")],
    tokenizer: Annotated[str | None, Option(help="Folder of the tokenizer, where SOURCE has none.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code",
        help="Run code in SOURCE that is not this version's, to verify against it.")] = False,
    tolerance: Tolerance = None, replace: Replace = False,
) -> None:  # fmt: skip
    """A model from elsewhere as a checkpoint to continue from or to fine-tune.

    What is made of it is compared with the source on real text; the differences are printed and kept in OUT/import.json.

    \b
    Examples:
      neobert import downloads/NeoBERT imported/neobert
      neobert glue configs/glue/base.yaml --glue.pretrained_checkpoint_dir imported/neobert
      neobert pretrain my.yaml --model.from_hub true --model.name imported/neobert
    """
    from neobert.export.importing import import_model

    import_model(source, out, tokenizer, trust_remote_code, tolerance, replace)
    print(f"imported    {out}")
