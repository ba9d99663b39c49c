"""SmolLM2's engine against transformers, token for token: 50 held-out prompts, 64 greedy tokens each, base and adapted.

    python -m scripts.checks.generation [--prompts 50] [--tokens 64]

Exports the real SmolLM2-135M-Instruct as it is and with the demo's adapter, generates on ONNX Runtime, and generates
with transformers (the adapter merged by PEFT) in the same left-padded batches. Ends of text are ignored, so that every
prompt gives all its tokens. Exit status 1 when one token differs. Needs the extras ``demo``, ``gguf`` and ``train``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from engines import load
from engines.feeds.generate import greedy
from engines.feeds.text import TextEncoder
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from exporter.task import Request, export_task
from scripts.support.demo_tasks import DATA, SUPERSENSE, held_out
from scripts.support.packaged_files import smollm2_checkpoint

BATCH = 10
ADAPTER = DATA / "adapters" / "supersense-completion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    glosses = [example.text for example in held_out(SUPERSENSE, arguments.prompts)]
    adapted, unadapted = [f"Definition: {gloss}\nCategory:" for gloss in glosses], glosses
    with tempfile.TemporaryDirectory() as folder:
        bundle = exported(Path(folder) / "bundle")
        different = sum(
            compare(bundle, task, prompts, arguments.tokens)
            for task, prompts in (("unadapted", unadapted), ("supersense", adapted))
        )
    sys.exit(1 if different else 0)


def exported(out: Path) -> Bundle:
    export_task(Request(smollm2_checkpoint(), None, "unadapted"), out)
    return export_task(Request(smollm2_checkpoint(), ADAPTER, "supersense"), out).bundle


def compare(bundle: Bundle, task: str, prompts: list[str], tokens: int) -> int:
    """How many tokens differ; printed with the time that each side took."""
    encoder, graph, model = TextEncoder(bundle), task_part(bundle, task).graph, reference(task)
    ours: list[list[int]] = []
    theirs: list[list[int]] = []
    seconds = np.zeros(2)
    with load(bundle.path, task, threads=1) as session:
        for start in range(0, len(prompts), BATCH):
            inputs = encoder.encode(prompts[start : start + BATCH], graph)
            times = [time.perf_counter()]
            ours += greedy(session, inputs, tokens)
            times.append(time.perf_counter())
            theirs += generated(model, inputs, tokens)
            times.append(time.perf_counter())
            seconds += np.diff(times)
    different = sum(
        one != other
        for row, reference_row in zip(ours, theirs, strict=True)
        for one, other in zip(row, reference_row, strict=True)
    )
    total = sum(map(len, ours))
    print(
        f"{task}: {len(prompts)} prompts, {total} tokens, {different} differ; engine {seconds[0]:.0f} s, transformers"
        f" {seconds[1]:.0f} s, one thread"
    )
    return different


def reference(task: str) -> Any:
    """transformers' model; the adapter is merged by PEFT."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm2_checkpoint(), dtype=torch.float32)
    if task != "unadapted":
        model = peft.PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()
    model.generation_config.eos_token_id = None
    return model.eval()


def generated(model: Any, inputs: dict[str, np.ndarray], tokens: int) -> list[list[int]]:
    ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
    configuration = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=tokens, pad_token_id=0, eos_token_id=None
    )
    made: list[list[int]] = model.generate(ids, attention_mask=mask, generation_config=configuration)[
        :, ids.shape[1] :
    ].tolist()
    return made


if __name__ == "__main__":
    main()
