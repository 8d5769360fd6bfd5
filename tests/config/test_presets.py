"""The presets of the configuration reference, verbatim, on a small corpus: each trains, evaluates, saves, and is exported; the
third resumes."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from helpers.checkpoints import largest_difference, padded_rows
from helpers.runs import TOKENIZER
from neobert.checkpoints.format import list_steps
from neobert.checkpoints.load import load_source
from neobert.config.load import load_config
from neobert.export.write import write_transformers
from neobert.tasks.pretraining import task as pretraining
from neobert.training.metrics import read_metrics

BALANCED = """
task: pretraining
model:
  hidden_size: 768
  num_hidden_layers: 12
  num_attention_heads: 12
  intermediate_size: 3072
  max_position_embeddings: 512
  attn_backend: flash_attn_varlen
  kernel_backend: auto

dataset:
  name: refinedweb
  streaming: true
  max_seq_length: 512
  num_workers: 16

tokenizer:
  name: bert-base-uncased
  max_length: 512

trainer:
  per_device_train_batch_size: 16
  gradient_accumulation_steps: 1
  max_steps: 1000000
  save_steps: 10000
  eval_steps: 10000
  mixed_precision: bf16
  masked_logits_only_loss: true

optimizer:
  name: adamw
  lr: 1e-4
  weight_decay: 0.01

scheduler:
  name: cosine
  warmup_steps: 10000

datacollator:
  mlm_probability: 0.15
  mask_all: false
  pack_sequences: false
"""
MEMORY_CONSTRAINED = """
task: pretraining
model:
  hidden_size: 512
  num_hidden_layers: 8
  num_attention_heads: 8
  intermediate_size: 2048
  max_position_embeddings: 512
  attn_backend: sdpa

trainer:
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 8
  gradient_checkpointing: true
  mixed_precision: bf16
  masked_logits_only_loss: true
  torch_compile: false
  max_steps: 300000

optimizer:
  name: adamw
  lr: 8e-5

scheduler:
  name: cosine
  warmup_percent: 1.0

dataset:
  streaming: true
  num_workers: 4
"""
RESUMABLE = """
task: pretraining
dataset:
  path: /data/neobert_tokenized
  streaming: false
  max_seq_length: 512

trainer:
  output_dir: outputs/neobert_run
  resume_from_checkpoint: latest
  save_steps: 5000
  save_total_limit: 5
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 4

use_deepspeed: true
"""
FULL_LOGGING = """
task: pretraining
wandb:
  enabled: true
  project: neo-bert
  mode: online
  name: neobert-full-logging

trainer:
  logging_steps: 20
  eval_steps: 1000
  eval_max_batches: 200
  log_train_accuracy: true
  log_grad_norm: true
  log_weight_norms: true

scheduler:
  name: cosine
  warmup_steps: 5000
"""
PRESETS = {"balanced": BALANCED, "memory": MEMORY_CONSTRAINED, "resumable": RESUMABLE, "logging": FULL_LOGGING}
SIZES = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    f"tokenizer.path={TOKENIZER}",
    "tokenizer.max_length=64",
    "dataset.max_seq_length=64",
    "trainer.per_device_train_batch_size=2",
    "trainer.max_steps=4",
    "trainer.save_steps=2",
    "trainer.eval_steps=2",
    "trainer.logging_steps=1",
    "dataset.num_workers=0",
]


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # W&B writes below the folder it is started in
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "preset.yaml").write_text(PRESETS[name])
    words = [
        small[0],
        *SIZES,
        f"trainer.output_dir={tmp_path / 'out'}",
        *(["wandb.mode=offline"] if name == "logging" else []),
    ]
    pretraining.run(load_config([str(tmp_path / "preset.yaml")], words))
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [2, 4]
    assert list_steps(tmp_path / "out/checkpoints") == [2, 4]
    if name == "resumable":
        assert "starting from the beginning" in capsys.readouterr().out
        pretraining.run(load_config([str(tmp_path / "preset.yaml")], [*words, "trainer.max_steps=6"]))
        assert "resuming from" in capsys.readouterr().out
        assert list_steps(tmp_path / "out/checkpoints") == [2, 4, 6]
    if name == "logging":
        assert {"accuracy", "grad_norm", "weight_norm"} <= rows[0].keys()
        assert list((tmp_path / "logs/wandb/wandb").glob("offline-run-*"))
    check_export(tmp_path / "out", tmp_path / "exported")


@torch.no_grad()
def check_export(run, folder):
    """transformers loads what was trained, without our code, and computes the same."""
    source = load_source(str(run))
    folder.mkdir()
    write_transformers(source, folder)
    theirs = AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "EuroBertForMaskedLM"
    ids, mask = padded_rows((1, 7, 64, 200))
    ids = ids % len(AutoTokenizer.from_pretrained(folder))
    assert largest_difference(source.model, theirs, ids, mask, "logits") <= 1e-5
