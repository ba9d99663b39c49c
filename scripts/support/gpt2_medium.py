"""GPT-2 medium, the paper's own model, with random weights and random adapters.

For where time and size matter, and values do not.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


def base_and_adapters(folder: Path, names: Sequence[str]) -> tuple[Path, list[Path]]:
    """The base in float32 and an adapter of rank 4 on queries and values for each name, made in ``folder`` once."""
    base, adapters = folder / "base", [folder / name for name in names]
    if not all((adapter / "adapter_config.json").exists() for adapter in adapters):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _make(base, adapters)
    return base, adapters


def _make(base: Path, adapters: Sequence[Path]) -> None:
    import peft
    import torch
    import transformers

    logging: Any = transformers.logging
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    model.save_pretrained(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config)
    for adapter in adapters:
        _save_random_adapter(wrapped, adapter)


def _save_random_adapter(wrapped: Any, adapter: Path) -> None:
    """Random factors that change queries and values; c_attn's outputs are queries, keys and values, a third each."""
    import torch

    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
                if "lora_B" in name:
                    third = parameter.shape[0] // 3
                    parameter[third : 2 * third] = 0
    wrapped.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    record = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": None}))
