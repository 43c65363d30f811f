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


def advise(
    status: Status,
    *,
    residual: tuple[float, float, float],
    steps: int | None,
    most: int | None = None,
    tolerance: float | None = None,
    double: bool = False,
    allow: str = "",
    ray: bool = True,
) -> str:
    """One sentence of advice with the numbers of one sample.

    steps, tolerance:  those that were taken, and the one that was to be met; None where nobody knows
    most:              the most steps, where no more is known of them than that
    double:            whether the data are float64 already
    allow:             what the method would have gone on with, if anything: "more steps", "more time"
    ray:               whether who reads it has that to look at
    """
    stationarity, feasibility, gap = residual
    above = "" if tolerance is None else f" of {tolerance:.0e}"
    wider = "" if double else ", or solve in float64"
    ended = "the method" if most is None else f"at most {most} steps"
    ended = ended if steps is None else f"{steps} steps"
    numbers = f"stationarity {stationarity:.1e}, feasibility {feasibility:.1e}, duality gap {gap:.1e}"
    infeasible = "as `ray` proves: loosen those with the largest entries there" if ray else "loosen them"
    return {
        Status.CONVERGED: f"converged{'' if double else ', before it was rounded to float32'}: {numbers}",
        Status.INACCURATE: f"{ended} ended above the tolerance{above} ({numbers}): "
        f"{f'allow {allow}' if allow else f'scale rows and columns of the data to similar sizes{wider}'}; "
        "gradients are withheld",
        Status.INFEASIBLE: f"no z meets the constraints{', ' if ray else ': '}{infeasible}",
        Status.UNBOUNDED: f"the objective falls without end{' along `ray`' * ray}: bound z, or add a multiple of the "
        "identity to Q",
        Status.SOLVER: f"{ended} found neither an answer nor a certificate: "
        f"{f'allow {allow}' if allow else f'rescale the data{wider}'}",
        Status.NOT_FINITE_INPUT: "the data hold NaN, or an infinity that is no absent bound: clean them",
        Status.NOT_CONVEX: "Q has a negative eigenvalue, so the problem is not convex: pass F F' + ε I with a factor F",
        Status.NOT_FINITE: "z left the range of its dtype behind the programs: scale what follows them"
        f"{'' if double else ', or export in float64'}",
    }[status]
