"""The C ABI, called as another language would: one JSON request a line in, one answer a line out. Run in a process of its own."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3, "int64": 4, "int32": 5}


class Options(ctypes.Structure):
    _fields_ = [("mode", ctypes.c_int), ("threads", ctypes.c_int), ("memory", ctypes.c_uint64), ("onnxruntime", ctypes.c_char_p)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    ]


def main(library: str, bundle: str, mode: int, memory: int) -> None:
    api = ctypes.CDLL(library)
    api.lorafuse_error.restype = ctypes.c_char_p
    api.lorafuse_output.restype = Tensor
    api.lorafuse_count.restype = ctypes.c_size_t
    for name in ("lorafuse_count", "lorafuse_free", "lorafuse_close"):
        getattr(api, name).argtypes = [ctypes.c_void_p]
    api.lorafuse_output.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    runtime = ctypes.c_void_p()
    options = Options(mode, 1, memory, None)
    if api.lorafuse_open(bundle.encode(), ctypes.byref(options), ctypes.byref(runtime)):
        print(json.dumps({"error": api.lorafuse_error().decode()}))
        return
    before = anonymous()
    for line in sys.stdin:
        print(json.dumps(answer(api, runtime, json.loads(line), before)), flush=True)
    api.lorafuse_close(runtime)


def answer(api: ctypes.CDLL, runtime: ctypes.c_void_p, request: dict, before: int) -> dict:
    inputs = (Tensor * len(request["inputs"]))()
    kept = []
    for place, given in enumerate(request["inputs"]):
        data, shape = bytes.fromhex(given["data"]), (ctypes.c_int64 * len(given["shape"]))(*given["shape"])
        buffer = ctypes.create_string_buffer(data, max(1, len(data)))
        kept += [shape, buffer]
        name = None if given["name"] is None else given["name"].encode()
        inputs[place] = Tensor(name, DTYPES.get(given["dtype"], 99), shape, len(shape), ctypes.cast(buffer, ctypes.c_void_p), len(data))
    outputs = ctypes.c_void_p()
    task = None if request["task"] is None else request["task"].encode()
    if api.lorafuse_run(runtime, task, int(request["adapted"]), inputs, len(inputs), ctypes.byref(outputs)):
        return {"error": api.lorafuse_error().decode()}
    found = {}
    for index in range(api.lorafuse_count(outputs)):
        tensor = api.lorafuse_output(outputs, index)
        found[tensor.name.decode()] = {"shape": tensor.shape[: tensor.rank], "data": ctypes.string_at(tensor.data, tensor.bytes).hex()}
    api.lorafuse_free(outputs)
    return {"outputs": found, "anonymous": anonymous() - before}


def anonymous() -> int:
    """This process's memory that no file backs, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
