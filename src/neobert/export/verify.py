"""Is an exported folder the model that was trained? It is loaded in a clean process and compared on real text.

Rows are CLS, text, SEP of 1 to 512 tokens, each alone and in padded batches. What is compared: hidden states of every token,
logits of the head (of a masked language model those of 16 tokens a row, as they are V numbers each), token ids, embeddings.
A difference is the largest absolute one, divided by the largest output where that is above 1: float32 has 7 digits. In bfloat16
and float16 (8 and 11 bits) it is the root mean square of the differences on the first few rows, divided by that of the outputs.
float16 has less range than a model may have been trained with, so a difference there is reported and no reason to keep nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from neobert.checkpoints.load import Source
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import UserError
from neobert.inference.embed import load_embedder
from neobert.inference.sentence_transformers import Embedding
from neobert.training.runtime import Runtime

SCRIPT = Path(__file__).with_name("reload.py")
ONNX = "onnx/model.onnx"  # where sentence-transformers and optimum look
LENGTHS = (1, 2, 3, 7, 16, 31, 32, 33, 65, 128, 200, 256, 333, 511, 512)
BATCH_SIZE = 4
NUM_PICKS = 16
NUM_HALF = 5  # rows that are compared in half precision, which CPUs may emulate slowly
HALF = {"bfloat16": 1e-1, "float16": 2e-2}
TOLERANCE = {
    "hidden": 1e-5, "logits": 1e-5, "pairs": 1e-5, "embedding": 1e-5, "onnx hidden": 1e-4, "onnx logits": 1e-4,
    **{f"{what} {dtype}": tolerance for what in ("hidden", "logits") for dtype, tolerance in HALF.items()},
}  # fmt: skip
# Real text: the end of Lincoln's message to Congress of 1862 (public domain), and texts that tokenizers find hard.
MESSAGE = """
The plan is proposed as permanent constitutional law. It can not become such without the concurrence of, first,
two-thirds of Congress, and afterwards three-fourths of the States. The requisite three-fourths of the States will
necessarily include seven of the slave States. Their concurrence, if obtained, will give assurance of their severally
adopting emancipation at no very distant day upon the new constitutional terms. This assurance would end the struggle
now and save the Union forever. I do not forget the gravity which should characterize a paper addressed to the Congress
of the nation by the Chief Magistrate of the nation, nor do I forget that some of you are my seniors, nor that many of
you have more experience than I in the conduct of public affairs. Yet I trust that in view of the great responsibility
resting upon me you will perceive no want of respect to yourselves in any undue earnestness I may seem to display. Is it
doubted, then, that the plan I propose, if adopted, would shorten the war, and thus lessen its expenditure of money and
of blood? Is it doubted that it would restore the national authority and national prosperity and perpetuate both
indefinitely? Is it doubted that we here--Congress and Executive can secure its adoption? Will not the good people
respond to a united and earnest appeal from us? Can we, can they, by any other means so certainly or so speedily assure
these vital objects? We can succeed only by concert. It is not "Can any of us imagine better?" but "Can we all do
better?" Object whatsoever is possible, still the question recurs, "Can we do better?" The dogmas of the quiet past are
inadequate to the stormy present. The occasion is piled high with difficulty, and we must rise with the occasion. As our
case is new, so we must think anew and act anew. We must disenthrall ourselves, and then we shall save our country.
Fellow-citizens, we can not escape history. We of this Congress and this Administration will be remembered in spite of
ourselves. No personal significance or insignificance can spare one or another of us. The fiery trial through which we
pass will light us down in honor or dishonor to the latest generation. We say we are for the Union. The world will not
forget that we say this. We know how to save the Union. The world knows we do know how to save it. We, even we here,
hold the power and bear the responsibility. In giving freedom to the slave we assure freedom to the free--honorable
alike in what we give and what we preserve. We shall nobly save or meanly lose the last best hope of earth. Other means
may succeed; this could not fail. The way is plain, peaceful, generous, just--a way which if followed the world will
forever applaud and God must forever bless.
""".strip().replace("\n", " ")
HARD = (
    "",
    "a",
    "Naïve café - Ærøskøbing, 東京タワー, Привет! 😀\t[SEP] e\u0301",
    "x = {'a': 1}  # ünïcode\n\n\u00a0end",
)
PAIRS = [("peace", "war"), (MESSAGE[:60], MESSAGE[60:90])]

Outputs = list[np.ndarray]  # of every row, T x D, picked tokens x V, or one vector
Found = dict[str, np.ndarray]  # what the clean process computed
Sample = list[tuple[list[int], list[int]]]  # the token ids of a row, and at which of them its logits are compared


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

    def __str__(self) -> str:
        size = f"{self.num_rows} rows of {self.shortest} to {self.longest} tokens"
        return f"{self.what}: {size}, difference {self.difference:.1e} (allowed {self.tolerance:.0e})"


def build_sample(source: Source) -> Sample:
    """Real text as rows of many lengths, at most those that the model takes, in an order that mixes lengths."""
    facts = text_tokenizer(source.tokenizer)
    ids = facts.encode([MESSAGE])[0].tolist() or [facts.mask_id]
    ids = ids * (1 + LENGTHS[-1] // len(ids))
    lengths = sorted({min(length, source.positions) for length in LENGTHS}, key=lambda length: (length % 5, length))
    rows = [[facts.cls_id, *ids[: length - 2], facts.sep_id][:length] for length in lengths]
    return [(row, sorted({round(i) for i in np.linspace(0, len(row) - 1, NUM_PICKS)})) for row in rows]


@torch.no_grad()
def row_outputs(source: Source, sample: Sample) -> dict[str, Outputs]:
    """What the training model computes for each row alone: hidden states T x D, and the logits of its head, if it has one, of
    picked tokens x V, or of labels.
    """
    model, inputs = source.model, [torch.tensor([row]) for row, _ in sample]
    found = {"hidden": [model.model(input_ids=ids).last_hidden_state[0].numpy() for ids in inputs]}
    if source.has_head:
        logits = [model(input_ids=ids).logits[0].numpy() for ids in inputs]
        if not source.is_classifier:
            logits = [values[picks] for values, (_, picks) in zip(logits, sample, strict=True)]
        found["logits"] = logits
    return found


# --- how it compares -----------


@torch.no_grad()
def compare(
    source: Source, folder: Path, tokenizer: str | None = None, onnx: str = "", embedding: Embedding | None = None
) -> list[Check]:
    """Compare what a clean process loads from `folder` with the training model: transformers' Auto classes; the graph, where
    `onnx` names its output; where there is an `embedding`, sentence-transformers with `neobert embed`. `tokenizer` is its
    folder, if another one.

    Raises UserError when the folder does not load there, or gives other ids.
    """
    sample, texts = build_sample(source), [MESSAGE[:400], *HARD]
    computed, words, lengths = row_outputs(source, sample), MESSAGE.split(), [len(row) for row, _ in sample]
    head = "AutoModelForSequenceClassification" if source.is_classifier else "AutoModelForMaskedLM"
    loaders = {"hidden": ("AutoModel", "last_hidden_state"), "logits": (head, "logits")}
    outputs: list[tuple[str, str, str, str, int | None]] = [(w, *loaders[w], "float32", None) for w in computed]
    if folder != source.folder and not source.is_hf_encoder:  # written here
        outputs += [(f"{w} {dtype}", *loaders[w], dtype, NUM_HALF) for w in computed for dtype in HALF]
    if onnx:
        outputs.append(("onnx logits" if onnx == "logits" else "onnx hidden", ONNX, onnx, "float32", None))
    expected = {
        what: (computed["logits" if output == "logits" else "hidden"][:num_rows], lengths[:num_rows])
        for what, _, output, _, num_rows in outputs
    }
    pairs, sentences = PAIRS if source.is_hf_encoder and source.is_classifier else [], list[str]()
    if pairs:  # as the tokenizer joins them, with the segments that it numbers
        inputs = [source.tokenizer(*pair, return_tensors="pt") for pair in pairs]
        values = [source.model(**one).logits[0].numpy() for one in inputs]
        expected["pairs"] = values, [one["input_ids"].shape[1] for one in inputs]
    if embedding is not None:
        sentences = [" ".join(words[:count]) for count in (1, 2, 5, 9, 20, 50, 100, 200, 400)] + [MESSAGE, *HARD]
        longest, runtime = embedding.max_length, Runtime(device=torch.device("cpu"))
        embedder = load_embedder(str(source.folder), embedding.pooling, longest, runtime=runtime)
        num_tokens = [min(longest, len(ids)) for ids in source.tokenizer(sentences)["input_ids"]]
        expected["embedding"] = list(embedder.encode(sentences, embedding.normalize)), num_tokens
    job = {
        "own_code": not source.is_native, "outputs": outputs, "sample": sample,
        "pad_id": source.model.config.pad_token_id or 0, "batch_size": BATCH_SIZE, "texts": texts,
        "tokenizer": str(Path(tokenizer or folder).resolve()), "pairs": pairs, "sentences": sentences,
    }  # fmt: skip
    found = run_clean(folder, job)
    for number, text in enumerate(texts):
        if found[f"ids/{number}"].tolist() != source.tokenizer(text)["input_ids"]:
            raise UserError(f"{folder}: the tokenizer, loaded again, gives other ids for {text[:40]!r}")
    return [check(found, what, *values) for what, values in expected.items()]


def run_clean(folder: Path, job: dict[str, Any]) -> Found:
    """The results of `reload.py` in a new process, without our package, offline. Raises UserError with its last line."""
    with tempfile.TemporaryDirectory() as scratch:
        result, job_file = Path(scratch) / "result.safetensors", Path(scratch) / "job.json"
        job_file.write_text(json.dumps(job))
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules", "CUDA_VISIBLE_DEVICES": "",
            "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", str(SCRIPT), str(folder.resolve()), str(job_file), str(result)],
            capture_output=True, text=True, cwd=scratch, env=environment, check=False,
        )  # fmt: skip
        if done.returncode or not result.is_file():
            lines = done.stderr.strip().splitlines() or ["nothing was said"]
            raise UserError(f"{folder}: a new process cannot load it: {lines[-1]}")
        return load_file(result)


def check(found: Found, what: str, expected: Outputs, lengths: list[int]) -> Check:
    """The results named `<what>/...` against what they should be; `lengths` are the rows' in tokens.

    In half precision the difference is the root mean square of the differences over that of the outputs.
    """
    pairs = [(found[f"{what}/{how}/{n}"], wanted) for how in ("alone", "padded") for n, wanted in enumerate(expected)]
    for got, wanted in pairs:
        if got.shape != wanted.shape:
            raise UserError(f"{what}: loaded again it has shape {got.shape}, the training model {wanted.shape}")
    differences = np.concatenate([(got - wanted).ravel() for got, wanted in pairs]).astype(np.float64)
    outputs = np.concatenate([wanted.ravel() for wanted in expected]).astype(np.float64)
    absolute, largest = float(np.nan_to_num(np.abs(differences), nan=np.inf).max()), float(np.abs(outputs).max())
    difference = absolute / max(1.0, largest)
    if what.endswith(tuple(HALF)):
        scale = max(np.square(outputs).mean(), 1e-24)
        difference = float(np.nan_to_num(np.sqrt(np.square(differences).mean() / scale), nan=np.inf))
    return Check(what, len(expected), min(lengths), max(lengths), difference, absolute, largest, TOLERANCE[what])


def judged(checks: list[Check], tolerance: float | None, result: str, log: Callable[[str], None]) -> list[Check]:
    """The checks with another tolerance, where one is given, but for half precision; `log` gets a line for each.

    Raises UserError, naming `result`, for the first difference that is too large.
    """
    checks = [one if tolerance is None or one.is_half else replace(one, tolerance=tolerance) for one in checks]
    for one in checks:
        log(f"verified    {one}" if one.is_met else f"DIFFERS     {one}")
    for one in checks:
        if not one.is_met and not one.what.endswith(" float16"):
            raise UserError(f"{result} computes something else, so it is not kept: {one}")
    return checks
