"""A model's dimensions, from its transformers configuration alone.

The model is built on torch's meta device, without memory for weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lora.errors import AdapterError
from lora.modules.layers import check_kind, chosen_layers, has_lora
from lora.modules.projections import FUSED, PARTS, SEPARATE, ends_in, fused_widths
from lora.planning.economics import Dimensions, Plan, Product

# The paper's model (Brown et al. 2020, table 2.1), which has GPT-2's architecture.
GPT3 = "gpt3-175b"
GPT3_CONFIG: dict[str, Any] = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "vocab_size": 50257}
PAPERS_CASE = (GPT3, 4, "q,v", 2)  # model, rank, targets, bytes of a number
# The paper's figures for that: sections 1, 4.2 and 5.5.
PAPER = {
    "parameters of the base": "175 billion",
    "checkpoint, full fine-tuning": "350 GB",
    "checkpoint, LoRA": "35 MB, as 350 GB ÷ 10,000",
    "checkpoint, full ÷ LoRA": "roughly 10,000",
    "weights and moments, LoRA": "350 GB",
    "weights and moments, full ÷ LoRA": "3 (1.2 TB of memory in all to 350 GB)",
    "100 tasks, one base and an adapter each": "354 GB",
    "100 tasks, a model each": "35 TB",
}


def read_dimensions(model: str, targets: Sequence[str]) -> Dimensions:
    """The dimensions of ``gpt3-175b`` or of the configuration at a path (config.json, or its folder).

    ``targets`` are the paper's q, k, v and o, or names that module paths end in. Raises AdapterError when there is no
    such configuration, its architecture is unknown, or a target names nothing.
    """
    config = _config(model)
    built = _built(model, config)
    products = [product for target in targets for product in _products(built, config, target)]
    if repeated := sorted(
        {product.name for product in products if sum(product.name == other.name for other in products) > 1}
    ):
        raise AdapterError(f"targets {', '.join(targets)}: '{repeated[0]}' is named twice; name it once")
    return Dimensions(model, sum(parameter.numel() for parameter in built.parameters()), tuple(products))


def with_papers_figures(found: Plan) -> Plan:
    """The plan of the paper's model, with the paper's own figures beside it."""
    return replace(found, figures=tuple(replace(figure, paper=PAPER.get(figure.name, "")) for figure in found.figures))


def _config(model: str) -> Any:
    if model == GPT3:
        return transformers.GPT2Config(**GPT3_CONFIG)
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except OSError as error:
        raise AdapterError(
            f"{path}: can't be read ({error.strerror}); give a config.json, its folder, or {GPT3}"
        ) from error
    except Exception as error:  # a class of transformers checks its own fields, each with errors of its own
        raise AdapterError(
            f"{path}: not the configuration of a model that transformers knows ({_short(error)}); correct it, or take"
            " the model's own"
        ) from error


def _auto(config: Any) -> Any:
    """The architecture's language model where it has one, else the plain model.

    The output embedding is tied to the input's, or counted.
    """
    if config.is_encoder_decoder:  # Whisper and Marian have a causal model as well: their decoder alone
        whole = (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForSpeechSeq2Seq)
        return next((auto for auto in whole if type(config) in auto._model_mapping), transformers.AutoModel)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    encoder = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    return transformers.AutoModelForCausalLM if causal and not encoder else transformers.AutoModel


def _built(model: str, config: Any) -> Any:
    auto = _auto(config)
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except (
        Exception
    ) as error:  # a number that fits no model fails where it is first used: a division by zero, an assertion, a shape
        raise AdapterError(
            f"{model}: transformers can't build the model ({_short(error)}); correct the sizes in its configuration, or"
            " take the model's own"
        ) from error


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _products(model: Any, config: Any, target: str) -> list[Product]:
    if target not in SEPARATE:
        return [_product(path, layer) for path, layer in chosen_layers(model, (target,)).items()]
    paths = {path: layer for path, layer in model.named_modules() if has_lora(layer)}
    found = [_product(path, layer) for path, layer in paths.items() if ends_in(path, SEPARATE[target])]
    if found:
        return found
    if target in PARTS:
        found = [_part(path, layer, config, target) for path, layer in paths.items() if ends_in(path, FUSED)]
    if not found:
        raise AdapterError(
            f"target '{target}': {type(model).__name__} has no projection by a name that is known; give the module's"
            " own name, as for PEFT"
        )
    return found


def _product(path: str, layer: Any) -> Product:
    check_kind(path, layer)
    rows, columns = layer.weight.shape
    if not rows * columns:
        raise AdapterError(
            f"'{path}' is empty, {rows} × {columns}; correct the sizes in the configuration, or take the model's own"
        )
    return Product(path, columns, rows) if isinstance(layer, torch.nn.Linear) else Product(path, rows, columns)


def _part(path: str, layer: Any, config: Any, target: str) -> Product:
    """One of queries, keys and values in a fused projection; grouped heads make the latter two narrower."""
    whole = _product(path, layer)
    widths = fused_widths(config, whole.outputs)
    if widths is None:
        own = path.rpartition(".")[2]
        raise AdapterError(
            f"target '{target}': by the configuration, the {whole.outputs} outputs of '{path}' are not its heads'"
            f" queries, keys and values; give --targets {own} to adapt it whole"
        )
    return Product(f"{path}[{target}]", whole.inputs, widths[PARTS.index(target)])
