"""MTEB: our wrapper against the library's own SentenceTransformer wrapper, on the same weights: scores and wall-clock.

Four local tasks of real text: STS (STS-B), classification (CoLA), retrieval (one-line titles of software packages -> their
first paragraphs), clustering (which of four corpora a text is from). The model is `--weights`, a folder of
sentence-transformers, as that of all-MiniLM-L6-v2; without it an untrained BERT of that shape, which costs the same and whose
scores are as comparable.

Each run is a process of its own; the clock runs over `mteb.evaluate` of all tasks, with float32 on both sides and the batch
size 32 of both defaults. The runs take turns.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from _bench import ROOT, TOKENIZER, alternate, arguments, bar, finish, run, table

SHARED = ROOT.parent / "shared/data"
OPTIONS = {
    "weights": {"default": None, "help": "folder of a sentence-transformers model"},
    "data": {"default": str(SHARED)},
    "tasks": {"default": None, "help": "a folder of local tasks instead of those"},
    "one": {"default": None, "help": "ours or peer: one run, in this process"},
}  # fmt: skip


def read(path: Path, count: int) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(data: Path, folder: Path, size: int) -> None:
    """The four tasks, `size` texts each."""
    sts = read(data / "glue/stsb/validation.jsonl", size // 2)
    write(
        folder / "sts/test.jsonl", [{k: r[k] for k in ("sentence1", "sentence2")} | {"score": r["label"]} for r in sts]
    )
    for split, name in (("train", "train"), ("validation", "test")):
        rows = read(data / f"glue/cola/{split}.jsonl", size)
        write(folder / f"acceptability/{name}.jsonl", [{"text": r["sentence"], "label": r["label"]} for r in rows])
    pairs = read(data / "pairs/packages.jsonl", size)
    write(folder / "packages/corpus.jsonl", [{"id": i, "text": r["positive"]} for i, r in enumerate(pairs)])
    queries = range(0, size, 4)
    write(folder / "packages/queries.jsonl", [{"id": i, "text": pairs[i]["anchor"]} for i in queries])
    write(folder / "packages/qrels.jsonl", [{"query_id": i, "document_id": i} for i in queries])
    sources = {
        "packages": pairs,
        **{name: read(data / f"pairs/{name}.jsonl", size // 4) for name in ("verses", "wordnet")},
    }
    texts = [(r["anchor"], name) for name, rows in sources.items() for r in rows[: size // 4]]
    texts += [(r["sentence"], "cola") for r in read(data / "glue/cola/train.jsonl", size // 4)]
    write(folder / "corpora/test.jsonl", [{"text": text, "label": label} for text, label in texts])


def untrained(folder: Path) -> str:
    """A BERT of MiniLM's shape, as sentence-transformers saves it."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from neobert.inference.sentence_transformers import Embedding, write_sentence_transformers

    tokens = SHARED / "tokenizers/bert-base-uncased"
    tokenizer = AutoTokenizer.from_pretrained(str(tokens if tokens.is_dir() else TOKENIZER))
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sentence_transformers(folder, 384, Embedding("mean", max_length=256))
    return str(folder)


def one(args) -> dict:
    """{"seconds": .., "scores": {task: main score}} of one system."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    import mteb

    from neobert.tasks.mteb.library import find_local_tasks

    logging.getLogger("mteb").setLevel(logging.ERROR)
    tasks = find_local_tasks(args.tasks)
    if args.one == "ours":
        from neobert.config.load import load_config
        from neobert.tasks.mteb.library import EncoderForMTEB
        from neobert.tasks.mteb.task import load_subject

        subject = load_subject(load_config([], [], "mteb").config, args.weights)
        model = EncoderForMTEB(subject.name, {**subject.settings, "prompts": {}}, subject.embedder)
    else:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(args.weights, device="cpu")
    begin, scores = time.perf_counter(), {}
    for task in tasks:
        kwargs = {"batch_size": 1024 if args.one == "ours" else 32, "show_progress_bar": False}
        found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs=kwargs)
        scores[task.metadata.name] = found.task_results[0].get_score()
    return {"seconds": time.perf_counter() - begin, "scores": scores}


def main() -> None:
    args = arguments(__doc__, **OPTIONS)
    if args.one is not None:
        print(json.dumps(one(args)))
        return
    if not Path(args.data).is_dir():
        print(f"no data at {args.data}: name it with --data")
        return
    with tempfile.TemporaryDirectory() as scratch:
        tasks = Path(scratch) / "tasks"
        write_tasks(Path(args.data), tasks, 400 if args.quick else 2000)
        weights = args.weights or untrained(Path(scratch) / "model")
        print(f"weights: {args.weights or 'untrained, 384 wide x 6 layers'}")
        compare(weights, tasks, 1 if args.quick else 3)
    finish()


def compare(weights: str, tasks: Path, repeats: int) -> None:
    """The table, and the bars."""
    scores: dict[str, dict[str, float]] = {}

    def measure(system: str) -> float:
        words = [sys.executable, __file__, "--one", system, "--weights", weights, "--tasks", tasks]
        found = json.loads(run(words, PYTHONWARNINGS="ignore").splitlines()[-1])
        scores[system] = found["scores"]
        return found["seconds"]

    seconds = alternate({system: lambda system=system: measure(system) for system in ("ours", "peer")}, repeats)
    apart = {name: abs(scores["ours"][name] - scores["peer"][name]) for name in scores["peer"]}
    rows = [
        (name, f"{scores['ours'][name]:.5f}", f"{scores['peer'][name]:.5f}", f"{apart[name]:.1e}") for name in apart
    ]
    table([("task", "ours", "SentenceTransformer", "apart"), *rows])
    print(f"seconds: ours {seconds['ours']:.1f}, SentenceTransformer {seconds['peer']:.1f}")
    bar("mteb_scores_apart", max(apart.values()), 1e-4, at_most=True)
    bar("mteb_seconds_over_sentence_transformers", seconds["peer"] / seconds["ours"], 1.0)


if __name__ == "__main__":
    main()
