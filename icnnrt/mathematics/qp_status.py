"""What became of one quadratic program, and what to do about it."""

from enum import IntEnum

__all__ = ["QPStatus", "advise"]


class QPStatus(IntEnum):
    """The verdict on one sample; 0 is good. The numbers are those of the operator's output `status`."""

    SOLVED = 0
    """All KKT residuals are within the tolerance."""
    INACCURATE = 1
    """z is close to a solution, and its residuals are true, but above the tolerance: gradients are withheld."""
    PRIMAL_INFEASIBLE = 2
    """No z meets the constraints: `ray` holds multipliers (λ, ν, μ) with A'ν + G'λ + μ = 0 whose bounds sum to −1, or
    0 where a lower bound exceeds its upper one. The answer is NaN."""
    DUAL_INFEASIBLE = 3
    """The objective falls without end, if any z is feasible: `ray` holds a direction d with Qd = 0, Ad = 0, p'd = −1
    that leaves no bound behind. The answer is NaN."""
    FAILED = 4
    """The steps ended without an answer or a certificate. The answer is NaN."""
    NOT_FINITE_INPUT = 5
    """The data hold NaN or an infinity that is no absent bound. The sample was not run; its answer is NaN."""
    NOT_CONVEX = 6
    """Q has a negative eigenvalue. The sample was not run; its answer is NaN."""


def advise(status: QPStatus, *, residual: tuple[float, float, float], steps: int, ray: bool = True) -> str:
    """One sentence of advice with the numbers of one sample; `ray`: whether who reads it has that to look at."""
    stationarity, feasibility, gap = residual
    numbers = f"stationarity {stationarity:.1e}, feasibility {feasibility:.1e}, duality gap {gap:.1e}"
    match status:
        case QPStatus.SOLVED:
            return f"solved: {numbers}"
        case QPStatus.INACCURATE:
            return (
                f"{steps} steps ended above the tolerance ({numbers}): scale rows and columns of the data to similar "
                "sizes, or solve in float64; gradients are withheld"
            )
        case QPStatus.PRIMAL_INFEASIBLE:
            if not ray:
                return "no z meets the constraints: loosen them"
            return "no z meets the constraints, as `ray` proves: loosen those with the largest entries there"
        case QPStatus.DUAL_INFEASIBLE:
            along = " along `ray`" if ray else ""
            return f"the objective falls without end{along}: bound z, or add a multiple of the identity to Q"
        case QPStatus.FAILED:
            return f"{steps} steps found neither an answer nor a certificate: rescale the data, or solve in float64"
        case QPStatus.NOT_FINITE_INPUT:
            return "the data hold NaN, or an infinity that is no absent bound: clean them"
        case QPStatus.NOT_CONVEX:
            return "Q has a negative eigenvalue, so the problem is not convex: pass F F' + ε I with a factor F"
