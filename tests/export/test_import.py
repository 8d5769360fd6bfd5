"""Models from elsewhere: the same function as ours, and a start for training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, EuroBertConfig, EuroBertForMaskedLM, EuroBertModel

from helpers.checkpoints import OWN_CODE, padded_rows, tiny_model, write_checkpoint
from helpers.models import Published
from helpers.runs import TOKENIZER
from neobert.checkpoints.convert import convert
from neobert.checkpoints.format import list_steps
from neobert.checkpoints.initial_weights import find_initial_weights
from neobert.checkpoints.load import load_source
from neobert.config.load import load_config
from neobert.data.labelled import TASKS
from neobert.errors import CheckpointError, ConfigError, UserError
from neobert.export.importing import import_model
from neobert.export.write import read_embedding, write_transformers
from neobert.tasks.glue.model import build_classifier
from neobert.tasks.glue.task import fill_in
from neobert.tasks.pretraining import task as pretraining

EUROBERT = {
    "vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 512, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip


def with_tokenizer(folder):
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def eurobert(folder, kind=EuroBertForMaskedLM, **fields):
    """A EuroBERT as transformers saves it: (model, folder)."""
    torch.manual_seed(0)
    model = kind(EuroBertConfig(**{**EUROBERT, **fields})).eval()
    model.save_pretrained(folder, max_shard_size="600KB")
    return model, with_tokenizer(folder)


def quiet(text):
    pass


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 250_000.0}},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    ],
    ids=str,
)
@torch.no_grad()
def test_eurobert(fields, tmp_path):
    """Grouped heads, another base of RoPE, several files of weights."""
    theirs, folder = eurobert(tmp_path / "euro", **fields)
    ours = convert(str(folder)).model
    ids, mask = padded_rows()
    difference = ours(ids, attention_mask=mask).logits - theirs(ids, attention_mask=mask).logits
    assert difference[mask.bool()].abs().max() <= 1e-5


def test_eurobert_becomes_a_start(tmp_path):
    """Verified in a clean process; GLUE finds it; exported, transformers' model is the same again."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    theirs, folder = eurobert(tmp_path / "euro", num_key_value_heads=2, rope_parameters=rope)
    checks = import_model(str(folder), tmp_path / "in", log=quiet)
    assert {check.what: check.absolute <= 1e-5 for check in checks} == {"hidden": True, "logits": True}
    record = json.loads((tmp_path / "in/import.json").read_text())
    assert (record["layout"], len(record["verified"])) == ("eurobert", 2)
    words = ["glue.task_name=rte", f"glue.pretrained_checkpoint_dir={tmp_path / 'in'}"]
    config = load_config([], words, "glue").config
    start = find_initial_weights(config)
    settled = fill_in(config, TASKS["rte"], start)
    classifier, _ = build_classifier(settled, TASKS["rte"], start, 8192, 0)
    ids, mask = padded_rows()
    with torch.no_grad():
        difference = classifier.eval().model(ids, attention_mask=mask)[0] - theirs.model(ids, attention_mask=mask)[0]
    assert difference[mask.bool()].abs().max() <= 1e-5
    assert (start.architecture.hidden_size, start.state["step"], start.state["imported_from"]) == (32, 0, "euro")
    (tmp_path / "out").mkdir()
    write_transformers(load_source(str(tmp_path / "in")), tmp_path / "out")
    again = EuroBertForMaskedLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, theirs.lm_head.weight)
    with pytest.raises(UserError, match="is a checkpoint already"):
        import_model(str(tmp_path / "in"), tmp_path / "twice", log=quiet)


@torch.no_grad()
def test_an_encoder_alone_gets_a_decoder(tmp_path):
    theirs, folder = eurobert(tmp_path / "euro", EuroBertModel)
    found = convert(str(folder))
    ids, mask = padded_rows()
    difference = found.model.model(ids, attention_mask=mask)[0] - theirs(ids, attention_mask=mask)[0]
    assert difference[mask.bool()].abs().max() <= 1e-5
    assert (found.has_head, found.notes) == (False, ["no decoder in it: a new one, drawn at random"])
    assert torch.equal(found.model.lm_head.weight, convert(str(folder)).model.lm_head.weight)


def published(folder, biased=True):
    """A model in the published layout: (reference, folder)."""
    torch.manual_seed(0)
    model = Published(8000, 32, 2, 4, 32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    if not biased:
        model.decoder.bias.data.zero_()
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    fields = {
        "model_type": "neobert", "architectures": ["NeoBERTLMHead"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "norm_eps": 1e-5, "vocab_size": 8000, "max_length": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return model, with_tokenizer(folder)


@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_published(biased, tmp_path):
    """Fused heads, interleaved rotary pairs, a bias; a vocabulary that is no multiple of 64."""
    theirs, folder = published(tmp_path / "published", biased)
    shrink_tokenizer(folder, 8000)
    checks = import_model(str(folder), tmp_path / "in", log=quiet)
    assert {check.what: check.difference <= 1e-5 for check in checks} == {"hidden": True, "logits": True}
    source = load_source(str(tmp_path / "in"))
    assert (source.is_native, len(source.tokenizer), read_embedding(source).max_length) == (not biased, 8000, 512)
    ids, mask = padded_rows()
    ids = ids.clamp_max(7999)
    expected = theirs(ids, mask)[mask.bool()]
    difference = (source.model(ids, attention_mask=mask).logits[mask.bool()] - expected).abs().max()
    assert difference <= 1e-5 * max(1.0, expected.abs().max())


def shrink_tokenizer(folder, size):
    """A tokenizer of fewer tokens, as a published folder has them: not padded to the model's size."""
    from tokenizers import Tokenizer

    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["model"]["vocab"] = {token: i for token, i in backend["model"]["vocab"].items() if i < size - 10}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < size - 10]
    Tokenizer.from_str(json.dumps(backend)).save(str(folder / "tokenizer.json"))


def test_bad_input_is_one_line(tmp_path):
    _, folder = eurobert(tmp_path / "euro")
    fields = json.loads((folder / "config.json").read_text())

    def says(text, folder=folder, **changed):
        (folder / "config.json").write_text(json.dumps(fields | changed))
        with pytest.raises(CheckpointError) as caught:
            import_model(str(folder), tmp_path / "in", log=quiet)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "in").exists()

    says("model_type 'bert' cannot be imported; what can: ", model_type="bert")
    says("our model has no hidden_act gelu; no mlp_bias", hidden_act="gelu", mlp_bias=True)
    says("intermediate_size 44, not a multiple of 8", intermediate_size=44)
    says("the weights do not fit the model: model.layers.2.attention_norm.weight is missing", num_hidden_layers=3)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    says("no tokenizer can be loaded from it")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="not a model: it has no config.json"):
        import_model(str(folder), tmp_path / "in", log=quiet)
    with pytest.raises(CheckpointError, match="no such folder"):
        import_model(str(tmp_path / "absent"), tmp_path / "in", log=quiet)


# --- pretraining goes on from it -----------

MORE = ["model.from_hub=true", "trainer.max_steps=3", "trainer.save_steps=2", "trainer.logging_steps=1",
        "dataset.max_seq_length=64", "dataset.num_workers=0", "dataset.streaming=false", "trainer.mixed_precision=no",
        "scheduler.warmup_steps=1", "optimizer.lr=1e-3", "trainer.eval_max_batches=1"]  # fmt: skip


def go_on(small, name, out, *words):
    loaded = load_config([], [*small, *MORE, f"model.name={name}", f"trainer.output_dir={out}", *words])
    pretraining.run(loaded)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("variant", [{}, OWN_CODE], ids=str)
def test_pretraining_goes_on(variant, small, tmp_path, capsys):
    """From a checkpoint and from its export alike; with the weights' architecture and tokenizer, and a fresh optimizer."""
    run = write_checkpoint(tmp_path / "run", tiny_model(**variant))
    exported = tmp_path / "exported"
    exported.mkdir()
    write_transformers(load_source(str(run)), exported)
    losses = go_on(small, run, tmp_path / "a")
    assert "with a fresh optimizer" in capsys.readouterr().out
    assert go_on(small, exported, tmp_path / "b") == losses
    assert go_on(small, exported, tmp_path / "c", "seed=1") != losses
    shutil.rmtree(exported)  # a run that is resumed needs nothing but its checkpoint
    config = str(tmp_path / "b/config.yaml")
    shutil.rmtree(tmp_path / "b/checkpoints/3")
    (tmp_path / "b/checkpoints/latest").write_text("2\n")
    pretraining.run(load_config([config], ["trainer.resume_from_checkpoint=latest"]))
    assert list_steps(tmp_path / "b/checkpoints") == [2, 3]
    for step in (2, 3):
        pair = [(tmp_path / name / f"checkpoints/{step}/model.safetensors").read_bytes() for name in "ab"]
        assert pair[0] == pair[1]
    assert json.loads((tmp_path / "b/checkpoints/3/config.json").read_text())["neobert"]["name"] == "exported"


def test_longer_texts_with_rope(small, tmp_path):
    """RoPE has no parameters for positions, so a run may raise them; learned positions are as many as there are."""
    run = write_checkpoint(tmp_path / "run", tiny_model())
    go_on(small, run, tmp_path / "a", "model.max_position_embeddings=1024", "trainer.max_steps=1")
    assert read_embedding(load_source(str(tmp_path / "a"))).max_length == 1024
    learned = write_checkpoint(tmp_path / "learned", tiny_model(rope=False))
    for name, words, text in (
        (learned, ["model.max_position_embeddings=1024"], "model.max_position_embeddings: 1024, but"),
        (run, ["model.hidden_size=96"], "model.hidden_size: 96, but .* has 32; leave it out"),
        (tmp_path / "absent", [], "no such folder"),
        ("absent/model", [], "is no folder, and it cannot be had from the hub: this machine is offline"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=text):
            go_on(small, name, tmp_path / "b", *words)
    with pytest.raises(ConfigError, match="not set; model.from_hub continues from the model that it names"):
        load_config([], ["model.from_hub=true"])
