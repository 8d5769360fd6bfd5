"""Embedding texts: ours against `SentenceTransformer.encode`, on the same weights and real texts of mixed length, in float32.

The peer is the same encoder, read from our checkpoint as EuroBERT, with mean pooling; it too sorts texts by length. Both
tokenise. Titles are mixed with paragraphs, at most 256 tokens each. `--peer-batch` is its batch size (default: its own, 32).

Weights are those of `--weights`, a run's folder; without it a small encoder is trained for seconds first.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import QUICKSTART, ROOT, alternate, arguments, bar, finish, neobert, run, table
from contrastive_vs_st import load_peer

OPTIONS = {
    "weights": {"default": None}, "data": {"default": str(ROOT.parent / "shared/data/pairs/packages.jsonl")},
    "texts": {"type": int, "default": 4000}, "peer-batch": {"type": int, "default": 32},
}  # fmt: skip
LENGTH = 256


def main() -> None:
    args = arguments(__doc__, **OPTIONS)
    if not Path(args.data).is_file():
        print(f"no texts at {args.data}: name a .jsonl with anchor and positive with --data")
        return
    args.texts = min(args.texts, 1000) if args.quick else args.texts
    with tempfile.TemporaryDirectory() as folder:
        if args.weights is None:
            run(neobert("pretrain", QUICKSTART, f"trainer.output_dir={folder}", "trainer.max_steps=20"))
            args.weights = folder
        compare(args)
    finish()


def compare(args) -> None:
    """The table, and the bars."""
    from neobert.inference.embed import load_embedder

    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()[: args.texts // 2]]
    texts = [text for row in rows for text in (row["anchor"], row["positive"])]
    ours, peer = load_embedder(args.weights, max_length=LENGTH), load_peer(args.weights, LENGTH)
    found: dict[str, np.ndarray] = {}

    def seconds_of(name: str, encode) -> float:
        begin = time.perf_counter()
        found[name] = encode(texts)
        return time.perf_counter() - begin

    def encode_peer(texts: list[str]) -> np.ndarray:
        return peer.encode(texts, batch_size=args.peer_batch, normalize_embeddings=True)

    for encode in (ours.encode, encode_peer):
        encode(texts[:100])
    runs = {"ours": lambda: seconds_of("ours", ours.encode), "peer": lambda: seconds_of("peer", encode_peer)}
    seconds = alternate(runs, 2 if args.quick else 3)
    difference = float(np.abs(found["ours"] - found["peer"]).max())
    names = {"ours": "neobert", "peer": "SentenceTransformer.encode"}
    lines = [(names[name], f"{value:.2f}", f"{len(texts) / value:,.0f}") for name, value in seconds.items()]
    table([(f"{len(texts):,} texts", "seconds, median", "texts per second"), *lines])
    bar("embed_over_sentence_transformers", seconds["peer"] / seconds["ours"], 1.3)
    bar("embed_largest_difference", difference, 1e-4, at_most=True)


if __name__ == "__main__":
    main()
