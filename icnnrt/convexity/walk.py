"""A walk through an energy's graph, from its inputs to f, that carries along what is known of every value.

Facts are of `rules`; `samples` has what is known of the batch, `quadratic` what is of degree two in y.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity import rules
from icnnrt.convexity.memory import Unsupported, take
from icnnrt.convexity.onnx_numpy import (
    along_channels,
    convolve,
    einsum_equation,
    normal,
    optional,
    promote,
    reduced_axes,
    run,
)
from icnnrt.convexity.quadratic import MOVERS, SUMS, Degree, curvature, degree
from icnnrt.convexity.rules import AFFINE, CONCAVE, CONVEX, FALLING, FREE, LOG_CONCAVE, RISING, Fact
from icnnrt.convexity.samples import ROUNDED, Probes, Stop
from icnnrt.convexity.univariate import classify
from icnnrt.convexity.weighing import WEIGHED
from icnnrt.errors import LimitError
from icnnrt.format.onnx_graph import Graph, Node, ancestors
from icnnrt.limits import check
from icnnrt.printable import named

Tensor: TypeAlias = NDArray[Any]

MAX_BASES: Final = 16  # how many values back a function of one variable is looked for
BYTES_PER_FACT: Final = 19  # bytes that are known of one number
BYTES_PER_NAME: Final = 64  # and of one name in a set of them

# Operators that are not finite everywhere, and of which operand that is told; of Pow it hangs on the exponent.
_BOUNDED: Final = {"Div": 1, "Reciprocal": 0, "Log": 0, "Sqrt": 0, "Pow": 0}

# Inputs, from the given one on, that the shape of the result is made from: it must not change with x or y.
_SHAPING: Final = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Slice", "Pad", "Split", "Squeeze", "Unsqueeze", "TopK"), 1),
    **dict.fromkeys(("ConstantOfShape", "Range"), 0),
}
_LARGER: Final = {"Greater": True, "GreaterOrEqual": True, "Less": False, "LessOrEqual": False}
_BOUNDS: Final = {"Max": -np.inf, "Min": np.inf}
_CLIP_BOUNDS: Final = {1: -np.inf, 2: np.inf}
_COMPARISONS: Final = frozenset(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"))
_LARGEST: Final = frozenset(("ReduceMax", "MaxPool", "GlobalMaxPool"))


class Pole(Stop):
    """Weights make an operator infinite or not a number, or may do so; `blame` says which."""


class Walk(Probes):
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
        super().__init__(graph, batch, other)
        self.apart = apart
        self.finite: dict[str, NDArray[np.bool_]] = {}
        self.changed: Collection[str] = loose.keys()  # weights that are not, or need not be, what they were
        self.nodes = tuple(ancestors(graph, "f"))
        self.known -= loose.keys()
        self.facts: dict[str, Fact] = dict(loose)
        self.kinds: dict[str, Degree] = dict.fromkeys(loose, Degree.NONE)
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
            self.kinds[i.name] = Degree.LINEAR if i.name == "y" else Degree.NONE

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
            take(BYTES_PER_FACT * self.values[name].size)
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
        stirred = self.stirs(node, inputs, outputs, again)
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
            take(BYTES_PER_NAME * len(self.origins[name]))
        made = [name for name in node.outputs if name]
        if any(name not in self.values for name in made):
            raise Unsupported("an output beyond the first is not known here")
        known = node.op_type == "Shape" or (all(name in self.known for name in read) and not stirred)
        self.check_pole(node, known)
        if known:
            self.known.update(made)
            self.kinds.update(dict.fromkeys(made, Degree.NONE))
            return
        if not self.free(node):
            self.check_finite(node)
        take(BYTES_PER_FACT * sum(array.size for array in outputs))
        facts = self.rule(node, inputs)
        if stirred:
            facts = [rules.anything(one.shape, FREE) for one in facts]
        for name, one in zip(node.outputs, facts, strict=False):
            if name:
                shape = self.values[name].shape
                if self.values[name].dtype.kind in "iu":
                    one = rules.unbent(one)  # integers wrap and truncate
                self.facts[name] = one.planes(lambda p, s=shape: np.broadcast_to(p, s))
                self.kinds[name] = degree(self, node)
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
                raise Pole(
                    node, f"Pow is not finite at 0 where {_listed(made)} makes the exponent < 0", tuple(sorted(made))
                )
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
            raise Pole(node, f"{node.op_type} is not finite where {_listed(made)} {puts} it", made)
        take(inside.nbytes)
        self.finite[node.outputs[0]] = inside

    def idle(self, node: Node, i: int) -> bool:
        """Whether this operand of a maximum or minimum, infinite throughout, never is the result."""
        name = node.inputs[i]
        bound = _BOUNDS.get(node.op_type) or (_CLIP_BOUNDS.get(i) if node.op_type == "Clip" else None)
        return bound is not None and name in self.known and bool((self.values[name] == bound).all())

    def free(self, node: Node) -> bool:
        return all(self.fact(name).free.all() for name in node.inputs if name)

    def stirs(
        self, node: Node, inputs: Sequence[Tensor | None], made: Sequence[Tensor], again: Sequence[Tensor]
    ) -> bool:
        """Whether samples meet, or count, in a value that is free of y; where they would in any other, `Unsupported`.

        Then it may be anything: its numbers in the probe are those of one batch.
        """
        if self.counts(node, inputs, made, again):
            return True
        try:
            self.check_apart(node, inputs, made, again)
        except Unsupported:
            # What x makes may be anything, of other samples' x too, but then no probe tells Hessians; weights must not
            # depend on the place in the batch.
            if self.constant(node) or not self.free(node) or node.op_type in ROUNDED:
                raise
            return True
        return False

    # --- Rules -----------------------------------------------------------------------------------

    def rule(self, node: Node, inputs: Sequence[Tensor | None]) -> list[Fact]:
        op, attributes = node.op_type, node.attributes
        facts: list[Any] = [self.fact(name) if name else None for name in node.inputs]
        if op in ("Max", "Min", "Clip") and not self.free(node):
            facts = [None if name and self.idle(node, i) else facts[i] for i, name in enumerate(node.inputs)]
            facts = facts if op == "Clip" else [f for f in facts if f is not None]
        a = facts[0]
        placed = all(name in self.known for name in node.inputs[1:] if name)  # where entries go, x and y have no say in

        def every(*planes: Any) -> tuple[Tensor, ...]:
            return run(node, [*planes, *inputs[len(planes) :]])

        def first(*planes: Any) -> Tensor:
            return every(*planes)[0]

        if op in MOVERS and placed:
            return [Fact(*parts) for parts in zip(*map(every, a), strict=True)]
        if op == "Concat":
            return [a.planes(first, *facts[1:])]
        if op == "ScatterND" and node.inputs[1] in self.known:
            return [a.planes(lambda p, q: first(p, inputs[1], q), facts[2])]
        if op == "Pad" and placed:
            value = optional(inputs, 2)
            filled = rules.constant(0.0 if value is None else float(value.reshape(-1)[0]))
            return [a.planes(lambda p, c: first(p, inputs[1], np.asarray(c)), filled)]
        if op == "Where" and (joined := self.chosen(node)) is not None:
            return [joined]
        if op == "Mul" and any(self.is_sign(one, other) for one, other in (node.inputs, node.inputs[::-1])):
            return [rules.absolute(facts[1] if self.is_sign(*node.inputs) else a)]
        if op == "Mul" and node.inputs[0] == node.inputs[1]:
            return [rules.square(a)]
        if op == "Cast":  # where it rounds, steps, but of the same sign
            steps = rules.fact(np.where(a.lo >= 0, 0.0, -np.inf), np.inf, np.where(a.free, FREE, 0))
            return [a if self.keeps(node) else steps]
        if op in rules.ENTRYWISE:
            return [rules.ENTRYWISE[op](*facts, **attributes)]
        if op == "MatMul":
            return [rules.bilinear(np.matmul, *facts)]
        if op == "Gemm":
            return [self.gemm(node, facts)]
        if op == "Einsum" and len(facts) == 2:
            equation = einsum_equation(attributes)
            return [rules.bilinear(lambda p, q: np.einsum(equation, p, q), *facts)]
        if op == "Conv":
            result = rules.bilinear(lambda p, q: convolve(p, q, attributes), *facts[:2])
            for bias in facts[2:]:
                result = rules.add(result, bias.planes(lambda p: along_channels(p, a.code.ndim)))
            return [result]
        if op in SUMS and placed:
            return [rules.total(first, a)]
        if op in _LARGEST:
            return [_largest(first, a)]
        if op == "ReduceMin":
            return [rules.negate(_largest(lambda p: -first(-p) if p.dtype.kind == "f" else first(p), rules.negate(a)))]
        if op in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "LogSoftmax", "Softmax"):
            return [self.composed(node, a, inputs)]
        if op == "BatchNormalization":
            scale, shift, mean, variance = (f.planes(lambda p: along_channels(p, a.code.ndim)) for f in facts[1:])
            deviation = rules.root(rules.add(variance, rules.constant(float(attributes.get("epsilon", 1e-5)))))
            return [rules.add(rules.multiply(rules.divide(rules.subtract(a, mean), deviation), scale), shift)]
        # Whatever it does: of values free of y it makes values free of y.
        return [rules.anything(self.values[name].shape, FREE * self.free(node)) for name in node.outputs if name]

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
        rest = rules.where(self.fact(condition), a, b)
        one_of_both = rules.select(s.hi <= 1, rules.maximum(a, b), rules.select(s.lo >= 1, rules.minimum(a, b), rest))
        return one_of_both.planes(lambda p: np.broadcast_to(p, self.values[node.outputs[0]].shape))

    def is_sign(self, sign: str, of: str) -> bool:
        maker = self.makers.get(sign)
        return maker is not None and maker.op_type == "Sign" and maker.inputs[0] == of

    def keeps(self, cast: Node) -> bool:
        """Whether a Cast leaves numbers as they are, up to the rounding of y's own dtype."""
        to, source = self.values[cast.outputs[0]].dtype, self.values[cast.inputs[0]].dtype
        least = self.values["y"].dtype.itemsize
        return to.kind == "f" and (source.kind != "f" or to.itemsize >= min(source.itemsize, least))

    def gemm(self, node: Node, facts: Sequence[Fact]) -> Fact:
        attributes = node.attributes
        a, b = (
            f.planes(np.transpose) if attributes.get(transposed, 0) else f
            for f, transposed in zip(facts, ("transA", "transB"), strict=False)
        )
        result = rules.multiply(rules.bilinear(np.matmul, a, b), rules.constant(float(attributes.get("alpha", 1.0))))
        for c in facts[2:]:
            result = rules.add(result, rules.multiply(c, rules.constant(float(attributes.get("beta", 1.0)))))
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
        if (self.facts[name].code == 0).any() and self.kinds[name] is Degree.QUADRATIC:
            self.claim(name, curvature(self, name))

    def claim(self, name: str, code: NDArray[Any] | None) -> None:
        """Every set bit is a claim that holds, so claims of two proofs add up."""
        if code is not None:
            f = self.facts[name]
            self.facts[name] = rules.fact(f.lo, f.hi, f.code | code, f.form, f.trend)

    def find_bases(self, name: str, node: Node) -> None:
        """The values of the same shape that this one is a function of, entry by entry, with fixed numbers besides."""
        if node.op_type not in rules.ENTRYWISE and node.op_type != "Cast":
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
