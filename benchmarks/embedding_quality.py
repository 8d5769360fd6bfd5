"""What contrastive training makes of a pretrained encoder, beside word overlap and BM25: MRR@10 on held-out package
descriptions (a title among 1,000 first paragraphs) and Spearman's correlation on STS-B's test.

`--pretrained` is a run of pretraining, `--trained` a contrastive run from it that held the last 1,000 packages out. Without
them both are trained first, in `--folder`: about 30 CPU minutes (`--quick` a minute). Pairs are titles and paragraphs of the
packages, pieces of their paragraphs, WordNet's example sentences and glosses, and verses in two translations.
"""

import json
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from _bench import QUICKSTART, ROOT, arguments, bar, finish, neobert, run, table

HELD_OUT = 1000
OPTIONS = {
    "pretrained": {"default": None}, "trained": {"default": None}, "folder": {"default": None},
    "data": {"default": str(ROOT.parent / "shared/data")},
}  # fmt: skip

MUON = [
    "optimizer.name=muonclip", "optimizer.lr=2e-3", "optimizer.betas=[0.9, 0.98]", "scheduler.name=linear",
    "scheduler.final_lr_ratio=0.0", "trainer.gradient_clipping=1.0",
]  # fmt: skip
PRETRAINING = [
    "model.hidden_size=384", "model.num_hidden_layers=2", "model.num_attention_heads=6", "model.intermediate_size=1536",
    "dataset.max_seq_length=128", "tokenizer.max_length=128", "trainer.per_device_train_batch_size=32",
    "scheduler.warmup_percent=5", *MUON,
]  # fmt: skip
CONTRASTIVE = [
    "contrastive.loss_type=supcon", "contrastive.temperature=0.05",
    "dataset.max_seq_length=96", "trainer.per_device_train_batch_size=512",
    "dataset.validation_split=null", "scheduler.warmup_percent=10", *MUON,
]  # fmt: skip
SHARES = {"packages": 3, "pieces": 2, "halves": 1, "wordnet": 1, "verses": 1}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def overlap(queries: list[str], texts: list[str]) -> np.ndarray:
    """Jaccard's index of the sets of words: queries x texts."""
    sets = [set(words(text)) for text in texts]
    return np.array([[len(q & t) / max(1, len(q | t)) for t in sets] for q in (set(words(text)) for text in queries)])


def bm25(queries: list[str], texts: list[str]) -> np.ndarray:
    """Okapi BM25 of rank-bm25: queries x texts."""
    from rank_bm25 import BM25Okapi

    index = BM25Okapi([words(text) for text in texts])
    return np.array([index.get_scores(words(query)) for query in queries])


def mean_reciprocal_rank(scores: np.ndarray, relevant: np.ndarray) -> float:
    """MRR@10 of queries x texts; texts of one score share their places."""
    ranks = []
    for row, own in zip(scores, relevant, strict=True):
        best = row[own].max()
        ranks.append(1 + (row > best).sum() + ((row == best).sum() - (row[own] == best).sum()) / 2)
    return float(np.mean([1 / rank if rank <= 10 else 0.0 for rank in ranks]))


def spearman(values: np.ndarray, gold: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(values, gold)[0])


def load(args) -> tuple[tuple[list[str], list[str], np.ndarray], tuple[list[str], list[str], list[float]]]:
    """(titles, different paragraphs, which belong together), (sentences, sentences, scores)."""
    lines = (Path(args.data) / "pairs/packages.jsonl").read_text().splitlines()[-HELD_OUT:]
    rows = [json.loads(line) for line in lines]
    texts = list(dict.fromkeys(row["positive"] for row in rows))
    relevant: dict[str, set[int]] = {}
    for row in rows:
        relevant.setdefault(row["anchor"], set()).add(texts.index(row["positive"]))
    own = np.zeros((len(relevant), len(texts)), dtype=bool)
    for number, places in enumerate(relevant.values()):
        own[number, list(places)] = True
    sts = [json.loads(line) for line in (Path(args.data) / "glue/stsb/test.jsonl").read_text().splitlines()]
    columns = ([row[name] for row in sts] for name in ("sentence1", "sentence2", "label"))
    return (list(relevant), texts, own), tuple(columns)


def measure(scores_of, pairs_of, packages, sts) -> tuple[float, float]:
    """(MRR@10, Spearman) of a function for all pairs of two lists, and one for the pairs of a row."""
    queries, texts, own = packages
    first, second, gold = sts
    return mean_reciprocal_rank(scores_of(queries, texts), own), spearman(pairs_of(first, second), gold)


def of_model(folder: str):
    """The same two functions for a checkpoint: cosines."""
    from neobert.inference.embed import load_embedder

    embedder = load_embedder(folder)
    return (
        lambda queries, texts: embedder.encode(queries) @ embedder.encode(texts).T,
        lambda first, second: (embedder.encode(first) * embedder.encode(second)).sum(1),
    )


def lexical(first: list[str], second: list[str]) -> np.ndarray:
    return np.array([overlap([a], [b])[0, 0] for a, b in zip(first, second, strict=True)])


def lexical_bm25(first: list[str], second: list[str]) -> np.ndarray:
    """BM25 of every pair, both ways, over all sentences."""
    from rank_bm25 import BM25Okapi

    index = BM25Okapi([words(text) for text in (*first, *second)])
    count = len(first)
    ways = ((first, count), (second, 0))
    scores = [
        [index.get_batch_scores(words(text), [begin + n])[0] for n, text in enumerate(texts)] for texts, begin in ways
    ]
    return np.mean(scores, axis=0)


def train(args, home: Path) -> None:
    """A tokenizer for speeches, sermons and pairs; pretraining; pairs."""
    data = Path(args.data)
    args.pretrained, args.trained = str(home / "pretrained"), str(home / "trained")
    pretraining_steps, steps = (40, 20) if args.quick else (1000, 450)
    packages = read_rows(data / "pairs/packages.jsonl")[:-HELD_OUT]
    made = {"packages": packages, "halves": halves(packages), "pieces": pieces(packages)}
    paths = {name: home / f"{name}.jsonl" for name in made}
    for name, rows in made.items():
        paths[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    paths |= {name: data / f"pairs/{name}.jsonl" for name in ("wordnet", "verses")}
    texts, tokenizer = home / "texts.txt", home / "tokenizer"
    sources = [read_rows(paths[name]) for name in ("packages", "wordnet", "verses")]
    texts.write_text("\n".join(text for rows in sources for row in rows for text in row.values()))
    prose = sorted((data / "prose").glob("*.jsonl"))
    run(neobert("tokenizer", "train", *prose, texts, "-o", tokenizer, "--vocab-size", 16000))
    words = [f"dataset.path={data / 'prose'}", f"tokenizer.path={tokenizer}", f"trainer.output_dir={args.pretrained}"]
    run(neobert("pretrain", QUICKSTART, *words, f"trainer.max_steps={pretraining_steps}", *PRETRAINING))
    mixture = [{"path": str(paths[name]), "weight": weight} for name, weight in SHARES.items()]
    words = [f"dataset.mixture={json.dumps(mixture)}", "dataset.path=", f"trainer.max_steps={steps}", *CONTRASTIVE]
    words += [f"contrastive.pretrained_checkpoint_dir={args.pretrained}", f"trainer.output_dir={args.trained}"]
    run(neobert("contrastive", ROOT / "configs/contrastive/small.yaml", *words))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"trained: {(used.ru_utime + used.ru_stime) / 60:.0f} CPU minutes\n", flush=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def halves(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """The first sentence of a paragraph, and the others."""
    for row in rows:
        first, *others = re.split(r"(?<=[.!?])\s+", row["positive"])
        if min(len(first.split()), len(" ".join(others).split())) >= 4:
            yield {"anchor": first, "positive": " ".join(others)}


def pieces(rows: list[dict[str, str]], each: int = 4) -> Iterator[dict[str, str]]:
    """A few words out of a paragraph, some of them left out, and half of it or more (as Contriever crops, arXiv 2112.09118)."""
    random = Random(0)

    def span(words: list[str], least: int, most: int) -> list[str]:
        length = random.randint(min(least, len(words)), min(most, len(words)))
        start = random.randint(0, len(words) - length)
        return words[start : start + length]

    for row in rows:
        words = row["positive"].split()
        for _ in range(each if len(words) >= 8 else 0):
            few = [word for word in span(words, 5, 12) if random.random() > 0.2]
            most = span(words, max(6, len(words) // 2), len(words))
            if len(few) > 1:
                yield {"anchor": " ".join(few), "positive": " ".join(most)}


def main() -> None:
    args = arguments(__doc__, **OPTIONS)
    if not (Path(args.data) / "pairs").is_dir():
        sys.exit(print(f"no pairs at {args.data}: name them with --data"))
    with tempfile.TemporaryDirectory() as folder:
        if args.trained is None:
            home = Path(args.folder or folder)
            home.mkdir(parents=True, exist_ok=True)
            train(args, home)
        compare(args)
    finish()


def compare(args) -> None:
    """The table, and the bars."""
    packages, sts = load(args)
    systems = {
        "word overlap (Jaccard)": (overlap, lexical),
        "BM25": (bm25, lexical_bm25),
        "pretrained, mean pooling": of_model(args.pretrained),
        "after contrastive training": of_model(args.trained),
    }
    found = {name: measure(*functions, packages, sts) for name, functions in systems.items()}
    told = [(name, f"{mrr:.3f}", f"{100 * rho:.1f}") for name, (mrr, rho) in found.items()]
    table([("", "packages, MRR@10", "STS-B test, Spearman x 100"), *told])
    if args.quick:
        return
    *before, (mrr, rho) = found.values()
    start = before.pop()
    bar("embedding_mrr_over_lexical", mrr / max(m for m, _ in before), 1.0)
    bar("embedding_spearman_over_lexical", rho / max(r for _, r in before), 1.0)
    bar("embedding_mrr_over_start", mrr / start[0], 1.5)
    bar("embedding_spearman_over_start", rho / start[1], 1.2)


if __name__ == "__main__":
    main()
