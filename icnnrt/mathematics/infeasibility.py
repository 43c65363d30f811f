"""Certificates that a quadratic program has no solution.

What was not solved is asked whether it can be. The residual t of the least squares problem

    min over z of ½ ‖t‖²,  t = the amounts by which constraints are violated

is a Farkas certificate if it is not 0 (and a row of zeros whose bounds keep 0 out is one by itself). Where violations
are small, so is t, and known to few digits: so the problem is asked again about the z of the first answer, in units of
its violations. And the projection of −p onto {d: Qd = 0, Ad = 0, Cd within the recession cones of its bounds} is a ray
along which the objective falls without end if it is not 0. All are quadratic programs for the same interior point
method.
"""

from typing import Any, Final

from icnnrt.mathematics.condensed_kkt import transposed
from icnnrt.mathematics.interior_point import BOUND_MAX, Answer, Problem
from icnnrt.mathematics.namespace import TINY, Array, Namespace

CERTIFICATE: Final = 1e-7  # how well a certificate must hold: its residual against the amount it proves
CANCELLED: Final = 1e-6  # the same against the terms that cancel
FALLS: Final = 1e-6  # how fast the objective has to fall along a ray, against the same
OVERRULES: Final = 0.1  # the same, for any z as large as one that was found to be nearly feasible for its size
CERTIFIED: Final = 1e-9  # the least relative amount of infeasibility that is told from rounding


def farkas(xp: Namespace, problem: Problem, solve: Any, found: Array) -> tuple[Array, Array, Array]:
    """Whether no z is feasible [B, 1, 1], and λ [B, 1, m + n] and ν of the certificate: A'ν + C'λ = 0 though bounds sum
    to −1. `solve(problem, soft, all_bounds)` is the interior point method; found [B, 1, n] is a z that the certificate
    has to rule out, or 0."""
    Q, p, G, A, b, lower, upper = problem
    violated = problem._replace(Q=0.0 * Q, p=0.0 * p)
    z = solve(violated, 1.0).z
    C = xp.concat_rows([G, xp.eyes(Q)])
    r, left = z @ transposed(xp, C), b - z @ transposed(xp, A)
    out = xp.maximum(xp.largest(xp.maximum(xp.maximum(r - upper, lower - r), 0.0)), xp.largest(left))
    unit = xp.where(out > TINY, out, 1.0)
    # In these units bounds are far away that z may well reach: none is left out.
    moved = violated._replace(b=left / unit, lower=(lower - r) / unit, upper=(upper - r) / unit)
    proof: Answer = solve(moved, 1.0, 1.0)
    D = proof.D
    # Where 0'z cannot be within the bounds of a row of zeros.
    empty = xp.mT(xp.max(abs(C))) <= 0.0
    has_upper, has_lower = abs(upper) < BOUND_MAX, abs(lower) < BOUND_MAX
    against = xp.indicator(empty & has_upper & (upper < 0.0)) - xp.indicator(empty & has_lower & (lower > 0.0))
    against_nu = xp.where(xp.mT(xp.max(abs(A))) <= 0.0, -b, 0.0)
    contradicted = xp.largest(xp.concat([against, against_nu])) > 0.0
    lam, nu = xp.where(contradicted, against, proof.lam), xp.where(contradicted, against_nu, proof.nu)
    pointed = xp.where(lam >= 0.0, upper, lower)
    bound = xp.where(abs(pointed) < BOUND_MAX, pointed, 0.0)
    terms = xp.concat([lam * bound, nu * b])
    amount = -xp.sum(terms)
    # In units of z: no z of a reasonable size makes up for what is off.
    off = xp.largest((lam @ C + nu @ A) * D)
    magnitude = xp.largest((abs(lam) @ abs(C) + abs(nu) @ abs(A)) * D)
    most = xp.minimum(CERTIFICATE * amount, CANCELLED * magnitude)
    overrules = off * xp.sum(abs(found / D)) <= OVERRULES * amount
    proven = (amount > CERTIFIED * xp.sum(abs(terms))) & (off <= most) & overrules
    unit = xp.where(amount > 0.0, amount, 1.0)
    return proven, lam / unit, nu / unit


def recession(xp: Namespace, problem: Problem, solve: Any, away: Array) -> tuple[Array, Array]:
    """Whether the objective falls without end along some d [B, 1, 1], and that d [B, 1, n], p'd = −1.

    away: how far d may leave what it should stay in, against the sizes of the row and of d.
    """
    Q, p, G, A, _, lower, upper = problem
    has_upper, has_lower = abs(upper) < BOUND_MAX, abs(lower) < BOUND_MAX
    flat = xp.concat_rows([A, Q])
    cone = Problem(
        Q=xp.eyes(Q),
        p=p / xp.maximum(xp.largest(p), TINY),
        G=G,
        A=flat,
        b=0.0 * xp.mT(xp.sum(flat)),
        lower=xp.where(has_lower, 0.0, lower),
        upper=xp.where(has_upper, 0.0, upper),
    )
    found: Answer = solve(cone, 0.0)
    d, D = found.z, found.D
    C = xp.concat_rows([G, xp.eyes(Q)])
    amount = -xp.sum(p * d)
    r, flat_d = d @ transposed(xp, C), d @ transposed(xp, flat)
    # Each row against its own size and that of d, in units of z.
    length = xp.largest(d / D)
    most = away * length * xp.mT(xp.concat_rows([xp.max(abs(C * D)), xp.max(abs(flat * D))]))
    violation = xp.maximum(xp.where(has_upper, r, 0.0), xp.where(has_lower, -r, 0.0))
    leaves = xp.sum(xp.indicator(xp.concat([violation, abs(flat_d)]) <= most) - 1.0)
    falls = (amount > 0.0) & (amount >= FALLS * (xp.largest(p * D) * length))
    return falls & (leaves >= 0.0), d / xp.where(amount > 0.0, amount, 1.0)
