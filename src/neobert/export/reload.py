"""Run by `verify.py` in a process of its own: load an exported folder as a stranger would, and write what it computes.

    python -I reload.py FOLDER JOBS.json RESULT.safetensors

Nothing of this package may be imported here: what is loaded must need nothing but the folder and the libraries it is for.
Results are `<what>/<padded or alone>/<row>`: rows as they come, in batches with padding, and each alone.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Found = dict[str, np.ndarray]
Compute = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids and mask, B x T -> B x T x ... or B x ...


def outputs(what: str, output: str, compute: Compute, job: dict[str, Any], num_rows: int | None = None) -> Found:
    """The results of the job's first `num_rows` rows; logits of tokens at the job's picks, hidden states at all of a row."""
    rows, found = job["rows"][:num_rows], {}
    for how, size in (("alone", 1), ("padded", job["batch_size"])):
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            longest = max(map(len, batch))
            ids = np.array([row + [job["pad_id"]] * (longest - len(row)) for row in batch], dtype=np.int64)
            mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in batch], dtype=np.int64)
            for number, values in enumerate(compute(ids, mask), first):
                if values.ndim == 2:
                    values = values[job["picks"][number] if output == "logits" else slice(len(rows[number]))]
                found[f"{what}/{how}/{number}"] = np.ascontiguousarray(values, dtype=np.float32)
    return found


def run_transformers(folder: str, job: dict[str, Any]) -> Found:
    """The ids that AutoTokenizer gives, and what the Auto classes of the job's outputs compute, each in its type."""
    import torch
    import transformers

    def computed_by(name: str, output: str, dtype: str) -> Compute:
        model, loading = getattr(transformers, name).from_pretrained(
            folder, trust_remote_code=job["own_code"], output_loading_info=True, dtype=getattr(torch, dtype)
        )
        # Some encoders have a layer of their own after the first token, which is not compared.
        unused = "pooler." if name == "AutoModel" else ()
        missing = sorted(key for key in loading["missing_keys"] if not key.startswith(unused))
        if missing or loading["mismatched_keys"]:
            raise SystemExit(f"{name} did not find {missing} {sorted(loading['mismatched_keys'])}")
        model.eval()

        def compute(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            masked = {} if len(ids) == 1 else {"attention_mask": torch.from_numpy(mask)}
            return getattr(model(input_ids=torch.from_numpy(ids), **masked), output).float().numpy()

        return compute

    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"], trust_remote_code=job["own_code"])
    found = {f"ids/{n}": np.array(tokenizer(text)["input_ids"]) for n, text in enumerate(job["texts"])}
    with torch.no_grad():
        for what, name, output, dtype, num_rows in job["outputs"]:
            found |= outputs(what, output, computed_by(name, output, dtype), job, num_rows)
        if job["pairs"]:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
            firsts, seconds = map(list, zip(*job["pairs"], strict=True))
            padded = model(**tokenizer(firsts, seconds, padding=True, return_tensors="pt")).logits
            for n, pair in enumerate(job["pairs"]):
                found[f"pairs/padded/{n}"] = padded[n].numpy()
                found[f"pairs/alone/{n}"] = model(**tokenizer(*pair, return_tensors="pt")).logits[0].numpy()
    return found


def run_onnx(folder: str, job: dict[str, Any]) -> Found:
    """The graph's one output, by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(Path(folder) / job["onnx"]), providers=["CPUExecutionProvider"])

    def compute(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run([job["output"]], {"input_ids": ids, "attention_mask": mask})[0]

    return outputs(job["what"], job["output"], compute, job)


def run_sentence_transformers(folder: str, job: dict[str, Any]) -> Found:
    """Embeddings of the texts by `SentenceTransformer.encode`, alone and in batches."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, trust_remote_code=job["own_code"], device="cpu")
    found = {}
    for how, size in (("alone", 1), ("padded", job["batch_size"])):
        for row, vector in enumerate(model.encode(job["texts"], batch_size=size, show_progress_bar=False)):
            found[f"embedding/{how}/{row}"] = np.asarray(vector, dtype=np.float32)
    return found


RUN = {"transformers": run_transformers, "onnx": run_onnx, "sentence_transformers": run_sentence_transformers}


def main(folder: str, jobs_file: str, result_file: str) -> None:
    found: Found = {}
    for job in json.loads(Path(jobs_file).read_text()):
        found |= RUN[job["kind"]](folder, job)
    if "neobert" in sys.modules:
        raise SystemExit("the package neobert was imported: this process is not clean")
    save_file(found, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
