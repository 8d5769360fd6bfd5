"""The data of a GLUE run: splits read, tokenised and turned into batches, as the configuration says."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from neobert.config.schema import Config
from neobert.data.batch import RowLayout
from neobert.data.labelled.loader import EpochLoader, Rows, tokenize_rows
from neobert.data.labelled.tasks import REPOSITORY, GlueTask, Source, find_files, read_split
from neobert.data.tokenizer import text_tokenizer
from neobert.ranks import Ranks
from neobert.tasks.encoder import row_layout

MOST_THREADS = 64


@dataclass(frozen=True)
class GlueData:
    """The training batches, the splits that are evaluated, and how long the run is."""

    train: EpochLoader
    evaluation: tuple[Rows, ...]
    layout: RowLayout
    num_steps: int
    notes: list[str]


def build_data(config: Config, task: GlueTask, hf_tokenizer: Any, ranks: Ranks) -> GlueData:
    """Read and tokenise the splits. Raises DataError."""
    glue, trainer = config.glue, config.trainer
    source = glue_source(config)
    limits = (glue.max_seq_length, config.tokenizer.truncation, glue.preprocessing_num_proc)
    fingerprint = text_tokenizer(hf_tokenizer).fingerprint
    shared = Shared(hf_tokenizer, fingerprint)
    train = encode_split(source, task, "train", True, shared, limits)
    evaluation = [encode_split(source, task, split, True, shared, limits) for split in task.evaluation]
    layout = row_layout(config, hf_tokenizer.pad_token_id, glue.max_seq_length)
    loader = EpochLoader(
        train, layout, ranks, trainer.per_device_train_batch_size, config.seed, glue.group_by_length,
        min(glue.num_workers, MOST_THREADS),
        {"task": task.name, "tokenizer": fingerprint, "max_seq_length": glue.max_seq_length,
         "accumulation": trainer.gradient_accumulation_steps},
    )  # fmt: skip
    steps_per_epoch = -(-loader.batches_per_epoch // trainer.gradient_accumulation_steps)
    num_steps, notes = steps_per_epoch * trainer.num_train_epochs, []
    if 0 <= trainer.max_steps < num_steps:
        num_steps = trainer.max_steps
    elif trainer.max_steps >= 0 and trainer.max_steps != type(trainer).model_fields["max_steps"].default:
        notes = [
            f"trainer.max_steps {trainer.max_steps:,} is not reached: {trainer.num_train_epochs} epochs are {num_steps:,} "
            "steps; raise num_train_epochs"
        ]
    return GlueData(loader, tuple(evaluation), layout, num_steps, notes)


def glue_source(config: Config) -> Source:
    """Where the configuration has the tasks."""
    dataset = config.dataset
    name = REPOSITORY if dataset.name == type(dataset).model_fields["name"].default else dataset.name
    return Source(dataset.path, name, dataset.cache_dir, dataset.force_redownload)


def find_all_files(config: Config, task: GlueTask) -> None:
    """Raises DataError where a split that training needs is missing."""
    for split in ("train", *task.evaluation):
        find_files(glue_source(config), task.name, split)


@dataclass(frozen=True)
class Shared:
    """A tokenizer that counts as equal to another one with the same fingerprint: what was tokenised can be used again."""

    hf_tokenizer: Any
    fingerprint: str

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shared) and other.fingerprint == self.fingerprint


@lru_cache(maxsize=4)
def encode_split(
    source: Source, task: GlueTask, split: str, with_labels: bool, tokenizer: Shared, limits: tuple[int, bool, int]
) -> Rows:
    """A split as rows; the seeds of a suite share them. Raises DataError."""
    found = read_split(source, task, split, with_labels)
    max_length, truncate, num_proc = limits
    what = f"{source}, {task.name}, {split}"
    return tokenize_rows(
        tokenizer.hf_tokenizer, found.texts, found.labels, max_length, truncate, num_proc, what, not task.labels
    )
