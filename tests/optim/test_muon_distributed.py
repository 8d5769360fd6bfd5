"""MuonClip over two real processes (gloo): replicas stay identical to the bit, and all equal one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from helpers.commands import spawn
from helpers.models import LENGTHS, PAD, build, packed_batch, planted
from neobert.checkpoints.layouts import FUSED
from neobert.errors import UserError
from neobert.optim.build import OptimizerSettings, build_optimizer, load_optimizer_state, optimizer_state
from neobert.optim.muon import MuonSettings
from neobert.optim.qk_clip import QKClip, QKClipSettings
from neobert.optim.sharding import Placement, distribute, owners, split_rows

STEPS, RANKS = 20, 2
SETTINGS = QKClipSettings(threshold=3.0, alpha=0.4, interval=2)


def batch_of(step, rank=None):
    """Four packed rows; a rank gets two of them."""
    ids, labels, _ = packed_batch(step)
    rows = range(4) if rank is None else range(2 * rank, 2 * rank + 2)
    lengths = torch.tensor([n for row in rows for n in LENGTHS[row]])
    chosen = slice(rows[0], rows[-1] + 1)
    return {"input_ids": ids[chosen], "labels": labels[chosen], "document_lengths": lengths}, int(
        (labels != -100).sum()
    )


def optimizer_of(model, **settings):
    muon = MuonSettings(dtype=torch.float32, weight_decay=0.01, **settings)
    fused = {ours: len(parts) for ours, parts in FUSED.items()}
    adamw = {"lr": 2e-3, "weight_decay": 0.01, "betas": (0.9, 0.95)}
    return build_optimizer(model.named_parameters(), OptimizerSettings("muonclip", **adamw, muon=muon, fused=fused))


def train(model, wrapped, rank=None, resume_at=None):
    """`STEPS` updates; returns the reports of the clips. `resume_at`: go on with a fresh optimizer that is given the state."""
    optimizer, clip = optimizer_of(model), QKClip(model, SETTINGS, pad_id=PAD)
    reports = []
    for update in range(1, STEPS + 1):
        if update == resume_at:
            state = {
                name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in optimizer_state(optimizer).items()
            }
            optimizer = optimizer_of(model)
            load_optimizer_state(optimizer, state)
        inputs, num_targets = batch_of(update, rank)
        clip.prepare(update, is_last_microbatch=True)
        loss_sum = wrapped(**inputs).loss_sum
        (loss_sum * (1 if rank is None else RANKS) / num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(clip.apply(update))
    return [report for report in reports if report is not None]


def weights_of(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def run_ddp(rank):
    model = planted(build(pad_token_id=PAD))
    reports = train(model, DistributedDataParallel(model), rank)
    return {"weights": weights_of(model), "reports": reports, "skips": skips(model)}


def run_fsdp(rank):
    model = planted(build(pad_token_id=PAD))
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    reports = train(model, model, rank, resume_at=11)
    return {"weights": weights_of(model), "reports": reports, "skips": skips(model), "anomaly": anomaly(model, rank)}


def skips(model):
    """Whether a flag keeps Muon, and torch's AdamW, from writing gradients that are not finite."""
    before, same = weights_of(model), []
    for optimizer in (optimizer_of(model), torch.optim.AdamW(model.parameters(), fused=True)):
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        same.append(all(torch.equal(before[name], x) for name, x in weights_of(model).items()))
    return same


def anomaly(model, rank):
    """One bad element on one rank stops all ranks."""
    optimizer = optimizer_of(model, detect_anomalies=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if rank == 1:
        model.model.layers[0].ffn.down.weight.grad.to_local()[0, 0] = torch.nan
    try:
        optimizer.step()
    except UserError as error:
        return str(error)
    return ""


def run_odd_rows(rank):
    """Matrices whose rows do not split evenly, or not at all, and more of them than ranks; in bfloat16."""
    torch.manual_seed(0)
    whole = [torch.randn(rows, columns).bfloat16() for rows, columns in ((5, 3), (1, 4), (2, 2), (7, 1))]
    doubled = {}
    for is_split in (True, False):
        parts = [x[split_rows(len(x), rank, RANKS)] for x in whole] if is_split else whole
        where = Placement(dist.group.WORLD, is_split)
        got = distribute(where, parts, [len(x) for x in whole], lambda _, xs: [x.cumsum(0) for x in xs])
        wanted = [x.cumsum(0)[split_rows(len(x), rank, RANKS)] if is_split else x.cumsum(0) for x in whole]
        doubled[is_split] = all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    return doubled


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {"odd rows": run_odd_rows(rank), "ddp": run_ddp(rank), "fsdp": run_fsdp(rank)}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(worker, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    model = planted(build(pad_token_id=PAD))
    reports = train(model, model)
    return {"weights": weights_of(model), "reports": reports}


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_equal_one(ranks, alone, engine):
    """Weights after 20 steps, and every clip on the way: identical between ranks, and those of one process that has the
    whole batch. The clip fires, and is not the clip of either half of the batch.
    """
    a, b = (results[engine] for results in ranks)
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    for one, other in zip(a["reports"], b["reports"], strict=True):
        assert torch.equal(one.maxima, other.maxima)
        assert torch.equal(one.factors, other.factors)
    difference = max(
        ((a["weights"][name] - wanted).norm() / wanted.norm()).item() for name, wanted in alone["weights"].items()
    )
    print(f"{engine}: relative difference of two ranks to one {difference:.1e}")
    assert difference <= 1e-5
    assert len(alone["reports"]) == STEPS // 2
    assert sum(int((report.factors < 1).sum()) for report in alone["reports"]) > 10
    for report, wanted in zip(a["reports"], alone["reports"], strict=True):
        assert torch.equal(report.factors < 1, wanted.factors < 1)
        torch.testing.assert_close(report.factors, wanted.factors, rtol=1e-4, atol=0)
    first = alone["reports"][0].maxima
    halves = [half_maxima(rank) for rank in range(RANKS)]
    assert all((half < first - 0.01).any() for half in halves)


def half_maxima(rank):
    """What a rank would clip by if it looked at its own half only; first clip, before weights differ much."""
    model = planted(build(pad_token_id=PAD))
    clip = QKClip(model, SETTINGS, pad_id=PAD)
    inputs, num_targets = batch_of(1)
    (model(**inputs).loss_sum / num_targets).backward()
    optimizer_of(model).step()
    clip.prepare(2, is_last_microbatch=True)
    model(**batch_of(2, rank)[0])
    return clip.apply(2).maxima


def test_one_bad_rank_stops_all(ranks):
    messages = [results["fsdp"]["anomaly"] for results in ranks]
    assert messages[0] == messages[1]
    assert "gradient of model.layers.0.ffn.down.weight is not finite" in messages[0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_flag_skips_a_step(ranks, engine):
    assert [results[engine]["skips"] for results in ranks] == [[True, True]] * 2


def test_rows_travel_to_their_owner_and_back(ranks):
    assert [results["odd rows"] for results in ranks] == [{True: True, False: True}] * 2


def test_owners_share_the_work():
    assert owners([5, 9, 4, 4], 2) == [1, 0, 1, 0]
    assert owners([], 3) == []
    sizes = [7, 7, 7, 7, 20, 1]
    loads = [
        sum(size for size, owner in zip(sizes, owners(sizes, 3), strict=True) if owner == rank) for rank in range(3)
    ]
    assert max(loads) <= 21
