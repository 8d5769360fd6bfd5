"""How a sentence-transformers folder embeds: what its modules say, so that other code can do the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neobert.errors import CheckpointError
from neobert.model.flat import Pooling

MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max"}


@dataclass(frozen=True)
class SentenceSettings:
    """`max_length` is None where the folder does not limit it."""

    pooling: Pooling
    normalize: bool
    max_length: int | None
    prompts: dict[str, str] = field(default_factory=dict)


def read_sentence_settings(folder: Path) -> SentenceSettings | None:
    """None for a folder that is none of sentence-transformers. Raises CheckpointError for modules that ours has not."""
    if not (folder / "modules.json").is_file():
        return None
    kinds = {one["type"].rpartition(".")[2]: folder / one["path"] for one in _read(folder / "modules.json")}
    if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise CheckpointError(f"{folder}: has modules that are not computed here: {', '.join(unknown)}")
    if "Pooling" not in kinds:
        raise CheckpointError(f"{folder / 'modules.json'}: no Pooling module, so it gives no vector per text")
    transformer = (
        _read(folder / "sentence_bert_config.json") if (folder / "sentence_bert_config.json").is_file() else {}
    )
    own = folder / "config_sentence_transformers.json"
    prompts = _read(own).get("prompts") or {} if own.is_file() else {}
    return SentenceSettings(
        pooling=_pooling(folder, _read(kinds["Pooling"] / "config.json")),
        normalize="Normalize" in kinds,
        max_length=transformer.get("max_seq_length"),
        prompts={name: text for name, text in prompts.items() if text},
    )


def _pooling(folder: Path, fields: dict[str, Any]) -> Pooling:
    """From `pooling_mode: mean` of newer folders, or `pooling_mode_mean_tokens: true` of older ones."""
    older = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    chosen = [fields["pooling_mode"]] if "pooling_mode" in fields else []
    chosen = chosen or [
        older.get(name, name) for name, value in fields.items() if name.startswith("pooling_mode") and value
    ]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise CheckpointError(f"{folder}: pooling {', '.join(map(str, chosen))} is not computed here")
    return MODES[chosen[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: missing or not JSON") from None
