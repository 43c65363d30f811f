"""The main graph of an ONNX model as plain data: nodes, tensors, inputs and outputs, read without onnx.

What the reader keeps is what an analysis of value.onnx needs. Model-local functions and subgraphs are noted by their
presence alone. What readers of protobuf may understand differently, such as a singular field given twice, is refused
(`wire`). Every size is checked against the bytes that are there before anything of that size is made, and `MAX_STEPS`
bounds what is read. Field numbers: onnx.proto3.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.errors import PackageError
from icnnrt.format.wire import BYTES, MESSAGES, Wire
from icnnrt.printable import show

Tensor: TypeAlias = NDArray[Any]

# Far above any energy's graph; below it every list of this module fits into memory many times.
MAX_NODES: Final = 1 << 16
MAX_STEPS: Final = 1 << 21  # see `wire`; and one for each packed integer
MAX_ELEMENTS: Final = 1 << 28
MAX_RANK: Final = 16

# TensorProto.DataType -> dtype, and the field that holds values that are not raw bytes.
DTYPES: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
}
_INT32_DATA: Final = frozenset((2, 3, 5, 6, 9, 10))
_EXTERNAL: Final = 1  # TensorProto.DataLocation


@dataclass(frozen=True, eq=False)
class Node:
    """One operator. A blank input or output name stands for one that is left out."""

    op_type: str
    name: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # int, float, bytes, Tensor, tuples of them; None for a graph


@dataclass(frozen=True)
class ValueInfo:
    """An input or output as the file declares it: dtype None where this reader does not know it.

    A size is a number, the name of an open one, or None; shape is None where nothing is said of it. `default` is the
    number that an input has where it is left out, if it may be and is one number.
    """

    name: str
    dtype: np.dtype[Any] | None = None
    shape: tuple[int | str | None, ...] | None = None
    default: bool | int | float | None = None

    @property
    def sizes(self) -> tuple[int | None, ...] | None:
        """The shape with None for what is not fixed."""
        shape = self.shape
        return None if shape is None else tuple(size if isinstance(size, int) else None for size in shape)


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which every value is made before it is read, as ONNX demands."""

    nodes: tuple[Node, ...]
    inputs: tuple[ValueInfo, ...]  # less those that are initialisers
    outputs: tuple[str, ...]
    initializers: Mapping[str, Tensor]
    functions: bool  # whether the model brings functions of its own
    opset: int


def read_graph(data: bytes, weights: Mapping[str, Tensor], file: str = "value.onnx") -> Graph:
    """Read the main graph of an ONNX ModelProto; tensors kept outside of it are looked up in `weights` by name.

    Raises `PackageError` with one sentence where the bytes are not a well-formed model, a value is read before it is
    made or made twice, or a tensor has another dtype or shape than the weight of its name.
    """
    return Reader(data, file).model(weights)


class Interface(NamedTuple):
    """What the main graph of a model takes and gives. Weights that may be overridden are among the inputs."""

    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]


def read_interface(data: bytes, file: str) -> Interface:
    """Read what the main graph of an ONNX ModelProto takes and gives, and nothing else.

    Raises `PackageError` with one sentence where the bytes are not a well-formed model.
    """
    return Reader(data, file).interface()


# What is read of each message, unless a reader wants others.
READ: Final = {
    "ModelProto": frozenset((7, 8, 25)),
    "OperatorSetIdProto": frozenset((1, 2)),
    "GraphProto": frozenset((1, 5, 11, 12, 15)),
    "NodeProto": frozenset((1, 2, 3, 4, 5, 7)),
    "AttributeProto": frozenset((1, 2, 3, 4, 5, 7, 8, 9, 20, 21)),
    "TensorProto": frozenset((1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 14)),
    "ValueInfoProto": frozenset((1, 2)),
    "TypeProto": frozenset((1,)),
    "TypeProto.Tensor": frozenset((1, 2)),
    "TensorShapeProto": frozenset((1,)),
    "TensorShapeProto.Dimension": frozenset((1, 2)),
}
_NUMBERS: Final = ("i", "n")  # types of fields whose values are integers

Span: TypeAlias = tuple[int, int]  # where the bytes of a field start and stop
Fields: TypeAlias = dict[int, list[int | Span]]  # by field number, in order; packed integers are a span too


class Reader(Wire):
    """The messages of a model as fields by number; of those `wanted` of each kind."""

    wanted: ClassVar[Mapping[str, frozenset[int]]] = READ

    def __init__(self, data: bytes, file: str, steps: int | None = None) -> None:
        super().__init__(data, file, MAX_STEPS if steps is None else steps)

    def read(self, kind: str, span: Span) -> Fields:
        found: Fields = {}
        declared = MESSAGES[kind]
        for number, value, start, stop, here in self.fields(kind, *span, self.wanted[kind]):
            packed = declared[number].repeated and self.data[here] & 7 == BYTES
            integer = declared[number].type in _NUMBERS and not packed
            found.setdefault(number, []).append(value if integer else (start, stop))
        return found

    def spans(self, fields: Fields, number: int) -> list[Span]:
        """Where every message, text, byte string or number of fixed width of a repeated field lies."""
        return [one for one in fields.get(number, []) if not isinstance(one, int)]

    def one(self, fields: Fields, number: int) -> Span | None:
        return next(iter(self.spans(fields, number)), None)

    def texts(self, fields: Fields, number: int) -> tuple[str, ...]:
        return tuple(self.data[a:b].decode() for a, b in self.spans(fields, number))

    def text(self, fields: Fields, number: int) -> str:
        return next(iter(self.texts(fields, number)), "")

    def integers(self, fields: Fields, number: int) -> list[int]:
        """A repeated integer, packed or not, as two's complement of 64 bits."""
        result = []
        for value in fields.get(number, []):
            if isinstance(value, int):
                result.append(value)
                continue
            at, end = value
            while at < end:
                self.left -= 1
                if self.left < 0:
                    self.exhausted()
                one, at = self.varint(at, end)
                result.append(one)
        return [v - (1 << 64) if v >> 63 else v for v in result]

    def integer(self, fields: Fields, number: int) -> int:
        return next(iter(self.integers(fields, number)), 0)

    def floats(self, fields: Fields, number: int, kind: str, span: Span, width: int = 4) -> Tensor:
        """A repeated float or double, packed or not."""
        spans = self.spans(fields, number)
        if any((stop - start) % width for start, stop in spans):
            self.refuse(span[0], f"field {number} of {kind} should hold numbers of {width} bytes, but does not")
        return np.frombuffer(b"".join(self.data[a:b] for a, b in spans), np.dtype(f"<f{width}"))

    def model(self, weights: Mapping[str, Tensor]) -> Graph:
        fields = self.read("ModelProto", (0, len(self.data)))
        graph = self.one(fields, 7)
        if graph is None:
            self.refuse(0, "ModelProto holds no graph")
        opset = 0
        for span in self.spans(fields, 8):
            entry = self.read("OperatorSetIdProto", span)
            if self.text(entry, 1) in ("", "ai.onnx"):
                opset = max(opset, self.integer(entry, 2))
        return self.graph(graph, weights, bool(fields.get(25)), opset)

    def graph(self, span: Span, weights: Mapping[str, Tensor], functions: bool, opset: int) -> Graph:
        kind = "GraphProto"
        fields = self.read(kind, span)
        if fields.get(15):
            self.refuse(span[0], "GraphProto holds sparse initializers, which this reader does not know,")
        spans = self.spans(fields, 1)
        if len(spans) > MAX_NODES:
            self.refuse(span[0], f"GraphProto holds {len(spans)} nodes, more than {MAX_NODES},")
        initializers: dict[str, Tensor] = {}
        for one in self.spans(fields, 5):
            name, tensor = self.tensor(one, weights)
            if not name or name in initializers:
                self.refuse(one[0], f"the initializer {show(name)} has no name or one that is taken")
            initializers[name] = tensor
        inputs = tuple(self.value_info(one) for one in self.spans(fields, 11))
        outputs = tuple(self.value_info(one).name for one in self.spans(fields, 12))
        nodes = tuple(self.node(one, weights) for one in spans)
        self.check_order(span, nodes, [i.name for i in inputs], initializers, outputs)
        left = tuple(i for i in inputs if i.name not in initializers)
        return Graph(nodes, left, outputs, initializers, functions, opset)

    def interface(self) -> Interface:
        span = self.one(self.read("ModelProto", (0, len(self.data))), 7)
        if span is None:
            return Interface((), ())
        fields = self.read("GraphProto", span)
        inputs = [self.value_info(one) for one in self.spans(fields, 11)]
        outputs = [self.value_info(one) for one in self.spans(fields, 12)]
        named = {v.name: v for v in inputs}
        if len(named) < len(inputs) or len({v.name for v in outputs}) < len(outputs):
            self.refuse(span[0], "an input or output of the graph has a name that is taken")
        for one in self.spans(fields, 5):
            tensor = self.read("TensorProto", one)
            name = self.text(tensor, 8)
            if name in named and not tensor.get(1) and not tensor.get(13):  # one number, in the graph itself
                value = self.tensor(one, {})[1].item()
                named[name] = replace(named[name], default=value)
        return Interface(tuple(named.values()), tuple(outputs))

    def check_order(
        self,
        span: Span,
        nodes: tuple[Node, ...],
        inputs: list[str],
        initializers: Mapping[str, Tensor],
        outputs: tuple[str, ...],
    ) -> None:
        if len(set(inputs)) < len(inputs) or "" in inputs:
            self.refuse(span[0], "an input of the graph has no name or one that is taken")
        made = {*inputs, *initializers}
        for node in nodes:
            for name in node.inputs:
                if name and name not in made:
                    self.refuse(span[0], f"{show(name)} is read by a {show(node.op_type)} before anything makes it")
            for name in node.outputs:
                if name and name in made:
                    self.refuse(span[0], f"{show(name)} is made twice")
                made.add(name)
        for name in outputs:
            if name not in made or not name:
                self.refuse(span[0], f"nothing makes the output {show(name)}")

    def value_info(self, span: Span) -> ValueInfo:
        fields = self.read("ValueInfoProto", span)
        name = self.text(fields, 1)
        kind = self.one(fields, 2)
        tensor = kind and self.one(self.read("TypeProto", kind), 1)
        if tensor is None:
            return ValueInfo(name)
        fields = self.read("TypeProto.Tensor", tensor)
        dtype = DTYPES.get(self.integer(fields, 1))
        shape = self.one(fields, 2)
        if shape is None:
            return ValueInfo(name, dtype)
        sizes = []
        for one in self.spans(self.read("TensorShapeProto", shape), 1):
            dimension = self.read("TensorShapeProto.Dimension", one)
            sizes.append(self.integer(dimension, 1) if 1 in dimension else self.text(dimension, 2) or None)
        return ValueInfo(name, dtype, tuple(sizes))

    def node(self, span: Span, weights: Mapping[str, Tensor]) -> Node:
        kind = "NodeProto"
        fields = self.read(kind, span)
        attributes: dict[str, Any] = {}
        for one in self.spans(fields, 5):
            name, value = self.attribute(one, weights)
            if name in attributes:
                self.refuse(one[0], f"the attribute {show(name)} is given twice")
            attributes[name] = value
        domain = self.text(fields, 7)
        return Node(
            self.text(fields, 4),
            self.text(fields, 3),
            "" if domain == "ai.onnx" else domain,
            self.texts(fields, 1),
            self.texts(fields, 2),
            attributes,
        )

    def attribute(self, span: Span, weights: Mapping[str, Tensor]) -> tuple[str, Any]:
        kind = "AttributeProto"
        fields = self.read(kind, span)
        name = self.text(fields, 1)
        if fields.get(21):
            self.refuse(span[0], f"the attribute {show(name)} refers to a function's outside of one")
        # AttributeProto.AttributeType: FLOAT 1, INT 2, STRING 3, TENSOR 4, FLOATS 6, INTS 7, STRINGS 8
        match self.integer(fields, 20):
            case 1:
                values = self.floats(fields, 2, kind, span)
                return name, float(values[0]) if len(values) else 0.0
            case 2:
                return name, self.integer(fields, 3)
            case 3:
                text = self.one(fields, 4)
                return name, self.data[text[0] : text[1]] if text else b""
            case 4:
                tensor = self.one(fields, 5)
                if tensor is None:
                    self.refuse(span[0], f"the attribute {show(name)} should be a tensor, but holds none")
                return name, self.tensor(tensor, weights)[1]
            case 6:
                return name, tuple(float(v) for v in self.floats(fields, 7, kind, span))
            case 7:
                return name, tuple(self.integers(fields, 8))
            case 8:
                return name, tuple(self.data[a:b] for a, b in self.spans(fields, 9))
        return name, None

    def tensor(self, span: Span, weights: Mapping[str, Tensor]) -> tuple[str, Tensor]:
        kind = "TensorProto"
        fields = self.read(kind, span)
        name = self.text(fields, 8)
        shape = self.integers(fields, 1)
        number = self.integer(fields, 2)
        dtype = DTYPES.get(number)
        count = bound = 1  # bound: zeros left out, as numpy multiplies the rest of a shape too
        for size in shape:
            count *= size
            bound *= max(size, 1)
            if size < 0 or bound > MAX_ELEMENTS or len(shape) > MAX_RANK:
                self.refuse(span[0], f"the tensor {show(name)} has the impossible shape {str(shape)[:80]}")
        if dtype is None or fields.get(3):
            self.refuse(span[0], f"the tensor {show(name)} is of data type {number}, which this reader does not know,")
        if fields.get(13) or self.integer(fields, 14) == _EXTERNAL:
            return name, self.external(name, dtype, tuple(shape), weights)
        return name, self.values(fields, span, name, number, count).reshape(shape)

    def external(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], weights: Mapping[str, Tensor]
    ) -> Tensor:
        array = weights.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            came = "there is none" if array is None else f"it is {array.dtype}{list(array.shape)}"
            raise PackageError(
                f"{self.file}: the weight {show(name)} should be {dtype}{list(shape)}, but {came}; "
                "give the weights of the package that the graph is from."
            )
        return array

    def values(self, fields: Fields, span: Span, name: str, number: int, count: int) -> Tensor:
        """The flat values of a tensor inside the model."""
        kind, dtype = "TensorProto", DTYPES[number]
        raw = self.one(fields, 9)
        if raw is not None:
            if raw[1] - raw[0] != count * dtype.itemsize:
                self.refuse(span[0], f"the tensor {show(name)} has {raw[1] - raw[0]} bytes for {count} {dtype}")
            flat = np.frombuffer(self.data, dtype.newbyteorder("<"), count, raw[0])
        elif number == 1:
            flat = self.floats(fields, 4, kind, span)
        elif number == 11:
            flat = self.floats(fields, 10, kind, span, 8)
        else:
            given = self.integers(fields, 5 if number in _INT32_DATA else 7)
            if number == 10:
                flat = np.array([v & 0xFFFF for v in given], np.uint16).view(np.float16)
            else:
                # Through int64, which wraps what does not fit instead of raising.
                flat = np.array(given, np.int64)
        if len(flat) != count:
            self.refuse(span[0], f"the tensor {show(name)} has {len(flat)} values for {count}")
        return flat.astype(dtype)


def ancestors(graph: Graph, output: str) -> Iterator[Node]:
    """The nodes that `output` is computed from, in the order of the graph."""
    wanted, chosen = {output}, []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            wanted.update(name for name in node.inputs if name)
            chosen.append(node)
    return reversed(chosen)
