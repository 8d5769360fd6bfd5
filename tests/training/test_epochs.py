"""Epochs, the end of the data and its errors on two real processes: all processes do the same at the same step."""

import json
import os
import shutil
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from helpers.commands import spawn
from helpers.runs import TINY
from helpers.uneven import run_noting, write_uneven
from neobert.checkpoints.format import list_steps, verify_checkpoint
from neobert.config.load import load_config
from neobert.errors import DataError
from neobert.tasks.pretraining import task as pretraining
from neobert.training.loop import Interrupt, evaluate
from neobert.training.metrics import read_metrics
from neobert.training.runtime import build_runtime

EPOCHS, HALF = 3, 10
EDGES = [f"trainer.num_train_epochs={EPOCHS}", "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch"]
PACKED = "datacollator.pack_sequences=true"
BY_EPOCH = {
    "ddp": ["dataset.num_shards=2", PACKED],
    "fsdp2": [
        "trainer.engine=fsdp2",
        "dataset.num_shards=4",
        PACKED,
        "dataset.streaming=true",
        "trainer.gradient_accumulation_steps=3",
    ],
}
STEPS = ["trainer.num_train_epochs=1", "dataset.num_shards=2", f"trainer.save_steps={HALF}"]
FIXED = [*TINY, "trainer.gradient_accumulation_steps=2", "trainer.save_steps=1000", "trainer.eval_steps=1000"]


def failing(rank, number):
    """Shown every batch of a process: in the second one, microbatch `number` cannot be read."""

    def observe(batch, count):
        if rank == 1 and count == number:
            raise DataError("shard 7: the connection was lost")

    return observe


class Toy(nn.Module):
    def forward(self, masked_only, count_correct):
        return SimpleNamespace(loss_sum=torch.tensor(1.0), num_correct=0)


class ToyBatch:
    num_targets = 1

    def to(self, device):
        return self

    def inputs(self):
        return {}


def batches_of(rank):
    """Of an evaluation: the second turn cannot be read in one process."""
    yield from [ToyBatch()] * 2
    if rank == 1:
        raise DataError("shard 8: truncated")
    yield from [ToyBatch()] * 2


def worker(rank, root):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    found = {}
    text = f"dataset.path={root / 'text'}"
    for name, words in BY_EPOCH.items():
        run, noted = run_noting(text, f"trainer.output_dir={root / name}", *EDGES, *words)
        found[name] = (run.state.step, run.state.epoch, len(noted))
    drop = f"dataset.mixture=[{{path: {root / 'text'}}}, {{path: {root / 'text/validation.txt'}}}]"
    words = ["trainer.max_steps=1000", "dataset.mixture_exhausted=drop", "trainer.eval_strategy=epoch"]
    run, noted = run_noting(drop, f"trainer.output_dir={root / 'mixture'}", *words)
    found["mixture"] = (run.state.step, run.state.stop_reason, list(chain(*noted)))

    _, noted = run_noting(text, f"trainer.output_dir={root / 'two'}", *STEPS)
    found["two"] = list(chain(*noted[:HALF]))
    if rank == 0:
        shutil.copytree(root / f"one/checkpoints/{HALF}", root / f"one to two/checkpoints/{HALF}")
    dist.barrier()
    words = ["trainer.resume_from_checkpoint=latest", "trainer.num_train_epochs=1", "trainer.save_steps=3"]
    run, noted = run_noting(text, f"trainer.output_dir={root / 'one to two'}", *words)
    found["one to two"] = list(chain(*noted)), run.state.num_rows, run.state.step

    words = [*FIXED, "trainer.max_steps=8"]
    pretraining.run(load_config([], [*words, f"trainer.output_dir={root / 'whole'}"]))
    with pytest.raises(DataError) as error:  # in the second microbatch of step 5
        pretraining.run(load_config([], [*words, f"trainer.output_dir={root / 'failed'}"]), failing(rank, 10))
    found["error"] = str(error.value), list_steps(root / "failed/checkpoints")
    dist.barrier()
    again = [*words, f"trainer.output_dir={root / 'failed'}", "trainer.resume_from_checkpoint=latest"]
    pretraining.run(load_config([], again))
    runtime = build_runtime(use_cpu=True, mixed_precision="no", tf32=False)
    with pytest.raises(DataError, match="shard 8: truncated"):
        evaluate(Toy(), batches_of(rank), runtime, None, Interrupt())
    (root / f"found{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of all runs by name, and what each process found."""
    root = tmp_path_factory.mktemp("runs")
    text = write_uneven(root / "text")
    _, noted = run_noting(text, f"trainer.output_dir={root / 'one'}", *STEPS, "trainer.gradient_accumulation_steps=2")
    one = list(chain(*noted[: 2 * HALF]))
    spawn(worker, (root,), 2)
    shutil.copytree(root / f"two/checkpoints/{HALF}", root / f"two to one/checkpoints/{HALF}")
    words = ["trainer.resume_from_checkpoint=latest", *STEPS[:1]]
    run, noted = run_noting(text, f"trainer.output_dir={root / 'two to one'}", *words)
    found = [json.loads((root / f"found{rank}.json").read_text()) for rank in range(2)]
    resumed = {"two to one": (list(chain(*noted)), run.state.num_rows, run.state.step)}
    return SimpleNamespace(root=root, found=found, one=one, resumed=resumed, words=words, text=text)


def corpus(root, name="train"):
    """The rows of the documents, unpacked: as a run of one epoch reads them."""
    _, noted = run_noting(f"dataset.path={root / 'text' / name}.txt", f"trainer.output_dir={root / name}", STEPS[0])
    return Counter(chain(*noted))


def counted(rows):
    return Counter(map(tuple, rows))


@pytest.mark.parametrize("name", BY_EPOCH)
def test_all_processes_evaluate_and_save_at_the_ends_of_epochs(root, name):
    """As many evaluations and checkpoints as epochs, though lanes get to them at very different steps."""
    rows = read_metrics(root.root / name / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "eval"]
    (step, epoch, zero), (other_step, other_epoch, one) = (found[name] for found in root.found)
    assert (step, epoch) == (other_step, other_epoch) == (steps[-1], EPOCHS - 1)
    assert len(steps) == EPOCHS
    assert steps == list_steps(root.root / name / "checkpoints")
    assert [row["epoch"] for row in rows if row["kind"] == "train"] == sorted(
        row["epoch"] for row in rows if "loss" in row
    )
    assert zero != one  # their data ended at different steps
    for saved in steps:
        assert verify_checkpoint(root.root / name / f"checkpoints/{saved}")["epoch"] == min(
            EPOCHS - 1, steps.index(saved) + 1
        )


def test_a_mixture_ends_in_all_processes_when_the_data_of_all_has(root):
    """Without a pass over the data that counts; the last step is evaluated and saved."""
    (step, reason, zero), (other_step, _, one) = (found["mixture"] for found in root.found)
    assert step == other_step < 1000
    assert reason == "the data ended"
    assert counted([*zero, *one]) == corpus(root.root) + corpus(root.root, "validation")
    rows = read_metrics(root.root / "mixture/metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "eval"][-1] == step
    assert list_steps(root.root / "mixture/checkpoints") == [step]


def test_documents_are_read_once_whatever_the_number_of_processes(root):
    """1 -> 2 and 2 -> 1 processes in the middle of an epoch; a step keeps its rows."""
    documents = corpus(root.root)
    zero, one = (found["one to two"] for found in root.found)
    assert counted([*root.one, *zero[0], *one[0]]) == documents
    alone = root.resumed["two to one"]
    assert counted([*root.found[0]["two"], *root.found[1]["two"], *alone[0]]) == documents
    for _, num_rows, step in (zero, alone):
        assert num_rows == 4 * step
    state = verify_checkpoint(root.root / f"two to one/checkpoints/{alone[2]}")
    assert state["step_size"]["rows_per_step"] == 4


def test_a_data_error_of_one_process_ends_all_and_saves_the_last_whole_step(root):
    """In the middle of an accumulation window; resumed, the run equals one that could read all, to the bit."""
    for message, steps in (found["error"] for found in root.found):
        assert message.startswith("shard 7: the connection was lost; go on from ")
        assert message.endswith("checkpoints/4")
        assert steps == [4]
    weights = [load_file(root.root / name / "checkpoints/8/model.safetensors") for name in ("whole", "failed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    losses = [
        [
            (row["step"], row["loss"])
            for row in read_metrics(root.root / name / "metrics.jsonl")
            if row["kind"] == "train"
        ]
        for name in ("whole", "failed")
    ]
    assert losses[0] == losses[1]
