"""The C ABI, called as another language would: one JSON request a line in, one answer a line out.

Run in a process of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3, "int64": 4, "int32": 5}


class Options(ctypes.Structure):
    _fields_ = [
        ("mode", ctypes.c_int),
        ("backend", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("memory", ctypes.c_uint64),
        ("onnxruntime", ctypes.c_char_p),
        ("digest", ctypes.c_char_p),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    ]


def main(library: str, bundle: str, mode: int, memory: int, backend: int = 0, threads: int = 1) -> None:
    api = ctypes.CDLL(library)
    api.lorafuse_error.restype = ctypes.c_char_p
    api.lorafuse_output.restype = Tensor
    api.lorafuse_count.restype = ctypes.c_size_t
    for name in ("lorafuse_task", "lorafuse_label", "lorafuse_part"):
        getattr(api, name).restype = ctypes.c_char_p
    api.lorafuse_task.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for name in ("lorafuse_label", "lorafuse_part"):
        getattr(api, name).argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    for name in ("lorafuse_count", "lorafuse_free", "lorafuse_close"):
        getattr(api, name).argtypes = [ctypes.c_void_p]
    api.lorafuse_output.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    runtime = ctypes.c_void_p()
    options = Options(mode, backend, threads, memory, None, None)
    if api.lorafuse_open(bundle.encode(), ctypes.byref(options), ctypes.byref(runtime)):
        print(json.dumps({"error": api.lorafuse_error().decode()}))
        return
    before = anonymous()
    for line in sys.stdin:
        print(json.dumps(answer(api, runtime, json.loads(line), before)), flush=True)
    api.lorafuse_close(runtime)


def texts(get: Callable[[int], bytes | None]) -> list[str]:
    """All up to the NULL behind the last one."""
    return [text.decode() for text in iter(map(get, itertools.count()).__next__, None)]


def answer(api: ctypes.CDLL, runtime: ctypes.c_void_p, request: dict, before: int) -> dict | list:
    if request.get("list"):
        tasks = texts(lambda index: api.lorafuse_task(runtime, index))
        return {
            task: texts(lambda index, task=task: api.lorafuse_label(runtime, task.encode(), index)) for task in tasks
        }
    if request.get("parts"):
        return texts(lambda index: api.lorafuse_part(runtime, request["task"].encode(), index))
    if request.get("null"):
        return nulls(api, runtime)
    inputs = (Tensor * len(request["inputs"]))()
    kept = []
    for place, given in enumerate(request["inputs"]):
        data, shape = bytes.fromhex(given["data"]), (ctypes.c_int64 * len(given["shape"]))(*given["shape"])
        buffer = ctypes.create_string_buffer(data, max(1, len(data)))
        kept += [shape, buffer]
        name = None if given["name"] is None else given["name"].encode()
        inputs[place] = Tensor(
            name, DTYPES.get(given["dtype"], 99), shape, len(shape), ctypes.cast(buffer, ctypes.c_void_p), len(data)
        )
    outputs = ctypes.c_void_p()
    task = None if request["task"] is None else request["task"].encode()
    given = (int(request["adapted"]), inputs, len(inputs), ctypes.byref(outputs))
    part = request.get("part")
    refused = (
        api.lorafuse_run(runtime, task, *given)
        if part is None
        else api.lorafuse_run_part(runtime, task, part.encode(), *given)
    )
    if refused:
        return {"error": api.lorafuse_error().decode()}
    found = {}
    for index in range(api.lorafuse_count(outputs)):
        tensor = api.lorafuse_output(outputs, index)
        found[tensor.name.decode()] = {
            "shape": tensor.shape[: tensor.rank],
            "data": ctypes.string_at(tensor.data, tensor.bytes).hex(),
        }
    api.lorafuse_free(outputs)
    return {"outputs": found, "anonymous": anonymous() - before}


def nulls(api: ctypes.CDLL, runtime: ctypes.c_void_p) -> list:
    """What each NULL that is not allowed is answered with."""
    outputs, none = ctypes.byref(ctypes.c_void_p()), ctypes.c_void_p()
    calls = [
        lambda: api.lorafuse_open(b"bundle", None, None),
        lambda: api.lorafuse_open(None, None, outputs),
        lambda: api.lorafuse_run(None, b"first", 1, None, 0, outputs),
        lambda: api.lorafuse_run(runtime, b"first", 1, None, 1, outputs),
        lambda: api.lorafuse_run(runtime, b"first", 1, None, 0, None),
        lambda: api.lorafuse_run(runtime, b"first", 1, ctypes.byref(Tensor(b"a", 0, None, 1, None, 0)), 1, outputs),
    ]
    refused = [api.lorafuse_error().decode() if call() else None for call in calls]
    api.lorafuse_free(none)
    api.lorafuse_close(none)
    return [
        *refused,
        api.lorafuse_count(none),
        api.lorafuse_output(none, 0).name,
        api.lorafuse_task(none, 0),
        api.lorafuse_label(runtime, b"nope", 0),
        api.lorafuse_part(runtime, b"nope", 0),
        api.lorafuse_part(runtime, None, 0),
        api.lorafuse_part(none, b"first", 0),
    ]


def anonymous() -> int:
    """This process's memory that no file backs, in bytes."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
