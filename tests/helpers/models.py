"""Tiny models on packed batches, models made by others, and how two of them are compared."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neobert.checkpoints.layouts import PUBLISHED
from neobert.model.modeling_neobert import IGNORED, NeoBERTConfig, NeoBERTForMaskedLM

VOCABULARY = 120


LENGTHS = [(5, 30, 29), (64,), (1, 62, 1), (40, 24)]  # 4 packed rows of 64 tokens


VARIANTS = [
    {"rope": rope, "rms_norm": rms, "hidden_act": act}
    for rope, rms, act in itertools.product((True, False), (True, False), ("swiglu", "gelu"))
] + [{"ngpt": True, "rope": rope, "hidden_act": act} for rope, act in ((True, "swiglu"), (False, "gelu"))]


def build(seed=0, **fields):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
    ranges = {"decoder_init_range": 0.2, "embedding_init_range": 0.5}
    return NeoBERTForMaskedLM(
        NeoBERTConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 64, **shape, **ranges, **fields})
    )


def packed_batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (len(LENGTHS), 64), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, IGNORED)
    return ids, labels, torch.tensor([n for row in LENGTHS for n in row])


def unpacked(x_BT, fill):
    """The documents of a packed batch as padded rows of their own."""
    documents = x_BT.flatten().split([n for row in LENGTHS for n in row])
    return torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True, padding_value=fill)


def gradients(model, masked_only=True, **inputs):
    model.zero_grad()
    output = model(**inputs, masked_only=masked_only)
    output.loss_sum.backward()
    return output.loss_sum.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(a, b, tolerance=1e-5):
    assert a[0] == pytest.approx(b[0].item(), rel=tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=tolerance, atol=tolerance, msg=name)


HEADS, WIDTH = 4, 8


OUTLIERS = {0: {1: 3.0}, 2: {0: 2.0, 3: 4.0}}  # block -> head -> factor of its rows of q and k


PAD = 0


def planted(model):
    """Some heads with large logits."""
    with torch.no_grad():
        for block, heads in OUTLIERS.items():
            weight = model.model.layers[block].attention.qkv.weight
            for head, factor in heads.items():
                for part in (0, 32):
                    weight[part + head * WIDTH : part + (head + 1) * WIDTH] *= factor
    return model


class PublishedLayer(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.qkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.ffn = nn.ModuleDict(
            {"w12": nn.Linear(width, 2 * inner, bias=False), "w3": nn.Linear(inner, width, bias=False)}
        )

    def forward(self, x, turn, mask):
        B, T, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, self.heads, -1).chunk(3, dim=-1)
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.reshape(B, T, self.heads, -1, 2)) * turn).flatten(3)
            for z in (q, k)
        )
        scores = torch.einsum("bqhk,bvhk->bhqv", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
        x = x + self.wo(torch.einsum("bhqv,bvhk->bqhk", weights, v).reshape(B, T, D))
        gate, up = self.ffn["w12"](self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn["w3"](F.silu(gate) * up)


class Published(nn.Module):
    """Interleaved rotary pairs as complex numbers, q, k and v fused head by head, a decoder with a bias."""

    def __init__(self, vocabulary, width, layers, heads, inner):
        super().__init__()
        self.heads = heads
        self.model = nn.ModuleDict(
            {
                "encoder": nn.Embedding(vocabulary, width),
                "transformer_encoder": nn.ModuleList([PublishedLayer(width, heads, inner) for _ in range(layers)]),
                "layer_norm": nn.RMSNorm(width, 1e-5),
            }
        )
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, ids, mask):
        x = self.model["encoder"](ids)
        K = x.shape[-1] // self.heads
        angles = torch.outer(torch.arange(ids.shape[1]), 10_000.0 ** (-torch.arange(0, K, 2) / K))
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
        for layer in self.model["transformer_encoder"]:
            x = layer(x, turn, mask.bool())
        return self.decoder(self.model["layer_norm"](x))


def to_published(weights, num_heads):
    """The inverse of `from_published`; a decoder without a bias gets one of zeros."""
    out = {}
    for name, tensor in weights.items():
        if name.endswith("attention.qkv.weight"):
            q, k, v = tensor.view(3, num_heads, -1, tensor.shape[1]).unbind(0)
            pairs = [torch.stack(x.chunk(2, dim=1), dim=2).flatten(1, 2) for x in (q, k)]
            tensor = torch.stack((*pairs, v), dim=1).reshape(tensor.shape)
        for theirs, ours in PUBLISHED.items():
            name = name.replace(ours, theirs)
        out[name] = tensor
    if "decoder.weight" in out:
        out.setdefault("decoder.bias", out["decoder.weight"].new_zeros(len(out["decoder.weight"])))
    return out
