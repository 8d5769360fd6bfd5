"""FSDP2 that splits within a node and copies over nodes: four gloo processes as two nodes of two."""

import os

import pytest
import torch
import torch.distributed as dist

from helpers.commands import spawn
from helpers.ranks import MUON, STEPS, differences, resume, run
from neobert.errors import ConfigError
from neobert.training.choices import choose_copies

SHARDS = "dataset.num_shards=4"
HYBRID = ["trainer.engine=fsdp2", "trainer.fsdp_hybrid=true", SHARDS, *MUON, "trainer.per_device_train_batch_size=2"]


def worker(rank, root):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=4)
    run(root / "hybrid", *HYBRID)
    resume(root, "again", "hybrid", *HYBRID)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybrid")
    one = [SHARDS, *MUON, "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4"]
    run(root / "one", *one)
    spawn(worker, (root,), 4)
    resume(root, "to one", "hybrid", *one)
    return root


@pytest.mark.parametrize("other", ["hybrid", "to one"])
def test_equals_one_process(root, other):
    loss, weight = differences(root, "one", other)
    print(f"{other}: losses {loss:.1e}, weights {weight:.1e}")
    assert loss <= 1e-6
    assert weight <= 1e-5


def test_resumed_is_equal_to_the_bit(root):
    assert differences(root, "hybrid", "again") == (0.0, 0.0)


def test_the_first_copy_alone_saves_its_optimizer_state(root):
    files = sorted((root / f"hybrid/checkpoints/{STEPS}/optimizer").iterdir())
    whole = next((root / f"one/checkpoints/{STEPS}/optimizer").iterdir()).stat().st_size
    assert [path.name for path in files] == ["rank00000.safetensors", "rank00001.safetensors"]
    assert all(path.stat().st_size < 0.52 * whole for path in files)


def test_how_many_copies():
    assert choose_copies(False, 4, {}) == 1
    assert choose_copies(True, 16, {"LOCAL_WORLD_SIZE": "8"}) == 2
    assert choose_copies(True, 8, {"LOCAL_WORLD_SIZE": "8"}) == 1
    for environment, message in ({"LOCAL_WORLD_SIZE": "3"}, "3 of 8 processes on this node"), ({}, "is not set"):
        with pytest.raises(ConfigError, match=message):
            choose_copies(True, 8, environment)
