"""Is an exported folder the model that was trained? It is loaded in a clean process and compared on real text.

Rows are CLS, text, SEP of 1 to 512 tokens, each alone and in padded batches. What is compared: hidden states of every token,
logits of the head (of a masked language model those of 16 tokens a row, as they are V numbers each), token ids, embeddings.
A difference is the largest absolute one, divided by the largest output where that is above 1: float32 has 7 digits.

Loaded in bfloat16 and float16 (8 and 11 bits) the folder is compared on the first few rows, by the root mean square of the
differences, divided by that of the outputs. float16 has less range than a model may have been trained with,
so a difference there is told and kept with the result, and is no reason to keep nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from neobert.checkpoints.load import Model
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import UserError
from neobert.export.sample import HARD, MESSAGE
from neobert.export.source import Source
from neobert.inference.embed import Embedder
from neobert.inference.sentence_transformers import Embedding, SentenceSettings
from neobert.model.embedding import ContrastiveSettings, HFEncoderForEmbedding, NeoBERTForEmbedding

SCRIPT = Path(__file__).with_name("reload.py")
LENGTHS = (1, 2, 3, 7, 16, 31, 32, 33, 65, 128, 200, 256, 333, 511, 512)
BATCH_SIZE = 4
NUM_PICKS = 16
NUM_HALF = 5  # rows that are compared in half precision, which CPUs may emulate slowly
HALF = {"bfloat16": 1e-1, "float16": 2e-2}
PAIRS = [("peace", "war"), (MESSAGE[:60], MESSAGE[60:90])]
TOLERANCE = {
    "hidden": 1e-5, "logits": 1e-5, "pairs": 1e-5, "embedding": 1e-5, "onnx hidden": 1e-4, "onnx logits": 1e-4,
    **{f"{what} {dtype}": tolerance for what in ("hidden", "logits") for dtype, tolerance in HALF.items()},
}  # fmt: skip


Found = dict[str, np.ndarray]  # what the clean process computed


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, over how many rows, the difference, and what is allowed."""

    what: str
    num_rows: int
    shortest: int
    longest: int
    difference: float
    absolute: float
    largest_output: float
    tolerance: float

    @property
    def is_met(self) -> bool:
        return self.difference <= self.tolerance

    @property
    def is_half(self) -> bool:
        return self.what.endswith(tuple(HALF))

    @property
    def must_hold(self) -> bool:
        """Whether nothing is kept where the difference is too large."""
        return not self.what.endswith(" float16")

    def __str__(self) -> str:
        size = f"{self.num_rows} rows of {self.shortest} to {self.longest} tokens"
        return f"{self.what}: {size}, difference {self.difference:.1e} (allowed {self.tolerance:.0e})"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """Rows of token ids, in an order that mixes lengths, and the tokens of each whose logits are compared."""

    rows: list[list[int]]
    picks: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]


def build_sample(tokenizer: Any, longest: int) -> Sample:
    """Real text as rows of many lengths, at most `longest` tokens."""
    facts = text_tokenizer(tokenizer)
    ids = facts.encode([MESSAGE])[0].tolist() or [facts.mask_id]
    ids = ids * (1 + LENGTHS[-1] // len(ids))
    lengths = sorted({min(length, longest) for length in LENGTHS}, key=lambda length: (length % 5, length))
    rows = [[facts.cls_id, *ids[: length - 2], facts.sep_id][:length] for length in lengths]
    picks = [sorted({round(i) for i in np.linspace(0, len(row) - 1, NUM_PICKS)}) for row in rows]
    return Sample(rows, picks)


@dataclass(frozen=True)
class Comparison:
    """Something to compute in a clean process (`job`, read by `reload.py`), and what to make of it."""

    job: dict[str, Any]
    judge: Callable[[Found], list[Check]]


def compare(folder: Path, comparisons: list[Comparison]) -> list[Check]:
    """All comparisons, in one clean process. Raises UserError when the folder does not load there."""
    found = run_clean(folder, [one.job for one in comparisons])
    return [made for one in comparisons for made in one.judge(found)]


def by_transformers(
    source: Source, folder: Path, sample: Sample, tokenizer: Path | None = None, has_head: bool = True
) -> Comparison:
    """The Auto classes against the training model; `tokenizer` is its folder, where it is another one.

    Judging raises UserError when text becomes other ids.
    """
    texts = [MESSAGE[:400], *HARD]
    expected_ids = [source.tokenizer(text)["input_ids"] for text in texts]
    auto_class = "AutoModelForSequenceClassification" if source.is_classifier else "AutoModelForMaskedLM"
    job = {
        "kind": "transformers", "own_code": not source.is_native, "auto_class": auto_class if has_head else None,
        "texts": texts, "tokenizer": str((tokenizer or folder).resolve()), "num_half": NUM_HALF,
        "half": [] if source.is_hf_encoder or folder == source.folder else list(HALF),  # of what was written here
        "pairs": PAIRS if source.is_hf_encoder and source.is_classifier else [],
    }  # fmt: skip

    def judge(found: Found) -> list[Check]:
        for number, (text, expected) in enumerate(zip(texts, expected_ids, strict=True)):
            if found[f"ids/{number}"].tolist() != expected:
                raise UserError(f"{folder}: the tokenizer, loaded again, gives other ids for {text[:40]!r}")
        outputs = {"hidden": hidden_states(source.model, sample.rows)}
        if has_head:
            outputs["logits"] = logits(source, sample)
        checks = [check(found, what, expected, sample.lengths) for what, expected in outputs.items()]
        for what, expected in outputs.items():
            checks += [
                check_half(found, f"{what} {dtype}", expected[:NUM_HALF], sample.lengths) for dtype in job["half"]
            ]
        if job["pairs"]:  # with the segments that the tokenizer numbers
            lengths = [len(source.tokenizer(*pair)["input_ids"]) for pair in PAIRS]
            checks.append(check(found, "pairs", pair_logits(source), lengths))
        return checks

    return Comparison(job | _of_rows(source, sample), judge)


def by_onnx(source: Source, path: str, output: str, sample: Sample) -> Comparison:
    """onnxruntime against the training model."""

    def judge(found: Found) -> list[Check]:
        if output == "last_hidden_state":
            return [check(found, "onnx hidden", hidden_states(source.model, sample.rows), sample.lengths)]
        return [check(found, "onnx logits", logits(source, sample), sample.lengths)]

    return Comparison({"kind": "onnx", "onnx": path} | _of_rows(source, sample), judge)


def by_sentence_transformers(source: Source, embedding: Embedding) -> Comparison:
    """`SentenceTransformer.encode` against what `neobert embed` computes with the training model."""
    words = MESSAGE.split()
    texts = [" ".join(words[:count]) for count in (1, 2, 5, 9, 20, 50, 100, 200, 400)] + [MESSAGE, *HARD]

    def judge(found: Found) -> list[Check]:
        how = ContrastiveSettings(pooling=embedding.pooling or "mean")
        if source.is_hf_encoder:
            model = HFEncoderForEmbedding(source.model.model, how, source.tokenizer.pad_token_id)
        else:
            with torch.no_grad():
                model = NeoBERTForEmbedding(source.model.config, how)
            model.model = source.model.model
        settings = SentenceSettings(source.folder, source.folder)
        embedder = Embedder(model.eval(), source.tokenizer, embedding.max_length, settings)
        lengths = [min(embedding.max_length, len(ids)) for ids in source.tokenizer(texts)["input_ids"]]
        return [check(found, "embedding", list(embedder.encode(texts, embedding.normalize)), lengths)]

    job = {"kind": "sentence_transformers", "own_code": not source.is_native, "texts": texts, "batch_size": BATCH_SIZE}
    return Comparison(job, judge)


def check(found: Found, what: str, expected: list[np.ndarray], lengths: list[int]) -> Check:
    """The results named `<what>/...` against what they should be, row by row; `lengths` are the rows' in tokens."""
    worst = 0.0
    for number, wanted in enumerate(expected):
        for how in ("alone", "padded"):
            got = found[f"{what}/{how}/{number}"]
            if got.shape != wanted.shape:
                raise UserError(f"{what}: loaded again it has shape {got.shape}, the training model {wanted.shape}")
            worst = max(worst, float(np.nan_to_num(np.abs(got - wanted), nan=np.inf).max()))
    largest = max(float(np.abs(wanted).max()) for wanted in expected)
    return Check(
        what, len(expected), min(lengths), max(lengths), worst / max(1.0, largest), worst, largest, TOLERANCE[what]
    )


def check_half(found: Found, what: str, expected: list[np.ndarray], lengths: list[int]) -> Check:
    """As `check`, in half precision: root mean square of the differences over that of the outputs."""
    pairs = [(found[f"{what}/{how}/{n}"], wanted) for how in ("alone", "padded") for n, wanted in enumerate(expected)]
    differences = np.concatenate([(got - wanted).ravel() for got, wanted in pairs]).astype(np.float64)
    outputs = np.concatenate([wanted.ravel() for wanted in expected]).astype(np.float64)
    scale = max(np.square(outputs).mean(), 1e-24)
    relative = float(np.nan_to_num(np.sqrt(np.square(differences).mean() / scale), nan=np.inf))
    absolute, largest = float(np.nan_to_num(np.abs(differences), nan=np.inf).max()), float(np.abs(outputs).max())
    lengths = lengths[: len(expected)]
    return Check(what, len(expected), min(lengths), max(lengths), relative, absolute, largest, TOLERANCE[what])


def judged(checks: list[Check], tolerance: float | None, say: Callable[[str], None]) -> list[Check]:
    """The checks with another tolerance, where one is given, but for half precision; says what each came to."""
    checks = [one if tolerance is None or one.is_half else replace(one, tolerance=tolerance) for one in checks]
    for check in checks:
        say(f"verified    {check}" if check.is_met else f"DIFFERS     {check}")
    return checks


@torch.no_grad()
def hidden_states(model: Model, rows: list[list[int]]) -> list[np.ndarray]:
    """What the training model computes for each row alone: T x D."""
    return [model.model(input_ids=torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]


@torch.no_grad()
def logits(source: Source, sample: Sample) -> list[np.ndarray]:
    """What the training model's head computes: picked tokens x V, or one row of labels."""
    computed = [source.model(input_ids=torch.tensor([row])).logits[0] for row in sample.rows]
    if source.is_classifier:
        return [one.numpy() for one in computed]
    return [one[picks].numpy() for one, picks in zip(computed, sample.picks, strict=True)]


@torch.no_grad()
def pair_logits(source: Source) -> list[np.ndarray]:
    """What a classifier says of `PAIRS`, as its tokenizer joins them."""
    return [source.model(**source.tokenizer(*pair, return_tensors="pt")).logits[0].numpy() for pair in PAIRS]


def _of_rows(source: Source, sample: Sample) -> dict[str, Any]:
    pad = source.model.config.pad_token_id or 0
    return {"rows": sample.rows, "picks": sample.picks, "pad_id": pad, "batch_size": BATCH_SIZE}


def run_clean(folder: Path, jobs: list[dict[str, Any]]) -> Found:
    """The results of `reload.py` in a new process, without our package, offline. Raises UserError with what it said."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.safetensors"
        (Path(scratch) / "jobs.json").write_text(json.dumps(jobs))
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules", "CUDA_VISIBLE_DEVICES": "",
            "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", str(SCRIPT), str(folder.resolve()), f"{scratch}/jobs.json", str(result)],
            capture_output=True, text=True, cwd=scratch, env=environment, check=False,
        )  # fmt: skip
        if done.returncode or not result.is_file():
            said = done.stderr.strip().splitlines() or ["nothing was said"]
            raise UserError(f"{folder}: a new process cannot load it: {said[-1]}")
        return load_file(result)
