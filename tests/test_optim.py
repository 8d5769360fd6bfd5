"""Optimizer groups and state; schedules against their closed forms."""

import math

import pytest
import torch

from neobert.optim.build import build_optimizer, load_optimizer_state, optimizer_state, weight_decay_groups
from neobert.optim.schedule import Schedule, build_schedule, lr_scale


def parameters():
    torch.manual_seed(0)
    shapes = {
        "embed_tokens.weight": (9, 4),
        "layers.0.qkv.weight": (12, 4),
        "norm.weight": (4,),
        "lm_head.weight": (9, 4),
    }
    return [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def test_only_matrices_decay():
    decayed, others = weight_decay_groups(parameters(), 0.1)
    assert decayed["param_names"] == ["layers.0.qkv.weight", "lm_head.weight"]
    assert decayed["weight_decay"] == 0.1
    assert others["param_names"] == ["embed_tokens.weight", "norm.weight"]
    assert others["weight_decay"] == 0


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_equals_torch(name, kind):
    ours, theirs = parameters(), parameters()
    a = build_optimizer(name, ours, lr=0.1, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
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


def test_state_survives_a_round_trip():
    named = parameters()
    optimizer = build_optimizer("adamw", named, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    fresh = build_optimizer("adamw", named, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    load_optimizer_state(fresh, optimizer_state(optimizer))
    saved, loaded = optimizer_state(optimizer), optimizer_state(fresh)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    with pytest.raises(ValueError, match="unknown parameter"):
        load_optimizer_state(fresh, {"absent/exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        load_optimizer_state(fresh, {"norm.weight/exp_avg": torch.zeros(5)})


def test_schedules_equal_their_closed_forms():
    for step in range(10, 100):
        progress = (step - 10) / 90
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        assert lr_scale(step, Schedule("cosine", 10, 100, 0.1)) == pytest.approx(cosine)
        assert lr_scale(step, Schedule("linear", 10, 100, 0.1)) == pytest.approx(1 - 0.9 * progress)
        assert lr_scale(step, Schedule("constant", 10, 100, 0.1)) == 1
        two = 0.1 + 0.9 * 0.5 * (1 + math.cos(3 * math.pi * progress))
        assert lr_scale(step, Schedule("cosine", 10, 100, 0.1, num_cycles=1.5)) == pytest.approx(two)
    warmup = [lr_scale(step, Schedule("cosine", 10, 100, 0.1)) for step in range(11)]
    assert warmup == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert lr_scale(100, Schedule("cosine", 10, 100, 0.1)) == lr_scale(10**6, Schedule("linear", 10, 100, 0.1)) == 0.1


def build(**changed):
    keys = {"warmup_steps": 5, "warmup_percent": None, "total_steps": None, "decay_steps": None, "decay_percent": None}
    return build_schedule("cosine", 200, **{**keys, "final_lr_ratio": 0.1, "num_cycles": 0.5, **changed})


def test_percentages_win_over_steps():
    assert build() == Schedule("cosine", 5, 200, 0.1)
    assert build(total_steps=400).decay_end == 400
    assert build(decay_steps=50).decay_end == 50
    assert build(warmup_percent=10.0, decay_percent=80.0, decay_steps=50) == Schedule("cosine", 20, 160, 0.1)
    assert lr_scale(199, build(warmup_steps=300)) == pytest.approx(200 / 301)
    with pytest.raises(ValueError, match="before the warmup of 60 steps is over"):
        build(warmup_steps=60, decay_steps=50)
