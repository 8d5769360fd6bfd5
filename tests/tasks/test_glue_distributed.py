"""GLUE on two real processes (gloo): losses, weights and scores of one process; suites; resuming on another number."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from helpers.commands import spawn
from helpers.glue import GLUE_TINY, RANDOM, foreign_model, made_rows, run_glue, write_local
from neobert.data.labelled import TASKS
from neobert.tasks.glue import suite as glue_suite
from neobert.training.metrics import read_metrics

STEPS = 8  # two epochs of 25 rows in batches of 8: the last one has one row, which is one process's only
WORDS = [
    "trainer.num_train_epochs=2",
    "trainer.save_steps=4",
    "trainer.eval_strategy=epoch",
    "glue.classifier_dropout=0",
]
HALVES = ["trainer.per_device_train_batch_size=4"]
RUNS = {
    "rte ddp": ["glue.task_name=rte", *RANDOM, "trainer.engine=ddp"],
    "rte fsdp2": ["glue.task_name=rte", *RANDOM, "trainer.engine=fsdp2", "datacollator.pack_sequences=true"],
    "stsb ddp": ["glue.task_name=stsb", *RANDOM, "glue.group_by_length=true"],
    "stsb fsdp2": ["glue.task_name=stsb", *RANDOM, "glue.group_by_length=true", "trainer.engine=fsdp2"],
}
ALONE = {
    "rte": ["glue.task_name=rte", *RANDOM],
    "stsb": ["glue.task_name=stsb", *RANDOM, "glue.group_by_length=true"],
}


def run(root, name, *words):
    return run_glue(f"dataset.path={root / 'glue'}", f"trainer.output_dir={root / name}", *WORDS, *words)


def foreign(root):
    return ["glue.task_name=rte", "model.from_hub=true", f"model.name={root / 'bert'}"]


def suite(root, name, *words):
    words = [*GLUE_TINY, f"dataset.path={root / 'glue'}", f"trainer.output_dir={root / name}", *RANDOM, *words]
    return glue_suite.run_suite([], [*words, "glue.classifier_dropout=0"], ["mrpc", "rte"], 2, predict=True)


def worker(rank, root):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    for name, words in RUNS.items():
        run(root, name, *words, *HALVES)
    run(root, "bert fsdp2", *foreign(root), "trainer.engine=fsdp2", *HALVES)
    assert suite(root, "suite of two", *HALVES) == 0
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of all runs, by name."""
    root = tmp_path_factory.mktemp("runs")
    write_local(root / "glue", ["rte", "stsb", "mrpc"])
    for name in ("rte", "stsb"):
        rows = [json.dumps(row) + "\n" for row in made_rows(TASKS[name], 25)]
        (root / "glue" / name / "train.jsonl").write_text("".join(rows))
    settings = foreign_model(root / "bert") / "config.json"
    settings.write_text(settings.read_text().replace('dropout_prob": 0.1', 'dropout_prob": 0.0'))
    for name, words in ALONE.items():
        run(root, name, *words)
    run(root, "bert", *foreign(root))
    assert suite(root, "suite") == 0
    spawn(worker, (root,), 2)
    return root


def losses(root, name):
    rows = read_metrics(root / name / "metrics.jsonl")
    return {(row["step"], row["kind"]): row.get("loss", row.get("eval_loss")) for row in rows}


@pytest.mark.parametrize(("one", "two"), [*((name.split()[0], name) for name in RUNS), ("bert", "bert fsdp2")])
def test_two_processes_equal_one(root, one, two):
    found = [losses(root, name) for name in (one, two)]
    assert {step for step, kind in found[0] if kind == "train"} == set(range(1, STEPS + 1))
    assert found[1] == pytest.approx(found[0], abs=2e-5)
    a, b = (load_file(root / name / f"checkpoints/{STEPS}/model.safetensors") for name in (one, two))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-4
    results = [json.loads((root / name / "result.json").read_text()) for name in (one, two)]
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"], abs=1e-3)
    assert results[0]["protocol"] == results[1]["protocol"]


def test_saved_by_two_resumed_by_one(root):
    (root / "again").mkdir()
    shutil.copytree(root / "rte ddp/checkpoints/4", root / "again/checkpoints/4")
    _, result = run(root, "again", *ALONE["rte"], "trainer.resume_from_checkpoint=latest")
    assert result["metrics"] == pytest.approx(json.loads((root / "rte/result.json").read_text())["metrics"], abs=1e-3)


def test_a_suite_of_two_processes_has_the_table_of_one(root):
    tables = [json.loads((root / name / "results.json").read_text()) for name in ("suite", "suite of two")]
    for name in ("mean", "std", "values"):
        assert tables[1]["average"][name] == pytest.approx(tables[0]["average"][name], abs=1e-3)
    assert (root / "suite of two/submission/RTE.tsv").read_text() == (root / "suite/submission/RTE.tsv").read_text()
    for task in ("mrpc", "rte"):
        assert tables[0]["tasks"][task]["protocol"] == tables[1]["tasks"][task]["protocol"]
