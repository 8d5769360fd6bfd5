"""A run's folder has one owner, loses nothing, and goes on after a kill at any moment."""

import json
import os
import shutil
import signal
import sys
import time

import pytest
from safetensors.torch import load_file

from helpers.checkpoints import content
from helpers.commands import run_neobert, start_function, start_neobert
from helpers.runs import TINY
from neobert.checkpoints.format import ALONE, list_steps, save_checkpoint, verify_checkpoint
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.load import load_config
from neobert.errors import CheckpointError, ConfigError, UserError
from neobert.tasks.contrastive import task as contrastive
from neobert.tasks.glue import task as glue
from neobert.tasks.pretraining import task as pretraining
from neobert.training import run_folder
from neobert.training.metrics import read_metrics
from neobert.training.run_folder import LOCK, SILENT_SECONDS, FolderLock, plan_start


def hold(folder):
    try:
        lock = FolderLock(folder)
    except UserError as error:
        sys.exit(str(error))
    print("held", lock.note, flush=True)
    time.sleep(600)


def holder(folder, count=1):
    """Processes that start at once and want a folder."""
    return [start_function(hold, folder) for _ in range(count)]


def test_one_of_many_that_start_at_once_gets_the_folder(tmp_path):
    """Also when the one before was killed: its lock is taken over, by one."""
    killed = None
    for _ in range(4):
        all_of_them = holder(tmp_path, 4)
        said = {}
        while len(said) < 3:
            said |= {one.pid: one.errors() for one in all_of_them if one.pid not in said and one.poll() is not None}
            time.sleep(0.01)
        (winner,) = [one for one in all_of_them if one.poll() is None]
        line = winner.stdout.readline()
        assert all(f"(process {winner.pid} on " in text and text.count("\n") == 1 for text in said.values())
        assert (f"took over {tmp_path} from process {killed} on" in line) == (killed is not None)
        winner.kill()
        winner.wait()
        killed = winner.pid
    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on {os.uname().nodename}"):
        FolderLock(tmp_path)
    lock.release()
    again = FolderLock(tmp_path)
    assert not again.note
    again.release()


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_holder_on_another_machine_or_without_locks_of_the_kernel(has_kernel, tmp_path, monkeypatch):
    """It is believed as long as it gives signs of life; a run that was taken for dead writes no checkpoint any more."""
    if not has_kernel:
        monkeypatch.setattr(
            run_folder.fcntl, "flock", lambda *arguments: (_ for _ in ()).throw(OSError(37, "no locks"))
        )
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": "1", "since": "then", "id": "x"}))
    with pytest.raises(ConfigError, match="process 7 on elsewhere, since then.*free 5 minutes after"):
        FolderLock(tmp_path)
    os.utime(path, times=(time.time() - SILENT_SECONDS - 60,) * 2)
    lock = FolderLock(tmp_path)
    assert "process 7 on elsewhere, which is gone" in lock.note
    if not has_kernel:
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path)
        dead = json.loads(path.read_text()) | {"start": "1"}  # another process has its number now
        path.write_text(json.dumps(dead))
        FolderLock(tmp_path).release()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 8, "start": "1", "since": "now", "id": "y"}))
    root = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="another run has taken the folder over"):
        save_checkpoint(root, content(1), ALONE, lock.check)
    lock.release()
    assert not list_steps(root)
    assert "elsewhere" in path.read_text()


def test_the_refusal_comes_before_the_data(tmp_path, empty_config):
    """In all tasks: what else is wrong, or takes long, is not looked at. The command prints one line."""
    folder = tmp_path / "out"
    folder.mkdir()
    lock = FolderLock(folder)
    (tmp_path / "text.jsonl").write_text("not JSON")
    words = [*TINY, f"trainer.output_dir={folder}", f"dataset.path={tmp_path / 'text.jsonl'}"]
    result = run_neobert("pretrain", empty_config, *words)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert f"another run is writing in {folder} (process {os.getpid()} on " in result.stderr
    more = ["glue.task_name=rte", "glue.allow_random_weights=true", "contrastive.allow_random_weights=true"]
    for task, module in (("glue", glue), ("contrastive", contrastive)):
        own = [word for word in more if word.startswith(task)]
        with pytest.raises(ConfigError, match="another run is writing in"):
            module.run(load_config([], [f"tokenizer.path={tmp_path}", *words[-2:], *own], task))
    lock.release()
    assert [path.name for path in folder.iterdir()] == [LOCK]


# --- nothing is lost -----------


def snapshot(folder):
    """Every file of a folder with its content, without what is there for a moment."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (LOCK, "latest", "best")
    }


@pytest.fixture
def go(tmp_path):
    """Train in this process, in folder `name`."""

    def run(name, *words):
        base = [*TINY, "trainer.save_steps=2", "trainer.eval_steps=2", "scheduler.total_steps=12"]
        finished = pretraining.run(load_config([], [*base, f"trainer.output_dir={tmp_path / name}", *words]))
        return finished.folder

    return run


def losses(folder):
    return [(r["kind"], r["step"], r.get("loss", r.get("eval_loss"))) for r in read_metrics(folder / "metrics.jsonl")]


def test_a_second_run_is_refused_and_harms_nothing(go, tmp_path):
    """The first one ends as if it had been alone; `benchmarks/two_runs.py` does this 50 times."""
    words = [*TINY, "trainer.save_steps=2", "trainer.eval_steps=2", "scheduler.total_steps=12", "trainer.max_steps=12"]
    words += ["trainer.save_total_limit=1", f"trainer.output_dir={tmp_path / 'out'}"]
    (tmp_path / "c.yaml").write_text("task: pretraining\n")
    first = start_neobert("run", tmp_path / "c.yaml", *words, discard=True)
    while first.poll() is None and not ((tmp_path / "out" / LOCK).exists() and (tmp_path / "out" / LOCK).read_text()):
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=rf"\(process {first.pid} on "):
        go("out", "trainer.max_steps=12", "trainer.save_total_limit=1")
    assert first.wait() == 0
    whole = go("whole", "trainer.max_steps=12", "trainer.save_total_limit=1")
    assert losses(tmp_path / "out") == losses(whole)
    assert list_steps(tmp_path / "out/checkpoints") == list_steps(whole / "checkpoints")


def test_earlier_runs_are_numbered_and_kept(go, tmp_path):
    """So is what an older version left in `previous` without a number."""
    old = tmp_path / "out/previous/checkpoints/900000"
    old.mkdir(parents=True)
    (old / "state.json").write_text("{}")
    runs = [snapshot(go("out", f"seed={seed}", "trainer.max_steps=2")) for seed in range(3)]
    assert (old / "state.json").read_text() == "{}"
    for number in (1, 2):
        moved = snapshot(tmp_path / f"out/previous/{number}")
        assert moved == {name: data for name, data in runs[number - 1].items() if not name.startswith("previous/")}
    assert list_steps(tmp_path / "out/checkpoints") == [2]


def test_a_checkpoint_from_elsewhere_begins_a_new_run(go, tmp_path):
    """The run that lives there is moved aside whole, or refused; the new one goes on to the bit."""
    other = go("other", "seed=1", "trainer.max_steps=4")
    home = go("home", "trainer.max_steps=6")
    before = snapshot(home)
    outer = f"trainer.resume_from_checkpoint={other / 'checkpoints/2'}"
    with pytest.raises(ConfigError, match="holds a run"):
        go("home", "seed=1", "trainer.max_steps=4", outer, "trainer.overwrite_output_dir=false")
    assert snapshot(home) == before
    go("home", "seed=1", "trainer.max_steps=4", outer)
    assert snapshot(home / "previous/1") == before
    assert list_steps(home / "checkpoints") == [4]
    assert losses(home) == [row for row in losses(other) if row[1] > 2]
    whole, again = (load_file(folder / "checkpoints/4/model.safetensors") for folder in (other, home))
    assert all((whole[name] == again[name]).all() for name in whole)


def test_going_back_moves_later_steps_aside(go):
    """They do not count for what is kept, and what the log said of them is kept with them."""
    folder = go("out", "trainer.max_steps=8", "trainer.save_total_limit=3")
    assert list_steps(folder / "checkpoints") == [4, 6, 8]
    before, log = snapshot(folder), (folder / "metrics.jsonl").read_bytes()
    go("out", "trainer.max_steps=6", "trainer.save_total_limit=3", "trainer.resume_from_checkpoint=4")
    assert list_steps(folder / "checkpoints") == [4, 6]
    moved = snapshot(folder / "previous/1")
    assert {name.split("/")[1] for name in moved if name.startswith("checkpoints/")} == {"6", "8"}
    assert all(data == before[name] for name, data in moved.items())
    assert moved["metrics.jsonl"] == log
    assert find_checkpoint(str(folder)).name == "6"
    assert [row[1] for row in losses(folder) if row[0] == "train"] == [1, 2, 3, 4, 5, 6]


def test_started_again_before_the_first_checkpoint(go):
    """Every step stands in the log once."""
    folder = go("out", "trainer.max_steps=3", "trainer.save_strategy=no", "trainer.save_model=false")
    assert [row[1] for row in losses(folder)] == [1, 2, 2, 3, 3]
    go("out", "trainer.max_steps=4", "trainer.resume_from_checkpoint=latest")
    assert [row[1] for row in losses(folder)] == [1, 2, 2, 3, 4, 4]


# --- killed at any moment -----------

CALLS = ("replace", "mkdir", "unlink", "rmdir", "fsync")


def killed_at(number, work):
    """Run `work` in a fork that ends at its `number`-th call that changes the disk; whether it got so far."""
    pid = os.fork()
    if not pid:
        left = number

        def wrap(call):
            def counted(*arguments, **keywords):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **keywords)

            return counted

        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def kill_everywhere(folder, make, work, check):
    """`check` what is there after `work` on `make(folder)` was killed at each of its calls; returns how many there were."""
    number, is_killed = 0, True
    while is_killed:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        is_killed = killed_at(number, work)
        check(is_killed)
    return number - 1


def made(folder):
    """Steps 1 to 3, and what else a run leaves."""
    for step in (1, 2, 3):
        save_checkpoint(folder / "checkpoints", content(step))
    (folder / "trackers").mkdir()
    for name in ("metrics.jsonl", "report.html", "trackers/events", "result.json"):
        (folder / name).write_text(f"{name}\n" * 10)


@pytest.mark.parametrize("resume", [None, "1"])
def test_a_move_that_is_killed_loses_nothing(resume, tmp_path):
    """The next start finds the run as it was, or all that was moved under a number."""
    from neobert.training.run_folder import OpenRun, enter_run

    folder = tmp_path / "out"

    def work():
        checkpoint, in_the_way, _ = plan_start(folder, resume, True)
        enter_run(OpenRun(folder, checkpoint, {}, in_the_way, []))

    def check(is_killed):
        found, _, _ = plan_start(folder, "latest", True)
        now = snapshot(folder)
        back = {name.removeprefix("previous/1/"): data for name, data in now.items()}
        assert back == whole
        is_moved = (folder / "previous/1").is_dir()
        assert is_moved or found.name == "3"
        assert is_moved or now == whole
        assert is_killed or is_moved
        for step in list_steps(folder / "checkpoints"):
            verify_checkpoint(folder / "checkpoints" / str(step))

    made(folder)
    whole = snapshot(folder)
    assert kill_everywhere(folder, made, work, check) > 8


def test_a_step_saved_again_is_always_there(tmp_path):
    """Killed at any moment, the old one or the new one is whole."""
    root = tmp_path / "checkpoints"

    def make(root):
        save_checkpoint(root, content(1))
        save_checkpoint(root, content(2))

    def check(is_killed):
        from neobert.checkpoints.format import clean_leftovers

        clean_leftovers(root)
        assert list_steps(root) == [1, 2]
        assert find_checkpoint("latest", root, to_resume=True).name == "2"
        verify_checkpoint(root / "2")
        assert not list(root.glob(".*"))

    assert kill_everywhere(root, make, lambda: save_checkpoint(root, content(2)), check) > 12


# --- the best is what a run ends with -----------

BEST = [
    "trainer.load_best_model_at_end=true",
    "optimizer.lr=0.3",
    "scheduler.warmup_steps=0",
    "trainer.save_total_limit=1",
]


def test_the_run_goes_on_from_its_last_step(go):
    """It ended with its best; with more steps it equals, to the bit, the run that had them from the beginning."""
    folder = go("out", *BEST, "trainer.max_steps=6")
    root = folder / "checkpoints"
    best = min((value, step) for kind, step, value in losses(folder) if kind == "eval")[1]
    assert best < 6
    assert list_steps(root) == [best, 6]
    assert find_checkpoint(str(folder)).name == find_checkpoint("latest", root).name == str(best)
    before = losses(folder)
    go("out", *BEST, "trainer.max_steps=6", "trainer.resume_from_checkpoint=latest")  # nothing is left to do
    assert losses(folder) == before
    assert find_checkpoint(str(folder)).name == str(best)
    go("out", *BEST, "trainer.max_steps=10", "trainer.resume_from_checkpoint=latest")
    whole = go("whole", *BEST, "trainer.max_steps=10")
    assert losses(folder) == losses(whole)
    weights = [load_file(one / "checkpoints/10/model.safetensors") for one in (folder, whole)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_a_best_checkpoint_that_is_gone_is_no_disaster(go):
    """The run ends with its last step, and another best is looked for when it goes on."""
    folder = go("out", *BEST, "trainer.max_steps=4")
    best = find_checkpoint(str(folder))
    assert best.name == "2"
    shutil.rmtree(best)
    go("out", *BEST, "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest")
    state = json.loads((folder / "checkpoints/8/state.json").read_text())
    assert state["best_step"] in (6, 8)
    assert find_checkpoint(str(folder)).name == str(state["best_step"])
