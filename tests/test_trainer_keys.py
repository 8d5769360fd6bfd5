"""Keys of `trainer` and `dataset` that change what a run does: when it stops, evaluates, saves, and what it reads."""

import pytest
from conftest import TINY

from neobert.config.load import load_config
from neobert.errors import ConfigError, DataError
from neobert.tasks import pretraining
from neobert.training.checkpoint import list_steps, read_pointer
from neobert.training.metrics import read_metrics


@pytest.fixture
def train(tmp_path, empty_config):
    """Run in this process; returns (finished, rows of metrics.jsonl by kind)."""

    def run(*words, name="out"):
        loaded = load_config([str(empty_config)], [*TINY, f"trainer.output_dir={tmp_path / name}", *words])
        finished = pretraining.run(loaded)
        rows = read_metrics(finished.folder / "metrics.jsonl")
        return finished, {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}

    return run


SMALL = ["dataset.path={text}", "trainer.per_device_train_batch_size=2", "datacollator.pack_sequences=true"]


@pytest.fixture
def small(tmp_path):
    """A corpus of 40 lines with a validation split, as overrides."""
    (tmp_path / "text").mkdir()
    lines = [f"the president spoke to the congress of the people for the {n}th time about peace" for n in range(40)]
    (tmp_path / "text/train.txt").write_text("\n".join(lines))
    (tmp_path / "text/validation.txt").write_text("\n".join(lines[:5]))
    return [word.format(text=tmp_path / "text") for word in SMALL]


def test_epochs_limit_the_run(train, small, capsys):
    finished, rows = train(
        *small,
        "trainer.max_steps=-1",
        "trainer.num_train_epochs=3",
        "trainer.eval_strategy=epoch",
        "trainer.save_strategy=epoch",
    )
    steps = finished.state.step
    assert f"3 epochs are {steps} steps" in capsys.readouterr().out
    assert finished.state.epoch == 2
    assert len(rows["eval"]) == 3
    assert rows["eval"][-1]["step"] == steps
    assert list_steps(finished.folder / "checkpoints") == [row["step"] for row in rows["eval"]]


def test_early_stopping_and_the_best_model(train, small):
    words = [
        "trainer.eval_steps=2",
        "trainer.early_stopping=2",
        "trainer.load_best_model_at_end=true",
        "trainer.max_steps=60",
    ]
    finished, rows = train(*small, *words, "optimizer.lr=0.5", "scheduler.warmup_steps=0", "trainer.save_strategy=best")
    losses = [row["eval_loss"] for row in rows["eval"]]
    best = min(rows["eval"], key=lambda row: row["eval_loss"])
    assert finished.state.step < 60
    assert finished.state.stop_reason == "no better loss in 2 evaluations"
    assert finished.state.best_step == best["step"]
    assert read_pointer(finished.folder / "checkpoints/best") == str(best["step"])
    assert losses[-1] == pytest.approx(best["eval_loss"])  # evaluated again with the best weights


def test_best_by_another_metric(train, small):
    finished, rows = train(*small, "trainer.eval_steps=2", "trainer.metric_for_best_model=accuracy")
    assert finished.state.best_metric == max(row["eval_accuracy"] for row in rows["eval"])
    with pytest.raises(ConfigError, match="no metric 'speed'; there are: loss, accuracy"):
        train(*small, "trainer.eval_steps=2", "trainer.metric_for_best_model=speed")


def test_evaluation_data_is_needed_or_held_out(train, small, tmp_path):
    only = [*small, f"dataset.path={tmp_path / 'text/train.txt'}"]
    assert train(*only)[1]["eval"] == []
    assert len(train(*only, "dataset.validation_split=0.2")[1]["eval"]) == 1
    with pytest.raises(ConfigError, match="early_stopping: needs evaluation data"):
        train(*only, "trainer.early_stopping=1")


def test_retention(train, small):
    words = ["trainer.save_steps=1", "trainer.max_ckpt=2", "trainer.eval_steps=100"]
    assert list_steps(train(*small, *words)[0].folder / "checkpoints") == [5, 6]
    nothing = train(*small, "trainer.save_strategy=no", "trainer.save_model=false")[0].folder
    assert list_steps(nothing / "checkpoints") == []


def test_what_is_logged(train, small):
    words = ["trainer.log_grad_norm=true", "trainer.log_weight_norms=true", "trainer.log_train_accuracy=true"]
    row = train(*small, *words, "trainer.logging_steps=3")[1]["train"][0]
    assert row["step"] == 3
    assert row["grad_norm"] > 0
    assert row["weight_norm"] > 0
    assert 0 <= row["accuracy"] <= 1


def losses(rows):
    return [row["loss"] for row in rows["train"]]


@pytest.mark.parametrize("change", ["trainer.masked_logits_only_loss=false", "trainer.gradient_checkpointing=true"])
def test_paths_that_change_nothing_but_cost(train, small, change):
    assert losses(train(*small, change)[1]) == pytest.approx(losses(train(*small)[1]), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    ["seed=1", "datacollator.mask_all=true", "datacollator.mlm_probability=0.4", "dataset.streaming=true",
     "model.rope=false", "model.rms_norm=false", "model.hidden_act=gelu", "optimizer.name=adam", "optimizer.weight_decay=0.5",
     "optimizer.betas=[0.5, 0.9]", "optimizer.eps=0.1", "trainer.gradient_clipping=0.01",
     "trainer.gradient_accumulation_steps=2",
     "scheduler.name=linear", "scheduler.final_lr_ratio=0.9", "scheduler.num_cycles=2.0", "scheduler.total_steps=50",
     "model.dropout_prob=0.2", "model.norm_eps=0.5", "model.embedding_init_range=0.3", "model.decoder_init_range=0.2",
     "trainer.enforce_full_packed_batches=false", "tokenizer.max_length=9", "datacollator.max_length=32"],
)  # fmt: skip
def test_keys_that_change_the_training(train, small, change):
    assert losses(train(*small, change)[1]) != losses(train(*small)[1])


def test_token_folders_are_used_again(train, small, tmp_path, capsys):
    words = [
        *small,
        "dataset.pre_tokenize=true",
        f"dataset.pre_tokenize_output={tmp_path / 'tokens'}",
        "dataset.num_proc=1",
    ]
    first = losses(train(*words)[1])
    assert "tokenised into" in capsys.readouterr().out
    assert losses(train(*words)[1]) == first
    assert "tokens found in" in capsys.readouterr().out
    assert losses(train(*words, f"dataset.path={tmp_path / 'tokens'}", "dataset.pre_tokenize=false",
                        "dataset.pre_tokenize_output=null")[1]) == first  # fmt: skip
    (tmp_path / "text/train.txt").write_text("another text\n" * 40)
    with pytest.raises(DataError, match="made from another text"):
        train(*words)
    train(*words, "dataset.force_redownload=true")


def test_the_vocabulary_follows_the_tokenizer(train, small, capsys):
    model_size = ["model.vocab_size=9000"]
    train(*small, *model_size)
    out = capsys.readouterr().out
    assert "vocabulary      9,024 tokens" in out
    assert "model.vocab_size is 9,024, not 9,000" in out
    with pytest.raises(ConfigError, match="expected 500, but the tokenizer has 8192"):
        train(*small, "tokenizer.vocab_size=500")


def test_tensorboard_gets_the_numbers(train, small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished, rows = train(*small, "trainer.report_to=[tensorboard]", "wandb.project=mine")
    events = EventAccumulator(str(finished.folder / "trackers/mine")).Reload()
    assert [scalar.value for scalar in events.Scalars("train/loss")] == pytest.approx(losses(rows), rel=1e-6)
    assert [scalar.step for scalar in events.Scalars("eval/eval_loss")] == [6]


def test_wandb_is_recorded_and_resumed(train, small, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = [
        *small,
        "wandb.enabled=true",
        "wandb.mode=offline",
        f"wandb.dir={tmp_path / 'logs'}",
        "trainer.save_steps=3",
    ]
    names = ["wandb.project=the-project", "wandb.entity=the-entity", "wandb.name=the-name", "wandb.tags=[the-tag]"]
    train(*words, *names)
    train(*words, "trainer.resume_from_checkpoint=3", "wandb.resume=allow")
    train(*words, "trainer.resume_from_checkpoint=3", "wandb.resume=never")
    runs = sorted((tmp_path / "logs/wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    ids = [path.name.rpartition("-")[2] for path in runs]
    assert ids[0] in ids[1:] or len(runs) == 2
    assert len(set(ids)) == 2
    recorded = b"".join(path.read_bytes() for path in (tmp_path / "logs/wandb").rglob("*.wandb"))
    for word in (b"the-project", b"the-entity", b"the-name", b"the-tag", b"optimizer.lr"):
        assert word in recorded


def test_unknown_trackers_are_named(train, small):
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'; there are: .*tensorboard"):
        train(*small, "trainer.report_to=[tensorbord]")
