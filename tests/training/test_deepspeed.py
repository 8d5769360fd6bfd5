"""DeepSpeed's ZeRO on two real processes (gloo): equal to one process, resumed to the bit; what it is asked to do, and refused.

The runs are skipped where deepspeed is not installed.
"""

import importlib.util
import json
import os

import pytest
import torch
import torch.distributed as dist

from helpers.commands import spawn
from helpers.ranks import HALF, MUON, STEPS, TWO, differences, resume, run
from helpers.runs import ROOT
from neobert.checkpoints.format import verify_checkpoint
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.deepspeed import read_zero
from neobert.config.load import load_config
from neobert.errors import CheckpointError, ConfigError
from neobert.training.metrics import read_metrics
from neobert.training.processes import Launch, plan_launch

STAGES = (0, 1, 2, 3)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (docs/distributed.md)"
)


def zero(stage):
    return ["trainer.engine=deepspeed", f"trainer.deepspeed_config_file={ROOT}/configs/deepspeed/zero{stage}.json"]


MORE = {  # name of a run: words
    "zero0 muon": [*zero(0), *MUON],
    "zero3 best": [
        *zero(3), "trainer.gradient_checkpointing=true", "trainer.load_best_model_at_end=true", "trainer.eval_steps=4",
        "trainer.mixed_precision=bf16", "trainer.metric_for_best_model=num_targets",  # which never gets better
    ],
}  # fmt: skip


def worker(rank, root):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    for stage in STAGES:
        run(root / f"zero{stage}", *zero(stage))
        resume(root, f"zero{stage} again", f"zero{stage}", *zero(stage))
    ends = {name: run(root / name, *words).values for name, words in MORE.items()}
    (root / f"ends{rank}.json").write_text(json.dumps(ends))
    run(root / "ddp", *TWO["ddp"], "trainer.max_steps=2", "trainer.save_steps=2")
    for name, words in {"zero1": TWO["ddp"], "zero2": zero(3), "ddp": zero(1)}.items():
        with pytest.raises(CheckpointError, match="pieces cannot be put together in another way"):
            run(root / name, f"trainer.resume_from_checkpoint={HALF if 'zero' in name else 2}", *words)
    resume(root, "zero0 to ddp", "zero0", *TWO["ddp"])
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    alone = "trainer.gradient_accumulation_steps=2"
    run(root / "one", alone)
    run(root / "one muon", alone, *MUON)
    spawn(worker, (root,), 2)
    return root


@needs_deepspeed
@pytest.mark.parametrize("two", [*(f"zero{stage}" for stage in STAGES), "zero0 muon", "zero0 to ddp"])
def test_two_processes_equal_one(root, two):
    loss, weight = differences(root, "one muon" if "muon" in two else "one", two)
    print(f"{two}: losses {loss:.1e}, weights {weight:.1e}")
    assert loss <= 1e-6
    assert weight <= 1e-5


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_is_equal_to_the_bit(root, stage):
    assert differences(root, f"zero{stage}", f"zero{stage} again") == (0.0, 0.0)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_are_ours(root, stage):
    """Whole weights, no pickles, optimizer state in equal parts from stage 1 on."""
    folder = root / f"zero{stage}/checkpoints/{STEPS}"
    assert verify_checkpoint(folder)["zero_stage"] == stage
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".yaml"}
    sizes = [path.stat().st_size for path in sorted((folder / "optimizer").iterdir())]
    assert len(sizes) == (2 if stage else 1)
    assert max(sizes) - min(sizes) <= 1000


@needs_deepspeed
def test_the_best_weights_are_loaded_into_pieces(root):
    """ZeRO 3 in bfloat16, recomputing: the run ends with the weights of its best evaluation, here the first."""
    rows = [row for row in read_metrics(root / "zero3 best/metrics.jsonl") if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert find_checkpoint(str(root / "zero3 best")).name == "4"
    for rank in (0, 1):
        loss = json.loads((root / f"ends{rank}.json").read_text())["zero3 best"]["loss"]
        assert loss == rows[0]["eval_loss"] != rows[-1]["eval_loss"]


@needs_deepspeed
def test_a_single_process_is_told_why_it_does_not_resume(root):
    with pytest.raises(CheckpointError, match="saved for ZeRO 2 on 2 processes, and this run has whole matrices on 1"):
        run(root / "zero2", f"trainer.resume_from_checkpoint={HALF}", "dataset.num_shards=null")


# --- what DeepSpeed is asked to do -----------


def asked(*words, **environment):
    return read_zero(load_config([], list(words)).config, environment)


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_who_asks_for_deepspeed(tmp_path):
    """Nobody, the configuration, Accelerate, or the `deepspeed` command; `use_deepspeed: false` wins over launchers."""
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert asked() is None
    assert asked("trainer.engine=deepspeed").stage == 2
    assert asked(**launched).stage == 3
    assert asked("use_deepspeed=false", **launched) is None
    assert asked(CROSS_RANK="0", CROSS_SIZE="1", LOCAL_SIZE="2").stage == 2
    own = write(tmp_path / "own.json", {"zero_optimization": {"stage": 1}})
    assert asked(**launched, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(own)).stage == 1
    with pytest.raises(ConfigError, match="deepspeed, but use_deepspeed is false"):
        asked("trainer.engine=deepspeed", "use_deepspeed=false")


def test_a_file_of_deepspeed(tmp_path):
    """What is ours is noted, `auto` is left out, and what is not built is refused."""

    def read(**values):
        file = write(tmp_path / "zero.json", values)
        return asked("trainer.engine=deepspeed", f"trainer.deepspeed_config_file={file}")

    found = read(
        bf16={"enabled": "auto"}, fp16={"enabled": False}, train_batch_size="auto", gradient_clipping=1.0,
        zero_optimization={"stage": 3, "stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": 1000,
                           "offload_param": {"device": "none"}},
    )  # fmt: skip
    assert found.options == {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}
    assert found.notes == [f"{tmp_path / 'zero.json'}: gradient_clipping is not used; trainer.gradient_clipping is"]
    for message, values in {
        "offload_optimizer: offloading is not part": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "the stage of ZeRO is 0, 1, 2 or 3, got '4'": {"zero_optimization": {"stage": 4}},
        "zero_optimization must be a mapping": {"zero_optimization": 2},
        "pipeline: not supported; there are": {"pipeline": {}},
    }.items():
        with pytest.raises(ConfigError, match=message):
            read(**values)
    (tmp_path / "broken.json").write_text("{")
    for message, name in {"not JSON": "broken.json", "No such file": "absent.json"}.items():
        with pytest.raises(ConfigError, match=message):
            asked("trainer.engine=deepspeed", f"trainer.deepspeed_config_file={tmp_path / name}")


def test_what_cannot_run_is_refused(tmp_path):
    two = write(tmp_path / "two.yaml", {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}})
    file = f"accelerate_config_file={two}"
    for message, words in {
        "muonclip cannot run under ZeRO stage 3": ["optimizer.name=muonclip"],
        "model.ngpt: renormalises matrices": ["model.ngpt=true"],
        "trainer.torch_compile: not under ZeRO stage 3": ["trainer.torch_compile=true"],
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config([], [file, *words])
        load_config([], [file, *words, "use_deepspeed=false"])
    warnings = load_config([], ["trainer.deepspeed_config_file=x.json"]).warnings
    assert any("deepspeed_config_file: has no effect without DeepSpeed" in warning for warning in warnings)


@pytest.mark.parametrize("stage", STAGES)
def test_example_files(stage):
    """DeepSpeed's own file and Accelerate's ask for the same stage."""
    own = load_config([], zero(stage))
    assert read_zero(own.config, {}).stage == stage
    assert not own.warnings
    theirs = load_config([], [f"accelerate_config_file={ROOT}/configs/accelerate/zero{stage}.yaml"])
    assert read_zero(theirs.config, {}).stage == stage
    assert plan_launch(theirs.config, None) == (Launch(2, kind="DEEPSPEED"), [])
