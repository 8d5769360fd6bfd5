"""`neobert export`: a checkpoint becomes one folder for transformers, sentence-transformers and onnxruntime.

    OUT/
      config.json  model.safetensors  tokenizer.json  ...     transformers; *.py of our model where EuroBERT is not it
      modules.json  1_Pooling/  2_Normalize/                   sentence-transformers, when asked for
      onnx/model.onnx                                          ONNX, when asked for
      README.md  training.svg                                  the model card
      export.json                                              what was exported, and how far it is from the trained model

All is written to a hidden folder beside OUT, verified there in a clean process, and renamed: a folder with its final name is
whole and right.

With RoPE, RMSNorm and SwiGLU the folder is a EuroBERT, which transformers has built in. The other variants ship the files of
`neobert.model` as they are; `auto_map` in config.json tells the Auto classes where to look (with trust_remote_code=True).
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from neobert import __version__
from neobert.checkpoints.format import WEIGHTS, write_json
from neobert.checkpoints.layouts import to_eurobert
from neobert.checkpoints.load import EMBEDDING
from neobert.data.tokenizer import save_tokenizer
from neobert.errors import UserError
from neobert.export import verify
from neobert.export.atomic import check_target, whole_folder
from neobert.export.card import write_card
from neobert.export.hf_encoder import hf_encoder_config, hf_encoder_tensors
from neobert.export.onnx import ONNX, Output, check_onnx, write_onnx
from neobert.export.source import Source, load_source
from neobert.inference.sentence_transformers import Embedding, check_sentence_transformers, write_sentence_transformers
from neobert.model import modeling_neobert

RECORD = "export.json"
CODE = Path(modeling_neobert.__file__)
AUTO_MAP = {
    "AutoConfig": "modeling_neobert.NeoBERTConfig",
    "AutoModel": "modeling_neobert.NeoBERT",
    "AutoModelForMaskedLM": "modeling_neobert.NeoBERTForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_neobert.NeoBERTForSequenceClassification",
}


@dataclass(frozen=True)
class Wanted:
    """What an export holds besides the transformers model: `embedding` makes it one of sentence-transformers.

    `tolerance` is that of all comparisons, instead of those of `verify.py`.
    """

    embedding: Embedding | None = None
    onnx: bool = False
    tolerance: float | None = None

    def completed(self, source: Source) -> "Wanted":
        """With what the model was trained with where nothing else is asked for: an embedding model is exported as one."""
        embedding = self.embedding
        if embedding is None and not source.is_embedder:
            return self
        found = source.sentence
        embedding = embedding or Embedding(normalize=found.normalize is not False, prompts=found.prompts)
        pooling = embedding.pooling or found.pooling or "mean"
        return replace(self, embedding=replace(embedding, pooling=pooling, max_length=source.longest))

    @property
    def onnx_output(self) -> Output:
        """Sentence-transformers pools hidden states; other users want what the head says."""
        return "last_hidden_state" if self.embedding is not None else "logits"


def export_model(
    checkpoint: str, out: Path, wanted: Wanted, replacing: bool = False, say: Callable[[str], None] = print
) -> list[verify.Check]:
    """Write and verify `out`; returns what was compared. `replacing` puts it in the place of an earlier export.

    Raises UserError, and leaves nothing behind, when the checkpoint cannot be exported or what was written differs from it.
    """
    check_target(out, RECORD, replacing)
    if wanted.onnx:
        check_onnx()
    source = load_source(checkpoint)
    if wanted.onnx and source.is_hf_encoder:
        raise UserError(f"--onnx: {source.folder} has an encoder of transformers' own; optimum exports those")
    wanted = wanted.completed(source)
    embedding = wanted.embedding
    if embedding is not None:
        check_sentence_transformers()
    say(f"model       {source.folder}: {describe(source)}")
    with whole_folder(out) as scratch:
        write_transformers(source, scratch, embedding)
        sample = verify.build_sample(source.tokenizer, source.positions)
        comparisons = [verify.by_transformers(source, scratch, sample, has_head=not source.is_embedder)]
        if wanted.onnx:
            say("onnx        exporting the graph")
            write_onnx(source.model, scratch / ONNX, wanted.onnx_output)
            comparisons.append(verify.by_onnx(source, ONNX, wanted.onnx_output, sample))
        if embedding is not None:
            write_sentence_transformers(scratch, source.model.config.hidden_size, embedding)
            comparisons.append(verify.by_sentence_transformers(source, embedding))
        say("verifying   in a process that has only the folder")
        found = verify.compare(scratch, comparisons)
        checks = verify.judged(found, wanted.tolerance, f"{source.folder}: what was exported", say)
        write_json(scratch / RECORD, record(source, wanted, checks))
        write_card(source, scratch, embedding, wanted.onnx, checks, out.name)
    return checks


def describe(source: Source) -> str:
    """Which class it becomes, and why."""
    head = "sequence classification" if source.is_classifier else "masked language model"
    head = "embedding model" if source.is_embedder else head
    if source.is_hf_encoder:
        return f"{head} on transformers' own {source.fields['model_type']} (no trust_remote_code)"
    if source.is_native:
        return f"{head}, transformers' own EuroBERT (no trust_remote_code)"
    config = source.model.config
    differences = {
        "no nGPT": config.ngpt,
        "no learned positions": not config.rope,
        "no GELU": config.hidden_act != "swiglu",
        "no LayerNorm": not config.rms_norm and not config.ngpt,
        "no decoder bias": config.decoder_bias,
    }
    reasons = " and ".join(reason for reason, holds in differences.items() if holds)
    return f"{head}, ships its own code (trust_remote_code=True), as EuroBERT has {reasons}"


def record(source: Source, wanted: Wanted, checks: list[verify.Check]) -> dict[str, Any]:
    """What export.json holds."""
    return {
        "neobert": __version__,
        "source": source.folder.name,
        "checkpoint": {name: source.state[name] for name in ("step", "num_tokens") if name in source.state},
        "model_type": source.fields["model_type"],
        "embedding": asdict(wanted.embedding) if wanted.embedding is not None else None,
        "onnx": wanted.onnx_output if wanted.onnx else None,
        "verified": [check.as_json() for check in checks],
    }


def write_transformers(source: Source, folder: Path, embedding: Embedding | None = None) -> None:
    """Write what `AutoModel.from_pretrained(folder)` and `AutoTokenizer` read. `embedding` says how it embeds, if it does."""
    tokenizer = source.tokenizer
    tokenizer.model_max_length = source.longest if embedding is None else embedding.max_length
    if source.is_hf_encoder:
        fields = hf_encoder_config(source.model, source.fields)
        tensors = hf_encoder_tensors(source.model, source.fields["model_type"])
    else:
        fields, weights = exported_config(source, embedding), source.model.state_dict()
        tensors = to_eurobert(weights) if source.is_native else weights
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    write_json(folder / "config.json", fields)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder)
    if not source.is_native:
        for path in code_files():
            shutil.copyfile(path, folder / path.name)


def exported_config(source: Source, embedding: Embedding | None) -> dict[str, Any]:
    """The checkpoint's config.json with how the model embeds, and with `auto_map` where our code is shipped."""
    fields = {name: value for name, value in source.fields.items() if name != "auto_map"}
    if embedding is not None:
        trained = {"pooling": embedding.pooling, "max_length": embedding.max_length}
        fields["neobert"] = {**fields["neobert"], EMBEDDING: trained}
    if source.is_native:
        return fields
    kind = ["NeoBERT"] if source.is_embedder else fields["architectures"]
    return {**fields, "architectures": kind, "auto_map": AUTO_MAP}


def code_files() -> list[Path]:
    """The model's file and those that it imports, which are all that it needs besides torch and transformers."""
    from transformers.dynamic_module_utils import get_relative_import_files

    return sorted({CODE, *map(Path, get_relative_import_files(CODE))})
