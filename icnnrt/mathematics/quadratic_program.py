"""Convex quadratic programs, each sample with a status of its own.

    min over z in R^n of  ½ z'Qz + p'z   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

with Q [n, n] symmetric positive semidefinite, G [m, n], A [q, n]; any bound may be infinite, m and q may be 0.
Multipliers are signed: λ_i > 0 pushes back from h_i, λ_i < 0 from h_lower_i, and so μ for the box. Where solved,

    stationarity     Qz + p + G'λ + A'ν + μ = 0
    complementarity  max(λ, 0)'(h − Gz) + max(−λ, 0)'(Gz − h_lower) + the same of μ = 0

which sum is the duality gap. The method is `interior_point`. What it leaves begins again without the start, and then
with the bounds that it left out; what is left then is asked for a certificate, see `infeasibility`; and what has none
begins once more, in units of the z that was seen, with rows in other units and more steps.
"""

from typing import Any, Final, NamedTuple

from icnnrt.mathematics.infeasibility import farkas, recession
from icnnrt.mathematics.interior_point import BOUND_MAX, NEARLY, Answer, Problem, interior_point
from icnnrt.mathematics.namespace import Array, Namespace
from icnnrt.mathematics.qp_status import QPStatus

INFINITY: Final = float("inf")
NAN: Final = float("nan")
PERSISTENCE: Final = 4  # times the steps that are allowed, of what begins once more
PURSUED: Final = 30  # steps from which on it is not the few that were allowed that left a problem unsolved


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

    none = xp.concat([0.0 * p, xp.ones_like(lower) - 1.0, 0.0 * b])
    first = _interior_point(xp, problem, 0.0, precision.ends, start, ~trivial, steps, 0.0 * p, xp.sum(none))
    *answers, status, ray = xp.cond(
        xp.any(_unsolved(xp, first, precision) | _doubted(first)),
        lambda: _pursued(xp, problem, start, none, first, ~trivial, precision, steps),
        lambda: (*first, float(QPStatus.SOLVED) + xp.sum(none), none),
    )
    found = Answer(*answers)

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


def _worst(xp: Namespace, found: Answer) -> Array:
    """The largest residual, NaN if one is."""
    return xp.max(found.residual) + 0.0 * xp.sum(found.residual)


def _unsolved(xp: Namespace, found: Answer, precision: Precision) -> Array:
    return ~(_worst(xp, found) <= precision.solved)


def _doubted(found: Answer) -> Array:
    """What may be solved only in relation to a z of 1e10, to which a row that is off by 1 is nothing."""
    return found.off > 0.0


def _status(xp: Namespace, worst: Array, precision: Precision) -> Array:
    """SOLVED, INACCURATE or FAILED."""
    bad = xp.where(worst <= precision.inaccurate, float(QPStatus.INACCURATE), float(QPStatus.FAILED))
    return xp.where(worst <= precision.solved, float(QPStatus.SOLVED), bad + 0.0 * worst)


def _cold(xp: Namespace, problem: Problem) -> tuple[Array, Array]:
    """A start that is none, and that all samples are active."""
    none = xp.concat([0.0 * problem.p, xp.ones_like(problem.lower), 0.0 * problem.b])
    return NAN + none, xp.sum(none) > -1.0


# fmt: off
def _pursued(
    xp: Namespace, problem: Problem, start: Array, none: Array, first: Answer, sound: Array, precision: Precision,
    steps: Any
) -> tuple[Array, ...]:
    # fmt: on
    """Answers, statuses and rays where one attempt did not solve all, or may not have."""

    def attempt(before: Answer, again: Array, seen: Array, all_bounds: Array, steps: Any) -> Answer:
        """Those `again` from a cold start, by themselves: the better of both answers."""
        few = Problem(*(xp.pick(again, a) for a in problem))
        cold, active = _cold(xp, few)
        given = (xp.pick(again, a) for a in (seen, all_bounds))
        found = _interior_point(xp, few, 0.0, precision.ends, cold, active, steps, *given)
        found = Answer(*(xp.put(again, new, old) for new, old in zip(found, before, strict=True)))
        taken, worst = before.steps + xp.where(again, found.steps, 0.0), _worst(xp, before)
        better = (_worst(xp, found) < worst) | ~xp.isfinite(worst)
        found = Answer(*(xp.where(better, new, old) for new, old in zip(found, before, strict=True)))
        return found._replace(steps=taken)

    no_z = 0.0 * problem.p
    again = sound & _unsolved(xp, first, precision) & xp.isfinite(xp.sum(start))
    found = attempt(first, again, no_z, xp.sum(none), steps)
    again = sound & _unsolved(xp, found, precision) & (found.left_out > 0.0)
    found = attempt(found, again, no_z, 1.0 + xp.sum(none), steps)
    left = sound & _unsolved(xp, found, precision)
    asked = left | (sound & _doubted(found))
    status, ray = xp.cond(
        xp.any(asked),
        lambda: _certificates(xp, asked, problem, none, found, precision, steps),
        lambda: (float(QPStatus.SOLVED) + xp.sum(none), none),
    )
    certified = (status >= float(QPStatus.PRIMAL_INFEASIBLE)) & (status <= float(QPStatus.DUAL_INFEASIBLE))
    left = left & ~certified
    failed = left & (found.steps >= float(PURSUED)) & xp.isfinite(xp.sum(found.z))
    last = attempt(found, failed, found.z, xp.sum(none), PERSISTENCE * steps)
    return (*last, xp.where(left, _status(xp, _worst(xp, last), precision), status), ray)


# fmt: off
def _interior_point(
    xp: Namespace, problem: Problem, soft: float, tolerance: Any, start: Array, active: Array, steps: Any,
    seen: Array, all_bounds: Array
) -> Answer:
    # fmt: on
    """`interior_point`, as a piece that stands in a graph once."""

    def solve(xp: Namespace, *arrays: Array) -> Answer:
        """`icnnrt.mathematics.interior_point` of Q, p, G, A, b, lower, upper, soft, tolerance, start, active, steps,
        seen, all_bounds."""
        *of, soft, tolerance, start, active, steps, seen, all_bounds = arrays
        return interior_point(xp, Problem(*of), soft, tolerance, start, active, steps, seen, all_bounds)

    none = 0.0 * xp.count(problem.p)
    given = [*problem, soft + none, tolerance + none, start, active, steps, seen, all_bounds]
    return Answer(*xp.piece("QPInteriorPoint", solve, given))


def _certificates(
    xp: Namespace, asked: Array, problem: Problem, none: Array, found: Answer, precision: Precision, steps: Any
) -> tuple[Array, Array]:
    """Status and ray of all samples, some of them asked for certificates, by themselves."""
    few = Problem(*(xp.pick(asked, a) for a in problem))
    n = few.p

    def solve(few: Problem, soft: float, all_bounds: float = 0.0) -> Answer:
        cold, active = _cold(xp, few)
        return _interior_point(xp, few, soft, NEARLY, cold, active, steps, 0.0 * n, all_bounds + xp.sum(0.0 * n))

    worst, z = xp.pick(asked, _worst(xp, found)), xp.pick(asked, found.z)
    solved = worst <= precision.solved
    infeasible, lam, nu = farkas(xp, few, solve, xp.where(solved, z, 0.0))
    falling, d = recession(xp, few, solve, precision.away)
    falling = falling & ~solved
    status = _status(xp, worst, precision)
    status = xp.where(falling, float(QPStatus.DUAL_INFEASIBLE), status)
    status = xp.where(infeasible, float(QPStatus.PRIMAL_INFEASIBLE), status)
    none_few = xp.pick(asked, none)
    _, no_lam, no_nu = xp.parts(none_few, [n, lam, nu])
    along = xp.where(falling, xp.concat([d, no_lam, no_nu]), none_few)
    ray = xp.where(infeasible, xp.concat([0.0 * n, lam, nu]), along)
    return xp.put(asked, status, float(QPStatus.SOLVED) + xp.sum(none)), xp.put(asked, ray, none)
