"""Writes tests/data/ac63e8d: checkpoints of an older version, and what that version did next.

It was run once, with the code of commit ac63e8d and its dependencies, on a CPU in float32:

    cd <a checkout of ac63e8d> && .venv/bin/python <this file> <this repository>/tests/data/ac63e8d

Each of the folders pretraining, glue and contrastive has `checkpoints/<step>` and `metrics.jsonl` as that version left them,
and `next.json`: the token ids, masks and labels of the next batches, the losses of the next steps, and what the version
computed from the checkpoint (vectors of sentences, predicted classes, tokens for a mask). All text is made by a rule, so that
the tests write it again. Models are 16 wide and the vocabulary has 128 tokens, to keep the folder small.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

SUBJECTS = ("the senate", "a farmer", "every school", "the old river", "a small town", "the new law")
VERBS = ("spoke of", "asked for", "voted on", "waited for", "paid for")
OBJECTS = ("peace", "more land", "the harvest", "a bridge", "trade by sea", "clean water", "ships")
STEP, LAST_STEP = 4, 7  # of the checkpoint, of what is recorded
SHAPE = [
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=16",
    "model.max_position_embeddings=64", "trainer.mixed_precision=no", "trainer.logging_steps=1", f"trainer.save_steps={STEP}",
    "trainer.eval_steps=1000", "trainer.use_cpu=true", "optimizer.lr=1e-2", "scheduler.warmup_steps=1",
    "scheduler.total_steps=20", "trainer.disable_tqdm=true",
]  # fmt: skip
OWN = {
    "pretraining": ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2",
                    "dataset.max_seq_length=32",
                    "dataset.lanes=2", "dataset.num_workers=0", "dataset.streaming=false", "datacollator.pack_sequences=true"],
    "glue": ["glue.task_name=rte", "glue.allow_random_weights=true", "glue.max_seq_length=32", "glue.num_workers=0",
             "trainer.per_device_train_batch_size=4"],
    "contrastive": ["contrastive.allow_random_weights=true", "dataset.max_seq_length=32", "dataset.num_workers=0",
                    "trainer.per_device_train_batch_size=4"],
}  # fmt: skip
SENTENCES = ["the senate spoke of peace", "a farmer waited for clean water and ships"]
MASKED = "the senate spoke of [MASK]"


def sentence(n):
    return f"{SUBJECTS[n % 6]} {VERBS[n % 5]} {OBJECTS[n % 7]} {n} times"


def write_texts(folder):
    """The data of all three tasks. Returns task -> what dataset.path is."""
    folder.mkdir(parents=True)
    (folder / "text").mkdir()
    documents = [". ".join(sentence(n * k) for k in range(1, 2 + n % 4)) for n in range(1, 60)]
    (folder / "text/train.txt").write_text("\n".join(documents))
    (folder / "text/validation.txt").write_text("\n".join(documents[:6]))
    (folder / "glue/rte").mkdir(parents=True)
    for split, number in (("train", 48), ("validation", 8), ("test", 40)):
        rows = [
            {
                "sentence1": sentence(n),
                "sentence2": sentence(n * 5),
                "label": n % 2 if split != "test" else -1,
                "idx": n,
            }
            for n in range(number)
        ]
        (folder / f"glue/rte/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"anchor": sentence(n), "positive": sentence(n + 210)} for n in range(48)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return {"pretraining": folder / "text", "glue": folder / "glue", "contrastive": folder / "pairs.jsonl"}


def overrides(task, path, tokenizer, output):
    """The configuration of a run as words of the command line."""
    return [*SHAPE, *OWN[task], f"dataset.path={path}", f"tokenizer.path={tokenizer}", f"trainer.output_dir={output}"]


@contextmanager
def recorded_inputs():
    """A list that grows by what the model is given in every microbatch of training: name -> rows of integers."""
    batches = []

    def record(module, arguments, named, output):
        if module.training and type(module).__name__.startswith("NeoBERTFor"):
            given = {name: named.get(name) for name in ("input_ids", "labels", "attention_mask")}
            batches.append({name: value.tolist() for name, value in given.items() if value is not None})

    hook = torch.nn.modules.module.register_module_forward_hook(record, with_kwargs=True)
    try:
        yield batches
    finally:
        hook.remove()


def read_losses(folder):
    """The losses of a run's steps from the checkpoint on."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train" and row["step"] > STEP]


def main(target):
    from neobert.inference.fill_mask import fill_masks

    from neobert.config.load import load_config
    from neobert.inference.embed import load_embedder
    from neobert.tasks import contrastive, glue, glue_predict, pretraining

    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = write_texts(Path(scratch) / "data")
        tokenizer = Path(scratch) / "tokenizer"
        words = ["tokenizer", "train", data["pretraining"] / "train.txt", "-o", tokenizer, "--vocab-size", "120"]
        subprocess.run([sys.executable, "-m", "neobert", *words, "--kind", "wordpiece"], check=True)
        for task, module in {"pretraining": pretraining, "glue": glue, "contrastive": contrastive}.items():
            run = Path(scratch) / task
            base = overrides(task, data[task], tokenizer, run)
            module.run(load_config([], [*base, f"trainer.max_steps={STEP}"], task))
            for name in (f"checkpoints/{STEP}", "metrics.jsonl", *(["result.json"] if task == "glue" else [])):
                (target / task / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, target / task / name)
            found = {}
            if task == "pretraining":
                found["guesses"] = [token for token, _ in next(iter(fill_masks(str(run), [MASKED], 3))).masks[0]]
            if task == "contrastive":
                found["vectors"] = load_embedder(str(run)).encode(SENTENCES).tolist()
            if task == "glue":
                glue_predict.predict_run(load_config([str(run / "config.yaml")], [f"trainer.output_dir={run}"]).config)
                (predictions,) = run.rglob("RTE.tsv")
                found["predictions"] = predictions.read_text()
            with recorded_inputs() as batches:
                resumed = [f"trainer.max_steps={LAST_STEP}", "trainer.resume_from_checkpoint=latest"]
                module.run(load_config([], [*base, *resumed], task))
            found |= {"losses": read_losses(run), "batches": batches}
            (target / task / "next.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
