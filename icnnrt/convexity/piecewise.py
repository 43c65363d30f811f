"""A piecewise-linear convex energy as variables, linear inequalities and a linear objective, read off its graph.

With x given, every value of the graph is affine in y and in hidden variables t, up to operators that take a maximum.
Each entry of such a maximum becomes one t, held by the epigraphs of its pieces::

    t = max_k (a_k'(y, t_before) + b_k)    becomes    a_k'(y, t_before) + b_k <= t  for every k

Where the coefficients of all t in pieces and in f are >= 0, making a t smaller never makes f larger, so the minimum of
f over (y, t) is the minimum of f over y. That is checked here, entry by entry, and proves on its own that f is convex.
Values that do not depend on y (the x path, gates) are numbers, computed in float64; a maximum of numbers alone makes no
variable. A minimum is the negative of a maximum of negatives.

A choice by a sign, `where(d > 0, a, b)` or `a·sign(d)`, is max(a, b) if a − b is d times a number >= 0, which is tested
on the coefficients: so leaky ReLU and |z| look once they are exported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity.memory import Unsupported
from icnnrt.convexity.onnx_numpy import (
    convolve,
    einsum_equation,
    gemm_operands,
    optional,
    promote,
    reduced_axes,
    run,
    windows,
)
from icnnrt.convexity.quadratic import MOVERS, SUMS
from icnnrt.errors import InputError
from icnnrt.format.onnx_graph import Graph, Node, ancestors, read_graph
from icnnrt.printable import show

Array: TypeAlias = NDArray[np.float64]
Tensor: TypeAlias = NDArray[Any]

MAX_COEFFICIENTS: Final = 1 << 26  # of one value: half a gigabyte
# A choice by a sign is believed where the coefficients fit to so many units of rounding.
SAME_COEFFICIENTS: Final = 256 * float(np.finfo(np.float64).eps)
_REMEDY: Final = "keep to affine maps, relu, leaky_relu, abs and max in y, or solve with session.argmin"


@dataclass(frozen=True, eq=False)
class Affine:
    """const + Σ over blocks of Σ_j terms[block][j] · variable j of the block: [*shape], planes [P, *shape]."""

    const: Array
    terms: Mapping[int, Array]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.const.shape

    def moving(self) -> NDArray[np.bool_]:
        """Entries with a coefficient."""
        mask = np.zeros(self.shape, bool)
        for planes in self.terms.values():
            mask |= (planes != 0).any(0)
        return mask

    def map(self, function: Callable[[Array], Array]) -> "Affine":
        """A linear function of leading dimensions' own: f(const), f(planes) with the planes stacked in front."""
        return Affine(function(self.const), {b: function(planes) for b, planes in self.terms.items()})

    def scaled(self, factor: Tensor | float) -> "Affine":
        factor = np.asarray(factor, np.float64)
        shape = np.broadcast_shapes(self.shape, factor.shape)
        wide = self.broadcast(shape)
        return Affine(wide.const * factor, {b: planes * factor for b, planes in wide.terms.items()})

    def broadcast(self, shape: tuple[int, ...]) -> "Affine":
        if shape == self.shape:
            return self
        _check_size(sum(len(planes) for planes in self.terms.values()) * math.prod(shape))
        return Affine(
            np.broadcast_to(self.const, shape),
            {b: _wide(planes, self.shape, shape) for b, planes in self.terms.items()},
        )


def _check_size(numbers: int) -> None:
    """Refuse coefficients before they are made."""
    if numbers > MAX_COEFFICIENTS:
        raise Unsupported(f"needs {numbers} coefficients, more than {MAX_COEFFICIENTS}")


def _wide(planes: Array, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Array:
    padded = planes.reshape(len(planes), *(1,) * (len(wanted) - len(shape)), *shape)
    return np.broadcast_to(padded, (len(planes), *wanted))


@dataclass(frozen=True, eq=False)
class _Sign:
    """high where the value `name` minus `other` is positive, low where not; `difference` is that."""

    difference: Affine
    pair: frozenset[str]  # the names of what was compared
    first: str
    high: float
    low: float


_Value: TypeAlias = Affine | _Sign | Tensor
_Inputs: TypeAlias = Sequence[Any]  # of one node: a _Value each, None for one that is left out


@dataclass
class Hidden:
    """One block of hidden variables, a variable for each moving entry of one maximum."""

    name: str
    size: int
    lower: Array  # [size], the largest of the pieces that are numbers, or −inf
    pieces: list[tuple[NDArray[np.int64], Affine]] = field(default_factory=list)  # (variables, pieces [len(variables)])


class Walk:
    """f of one sample as an Affine of y (block 0) and hidden variables (blocks 1, 2, ...: `hidden[block]`)."""

    def __init__(self, graph: Graph, x: Tensor | None, n: int) -> None:
        self.graph = graph
        self.n = n
        self.hidden: dict[int, Hidden] = {}
        self.values: dict[str, _Value] = {name: promote(array) for name, array in graph.initializers.items()}
        shape = next((i.sizes for i in graph.inputs if i.name == "y"), None)
        if shape is None:
            raise InputError("epigraph: expected a value graph with an input y, but it has none; export it again.")
        y_shape = (1, *(s or 1 for s in shape[1:]))
        if n * n > MAX_COEFFICIENTS or math.prod(y_shape) != n:
            raise InputError(
                f"epigraph: expected y of {n} entries, and at most {math.isqrt(MAX_COEFFICIENTS)} of them, but the "
                f"value graph has it as {list(y_shape)}; solve with session.argmin."
            )
        self.values["y"] = Affine(np.zeros(y_shape), {0: np.eye(n).reshape(n, *y_shape)})
        if x is not None:
            self.values["x"] = promote(x[None])

    def run(self) -> Affine:
        """f as [1]. Raises `InputError` naming the operator that is not piecewise linear and convex."""
        nodes = tuple(ancestors(self.graph, "f"))
        last = {name: i for i, node in enumerate(nodes) for name in node.inputs}
        with np.errstate(all="ignore"):
            for i, node in enumerate(nodes):
                try:
                    outputs = self.step(node)
                except Unsupported as error:
                    raise _refusal(node, str(error)) from error
                except InputError:
                    raise
                except MemoryError as error:
                    raise _refusal(node, "takes more memory than there is") from error
                except Exception as error:  # of an operator that is used as nobody foresaw
                    raise _refusal(node, f"cannot be followed ({str(error)[:120]})") from error
                for name, value in zip(node.outputs, outputs, strict=False):
                    if name:
                        self.values[name] = value
                for name in node.inputs:
                    if last.get(name) == i and name not in ("x", "y"):
                        self.values.pop(name, None)
        f = self.values["f"]
        if isinstance(f, _Sign) or f.shape != (1,):
            raise InputError("epigraph: expected an energy f of one number a sample; export it again.")
        f = f if isinstance(f, Affine) else Affine(np.asarray(f, np.float64), {})
        self.check_monotone([f], nodes[-1] if nodes else None)
        return f

    # --- One node --------------------------------------------------------------------------------

    def step(self, node: Node) -> Sequence[_Value]:
        inputs: list[Any] = [self.values[name] if name else None for name in node.inputs]
        if not any(isinstance(v, Affine | _Sign) for v in inputs):  # numbers, whatever y is
            return [promote(a) for a in run(node, inputs)]
        if node.domain:
            raise Unsupported("is no operator of ONNX")
        if any(isinstance(v, _Sign) for v in inputs):
            return [self.with_sign(node, inputs)]
        op = node.op_type
        if op == "Shape":
            return run(node, [self.affine(inputs[0]).const])
        if op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
            a, b = (self.affine(v) for v in inputs)
            first, second = node.inputs
            if op.startswith("Less"):
                a, b, first, second = b, a, second, first
            return [_Sign(_add(a, b.scaled(-1.0)), frozenset((first, second)), first, 1.0, 0.0)]
        if op == "Sign":
            name = node.inputs[0]
            return [_Sign(self.affine(inputs[0]), frozenset((name,)), name, 1.0, -1.0)]
        if op in _BENT:
            return [self.bent(node, inputs)]
        return self.linear(node, inputs)

    def affine(self, value: _Value | None) -> Affine:
        if value is None or isinstance(value, _Sign):
            raise Unsupported("reads a value that jumps in y")
        return value if isinstance(value, Affine) else Affine(np.asarray(value, np.float64), {})

    def linear(self, node: Node, inputs: _Inputs) -> Sequence[_Value]:
        op, attributes = node.op_type, node.attributes
        moving = [i for i, v in enumerate(inputs) if isinstance(v, Affine)]
        a = inputs[0]
        if op in ("Add", "Sub", "Sum"):
            total = self.affine(a)
            for other in inputs[1:]:
                total = _add(total, self.affine(other).scaled(-1.0 if op == "Sub" else 1.0))
            return [total]
        if op == "Neg":
            return [self.affine(a).scaled(-1.0)]
        if op == "Identity" or (op == "Cast" and attributes.get("to") in (1, 11)):
            return [self.affine(a)]
        if op in ("Mul", "MatMul", "Gemm", "Einsum") and {0, 1} <= set(moving):
            raise Unsupported("multiplies two values that both depend on y")
        if op == "Mul":
            other = inputs[1 - moving[0]]
            return [self.affine(inputs[moving[0]]).scaled(other)]
        if op == "Where" and 0 not in moving:
            condition = np.asarray(inputs[0])
            a, b = self.affine(inputs[1]), self.affine(inputs[2])
            shape = np.broadcast_shapes(condition.shape, a.shape, b.shape)
            kept = a.broadcast(shape).map(lambda p: np.where(condition, p, 0.0))
            return [_add(kept, b.broadcast(shape).map(lambda p: np.where(condition, 0.0, p)))]
        if op == "Div" and moving == [0]:
            return [self.affine(a).scaled(1.0 / inputs[1])]
        if op == "MatMul":
            return [_product(np.matmul, inputs)]
        if op == "Gemm":
            product = _product(lambda p, q: np.matmul(*gemm_operands(attributes, p, q)), inputs, stacked=False)
            product = product.scaled(attributes.get("alpha", 1.0))
            C = optional(inputs, 2)
            return [product if C is None else _add(product, self.affine(C).scaled(attributes.get("beta", 1.0)))]
        if op == "Einsum" and len(inputs) == 2:
            equation = einsum_equation(attributes)
            return [_product(lambda p, q: np.einsum(equation, p, q), inputs, stacked=False)]
        if op == "Conv" and moving == [0]:
            W = inputs[1]
            result = _planewise(self.affine(a), lambda p: convolve(p, W, attributes))
            bias = optional(inputs, 2)
            if bias is None:
                return [result]
            return [_add(result, self.affine(bias.reshape(-1, *(1,) * (len(result.shape) - 2))))]
        if op == "Concat":
            parts = [self.affine(v) for v in inputs]
            axis = attributes["axis"]
            axis = axis + parts[0].const.ndim if axis < 0 else axis
            terms = {}
            for block in sorted({b for p in parts for b in p.terms}):
                P = next(len(p.terms[block]) for p in parts if block in p.terms)
                planes = [p.terms[block] if block in p.terms else np.zeros((P, *p.shape)) for p in parts]
                terms[block] = np.concatenate(planes, axis + 1)
            return [Affine(np.concatenate([p.const for p in parts], axis), terms)]
        if moving == [0] and (op in MOVERS or op in _LINEAR):
            value = self.affine(a)
            if op in MOVERS:
                return self.moved(node, value, inputs)
            offset = run(node, [np.zeros(value.shape), *inputs[1:]])[0]
            const = run(node, [value.const, *inputs[1:]])[0]

            def one(plane: Array) -> Array:
                result = run(node, [plane, *inputs[1:]])[0]
                return np.where(np.isfinite(offset), result - offset, 0.0)

            return [Affine(const, _planewise(value, one, const=False).terms)]
        raise Unsupported("is not piecewise linear in y, or not known to be")

    def moved(self, node: Node, value: Affine, inputs: _Inputs) -> list[Affine]:
        """By where each entry comes from: one gather for all planes."""
        where = np.arange(value.const.size).reshape(value.shape)
        return [_picked(value, index) for index in run(node, [where, *inputs[1:]])]

    # --- Maxima ----------------------------------------------------------------------------------

    def bent(self, node: Node, inputs: _Inputs) -> Affine:
        op, attributes = node.op_type, node.attributes
        a = self.affine(inputs[0])
        zero = Affine(np.zeros(()), {})
        match op:
            case "Relu":
                return self.maximum(node, [a, zero])
            case "Abs":
                return self.maximum(node, [a, a.scaled(-1.0)])
            case "Max":
                return self.maximum(node, [self.affine(v) for v in inputs])
            case "Min":
                return self.minimum(node, [self.affine(v) for v in inputs])
            case "LeakyRelu" | "PRelu":
                slope: Any = attributes.get("alpha", 0.01) if op == "LeakyRelu" else inputs[1]
                if isinstance(slope, Affine) or np.any(np.asarray(slope) > 1.0):
                    raise Unsupported("has a slope that exceeds 1 or depends on y, so it is not convex")
                return self.maximum(node, [a, a.scaled(np.asarray(slope))])
            case "Clip":
                low, high = (v if v is None else self.affine(v) for v in (*inputs[1:3], None, None)[:2])
                a = a if low is None else self.maximum(node, [a, low])
                return a if high is None else self.minimum(node, [a, high])
            case "ReduceL1" | "ReduceMax" | "ReduceMin":
                axes, keep = reduced_axes(attributes, [a.const, *inputs[1:]]), bool(attributes.get("keepdims", 1))
                if op == "ReduceL1":
                    inner = tuple(x - len(a.shape) for x in axes)
                    return self.maximum(node, [a, a.scaled(-1.0)]).map(lambda p: p.sum(inner, keepdims=keep))
                where = np.moveaxis(np.arange(a.const.size).reshape(a.shape), axes, range(len(axes)))
                rest = where.shape[len(axes) :]
                kept = tuple(1 if i in axes else s for i, s in enumerate(a.shape)) if keep else rest
                rows = where.reshape(math.prod(where.shape[: len(axes)]), *rest)
                pieces = [_picked(a, row.reshape(kept)) for row in rows]
                return (self.maximum if op == "ReduceMax" else self.minimum)(node, pieces)
            case _:  # MaxPool, GlobalMaxPool: −1 stands for padding, which is no piece
                kernel = a.shape[2:] if op == "GlobalMaxPool" else attributes["kernel_shape"]
                place = np.arange(float(a.const.size)).reshape(a.shape)
                view = windows(place, {} if op == "GlobalMaxPool" else attributes, kernel, -1.0).astype(np.int64)
                out = view.shape[: -len(kernel)]
                taps = np.moveaxis(view.reshape(*out, -1), -1, 0)
                return self.maximum(node, [_picked(a, tap) for tap in taps])

    def minimum(self, node: Node, pieces: Sequence[Affine]) -> Affine:
        return self.maximum(node, [p.scaled(-1.0) for p in pieces]).scaled(-1.0)

    def maximum(self, node: Node, pieces: Sequence[Affine]) -> Affine:
        """The entrywise maximum, with a new variable for each entry that has a piece that moves."""
        shape = np.broadcast_shapes(*(p.shape for p in pieces))
        pieces = [p.broadcast(shape) for p in pieces]
        moving = [p.moving() for p in pieces]
        numbers = np.max([np.where(m, -np.inf, p.const) for p, m in zip(pieces, moving, strict=True)], axis=0)
        several = np.sum([m | (p.const > -np.inf) for p, m in zip(pieces, moving, strict=True)], axis=0) > 1
        bent = np.logical_or.reduce(moving) & several
        flat = np.flatnonzero(bent)
        if len(flat) == 0 and len(pieces) == 1:
            return pieces[0]
        _check_size(len(flat) * math.prod(shape))
        variable = np.full(bent.size, -1)
        variable[flat] = np.arange(len(flat))
        hidden = Hidden(node.outputs[0], len(flat), numbers.reshape(-1)[flat])
        for p, m in zip(pieces, moving, strict=True):
            entries = np.flatnonzero(m & bent)
            if len(entries):
                rows = Affine(
                    p.const.reshape(-1)[entries],
                    {b: planes.reshape(len(planes), -1)[:, entries] for b, planes in p.terms.items()},
                )
                self.check_monotone([rows], node)
                hidden.pieces.append((variable[entries], rows))
        # Entries with one piece alone stay that piece.
        terms: dict[int, Array] = {}
        const = np.where(bent, 0.0, numbers).reshape(shape)
        for p, m in zip(pieces, moving, strict=True):
            alone = m & ~bent
            if alone.any():
                const = np.where(alone, p.const, const)
                for b, planes in p.terms.items():
                    terms[b] = terms.get(b, 0.0) + np.where(alone, planes, 0.0)
        if len(flat):
            block = len(self.hidden) + 1
            self.hidden[block] = hidden
            planes = np.zeros((len(flat), bent.size))
            planes[np.arange(len(flat)), flat] = 1.0
            terms[block] = planes.reshape(len(flat), *shape)
        return Affine(const, terms)

    def check_monotone(self, values: Sequence[Affine], node: Node | None) -> None:
        for value in values:
            for block, planes in value.terms.items():
                if block and (least := float(planes.min(initial=0.0))) < 0.0:
                    hidden = self.hidden[block].name
                    reader = f"its {node.op_type[:40]} {show(node.outputs[0])}" if node else "f"
                    raise InputError(
                        f"epigraph: expected f to grow with every maximum in it, but {reader} reads the one that "
                        f"{show(hidden)} makes with the factor {least:.3g}, so f is not proven convex; make the "
                        "weights between hidden layers non-negative (icnnrt repair), or write each activation as one "
                        "maximum."
                    )

    # --- Choices by a sign -----------------------------------------------------------------------

    def with_sign(self, node: Node, inputs: _Inputs) -> _Value:
        op = node.op_type
        signs = [v for v in inputs if isinstance(v, _Sign)]
        if op in MOVERS and len(signs) == 1 and inputs[0] is signs[0]:
            s = signs[0]
            return _Sign(self.moved(node, s.difference, inputs)[0], frozenset(), "", s.high, s.low)
        if op in ("Cast", "Identity"):
            return signs[0]
        if op == "Not":
            return _Sign(signs[0].difference.scaled(-1.0), signs[0].pair, "", 1.0, 0.0)
        if op == "Where" and isinstance(inputs[0], _Sign) and len(signs) == 1:
            a, b = self.affine(inputs[1]), self.affine(inputs[2])
            same = inputs[0].first == node.inputs[1] and inputs[0].pair == frozenset(node.inputs[1:])
            return self.choose(node, inputs[0].difference, a, b, same)
        if op == "Mul" and len(signs) == 1:
            a = self.affine(inputs[1] if isinstance(inputs[0], _Sign) else inputs[0])
            s = signs[0]
            return self.choose(node, s.difference, a.scaled(s.high), a.scaled(s.low), False)
        raise Unsupported("reads a value that jumps in y")

    def choose(self, node: Node, d: Affine, a: Affine, b: Affine, same: bool) -> Affine:
        """a where d > 0, b elsewhere; `same` where d is a − b by its name."""
        if not same:
            shape = np.broadcast_shapes(d.shape, a.shape, b.shape)
            D, difference = _rows(d.broadcast(shape)), _rows(_add(a, b.scaled(-1.0)).broadcast(shape))
            blocks = sorted({*D.terms, *difference.terms})

            def columns(v: Affine) -> Array:
                widths = [len(D.terms[k] if k in D.terms else difference.terms[k]) for k in blocks]
                parts = [
                    v.terms[k].T if k in v.terms else np.zeros((v.const.size, width))
                    for k, width in zip(blocks, widths, strict=True)
                ]
                return np.concatenate([*parts, v.const[:, None]], 1)

            P, R = columns(D), columns(difference)
            scale = np.abs(P).max(1)
            at = np.abs(P).argmax(1)
            rows = np.arange(len(P))
            ratio = np.where(scale > 0, R[rows, at] / np.where(scale > 0, P[rows, at], 1.0), 0.0)
            fits = (
                np.abs(R - ratio[:, None] * P)
                <= SAME_COEFFICIENTS * (np.abs(R).max(1) + scale * np.abs(ratio))[:, None]
            ).all(1)
            number = ~(P[:, :-1] != 0).any(1)  # the sign is one, whatever y is
            if not (fits | number).all():
                raise Unsupported("chooses by a condition on y, and the pieces are not known to join")
            if not ((ratio >= 0) | number).all():
                raise Unsupported("takes the smaller of two pieces, which is not convex in y")
            chosen = (number & (P[:, -1] > 0)).reshape(shape), (number & (P[:, -1] <= 0)).reshape(shape)
            # The piece that a number never chooses is none: −∞.
            a, b = (
                Affine(
                    np.where(never, -np.inf, v.const),
                    {k: np.where(never, 0.0, planes) for k, planes in v.terms.items()},
                )
                for v, never in ((a.broadcast(shape), chosen[1]), (b.broadcast(shape), chosen[0]))
            )
        return self.maximum(node, [a, b])


_BENT: Final = frozenset(
    (
        *("Relu", "LeakyRelu", "PRelu", "Abs", "Max", "Min", "Clip"),
        *("ReduceMax", "ReduceMin", "ReduceL1", "MaxPool", "GlobalMaxPool"),
    )
)
_LINEAR: Final = SUMS | {"BatchNormalization", "Pad", "Trilu"}


def is_piecewise_linear(data: bytes, weights: Mapping[str, Tensor], x: Tensor, n: int) -> bool:
    """Whether the value graph is affine maps and maxima in y, at this x."""
    try:
        Walk(read_graph(data, weights), x, n).run()
    except InputError:
        return False
    return True


def _refusal(node: Node, why: str) -> InputError:
    return InputError(
        f"epigraph: expected an energy that is piecewise linear in y, but its {node.op_type[:40]} "
        f"{show((node.outputs or ('',))[0])} {why}; {_REMEDY}."
    )


def _rows(v: Affine) -> Affine:
    return Affine(v.const.reshape(-1), {b: planes.reshape(len(planes), -1) for b, planes in v.terms.items()})


def _add(a: Affine, b: Affine) -> Affine:
    shape = np.broadcast_shapes(a.shape, b.shape)
    a, b = a.broadcast(shape), b.broadcast(shape)
    terms = dict(a.terms)
    for block, planes in b.terms.items():
        terms[block] = terms[block] + planes if block in terms else planes
    return Affine(a.const + b.const, terms)


def _picked(a: Affine, index: NDArray[Any]) -> Affine:
    """Entry index[...] of the flattened value at every place; −∞ where the index is −1."""
    _check_size(index.size * sum(len(planes) for planes in a.terms.values()))
    outside = index < 0
    const = np.where(outside, -np.inf, a.const.reshape(-1)[index])
    return Affine(
        const,
        {b: np.where(outside, 0.0, planes.reshape(len(planes), -1)[:, index]) for b, planes in a.terms.items()},
    )


def _planewise(a: Affine, function: Callable[[Array], Tensor], *, const: bool = True) -> Affine:
    first = np.asarray(function(a.const) if const else a.const, np.float64)
    terms = {}
    for block, planes in a.terms.items():
        _check_size(len(planes) * first.size)
        terms[block] = np.stack([np.asarray(function(plane), np.float64) for plane in planes])
    return Affine(first, terms)


def _product(product: Callable[[Tensor, Tensor], Tensor], inputs: _Inputs, *, stacked: bool = True) -> Affine:
    """A bilinear map with one operand that is a number; `stacked` where it takes leading dimensions."""
    p, q = inputs[:2]
    first = isinstance(p, Affine)
    value, other = (p, q) if first else (q, p)
    assert isinstance(value, Affine)
    assert isinstance(other, np.ndarray)

    def of(plane: Array) -> Tensor:
        return product(plane, other) if first else product(other, plane)

    if stacked and len(value.shape) >= 2 and other.ndim == 2:
        return value.map(lambda planes: np.asarray(of(planes), np.float64))
    return _planewise(value, of)
