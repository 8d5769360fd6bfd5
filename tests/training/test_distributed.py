"""Whole runs on two real processes (gloo): equal to one process, whatever the engine; saved by any, resumed by any.

One pair of processes makes all runs on two ranks, so that starting them is paid once. One process with two lanes and twice the
accumulation has the same batches as two.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from helpers.commands import spawn, start_neobert
from helpers.ranks import BF16, MUON, NGPT, STEPS, TWO, differences, resume, run
from helpers.runs import ROOT, TINY
from neobert.checkpoints.format import list_steps, verify_checkpoint
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.load import load_config
from neobert.errors import CheckpointError, ConfigError, UserError
from neobert.training import run_folder
from neobert.training.choices import choose_engine
from neobert.training.metrics import read_metrics
from neobert.training.processes import Launch, plan_launch

RESUMED = {  # name of a run on two ranks: (whose checkpoint, words)
    "ddp again": ("ddp", TWO["ddp"]),
    "fsdp2 again": ("fsdp2", TWO["fsdp2"]),
    "fsdp2 muon again": ("fsdp2 muon", TWO["fsdp2 muon"]),
    "one to ddp": ("one", TWO["ddp"]),
    "one to fsdp2": ("one", TWO["fsdp2"]),
    "ddp to fsdp2": ("ddp", TWO["fsdp2"]),
}


def worker(rank, root):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    num_open = []
    for name, words in TWO.items():
        run(root / name, *words)
    for name, (source, words) in RESUMED.items():
        resume(root, name, source, *words)
        num_open.append([len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")])
    (root / f"open{rank}.json").write_text(json.dumps(num_open))
    with pytest.raises(UserError, match="cannot share equally"):
        run(root / "three lanes", "dataset.num_shards=3")
    run_folder.SHARED_SECONDS = 0.5
    os.makedirs(root / f"machine{rank}")
    os.chdir(root / f"machine{rank}")
    with pytest.raises(ConfigError, match="1 of 2 processes do not see out of process 0"):
        run("out")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of all runs, by name."""
    root = tmp_path_factory.mktemp("runs")
    alone = "trainer.gradient_accumulation_steps=2"
    for name, words in {"one": [], "one muon": MUON, "one ngpt": NGPT, "one bf16": BF16}.items():
        run(root / name, alone, *words)
    spawn(worker, (root,), 2)
    for source in ("ddp", "fsdp2", "fsdp2 muon"):
        words = [alone, "dataset.num_shards=null", *(MUON if "muon" in source else [])]
        resume(root, f"{source} to one", source, *words)
    return root


PAIRS = [("one", "ddp"), ("one", "fsdp2"), ("one muon", "fsdp2 muon"), ("one ngpt", "fsdp2 ngpt")]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_two_processes_equal_one(root, one, two):
    """Losses of training and evaluation, and weights after all steps, with clipping."""
    loss, weight = differences(root, one, two)
    print(f"{two}: losses {loss:.1e}, weights {weight:.1e}")
    assert loss <= 1e-6
    assert weight <= 1e-5
    if "muon" in one:
        assert sum(row.get("qk_clipped_heads", 0) for row in read_metrics(root / two / "metrics.jsonl")) > 4


@pytest.mark.parametrize(("one", "two"), [("one bf16", "fsdp2 bf16"), ("one", "ddp hook")])
def test_bfloat16_between_processes(root, one, two):
    """Weights gathered in it, gradients summed in float32 (FSDP2); gradients summed in it (DDP): equal up to its rounding."""
    loss, weight = differences(root, one, two)
    print(f"{two}: losses {loss:.1e}, weights {weight:.1e}")
    assert 0 < loss <= 2e-3
    assert weight <= 1e-2


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2 muon"])
def test_resumed_on_its_engine_is_equal_to_the_bit(root, engine):
    assert differences(root, engine, f"{engine} again") == (0.0, 0.0)


@pytest.mark.parametrize(
    ("whole", "resumed"),
    [("one", "ddp to one"), ("one", "fsdp2 to one"), ("one muon", "fsdp2 muon to one"), ("ddp", "one to ddp"),
     ("fsdp2", "one to fsdp2"), ("fsdp2", "ddp to fsdp2")],
)  # fmt: skip
def test_resumed_on_another_number_of_processes_or_engine(root, whole, resumed):
    loss, weight = differences(root, whole, resumed)
    print(f"{resumed}: losses {loss:.1e}, weights {weight:.1e}")
    assert loss <= 1e-6
    assert weight <= 1e-5


def test_optimizer_state_is_split_as_the_engine_splits_it(root):
    """FSDP2: every process writes half of it, and no more; DDP: one process writes it; weights are whole in both."""
    sizes = {
        name: [path.stat().st_size for path in sorted((root / name / f"checkpoints/{STEPS}/optimizer").iterdir())]
        for name in ("one", "ddp", "fsdp2")
    }
    assert sizes["ddp"] == sizes["one"]
    assert len(sizes["fsdp2"]) == 2
    assert all(size < 0.52 * sizes["one"][0] for size in sizes["fsdp2"])
    assert (
        load_file(root / f"fsdp2/checkpoints/{STEPS}/model.safetensors").keys()
        == load_file(root / f"one/checkpoints/{STEPS}/model.safetensors").keys()
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_runs_in_one_process_group_leave_nothing_open(root, rank):
    """Files and threads of a process behind each of several runs, as a suite has them."""
    files, threads = zip(*json.loads((root / f"open{rank}.json").read_text()), strict=True)
    assert max(files) <= files[0] + 2, files
    assert max(threads) <= threads[0] + 2, threads


@pytest.mark.parametrize("missing", ["optimizer/rank00001.safetensors", "data_rank00001.json"])
def test_a_missing_file_of_a_rank_is_named(root, tmp_path, missing):
    folder = shutil.copytree(root / f"fsdp2/checkpoints/{STEPS}", tmp_path / str(STEPS))
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing}: missing"):
        verify_checkpoint(folder)


# --- the launcher -----------


def start(folder, *words):
    (folder / "config.yaml").write_text("task: pretraining\n")
    words = [*TINY, *words, f"trainer.output_dir={folder / 'out'}", "trainer.max_steps=100000", "trainer.save_steps=2"]
    return start_neobert("run", folder / "config.yaml", *words, "--nproc", "2", unbuffered=True)


def until_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    pytest.fail(process.errors())


def test_a_process_that_is_killed_ends_all(tmp_path):
    """The culprit is named, the exit code is its own, and what was saved is whole."""
    process = start(tmp_path)
    until_step(process, 20)  # some checkpoint is whole by then
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(int(pid) for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert f"process 1 of 2 (pid {victim}) was killed by SIGKILL; the others were ended" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    verify_checkpoint(find_checkpoint("latest", tmp_path / "out/checkpoints"))


def test_a_signal_to_the_launcher_saves(tmp_path):
    process = start(tmp_path)
    until_step(process, 4)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGUSR1
    step = list_steps(tmp_path / "out/checkpoints")[-1]
    assert f"stopped at step {step}: received SIGUSR1" in output
    state = verify_checkpoint(tmp_path / f"out/checkpoints/{step}")
    assert (state["world_size"], state["engine"]) == (2, "ddp")
    assert json.loads((tmp_path / "out/environment.json").read_text())["processes"].startswith("2, DDP")


# --- what to launch, and what is refused -----------


def plan(tmp_path, nproc=None, words=(), **values):
    """What a file of Accelerate with these values launches."""
    path = tmp_path / "accelerate.yaml"
    path.write_text(json.dumps(values))
    return plan_launch(load_config([], [f"accelerate_config_file={path}", *words]).config, nproc)


def test_accelerate_files_say_what_to_launch(tmp_path, monkeypatch):
    assert plan(tmp_path, distributed_type="NO", num_processes=1) == (None, [])
    assert plan(tmp_path, distributed_type="MULTI_CPU", num_processes=2) == (Launch(2, kind="MULTI_CPU"), [])
    assert plan(tmp_path, 3, distributed_type="MULTI_GPU", num_processes=2) == (Launch(3, kind="MULTI_GPU"), [])
    assert plan(tmp_path, mixed_precision="fp16", distributed_type="FSDP", num_processes=4) == (
        Launch(4, kind="FSDP"),
        [f"{tmp_path / 'accelerate.yaml'}: mixed_precision fp16 is not used; trainer.mixed_precision is"],
    )
    several = {"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2, "machine_rank": 1}
    address = {"main_process_ip": "10.0.0.1", "main_process_port": 29400}
    assert plan(tmp_path, **several, **address)[0] == Launch(8, 2, 1, "10.0.0.1:29400", "MULTI_GPU")
    for message, values in {
        "several machines need main_process_ip": several,
        "15 processes are not the same number on 2 machines": several | {"num_processes": 15},
        "num_processes must be a number from 1, got 'two'": {"num_processes": "two"},
        "distributed_type TPU; it can be NO, MULTI_CPU": {"distributed_type": "TPU"},
    }.items():
        with pytest.raises(ConfigError, match=message):
            plan(tmp_path, **values)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan(tmp_path, distributed_type="MULTI_CPU", num_processes=2) == (None, [])
    with pytest.raises(ConfigError, match="already one of several"):
        plan(tmp_path, 2)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_example_files_of_accelerate(path):
    launch, notes = plan_launch(load_config([], [f"accelerate_config_file={path}"]).config, None)
    assert launch is not None
    assert not notes
    assert launch.num_machines == (2 if "machines" in path.name else 1)


def test_the_slurm_script_starts_a_run():
    """The shell takes it, torchrun takes its words, and what it runs is a command of ours."""
    script = ROOT / "configs/slurm/pretrain.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text().replace("\\\n", " ")
    command = next(line for line in text.splitlines() if line.startswith("srun torchrun"))
    found = get_args_parser().parse_args(command.replace('"$SLURM_JOB_NUM_NODES"', "2").split()[2:])
    assert (found.nnodes, found.module, found.training_script) == ("2", True, "neobert")
    assert found.signals_to_handle == "SIGTERM,SIGINT,SIGUSR1"
    assert found.training_script_args[0] == "run"
    load_config([], found.training_script_args[2:-1])


def test_engines():
    """What runs, by what was asked for, the number of processes, and the launcher."""
    fsdp = {"ACCELERATE_USE_FSDP": "true"}
    assert choose_engine("auto", 1, False, {}) == ("plain", "")
    assert choose_engine("fsdp2", 1, False, {}) == ("plain", "trainer.engine: fsdp2 is for several processes")
    assert choose_engine("auto", 1, False, fsdp) == ("plain", "FSDP was launched, which is for several processes")
    assert choose_engine("auto", 2, False, {}) == ("ddp", "")
    assert choose_engine("auto", 2, False, fsdp) == ("fsdp2", "launched for it")
    assert choose_engine("fsdp2", 2, False, {}) == ("fsdp2", "")
    with pytest.raises(ConfigError, match="launched for FSDP"):
        choose_engine("ddp", 2, False, fsdp)
    assert choose_engine("auto", 2, True, {}) == ("deepspeed", "launched for it")
    assert choose_engine("deepspeed", 1, True, {}) == ("plain", "trainer.engine: deepspeed is for several processes")
    with pytest.raises(ConfigError, match="launched for DeepSpeed; use auto or deepspeed"):
        choose_engine("fsdp2", 2, True, {})
