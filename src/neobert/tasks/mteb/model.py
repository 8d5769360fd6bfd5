"""A model as the MTEB library wants one: our embedder under its encoder's interface, with prompts."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from tqdm import tqdm

from neobert.files import sha256
from neobert.inference.embed import Embedder


class EncoderForMTEB(AbsEncoder):
    """`embedder` with `prompts`: by task name, type of task, or `query` and `document`, as MTEB chooses among them.

    Texts of a task come at once and are sorted by length, so nothing is spent on padding.
    """

    def __init__(self, embedder: Embedder, meta: ModelMeta, prompts: dict[str, str]):
        self.embedder, self.prompts = embedder, prompts
        self.model = embedder.model
        self.mteb_model_meta = meta

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Texts x width, float32. `inputs` gives batches with a list of texts under `text`."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self._prompt(task_metadata, prompt_type)
        with tqdm(total=len(texts), unit="text", disable=not os.isatty(2), leave=False, dynamic_ncols=True) as bar:
            bar.set_description(task_metadata.name)
            return self.embedder.encode(texts, None, bar.update, prompt)

    def prompts_of(self, task_metadata: Any) -> dict[str, str]:
        """The prompts that texts of a task get: of `query` and `document`, or of every `text`."""
        sides: dict[str, PromptType | None] = {"text": None}
        if task_metadata.type in ("Retrieval", "Reranking"):
            sides = {side.value: side for side in (PromptType.query, PromptType.document)}
        found = {name: self._prompt(task_metadata, side) for name, side in sides.items()}
        return {name: prompt for name, prompt in found.items() if prompt}

    def _prompt(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """As sentence-transformers: a text that is neither query nor document gets the folder's default prompt, if no other."""
        name = get_prompt_name(self.prompts, task_metadata, prompt_type) if self.prompts else None
        default = self.embedder.settings.default_prompt if prompt_type is None else ""
        return self.prompts[name] if name is not None else default


def build_meta(name: str, identity: str, settings: dict[str, Any], embedder: Embedder) -> ModelMeta:
    """The model's card for MTEB. Its revision names weights and settings, so that results of others are not mixed in."""
    text = json.dumps(settings, sort_keys=True)
    revision = f"{identity[:12]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    unknown: dict[str, Any] = dict.fromkeys(
        ("loader", "release_date", "languages", "memory_usage_mb", "license", "open_weights", "public_training_code",
         "public_training_data", "training_datasets")
    )  # fmt: skip
    return ModelMeta(
        name=name,
        revision=revision,
        n_parameters=sum(parameter.numel() for parameter in embedder.model.parameters()),
        max_tokens=embedder.max_length,
        embed_dim=embedder.width,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction(embedder.settings.similarity),
        use_instructions=bool(settings["prompts"]),
        **unknown,
    )


def weights_identity(folder: Path) -> str:
    """A hash of the model's tensors, those of its modules too."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "*/model.safetensors")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(bytes.fromhex(sha256(path)) for path in files)).hexdigest()
