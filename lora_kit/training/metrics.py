"""What is measured: accuracy, precision, recall and F1 of a classifier; loss and perplexity of a language model.

Trainer hands over logits batch by batch; a language model's are reduced at once to two numbers a row, so that no
vocabulary-sized tensor is kept.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_kit.errors import MissingPackageError
from lora_kit.training.data import IGNORED

if TYPE_CHECKING:
    import torch

HEADLINE = {"classification": "accuracy", "causal-lm": "loss", "seq2seq-lm": "loss"}
"""The one number by which runs of a task are compared."""


def for_task(task: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any], dict[str, float]]]:
    """Trainer's `preprocess_logits_for_metrics` and `compute_metrics`."""
    if task == "classification":
        return _logits_alone, classification
    return (_causal_sums if task == "causal-lm" else _seq2seq_sums), language_model


def _logits_alone(logits: Any, labels: Any) -> "torch.Tensor":
    return (logits[0] if isinstance(logits, tuple) else logits).float()


def classification(prediction: Any) -> dict[str, float]:
    """Accuracy, and the mean over classes of precision, recall and F1."""
    try:
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support
    except ImportError:
        raise MissingPackageError("metrics need scikit-learn: pip install 'lora_kit[train]'") from None
    guessed = prediction.predictions.argmax(-1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        prediction.label_ids, guessed, average="macro", zero_division=0
    )
    accuracy = accuracy_score(prediction.label_ids, guessed)
    return {"accuracy": float(accuracy), "precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _causal_sums(logits: Any, labels: "torch.Tensor") -> "torch.Tensor":
    logits = logits[0] if isinstance(logits, tuple) else logits
    return sums(logits[:, :-1], labels[:, 1:])


def _seq2seq_sums(logits: Any, labels: "torch.Tensor") -> "torch.Tensor":
    return sums(logits[0] if isinstance(logits, tuple) else logits, labels)


def sums(logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Per row, the summed negative log-likelihood and the number of labelled tokens.

    (batch, seq, vocabulary), (batch, seq) -> (batch, 2)
    """
    import torch
    from torch.nn import functional

    # row by row: the float32 copy of a whole batch of logits would be the largest tensor of the evaluation
    rows = []
    for row, wanted in zip(logits, labels, strict=True):
        loss = functional.cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="sum")
        rows.append(torch.stack([loss, (wanted != IGNORED).sum().to(loss.dtype)]))
    return torch.stack(rows)


def language_model(prediction: Any) -> dict[str, float]:
    """Mean negative log-likelihood per labelled token over all rows, and its exponential."""
    total, count = prediction.predictions.astype("float64").sum(0)
    loss = float(total / count)
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
