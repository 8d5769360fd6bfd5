"""`neobert glue CONFIG --predict`: the files that GLUE's server takes, from a finished run."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np

from neobert.checkpoints.format import STATE
from neobert.config.schema import Config
from neobert.data.labelled import TASKS, GlueTask, has_split
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import CheckpointError, DataError, UserError
from neobert.files import write_text
from neobert.tasks.encoder import row_layout
from neobert.tasks.glue.data import Shared, encode_split, glue_source, predict_logits, predictions
from neobert.tasks.glue.model import load_finetuned
from neobert.tasks.glue.task import read_result
from neobert.training.run_folder import hold_folder
from neobert.training.runtime import Runtime, build_runtime

FOLDER = "submission"


def predict_run(config: Config) -> list[Path]:
    """Write the submission files of the run in `trainer.output_dir`. Raises UserError when there is nothing to predict."""
    folder, asked = Path(config.trainer.output_dir), config.trainer
    runtime = build_runtime(use_cpu=asked.use_cpu, mixed_precision=asked.mixed_precision, tf32=asked.tf32, trains=False)
    if not runtime.is_main:
        return []
    alone = runtime.alone()
    with hold_folder(folder, alone) if folder.is_dir() else nullcontext():
        written = write_predictions(config, folder / FOLDER, alone)
    if not written:
        raise DataError(f"{glue_source(config)}: no test split of {config.glue.task_name}: nothing to predict")
    return written


def write_predictions(config: Config, output: Path, runtime: Runtime) -> list[Path]:
    """The submission files of a finished run, for every test split that is there; a model of mnli also predicts ax."""
    run_folder, source = Path(config.trainer.output_dir), glue_source(config)
    result = read_result(run_folder)
    if result is None:
        raise UserError(f"{run_folder}: no result.json, so no finished run of GLUE; train first: neobert glue CONFIG")
    checkpoint = run_folder / "checkpoints" / str(result["step"])
    if not (checkpoint / STATE).is_file():
        raise CheckpointError(f"{checkpoint}: the run kept no checkpoint of its result (trainer.save_model: false?)")
    model, hf_tokenizer, task = load_finetuned(checkpoint)
    model.to(runtime.device)
    layout = row_layout(config, hf_tokenizer.pad_token_id, config.glue.max_seq_length)
    shared = Shared(text_tokenizer(hf_tokenizer).fingerprint, hf_tokenizer)
    written, batch_size = [], config.trainer.per_device_eval_batch_size
    for one in [task, *([TASKS["ax"]] if task.name == "mnli" else [])]:
        for split, name in one.tests:
            if not has_split(source, one, split):
                print(f"note: no split {split} of {one.name} in {source}: {name} is not written")
                continue
            rows = encode_split(config, one, split, shared, with_labels=False)
            logits, _ = predict_logits(model, one.num_labels, rows, layout, batch_size, runtime)
            written.append(write_submission(output / name, one, logits))
            print(f"{output / name}: {len(rows):,} predictions, by {checkpoint}")
    return written


def write_submission(path: Path, task: GlueTask, logits: np.ndarray) -> Path:
    """A tab-separated file of index and prediction, one line an example, in the order of the split."""
    predicted = predictions(task, logits)
    if not task.labels:
        lines = [f"{value:.3f}" for value in predicted.clip(0.0, task.largest)]
    else:
        lines = [task.labels[number] if task.writes_names else str(number) for number in predicted]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "index\tprediction\n" + "".join(f"{i}\t{line}\n" for i, line in enumerate(lines)))
    return path
