"""What an adapter has to beat: the same answer for every text, and a linear model on the frozen base's embeddings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lora.files.tensorfile import Array
from lora.training.examples import Examples, Kind

BATCH = 32


def metric_of(kind: Kind) -> str:
    """What a kind of task is judged by."""
    return {"classification": "accuracy", "regression": "Pearson r", "causal-lm": "loss"}[kind]


def judged(kind: Kind, predicted: Array, targets: Array) -> float:
    """Accuracy of class indices, or Pearson's r of numbers (0 where one side is constant)."""
    if kind == "classification":
        return float((predicted == targets).mean())
    return float(np.corrcoef(predicted, targets)[0, 1]) if predicted.std() > 0 and targets.std() > 0 else 0.0


def majority(train: Examples, validation: Examples) -> float:
    """The accuracy of always saying the commonest class of the training examples."""
    ((commonest, _),) = Counter(train.targets).most_common(1)
    return float((np.array(validation.targets) == commonest).mean())


def linear_probe(base: Path, tokenizer: Any, kind: Kind, train: Examples, validation: Examples, longest: int) -> float:
    """A logistic regression, or ridge, on the mean of the frozen base's last hidden states."""
    encoder = transformers.AutoModel.from_pretrained(base).eval()
    embedded = [_embeddings(encoder, tokenizer, examples, longest) for examples in (train, validation)]
    linear = LogisticRegression(max_iter=2000, C=0.1) if kind == "classification" else Ridge(alpha=10.0)
    fitted = make_pipeline(StandardScaler(), linear).fit(embedded[0], train.targets)
    return judged(kind, fitted.predict(embedded[1]), np.array(validation.targets))


@torch.no_grad()
def _embeddings(encoder: Any, tokenizer: Any, examples: Examples, longest: int) -> Array:
    """Shape (examples, width), float32."""
    pooled = []
    for start in range(0, len(examples), BATCH):
        batch = tokenizer(
            list(examples.texts[start : start + BATCH]),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append((encoder(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1))
    return np.asarray(torch.cat(pooled).numpy())
