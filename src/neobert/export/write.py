"""`neobert export`: a checkpoint becomes one folder for transformers, sentence-transformers and onnxruntime.

    OUT/
      config.json  model.safetensors  tokenizer.json  ...     transformers; *.py of our model where EuroBERT is not it
      modules.json  1_Pooling/  2_Normalize/                   sentence-transformers, when asked for
      onnx/model.onnx                                          ONNX, when asked for
      README.md  training.svg                                  the model card
      export.json                                              what was exported, and how far it is from the trained model

All is written to a hidden folder beside OUT, verified there in a clean process, and renamed: a folder with its final name is
whole and right.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neobert import __version__
from neobert.errors import UserError
from neobert.export.card import write_card
from neobert.export.huggingface import write_transformers
from neobert.export.onnx import ONNX, Output, check_onnx, write_onnx
from neobert.export.source import Source, load_source
from neobert.export.verify import (
    Check,
    build_sample,
    by_onnx,
    by_sentence_transformers,
    by_transformers,
    compare,
    judged,
)
from neobert.files import check_target, whole_folder, write_json
from neobert.inference.sentence_transformers import Embedding, check_sentence_transformers, write_sentence_transformers

RECORD = "export.json"


@dataclass(frozen=True)
class Wanted:
    """What an export holds besides the transformers model: `embedding` makes it one of sentence-transformers.

    `tolerance` of all comparisons, instead of those of `verify.py`.
    """

    embedding: Embedding | None = None
    onnx: bool = False
    tolerance: float | None = None

    def settled(self, source: Source) -> "Wanted":
        """With what the model was trained with where nothing else is asked for: an embedding model is exported as one."""
        asked = self.embedding
        if asked is None and not source.is_embedder:
            return self
        found = source.sentence
        asked = asked or Embedding(normalize=found.normalize is not False, prompts=found.prompts)
        pooling = asked.pooling or found.pooling or "mean"
        return replace(self, embedding=replace(asked, pooling=pooling, max_length=source.longest))

    @property
    def trained(self) -> dict[str, Any]:
        """What config.json keeps of how the model embeds."""
        if self.embedding is None:
            return {}
        return {"pooling": self.embedding.pooling, "max_length": self.embedding.max_length}

    @property
    def onnx_output(self) -> Output:
        """Sentence-transformers pools hidden states; other users want what the head says."""
        return "last_hidden_state" if self.embedding is not None else "logits"


def export_model(
    checkpoint: str, out: Path, wanted: Wanted, replacing: bool = False, say: Callable[[str], None] = print
) -> list[Check]:
    """Write and verify `out`; returns what was compared. `replacing` puts it in the place of an earlier export.

    Raises UserError, and leaves nothing behind, when the checkpoint cannot be exported or what was written differs from it.
    """
    check_target(out, RECORD, replacing)
    if wanted.onnx:
        check_onnx()
    source = load_source(checkpoint)
    if wanted.onnx and source.is_hf_encoder:
        raise UserError(f"--onnx: {source.folder} has an encoder of transformers' own; optimum exports those")
    wanted = wanted.settled(source)
    if wanted.embedding is not None:
        check_sentence_transformers()
    say(f"model       {source.folder}: {describe(source)}")
    with whole_folder(out) as scratch:
        write_transformers(source, scratch, wanted.trained)
        if wanted.embedding is not None:
            write_sentence_transformers(scratch, source.model.config.hidden_size, wanted.embedding)
        if wanted.onnx:
            say("onnx        exporting the graph")
            write_onnx(source.model, scratch / ONNX, wanted.onnx_output)
        checks = verify(source, scratch, wanted, say)
        write_json(scratch / RECORD, record(source, wanted, checks))
        write_card(source, scratch, wanted.embedding, wanted.onnx, checks, out.name)
    return checks


def describe(source: Source) -> str:
    """Which class it becomes, and why."""
    head = "sequence classification" if source.is_classifier else "masked language model"
    head = "embedding model" if source.is_embedder else head
    if source.is_hf_encoder:
        return f"{head} on transformers' own {source.fields['model_type']} (no trust_remote_code)"
    if source.is_native:
        return f"{head}, transformers' own EuroBERT (no trust_remote_code)"
    return f"{head}, ships its own code (trust_remote_code=True), as EuroBERT has {_difference(source)}"


def _difference(source: Source) -> str:
    config = source.model.config
    reasons = {
        "no nGPT": config.ngpt,
        "no learned positions": not config.rope,
        "no GELU": config.hidden_act != "swiglu",
        "no LayerNorm": not config.rms_norm and not config.ngpt,
        "no decoder bias": config.decoder_bias,
    }
    return " and ".join(reason for reason, holds in reasons.items() if holds)


def verify(source: Source, folder: Path, wanted: Wanted, say: Callable[[str], None]) -> list[Check]:
    """Compare what was written with the training model. Raises UserError naming the first difference that is too large."""
    sample = build_sample(source.tokenizer, source.positions)
    say("verifying   in a process that has only the folder")
    comparisons = [by_transformers(source, folder, sample, has_head=not source.is_embedder)]
    if wanted.onnx:
        comparisons.append(by_onnx(source, ONNX, wanted.onnx_output, sample))
    if wanted.embedding is not None:
        comparisons.append(by_sentence_transformers(source, wanted.embedding))
    checks = judged(compare(folder, comparisons), wanted.tolerance, say)
    if wrong := [check for check in checks if not check.is_met and check.must_hold]:
        raise UserError(f"{source.folder}: what was exported computes something else, so it is not kept: {wrong[0]}")
    return checks


def record(source: Source, wanted: Wanted, checks: list[Check]) -> dict[str, Any]:
    """export.json."""
    embedding = asdict(wanted.embedding) if wanted.embedding is not None else None
    return {
        "neobert": __version__,
        "source": source.folder.name,
        "checkpoint": {name: source.state[name] for name in ("step", "num_tokens") if name in source.state},
        "model_type": source.fields["model_type"],
        "embedding": embedding,
        "onnx": wanted.onnx_output if wanted.onnx else None,
        "verified": [check.as_json() for check in checks],
    }
