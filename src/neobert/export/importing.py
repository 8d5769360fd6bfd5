"""`neobert import`: a model in another layout becomes a checkpoint that `glue` and `pretrain` start from.

    OUT/
      checkpoints/0/  checkpoints/latest     a checkpoint as a run writes it, without optimizer and position
      import.json                            where it comes from, and how far it is from what it was

The source is compared with what was made of it: a EuroBERT is loaded by transformers in a clean process, the published layout
by `published.py`; an export with code of its own by that code, when it is this version's or you trust it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml

from neobert import __version__
from neobert.checkpoints.convert import Converted, convert
from neobert.checkpoints.format import Content, save_checkpoint, strip_checkpoint
from neobert.config.sections import ModelConfig
from neobert.data.tokenizer import save_tokenizer
from neobert.errors import UserError
from neobert.export.published import published_outputs
from neobert.export.source import Source
from neobert.export.verify import (
    Check,
    Sample,
    build_sample,
    by_transformers,
    check,
    compare,
    hidden_states,
    judged,
    logits,
)
from neobert.export.write import code_files
from neobert.files import check_target, whole_folder, write_json
from neobert.model.modeling_neobert import NeoBERTConfig

RECORD = "import.json"


def import_model(
    path: str,
    out: Path,
    tokenizer: str | None = None,
    trust_code: bool = False,
    tolerance: float | None = None,
    replace: bool = False,
    log: Callable[[str], None] = print,
) -> list[Check]:
    """Write and verify `out`; returns what was compared. Raises UserError, and leaves nothing behind, when that fails."""
    check_target(out, RECORD, replace)
    converted = convert(path, tokenizer)
    if converted.kind == "checkpoint":
        raise UserError(f"{converted.folder}: is a checkpoint already; start from it as it is")
    log(f"model       {converted.folder}: {describe(converted)}")
    for note in converted.notes:
        log(f"note: {note}")
    found = verify(converted, Path(tokenizer) if tokenizer else None, trust_code, log)
    checks = judged(found, tolerance, f"{converted.folder}: what was imported", log)
    with whole_folder(out) as scratch:
        root = scratch / "checkpoints"
        root.mkdir()
        strip_checkpoint(save_checkpoint(root, checkpoint_content(converted)))
        write_json(
            scratch / RECORD,
            {
                "neobert": __version__,
                "source": converted.folder.resolve().name,
                "layout": converted.kind,
                "notes": converted.notes,
                "verified": [check.as_json() for check in checks],
            },
        )
    return checks


def describe(converted: Converted) -> str:
    """The layout and the shape."""
    config, names = converted.model.config, {"eurobert": "a EuroBERT", "published": "the published NeoBERT's layout"}
    kind = names.get(converted.kind, "an export of ours")
    return f"{kind}, {config.num_hidden_layers} layers x {config.hidden_size} wide, {config.vocab_size:,} tokens"


def verify(converted: Converted, tokenizer: Path | None, trust_code: bool, log: Callable[[str], None]) -> list[Check]:
    """Compare the source with the model that was made of it. Raises UserError where it does not load."""
    source = Source(converted.folder, converted.fields, converted.model, converted.tokenizer)
    sample = build_sample(converted.tokenizer, converted.model.config.max_position_embeddings)
    if converted.kind == "published":
        checks = compare_published(source, sample, converted.has_head)
    elif source.is_native or trust_code or _ships_this_code(converted.folder):
        comparison = by_transformers(source, converted.folder, sample, tokenizer, converted.has_head)
        checks = compare(converted.folder, [comparison])
    else:
        log("not verified: the code in the folder is not that of this version; --trust-remote-code runs it")
        return []
    return checks


def compare_published(source: Source, sample: Sample, has_head: bool) -> list[Check]:
    """The published model, from its tensors and its description, against ours."""
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for number, (hidden, scores) in enumerate(published_outputs(source.folder, sample.rows)):
            for how in ("alone", "padded"):
                found[f"hidden/{how}/{number}"] = hidden
                if scores is not None:
                    found[f"logits/{how}/{number}"] = scores[sample.picks[number]]
    checks = [check(found, "hidden", hidden_states(source.model, sample.rows), sample.lengths)]
    return checks + ([check(found, "logits", logits(source, sample), sample.lengths)] if has_head else [])


def _ships_this_code(folder: Path) -> bool:
    ours = {path.name: path.read_bytes() for path in code_files()}
    return ours == {path.name: path.read_bytes() for path in folder.glob("*.py")}


def checkpoint_content(converted: Converted) -> Content:
    """Step 0 of a run that has not begun: weights, config and tokenizer; no optimizer, no position."""
    architecture = converted.model.config
    names = sorted(set(NeoBERTConfig.__annotations__) & set(ModelConfig.model_fields))
    return Content(
        step=0,
        weights=converted.tensors(),
        model_config={name: value for name, value in converted.fields.items() if name != "auto_map"},
        save_beside=lambda folder: save_tokenizer(converted.tokenizer, folder, has_token_types=False),
        config_yaml=yaml.safe_dump({"model": {name: getattr(architecture, name) for name in names}}, sort_keys=False),
        optimizer={},
        data=({}, {}),
        state={"imported_from": converted.folder.resolve().name, "num_tokens": 0},
    )
