"""A model's folder as sentence-transformers knows it: the one reader and the one writer of its files.

What a folder asks for is either computed as sentence-transformers computes it or refused by name, never left out. The names of
the modules that are written are those of sentence-transformers 2 to 6, which all of these versions know.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from neobert.checkpoints.load import EMBEDDING, HF_ENCODER
from neobert.checkpoints.locate import MODULES, read_model_config
from neobert.errors import CheckpointError, UserError, first_line
from neobert.files import read_json, write_json
from neobert.model.unpadding import Pooling

TRANSFORMER, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max"}
OLDER_MODES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
}  # fmt: skip
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")  # of torch.nn, with their defaults
# Fields of a Transformer module that are read here, or change no number.
KNOWN = {
    "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs",
    "model_args", "model_kwargs",
}  # fmt: skip
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True)
class Embedding:
    """How a text becomes one vector: the pooling of its tokens, whether it gets length 1, the prompts by name that are put in
    front of it, and the number of tokens after which it is cut. `pooling` None: as the model was trained, else the mean.
    """

    pooling: Pooling | None = None
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    max_length: int = 512


@dataclass(frozen=True)
class SentenceSettings:
    """How a folder's model embeds. None stands for what the folder does not say. `encoder` is the folder of the transformers
    model, `head` what follows pooling except for a last normalisation, `default_prompt` the text that is put in front where no
    prompt is asked for, `include_prompt` whether the prompt's tokens are pooled.
    """

    folder: Path
    encoder: Path
    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    include_prompt: bool = True
    lower_case: bool = False
    similarity: str = "cosine"
    head: nn.Sequential = field(default_factory=nn.Sequential)

    def prompt(self, name: str | None) -> str:
        """The text of the prompt `name`; None: of the default one. Raises CheckpointError for an unknown name."""
        if name is None:
            return self.default_prompt
        if name not in self.prompts:
            there = f"there are: {', '.join(self.prompts)}" if self.prompts else "there is none"
            raise CheckpointError(f"{self.encoder}: no prompt {name!r}; {there}")
        return self.prompts[name]


# --- writing -----------


def parse_pooling(text: str) -> Pooling:
    """Raises UserError for an unknown pooling."""
    if text not in get_args(Pooling):
        raise UserError(f"--pooling: must be one of {', '.join(get_args(Pooling))}, got {text!r}")
    return text  # type: ignore[return-value]


def write_sentence_transformers(folder: Path, width: int, embedding: Embedding) -> None:
    """Write what `SentenceTransformer(folder)` reads beside the transformers model in `folder`."""
    chosen = "mean" if embedding.pooling == "avg" else embedding.pooling
    modes = {name: mode == chosen for name, mode in OLDER_MODES.items()} | {"pooling_mode_mean_sqrt_len_tokens": False}
    configs = {"1_Pooling": {"word_embedding_dimension": width, **modes}}
    configs |= {"2_Normalize": {}} if embedding.normalize else {}
    for path, fields in configs.items():
        (folder / path).mkdir()
        write_json(folder / path / "config.json", fields)
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
        for n, path in enumerate(["", *configs])
    ]
    write_json(folder / MODULES, modules)
    write_json(folder / TRANSFORMER, {"max_seq_length": embedding.max_length, "do_lower_case": False})
    settings = {"prompts": embedding.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / PROMPTS, {"model_type": "SentenceTransformer", **settings})


# --- reading -----------


def read_sentence_settings(folder: Path) -> SentenceSettings:
    """The settings of a model's folder. Raises CheckpointError naming a module or setting that is not computed here."""
    if not (folder / MODULES).is_file():
        fields = read_model_config(folder)
        trained = fields.get("neobert", fields.get(HF_ENCODER, {})).get(EMBEDDING, {})
        return SentenceSettings(folder, folder, trained.get("pooling"), max_length=trained.get("max_length"))
    listed = read_json(folder / MODULES, CheckpointError, shape=list)
    modules = [(one["type"].rpartition(".")[2], folder / one["path"]) for one in listed]
    kinds = [kind for kind, _ in modules]
    if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Dense", "Normalize"}):
        raise CheckpointError(f"{folder}: has modules that are not computed here: {', '.join(unknown)}")
    if kinds[:2] != ["Transformer", "Pooling"] or "Pooling" in kinds[2:]:
        known = "only Transformer, Pooling, then Dense and Normalize are computed here"
        raise CheckpointError(f"{folder / MODULES}: {', '.join(kinds)}: {known}")
    (_, encoder), (_, pooling), *rest = modules
    normalize = kinds[-1] == "Normalize"
    head = [_read_head(*one) for one in (rest[:-1] if normalize else rest)]
    fields = read_json(pooling / "config.json", CheckpointError)
    return SentenceSettings(
        folder=folder,
        encoder=encoder,
        pooling=_read_pooling(folder, fields),
        normalize=normalize,
        include_prompt=fields.get("include_prompt", True),
        head=nn.Sequential(*head).eval(),
        **_read_transformer(encoder),
        **_read_prompts(folder / PROMPTS),
    )


def _read_transformer(folder: Path) -> dict[str, Any]:
    """Length and case from `sentence_bert_config.json`, which older folders name after the kind of their encoder."""
    path = next(iter(sorted(folder.glob("sentence_*_config.json"))), None)
    fields = read_json(path, CheckpointError) if path else {}
    text = (fields.get("modality_config") or {}).get("text", {})
    expected = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    refused = [name for name, value in fields.items() if value and name not in KNOWN]
    refused += [f"{name} {fields[name]}" for name, value in expected.items() if fields.get(name, value) != value]
    if text.get("method_output_name", "last_hidden_state") != "last_hidden_state":
        refused.append(f"method_output_name {text['method_output_name']}")
    if refused:
        raise CheckpointError(f"{path}: asks for what is not computed here: {', '.join(refused)}")
    return {"max_length": fields.get("max_seq_length"), "lower_case": bool(fields.get("do_lower_case"))}


def _read_prompts(path: Path) -> dict[str, Any]:
    fields = read_json(path, CheckpointError) if path.is_file() else {}
    prompts = {name: text for name, text in (fields.get("prompts") or {}).items() if text}
    similarity = fields.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise CheckpointError(f"{path}: similarity_fn_name {similarity!r} is not computed here")
    default = prompts.get(fields.get("default_prompt_name") or "", "")
    return {"prompts": prompts, "default_prompt": default, "similarity": similarity}


def _read_pooling(folder: Path, fields: dict[str, Any]) -> Pooling:
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


def _read_head(kind: str, folder: Path) -> nn.Module:
    """A Dense module (a linear layer and an activation), or a Normalize in front of one."""
    if kind == "Normalize":
        return _Normalize()
    fields = read_json(folder / "config.json", CheckpointError)
    activation = fields.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    names = [name for name in ("module_input_name", "module_output_name") if fields.get(name) is not None]
    refused = [] if activation in ACTIVATIONS else [f"activation_function {activation}"]
    refused += ["use_residual"] if fields.get("use_residual") else []
    refused += [f"{name} {fields[name]}" for name in names if fields[name] != "sentence_embedding"]
    if refused:
        raise CheckpointError(f"{folder}: a Dense module with {', '.join(refused)} is not computed here")
    linear = nn.Linear(fields["in_features"], fields["out_features"], bias=fields.get("bias", True))
    try:
        weights = load_file(folder / "model.safetensors")
        linear.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        why = first_line(error)
        raise CheckpointError(f"{folder}: the weights of the Dense module cannot be read: {why}") from None
    return nn.Sequential(linear, getattr(nn, activation)())
