"""Models by name: a folder, or a repository of the hub, downloaded or from its local cache."""

import os
from pathlib import Path
from typing import Any

import torch

from neobert.errors import CheckpointError, first_line

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json"]


def model_folder(name: str) -> Path:
    """The folder of a model; of one of the hub, after downloading it. Raises CheckpointError, also when offline."""
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        why = "this machine is offline (HF_HUB_OFFLINE)" if offline else first_line(error)
        raise CheckpointError(f"{name!r} is no folder, and it cannot be had from the hub: {why}") from None


def load_encoder(name: str) -> Any:
    """Any encoder of `AutoModel`, in float32. Raises CheckpointError when it cannot be loaded, or not whole."""
    from transformers import AutoModel

    try:
        encoder, found = AutoModel.from_pretrained(
            name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{name!r} cannot be loaded: {reason}") from None
    if getattr(encoder.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{name!r} is an encoder with a decoder; an encoder alone is needed")
    missing = sorted(key for key in found["missing_keys"] if "pooler." not in key)
    if missing or found["mismatched_keys"]:
        listed = [*missing, *map(str, found["mismatched_keys"])]
        raise CheckpointError(f"{name!r}: {len(listed)} tensors were not loaded: {', '.join(listed[:3])}")
    return encoder
