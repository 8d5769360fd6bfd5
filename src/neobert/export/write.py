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
from safetensors.torch import save_file
from torch import Tensor, nn

from neobert import __version__
from neobert.checkpoints.format import WEIGHTS
from neobert.checkpoints.layouts import to_eurobert
from neobert.checkpoints.load import EMBEDDING, Model
from neobert.data.tokenizer import save_tokenizer
from neobert.errors import UserError, check_installed
from neobert.export import verify
from neobert.export.card import write_card
from neobert.export.source import Source, hf_encoder_config, hf_encoder_tensors, load_source
from neobert.files import check_target, whole_folder, write_json
from neobert.inference.sentence_transformers import Embedding, write_sentence_transformers
from neobert.model import modeling_neobert
from neobert.model.attention import UnpaddedBatch
from neobert.model.modeling_neobert import NeoBERTForMaskedLM, NeoBERTForSequenceClassification

RECORD = "export.json"
ONNX = "onnx/model.onnx"  # where sentence-transformers and optimum look
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
    wanted = wanted.completed(source)
    embedding = wanted.embedding
    if embedding is not None:
        need = "an export for sentence-transformers is verified with that library"
        check_installed(need, "contrastive", "sentence_transformers")
    log(f"model       {source.folder}: {describe(source)}")
    with whole_folder(out) as scratch:
        write_transformers(source, scratch, embedding)
        sample = verify.build_sample(source.tokenizer, source.positions)
        comparisons = [verify.by_transformers(source, scratch, sample, has_head=not source.is_embedder)]
        if wanted.onnx:
            log("onnx        exporting the graph")
            write_onnx(source.model, scratch / ONNX, wanted.onnx_output)
            comparisons.append(verify.by_onnx(source, ONNX, wanted.onnx_output, sample))
        if embedding is not None:
            write_sentence_transformers(scratch, source.model.config.hidden_size, embedding)
            comparisons.append(verify.by_sentence_transformers(source, embedding))
        log("verifying   in a process that has only the folder")
        found = verify.compare(scratch, comparisons)
        checks = verify.judged(found, wanted.tolerance, f"{source.folder}: what was exported", log)
        record = {
            "neobert": __version__,
            "source": source.folder.name,
            "checkpoint": {name: source.state[name] for name in ("step", "num_tokens") if name in source.state},
            "model_type": source.fields["model_type"],
            "embedding": asdict(embedding) if embedding is not None else None,
            "onnx": wanted.onnx_output if wanted.onnx else None,
            "verified": [asdict(check) for check in checks],
        }
        write_json(scratch / RECORD, record)
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


def write_transformers(source: Source, folder: Path, embedding: Embedding | None = None) -> None:
    """Write what `AutoModel.from_pretrained(folder)` and `AutoTokenizer` read. `embedding` says how it embeds, if it does."""
    tokenizer = source.tokenizer
    tokenizer.model_max_length = source.longest if embedding is None else embedding.max_length
    if source.is_hf_encoder:
        fields, tensors = hf_encoder_config(source), hf_encoder_tensors(source)
    else:
        fields = {name: value for name, value in source.fields.items() if name != "auto_map"}
        if embedding is not None:
            trained = {"pooling": embedding.pooling, "max_length": embedding.max_length}
            fields["neobert"] = {**fields["neobert"], EMBEDDING: trained}
        weights = source.model.state_dict()
        tensors = to_eurobert(weights) if source.is_native else weights
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if not source.is_native:
        kind = ["NeoBERT"] if source.is_embedder else fields["architectures"]
        fields = {**fields, "architectures": kind, "auto_map": AUTO_MAP}
        for path in code_files():
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", fields)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder)


def code_files() -> list[Path]:
    """The model's file and those that it imports, which are all that it needs besides torch and transformers."""
    from transformers.dynamic_module_utils import get_relative_import_files

    return sorted({CODE, *map(Path, get_relative_import_files(CODE))})


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
        assert isinstance(model, NeoBERTForSequenceClassification)
        hidden_BTD, mask_BT1 = hidden_ND.view(*input_ids.shape, -1), mask_BT.unsqueeze(-1).float()
        if model.config.classifier_pooling == "bos":
            first_B = mask_BT.int().argmax(1)
            pooled_BD = hidden_BTD[torch.arange(first_B.shape[0]), first_B]
        else:
            pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return model.classifier(F.gelu(model.dense(pooled_BD)))


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
