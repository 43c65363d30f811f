"""Functions of one number that a graph spells out operator by operator: convex or not, and why that is a proof.

Exported graphs hold log(1 + e^z) as max(z, 0) + log(1 + e^{−|z|}), leaky ReLU as Where(z > 0, z, z/100), and so on:
no single rule applies, since |z| falls where max(z, 0) is flat. On each side of z = 0 the rules do apply. So:

    1. cut the line wherever an affine argument of a kink (Abs, Max, a comparison, ..) changes sign;
    2. on every piece, apply the rules of `rules` with t the variable;
    3. join: g is convex if it is convex on every piece, continuous, and no slope falls where two pieces meet;
       it rises if it rises on every piece and is continuous.

Values and slopes at the cuts are computed in float64; two values count as the same if they differ by no more than the
graph's own dtype rounds them: 16 units. A jump of that size cannot be told from rounding by any number the graph can
return. (Torch's softplus has such a jump at its threshold.)
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity import rules
from icnnrt.convexity.rules import AFFINE, CONCAVE, CONVEX, FALLING, RISING, Fact
from icnnrt.format.onnx_graph import Node

Array: TypeAlias = NDArray[np.float64]

MAX_PIECES: Final = 16
UNITS: Final = 16.0  # of rounding
NEAR: Final = 8 * float(np.finfo(np.float64).eps)  # two cuts that differ by less, relative to either, are one


class Shape(NamedTuple):
    """What g is on an interval."""

    code: int  # CONVEX | CONCAVE
    trend: int  # RISING | FALLING


class _Cut(Exception):
    """The line must be cut at `at`."""

    def __init__(self, at: float) -> None:
        self.at = at


class _Stuck(Exception):
    """The rules do not reach this function."""


@dataclass(frozen=True, eq=False)
class _Term:
    """A number on one piece: what is known of it, and value and slope at three points.

    The first two are the ends of the piece, or points within where an end is infinite; the third is t = 0, on the piece
    or not, where an affine term shows its offset.
    """

    fact: Fact
    value: Array  # [3]
    slope: Array  # [3]

    @property
    def affine(self) -> bool:
        return bool(self.fact.code & AFFINE == AFFINE)


_Entry: TypeAlias = _Term | bool


def classify(
    target: str,
    variable: str,
    lo: float,
    hi: float,
    makers: Mapping[str, Node],
    number: Callable[[str], float | None],
    eps: float,
) -> Shape | None:
    """g with target = g(variable) on [lo, hi], or None.

    makers: the node that makes each value between the two. number(name): the one number that another value is known
    to be, None if it is not. eps: unit of rounding of the graph.
    """
    cuts: list[float] = []
    known: dict[tuple[float, float], _Whole] = {}  # a cut leaves the other pieces as they are
    while len(cuts) < MAX_PIECES:
        ends = [lo, *sorted(cuts), hi]
        try:
            for a, b in itertools.pairwise(ends):
                if (a, b) not in known:
                    known[a, b] = _Piece(variable, a, b, makers, number).finished(target)
        except _Cut as cut:
            cuts.append(cut.at)
            continue
        except _Stuck:
            return None
        return _join([known[piece] for piece in itertools.pairwise(ends)], ends, eps) if lo < hi else None
    return None


@dataclass(frozen=True)
class _Whole:
    """The target on one piece; `owned` says, for either end, whether each comparison that flips there holds at the end
    itself what it holds on this piece."""

    term: _Term
    owned: tuple[frozenset[bool], frozenset[bool]]


def _join(wholes: list[_Whole], ends: list[float], eps: float) -> Shape | None:
    pieces = [w.term for w in wholes]
    if not all(np.isfinite(p.value[:2]).all() and np.isfinite(p.slope[:2]).all() for p in pieces):
        return None
    for left, right in itertools.pairwise(wholes):
        # Where z < 0 and z > 0 both fail, at z = 0 alone, a third branch may be taken, which no piece has seen.
        mine, yours = left.owned[1], right.owned[0]
        if len(mine) > 1 or len(yours) > 1 or (mine and mine == yours):
            return None
    code, trends = CONVEX | CONCAVE, []
    for p in pieces:
        code &= int(p.fact.code)
        trends.append(int(p.fact.trend))
    for (one, other), at in zip(itertools.pairwise(pieces), ends[1:-1], strict=True):
        before, after = float(one.slope[1]), float(other.slope[0])
        steep = max(abs(before), abs(after))
        v, w = float(one.value[1]), float(other.value[0])
        # What rounds: the value in the dtype of the graph, and the place of the cut in float64.
        if abs(v - w) > UNITS * (eps * max(abs(v), abs(w)) + np.finfo(np.float64).eps * steep * abs(at)):
            return None
        if after < before - UNITS * eps * steep:
            code &= ~CONVEX
        if after > before + UNITS * eps * steep:
            code &= ~CONCAVE
    # Slopes of a convex function only grow, those of a concave one only fall.
    for i, p in enumerate(pieces):
        first, last = float(p.slope[0]), float(p.slope[1])
        low_end, high_end = np.isfinite(ends[i]), np.isfinite(ends[i + 1])
        if p.fact.code & CONVEX:
            trends[i] |= RISING * bool(low_end and first >= 0) | FALLING * bool(high_end and last <= 0)
        if p.fact.code & CONCAVE:
            trends[i] |= RISING * bool(high_end and last >= 0) | FALLING * bool(low_end and first <= 0)
    trend = RISING | FALLING
    for bits in trends:
        trend &= bits
    if code & CONVEX:
        trend |= trends[0] & RISING | trends[-1] & FALLING
    if code & CONCAVE:
        trend |= trends[0] & FALLING | trends[-1] & RISING
    return Shape(code & AFFINE, trend)


class _Piece:
    """The graph between t and the target, for t on [a, b]."""

    def __init__(
        self, variable: str, a: float, b: float, makers: Mapping[str, Node], number: Callable[[str], float | None]
    ) -> None:
        self.a, self.b = a, b
        self.makers = makers
        self.number = number
        low, high = np.isfinite(a), np.isfinite(b)
        first = a if low else (b - 1.0 if high else -1.0)
        last = b if high else (a + 1.0 if low else 1.0)
        t = _Term(rules.fact(a, b, AFFINE, 0, RISING), np.array([first, last, 0.0]), np.ones(3))
        self.middle = first + (last - first) / 2
        self.owned: tuple[set[bool], set[bool]] = (set(), set())
        self.found: dict[str, _Entry] = {variable: t}

    def finished(self, target: str) -> _Whole:
        with np.errstate(all="ignore"):
            term = self.term(target, 0)
        if isinstance(term, bool):
            raise _Stuck
        return _Whole(term, (frozenset(self.owned[0]), frozenset(self.owned[1])))

    def term(self, name: str, depth: int) -> _Entry:
        if name not in self.found:
            if depth > 64:
                raise _Stuck
            self.found[name] = self.made(name, depth)
        return self.found[name]

    def made(self, name: str, depth: int) -> _Entry:
        known = self.number(name)
        if known is not None:
            return _constant(known)
        node = self.makers.get(name)
        if node is None:
            raise _Stuck
        if node.op_type == "Where":
            condition, *branches = node.inputs
            chosen = self.term(condition, depth + 1)
            if isinstance(chosen, _Term):
                raise _Stuck
            # Only the branch that is taken must be within the rules.
            return self.term(branches[0] if chosen else branches[1], depth + 1)
        found = [self.term(one, depth + 1) for one in node.inputs if one]
        if node.op_type in _LOGIC:
            if not all(isinstance(one, bool) for one in found):
                raise _Stuck
            return _LOGIC[node.op_type](*found)
        given = [one for one in found if isinstance(one, _Term)]
        if len(given) < len(found):
            raise _Stuck
        if node.op_type in _COMPARISONS:
            return self.compare(node.op_type, *given)
        return self.operate(node, given, depth)

    def compare(self, op_type: str, a: _Term, b: _Term) -> bool:
        d = _subtract(a, b)
        greater, or_equal = op_type.startswith("Greater"), op_type.endswith("OrEqual")
        if d.fact.free:
            raise _Stuck
        if d.affine:
            side = self.side(d)
            if side == 0:
                raise _Stuck
            holds = (side > 0) == greater
            for end, at in enumerate((self.a, self.b)):
                if self.at_end(d, at):
                    self.owned[end].add(holds == or_equal)
            return holds
        above, below = bool(d.fact.lo > 0), bool(d.fact.hi < 0)
        if not above and not below:
            raise _Stuck
        return above == greater

    def at_end(self, d: _Term, end: float) -> bool:
        zero = -float(d.value[2]) / float(d.slope[0])
        return bool(np.isfinite(end)) and abs(zero - end) <= NEAR * abs(zero)

    def side(self, d: _Term) -> int:
        """The sign of d within this piece; 0 where it is not known or changes without being affine."""
        if d.fact.free or not d.affine:
            return 1 if d.fact.lo >= 0 else -1 if d.fact.hi <= 0 else 0
        slope, offset = float(d.slope[0]), float(d.value[2])
        if slope == 0 or not np.isfinite(slope) or not np.isfinite(offset):
            return 0
        zero = -offset / slope
        if self.a < zero < self.b and not self.at_end(d, self.a) and not self.at_end(d, self.b):
            raise _Cut(zero)
        return int(np.sign(offset + slope * self.middle))

    def operate(self, node: Node, terms: list[_Term], depth: int) -> _Term:
        op, attributes = node.op_type, node.attributes
        u = terms[0]
        if op in ("Max", "Min", "Clip"):
            return self.extreme(op, node, terms)
        if op in ("Relu", "Abs", "LeakyRelu", "Elu", "Celu"):
            side = self.side(u)
            if side == 0:
                raise _Stuck
            if side > 0:
                return u
            return {
                "Relu": lambda: _constant(0.0),
                "Abs": lambda: _scale(u, -1.0),
                "LeakyRelu": lambda: _scale(u, attributes.get("alpha", 0.01)),
                "Elu": lambda: _scaled_expm1(u, attributes.get("alpha", 1.0), 1.0),
                "Celu": lambda: _scaled_expm1(u, attributes.get("alpha", 1.0), attributes.get("alpha", 1.0)),
            }[op]()
        if op == "Div" and (argument := self.expm1_argument(node, depth + 1)) is not None:
            doubled = _scale(argument, 2.0)
            value = np.expm1(doubled.value)
            return _Term(rules.expm1(doubled.fact), value, (value + 1) * doubled.slope)
        if op in ("Mul", "Pow") and (op == "Pow" or node.inputs[0] == node.inputs[1]):
            if op == "Pow" and not terms[1].fact.free:
                raise _Stuck
            exponent = float(terms[1].value[0]) if op == "Pow" else 2.0
            slope = np.zeros(3) if exponent == 0 else exponent * np.power(u.value, exponent - 1) * u.slope
            return _Term(rules.power(u.fact, exponent), np.power(u.value, exponent), slope)
        rule = _DERIVATIVES.get(op)
        if rule is None:
            raise _Stuck
        value, slope = rule(*((t.value, t.slope) for t in terms))
        return _Term(rules.ENTRYWISE[op](*(t.fact for t in terms), **attributes), value, slope)

    def extreme(self, op: str, node: Node, terms: list[_Term]) -> _Term:
        result = terms[0]
        ways = [op] * (len(terms) - 1)
        if op == "Clip":
            # An optional bound may be left out by a blank name, which `terms` has no entry for.
            ways = [way for way, name in zip(("Max", "Min"), node.inputs[1:], strict=False) if name]
        for way, other in zip(ways, terms[1:], strict=True):
            side = self.side(_subtract(result, other)) if result is not other else 0
            if side:
                result = result if (side > 0) == (way == "Max") else other
                continue
            pick = result.value >= other.value if way == "Max" else result.value <= other.value
            function = rules.maximum if way == "Max" else rules.minimum
            joined = function(result.fact, other.fact)
            if joined.code & AFFINE == AFFINE:
                raise _Stuck  # which of the two it is would not be known at t = 0
            result = _Term(
                joined,
                np.where(pick, result.value, other.value),
                np.where(pick, result.slope, other.slope),
            )
        return result

    def expm1_argument(self, node: Node, depth: int) -> _Term | None:
        """u, if this is 2 tanh(u) / (1 − tanh(u)) = e^{2u} − 1."""
        top, bottom = (self.makers.get(name) for name in node.inputs)
        if top is None or bottom is None or top.op_type != "Mul" or bottom.op_type != "Sub":
            return None
        factors = [name for name in top.inputs if self.number(name) != 2.0]
        if len(factors) != 1 or self.number(bottom.inputs[0]) != 1.0 or bottom.inputs[1] != factors[0]:
            return None
        tanh = self.makers.get(factors[0])
        if tanh is None or tanh.op_type != "Tanh":
            return None
        argument = self.term(tanh.inputs[0], depth)
        return argument if isinstance(argument, _Term) else None


def _constant(number: float) -> _Term:
    return _Term(rules.constant(number), np.full(3, number), np.zeros(3))


def _scale(u: _Term, factor: float) -> _Term:
    return _Term(rules.multiply(u.fact, rules.constant(factor)), u.value * factor, u.slope * factor)


def _subtract(a: _Term, b: _Term) -> _Term:
    return _Term(rules.subtract(a.fact, b.fact), a.value - b.value, a.slope - b.slope)


def _scaled_expm1(u: _Term, alpha: float, scale: float) -> _Term:
    if not scale > 0:
        raise _Stuck
    inner = _scale(u, 1 / scale)
    value = np.expm1(inner.value)
    return _scale(_Term(rules.expm1(inner.fact), value, (value + 1) * inner.slope), alpha)


_COMPARISONS: Final = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LOGIC: Final[dict[str, Callable[..., bool]]] = {
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Not": lambda a: not a,
}

_Pair: TypeAlias = tuple[Array, Array]  # value and slope at two points


def _sigmoid(v: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * v))


def _chain(function: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Callable[..., _Pair]:
    return lambda u: (function(u[0]), derivative(u[0]) * u[1])


def _quotient(a: _Pair, b: _Pair) -> _Pair:
    return a[0] / b[0], (a[1] - a[0] / b[0] * b[1]) / b[0]


_DERIVATIVES: Final[dict[str, Callable[..., _Pair]]] = {
    "Add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "Sub": lambda a, b: (a[0] - b[0], a[1] - b[1]),
    "Mul": lambda a, b: (a[0] * b[0], a[1] * b[0] + a[0] * b[1]),
    "Div": _quotient,
    "Neg": lambda a: (-a[0], -a[1]),
    "Identity": lambda a: a,
    "Exp": _chain(np.exp, np.exp),
    "Cosh": _chain(np.cosh, np.sinh),
    "Log": _chain(np.log, np.reciprocal),
    "Sqrt": _chain(np.sqrt, lambda v: 0.5 / np.sqrt(v)),
    "Reciprocal": _chain(np.reciprocal, lambda v: -1 / np.square(v)),
    "Softplus": _chain(lambda v: np.logaddexp(0, v), _sigmoid),
    "Sigmoid": _chain(_sigmoid, lambda v: _sigmoid(v) * _sigmoid(-v)),
    "Tanh": _chain(np.tanh, lambda v: 1 - np.square(np.tanh(v))),
}
