"""The model against implementations that are not ours: transformers' EuroBERT, the published NeoBERT, nGPT's formulas."""

import pytest
import torch
import torch.nn.functional as F
from transformers import EuroBertConfig, EuroBertForMaskedLM, EuroBertForSequenceClassification

from helpers.models import LENGTHS, VOCABULARY, Published, build, packed_batch, to_published, unpacked
from neobert.checkpoints.layouts import eurobert_config, from_eurobert, from_published, to_eurobert
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTForSequenceClassification

SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}


def padded_batch(rows=(50, 1, 49, 20, 33, 7)):
    torch.manual_seed(0)
    ids, mask = torch.randint(5, 200, (len(rows), max(rows))), torch.ones(len(rows), max(rows), dtype=torch.long)
    for row, length in enumerate(rows):
        mask[row, length:] = 0
    return ids, mask


# --- EuroBERT -----------


@pytest.mark.parametrize(("width", "layers", "heads"), [(16, 1, 2), (64, 4, 4), (256, 6, 4), (768, 12, 12)])
@torch.no_grad()
def test_equals_eurobert(width, layers, heads):
    """transformers' EuroBERT with the same weights computes the same hidden states and logits, on padded batches."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = NeoBERTConfig(vocab_size=200, intermediate_size=4 * width, **shape)
    ours = NeoBERTForMaskedLM(config).eval()
    theirs = EuroBertForMaskedLM(EuroBertConfig(**eurobert_config(config, SPECIAL))).eval()
    theirs.load_state_dict(to_eurobert(ours.state_dict()))
    ids, mask = padded_batch()
    for a, b in (
        (ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits),
        (ours.model(ids, attention_mask=mask)[0], theirs.model(ids, attention_mask=mask)[0]),
    ):
        assert (a - b)[mask.bool()].abs().max() <= 1e-5


@pytest.mark.parametrize("pooling", ["bos", "mean"])
@torch.no_grad()
def test_classifier_equals_eurobert(pooling):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = NeoBERTConfig(vocab_size=200, num_labels=3, classifier_pooling=pooling, **shape)
    ours = NeoBERTForSequenceClassification(config).eval()
    fields = eurobert_config(config, SPECIAL) | {"num_labels": 3, "classifier_pooling": pooling}
    theirs = EuroBertForSequenceClassification(EuroBertConfig(**fields)).eval()
    theirs.load_state_dict(to_eurobert(ours.state_dict()))
    ids, mask = padded_batch()
    difference = ours(ids, attention_mask=mask).logits - theirs(ids, attention_mask=mask).logits
    assert difference.abs().max() <= 1e-5


def test_classifier_starts_in_its_range_and_learns():
    ids, mask = padded_batch()
    config = NeoBERTConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        num_labels=2, classifier_init_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NeoBERTForSequenceClassification(config)
    assert model.dense.weight.std().item() == pytest.approx(0.05, rel=0.05)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(ids, attention_mask=mask, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1].item() < 0.2 * losses[0]


def test_layouts_are_inverse():
    weights = build().state_dict()
    for there, back in (
        (to_eurobert, from_eurobert),
        (lambda w: to_published(w, 4), lambda w: from_published(w, 4)),
    ):
        again = back(there(weights))
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[name], weights[name]) for name in weights)


# --- the published NeoBERT, from its description -----------


@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_equals_the_published_model(biased):
    """Both directions: its weights in our model, and ours in it."""
    torch.manual_seed(0)
    theirs = Published(200, 64, 3, 4, 88).eval()
    if not biased:
        theirs.decoder.bias.zero_()
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = NeoBERTConfig(vocab_size=200, decoder_bias=biased, **shape)
    ours = NeoBERTForMaskedLM(config).eval()
    ids, mask = padded_batch()
    fresh = Published(200, 64, 3, 4, 88).eval()
    fresh.load_state_dict(to_published(ours.state_dict(), 4))
    difference = ours(ids, attention_mask=mask).logits - fresh(ids, mask)
    assert difference[mask.bool()].abs().max() <= 1e-5
    ours.load_state_dict(from_published(theirs.state_dict(), 4))
    difference = ours(ids, attention_mask=mask).logits - theirs(ids, mask)
    assert difference[mask.bool()].abs().max() <= 1e-5


# --- nGPT, from the formulas of arXiv 2410.01131 -----------


def norm(x):
    return x / x.norm(dim=-1, keepdim=True)


def ngpt_logits(w, ids, heads, layers, base_scale, rope=True):
    """Its sections 2.1 to 2.5, for one document; every learned scale is value / stored * initial."""
    D = w["model.embed_tokens.weight"].shape[1]
    K = D // heads
    h = w["model.embed_tokens.weight"][ids]
    h = h if rope else norm(h + w["model.embed_positions.weight"][1 : len(ids) + 1])
    angles = torch.arange(len(ids))[:, None] * 10_000.0 ** (-torch.arange(0, K, 2) / K)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    for n in range(layers):
        p = f"model.layers.{n}."
        q, k, v = ((h @ x.T).view(-1, heads, K) for x in w[p + "attention.qkv.weight"].chunk(3))
        if rope:
            q, k = (x * cos + torch.cat((-x[..., K // 2 :], x[..., : K // 2]), -1) * sin for x in (q, k))
        s_qk = (w[p + "attention.qk_scale.weight"] / base_scale).view(heads, K)
        q, k = norm(q) * s_qk, norm(k) * s_qk
        weights = (torch.einsum("qhk,vhk->hqv", q, k) * K**0.5).softmax(-1)
        attended = torch.einsum("hqv,vhk->qhk", weights, v).reshape(-1, D) @ w[p + "attention.out.weight"].T
        h = norm(h + (w[p + "attention_alpha.weight"] / base_scale * 0.05).abs() * (norm(attended) - h))
        if p + "ffn.gate_up.weight" in w:
            gate, up = (h @ w[p + "ffn.gate_up.weight"].T).chunk(2, -1)
            inner = F.silu(gate * w[p + "ffn.gate_scale.weight"] * D**0.5) * up * w[p + "ffn.up_scale.weight"]
        else:
            inner = F.gelu(h @ w[p + "ffn.up.weight"].T * w[p + "ffn.up_scale.weight"] * D**0.5)
        part = inner @ w[p + "ffn.down.weight"].T
        h = norm(h + (w[p + "ffn_alpha.weight"] / base_scale * 0.05).abs() * (norm(part) - h))
    return h @ w["lm_head.weight"].T * (w["logit_scale.weight"] / base_scale)


@pytest.mark.parametrize("fields", [{}, {"rope": False, "hidden_act": "gelu"}], ids=str)
@torch.no_grad()
def test_ngpt_equals_the_formulas(fields):
    model = build(ngpt=True, base_scale=0.1, **fields).eval()
    for name, p in model.named_parameters():  # scales that differ from their start, alphas of both signs
        if p.ndim == 1:
            p.mul_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) + 1.0)
    ids, _, lengths = packed_batch()
    logits = model(ids, document_lengths=lengths).logits.flatten(0, 1)
    expected = [
        ngpt_logits(model.state_dict(), document, 4, 3, 0.1, rope=fields.get("rope", True))
        for document in ids.flatten().split(lengths.tolist())
    ]
    assert (logits - torch.cat(expected)).abs().max() <= 1e-5


def test_ngpt_matrices_stay_of_length_one():
    """After ten updates: rows along the embedding dimension, columns of the matrices that write to it; hidden states too."""
    model = build(ngpt=True)
    ids, labels, lengths = packed_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(10):
        model(ids, document_lengths=lengths, labels=labels).loss.backward()
        optimizer.step()
        model.normalize_matrices()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
        if p.ndim == 2:
            writes = "attention.out" in name or "ffn.down" in name
            assert (p.norm(dim=0 if writes else 1) - 1).abs().max() <= 1e-5, name
    hidden = model.model(ids, document_lengths=lengths).last_hidden_state
    assert (hidden.norm(dim=-1) - 1).abs().max() <= 1e-5


def test_ngpt_on_padded_batches():
    model = build(ngpt=True).eval()
    ids, _, lengths = packed_batch()
    mask = unpacked(torch.ones_like(ids), 0)
    padded = model(unpacked(ids, 0), attention_mask=mask).logits[mask.bool()]
    packed = model(ids, document_lengths=lengths).logits.flatten(0, 1)
    assert sum(map(sum, LENGTHS)) == len(padded)
    torch.testing.assert_close(padded, packed, rtol=1e-5, atol=1e-5)
    assert packed.shape[-1] == VOCABULARY
