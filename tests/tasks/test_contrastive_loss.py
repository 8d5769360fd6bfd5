"""Contrastive losses = sentence-transformers' and naive formulas; two processes with gathered texts = one with all of them."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.commands import spawn
from helpers.pairs import made_pairs, made_scores, run_contrastive, three_sources, write_rows
from neobert.model.embedding import ContrastiveLoss, ContrastiveSettings, NeoBERTForEmbedding, alignment, uniformity
from neobert.model.hf_encoder import group_by_length
from neobert.model.modeling_neobert import NeoBERTConfig
from neobert.training.metrics import read_metrics

G, D = 12, 24


def vectors(number, seed=0):
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def keys_of(num_negatives=0, world=1, rows=G):
    """Keys of G rows whose texts all differ, with so many negatives each."""
    return {
        "row_keys_G": torch.arange(rows),
        "anchor_keys_G": torch.arange(rows) + 1000,
        "negative_keys": torch.arange(rows * num_negatives) + 2000,
        "negative_rows": torch.arange(rows).repeat_interleave(num_negatives),
        "num_negatives": (rows * num_negatives // world,) * world,
    }


def loss_and_gradient(settings, x, keys):
    loss_sum, num_correct = ContrastiveLoss(ContrastiveSettings(**settings))(x, **keys)
    return loss_sum.detach(), torch.autograd.grad(loss_sum, x)[0], num_correct


@pytest.mark.parametrize("num_negatives", [0, 1, 3])
def test_info_nce_equals_sentence_transformers(num_negatives):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    x = vectors(G * (2 + num_negatives))
    ours, gradient, _ = loss_and_gradient({"temperature": 0.05}, x, keys_of(num_negatives))
    peer = losses.MultipleNegativesRankingLoss(model=None, scale=20.0)
    negatives = x[2 * G :].view(G, num_negatives, D).unbind(1)
    theirs = peer.compute_loss_from_embeddings([x[:G], x[G : 2 * G], *negatives], None) * G
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, x)[0], atol=1e-5, rtol=1e-5)


def test_supcon_equals_the_formula():
    x, labels = vectors(2 * G), torch.tensor([n % 4 for n in range(G)])
    keys = {**keys_of(), "row_keys_G": labels, "anchor_keys_G": labels}
    ours, gradient, num_correct = loss_and_gradient({"loss_type": "supcon", "temperature": 0.1}, x, keys)
    z, y, total, right = F.normalize(x, dim=1), labels.repeat(2), 0.0, 0
    for i in range(2 * G):
        others = [a for a in range(2 * G) if a != i]
        logits = torch.stack([z[i] @ z[a] / 0.1 for a in others])
        positives = [n for n, a in enumerate(others) if y[a] == y[i]]
        total = total - (logits[positives] - logits.logsumexp(0)).mean()
        right += int(y[others[int(logits.argmax())]] == y[i])
    torch.testing.assert_close(ours, total.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, x)[0], atol=1e-5, rtol=1e-5)
    assert num_correct == right


def test_texts_equal_to_the_positive_are_no_negatives():
    """Row 3 has the positive of row 0, negative 1 too, and negative 2 is the anchor of row 0."""
    x, keys = vectors(3 * G), keys_of(1)
    keys["row_keys_G"][3] = 0
    keys["negative_keys"][1] = 0
    keys["negative_keys"][2] = 1000
    mask = torch.zeros(G, 2 * G, dtype=torch.bool)
    mask[0, [3, G + 1, G + 2]] = mask[3, [0, G + 1]] = True
    z = F.normalize(x, dim=1)
    logits = (z[:G] @ z[G:].T / 0.05).masked_fill(mask, -torch.inf)
    expected = F.cross_entropy(logits, torch.arange(G), reduction="sum").detach()
    torch.testing.assert_close(loss_and_gradient({}, x, keys)[0], expected)


def test_hard_negatives_count_e_to_the_weight():
    x, weight = vectors(3 * G), 1.5
    ours, _, _ = loss_and_gradient({"hard_negative_weight": weight}, x, keys_of(1))
    z = F.normalize(x, dim=1)
    terms = (z[:G] @ z[G:].T / 0.05).exp()
    terms = torch.cat(
        [terms[:, :G], terms[:, G:] * torch.where(torch.eye(G).bool(), torch.tensor(weight).exp(), 1.0)], 1
    )
    torch.testing.assert_close(ours, -(terms.diag() / terms.sum(1)).log().sum().detach(), rtol=1e-4, atol=1e-4)


def test_alignment_and_uniformity():
    a, b = (F.normalize(vectors(G, seed), dim=1) for seed in (1, 2))
    pairs = [(a[i] - a[j]).square().sum() for i in range(G) for j in range(G) if i != j]
    torch.testing.assert_close(alignment(a, b), (a - b).norm(dim=1).square().mean().detach())
    torch.testing.assert_close(uniformity(a), torch.stack(pairs).mul(-2).exp().mean().log().detach())
    assert uniformity(torch.ones(3, D) / D**0.5) == pytest.approx(0, abs=1e-5)


class Operations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_batches_are_looked_at_when_a_step_is_logged():
    """A step in training computes what one in evaluation does and waits for no number; looking takes the last batch's pairs."""
    loss = tiny_model({}).contrastive
    keys = {name: value for name, value in batch_of((0,) * G, 1, 0)["keys"].items()}
    assert loss.observe().tolist() == [0, 0, 0]
    counted = []
    for mode, vectors in zip((True, True, False), torch.randn(3, 2 * G, D).unbind(0), strict=True):
        with Operations() as seen:
            loss.train(mode)(vectors, **keys)
        counted.append({name: seen.names.count(name) for name in ("mm", "exp", "_local_scalar_dense")})
        if mode:
            a, b = torch.nn.functional.normalize(vectors, dim=-1).split(G)
    assert counted[0] == counted[1] == counted[2]
    assert loss.observe().tolist() == pytest.approx([alignment(a, b).item(), uniformity(a).item(), 1])


def test_groups_hold_every_text_once():
    lengths = [5, 128, 6, 90, 7, 127, 64, 5]
    order, groups = group_by_length(lengths)
    assert [number for group in groups for number in group] == order
    assert sorted(order) == list(range(len(lengths)))
    assert all(min(lengths[n] for n in group) >= 0.75 * max(lengths[n] for n in group) for group in groups)


# --- two processes -----------

CASES = {
    "simcse": ({}, (0,) * G),
    "negatives": ({"hard_negative_weight": 0.7}, (1, 0, 2) * (G // 3)),
    "uneven": ({}, (2,) * (G // 2) + (0,) * (G // 2)),
    "supcon": ({"loss_type": "supcon"}, (1,) * G),
}


def batch_of(counts, world, rank):
    """Inputs of one of `world` processes: G rows with so many negatives each; some texts are the same."""
    B, generator = G // world, torch.Generator().manual_seed(7)
    texts = [torch.randint(5, 60, (3 + n % 9,), generator=generator) for n in range(2 * G + sum(counts))]
    anchors, positives, negatives = texts[:G], texts[G : 2 * G], texts[2 * G :]
    positives[4] = positives[1]
    row_keys = torch.arange(G)
    row_keys[4] = 1
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    mine = slice(rank * B, (rank + 1) * B)
    held = [*anchors[mine], *positives[mine], *negatives[ends[mine.start] : ends[mine.stop]]]
    keys = {
        "row_keys_G": row_keys,
        "anchor_keys_G": torch.arange(G) + 1000,
        "negative_keys": torch.arange(sum(counts)) + 2000,
        "negative_rows": torch.arange(G).repeat_interleave(torch.tensor(counts)),
        "num_negatives": tuple(torch.tensor(counts).view(world, B).sum(1).tolist()),
    }
    lengths = torch.tensor([len(text) for text in held])
    return {"input_ids": torch.cat(held)[None], "document_lengths": lengths, "keys": keys}


def tiny_model(settings):
    torch.manual_seed(0)
    config = NeoBERTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, embedding_init_range=0.5, decoder_init_range=0.2,
    )  # fmt: skip
    return NeoBERTForEmbedding(config, ContrastiveSettings(**settings))


def gradients(model, counts, world, rank):
    """Of the mean loss over all anchors, as the loop computes them."""
    output = model(**batch_of(counts, world, rank))
    (output.loss_sum * world / G).backward()
    return {name: p.grad for name, p in getattr(model, "module", model).named_parameters()} | {
        "loss": output.loss_sum.detach()
    }


ENGINES = ("ddp", "fsdp2")


def run_words(folder, *more):
    evaluation = [
        {"path": str(folder / "scores.jsonl"), "label": "sts"},
        {"path": str(folder / "held.jsonl"), "label": "held"},
    ]
    return [
        f"contrastive.evaluation={json.dumps(evaluation)}", "trainer.eval_steps=3",
        *three_sources(folder / "data"), f"trainer.output_dir={folder / 'out'}", "trainer.save_steps=3",
        "trainer.gradient_accumulation_steps=2", "trainer.max_steps=6", *more,
    ]  # fmt: skip


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, (settings, counts) in CASES.items():
        model = torch.nn.parallel.DistributedDataParallel(tiny_model(settings))
        save_file(gradients(model, counts, 2, rank), folder / f"{name}{rank}.safetensors")
    for engine in ENGINES:
        words = (f"trainer.engine={engine}", "trainer.per_device_train_batch_size=4")
        run_contrastive(*run_words(folder, *words, f"trainer.output_dir={folder / engine}"))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_with_all_texts(tmp_path):
    """Gradients; whole runs; and a run of two that one process continues."""
    three_sources(tmp_path / "data")
    write_rows(tmp_path / "scores.jsonl", made_scores(31))
    write_rows(tmp_path / "held.jsonl", made_pairs(12))
    spawn(worker, (tmp_path,), 2)
    compare_gradients(tmp_path)
    run_contrastive(*run_words(tmp_path))
    shutil.copytree(tmp_path / "ddp/checkpoints/3", tmp_path / "one/checkpoints/3")
    shutil.copy(tmp_path / "ddp/metrics.jsonl", tmp_path / "one")
    run_contrastive(
        *run_words(tmp_path, f"trainer.output_dir={tmp_path / 'one'}", "trainer.resume_from_checkpoint=latest")
    )
    wanted = load_file(tmp_path / "out/checkpoints/6/model.safetensors")
    losses = [row["loss"] for row in read_metrics(tmp_path / "out/metrics.jsonl") if row["kind"] == "train"]
    scores = evaluated(tmp_path / "out")
    assert set(scores[6]) >= {"eval_sts_spearman", "eval_held_mrr@10", "eval_held_ndcg@10"}
    for name in (*ENGINES, "one"):
        found = load_file(tmp_path / name / "checkpoints/6/model.safetensors")
        rows = [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-4)
        assert evaluated(tmp_path / name)[6] == pytest.approx(scores[6], abs=0.05)
        for tensor, value in wanted.items():
            torch.testing.assert_close(found[tensor], value, atol=2e-4, rtol=1e-3)


def evaluated(run):
    """Step -> scores."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "eval"]
    return {row["step"]: {k: v for k, v in row.items() if k.startswith(("eval_sts", "eval_held"))} for row in rows}


def compare_gradients(tmp_path):
    for name, (settings, counts) in CASES.items():
        alone = gradients(tiny_model(settings), counts, 1, 0)
        halves = [load_file(tmp_path / f"{name}{rank}.safetensors") for rank in (0, 1)]
        torch.testing.assert_close(alone.pop("loss"), sum(one.pop("loss") for one in halves), atol=1e-5, rtol=1e-5)
        for half in halves:
            for parameter, gradient in alone.items():
                torch.testing.assert_close(half[parameter], gradient, atol=1e-5, rtol=1e-5)
