"""The whole configuration. What a key means stands at its field; `load.py` turns YAML into a frozen `Config`."""

from functools import cache
from typing import Any, Literal

from neobert.config import sections
from neobert.config.field import CONTRASTIVE, GLUE, MTEB, TASKS, KeyInfo, Section, describe_keys, key, section


# Tables, laid out by hand.
# fmt: off
class GlueConfig(Section):
    """`glue`: fine-tuning on a GLUE task."""

    tasks = GLUE
    task_name: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"] = key("cola",
        "GLUE task.", "data, head and metrics")
    num_labels: int = key(2, "Number of labels; 1 is regression. Follows the task.", "an error when they differ", ge=1)
    max_seq_length: int = key(128, "Longest row, a sentence or a pair, in tokens.", "length of rows", ge=8)
    pretrained_model_path: str | None = key(None,
        "Pretrained model: a run's folder, a checkpoint, or the config file in one. With `pretrained_checkpoint_dir` it only "
        "says which architecture is expected there.", "initial weights")
    pretrained_checkpoint_dir: str | None = key(None,
        "Folder that holds checkpoints, as <output_dir> or <output_dir>/checkpoints.", "initial weights")
    pretrained_checkpoint: str | int | None = key(None,
        "Which of them: `latest`, `best`, a step; or the path of one (default: top-level `pretrained_checkpoint`).",
        "initial weights")
    allow_random_weights: bool = key(False, "Train without pretrained weights where none are named.", "an error, or not")
    classifier_dropout: float = key(0.1, "Dropout before the classifier.", "training noise", ge=0, lt=1)
    classifier_init_range: float = key(0.02,
        "Standard deviation of the classifier's first weights; wins over `model.classifier_init_range`.",
        "initial weights", gt=0)
    transfer_from_task: bool = key(False,
        "Start from a checkpoint of another GLUE task (its encoder and hidden layer). In a suite: rte, mrpc and stsb from "
        "mnli of the same seed.", "initial weights")
    num_workers: int = key(4, "Threads that put batches together ahead.", "speed", ge=0, le=1024)
    preprocessing_num_proc: int = key(4, "Most threads for tokenising the task; one takes 20,000 rows.", "speed", ge=1, le=1024)
    pooling: Literal["cls", "mean"] = key("cls",
        "What the classifier sees of a row: its first token, or the mean of all.", "shape of the head", beyond=True)
    group_by_length: bool = key(False,
        "Rows of similar length come in one batch: less padding where padding costs.", "order of the data", beyond=True)


class EvaluationSet(Section):
    """One entry of `contrastive.evaluation`."""

    path: str = key("", "As `dataset.path`.", "what is evaluated")
    name: str = key("", "As `dataset.name`.", "what is evaluated")
    config: str | None = key(None, "As `dataset.config`.", "what is evaluated")
    split: str | None = key(None, "Split, or a slice of one.", "what is evaluated")
    columns: dict[str, str] = key({}, "As `dataset.columns`.", "what is evaluated")
    label: str | None = key(None, "Its name in metrics (default: that of the file).", "metrics")


class ContrastiveConfig(Section):
    """`contrastive`: training sentence embeddings."""

    tasks = CONTRASTIVE
    temperature: float = key(0.05, "Cosine similarities are divided by this.", "loss", gt=0)
    pooling: Literal["avg", "cls", "max"] = key("avg",
        "How token vectors become one: their mean, the first one, or the maximum.", "embeddings")
    loss_type: Literal["simcse", "supcon"] = key("simcse",
        "`simcse`: every anchor is to find its positive among all texts of the batch (InfoNCE). `supcon`: all texts with the "
        "same label, or of the same pair, attract each other.", "loss")
    hard_negative_weight: float = key(0.0,
        "Added to the logits of an anchor's own hard negatives: w counts them e^w times in the denominator (SimCSE).",
        "loss", ge=0)
    min_score: float | None = key(None,
        "Of two texts with a score, those with at least this one are positive pairs (default: 80 % of the highest).",
        "rows used", beyond=True)
    evaluation: list[EvaluationSet] = key([],
        "Sets to evaluate on, besides held-out rows of the sources: a list of {path or name, config, split, columns, label}. "
        "Scores give Spearman's correlation, pairs MRR@10 and nDCG@10.", "metrics", beyond=True)
    pretrained_checkpoint_dir: str | None = key(None, "As `glue.pretrained_checkpoint_dir`.", "initial weights", beyond=True)
    pretrained_model_path: str | None = key(None, "As `glue.pretrained_model_path`.", "initial weights", beyond=True)
    pretrained_checkpoint: str | int | None = key(None, "As `glue.pretrained_checkpoint`.", "initial weights", beyond=True)
    allow_random_weights: bool = key(False,
        "Train without pretrained weights where none are named.", "an error, or not", beyond=True)


class Config(Section):
    """A run. Built by `neobert.config.load.load_config`; never changed afterwards."""

    tasks = TASKS
    task: Literal["pretraining", "glue", "mteb", "contrastive"] = key("pretraining", "What the run does.", "the run")
    model: sections.ModelConfig = section("The architecture.")
    tokenizer: sections.TokenizerConfig = section("How text becomes token ids.")
    dataset: sections.DatasetConfig = section("Where text comes from.")
    trainer: sections.TrainerConfig = section("The loop.")
    scheduler: sections.SchedulerConfig = section("The learning rate.")
    optimizer: sections.OptimizerConfig = section("How gradients become updates.")
    datacollator: sections.DataCollatorConfig = section("Rows and their masks.")
    wandb: sections.WandbConfig = section("The Weights & Biases tracker.")
    glue: GlueConfig = section("Fine-tuning on a GLUE task.")
    contrastive: ContrastiveConfig = section("Training sentence embeddings.")
    pretrained_checkpoint: str = key("latest",
        "Checkpoint that a downstream task starts from: `latest`, `best`, or a step.",
        "initial weights", tasks=("glue", "contrastive", "mteb"))
    mteb_task_type: str = key("all",
        "Which MTEB tasks to run: `all` (the 56 English tasks, or all of `mteb_local_tasks`), classification, clustering, "
        "pair_classification, reranking, retrieval, sts, summarization; names of tasks, separated by commas; or a benchmark.",
        "results", min_length=1, tasks=MTEB)
    mteb_batch_size: int = key(32,
        "Texts of 128 tokens that are computed at a time: of longer ones fewer, of shorter ones more; where it is not set, by "
        "device.", "speed", ge=1, tasks=MTEB)
    mteb_pooling: Literal["mean", "avg", "cls", "max"] = key("mean",
        "How token vectors become one; where it is not set, as the model was trained.", "results", tasks=MTEB)
    mteb_overwrite_results: bool = key(False, "Run tasks again that have results.", "results", tasks=MTEB)
    mteb_prompts: dict[str, str] = key({},
        "Prompts, put in front of texts: by `query` or `document`, type of task (as STS), or task (as STS12, or STS12-query).",
        "results", tasks=MTEB, beyond=True)
    mteb_local_tasks: str | None = key(None,
        "Folder of tasks of your own, as jsonl; `mteb_task_type` then chooses among these.", "results", tasks=MTEB, beyond=True)
    seed: int = key(0, "Seed of weights, order, masks and dropout.", "all that is random", ge=0, lt=2**63)
    debug: bool = key(False, "Print more: the resolved configuration, versions, and every step.", "the console")
    use_deepspeed: bool = key(True, "Use DeepSpeed when launched by it.", "the engine")
    accelerate_config_file: str | None = key(None, "Accelerate launch configuration.", "the engine")
    pretraining_metadata: dict[str, Any] = key({}, "Notes kept with every checkpoint.", "state.json")
    config_path: str | None = key(None, "File that this configuration was read from.", "config.yaml of a run")

    @property
    def row_length(self) -> int:
        """Tokens of a row of pretraining."""
        packed = self.datacollator.max_length if self.datacollator.pack_sequences else None
        return packed or self.dataset.max_seq_length

    def value_of(self, dotted: str) -> Any:
        """The value of a key; None below a section that is not there."""
        value: Any = self
        for part in dotted.split("."):
            value = getattr(value, part, None)
        return value

    def with_keys(self, **sections: dict[str, Any]) -> "Config":
        """This configuration with keys of its sections replaced."""
        replaced = {name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()}
        return self.model_copy(update=replaced)

    def is_set(self, dotted: str) -> bool:
        """Whether a key was given a value, be it its default, in a file, on the command line, or by the run itself."""
        section, _, name = dotted.rpartition(".")
        inner = self.value_of(section) if section else self
        return isinstance(inner, Section) and name in inner.model_fields_set

    def is_chosen(self, dotted: str) -> bool:
        """Whether a key was given another value than its default."""
        value = self.value_of(dotted)
        default = type(value)() if isinstance(value, Section) else known_keys()[dotted].default
        return self.is_set(dotted) and bool(value != default)


@cache
def known_keys() -> dict[str, KeyInfo]:
    """Every key of the configuration in the order of the schema, by dotted name."""
    return {info.key: info for info in describe_keys(Config)}
