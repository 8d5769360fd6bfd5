"""Small checkpoints for tests, written without training: weights large enough that differences would show."""

import json

import torch

from helpers.runs import TOKENIZER
from neobert.checkpoints.format import Content, save_checkpoint
from neobert.checkpoints.layouts import checkpoint_config, is_eurobert, to_eurobert
from neobert.data.tokenizer import load_tokenizer, save_tokenizer
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTForSequenceClassification

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
RANGES = {"decoder_init_range": 0.3, "embedding_init_range": 0.5}
OWN_CODE = {"ngpt": True, "rope": False, "hidden_act": "gelu"}
LENGTHS = (1, 2, 17, 32, 33, 100, 512)


def tiny_model(kind=NeoBERTForMaskedLM, **fields):
    torch.manual_seed(0)
    config = NeoBERTConfig(vocab_size=8192, max_position_embeddings=512, **{**SHAPE, **RANGES, **fields})
    return kind(config).eval()


def write_checkpoint(run, model, step=7, **own):
    """`run/checkpoints/<step>` with `model`; `own` goes into our section of config.json. Returns the run's folder."""
    tokenizer = load_tokenizer("", str(TOKENIZER))
    fields = checkpoint_config(model.config, tokenizer, None)
    fields["neobert"] = {**fields["neobert"], **own}
    prefix = "EuroBert" if is_eurobert(model.config) else "NeoBERT"
    if isinstance(model, NeoBERTForSequenceClassification):
        fields |= {"architectures": [f"{prefix}ForSequenceClassification"], "classifier_pooling": "bos"}
        fields["neobert"]["num_labels"] = model.config.num_labels
        names = {str(number): f"LABEL_{number}" for number in range(model.config.num_labels)}
        fields |= {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    if isinstance(model, NeoBERTForEmbedding):
        fields |= {"architectures": ["EuroBertModel" if prefix == "EuroBert" else "NeoBERTForEmbedding"]}
    weights = model.state_dict()
    root = run / "checkpoints"
    root.mkdir(parents=True)
    save_checkpoint(
        root,
        Content(
            step=step,
            weights=to_eurobert(weights) if prefix == "EuroBert" else weights,
            model_config=fields,
            save_beside=lambda folder: save_tokenizer(tokenizer, folder),
            config_yaml="dataset:\n  path: /somewhere/corpus\noptimizer:\n  lr: 0.002\n",
            optimizer={},
            data=({}, {}),
            state={"num_tokens": 12_345},
        ),
    )
    rows = [{"kind": "train", "step": n, "loss": 9.0 - n / 4, "num_tokens": 100 * n} for n in range(1, step + 1)]
    rows += [
        {"kind": "eval", "step": step, "eval_loss": 7.5, "eval_num_targets": 10},
        {"kind": "train", "step": 99, "loss": 1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def padded_rows(lengths=LENGTHS):
    """(ids, mask) of rows of these lengths, right-padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 8000, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


def largest_difference(ours, theirs, ids, mask, output):
    """Between two models, over padded rows and each row alone, at real tokens."""
    with torch.no_grad():
        pairs = [(getattr(m(input_ids=ids, attention_mask=mask), output) for m in (ours, theirs))]
        for row, length in zip(ids, mask.sum(1).tolist(), strict=True):
            pairs.append(getattr(m(input_ids=row[None, :length]), output) for m in (ours, theirs))
        worst = 0.0
        for number, (a, b) in enumerate(pairs):
            if a.ndim == 3 and number == 0:
                a, b = a[mask.bool()], b[mask.bool()]
            worst = max(worst, float((a - b).abs().max()))
    return worst


def content(step, size=100):
    return Content(
        step=step,
        weights={"w": torch.arange(size).float() + step},
        model_config={"model_type": "x"},
        save_beside=lambda path: (path / "tokenizer.json").write_text("{}"),
        config_yaml="task: pretraining\n",
        optimizer={"w/exp_avg": torch.ones(size)},
        data=({"reader": {}}, {"buffer.ids": torch.zeros(3).numpy()}),
        state={"num_tokens": 7},
    )
