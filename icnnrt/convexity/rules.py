"""Disciplined rules: what is known of every entry of a value, and what an operator makes of it.

For every entry of a value, as a function of the whole input y in R^n with x fixed but unknown:

    lo <= value <= hi          an interval, rounded outwards
    code                       CONVEX | CONCAVE in y; both: AFFINE; FREE: it does not depend on y
    form                       LOG_CONVEX, LOG_CONCAVE: the value is >= 0 and its logarithm is convex, concave
                               SUM_OF_SQUARES: it is ‖u‖² with every u_i affine, or convex and >= 0
    trend                      RISING | FALLING, as a function of one variable; known to `univariate` alone

A bit that is set is a claim that holds; a bit that is not set claims nothing. Every rule follows from the definitions
of convexity in real arithmetic and from the composition theorem (Boyd, Vandenberghe, Convex Optimization, 3.2.4):

    g convex,  and u affine, or g rising and u convex, or g falling and u concave   =>   g(u) convex

Entries are judged one by one, so a weight of zero switches off whatever stands behind it.

To add an activation that is one operator: its rule in ENTRYWISE and its values in `onnx_numpy`. One that graphs spell
out by several operators needs no rule of its own if `univariate` follows each of them: with its slope among
`_DERIVATIVES` there or, of an operator with a kink, in `operate`.
"""

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Bits: TypeAlias = NDArray[Any]  # small integers

CONVEX: Final = 1
CONCAVE: Final = 2
AFFINE: Final = 3
FREE: Final = 7

LOG_CONVEX: Final = 1
LOG_CONCAVE: Final = 2
SUM_OF_SQUARES: Final = 4

# The least number above zero: an upper bound that underflowed to zero would make a value look constant.
TINY: Final = 5e-324

RISING: Final = 1
FALLING: Final = 2


class Fact(NamedTuple):
    """What is known of every entry of a value; all arrays have its shape."""

    lo: Array
    hi: Array
    code: Bits
    form: Bits
    trend: Bits

    @property
    def shape(self) -> tuple[int, ...]:
        return self.code.shape

    @property
    def free(self) -> Mask:
        return self.code == FREE

    def has(self, bits: int) -> Mask:
        return (self.code & bits) == bits

    def planes(self, function: Callable[..., NDArray[Any]], *others: "Fact") -> "Fact":
        """Entries moved about by `function`, which treats every array alike, and may take some from `others`."""
        return Fact(*map(function, self, *others))


def fact(lo: Array | float, hi: Array | float, code: Bits | int, form: Bits | int = 0, trend: Bits | int = 0) -> Fact:
    """A fact from its parts, broadcast, with what they imply of one another."""
    low, high, codes, forms, trends = np.broadcast_arrays(
        np.asarray(lo, np.float64),
        np.asarray(hi, np.float64),
        np.asarray(code, np.uint8),
        np.asarray(form, np.uint8),
        np.asarray(trend, np.uint8),
    )
    low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
    # Infinite numbers, which only weights can be, obey no rule of signs.
    low, high = np.where(low == np.inf, -np.inf, low), np.where(high == -np.inf, np.inf, high)
    still = low == high
    free = (codes == FREE) | still
    forms = np.where(low >= 0, np.where(free, 7, forms), 0).astype(np.uint8)
    implied = np.where(forms & (LOG_CONVEX | SUM_OF_SQUARES), CONVEX, 0)
    codes = np.where(free, FREE, codes | implied).astype(np.uint8)
    return Fact(low, high, codes, forms, np.where(free, RISING | FALLING, trends).astype(np.uint8))


def constant(value: NDArray[Any] | float) -> Fact:
    """A value that is known."""
    number = np.asarray(value, np.float64)
    unknown = ~np.isfinite(number)
    return fact(np.where(unknown, -np.inf, number), np.where(unknown, np.inf, number), FREE)


def anything(shape: tuple[int, ...], code: int, lo: float = -np.inf, hi: float = np.inf) -> Fact:
    return fact(np.full(shape, lo), np.full(shape, hi), code)


def swapped(bits: Bits) -> Bits:
    """CONVEX <-> CONCAVE, or RISING <-> FALLING: what becomes of −u."""
    return ((bits & 1) << 1 | (bits >> 1) & 1 | bits & 4).astype(np.uint8)


# Four units in the last place: above what numpy's own functions are off by.
def down(lo: Array) -> Array:
    return np.where(np.isfinite(lo) & (lo != 0), lo - 4 * np.spacing(np.abs(lo)), lo)


def up(hi: Array) -> Array:
    return np.where(np.isfinite(hi) & (hi != 0), hi + 4 * np.spacing(np.abs(hi)), hi)


def sum_down(p: Array, q: Array) -> Array:
    """p + q rounded down, and not at all where the sum is exact: so that 1 + e^u stays >= 1."""
    s = p + q
    back = s - p
    error = (p - (s - back)) + (q - back)  # p + q − s, exactly (Knuth)
    return np.where(error < 0, np.nextafter(s, -np.inf), s)


def select(condition: Mask, a: Fact, b: Fact) -> Fact:
    def picked(p: NDArray[Any], q: NDArray[Any]) -> NDArray[Any]:
        return np.where(condition, p, q)

    return a.planes(picked, b)


def gathered(ufunc: np.ufunc, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The adjoint of broadcasting: what a result gives, for an operand of this shape that was broadcast to it."""
    values = ufunc.reduce(values, tuple(range(values.ndim - len(shape))))
    stretched = tuple(i for i, s in enumerate(shape) if s == 1 and values.shape[i] != 1)
    return ufunc.reduce(values, stretched, keepdims=True)


def compose(
    u: Fact,
    lo: Array | float,
    hi: Array | float,
    *,
    convex: Mask | bool = False,
    concave: Mask | bool = False,
    rising: Mask | bool = False,
    falling: Mask | bool = False,
    form: Bits | int = 0,
    besides: Bits | int = 0,
) -> Fact:
    """g(u) for a g with these properties on the interval of u; `besides` are bits of its code that hold anyway."""
    affine, cvx, ccv = u.has(AFFINE), u.has(CONVEX), u.has(CONCAVE)
    is_convex = convex & (affine | rising & cvx | falling & ccv)
    is_concave = concave & (affine | rising & ccv | falling & cvx)
    code = np.where(u.free, FREE, is_convex * CONVEX | is_concave * CONCAVE | besides)
    trend = np.where(rising, u.trend, 0) | np.where(falling, swapped(u.trend), 0)
    return fact(lo, hi, code, form, trend)


# --- Entry by entry ------------------------------------------------------------------------------


def add(a: Fact, b: Fact) -> Fact:
    lo, hi = sum_down(a.lo, b.lo), -sum_down(-a.hi, -b.hi)
    return fact(lo, hi, a.code & b.code, a.form & b.form & (LOG_CONVEX | SUM_OF_SQUARES), a.trend & b.trend)


def negate(a: Fact) -> Fact:
    return fact(-a.hi, -a.lo, swapped(a.code), 0, swapped(a.trend))


def subtract(a: Fact, b: Fact) -> Fact:
    return add(a, negate(b))


def multiply(a: Fact, b: Fact) -> Fact:
    """A factor that is free of y scales the other by its sign; of two that depend on y little can be said."""
    corners = [np.where((p == 0) | (q == 0), 0.0, p * q) for p in (a.lo, a.hi) for q in (b.lo, b.hi)]
    lo, hi = down(np.minimum.reduce(corners)), up(np.maximum.reduce(corners))
    # The signs themselves, which underflow would lose.
    same = (a.lo >= 0) & (b.lo >= 0) | (a.hi <= 0) & (b.hi <= 0)
    lo = np.where(same, np.maximum(lo, 0), lo)
    lo = np.where((a.lo < 0) & (b.hi > 0) | (a.hi > 0) & (b.lo < 0), np.minimum(lo, -TINY), lo)
    hi = np.where((a.lo < 0) & (b.lo < 0) | (a.hi > 0) & (b.hi > 0), np.maximum(hi, TINY), hi)
    either = a.free | b.free
    s, u = select(a.free, a, b), select(a.free, b, a)  # s is free, if either is
    code = np.where(s.lo >= 0, u.code, np.where(s.hi <= 0, swapped(u.code), np.where(u.has(AFFINE), AFFINE, 0)))
    code = np.where(u.free, FREE, code)
    trend = np.where(s.lo >= 0, u.trend, np.where(s.hi <= 0, swapped(u.trend), 0))
    # (uv)'' = u''v + 2u'v' + uv'': nonnegative factors, convex, that rise or fall together
    together = a.trend & b.trend
    positive = (a.lo >= 0) & (b.lo >= 0)
    product = positive & (together > 0) & a.has(CONVEX) & b.has(CONVEX)
    form = a.form & b.form & np.where(either, 7, LOG_CONVEX | LOG_CONCAVE)
    return fact(
        lo,
        hi,
        np.where(either, code, product * CONVEX),
        form,
        np.where(either, trend, np.where(positive, together, 0)),
    )


def reciprocal(a: Fact) -> Fact:
    positive, negative = a.lo >= 0, a.hi <= 0
    lo = np.where(positive | negative, 1 / np.where(a.hi == 0, -0.0, a.hi), -np.inf)
    hi = np.where(positive | negative, 1 / np.where(a.lo == 0, 0.0, a.lo), np.inf)
    lo = np.where(positive, np.maximum(down(lo), 0), down(lo))
    hi = np.where(negative, np.minimum(up(hi), 0), up(hi))
    form = np.where(positive, swapped(a.form & (LOG_CONVEX | LOG_CONCAVE)), 0)
    return compose(a, lo, hi, convex=positive, concave=negative, falling=positive | negative, form=form)


def divide(a: Fact, b: Fact) -> Fact:
    return multiply(a, reciprocal(b))


def square(a: Fact) -> Fact:
    positive, negative = a.lo >= 0, a.hi <= 0
    hi = np.maximum(np.square(a.lo), np.square(a.hi))
    hi = np.where((a.lo == 0) & (a.hi == 0), 0, np.maximum(hi, TINY))
    lo = np.where(positive, np.square(a.lo), np.where(negative, np.square(a.hi), 0))
    of_squares = a.has(AFFINE) | positive & a.has(CONVEX) | negative & a.has(CONCAVE)
    form = a.form & (LOG_CONVEX | LOG_CONCAVE) | of_squares * SUM_OF_SQUARES
    return compose(a, np.maximum(down(lo), 0), up(hi), convex=True, rising=positive, falling=negative, form=form)


def power(a: Fact, exponent: float) -> Fact:
    positive, negative = a.lo >= 0, a.hi <= 0
    if exponent == 0:
        return constant(np.ones(a.shape))
    if exponent == 1:
        return a
    if exponent == 2:
        return square(a)
    if exponent == 0.5:
        return root(a)
    logs = a.form & (LOG_CONVEX | LOG_CONCAVE)
    if exponent < 0:
        return reciprocal(power(a, -exponent))
    if exponent == int(exponent) and exponent % 2 == 0:
        return compose(a, 0.0, np.inf, convex=True, rising=positive, falling=negative, form=np.where(positive, logs, 0))
    if exponent == int(exponent):
        lo, hi = np.where(positive, 0.0, -np.inf), np.where(negative, 0.0, np.inf)
        return compose(a, lo, hi, convex=positive, concave=negative, rising=True, form=np.where(positive, logs, 0))
    # A root: not a number below zero.
    lo = np.where(positive, 0.0, -np.inf)
    return compose(
        a,
        lo,
        np.inf,
        convex=positive & (exponent > 1),
        concave=positive & (exponent < 1),
        rising=positive,
        form=np.where(positive, logs, 0),
    )


def exponential(a: Fact) -> Fact:
    form = a.code & (CONVEX | CONCAVE)  # LOG_CONVEX where a is convex, LOG_CONCAVE where it is concave
    hi = np.maximum(up(np.exp(a.hi)), TINY)
    return compose(a, np.maximum(down(np.exp(a.lo)), 0), hi, convex=True, rising=True, form=form)


def hyperbolic_cosine(a: Fact) -> Fact:
    """½ (e^u + e^−u): its logarithm is convex, and rises where u >= 0."""
    rising, falling = a.lo >= 0, a.hi <= 0
    logs = a.has(AFFINE) | rising & a.has(CONVEX) | falling & a.has(CONCAVE)
    return compose(a, 1.0, np.inf, convex=True, rising=rising, falling=falling, form=logs * LOG_CONVEX)


def logarithm(a: Fact) -> Fact:
    positive = a.lo >= 0
    lo = np.where(positive, down(np.log(np.maximum(a.lo, 0))), -np.inf)
    hi = np.where(positive, up(np.log(np.maximum(a.hi, 0))), np.inf)
    of_logs = np.where(positive, a.form & (LOG_CONVEX | LOG_CONCAVE), 0)
    return compose(a, lo, hi, concave=positive, rising=positive, besides=of_logs)


def root(a: Fact) -> Fact:
    positive = a.lo >= 0
    lo = np.where(positive, np.maximum(down(np.sqrt(np.maximum(a.lo, 0))), 0), -np.inf)
    hi = np.where(positive, up(np.sqrt(np.maximum(a.hi, 0))), np.inf)
    logs = np.where(positive, a.form & (LOG_CONVEX | LOG_CONCAVE), 0)
    # ‖u‖ of a vector whose entries are affine, or convex and >= 0
    norm = np.where(a.form & SUM_OF_SQUARES, CONVEX, 0)
    return compose(a, lo, hi, concave=positive, rising=positive, form=logs, besides=norm)


def maximum(a: Fact, b: Fact) -> Fact:
    code = np.where(a.free & b.free, FREE, a.code & b.code & CONVEX)
    either = fact(
        np.maximum(a.lo, b.lo),
        np.maximum(a.hi, b.hi),
        code,
        a.form & b.form & LOG_CONVEX,
        a.trend & b.trend,
    )
    # One that is never below the other is the maximum.
    return select(a.lo >= b.hi, a, select(b.lo >= a.hi, b, either))


def minimum(a: Fact, b: Fact) -> Fact:
    return negate(maximum(negate(a), negate(b)))


ZERO: Final = constant(0.0)


def relu(a: Fact) -> Fact:
    return maximum(a, ZERO)


def absolute(a: Fact) -> Fact:
    positive, negative = a.lo >= 0, a.hi <= 0
    kept = compose(
        a,
        0.0,
        np.maximum(np.abs(a.lo), np.abs(a.hi)),
        convex=True,
        rising=positive,
        falling=negative,
    )
    return select(positive, a, select(negative, negate(a), kept))


def leaky(a: Fact, slope: float) -> Fact:
    """u for u >= 0, slope·u below: the larger of the two where slope <= 1, the smaller where it is >= 1."""
    scaled = multiply(a, constant(slope))
    lo, hi = np.minimum(a.lo, scaled.lo), np.maximum(a.hi, scaled.hi)
    lo, hi = np.where(a.lo >= 0, a.lo, lo), np.where(a.hi <= 0, scaled.hi, hi)
    kept = compose(a, lo, hi, convex=slope <= 1, concave=slope >= 1, rising=(slope >= 0) | (a.lo >= 0))
    return select(a.lo >= 0, a, select(a.hi <= 0, scaled, kept))


def elu(a: Fact, alpha: float, scale: float) -> Fact:
    """u for u >= 0, alpha (e^{u/scale} − 1) below: slopes alpha/scale and 1 meet at 0."""
    good = alpha >= 0 and scale > 0
    lo = np.where(a.lo >= 0, a.lo, -abs(alpha) if good else -np.inf)
    hi = np.where(a.hi <= 0, 0.0, a.hi) if good else np.inf
    below = a.hi <= 0
    return compose(a, lo, hi, convex=good and ((alpha <= scale) | below), rising=good)


def softplus(a: Fact) -> Fact:
    lo = np.maximum(down(np.logaddexp(0, a.lo)), np.maximum(a.lo, 0))
    return compose(a, lo, np.maximum(up(np.logaddexp(0, a.hi)), TINY), convex=True, rising=True)


def sigmoid(a: Fact) -> Fact:
    # log σ is concave and rises; σ itself bends at 0.
    form = np.where(a.has(CONCAVE), LOG_CONCAVE, 0)
    lo, hi = (np.where(v >= 0, 1 / (1 + np.exp(-v)), np.exp(v) / (1 + np.exp(v))) for v in (a.lo, a.hi))
    lo, hi = np.where(a.lo == -np.inf, 0.0, lo), np.where(a.hi == np.inf, 1.0, hi)
    lo, hi = np.clip(down(lo), 0, 1), np.clip(up(hi), TINY, 1)
    lo, hi = np.where(np.isnan(lo), 0.0, lo), np.where(np.isnan(hi), 1.0, hi)
    return compose(a, lo, hi, convex=a.hi <= 0, concave=a.lo >= 0, rising=True, form=form)


def tangent(a: Fact) -> Fact:
    lo, hi = np.maximum(down(np.tanh(a.lo)), -1), np.minimum(up(np.tanh(a.hi)), 1)
    return compose(a, lo, hi, convex=a.hi <= 0, concave=a.lo >= 0, rising=True)


def error_function(a: Fact) -> Fact:
    lo, hi = np.where(a.lo >= 0, 0.0, -1.0), np.where(a.hi <= 0, 0.0, 1.0)
    return compose(a, lo, hi, convex=a.hi <= 0, concave=a.lo >= 0, rising=True)


def expm1(a: Fact) -> Fact:
    return compose(a, np.maximum(down(np.expm1(a.lo)), -1), up(np.expm1(a.hi)), convex=True, rising=True)


def where(condition: Fact, a: Fact, b: Fact) -> Fact:
    either = fact(
        np.minimum(a.lo, b.lo),
        np.maximum(a.hi, b.hi),
        np.where(condition.free, a.code & b.code, 0),
        np.where(condition.free, a.form & b.form, 0),
        np.where(condition.free, a.trend & b.trend, 0),
    )
    # A condition that is known and true lies in [1, 1], a false one in [0, 0].
    return select(condition.lo > 0, a, select((condition.lo == 0) & (condition.hi == 0), b, either))


def logic(*operands: Fact) -> Fact:
    """True or false, it is not known which."""
    free = np.logical_and.reduce(np.broadcast_arrays(*(f.free for f in operands)))
    return fact(0.0, 1.0, np.where(free, FREE, 0))


def unbent(a: Fact) -> Fact:
    """A function of a of which nothing is known."""
    return fact(-np.inf, np.inf, np.where(a.free, FREE, 0))


def uniform(u: Fact) -> float | None:
    """The one number that all entries are known to be."""
    if u.lo.size and np.all(u.lo == u.hi) and np.all(u.lo == u.lo.flat[0]):
        return float(u.lo.flat[0])
    return None


def clip(a: Fact, low: Fact | None = None, high: Fact | None = None) -> Fact:
    a = a if low is None else maximum(a, low)
    return a if high is None else minimum(a, high)


def _power(a: Fact, b: Fact) -> Fact:
    exponent = uniform(b)
    if exponent is None or not np.isfinite(exponent):
        return fact(-np.inf, np.inf, np.where(a.free & b.free, FREE, 0))
    return power(a, exponent).planes(lambda p: np.broadcast_to(p, np.broadcast_shapes(a.shape, b.shape)))


def _prelu(a: Fact, slope: Fact) -> Fact:
    # max(u, slope·u) for slopes <= 1
    return select((slope.hi <= 1) & slope.free, maximum(a, multiply(a, slope)), unbent(a))


# Operators that act entry by entry, called as in `onnx_numpy.operators`: rule(*facts, **attributes).
ENTRYWISE: Final[dict[str, Callable[..., Fact]]] = {
    "Add": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": divide,
    "Pow": _power,
    "Sum": lambda *facts: functools.reduce(add, facts),
    "Max": lambda *facts: functools.reduce(maximum, facts),
    "Min": lambda *facts: functools.reduce(minimum, facts),
    "Neg": negate,
    "Abs": absolute,
    "Exp": exponential,
    "Log": logarithm,
    "Cosh": hyperbolic_cosine,
    "Sqrt": root,
    "Reciprocal": reciprocal,
    "Relu": relu,
    "LeakyRelu": lambda a, alpha=0.01: leaky(a, alpha),
    "PRelu": _prelu,
    "Elu": lambda a, alpha=1.0: elu(a, alpha, 1.0),
    "Celu": lambda a, alpha=1.0: elu(a, alpha, alpha),
    "Clip": clip,
    "Softplus": softplus,
    "Sigmoid": sigmoid,
    "Tanh": tangent,
    "Erf": error_function,
    "Identity": lambda a: a,
    "Where": where,
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not", "IsNaN"), logic),
    "IsInf": lambda a, **attributes: logic(a),
    **dict.fromkeys(("Sign", "Floor", "Ceil", "Sin", "Cos"), unbent),
}


# --- Sums ----------------------------------------------------------------------------------------


def total(linear: Callable[[Array], NDArray[Any]], a: Fact) -> Fact:
    """A map with coefficients >= 0 that are known: sums, means, average pooling."""

    def where_all(mask: Mask, bits: int) -> NDArray[Any]:
        return np.where(linear((~mask).astype(np.float64)) > 0, 0, bits)

    code = where_all(a.has(CONVEX), CONVEX) | where_all(a.has(CONCAVE), CONCAVE) | where_all(a.free, FREE)
    form = where_all(a.form & LOG_CONVEX != 0, LOG_CONVEX) | where_all(a.form & SUM_OF_SQUARES != 0, SUM_OF_SQUARES)
    lo = np.where(where_all(a.lo >= 0, 1), 0.0, -np.inf)
    hi = np.where(where_all(a.hi <= 0, 1), 0.0, np.inf)
    return fact(lo, hi, code, form)


def bilinear(contract: Callable[[Array, Array], NDArray[Any]], a: Fact, b: Fact) -> Fact:
    """Sums of products a_i b_j: MatMul, Gemm, Conv, Einsum. `contract` is applied to masks of 0 and 1.

    A term with a factor b free of y is convex where b may be > 0 only against convex a, < 0 only against concave a.
    """

    def count(p: Mask, q: Mask) -> Mask:
        if not (p.any() and q.any()):
            return np.zeros(shape, np.bool_)
        return contract(p.astype(np.float64), q.astype(np.float64)) > 0

    shape = contract(np.zeros(a.shape), np.zeros(b.shape)).shape
    a_pos, a_neg, b_pos, b_neg = a.hi > 0, a.lo < 0, b.hi > 0, b.lo < 0
    a_any, b_any = a_pos | a_neg, b_pos | b_neg
    both = count(~a.free, ~b.free)
    not_convex, not_concave = (
        both
        | count(~a.has(one), b_pos)
        | count(~a.has(other), b_neg)
        | count(a_pos, ~b.has(one))
        | count(a_neg, ~b.has(other))
        for one, other in ((CONVEX, CONCAVE), (CONCAVE, CONVEX))
    )
    depends = count(~a.free, b_any) | count(a_any, ~b.free)
    code = np.where(not_convex, 0, CONVEX) | np.where(not_concave, 0, CONCAVE)
    code = np.where(depends, code, FREE)
    lo = np.where(count(a_pos, b_neg) | count(a_neg, b_pos), -np.inf, 0.0)
    hi = np.where(count(a_pos, b_pos) | count(a_neg, b_neg), np.inf, 0.0)
    form = np.zeros(shape, np.uint8)
    for bit in (LOG_CONVEX, SUM_OF_SQUARES):
        a_not, b_not = (a.form & bit) == 0, (b.form & bit) == 0
        lacking = both | count(a_not & a_any, b_any) | count(a_any, b_not & b_any)
        form |= np.where(lacking, 0, bit).astype(np.uint8)
    return fact(lo, hi, code, form)


def extreme(any_of: Callable[[Mask], Mask], a: Fact, lo: Array, hi: Array) -> Fact:
    """The largest of several entries."""
    code = np.where(any_of(~a.free), np.where(any_of(~a.has(CONVEX)), 0, CONVEX), FREE)
    form = np.where(any_of((a.form & LOG_CONVEX) == 0), 0, LOG_CONVEX)
    return fact(lo, hi, code, form)
