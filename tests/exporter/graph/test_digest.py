"""The digest of a graph: what it must not see, and what it must."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporter.graph.digest import graph_digest

UNARY, BINARY = ("Relu", "Tanh", "Softmax"), ("Add", "Sub", "MatMul")
SOURCES = ("x", "w", "c")


def model_of(nodes: list[NodeProto], location: str = "weights.bin", offset: int = 0) -> ModelProto:
    """``nodes`` over an input x, an external weight w and an inline constant c; y is the output."""
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])] for name in ("x", "y")]
    weight = TensorProto(name="w", dims=[4, 4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": 64}.items():
        weight.external_data.add(key=key, value=str(value))
    constant = numpy_helper.from_array(np.arange(4, dtype=np.float32), "c")
    return helper.make_model(
        helper.make_graph(nodes, "g", *ports, [weight, constant]), opset_imports=[helper.make_opsetid("", 20)]
    )


@st.composite
def node_lists(draw: st.DrawFn) -> list[NodeProto]:
    """A chain or tree of one to eight operators, each reading anything made before it."""
    values, nodes = list(SOURCES), []
    count = draw(st.integers(1, 8))
    for index in range(count):
        operator = draw(st.sampled_from(UNARY + BINARY))
        operands = [draw(st.sampled_from(values)) for _ in range(1 if operator in UNARY else 2)]
        output = "y" if index == count - 1 else f"v{index}"
        attributes = {"axis": draw(st.sampled_from([-1, 0]))} if operator == "Softmax" else {}
        nodes.append(helper.make_node(operator, operands, [output], **attributes))
        values.append(output)
    return nodes


def renamed(nodes: list[NodeProto], names: dict[str, str]) -> list[NodeProto]:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for node in copies:
        node.name = names.get(node.output[0], "n") + "-node"
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
    return copies


@given(node_lists(), st.permutations(range(8)))
def test_digest_ignores_the_names_of_intermediate_values_and_nodes(nodes: list[NodeProto], numbers: list[int]):
    names = {f"v{index}": f"v{number}" for index, number in enumerate(numbers)}
    assert graph_digest(model_of(renamed(nodes, names))) == graph_digest(model_of(nodes))


@given(node_lists(), st.text("abc", min_size=1), st.integers(0, 1 << 40))
def test_digest_ignores_where_a_weights_values_lie_and_so_what_they_are(
    nodes: list[NodeProto], location: str, offset: int
):
    assert graph_digest(model_of(nodes, location, offset)) == graph_digest(model_of(nodes))


@given(node_lists(), st.data())
def test_digest_sees_every_edge(nodes: list[NodeProto], data: st.DataObject):
    before = graph_digest(model_of(nodes))
    index = data.draw(st.integers(0, len(nodes) - 1))
    position = data.draw(st.integers(0, len(nodes[index].input) - 1))
    others = {*SOURCES, *(node.output[0] for node in nodes[:index])} - {nodes[index].input[position]}
    nodes[index].input[position] = data.draw(st.sampled_from(sorted(others)))
    assert graph_digest(model_of(nodes)) != before


@given(node_lists(), st.data())
def test_digest_sees_every_operator_and_attribute(nodes: list[NodeProto], data: st.DataObject):
    before = graph_digest(model_of(nodes))
    node = nodes[data.draw(st.integers(0, len(nodes) - 1))]
    if data.draw(st.booleans()):
        node.op_type += "V2"
    else:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("axis", 7))
    assert graph_digest(model_of(nodes)) != before


def a_model() -> ModelProto:
    """MatMul, a Sub whose operands can be swapped, and an If with a subgraph that reads from outside."""
    branches = [
        helper.make_graph([helper.make_node("Neg", ["difference"], [f"{name}_out"])], name, [], [port(f"{name}_out")])
        for name in ("then", "else")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Sub", ["product", "c"], ["difference"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    model = model_of(nodes)
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    return model


def port(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])


def swap_operands(model: ModelProto) -> None:
    model.graph.node[1].input[:] = ["c", "product"]


def swap_nodes(model: ModelProto) -> None:
    first, second = (NodeProto.FromString(node.SerializeToString()) for node in model.graph.node[:2])
    model.graph.node[0].CopyFrom(second)
    model.graph.node[1].CopyFrom(first)
    model.graph.node[0].input[0], model.graph.node[1].input[0] = "x", "difference"


def change_constant(model: ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.arange(1, 5, dtype=np.float32), "c"))


def rename_weight(model: ModelProto) -> None:
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "w2"


def rename_input(model: ModelProto) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "x2"


def add_function(model: ModelProto) -> None:
    model.functions.append(
        helper.make_function("local", "f", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], model.opset_import)
    )


CHANGES: dict[str, Callable[[ModelProto], object]] = {
    "opset": lambda model: setattr(model.opset_import[0], "version", 21),
    "opset of another domain": lambda model: model.opset_import.add(domain="com.microsoft", version=1),
    "function": add_function,
    "input name": rename_input,
    "input dtype": lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
    "input shape": lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 5),
    "name of a dynamic axis": lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "m"
    ),
    "output dtype": lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
    "weight name": rename_weight,
    "weight dtype": lambda model: setattr(model.graph.initializer[0], "data_type", TensorProto.FLOAT16),
    "weight shape": lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), [2, 8]),
    "additional weight": lambda model: model.graph.initializer.append(
        TensorProto(name="v", dims=[1], data_location=TensorProto.EXTERNAL)
    ),
    "inline constant": change_constant,
    "operator": lambda model: setattr(model.graph.node[0], "op_type", "Gemm"),
    "domain": lambda model: setattr(model.graph.node[0], "domain", "com.microsoft"),
    "order of operands": swap_operands,
    "order of nodes": swap_nodes,
    "attribute": lambda model: model.graph.node[0].attribute.append(helper.make_attribute("transB", 1)),
    "additional output": lambda model: model.graph.node[0].output.append("unused"),
    "operator in a subgraph": lambda model: setattr(model.graph.node[2].attribute[0].g.node[0], "op_type", "Abs"),
    "edge into a subgraph": lambda model: model.graph.node[2].attribute[0].g.node[0].input.__setitem__(0, "product"),
    "swapped subgraphs": lambda model: [
        setattr(attribute, "name", "x" + attribute.name[::-1]) for attribute in model.graph.node[2].attribute
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_digest_sees(change: Callable[[ModelProto], object]):
    model = a_model()
    change(model)
    assert graph_digest(model) != graph_digest(a_model())


def test_digest_ignores_documentation_and_producer():
    model = a_model()
    model.producer_name, model.doc_string, model.graph.doc_string, model.graph.node[0].doc_string = "p", "d", "d", "d"
    model.metadata_props.add(key="k", value="v")
    assert graph_digest(model) == graph_digest(a_model())


def test_digest_sees_an_optional_input_that_is_left_out():
    given_, left_out = (model_of([helper.make_node("Clip", ["x", minimum, "c"], ["y"])]) for minimum in ("c", ""))
    assert graph_digest(given_) != graph_digest(left_out)
