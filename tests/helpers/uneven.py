"""A corpus of documents of very uneven length, and runs on it that note every row they read."""

import random

import torch

from helpers.runs import TEXT, TINY
from neobert.config.load import load_config
from neobert.tasks.pretraining import task as pretraining

NUM_DOCUMENTS = 60
UNEVEN = [
    *TINY, "trainer.max_steps=-1", "trainer.per_device_train_batch_size=2", "trainer.disable_tqdm=true",
    "trainer.save_total_limit=null", "trainer.save_steps=1000", "trainer.eval_steps=1000",
]  # fmt: skip


def write_uneven(folder):
    """Documents of 20 to 3,000 characters, all different."""
    lines, draw = (TEXT / "validation.txt").read_text().split(), random.Random(1)
    documents = [
        f"{number} " + " ".join(lines[start : start + draw.choice([4, 8, 300, 500])])
        for number, start in enumerate(draw.sample(range(len(lines) - 500), NUM_DOCUMENTS))
    ]
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(documents))
    (folder / "validation.txt").write_text("\n".join(documents[:8]))
    return f"dataset.path={folder}"


def run_noting(*words):
    """(the finished run, the rows of every microbatch of this process as tuples of their token ids)."""
    noted = []

    def note(batch, number):
        ids = torch.where(batch.labels == -100, batch.input_ids, batch.labels)
        noted.append([tuple(row[row > 3].tolist()) for row in ids if (row > 3).any()])  # no special tokens

    return pretraining.run(load_config([], [*UNEVEN, *words]), note), noted
