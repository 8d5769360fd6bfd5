"""QK-clip against a naive float64 reference over the whole batch: same heads, same factors, same weights."""

from collections import Counter

import pytest
import torch
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EuroBertConfig, EuroBertModel

from helpers.host_reads import HostReads
from helpers.models import HEADS, LENGTHS, PAD, WIDTH, build, packed_batch, planted, unpacked
from neobert.data.batch import Batch
from neobert.errors import ConfigError
from neobert.model.attention import Layout
from neobert.model.layers import Attention
from neobert.model.unpadding import Documents
from neobert.optim.qk_clip import (
    QKClip,
    QKClipSettings,
    _real_documents,
    clip_factors,
    clip_metrics,
    group_documents,
    largest_logits,
    stack_reports,
)
from neobert.training.loop import to_host


def rotations(positions, width):
    """RoPE as complex numbers, of the pairs (i, i + K/2)."""
    angles = positions.double()[:, None] / 10_000.0 ** (torch.arange(0, width, 2).double() / width)
    return torch.polar(torch.ones_like(angles), angles)


def naive_maxima(inputs, weights, documents, has_rope):
    """Largest logit of every block and head. `inputs`: hidden states N x D of each block; `documents`: runs of tokens."""
    maxima = torch.full((len(inputs), HEADS), -torch.inf, dtype=torch.float64)
    for block, (hidden, weight) in enumerate(zip(inputs, weights, strict=True)):
        for document in documents:
            for head in range(HEADS):
                rows = slice(head * WIDTH, (head + 1) * WIDTH)
                q, k = (hidden[document].double() @ weight.double()[part:][rows].T for part in (0, 32))
                if has_rope:
                    turn = rotations(torch.arange(len(q)), WIDTH)
                    q, k = (torch.complex(*x.chunk(2, 1)) * turn for x in (q, k))
                    logits = (q @ k.conj().T).real
                else:
                    logits = q @ k.T
                maxima[block, head] = max(maxima[block, head], logits.max() / WIDTH**0.5)
    return maxima


def remember_inputs(model):
    """Hidden states that go into each attention, pass by pass."""
    seen = [[] for _ in model.model.layers]
    for block, kept in zip(model.model.layers, seen, strict=True):
        block.attention.qkv.register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0].detach().clone())
        )
    return seen


def qkv(model):
    return [layer.attention.qkv.weight.detach().clone() for layer in model.model.layers]


def packed_inputs(seed=1):
    """Packed rows whose ends are padding, which counts as a document in `document_lengths`; and the runs of real tokens."""
    ids, labels, lengths = packed_batch(seed)
    ids = ids.flatten()
    starts, runs = (lengths.cumsum(0) - lengths).tolist(), []
    for number, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=True)):
        if number in (2, 6):  # the last document of rows 0 and 2
            ids[start : start + length] = PAD
        else:
            runs.append(slice(start, start + length))
    return {"input_ids": ids.view(labels.shape), "labels": labels, "document_lengths": lengths}, runs


def padded_inputs(seed=1):
    """One document a row; the model leaves padding out, so the runs are those of a flat batch."""
    ids, labels, lengths = packed_batch(seed)
    mask = unpacked(torch.ones_like(ids), 0)
    ends = lengths.cumsum(0).tolist()
    runs = [slice(end - length, end) for end, length in zip(ends, lengths.tolist(), strict=True)]
    return {"input_ids": unpacked(ids, PAD), "labels": unpacked(labels, -100), "attention_mask": mask}, runs


def check_clip(model, before, report, wanted, threshold, alpha):
    """Same heads, same factors, and weights scaled by them and nothing else."""
    factors = torch.where(wanted > threshold, threshold / wanted, 1.0)
    torch.testing.assert_close(report.maxima.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(report.factors < 1, factors < 1)
    torch.testing.assert_close(report.factors, factors, rtol=1e-5, atol=0)
    for old, new, factor in zip(before, qkv(model), factors, strict=True):
        q, k, v = old.chunk(3)
        per_row = factor.repeat_interleave(WIDTH)[:, None].float()
        torch.testing.assert_close(
            new, torch.cat([q * per_row**alpha, k * per_row ** (1 - alpha), v]), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize("inputs", [packed_inputs, padded_inputs])
@pytest.mark.parametrize("rope", [True, False])
def test_equals_a_naive_reference(rope, inputs, chunk):
    model = planted(build(rope=rope, pad_token_id=PAD))
    threshold, alpha = 4.0, 0.3
    clip = QKClip(model, QKClipSettings(threshold, alpha, interval=1, chunk_size=chunk), pad_id=PAD)
    seen, before = remember_inputs(model), qkv(model)
    batch, runs = inputs()
    clip.prepare(1, is_last_microbatch=True)
    model(**batch).loss_sum.backward()
    wanted = naive_maxima([kept[0] for kept in seen], before, runs, rope)
    report = clip.apply(1)
    check_clip(model, before, report, wanted, threshold, alpha)
    assert {(b, h) for b, h in (report.factors < 1).nonzero().tolist()} >= {(0, 1), (2, 3)}
    assert (report.factors == 1).any()


def test_a_clipped_head_comes_down_to_the_threshold():
    """The same batch again, for the first block (whose input does not change): its largest logit is the threshold."""
    model = planted(build())
    clip = QKClip(model, QKClipSettings(4.0, interval=1), pad_id=None)
    batch, _ = packed_inputs()
    reports = []
    for update in (1, 2):
        clip.prepare(update, is_last_microbatch=True)
        model(**batch)
        reports.append(clip.apply(update))
    assert reports[0].maxima[0, 1] > 8
    assert reports[1].maxima[0, 1] == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("last_only", [True, False])
def test_the_window_that_is_looked_at(last_only):
    """The last microbatch, or the maximum over all of them; forward passes that nobody prepared do not count."""
    model = planted(build())
    settings = QKClipSettings(4.0, 0.5, interval=1, last_microbatch_only=last_only)
    clip = QKClip(model, settings, pad_id=PAD)
    seen, before = remember_inputs(model), qkv(model)
    batches = [packed_inputs(seed) for seed in (1, 2, 3)]
    model(**packed_inputs(9)[0])  # an evaluation
    for number, (batch, _) in enumerate(batches):
        clip.prepare(1, is_last_microbatch=number == 2)
        model(**batch)
    model(**packed_inputs(8)[0])
    looked_at = [2] if last_only else [0, 1, 2]
    maxima = [
        naive_maxima([kept[1 + number] for kept in seen], before, batches[number][1], True) for number in looked_at
    ]
    check_clip(model, before, clip.apply(1), torch.stack(maxima).amax(0), 4.0, 0.5)


def test_updates_that_are_due():
    settings = QKClipSettings(interval=3, warmup_steps=4)
    assert [update for update in range(1, 14) if settings.is_due(update)] == [6, 9, 12]
    model = planted(build())
    clip, before = QKClip(model, settings, pad_id=None), qkv(model)
    clip.see = lambda *_: pytest.fail("update 5 is not due")
    clip.prepare(5, is_last_microbatch=True)
    model(**packed_inputs()[0])
    assert clip.apply(5) is None
    assert all(torch.equal(a, b) for a, b in zip(before, qkv(model), strict=True))


@pytest.mark.parametrize("how", ["checkpointing", "compiled", "both"])
def test_same_clip_with_checkpointing_and_compilation(how):
    """A recomputation in the backward pass is not looked at, and compiled blocks are seen; gradients stay what they were."""
    torch._dynamo.reset()
    models = [planted(build()), planted(build())]
    models[1].model.gradient_checkpointing = how != "compiled"
    if how != "checkpointing":
        for layer in models[1].model.layers:
            layer.project = torch.compile(layer.project, backend="aot_eager", fullgraph=True)
            layer.finish = torch.compile(layer.finish, backend="aot_eager", fullgraph=True)
    clips = [QKClip(model, QKClipSettings(4.0, interval=2), pad_id=PAD) for model in models]
    calls = []
    original = clips[1].see
    clips[1].see = lambda *arguments: (calls.append(1), original(*arguments))
    for update in (1, 2, 3, 4):
        reports = []
        for model, clip in zip(models, clips, strict=True):
            model.zero_grad()
            clip.prepare(update, is_last_microbatch=True)
            model(**packed_inputs(update)[0]).loss_sum.backward()
            reports.append(clip.apply(update))
        if update % 2 == 0:
            torch.testing.assert_close(reports[1].maxima, reports[0].maxima, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * len(models[1].model.layers)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_with_a_mask_are_seen_as_documents():
    """CUDA's layout: rows stay padded and are masked. Same maxima as of the flat layout without padding, or with padding."""
    torch.manual_seed(0)
    attention = Attention(32, 4)
    model = torch.nn.Sequential(attention)
    clip = QKClip(model, QKClipSettings(interval=1), pad_id=None)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    x = torch.randn(8, 32)
    seen, real = [], x[mask.flatten()]
    filled = torch.cat((real, 100 * torch.ones(1, 32)))
    for layout, tokens in (
        (Layout(mask_BT=mask), x),
        (Layout(lengths=(3, 4)), real),
        (Layout(lengths=(3, 4), padding=1), filled),
    ):
        clip.prepare(1, is_last_microbatch=True)
        clip._before(model, (), {"input_ids": mask.long(), "attention_mask": mask})
        attention(attention.project(tokens), None, layout)
        clip._after(model, (), None)
        seen.append(clip.apply(1).maxima)
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[2])


# --- a clip that never waits -----------


def test_a_step_that_clips_asks_the_device_for_nothing():
    """From the forward pass, whose documents the host has laid out, to the report; that is one copy for all clips together."""
    torch.manual_seed(0)
    attention = Attention(32, 4)
    model = torch.nn.Sequential(attention)
    clip = QKClip(model, QKClipSettings(1e-3, 0.3, interval=1), pad_id=PAD)
    ids, x, reports = torch.tensor([[5, 6, 7, 5, 6, 7, 8, PAD]]), torch.randn(8, 32), []
    with HostReads() as reads:
        for update in (1, 2):
            clip.prepare(update, is_last_microbatch=True)
            clip._before(model, (), {"input_ids": ids, "document_lengths": Documents((3, 4), None, 4)})
            attention(attention.project(x), None, Layout(lengths=(3, 4), padding=1))
            clip._after(model, (), None)
            reports.append(clip.apply(update))
    assert not reads.found
    assert all((report.factors < 1).any() for report in reports)
    with HostReads() as reads:
        assert to_host([stack_reports(reports)])[0][0] > 0
    assert reads.found == Counter(tolist=1)


def test_a_whole_model_that_clips_reads_no_more_than_one_that_does_not():
    model = planted(build())
    batch, _ = packed_inputs()
    batch["document_lengths"] = tuple(batch["document_lengths"].tolist())
    clip, found = QKClip(model, QKClipSettings(4.0, interval=2), pad_id=None), []
    for update in (1, 2):
        clip.prepare(update, is_last_microbatch=True)
        with HostReads() as reads:
            model(**batch).loss_sum.backward()
            report = clip.apply(update)
        found.append(reads.found)
    assert (report.factors < 1).any()
    assert found[0] == found[1]


def test_a_flag_on_the_device_skips_a_clip():
    model = planted(build())
    clip, before = QKClip(model, QKClipSettings(4.0, interval=1), pad_id=PAD), qkv(model)
    for flag in (1.0, 0.0):
        clip.prepare(1, is_last_microbatch=True)
        model(**packed_inputs()[0])
        report = clip.apply(1, torch.tensor(flag))
        assert (report.factors < 1).any() == (flag == 0)
        assert all(torch.equal(a, b) for a, b in zip(before, qkv(model), strict=True)) == (flag == 1)


# --- blocks with separate projections -----------


def eurobert(**fields):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = EuroBertModel(EuroBertConfig(vocab_size=60, pad_token_id=0, **shape, initializer_range=0.5, **fields))
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_eurobert(key_heads, bias):
    """transformers' own model with its separate projections, grouped key heads and biases: after the clip every head that
    was above the threshold is at it, and the others are where they were.
    """
    model = eurobert(num_key_value_heads=key_heads, attention_bias=bias)
    if bias:
        for layer in model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    ids = torch.randint(1, 60, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 7 + [0] * 2])
    mapping = {"q_proj": "q_proj", "k_proj": "k_proj"}
    before = eager_maxima(model, ids, mask)
    threshold = before[0].sort().values[1:3].mean().item()
    clip = QKClip(model, QKClipSettings(threshold, 0.4, interval=1), pad_id=None, mapping=mapping)
    clip.prepare(1, is_last_microbatch=True)
    model(ids, attention_mask=mask)
    report = clip.apply(1)
    torch.testing.assert_close(report.maxima, before, rtol=1e-5, atol=1e-5)
    after = eager_maxima(model, ids, mask)
    assert 1 <= int((report.factors[0] < 1).sum()) <= 3
    torch.testing.assert_close(after[0], before[0].clamp_max(threshold), rtol=1e-4, atol=1e-5)


def eager_maxima(model, ids, mask):
    """Largest logits of real pairs, from what transformers' own attention is given."""
    from transformers.models.eurobert import modeling_eurobert

    found, original = [], modeling_eurobert.ALL_ATTENTION_FUNCTIONS.get_interface

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        logits = query @ modeling_eurobert.repeat_kv(key, module.num_key_value_groups).mT * scaling
        pairs = mask[:, None, :, None].bool() & mask[:, None, None, :].bool()
        found.append(logits.masked_fill(~pairs, -torch.inf).amax((0, 2, 3)))
        return modeling_eurobert.eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs)

    modeling_eurobert.ALL_ATTENTION_FUNCTIONS.get_interface = lambda *_: attend
    model.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            model(ids, attention_mask=mask)
    finally:
        modeling_eurobert.ALL_ATTENTION_FUNCTIONS.get_interface = original
    return torch.stack(found)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"q_proj": "query", "k_proj": "key"}, r"no attention block .* \(q_proj: query, k_proj: key\)"),
        ({"q_proj": "query"}, r"\(q_proj: query\)"),
        ({"q_proj": "mlp", "k_proj": "self_attn"}, "does not say how wide its heads are"),
        ({"q_proj": "q_proj", "k_proj": "q_proj.absent"}, r"\(k_proj: q_proj.absent\)"),
        ({"queries": "q_proj"}, "no projection 'queries'; keys are q_proj, k_proj, v_proj"),
    ],
)
def test_a_mapping_that_does_not_fit(mapping, message):
    with pytest.raises(ConfigError, match=message) as error:
        QKClip(eurobert(), QKClipSettings(), pad_id=None, mapping=mapping)
    assert str(error.value).startswith("optimizer.muon_config.clipping_layers_mapping: ")
    with pytest.raises(ConfigError, match="no attention block that is known"):
        QKClip(torch.nn.Linear(2, 2), QKClipSettings(), pad_id=None)


def test_blocks_that_normalise_are_refused():
    model = eurobert()
    model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(8)
    with pytest.raises(ConfigError, match=r"EuroBertAttention normalises q and k \(q_norm\)"):
        QKClip(model, QKClipSettings(), pad_id=None)


# --- tensors -----------


def test_factors():
    """Factors of logits are exact for every head; what is not finite, or below the threshold, is left alone."""
    maxima = torch.tensor([10.0, 100.0, -3.0, torch.inf, torch.nan, -torch.inf, 50.0, 50.1])
    logits, q, k = clip_factors(maxima, 50.0, 0.25, 8)
    assert logits.tolist() == pytest.approx([1, 0.5, 1, 1, 1, 1, 1, 50 / 50.1], rel=1e-6)
    torch.testing.assert_close(q * k, logits)
    torch.testing.assert_close(k, logits**0.75)
    logits, q, k = clip_factors(maxima, 50.0, 0.25, 2)
    torch.testing.assert_close(q * k.repeat_interleave(4), logits)


def test_largest_logits_of_nothing():
    q = torch.randn(0, 2, 4)
    assert largest_logits(q, q, [], 8).tolist() == [-torch.inf] * 2
    q = torch.randn(3, 2, 4)
    groups = group_documents([0, 3, 0], 2, q.device)
    torch.testing.assert_close(largest_logits(q, q, groups, 2), torch.einsum("nhk,mhk->hnm", q, q).amax((1, 2)) / 2)


@pytest.fixture
def allow_tf32():
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Products(TorchDispatchMode):
    """Whether TF32 was allowed in each batched product that runs inside."""

    def __init__(self):
        super().__init__()
        self.tf32 = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.tf32.append(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


def test_products_are_few_and_exact(allow_tf32):
    """70 documents of 20 to 220 tokens and a long one: a product for about every 1,024 tokens, none of them in TF32."""
    torch.manual_seed(0)
    lengths = [*torch.randint(20, 220, (70,)).tolist(), 3000]
    q, k = torch.randn(sum(lengths), 4, 8), torch.randn(sum(lengths), 2, 8)
    with Products() as seen:
        found = largest_logits(q, k, group_documents(lengths, 1024, q.device), 1024)
    wanted = [
        torch.einsum("nhk,mhk->hnm", a, b.repeat_interleave(2, 1)).amax((1, 2))
        for a, b in zip(q.split(lengths), k.split(lengths), strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(wanted).amax(0) / 8**0.5)
    assert len(seen.tf32) <= 1.5 * sum(lengths) / 1024
    assert not any(seen.tf32)
    assert torch.backends.cuda.matmul.allow_tf32


def test_lengths_stay_on_the_host():
    """Engines of several processes move every tensor of the inputs to the device ("meta"), but not the lengths."""
    ids, labels, _ = packed_batch()
    batch = Batch(ids, labels, None, tuple(n for row in LENGTHS for n in row), 1, 1, 0)
    _, (inputs,) = _to_kwargs((), batch.inputs(), torch.device("meta"), False)
    hidden = build().to("meta").model(inputs["input_ids"], document_lengths=inputs["document_lengths"])
    assert hidden.last_hidden_state.device.type == "meta"
    kept_N, lengths = _real_documents(inputs["input_ids"], inputs, None)
    assert (kept_N, lengths) == (None, batch.document_lengths)
    assert {group.device.type for group in group_documents(lengths, 64, inputs["input_ids"].device)} == {"meta"}


@pytest.mark.parametrize(
    "settings", [{"threshold": 0.0}, {"threshold": -1.0}, {"alpha": 1.1}, {"interval": 0}, {"chunk_size": 0}]
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match="clipping_"):
        QKClipSettings(**settings)


def test_what_is_logged():
    model = planted(build())
    clip = QKClip(model, QKClipSettings(4.0, interval=1), pad_id=PAD)
    reports = []
    for update in (1, 2):
        clip.prepare(update, is_last_microbatch=True)
        model(**packed_inputs(update)[0])
        reports.append(clip.apply(update))
    row = clip_metrics(stack_reports(reports))
    assert row["qk_max_logit"] == pytest.approx(max(report.maxima.max().item() for report in reports), abs=1e-4)
    assert row["qk_clipped_heads"] == sum(int((report.factors < 1).sum()) for report in reports)
    assert len(row["qk_block_max_logits"]) == 3
    assert row["qk_factors"]["2.3"] == pytest.approx((reports[0].factors * reports[1].factors)[2, 3].item(), rel=1e-4)
    assert len(stack_reports([])) == 0
    reports[0].maxima.fill_(-torch.inf)
    assert clip_metrics(stack_reports(reports[:1]))["qk_max_logit"] is None


assert len(LENGTHS) == 4  # the documents that `packed_inputs` turns into padding
