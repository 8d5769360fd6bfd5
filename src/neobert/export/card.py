"""The model card: README.md with what the model is, how to load it, what it was trained on, its curve and its scores."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from neobert.checkpoints.load import Source
from neobert.config.explain import changed_keys
from neobert.config.load import put
from neobert.export.verify import Check
from neobert.files import read_json
from neobert.inference.sentence_transformers import Embedding
from neobert.training.metrics import markdown_table, read_metrics

CURVE = "training.svg"
MAX_POINTS = 12  # steps in the table of the curve
# Where a run happened, which says nothing of the model.
OF_THE_MACHINE = (
    "trainer.output_dir", "trainer.resume_from_checkpoint", "trainer.overwrite_output_dir", "trainer.report_to",
    "trainer.use_cpu", "trainer.logging_steps", "trainer.save_steps", "trainer.save_total_limit", "config_path",
    "accelerate_config_file", "pretraining_metadata", "dataset.num_workers", "dataset.num_proc", "dataset.cache_dir",
    "dataset.pre_tokenize_output",
)  # fmt: skip

MASKED = """from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForMaskedLM.from_pretrained("{name}"{trust})
fill_mask = pipeline("fill-mask", model=model, tokenizer=tokenizer)
print(fill_mask(f"Some {{tokenizer.mask_token}} of your own."))"""
CLASSIFIER = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForSequenceClassification.from_pretrained("{name}"{trust})
logits = model(**tokenizer("some text", return_tensors="pt")).logits"""
SENTENCES = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{trust})
embeddings = model.encode(["some text", "another text"]){prompts}"""
POOLED = """import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModel.from_pretrained("{name}"{trust})
inputs = tokenizer(["some text", "another text"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = {pooled}{normalized}"""
POOLED_BY = {"cls": "hidden[:, 0]", "max": "hidden.masked_fill(mask == 0, -torch.inf).amax(1)"}
POOLED_BY |= dict.fromkeys(("mean", "avg"), "(hidden * mask).sum(1) / mask.sum(1)")
ONNX_CODE = """import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
session = onnxruntime.InferenceSession("{name}/onnx/model.onnx")
(output,) = session.run(None, dict(tokenizer(["some text"], return_tensors="np")))"""
VERIFIED = (
    "Loaded in a process that has only this folder, and compared with the trained model, in float32, on real text, alone "
    "and in padded batches. Differences are absolute, or relative to the largest output where that is above 1; of the "
    "folder loaded in bfloat16 and float16, root mean squares relative to that of the outputs."
)


def write_card(
    source: Source, folder: Path, embedding: Embedding | None, onnx: bool, checks: list[Check], name: str
) -> None:
    """Write README.md into `folder`, and the picture of the curve where the run left metrics."""
    is_of_a_run = bool(source.state) and source.folder.parent.name == "checkpoints"
    run = source.folder.parent.parent if is_of_a_run else None
    config = yaml.safe_load((source.folder / "config.yaml").read_text() if source.state else "") or {}
    found = read_metrics(run / "metrics.jsonl") if run is not None and (run / "metrics.jsonl").is_file() else []
    metrics = [record for record in found if record.get("step", 0) <= source.state["step"]]  # up to the checkpoint
    names = ["what", "rows", "tokens", "difference", "allowed"]
    verified = [
        (c.what, f"{c.num_rows}", f"{c.shortest} to {c.longest}", f"{c.difference:.1e}", f"{c.tolerance:.0e}")
        for c in checks
    ]
    sections = {
        "How to load it": how_to_load(source, embedding, onnx, name),
        "Training data": data(config),
        "Training curve": curve(metrics, folder),
        "Scores": scores(run, source.folder.name, metrics),
        "Configuration": configuration(config),
        "Verified": [VERIFIED, markdown_table(names, verified)],
    }
    head = {  # the hub's metadata
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if source.is_classifier else "fill-mask",
        "tags": ["neobert", source.fields["model_type"] if source.is_native else "custom_code"],
    }
    if embedding is not None:
        head |= {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {name}", summary(source)]
    for title, content in sections.items():
        if section := list(content):
            parts += [f"## {title}", *section]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def summary(source: Source) -> str:
    """What the model is, in two sentences."""
    config, state = source.model.config, source.state
    if source.is_hf_encoder:
        kinds = f"the architecture {source.fields['model_type']} of transformers"
    else:
        norm = "nGPT" if config.ngpt else "RMSNorm" if config.rms_norm else "LayerNorm"
        kinds = f"{'RoPE' if config.rope else 'learned positions'}, {norm}, {config.hidden_act}"
    size = sum(parameter.numel() for parameter in source.model.parameters())
    tokens = f" and {state['num_tokens']:,} tokens" if state.get("num_tokens") else ""
    trained = f" It was trained for {state['step']:,} steps{tokens}." if state.get("step") else ""
    return (
        f"A bidirectional text encoder of {size:,} parameters: {config.num_hidden_layers} layers x {config.hidden_size} wide x "
        f"{config.num_attention_heads} heads, {kinds}, {config.vocab_size:,} tokens, texts of up to "
        f"{source.positions:,} tokens.{trained}"
    )


def how_to_load(source: Source, embedding: Embedding | None, onnx: bool, name: str) -> Iterator[str]:
    """Code for each library that loads the folder."""
    facts = {"name": name, "trust": "" if source.is_native else ", trust_remote_code=True"}
    templates = [CLASSIFIER if source.is_classifier else MASKED]
    if embedding is not None:
        facts["prompts"] = "".join(f"\n# prompt {key!r}: {text!r}" for key, text in embedding.prompts.items())
        facts["pooled"] = POOLED_BY[embedding.pooling or "mean"]
        facts["normalized"] = "\nembeddings = torch.nn.functional.normalize(embeddings)" if embedding.normalize else ""
        templates = [POOLED if source.is_embedder else templates[0], SENTENCES]
    if not source.is_native:
        yield "The model's code is in this folder; `trust_remote_code=True` runs it."
    for template in [*templates, *([ONNX_CODE] if onnx else [])]:
        yield f"```python\n{template.format(**facts)}\n```"


def data(config: dict[str, Any]) -> Iterator[str]:
    """Where the text came from: names, not paths of a machine."""
    lines = []
    dataset = config.get("dataset") or {}
    for one in dataset.get("mixture") or [dataset]:
        if one.get("path") or one.get("name"):
            name = Path(one["path"]).name if one.get("path") else f"`{one['name']}` of the hub"
            details = ", ".join(str(one[key]) for key in ("config", "weight") if one.get(key) is not None)
            lines.append(f"- {name} ({details})" if details else f"- {name}")
    if lines:
        yield "\n".join(lines)


def curve(metrics: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    """The loss over the run: a picture, and a table of a few steps."""
    train = [(one["step"], one["loss"]) for one in metrics if one.get("kind") == "train" and "loss" in one]
    held_out = {one["step"]: one["eval_loss"] for one in metrics if one.get("kind") == "eval" and "eval_loss" in one}
    if not train:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for points, label, colour in ((train, "training", "#0969da"), (sorted(held_out.items()), "held out", "#bc4c00")):
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.2)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(folder / CURVE, format="svg", metadata={"Date": None})
    shown = sorted({round(i * (len(train) - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})
    rows = [
        (f"{step:,}", f"{loss:.4f}", f"{held_out[step]:.4f}" if step in held_out else "")
        for step, loss in (train[i] for i in shown)
    ]
    yield f"![loss]({CURVE})"
    yield markdown_table(["step", "training loss", "held-out loss"], rows)


def scores(run: Path | None, step: str, metrics: list[dict[str, Any]]) -> Iterator[str]:
    """Scores that stand in the run's folder: of the last evaluation, of GLUE, of MTEB."""
    if run is None:
        return
    last: dict[str, Any] = next((one for one in reversed(metrics) if one.get("kind") == "eval"), {})
    rows = [
        (f"{name.removeprefix('eval_')}, held out", f"{value:.4g}")
        for name, value in last.items()
        if name.startswith("eval_") and not name.startswith("eval_num_")
    ]
    files = (run / "result.json", run / "mteb" / f"local__{run.resolve().name}-{step}.json")
    glue, mteb = (read_json(path) if path.is_file() else {} for path in files)
    found = [(f"GLUE {glue.get('task', '')}, score", glue.get("score"))]
    found += [(f"MTEB {one['name']}", one.get("score")) for one in mteb.get("tasks", [])]
    rows += [(name, f"{100 * score:.2f}") for name, score in found if isinstance(score, float)]
    if rows:
        yield markdown_table(["", ""], rows)


def configuration(config: dict[str, Any]) -> Iterator[str]:
    """The keys of the run that are not at their defaults, without what only concerns the machine; of paths the last part."""
    changed: dict[str, Any] = {}
    for dotted, value in changed_keys(config).items():
        if isinstance(value, dict) or dotted in OF_THE_MACHINE or dotted.startswith("wandb."):
            continue
        is_path = isinstance(value, str) and dotted.endswith(("path", "_dir"))
        put(changed, dotted, Path(value).name if is_path else value)
    if changed:
        yield "Keys that were not at their defaults:"
        yield f"```yaml\n{yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)}```"
