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

    @staticmethod
    def cond(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return then() if condition else otherwise()

    def piece(self, name: str, statement: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        return statement(self, *arrays)

    def solve_spd(self, A: Array, eye: Array, rows: Sequence[Array]) -> Sequence[Array]:
        found = self.inverse_spd(A, eye)(self.concat_rows(rows))
        return [found[:, i : i + 1] for i in range(len(rows))]

    @staticmethod
    def loop(unfinished: Callable[..., Any], step: Callable[..., Any], state: Any, most: Any) -> Any:
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

    @staticmethod
    def row(a: Array) -> Array:
        return a[:, None]

    @staticmethod
    def column(a: Array) -> Array:
        return a[..., None]

    @staticmethod
    def entry(a: Array, i: int) -> Array:
        return a[..., i]

    @staticmethod
    def slot(a: Array, k: int) -> Array:
        return a[:, k]

    @staticmethod
    def slots(a: Array) -> Any:
        return a.shape[1]

    @staticmethod
    def upto(a: Array, k: int) -> Array:
        return a[:, :k]

    @staticmethod
    def beyond(a: Array, k: int) -> Array:
        return a[:, k:]

    @staticmethod
    def equal(a: Array, b: Any) -> Array:
        return a == b

    @staticmethod
    def slots_sum(a: Array) -> Array:
        return a.sum(1)

    def padded(self, row: Array, length: int) -> Array:
        return self.concat([row, self.zeros(row, *row.shape[1:-1], length - row.shape[-1])])

    @staticmethod
    def spread(number: float, like: Array) -> float:
        return number

    @staticmethod
    def _lengths(row: Array, like: Sequence[Array | None]) -> list[Any]:
        """How long the parts of a row are."""
        known = sum(a.shape[-1] for a in like if a is not None)
        return [row.shape[-1] - known if a is None else a.shape[-1] for a in like]


class Numpy(Eager):
    """The namespace of float64 numpy arrays."""

    @staticmethod
    def exp(a: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(a)

    @staticmethod
    def log(a: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(a)

    log1p = staticmethod(np.log1p)

    @staticmethod
    def sqrt(a: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return np.sqrt(a)

    @staticmethod
    def sigmoid(s: Array) -> Array:
        e = np.exp(-np.abs(s))
        return np.where(s >= 0, 1.0, e) / (1.0 + e)

    @staticmethod
    def x_log_x(a: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(a == 0.0, 0.0, a * np.log(a))

    maximum = staticmethod(np.maximum)
    minimum = staticmethod(np.minimum)

    @staticmethod
    def clip(a: Array, low: Array | float, high: Array | float) -> Array:
        return np.minimum(np.maximum(a, low), high)

    where = staticmethod(np.where)

    @staticmethod
    def sum(a: Array) -> Array:
        return a.sum(-1, keepdims=True)

    @staticmethod
    def max(a: Array) -> Array:
        return a.max(-1, keepdims=True)

    @staticmethod
    def min(a: Array) -> Array:
        return a.min(-1, keepdims=True)

    @staticmethod
    def mean(a: Array) -> Array:
        return a.mean(-1, keepdims=True)

    @staticmethod
    def total(M: Array) -> Array:
        return M.sum((-2, -1), keepdims=True)

    @staticmethod
    def largest(M: Array) -> Array:
        return np.abs(M).max((-2, -1), keepdims=True)

    isfinite = staticmethod(np.isfinite)

    @staticmethod
    def indicator(condition: Array) -> Array:
        return condition.astype(np.float64)

    @staticmethod
    def power_of_2(a: Array) -> Array:
        return 2.0 ** np.round(np.log2(a))

    @staticmethod
    def pick(which: Array, a: Array) -> Array:
        return a[which[:, 0, 0]]

    @staticmethod
    def put(which: Array, found: Array, among: Array) -> Array:
        result = among.copy()
        result[which[:, 0, 0]] = found
        return result

    @staticmethod
    def all(condition: Array) -> Array:
        return condition.all(-1, keepdims=True)

    @staticmethod
    def positive_definite(M: Array, eye: Array) -> Array:
        return (np.linalg.eigvalsh(M)[:, 0] > 0.0)[:, None, None]

    @staticmethod
    def count(a: Array) -> Array:
        return np.full((*a.shape[:-1], 1), float(a.shape[-1]))

    @staticmethod
    def mT(a: Array) -> Array:
        return a.swapaxes(-1, -2)

    @staticmethod
    def argmin1(a: Array) -> Array:
        return a.argmin(1)[:, :, None]

    @staticmethod
    def pick1(a: Array, i: Array) -> Array:
        return np.take_along_axis(a, i, 1)

    ones_like = staticmethod(np.ones_like)

    @staticmethod
    def eye(row: Array) -> Array:
        return np.eye(row.shape[-1])

    @staticmethod
    def eyes(row: Array) -> Array:
        return np.broadcast_to(np.eye(row.shape[-1]), (len(row), row.shape[-1], row.shape[-1]))

    @staticmethod
    def zeros(like: Array, *sizes: int) -> Array:
        return np.zeros((len(like), *sizes), like.dtype)

    @staticmethod
    def places(a: Array) -> Array:
        return np.arange(a.shape[-1])

    @staticmethod
    def backwards(a: Array) -> Array:
        return a[:, ::-1]

    @staticmethod
    def rows(numbers: Sequence[float], like: Array) -> Array:
        return np.broadcast_to(np.asarray(numbers)[None, :, None], (len(like), len(numbers), 1))

    @staticmethod
    def extended(row: Array, like: Array) -> Array:
        return np.concatenate([row, np.zeros_like(like[..., row.shape[-1] :])], axis=-1)

    @staticmethod
    def concat(arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays, axis=-1)

    @staticmethod
    def concat_rows(arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays, axis=1)

    @staticmethod
    def halves(row: Array) -> Sequence[Array]:
        return np.split(row, 2, axis=-1)

    def parts(self, row: Array, like: Sequence[Array | None]) -> Sequence[Array]:
        return np.split(row, np.cumsum(self._lengths(row, like))[:-1], axis=-1)

    @staticmethod
    def stack(arrays: Sequence[Array]) -> Array:
        return np.stack(arrays, axis=1)

    @staticmethod
    def double(a: Array) -> Array:
        return np.asarray(a, np.float64)

    @staticmethod
    def like(a: Array, other: Array) -> Array:
        return np.asarray(a, other.dtype)

    @staticmethod
    def inverse_spd(A: Array, eye: Array) -> Callable[[Array], Array]:
        scale = 1.0 / np.sqrt(np.maximum(np.einsum("bii->bi", A), TINY))[:, None, :]
        scaled = A * scale * scale.swapaxes(1, 2) + RIDGE * eye
        return lambda r: _solved(scaled, (r * scale).swapaxes(1, 2)).swapaxes(1, 2) * scale

    factor_spd = inverse_spd

    any = staticmethod(np.any)


NUMPY: Final = Numpy()


def _solved(A: Array, R: Array) -> Array:
    """A⁻¹ R; NaN in a sample whose A is singular in spite of its ridge, where numpy raises for the whole batch."""
    try:
        return np.linalg.solve(A, R)
    except np.linalg.LinAlgError:
        if len(A) == 1:
            return np.full_like(R, np.nan)
        return np.concatenate([_solved(A[b : b + 1], R[b : b + 1]) for b in range(len(A))])
