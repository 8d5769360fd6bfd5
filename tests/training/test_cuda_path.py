"""Whole runs on the path of a GPU, on the CPU: documents laid out by loaders, one call of attention, results read late.

Only the kernels of attention are others (helpers/reference_kernels.py). What they train is what the CPU's own path trains.
"""

import json
from dataclasses import replace

import pytest

from helpers import reference_kernels
from helpers.glue import load_glue, pretrain_tiny, write_local
from helpers.runs import TINY
from neobert.config.load import load_config
from neobert.tasks.glue import task as glue
from neobert.tasks.pretraining import task as pretraining
from neobert.training import processes
from neobert.training.runtime import Runtime, build_runtime

WHOLE = ["trainer.logging_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=4", "trainer.save_steps=3"]
BATCHES = {
    "padded": [],
    "packed": ["datacollator.pack_sequences=true"],
    "muonclip": ["optimizer.name=muonclip", "optimizer.muon_config.clipping_interval=2"],
    "all positions": ["trainer.masked_logits_only_loss=false"],
    "accumulated": ["trainer.gradient_accumulation_steps=3", "trainer.log_weight_norms=true"],
}


@pytest.fixture
def on_gpu_path(monkeypatch):
    """Turns the path on."""
    reference_kernels.register()

    def turn_on():
        def set_attention(self, model, *_, **__):
            model.model.attention_kernel = "torch_efficient"
            return "as on a GPU"

        monkeypatch.setattr(Runtime, "set_attention", set_attention)
        monkeypatch.setattr(
            processes, "build_runtime", lambda **facts: replace(build_runtime(**facts), reads_late=True)
        )

    return turn_on


def rows(folder, kind="train"):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"] if kind == "train" else row["eval_loss"]) for row in found if row["kind"] == kind]


def pretrain(folder, *words):
    words = [*TINY, *WHOLE, "dataset.validation_split=0.05", f"trainer.output_dir={folder}", *words]
    return pretraining.run(load_config([], words, "pretraining"))


@pytest.mark.parametrize("name", BATCHES)
def test_pretraining(name, tmp_path, on_gpu_path):
    pretrain(tmp_path / "cpu", *BATCHES[name])
    on_gpu_path()
    pretrain(tmp_path / "gpu", *BATCHES[name])
    for kind in ("train", "eval"):
        ours, expected = rows(tmp_path / "gpu", kind), rows(tmp_path / "cpu", kind)
        assert [step for step, _ in ours] == [step for step, _ in expected]
        assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in expected], rel=1e-5)


def test_resumed_equals_uninterrupted(tmp_path, on_gpu_path):
    on_gpu_path()
    words = BATCHES["packed"] + BATCHES["muonclip"]
    pretrain(tmp_path / "whole", *words)
    pretrain(tmp_path / "half", *words, "trainer.max_steps=3", "scheduler.total_steps=6")
    again = [f"trainer.resume_from_checkpoint={tmp_path / 'half/checkpoints/3'}", "scheduler.total_steps=6"]
    pretrain(tmp_path / "half", *words, *again)
    pair = [(tmp_path / name / "checkpoints/6/model.safetensors").read_bytes() for name in ("whole", "half")]
    assert pair[0] == pair[1]


def test_glue(tmp_path, on_gpu_path):
    folder = pretrain_tiny(tmp_path / "weights")
    write_local(tmp_path / "data", ["rte"])
    base = [f"dataset.path={tmp_path / 'data'}", "glue.task_name=rte", f"glue.pretrained_checkpoint_dir={folder}"]
    base += ["glue.classifier_dropout=0", "trainer.num_train_epochs=1", "trainer.logging_steps=1"]
    glue.run(load_glue(*base, f"trainer.output_dir={tmp_path / 'cpu'}"))
    on_gpu_path()
    glue.run(load_glue(*base, f"trainer.output_dir={tmp_path / 'gpu'}"))
    ours, expected = rows(tmp_path / "gpu"), rows(tmp_path / "cpu")
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in expected], rel=1e-5)
