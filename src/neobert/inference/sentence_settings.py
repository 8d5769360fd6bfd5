"""How a model's folder makes vectors of texts: the one reader of what sentence-transformers, or a run of ours, wrote there.

What a folder asks for is either computed as sentence-transformers computes it or refused by name, never left out.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from neobert.checkpoints.load import EMBEDDING, HF_ENCODER, read_model_config
from neobert.errors import CheckpointError, first_line
from neobert.model.unpadding import Pooling

MODULES = "modules.json"
MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max"}
OLDER_MODES = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
}  # fmt: skip
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")  # of torch.nn, with their defaults
# Fields of a Transformer module that are read here, or change no number.
KNOWN = {
    "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs",
    "model_args", "model_kwargs",
}  # fmt: skip
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True)
class SentenceSettings:
    """None stands for what the folder does not say. `encoder` is the folder of the transformers model, `head` what follows
    pooling but for a last normalisation, `default_prompt` the text that is put in front where no prompt is asked for.
    """

    folder: Path
    encoder: Path
    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    include_prompt: bool = True  # in what is pooled
    lower_case: bool = False
    similarity: str = "cosine"
    head: nn.Sequential = field(default_factory=nn.Sequential)

    def prompt(self, name: str | None) -> str:
        """The text of the prompt `name`; None: of the default one. Raises CheckpointError for a name that is none."""
        if name is None:
            return self.default_prompt
        if name not in self.prompts:
            there = f"there are: {', '.join(self.prompts)}" if self.prompts else "there is none"
            raise CheckpointError(f"{self.encoder}: no prompt {name!r}; {there}")
        return self.prompts[name]


def read_sentence_settings(folder: Path) -> SentenceSettings:
    """The settings of a model's folder. Raises CheckpointError naming a module or setting that is not computed here."""
    if not (folder / MODULES).is_file():
        fields = read_model_config(folder)
        trained = fields.get("neobert", fields.get(HF_ENCODER, {})).get(EMBEDDING, {})
        return SentenceSettings(folder, folder, trained.get("pooling"), max_length=trained.get("max_length"))
    modules = [(one["type"].rpartition(".")[2], folder / one["path"]) for one in _read(folder / MODULES)]
    kinds = [kind for kind, _ in modules]
    if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Dense", "Normalize"}):
        raise CheckpointError(f"{folder}: has modules that are not computed here: {', '.join(unknown)}")
    if kinds[:2] != ["Transformer", "Pooling"] or "Pooling" in kinds[2:]:
        order = ", ".join(kinds)
        raise CheckpointError(
            f"{folder / MODULES}: {order}: only Transformer, Pooling, then Dense and Normalize are computed here"
        )
    normalize = kinds[-1] == "Normalize"
    head = [_head_module(kind, path) for kind, path in (modules[2:-1] if normalize else modules[2:])]
    pooling = _read(modules[1][1] / "config.json")
    return SentenceSettings(
        folder=folder,
        encoder=modules[0][1],
        pooling=_pooling(folder, pooling),
        normalize=normalize,
        include_prompt=pooling.get("include_prompt", True),
        head=nn.Sequential(*head).eval(),
        **_transformer(folder, modules[0][1]),
        **_prompts(folder),
    )


def _transformer(folder: Path, path: Path) -> dict[str, Any]:
    """Of `sentence_bert_config.json`, which older folders name after the kind of their encoder."""
    found = next(iter(sorted(path.glob("sentence_*_config.json"))), None)
    fields = _read(found) if found else {}
    text = (fields.get("modality_config") or {}).get("text", {})
    expected = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    refused = [name for name, value in fields.items() if value and name not in KNOWN]
    refused += [f"{name} {fields[name]}" for name, value in expected.items() if fields.get(name, value) != value]
    if text.get("method_output_name", "last_hidden_state") != "last_hidden_state":
        refused.append(f"method_output_name {text['method_output_name']}")
    if refused:
        raise CheckpointError(f"{found}: asks for what is not computed here: {', '.join(refused)}")
    return {"max_length": fields.get("max_seq_length"), "lower_case": bool(fields.get("do_lower_case"))}


def _prompts(folder: Path) -> dict[str, Any]:
    """Of `config_sentence_transformers.json`."""
    path = folder / "config_sentence_transformers.json"
    fields = _read(path) if path.is_file() else {}
    prompts = {name: text for name, text in (fields.get("prompts") or {}).items() if text}
    similarity = fields.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise CheckpointError(f"{path}: similarity_fn_name {similarity!r} is not computed here")
    default = prompts.get(fields.get("default_prompt_name") or "", "")
    return {"prompts": prompts, "default_prompt": default, "similarity": similarity}


def _pooling(folder: Path, fields: dict[str, Any]) -> Pooling:
    """From `pooling_mode: mean` of newer folders, or `pooling_mode_mean_tokens: true` of older ones."""
    chosen = fields.get("pooling_mode") or [
        OLDER_MODES.get(name, name) for name, value in fields.items() if name.startswith("pooling_mode_") and value
    ]
    chosen = [chosen] if isinstance(chosen, str) else chosen or ["mean"]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise CheckpointError(f"{folder}: pooling {', '.join(map(str, chosen))} is not computed here")
    return MODES[chosen[0]]


class _Normalize(nn.Module):
    def forward(self, vectors_nD: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(vectors_nD, dim=1)


def _head_module(kind: str, folder: Path) -> nn.Module:
    """A Dense module (a linear layer and an activation), or a Normalize in front of one."""
    if kind == "Normalize":
        return _Normalize()
    fields = _read(folder / "config.json")
    activation = fields.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    refused = {
        f"activation_function {activation}": activation not in ACTIVATIONS,
        "use_residual": fields.get("use_residual"),
        **{
            f"{name} {fields.get(name)}": fields.get(name) not in (None, "sentence_embedding")
            for name in ("module_input_name", "module_output_name")
        },
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise CheckpointError(f"{folder}: a Dense module with {', '.join(names)} is not computed here")
    linear = nn.Linear(fields["in_features"], fields["out_features"], bias=fields.get("bias", True))
    try:
        weights = load_file(folder / "model.safetensors")
        linear.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{folder}: the weights of the Dense module cannot be read: {reason}") from None
    return nn.Sequential(linear, getattr(nn, activation)())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: missing or not JSON") from None
