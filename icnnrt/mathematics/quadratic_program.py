"""Convex quadratic programs, each sample with a status of its own.

    min over z in R^n of  ½ z'Qz + p'z   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

with Q [n, n] symmetric positive semidefinite, G [m, n], A [q, n]; any bound may be infinite, m and q may be 0.
Multipliers are signed: λ_i > 0 pushes back from h_i, λ_i < 0 from h_lower_i, and so μ for the box. Where solved,

    stationarity     Qz + p + G'λ + A'ν + μ = 0
    complementarity  max(λ, 0)'(h − Gz) + max(−λ, 0)'(Gz − h_lower) + the same of μ = 0

which sum is the duality gap. The method is `interior_point`; what that leaves is asked for a certificate, see
`infeasibility`.
"""

from typing import Any, Final, NamedTuple

from icnnrt.mathematics.infeasibility import farkas, recession
from icnnrt.mathematics.interior_point import BOUND_MAX, NEARLY, Answer, Problem, interior_point
from icnnrt.mathematics.namespace import Array, Namespace
from icnnrt.mathematics.qp_status import QPStatus

INFINITY: Final = float("inf")
NAN: Final = float("nan")


class Precision(NamedTuple):
    """What the type of the data decides, and the tolerance; numbers, or arrays that broadcast against [B, 1, 1]."""

    solved: Any  # the relative KKT residual that counts as solved
    ends: Any  # that by which steps end: the tolerance where one is asked for, whatever the type
    inaccurate: Any  # and as inaccurate
    away: Any  # how far a ray may leave what it should stay in, against sizes
    noise: Any  # what rounding may do to the eigenvalues of Q, in units of its largest entry and of n
    most: Any  # the largest number that the type holds


class Solution(NamedTuple):
    """What the operator gives."""

    z: Array  # [B, 1, n], NaN unless SOLVED or INACCURATE, and so the multipliers
    lam: Array  # [B, 1, m + n] of G and of the box
    nu: Array  # [B, 1, q]
    slack: Array  # [B, 1, m + n] of the side that λ points at; 0 of bounds that leave no room, and of nothing else
    # [B, 1, 3] relative, in the data's units or equilibrated: the larger; before it is rounded to the data's type
    residual: Array
    status: Array  # [B, 1, 1] a `QPStatus`, as a number
    ray: Array  # [B, 1, n + (m + n) + q] (d, λ, ν): a ray d of z, or a Farkas certificate; else 0
    steps: Array  # [B, 1, 1] that were taken, of certificates aside


def solve(xp: Namespace, problem: Problem, start: Array, precision: Precision, steps: Any) -> Solution:
    """Solve B problems, from start [B, 1, n + m + q + n] = (z, λ, ν, μ), cold where that is NaN. q >= 1.

    No sample depends on its neighbours. SOLVED and INACCURATE have z and multipliers; PRIMAL_INFEASIBLE and
    DUAL_INFEASIBLE have a ray instead, the others nothing but NaN.
    """
    Q, p, G, A, b, lower, upper = problem
    # Bounds that are none are made infinite, which no scaling brings within reach.
    lower = xp.where(abs(lower) >= BOUND_MAX, lower * INFINITY, lower)
    upper = xp.where(abs(upper) >= BOUND_MAX, upper * INFINITY, upper)
    # An upper bound of −inf, or a lower one of +inf, is no bound.
    is_bound = (upper > -BOUND_MAX) & (lower < BOUND_MAX)
    data = xp.concat([0.0 * p, *(xp.mT(xp.sum(0.0 * M)) for M in (Q, G, A)), 0.0 * b])
    finite = xp.all(is_bound) & xp.isfinite(xp.sum(data))
    crossed = ~xp.all(lower <= upper)
    # No sample may spoil another: those that cannot be solved are replaced while the others are.
    eyes = xp.eyes(Q)
    Q = xp.where(finite, 0.5 * (Q + xp.mT(Q)), eyes)
    p, G, A, b = (xp.where(finite, a, 0.0) for a in (p, G, A, b))
    size = xp.largest(Q)
    eye = xp.eye(Q)
    convex = xp.positive_definite(Q / xp.where(size > 0.0, size, 1.0) + precision.noise * xp.count(p) * eye, eye)
    trivial = ~finite | ~convex | crossed
    Q = xp.where(trivial, eyes, Q)
    lower, upper = xp.where(trivial, -INFINITY, lower), xp.where(trivial, INFINITY, upper)
    problem = Problem(Q, p, G, A, b, lower, upper)

    found = _interior_point(xp, problem, 0.0, precision.ends, start, ~trivial, steps)
    worst = xp.max(found.residual) + 0.0 * xp.sum(found.residual)
    unsolved = ~(worst <= precision.solved) & ~trivial
    none = xp.concat([0.0 * p, xp.ones_like(lower) - 1.0, 0.0 * b])
    status, ray = xp.cond(
        xp.any(unsolved),
        lambda: _certificates(xp, unsolved, problem, none, worst, precision, steps),
        lambda: (float(QPStatus.SOLVED) + xp.sum(none), none),
    )

    answer = xp.concat([found.z, found.lam, found.nu])
    beyond = ~(xp.largest(answer) + 0.0 * xp.sum(answer) <= precision.most)
    status = xp.where(beyond & (status <= float(QPStatus.INACCURATE)), float(QPStatus.FAILED), status)
    status = xp.where(crossed, float(QPStatus.PRIMAL_INFEASIBLE), status)
    status = xp.where(convex, status, float(QPStatus.NOT_CONVEX))
    status = xp.where(finite, status, float(QPStatus.NOT_FINITE_INPUT))
    lost = status > float(QPStatus.INACCURATE)
    z, lam, nu, slack, residual = (
        xp.where(lost, NAN, a) for a in (found.z, found.lam, found.nu, found.slack, found.residual)
    )
    return Solution(z, lam, nu, slack, residual, status, ray, found.steps)


# fmt: off
def _interior_point(
    xp: Namespace, problem: Problem, soft: float, tolerance: Any, start: Array, active: Array, steps: Any
) -> Answer:
    # fmt: on
    """`interior_point`, as a piece that stands in a graph once."""

    def solve(xp: Namespace, *arrays: Array) -> Answer:
        """`icnnrt.mathematics.interior_point` of Q, p, G, A, b, lower, upper, soft, tolerance, start, active, steps."""
        *of, soft, tolerance, start, active, steps = arrays
        return interior_point(xp, Problem(*of), soft, tolerance, start, active, steps)

    none = 0.0 * xp.count(problem.p)
    given = [*problem, soft + none, tolerance + none, start, active, steps]
    return Answer(*xp.piece("QPInteriorPoint", solve, given))


def _certificates(
    xp: Namespace, unsolved: Array, problem: Problem, none: Array, worst: Array, precision: Precision, steps: Any
) -> tuple[Array, Array]:
    """Status and ray of all samples, those that are unsolved asked for certificates, by themselves."""
    few = Problem(*(xp.pick(unsolved, a) for a in problem))
    n = few.p

    def solve(few: Problem, soft: float) -> Answer:
        cold = NAN + 0.0 * xp.concat([n, few.lower, few.b])
        active = xp.sum(0.0 * n) > -1.0
        return _interior_point(xp, few, soft, NEARLY, cold, active, steps)

    infeasible, lam, nu = farkas(xp, few, solve)
    falling, d = recession(xp, few, solve, precision.away)
    accurate = xp.pick(unsolved, worst) <= precision.inaccurate
    status = xp.where(accurate, float(QPStatus.INACCURATE), float(QPStatus.FAILED) + xp.sum(0.0 * n))
    status = xp.where(falling, float(QPStatus.DUAL_INFEASIBLE), status)
    status = xp.where(infeasible, float(QPStatus.PRIMAL_INFEASIBLE), status)
    none_few = xp.pick(unsolved, none)
    _, no_lam, no_nu = xp.parts(none_few, [n, lam, nu])
    along = xp.where(falling, xp.concat([d, no_lam, no_nu]), none_few)
    ray = xp.where(infeasible, xp.concat([0.0 * n, lam, nu]), along)
    return xp.put(unsolved, status, float(QPStatus.SOLVED) + xp.sum(none)), xp.put(unsolved, ray, none)
