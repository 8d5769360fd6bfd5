"""Optimizer groups and state; schedules against their closed forms."""

import math

import pytest
import torch

from neobert.config.sections import SchedulerConfig
from neobert.errors import ConfigError
from neobert.optim.build import (
    GroupRule,
    OptimizerSettings,
    Schedule,
    build_optimizer,
    load_optimizer_state,
    lr_scale,
    optimizer_state,
    parameter_groups,
)
from neobert.optim.muon import MuonSettings
from neobert.training.optimizer import build_schedule


def parameters():
    torch.manual_seed(0)
    shapes = {
        "embed_tokens.weight": (9, 4),
        "layers.0.qkv.weight": (12, 4),
        "norm.weight": (4,),
        "lm_head.weight": (9, 4),
    }
    return [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def groups_of(named, muon_decay=None, rules=()):
    """`{name: (algorithm, weight decay, lr_scale)}`."""
    keys = ("algorithm", "weight_decay", "lr_scale")
    name, muon = "adamw" if muon_decay is None else "muonclip", MuonSettings(weight_decay=muon_decay or 0.0)
    groups = parameter_groups(named, OptimizerSettings(name, lr=0.1, weight_decay=0.1, muon=muon, rules=rules))
    return {name: tuple(group[key] for key in keys) for group in groups for name in group["param_names"]}


def test_only_matrices_decay():
    assert groups_of(parameters()) == {
        "embed_tokens.weight": ("adamw", 0.0, 1.0),
        "layers.0.qkv.weight": ("adamw", 0.1, 1.0),
        "norm.weight": ("adamw", 0.0, 1.0),
        "lm_head.weight": ("adamw", 0.1, 1.0),
    }


def test_muon_takes_the_matrices_of_layers():
    found = groups_of(parameters(), muon_decay=0.2)
    assert found["layers.0.qkv.weight"] == ("muon", 0.2, 1.0)
    assert {name for name, (algorithm, *_) in found.items() if algorithm == "muon"} == {"layers.0.qkv.weight"}
    bert = [("bert.encoder.layer.0.output.dense.weight", torch.nn.Parameter(torch.ones(2, 2)))]
    assert groups_of(bert, muon_decay=0.0).popitem()[1][0] == "muon"


def test_the_first_pattern_decides():
    rules = [
        GroupRule("*norm*", lr_scale=0.5),
        GroupRule("layers.*", 2.0, 0.7, "adamw"),
        GroupRule("*", weight_decay=0.3),
    ]
    assert groups_of(parameters(), muon_decay=None, rules=rules) == {
        "embed_tokens.weight": ("adamw", 0.3, 1.0),
        "layers.0.qkv.weight": ("adamw", 0.7, 2.0),
        "norm.weight": ("adamw", 0.0, 0.5),
        "lm_head.weight": ("adamw", 0.3, 1.0),
    }
    taken = groups_of(parameters(), muon_decay=0.2, rules=[GroupRule("lm_head*", algorithm="muon")])
    assert taken["lm_head.weight"] == ("muon", 0.2, 1.0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([GroupRule("layer.*")], "'layer.*' matches no parameter; names are like embed_tokens.weight"),
        ([GroupRule("*"), GroupRule("norm*")], "'norm[*]' acts on nothing: earlier patterns take"),
        ([GroupRule("norm*", algorithm="muon")], "gives norm.weight to muon, which takes matrices only"),
        ([GroupRule("layers*", algorithm="adamw")], "muonclip found no matrix"),
    ],
    ids=["nothing", "shadowed", "vector", "no matrix left"],
)
def test_patterns_without_effect_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        groups_of(parameters(), muon_decay=0.0, rules=rules)


def test_empty_groups():
    named = parameters()
    for _, parameter in named:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        groups_of(named)
    with pytest.raises(ValueError, match="no parameter to train"):
        groups_of([])
    with pytest.raises(ValueError, match="ZeRO"):
        groups_of([("layers.0.qkv.weight", torch.nn.Parameter(torch.ones(12)))], muon_decay=0.0)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_equals_torch(name, kind):
    ours, theirs = parameters(), parameters()
    a = build_optimizer(ours, OptimizerSettings(name, lr=0.1, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6))
    b = [
        kind([p], lr=0.1, weight_decay=0.1 if i in (1, 3) else 0, betas=(0.8, 0.9), eps=1e-6)
        for i, (_, p) in enumerate(theirs)
    ]
    for step in range(5):
        for (_, x), (_, y) in zip(ours, theirs, strict=True):
            x.grad = torch.full_like(x, 0.1 * step) + x.detach()
            y.grad = torch.full_like(y, 0.1 * step) + y.detach()
        for optimizer in (a, *b):
            optimizer.step()
    for (_, x), (_, y) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "muonclip"])
def test_state_survives_a_round_trip(name):
    """Three steps = two steps, the state into a fresh optimizer, one step: to the bit."""
    runs = []
    for resumed in (False, True):
        named = parameters()
        optimizer = fresh(name, named)
        for step in range(3):
            if resumed and step == 2:
                saved = {path: value.clone() for path, value in optimizer_state(optimizer).items()}
                optimizer = fresh(name, named)
                load_optimizer_state(optimizer, saved)
            torch.manual_seed(step)
            for _, p in named:
                p.grad = torch.randn_like(p)
            optimizer.step()
        runs.append([p.detach() for _, p in named])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_foreign_state_is_refused():
    optimizer = fresh("adamw", parameters())
    with pytest.raises(ValueError, match="unknown parameter"):
        load_optimizer_state(optimizer, {"absent/exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        load_optimizer_state(optimizer, {"norm.weight/exp_avg": torch.zeros(5)})
    with pytest.raises(ValueError, match="'momentum_buffer' of 'layers.0.qkv.weight', which adamw does not have"):
        load_optimizer_state(optimizer, {"layers.0.qkv.weight/momentum_buffer": torch.zeros(12, 4)})
    with pytest.raises(ValueError, match="'exp_avg' of 'layers.0.qkv.weight', which muon does not have"):
        load_optimizer_state(fresh("muonclip", parameters()), {"layers.0.qkv.weight/exp_avg": torch.zeros(12, 4)})


def fresh(name, named):
    return build_optimizer(named, OptimizerSettings(name, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99)))


def closed_form(schedule, step):
    """Written down independently: `w` warmup, `e` end, `f` floor."""
    w, e, f = schedule.warmup_steps, schedule.decay_end, schedule.floor
    if step < w:
        return (step + 1) / (w + 1)
    t = (step - w) / (e - w)
    forms = {
        "cosine": f + (1 - f) * 0.5 * (1 + math.cos(2 * math.pi * schedule.num_cycles * t)),
        "linear": 1 - (1 - f) * t,
        "polynomial": f + (1 - f) * max(0, 1 - t) ** schedule.power,
        "wsd": 1 - (1 - f) * max(0, step - schedule.decay_start) / (e - max(w, schedule.decay_start)),
        "inverse_sqrt": max(f, ((w + 1) / (step + 1)) ** 0.5),
    }
    return 1.0 if schedule.name == "constant" else f if step >= e else forms[schedule.name]


@pytest.mark.parametrize("end", [100, 60])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "polynomial", "inverse_sqrt"])
def test_schedules_equal_their_closed_forms(name, floor, warmup, end):
    """At every step, and long after the end."""
    schedule = build(name, 100, decay_steps=end, warmup_steps=warmup, final_lr_ratio=floor, num_cycles=1.5, power=3.0)
    assert (schedule.warmup_steps, schedule.decay_end) == (warmup, end)
    assert schedule.decay_start == (end - 20 if name == "wsd" else 0)
    for step in [*range(130), 10**6]:
        assert lr_scale(step, schedule) == pytest.approx(closed_form(schedule, step), rel=1e-12), step
    assert lr_scale(warmup, schedule) == 1.0
    assert lr_scale(10**6, schedule) == (1.0 if name == "constant" else floor)


def build(name="cosine", num_steps=200, **changed):
    keys = {"warmup_steps": 5, "final_lr_ratio": 0.1, **changed}
    return build_schedule(SchedulerConfig(name=name, **keys), num_steps)


def test_percentages_win_over_steps():
    assert build() == Schedule("cosine", 5, 200, 0.1)
    assert build(total_steps=400).decay_end == 400
    assert build(decay_steps=50).decay_end == 50
    assert build(warmup_percent=10.0, decay_percent=80.0, decay_steps=50) == Schedule("cosine", 20, 160, 0.1)
    assert build("wsd", total_steps=400, decay_percent=90.0, wsd_decay_percent=10.0).decay_start == 320
    assert build("wsd", warmup_steps=190, wsd_decay_percent=100.0).decay_start == 190
    assert lr_scale(199, build(warmup_steps=300)) == pytest.approx(200 / 301)
    with pytest.raises(ConfigError, match="before the warmup of 60 steps is over"):
        build(warmup_steps=60, decay_steps=50)


@pytest.mark.parametrize("name", ["wsd", "inverse_sqrt"])
def test_rates_after_a_resume_in_each_phase(name, train, small):
    """Warmup, peak or fall, floor: the rates of a resumed run are the closed form's."""
    words = [*small, f"scheduler.name={name}", "scheduler.warmup_steps=2", "scheduler.decay_steps=6", "optimizer.lr=0.01",
             "scheduler.wsd_decay_percent=25", "trainer.max_steps=8",
             "trainer.save_steps=1", "trainer.save_total_limit=9"]  # fmt: skip
    schedule = build(name, 8, warmup_steps=2, decay_steps=6, wsd_decay_percent=25.0)
    rates = [0.01 * closed_form(schedule, step) for step in range(8)]
    assert [row["lr"] for row in train(*words).train] == pytest.approx(rates, rel=1e-12)
    for step in (1, 3, 5, 7):
        run = train(*words, f"trainer.resume_from_checkpoint={step}")
        assert [row["lr"] for row in run.train] == pytest.approx(rates, rel=1e-12)
