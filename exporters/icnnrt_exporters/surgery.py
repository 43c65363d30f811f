"""Moves on ONNX graphs that the assembly of the solver graphs needs: split by dependence, splice, copy."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir


class Ops:
    """Appends nodes to a list; `op("Add", a, b)` returns the new value, `op.many` several.

    Values are named prefix/..., as no weight is: ONNX forbids a name inside a loop that stands outside it too.
    """

    def __init__(self, prefix: str, constants: list[ir.Value] | None = None) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = [] if constants is None else constants

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: object
    ) -> ir.Value:
        return self.many(op_type, *inputs, outputs=outputs, domain=domain, **attributes)[0]

    def many(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: object
    ) -> Sequence[ir.Value]:
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs)  # type: ignore[arg-type]
        for i, output in enumerate(node.outputs):
            output.name = f"{self.prefix}/{len(self.nodes)}/{i}"
        self.nodes.append(node)
        return node.outputs

    def constant(self, value: object, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A constant, collected in `constants` for the main graph's initialisers."""
        tensor = ir.Tensor(np.asarray(value, dtype=dtype.numpy()))
        constant = ir.Value(type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        self.constants.append(constant)
        return constant

    def extend(self, nodes: Iterable[ir.Node]) -> None:
        self.nodes.extend(nodes)


def value(name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
    """A named, typed value without a producer: a graph input."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def static(v: ir.Value, dim: int) -> int:
    """The size of a dimension that does not depend on the batch."""
    assert v.shape is not None
    size = v.shape[dim]
    assert isinstance(size, int), f"dimension {dim} of {v.name} is not fixed"
    return size


def dtype_of(v: ir.Value) -> ir.DataType:
    """The type of a value that is known to have one."""
    assert v.dtype is not None
    return v.dtype


def sizes(v: ir.Value) -> list[int]:
    """The shape of a value of fixed size."""
    assert v.shape is not None
    return [static(v, dim) for dim in range(len(v.shape))]


def numbered(constants: Iterable[ir.Value]) -> list[ir.Value]:
    """The constants of several graphs under names that cannot meet in one: constant/0, constant/1, ..."""
    named = list(constants)
    for i, constant in enumerate(named):
        constant.name = f"constant/{i}"
        if constant.const_value is not None:
            constant.const_value.name = constant.name
    return named


def describe(target: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
    """Name and type an existing value, as graph outputs need."""
    target.name, target.type, target.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return target


class Parts(NamedTuple):
    """A graph taken to pieces. The values stay connected; no graph owns them any more."""

    inputs: list[ir.Value]
    outputs: list[ir.Value]
    nodes: list[ir.Node]
    initializers: list[ir.Value]


def dismantle(graph: ir.Graph, prefix: str) -> Parts:
    """Take everything out of a graph, in order, and put the prefix before the names of what nodes compute."""
    parts = Parts(list(graph.inputs), list(graph.outputs), list(graph), list(graph.initializers.values()))
    graph.inputs.clear()
    graph.outputs.clear()
    graph.initializers.clear()
    graph.remove(parts.nodes)
    for node in parts.nodes:
        for output in node.outputs:
            if output not in parts.outputs:
                output.name = f"{prefix}/{output.name}"
    return parts


def replace(nodes: Iterable[ir.Node], replacement: Mapping[ir.Value, ir.Value]) -> None:
    """Rewire every use of some values in these nodes, and in the graphs inside them."""
    for node in nodes:
        for i, v in enumerate(node.inputs):
            if v is not None and v in replacement:
                _of_the_shape(replacement[v], v)
                node.replace_input_with(i, replacement[v])
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
                replace(attribute.as_graph(), replacement)


def _of_the_shape(new: ir.Value, old: ir.Value) -> None:
    """What stands in for a value has its rank and fixed sizes: products, whose rewriting asks for ranks, read it."""
    if new.shape is None and old.shape is not None:
        new.shape = ir.Shape([size if isinstance(size, int) else None for size in old.shape])
    if new.type is None:
        new.type = old.type


def split(nodes: Sequence[ir.Node], roots: Iterable[ir.Value]) -> tuple[list[ir.Node], list[ir.Node]]:
    """(nodes that do not depend on the roots, nodes that do), each in order.

    ONNX Runtime moves nothing out of a Loop, so what does not depend on the loop's state must be put outside by us.
    """
    reached = set(roots)
    independent, dependent = [], []
    for node in nodes:
        if any(v in reached for v in _read_by(node)):
            dependent.append(node)
            reached.update(node.outputs)
        else:
            independent.append(node)
    return independent, dependent


def needed(nodes: Sequence[ir.Node], results: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that the results depend on, in order. The others read nothing any more, so that nothing seems to be
    read."""
    wanted = set(results)
    kept = []
    for node in reversed(nodes):
        if any(v in wanted for v in node.outputs):
            kept.append(node)
            wanted.update(_read_by(node))
        else:
            cut_loose(node)
    return kept[::-1]


def cut_loose(node: ir.Node) -> None:
    """Leave a node without inputs: it is in no graph."""
    for i in range(len(node.inputs)):
        node.replace_input_with(i, None)


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs of a node and of all nodes in the graphs inside it."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _read_by(inner)


def copy(
    nodes: Sequence[ir.Node], replacement: Mapping[ir.Value, ir.Value], prefix: str
) -> tuple[list[ir.Node], dict[ir.Value, ir.Value]]:
    """Fresh nodes, and graphs inside them, that compute the same from replaced values; and the map from old to new."""
    for old, new in replacement.items():
        _of_the_shape(new, old)
    mapping = dict(replacement)
    fresh = []
    for node in nodes:
        twin = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else mapping.get(v, v) for v in node.inputs],
            attributes=[_copied(attribute) for attribute in node.attributes.values()],
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.name, new.type, new.shape = f"{prefix}/{old.name}", old.type, old.shape
            mapping[old] = new
        fresh.append(twin)
    for node in fresh:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                replace(attribute.as_graph(), mapping)
    return fresh, mapping


def _copied(attribute: ir.Attr) -> ir.Attr:
    if attribute.type != ir.AttributeType.GRAPH:
        return attribute
    return ir.AttrGraph(attribute.name, attribute.as_graph().clone(allow_outer_scope_values=True))


def shapes_from(nodes: Iterable[ir.Node], y: ir.Value, same_shape: ir.Value) -> None:
    """Let Shape(y) read another value of the same shape, so that what needs only y's batch leaves the loop."""
    for node in nodes:
        if node.op_type == "Shape" and node.domain == "" and node.inputs[0] is y:
            node.replace_input_with(0, same_shape)


def spread_scalars(graph: ir.Graph) -> None:
    """Factors of one entry beside products of float64 matrices -> tensors of several, in place, also inside loops.

    ONNX Runtime folds a product with a constant of one entry into the MatMul beside it, as an attribute of float32
    (MatMulScaleFusion, 1.31: off by 1e-8). It leaves tensors of several entries, and what is no constant, alone. A
    weight of one entry is a constant where a graph is frozen, so it is spread too.
    """

    def lone_weight(v: ir.Value | None) -> bool:
        return (
            v in graph.inputs
            and v is not None
            and v.dtype == ir.DataType.DOUBLE
            and v.shape is not None
            and all(size == 1 for size in v.shape)
        )

    def constant(v: ir.Value | None) -> np.ndarray | None:
        if v is None or v.const_value is None or v in graph.inputs:
            return None
        array = v.const_value.numpy()
        return array if array.size == 1 and array.dtype == np.float64 else None

    made: dict[tuple[float, int], ir.Value] = {}
    for node in list(graph.all_nodes()):
        if node.op_type not in ("Mul", "Div") or node.domain:
            continue
        for i, v in enumerate(node.inputs):
            array, other = constant(v), node.inputs[1 - i]
            if array is None and not lone_weight(v):
                continue
            if other is None or other.shape is None or len(other.shape) < 2:
                continue
            if not _beside_product(node, other):
                continue
            last = other.shape[len(other.shape) - 1]
            if array is not None and isinstance(last, int) and last > 1:
                number = float(array.reshape(()))
                if (number, last) not in made:
                    tensor = ir.tensor(np.full(last, number), name=f"factor/{len(made)}")
                    made[number, last] = ir.Value(
                        name=tensor.name,
                        type=ir.TensorType(ir.DataType.DOUBLE),
                        shape=ir.Shape([last]),
                        const_value=tensor,
                    )
                    graph.register_initializer(made[number, last])
                node.replace_input_with(i, made[number, last])
            else:
                shape = ir.node("Shape", [other])
                wide = ir.node("Expand", [v, shape.outputs[0]])
                wide.outputs[0].type, wide.outputs[0].shape = other.type, other.shape
                assert node.graph is not None
                node.graph.insert_before(node, [shape, wide])
                node.replace_input_with(i, wide.outputs[0])


def _beside_product(node: ir.Node, other: ir.Value) -> bool:
    """Whether a product of matrices makes what is scaled, or takes it."""
    kinds = ("MatMul", "Gemm", "Mul", "Div")  # scalars in a row are folded one after the other
    producer = other.producer()
    return (producer is not None and producer.op_type in kinds) or any(
        use.node.op_type in kinds for use in node.outputs[0].uses()
    )


def transposed_products(graph: ir.Graph) -> None:
    """MatMul(a, Transpose(W)) -> Gemm(a, W, transB=1), and the like, in place, also inside loops.

    Weights stay replaceable, so ONNX Runtime cannot transpose them ahead of time; without this every call would write
    each weight matrix out again. And up to 1.22 it makes of a transpose and a product of doubles one operator for which
    it has no kernel, so that the graph does not load.
    """

    def is_flip(v: ir.Value | None) -> bool:
        node = v.producer() if v is not None else None
        return node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]

    def origin(v: ir.Value) -> tuple[ir.Value, int]:
        """The value that v is, and how often (0 or 1) it is transposed: it may have passed other names on its way."""
        flips = 0
        while (node := v.producer()) is not None and (is_flip(v) or node.op_type == "Identity"):
            flips += is_flip(v)
            source = node.inputs[0]
            assert source is not None
            v = source
        return v, flips % 2

    for node in list(graph.all_nodes()):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        left, right = node.inputs[0], node.inputs[1]
        assert left is not None
        assert right is not None
        (a, flip_a), (b, flip_b) = origin(left), origin(right)
        if not (flip_a or flip_b or is_flip(left) or is_flip(right)):
            continue
        if any(v.shape is None or len(v.shape) != 2 for v in (left, right)):
            continue
        attributes = dict(node.attributes)
        old_a = attributes.pop("transA", None)
        old_b = attributes.pop("transB", None)
        trans_a = flip_a ^ (old_a.as_int() if old_a is not None else 0)
        trans_b = flip_b ^ (old_b.as_int() if old_b is not None else 0)
        twin = ir.Node(
            "",
            "Gemm",
            [a, b, *node.inputs[2:]],
            attributes=[
                *attributes.values(),
                *(ir.AttrInt64(name, 1) for name, on in (("transA", trans_a), ("transB", trans_b)) if on),
            ],
        )
        twin.outputs[0].type, twin.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        twin.outputs[0].name = node.outputs[0].name
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [twin], node.outputs, twin.outputs)
