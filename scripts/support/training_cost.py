"""What a training step of GPT-2 medium costs, fully or by LoRA, in this process."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_model

from lora.modules.layers import Injection, inject
from lora.modules.peft_files import save

BATCH, LENGTH, STEPS, WARM = 2, 128, 3, 1
# The paper's: rank 4 on queries and values, which GPT-2 keeps in one projection with its keys.
INJECTION = Injection(("c_attn",), rank=4, alpha=32, parts=(True, False, True))


def measured(arm: str) -> dict[str, Any]:
    """Bytes, and tokens a second in the median of the steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    if arm == "lora":
        inject(model, INJECTION)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    seconds = [step(model, optimizer) for _ in range(WARM + STEPS)]
    return {
        "trainable": sum(parameter.numel() for parameter in parameters),
        "gradients": sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None),
        "optimizer": sum(
            values.nbytes
            for state in optimizer.state.values()
            for values in state.values()
            if isinstance(values, torch.Tensor)
        ),
        "peak": peak(),
        "tokens_per_second": round(BATCH * LENGTH / float(np.median(seconds[WARM:])), 1),
        "checkpoint": checkpoint(model, arm),
    }


def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    ids = torch.randint(0, 50257, (BATCH, LENGTH))
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - started
    if len(optimizer.state) and model.training:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # kept, so that they are counted
    return seconds


def checkpoint(model: Any, arm: str) -> int:
    """The bytes of what a task has to keep: the adapter, or the model."""
    with tempfile.TemporaryDirectory() as folder:
        if arm == "lora":
            save(model, INJECTION, Path(folder) / "adapter", "CAUSAL_LM")
        else:
            save_model(model, str(Path(folder) / "model.safetensors"))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def peak() -> int:
    """This process's peak resident memory, in bytes."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
