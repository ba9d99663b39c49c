"""Bundles that an attacker changed and signed again: a seed makes one change to a bundle of four tasks.

A change is to the manifest (a value removed, replaced, or copied from elsewhere), a graph (as ONNX has it, or byte by
byte), a weights file, or an adapter's file. Sizes and hashes are right again afterwards, so that only what the content
says can give the change away. Beside the files lies one that no manifest names, with poisonous values.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from scripts.support.hand_made_bundle import TASKS
from scripts.support.resigned import Record, edit_manifest, files_in, manifest_of, part_of, replace_content, resign

STRAY = "stray.safetensors"
Place = tuple[str | int, ...]
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    7,
    7.5,
    2**40,
    "",
    "x",
    "\x1b[2J",
    STRAY,
    "../" + STRAY,
    "a/b",
    [],
    [0, 1],
    [1],
    {},
    {"a": 1},
)


def mutated(made: Path, folder: Path, seed: int) -> Path:
    """A copy of the bundle ``made`` in ``folder``, with one change; the stray file lies in it and beside it."""
    chance = random.Random(seed)
    bundle = Path(shutil.copytree(made, folder / "bundle"))
    for place in (bundle, folder):
        (place / STRAY).write_bytes(_poison(bundle))
    chance.choice((_manifest, _manifest, _graph, _graph_bytes, _weights, _adapter))(chance, bundle)
    return bundle


def without_strays(bundle: Path, folder: Path) -> Path:
    """A copy of the bundle that has nothing but what its manifest names."""
    copy = folder / "vouched" / "bundle"
    named = {copy / "manifest.json"} | {copy / path for path in _named(bundle)}
    shutil.copytree(bundle, copy)
    for file in sorted(copy.rglob("*")):
        if file.is_file() and file not in named:
            file.unlink()
    return copy


def _named(bundle: Path) -> list[str]:
    return [file["path"] for file in files_in(manifest_of(bundle)) if isinstance(file["path"], str)]


def _poison(bundle: Path) -> bytes:
    """The base, with values of its own."""
    base: str = manifest_of(bundle)["base"]["weights"][0]["path"]
    content = (bundle / base).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    return content[:size] + bytes.fromhex("00007a44") * ((len(content) - size) // 4)  # a thousand


def _manifest(chance: random.Random, bundle: Path) -> None:
    def change(manifest: Record) -> None:
        places = [place for place in _places(manifest) if place]
        place = chance.choice(places)
        match chance.randrange(4):
            case 0:
                _holder(manifest, place).pop(place[-1])
            case 1:
                _holder(manifest, place)[place[-1]] = chance.choice(VALUES)
            case 2:  # a value from a place of the same name, so that it is of the right kind
                alike = [other for other in places if other[-1] == place[-1]]
                _holder(manifest, place)[place[-1]] = _copied(manifest, chance.choice(alike))
            case 3:
                _holder(manifest, place)[place[-1]] = _copied(manifest, chance.choice(places))

    edit_manifest(bundle, change)
    if chance.random() < 0.5 and _is_sound(bundle):
        resign(bundle)


def _is_sound(bundle: Path) -> bool:
    """Whether every file's record names a file as text, so that it can be signed."""
    return all(isinstance(file["path"], str) and "\0" not in file["path"] for file in files_in(manifest_of(bundle)))


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    yield place
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from _places(value[key], (*place, key))


def _holder(manifest: Any, place: Place) -> Any:
    for key in place[:-1]:
        manifest = manifest[key]
    return manifest


def _copied(manifest: Any, place: Place) -> Any:
    return json.loads(json.dumps(_holder(manifest, place)[place[-1]]))


def _graph(chance: random.Random, bundle: Path) -> None:
    path = part_of(bundle, chance.choice(tuple(TASKS)))["model"]["path"]
    model = onnx.load(bundle / path, load_external_data=False)
    chance.choice((_place_tensor, _describe_tensor, _rename_tensor, _rewire))(chance, bundle, model)
    replace_content(bundle, path, model.SerializeToString())


def _tensor(chance: random.Random, model: onnx.ModelProto) -> onnx.TensorProto:
    tensors: list[onnx.TensorProto] = [tensor for tensor in model.graph.initializer if tensor.external_data]
    return chance.choice(tensors)


def _place_tensor(chance: random.Random, bundle: Path, model: onnx.ModelProto) -> None:
    places = (STRAY, "../" + STRAY, str(bundle.parent / STRAY), "./" + STRAY, *_named(bundle))
    entry = chance.choice(_tensor(chance, model).external_data)
    if entry.key == "location":
        entry.value = chance.choice(places)
    else:
        entry.value = str(int(entry.value) + chance.choice((-256, -8, -4, -1, 1, 4, 8, 64, 256)))


def _describe_tensor(chance: random.Random, bundle: Path, model: onnx.ModelProto) -> None:
    tensor = _tensor(chance, model)
    match chance.randrange(4):
        case 0:
            tensor.dims[0] = chance.choice((0, 1, 7, 16, 2**40))
        case 1:
            tensor.data_type = chance.choice((0, 6, 7, 10, 16, 99))
        case 2:
            tensor.data_location = onnx.TensorProto.DEFAULT
        case 3:
            tensor.external_data.add(key=chance.choice(("location", "checksum")), value=STRAY)


def _rename_tensor(chance: random.Random, bundle: Path, model: onnx.ModelProto) -> None:
    _tensor(chance, model).name = chance.choice(("", "x", *(tensor.name for tensor in model.graph.initializer)))


def _rewire(chance: random.Random, bundle: Path, model: onnx.ModelProto) -> None:
    node = chance.choice(model.graph.node)
    names = sorted({name for other in model.graph.node for name in (*other.input, *other.output)})
    match chance.randrange(3):
        case 0:
            node.op_type = chance.choice(("Identity", "Relu", "Tanh", "EPContext", "x"))
        case 1:
            node.input[chance.randrange(len(node.input))] = chance.choice(names)
        case 2:
            model.graph.node.remove(node)


def _graph_bytes(chance: random.Random, bundle: Path) -> None:
    path = part_of(bundle, chance.choice(tuple(TASKS)))["model"]["path"]
    content = _bytes_changed(chance, (bundle / path).read_bytes())
    replace_content(bundle, path, content)


def _bytes_changed(chance: random.Random, content: bytes, end: int | None = None) -> bytes:
    """One place of the first ``end`` bytes changed, removed, repeated or filled with others."""
    place, size = chance.randrange(len(content) if end is None else end), chance.randrange(1, 5)
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :],
        lambda: content[:place] + content[place + size :],
        lambda: content[:place] + content[place : place + size] * 2 + content[place + size :],
        lambda: content[:place] + chance.randbytes(size) + content[place:],
        lambda: content[:place],
    )
    return chance.choice(changes)()


def _weights(chance: random.Random, bundle: Path) -> None:
    """Mostly the header, whose length is made right again."""
    paths = [part_of(bundle, task)["weights"]["path"] for task in TASKS]
    path = chance.choice([*paths, manifest_of(bundle)["base"]["weights"][0]["path"]])
    content = (bundle / path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    if chance.random() < 0.2:
        changed = _bytes_changed(chance, content)
    else:
        header = _bytes_changed(chance, content[8 : 8 + size])
        changed = len(header).to_bytes(8, "little") + header + content[8 + size :]
    replace_content(bundle, path, changed)


def _adapter(chance: random.Random, bundle: Path) -> None:
    path = chance.choice(manifest_of(bundle)["tasks"][chance.choice(tuple(TASKS))]["adapter"])["path"]
    replace_content(bundle, path, _bytes_changed(chance, (bundle / path).read_bytes()))
