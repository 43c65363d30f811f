"""The operations that the algorithms of this folder are stated in, and how numpy does them.

Every algorithm is written once, over a namespace `xp`, and run by what stands behind it: numpy here, torch in
`icnnrt_models.layers.namespace`, and ONNX nodes, which `icnnrt_exporters.operators.traced` writes down instead of
computing. Arrays of all of them have Python's operators + − * / @ > < >= <= & | ~, unary − and abs(). Whatever else a
statement needs is one of these (a row is [B, 1, k]):

==================  ================================================================================================
exp, log, sqrt      as in IEEE 754, without a warning: log 0 = −∞, log of a negative number is NaN
log1p               log(1 + a), with an absolute error of rounding (ONNX forms the sum first)
sigmoid             1/(1 + e^−s) without overflow, exact in both tails
x_log_x             a log a; 0 at 0, NaN below
maximum, minimum    of an array and an array or a number; NaN where either is
clip                to [low, high], numbers or arrays; NaN stays
where               of two arrays, by a condition
total, largest      over both axes of each sample's matrix: the sum, and the largest magnitude, which may pass over NaN
isfinite, indicator neither NaN nor infinite; 1 for true, 0 for false
power_of_2          the power of 2 nearest to a number, by its logarithm
pick, put           the samples for which [B, 1, 1] is true, by themselves; and what was found for them among the others
cond                then() if a condition on all samples holds, else otherwise(): lists of as many arrays, or None
piece               statement(xp, *arrays), in a graph as a function of this name, which stands there once
all                 whether all entries of a row are true, [B, 1, 1]
positive_definite   whether all pivots of a symmetric matrix are positive, [B, 1, 1]
factor_spd          for A [B, k, k] symmetric and positive semidefinite: the function r -> A⁻¹r of rows [B, m, k], as
                    exact as by LU after one refinement
sum, max, min, mean over the last axis, which stays with one entry. `max` may pass over NaN (ONNX Runtime does): what
                    must be NaN with it takes it from a sum
count               how many entries the last axis has, to be broadcast against rows
mT                  the last two axes exchanged. Never right before @: onnxruntime 1.18 to 1.22 has no kernel for it
argmin1, pick1      where the least entry of a [B, m, 1] stands, and the row of a [B, m, k] there: [B, 1, k]
ones_like           as many ones
eye, eyes           the identity [k, k] for a row of k entries, alone and for every sample
rows                numbers, one a row: [B, m, 1] for m of them and any array of B samples
extended            a row with zeros behind it, as long as another one
concat              arrays side by side in the last axis
concat_rows         matrices [B, m, k] one above the other
halves              a row in two equal parts
parts               a row in parts as long as other rows are; one of them may be None, for the rest
stack               arrays [B, ...] one behind the other in a new axis 1
double, like        as float64; in the dtype of another array
inverse_spd         for A [B, k, k] symmetric and positive semidefinite: the function r -> A⁻¹r of a row, as exact as a
                    search direction has to be (1e-4 where A is nearly singular). eye is the identity [k, k]
solve_spd           A⁻¹r for each of some rows r [B, 1, k], as exact as by LU
any                 whether an entry is true
loop                `state = step(*state)` while `unfinished(*state)`, at most `most` times
repeat              `state, rows = step(i, *state)` for i < times, then all rows, [B, ...], as [B, times, ...]; what is
                    in state may grow, and None stays None. With `unfinished` it ends before, after a trip that leaves
                    `unfinished(*state)` false, and there are no rows
row, column         an axis more, of one entry: the second, the last
entry, slot         one entry of the last axis, one slot of the second, which goes
slots               how many the second axis has, a number for upto and beyond
upto, beyond        the first slots of the second axis, as many as a number says, and those behind them
places              0, 1, 2, ... along the last axis, to be compared
equal               whether entries are equal to others or a number
backwards           the second axis the other way round
slots_sum           over the second axis, which goes
padded              a row with zeros behind it, of so many entries in all
zeros               of the samples and the dtype of an array, of any further sizes
spread              a number to multiply with, in every entry of an array like another: one number beside a product of
                    matrices onnxruntime 1.31 would fold into it, as float32
==================  ================================================================================================

All numbers are float64 where nothing else is said. A sample may be NaN and the others are as if it were not there.
Python's `if` and `for` are for what is fixed when an algorithm is written down: a domain, never an entry or a size.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = Any  # of the namespace at hand

TINY: Final = float(np.finfo(np.float64).tiny)
EPS: Final = float(np.finfo(np.float64).eps)
# Duplicate rows make a system singular. Scaled to unit diagonal it gets this much more of it, so it never is.
RIDGE: Final = 4 * EPS


class Namespace(Protocol):
    """What the head of this file lists."""

    def exp(self, a: Array) -> Array: ...
    def log(self, a: Array) -> Array: ...
    def log1p(self, a: Array) -> Array: ...
    def sqrt(self, a: Array) -> Array: ...
    def sigmoid(self, s: Array) -> Array: ...
    def x_log_x(self, a: Array) -> Array: ...
    def maximum(self, a: Array, b: Array | float) -> Array: ...
    def minimum(self, a: Array, b: Array | float) -> Array: ...
    def clip(self, a: Array, low: Array | float, high: Array | float) -> Array: ...
    def where(self, condition: Array, a: Array, b: Array) -> Array: ...
    def sum(self, a: Array) -> Array: ...
    def max(self, a: Array) -> Array: ...
    def min(self, a: Array) -> Array: ...
    def mean(self, a: Array) -> Array: ...
    def count(self, a: Array) -> Array: ...
    def mT(self, a: Array) -> Array: ...
    def argmin1(self, a: Array) -> Array: ...
    def pick1(self, a: Array, i: Array) -> Array: ...
    def ones_like(self, a: Array) -> Array: ...
    def eye(self, row: Array) -> Array: ...
    def eyes(self, row: Array) -> Array: ...
    def total(self, M: Array) -> Array: ...
    def largest(self, M: Array) -> Array: ...
    def isfinite(self, a: Array) -> Array: ...
    def indicator(self, condition: Array) -> Array: ...
    def power_of_2(self, a: Array) -> Array: ...
    def pick(self, which: Array, a: Array) -> Array: ...
    def put(self, which: Array, found: Array, among: Array) -> Array: ...
    def cond(self, condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any: ...
    def piece(self, name: str, statement: Callable[..., Any], arrays: Sequence[Any]) -> Any: ...
    def all(self, condition: Array) -> Array: ...
    def positive_definite(self, M: Array, eye: Array) -> Array: ...
    def factor_spd(self, A: Array, eye: Array) -> Callable[[Array], Array]: ...
    def concat_rows(self, arrays: Sequence[Array]) -> Array: ...
    def halves(self, row: Array) -> Sequence[Array]: ...
    def parts(self, row: Array, like: Sequence[Array | None]) -> Sequence[Array]: ...
    def rows(self, numbers: Sequence[float], like: Array) -> Array: ...
    def extended(self, row: Array, like: Array) -> Array: ...
    def concat(self, arrays: Sequence[Array]) -> Array: ...
    def stack(self, arrays: Sequence[Array]) -> Array: ...
    def double(self, a: Array) -> Array: ...
    def like(self, a: Array, other: Array) -> Array: ...
    def inverse_spd(self, A: Array, eye: Array) -> Callable[[Array], Array]: ...
    def solve_spd(self, A: Array, eye: Array, rows: Sequence[Array]) -> Sequence[Array]: ...
    def any(self, a: Array) -> Any: ...
    def loop(self, unfinished: Callable[..., Any], step: Callable[..., Any], state: Any, most: Any) -> Any: ...
    def repeat(
        self, times: Any, step: Callable[..., Any], state: Any, unfinished: Callable[..., Any] | None = None
    ) -> tuple[Any, Sequence[Array]]: ...
    def row(self, a: Array) -> Array: ...
    def column(self, a: Array) -> Array: ...
    def entry(self, a: Array, i: int) -> Array: ...
    def slot(self, a: Array, k: Any) -> Array: ...
    def slots(self, a: Array) -> Any: ...
    def upto(self, a: Array, k: Any) -> Array: ...
    def beyond(self, a: Array, k: Any) -> Array: ...
    def places(self, a: Array) -> Array: ...
    def equal(self, a: Array, b: Any) -> Array: ...
    def backwards(self, a: Array) -> Array: ...
    def slots_sum(self, a: Array) -> Array: ...
    def padded(self, row: Array, length: int) -> Array: ...
    def zeros(self, like: Array, *sizes: int) -> Array: ...
    def spread(self, number: float, like: Array) -> Array: ...


class Eager:
    """What every namespace that computes at once has from its other operations and from Python."""

    inverse_spd: Callable[[Array, Array], Callable[[Array], Array]]
    concat: Callable[[Sequence[Array]], Array]
    concat_rows: Callable[[Sequence[Array]], Array]
    stack: Callable[[Sequence[Array]], Array]
    zeros: Callable[..., Array]

    row = staticmethod(lambda a: a[:, None])
    column = staticmethod(lambda a: a[..., None])
    entry = staticmethod(lambda a, i: a[..., i])
    slot = staticmethod(lambda a, k: a[:, k])
    slots = staticmethod(lambda a: a.shape[1])
    upto = staticmethod(lambda a, k: a[:, :k])
    beyond = staticmethod(lambda a, k: a[:, k:])
    equal = staticmethod(lambda a, b: a == b)
    slots_sum = staticmethod(lambda a: a.sum(1))
    spread = staticmethod(lambda number, like: number)

    def padded(self, row: Array, length: int) -> Array:
        return self.concat([row, self.zeros(row, *row.shape[1:-1], length - row.shape[-1])])

    def cond(self, condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return then() if condition else otherwise()

    def piece(self, name: str, statement: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        return statement(self, *arrays)

    def solve_spd(self, A: Array, eye: Array, rows: Sequence[Array]) -> Sequence[Array]:
        found = self.inverse_spd(A, eye)(self.concat_rows(rows))
        return [found[:, i : i + 1] for i in range(len(rows))]

    def loop(self, unfinished: Callable[..., Any], step: Callable[..., Any], state: Any, most: Any) -> Any:
        for _ in range(most):
            if not unfinished(*state):
                break
            state = step(*state)
        return state

    def repeat(
        self, times: int, step: Callable[..., Any], state: Any, unfinished: Callable[..., Any] | None = None
    ) -> tuple[Any, Sequence[Array]]:
        collected = []
        for i in range(times):
            state, rows = step(i, *state)
            collected.append(rows)
            if unfinished is not None and not unfinished(*state):
                break
        return state, [self.stack(rows) for rows in zip(*collected, strict=True)]

    def _lengths(self, row: Array, like: Sequence[Array | None]) -> list[Any]:
        """How long the parts of a row are."""
        known = sum(a.shape[-1] for a in like if a is not None)
        return [row.shape[-1] - known if a is None else a.shape[-1] for a in like]


class Numpy(Eager):
    """The namespace of float64 numpy arrays."""

    log1p = staticmethod(np.log1p)
    maximum = staticmethod(np.maximum)
    minimum = staticmethod(np.minimum)
    clip = staticmethod(lambda a, low, high: np.minimum(np.maximum(a, low), high))
    where = staticmethod(np.where)
    isfinite = staticmethod(np.isfinite)
    indicator = staticmethod(lambda condition: condition.astype(np.float64))
    power_of_2 = staticmethod(lambda a: 2.0 ** np.round(np.log2(a)))

    sum = staticmethod(lambda a: a.sum(-1, keepdims=True))
    max = staticmethod(lambda a: a.max(-1, keepdims=True))
    min = staticmethod(lambda a: a.min(-1, keepdims=True))
    mean = staticmethod(lambda a: a.mean(-1, keepdims=True))
    all = staticmethod(lambda condition: condition.all(-1, keepdims=True))
    any = staticmethod(np.any)
    total = staticmethod(lambda M: M.sum((-2, -1), keepdims=True))
    largest = staticmethod(lambda M: np.abs(M).max((-2, -1), keepdims=True))
    count = staticmethod(lambda a: np.full((*a.shape[:-1], 1), float(a.shape[-1])))
    argmin1 = staticmethod(lambda a: a.argmin(1)[:, :, None])
    pick1 = staticmethod(lambda a, i: np.take_along_axis(a, i, 1))
    pick = staticmethod(lambda which, a: a[which[:, 0, 0]])

    mT = staticmethod(lambda a: a.swapaxes(-1, -2))
    backwards = staticmethod(lambda a: a[:, ::-1])
    concat = staticmethod(lambda arrays: np.concatenate(arrays, axis=-1))
    concat_rows = staticmethod(lambda arrays: np.concatenate(arrays, axis=1))
    stack = staticmethod(lambda arrays: np.stack(arrays, axis=1))
    halves = staticmethod(lambda row: (row[..., : row.shape[-1] // 2], row[..., row.shape[-1] // 2 :]))
    extended = staticmethod(lambda row, like: np.concatenate([row, np.zeros_like(like[..., row.shape[-1] :])], axis=-1))

    ones_like = staticmethod(np.ones_like)
    zeros = staticmethod(lambda like, *sizes: np.zeros((len(like), *sizes), like.dtype))
    eye = staticmethod(lambda row: np.eye(row.shape[-1]))
    eyes = staticmethod(lambda row: np.broadcast_to(np.eye(row.shape[-1]), (len(row), row.shape[-1], row.shape[-1])))
    places = staticmethod(lambda a: np.arange(a.shape[-1]))
    double = staticmethod(lambda a: np.asarray(a, np.float64))
    like = staticmethod(lambda a, other: np.asarray(a, other.dtype))

    def exp(self, a: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(a)

    def log(self, a: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(a)

    def sqrt(self, a: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return np.sqrt(a)

    def sigmoid(self, s: Array) -> Array:
        e = np.exp(-np.abs(s))
        return np.where(s >= 0, 1.0, e) / (1.0 + e)

    def x_log_x(self, a: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(a == 0.0, 0.0, a * np.log(a))

    def put(self, which: Array, found: Array, among: Array) -> Array:
        result = among.copy()
        result[which[:, 0, 0]] = found
        return result

    def rows(self, numbers: Sequence[float], like: Array) -> Array:
        return np.broadcast_to(np.asarray(numbers)[None, :, None], (len(like), len(numbers), 1))

    def parts(self, row: Array, like: Sequence[Array | None]) -> Sequence[Array]:
        ends = list(itertools.accumulate(self._lengths(row, like)))  # in a tenth of the time of np.split
        return [row[..., a:b] for a, b in itertools.pairwise([0, *ends])]

    def positive_definite(self, M: Array, eye: Array) -> Array:
        return (np.linalg.eigvalsh(M)[:, 0] > 0.0)[:, None, None]

    def inverse_spd(self, A: Array, eye: Array) -> Callable[[Array], Array]:
        scale = 1.0 / np.sqrt(np.maximum(np.einsum("bii->bi", A), TINY))[:, None, :]
        scaled = A * scale * scale.swapaxes(1, 2) + RIDGE * eye
        return lambda r: _solved(scaled, (r * scale).swapaxes(1, 2)).swapaxes(1, 2) * scale

    factor_spd = inverse_spd


NUMPY: Final = Numpy()


def _solved(A: Array, R: Array) -> Array:
    """A⁻¹ R; NaN in a sample whose A is singular in spite of its ridge, where numpy raises for the whole batch."""
    try:
        return np.linalg.solve(A, R)
    except np.linalg.LinAlgError:
        if len(A) == 1:
            return np.full_like(R, np.nan)
        return np.concatenate([_solved(A[b : b + 1], R[b : b + 1]) for b in range(len(A))])
