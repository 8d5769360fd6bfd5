"""A task in a file of its own, as the examples have one: it trains, is killed, and goes on exactly."""

import os
import runpy
import signal
from pathlib import Path

import pytest

from neobert.checkpoints.format import list_steps
from neobert.training.metrics import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples/own_task/vowels.py"
WORDS = [
    "trainer.use_cpu=true", "trainer.max_steps=8", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1",
    "trainer.save_steps=3", "trainer.save_in_background=false", "optimizer.lr=0.01", "scheduler.warmup_steps=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Words and their shares of vowels, made by a rule."""
    words = ["".join("baeioukdrn"[(number * k) % 10] for k in range(2, 9)) for number in range(1, 41)]
    path = tmp_path_factory.mktemp("own") / "vowels.tsv"
    path.write_text("".join(f"{word}\t{sum(c in 'aeiou' for c in word) / len(word):.3f}\n" for word in words))
    return path


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]


def test_it_learns_and_goes_on_exactly_after_a_kill(table, tmp_path):
    run = runpy.run_path(str(EXAMPLE))["run"]
    run(str(table), *WORDS, f"trainer.output_dir={tmp_path / 'whole'}")
    whole = losses(tmp_path / "whole")
    assert len(whole) == 8
    assert whole[-1] < whole[0]
    folder = tmp_path / "killed"
    words = [*WORDS, f"trainer.output_dir={folder}", "trainer.resume_from_checkpoint=latest"]
    pid = os.fork()
    if not pid:
        from neobert.training.reporting import Log

        write = Log.__call__

        def kill_at_five(log, state, result):
            write(log, state, result)
            if state.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Log.__call__ = kill_at_five
        run(str(table), *words)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert list_steps(folder / "checkpoints") == [3]
    assert run(str(table), *words).state.step == 8
    assert losses(folder) == whole


def test_a_line_that_is_not_one_is_named(table, tmp_path):
    from neobert.errors import DataError

    (tmp_path / "bad.tsv").write_text("no number here\n")
    with pytest.raises(DataError, match="bad.tsv: not lines of text, tab, number"):
        runpy.run_path(str(EXAMPLE))["run"](str(tmp_path / "bad.tsv"), *WORDS, f"trainer.output_dir={tmp_path / 'out'}")
