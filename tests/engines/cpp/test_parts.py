"""The parts that the C++ runtime has of its own, against the libraries that Python has for them; and what a user does
with the library.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from compiled import HERE, ROOT, Built, run
from safetensors.numpy import save

from exporter.bundle.manifest import Bundle
from lora.errors import CheckpointError
from lora.files.mapped import mapped, opened
from lora.files.tensorfile import TensorFile


def test_sha256_is_hashlibs(built: Built, tmp_path: Path):
    """With the processor's instructions and without: every length up to three blocks, where the padding takes every
    form, and one of many.
    """
    chance = random.Random(0)
    contents = [chance.randbytes(size) for size in (*range(193), 100_003)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    said = built.probe("sha256", *(tmp_path / str(number) for number in range(len(contents))))
    assert said.splitlines() == [" ".join([hashlib.sha256(content).hexdigest()] * 2) for content in contents]


WHOLE = {
    "scalar": np.array(1.5, np.float32),
    "matrix@1,0": np.arange(6, dtype=np.float16).reshape(2, 3),
    "ids": np.arange(4, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
    "codes": np.arange(3, dtype=np.uint32),
}


def test_a_safetensors_file_is_read_as_the_library_reads_it(built: Built, tmp_path: Path):
    (tmp_path / "file").write_bytes(save(WHOLE, {"format": "pt"}))
    wanted = ["whole"]
    for name, values in sorted(WHOLE.items()):
        wanted += [name, str(values.dtype), hashlib.sha256(values.tobytes()).hexdigest()[:16], *map(str, values.shape)]
    assert built.probe("tensors", tmp_path / "file").split() == wanted


def mutated(chance: random.Random, content: bytes) -> bytes:
    """A file with its header's length, some bytes of its header, or its end changed."""
    size = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + size]), content[8 + size :]
    match chance.randrange(5):
        case 0:
            return (
                chance.choice([0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
                + content[8:]
            )
        case 1:
            return content[: chance.randrange(len(content))]
        case 2:
            return content + chance.randbytes(chance.randrange(1, 9))
        case 3:
            digits = [place for place, byte in enumerate(header) if chr(byte).isdigit()]
            for place in chance.sample(digits, chance.randrange(1, 4)):
                header[place] = ord(chance.choice("0123456789"))
        case 4:
            place = chance.randrange(len(header))
            header[place : place + chance.randrange(3)] = chance.choice(
                [b"", b"-", b"9" * 20, b'"', b"[", b"}", b"\x00", b"\xff", b"1.5", b"null"]
            )
    return len(header).to_bytes(8, "little") + bytes(header) + data


def in_python(path: Path) -> str:
    with opened(path.parent, path.name) as (descriptor, state):
        file = mapped(path, descriptor, state)
    try:
        TensorFile(file)
    except CheckpointError as error:
        return f"refused {error}"
    return "whole"


def decision(said: str) -> str:
    """Whether it is refused: the reasons are the safetensors library's words, and ours."""
    return said.partition(" ")[0]


def test_hostile_safetensors_files_are_refused_by_both(built: Built, tmp_path: Path):
    """And none crashes it: the probe runs under AddressSanitizer."""
    chance, content = random.Random(1), save(WHOLE, {"format": "pt"})
    paths = [tmp_path / f"{number:03}" for number in range(400)]
    for path in paths:
        path.write_bytes(mutated(chance, content))
    found, wanted = built.probe("tensors", *paths).splitlines(), [in_python(path) for path in paths]
    assert 0 < wanted.count("whole") < len(set(wanted)) < len(wanted)
    pairs = list(zip(paths, found, wanted, strict=True))
    assert [pair for pair in pairs if decision(pair[1]) != decision(pair[2])] == []
    assert [path for path, said, _ in pairs if said.startswith("refused ") and f" {path}: " not in said] == []


F32: dict[str, object] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS: dict[str, dict[str, object]] = {
    "an unknown field": {"a": F32 | {"more": 1}},
    "metadata that is no text": {"__metadata__": {"a": 1}, "a": F32},
    "metadata that is no object": {"__metadata__": 1, "a": F32},
    "a size that can't be counted": {"a": F32 | {"shape": [2**62, 8]}},
    "a negative size": {"a": F32 | {"shape": [-1]}},
    "another size": {"a": F32 | {"shape": [2]}},
    "an end before the start": {"a": F32 | {"data_offsets": [4, 0]}},
    "three offsets": {"a": F32 | {"data_offsets": [0, 4, 4]}},
    "a gap": {"a": F32 | {"data_offsets": [4, 8]}},
    "a dtype that numpy lacks": {"a": F32 | {"dtype": "F8_E4M3", "shape": [4]}},
    "no tensors": {},
}


def headed(path: Path, header: bytes) -> Path:
    """A file of that header and four bytes of data."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    return path


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_is_refused_by_both(built: Built, tmp_path: Path, header: dict[str, object]):
    path = headed(tmp_path / "file", json.dumps(header).encode())
    found = built.probe("tensors", path)
    assert found.count("\n") == 1
    assert decision(found.rstrip("\n")) == decision(in_python(path))


def test_a_dtype_that_engines_lack_is_refused_in_the_same_words(built: Built, tmp_path: Path):
    path = headed(tmp_path / "file", json.dumps({"a": F32 | {"dtype": "F8_E4M3", "shape": [4]}}).encode())
    assert built.probe("tensors", path) == in_python(path) + "\n"


def test_a_safetensors_header_that_names_a_tensor_twice_is_refused(built: Built, tmp_path: Path):
    """The library takes the last of them."""
    path = headed(tmp_path / "file", b'{"a":1,"a":' + json.dumps(F32).encode() + b"}")
    said = f"refused {path}: not a whole safetensors file (in its header: the field 'a' stands twice); fetch or save it"
    assert built.probe("tensors", path).startswith(said)


def test_the_pool_holds_under_threads(tmp_path: Path, built: Built):
    """Under ThreadSanitizer, which sees a race even where it does no harm."""
    program, source = tmp_path / "pool", ROOT / "engines" / "cpp"
    flags = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread", "-pthread")
    run(
        "g++",
        *flags,
        f"-I{source}/include",
        f"-I{source}/src",
        HERE / "pool_stress.cpp",
        *(source / "src" / name for name in ("dtype.cpp", "error.cpp", "printable.cpp")),
        "-o",
        program,
    )
    assert run(program) == "0 broken, loaded again: yes, refused: yes\n"


def test_an_installed_library_is_found_by_cmake_and_needs_no_json_header(
    built: Built, tmp_path: Path, tiny_bundle: Bundle
):
    prefix = tmp_path / "installed"
    run("cmake", "--install", built.shared, "--prefix", prefix)
    run("cmake", "-S", HERE / "consumer", "-B", tmp_path / "consumer", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("ninja", "-C", tmp_path / "consumer")
    assert run(tmp_path / "consumer" / "consumer", tiny_bundle.path) == "first\n"
    run(
        "gcc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-fsyntax-only",
        f"-I{prefix}/include",
        prefix / "include" / "lorafuse.h",
    )
    assert (
        json.dumps(sorted(path.name for path in (prefix / "include").rglob("*.h*")))
        == '["export.h", "lorafuse.h", "runtime.hpp"]'
    )


def test_the_shared_library_shows_what_its_headers_declare_and_nothing_else(built: Built):
    shown = run("nm", "--dynamic", "--defined-only", "--demangle", built.shared / "liblorafuse.so")
    functions = [line.split(" ", 2)[2] for line in shown.splitlines() if " T " in line]
    assert functions
    assert [name for name in functions if not name.startswith("lorafuse")] == []
    assert "nlohmann" not in shown
