"""A point of the central path of a quadratic program, and the adjoint there: a smoothed gradient.

For κ > 0 and s the slacks of lower <= Cz <= upper, C = [G; I], one a bound,

    z_κ = argmin ½ z'Qz + p'z − κ Σ log s   s.t.  Az = b

with Qz + p + C'λ + A'ν = 0, λ = l_upper − l_lower and l∘s = κ on every side (Fiacco, McCormick, *Nonlinear programming:
sequential unconstrained minimization techniques*, 1968). Its objective is at most κ times the number of bounds above
the least. It is a smooth function of the data where the argmin jumps or has a kink, and tells a learner of constraints
that are not active yet. Rows with lower = upper are equalities.

With w = l/s of every side and W = w_upper + w_lower, λ moves with Cz by W. So for a loss ℓ with z̄, λ̄, ν̄::

    [Q   C'    A'] [d_z]   [−z̄]
    [C  −W⁻¹     ] [d_λ] = [−λ̄]       ∂ℓ/∂upper = −d_λ w_upper/W,   ∂ℓ/∂lower = −d_λ w_lower/W
    [A           ] [d_ν]   [−ν̄]

and all else is as in `qp_adjoint`, which this becomes as κ falls to 0.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from icnnrt.mathematics.condensed_kkt import Step, solver
from icnnrt.mathematics.interior_point import Equilibrated, Problem, beyond, both, equilibrated, newton, split
from icnnrt.mathematics.namespace import TINY, Array, Namespace

STEPS: Final = 60  # bound on Newton steps: 3 to 12 are usual
ENOUGH: Final = 1e-9  # relative residual of the conditions at which a point is on the path
OF_A_SLACK: Final = 1e-6  # what may be left of the conditions, against the least slack
TO_BOUNDARY: Final = 0.99
RHO: Final = 1e-11  # proximal weights of z and of constraints
DELTA: Final = 1e-10
PASSES: Final = 4  # of the proximal point method: 2 are usual


class Smoothed(NamedTuple):
    """Points of the central path and the adjoint there; NaN where none was found, or the answer is NaN."""

    z: Array  # [B, n]
    lam: Array  # [B, m]
    nu: Array  # [B, q]
    mu: Array  # [B, n]
    d_z: Array
    d_lam: Array
    d_nu: Array
    d_mu: Array
    share: Array  # [B] of the loss that has no gradient there; infinite where no point was found
    upper: Array  # [B, m] w_upper/W: the part of the upper bound in what a row does; 1 of equalities
    box_upper: Array  # [B, n] the same of the box


def smoothed(
    xp: Namespace, data: Sequence[Array], answer: Sequence[Array], bars: Sequence[Array], kappa: Any
) -> Smoothed:
    """The point of the central path and the adjoint there, of B problems, in float64.

    data: Q, p, G, h_lower, h, A, b, lower, upper, [B, ...] each, bounds infinite where there is none. answer: z, λ, ν
    and μ of the optimum; bars: z̄, λ̄, ν̄ and μ̄ in their shapes. kappa > 0 is in units of the objective.
    """
    Q, p, G, h_lower, h, A, b, lower, upper = data
    z, lam, nu, mu, *bars = (xp.row(a) for a in (*answer, *bars))
    has_answer = xp.isfinite(xp.sum(xp.concat([z, lam, nu, mu])))
    kappa = kappa + 0.0 * xp.indicator(has_answer)

    def sound(a: Array) -> Array:
        return xp.where(has_answer, a, 0.0 * kappa)

    # A row of zeros more, as there must be one: 0'z = 0.
    A, no_b = xp.concat_rows([A, 0.0 * xp.row(p)]), 0.0 * kappa
    b, nu, nu_bar = (xp.concat([a, no_b]) for a in (xp.row(b), nu, bars[2]))
    rows = [xp.row(xp.concat(pair)) for pair in ((h_lower, lower), (h, upper))]
    problem = Problem(*(sound(a) for a in (0.5 * (Q + xp.mT(Q)), xp.row(p), G, A, b)), *rows)
    at = equilibrated(xp, problem, no_b, no_b + ENOUGH, 0.0 * problem.p, no_b + 1.0)
    kappa = kappa * at.c  # λ = F λ̂ / c, s = ŝ / F
    x, found = central_point(xp, at, sound(z), sound(xp.concat([lam, mu])), sound(nu), kappa)
    found = found & has_answer
    z, nu, l, s = split(xp, at, x)  # noqa: E741
    l_upper, l_lower = xp.halves(l)
    w_upper, w_lower = xp.halves(at.has * l / s)
    W, (equal, _) = w_upper + w_lower, xp.halves(xp.indicator(at.is_equal))
    z_bar, lam_bar, _, mu_bar = bars
    (d_z, d_lam, d_nu), share = adjoint(xp, at, W, equal, (z_bar, xp.concat([lam_bar, mu_bar]), nu_bar))

    def told(a: Array, *like: Array) -> list[Array]:
        a = xp.where(found, a, float("nan"))
        return [xp.slot(part, 0) for part in (xp.parts(a, like) if like else [a])]

    part = xp.where(W > 0.0, w_upper / xp.where(W > 0.0, W, 1.0), 1.0)
    (lam, mu), (d_lam, d_mu), (part_lam, part_mu) = (
        told(a, lam_bar, mu_bar) for a in ((l_upper - l_lower) * at.F / at.c, d_lam * at.F, part)
    )
    (nu, _), (d_nu, _) = (told(a, bars[2], None) for a in (nu * at.E / at.c, d_nu * at.E))
    (z,), (d_z,) = told(z * at.D), told(d_z * at.D * at.c)
    share = xp.where(found, share, float("inf"))
    return Smoothed(z, lam, nu, mu, d_z, d_lam, d_nu, d_mu, xp.slot(xp.slot(share, 0), 0), part_lam, part_mu)


def central_point(
    xp: Namespace, at: Equilibrated, z: Array, lam: Array, nu: Array, kappa: Array
) -> tuple[Array, Array]:
    """(z, ν, l, s) in one row, and whether it is on the path: by Newton's method from the optimum z, (λ, μ), ν.

    The start has l∘s = κ and s − l as at the optimum.
    """
    z, nu, lam = z / at.D, nu * at.c / at.E, both(xp, lam * at.c / at.F)
    is_bound = at.has > 0.0
    apart = at.u - both(xp, z @ at.of.Ct) - lam
    root = xp.sqrt(apart * apart + 4.0 * kappa)
    s = xp.where(apart > 0.0, 0.5 * (apart + root), 2.0 * kappa / xp.maximum(root - apart, TINY))
    s = xp.where(is_bound, s, 1.0)
    l = xp.where(is_bound, kappa / s, xp.where(at.is_equal, lam, 0.0))  # noqa: E741

    x = xp.concat([z, nu, l, s])
    r_d, r_nu, r_s, off = off_path(xp, at, x, kappa)

    def unfinished(*state: Array) -> Array:
        return xp.any(state[-1] > ENOUGH)

    def next_of(x: Array, r_d: Array, r_nu: Array, r_s: Array, off: Array) -> tuple[Array, ...]:
        x = xp.where(off > ENOUGH, newton_step(xp, at, x, (r_d, r_nu, r_s), kappa), x)
        return x, *off_path(xp, at, x, kappa)

    x, *_, off = xp.loop(unfinished, next_of, (x, r_d, r_nu, r_s, off), STEPS)
    return x, off <= ENOUGH


def off_path(xp: Namespace, at: Equilibrated, x: Array, kappa: Array) -> tuple[Array, Array, Array, Array]:
    """r_d, r_ν, r_s, and the largest of them and of l∘s/κ − 1, each against the size of its terms."""
    z, nu, l, s = split(xp, at, x)  # noqa: E741
    l_upper, l_lower = xp.halves(l)
    (Qz, _, _, C_lam, _), sides, r_d, r_nu = beyond(xp, at, z, nu, l_upper - l_lower)
    r_s = xp.where(at.is_equal, sides, (sides + s) * at.has)
    held = xp.where(at.has + xp.indicator(at.is_equal) > 0.0, at.u, 0.0)
    terms = [(r_d, [at.p, Qz, C_lam]), (r_nu, [at.b]), (r_s, [held, z])]
    sizes = [xp.largest(r) / (1.0 + xp.largest(xp.concat(row))) for r, row in terms]
    # What is left may move z by no more than a little of the least slack, by which a row acts.
    nearest = xp.min(xp.where(at.has > 0.0, s, 1.0))
    left = (ENOUGH / OF_A_SLACK) * xp.largest(xp.concat([r_d, r_nu, r_s])) / nearest
    off = xp.max(xp.concat([*sizes, left, xp.largest(at.has * (l * s / kappa - 1.0))]))
    return r_d, r_nu, r_s, xp.where(xp.isfinite(xp.sum(x)), off, float("inf"))


def newton_step(
    xp: Namespace, at: Equilibrated, x: Array, residuals: tuple[Array, Array, Array], kappa: Array
) -> Array:
    """One step to l∘s = κ and residuals of 0, as far as l and s stay positive."""
    z, nu, l, s = split(xp, at, x)  # noqa: E741
    none = 0.0 * kappa
    direction = newton(xp, at, l, s, residuals, RHO + none, DELTA + none)
    dz, dnu, dl, ds = direction(at.has * (kappa - l * s))
    l_safe = xp.where(at.has > 0.0, l, float("inf"))
    a = TO_BOUNDARY / xp.maximum(xp.maximum(-xp.min(ds / s), -xp.min(dl / l_safe)), TO_BOUNDARY)
    return xp.concat([z + a * dz, nu + a * dnu, l + a * dl, s + a * ds])


def adjoint(
    xp: Namespace, at: Equilibrated, W: Array, equal: Array, bars: tuple[Array, Array, Array]
) -> tuple[Step, Array]:
    """(d_z, d_λ, d_ν) and the share of the right-hand side that is not reached, by the proximal point method from 0."""
    z_bar, lam_bar, nu_bar = bars
    holds = xp.indicator(W + equal > 0.0)
    r_z, r, r_nu = -z_bar * at.D, holds * (-lam_bar * at.F / at.c), -nu_bar * at.E / at.c
    give = xp.where(W > 0.0, 1.0 / xp.where(W > 0.0, W, 1.0), 0.0)
    none = 0.0 * at.c
    solve = solver(xp, at.of, holds / (give + DELTA), RHO + none, DELTA + none)

    def left(x: Step) -> Step:
        dz, dlam, dnu = x
        return (
            r_z - dz @ at.of.Q - dlam @ at.of.C - dnu @ at.of.A,
            holds * (r - dz @ at.of.Ct + give * dlam),
            r_nu - dz @ at.of.At,
        )

    x = 0.0 * r_z, 0.0 * r, 0.0 * r_nu
    for _ in range(PASSES):
        e_z, e, e_nu = left(x)
        dz, dlam, dnu = solve(e_z, -e, e_nu, 1)
        x = x[0] + dz, x[1] + dlam, x[2] + dnu
    size = xp.largest(xp.concat([r_z, r, r_nu]))
    return x, xp.largest(xp.concat(list(left(x)))) / xp.where(size > 0.0, size, 1.0)
