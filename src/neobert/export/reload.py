"""Run by `verify.py` in a process of its own: load an exported folder as a stranger would, and write what it computes.

    python -I reload.py FOLDER JOBS.json RESULT.safetensors

Nothing of this package may be imported here: what is loaded must need nothing but the folder and the libraries it is for.
Results are `<what>/<padded or alone>/<row>`: rows as they come, in batches with padding, and each alone.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Rows = list[list[int]]
Compute = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids and mask, B x T -> B x T x ... or B x ...


def batches(rows: Rows, size: int, pad: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the first row, ids, mask) of `size` rows at a time, padded to the longest of them."""
    for begin in range(0, len(rows), size):
        some = rows[begin : begin + size]
        longest = max(map(len, some))
        ids = np.array([row + [pad] * (longest - len(row)) for row in some], dtype=np.int64)
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in some], dtype=np.int64)
        yield begin, ids, mask


def outputs(what: str, compute: Compute, job: dict[str, Any], picks: list[list[int]] | None) -> dict[str, np.ndarray]:
    """The results of all rows; of an output per token those at `picks`, or all of the row's own."""
    found: dict[str, np.ndarray] = {}
    for how, size in (("alone", 1), ("padded", job["batch_size"])):
        for begin, ids, mask in batches(job["rows"], size, job["pad_id"]):
            for i, values in enumerate(compute(ids, mask)):
                row = begin + i
                if values.ndim == 2:
                    values = values[: len(job["rows"][row])] if picks is None else values[picks[row]]
                found[f"{what}/{how}/{row}"] = np.ascontiguousarray(values, dtype=np.float32)
    return found


def run_transformers(folder: str, job: dict[str, Any]) -> dict[str, np.ndarray]:
    """Hidden states by AutoModel, logits by the head's Auto class, ids by AutoTokenizer; the first two in half types too."""
    import torch
    import transformers

    def computed_by(name: str, output: str, dtype: str = "float32") -> Compute:
        kind = getattr(transformers, name)
        model, found = kind.from_pretrained(
            folder, trust_remote_code=job["own_code"], output_loading_info=True, dtype=getattr(torch, dtype)
        )
        unpooled = (
            name == "AutoModel"
        )  # some encoders have a layer of their own behind the first token, which is not compared
        missing = sorted(key for key in found["missing_keys"] if not (unpooled and key.startswith("pooler.")))
        if missing or found["mismatched_keys"]:
            raise SystemExit(f"{name} did not find {missing} {sorted(found['mismatched_keys'])}")

        @torch.no_grad()
        def compute(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            alone = {} if len(ids) == 1 else {"attention_mask": torch.from_numpy(mask)}
            return getattr(model(input_ids=torch.from_numpy(ids), **alone), output).float().numpy()

        model.eval()
        return compute

    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"], trust_remote_code=job["own_code"])
    found = {f"ids/{n}": np.array(tokenizer(text)["input_ids"]) for n, text in enumerate(job["texts"])}
    short = job | {"rows": job["rows"][: job["num_half"]]}
    wanted = [("hidden", "AutoModel", "last_hidden_state", None)]
    if job["auto_class"] is not None:
        wanted.append(("logits", job["auto_class"], "logits", job["picks"]))
    for what, name, output, picks in wanted:
        found |= outputs(what, computed_by(name, output), job, picks)
        for dtype in job["half"]:
            found |= outputs(f"{what} {dtype}", computed_by(name, output, dtype), short, picks)
    if job["pairs"]:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        firsts, seconds = zip(*job["pairs"], strict=True)
        with torch.no_grad():
            padded = model(**tokenizer(list(firsts), list(seconds), padding=True, return_tensors="pt")).logits
            for n, pair in enumerate(job["pairs"]):
                found[f"pairs/padded/{n}"] = padded[n].numpy()
                found[f"pairs/alone/{n}"] = model(**tokenizer(*pair, return_tensors="pt")).logits[0].numpy()
    return found


def run_onnx(folder: str, job: dict[str, Any]) -> dict[str, np.ndarray]:
    """The graph's one output, by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(Path(folder) / job["onnx"]), providers=["CPUExecutionProvider"])
    name = session.get_outputs()[0].name

    def compute(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run([name], {"input_ids": ids, "attention_mask": mask})[0]

    if name == "last_hidden_state":
        return outputs("onnx hidden", compute, job, None)
    return outputs("onnx logits", compute, job, job["picks"])


def run_sentence_transformers(folder: str, job: dict[str, Any]) -> dict[str, np.ndarray]:
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
    found: dict[str, np.ndarray] = {}
    for job in json.loads(Path(jobs_file).read_text()):
        found |= RUN[job["kind"]](folder, job)
    if "neobert" in sys.modules:
        raise SystemExit("the package neobert was imported: this process is not clean")
    save_file(found, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
