"""The graphs of the paper's other adapters: bottlenecks in the unadapted model, which no merge takes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from exporter.base_graph import weight_map
from exporter.bundle.layout import to_graph
from exporter.bundle.task_part import TaskPart
from exporter.graph.external_data import pointed
from exporter.graph.precision import stored_as
from exporter.graph.signature import signature
from exporter.graph.trace import trace
from exporter.transformers_base import skeleton
from lora.errors import ExportError
from lora.files.tensorfile import Array, numpy_dtype
from lora.modules.bottlenecks import Kind, insert, width_for

SHARE = 11.0 / 354.8  # the paper's Table 1: 11 M parameters beside GPT-2 medium's


def bottleneck_graph(part: TaskPart, kind: Kind) -> onnx.ModelProto:
    """The task's unadapted graph with bottlenecks of ``kind`` and random values.

    They have the paper's share of the model's parameters.

    Raises ExportError where the base was not made by transformers, LorafuseError where ``kind`` has no place in it.
    """
    bundle, head, base = part.bundle, part.graph.head, part.bundle.manifest.base
    if not any(file.path == "base/config.json" for file in base.files):
        raise ExportError(
            f"{bundle.path}: the base was not made by transformers, so there is no model to put {kind} into; leave"
            f" {kind} out"
        )
    model = skeleton(bundle.path / "base", head, base.precision, part.role)
    values = with_bottlenecks(model, kind)
    traced = trace(signature(model, head, part.role))
    files = [bundle.tensors(file) for file in (*part.part.own_weights, *base.weights)]
    orders = {name: order for name, order in traced.weights.items() if name not in values}
    graph = pointed(traced.graph, weight_map(traced.graph, orders), files)
    for tensor in [tensor for tensor in graph.graph.initializer if tensor.name in values]:
        dtype = numpy_dtype(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).name)
        stored = stored_as(tensor.name, values[tensor.name], dtype, kind)
        tensor.CopyFrom(numpy_helper.from_array(to_graph(stored, traced.weights[tensor.name]), tensor.name))
    return graph


def with_bottlenecks(model: Any, kind: Kind, seed: int = 0) -> dict[str, Array]:
    """Insert bottlenecks of ``kind`` into ``model`` and give them small random values; all of their values, float32."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = insert(model, kind, width_for(model, kind, round(SHARE * parameters)))
    generator = torch.Generator().manual_seed(seed)
    values = {}
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            if ".norm." not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            values[name] = parameter.float().numpy().copy()
    return values
