"""What a run does between steps: when it stops, evaluates and saves, what is best, what is read again, what trackers get."""

import pytest

from neobert.checkpoints.format import read_pointer
from neobert.checkpoints.locate import find_checkpoint
from neobert.errors import ConfigError, DataError


def test_epochs_limit_the_run(train, small):
    run = train(
        *small,
        "trainer.max_steps=-1",
        "trainer.num_train_epochs=3",
        "trainer.eval_strategy=epoch",
        "trainer.save_strategy=epoch",
    )
    assert f"3 epochs are {run.state.step} steps" in run.printed
    assert run.state.epoch == 2
    assert len(run.eval) == 3
    assert run.eval[-1]["step"] == run.state.step
    assert run.steps == [row["step"] for row in run.eval]


def test_early_stopping_and_the_best_model(train, small):
    words = [
        "trainer.eval_steps=2",
        "trainer.early_stopping=2",
        "trainer.load_best_model_at_end=true",
        "trainer.max_steps=60",
    ]
    run = train(*small, *words, "optimizer.lr=0.5", "scheduler.warmup_steps=0", "trainer.save_strategy=best")
    best = min(run.eval, key=lambda row: row["eval_loss"])
    assert run.state.step < 60
    assert run.state.stop_reason == "no better loss in 2 evaluations"
    assert run.state.best_step == best["step"]
    assert read_pointer(run.folder / "checkpoints/best") == str(best["step"])
    assert len({row["step"] for row in run.eval}) == len(run.eval)  # the best one's numbers stand at its own step only
    root = run.folder / "checkpoints"
    assert find_checkpoint(str(run.folder)).name == read_pointer(root / "latest") == str(best["step"])
    assert find_checkpoint("latest", root, to_resume=True).name == str(run.state.step) != str(best["step"])


def test_best_by_another_metric(train, small):
    run = train(*small, "trainer.eval_steps=2", "trainer.metric_for_best_model=accuracy")
    assert run.state.best_metric == max(row["eval_accuracy"] for row in run.eval)
    with pytest.raises(ConfigError, match="no metric 'speed'; there are: loss, accuracy"):
        train(*small, "trainer.eval_steps=2", "trainer.metric_for_best_model=speed")


def test_evaluation_data_is_needed_or_held_out(train, small, tmp_path):
    only = [*small, f"dataset.path={tmp_path / 'text/train.txt'}"]
    assert train(*only).eval == []
    assert len(train(*only, "dataset.validation_split=0.2").eval) == 1
    with pytest.raises(ConfigError, match="early_stopping: needs evaluation data"):
        train(*only, "trainer.early_stopping=1")


@pytest.mark.parametrize("change", ["trainer.masked_logits_only_loss=false", "trainer.gradient_checkpointing=true"])
def test_paths_that_change_nothing_but_cost(train, small, change):
    assert train(*small, change).losses == pytest.approx(train(*small).losses, rel=1e-5)


def test_token_folders_are_used_again(train, small, tmp_path):
    tokens = tmp_path / "tokens"
    words = [*small, "dataset.pre_tokenize=true", f"dataset.pre_tokenize_output={tokens}", "dataset.num_proc=1"]
    first = train(*words)
    assert "tokenised by 1 thread into" in first.printed
    again = train(*words)
    assert "tokens found in" in again.printed
    assert again.losses == first.losses
    direct = [f"dataset.path={tokens}", "dataset.pre_tokenize=false", "dataset.pre_tokenize_output=null"]
    assert train(*words, *direct).losses == first.losses
    (tmp_path / "text/train.txt").write_text("another text\n" * 40)
    with pytest.raises(DataError, match="made from another text"):
        train(*words)
    assert "tokenised by" in train(*words, "dataset.force_redownload=true").printed


def test_tensorboard_gets_the_numbers(train, small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(*small, "trainer.report_to=[tensorboard]", "wandb.project=mine")
    events = EventAccumulator(str(run.folder / "trackers/mine")).Reload()
    assert [scalar.value for scalar in events.Scalars("train/loss")] == pytest.approx(run.losses, rel=1e-6)
    assert [scalar.step for scalar in events.Scalars("eval/eval_loss")] == [6]
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'; there are: .*tensorboard"):
        train(*small, "trainer.report_to=[tensorbord]")


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
    identifiers = []
    for extra in ([], ["wandb.resume=allow"], ["wandb.resume=never"]):
        resumed = ["trainer.resume_from_checkpoint=3", *extra] if extra else names
        run = train(*words, *resumed)
        identifiers.append((run.folder / "wandb.json").read_text())
    assert identifiers[0] == identifiers[1] != identifiers[2]
    recorded = b"".join(path.read_bytes() for path in (tmp_path / "logs/wandb").rglob("*.wandb"))
    for word in (b"the-project", b"the-entity", b"the-name", b"the-tag", b"optimizer.lr"):
        assert word in recorded
