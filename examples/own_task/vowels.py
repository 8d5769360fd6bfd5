"""A task of your own: how large is the share of vowels in a text? Regression on a file of two columns, text and number.

    python examples/own_task/vowels.py TABLE.tsv [--SECTION.KEY VALUE]...

It brings the parts of a run; checkpoints, resuming, logs, schedules, engines and the summary come with `run_task`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from neobert.config.load import load_config
from neobert.data.batch import RowLayout
from neobert.data.labelled import EpochLoader, Split, tokenize_rows
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import DataError
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification
from neobert.tasks.encoder import blocks_of, build_storage, model_config, prepare_model
from neobert.training.run import Context, Finished, Parts, run_task

TOKENIZER = Path(__file__).parents[1] / "quickstart/tokenizer"
SMALL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=128",
]


def build(context: Context) -> Parts:
    """Data, model and storage. The loss is that of a classifier with one label: the squared error."""
    config, runtime = context.config, context.runtime
    context.print_configuration(config)
    hf_tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.path)
    path, trainer = config.dataset.path, config.trainer
    try:
        pairs = [line.split("\t") for line in Path(str(path)).read_text().splitlines()]
        texts, numbers = [text for text, _ in pairs], np.array([float(number) for _, number in pairs], np.float32)
    except ValueError as error:
        raise DataError(f"{path}: not lines of text, tab, number: {error}") from None
    longest = config.dataset.max_seq_length
    rows = tokenize_rows(hf_tokenizer, Split((texts,), numbers), longest, True, 1, str(path))
    layout = RowLayout(hf_tokenizer.pad_token_id)
    size = trainer.per_device_train_batch_size
    batches = EpochLoader(rows, layout, runtime, size, config.seed, False, 0, {"path": str(path)})

    torch.manual_seed(config.seed)
    architecture = model_config(config, len(hf_tokenizer), hf_tokenizer.pad_token_id, num_labels=1)
    model = NeoBERTForSequenceClassification(architecture)
    return Parts(
        config,
        model,
        batches,
        build_storage(model, "vowels", hf_tokenizer),
        blocks=blocks_of(model),
        after_update=model.normalize_matrices,
        facts={"task": f"the share of vowels, {len(rows):,} texts"},
        more_facts=prepare_model(config, model, runtime),
    )


def run(table: str, *overrides: str) -> Finished:
    """Train on a table. Raises UserError."""
    words = [f"dataset.path={table}", f"tokenizer.path={TOKENIZER}", "dataset.max_seq_length=64", *SMALL]
    return run_task(load_config([], [*words, *overrides], "pretraining"), build)


if __name__ == "__main__":
    run(*sys.argv[1:])
