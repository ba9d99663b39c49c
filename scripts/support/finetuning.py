"""One way of adapting a model to a task, from the frozen base to its score.

Full fine-tuning, LoRA, bottleneck adapters, or a linear probe.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

from lora.modules.bottlenecks import Kind, insert, width_for
from lora.modules.layers import Injection, inject
from scripts.support.demo_tasks import Example, Task, split
from scripts.support.packaged_files import minilm

TRAIN, VALIDATION, TEST = 320, 160, 400
EPOCHS, BATCH, MAX_TOKENS = 6, 16, 32
TARGETS = ("query", "value")


@dataclass(frozen=True)
class Way:
    """A way to adapt: ``kind`` is full, lora, adapter-h, adapter-l or probe.

    ``rank`` is LoRA's, and sets how many parameters the adapters have.
    """

    kind: str
    rank: int = 8


@dataclass(frozen=True)
class Sample:
    """What one run trains on, chooses its rate by, and is judged on."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def sample(task: Task, seed: int) -> Sample:
    """Another draw of the training examples for every seed; the test examples are the same, and in no draw."""
    pool, test = split(task)
    drawn = random.Random(seed).sample(pool, TRAIN + VALIDATION)
    return Sample(drawn[:TRAIN], drawn[TRAIN:], test[:TEST])


def trained(task: Task, way: Way, rate: float, data: Sample, seed: int) -> tuple[Any, Any]:
    """The model after training, and its tokenizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=len(task.labels) or 1
    )
    prepare(model, way)
    fit(model, tokenizer, task, data.train, rate, seed)
    return model, tokenizer


def prepare(model: nn.Module, way: Way) -> None:
    """Make trainable what this way trains: everything, or its own parameters and the classifier."""
    if way.kind == "lora":
        inject(model, Injection(TARGETS, way.rank, 2 * way.rank, dropout=0.05, heads=("classifier",)))
    elif way.kind != "full":
        kind: Kind = way.kind  # type: ignore[assignment]
        new = set(insert(model, kind, width_for(model, kind, lora_parameters(model, way.rank))))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in new or name.startswith("classifier.")


def lora_parameters(model: Any, rank: int) -> int:
    """How many parameters LoRA of that rank has on the targets: A and B of two square projections a layer."""
    return int(model.config.num_hidden_layers * len(TARGETS) * 2 * rank * model.config.hidden_size)


def fit(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], rate: float, seed: int) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    steps = EPOCHS * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    order = random.Random(seed)
    for _ in range(EPOCHS):
        model.train()
        shuffled = order.sample(examples, len(examples))
        for start in range(0, len(shuffled), BATCH):
            batch = shuffled[start : start + BATCH]
            targets = torch.tensor(
                [example.target for example in batch], dtype=torch.long if task.labels else torch.float32
            )
            model(**tokenize(tokenizer, batch), labels=targets).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def tokenize(tokenizer: Any, examples: Sequence[Example]) -> Any:
    return tokenizer(
        [example.text for example in examples],
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )


@torch.no_grad()
def score(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example]) -> float:
    model.eval()
    batches = [examples[start : start + 64] for start in range(0, len(examples), 64)]
    logits = torch.cat([model(**tokenize(tokenizer, batch)).logits for batch in batches]).numpy()
    return metric(task, logits.argmax(-1) if task.labels else logits[:, 0], examples)


def metric(task: Task, predicted: np.ndarray, examples: Sequence[Example]) -> float:
    """Accuracy for classes, Pearson's r for a regression."""
    targets = np.array([example.target for example in examples])
    return float((predicted == targets).mean()) if task.labels else float(np.corrcoef(predicted, targets)[0, 1])


def probe_score(task: Task, data: Sample) -> float:
    """The score of a linear model on the frozen base's mean-pooled embeddings.

    Its penalty is chosen on validation examples, as the others' rates are.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    encoder = transformers.AutoModel.from_pretrained(minilm()).eval()
    train, validation, test = (
        embeddings(encoder, tokenizer, examples) for examples in (data.train, data.validation, data.test)
    )
    scaler = StandardScaler().fit(train)

    def fitted(strength: float) -> Any:
        linear = LogisticRegression(max_iter=2000, C=strength) if task.labels else Ridge(alpha=1 / strength)
        return linear.fit(scaler.transform(train), [example.target for example in data.train])

    best = max(
        (fitted(strength) for strength in (0.001, 0.01, 0.1)),
        key=lambda one: metric(task, one.predict(scaler.transform(validation)), data.validation),
    )
    return metric(task, best.predict(scaler.transform(test)), data.test)


@torch.no_grad()
def embeddings(encoder: Any, tokenizer: Any, examples: Sequence[Example]) -> np.ndarray:
    """Mean-pooled over the tokens, shape (examples, 384)."""
    pooled = []
    for start in range(0, len(examples), 64):
        batch = tokenize(tokenizer, examples[start : start + 64])
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled).numpy()
