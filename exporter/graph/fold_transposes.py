"""A graph pass: store weights in the layout that the graph reads them in.

A linear layer is exported as ``Transpose(weight)`` and a MatMul. Folding the transpose into the stored weight costs no
node and no name: the initializer keeps the parameter's name, and the permutation is recorded.
"""

from __future__ import annotations

import onnx_ir as ir

Permutation = tuple[int, ...]


def is_weight_transpose(node: ir.Node) -> bool:
    """Whether ``node`` transposes an initializer."""
    source = node.inputs[0] if node.op_type == "Transpose" and node.inputs else None
    return source is not None and source.is_initializer()


def fold_weight_transposes(model: ir.Model) -> dict[str, Permutation]:
    """Replace each ``Transpose(weight)`` by the weight itself, now declared in the transposed shape.

    Changes shapes only, no values: what is stored under the name must be the parameter permuted as the result says,
    ``{initializer: permutation}``. A weight that is also read untransposed (a tied embedding) keeps its Transpose node,
    because folding would store it twice.
    """
    permutations: dict[str, Permutation] = {}
    for weight in list(model.graph.initializers.values()):
        readers = [usage.node for usage in weight.uses()]
        orders = {tuple(node.attributes["perm"].as_ints()) for node in readers if is_weight_transpose(node)}
        if len(orders) != 1 or not all(map(is_weight_transpose, readers)):
            continue
        order = orders.pop()
        assert weight.shape is not None
        assert weight.name is not None
        weight.shape = ir.Shape([weight.shape[axis] for axis in order])
        weight.const_value = None
        permutations[weight.name] = order
        for node in readers:
            node.outputs[0].replace_all_uses_with(weight)
            model.graph.remove(node, safe=True)
    return permutations
