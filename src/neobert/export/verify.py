"""Is an exported folder the model that was trained? It is loaded in a clean process and compared on real text.

Rows are CLS, text, SEP of 1 to 512 tokens, each alone and in padded batches. What is compared: hidden states of every token,
logits of the head (of a masked language model those of 16 tokens a row, as they are V numbers each), token ids, embeddings.
A difference is the largest absolute one, divided by the largest output where that is above 1: float32 has 7 digits.

Loaded in bfloat16 and float16 (8 and 11 bits) the folder is compared on the first few rows, by the root mean square of the
differences, divided by that of the outputs. float16 has less range than a model may have been trained with,
so a difference there is reported and kept with the result, and is no reason to keep nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from neobert.checkpoints.load import HFEncoderModel, Model
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import UserError
from neobert.export.source import Source
from neobert.inference.embed import Embedder
from neobert.inference.sentence_transformers import Embedding, SentenceSettings
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding

SCRIPT = Path(__file__).with_name("reload.py")
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
MESSAGE = (
    "The plan is proposed as permanent constitutional law. It can not become such without the concurrence of, first, "
    "two-thirds of Congress, and afterwards three-fourths of the States. The requisite three-fourths of the States will "
    "necessarily include seven of the slave States. Their concurrence, if obtained, will give assurance of their "
    "severally adopting emancipation at no very distant day upon the new constitutional terms. This assurance would end "
    "the struggle now and save the Union forever. I do not forget the gravity which should characterize a paper "
    "addressed to the Congress of the nation by the Chief Magistrate of the nation, nor do I forget that some of you "
    "are my seniors, nor that many of you have more experience than I in the conduct of public affairs. Yet I trust "
    "that in view of the great responsibility resting upon me you will perceive no want of respect to yourselves in any "
    "undue earnestness I may seem to display. Is it doubted, then, that the plan I propose, if adopted, would shorten "
    "the war, and thus lessen its expenditure of money and of blood? Is it doubted that it would restore the national "
    "authority and national prosperity and perpetuate both indefinitely? Is it doubted that we here--Congress and "
    "Executive can secure its adoption? Will not the good people respond to a united and earnest appeal from us? Can "
    "we, can they, by any other means so certainly or so speedily assure these vital objects? We can succeed only by "
    'concert. It is not "Can any of us imagine better?" but "Can we all do better?" Object whatsoever is possible, '
    'still the question recurs, "Can we do better?" The dogmas of the quiet past are inadequate to the stormy present. '
    "The occasion is piled high with difficulty, and we must rise with the occasion. As our case is new, so we must "
    "think anew and act anew. We must disenthrall ourselves, and then we shall save our country. Fellow-citizens, we "
    "can not escape history. We of this Congress and this Administration will be remembered in spite of ourselves. No "
    "personal significance or insignificance can spare one or another of us. The fiery trial through which we pass will "
    "light us down in honor or dishonor to the latest generation. We say we are for the Union. The world will not "
    "forget that we say this. We know how to save the Union. The world knows we do know how to save it. We, even we "
    "here, hold the power and bear the responsibility. In giving freedom to the slave we assure freedom to the "
    "free--honorable alike in what we give and what we preserve. We shall nobly save or meanly lose the last best hope "
    "of earth. Other means may succeed; this could not fail. The way is plain, peaceful, generous, just--a way which if "
    "followed the world will forever applaud and God must forever bless."
)
HARD = (
    "",
    "a",
    "Naïve café - Ærøskøbing, 東京タワー, Привет! 😀\t[SEP] e\u0301",
    "x = {'a': 1}  # ünïcode\n\n\u00a0end",
)
PAIRS = [("peace", "war"), (MESSAGE[:60], MESSAGE[60:90])]

Outputs = list[np.ndarray]  # of every row, T x D, picked tokens x V, or one vector
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


# --- what is compared -----------


@dataclass(frozen=True)
class Comparison:
    """Something that a clean process computes (`job`, read by `reload.py`), and what the training model computes: by name, the
    outputs of rows and their lengths in tokens. `ids` are those of the job's texts.
    """

    job: dict[str, Any]
    expected: dict[str, tuple[Outputs, list[int]]]
    ids: list[list[int]] = field(default_factory=list)


@torch.no_grad()
def by_transformers(
    source: Source, folder: Path, sample: Sample, tokenizer: Path | None = None, has_head: bool = True
) -> Comparison:
    """The Auto classes against the training model; `tokenizer` is its folder, where it is another one."""
    texts = [MESSAGE[:400], *HARD]
    computed = {"hidden": ("AutoModel", "last_hidden_state", hidden_states(source.model, sample.rows))}
    if has_head:
        auto_class = "AutoModelForSequenceClassification" if source.is_classifier else "AutoModelForMaskedLM"
        computed["logits"] = (auto_class, "logits", logits(source, sample))
    outputs: list[tuple[str, str, str, str, int | None]] = [
        (w, *one[:2], "float32", None) for w, one in computed.items()
    ]
    if folder != source.folder and not source.is_hf_encoder:  # written here
        outputs += [(f"{w} {dtype}", *one[:2], dtype, NUM_HALF) for w, one in computed.items() for dtype in HALF]
    expected = {
        what: (computed[what.split()[0]][2][:num_rows], sample.lengths[:num_rows]) for what, *_, num_rows in outputs
    }
    pairs = PAIRS if source.is_hf_encoder and source.is_classifier else []
    if pairs:  # as the tokenizer joins them, with the segments that it numbers
        inputs = [source.tokenizer(*pair, return_tensors="pt") for pair in pairs]
        values = [source.model(**one).logits[0].numpy() for one in inputs]
        expected["pairs"] = (values, [one["input_ids"].shape[1] for one in inputs])
    job = {
        "kind": "transformers", "own_code": not source.is_native, "outputs": outputs, "pairs": pairs,
        "texts": texts, "tokenizer": str((tokenizer or folder).resolve()), **_of_rows(source, sample),
    }  # fmt: skip
    return Comparison(job, expected, [source.tokenizer(text)["input_ids"] for text in texts])


def by_onnx(source: Source, path: str, output: str, sample: Sample) -> Comparison:
    """onnxruntime against the training model."""
    is_hidden = output == "last_hidden_state"
    what = "onnx hidden" if is_hidden else "onnx logits"
    values = hidden_states(source.model, sample.rows) if is_hidden else logits(source, sample)
    job = {"kind": "onnx", "onnx": path, "what": what, "output": output, **_of_rows(source, sample)}
    return Comparison(job, {what: (values, sample.lengths)})


def by_sentence_transformers(source: Source, embedding: Embedding) -> Comparison:
    """`SentenceTransformer.encode` against what `neobert embed` computes with the training model."""
    words = MESSAGE.split()
    texts = [" ".join(words[:count]) for count in (1, 2, 5, 9, 20, 50, 100, 200, 400)] + [MESSAGE, *HARD]
    how = ContrastiveSettings(pooling=embedding.pooling or "mean")
    if source.is_hf_encoder:
        model = HFEncoderForEmbedding(source.model.model, how, source.tokenizer.pad_token_id)
    else:
        with torch.no_grad():
            model = NeoBERTForEmbedding(source.model.config, how)
        model.model = source.model.model
    embedder = Embedder(
        model.eval(), source.tokenizer, embedding.max_length, SentenceSettings(source.folder, source.folder)
    )
    lengths = [min(embedding.max_length, len(ids)) for ids in source.tokenizer(texts)["input_ids"]]
    job = {"kind": "sentence_transformers", "own_code": not source.is_native, "texts": texts, "batch_size": BATCH_SIZE}
    return Comparison(job, {"embedding": (list(embedder.encode(texts, embedding.normalize)), lengths)})


def _of_rows(source: Source, sample: Sample) -> dict[str, Any]:
    pad = source.model.config.pad_token_id or 0
    return {"rows": sample.rows, "picks": sample.picks, "pad_id": pad, "batch_size": BATCH_SIZE}


@torch.no_grad()
def hidden_states(model: Model | HFEncoderModel, rows: list[list[int]]) -> Outputs:
    """What the training model computes for each row alone: T x D."""
    return [model.model(input_ids=torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]


@torch.no_grad()
def logits(source: Source, sample: Sample) -> Outputs:
    """What the training model's head computes: picked tokens x V, or one row of labels."""
    computed = [source.model(input_ids=torch.tensor([row])).logits[0].numpy() for row in sample.rows]
    if source.is_classifier:
        return computed
    return [one[picks] for one, picks in zip(computed, sample.picks, strict=True)]


# --- how it compares -----------


def compare(folder: Path, comparisons: list[Comparison]) -> list[Check]:
    """Make all comparisons in one clean process. Raises UserError when the folder does not load there, or gives other ids."""
    found = run_clean(folder, [one.job for one in comparisons])
    checks = []
    for one in comparisons:
        for number, ids in enumerate(one.ids):
            if found[f"ids/{number}"].tolist() != ids:
                text = one.job["texts"][number][:40]
                raise UserError(f"{folder}: the tokenizer, loaded again, gives other ids for {text!r}")
        checks += [check(found, what, *expected) for what, expected in one.expected.items()]
    return checks


def run_clean(folder: Path, jobs: list[dict[str, Any]]) -> Found:
    """The results of `reload.py` in a new process, without our package, offline. Raises UserError with its last line."""
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
    one = Check(what, len(expected), min(lengths), max(lengths), 0.0, absolute, largest, TOLERANCE[what])
    if not one.is_half:
        return replace(one, difference=absolute / max(1.0, largest))
    scale = max(np.square(outputs).mean(), 1e-24)
    relative = np.sqrt(np.square(differences).mean() / scale)
    return replace(one, difference=float(np.nan_to_num(relative, nan=np.inf)))


def judged(checks: list[Check], tolerance: float | None, result: str, log: Callable[[str], None]) -> list[Check]:
    """The checks with another tolerance, where one is given, but for half precision; `log` gets a line for each.

    Raises UserError, naming `result`, for the first difference that is too large.
    """
    checks = [one if tolerance is None or one.is_half else replace(one, tolerance=tolerance) for one in checks]
    for one in checks:
        log(f"verified    {one}" if one.is_met else f"DIFFERS     {one}")
    for one in checks:
        if not one.is_met and one.must_hold:
            raise UserError(f"{result} computes something else, so it is not kept: {one}")
    return checks
