"""What commit ac63e8d saved is read by this version: it goes on with the same data, and is exported and evaluated.

Token ids, masks and labels are compared exactly, losses to 1e-5: the kernel of float32 attention changed since.
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from helpers.commands import run_neobert
from helpers.write_old_checkpoints import (
    LAST_STEP,
    MASKED,
    SENTENCES,
    STEP,
    overrides,
    read_losses,
    recorded_inputs,
    write_texts,
)
from neobert.checkpoints.format import verify_checkpoint
from neobert.checkpoints.layouts import from_eurobert
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.load import load_config
from neobert.export.write import Wanted, export_model
from neobert.inference.embed import load_embedder
from neobert.inference.masked_lm import fill_masks
from neobert.tasks.contrastive import task as contrastive
from neobert.tasks.glue import suite
from neobert.tasks.glue import task as glue
from neobert.tasks.pretraining import task as pretraining

OLD = Path(__file__).parents[1] / "data/ac63e8d"
TASKS = {"pretraining": pretraining, "glue": glue, "contrastive": contrastive}


@pytest.fixture(params=TASKS)
def old(request, tmp_path):
    """(task, a copy of its run's folder, words of its configuration, what the older version did next)."""
    task = request.param
    run = shutil.copytree(OLD / task, tmp_path / "run")
    path = write_texts(tmp_path / "data")[task]
    words = overrides(task, path, run / f"checkpoints/{STEP}/tokenizer", run)
    return task, run, words, json.loads((run / "next.json").read_text())


@contextmanager
def recorded_states():
    """A list that grows by (weight, first and second moment) of every parameter, by its name, before each step of AdamW."""
    models, states = [], []

    def keep(module, arguments):
        if type(module).__name__.startswith("NeoBERTFor"):
            models[:] = [module]

    def record(optimizer, arguments, named):
        names = {parameter: name for name, parameter in models[0].named_parameters()}
        states.append(
            {
                names[parameter]: tuple(
                    tensor.detach().clone() for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
                )
                for parameter, state in optimizer.state.items()
            }
        )

    hooks = register_module_forward_pre_hook(keep), register_optimizer_step_pre_hook(record)
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def test_it_goes_on(old):
    """Weights and moments equal those of the files before the first step, to the bit; then the same batches and losses."""
    task, run, words, following = old
    folder = find_checkpoint(str(run))
    assert verify_checkpoint(folder)["step"] == STEP
    saved = load_file(folder / "optimizer/rank00000.safetensors")
    weights = from_eurobert(load_file(folder / "model.safetensors"))
    with recorded_states() as states, recorded_inputs() as batches:
        resumed = [f"trainer.max_steps={LAST_STEP}", "trainer.resume_from_checkpoint=latest"]
        TASKS[task].run(load_config([], [*words, *resumed], task))
    assert states[0].keys() == weights.keys() == {name.rpartition("/")[0] for name in saved}
    for name, found in states[0].items():
        expected = weights[name], saved[f"{name}/exp_avg"], saved[f"{name}/exp_avg_sq"]
        assert all(map(torch.equal, found, expected)), name
    assert batches == following["batches"]
    assert read_losses(run) == pytest.approx(following["losses"], abs=1e-5)


def test_it_is_exported_and_evaluated(old, tmp_path):
    task, run, words, following = old
    assert all(check.is_met for check in export_model(str(run), tmp_path / "out", Wanted(), log=lambda text: None))
    if task == "pretraining":
        (guesses,) = fill_masks(str(run), [MASKED], 3)
        assert [token for token, _ in guesses.masks[0]] == following["guesses"]
    if task == "contrastive":
        for folder in (run, tmp_path / "out"):
            vectors = load_embedder(str(folder)).encode(SENTENCES)
            assert np.abs(vectors - np.array(following["vectors"])).max() < 1e-5
            said = run_neobert("similarity", folder, *SENTENCES)
            first, second = map(np.array, following["vectors"])
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert f"{cosine:.4f}" in said.stdout, said.stdout + said.stderr
    if task == "glue":
        config = run / f"checkpoints/{STEP}/config.yaml"
        data = next(word for word in words if word.startswith("dataset.path="))
        suite.predict_run(load_config([str(config)], [f"trainer.output_dir={run}", data]).config)
        (predictions,) = run.rglob("RTE.tsv")
        assert predictions.read_text() == following["predictions"]
        assert len({line.split("\t")[1] for line in predictions.read_text().splitlines()[1:]}) == 2
