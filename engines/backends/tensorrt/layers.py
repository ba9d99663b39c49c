"""What a built engine consists of: its layers, their tactics, and where two engines differ in them.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/EngineInspector.html
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import msgspec

from lora.errors import EngineError


@dataclass(frozen=True)
class LayerDifference:
    """A place where two engines differ: the layer's position, a field, and both values.

    The field is ``layer`` where one engine has no such layer.
    """

    position: int
    field: str
    one: str
    other: str


def layers_of(information: str) -> list[dict[str, Any]]:
    """The layers of an inspector's JSON, each a mapping of its fields. Raises EngineError when it is none."""
    try:
        layers = msgspec.json.decode(information, type=_Information).Layers
    except msgspec.MsgspecError as error:
        raise EngineError(f"the engine's inspector gave no list of layers ({error})") from error
    # Engines built without detail list names only.
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]


def layer_differences(one: str, other: str) -> list[LayerDifference]:
    """Where the engines of two inspectors' JSON differ: layer by layer, field by field, tactics included."""
    found = []
    for position, (left, right) in enumerate(zip_longest(layers_of(one), layers_of(other))):
        if left is None or right is None:
            found.append(LayerDifference(position, "layer", _name(left), _name(right)))
            continue
        fields = sorted(field for field in left.keys() | right.keys() if left.get(field) != right.get(field))
        found += [LayerDifference(position, field, str(left.get(field)), str(right.get(field))) for field in fields]
    return found


class _Information(msgspec.Struct):
    Layers: list[dict[str, Any] | str]


def _name(layer: dict[str, Any] | None) -> str:
    return str(layer.get("Name")) if layer is not None else "none"
