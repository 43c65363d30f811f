"""What became of one quadratic program: the numbers of the operators, what they are in `Status`, and what to do."""

from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.status import Status

__all__ = ["STATUSES", "QPStatus", "advise", "statuses"]


class QPStatus(IntEnum):
    """The verdict inside QPSolve and QPAdjoint, and inside graphs that hold them. Everywhere else it is a `Status`."""

    SOLVED = 0
    INACCURATE = 1
    PRIMAL_INFEASIBLE = 2
    DUAL_INFEASIBLE = 3
    FAILED = 4
    NOT_FINITE_INPUT = 5
    NOT_CONVEX = 6


# The `Status` of every `QPStatus`.
STATUSES: Final = (
    Status.CONVERGED,
    Status.INACCURATE,
    Status.INFEASIBLE,
    Status.UNBOUNDED,
    Status.SOLVER,
    Status.NOT_FINITE_INPUT,
    Status.NOT_CONVEX,
)
_TABLE: Final = np.array(STATUSES, np.int32)


def statuses(codes: NDArray[Any]) -> NDArray[np.int32]:
    """Of what operators gave, `QPStatus` each, the `Status` each."""
    return np.asarray(_TABLE[codes], np.int32)


def advise(status: Status, *, residual: tuple[float, float, float], steps: int, ray: bool = True) -> str:
    """One sentence of advice with the numbers of one sample; `ray`: whether who reads it has that to look at."""
    stationarity, feasibility, gap = residual
    numbers = f"stationarity {stationarity:.1e}, feasibility {feasibility:.1e}, duality gap {gap:.1e}"
    match status:
        case Status.CONVERGED:
            return f"converged: {numbers}"
        case Status.INACCURATE:
            return (
                f"{steps} steps ended above the tolerance ({numbers}): scale rows and columns of the data to similar "
                "sizes, or solve in float64; gradients are withheld"
            )
        case Status.INFEASIBLE:
            if not ray:
                return "no z meets the constraints: loosen them"
            return "no z meets the constraints, as `ray` proves: loosen those with the largest entries there"
        case Status.UNBOUNDED:
            along = " along `ray`" if ray else ""
            return f"the objective falls without end{along}: bound z, or add a multiple of the identity to Q"
        case Status.SOLVER:
            return f"{steps} steps found neither an answer nor a certificate: rescale the data, or solve in float64"
        case Status.NOT_FINITE_INPUT:
            return "the data hold NaN, or an infinity that is no absent bound: clean them"
        case Status.NOT_CONVEX:
            return "Q has a negative eigenvalue, so the problem is not convex: pass F F' + ε I with a factor F"
        case Status.NOT_FINITE:
            return "z left the range of its dtype behind the programs: scale what follows them, or export in float64"
        case _:
            raise AssertionError(f"no quadratic program ends with {status!r}")
