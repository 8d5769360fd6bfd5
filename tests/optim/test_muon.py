"""Muon: orthogonalised updates, and the optimizer against torch's own on single matrices."""

import math

import pytest
import torch
from transformers import EuroBertForMaskedLM

from helpers.host_reads import HostReads
from helpers.models import build as build_model
from neobert.checkpoints.layouts import FUSED, eurobert_config, to_eurobert
from neobert.errors import UserError
from neobert.optim.build import OptimizerSettings, build_optimizer, parameter_groups
from neobert.optim.muon import SCALE, Muon, MuonSettings, orthogonalize_, quintics

PARTS = {name: len(parts) for name, parts in FUSED.items()}


def matrix(rows, columns, condition, spread, seed=0):
    """Random singular vectors; singular values from 1 to 1/condition, spread evenly in logarithm, evenly, or all but one 1."""
    torch.manual_seed(seed)
    n = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64))[0] for size in (rows, columns))
    values = {
        "logarithmic": torch.logspace(0, -math.log10(condition), n, dtype=torch.float64),
        "even": torch.linspace(1, 1 / condition, n, dtype=torch.float64),
        "one": torch.cat([torch.ones(n - 1), torch.tensor([1 / condition])]).double(),
    }
    return (u * values[spread]) @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (256, 64)], ids=str)
@pytest.mark.parametrize(("condition", "steps"), [(1, 5), (10, 5), (100, 5), (1e3, 10), (1e4, 14)])
def test_singular_values_after_polar_express(condition, steps, shape, dtype):
    """In [0.7, 1.3]: with five steps up to a condition number of 100; 1e4 takes 14, see the next test."""
    stack = torch.stack([matrix(*shape, condition, spread) for spread in ("logarithmic", "even", "one")])
    found = orthogonalize_(stack.to(dtype), "polar_express", steps).double()
    values = torch.linalg.svdvals(found)
    assert values.min() >= 0.7
    assert values.max() <= 1.3
    if dtype == torch.float32 and steps == 5:  # and the singular vectors stay
        u, _, vh = torch.linalg.svd(stack, full_matrices=False)
        core = u.mT @ found @ vh.mT
        assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_five_quintics_cannot_lift_a_ten_thousandth():
    """Any odd polynomial of degree 5^5 below 1.3 on [0, 1] has a slope of at most 1.3 * 5^5 at 0, so 1e-4 stays below 0.41;
    the number of steps is a limit of the method. Polar Express has a quarter of that slope.
    """
    slope = math.prod(a for a, _, _ in quintics("polar_express", 5))
    assert 1.3 * 5**5 / 4.5 < slope < 1.3 * 5**5
    assert 1e-4 * 1.3 * 5**5 < 0.7


@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (256, 64)], ids=str)
def test_singular_values_after_newton_schulz(shape):
    """Keller Jordan's quintic ends between 0.68 and 1.21: it does not converge to 1."""
    stack = torch.stack([matrix(*shape, 100, spread) for spread in ("logarithmic", "even")])
    values = torch.linalg.svdvals(orthogonalize_(stack.float(), "newton_schulz", 6).double())
    assert values.min() >= 0.68
    assert values.max() <= 1.21


def test_polar_express_equals_the_paper():
    """Algorithm 1 of arXiv 2505.16932, step by step on singular values, in float64."""
    first = [(8.28721201814563, -23.595886519098837, 17.300387312530933),
             (4.107059111542203, -2.9478499167379106, 0.5448431082926601)]  # fmt: skip
    x = matrix(24, 40, 50, "logarithmic")
    values = torch.linalg.svdvals(x) / (x.norm() * 1.01 + 1e-7)
    for a, b, c in first:
        values = a / 1.01 * values + b / 1.01**3 * values**3 + c / 1.01**5 * values**5
    found = torch.linalg.svdvals(orthogonalize_(x[None].clone(), "polar_express", 2)[0])
    torch.testing.assert_close(found, values.sort(descending=True).values, rtol=1e-10, atol=1e-10)
    assert quintics("polar_express", 12)[7:] == [(1.875, -1.25, 0.375)] * 5


def test_a_stack_is_worked_off_in_runs(monkeypatch):
    """The length of a run is about memory, not about results; zero stays zero and keeps to itself."""
    stack = torch.randn(7, 8, 12)
    stack[3] = 0
    whole = orthogonalize_(stack.clone())
    monkeypatch.setattr("neobert.optim.muon.CPU_ELEMENTS", 200)
    torch.testing.assert_close(orthogonalize_(stack.clone()), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(whole[3], torch.zeros(8, 12))
    assert whole.isfinite().all()


@pytest.mark.parametrize("arguments", [("polar_express", 0), ("newton_schulz", -1), ("qr", 5)])
def test_settings_that_cannot_be(arguments):
    with pytest.raises(ValueError, match="ns_steps must be at least 1|no orthogonalization 'qr'"):
        orthogonalize_(torch.ones(1, 2, 2), *arguments)


# --- the optimizer -----------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)], ids=str)
def test_equals_torchs_muon(shape, nesterov):
    """Same iteration and momentum; torch's learning rate is adjusted by 0.2 where ours is by 0.4."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    group = {"params": [ours], "param_names": ["w"], "parts": [1], "algorithm": "muon", "weight_decay": 0.1}
    settings = MuonSettings(momentum=0.9, nesterov=nesterov, method="newton_schulz", dtype=torch.bfloat16)
    a = Muon([group], lr=0.01, settings=settings)
    b = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.05, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        a.step()
        b.step()
    step = (ours - before).norm()
    assert (ours - theirs).norm() < 0.02 * step  # bfloat16 rounds at 0.004 of each element


@pytest.mark.parametrize("shape", [(48, 48), (24, 96)], ids=str)
def test_size_of_an_update(shape):
    """Root mean square 0.4 lr, whatever the size of gradient and matrix; weight decay beside it."""
    weight = torch.nn.Parameter(torch.randn(shape))
    group = {"params": [weight], "param_names": ["w"], "parts": [1], "algorithm": "muon", "weight_decay": 0.5}
    optimizer = Muon([group], lr=0.01, settings=MuonSettings(num_steps=12, dtype=torch.float32))
    before, weight.grad = weight.detach().clone(), 1e-6 * torch.randn(shape)
    optimizer.step()
    update = weight.detach() - before * (1 - 0.01 * 0.5)
    assert update.square().mean().sqrt() == pytest.approx(0.01 * SCALE, rel=1e-2)


def test_fused_matrices_are_updated_as_the_separate_ones_of_eurobert():
    """q, k, v and gate, up are orthogonalised apart: the same update as transformers' model with separate projections gets."""
    ours = build_model()
    theirs = EuroBertForMaskedLM._from_config(
        EuroBertForMaskedLM.config_class(
            **eurobert_config(ours.config, {"bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3})
        )
    )
    theirs.load_state_dict(to_eurobert(ours.state_dict()))
    muon = MuonSettings(dtype=torch.float32, weight_decay=0.1)
    settings = OptimizerSettings("muonclip", lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), muon=muon, fused=PARTS)
    optimizers = [build_optimizer(model.named_parameters(), settings) for model in (ours, theirs)]
    for seed in range(3):
        torch.manual_seed(seed)
        gradients = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
        for model, grads in ((ours, gradients), (theirs, to_eurobert(gradients))):
            for name, p in model.named_parameters():
                p.grad = grads[name].clone()
        for optimizer in optimizers:
            optimizer.step()
    wanted, found = theirs.state_dict(), to_eurobert(ours.state_dict())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def muonclip(model, **settings):
    muon = MuonSettings(dtype=torch.float32, **settings)
    settings = OptimizerSettings("muonclip", lr=0.01, betas=(0.9, 0.99), muon=muon, fused=PARTS)
    return build_optimizer(model.named_parameters(), settings)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_anomalies_are_named_before_anything_is_written(bad):
    model = build_model()
    optimizer = muonclip(model, detect_anomalies=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p)
        if name in ("model.layers.1.ffn.down.weight", "model.norm.weight"):
            p.grad.view(-1)[3] = bad
    with pytest.raises(UserError, match=r"model.norm.weight, model.layers.1.ffn.down.weight is not finite"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.zero_grad()
    optimizer.step()


def test_zero_and_absent_gradients():
    """Nothing moves, nothing becomes NaN."""
    model = build_model()
    optimizer = muonclip(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, p in enumerate(model.parameters()):
        p.grad = torch.zeros_like(p) if number % 2 else None
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- a step that never waits -----------


def pair(bfloat16, nesterov):
    """Two equal models, each with an optimizer of its own."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    muon = MuonSettings(dtype=dtype, nesterov=nesterov, weight_decay=0.1)
    settings = OptimizerSettings("muonclip", lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), muon=muon, fused=PARTS)
    models = [build_model(), build_model()]
    for model in models:
        model.model.layers[1].ffn.down.weight.data[0] = -0.0
    return models, [build_optimizer(model.named_parameters(), settings) for model in models]


def set_gradients(models, seed):
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def bits(optimizer):
    """Weights and state of all parameters as bytes, which tell -0.0 from 0.0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [x for p in parameters for x in (p.detach(), *optimizer.state[p].values())]
    return [x.numpy().tobytes() for x in tensors]


def plain_muon_step(optimizer, group):
    """The update of a group, matrix by matrix."""
    settings, directions = optimizer.settings, []
    for p in group["params"]:
        momentum = optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        momentum.lerp_(p.grad, 1 - settings.momentum)
        directions.append(p.grad.lerp(momentum, settings.momentum) if settings.nesterov else momentum)
    updates = optimizer._solve(group["parts"], list(range(len(directions))), directions)
    for p, parts, update in zip(group["params"], group["parts"], updates, strict=True):
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * SCALE * math.sqrt(max(p.shape[0] // parts, p.shape[1])))


@pytest.mark.parametrize("few_launches", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_batched_equals_the_loop(bfloat16, nesterov, few_launches, monkeypatch):
    monkeypatch.setattr("neobert.optim.muon.wants_few_launches", lambda tensor: few_launches)
    models, (batched, loop) = pair(bfloat16, nesterov)
    for seed in range(3):
        set_gradients(models, seed)
        batched.step()
        with torch.no_grad():
            for group in loop.param_groups:
                (plain_muon_step if group["algorithm"] == "muon" else Muon._adamw_step)(loop, group)
        assert bits(batched) == bits(loop)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_flag_on_the_device_skips_a_step(bfloat16, nesterov):
    """Nothing moves by a bit where it is 1, whatever the gradients are; where it is 0, the step is the one without a flag."""
    models, (flagged, plain) = pair(bfloat16, nesterov)
    for seed in range(4):
        set_gradients(models, seed)
        flagged.found_inf = torch.zeros(())
        flagged.step()
        plain.step()
        assert bits(flagged) == bits(plain)
        for number, p in enumerate(models[0].parameters()):
            p.grad.view(-1)[0] = [torch.nan, torch.inf, 1.0][number % 3]
        flagged.found_inf = torch.ones(())
        flagged.step()
        assert bits(flagged) == bits(plain)


def test_a_first_step_that_is_skipped():
    models, (flagged, plain) = pair(False, False)
    set_gradients(models, 0)
    flagged.found_inf, before = torch.ones(()), [p.detach().clone() for p in models[0].parameters()]
    flagged.step()
    assert all(torch.equal(p, old) for p, old in zip(models[0].parameters(), before, strict=True))
    flagged.found_inf = torch.zeros(())
    flagged.step()
    plain.step()
    assert bits(flagged) == bits(plain)


@pytest.mark.parametrize("flag", [None, 0.0])
def test_launches_of_a_step(flag, monkeypatch):
    """12 layers take fewer than 150, as many as 4 do (15 products for each of 3 stacks), and the device is asked nothing."""
    monkeypatch.setattr("neobert.optim.muon.wants_few_launches", lambda tensor: True)
    found = []
    for num_layers in (4, 12):
        model = build_model(num_hidden_layers=num_layers)
        optimizer = build_optimizer(
            model.named_parameters(), OptimizerSettings("muonclip", lr=0.01, weight_decay=0.1, fused=PARTS)
        )
        optimizer.found_inf = None if flag is None else torch.tensor(flag)
        for seed in range(2):  # the first makes the state
            set_gradients([model], seed)
            with HostReads() as reads:
                optimizer.step()
        assert not reads.found
        found.append(reads.launches.total())
    print(f"{found[1]} launches")
    assert found[1] < 150
    assert found[0] == found[1]


def test_matrices_that_do_not_fit():
    named = [("layers.0.w", torch.nn.Parameter(torch.ones(8, 4)))]
    with pytest.raises(ValueError, match=r"layers.0.w has 8 rows, which are not 3 equal matrices"):
        Muon(parameter_groups(named, OptimizerSettings("muonclip", lr=0.1, fused={"w": 3})), lr=0.1)
    group = {"params": [torch.nn.Parameter(torch.ones(8))], "param_names": ["v"], "parts": [1], "algorithm": "muon"}
    with pytest.raises(ValueError, match=r"muon takes matrices, and v has shape \(8,\)"):
        Muon([group], lr=0.1)
