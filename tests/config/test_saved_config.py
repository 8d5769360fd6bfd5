"""The configuration that a run leaves behind: it describes the run, and nothing but the run."""

import html
import re

import pytest
import yaml

from helpers.runs import CONFIGS, TINY
from neobert.config.load import dump_config, load_config
from neobert.insight.report import write_report
from neobert.tasks.pretraining import task as pretraining
from neobert.training.metrics import read_metrics


def flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]


def test_it_repeats_the_run_without_a_note(small, tmp_path, capsys):
    """Of older names, defaults, nulls and a call that resumes, what is left is what was set, under its present name."""
    (tmp_path / "mine.yaml").write_text(
        "trainer: {train_batch_size: 2, resume_from_checkpoint: latest, gradient_clipping: null, bf16: false}\n"
        "dataset: {num_shards: 1}\nmodel: {pad_token_id: 0}\nscheduler: {warmup_steps: 2}\n"
    )
    words = [
        word for word in [*TINY, *small] if "batch_size" not in word and "warmup" not in word and "mixed" not in word
    ]
    loaded = load_config([str(tmp_path / "mine.yaml")], [*words, f"trainer.output_dir={tmp_path / 'a'}"])
    assert len(loaded.warnings) == 2
    first = pretraining.run(loaded).folder
    told = capsys.readouterr()
    assert [line for line in told.err.splitlines() if line.startswith("note")] == [
        f"note: {w}" for w in loaded.warnings
    ]
    assert not any(warning in told.out for warning in loaded.warnings)
    saved = yaml.safe_load((first / "config.yaml").read_text())
    given = {word.partition("=")[0] for word in words} | {"trainer.output_dir", "task", "config_path"}
    given |= {"trainer.per_device_train_batch_size", "trainer.gradient_clipping", "trainer.mixed_precision"}
    assert set(flat(saved)) == given | {"dataset.num_shards", "model.pad_token_id", "scheduler.warmup_steps"}
    again = load_config([str(first / "config.yaml")], [f"trainer.output_dir={tmp_path / 'b'}"])
    assert again.warnings == []
    assert again.config.trainer.resume_from_checkpoint is None
    assert losses(pretraining.run(again).folder) == losses(first)
    more = [f"trainer.output_dir={tmp_path / 'b'}", "trainer.resume_from_checkpoint=latest", "trainer.max_steps=8"]
    pretraining.run(load_config([str(tmp_path / "b/config.yaml")], more))
    assert len(losses(tmp_path / "b")) == 8
    assert "resume_from_checkpoint" not in (tmp_path / "b/config.yaml").read_text()


def test_the_report_lists_what_was_set_to_something_else(small, tmp_path):
    words = ["trainer.save_total_limit=null", "dataset.num_proc=4", "pretraining_metadata={corpus: mine}"]
    loaded = load_config([], [*TINY, *small, *words, f"trainer.output_dir={tmp_path / 'a'}"])
    page = write_report(pretraining.run(loaded).folder).read_text()
    listed = html.unescape(re.search("<pre>(.*)</pre>", page, re.DOTALL)[1]).splitlines()
    names = {line.partition(": ")[0] for line in listed}
    assert names <= set(loaded.origins)
    assert {"trainer.save_total_limit: null", 'pretraining_metadata: {"corpus": "mine"}'} <= set(listed)
    assert "dataset.num_proc" not in names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_loads_for_every_task(path, tmp_path):
    loaded = load_config([str(path)])
    (tmp_path / "config.yaml").write_text(dump_config(loaded.config))
    again = load_config([str(tmp_path / "config.yaml")])
    assert again.config == loaded.config
    assert again.warnings == loaded.warnings


def test_the_checkpoint_of_another_run_belongs_to_the_run(tmp_path):
    for chosen, stays in (("latest", False), (500, False), ("a/checkpoints/5", False), ("b/checkpoints/5", True)):
        chosen = tmp_path / chosen if "/" in str(chosen) else chosen
        words = [f"trainer.output_dir={tmp_path / 'a'}", f"trainer.resume_from_checkpoint={chosen}"]
        saved = yaml.safe_load(dump_config(load_config([], words).config))["trainer"]
        assert saved.get("resume_from_checkpoint") == (str(chosen) if stays else None)
