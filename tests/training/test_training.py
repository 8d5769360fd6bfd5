"""The loop is exact over accumulation, stops before a bad update, and checkpoints are whole or absent."""

import errno
import json
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from helpers.checkpoints import content
from helpers.commands import spawn
from helpers.host_reads import HostReads
from helpers.models import VOCABULARY, build
from helpers.runs import TOKENIZER
from neobert import files
from neobert.checkpoints import format as checkpoint
from neobert.checkpoints.format import (
    ALONE,
    clean_leftovers,
    list_steps,
    load_weights,
    prune,
    save_checkpoint,
    verify_checkpoint,
)
from neobert.checkpoints.locate import find_checkpoint
from neobert.data.batch import Batch
from neobert.data.tokenizer import load_tokenizer, save_tokenizer
from neobert.errors import CheckpointError, UserError
from neobert.optim.build import OptimizerSettings, build_optimizer
from neobert.training.loop import Interrupt, Setup, TrainState, Window, train, train_step
from neobert.training.resume import Saver
from neobert.training.runtime import Runtime, total_norm

RUNTIME = Runtime(device=torch.device("cpu"))


def batches(count, rows, seed=0):
    """`count` batches of packed rows; the number of targets differs from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(5, VOCABULARY, (rows, 32), generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.1 * (number % 4), ids, -100)
        targets = int((labels != -100).sum())
        made.append(Batch(ids, labels, None, torch.full((rows,), 32), targets, ids.numel(), 0))
    return made


def window(micro):
    return Window(micro, sum(batch.num_targets for batch in micro), 0, 0)


def optimizer_of(model):
    return build_optimizer(model.named_parameters(), OptimizerSettings("adamw", lr=0.01, betas=(0.9, 0.99)))


def test_accumulation_is_exact():
    """8 microbatches of one row = one microbatch of 8 rows, though their target counts differ, and some have none."""
    small = batches(8, 1)
    joined = Batch(
        torch.cat([b.input_ids for b in small]), torch.cat([b.labels for b in small]), None, torch.full((8,), 32),
        sum(b.num_targets for b in small), 256, 0,
    )  # fmt: skip
    results, weights = [], []
    for micro in (small, [joined]):
        model = build()
        setup = Setup(model, torch.optim.SGD(model.parameters(), lr=1.0), RUNTIME, lr=lambda step: 0.01)
        results.append(train_step(setup, window(micro), 0))
        weights.append(model.state_dict())
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_gradient():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    setup = Setup(model, optimizer, RUNTIME, lr=lambda step: 1.0, gradient_clipping=1e-3)
    result = train_step(setup, window(batches(2, 2)), 0)
    moved = torch.stack([(p.detach() - before[name]).norm() for name, p in model.named_parameters()]).norm()
    assert result.grad_norm > 1e-3
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_a_norm_in_one_launch(monkeypatch):
    """The same norm off the CPU, by as many launches for many tensors as for few; a bad element shows in it."""
    tensors = [torch.randn(40, 3), torch.randn(7), torch.tensor(2.0), torch.empty(0, 4)]
    exact = torch.cat([x.double().flatten() for x in tensors]).norm().float()
    torch.testing.assert_close(total_norm(tensors), exact)
    monkeypatch.setattr("neobert.training.runtime.wants_few_launches", lambda tensor: True)
    torch.testing.assert_close(total_norm(tensors), exact)
    launches = []
    for many in (tensors, 30 * tensors):
        with HostReads() as reads:
            total_norm(many)
        assert not reads.found
        launches.append(reads.launches.total())
    assert launches[0] == launches[1] < 15
    tensors[1][3] = torch.nan
    assert total_norm(tensors).isnan()


def test_a_bad_loss_stops_before_the_update():
    model = build()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    before = {name: p.clone() for name, p in model.named_parameters()}
    state, data = TrainState(), iter([batches(2, 2)[1:]])
    setup = Setup(model, optimizer_of(model), RUNTIME, lr=lambda step: 0.01)
    with pytest.raises(UserError, match="loss became nan at step 1, microbatch 0"):
        train(setup, lambda: next(data), state, 5, [])
    assert state.step == 0
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in model.named_parameters())


# --- checkpoints -----------


def test_a_checkpoint_is_verified(tmp_path):
    save_checkpoint(tmp_path, content(5))
    folder = save_checkpoint(tmp_path, content(10))
    state = verify_checkpoint(folder)
    assert (state["step"], state["num_tokens"]) == (10, 7)
    assert load_weights(folder)["w"][0] == 10
    assert (tmp_path / "latest").read_text() == "10\n"
    for name in [*state["sha256"], "state.json"]:
        path, original = folder / name, (folder / name).read_bytes()
        middle = len(original) // 2
        for damaged in (original[:middle], original[:middle] + b"\x07" + original[middle + 1 :], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged|missing") as error:
                verify_checkpoint(folder)
            assert name.rpartition("/")[2] in str(error.value)
            assert "the checkpoint before it is step 5" in str(error.value)
            path.write_bytes(original)
    verify_checkpoint(folder)


def test_selectors(tmp_path):
    root = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="there is none"):
        find_checkpoint("latest", root)
    for step in (5, 10):
        save_checkpoint(root, content(step))
    assert find_checkpoint("latest", root).name == "10"
    assert find_checkpoint("5", root).name == "5"
    assert find_checkpoint(str(tmp_path)).name == find_checkpoint(str(root)).name == "10"
    assert find_checkpoint(str(root / "5")).name == "5"
    (root / "latest").unlink()
    assert find_checkpoint("latest", root).name == "10"
    with pytest.raises(CheckpointError, match="there are: 5, 10"):
        find_checkpoint("7", root)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(str(tmp_path / "absent"))


def test_retention_keeps_the_best_and_the_newest(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, content(step))
    assert prune(tmp_path, None, set()) == []
    assert prune(tmp_path, 2, {2}) == [1, 3, 4]
    assert list_steps(tmp_path) == [2, 5]
    assert prune(tmp_path, 1, {2}) == []


def test_a_failing_write_keeps_the_last_good_checkpoint(tmp_path):
    """Every write beyond a size limit fails, as on a full disk."""
    save_checkpoint(tmp_path, content(1))
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old_limit[1]))
        with pytest.raises(CheckpointError, match="cannot save step 2: .*the checkpoint of step 1 is intact"):
            save_checkpoint(tmp_path, content(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "latest"]
    verify_checkpoint(find_checkpoint("latest", tmp_path))


WRITES = {checkpoint: ("save_file", "save_arrays", "write_json", "write_text", "sync"), files: ("sync",)}


class FailingWrites:
    """The writes of a save, of which the one that `left` counts down to fails, as on a full disk."""

    def __init__(self):
        self.left = 0
        for module, names in WRITES.items():
            for name in names:
                setattr(module, name, self.wrap(getattr(module, name)))
        os.replace = self.wrap(os.replace)

    def wrap(self, write):
        def attempt(*arguments, **keywords):
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*arguments, **keywords)

        return attempt


def save_with_failures(rank, folder):
    """In two processes, one after the other the one that fails: every write of a save fails once."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def gather(value):
        values = [None, None]
        dist.all_gather_object(values, value)
        return values

    group, writes = checkpoint.ProcessGroup(rank, 2, gather), FailingWrites()
    for victim in (0, 1):
        root, writes.left = folder / f"checkpoints{victim}", 0
        save_checkpoint(root, content(1), group)
        new = replace(content(2), save_beside=writes.wrap(content(2).save_beside))
        number, message = 0, "start"
        while message:
            number, message = number + 1, ""
            writes.left = number if rank == victim else 0
            try:
                save_checkpoint(root, new, group, after=lambda: checkpoint.write_text(root / "best", "2\n"))  # noqa: B023
            except CheckpointError as error:
                message = str(error)
            assert len(set(gather(message))) == 1
            expected = "cannot save step 2: No space left on device; the checkpoint of step"
            assert not message or expected in message, message
            if rank == 0:
                for step in list_steps(root):
                    verify_checkpoint(root / str(step))
                assert list_steps(root)[0] == 1
                assert find_checkpoint("latest", root).name in ("1", "2")
                assert not list(root.glob(".*"))
            gather(None)
        assert number > (20, 6)[victim]
        assert find_checkpoint("latest", root).name == "2"
    writes.left = 0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # less than tokenizer.json
    hf_tokenizer = load_tokenizer("", str(TOKENIZER))
    big = replace(content(3), save_beside=lambda path: save_tokenizer(hf_tokenizer, path))
    with pytest.raises(
        CheckpointError, match="cannot save step 3: File too large .*; the checkpoint of step 2 is intact"
    ):
        save_checkpoint(root, big, group)
    assert rank or not list(root.glob(".*"))

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "result.json")

    with pytest.raises(UserError, match="^result.json: the disk is full$"):
        replace(RUNTIME, rank=rank, world_size=2).on_main(full)
    interrupt = Interrupt()
    interrupt.failure = lambda: UserError("metrics.jsonl: the disk is full") if rank == 1 else None
    with pytest.raises(UserError, match="^metrics.jsonl: the disk is full$"):
        interrupt.act(TrainState(), replace(RUNTIME, rank=rank, world_size=2))
    dist.destroy_process_group()


def test_every_write_of_a_save_may_fail(tmp_path):
    """On two processes, down to the last pointer and the tokenizer: what was there is whole, what is new is whole or absent,
    and both say the same."""
    spawn(save_with_failures, (tmp_path,), 2)


def test_a_save_in_the_background_fails_where_the_loop_looks(tmp_path):
    """The copy is saved, not what came after it; an error is kept until somebody waits."""
    saver = Saver(tmp_path / "checkpoints", ALONE)
    saver.submit(content(1), lambda: None)
    saver.wait()
    verify_checkpoint(tmp_path / "checkpoints/1")
    (tmp_path / "checkpoints/.2.tmp").write_text("in the way")
    os.chmod(tmp_path / "checkpoints/.2.tmp", 0)
    saver.submit(content(2), lambda: None)
    with pytest.raises(CheckpointError, match="cannot save step 2: .*the checkpoint of step 1 is intact"):
        saver.wait()
    saver.close()


def test_leftovers_of_a_crash_are_removed(tmp_path):
    save_checkpoint(tmp_path, content(1))
    (tmp_path / ".2.tmp").mkdir()
    (tmp_path / ".2.tmp/model.safetensors").write_text("half")
    clean_leftovers(tmp_path)
    assert list_steps(tmp_path) == [1]
    assert not (tmp_path / ".2.tmp").exists()


def test_state_round_trip():
    state = TrainState(step=3, num_tokens=9, best_metric=1.5, best_step=2, stop_reason="x")
    other = TrainState()
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert other == TrainState(step=3, num_tokens=9, best_metric=1.5, best_step=2)
