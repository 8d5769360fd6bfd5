"""Evaluation of sentence embeddings with sentence-transformers' evaluators.

Spearman's correlation of cosines with scores; MRR@10 and nDCG@10 of finding an anchor's positive among all texts of a set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from neobert.config.schema import Config
from neobert.data.files.documents import SkippedRows
from neobert.data.pairs.table import Examples, encode_texts, read_examples, roles_of
from neobert.errors import ConfigError, DataError, Problem, check_installed
from neobert.inference.embed import embed_ids, unit_rows
from neobert.tasks.contrastive.data import ContrastiveData, find_place, longest_text
from neobert.training.run import Context, Evaluation

TOP = 10
NAMES = {"ndcg": f"ndcg@{TOP}", "mrr": f"mrr@{TOP}", "spearman": "spearman"}


@dataclass
class SentenceEncoder:
    """What the evaluators need of a model: `encode` and a similarity, which is the cosine."""

    embed: Callable[[list[str]], np.ndarray]  # unit vectors
    similarity_fn_name: str = "cosine"

    def __post_init__(self) -> None:
        self.model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_, **__: None)

    def encode(self, sentences: list[str], **_: Any) -> torch.Tensor:
        return torch.from_numpy(self.embed(list(sentences)))

    encode_query = encode_document = encode

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b.T


def find_sets(config: Config, data: ContrastiveData) -> dict[str, Examples]:
    """Everything to evaluate on, by name: held-out rows of the sources, then `contrastive.evaluation`. Raises DataError,
    and UserError where the evaluators are missing, before anything is trained.
    """
    sets = dict(data.held_out)
    for number, entry in enumerate(config.contrastive.evaluation):
        key = f"contrastive.evaluation, entry {number}"
        given = {**entry.model_dump(exclude={"split", "label"}), "eval_split": entry.split}
        place = find_place(config.dataset.model_copy(update=given), key)
        usual = next((name for name in ("test", "validation", *place.splits) if name in place.splits), None)
        chosen = place.choose("split", entry.split, usual)
        paths, label = place.splits[chosen[0]], entry.label or place.label
        roles = roles_of(paths, place.dataset.columns, f"{key}.columns")
        if roles.kind not in ("scores", "pairs"):
            raise DataError(f"{key}: {paths[0]} has {roles.kind}; pairs, or two texts and a score, can be evaluated")
        if label in sets:
            problem = f"entry {number}: the name {label!r} is taken; set its label"
            raise ConfigError(Problem("contrastive.evaluation", problem))
        sets[label] = read_examples(place.splits, chosen, roles, key, SkippedRows())
    if sets:
        check_installed("evaluating embeddings needs sentence-transformers", "contrastive", "sentence_transformers")
    return sets


def build_evaluator(examples: Examples, batch_size: int) -> Any:
    """The evaluator of a set. Imports sentence-transformers, which takes seconds."""
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )

    rows = examples.rows
    if examples.roles.kind == "scores":
        return EmbeddingSimilarityEvaluator(
            [row.anchor for row in rows], [row.positive for row in rows], [row.value for row in rows],
            batch_size=batch_size, main_similarity="cosine", similarity_fn_names=["cosine"], name="", write_csv=False,
        )  # fmt: skip
    queries: dict[str, str] = {row.anchor: f"q{number}" for number, row in enumerate(rows)}
    texts = dict.fromkeys(text for row in rows for text in (row.positive, *row.negatives))
    corpus = {text: f"d{number}" for number, text in enumerate(texts)}
    relevant: dict[str, set[str]] = {}
    for row in rows:
        relevant.setdefault(queries[row.anchor], set()).add(corpus[row.positive])
    return InformationRetrievalEvaluator(
        {number: text for text, number in queries.items()}, {number: text for text, number in corpus.items()}, relevant,
        mrr_at_k=[TOP], ndcg_at_k=[TOP], accuracy_at_k=[1], precision_recall_at_k=[TOP], map_at_k=[TOP],
        batch_size=batch_size, write_csv=False, show_progress_bar=False,
    )  # fmt: skip


def evaluate_set(evaluator: Any, model: SentenceEncoder) -> dict[str, float]:
    """`spearman`, or `mrr@10` and `ndcg@10`."""
    values = evaluator(model)
    found = {name: value for key, name in NAMES.items() for full, value in values.items() if key in full}
    return {name: 0.0 if np.isnan(value) else float(value) for name, value in found.items()}


def build_evaluation(
    config: Config, hf_tokenizer: Any, sets: dict[str, Examples], context: Context, model: Any
) -> Evaluation:
    """All sets, and `score`: the mean of Spearman's correlations and nDCG@10s.

    The processes embed the texts in turn, and each evaluates all of the vectors.
    """
    runtime, interrupt = context.runtime, context.interrupt
    size, most = config.trainer.per_device_eval_batch_size, config.trainer.eval_max_batches
    shortened = {name: examples.first(None if most is None else most * size) for name, examples in sets.items()}
    evaluators: dict[str, Any] = {}
    pad_id = hf_tokenizer.pad_token_id

    def embed(texts: list[str]) -> np.ndarray:
        ids = encode_texts(hf_tokenizer, texts, longest_text(config), True, "evaluation")
        return unit_rows(embed_ids(model, ids, pad_id, runtime))

    def measure() -> dict[str, float] | None:
        values: dict[str, float] = {}
        model.eval()
        for name, examples in shortened.items():
            if name not in evaluators:
                evaluators[name] = build_evaluator(examples, size)
            for metric, value in evaluate_set(evaluators[name], SentenceEncoder(embed)).items():
                values[f"{name}_{metric}"] = value
            if runtime.all_max(interrupt.wanted)[0]:
                return None
        model.train()
        counted = [value for name, value in values.items() if name.endswith(("_spearman", f"_ndcg@{TOP}"))]
        return {**values, "score": float(np.mean(counted))}

    def headline(values: dict[str, float]) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in values.items())

    return Evaluation(measure, headline, "score")
