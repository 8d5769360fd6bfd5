"""Exports of models on an encoder of transformers' making: whole, as that architecture's own class, or refused in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
    EuroBertConfig,
    EuroBertModel,
    RobertaConfig,
    RobertaModel,
)

from helpers.checkpoints import tiny_model, write_checkpoint
from helpers.commands import run_neobert, run_script
from helpers.glue import foreign_model, run_glue, write_local
from helpers.pairs import CONTRASTIVE_TINY, made_pairs, write_rows
from helpers.runs import TOKENIZER
from neobert.checkpoints.convert import convert
from neobert.checkpoints.load import load_source
from neobert.config.load import load_config
from neobert.errors import CheckpointError, UserError
from neobert.export.write import Wanted, export_model, read_embedding
from neobert.inference.embed import load_embedder
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.tasks.contrastive import task as contrastive
from neobert.tasks.glue.model import load_finetuned

SIZES = {
    "vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 66, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
ENCODERS = {
    "electra": lambda: ElectraModel(ElectraConfig(**SIZES, embedding_size=32)),
    "deberta-v2": lambda: DebertaV2Model(
        DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "eurobert": lambda: EuroBertModel(EuroBertConfig(**SIZES, num_key_value_heads=1)),
    "roberta": lambda: RobertaModel(RobertaConfig(**{**SIZES, "pad_token_id": 1})),
}


def encoder_folder(kind, folder):
    torch.manual_seed(0)
    ENCODERS[kind]().save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def classifier(kind, root, *words):
    """The newest checkpoint of a classifier of pairs, fine-tuned on a tiny encoder, and its configuration."""
    folder = foreign_model(root / kind) if kind == "bert" else encoder_folder(kind, root / kind)
    data = write_local(root / "glue", ["rte"])
    finished, _ = run_glue(
        "glue.task_name=rte", f"dataset.path={data}", "model.from_hub=true", f"model.name={folder}",
        f"trainer.output_dir={root / 'run'}", "optimizer.lr=0.02", *words,
    )  # fmt: skip
    return finished.folder / "checkpoints/3", load_config([str(finished.folder / "config.yaml")]).config


@pytest.mark.parametrize(("kind", "pooling"), [("electra", "cls"), ("deberta-v2", "cls"), ("eurobert", "mean")])
def test_classifiers_leave_whole(kind, pooling, tmp_path):
    """transformers' own class gives the logits of the classifier that was trained, of texts and of pairs."""
    step, _ = classifier(kind, tmp_path, f"glue.pooling={pooling}")
    checks = {check.what: check for check in export_model(str(step), tmp_path / "out", Wanted(), log=lambda text: None)}
    assert set(checks) == {"hidden", "logits", "pairs"}
    assert all(check.difference <= 1e-5 for check in checks.values())
    trained, _, _ = load_finetuned(step)
    loaded, found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = tokenizer(["peace", "the congress met"], ["war", "to speak about trade"], padding=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = trained(**rows).logits, loaded.eval()(**rows).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert loaded.config.id2label == {0: "entailment", 1: "not_entailment"}
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()
    assert kind in (tmp_path / "out/README.md").read_text()


def test_another_head_is_refused(tmp_path):
    """BERT's own classifier has tanh: exported it would be another one. The command says so in one line."""
    step, _ = classifier("bert", tmp_path)
    said = run_neobert("export", step, tmp_path / "out")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1), said.stderr
    assert "a classifier on bert with pooling cls cannot be exported" in said.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="optimum exports those"):
        export_model(str(step), tmp_path / "out", Wanted(onnx=True), log=lambda text: None)


def test_embedding_models_leave_whole(tmp_path):
    """Pooled by CLS on a RoBERTa: a folder of sentence-transformers with the vectors of the run, and a card whose code runs."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    folder = encoder_folder("roberta", tmp_path / "roberta")
    words = [w for w in CONTRASTIVE_TINY if not w.startswith(("model.", "tokenizer.path", "contrastive."))]
    words += [
        f"dataset.path={write_rows(tmp_path / 'pairs.jsonl', made_pairs(30))}", "model.from_hub=true", f"model.name={folder}",
        "dataset.max_seq_length=32", "contrastive.pooling=cls", f"trainer.output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    run = contrastive.run(load_config([], words, "contrastive")).folder
    checks = export_model(str(run), tmp_path / "out", Wanted(), log=lambda text: None)
    assert {check.what for check in checks} == {"hidden", "embedding"}
    texts = ["some text", "another text"]
    vectors = load_embedder(str(run)).encode(texts)
    assert np.abs(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts) - vectors).max() <= 1e-5
    assert np.abs(run_card(tmp_path) - vectors).max() <= 1e-5


def run_card(folder):
    """The embeddings that the first code of the card in `folder/out` computes."""
    code = (folder / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "AutoModelForMaskedLM" not in code
    code += f"\nimport numpy; numpy.save({str(folder / 'card.npy')!r}, embeddings)"
    (folder / "card.py").write_text(code)
    run_script(folder / "card.py", folder)
    return np.load(folder / "card.npy")


def test_the_card_of_an_embedding_model(tmp_path):
    """Of our own encoder, with the maximum: its code gives the vectors of `embed`."""
    model = tiny_model(NeoBERTForEmbedding)
    run = write_checkpoint(tmp_path / "run", model, embedding={"pooling": "max", "max_length": 40})
    export_model(str(run), tmp_path / "out", Wanted(), log=lambda text: None)
    vectors = load_embedder(str(run)).encode(["some text", "another text"])
    assert np.abs(run_card(tmp_path) - vectors).max() <= 1e-5


def test_what_a_second_export_would_lose_is_named(tmp_path):
    """Prompts are kept; a Dense module that somebody trained on top is not left out silently."""
    run = write_checkpoint(
        tmp_path / "run", tiny_model(NeoBERTForEmbedding), embedding={"pooling": "cls", "max_length": 40}
    )
    export_model(str(run), tmp_path / "first", Wanted(), log=lambda text: None)
    own = tmp_path / "first/config_sentence_transformers.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "prompts": {"query": "query: "}}))
    assert read_embedding(load_source(str(tmp_path / "first"))).prompts == {"query": "query: "}
    export_model(str(tmp_path / "first"), tmp_path / "second", Wanted(), log=lambda text: None)
    assert json.loads((tmp_path / "second/config_sentence_transformers.json").read_text())["prompts"] == {
        "query": "query: "
    }
    own.write_text(json.dumps({**json.loads(own.read_text()), "default_prompt_name": "query"}))
    with pytest.raises(CheckpointError, match="its default_prompt_name cannot be exported"):
        export_model(str(tmp_path / "first"), tmp_path / "third", Wanted(), log=lambda text: None)


def test_weights_in_a_pickle_are_converted_as_told(tmp_path):
    """A folder with pytorch_model.bin alone: the command of the message makes a folder that loads, with the same weights."""
    run = write_checkpoint(tmp_path / "run", tiny_model())
    export_model(str(run), tmp_path / "out", Wanted(), log=lambda text: None)
    from safetensors.torch import load_file

    out = tmp_path / "out"
    weights = load_file(out / "model.safetensors")
    torch.save(weights, out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    for read in (load_source, convert):
        with pytest.raises(CheckpointError) as caught:
            read(str(out))
        assert "its weights are in pytorch_model.bin, and only safetensors are read" in str(caught.value)
        assert "\n" not in str(caught.value)
    command = str(caught.value).partition(f"convert them once, in {out}: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=out)
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert read_embedding(load_source(str(out))).max_length == 512
