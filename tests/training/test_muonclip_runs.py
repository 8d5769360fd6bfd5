"""MuonClip as a configuration asks for it: what runs, what is said of it, and what is refused."""

import pytest
import torch
from transformers import ModernBertConfig, ModernBertModel

from helpers.runs import TINY
from neobert.config.load import load_config
from neobert.errors import ConfigError
from neobert.model.hf_encoder import HFEncoderForSequenceClassification
from neobert.optim.build import OptimizerSettings, build_optimizer
from neobert.optim.muon import MuonSettings
from neobert.tasks.encoder import build_model
from neobert.training.optimizer import build_clip, build_run_optimizer

MUON = "optimizer.muon_config."
REFUSED = {
    f"{MUON}clipping_threshold=0": "clipping_threshold: must be greater than 0, got 0",
    f"{MUON}clipping_threshold=-3.0": "clipping_threshold: must be greater than 0",
    f"{MUON}clipping_interval=0": "clipping_interval: must be greater than or equal to 1",
    f"{MUON}ns_steps=0": "ns_steps: must be greater than or equal to 1",
    f"{MUON}ns_steps=21": "ns_steps: must be less than or equal to 20",
    f"{MUON}algorithm=svd": "orthogonalization: must be one of polar_express, newton_schulz, got 'svd'",
    f"{MUON}clipping_layers_mapping={{k_proj: keys}}": "modules of these names (q_proj: q_proj, k_proj: keys)",
    f"{MUON}clipping_layers_mapping={{q: q_proj}}": "no projection 'q'",
    "optimizer.param_groups=[{pattern: 'encoder.*'}]": "pattern 'encoder.*' matches no parameter; names are like model.",
    "optimizer.param_groups=[{pattern: '*norm*', algorithm: muon}]": "to muon, which takes matrices only",
    "optimizer.param_groups=[{pattern: '*.layers.*', algorithm: adamw}]": "optimizer.name: muonclip found no matrix",
    "optimizer.param_groups=[{patern: '*'}]": "optimizer.param_groups.0.patern: unknown key",
    "optimizer.param_groups=[{pattern: '*', lr_scale: -1}]": "param_groups.0.lr_scale: must be greater than or equal to 0",
    "optimizer.param_groups=[norm]": "optimizer.param_groups.0: must be a section with keys",
}


def build(*words):
    config = load_config([], [*TINY, "optimizer.name=muonclip", *words]).config
    model = build_model(config, 64, 0)
    return build_run_optimizer(config, model, None), build_clip(config, model)


@pytest.mark.parametrize("word", REFUSED)
def test_refused(word):
    with pytest.raises(ConfigError) as error:
        build(word)
    assert REFUSED[word] in str(error.value)


def test_algorithms_need_muonclip():
    with pytest.raises(ConfigError, match="has no effect with optimizer.name: adamw"):
        load_config([], ["optimizer.param_groups=[{pattern: '*', algorithm: muon}]"])
    assert load_config([], ["optimizer.param_groups=[{pattern: '*', lr_scale: 2}]"])


NEWTON = ("algorithm=newton_schulz", "polar_express=false")


@pytest.mark.parametrize("old", [*NEWTON, "polar_express=true"])
def test_older_names_act_and_warn(old):
    loaded = load_config([], [*TINY, "optimizer.name=muonclip", MUON + old])
    assert loaded.config.optimizer.muon_config.orthogonalization == (
        "newton_schulz" if old in NEWTON else "polar_express"
    )
    assert any("is an older name" in warning for warning in loaded.warnings)


def test_what_the_summary_says_of_the_clip():
    assert build()[1][1] == {"QK-clip": "logits above 50, every 10 steps, last microbatch"}
    words = [
        f"{MUON}clipping_warmup_steps=100",
        f"{MUON}capture_last_microbatch_only=false",
        f"{MUON}clipping_interval=2",
    ]
    assert build(*words)[1][1] == {"QK-clip": "logits above 50, every 2 steps after step 100, all microbatches"}
    clip, line = build(f"{MUON}enable_clipping=false")[1]
    assert clip is None
    assert line["QK-clip"].startswith("off")
    clip, line = build_clip(load_config([], ["optimizer.name=muonclip", "model.ngpt=true"]).config, None)
    assert clip is None
    assert "nGPT normalises queries and keys" in line["QK-clip"]
    assert build_clip(load_config([], []).config, None) == (None, {})


def test_every_matrix_of_the_encoder_is_muons():
    """The settings arrive; fused matrices are known as what they are made of."""
    optimizer, _ = build(f"{MUON}muon_beta=0.9", f"{MUON}ns_steps=7", f"{MUON}muon_decay=0.2", f"{MUON}nesterov=true")
    [muon] = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
    parts = {name.partition(".layers.0.")[2]: n for name, n in zip(muon["param_names"], muon["parts"], strict=True)}
    assert {name: n for name, n in parts.items() if name} == {
        "attention.qkv.weight": 3, "attention.out.weight": 1, "ffn.gate_up.weight": 2, "ffn.down.weight": 1,
    }  # fmt: skip
    settings = optimizer.settings
    assert (settings.momentum, settings.nesterov, muon["weight_decay"], settings.num_steps) == (0.9, True, 0.2, 7)
    rest = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rest["lm_head.weight"] == 0.01
    assert rest["model.embed_tokens.weight"] == rest["model.norm.weight"] == 0


def test_fused_matrices_of_modernbert():
    """`Wqkv` and `Wi` of an encoder from transformers move as separate matrices do."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    ids = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    model = HFEncoderForSequenceClassification(ModernBertModel(ModernBertConfig(**shape, **ids)), 2, "mean", 0.0, 0.02)
    words = ["optimizer.name=muonclip", f"{MUON}muon_decay=0.0", "optimizer.lr=0.1"]
    optimizer = build_run_optimizer(load_config([], [*TINY, *words]).config, model, None)
    parts = {"attn.Wqkv.weight": 3, "mlp.Wi.weight": 2, "attn.Wo.weight": 1}
    weights = {name: p for name, p in model.named_parameters() if name.endswith(tuple(parts)) and ".layers.1." in name}
    assert len(weights) == 3
    separate = {}
    for name, weight in weights.items():
        weight.grad = torch.randn_like(weight)
        count = next(n for ending, n in parts.items() if name.endswith(ending))
        separate[name] = [torch.nn.Parameter(piece.clone()) for piece in weight.detach().chunk(count)]
        for piece, grad in zip(separate[name], weight.grad.chunk(count), strict=True):
            piece.grad = grad.clone()
    alone = [(f"layers.0.{name}.{n}", p) for name, pieces in separate.items() for n, p in enumerate(pieces)]
    muon = MuonSettings(dtype=torch.float32)
    other = build_optimizer(alone, OptimizerSettings("muonclip", lr=0.1, betas=(0.9, 0.99), muon=muon))
    optimizer.step()
    other.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, torch.cat(separate[name]), rtol=1e-5, atol=1e-6)


def test_a_run_logs_its_clips(train, small):
    words = [
        "optimizer.name=muonclip",
        f"{MUON}clipping_threshold=0.001",
        f"{MUON}clipping_interval=2",
        "trainer.logging_steps=3",
    ]
    run = train(*small, *words)
    first, second = run.train
    assert first["qk_clipped_heads"] > 0  # step 2
    assert first["qk_max_logit"] > 0.001 > 0
    assert len(first["qk_block_max_logits"]) == 2
    assert first["qk_min_factor"] < 1
    assert min(first["qk_factors"].values()) == pytest.approx(first["qk_min_factor"], abs=1e-6)  # rounded, clipped once
    assert "heads clipped" in run.printed
    assert second["qk_max_logit"] < first["qk_max_logit"]
    assert "QK-clip         logits above 0.001, every 2 steps, last microbatch" in run.printed
