"""Two probes of a graph, batches of different sizes with random numbers in them, and what they tell apart.

They give every value its shape and every value that depends on weights alone its exact numbers; nothing else is
concluded from their numbers. An axis whose size differs between the probes holds samples; an operator that would join,
pick or sum along it is refused, and so is a number made from the size of the batch unless it does nothing but shape
another value: what holds for the batch that was walked through then holds for every other.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity.memory import Unsupported
from icnnrt.convexity.onnx_numpy import Attributes, axes_of, einsum_equation, given, normal, optional, reduced_axes
from icnnrt.format.onnx_graph import Graph, Node

Tensor: TypeAlias = NDArray[Any]

MAX_NUMBERS: Final = 1 << 25  # of one input
_BEYOND: Final = (1 << 31) - 1  # what exporters write for the end of an axis of any size

# Operators that may work on numbers made from the size of the batch; of Mul, Add and Sub one operand only.
_SIZES: Final = frozenset(
    ("Identity", "Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Mul", "Add", "Sub", "Reshape")
)
# What these leave of a batch is no multiple of it: of 2 and of 3 samples it may be as much, of 4 more.
ROUNDED: Final = frozenset(("Slice", "Split", "Conv", "AveragePool", "MaxPool", "TopK"))
# Where such numbers may end: (operator, index of the input).
_SHAPES: Final = frozenset((("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0)))


class Stop(Exception):
    """The walk cannot go on at `node`; the text says why, `blame` which weights are to blame."""

    def __init__(self, node: Node | None, why: str, blame: Iterable[str] = ()) -> None:
        super().__init__(why)
        self.node = node
        self.why = why
        self.blame = tuple(sorted(blame))


def probe(graph: Graph, batch: int, seed: int) -> dict[str, Tensor]:
    """Initialisers, and random x and y for `batch` samples."""
    rng = np.random.default_rng(seed)
    values: dict[str, Tensor] = dict(graph.initializers)
    for i in graph.inputs:
        sizes = i.sizes
        if i.name not in ("x", "y") or i.dtype is None or not sizes or None in sizes[1:]:
            raise Stop(None, f"the input {i.name[:40]!r} is not x or y, or its shape is not known but for the batch")
        shape = (batch if sizes[0] is None else sizes[0], *(s or 0 for s in sizes[1:]))
        if sizes[0] is not None or math.prod(shape) > MAX_NUMBERS:
            raise Stop(None, f"the input {i.name!r} has a fixed batch or impossible shape {list(shape)}")
        numbers = rng.random(shape)
        values[i.name] = (numbers if i.dtype.kind == "f" else numbers < 0.5).astype(i.dtype)
    return values


class Probes:
    """Both probes, and the values that have been computed of them.

    values, others: of every value its numbers for `batch` samples, and for another number of them
    known: names of values that depend on weights alone
    """

    def __init__(self, graph: Graph, batch: int, other: int) -> None:
        self.graph = graph
        self.batch = batch
        self.values = probe(graph, batch, 1)
        self.others = probe(graph, other, 2)
        self.known = set(graph.initializers)

    def sized(self, name: str) -> bool:
        """Whether the numbers of a known value change with the size of the batch."""
        if name not in self.known:
            return False
        a, b = self.values[name], self.others[name]
        common = tuple(slice(0, min(p, q)) for p, q in zip(a.shape, b.shape, strict=True))
        return not np.array_equal(a[common], b[common], equal_nan=a.dtype.kind == "f")

    def varying(self, name: str) -> set[int]:
        a, b = self.values[name].shape, self.others[name].shape
        return {i for i, (p, q) in enumerate(zip(a, b, strict=True)) if p != q}

    def counts(
        self, node: Node, inputs: Sequence[Tensor | None], made: Sequence[Tensor], again: Sequence[Tensor]
    ) -> bool:
        """Whether samples are counted out, by a Range; `Unsupported` of what may not work on the size of the batch."""
        op = node.op_type
        if op == "Shape":
            return False
        everywhere = op == "Squeeze" and optional(inputs, 1) is None and "axes" not in node.attributes
        if everywhere and self.varying(node.inputs[0]):
            raise Unsupported("Squeeze without axes takes the batch away where it is 1")
        sized = [i for i, name in enumerate(node.inputs) if name and self.sized(name)]
        if sized and op == "Range":
            # A length that is at least 1 and grows with the batch, or not at all, is linear in it.
            linear = made[0].dtype.kind == "i" and 2 not in sized and abs(int(given(inputs, 2).reshape(-1)[0])) == 1
            if not linear or not made[0].size or not again[0].size:
                raise Unsupported("Range counts something else than the samples of the batch")
            return True
        for i in sized:
            if (op, i) in _SHAPES:
                continue
            if op == "Cast" and not (made[0].dtype.kind == "i" and made[0].dtype.itemsize >= 4):
                # Rounded, what two batches give may be one number that others do not give.
                raise Unsupported("Cast makes a real number of the size of the batch")
            if op not in _SIZES or (op in ("Mul", "Add", "Sub") and len(sized) > 1):
                raise Unsupported(f"{op} works on a number that depends on the size of the batch")
            if op in ("Gather", "Slice") and i > 0:
                raise Unsupported(f"{op} picks entries by the size of the batch")
            if not self.constant(node):
                raise Unsupported(f"{op} brings the size of the batch into the energy")
        return False

    def constant(self, node: Node) -> bool:
        """Whether a node reads nothing but what depends on weights alone."""
        return all(name in self.known for name in node.inputs if name)

    def check_apart(
        self, node: Node, inputs: Sequence[Tensor | None], made: Sequence[Tensor], again: Sequence[Tensor]
    ) -> None:
        """`Unsupported` where a node joins or picks samples."""
        if node.op_type in ("Reshape", "Flatten"):
            self.check_reshape(node, made[0].shape, again[0].shape)
        if node.op_type.startswith("Reduce"):
            worked: _Worked = [(0, reduced_axes(node.attributes, inputs))]
        else:
            worked = _WORKED.get(node.op_type, lambda attributes, inputs: [])(node.attributes, inputs)
        for i, axes in worked:
            rank = self.values[node.inputs[i]].ndim
            if self.varying(node.inputs[i]) & {a % rank for a in axes if rank}:
                raise Unsupported(f"{node.op_type} joins or picks samples of the batch")

    def check_reshape(self, node: Node, b: tuple[int, ...], d: tuple[int, ...]) -> None:
        """The samples must stay as far out as they are, or a reshape could give one sample's numbers to another."""
        before = self.varying(node.inputs[0])
        a, c = self.values[node.inputs[0]].shape, self.others[node.inputs[0]].shape
        after = {i for i, (p, q) in enumerate(zip(b, d, strict=False)) if p != q}
        if len(before) > 1 or len(before) != len(after):
            raise Unsupported(f"{node.op_type} mixes the samples of the batch")
        for i, k in zip(before, after, strict=True):
            if math.prod(a[:i]) != math.prod(b[:k]) or math.prod(c[:i]) != math.prod(d[:k]):
                raise Unsupported(f"{node.op_type} mixes the samples of the batch")

    def number(self, name: str) -> float | None:
        if name not in self.known:
            return None
        array = self.values[name]
        if array.size == 0 or array.dtype.kind == "b" or self.sized(name):
            return None
        first = array.flat[0]
        return float(first) if np.isfinite(first) and (array == first).all() else None


# --- Along which axes operators work -------------------------------------------------------------

# (index of an input, the axes along which the operator sums, joins or picks)
_Worked: TypeAlias = list[tuple[int, Iterable[int]]]


def _of_slice(attributes: Attributes, inputs: Any) -> _Worked:
    # Whole only if it is so for every size: y[0:3] is the whole of three samples, not of four.
    z, starts, ends = inputs[:3]
    steps = optional(inputs, 4)
    axes = axes_of(z.ndim, optional(inputs, 3)) or tuple(range(len(starts)))
    whole = [starts[i] == 0 and ends[i] >= _BEYOND and (steps is None or steps[i] == 1) for i in range(len(axes))]
    return [(0, [a for a, w in zip(axes, whole, strict=True) if not w])]


def _of_pad(attributes: Attributes, inputs: Any) -> _Worked:
    z, pads = inputs[:2]
    axes = axes_of(z.ndim, optional(inputs, 3)) or tuple(range(z.ndim))
    return [(0, [a for i, a in enumerate(axes) if pads[i] or pads[i + len(axes)]])]


def _of_gather_nd(attributes: Attributes, inputs: Any) -> _Worked:
    batch = attributes.get("batch_dims", 0)
    return [(0, range(batch, batch + inputs[1].shape[-1])), (1, (-1,))]


def _of_scatter_nd(attributes: Attributes, inputs: Any) -> _Worked:
    index = inputs[1]
    return [(0, range(index.shape[-1])), (1, range(index.ndim)), (2, range(index.ndim - 1))]


def _of_einsum(attributes: Attributes, inputs: Any) -> _Worked:
    terms, result = einsum_equation(attributes).split("->")
    return [
        (i, [a for a, label in enumerate(term) if label not in result or term.count(label) > 1])
        for i, term in enumerate(terms.split(","))
    ]


_WORKED: Final[Mapping[str, Callable[[Attributes, Any], _Worked]]] = {
    "MatMul": lambda a, inputs: [(0, (-1,)), (1, (-2 if inputs[1].ndim > 1 else -1,))],
    "Gemm": lambda a, inputs: [(0, (0 if a.get("transA", 0) else 1,)), (1, (1 if a.get("transB", 0) else 0,))],
    "LayerNormalization": lambda a, inputs: [
        (0, range(normal(a.get("axis", -1), inputs[0].ndim), inputs[0].ndim)),
    ],
    **dict.fromkeys(("Softmax", "LogSoftmax", "TopK"), lambda a, inputs: [(0, (a.get("axis", -1),))]),
    **dict.fromkeys(("Gather", "Split"), lambda a, inputs: [(0, (a.get("axis", 0),))]),
    "GatherND": _of_gather_nd,
    "ScatterND": _of_scatter_nd,
    "EyeLike": lambda a, inputs: [(0, (0, 1))],
    "CumSum": lambda a, inputs: [(0, (int(inputs[1].reshape(-1)[0]),))],
    "Concat": lambda a, inputs: [(i, (a["axis"],)) for i in range(len(inputs))],
    "Slice": _of_slice,
    "Pad": _of_pad,
    "Tile": lambda a, inputs: [(0, [i for i, r in enumerate(inputs[1]) if r != 1])],
    "Conv": lambda a, inputs: [(0, range(1, inputs[0].ndim)), (1, range(inputs[1].ndim))],
    **dict.fromkeys(
        ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "BatchNormalization"),
        lambda a, inputs: [(0, range(1, inputs[0].ndim))],
    ),
    "Einsum": _of_einsum,
}
