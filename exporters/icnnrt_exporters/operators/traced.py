"""The namespace of `icnnrt.mathematics.namespace` that writes ONNX nodes: a statement run over it becomes a graph.

    trace = Traced("cut")
    y = at.point(trace, trace.of(s))          # nodes in trace.op.nodes, the value in y.value

A traced value has the operators of an array; each appends a node to the innermost graph, unless the same node stands
there or outside already. Values take the name of the variable that the statement holds them in, so that a graph can be
read beside it. How many axes a value has is known of it, and its sizes where it is an input.
"""

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from icnnrt.format.manifest import OP_DOMAIN
from icnnrt_exporters.surgery import Ops, cut_loose, describe, needed, numbered, value
from icnnrt_exporters.versions import OP_VERSION, OPSET

INT64, DOUBLE, BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL
SMALLEST: Final = float(np.finfo(np.float64).tiny)
STATEMENTS: Final = "icnnrt.mathematics"


def _binary(
    op_type: str, dtype: ir.DataType | None = None, swapped: bool = False
) -> Callable[["Symbol", Any], "Symbol"]:
    """An operator of a value and another, or a number; its result is of the value's type where `dtype` is None."""

    def written(a: "Symbol", b: Any) -> "Symbol":
        b = a.trace.lifted(b, a.dtype, a.rank)
        return a.trace.node(op_type, *((b, a) if swapped else (a, b)), result=dtype or a.dtype)

    return written


def _entrywise(op_type: str) -> Callable[["Traced", "Symbol"], "Symbol"]:
    return lambda xp, a: xp.node(op_type, a)


def _reduced(op_type: str) -> Callable[["Traced", "Symbol"], "Symbol"]:
    """Over the last axis, counted from the front: by −1 ONNX Runtime 1.31 does not reduce an empty batch."""
    return lambda xp, a: xp.node(op_type, a, xp.constant([a.rank - 1]), keepdims=1)


class Symbol:
    """A traced value: what a node will compute."""

    __array_ufunc__ = None  # numpy's numbers leave operators to us

    def __init__(self, trace: "Traced", v: ir.Value, dtype: ir.DataType, rank: int) -> None:
        self.trace, self.value, self.dtype, self.rank = trace, v, dtype, rank

    @property
    def shape(self) -> Sequence[Any]:
        assert self.value.shape is not None, f"the sizes of {self.value.name} are not known"
        return tuple(self.value.shape)

    __add__ = _binary("Add")
    __radd__ = _binary("Add", swapped=True)
    __sub__ = _binary("Sub")
    __rsub__ = _binary("Sub", swapped=True)
    __mul__ = _binary("Mul")
    __rmul__ = _binary("Mul", swapped=True)
    __truediv__ = _binary("Div")
    __matmul__ = _binary("MatMul")
    __gt__ = _binary("Greater", BOOL)
    __lt__ = _binary("Less", BOOL)
    __ge__ = _binary("GreaterOrEqual", BOOL)
    __le__ = _binary("LessOrEqual", BOOL)
    __or__ = _binary("Or")
    __and__ = _binary("And")

    def __rtruediv__(self, other: Any) -> "Symbol":
        if isinstance(other, float) and other == 1.0:
            return self.trace.node("Reciprocal", self)
        return _binary("Div", swapped=True)(self, other)

    def __invert__(self) -> "Symbol":
        return self.trace.node("Not", self)

    def __neg__(self) -> "Symbol":
        producer = self.value.producer()
        if producer is not None and producer.op_type == "Neg" and producer.domain == "":
            return Symbol(self.trace, producer.inputs[0], self.dtype, self.rank)  # type: ignore[arg-type]
        return self.trace.node("Neg", self)

    def __abs__(self) -> "Symbol":
        return self.trace.node("Abs", self)


def nodes_of(
    op: Ops, statement: Callable[..., Symbol], *values: ir.Value, dtype: ir.DataType = DOUBLE, rank: int = 2
) -> ir.Value:
    """Append the nodes of `statement(xp, *values)` to a graph's, for values of one type and rank."""
    xp = Traced(f"{op.prefix}/{len(op.nodes)}", op, rank)
    return statement(xp, *(xp.of(v, dtype) for v in values)).value


class Traced:
    """The namespace; `op` holds the nodes of the innermost graph.

    Args:
        prefix: stands before the names of values, as no weight's name does.
        op: nodes to append to; new ones of this prefix where not given.
        rank: how many axes a value has that does not tell.
        taken: names that are not to be given.
    """

    def __init__(self, prefix: str, op: Ops | None = None, rank: int = 3, taken: Iterable[str] = ()) -> None:
        self.op = op if op is not None else Ops(prefix)
        self.prefix = prefix
        self.rank = rank
        self._outer: list[Ops] = []
        self._known: list[dict[Any, Sequence[Symbol]]] = [{}]
        self._constants: dict[Any, Symbol] = {}
        self.templates: list[ir.Node] = []  # nodes that are copied to where they are called
        self.pieces: dict[str, tuple[ir.Function, list[ir.DataType]]] = {}  # by name, with the types of their outputs
        self._used: dict[str, int] = {}  # how often a name was asked for
        self._taken = set(taken)
        self._given: set[ir.Value] = set()  # values that have the name they keep
        self._outputs: set[ir.Value] = set()  # of the main graph

    # --- Writing nodes ---------------------------------------------------------------------------

    def of(self, v: ir.Value, dtype: ir.DataType | None = None, rank: int | None = None) -> Symbol:
        """An existing value as a traced one; double where neither it nor `dtype` says otherwise."""
        self._given.add(v)
        self._taken.add(v.name or "")
        return Symbol(self, v, dtype or v.dtype or DOUBLE, rank or (self.rank if v.shape is None else len(v.shape)))

    def lifted(self, a: Any, dtype: ir.DataType, rank: int = 1) -> Symbol:
        """A number as a constant of this type, of one entry or, beside a scalar, of none; a traced value as it is."""
        if isinstance(a, Symbol):
            return a
        return self.constant(np.asarray([a] if rank else a, dtype.numpy()), dtype)

    def constant(self, a: Any, dtype: ir.DataType = INT64) -> Symbol:
        array = np.asarray(a, dtype.numpy())
        key = (array.tobytes(), array.shape, dtype)
        if key not in self._constants:
            self._constants[key] = self.of(self.op.constant(array, dtype), dtype)
        return self._constants[key]

    def node(
        self,
        op_type: str,
        *inputs: Symbol,
        result: ir.DataType | None = None,
        rank: int | None = None,
        **attributes: Any,
    ) -> Symbol:
        """One node with one output, of the type of its first input where `result` does not say otherwise."""
        ranks = None if rank is None else [rank]
        return self.nodes(op_type, *inputs, results=[result or inputs[0].dtype], ranks=ranks, **attributes)[0]

    def nodes(
        self,
        op_type: str,
        *inputs: Symbol,
        results: Sequence[ir.DataType],
        ranks: Sequence[int] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[Symbol]:
        """One node; its outputs have as many axes as its inputs have, at most, where `ranks` does not say otherwise."""
        self._name()
        # Numbers, not id(): an object that is gone may leave its own to another.
        key = (op_type, domain, *(v.value for v in inputs), repr(sorted(attributes.items())))
        for known in self._known:
            if op_type not in ("Loop", "If") and key in known:
                return known[key]
        _no_scale_beside_product(op_type, inputs)
        made = self.op.many(op_type, *(v.value for v in inputs), outputs=len(results), domain=domain, **attributes)
        for v in made:
            v.name = self.free("t")
        ranks = ranks or [max((v.rank for v in inputs), default=0)] * len(results)
        found = [Symbol(self, v, dtype, rank) for v, dtype, rank in zip(made, results, ranks, strict=True)]
        self._known[-1][key] = found
        return found

    def _name(self) -> None:
        """Give values the names of the variables that hold them, in every statement that is running; the outermost
        has the first word."""
        frames = []
        frame: Any = sys._getframe(2)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(STATEMENTS):
                frames.append(frame)
            frame = frame.f_back
        for frame in reversed(frames):
            for name, held in frame.f_locals.items():
                known = not isinstance(held, Symbol) or held.trace is not self or held.value in self._given
                if not known and not name.startswith("_"):
                    held.value.name = self.free(name)
                    self._given.add(held.value)

    def free(self, name: str) -> str:
        """prefix/name, or the next that nothing has: name_2, name_3, ..."""
        for count in itertools.count(self._used.get(name, 0) + 1):
            self._used[name] = count
            found = name if count == 1 else f"{name}_{count}"
            if found not in self._taken:
                self._taken.add(found)
                return f"{self.prefix}/{found}" if self.prefix else found
        raise AssertionError

    # --- The namespace ---------------------------------------------------------------------------

    exp = _entrywise("Exp")
    log = _entrywise("Log")
    sqrt = _entrywise("Sqrt")
    sum = _reduced("ReduceSum")
    max = _reduced("ReduceMax")
    min = _reduced("ReduceMin")
    mean = _reduced("ReduceMean")
    maximum = staticmethod(_binary("Max"))
    minimum = staticmethod(_binary("Min"))
    equal = staticmethod(_binary("Equal", BOOL))

    def log1p(self, a: Symbol) -> Symbol:
        return self.log(1.0 + a)

    def sigmoid(self, s: Symbol) -> Symbol:
        """1/(1 + e^−s): overflow gives 0, as it should, while ONNX Runtime's Sigmoid of float64 is 1 − 1/(1 + e^s) for
        negative s and loses the lower tail."""
        return 1.0 / (1.0 + self.exp(-s))

    def x_log_x(self, a: Symbol) -> Symbol:
        return a * self.log(self.maximum(a, SMALLEST))

    def clip(self, a: Symbol, low: Any, high: Any) -> Symbol:
        if isinstance(low, Symbol) or isinstance(high, Symbol):
            return self.maximum(self.minimum(a, high), low)
        bounds = (self.constant(np.float64(bound), a.dtype) for bound in (low, high))  # without an axis, as Clip asks
        return self.node("Clip", a, *bounds)

    def where(self, condition: Symbol, a: Any, b: Any) -> Symbol:
        dtype = next((v.dtype for v in (a, b) if isinstance(v, Symbol)), DOUBLE)
        a, b = self.lifted(a, dtype), self.lifted(b, dtype)
        return self.node("Where", condition, a, b, result=dtype)

    def total(self, M: Symbol) -> Symbol:
        return self.node("ReduceSum", M, self.constant([1, 2]), keepdims=1)

    def largest(self, M: Symbol) -> Symbol:
        return self.node("ReduceMax", abs(M), self.constant([1, 2]), keepdims=1)

    def isfinite(self, a: Symbol) -> Symbol:
        return abs(a) < float("inf")

    def indicator(self, condition: Symbol) -> Symbol:
        return self.cast(condition, DOUBLE)

    def power_of_2(self, a: Symbol) -> Symbol:
        exponent = self.node("Round", self.log(a) / math.log(2.0))
        return self.node("Pow", self.lifted(2.0, DOUBLE), exponent)

    def all(self, condition: Symbol) -> Symbol:
        return self.min(self.indicator(condition)) > 0.0

    def pick(self, which: Symbol, a: Symbol) -> Symbol:
        return self.node("Compress", a, self._samples(which), axis=0)

    def _samples(self, which: Symbol) -> Symbol:
        return self.node("Squeeze", which, self.constant([1, 2]))

    def put(self, which: Symbol, found: Symbol, among: Symbol) -> Symbol:
        samples = self.size(among, 0)
        count = self.node("Squeeze", samples)
        places = self.node("Range", self.constant(0), count, self.constant(1))
        at = self.node("Compress", places, self._samples(which), axis=0)
        return self.node("ScatterND", among, self.node("Unsqueeze", at, self.constant([1])), found)

    def cond(self, condition: Symbol, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Sequence[Any]:
        branches: dict[str, Any] = {}
        found: list[Symbol | None] = []
        for name, branch in (("then_branch", then), ("else_branch", otherwise)):
            self._open()
            found = list(branch())
            branches[name] = self._closed([], [v for v in found if v is not None], name)
        return _in_place(found, self.nodes("If", condition, **_kinds([v for v in found if v is not None]), **branches))

    def piece(self, name: str, statement: Callable[..., Any], arrays: Sequence[Symbol]) -> Sequence[Symbol]:
        if name not in self.pieces:
            inner = Traced("", rank=self.rank)
            inner.pieces = self.pieces
            given = [ir.Value(name=f"in_{i}") for i in range(len(arrays))]
            found = list(statement(inner, *(inner.of(v, a.dtype) for v, a in zip(given, arrays, strict=True))))
            made = inner.function(name, given, found, inspect.getdoc(statement))
            self.pieces[name] = made, [v.dtype for v in found]
        return self.nodes(name, *arrays, results=self.pieces[name][1], domain=OP_DOMAIN)

    def count(self, a: Symbol) -> Symbol:
        return self.cast(self.size(a, -1), a.dtype)

    def mT(self, a: Symbol) -> Symbol:
        return self.node("Transpose", a, perm=[0, 2, 1])

    def argmin1(self, a: Symbol) -> Symbol:
        return self.node("ArgMin", a, result=INT64, axis=1, keepdims=1)

    def pick1(self, a: Symbol, i: Symbol) -> Symbol:
        return self.node("GatherND", a, i, batch_dims=1)

    def ones_like(self, a: Symbol) -> Symbol:
        shape = self.node("Shape", a, result=INT64)
        return self.node("ConstantOfShape", shape, result=a.dtype, rank=a.rank, value=ir.tensor([1.0], dtype=a.dtype))

    def eye(self, row: Symbol) -> Symbol:
        k = self.size(row, -1)
        square = self.node("ConstantOfShape", self.node("Concat", k, k, axis=0))
        return self.node("EyeLike", square, result=row.dtype, rank=2, dtype=row.dtype)

    def eyes(self, row: Symbol) -> Symbol:
        k = self.size(row, -1)
        return self.node("Expand", self.eye(row), self.node("Concat", self.size(row, 0), k, k, axis=0), rank=3)

    def rows(self, numbers: Sequence[float], like: Symbol) -> Symbol:
        return self.constant(np.asarray(numbers)[None, :, None], like.dtype)

    def extended(self, row: Symbol, like: Symbol) -> Symbol:
        return self._padded(row, self.size(like, -1))

    def padded(self, row: Symbol, length: int) -> Symbol:
        return self._padded(row, self.constant([length]))

    def _padded(self, row: Symbol, length: Symbol) -> Symbol:
        missing = self.node("Sub", length, self.size(row, -1))
        zeros = self.constant([0] * (2 * row.rank - 1))
        return self.node("Pad", row, self.node("Concat", zeros, missing, axis=0))

    def concat(self, arrays: Sequence[Symbol]) -> Symbol:
        return self.node("Concat", *arrays, axis=-1)

    def concat_rows(self, arrays: Sequence[Symbol]) -> Symbol:
        return self.node("Concat", *arrays, axis=1)

    def halves(self, row: Symbol) -> Sequence[Symbol]:
        return self.nodes("Split", row, results=[row.dtype] * 2, axis=row.rank - 1, num_outputs=2)

    def parts(self, row: Symbol, like: Sequence[Symbol | None]) -> Sequence[Symbol]:
        sizes = [None if a is None else self.size(a, -1) for a in like]
        rest = self.size(row, -1)
        for size in sizes:
            rest = rest if size is None else rest - size
        ends = self.node("Concat", *(rest if size is None else size for size in sizes), axis=0)
        return self.nodes("Split", row, ends, results=[row.dtype] * len(like), axis=row.rank - 1)

    def stack(self, arrays: Sequence[Symbol]) -> Symbol:
        return self.concat_rows([self.row(a) for a in arrays])

    def row(self, a: Symbol) -> Symbol:
        return self.node("Unsqueeze", a, self.constant([1]), rank=a.rank + 1)

    def column(self, a: Symbol) -> Symbol:
        return self.node("Unsqueeze", a, self.constant([a.rank]), rank=a.rank + 1)

    def entry(self, a: Symbol, i: int) -> Symbol:
        return self.node("Gather", a, self.constant(i), axis=a.rank - 1, rank=a.rank - 1)

    def slot(self, a: Symbol, k: Any) -> Symbol:
        return self.node("Gather", a, self.lifted(k, INT64, 0), axis=1, rank=a.rank - 1)

    def slots(self, a: Symbol) -> Symbol:
        return self.size(a, 1)

    def upto(self, a: Symbol, k: Any) -> Symbol:
        return self.node("Slice", a, self.constant([0]), self._one_axis(k), self.constant([1]))

    def beyond(self, a: Symbol, k: Any) -> Symbol:
        return self.node("Slice", a, self._one_axis(k), self.constant([2**62]), self.constant([1]))

    def _one_axis(self, k: Any) -> Symbol:
        """A number, or a value without an axis, with one."""
        k = self.lifted(k, INT64)
        return k if k.rank else self.node("Unsqueeze", k, self.constant([0]), rank=1)

    def places(self, a: Symbol) -> Symbol:
        count = self.node("Squeeze", self.size(a, -1), rank=0)
        return self.node("Range", self.constant(0), count, self.constant(1), rank=1)

    def backwards(self, a: Symbol) -> Symbol:
        last, beyond, axis = self.constant([-1]), self.constant([-(2**62)]), self.constant([1])
        return self.node("Slice", a, last, beyond, axis, last)

    def slots_sum(self, a: Symbol) -> Symbol:
        return self.node("ReduceSum", a, self.constant([1]), keepdims=0, rank=a.rank - 1)

    def zeros(self, like: Symbol, *sizes: int) -> Symbol:
        shape = self.node("Concat", self.size(like, 0), self.constant(sizes), axis=0)
        zero = ir.tensor([0.0], dtype=like.dtype)
        return self.node("ConstantOfShape", shape, result=like.dtype, rank=1 + len(sizes), value=zero)

    def spread(self, number: float, like: Symbol) -> Symbol:
        one = self.constant(np.full([1] * like.rank, number), like.dtype)
        return self.node("Expand", one, self.node("Shape", like, result=INT64, rank=1))

    def double(self, a: Symbol) -> Symbol:
        return self.cast(a, DOUBLE)

    def like(self, a: Symbol, other: Symbol) -> Symbol:
        return self.cast(a, other.dtype)

    def inverse_spd(self, A: Symbol, eye: Symbol) -> Callable[[Symbol], Symbol]:
        inverse = self.node("InverseSPD", A, eye, domain=OP_DOMAIN)
        return lambda r: r @ inverse

    def factor_spd(self, A: Symbol, eye: Symbol) -> Callable[[Symbol], Symbol]:
        above = self.node("Trilu", self.ones_like(eye), self.constant(1), upper=1)
        V, Vt = self.nodes("InverseCholesky", A, eye, above, results=[A.dtype] * 2, domain=OP_DOMAIN)
        return lambda r: r @ Vt @ V

    def positive_definite(self, M: Symbol, eye: Symbol) -> Symbol:
        return self.node("PositiveDefinite", M, eye, result=BOOL, domain=OP_DOMAIN)

    def solve_spd(self, A: Symbol, eye: Symbol, rows: Sequence[Symbol]) -> Sequence[Symbol]:
        found = self.node("SolveSPD", A, self.node("Concat", *rows, axis=1), eye, domain=OP_DOMAIN)
        return self.nodes("Split", found, results=[A.dtype] * len(rows), axis=1, num_outputs=len(rows))

    def any(self, a: Symbol) -> Symbol:
        return self.cast(self.node("ReduceSum", self.cast(a, INT64), keepdims=0), BOOL)

    def loop(
        self, unfinished: Callable[..., Symbol], step: Callable[..., Any], state: Iterable[Symbol], most: Symbol | int
    ) -> Sequence[Symbol]:
        state = list(state)
        going = unfinished(*state)
        counter, on = value(self.free("trip"), INT64, []), value(self.free("going"), BOOL, [])
        held = [ir.Value(name=self.free("state"), type=ir.TensorType(v.dtype)) for v in state]
        self._open()
        following = list(step(*(Symbol(self, v, s.dtype, s.rank) for v, s in zip(held, state, strict=True))))
        results = [unfinished(*following), *following]
        body = self._closed([counter, on, *held], results, "step")
        return self.nodes("Loop", self.lifted(most, INT64, 0), going, *state, **_kinds(state), body=body)

    def repeat(
        self,
        times: Any,
        step: Callable[..., Any],
        state: Iterable[Symbol | None],
        unfinished: Callable[..., Symbol] | None = None,
    ) -> tuple[Sequence[Symbol | None], Sequence[Symbol]]:
        if isinstance(times, int) and times == 0:
            return list(state), []
        trip, *names = inspect.signature(step).parameters
        names, given = list(getattr(state, "_fields", names)), list(state)
        start = [s for s in given if s is not None]
        counter, on = value(self.free(trip.strip("_") or "trip"), INT64, []), value(self.free("going"), BOOL, [])
        held = [
            ir.Value(name=self.free(name), type=ir.TensorType(s.dtype))
            for s, name in zip(given, names, strict=True)
            if s is not None
        ]
        self._given.update(held)
        self._open()
        inside = [Symbol(self, v, s.dtype, s.rank) for v, s in zip(held, start, strict=True)]
        after, rows = (list(part) for part in step(Symbol(self, counter, INT64, 0), *_in_place(given, inside)))
        assert unfinished is None or not rows, "how many rows there are is not known"
        goes_on = Symbol(self, on, BOOL, 0) if unfinished is None else unfinished(*after)
        following = [v for v in after if v is not None]
        body = self._closed([counter, on, *held], [goes_on, *following, *rows], step.__name__)
        most, true = self.lifted(times, INT64, 0), self.constant(True, BOOL)
        found = self.nodes("Loop", most, true, *start, **_kinds([*start, *rows]), body=body)
        collected = [self._collected(v, most, start[0]) for v in found[len(start) :]]
        return _in_place(given, found[: len(start)]), collected

    def _collected(self, rows: Symbol, times: Symbol, like: Symbol) -> Symbol:
        """What a loop put one behind the other in a new axis 0, of rows [B, ...], as [B, times, ...].

        The Reshape changes nothing, and costs nothing, but onnx.reference (onnx 1.23) joins rows in the axis they have.
        """
        sizes = [self.node("Unsqueeze", times, self.constant([0]), rank=1), self.size(like, 0)]
        if rows.rank > 1:
            sizes.append(self.node("Shape", rows, result=INT64, rank=1, start=1 - rows.rank))
        shape = self.node("Concat", *sizes, axis=0)
        apart = self.node("Reshape", rows, shape, allowzero=1, rank=rows.rank + 1)
        return self.node("Transpose", apart, perm=[1, 0, *range(2, apart.rank)])

    # --- Graphs ----------------------------------------------------------------------------------

    def function(
        self, name: str, given: Sequence[ir.Value], results: Sequence[Symbol], doc: str | None = None, **attributes: Any
    ) -> ir.Function:
        """All that was traced as a function of ai.icnnrt: constants in front, then what its outputs need."""
        outputs = [v.value for v in results]
        constants = []
        for v in self.op.constants:
            node = ir.node("Constant", [], attributes={"value": v.const_value}, num_outputs=1)
            node.outputs[0].name = self.free("constant")
            ir.convenience.replace_all_uses_with(v, node.outputs[0])
            constants.append(node)
        imports = {"": OPSET, OP_DOMAIN: OP_VERSION}
        nodes = needed([*constants, *self.op.nodes], outputs)
        graph = ir.Graph(given, outputs, nodes=nodes, opset_imports=imports, name=name, doc_string=doc)
        return ir.Function(OP_DOMAIN, name, graph=graph, attributes=list(attributes.values()))

    def output(self, v: Symbol, name: str, shape: Sequence[int | str | None]) -> ir.Value:
        """An output of the main graph; what is one already, as equal nodes are one, gets a node for its second name."""
        made = self.op("Identity", v.value) if v.value in self._outputs else v.value
        self._outputs.add(made)
        return describe(made, name, v.dtype, shape)

    def graph(
        self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], initializers: Sequence[ir.Value], name: str
    ) -> ir.Graph:
        """All that was traced, as the main graph of a model."""
        nodes = needed(self.op.nodes, outputs)
        for node in self.templates:
            cut_loose(node)
        return ir.Graph(
            inputs, outputs, nodes=nodes, initializers=numbered([*initializers, *self.op.constants]), name=name
        )

    def _open(self) -> None:
        """Begin a graph inside the one at hand."""
        self._outer.append(self.op)
        self.op = Ops(self.prefix, self.op.constants)
        self._known.append({})

    def _closed(self, inputs: Sequence[ir.Value], results: Sequence[Symbol], name: str) -> ir.Graph:
        """End it. Each of its outputs is made in it, and is one output only."""
        made = set(itertools.chain.from_iterable(node.outputs for node in self.op.nodes))
        outputs: list[ir.Value] = []
        for v in results:
            if v.value in made and v.value not in outputs:
                outputs.append(v.value)
            else:
                outputs.append(self.op("Identity", v.value))
                outputs[-1].name = self.free("t")
            outputs[-1].type = ir.TensorType(v.dtype)
        nodes = needed(self.op.nodes, outputs)
        self.op = self._outer.pop()
        self._known.pop()
        return ir.Graph(inputs, outputs, nodes=nodes, name=name)

    # --- How -------------------------------------------------------------------------------------

    def cast(self, a: Symbol, dtype: ir.DataType) -> Symbol:
        """The value in another type, or itself."""
        return a if a.dtype == dtype else self.node("Cast", a, result=dtype, to=dtype)

    def size(self, a: Symbol, axis: int) -> Symbol:
        """How many entries an axis has, [1]; from behind where it is negative."""
        ends = {} if axis == -1 else {"end": axis + 1}
        return self.node("Shape", a, result=INT64, rank=1, start=axis, **ends)


def _in_place(like: Iterable[Any], values: Iterable[Symbol]) -> list[Any]:
    """The values where `like` has some; None stays None."""
    rest = iter(values)
    return [None if v is None else next(rest) for v in like]


def _kinds(values: Sequence[Symbol]) -> dict[str, Any]:
    """What `Traced.nodes` is told of outputs that are like these."""
    return {"results": [v.dtype for v in values], "ranks": [v.rank for v in values]}


def _no_scale_beside_product(op_type: str, inputs: Sequence[Symbol]) -> None:
    """Refuse what ONNX Runtime computes wrongly.

    It folds a product with a number into the MatMul beside it, as float32 even among doubles (MatMulScaleFusion of
    1.31: off by 1e-8); and up to 1.22 it fuses a bare transpose and a product of doubles into one it has no kernel for.
    """

    def made_by(v: Symbol, *kinds: str) -> ir.Node | None:
        producer = v.value.producer()
        return producer if producer is not None and producer.op_type in kinds else None

    def is_number(v: ir.Value | None) -> bool:
        return v is not None and v.const_value is not None and v.const_value.size == 1

    if op_type in ("Mul", "Div") and any(is_number(v.value) for v in inputs):
        assert not any(made_by(v, "MatMul") for v in inputs), "a number times a product of matrices: state it otherwise"
    if op_type == "MatMul":
        for v in inputs:
            assert not made_by(v, "Transpose"), "a transpose right before a product: negate it, and the product"
            scaled = made_by(v, "Mul", "Div")
            assert scaled is None or not any(map(is_number, scaled.inputs)), "a number times a factor of a product"
