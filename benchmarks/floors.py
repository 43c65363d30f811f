"""What an argmin cannot cost less than: its K evaluations of f and ∇f, cut out of its own graph.

loop_floor  y <- clip(∇f(x, y), 0, 1), K times: the nodes of argmin.onnx that f and ∇f need, in a Loop, and one node
            that leads from one evaluation to the next; the x path before the loop, as there
unsolved    argmin.onnx whole, cuts and certificate included, with BundleEntropySolve replaced by nodes that cost
            next to nothing: how much of the distance from the floor is not the solver's
"""

from collections.abc import Iterable
from typing import Final

import onnx
from onnx import helper

from benchmarks.graphs import TYPES
from icnnrt_exporters.operators.bodies import OP_DOMAIN

SOLVE: Final = "BundleEntropySolve"


class _Loop:
    """Where things are in an argmin.onnx."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.node = next(node for node in model.graph.node if node.op_type == "Loop")
        self.body = next(a.g for a in self.node.attribute if a.name == "body")
        self.solve = next(node for node in self.body.node if node.op_type == SOLVE and node.domain == OP_DOMAIN)
        made_by = {name: node for node in self.body.node for name in node.output}
        # slopes = Concat(slopes, Unsqueeze(∇f)), offsets = Concat(offsets, Unsqueeze(Add(f, ...)))
        slopes, offsets = (made_by[name] for name in self.solve.input[:2])
        self.gradient: str = made_by[slopes.input[1]].input[0]
        self.f: str = made_by[made_by[offsets.input[1]].input[0]].input[0]
        self.counter, self.going, self.y = (self.body.input[i].name for i in range(3))
        element = next(i for i in model.graph.input if i.name == "y_init").type.tensor_type.elem_type
        self.dtype = next(name for name, code in TYPES.items() if code == element)


def loop_floor(argmin: bytes) -> bytes:
    """(x, y_init) -> y after K steps and f at the K-th point."""
    model = onnx.load_from_string(argmin)
    graph, loop = model.graph, _Loop(model)
    T = TYPES[loop.dtype]
    y_shape = [
        d.dim_param or d.dim_value
        for d in next(i for i in graph.input if i.name == "y_init").type.tensor_type.shape.dim
    ]
    body_nodes = _needed(loop.body.node, [loop.f, loop.gradient])
    body_nodes += [
        helper.make_node("Clip", [loop.gradient, "floor/0", "floor/1"], ["floor/y_next"]),
        helper.make_node("Identity", [loop.going], ["floor/going"]),
        helper.make_node("Identity", [loop.f], ["floor/f_scan"]),
    ]
    body = helper.make_graph(
        body_nodes,
        "evaluate",
        list(loop.body.input[:3]),
        [
            helper.make_tensor_value_info("floor/going", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("floor/y_next", T, y_shape),
            helper.make_tensor_value_info("floor/f_scan", T, y_shape[:1]),
        ],
    )
    K, going, y_init = loop.node.input[:3]
    node = helper.make_node("Loop", [K, going, y_init], ["floor/y", "floor/f"], body=body)
    outside = {name for n in body_nodes for name in n.input} | {K, going, y_init}
    before = _needed(graph.node, outside)
    constants = [helper.make_tensor(name, T, [], [value]) for name, value in (("floor/0", 0.0), ("floor/1", 1.0))]
    outputs = [
        helper.make_tensor_value_info("floor/y", T, y_shape),
        helper.make_tensor_value_info("floor/f", T, ["K", *y_shape[:1]]),
    ]
    used = {name for n in before for name in n.input} | outside
    floor = helper.make_graph(
        [*before, node],
        "floor",
        [i for i in graph.input if i.name in ("x", "y_init") or i.name in used],
        outputs,
        [*(i for i in graph.initializer if i.name in used), *constants],
    )
    return _like(model, floor)


def unsolved(argmin: bytes) -> bytes:
    """argmin.onnx with answers of the right shapes in place of the solver's: y = clip(∇f, 0, 1), λ = offsets."""
    model = onnx.load_from_string(argmin)
    graph, loop = model.graph, _Loop(model)
    T, double = TYPES[loop.dtype], onnx.TensorProto.DOUBLE
    y, lam, lower_bound, residual = loop.solve.output
    stand_in = [
        helper.make_node("Clip", [loop.gradient, "floor/0", "floor/1"], [y]),
        helper.make_node("Identity", [loop.solve.input[1]], [lam]),
        helper.make_node("Cast", [loop.f], [lower_bound], to=double),
        helper.make_node("Unsqueeze", [lower_bound, "floor/axis"], ["floor/column"]),
        helper.make_node("Concat", ["floor/column"] * 3, [residual], axis=1),
    ]
    body_nodes = [m for n in loop.body.node for m in (stand_in if n is loop.solve else [n])]
    body_nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in body_nodes]
    del loop.body.node[:]
    loop.body.node.extend(body_nodes)
    graph.initializer.extend(
        [
            helper.make_tensor("floor/0", T, [], [0.0]),
            helper.make_tensor("floor/1", T, [], [1.0]),
            helper.make_tensor("floor/axis", onnx.TensorProto.INT64, [1], [1]),
        ]
    )
    return _like(model, graph)


def _needed(nodes: Iterable[onnx.NodeProto], wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that the wanted values depend on, in order."""
    wanted, kept = set(wanted), []
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]


def _like(model: onnx.ModelProto, graph: onnx.GraphProto) -> bytes:
    """A model of this graph with the opsets of the other, and without its functions: nothing here calls them."""
    floor = onnx.ModelProto(ir_version=model.ir_version)
    floor.opset_import.extend(o for o in model.opset_import if o.domain == "")
    floor.graph.CopyFrom(graph)
    return bytes(floor.SerializeToString())
