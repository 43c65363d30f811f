"""A model in standard ONNX operators alone: every call of a model-local function replaced by the function's body."""

from collections.abc import Iterator

import onnx
import onnx.inliner

from icnnrt.errors import ExportError


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without functions and without any domain but ONNX's own.

    Functions that call functions and calls within Loop and If are covered, attributes that bodies refer to take the
    value of the call, and inner names are made unique. Raises `ExportError` for an operator of another domain that has
    no body.
    """
    result = onnx.inliner.inline_local_functions(model)
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in every_node(result.graph) if node.domain})
    if foreign:
        raise ExportError(
            f"portable: {', '.join(foreign)} has no body of standard operators in this graph; pack it without portable"
        )
    standard = [entry for entry in result.opset_import if not entry.domain]
    del result.opset_import[:]
    result.opset_import.extend(standard)
    return result


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from every_node(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a Loop, the branches of an If."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
