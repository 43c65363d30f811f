"""The inner problem for a conic solver: cvxpy states it, Clarabel solves it.

    min over y, t of  t − Σ entr(y) − Σ entr(1 − y)    s.t.  e + G(y − ½) <= t·1,      entr(p) = −p log p

which is two exponential cones an entry of y. One sample at a time, float64.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.interleaved import Missing


class Optimum(NamedTuple):
    value: float
    y: NDArray[np.float64]
    status: str
    clarabel_seconds: float  # what Clarabel itself says it took


class ConicModel:
    """One sample, stated and compiled once; calling it solves it once more, without cvxpy's compilation."""

    def __init__(self, G: NDArray[Any], e: NDArray[Any]) -> None:
        import cvxpy as cp

        self._y, t = cp.Variable(G.shape[1]), cp.Variable()
        entropy = cp.sum(cp.entr(self._y)) + cp.sum(cp.entr(1 - self._y))
        self._problem = cp.Problem(cp.Minimize(t - entropy), [e + G @ (self._y - 0.5) <= t])
        self._solver = cp.CLARABEL

    def __call__(self) -> Optimum:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it may be inaccurate is told by the status
            self._problem.solve(solver=self._solver)
        stats = self._problem.solver_stats
        return Optimum(float(self._problem.value), self._y.value, self._problem.status, float(stats.solve_time))


def available() -> Missing | None:
    """Why there is no conic solver, or None if there is."""
    try:
        import clarabel  # noqa: F401
        import cvxpy  # noqa: F401
    except ImportError as error:
        return Missing(f"{error}; install the dependency group bench")
    return None
