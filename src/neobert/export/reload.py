"""Run by `verify.py` in a process of its own: load an exported folder as a stranger would, and write what it computes.

    python -I reload.py FOLDER JOB.json RESULT.safetensors

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


def outputs_of_rows(job: dict[str, Any], what: str, output: str, compute: Compute, num_rows: int | None) -> Found:
    """The results of the first `num_rows` rows of the sample: logits of the picked tokens, hidden states of all."""
    sample, found = job["sample"][:num_rows], {}
    for how, size in (("alone", 1), ("padded", job["batch_size"])):
        for first in range(0, len(sample), size):
            batch = [row for row, _ in sample[first : first + size]]
            longest = max(map(len, batch))
            ids = np.array([row + [job["pad_id"]] * (longest - len(row)) for row in batch], dtype=np.int64)
            mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in batch], dtype=np.int64)
            for number, values in enumerate(compute(ids, mask), first):
                if values.ndim == 2:
                    row, picks = sample[number]
                    values = values[picks if output == "logits" else slice(len(row))]
                found[f"{what}/{how}/{number}"] = np.ascontiguousarray(values, dtype=np.float32)
    return found


def by_auto_class(folder: str, name: str, output: str, dtype: str, own_code: bool) -> Compute:
    """What one of transformers' Auto classes computes."""
    import torch
    import transformers

    model, loading = getattr(transformers, name).from_pretrained(
        folder, trust_remote_code=own_code, output_loading_info=True, dtype=getattr(torch, dtype)
    )
    # Some encoders have a layer of their own after the first token, which is not compared.
    unused = "pooler." if name == "AutoModel" else ()
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith(unused))
    if missing or loading["mismatched_keys"]:
        raise SystemExit(f"{name} did not find {missing} {sorted(loading['mismatched_keys'])}")
    model.eval()

    @torch.no_grad()
    def compute(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        masked = {} if len(ids) == 1 else {"attention_mask": torch.from_numpy(mask)}
        return getattr(model(input_ids=torch.from_numpy(ids), **masked), output).float().numpy()

    return compute


def by_graph(path: str, output: str) -> Compute:
    """What onnxruntime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def compute(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run([output], {"input_ids": ids, "attention_mask": mask})[0]

    return compute


def of_texts(folder: str, job: dict[str, Any]) -> Found:
    """The ids that AutoTokenizer gives, and the logits of pairs of texts as it joins them."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"], trust_remote_code=job["own_code"])
    found = {f"ids/{n}": np.array(tokenizer(text)["input_ids"]) for n, text in enumerate(job["texts"])}
    if job["pairs"]:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        firsts, seconds = map(list, zip(*job["pairs"], strict=True))
        with torch.no_grad():
            padded = model(**tokenizer(firsts, seconds, padding=True, return_tensors="pt")).logits
            alone = [model(**tokenizer(*pair, return_tensors="pt")).logits[0] for pair in job["pairs"]]
        for how, rows in (("padded", padded), ("alone", alone)):
            found |= {f"pairs/{how}/{n}": values.numpy() for n, values in enumerate(rows)}
    return found


def embeddings(folder: str, job: dict[str, Any]) -> Found:
    """Vectors of the job's sentences by `SentenceTransformer.encode`, alone and in batches."""
    from sentence_transformers import SentenceTransformer

    model, found = SentenceTransformer(folder, trust_remote_code=job["own_code"], device="cpu"), {}
    for how, size in (("alone", 1), ("padded", job["batch_size"])):
        for row, vector in enumerate(model.encode(job["sentences"], batch_size=size, show_progress_bar=False)):
            found[f"embedding/{how}/{row}"] = np.asarray(vector, dtype=np.float32)
    return found


def main(folder: str, job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    found = of_texts(folder, job)
    for what, name, output, dtype, num_rows in job["outputs"]:
        if name.endswith(".onnx"):
            compute = by_graph(str(Path(folder) / name), output)
        else:
            compute = by_auto_class(folder, name, output, dtype, job["own_code"])
        found |= outputs_of_rows(job, what, output, compute, num_rows)
    if job["sentences"]:
        found |= embeddings(folder, job)
    if "neobert" in sys.modules:
        raise SystemExit("the package neobert was imported: this process is not clean")
    save_file(found, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
