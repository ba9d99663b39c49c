"""Train the demo's decoder adapter: WordNet supersense by completion on SmolLM2-135M.

Records how it fares against its base.

    python -m scripts.training.demo_decoder

Needs the extras ``train``, ``demo`` and ``gguf``, and npm for WordNet. About 20 minutes on one core. Writes into
``scripts/demo_data``: a PEFT adapter and its entry of ``training_record.json``. One thread and fixed seeds: the same
machine reproduces the same bytes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections import Counter
from importlib import metadata
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers

from scripts.support.demo_tasks import DATA, SUPERSENSE, Example, Task, held_out, split
from scripts.support.packaged_files import smollm2_checkpoint
from scripts.support.saved_adapter import save_adapter

COMPLETION = Task("supersense-completion", SUPERSENSE.labels, train_size=3000, test_size=400)
SEED, EPOCHS, BATCH, RATE, MAX_NEW_TOKENS = 0, 2, 16, 1e-3, 6
RANK, ALPHA, TARGETS = 4, 8, ["q_proj", "v_proj"]
COMPLETION_TOKENS = 2  # the label, which is one token for each of the twelve, and the end
CLEAR_MARGIN = 0.1


def prompt(example: Example) -> str:
    return f"Definition: {example.text}\nCategory:"


def label(example: Example) -> str:
    return COMPLETION.labels[int(example.target)]


def complete(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The first line that greedy decoding appends to each prompt."""
    model.eval()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizer.tokenize("\n")[0])]
    lines = []
    for start in range(0, len(prompts), BATCH):
        inputs = tokenizer(prompts[start : start + BATCH], padding=True, return_tensors="pt")
        tokens = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lines += [text.split("\n")[0].strip() for text in texts]
    return lines


def accuracy(model: Any, tokenizer: Any, examples: list[Example], context: str = "") -> float:
    lines = complete(model, tokenizer, [context + prompt(e) for e in examples])
    return sum(line == label(e) for line, e in zip(lines, examples, strict=True)) / len(examples)


def one_a_class(examples: list[Example]) -> str:
    """The first example of each class, solved, in the order that they come in."""
    first = {label(e): e for e in reversed(examples)}
    return "".join(f"{prompt(e)} {label(e)}\n\n" for e in examples if e is first[label(e)])


def fit(model: Any, tokenizer: Any, train: list[Example]) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=EPOCHS * -(-len(train) // BATCH))
    order, base = random.Random(SEED), model.get_base_model()
    for epoch in range(EPOCHS):
        model.train()
        # Texts of like length together, else padding takes a third of the time.
        shuffled, total = sorted(order.sample(train, len(train)), key=lambda e: len(e.text)), 0.0
        batches = [shuffled[start : start + BATCH] for start in range(0, len(shuffled), BATCH)]
        for batch in order.sample(batches, len(batches)):
            inputs = tokenizer(
                [f"{prompt(e)} {label(e)}{tokenizer.eos_token}" for e in batch], padding=True, return_tensors="pt"
            )
            # The output embedding is a fifth of the model: only where the completion is predicted, and as one matrix
            # product.
            hidden = base.model(**inputs).last_hidden_state[:, -COMPLETION_TOKENS - 1 : -1]
            loss = torch.nn.functional.cross_entropy(
                base.lm_head(hidden.flatten(0, 1)), inputs["input_ids"][:, -COMPLETION_TOKENS:].flatten()
            )
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch)
        print(f"{COMPLETION.name}: epoch {epoch + 1}/{EPOCHS}, loss {total / len(train):.4f}", flush=True)


def train() -> dict[str, Any]:
    transformers.set_seed(SEED)
    train_set, test_set = split(SUPERSENSE)[0][: COMPLETION.train_size], held_out(SUPERSENSE, COMPLETION.test_size)
    assert len(train_set) == COMPLETION.train_size, len(train_set)
    assert len(test_set) == COMPLETION.test_size, len(test_set)
    assert not {e.text for e in train_set} & {e.text for e in test_set}
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_checkpoint(), padding_side="left")
    assert all(len(tokenizer.tokenize(" " + name)) == COMPLETION_TOKENS - 1 for name in COMPLETION.labels)
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2_checkpoint())
    few_shot = accuracy(base, tokenizer, test_set, one_a_class(train_set))
    print(f"{COMPLETION.name}: base with one example a class in its context, accuracy {few_shot:.4f}", flush=True)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    )
    started = time.perf_counter()
    fit(model, tokenizer, train_set)
    seconds = time.perf_counter() - started
    save_adapter(model, COMPLETION.adapter, "HuggingFaceTB/SmolLM2-135M-Instruct", smollm2_checkpoint())
    return {
        "metric": "accuracy",
        "train": len(train_set),
        "test": len(test_set),
        "majority": max(Counter(map(label, test_set)).values()) / len(test_set),
        "few_shot": few_shot,
        "lora": accuracy(model, tokenizer, test_set),
        "train_seconds": round(seconds),
        "settings": {
            "seed": SEED,
            "epochs": EPOCHS,
            "batch": BATCH,
            "max_rate": RATE,
            "r": RANK,
            "alpha": ALPHA,
            "targets": TARGETS,
        },
    }


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record_path = DATA / "training_record.json"
    result = train()
    versions = {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    record[COMPLETION.name] = {**result, "versions": versions}
    record_path.write_text(json.dumps(record, indent=2) + "\n")
    print(COMPLETION.name, record[COMPLETION.name], flush=True)
    if result["lora"] < max(result["majority"], result["few_shot"]) + CLEAR_MARGIN:
        sys.exit(
            f"{COMPLETION.name}: the adapter does not clearly beat its base's few-shot accuracy and the majority class;"
            " it proves nothing"
        )


if __name__ == "__main__":
    main()
