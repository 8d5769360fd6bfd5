"""The commands `export` and `import`. Registered in `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from neobert.errors import UserError

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="NAME=TEXT", help="With --sentence-transformers: a prompt, as query='query: '. Repeat."
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Put it in the place of an earlier result in OUT.")]

Tolerance = Annotated[
    float | None,
    typer.Option(min=0, help="Largest difference that is allowed [1e-5; ONNX 1e-4]; it is kept with the result."),
]


def export(
    checkpoint: Annotated[str, typer.Argument(help="A run's output folder, or <output_dir>/checkpoints/<step>.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    sentence_transformers: Annotated[
        bool,
        typer.Option(
            "--sentence-transformers", help="Also what SentenceTransformer(OUT) reads; embedding models always do."
        ),
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also OUT/onnx/model.onnx, any batch size and length.")] = False,
    pooling: Annotated[
        str | None, typer.Option(help="With --sentence-transformers: mean, cls or max [as trained, else mean].")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Embeddings of length 1.")] = True,
    prompt: Prompts = None,
    tolerance: Tolerance = None,
    replace: Replace = False,
) -> None:
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

    embedding = None
    if sentence_transformers:
        embedding = Embedding(parse_pooling(pooling) if pooling else None, normalize, _parse_prompts(prompt or []))
    elif pooling is not None or prompt or not normalize:
        raise UserError("--pooling, --prompt and --no-normalize: have no effect without --sentence-transformers")
    export_model(checkpoint, out, Wanted(embedding, onnx, tolerance), replace)
    print(f"exported    {out}")


def _parse_prompts(words: list[str]) -> dict[str, str]:
    prompts = dict(word.split("=", 1) for word in words if "=" in word)
    for word in words:
        if not word.partition("=")[0] or "=" not in word:
            raise UserError(f"--prompt: expected NAME=TEXT, got {word!r}")
    return prompts


def import_(
    source: Annotated[
        str, typer.Argument(help="Folder of a published NeoBERT, of a EuroBERT, or of what `neobert export` wrote.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    tokenizer: Annotated[str | None, typer.Option(help="Folder of the tokenizer, where SOURCE has none.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run code in SOURCE that is not this version's, to verify against it."
        ),
    ] = False,
    tolerance: Tolerance = None,
    replace: Replace = False,
) -> None:
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
