"""The loop as it runs on a GPU: the host reads what steps computed once a logging interval, and an update can be left out.

A runtime that reads late runs here on the CPU, on the path of a GPU (helpers/reference_kernels.py).
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers import reference_kernels
from helpers.host_reads import HostReads
from helpers.models import VOCABULARY, build
from neobert.config.load import load_config
from neobert.data.batch import Batch
from neobert.errors import UserError
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.modeling_neobert import IGNORED, NeoBERTForSequenceClassification
from neobert.model.unpadding import unpad
from neobert.optim.build import OptimizerSettings, build_optimizer
from neobert.optim.muon import MuonSettings
from neobert.optim.qk_clip import QKClip, QKClipSettings
from neobert.training.loop import Setup, TrainState, read, train
from neobert.training.reporting import Log
from neobert.training.runtime import Runtime

LATE = Runtime(device=torch.device("cpu"), reads_late=True)
FUSED = {"attention.qkv.weight": 3, "ffn.gate_up.weight": 2}


def batch(number):
    """Packed rows, as a loader lays them out."""
    ids = torch.randint(5, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(number))
    labels = ids.masked_fill(ids % 3 > 0, IGNORED)
    found = unpad(ids, document_lengths=(number % 30 + 1, 63 - number % 30, 64), labels=labels, pad_id=0)
    return Batch(**found, num_targets=len(found["labels"]), num_tokens=128)


def setup_of(name, model=None, runtime=LATE, **changes):
    model = build() if model is None else model
    model.model.attention_kernel = "torch_varlen"
    reference_kernels.register()
    muon = MuonSettings(dtype=torch.float32)
    settings = OptimizerSettings(name, lr=1e-2, weight_decay=0.01, muon=muon, fused=FUSED)
    clip = QKClip(model, QKClipSettings(threshold=1.0, interval=2), pad_id=0) if name == "muonclip" else None
    optimizer = build_optimizer(model.named_parameters(), settings)
    inputs = {"masked_only": True, "count_correct": True}
    return Setup(
        model, optimizer, runtime, lambda step: 1e-2, model_inputs=inputs, clip=clip, gradient_clipping=1.0, **changes
    )


def counted(setup, make, accumulation, steps=6, every=3):
    """Host reads after each of `steps`, the last of every `every` read."""
    numbers, reads, found = iter(range(1000)), HostReads(), []

    def fetch():
        return [make(next(numbers)) for _ in range(accumulation)]

    def look(state, result):
        if state.step % every == 0:
            read(setup, state)
        found.append(sum(reads.found.values()))
        reads.found.clear()

    windows = [fetch() for _ in range(steps)]
    with reads:
        train(setup, lambda: windows.pop(0), TrainState(), steps, [look])
    return found


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_pretraining_reads_once_a_logging_interval(name, accumulation):
    """No wait for the device between logging steps, one at a logging step; QK-clip in every second step included."""
    assert counted(setup_of(name), batch, accumulation) == [0, 0, 1] * 2


@pytest.mark.parametrize("labels", [3, 1])
def test_fine_tuning_reads_once_a_logging_interval(labels):
    config = build().config
    config.num_labels, config.classifier_dropout = labels, 0.0

    def rows(number):
        ids = torch.randint(5, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(number))
        mask = (torch.arange(20) < torch.tensor([20, 5, 9, number % 20 + 1])[:, None]).long()
        answers = torch.arange(4) % 3 if labels > 1 else torch.rand(4)
        return Batch(**unpad(ids, mask, labels=answers), num_targets=4, num_tokens=int(mask.sum()))

    setup = replace(setup_of("adamw", NeoBERTForSequenceClassification(config)), model_inputs={})
    assert counted(setup, rows, 1) == [0, 0, 1] * 2


@pytest.mark.parametrize("loss", ["simcse", "supcon"])
def test_contrastive_training_reads_once_a_logging_interval(loss):
    def pairs(number):
        ids = torch.randint(5, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(number))
        keys = {"row_keys_G": torch.arange(4) % 3, "anchor_keys_G": torch.arange(4), "num_negatives": (0,)}
        keys |= {"negative_keys": torch.zeros(0, dtype=torch.long), "negative_rows": torch.zeros(0, dtype=torch.long)}
        laid_out = unpad(ids, document_lengths=(5, 11) * 8)
        return Batch(**laid_out, keys=keys, num_targets=4, num_tokens=128)

    def half(number):
        made = pairs(number)
        return replace(made, **unpad(made.input_ids, document_lengths=(16,) * 8))

    model = NeoBERTForEmbedding(build().config, ContrastiveSettings(loss_type=loss))
    setup = replace(setup_of("adamw", model), model_inputs={})
    assert counted(setup, half, 1) == [0, 0, 1] * 2


@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_late_equals_at_once(name):
    """The same losses, sums and weights, to the bit, whenever they are read."""
    found = []
    for runtime in (LATE, Runtime(device=torch.device("cpu"))):
        setup, state, results = setup_of(name, runtime=runtime), TrainState(), []
        windows = [[batch(2 * n), batch(2 * n + 1)] for n in range(5)]
        train(
            setup,
            lambda windows=windows: windows.pop(0),
            state,
            5,
            [lambda _, result, seen=results: seen.append(result)],
        )
        read(setup, state)
        facts = [(r.loss, r.num_correct, r.grad_norm, r.num_targets) for r in results]
        found.append((json.dumps(facts), json.dumps(state.state_dict()), setup.model.state_dict()))
    assert found[0][:2] == found[1][:2]
    for weight, other in zip(found[0][2].values(), found[1][2].values(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_a_bad_step_changes_nothing(name, where):
    """Weights, moments and the state are those before the first step whose loss or gradient was not finite, whatever came
    after it; the message names it as one that is read at once does.
    """

    class Broken(torch.nn.Module):
        """The third microbatch has a loss, or a gradient, that is not finite."""

        def __init__(self, model):
            super().__init__()
            self.inner, self.config, self.model, self.calls = model, model.config, model.model, 0

        def forward(self, **inputs):
            output, self.calls = self.inner(**inputs), self.calls + 1
            if self.calls == 3:
                weight = self.inner.lm_head.weight
                bad = weight.sum() * torch.inf if where == "loss" else (weight[0, 0] * 0).sqrt()
                output.loss_sum = output.loss_sum + bad
            return output

    def run(steps, runtime):
        setup, state = setup_of(name, runtime=runtime), TrainState()
        setup = replace(setup, model=Broken(setup.model))
        windows = [[batch(n)] for n in range(steps)]
        error = ""
        try:
            train(setup, lambda: windows.pop(0), state, steps, [])
            read(setup, state)
        except UserError as failure:
            error = str(failure)
        return setup, state, error

    whole, before, none = run(2, LATE)
    late, state, message = run(5, LATE)
    _, _, at_once = run(5, Runtime(device=torch.device("cpu")))
    assert none == ""
    assert message == at_once
    assert f"the {where} became" in message
    assert "at step 3, microbatch 0" in message
    assert state.state_dict() == before.state_dict()
    for a, b in zip(whole.model.state_dict().values(), late.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.optimizer.state.values(), late.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[kind], b[kind]) for kind in a)


class Lines:
    """What a log writes, with the number of steps that had been started by then."""

    has_bar, failure = True, None

    def __init__(self):
        self.rows, self.started = [], 0

    def write(self, row):
        self.rows.append((self.started, row["step"], row["loss"]))

    def step(self, loss, rate):
        pass


def test_a_line_is_written_when_the_next_step_has_been_started():
    """Late by one step, and with the same numbers; the last line at once."""
    found = {}
    for late in (True, False):
        setup, state, out = setup_of("adamw", runtime=replace(LATE, reads_late=late)), TrainState(), Lines()
        config = load_config([], ["trainer.logging_steps=2"], "pretraining").config
        log = Log(SimpleNamespace(config=config, log_metrics=dict, model=setup.model), setup, out, 5)
        windows = [[batch(n)] for n in range(5)]

        def fetch(windows=windows, out=out):
            out.started += 1
            return windows.pop(0)

        train(setup, fetch, state, 5, [log])
        found[late] = out.rows
    assert [(started, step) for started, step, _ in found[True]] == [(3, 2), (5, 4), (5, 5)]
    assert [(started, step) for started, step, _ in found[False]] == [(2, 2), (4, 4), (5, 5)]
    assert [loss for *_, loss in found[True]] == [loss for *_, loss in found[False]]
