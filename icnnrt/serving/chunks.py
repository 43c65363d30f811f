"""How many samples a graph takes at once: so many that what it makes on the way stays within a bound.

A graph lists what its nodes make, with the batch as the name of a size; so for each sample

    bytes(graph) = Σ over all nodes, those in loops once, of the size of what they make

is known without running it, and is the same on every machine, as the answers then are. No order of the nodes and no
reuse of memory needs more than that, and onnxruntime, which gives back what is not read any more, needs a small part of
it. A chunk is as many samples as the bound is multiples of it. To write so much takes ten times as long as to call the
nodes, so chunks cost no time; on the contrary, what fits the caches is faster (measured: argmin of 60,000 samples by a
quarter). What a graph does not list, as in the bodies of operators, counts as much as its largest input or output.

onnxruntime's arena keeps what a chunk took, some tens of megabytes for each graph; to have it shrunk after the last
chunk gave nothing back (measured), so that is not done.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.format import wire
from icnnrt.format.onnx_graph import MAX_RANK, READ, Fields, Reader, Span
from icnnrt.format.signatures import BATCH, Shape, Signature, Tensor

MEMORY: Final = 64 << 20
# A chunk has to be worth reading all weights, so where they are large the bound is so many times their bytes.
WEIGHTS: Final = 4
# What these make is no larger for many samples than for one.
SMALL: Final = ("Constant", "Shape", "Size")
# Slots of cuts that a sample did not need repeat its first one, as graphs have it; their multiplier is 0.
UNUSED: Final = {"cut_lam": 0.0}

# Characters of a size: the products that exporters write are shorter, and those of strangers might have no end.
LONGEST: Final = 256

_BATCH: Final = ""  # among the names of open sizes
_FACTOR: Final = re.compile(r"[0-9]{1,10}")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")

Arrays = Mapping[str, NDArray[Any]]
Rows = slice | NDArray[np.intp]


# --- How large ---------------------------------------------------------------------------------------------------


class Footprint:
    """How much one graph makes for each sample."""

    def __init__(self, data: bytes, file: str, signature: Signature, without: Collection[str]) -> None:
        """Of an ONNX ModelProto and what it takes and gives; functions of the names `without` are never run."""
        ends = [*signature.inputs.values(), *signature.outputs.values()]
        self._open = {size for t in ends for size in t.shape[1:] if isinstance(size, str)}
        self._made: Counter[tuple[str, ...]] = Counter()  # open sizes -> bytes for each unit of their product
        made, self._unknown = _Sizes(data, file, wire.MAX_STEPS).made(without)
        for dtype, shape in made:
            bytes, names = self._size(dtype, shape)
            if _BATCH in names:
                self._made[names] += bytes
            elif bytes < 0:
                self._unknown += 1
        sizes = (self._size(np.dtype(t.dtype or "float64").itemsize, t.shape) for t in ends)
        self._ends = [(bytes, names) for bytes, names in sizes if _BATCH in names]

    def of_a_sample(self, sizes: Mapping[str, int]) -> int:
        """Bytes, at least 1; `sizes` are those that are open besides the batch."""

        def times(names: tuple[str, ...]) -> int:
            return math.prod(sizes.get(name, 1) for name in names)

        made = sum(bytes * times(names) for names, bytes in self._made.items())
        largest = max((bytes * times(names) for bytes, names in self._ends), default=0)
        return max(1, made + self._unknown * largest)

    @property
    def fixed(self) -> bool:
        """Whether no size but the batch is open."""
        return not self._open

    def _size(self, item: int, shape: Shape) -> tuple[int, tuple[str, ...]]:
        """Bytes for each unit of the open sizes, and their names; −1 and none for what cannot be told.

        A size is a number, a name, or a product such as "8*batch". A name that the graph's inputs and outputs do not
        explain is the batch: exporters have names of their own for it.
        """
        if len(shape) > MAX_RANK or max((len(str(size)) for size in shape), default=0) > LONGEST:
            return -1, ()
        bytes, names = item, []
        for size in shape:
            for factor in str(size).replace(" ", "").split("*"):
                if _FACTOR.fullmatch(factor):
                    bytes *= int(factor)
                elif _NAME.fullmatch(factor):
                    names.append(factor if factor in self._open else _BATCH)
                else:
                    return -1, ()
        return (bytes, tuple(sorted(names))) if names.count(_BATCH) < 2 else (-1, ())


class _Sizes(Reader):
    """Reads what the nodes of a model make, in all of its graphs and functions."""

    wanted: ClassVar = {
        **READ,
        "GraphProto": frozenset((1, 11, 12, 13)),
        "FunctionProto": frozenset((1, 7, 12)),
        "NodeProto": frozenset((2, 4, 5)),
        "AttributeProto": frozenset((6, 11)),
    }

    def made(self, without: Collection[str]) -> tuple[list[tuple[int, Shape]], int]:
        """Bytes of an entry and shape of each value that nodes make, and how many there are that nothing tells of."""
        self._made: list[tuple[int, Shape]] = []
        self._unknown = 0
        self._called: list[str] = []
        fields = self.read("ModelProto", (0, len(self.data)))
        for span in self.spans(fields, 7):
            self._graph(span)
        functions = {}
        for span in self.spans(fields, 25):
            function = self.read("FunctionProto", span)
            functions[self.text(function, 1)] = function
        for name in without:
            functions.pop(name, None)
        while self._called:
            if (called := functions.pop(self._called.pop(), None)) is not None:
                self._nodes(called, 7, (12,))
        return self._made, self._unknown

    def _graph(self, span: Span) -> None:
        self._nodes(self.read("GraphProto", span), 1, (11, 12, 13))

    def _nodes(self, fields: Fields, nodes: int, infos: tuple[int, ...]) -> None:
        """The nodes in one field of a message, by the declarations in others of its fields."""
        declared = {}
        for number in infos:
            for one in self.spans(fields, number):
                v = self.value_info(one)
                if v.dtype is not None and v.shape is not None and None not in v.shape:
                    declared[v.name] = v.dtype.itemsize, tuple(size for size in v.shape if size is not None)
        for one in self.spans(fields, nodes):
            node = self.read("NodeProto", one)
            operator = self.text(node, 4)
            self._called.append(operator)
            if operator not in SMALL:
                for name in filter(None, self.texts(node, 2)):
                    if name in declared:
                        self._made.append(declared[name])
                    else:
                        self._unknown += 1
            for attribute in self.spans(node, 5):
                held = self.read("AttributeProto", attribute)
                for number in (6, 11):
                    for graph in self.spans(held, number):
                        self._graph(graph)


# --- One after the other -----------------------------------------------------------------------------------------


def chunks(samples: int | NDArray[np.intp], size: int) -> Iterator[Rows]:
    """At most `size` rows at once, in their order: of so many samples, or of those at these places."""
    count = samples if isinstance(samples, int) else len(samples)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop) if isinstance(samples, int) else samples[start:stop]


def fed(feeds: Arrays, inputs: Mapping[str, Tensor], rows: Rows) -> dict[str, NDArray[Any]]:
    """What a chunk is fed: its rows of what there is one row of for each sample, and the whole of the rest."""
    samples = len(feeds["x"])

    def part(name: str, array: NDArray[Any]) -> NDArray[Any]:
        by_sample = bool(inputs[name].shape) and isinstance(inputs[name].shape[0], str)
        return array[rows] if by_sample and len(array) == samples else array  # one row may stand for all samples

    return {name: part(name, array) for name, array in feeds.items()}


class Gathered:
    """The outputs of a graph for all samples, put together chunk by chunk.

    Outputs without a batch are sums over the samples: they are added up in float64 and rounded once, so that another
    size of chunks changes no more than their rounding.
    """

    def __init__(
        self,
        outputs: Mapping[str, Tensor],
        where: NDArray[np.bool_],
        sizes: Mapping[str, int],
        fill: Mapping[str, object],
        out: Arrays,
    ) -> None:
        """`where` [B] are the samples that chunks will bring; the rows of others are NaN, or what `fill` says by name.
        What `out` has arrays for is written to these."""
        self._whole: dict[str, NDArray[Any]] = {}
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._parts: dict[str, list[tuple[Rows, NDArray[Any]]]] = {}  # of sizes that are only known at the end
        self._outputs, self._samples = outputs, len(where)
        absent = None if where.all() else ~where
        for name, (dtype, shape, _) in outputs.items():
            known = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)
            row = tuple(size for size in known[1:] if isinstance(size, int))
            if shape[:1] != (BATCH,):
                self._sums[name] = np.zeros(tuple(size for size in known if isinstance(size, int)))
            elif len(row) < len(shape) - 1:
                self._parts[name] = []
            else:
                array = out[name] if name in out else np.empty((len(where), *row), dtype)
                if absent is not None:
                    array[absent] = fill.get(name, math.nan)
                self._whole[name] = array

    def add(self, rows: Rows, found: Arrays) -> None:
        """The outputs of one chunk."""
        for name, value in found.items():
            if name in self._sums:
                self._sums[name] += value
            elif name in self._whole:
                self._whole[name][rows] = value
            else:
                self._parts[name].append((rows, value))

    def result(self) -> dict[str, NDArray[Any]]:
        """All of them by name, in their order."""
        for name, parts in self._parts.items():
            slots = max((value.shape[1] for _, value in parts), default=0)
            first = parts[0][1] if parts else np.empty((0, 0))
            whole = np.empty((self._samples, slots, *first.shape[2:]), first.dtype)
            for rows, value in parts:
                used = value.shape[1]
                whole[rows, :used] = value
                whole[rows, used:] = UNUSED.get(name, value[:, :1])
            self._whole[name] = whole
        sums = {name: total.astype(self._outputs[name].dtype) for name, total in self._sums.items()}
        return {name: (sums if name in sums else self._whole)[name] for name in self._outputs}
