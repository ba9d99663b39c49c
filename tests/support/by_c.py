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


class Port(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("axes", ctypes.POINTER(ctypes.c_char_p)),
        ("rank", ctypes.c_size_t),
    ]


def main(library: str, bundle: str, mode: int, memory: int, backend: int = 0, threads: int = 1) -> None:
    api = ctypes.CDLL(library)
    api.lorafuse_error.restype = ctypes.c_char_p
    api.lorafuse_output.restype = Tensor
    api.lorafuse_count.restype = ctypes.c_size_t
    api.lorafuse_input.restype = Port
    api.lorafuse_input.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    for name in ("lorafuse_task", "lorafuse_label", "lorafuse_part", "lorafuse_digest"):
        getattr(api, name).restype = ctypes.c_char_p
    api.lorafuse_task.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for name in ("lorafuse_label", "lorafuse_part"):
        getattr(api, name).argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    for name in ("lorafuse_count", "lorafuse_free", "lorafuse_close", "lorafuse_digest", "lorafuse_end"):
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
    if request.get("ports"):
        return ports(api, runtime, request["task"].encode())
    if request.get("change"):
        return changed(api, runtime, request)
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
    outputs.value = 1  # what is there before a call says nothing afterwards
    if request.get("use"):
        refused = in_use(api, runtime, task, given)
    elif part is None:
        refused = api.lorafuse_run(runtime, task, *given)
    else:
        refused = api.lorafuse_run_part(runtime, task, part.encode(), *given)
    if refused:
        assert outputs.value is None
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


def in_use(api: ctypes.CDLL, runtime: ctypes.c_void_p, task: bytes | None, given: tuple) -> int:
    """A run of a task that was given up by the runtime while it was in use."""
    use = ctypes.c_void_p(1)
    adapted, *inputs = given
    if refused := api.lorafuse_begin(runtime, task, adapted, ctypes.byref(use)):
        assert use.value is None
        given[-1]._obj.value = None
        return refused
    api.lorafuse_evict(runtime, task)
    refused = api.lorafuse_run_use(use, None, *inputs)
    api.lorafuse_end(use)
    return refused


def ports(api: ctypes.CDLL, runtime: ctypes.c_void_p, task: bytes) -> list:
    """Name, dtype, and of each dimension its size or the name of its axis."""
    found = []
    for index in itertools.count():
        port = api.lorafuse_input(runtime, task, None, index)
        if port.name is None:
            break
        shape = [port.axes[i].decode() if port.sizes[i] == -1 else port.sizes[i] for i in range(port.rank)]
        found.append([port.name.decode(), port.dtype, shape])
    return found


def changed(api: ctypes.CDLL, runtime: ctypes.c_void_p, request: dict) -> dict:
    """What lorafuse_reload, lorafuse_preload or lorafuse_evict says, and the digest afterwards."""
    given = None if request["task"] is None else request["task"].encode()
    refused = getattr(api, f"lorafuse_{request['change']}")(runtime, given)
    error = api.lorafuse_error().decode() if refused else None
    return {"error": error, "digest": api.lorafuse_digest(runtime).decode()}


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
