"""The length of a run and of its steps, resumed with other ones; what a failure leaves; what the log says of it."""

import errno
import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch

from helpers.commands import run_neobert, start_function, start_neobert
from helpers.pairs import CONTRASTIVE_TINY, made_pairs, write_rows
from helpers.runs import TEXT, TINY
from helpers.uneven import UNEVEN, run_noting, write_uneven
from neobert.checkpoints.format import list_steps, load_weights, verify_checkpoint
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.load import load_config
from neobert.data.tokenizer import load_tokenizer, text_tokenizer
from neobert.errors import DataError, UserError
from neobert.ranks import Ranks
from neobert.tasks.contrastive import task as contrastive
from neobert.tasks.pretraining import checks as verify_resume
from neobert.tasks.pretraining import task as pretraining
from neobert.tasks.pretraining.data import build_data
from neobert.training.metrics import read_metrics

EPOCH = ["trainer.num_train_epochs=2", "dataset.num_shards=2", "trainer.gradient_accumulation_steps=2"]


@pytest.fixture(scope="module")
def epochs(tmp_path_factory):
    """(folder, words of the corpus, rows of every microbatch) of a run of two epochs with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("length")
    text = write_uneven(folder / "text")
    _, noted = run_noting(text, f"trainer.output_dir={folder / 'whole'}", *EPOCH, "trainer.save_steps=14")
    return folder, text, noted


CHANGES = {
    "the same": [],
    "batch x 2": ["trainer.per_device_train_batch_size=4"],
    "batch x 0.5": ["trainer.per_device_train_batch_size=1"],
    "accumulation x 2": ["trainer.gradient_accumulation_steps=4"],
    "accumulation x 0.5": ["trainer.gradient_accumulation_steps=1"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_epoch_is_read_once_whatever_the_steps_are(change, epochs, tmp_path):
    """Resumed in the middle: every document of both epochs once, and the learning rate falls to its floor without a jump."""
    folder, text, noted = epochs
    shutil.copytree(folder / "whole/checkpoints/14", tmp_path / "checkpoints/14")
    words = [*EPOCH, *CHANGES[change], f"trainer.output_dir={tmp_path}", "trainer.resume_from_checkpoint=14"]
    run, behind = run_noting(text, *words)
    assert Counter(chain(*noted[: 2 * 14], *behind)) == Counter(chain(*noted))
    assert run.state.stop_reason is None
    assert all(behind[-1:])
    rows = [row for row in read_metrics(folder / "whole/metrics.jsonl") if row["step"] <= 14]
    rates = [row["lr"] for row in [*rows, *read_metrics(tmp_path / "metrics.jsonl")] if row["kind"] == "train"]
    assert rates[-1] == pytest.approx(1e-4, rel=0.2)  # the floor
    falls = [a - b for a, b in pairwise(rates[2:])]
    assert max(falls) < 2.5 * max(falls[:11])
    if change == "the same":
        whole = load_weights(folder / f"whole/checkpoints/{run.state.step}")
        resumed = load_weights(tmp_path / f"checkpoints/{run.state.step}")
        assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_killed_in_an_epoch_and_resumed_with_other_steps(epochs, tmp_path):
    """SIGKILL to a real process behind some checkpoint."""
    _, text, noted = epochs
    (tmp_path / "config.yaml").write_text("task: pretraining\n")
    words = [*UNEVEN, text, *EPOCH, f"trainer.output_dir={tmp_path / 'out'}", "trainer.save_steps=3"]
    process = start_neobert("run", tmp_path / "config.yaml", *words, unbuffered=True)
    for line in process.stdout:
        if line.startswith("step 8/"):
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = list_steps(tmp_path / "out/checkpoints")[-1]
    words = [*EPOCH, f"trainer.output_dir={tmp_path / 'out'}", "trainer.resume_from_checkpoint=latest"]
    _, behind = run_noting(text, *words, "trainer.per_device_train_batch_size=4")
    assert Counter(chain(*noted[: 2 * step], *behind)) == Counter(chain(*noted))


def test_pairs_are_read_once_whatever_the_steps_are(tmp_path):
    """`max_steps: -1` of a contrastive run, resumed with twice the accumulation in the middle."""
    path = write_rows(tmp_path / "pairs.jsonl", made_pairs(48))
    base = [
        *CONTRASTIVE_TINY,
        f"dataset.path={path}",
        "trainer.max_steps=-1",
        "trainer.num_train_epochs=4",
        "trainer.save_steps=12",
    ]
    whole = contrastive.run(load_config([], [*base, f"trainer.output_dir={tmp_path / 'whole'}"], "contrastive"))
    assert whole.state.step == 24
    shutil.copytree(tmp_path / "whole/checkpoints/12", tmp_path / "half/checkpoints/12")
    words = [*base, "trainer.gradient_accumulation_steps=2", "trainer.resume_from_checkpoint=12"]
    half = contrastive.run(load_config([], [*words, f"trainer.output_dir={tmp_path / 'half'}"], "contrastive"))
    positions = [
        json.loads((run.folder / f"checkpoints/{run.state.step}/data_rank00000.json").read_text())
        for run in (whole, half)
    ]
    assert half.state.step == 12 + 6
    assert positions[0] == positions[1]


# --- failures -----------


def run(folder, *words, observe=None):
    return pretraining.run(
        load_config([], [*TINY, f"trainer.output_dir={folder}", "trainer.eval_steps=1000", *words]), observe
    )


def is_finite(folder):
    return all(tensor.isfinite().all() for tensor in load_weights(folder).values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A learning rate that no weight survives: the good checkpoint stays, though only one is to be kept; exit code 2."""
    out = f"trainer.output_dir={tmp_path / 'out'}"
    limit = ["trainer.save_total_limit=1", "trainer.save_steps=1", "trainer.eval_steps=1000"]
    run(tmp_path / "out", *limit, "trainer.max_steps=3")
    (tmp_path / "config.yaml").write_text("task: pretraining\n")
    words = [*TINY, out, *limit, "optimizer.lr=1e38", "trainer.resume_from_checkpoint=latest"]
    result = run_neobert("run", tmp_path / "config.yaml", *words)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert result.stderr.rstrip().endswith(
        f"are not finite and are not saved; go on from {tmp_path / 'out/checkpoints/3'}"
    )
    assert list_steps(tmp_path / "out/checkpoints") == [3]
    assert is_finite(find_checkpoint("latest", tmp_path / "out/checkpoints"))
    with pytest.raises(UserError, match=f"loss became (nan|inf) .*step 4 are not finite .*go on from {tmp_path}"):
        run(
            tmp_path / "out",
            *limit[1:],
            "trainer.save_steps=100",
            "optimizer.lr=1e38",
            "trainer.resume_from_checkpoint=3",
        )
    assert list_steps(tmp_path / "out/checkpoints") == [3]


def test_the_checkpoint_before_is_kept_until_the_next_loss_is_finite(tmp_path):
    """Weights that are finite, and whose loss is not: both checkpoints are there."""
    limit = [
        "trainer.save_total_limit=1",
        "trainer.save_steps=1",
        f"dataset.path={TEXT / 'train.txt'}",
    ]  # without a best
    run(tmp_path, *limit, "trainer.max_steps=3")
    assert list_steps(tmp_path / "checkpoints") == [3]
    with pytest.raises(UserError, match="became (nan|inf).* at step 5"):
        run(tmp_path, *limit, "optimizer.lr=1e16", "trainer.resume_from_checkpoint=latest", "model.rms_norm=true")
    assert list_steps(tmp_path / "checkpoints") == [3, 4]
    assert all(is_finite(tmp_path / f"checkpoints/{step}") for step in (3, 4))


def test_a_data_error_saves_the_last_whole_step(tmp_path):
    """A row that cannot be used, in the middle of a stream: what was trained is saved; the row repaired, the run goes on."""
    lines = [json.dumps({"text": f"the president spoke to the congress for the {n}th time"}) for n in range(700)]
    path = tmp_path / "train.jsonl"
    path.write_text(
        "\n".join([*lines[:600], '{"text": 7777777777777777777777777777777777777777777777777777}', *lines[600:]])
    )
    (tmp_path / "config.yaml").write_text("task: pretraining\n")
    words = [
        *TINY, f"dataset.path={path}", "dataset.streaming=true", "dataset.shuffle_buffer_size=0", "dataset.bad_rows=refuse",
        "trainer.max_steps=100", "trainer.gradient_accumulation_steps=3", "trainer.save_steps=1000",
    ]  # fmt: skip
    result = run_neobert("run", tmp_path / "config.yaml", *words, f"trainer.output_dir={tmp_path / 'out'}")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    step = 512 // 4 // 3  # two blocks of documents were whole
    assert "train.jsonl" in result.stderr
    assert result.stderr.rstrip().endswith(f"go on from {tmp_path / f'out/checkpoints/{step}'}")
    assert list_steps(tmp_path / "out/checkpoints") == [step]
    state = verify_checkpoint(tmp_path / f"out/checkpoints/{step}")
    position = json.loads((tmp_path / f"out/checkpoints/{step}/data_rank00000.json").read_text())
    assert (state["step"], position["lanes"]["0"]["num_rows"]) == (step, 12 * step)
    assert [row["step"] for row in read_metrics(tmp_path / "out/metrics.jsonl")][-1] == step


def test_a_disk_that_fails_in_the_middle_of_a_step_costs_the_step(tmp_path):
    def observe(batch, number):
        if number == 6:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "train.txt")

    words = ["trainer.gradient_accumulation_steps=2", "trainer.save_total_limit=null"]
    whole = run(tmp_path / "whole", *words)
    with pytest.raises(DataError, match=r"cannot be read: .*train.txt.*; go on from .*/checkpoints/2$"):
        run(tmp_path / "failed", *words, observe=observe)
    assert list_steps(tmp_path / "failed/checkpoints") == [2]
    resumed = run(tmp_path / "failed", *words, "trainer.resume_from_checkpoint=latest")
    assert resumed.state == whole.state
    a, b = (load_weights(tmp_path / f"{name}/checkpoints/6") for name in ("whole", "failed"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# --- what the log says -----------


def test_a_logged_loss_is_that_of_an_uninterrupted_run(tmp_path):
    """Resumed between two lines of the log, which are means over four steps."""
    words = [
        "trainer.logging_steps=4",
        "trainer.save_steps=6",
        "trainer.max_steps=12",
        "trainer.log_train_accuracy=true",
    ]
    run(tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole/checkpoints/6", tmp_path / "half/checkpoints/6")
    run(tmp_path / "half", *words, "trainer.resume_from_checkpoint=6")
    whole, half = (
        {
            row["step"]: (row["loss"], row["accuracy"])
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
            if row["kind"] == "train"
        }
        for name in ("whole", "half")
    )
    assert list(whole) == [4, 8, 12]
    assert half == {step: whole[step] for step in (8, 12)}


def train_in_a_fork(command, **_):
    """As subprocess.run of `python -m neobert.tasks.pretraining.checks <job>` does it, but not from its start."""
    process = start_function(verify_resume._run_child, *json.loads(command[3]))
    _, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, "", errors)


def test_verify_resume_compares_the_lines_that_the_user_has(capsys, monkeypatch):
    monkeypatch.setattr(verify_resume, "subprocess", SimpleNamespace(run=train_in_a_fork))
    assert verify_resume.verify([], [*TINY, "trainer.logging_steps=4"], 10)
    output = capsys.readouterr().out
    assert "resume is exact" in output
    logged = [line.split()[0] for line in output.splitlines() if line[:4].strip().isdigit() and " - " not in line]
    assert logged == ["4", "8", "10"]


@pytest.mark.parametrize("is_asked", [True, False])
def test_batches_are_pinned_where_asked_for(is_asked, tmp_path):
    """On CUDA; without it torch refuses to pin, so an attempt shows."""
    config = load_config([], [*TINY, f"dataset.pin_memory={str(is_asked).lower()}"]).config
    tokenizer = text_tokenizer(load_tokenizer("", config.tokenizer.path))
    loader = build_data(config, tokenizer, Ranks(), tmp_path, on_cuda=True).train
    if is_asked and not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            next(loader)
    else:
        assert next(loader).input_ids.is_pinned() == is_asked
    loader.close()
