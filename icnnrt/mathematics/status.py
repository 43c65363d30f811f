"""What became of one sample, whatever solved it, and what to do about it."""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final


class Status(IntEnum):
    """The verdict on one sample; 0 is good, and no number will ever mean anything else.

    Of argmins `certificate.status_of` says how it is told, and which of two wins; of quadratic programs
    `qp_status.QPStatus`, which are the numbers inside their operators.
    """

    CONVERGED = 0
    """The duality gap and the residual are within the tolerances: up to rounding, no energy or objective is smaller by
    more than the gap."""
    GAP = 1
    """The gap is above its tolerance: y is feasible and its energy is true, but a smaller energy may exist."""
    SOLVER = 2
    """The steps ended above the tolerance. Of an argmin y is some point of the domain, and gradients are wrong; of a
    quadratic program there is neither an answer nor a certificate that there is none, and z is NaN."""
    NOT_CONVEX = 3
    """The energy lies below its own cuts here, or the package says that it was seen not to be convex in y: the lower
    bound is none. Of a quadratic program Q has a negative eigenvalue; it was not run, and z is NaN."""
    NOT_FINITE_INPUT = 4
    """x, a bound or a datum holds NaN or infinity in the package's dtype, absent bounds aside. The sample was not run;
    its answer is NaN."""
    NOT_FINITE = 5
    """The energy, its gradient or the answer holds NaN or infinity although x is finite."""

    INFEASIBLE = 6
    """No y meets the constraints: a lower bound exceeds its upper one or, of a quadratic program, `ray` holds
    multipliers (λ, ν, μ) with A'ν + G'λ + μ = 0 whose bounds sum to −1. The answer is NaN."""

    UNBOUNDED = 7
    """Over a polyhedron: the cuts fall without end along a ray, and f still fell along it as far out as it was
    evaluated. There is no minimum, if f is convex and goes on as it was seen to; the answer is NaN beside the ray. Of a
    quadratic program `ray` holds a direction d with Qd = 0, Ad = 0, p'd = −1 that leaves no bound behind."""
    PRECISION = 8
    """Rounding alone may move the gap by more than its tolerance: y is feasible, but its energy and the lower bound are
    known no better than that."""
    INACCURATE = 9
    """Of quadratic programs: z is close to a solution, and its residuals are true, but above the tolerance: gradients
    are withheld."""


# Those with a y to use, beside what is known of it.
ANSWERED: Final = (Status.CONVERGED, Status.GAP, Status.PRECISION)
# Those that mean nothing of an f that is not convex.
RESTS_ON_CONVEXITY: Final = (Status.CONVERGED, Status.GAP, Status.SOLVER, Status.UNBOUNDED, Status.PRECISION)


def advise(
    status: Status,
    *,
    iterations: int,
    steps: int,
    gap: float,
    gap_bound: float,
    residual: float,
    residual_bound: float,
    violation: float,
    uncertainty: float,
    dtype: str,
) -> str:
    """One sentence of advice with the numbers of one sample.

    `gap_bound` and `residual_bound` are what gap and residual had to stay below, `violation` is by how much the
    energy lies below its own cuts, `uncertainty` by how much rounding may have moved the gap.
    """
    seen = f"lies {violation:.1e} below its own cuts" if violation > 0 else "was seen to bend down"
    return {
        Status.CONVERGED: f"converged: a gap of {gap:.1e} <= {gap_bound:.1e} and a residual of {residual:.1e}",
        Status.GAP: f"{iterations} cuts left a gap of {gap:.1e} > {gap_bound:.1e}, so a smaller energy may exist: "
        f"export with more iterations ({2 * iterations}), or start from a better y_init",
        Status.SOLVER: f"{steps} steps left the last model with a residual of {residual:.1e} > {residual_bound:.1e}: "
        f"export with more steps ({2 * steps}), or scale the energy down if its slopes are far above 1e3",
        Status.NOT_CONVEX: f"the energy {seen}, so it is not convex in y and no bound holds: "
        "make the weights between hidden layers nonnegative and the activations convex, then export again",
        Status.NOT_FINITE: f"the energy or its gradient left the range of {dtype}: scale x to what the model was "
        "trained on, or export it in float64",
        Status.NOT_FINITE_INPUT: f"x holds NaN or infinity (or a number beyond {dtype}), or a bound does: clean it",
        Status.INFEASIBLE: "a lower bound exceeds its upper one, so no y is allowed: exchange or widen them",
        Status.UNBOUNDED: "the energy falls without end as far as it was followed: bound y",
        Status.PRECISION: imprecise(uncertainty, gap_bound, dtype),
    }[status]


def advise_polyhedron(status: Status, *, gap: float, cuts: int, uncertainty: float) -> str:
    """One sentence of advice on an argmin over a polyhedron.

    `cuts` is how many models were solved, `uncertainty` by how much rounding may have moved the gap.
    """
    held = f"{cuts} cut{'s' * (cuts != 1)}"
    left = f"left {f'a gap of {gap:.1e}' if math.isfinite(gap) else 'no answer'}"
    return {
        Status.CONVERGED: f"converged: a gap of {gap:.1e} after {held}",
        Status.GAP: f"{held} left a gap of {gap:.1e}: give more iterations, a larger mu or a better y_init",
        Status.SOLVER: f"after {held} a model was not solved, or falls without end where the energy does not, and "
        f"{left}: give more iterations, bound y, or raise mu",
        Status.NOT_CONVEX: "the energy lies below its own cuts, so it is not convex in y and no bound holds",
        Status.NOT_FINITE_INPUT: "x or a constraint holds NaN, or an infinity that is no absent bound: clean it",
        Status.NOT_FINITE: "the energy or its gradient is not finite: scale x, or export in float64",
        Status.INFEASIBLE: "no y meets the constraints: loosen them",
        Status.UNBOUNDED: "the energy falls along `ray`, within the constraints, as far as it was followed: "
        "bound y, or raise mu",
        Status.PRECISION: f"{held} left a gap of {gap:.1e}, but rounding may have moved it by "
        f"{uncertainty:.1e}, more than the tolerance: scale x and y down, centre the energy, "
        "allow a larger tolerance, or export in float64 if it is float32",
    }[status]


def imprecise(uncertainty: float, bound: float, dtype: str) -> str:
    """What to do where rounding hides the gap: the numbers are too large for the dtype."""
    remedy = "scale x down, centre the energy" + ("" if dtype == "float64" else ", or export in float64")
    return f"rounding in {dtype} leaves the energy open by {uncertainty:.1e} > {bound:.1e}: {remedy}"


def summarise(codes: Sequence[int], advice: Callable[[int], str]) -> str:
    """How many samples have which status, and the advice on the first of each kind that is not good, a line each."""
    first: dict[int, int] = {}
    counts: dict[int, int] = {}
    for i, code in enumerate(codes):
        first.setdefault(code, i)
        counts[code] = counts.get(code, 0) + 1
    head = ", ".join(f"{counts[code]} {Status(code).name}" for code in sorted(counts)) or "no samples"
    return "\n".join([head, *(advice(first[code]) for code in sorted(counts) if code)])
