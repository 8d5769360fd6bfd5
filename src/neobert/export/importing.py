"""`neobert import`: a model in another layout becomes a checkpoint that `glue` and `pretrain` start from.

    OUT/
      checkpoints/0/  checkpoints/latest     a checkpoint as a run writes it, without optimizer and position
      import.json                            where it comes from, and how far it is from what it was

The source is compared with what was made of it: a EuroBERT is loaded by transformers in a clean process, the published layout
by `published_outputs`; an export with code of its own by that code, when it is this version's or you trust it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from neobert import __version__
from neobert.checkpoints.convert import convert, published_architecture, read_tensors
from neobert.checkpoints.format import Content, save_checkpoint, strip_checkpoint
from neobert.checkpoints.load import Source, to_checkpoint
from neobert.checkpoints.locate import read_model_config
from neobert.config.sections import ModelConfig
from neobert.data.tokenizer import save_tokenizer
from neobert.errors import UserError
from neobert.export import verify
from neobert.export.verify import Check
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
    source = convert(path, tokenizer)
    if source.layout == "checkpoint":
        raise UserError(f"{source.folder}: is a checkpoint already; start from it as it is")
    names = {"eurobert": "a EuroBERT", "published": "the published NeoBERT's layout", "export": "an export of ours"}
    architecture, name = source.model.config, source.folder.resolve().name
    shape = f"{architecture.num_hidden_layers} layers x {architecture.hidden_size} wide"
    log(f"model       {source.folder}: {names[source.layout]}, {shape}, {architecture.vocab_size:,} tokens")
    for note in source.notes:
        log(f"note: {note}")
    code, own_code = ({p.name: p.read_bytes() for p in some} for some in (source.folder.glob("*.py"), code_files()))
    found = list[Check]()
    if source.layout == "published":
        found = compare_published(source)
    elif source.is_native or trust_code or code == own_code:
        found = verify.compare(source, source.folder, tokenizer)
    else:
        log("not verified: the code in the folder is not that of this version; --trust-remote-code runs it")
    checks = verify.judged(found, tolerance, f"{source.folder}: what was imported", log)
    keys = sorted(set(NeoBERTConfig.__annotations__) & set(ModelConfig.model_fields))
    content = Content(  # of a run that has not begun: no optimizer, no position
        step=0,
        weights=to_checkpoint(source.model, source.model.state_dict()),
        model_config={key: value for key, value in source.fields.items() if key != "auto_map"},
        save_beside=lambda folder: save_tokenizer(source.tokenizer, folder, has_token_types=False),
        config_yaml=yaml.safe_dump({"model": {key: getattr(architecture, key) for key in keys}}, sort_keys=False),
        state={"imported_from": name, "num_tokens": 0},
    )
    record = {
        "neobert": __version__, "source": name, "layout": source.layout,
        "notes": source.notes, "verified": [asdict(check) for check in checks],
    }  # fmt: skip
    with whole_folder(out) as scratch:
        (scratch / "checkpoints").mkdir()
        strip_checkpoint(save_checkpoint(scratch / "checkpoints", content))
        write_json(scratch / RECORD, record)
    return checks


def compare_published(source: Source) -> list[Check]:
    """The published model, from its tensors and its description, against ours."""
    sample = verify.build_sample(source)
    found = {
        f"{what}/{how}/{number}": values
        for number, outputs in enumerate(published_outputs(source.folder, sample))
        for what, values in outputs.items()
        for how in ("alone", "padded")
    }
    lengths = [len(row) for row, _ in sample]
    return [verify.check(found, what, values, lengths) for what, values in verify.row_outputs(source, sample).items()]


# --- the published NeoBERT (arXiv 2502.19587), computed plainly from its own tensors -----------


@torch.no_grad()
def published_outputs(folder: Path, sample: verify.Sample) -> Iterator[dict[str, np.ndarray]]:
    """Hidden states T x D, and logits of picked tokens x V where there is a decoder, of every row, by the published model.

    Nothing is shared with our model: complex numbers rotate interleaved pairs, heads are cut out of the fused projection one by
    one, attention is a softmax over one document.
    """
    weights, config = read_tensors(folder), published_architecture(read_model_config(folder))
    if not any(name.startswith("model.") for name in weights):  # an encoder saved by itself
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    for row, picks in sample:
        x_TD = weights["model.encoder.weight"][torch.tensor(row)]
        width = config.hidden_size // config.num_attention_heads
        angles = torch.outer(torch.arange(len(row)), 10_000.0 ** (-torch.arange(0, width, 2) / width))
        rotation = torch.polar(torch.ones_like(angles), angles)
        for number in range(config.num_hidden_layers):
            part = f"model.transformer_encoder.{number}."
            layer = {name.removeprefix(part): tensor for name, tensor in weights.items() if name.startswith(part)}
            x_TD = _block(x_TD, layer, rotation, config.num_attention_heads, config.norm_eps)
        x_TD = F.rms_norm(x_TD, x_TD.shape[1:], weights["model.layer_norm.weight"], config.norm_eps)
        outputs = {"hidden": x_TD.numpy()}
        if "decoder.weight" in weights:
            outputs["logits"] = F.linear(x_TD, weights["decoder.weight"], weights.get("decoder.bias"))[picks].numpy()
        yield outputs


def _block(x_TD: Tensor, layer: dict[str, Tensor], rotation: Tensor, num_heads: int, eps: float) -> Tensor:
    normed_TD = F.rms_norm(x_TD, x_TD.shape[1:], layer["attention_norm.weight"], eps)
    qkv_THK3 = (normed_TD @ layer["qkv.weight"].T).view(len(x_TD), num_heads, -1)
    attended = []
    for head in range(num_heads):
        q, k, v = qkv_THK3[:, head].chunk(3, dim=-1)
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.reshape(len(z), -1, 2).contiguous()) * rotation).flatten(1)
            for z in (q, k)
        )
        attended.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    x_TD = x_TD + torch.cat(attended, dim=-1) @ layer["wo.weight"].T
    normed_TD = F.rms_norm(x_TD, x_TD.shape[1:], layer["ffn_norm.weight"], eps)
    gate, up = (normed_TD @ layer["ffn.w12.weight"].T).chunk(2, dim=-1)
    return x_TD + (F.silu(gate) * up) @ layer["ffn.w3.weight"].T
