"""The model card: README.md with what the model is, how to load it, what it was trained on, its curve and its scores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from neobert.config.schema import known_keys
from neobert.export.source import Source
from neobert.export.verify import Check
from neobert.inference.sentence_transformers import Embedding
from neobert.training.metrics import read_metrics

CURVE = "training.svg"
MAX_POINTS = 12  # rows of the table of the curve
# Where a run happened, which says nothing of the model.
OF_THE_MACHINE = (
    "trainer.output_dir", "trainer.resume_from_checkpoint", "trainer.overwrite_output_dir", "trainer.report_to",
    "trainer.use_cpu", "trainer.logging_steps", "trainer.save_steps", "trainer.save_total_limit", "config_path",
    "accelerate_config_file",
    "pretraining_metadata", "dataset.num_workers", "dataset.num_proc", "dataset.cache_dir", "dataset.pre_tokenize_output",
)  # fmt: skip

MASKED = """```python
from transformers import {classes}

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForMaskedLM.from_pretrained("{name}"{trust})
fill_mask = pipeline("fill-mask", model=model, tokenizer=tokenizer)
print(fill_mask(f"Some {{tokenizer.mask_token}} of your own."))
```"""
CLASSIFIER = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForSequenceClassification.from_pretrained("{name}"{trust})
logits = model(**tokenizer("some text", return_tensors="pt")).logits
```"""
SENTENCES = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{trust})
embeddings = model.encode(["some text", "another text"]){prompt}
```"""
POOLED = """```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModel.from_pretrained("{name}"{trust})
inputs = tokenizer(["some text", "another text"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = {pooled}{normalized}
```"""
POOLED_BY = {
    "cls": "hidden[:, 0]",
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "avg": "(hidden * mask).sum(1) / mask.sum(1)",
    "max": "hidden.masked_fill(mask == 0, -torch.inf).amax(1)",
}
ONNX_CODE = """```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
session = onnxruntime.InferenceSession("{name}/onnx/model.onnx")
(output,) = session.run(None, dict(tokenizer(["some text"], return_tensors="np")))
```"""


def write_card(
    source: Source, folder: Path, embedding: Embedding | None, onnx: bool, checks: list[Check], name: str
) -> None:
    """Write README.md into `folder`, and the picture of the curve where the run left metrics."""
    rows = training_rows(source)
    parts = [
        front_matter(source, embedding), f"# {name}\n", f"{summary(source)}\n",
        "## How to load it\n", *how_to_load(source, embedding, onnx, name),
        *data_section(source), *curve_section(rows, folder), *score_section(source), *config_section(source),
        *verified_section(checks),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(parts))


def verified_section(checks: list[Check]) -> list[str]:
    """How far the folder is from the trained model."""
    lines = (
        f"{c.what} | {c.num_rows} | {c.shortest} to {c.longest} | {c.difference:.1e} | {c.tolerance:.0e}"
        for c in checks
    )
    return [
        "## Verified\n",
        "Loaded in a process that has only this folder, and compared with the trained model, in float32, on real text, alone "
        "and in padded batches. Differences are absolute, or relative to the largest output where that is above 1; of the "
        "folder loaded in bfloat16 and float16, root mean squares relative to that of the outputs.\n",
        "| what | rows | tokens | difference | allowed |",
        "|---|---|---|---|---|",
        *(f"| {line} |" for line in lines),
        "",
    ]


def front_matter(source: Source, embedding: Embedding | None) -> str:
    """The hub's metadata."""
    task = "text-classification" if source.is_classifier else "fill-mask"
    if embedding is not None:
        task = "sentence-similarity"
    fields = {
        "library_name": "sentence-transformers" if embedding is not None else "transformers",
        "pipeline_tag": task,
        "tags": ["neobert", source.fields["model_type"] if source.is_native else "custom_code"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def summary(source: Source) -> str:
    """What the model is, in two sentences."""
    config = source.model.config
    if source.is_hf_encoder:
        kinds = f"the architecture {source.fields['model_type']} of transformers"
    else:
        norm = "nGPT" if config.ngpt else "RMSNorm" if config.rms_norm else "LayerNorm"
        kinds = f"{'RoPE' if config.rope else 'learned positions'}, {norm}, {config.hidden_act}"
    size = sum(parameter.numel() for parameter in source.model.parameters())
    steps = f" It was trained for {source.state['step']:,} steps" if source.state.get("step") else ""
    tokens = f" and {source.state['num_tokens']:,} tokens" if steps and source.state.get("num_tokens") else ""
    return (
        f"A bidirectional text encoder of {size:,} parameters: {config.num_hidden_layers} layers x {config.hidden_size} wide x "
        f"{config.num_attention_heads} heads, {kinds}, {config.vocab_size:,} tokens, texts of up to "
        f"{source.positions:,} tokens.{steps}{tokens}{'.' if steps else ''}"
    )


def how_to_load(source: Source, embedding: Embedding | None, onnx: bool, name: str) -> Iterator[str]:
    """Code for each library that loads the folder."""
    trust = "" if source.is_native else ", trust_remote_code=True"
    if not source.is_native:
        yield "The model's code is in this folder; `trust_remote_code=True` runs it.\n"
    if source.is_embedder and embedding is not None:
        normalized = "\nembeddings = torch.nn.functional.normalize(embeddings)" if embedding.normalize else ""
        pooled = POOLED_BY[embedding.pooling or "mean"]
        yield POOLED.format(name=name, trust=trust, pooled=pooled, normalized=normalized) + "\n"
    else:
        template = CLASSIFIER if source.is_classifier else MASKED
        yield template.format(name=name, trust=trust, classes="AutoModelForMaskedLM, AutoTokenizer, pipeline") + "\n"
    if embedding is not None:
        prompts = "".join(f"\n# prompt {key!r}: {text!r}" for key, text in embedding.prompts.items())
        yield SENTENCES.format(name=name, trust=trust, prompt=prompts) + "\n"
    if onnx:
        yield ONNX_CODE.format(name=name, trust=trust) + "\n"


def data_section(source: Source) -> list[str]:
    """Where the text came from: names, not paths of a machine."""
    dataset = source.config.get("dataset") or {}
    sources = dataset.get("mixture") or [dataset]
    lines = [f"- {_data_name(one)}" for one in sources if one.get("path") or one.get("name")]
    return ["## Training data\n", *lines, ""] if lines else []


def _data_name(dataset: dict[str, Any]) -> str:
    name = Path(dataset["path"]).name if dataset.get("path") else f"`{dataset['name']}` of the hub"
    details = ", ".join(str(dataset[key]) for key in ("config", "weight") if dataset.get(key) is not None)
    return f"{name} ({details})" if details else name


def training_rows(source: Source) -> list[dict[str, Any]]:
    """The run's metrics up to the checkpoint."""
    path = source.run / "metrics.jsonl" if source.run is not None else None
    if path is None or not path.is_file():
        return []
    return [row for row in read_metrics(path) if row.get("step", 0) <= source.state["step"]]


def curve_section(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """The loss over the run: a picture, and a table of a few steps."""
    train = [(row["step"], row["loss"]) for row in rows if row.get("kind") == "train" and "loss" in row]
    held = {row["step"]: row["eval_loss"] for row in rows if row.get("kind") == "eval" and "eval_loss" in row}
    if not train:
        return []
    _draw(train, sorted(held.items()), folder / CURVE)
    last = len(train) - 1
    points = sorted({round(i * last / max(1, MAX_POINTS - 1)) for i in range(MAX_POINTS)}) if last else [0]
    lines = []
    for step, loss in (train[i] for i in points):
        evaluated = f"{held[step]:.4f}" if step in held else ""
        lines.append(f"| {step:,} | {loss:.4f} | {evaluated} |")
    table = ["| step | training loss | held-out loss |", "|---|---|---|", *lines, ""]
    return ["## Training curve\n", f"![loss]({CURVE})\n", *table]


def _draw(train: list[tuple[int, float]], held: list[tuple[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(*zip(*train, strict=True), label="training", color="#0969da", linewidth=1.2)
    if held:
        axes.plot(*zip(*held, strict=True), label="held out", color="#bc4c00", linewidth=1.2)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(path, format="svg", metadata={"Date": None})


def score_section(source: Source) -> list[str]:
    """Scores that stand in the run's folder: of the last evaluation, of GLUE, of MTEB."""
    run = source.run
    if run is None:
        return []
    lines = []
    for row in training_rows(source)[::-1]:
        if row.get("kind") == "eval":
            lines += [
                f"| {name.removeprefix('eval_')}, held out | {row[name]:.4g} |" for name in row if _is_score(name)
            ]
            break
    glue = _read(run / "result.json")
    if isinstance(glue.get("score"), float):
        lines.append(f"| GLUE {glue.get('task', '')}, score | {100 * glue['score']:.2f} |")
    for entry in _read(run / "mteb" / f"local__{run.resolve().name}-{source.folder.name}.json").get("tasks", []):
        if isinstance(entry.get("score"), float):
            lines.append(f"| MTEB {entry['name']} | {100 * entry['score']:.2f} |")
    return ["## Scores\n", "| | |", "|---|---|", *lines, ""] if lines else []


def _is_score(name: str) -> bool:
    return name.startswith("eval_") and not name.startswith("eval_num_")


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def config_section(source: Source) -> list[str]:
    """The keys of the run that are not at their defaults, as YAML."""
    changed = changed_keys(source.config)
    if not changed:
        return []
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    return ["## Configuration\n", "Keys that were not at their defaults:\n", f"```yaml\n{text}```\n"]


def changed_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, without what only concerns the machine; of paths the last part."""
    out: dict[str, Any] = {}
    for dotted, info in known_keys().items():
        value: Any = config
        for part in dotted.split("."):
            value = value.get(part, info.default) if isinstance(value, dict) else info.default
        if isinstance(value, dict) or value == info.default or dotted in OF_THE_MACHINE or dotted.startswith("wandb."):
            continue
        is_path = isinstance(value, str) and dotted.endswith(("path", "_dir"))
        section, _, name = dotted.rpartition(".")
        inner = out
        for part in section.split(".") if section else []:
            inner = inner.setdefault(part, {})
        inner[name] = Path(value).name if is_path else value
    return out
