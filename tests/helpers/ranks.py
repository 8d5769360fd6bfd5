"""Whole runs on one process and on two ranks, which differ by nothing else."""

import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from helpers.runs import TINY
from neobert.config.load import load_config
from neobert.tasks.pretraining import task as pretraining
from neobert.training.metrics import read_metrics

STEPS, HALF = 12, 6


BASE = [
    *TINY, f"trainer.max_steps={STEPS}", f"trainer.save_steps={HALF}", "trainer.eval_steps=8", "trainer.eval_max_batches=3",
    "datacollator.pack_sequences=true", "dataset.num_shards=2", "trainer.gradient_clipping=0.5",
    "trainer.log_weight_norms=true",
]  # fmt: skip


MUON = [
    "optimizer.name=muonclip", "optimizer.muon_config.clipping_threshold=0.001", "optimizer.muon_config.clipping_interval=3",
    "optimizer.muon_config.capture_last_microbatch_only=false",  # one process has two microbatches where two have one
]  # fmt: skip


NGPT = ["model.ngpt=true", "trainer.gradient_checkpointing=true"]


BF16 = ["trainer.mixed_precision=bf16"]


TWO = {
    "ddp": ["trainer.engine=ddp"],
    "fsdp2": ["trainer.engine=fsdp2"],
    "fsdp2 muon": ["trainer.engine=fsdp2", *MUON],
    "fsdp2 ngpt": ["trainer.engine=fsdp2", *NGPT],
    "fsdp2 bf16": ["trainer.engine=fsdp2", "trainer.fsdp_reshard_after_forward=false", *BF16],
    "ddp hook": ["trainer.engine=ddp", "trainer.ddp_bf16_gradients=true"],
}


def run(folder, *words):
    """A run in this process, or in this one of two."""
    loaded = load_config([], [*BASE, f"trainer.output_dir={folder}", *words])
    with pytest.MonkeyPatch.context() as patch:  # bfloat16, where it is asked for, on any machine
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        return pretraining.run(loaded)


def resume(root, name, source, *words):
    """Go on from the checkpoint at half of another run, in a folder of its own."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.copytree(root / source / "checkpoints" / str(HALF), root / name / "checkpoints" / str(HALF))
        shutil.copy(root / source / "metrics.jsonl", root / name)
    if dist.is_initialized():
        dist.barrier()
    return run(root / name, f"trainer.resume_from_checkpoint={HALF}", *words)


def differences(root, a, b):
    """(largest difference of a loss, largest relative difference of a weight) of two runs."""
    losses = [
        {
            (row["step"], row["kind"]): row.get("loss", row.get("eval_loss"))
            for row in read_metrics(root / name / "metrics.jsonl")
        }
        for name in (a, b)
    ]
    assert losses[0].keys() == losses[1].keys()
    weights = [load_file(root / name / f"checkpoints/{STEPS}/model.safetensors") for name in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    return (
        max(abs(losses[0][key] - losses[1][key]) for key in losses[0]),
        max(((one - weights[1][name]).norm() / one.norm()).item() for name, one in weights[0].items()),
    )
