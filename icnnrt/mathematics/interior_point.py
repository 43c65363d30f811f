"""Mehrotra's predictor-corrector interior point method for convex quadratic programs, with proximal regularisation.

    min over z of  ½ z'Qz + p'z   s.t.  lower <= Cz <= upper,   Az = b,      C = [G; I]

on all sides at once: [C; −C] z + s = [upper; −lower], λ = l_upper − l_lower, and l and s are 0 and 1 where there is no
bound. Rows with lower = upper are equalities, whose λ has either sign; it stands in the place of l_upper.

Every constraint has the proximal weight δ, and z has ρ, about a centre that moves with every step, so that
right-hand sides do not see them and the answer does not either (Friedlander and Orban, *A primal-dual regularized
interior-point method for convex quadratic programs*, 2012; Pougkakiotis and Gondzio, *An interior point-proximal method
of multipliers for convex quadratic programming*, 2021). So no weight l/(s + δl) exceeds 1/δ, and no system is singular.
Primal and dual variables have step lengths of their own, 1 / max(−ds/s) and 1 / max(−dl/l).

With soft > 0 a constraint may be violated by t at a price of ½ t² / soft; then its multiplier is t / soft.

Vectors are rows, numbers of a sample [B, 1, 1]. Everything is solved equilibrated: z = D ẑ, λ = F λ̂ / c, ν = E ν̂ / c,
s = ŝ / F. Samples that are done stand still.

A bound that is far beyond the size of z is left out of the steps, where its slack would drown everything in rounding,
and judged at the answer like all others: z within it proves that its multiplier is 0.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from icnnrt.mathematics.condensed_kkt import Matrices, matrices, solver
from icnnrt.mathematics.namespace import EPS, Array, Namespace

STEPS: Final = 60  # bound on steps: 6 to 30 are usual
BOUND_MAX: Final = 1e20  # bounds from there on are none, as other solvers and files have it
WARM: Final = 1e-2  # the least slack and multiplier of a warm start, in units of the equilibrated problem
ENOUGH: Final = 1e-12  # relative KKT residual at which a sample stops
NEARLY: Final = 1e-9  # and at which it does after so many steps without progress
BEYOND: Final = 1e-3  # of a looser tolerance, at which a sample stops: the active set is found by then
PATIENCE: Final = 3
PROGRESS: Final = 0.7
# Far from the solution and after so many steps without progress, predictor and corrector cycle: then a step has no
# second order and at least this σ, which takes it back to the central path.
CYCLES: Final = 6
CENTRING: Final = 0.3
TO_BOUNDARY: Final = 0.995
SMALLEST: Final = 1e-20  # of slacks and multipliers, so that their quotients stay finite
RHO: Final = 1e-8, 1e-12  # ρ: at the start, and the least
LEAST_DELTA: Final = 1e-10  # δ = ρ until then
# Close to the solution and after so many steps without progress δ is this instead: weights of 1e10 have roundings that
# hide the curvature of what they leave free (with δ = 1e-10 throughout, 27 of 4,000 hostile problems stay above 1e-9;
# with 1e-7 throughout, degenerate ones do).
STUCK: Final = 2
CLOSE: Final = 1e-6
STUCK_DELTA: Final = 1e-7
EQUILIBRATIONS: Final = 10
LEVEL: Final = 4.0  # a problem whose rows and columns are within this factor of 1 is left alone
LEVER_OF_P: Final = 16.0  # p counts this much less than Q in the size of the objective: curvature makes z of it
FAR: Final = 64.0  # and so are variables whose size seems to be within this one
NARROW: Final = 1e-9
NOTICEABLE: Final = 1e-6  # relative violation of a bound, by its own size: of z of 1e10, 1 is nothing
APART: Final = 4.0  # what units of rows are multiplied with, or divided by, in a last attempt
LOOSE: Final = 1e5  # times the size of z: bounds from there on are left out of steps
INFINITY: Final = float("inf")


class Problem(NamedTuple):
    """B problems as rows and matrices; Q symmetric."""

    Q: Array  # [B, n, n]
    p: Array  # [B, 1, n]
    G: Array  # [B, m, n]
    A: Array  # [B, q, n], q >= 1
    b: Array  # [B, 1, q]
    lower: Array  # [B, 1, m + n] of [Gz; z]
    upper: Array  # [B, 1, m + n]


class Answer(NamedTuple):
    """The best iterate, in the units of the data."""

    z: Array  # [B, 1, n]
    lam: Array  # [B, 1, m + n], signed: λ > 0 pushes back from upper
    nu: Array  # [B, 1, q]
    slack: Array  # [B, 1, m + n] of the side that λ points at
    residual: Array  # [B, 1, 3] relative stationarity, feasibility, duality gap: the larger of both units
    D: Array  # [B, 1, n] the units of z
    steps: Array  # [B, 1, 1] that were taken
    left_out: Array  # [B, 1, 1] how many bounds were left out of them
    off: Array  # [B, 1, 1] > 0: a row is off noticeably for its own bound, in units of the data


class Units(NamedTuple):
    """What brings amounts of an equilibrated problem into its own units, by 1, and into those of the data: two rows."""

    column: Array  # [B, 2, n] of gradients
    columns: Array  # [B, 2, 5 n] five times over
    row: Array  # [B, 2, 2 (m + n)] of bounds that there are, also of equalities; 0 elsewhere
    equality: Array  # [B, 2, q]
    equalities: Array  # [B, 2, 2 q] twice
    cost: Array  # [B, 2, 1]


class Equilibrated(NamedTuple):
    """A problem in its own units, and those units."""

    of: Matrices
    p: Array
    b: Array
    u: Array  # [B, 1, 2 (m + n)] bounds of both sides, 0 where there is none
    has: Array  # 1 where there is a bound of an inequality, else 0
    is_equal: Array  # bool, on the upper side of equalities
    loose: Array  # 1 where there is one that is left out of the steps
    N: Array  # how many inequalities there are, at least 1
    fixed: Array  # 1 where the centre of multipliers is 0 until the solution is close
    soft: Array
    enough: Array  # the relative KKT residual at which a sample stops
    nearly: Array  # and at which it does after `PATIENCE` steps without progress
    units: Units
    D: Array  # [B, 1, n]
    F: Array  # [B, 1, m + n]
    E: Array  # [B, 1, q]
    c: Array


class Iterate(NamedTuple):
    """Where the method stands."""

    x: Array  # (z, ν, l, s) in one row
    rho: Array
    mu: Array  # mean of l∘s
    r_d: Array
    r_nu: Array
    r_s: Array
    best_x: Array
    best_residual: Array
    idle: Array  # steps without progress
    taken: Array  # steps
    going: Array  # bool


# fmt: off
def interior_point(
    xp: Namespace, problem: Problem, soft: Array, tolerance: Array, start: Array, active: Array, steps: Any,
    seen: Array, all_bounds: Array
) -> Answer:
    # fmt: on
    """Solve the samples that are `active` [B, 1, 1], from start [B, 1, n + m + q + n] = (z, λ, ν, μ), NaN: cold.

    tolerance [B, 1, 1] is the relative KKT residual that is asked for. Steps end below it, where that is loose.
    seen [B, 1, n] is the z of an attempt that failed, 0 before there is one. It tells the size of z, rows have other
    units then, and multipliers are held near 0 until the solution is close: where rows depend on each other, nothing
    else keeps theirs from running away. all_bounds [B, 1, 1]: 1 where bounds that are far beyond z take part in steps
    all the same.
    """
    scaled = equilibrated(xp, problem, soft, tolerance, seen, all_bounds)

    def unfinished(*state: Array) -> Array:
        return xp.any(Iterate(*state).going)

    def next_of(*state: Array) -> Iterate:
        return step(xp, scaled, Iterate(*state))

    return finished(xp, scaled, Iterate(*xp.loop(unfinished, next_of, first(xp, scaled, start, active), steps)))


# --- Units ---------------------------------------------------------------------------------------


def units(xp: Namespace, Q: Array, p: Array, G: Array, A: Array) -> tuple[Array, ...]:
    """Q, p, G, A equilibrated, and the units D [B, 1, n] of z, F [B, 1, m + n] and E [B, 1, q] of rows, c of the
    objective.

    Rows of G and A are brought to size 1, so that their units leave no trace in those of z; then rows and columns of
    [Q; G; A] near it (Ruiz), and the objective before every sweep: so columns are scaled by constraints rather than by
    penalties, and a slack that costs 1e6 stays in its own units.
    """

    def unfinished(*state: Array) -> Array:
        return xp.any(state[-1])

    def sweep(*state: Array) -> tuple[Array, ...]:
        return swept(xp, *state)

    c, E_G, E_A = unit_of_cost(xp, Q, p), unit(xp, xp.max(abs(G))), unit(xp, xp.max(abs(A)))
    begin = (Q * c, p * c, G * E_G, A * E_A, xp.ones_like(p), E_G, E_A, c, c > 0.0)
    Q, p, G, A, D, E_G, E_A, c, _ = xp.loop(unfinished, sweep, begin, EQUILIBRATIONS)
    return Q, p, G, A, D, xp.concat([xp.mT(E_G), 1.0 / D]), xp.mT(E_A), c


def unit_of_cost(xp: Namespace, Q: Array, p: Array) -> Array:
    """What brings the larger of Q and p next to 1."""
    return unit(xp, xp.maximum(xp.largest(Q), xp.largest(p) / LEVER_OF_P))


def unit(xp: Namespace, size: Array) -> Array:
    """The power of 2 that brings a size next to 1, if it is not within `LEVEL` of it."""
    far = ((size > LEVEL) | (size < 1.0 / LEVEL)) & (size > 0.0)
    return xp.power_of_2(1.0 / xp.where(far, size, 1.0))


# fmt: off
def swept(
    xp: Namespace, Q: Array, p: Array, G: Array, A: Array, D: Array, E_G: Array, E_A: Array, c: Array, going: Array
) -> tuple[Array, ...]:
    """One sweep of those samples that need it."""
    # fmt: on
    size_G, size_A = abs(G), abs(A)
    of_columns = xp.maximum(xp.max(xp.mT(abs(Q))), xp.max(xp.mT(xp.concat_rows([size_G, size_A]))))
    of_rows = xp.max(size_G), xp.max(size_A)
    sizes = xp.concat_rows([of_columns, *of_rows])
    off = xp.largest(xp.where(sizes > 0.0, xp.maximum(sizes, 1.0 / xp.where(sizes > 0.0, sizes, 1.0)), 1.0))
    going = going & (off > LEVEL)

    def root(size: Array) -> Array:
        """A power of 2, by which nothing is rounded."""
        return xp.where(going & (size > 0.0), xp.power_of_2(1.0 / xp.sqrt(xp.clip(size, 1e-12, 1e12))), 1.0)

    d, g, a = xp.mT(root(of_columns)), root(of_rows[0]), root(of_rows[1])
    Q, p, G, A = Q * xp.mT(d) * d, p * d, G * g * d, A * a * d
    more = xp.where(going, unit_of_cost(xp, Q, p), 1.0)
    return Q * more, p * more, G, A, D * d, g * E_G, a * E_A, c * more, going


# fmt: off
def equilibrated(
    xp: Namespace, problem: Problem, soft: Array, tolerance: Array, seen: Array, all_bounds: Array
) -> Equilibrated:
    # fmt: on
    """The problem in its own units."""
    Q, p, G, A, b, lower, upper = problem
    Q, p, G, A, D, F, E, c = units(xp, Q, p, G, A)
    # Every measure of the method has a floor of 1: z is brought near it, so that an answer has no units.
    size_seen = xp.largest(seen / D)
    G, F = apart(xp, G, F, p, size_seen > 0.0)
    tau = size_of_z(xp, Q, p, bounds_of(xp, lower * F, upper * F)[0], b * E, all_bounds, size_seen)
    Q, p, D, F, E = Q * (tau * tau), p * tau, D * tau, F / tau, E / tau
    more = unit_of_cost(xp, Q, p)
    Q, p, c = Q * more, p * more, c * more
    u, has_any = bounds_of(xp, lower * F, upper * F)
    has_upper, has_lower = xp.halves(has_any)
    equal = (lower >= upper) & (has_upper * has_lower > 0.0)
    sides = xp.where(xp.concat([equal, equal]), 0.0, has_any)
    loose = sides * xp.indicator((u > LOOSE) & (all_bounds <= 0.0))
    has = sides - loose

    def of_both(units: Array) -> Array:
        return xp.concat_rows([0.0 * units + 1.0, units])

    column, equality = of_both(1.0 / (D * c)), of_both(1.0 / E)
    return Equilibrated(
        of=matrices(xp, Q, G, A),
        p=p,
        b=b * E,
        u=u,
        has=has,
        is_equal=xp.concat([xp.indicator(equal), 0.0 * F]) > 0.0,
        loose=loose,
        N=xp.maximum(xp.sum(has), 1.0),
        fixed=xp.indicator(size_seen > 0.0),
        soft=soft,
        enough=xp.minimum(tolerance, xp.maximum(BEYOND * tolerance, ENOUGH)),
        nearly=xp.maximum(tolerance, NEARLY),
        units=Units(
            column=column,
            columns=xp.concat([column] * 5),
            row=xp.concat_rows([has_any, has_any / xp.concat([F, F])]),
            equality=equality,
            equalities=xp.concat([equality, equality]),
            cost=of_both(1.0 / c),
        ),
        D=D,
        F=F,
        E=E,
        c=c,
    )


def apart(xp: Namespace, G: Array, F: Array, p: Array, last: Array) -> tuple[Array, Array]:
    """G and F with the first half of the rows of G in other units than the second, in a `last` attempt: rounding takes
    another way then, and where many answers are nearly as good, another way is what is missing."""
    m, at = xp.count(F) - xp.count(p), xp.double(xp.places(F))
    first, box = at + at < m, at >= m
    more = xp.where(last, xp.where(box, 1.0, xp.where(first, APART, 1.0 / APART)), xp.ones_like(F))
    of_rows, _ = xp.parts(more, [None, p])
    return G * xp.mT(of_rows), F * more


# fmt: off
def size_of_z(
    xp: Namespace, Q: Array, p: Array, u: Array, b: Array, all_bounds: Array, size_seen: Array
) -> Array:
    # fmt: on
    """A power of 2 near the size of z: that seen, else what b and bounds away from 0 demand, else what curvature and
    bounds allow, those left out that are far beyond the least.

    1 where z is of that size already or nothing tells. A bound u < 0 keeps z from 0.
    """
    curvature = xp.mean(xp.mT(xp.sum(Q * xp.eye(Q))))
    bent = curvature > 0.0
    pull = xp.largest(p)
    allowed = xp.where(bent, pull / xp.where(bent, curvature, 1.0), xp.where(pull > 0.0, INFINITY, 0.0))
    away = xp.maximum(xp.largest(b), xp.largest(xp.minimum(u, 0.0)))
    least = xp.maximum(xp.min(xp.where(u > 0.0, u, INFINITY)), xp.maximum(away, 1.0))
    held = xp.largest(xp.where((u > LOOSE * least) & (all_bounds <= 0.0), 0.0, u))
    allowed = xp.minimum(allowed, xp.where(held > 0.0, held, INFINITY))
    size = xp.where(size_seen > 0.0, size_seen, xp.maximum(away, allowed))
    known = ((size < 1.0 / FAR) | (size > FAR)) & (size > 0.0) & (size < INFINITY)
    return xp.power_of_2(xp.clip(xp.where(known, size, 1.0), 2.0**-60, 2.0**60))


def bounds_of(xp: Namespace, lower: Array, upper: Array) -> tuple[Array, Array]:
    """[upper; −lower], 0 where there is no bound, and where there is one: 1, else 0."""
    sides = xp.concat([upper, -lower])
    is_bound = abs(sides) < BOUND_MAX
    return xp.where(is_bound, sides, 0.0), xp.indicator(is_bound)


# --- Steps ---------------------------------------------------------------------------------------


def split(xp: Namespace, at: Equilibrated, x: Array) -> tuple[Array, Array, Array, Array]:
    """z, ν, l, s."""
    z, nu, l, s = xp.parts(x, [at.p, at.b, at.u, at.u])  # noqa: E741
    return z, nu, l, s


def both(xp: Namespace, r: Array) -> Array:
    """The amounts [r; −r] of both sides."""
    return xp.concat([r, -r])


def first(xp: Namespace, at: Equilibrated, start: Array, active: Array) -> Iterate:
    """The iterate to begin with: cold, the minimiser of the objective plus ½ ‖slacks‖² on the equalities, its slacks
    and multipliers lifted above 0 and balanced (Mehrotra, *On the implementation of a primal-dual interior point
    method*, 1992); warm, an interior point near `start`."""
    of, p, b, u, has, is_equal, soft = at.of, at.p, at.b, at.u, at.has, at.is_equal, at.soft
    is_bound = has > 0.0
    has_upper, has_lower = xp.halves(has)
    u_upper, u_lower = xp.halves(u)
    rho = RHO[0] + 0.0 * at.N
    delta = soft + rho
    sides, equal = has_upper + has_lower, xp.halves(xp.indicator(is_equal))[0] > 0.0
    t = xp.where(equal, -u_upper, (u_lower * has_lower - u_upper * has_upper) / xp.maximum(sides, 1.0))
    W = xp.where(equal, 1.0 / delta, sides / (1.0 + soft))
    z, lam, nu = solver(xp, of, W, rho, delta)(-p, t, b, 0)
    s = u - both(xp, z @ of.Ct)

    def lifted(a: Array) -> Array:
        return xp.where(is_bound, a - 1.5 * xp.min(xp.where(is_bound, xp.minimum(a, 0.0), 0.0)), 0.0)

    s, l = lifted(s), lifted(-s)  # noqa: E741
    total = xp.sum(s * l)
    balanced = total > 1e-8 * at.N

    def balance(by: Array) -> Array:
        return xp.where(balanced, xp.clip(0.5 * total / xp.maximum(by, 1e-300), 1e-4, 1e8), 1.0)

    s, l = xp.where(is_bound, s + balance(xp.sum(l)), 1.0), xp.where(is_bound, l + balance(xp.sum(s)), 0.0)  # noqa: E741
    cold = xp.concat([z, nu, xp.where(is_equal, both(xp, lam), l), s])

    z_given, lam_given, nu_given, mu_given = xp.parts(start, [p, None, b, p])
    z = z_given / at.D
    multiplier = xp.concat([lam_given, mu_given]) * at.c / at.F
    multipliers = both(xp, multiplier)
    l = xp.where(is_bound, xp.maximum(multipliers, WARM), xp.where(is_equal, multipliers, 0.0))  # noqa: E741
    s = xp.where(is_bound, xp.maximum(u - both(xp, z @ of.Ct), WARM), 1.0)
    warm = xp.concat([z, nu_given * at.c / at.E, l, s])
    x = xp.where(xp.isfinite(xp.sum(start)), warm, cold)

    mu, r_d, r_nu, r_s, residual, outside = evaluated(xp, at, x)
    going = active & (residual > at.enough) & ~outside
    return Iterate(x, rho, mu, r_d, r_nu, r_s, x, residual, 0.0 * rho, 0.0 * rho, going)


def evaluated(xp: Namespace, at: Equilibrated, x: Array) -> tuple[Array, ...]:
    """μ, the residuals r_d, r_ν and r_s, the largest relative residual, infinite if not finite, and whether z is beyond
    bounds that are left out, as it is where nothing else holds it."""
    z, nu, l, s = split(xp, at, x)  # noqa: E741
    l_upper, l_lower = xp.halves(l)
    lam = l_upper - l_lower
    sides, r_d, r_nu, residuals = measured(xp, at, z, nu, lam)
    r_s = xp.where(at.is_equal, sides, (sides + at.soft * (both(xp, lam) - l) + s) * at.has)
    sl = xp.sum(s * l * at.has)
    known = xp.isfinite(sl + xp.sum(r_d))  # sums are NaN where anything is NaN or infinite
    outside = xp.max(sides * at.loose) > 0.0
    return sl / at.N, r_d, r_nu, r_s, xp.where(known, xp.largest(residuals), INFINITY), outside


def newton(
    xp: Namespace, at: Equilibrated, l: Array, s: Array, residuals: tuple[Array, Array, Array], rho: Array, delta: Array  # noqa: E741
) -> Callable[[Array], tuple[Array, Array, Array, Array]]:
    """The function from c to the Newton step dz, dν, dl, ds to l∘s + c = 0 and to residuals r_d, r_ν, r_s of 0; c is 0
    where there is no bound."""
    has, of = at.has, at.of
    r_d, r_nu, r_s = residuals
    s_delta = s + delta * l
    w = xp.where(at.is_equal, 1.0 / delta, has * l / s_delta)
    w_upper, w_lower = xp.halves(w)
    W = w_upper + w_lower
    W_safe = xp.where(W > 0.0, W, 1.0)
    solved = solver(xp, of, W, rho, delta)
    minus_r_d, minus_r_nu = -r_d, -r_nu

    def direction(c: Array) -> tuple[Array, Array, Array, Array]:
        f = c / s_delta + w * r_s
        f_upper, f_lower = xp.halves(f)
        dz, d_lam, dnu = solved(minus_r_d, (f_upper - f_lower) / W_safe, minus_r_nu, 1)
        dr = both(xp, dz @ of.Ct)
        dl = xp.where(at.is_equal, both(xp, d_lam), f + w * dr)
        return dz, dnu, dl, has * (delta * dl - r_s - dr)

    return direction


def step(xp: Namespace, at: Equilibrated, iterate: Iterate) -> Iterate:
    """One predictor-corrector step."""
    x, rho, mu, r_d, r_nu, r_s, best_x, best_residual, idle, taken, going = iterate
    taken = taken + xp.indicator(going)
    has = at.has
    is_bound = has > 0.0
    z, nu, l, s = split(xp, at, x)  # noqa: E741
    stuck = (idle >= float(STUCK)) & (best_residual < CLOSE)
    proximal = xp.where(stuck, STUCK_DELTA, xp.maximum(rho, LEAST_DELTA))
    delta, pull = at.soft + proximal, xp.where(stuck, 0.0, at.fixed * proximal)
    direction = newton(xp, at, l, s, (r_d, r_nu - pull * nu, r_s - pull * l), rho, delta)

    # predictor
    sl = s * l * has
    l_safe = xp.where(is_bound, l, INFINITY)  # of what has no length

    def lengths(dl: Array, ds: Array, part: float) -> tuple[Array, Array]:
        """How far s and l may go, `part` of the way to the boundary."""
        return part / xp.maximum(-xp.min(ds / s), part), part / xp.maximum(-xp.min(dl / l_safe), part)

    _, _, dl, ds = direction(-sl)
    a_s, a_l = lengths(dl, ds, 1.0)
    ahead = xp.sum(has * (s + a_s * ds) * (l + a_l * dl)) / at.N
    ratio = xp.clip(ahead / xp.maximum(mu, 1e-300), 0.0, 1.0)
    # corrector
    sigma = ratio * ratio * ratio
    cycles = (idle >= float(CYCLES)) & (best_residual > CLOSE)
    target = xp.where(cycles, xp.maximum(sigma, CENTRING), sigma) * mu
    dz, dnu, dl, ds = direction(has * target - xp.where(cycles, 0.0, ds * dl) - sl)
    a_s, a_l = lengths(dl, ds, TO_BOUNDARY)
    l_next = l + a_l * dl
    moved = xp.concat(
        [
            z + a_s * dz,
            nu + a_l * dnu,
            xp.where(is_bound, xp.maximum(l_next, SMALLEST), l_next),
            xp.maximum(s + a_s * ds, SMALLEST),
        ]
    )
    x = xp.where(going & xp.isfinite(xp.sum(moved)), moved, x)

    mu_next, r_d, r_nu, r_s, residual, outside = evaluated(xp, at, x)
    rho = xp.maximum(rho * xp.minimum(mu_next / xp.maximum(mu, 1e-300), 1.0), RHO[1])
    idle = xp.where(residual < PROGRESS * best_residual, 0.0, idle + 1.0)
    better = going & (residual < best_residual)
    best_x, best_residual = xp.where(better, x, best_x), xp.where(better, residual, best_residual)
    enough = (best_residual <= at.nearly) & (idle >= float(PATIENCE))
    going = going & (best_residual > at.enough) & ~(enough | outside)
    return Iterate(x, rho, mu_next, r_d, r_nu, r_s, best_x, best_residual, idle, taken, going)


def finished(xp: Namespace, at: Equilibrated, last: Iterate) -> Answer:
    """The best iterate in the units of the data."""
    z, nu, l, s = split(xp, at, last.best_x)  # noqa: E741
    l_upper, l_lower = xp.halves(l)
    lam = l_upper - l_lower
    # Bounds that leave no room hold z as an equality does, whichever of them λ points at.
    (has_upper, has_lower), (equal, _) = xp.halves(at.has), xp.halves(xp.indicator(at.is_equal))
    u_upper, minus_lower = xp.halves(at.u)
    narrow = (has_upper * has_lower > 0.0) & (u_upper + minus_lower <= NARROW * (1.0 + abs(u_upper)))
    held = narrow | (equal > 0.0)
    beyond, _, r_nu, residuals = measured(xp, at, z, nu, lam)
    F, has_any = xp.concat([at.F, at.F]), at.has + at.loose + xp.indicator(at.is_equal)
    off = xp.concat(
        [
            has_any * (beyond - NOTICEABLE * (F + abs(at.u))),
            abs(r_nu) - NOTICEABLE * (at.E + abs(at.b)),
        ]
    )
    s_upper, s_lower = xp.halves(xp.where(at.loose > 0.0, xp.maximum(-beyond, SMALLEST), s))
    return Answer(
        z=z * at.D,
        lam=lam * at.F / at.c,
        nu=nu * at.E / at.c,
        slack=xp.where(held, 0.0, xp.where(l_upper >= l_lower, s_upper, s_lower)) / at.F,
        residual=xp.mT(xp.max(xp.mT(residuals))),
        D=at.D,
        steps=last.taken,
        left_out=xp.sum(at.loose),
        off=xp.max(off),
    )


def beyond(
    xp: Namespace, at: Equilibrated, z: Array, nu: Array, lam: Array
) -> tuple[tuple[Array, ...], Array, Array, Array]:
    """Qz, Cz, Az, C'λ and A'ν; how far Cz is beyond the bounds of both sides, r_d and r_ν. What may be violated is left
    out."""
    Q, C, Ct, A, At = at.of[:5]
    products = Qz, r, Az, C_lam, A_nu = z @ Q, z @ Ct, z @ At, lam @ C, nu @ A
    r_d, r_nu = Qz + at.p + C_lam + A_nu, Az - at.b - at.soft * nu
    return products, both(xp, r - at.soft * lam) - at.u, r_d, r_nu


def measured(xp: Namespace, at: Equilibrated, z: Array, nu: Array, lam: Array) -> tuple[Array, ...]:
    """How far Cz is beyond the bounds of both sides, r_d, r_ν, and the relative residuals [B, 2, 3]: stationarity,
    feasibility and duality gap, in units of the equilibrated problem and of the data, which must not be so small that
    the 1 in a denominator lets everything pass. What may be violated is left out."""
    (Qz, r, Az, C_lam, A_nu), sides, r_d, r_nu = beyond(xp, at, z, nu, lam)
    _, mu = xp.parts(lam, [None, z])

    def most(a: Array, units: Array) -> Array:
        return xp.max(abs(a * units))

    units = at.units
    # By Qz and p, which what the constraints do adds up to: multipliers of rows that depend on each other have no size,
    # and what their rounding hides counts as off.
    hidden = EPS * xp.maximum(xp.largest(lam), xp.largest(nu))
    hidden = xp.concat_rows([hidden, 0.0 * hidden])
    terms = xp.concat([Qz, at.p, *(at.soft * a for a in (C_lam - mu, A_nu, mu))])
    stationarity = (most(r_d, units.column) + hidden) / (1.0 + most(terms, units.columns))
    violation = xp.maximum(xp.maximum(xp.max(sides * units.row), 0.0), most(r_nu, units.equality))
    reach = xp.maximum(most(both(xp, r), units.row), most(xp.concat([at.b, Az]), units.equalities))
    gap = xp.sum(xp.maximum(both(xp, lam), 0.0) * abs(sides)) * units.cost
    objective = (0.5 * xp.sum(z * Qz) + xp.sum(z * at.p)) * units.cost
    relative = stationarity, violation / (1.0 + reach), gap / (1.0 + abs(objective))
    return sides, r_d, r_nu, xp.concat(relative) + 0.0 * gap  # `max` may pass over NaN
