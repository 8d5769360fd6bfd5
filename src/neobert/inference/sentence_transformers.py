"""The files that make a transformers folder one of sentence-transformers: pooling, normalisation, prompts."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from neobert.errors import UserError
from neobert.files import write_json

Pooling = Literal["mean", "avg", "cls", "max"]
MODULES = "modules.json"
POOLING, NORMALIZE = "1_Pooling", "2_Normalize"


@dataclass(frozen=True)
class Embedding:
    """How a text becomes one vector: pooling of its tokens, length 1 or not, prompts by name, put in front of it, and the
    tokens after which it is cut."""

    pooling: Pooling | None = None  # as it was trained, else the mean
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    max_length: int = 512


def parse_pooling(text: str) -> Pooling:
    """Raises UserError for a word that is none."""
    if text not in get_args(Pooling):
        raise UserError(f"--pooling: must be one of {', '.join(get_args(Pooling))}, got {text!r}")
    return text  # type: ignore[return-value]


def write_sentence_transformers(folder: Path, width: int, embedding: Embedding) -> None:
    """Write what `SentenceTransformer(folder)` reads, beside the transformers model in `folder`.

    The names of the modules are those of sentence-transformers 2 to 6, which all of these versions know.
    """
    modules = [("", "Transformer"), (POOLING, "Pooling"), *([(NORMALIZE, "Normalize")] if embedding.normalize else [])]
    write_json(
        folder / MODULES,
        [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ],
    )
    mode = {"avg": "mean"}.get(embedding.pooling, embedding.pooling)
    (folder / POOLING).mkdir()
    write_json(
        folder / POOLING / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": mode == "cls",
            "pooling_mode_mean_tokens": mode == "mean",
            "pooling_mode_max_tokens": mode == "max",
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": embedding.max_length, "do_lower_case": False})
    if embedding.normalize:
        (folder / NORMALIZE).mkdir()
        write_json(folder / NORMALIZE / "config.json", {})
    settings = {"prompts": embedding.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer", **settings})


def check_sentence_transformers() -> None:
    """Raises UserError when the library is not installed, without which the folder could not be verified."""
    if find_spec("sentence_transformers") is None:
        raise UserError(
            "an export for sentence-transformers is verified with that library: pip install 'neobert[contrastive]'"
        )
