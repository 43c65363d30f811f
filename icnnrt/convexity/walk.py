"""A walk through an energy's graph, from its inputs to f, that carries along what is known of every value.

Two probes, batches of different sizes with random numbers in them, give every value its shape and every value that
depends on weights alone its exact numbers. Nothing else is concluded from the numbers of a probe. An axis whose size
differs between the probes holds samples; an operator that would join, pick or sum along it is refused, and so is a
number made from the size of the batch unless it does nothing but shape another value: what holds for the batch that
was walked through then holds for every other.
"""

import copy
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity import rules
from icnnrt.convexity.onnx_numpy import (
    Unsupported,
    axes_of,
    convolve,
    einsum_equation,
    evaluate,
    given,
    normal,
    optional,
    promote,
    reduced_axes,
    run,
    take,
)
from icnnrt.convexity.rules import AFFINE, CONCAVE, CONVEX, FALLING, FREE, LOG_CONCAVE, RISING, Fact
from icnnrt.convexity.univariate import classify
from icnnrt.errors import LimitError
from icnnrt.format.onnx_graph import Graph, Node, ancestors
from icnnrt.limits import check
from icnnrt.printable import named

Tensor: TypeAlias = NDArray[Any]

MAX_BASES: Final = 16  # how many values back a function of one variable is looked for
MAX_QUADRATIC: Final = 128  # the largest n for which Hessians of quadratic values are formed
MAX_NUMBERS: Final = 1 << 25  # and the most numbers that may take
FACT: Final = 19  # bytes that are known of one number
NAME: Final = 64  # and of one name in a set of them
_BEYOND: Final = (1 << 31) - 1  # what exporters write for the end of an axis of any size

# Operators that are not finite everywhere, and of which operand that is told; of Pow it hangs on the exponent.
_BOUNDED: Final = {"Div": 1, "Reciprocal": 0, "Log": 0, "Sqrt": 0, "Pow": 0}

# How a value depends on y as a polynomial: each kind includes the ones before it.
_NONE, _LINEAR, _AFFINE, QUADRATIC, _OTHER = range(5)
# _LINEAR: affine with coefficients of y that are weights alone; _AFFINE: affine; QUADRATIC: of degree two, and its
# second-order coefficients are weights alone.

MOVERS: Final = frozenset(
    (
        "Identity",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Expand",
        "Tile",
        "Slice",
        "Split",
        "Gather",
        "GatherND",
    )
)
# Inputs, from the given one on, that the shape of the result is made from: it must not change with x or y.
_SHAPING: Final = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Slice", "Pad", "Split", "Squeeze", "Unsqueeze", "TopK"), 1),
    **dict.fromkeys(("ConstantOfShape", "Range"), 0),
}
_LARGER: Final = {"Greater": True, "GreaterOrEqual": True, "Less": False, "LessOrEqual": False}
_BOUNDS: Final = {"Max": -np.inf, "Min": np.inf}
_CLIP_BOUNDS: Final = {1: -np.inf, 2: np.inf}
_COMPARISONS: Final = frozenset(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"))
_SUMS: Final = frozenset(("ReduceSum", "ReduceMean", "AveragePool", "GlobalAveragePool", "CumSum"))
_LARGEST: Final = frozenset(("ReduceMax", "MaxPool", "GlobalMaxPool"))
# Operators that may work on numbers made from the size of the batch; of Mul, Add and Sub one operand only.
_SIZES: Final = frozenset(
    ("Identity", "Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Mul", "Add", "Sub", "Reshape")
)
# What these leave of a batch is no multiple of it: of 2 and of 3 samples it may be as much, of 4 more.
_ROUNDED: Final = frozenset(("Slice", "Split", "Conv", "AveragePool", "MaxPool", "TopK"))
# Where such numbers may end: (operator, index of the input).
_SHAPES: Final = frozenset((("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0)))


class Stop(Exception):
    """The walk cannot go on at `node`; the text says why, `blame` which weights are to blame."""

    def __init__(self, node: Node | None, why: str, blame: tuple[str, ...] = ()) -> None:
        super().__init__(why)
        self.node = node
        self.why = why
        self.blame = blame


def probe(graph: Graph, batch: int, seed: int) -> dict[str, Tensor]:
    """Initialisers, and random x and y for `batch` samples."""
    rng = np.random.default_rng(seed)
    values: dict[str, Tensor] = dict(graph.initializers)
    for i in graph.inputs:
        if i.name not in ("x", "y") or i.dtype is None or not i.shape or any(s is None for s in i.shape[1:]):
            raise Stop(None, f"the input {i.name[:40]!r} is not x or y, or its shape is not known but for the batch")
        shape = (batch if i.shape[0] is None else i.shape[0], *(s or 0 for s in i.shape[1:]))
        if i.shape[0] is not None or math.prod(shape) > MAX_NUMBERS:
            raise Stop(None, f"the input {i.name!r} has a fixed batch or impossible shape {list(shape)}")
        numbers = rng.random(shape)
        values[i.name] = (numbers if i.dtype.kind == "f" else numbers < 0.5).astype(i.dtype)
    return values


class Pole(Stop):
    """Weights make an operator infinite or not a number, or may do so; `blame` says which."""


class Walk:
    """Facts of every value that f is made from, for `batch` samples; `names` are the weights to be named.

    Weights in `loose` may be any numbers within the intervals given there, entry by entry, as x may: what the walk
    finds then holds for all of them, and not only for the numbers in the graph.

    `apart` tells, by what a node makes, which entries of its operand must be where it is finite with any of them.

    After `run`: facts["f"], and
    least: (number, names), the smallest weight that had to be >= 0 and was, and where it comes from
    broken: names of the weights of a wrong sign, node by node
    finite: of every node that is not finite everywhere, by what it makes, where it is for sure
    """

    def __init__(
        self,
        graph: Graph,
        names: Collection[str],
        batch: int,
        other: int,
        loose: Mapping[str, Fact] = MappingProxyType({}),
        apart: Mapping[str, NDArray[np.bool_]] = MappingProxyType({}),
    ) -> None:
        self.graph = graph
        self.apart = apart
        self.finite: dict[str, NDArray[np.bool_]] = {}
        self.changed: Collection[str] = loose.keys()  # weights that are not, or need not be, what they were
        self.nodes = tuple(ancestors(graph, "f"))
        self.batch = batch
        self.values = probe(graph, batch, 1)
        self.others = probe(graph, other, 2)
        self.known = set(graph.initializers) - loose.keys()
        self.facts: dict[str, Fact] = dict(loose)
        self.kinds: dict[str, int] = dict.fromkeys(loose, _NONE)
        self.bases: dict[str, tuple[str, ...]] = {}
        self.makers: dict[str, Node] = {}
        self.order: dict[str, int] = {}
        self.origins: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in names}
        self.stirred = False  # whether samples of x meet
        self.least: tuple[float, frozenset[str]] | None = None
        # By output: the names, how far beyond 0, and 1 for what should be >= 0, −1 for what should be <= 0.
        self.broken: dict[str, tuple[frozenset[str], float, int]] = {}
        for i in graph.inputs:
            shape = self.values[i.name].shape
            self.facts[i.name] = rules.anything(shape, AFFINE if i.name == "y" else FREE)
            self.kinds[i.name] = _LINEAR if i.name == "y" else _NONE

    def run(self) -> Fact:
        with np.errstate(all="ignore"):
            for node in self.nodes:
                self.stepped(node)
        return self.fact("f")

    def stepped(self, node: Node) -> None:
        check("the proof of convexity")
        try:
            self.step(node)
        except Unsupported as error:
            raise Stop(node, str(error)) from error
        except (Stop, LimitError):
            raise
        except MemoryError as error:
            raise Stop(node, "it takes more memory than there is") from error
        except Exception as error:  # of an operator that is used as nobody foresaw
            raise Stop(node, f"it cannot be followed ({str(error)[:120]})") from error

    def copied(self) -> "Walk":
        """The same walk, to go on with on its own."""
        other = copy.copy(self)
        for name in ("values", "others", "facts", "kinds", "bases", "origins", "broken", "finite"):
            setattr(other, name, dict(getattr(self, name)))
        return other

    def again(self, changed: Mapping[str, Tensor]) -> Fact:
        """The fact of f with other numbers for some weights, of the same shapes: of a walk that has been run, what
        depends on them is walked through once more."""
        self.least, self.broken, self.changed = None, {}, changed.keys()
        dirty = set(changed)
        for environment in (self.values, self.others):
            environment.update(changed)
        for name in changed:
            self.facts.pop(name, None)
        with np.errstate(all="ignore"):
            for node in self.nodes:
                if dirty.isdisjoint(node.inputs):
                    continue
                dirty.update(name for name in node.outputs if name)
                for name in node.outputs:
                    self.facts.pop(name, None)
                self.stepped(node)
        return self.fact("f")

    def fact(self, name: str) -> Fact:
        if name not in self.facts:
            take(FACT * self.values[name].size)
            self.facts[name] = rules.constant(self.values[name])
        return self.facts[name]

    # --- One node --------------------------------------------------------------------------------

    def step(self, node: Node) -> None:
        if node.domain:
            raise Unsupported(f"{node.op_type[:40]} is no operator of ONNX")
        read = [name for name in node.inputs if name]
        shaping = _SHAPING.get(node.op_type, 1 if node.op_type.startswith("Reduce") else len(node.inputs))
        if any(name and name not in self.known for name in node.inputs[shaping:]):
            raise Unsupported(f"the shape of what {node.op_type} makes depends on x or y")
        inputs = [self.values[name] if name else None for name in node.inputs]
        again = run(node, [self.others[name] if name else None for name in node.inputs])
        outputs = run(node, inputs)
        stirred = self.check_batch(node, inputs, outputs, again)
        if stirred:
            self.stirred = True
        for name, a, b in zip(node.outputs, outputs, again, strict=False):
            if not name:
                continue
            if a.ndim != b.ndim:
                raise Unsupported("the number of its dimensions depends on the size of the batch")
            take(a.nbytes + b.nbytes)
            self.values[name], self.others[name] = a, b
            self.makers[name] = node
            self.order[name] = len(self.order)
            self.origins[name] = frozenset().union(*(self.origins.get(one, frozenset()) for one in read))
            take(NAME * len(self.origins[name]))
        made = [name for name in node.outputs if name]
        if any(name not in self.values for name in made):
            raise Unsupported("an output beyond the first is not known here")
        known = node.op_type == "Shape" or (all(name in self.known for name in read) and not stirred)
        self.check_pole(node, known)
        if known:
            self.known.update(made)
            self.kinds.update(dict.fromkeys(made, _NONE))
            return
        if not self.free(node):
            self.check_finite(node)
        take(FACT * sum(array.size for array in outputs))
        facts = self.rule(node, inputs)
        if stirred:
            facts = [rules.anything(one.shape, FREE) for one in facts]
        for name, one in zip(node.outputs, facts, strict=False):
            if name:
                shape = self.values[name].shape
                if self.values[name].dtype.kind in "iu":
                    one = rules.unbent(one)  # integers wrap and truncate
                self.facts[name] = one.planes(lambda p, s=shape: np.broadcast_to(p, s))  # type: ignore[misc]
                self.kinds[name] = self.kind(node)
                self.improve(name, node)
        if node.op_type in WEIGHED:
            self.weigh(node)

    def check_finite(self, node: Node) -> None:
        """Infinite numbers, such as mask what is left out of a maximum, may meet only what is free of y.

        Besides, numbers may be compared with them, and clamped by them: z <= inf, max(z, −inf).
        """
        if node.op_type in _COMPARISONS:
            return
        for i, name in enumerate(node.inputs):
            if self.idle(node, i):
                continue
            if name in self.known and self.values[name].dtype.kind == "f" and not np.isfinite(self.values[name]).all():
                raise Stop(None, f"the weight {named(name)} holds numbers that are not finite")

    def check_pole(self, node: Node, known: bool) -> None:
        """Weights must not make an operator infinite for every x: no operand is outside of where it is finite, and
        where `apart` says that it is inside for sure, it still is.

        What x and y lead outside is the sample's own matter, and infinite numbers that are known and that nobody moves
        may be masks, which `check_finite` looks at where they meet y.
        """
        operand = _BOUNDED.get(node.op_type)
        if operand is None:
            return
        a = self.fact(node.inputs[operand])
        made = self.origins[node.outputs[0]]
        moved = not made.isdisjoint(self.changed)
        if node.op_type == "Pow":
            exponent = self.fact(node.inputs[1])
            if not self.origins.get(node.inputs[1], frozenset()).isdisjoint(self.changed) and (exponent.lo < 0).any():
                raise Pole(node, f"Pow is not finite at 0 where {_listed(made)} makes the exponent < 0", tuple(made))
            inside, outside = _of_power(a, exponent)
        elif node.op_type == "Sqrt":
            inside, outside = a.lo >= 0, a.hi < 0
        elif node.op_type == "Log":
            inside, outside = a.lo > 0, a.hi <= 0
        else:
            inside, outside = (a.lo > 0) | (a.hi < 0), (a.lo == 0) & (a.hi == 0)
        apart = self.apart.get(node.outputs[0])
        is_outside = (moved or not known) and bool(outside.any())
        if is_outside or (apart is not None and (apart & ~inside).any()):
            puts = "puts" if is_outside else "may put"
            raise Pole(node, f"{node.op_type} is not finite where {_listed(made)} {puts} it", tuple(made))
        take(inside.nbytes)
        self.finite[node.outputs[0]] = inside

    def idle(self, node: Node, i: int) -> bool:
        """Whether this operand of a maximum or minimum, infinite throughout, never is the result."""
        name = node.inputs[i]
        bound = _BOUNDS.get(node.op_type) or (_CLIP_BOUNDS.get(i) if node.op_type == "Clip" else None)
        return bound is not None and name in self.known and bool((self.values[name] == bound).all())

    def free(self, node: Node) -> bool:
        return all(self.fact(name).free.all() for name in node.inputs if name)

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

    def check_batch(
        self, node: Node, inputs: Sequence[Tensor | None], made: Sequence[Tensor], again: Sequence[Tensor]
    ) -> bool:
        """Whether samples meet, or count, in a value that is free of y; where they would in any other, `Unsupported`.

        Then it may be anything: its numbers in the probe are those of one batch.
        """
        if node.op_type == "Shape":
            return False
        everywhere = node.op_type == "Squeeze" and optional(inputs, 1) is None and "axes" not in node.attributes
        if everywhere and self.varying(node.inputs[0]):
            raise Unsupported("Squeeze without axes takes the batch away where it is 1")
        sized = [i for i, name in enumerate(node.inputs) if name and self.sized(name)]
        if sized and node.op_type == "Range":
            # A length that is at least 1 and grows with the batch, or not at all, is linear in it.
            counts = made[0].dtype.kind == "i" and 2 not in sized and abs(int(given(inputs, 2).reshape(-1)[0])) == 1
            if not counts or not made[0].size or not again[0].size:
                raise Unsupported("Range counts something else than the samples of the batch")
            return True
        for i in sized:
            if (node.op_type, i) in _SHAPES:
                continue
            if node.op_type == "Cast" and not (made[0].dtype.kind == "i" and made[0].dtype.itemsize >= 4):
                # Rounded, what two batches give may be one number that others do not give.
                raise Unsupported("Cast makes a real number of the size of the batch")
            if node.op_type not in _SIZES or (node.op_type in ("Mul", "Add", "Sub") and len(sized) > 1):
                raise Unsupported(f"{node.op_type} works on a number that depends on the size of the batch")
            if node.op_type in ("Gather", "Slice") and i > 0:
                raise Unsupported(f"{node.op_type} picks entries by the size of the batch")
            if not all(name in self.known for name in node.inputs if name):
                raise Unsupported(f"{node.op_type} brings the size of the batch into the energy")
        try:
            if node.op_type in ("Reshape", "Flatten"):
                self.check_reshape(node, made[0].shape, again[0].shape)
            for i, axes in _worked_axes(node, inputs):
                name = node.inputs[i]
                rank = self.values[name].ndim
                if self.varying(name) & {a % rank for a in axes if rank}:
                    raise Unsupported(f"{node.op_type} joins or picks samples of the batch")
        except Unsupported:
            # What x makes may be anything, of other samples' x too, but then no probe tells Hessians; weights must not
            # depend on the place in the batch.
            known = all(name in self.known for name in node.inputs if name)
            if known or not self.free(node) or node.op_type in _ROUNDED:
                raise
            return True
        return False

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

    # --- Rules -----------------------------------------------------------------------------------

    def rule(self, node: Node, inputs: Sequence[Tensor | None]) -> list[Fact]:
        op, attributes = node.op_type, node.attributes
        facts = [self.fact(name) if name else None for name in node.inputs]
        if op in ("Max", "Min", "Clip") and not self.free(node):
            facts = [
                None if name and self.idle(node, i) else f
                for i, (name, f) in enumerate(zip(node.inputs, facts, strict=True))
            ]
            facts = facts if op == "Clip" else [f for f in facts if f is not None]
        present = [f for f in facts if f is not None]
        a = facts[0]
        assert a is not None

        def with_first(plane: NDArray[Any]) -> tuple[Tensor, ...]:
            return run(node, [plane, *inputs[1:]])

        def first(plane: NDArray[Any]) -> Tensor:
            return with_first(plane)[0]

        if op in MOVERS and all(name in self.known for name in node.inputs[1:] if name):
            planes = [with_first(p) for p in (a.lo, a.hi, a.code, a.form, a.trend)]
            return [Fact(*parts) for parts in zip(*planes, strict=True)]
        if op == "Concat":
            planes = [run(node, p) for p in zip(*((f.lo, f.hi, f.code, f.form, f.trend) for f in present), strict=True)]
            return [Fact(*(p[0] for p in planes))]
        if op == "ScatterND" and node.inputs[1] in self.known and attributes.get("reduction", b"none") == b"none":
            data, put = a, present[2]
            pairs = zip(
                (data.lo, data.hi, data.code, data.form, data.trend),
                (put.lo, put.hi, put.code, put.form, put.trend),
                strict=True,
            )
            return [Fact(*(run(node, [p, inputs[1], q])[0] for p, q in pairs))]
        if op == "Where" and (joined := self.chosen(node)) is not None:
            return [joined]
        if op == "Mul" and any(self.is_sign(one, other) for one, other in (node.inputs, node.inputs[::-1])):
            return [rules.absolute(facts[1] if self.is_sign(*node.inputs) else a)]  # type: ignore[arg-type]
        if op == "Pad" and all(name in self.known for name in node.inputs[1:] if name):
            value = optional(inputs, 2)
            filled = rules.constant(0.0 if value is None else float(value.reshape(-1)[0]))
            parts = zip(
                (a.lo, a.hi, a.code, a.form, a.trend),
                (filled.lo, filled.hi, filled.code, filled.form, filled.trend),
                strict=True,
            )
            return [Fact(*(run(node, [p, inputs[1], np.asarray(c), *inputs[3:]])[0] for p, c in parts))]
        if op == "Cast":
            if self.keeps(node):
                return [a]
            # Steps, but of the same sign.
            return [rules.fact(np.where(a.lo >= 0, 0.0, -np.inf), np.inf, np.where(a.free, FREE, 0))]
        if op == "Clip":
            low, high = (facts[i] if i < len(facts) else None for i in (1, 2))
            a = a if low is None else rules.maximum(a, low)
            return [a if high is None else rules.minimum(a, high)]
        if op == "Mul" and node.inputs[0] == node.inputs[1]:
            return [rules.square(a)]
        if op in rules.ENTRYWISE:
            return [rules.ENTRYWISE[op](attributes, present)]
        if op == "MatMul":
            return [rules.bilinear(np.matmul, a, present[1])]
        if op == "Gemm":
            return [self.gemm(node, present, inputs)]
        if op == "Einsum" and len(present) == 2:
            equation = einsum_equation(attributes)
            return [rules.bilinear(lambda p, q: np.einsum(equation, p, q), a, present[1])]
        if op == "Conv":
            result = rules.bilinear(lambda p, q: convolve(p, q, attributes), a, present[1])
            if len(present) > 2:
                shape = (-1, *(1,) * (a.code.ndim - 2))
                result = rules.add(result, present[2].planes(lambda p: p.reshape(shape)))
            return [result]
        if op in _SUMS and all(name in self.known for name in node.inputs[1:] if name):
            return [rules.total(lambda mask: first(mask), a)]
        if op in _LARGEST:
            return [_largest(first, a)]
        if op == "ReduceMin":
            return [rules.negate(_largest(lambda p: -first(-p) if p.dtype.kind == "f" else first(p), rules.negate(a)))]
        if op in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "LogSoftmax", "Softmax"):
            return [self.composed(node, a, inputs)]
        if op == "BatchNormalization":
            shape = (-1, *(1,) * (a.code.ndim - 2))
            scale, shift, mean, variance = (f.planes(lambda p: p.reshape(shape)) for f in present[1:5])
            deviation = rules.root(rules.add(variance, rules.constant(float(attributes.get("epsilon", 1e-5)))))
            return [rules.add(rules.multiply(rules.divide(rules.subtract(a, mean), deviation), scale), shift)]
        # Whatever it does: of values free of y it makes values free of y.
        free = all(f.free.all() for f in present)
        return [rules.anything(self.values[name].shape, FREE if free else 0) for name in node.outputs if name]

    def chosen(self, node: Node) -> Fact | None:
        """A Where that takes the larger or the smaller of its branches, as torch writes maxima and PReLU.

        where(p > q, p, q) = max(p, q)
        where(u > 0, u, s·u) = max(u, s·u) for s <= 1, and min(u, s·u) for s >= 1
        """
        condition, yes, no = node.inputs
        test = self.makers.get(condition)
        if test is None or test.op_type not in _LARGER:
            return None
        p, q = test.inputs if _LARGER[test.op_type] else test.inputs[::-1]  # it is p > q or p >= q
        a, b = self.fact(yes), self.fact(no)
        if {p, q} == {yes, no}:
            return rules.maximum(a, b) if p == yes else rules.minimum(a, b)
        # u > 0 chooses `yes`, or 0 > u chooses `no`
        u, other = (yes, no) if self.number(q) == 0 else (no, yes)
        zero, tested = (q, p) if self.number(q) == 0 else (p, q)
        product = self.makers.get(other)
        if self.number(zero) != 0 or tested != u or product is None or product.op_type != "Mul":
            return None
        if u not in product.inputs or product.inputs[0] == product.inputs[1]:
            return None
        s = self.fact(product.inputs[1] if product.inputs[0] == u else product.inputs[0])
        if not s.free.all():
            return None
        s = s.planes(lambda plane: np.broadcast_to(plane, self.values[node.outputs[0]].shape))
        rest = rules.where(self.fact(condition), a, b)
        return rules.select(
            s.hi <= 1,
            *rules.stretched(rules.maximum(a, b), rules.select(s.lo >= 1, *rules.stretched(rules.minimum(a, b), rest))),
        )

    def is_sign(self, sign: str, of: str) -> bool:
        maker = self.makers.get(sign)
        return maker is not None and maker.op_type == "Sign" and maker.inputs[0] == of

    def keeps(self, cast: Node) -> bool:
        """Whether a Cast leaves numbers as they are, up to the rounding of y's own dtype."""
        to, source = self.values[cast.outputs[0]].dtype, self.values[cast.inputs[0]].dtype
        least = self.values["y"].dtype.itemsize
        return to.kind == "f" and (source.kind != "f" or to.itemsize >= min(source.itemsize, least))

    def gemm(self, node: Node, facts: list[Fact], inputs: Sequence[Tensor | None]) -> Fact:
        attributes = node.attributes
        a, b = (
            f.planes(lambda p: p.T) if attributes.get(transposed, 0) else f
            for f, transposed in zip(facts, ("transA", "transB"), strict=False)
        )
        result = rules.bilinear(np.matmul, a, b)
        result = rules.multiply(result, rules.constant(float(attributes.get("alpha", 1.0))))
        if len(facts) > 2:
            scaled = rules.multiply(facts[2], rules.constant(float(attributes.get("beta", 1.0))))
            result = rules.add(result, scaled)
        return result

    def composed(self, node: Node, a: Fact, inputs: Sequence[Tensor | None]) -> Fact:
        """Reductions that are made of simpler ones."""
        op, attributes = node.op_type, node.attributes
        if op in ("Softmax", "LogSoftmax"):
            axis = normal(attributes.get("axis", -1), a.code.ndim)
            sum_of = rules.total(lambda m: m.sum(axis, keepdims=True), rules.exponential(a))
            log = rules.subtract(a, rules.logarithm(sum_of))
            if op == "LogSoftmax":
                return rules.fact(-np.inf, np.maximum(log.hi, 0), log.code)
            form = np.where(log.has(CONCAVE), LOG_CONCAVE, 0)
            return rules.fact(0.0, 1.0, np.where(log.free, FREE, 0), form)
        axes = reduced_axes(attributes, inputs)
        if axes == ():
            raise Unsupported(f"{op} over no axis")
        keepdims = bool(attributes.get("keepdims", 1))

        def summed(f: Fact) -> Fact:
            return rules.total(lambda m: m.sum(axes, keepdims=keepdims), f)

        if op == "ReduceL1":
            return summed(rules.absolute(a))
        if op == "ReduceLogSumExp":
            return rules.logarithm(summed(rules.exponential(a)))
        squares = summed(rules.square(a))
        return rules.root(squares) if op == "ReduceL2" else squares

    # --- What a single rule misses ---------------------------------------------------------------

    def improve(self, name: str, node: Node) -> None:
        """Try functions of one variable, shifted log-sum-exps and quadratic forms where the rules left entries open."""
        self.find_bases(name, node)
        one = self.facts[name]
        if self.values[name].dtype.kind != "f":
            return
        if (one.code == 0).any() and node.op_type == "Add":
            self.claim(name, self.shifted_log_sum_exp(node))
        for base in reversed(self.bases.get(name, ())):
            if not (self.facts[name].code == 0).any():
                break
            self.claim(name, self.univariate(name, base))
        if (self.facts[name].code == 0).any() and self.kinds[name] == QUADRATIC:
            self.claim(name, self.quadratic(name))

    def claim(self, name: str, code: NDArray[Any] | None) -> None:
        """Every set bit is a claim that holds, so claims of two proofs add up."""
        if code is not None:
            f = self.facts[name]
            self.facts[name] = rules.fact(f.lo, f.hi, f.code | code, f.form, f.trend)

    def find_bases(self, name: str, node: Node) -> None:
        """The values of the same shape that this one is a function of, entry by entry, with fixed numbers besides."""
        if node.op_type not in rules.ENTRYWISE and node.op_type not in ("Clip", "Cast"):
            return
        if node.op_type == "Cast":
            if not self.keeps(node) or self.values[node.inputs[0]].dtype.kind != "f":
                return
            self.makers[name] = Node("Identity", node.name, "", node.inputs, node.outputs, {})
        common: set[str] | None = None
        for one in node.inputs:
            if not one or self.number(one) is not None:
                continue
            if one in self.known or self.facts[one].free.all():
                return
            reach = {one, *self.bases.get(one, ())}
            common = reach if common is None else common & reach
        shape = self.values[name].shape
        found = [b for b in common or () if self.values[b].shape == shape and self.values[b].dtype.kind == "f"]
        self.bases[name] = tuple(sorted(found, key=lambda b: self.order.get(b, -1))[-MAX_BASES:])

    def number(self, name: str) -> float | None:
        if name not in self.known:
            return None
        array = self.values[name]
        if array.size == 0 or array.dtype.kind == "b" or self.sized(name):
            return None
        first = array.flat[0]
        return float(first) if np.isfinite(first) and (array == first).all() else None

    def univariate(self, name: str, base: str) -> NDArray[Any] | None:
        u = self.fact(base)
        moving = ~u.free
        if not moving.any():
            return None
        eps = float(np.finfo(self.values[name].dtype).eps)
        lo, hi = float(u.lo[moving].min()), float(u.hi[moving].max())
        shape = classify(name, base, lo, hi, self.makers, self.number, eps)
        if shape is None:
            return None
        return rules.compose(
            u,
            -np.inf,
            np.inf,
            convex=bool(shape.code & CONVEX),
            concave=bool(shape.code & CONCAVE),
            rising=bool(shape.trend & RISING),
            falling=bool(shape.trend & FALLING),
        ).code

    def shifted_log_sum_exp(self, node: Node) -> NDArray[Any] | None:
        """m + log Σ exp(z − m) = log Σ exp(z), whatever m is, if it is one number for each sum."""
        for m, log in (node.inputs, node.inputs[::-1]):
            maker = self.makers.get(log)
            total = self.makers.get(maker.inputs[0]) if maker and maker.op_type == "Log" else None
            exp = self.makers.get(total.inputs[0]) if total and total.op_type == "ReduceSum" else None
            shift = self.makers.get(exp.inputs[0]) if exp and exp.op_type == "Exp" else None
            if not (total and shift and shift.op_type == "Sub"):
                continue
            z, within = shift.inputs
            inputs = [self.values[one] if one else None for one in total.inputs]
            axes = reduced_axes(total.attributes, inputs)
            shape = self.values[z].shape
            kept = tuple(1 if i in axes else s for i, s in enumerate(shape))
            same = self.stripped(m) == self.stripped(within)
            if axes and same and self.values[within].shape == kept and self.values[m].shape == self.values[log].shape:
                f = self.fact(z)
                keepdims = bool(total.attributes.get("keepdims", 1))
                summed = functools.partial(np.sum, axis=axes, keepdims=keepdims)
                result = rules.logarithm(rules.total(summed, rules.exponential(f)))
                if result.shape == self.values[log].shape:
                    return result.code
        return None

    def stripped(self, name: str) -> str:
        """The value that this one is, with dimensions of one added or taken away."""
        while (node := self.makers.get(name)) is not None and node.op_type in ("Identity", "Squeeze", "Unsqueeze"):
            name = node.inputs[0]
        return name

    # --- Quadratic values ------------------------------------------------------------------------

    def kind(self, node: Node) -> int:
        kinds = [self.kinds.get(name, _NONE) for name in node.inputs if name]
        op, most = node.op_type, max(kinds, default=_NONE)
        if most == _NONE:
            return _NONE
        if op == "Cast" and not self.keeps(node):
            return _OTHER
        if (op in MOVERS or op in _SUMS or op in ("Pad", "ScatterND")) and node.inputs[1:2]:
            where = node.inputs[1]
            if where and where not in self.known:
                return _OTHER  # which entries, depends on x or y
        if op in MOVERS or op in _SUMS or op in ("Add", "Sub", "Neg", "Concat", "Sum", "Pad", "ScatterND", "Cast"):
            return most
        if op == "Einsum" and len(kinds) != 2:
            return _OTHER  # a third operand is a factor, not a summand as it is of Gemm and Conv
        if op in ("Mul", "MatMul", "Gemm", "Einsum", "Conv") and len(kinds) >= 2:
            a, b = kinds[:2]
            if a == b == _LINEAR:
                product = QUADRATIC
            elif _NONE in (a, b) and node.inputs[0 if a == _NONE else 1] in self.known:
                product = max(a, b)
            elif _NONE in (a, b) and max(a, b) <= _AFFINE:
                product = _AFFINE
            else:
                product = _OTHER
            return max(product, *kinds[2:]) if len(kinds) > 2 else product
        if op == "Div" and kinds[1] == _NONE:
            return most if node.inputs[1] in self.known else (_AFFINE if most <= _AFFINE else _OTHER)
        if op == "Pow" and kinds[0] == _LINEAR and self.number(node.inputs[1]) == 2.0:
            return QUADRATIC
        if op == "ReduceSumSquare" and kinds[0] == _LINEAR:
            return QUADRATIC
        return _OTHER

    def hessians(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """[entries of one sample, n, n], of a quadratic value, and how much each may be off: differences in float64.

        H_jk = v(e_j + e_k) − v(e_j) − v(e_k) + v(0)
        """
        if self.stirred:
            return None
        y = self.values["y"]
        n = math.prod(y.shape[1:])
        varying = self.varying(name)
        size = self.values[name].size // max(self.batch, 1)
        rows = 1 + n + n * (n + 1) // 2
        if n > MAX_QUADRATIC or len(varying) != 1 or rows * size > MAX_NUMBERS or size * n * n > MAX_NUMBERS:
            return None
        (axis,) = varying
        j, k = np.triu_indices(n)
        eye = np.eye(n)
        points = np.concatenate([np.zeros((1, n)), eye, eye[j] + eye[k]])
        environment: dict[str, Tensor] = {one: self.values[one] for one in self.graph.initializers}
        environment["y"] = points.reshape(rows, *y.shape[1:])
        if "x" in self.values:
            environment["x"] = np.repeat(self.values["x"][:1], rows, 0)
        nodes = self.nodes[: self.nodes.index(self.makers[name]) + 1]
        try:
            values = evaluate(nodes, environment, float64=True, only=name)
        except Unsupported:  # so many points take too much memory
            return None
        v = np.moveaxis(values[name], axis, 0)
        if v.shape[0] != rows:
            return None
        v = v.reshape(rows, -1)
        H = np.empty((v.shape[1], n, n))
        H[:, j, k] = H[:, k, j] = (v[1 + n :] - v[1 + j] - v[1 + k] + v[0]).T
        noise = 8 * np.finfo(np.float64).eps * np.abs(v - v[0]).max(0) + np.finfo(np.float64).eps * np.abs(v[0])
        return (H, noise) if np.isfinite(H).all() else None

    def quadratic(self, name: str) -> NDArray[Any] | None:
        """CONVEX where the Hessian is positive semidefinite up to float64's rounding, CONCAVE where negative."""
        found = self.hessians(name)
        if found is None:
            return None
        H, noise = found
        eigenvalues = np.linalg.eigvalsh(H)
        largest = np.abs(eigenvalues).max(1)
        if (noise > 1e-12 * largest).any():
            return None  # lost in the rounding of the values it was computed from
        tolerance = 64 * np.finfo(np.float64).eps * H.shape[1] * largest
        code = np.where(eigenvalues[:, 0] >= -tolerance, CONVEX, 0) | np.where(
            eigenvalues[:, -1] <= tolerance, CONCAVE, 0
        )
        (axis,) = self.varying(name)
        shape = list(self.values[name].shape)
        shape[axis] = 1
        # Rows of H are entries of one sample in the order of the other axes.
        return np.broadcast_to(code.reshape(shape), self.values[name].shape)

    # --- Weights ---------------------------------------------------------------------------------

    def weigh(self, node: Node) -> None:
        """Note the known factors of values that are convex, not affine, in y: for a convex result they must be >= 0.

        Those whose product came out convex count for `least`, the others for `broken`. (Of values that are concave the
        same holds with the opposite sign.)
        """
        output = node.outputs[0]
        convex = self.fact(output).has(CONVEX)
        for here, there in ((0, 1), (1, 0)):
            known, other = node.inputs[here], node.inputs[there]
            if known not in self.known or other in self.known:
                continue
            code, names = self.fact(other).code, self.origins.get(known, frozenset())
            for wanted in (convex, ~convex):
                bent = code == CONVEX
                if wanted is not convex and self.broken:
                    bent = bent | (code == 0)  # behind a weight that broke a rule, more may
                margins = [
                    (float((sign * met).min()), sign)
                    for strict, sign in ((bent, 1), (code == CONCAVE, -1))
                    if strict.any() and wanted.any()
                    for met in [WEIGHED[node.op_type](node, promote(self.values[known]), strict, wanted, here)]
                    if met.size
                ]
                if not margins or not names:
                    continue
                least, sign = min(margins)
                if wanted is not convex:
                    if least < 0:
                        self.broken[output] = (names, least, sign)
                elif self.least is None or least < self.least[0]:
                    self.least = (least, names)

    # --- The end ---------------------------------------------------------------------------------

    def culprit(self, output: str = "f") -> tuple[Node | None, str]:
        """The first node back from f of which nothing is known although something is known of what it reads."""
        name = output
        while True:
            node = self.makers.get(name)
            if node is None:
                return None, name
            open_inputs = [
                one
                for one in node.inputs
                if one
                and one not in self.known
                and self.values[one].dtype.kind == "f"  # conditions bend nothing by themselves
                and (self.fact(one).code == 0).any()
            ]
            if not open_inputs:
                # Values that turned concave are told by the weights that turned them.
                turned = [one for one in node.inputs if one in self.broken]
                return (self.makers[turned[0]], turned[0]) if turned and name not in self.broken else (node, name)
            name = open_inputs[0]

    def why(self, node: Node, output: str) -> str:
        op = node.op_type
        if output in self.broken:
            names, least, sign = self.broken[output]
            should, bent = (">= 0", "convex") if sign > 0 else ("<= 0", "concave")
            return (
                f"{_listed(names)} should be {should} where it meets values that are {bent} in y, but reaches "
                f"{sign * least:.3g}"
            )
        dependent = [one for one in node.inputs if one and one not in self.known and not self.fact(one).free.all()]
        if op in ("Mul", "Div", "MatMul", "Gemm", "Einsum", "Conv"):
            if len(dependent) > 1:
                return "it multiplies two values that both depend on y"
            return "a factor that does not depend on y has no known sign, and what it scales is not affine in y"
        if output == "f" and not (self.fact(output).code == 0).any():
            return "f is concave in y"
        if op == "Where":
            return "it chooses by a condition on y, and the pieces are not known to join to a convex function"
        return "what it makes of values that depend on y is not known to be convex or concave"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(named, sorted(names))) or "a constant"


def _of_power(a: Fact, exponent: Fact) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where a^exponent is finite for sure, and where it is not for sure: 0 has no negative power, a number below 0 none
    that is no integer."""
    zero, whole = exponent.lo < 0, (exponent.lo == exponent.hi) & (exponent.lo == np.floor(exponent.lo))
    above = np.where(zero, a.lo > 0, a.lo >= 0)
    inside = above | (whole & np.where(zero, a.hi < 0, True))
    return inside, (zero & (a.lo == 0) & (a.hi == 0)) | (~whole & (a.hi < 0))


def _largest(first: Callable[[Tensor], Tensor], a: Fact) -> Fact:
    # As float, which pooling's padding with −∞ needs.
    return rules.extreme(lambda m: first(m.astype(np.float64)) > 0, a, first(a.lo), first(a.hi))


_Mask: TypeAlias = NDArray[np.bool_]


def _scaling(node: Node, known: Tensor, strict: _Mask, wanted: _Mask, here: int) -> Tensor:
    known, strict, wanted = np.broadcast_arrays(known, strict, wanted)
    return known[strict & wanted]


def _matrix(node: Node, known: Tensor, strict: _Mask, wanted: _Mask, here: int) -> Tensor:
    """Entries of a known factor that stand between a strict entry of the other and a wanted one of the product."""
    flags = [node.attributes.get(t, 0) if node.op_type == "Gemm" else 0 for t in ("transA", "transB")]
    known = known.T if flags[here] else known
    strict = strict.T if flags[1 - here] else strict
    if known.ndim != 2 or strict.ndim < 2 or wanted.ndim < 2:
        return known[:0]
    p, q = strict.astype(np.float64), wanted.astype(np.float64)
    if here == 1:
        return known[p.reshape(-1, p.shape[-1]).T @ q.reshape(-1, q.shape[-1]) > 0]
    joint = q @ p.swapaxes(-1, -2)
    return known[joint.reshape(-1, *joint.shape[-2:]).sum(0) > 0]


def _kernels(node: Node, known: Tensor, strict: _Mask, wanted: _Mask, here: int) -> Tensor:
    if here != 1:
        return known[:0]
    away = (0, *range(2, strict.ndim))
    groups = node.attributes.get("group", 1)
    met = [
        kernels[np.ix_(made, read)].reshape(-1)
        for kernels, made, read in zip(
            np.split(known, groups), np.split(wanted.any(away), groups), np.split(strict.any(away), groups), strict=True
        )
    ]
    return np.concatenate(met)


# (node, factor, which entries of the other operand, which of the product, index of the factor) -> the entries of the
# factor that stand between the two
WEIGHED: Final[Mapping[str, Callable[[Node, Tensor, _Mask, _Mask, int], Tensor]]] = {
    "Mul": _scaling,
    "MatMul": _matrix,
    "Gemm": _matrix,
    "Conv": _kernels,
}


def _worked_axes(node: Node, inputs: Sequence[Tensor | None]) -> list[tuple[int, Iterable[int]]]:
    """(index of an input, the axes along which the operator sums, joins or picks)."""
    op, attributes = node.op_type, node.attributes
    rank = given(inputs, 0).ndim if inputs else 0
    if op == "MatMul":
        return [(0, (-1,)), (1, (-2 if given(inputs, 1).ndim > 1 else -1,))]
    if op == "Gemm":
        return [(0, (0 if attributes.get("transA", 0) else 1,)), (1, (1 if attributes.get("transB", 0) else 0,))]
    if op.startswith("Reduce"):
        return [(0, reduced_axes(attributes, inputs))]
    if op in ("Softmax", "LogSoftmax"):
        return [(0, (attributes.get("axis", -1),))]
    if op == "LayerNormalization":
        return [(0, range(normal(attributes.get("axis", -1), rank), rank))]
    if op in ("Gather", "Split"):
        return [(0, (attributes.get("axis", 0),))]
    if op == "TopK":
        return [(0, (attributes.get("axis", -1),))]
    if op == "GatherND":
        batch = attributes.get("batch_dims", 0)
        return [(0, range(batch, batch + given(inputs, 1).shape[-1])), (1, (-1,))]
    if op == "ScatterND":
        index = given(inputs, 1)
        return [(0, range(index.shape[-1])), (1, range(index.ndim)), (2, range(index.ndim - 1))]
    if op == "EyeLike":
        return [(0, (0, 1))]
    if op == "CumSum":
        return [(0, (int(given(inputs, 1).reshape(-1)[0]),))]
    if op == "Concat":
        return [(i, (attributes["axis"],)) for i in range(len(inputs))]
    if op == "Slice":
        # Whole only if it is so for every size: y[0:3] is the whole of three samples, not of four.
        starts, ends, steps = given(inputs, 1), given(inputs, 2), optional(inputs, 4)
        axes = axes_of({}, inputs, rank, 3) or tuple(range(len(starts)))
        whole = [starts[i] == 0 and ends[i] >= _BEYOND and (steps is None or steps[i] == 1) for i in range(len(axes))]
        return [(0, [a for a, w in zip(axes, whole, strict=True) if not w])]
    if op == "Pad":
        pads = given(inputs, 1)
        axes = axes_of({}, inputs, rank, 3) or tuple(range(rank))
        return [(0, [a for i, a in enumerate(axes) if pads[i] or pads[i + len(axes)]])]
    if op == "Tile":
        return [(0, [i for i, r in enumerate(given(inputs, 1)) if r != 1])]
    if op in ("Conv", "AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "BatchNormalization"):
        every: list[tuple[int, Iterable[int]]] = [(0, range(1, rank))]
        return [*every, (1, range(given(inputs, 1).ndim))] if op == "Conv" else every
    if op == "Einsum":
        terms, result = einsum_equation(attributes).split("->")
        return [
            (i, [a for a, label in enumerate(term) if label not in result or term.count(label) > 1])
            for i, term in enumerate(terms.split(","))
        ]
    return []
