"""Shared by all tests: no network, a small corpus, and ways to run the command."""

import os

from helpers.commands import run_clean_script
from helpers.runs import SHARED, TINY, TOKENIZER, Trained

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import json
import sys
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)  # the tests run in two processes


@pytest.fixture(autouse=True)
def _verified_in_a_fork(monkeypatch):
    """Exports are loaded again in forks of a clean process; `neobert export` as a process of its own starts a real one."""
    verify = sys.modules.get("neobert.export.verify")
    if verify:
        monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run_clean_script))


@pytest.fixture
def empty_config(tmp_path):
    """A YAML file without any key; everything comes from overrides."""
    path = tmp_path / "config.yaml"
    path.write_text("task: pretraining\n")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer that ships with the project, as the data pipeline sees it."""
    from neobert.data.tokenizer import load_tokenizer, text_tokenizer

    return text_tokenizer(load_tokenizer("", str(TOKENIZER)))


@pytest.fixture(scope="session")
def reference_keys():
    """The configuration reference as data."""
    path = SHARED / "spec/keys.json"
    if not path.is_file():
        pytest.skip(f"the configuration reference is not at {path}")
    return json.loads(path.read_text())


@pytest.fixture
def small(tmp_path):
    """A corpus of 40 lines with a validation split, packed, as overrides."""
    (tmp_path / "text").mkdir()
    lines = [f"the president spoke to the congress of the people for the {n}th time about peace" for n in range(40)]
    (tmp_path / "text/train.txt").write_text("\n".join(lines))
    (tmp_path / "text/validation.txt").write_text("\n".join(lines[:5]))
    return [
        f"dataset.path={tmp_path / 'text'}",
        "trainer.per_device_train_batch_size=2",
        "datacollator.pack_sequences=true",
    ]


@pytest.fixture
def train(tmp_path, empty_config, capsys):
    """Run a configuration of `TINY` and the given overrides in this process."""

    def run(*words):
        from neobert.config.load import load_config
        from neobert.tasks.pretraining import task as pretraining

        loaded = load_config([str(empty_config)], [*TINY, f"trainer.output_dir={tmp_path / 'out'}", *words])
        capsys.readouterr()
        finished = pretraining.run(loaded)
        return Trained(finished, capsys.readouterr().out)

    return run
