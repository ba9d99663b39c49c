"""Reading a diffusers pipeline's file: ``<component>.<module>.<slot>``, in ``pytorch_lora_weights.safetensors``.

Slots are PEFT's, or older spellings of the same. The configuration is PEFT's too, one per component, as JSON in the
file's metadata; a file without it has a scalar ``alpha`` beside the factors, or a scaling of 1. Format:
https://huggingface.co/docs/diffusers/using-diffusers/other-formats
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora.adapter import Adapter, Change, LowRank
from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.formats.components import choose
from lora.formats.factors import Factors, identity, open_factors
from lora.formats.original_names import of_flux
from lora.formats.peft import LINEAR_A, LINEAR_B, MAGNITUDE, peft_changes
from lora.formats.peft_config import PeftConfig, parse_lora_config

WEIGHTS, PICKLE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
METADATA = "lora_adapter_metadata"
ALPHA = ".alpha"
# The last is ComfyUI's and ai-toolkit's name for the pipeline's one diffusion model.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "diffusion_model")
COMPONENT = re.compile(rf"({'|'.join(COMPONENTS)})\.")
# Flux' own file has no component: its modules' names are those of the authors.
OF_FLUX = re.compile(r"(double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\.")
# diffusers 0.18 to 0.2x; still written by its training scripts. The text encoders have the second.
SPELLED_DOWN_UP = re.compile(r"\.(?:lora\.|lora_linear_layer\.|lora_)(down|up)\.weight$")
# Before, the factors belonged to the attention's processor and not to its layers.
OF_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
OF_TEXT_PROCESSOR = re.compile(r"\.to_(q|k|v|out)_lora\.")
PROCESSOR_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
SLOTS = {"down": LINEAR_A, "up": LINEAR_B}


def read_diffusers(source: Path | MappedFile, component: str | None = None) -> Adapter:
    """Read the updates of one component from a file, or from the folder that holds it under its usual name.

    ``component`` may be left out when the file has one only; the adapter's ``skipped`` names those that were not read.
    Raises AdapterError when the file can't be read, a tensor or field can't be honoured, or the component is not clear.
    """
    opened = _weights(source) if isinstance(source, Path) and source.is_dir() else source
    factors, metadata = open_factors(opened)
    file = factors.path
    components = {key: _component(file, key) for key in factors.names()}
    present = set(components.values())
    chosen = choose(file, present, component)
    keys = _canonical(file, [key for key, name in components.items() if name == chosen], f"{chosen}.")
    config = _config(file, metadata, f"{chosen}.")
    ours = factors.renamed(keys)
    return Adapter(
        path=source if isinstance(source, Path) else file,
        format="diffusers",
        files=(file,),
        sha256=identity((opened,)),
        changes=_in_diffusers_names(file, peft_changes(ours, config, "") if config else _changes(ours)),
        skipped=tuple(sorted(present - {chosen})),
    )


def _in_diffusers_names(path: Path, changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The authors' names of Flux' modules in diffusers' names; others stay."""
    return tuple(
        part
        for change in changes
        for part in (of_flux(change, path, flattened=False) if isinstance(change, LowRank) else (change,))
    )


def _weights(folder: Path) -> Path:
    return folder / (PICKLE if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists() else WEIGHTS)


def _component(path: Path, key: str) -> str:
    match = COMPONENT.match(key)
    if match is None and OF_FLUX.match(key):
        return "transformer"
    if match is None:
        raise AdapterError(
            f"{path}: tensor '{key}' belongs to no component; expected {', '.join(f'{name}.' for name in COMPONENTS)}"
            " before its name"
        )
    return match[1]


def _canonical(path: Path, keys: list[str], prefix: str) -> dict[str, str]:
    """{the key in PEFT's spelling, without the component: the file's key}."""
    canonical: dict[str, str] = {}
    for key in keys:
        name = _spelled_as_peft(path, key.removeprefix(prefix), key)
        if canonical.setdefault(name, key) != key:
            raise AdapterError(
                f"{path}: tensors '{canonical[name]}' and '{key}' are two spellings of one; save the adapter again"
            )
    return canonical


def _spelled_as_peft(path: Path, name: str, key: str) -> str:
    if (old := OF_PROCESSOR.search(name)) is not None:
        return f"{name[: old.start()]}.{PROCESSOR_LAYERS[old[1]]}{SLOTS[old[2]]}"
    if OF_TEXT_PROCESSOR.search(name):
        raise AdapterError(
            f"{path}: tensor '{key}' is spelled as by diffusers before 0.18, which is not understood here; load and"
            " save it with a newer one"
        )
    return SPELLED_DOWN_UP.sub(lambda match: SLOTS[match[1]], name)


def _config(path: Path, metadata: dict[str, str], prefix: str) -> PeftConfig | None:
    """The component's configuration in the metadata, whose fields bear the component's name as a prefix."""
    if METADATA not in metadata:
        return None
    try:
        fields: Any = json.loads(metadata[METADATA])
    except ValueError as error:
        raise AdapterError(
            f"{path}: the metadata '{METADATA}' is not JSON ({error}); save the adapter again"
        ) from error
    if not isinstance(fields, dict):
        raise AdapterError(
            f"{path}: the metadata '{METADATA}' is a {type(fields).__name__}; expected an object of fields, save the"
            " adapter again"
        )
    ours = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    return parse_lora_config(path, json.dumps(ours).encode()) if ours else None


def _changes(factors: Factors) -> tuple[Change, ...]:
    """What the tensors alone say: the rank by their shape, alpha by a scalar or not at all."""
    for key in factors.names():
        if key.endswith(MAGNITUDE):
            raise AdapterError(
                f"{factors.path}: tensor '{factors.spelling(key)}' is DoRA's, but the file has no configuration; save"
                " it with a newer diffusers"
            )
    modules = [key.removesuffix(LINEAR_A) for key in factors.names() if key.endswith(LINEAR_A)]
    changes = tuple(
        factors.take_low_rank(module, module + LINEAR_A, module + LINEAR_B, module + ALPHA) for module in modules
    )
    factors.done()
    return changes
