"""A model as a folder of transformers: config.json, model.safetensors, the tokenizer, and our code where it is needed.

With RoPE, RMSNorm and SwiGLU the folder is a EuroBERT, which transformers has built in. The other variants ship the files of
`neobert.model` as they are; `auto_map` in config.json tells the Auto classes where to look (with trust_remote_code=True).
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from neobert.checkpoints.format import WEIGHTS, Tensors
from neobert.checkpoints.layouts import to_eurobert
from neobert.checkpoints.load import EMBEDDING
from neobert.data.tokenizer import save_tokenizer
from neobert.export.hf_encoder import hf_encoder_config, hf_encoder_tensors
from neobert.export.source import Source
from neobert.files import write_json
from neobert.model import modeling_neobert

CODE = Path(modeling_neobert.__file__)
AUTO_MAP = {
    "AutoConfig": "modeling_neobert.NeoBERTConfig",
    "AutoModel": "modeling_neobert.NeoBERT",
    "AutoModelForMaskedLM": "modeling_neobert.NeoBERTForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_neobert.NeoBERTForSequenceClassification",
}


def write_transformers(source: Source, folder: Path, trained: dict[str, Any]) -> None:
    """Write what `AutoModel.from_pretrained(folder)` and `AutoTokenizer` read. `trained` says how it embeds, if it does."""
    tokenizer = source.tokenizer
    tokenizer.model_max_length = trained.get("max_length", source.longest)
    if source.is_hf_encoder:
        fields, tensors = (
            hf_encoder_config(source.model, source.fields),
            hf_encoder_tensors(source.model, source.fields["model_type"]),
        )
    else:
        weights = source.model.state_dict()
        fields, tensors = exported_config(source, trained), to_eurobert(weights) if source.is_native else weights
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    write_json(folder / "config.json", fields)
    save_file(_contiguous(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder)
    if not source.is_native:
        for path in code_files():
            shutil.copyfile(path, folder / path.name)


def exported_config(source: Source, trained: dict[str, Any]) -> dict[str, Any]:
    """config.json: the checkpoint's, with `auto_map` where our code is shipped."""
    fields = {name: value for name, value in source.fields.items() if name != "auto_map"}
    if trained:
        fields["neobert"] = {**fields["neobert"], EMBEDDING: trained}
    if source.is_native:
        return fields
    kind = ["NeoBERT"] if source.is_embedder else fields["architectures"]
    return {**fields, "architectures": kind, "auto_map": AUTO_MAP}


def code_files() -> list[Path]:
    """The model's file and those that it imports, which are all that it needs besides torch and transformers."""
    from transformers.dynamic_module_utils import get_relative_import_files

    return sorted({CODE, *map(Path, get_relative_import_files(CODE))})


def _contiguous(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
