"""`neobert export`: a checkpoint becomes one folder for transformers, sentence-transformers and onnxruntime.

    OUT/
      config.json  model.safetensors  tokenizer.json  ...     transformers; *.py of our model where EuroBERT is not it
      modules.json  1_Pooling/  2_Normalize/                   sentence-transformers, when asked for
      onnx/model.onnx                                          ONNX, when asked for
      README.md  training.svg                                  the model card
      export.json                                              what was exported, and how far it is from the trained model

All is written to a hidden folder beside OUT, verified there in a clean process, and renamed. With RoPE, RMSNorm and SwiGLU it
is a EuroBERT, which transformers has built in. The other variants ship the files of `neobert.model` as they are; `auto_map` in
config.json tells the Auto classes where to look (with trust_remote_code=True).
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert import __version__
from neobert.checkpoints.format import WEIGHTS, Tensors, save_tensors
from neobert.checkpoints.layouts import beyond_eurobert
from neobert.checkpoints.load import EMBEDDING, HF_ENCODER, HFEncoderModel, Model, Source, load_source, to_checkpoint
from neobert.data.tokenizer import save_tokenizer
from neobert.errors import CheckpointError, UserError, check_installed
from neobert.export import verify
from neobert.export.card import write_card
from neobert.files import check_target, whole_folder, write_json
from neobert.inference.sentence_transformers import Embedding, read_sentence_settings, write_sentence_transformers
from neobert.model import modeling_neobert
from neobert.model.hf_encoder import HFEncoderForEmbedding, pool_rows
from neobert.model.modeling_neobert import NeoBERTForMaskedLM, classify
from neobert.model.unpadding import UnpaddedBatch

RECORD = "export.json"
Output = Literal["last_hidden_state", "logits"]  # of the graph
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


def export_model(
    checkpoint: str, out: Path, wanted: Wanted, replacing: bool = False, log: Callable[[str], None] = print
) -> list[verify.Check]:
    """Write and verify `out`; returns what was compared. `replacing` puts it in the place of an earlier export.

    Raises UserError, and leaves nothing behind, when the checkpoint cannot be exported or what was written differs from it.
    """
    check_target(out, RECORD, replacing)
    if wanted.onnx:
        check_installed("--onnx needs {}", "onnx", "onnx", "onnxruntime", "onnxscript")
    source = load_source(checkpoint)
    if wanted.onnx and source.is_hf_encoder:
        raise UserError(f"--onnx: {source.folder} has an encoder of transformers' own; optimum exports those")
    trained = read_embedding(source)
    embedding = wanted.embedding or (trained if source.is_embedder else None)
    output: Output = "logits" if embedding is None else "last_hidden_state"  # which sentence-transformers pools
    if embedding is not None:
        pooling = embedding.pooling or trained.pooling or "mean"
        embedding = replace(embedding, pooling=pooling, max_length=trained.max_length)
        need = "an export for sentence-transformers is verified with that library"
        check_installed(need, "contrastive", "sentence_transformers")
    log(f"model       {source.folder}: {describe(source)}")
    with whole_folder(out) as scratch:
        write_transformers(source, scratch, embedding)
        if wanted.onnx:
            log("onnx        exporting the graph")
            write_onnx(source.model, scratch / verify.ONNX, output)
        if embedding is not None:
            write_sentence_transformers(scratch, source.model.config.hidden_size, embedding)
        log("verifying   in a process that has only the folder")
        found = verify.compare(source, scratch, onnx=output if wanted.onnx else "", embedding=embedding)
        checks = verify.judged(found, wanted.tolerance, f"{source.folder}: what was exported", log)
        record = {
            "neobert": __version__, "source": source.folder.name,
            "checkpoint": {name: source.state[name] for name in ("step", "num_tokens") if name in source.state},
            "model_type": source.fields["model_type"], "embedding": None if embedding is None else asdict(embedding),
            "onnx": output if wanted.onnx else None, "verified": [asdict(check) for check in checks],
        }  # fmt: skip
        write_json(scratch / RECORD, record)
        write_card(source, scratch, embedding, wanted.onnx, checks, out.name)
    return checks


def read_embedding(source: Source) -> Embedding:
    """How the model was trained or exported to embed, and the longest text that it is for. Raises CheckpointError for what an
    export cannot keep.
    """
    found = read_sentence_settings(source.folder)
    lost = {
        "Dense modules": len(found.head),
        "default_prompt_name": found.default_prompt,
        "include_prompt: false": not found.include_prompt,
        "do_lower_case": found.lower_case,
        f"similarity_fn_name {found.similarity}": found.similarity != "cosine",
    }
    if names := [name for name, is_there in lost.items() if is_there]:
        raise CheckpointError(f"{source.folder}: its {', '.join(names)} cannot be exported; use the folder as it is")
    longest = min(source.positions, found.max_length or source.positions)
    return Embedding(found.pooling, found.normalize is not False, found.prompts, longest)


def describe(source: Source) -> str:
    """Which class it becomes, and why."""
    head = "sequence classification" if source.is_classifier else "masked language model"
    head = "embedding model" if source.is_embedder else head
    if source.is_hf_encoder:
        return f"{head} on transformers' own {source.fields['model_type']} (no trust_remote_code)"
    if source.is_native:
        return f"{head}, transformers' own EuroBERT (no trust_remote_code)"
    reasons = " and ".join(f"no {part}" for part in beyond_eurobert(source.model.config))
    return f"{head}, ships its own code (trust_remote_code=True), as EuroBERT has {reasons}"


def write_transformers(source: Source, folder: Path, embedding: Embedding | None = None) -> None:
    """Write what `AutoModel.from_pretrained(folder)` and `AutoTokenizer` read. `embedding` says how it embeds, if it does."""
    tokenizer = source.tokenizer
    tokenizer.model_max_length = (embedding or read_embedding(source)).max_length
    fields = {name: value for name, value in source.fields.items() if name != "auto_map"}
    if isinstance(source.model, HFEncoderModel):
        fields, tensors = hf_encoder_files(source.model, fields)
    else:
        if embedding is not None:
            trained = {"pooling": embedding.pooling, "max_length": embedding.max_length}
            fields["neobert"] = {**fields["neobert"], EMBEDDING: trained}
        tensors = to_checkpoint(source.model, source.model.state_dict())
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if not source.is_native:
        kind = ["NeoBERT"] if source.is_embedder else fields["architectures"]
        fields = {**fields, "architectures": kind, "auto_map": AUTO_MAP}
        for path in code_files():
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", fields)
    save_tensors(tensors, folder / WEIGHTS)
    save_tokenizer(tokenizer, folder)


def code_files() -> list[Path]:
    """The model's file and those that it imports, which are all that it needs besides torch and transformers."""
    from transformers.dynamic_module_utils import get_relative_import_files

    return sorted({CODE, *map(Path, get_relative_import_files(CODE))})


# --- encoders of transformers' making -----------


# Where an architecture keeps our head (pooling, a hidden layer with GELU, a linear layer): names of its two layers, the
# poolings it has, and what config.json has to say. Classes of these architectures compute it exactly; anything else is refused,
# since it would load as another classifier.
HEADS: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    "electra": ("classifier.dense", "classifier.out_proj", ("bos",), {}),
    "deberta-v2": ("pooler.dense", "classifier", ("bos",), {"pooler_hidden_act": "gelu"}),
    "eurobert": ("dense", "classifier", ("bos", "mean"), {}),
}


def hf_encoder_files(model: HFEncoderModel, fields: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """(config.json, tensors) of the architecture's own class. Raises UserError where it has not our head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    kept = {name: value for name, value in fields.items() if name not in (HF_ENCODER, "_name_or_path")}
    if isinstance(model, HFEncoderForEmbedding):
        return {**kept, "architectures": [type(model.model).__name__]}, model.model.state_dict()
    kind = fields["model_type"]
    dense, classifier, poolings, more = HEADS.get(kind, ("", "", (), {}))
    if model.pooling not in poolings:
        pooling = {"bos": "cls"}.get(model.pooling, model.pooling)
        raise UserError(
            f"a classifier on {kind} with pooling {pooling} cannot be exported: ours has a hidden layer with GELU after it, "
            f"{NAMES.get(kind, 'transformers')} another head, so it would load as another model; these can: {', '.join(HEADS)}"
        )
    if len(poolings) > 1:
        more = {**more, "classifier_pooling": model.pooling}
    tensors, renamed = {}, {"dense": dense, "classifier": classifier}
    for name, tensor in to_checkpoint(model, model.state_dict()).items():
        layer, _, rest = name.partition(".")
        tensors[f"{renamed.get(layer, layer)}.{rest}"] = tensor
    return {**kept, **more, "architectures": [NAMES[kind]]}, tensors


# --- ONNX -----------


class PaddedModel(nn.Module):
    """`model` as a function of two tensors, B x T. `output`: hidden states B x T x D, or logits of its head.

    All variants go one way: our model on padded rows, as on CUDA with SDPA, where no shape depends on the data but B and T.
    """

    def __init__(self, model: Model, output: Output):
        super().__init__()
        self.inner, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask_BT, model = attention_mask.bool(), self.inner
        hidden_ND = model.model.encode(UnpaddedBatch.padded(input_ids, mask_BT))
        if self.output == "last_hidden_state":
            return hidden_ND.view(*input_ids.shape, -1)
        if isinstance(model, NeoBERTForMaskedLM):
            return F.linear(hidden_ND, model.decoder_weight(), model.lm_head.bias).view(*input_ids.shape, -1)
        pooled_BD = pool_rows(hidden_ND.view(*input_ids.shape, -1), mask_BT, model.config.classifier_pooling)
        return classify(model, pooled_BD, None).logits


def write_onnx(model: Model, path: Path, output: Output) -> None:
    """Write the graph to `path`, for any batch size and length; weights beyond 2 GB go into a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    length = min(8, model.config.max_position_embeddings)
    ids = torch.ones(2, length, dtype=torch.int64)
    mask = ids.clone()
    mask[1, length // 2 :] = 0
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    shapes: dict[str, Any] = {name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            PaddedModel(model, output).eval(), (ids, mask), dynamo=True, dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask"], output_names=[output], verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path))
