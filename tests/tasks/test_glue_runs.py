"""GLUE runs and suites: resumed equals uninterrupted, killed suites finish with the same table, transfer, selection."""

import json
import os
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from helpers.commands import run_neobert, start_neobert
from helpers.glue import GLUE_TINY, RANDOM, pretrain_tiny, run_glue, write_local
from neobert.checkpoints.format import find_checkpoint, list_steps, verify_checkpoint
from neobert.data.labelled.loader import in_order
from neobert.errors import UserError
from neobert.tasks.glue import suite as glue_suite
from neobert.tasks.glue import task as glue
from neobert.tasks.glue.suite import summarize, to_markdown, to_terminal

DROPOUT = ["model.dropout_prob=0.1", "trainer.num_train_epochs=2"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_local(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return pretrain_tiny(tmp_path_factory.mktemp("pretrained") / "run")


def suite(tasks, seeds, *words, predict=False):
    return glue_suite.run_suite([], [*GLUE_TINY, *map(str, words)], tasks, seeds, predict)


def table(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    "extra", [[], ["datacollator.pack_sequences=true", "optimizer.name=muonclip", "glue.num_workers=2"]]
)
def test_resumed_equals_uninterrupted(extra, local, tmp_path):
    words = [f"dataset.path={local}", "glue.task_name=rte", *RANDOM, *DROPOUT, f"trainer.output_dir={tmp_path / 'out'}"]
    words += ["trainer.save_steps=2", "trainer.save_total_limit=9", *extra]
    whole, result = run_glue(*words)
    last = whole.folder / "checkpoints/6/model.safetensors"
    wanted = load_file(last)
    shutil.rmtree(last.parent)
    for step in (2, 4):
        again, second = run_glue(*words, f"trainer.resume_from_checkpoint={step}")
        found = load_file(again.folder / "checkpoints/6/model.safetensors")
        assert all((found[name] == wanted[name]).all() for name in wanted)
        assert second == result


def test_an_early_stop_stands_when_resumed(local, tmp_path):
    words = [f"dataset.path={local}", "glue.task_name=rte", *RANDOM, f"trainer.output_dir={tmp_path}"]
    words += [
        "trainer.num_train_epochs=9",
        "trainer.early_stopping=2",
        "trainer.eval_strategy=epoch",
        "optimizer.lr=1e-9",
    ]
    finished, result = run_glue(*words)
    assert finished.state.step == 9  # three epochs: the first is the best
    again, second = run_glue(*words, "trainer.resume_from_checkpoint=latest")
    assert again.state.step == 9
    assert (second["score"], second["step"]) == (result["score"], result["step"])


def test_an_evaluation_that_a_signal_breaks_off_is_made_up_for(local, tmp_path, monkeypatch):
    """SIGTERM between two batches of the first evaluation: saved at once; resumed, all is as if nothing had happened."""
    words = [f"dataset.path={local}", "glue.task_name=rte", *RANDOM, "trainer.eval_strategy=epoch"]
    words += ["trainer.num_train_epochs=2", "trainer.per_device_eval_batch_size=2"]
    _, wanted = run_glue(*words, f"trainer.output_dir={tmp_path / 'whole'}")
    words.append(f"trainer.output_dir={tmp_path / 'broken'}")
    shown = []

    def signal_in_the_second_batch(*arguments):
        for places, batch in in_order(*arguments):
            shown.append(len(places))
            if len(shown) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield places, batch

    monkeypatch.setattr("neobert.tasks.glue.evaluation.in_order", signal_in_the_second_batch)
    broken, result = run_glue(*words)
    assert (broken.exit_code, result, len(shown)) == (128 + signal.SIGTERM, None, 2)
    assert broken.state.is_evaluation_open
    monkeypatch.undo()
    again, result = run_glue(*words, "trainer.resume_from_checkpoint=latest")
    assert again.exit_code == 0
    assert result["metrics"] == wanted["metrics"]


def test_the_best_epoch_is_the_result(local, tmp_path):
    words = [
        f"dataset.path={local}",
        "glue.task_name=stsb",
        *RANDOM,
        f"trainer.output_dir={tmp_path}",
        "optimizer.lr=0.03",
        "seed=1",
    ]
    words += ["trainer.num_train_epochs=4", "trainer.eval_strategy=epoch", "trainer.load_best_model_at_end=true"]
    finished, result = run_glue(*words)
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["eval_score"] for row in rows if row["kind"] == "eval"}
    assert {3, 6, 9} <= set(scores)  # evaluated at the end of every epoch, not a step later
    assert result["score"] == max(scores.values()) == scores[result["step"]]
    assert "best score" in result["protocol"]["selection"]
    assert len([row for row in rows if row["kind"] == "eval"]) == len(scores)  # each step's numbers stand at that step
    assert find_checkpoint(str(tmp_path)).name == str(result["step"]) != str(finished.state.step)
    again, _ = run_glue(*words, "trainer.resume_from_checkpoint=latest")
    assert again.values == finished.values
    shutil.rmtree(tmp_path / f"checkpoints/{result['step']}")
    again, result = run_glue(*words, "trainer.resume_from_checkpoint=latest")
    assert result["step"] == again.state.step == again.step
    assert result["score"] == scores[result["step"]]


def test_a_killed_suite_finishes_with_the_same_table(pretrained, local, tmp_path):
    config = tmp_path / "suite.yaml"
    config.write_text("task: glue\n")
    words = [*GLUE_TINY, f"dataset.path={local}", f"glue.pretrained_checkpoint_dir={pretrained}", *DROPOUT]
    words += ["trainer.num_train_epochs=12", "trainer.save_steps=5"]
    assert suite(["mrpc", "rte"], 2, *words, f"trainer.output_dir={tmp_path / 'whole'}") == 0
    out = f"trainer.output_dir={tmp_path / 'killed'}"
    process = start_neobert("glue", config, "--tasks", "rte,mrpc", "--seeds", "2", *words, out, discard=True)
    second = tmp_path / "killed/mrpc/seed-1/checkpoints"
    while process.poll() is None and not (second.is_dir() and list_steps(second)):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/results.json").exists()
    assert (tmp_path / "killed/mrpc/seed-0/result.json").exists()
    assert suite(["mrpc", "rte"], 2, *words, out) == 0
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert (tmp_path / "killed/results.md").read_text() == (tmp_path / "whole/results.md").read_text()
    folder = tmp_path / "killed/rte/seed-0/checkpoints/36"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "config.yaml",
        "model.safetensors",
        "state.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    verify_checkpoint(folder)


def test_a_suite_transfers_from_mnli_and_predicts_with_the_best_seed(pretrained, local, tmp_path):
    words = [f"dataset.path={local}", f"glue.pretrained_checkpoint_dir={pretrained}", "glue.transfer_from_task=true"]
    words += [f"trainer.output_dir={tmp_path}"]
    with pytest.raises(UserError, match="--tasks has no mnli"):
        suite(["rte"], 1, *words)
    assert suite(["cola", "mnli", "rte"], 2, *words, predict=True) == 0
    found = table(tmp_path)
    assert {name: task["transferred_from"] for name, task in found["tasks"].items()} == {
        "cola": None,
        "mnli": None,
        "rte": "mnli",
    }
    assert found["tasks"]["rte"]["weights"][1].startswith(str(tmp_path / "mnli/seed-1"))
    assert sorted(path.name for path in (tmp_path / "submission").iterdir()) == [
        "AX.tsv",
        "CoLA.tsv",
        "MNLI-m.tsv",
        "MNLI-mm.tsv",
        "RTE.tsv",
    ]
    assert suite(["cola", "mnli", "rte"], 2, *words) == 0  # all stand
    with pytest.raises(UserError, match="was run with max_seq_length 32, not 24"):
        suite(["cola", "mnli", "rte"], 2, *words, "glue.max_seq_length=24")


def test_a_suite_says_at_once_what_would_stop_it_later(local, tmp_path):
    words = [
        f"dataset.path={write_local(tmp_path / 'data', ['cola'])}",
        *RANDOM,
        f"trainer.output_dir={tmp_path / 'out'}",
    ]
    with pytest.raises(UserError, match="no folder 'rte' with the task's files"):
        suite(["cola", "rte"], 1, *words)
    with pytest.raises(UserError, match="cola has no metric 'f1'"):
        suite(["cola"], 1, *words, "trainer.metric_for_best_model=f1")
    assert not (tmp_path / "out").exists()


def test_the_table_says_mean_spread_seeds_and_neighbours():
    protocol = {"optimizer": {"name": "adamw", "lr": 2e-5, "weight_decay": 0.01}, "epochs": 3,
                "scheduler": {"name": "linear", "warmup_percent": 6.0, "warmup_steps": 1}}  # fmt: skip
    run = {"step": 9, "transferred_from": None, "weights": "w", "protocol": protocol}
    results = [
        {**run, "task": task, "seed": seed, "score": score, "metrics": {"loss": 1.0, "score": score, "accuracy": score}}
        for task, scores in {"rte": (0.5, 0.6, 0.7), "qnli": (0.8, 0.8, 0.9)}.items()
        for seed, score in enumerate(scores)
    ]
    summary = summarize(results)
    assert summary["tasks"]["rte"]["score"] == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1),
        "values": [0.5, 0.6, 0.7],
    }
    assert summary["average"]["values"] == pytest.approx([0.65, 0.7, 0.8])
    markdown = "\n".join(to_markdown(summary))
    assert (
        "| RTE | accuracy | 60.00 ± 10.00 | accuracy 60.00 ± 10.00 | 50.00 60.00 70.00 | 78.2 | 78.7 | 91.3 | 87.4 |"
        in markdown
    )
    assert "not GLUE's" in markdown
    assert "arXiv 2502.19587" in markdown
    assert "optimizer: adamw, lr 2e-05, weight decay 0.01" in to_terminal(summary)


def test_the_command_checks_its_words(tmp_path):
    config = tmp_path / "glue.yaml"
    config.write_text("task: glue\n")
    wrong = run_neobert("glue", config, "--tasks", "colla")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert (
        wrong.stderr
        == "error: --tasks: no task 'colla'; there are: all, cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli\n"
    )
    nothing = run_neobert("glue", config, "--predict", f"--trainer.output_dir={tmp_path}")
    assert nothing.returncode == 2
    assert (
        nothing.stderr
        == f"error: {tmp_path}: no result.json, so no finished run of GLUE; train first: neobert glue CONFIG\n"
    )
