"""Reading a kohya / A1111 file: ``lora_<component>_<module>.<slot>``, with the module's dots written as underscores.

Slots are ``lora_down.weight`` (A), ``lora_up.weight`` (B) and the scalar ``alpha``; the scaling is alpha / rank, per
module, and 1 without alpha. Format: https://github.com/kohya-ss/sd-scripts (networks/lora.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from lora.adapter import Adapter, LowRank
from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.formats.components import choose
from lora.formats.factors import Factors, identity, open_factors
from lora.formats.original_names import of_flux, of_sdxl

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
COMPONENT = re.compile(r"lora_(unet|transformer|te[123]?)_")
# Slots of LyCORIS and its kin, by how they begin.
REFUSED = {
    "lora_mid": "a CP-decomposed convolution (LoCon)",
    "hada_": "a Hadamard product (LoHa)",
    "lokr_": "a Kronecker product (LoKr)",
    "dora_scale": "DoRA as LyCORIS stores it",
    "diff": "a full difference",
    "oft_": "an orthogonal rotation (OFT)",
    "on_input": "a rescaling (IA3)",
    "w_norm": "a trained normalisation",
    "b_norm": "a trained normalisation",
}


def read_kohya(source: Path | MappedFile, component: str | None = None) -> Adapter:
    """Read the updates of one component: unet, transformer, te, te1, te2 or te3. It may be left out when the file has
    one only.

    Tensors of the others are not read; the adapter's ``skipped`` names them. Raises AdapterError when the file can't be
    read, a tensor can't be honoured or is left over, or the component is not clear.
    """
    factors, _ = open_factors(source)
    path = factors.path
    components = {key: _component(path, key) for key in factors.names()}
    present = set(components.values())
    chosen = choose(path, present, component)
    prefix = f"lora_{chosen}_"
    ours = factors.renamed({key.removeprefix(prefix): key for key, name in components.items() if name == chosen})
    return Adapter(
        path=path,
        format="kohya",
        files=(path,),
        sha256=identity((source,)),
        changes=_changes(ours),
        spelling="flattened",
        skipped=tuple(sorted(present - {chosen})),
    )


def _component(path: Path, key: str) -> str:
    match = COMPONENT.match(key)
    if match is None:
        raise AdapterError(
            f"{path}: tensor '{key}' belongs to no component; expected lora_unet_, lora_transformer_, lora_te_,"
            " lora_te1_, lora_te2_ or lora_te3_"
        )
    return match[1]


def _changes(factors: Factors) -> tuple[LowRank, ...]:
    for key in factors.names():
        slot = key.partition(".")[2]
        for start, what in REFUSED.items():
            if slot.startswith(start):
                raise AdapterError(
                    f"{factors.path}: tensor '{factors.spelling(key)}' is part of {what}, which can't be merged here;"
                    " convert the adapter to plain LoRA"
                )
    modules = [key.removesuffix(DOWN) for key in factors.names() if key.endswith(DOWN)]
    changes = [factors.take_low_rank(module, module + DOWN, module + UP, module + ALPHA) for module in modules]
    factors.done()
    renamed = [replace(change, module=of_sdxl(change.module)) for change in changes]
    return tuple(part for change in renamed for part in of_flux(change, factors.path, flattened=True))
