"""Rows of `test_every_key.py` for the keys of MTEB."""

import json

from helpers.checkpoints import tiny_model, write_checkpoint
from neobert.config.load import load_config
from neobert.tasks.mteb import task as mteb_task


def subject(small, *words):
    """The model as a run of MTEB gets it."""
    from pathlib import Path

    run = Path(small[0].partition("=")[2]).parent / "mteb-run"
    if not run.exists():
        write_checkpoint(run, tiny_model())
    loaded = load_config([], [f"trainer.output_dir={run}", *words], "mteb")
    return run, loaded, mteb_task.load_subject(loaded.config, None)


def setting(name, expected, *words):
    """A setting of the model is `expected`, and without the words it is not."""

    def row(train, small):
        found = [subject(small, *some)[2].settings[name] for some in (words, ())]
        return found[0] == expected and found[1] != expected

    return row


def batches(train, small):
    return [subject(small, f"mteb_batch_size={n}")[2].embedder.batch_tokens for n in (2, 3)] == [256, 384]


def local_task(root):
    rows = [{"sentence1": f"the {n}th", "sentence2": f"of {n * n}", "score": n} for n in range(6)]
    for name in ("first", "second"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def chosen(train, small):
    from neobert.tasks.mteb.library import choose_tasks

    run, loaded, _ = subject(small, "mteb_task_type=second")
    own = str(local_task(run / "tasks"))
    kinds = (loaded.config.mteb_task_type, "all")
    return [[task.metadata.name for task in choose_tasks(kind, own)] for kind in kinds] == [
        ["second"],
        ["first", "second"],
    ]


def again(train, small):
    """Tasks that have results run again, or not; those of a folder of one's own."""
    run, _, _ = subject(small)
    words = [f"mteb_local_tasks={local_task(run / 'tasks')}", "mteb_task_type=first", f"trainer.output_dir={run}"]
    times = []
    for more in ([], [], ["mteb_overwrite_results=true"]):
        assert mteb_task.run(load_config([], [*words, *more], "mteb")) == 0
        [path] = (run / "mteb/results").glob("*/*/first.json")
        times.append(path.stat().st_mtime_ns)
    return times[0] == times[1] < times[2]


MTEB_ROWS = {
    "mteb_task_type": chosen,
    "mteb_batch_size": batches,
    "mteb_pooling": setting("pooling", "cls", "mteb_pooling=cls"),
    "mteb_prompts": setting("prompts", {"query": "q: "}, "mteb_prompts={query: 'q: '}"),
    "mteb_overwrite_results": again,
    "mteb_local_tasks": again,
}
