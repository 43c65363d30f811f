"""Mehrotra's predictor-corrector interior point method for convex quadratic programs.

    min over z of  ½ z'Qz + p'z   s.t.  lower <= Cz <= upper,   Az = b,      C = [G; I]

on all sides at once: [C; −C] z + s = [upper; −lower], λ = l_upper − l_lower, and l and s are 0 and 1 where there is no
bound. The Newton systems are condensed and regularised by ρ and δ, which the right-hand sides do not see, so that the
answer does not either (Friedlander and Orban, *A primal-dual regularized interior-point method for convex quadratic
programs*, 2012), and refined once. The step to the boundary is 1 / max(−dl/l, −ds/s).

With soft > 0 a constraint may be violated by t at a price of ½ t² / soft; then its multiplier is t / soft.

Vectors are rows, numbers of a sample [B, 1, 1]. Everything is solved equilibrated: z = D ẑ, λ = F λ̂ / c, ν = E ν̂ / c,
s = ŝ / F. Samples that are done stand still.
"""

from typing import Any, Final, NamedTuple

from icnnrt.mathematics.condensed_kkt import Matrices, matrices, solver
from icnnrt.mathematics.namespace import Array, Namespace

STEPS: Final = 50  # bound on steps: 8 to 14 are usual, degenerate and badly scaled problems take up to 35
BOUND_MAX: Final = 1e30  # bounds beyond are none
WARM: Final = 1e-2  # the least slack and multiplier of a warm start, in units of the equilibrated problem
ENOUGH: Final = 1e-12  # relative KKT residual at which a sample stops
TO_BOUNDARY: Final = 0.995
SHORT_STEP: Final = 0.2
# Steps without progress, far from the solution, after which a step has no second order, and the least σ then.
CYCLES: Final = 3, 0.3
SMALLEST: Final = 1e-18  # of slacks and multipliers, so that their quotients stay finite
REGULARISATION: Final = 1e-8, 1e-12  # ρ = δ: the most, and the least, in units of the equilibrated problem
PATIENCE: Final = 6, 15  # steps without progress that end a sample: when it is nearly solved, and when it is not
NEARLY: Final = 1e-9
PROGRESS: Final = 0.7
EQUILIBRATIONS: Final = 4
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
    residual: Array  # [B, 1, 3] relative stationarity, feasibility, duality gap of the equilibrated problem
    D: Array  # [B, 1, n] the units of z


class Equilibrated(NamedTuple):
    """A problem in its own units, and those units."""

    of: Matrices
    p: Array
    b: Array
    u: Array  # [B, 1, 2 (m + n)] bounds of both sides, 0 where there is none
    has: Array  # 1 where there is a bound, else 0
    any_has: Array  # [B, 1, m + n] the same of either side
    N: Array  # how many there are, at least 1
    soft: Array
    D: Array  # [B, 1, n]
    F: Array  # [B, 1, m + n]
    E: Array  # [B, 1, q]
    c: Array


class Iterate(NamedTuple):
    """Where the method stands."""

    x: Array  # (z, ν, l, s) in one row
    r_d: Array
    r_nu: Array
    r_s: Array
    gap: Array
    best_x: Array
    best_residual: Array
    idle: Array  # steps without progress
    going: Array  # bool


def interior_point(xp: Namespace, problem: Problem, soft: Array, start: Array, active: Array, steps: Any) -> Answer:
    """Solve the samples that are `active` [B, 1, 1], from start [B, 1, n + m + q + n] = (z, λ, ν, μ), NaN: cold."""
    scaled = equilibrated(xp, problem, soft)

    def unfinished(*state: Array) -> Array:
        return xp.any(Iterate(*state).going)

    def next_of(*state: Array) -> Iterate:
        return step(xp, scaled, Iterate(*state))

    last = Iterate(*xp.loop(unfinished, next_of, first(xp, scaled, start, active), steps))
    return finished(xp, scaled, problem, last.best_x)


# --- Units ---------------------------------------------------------------------------------------


def equilibrated(xp: Namespace, problem: Problem, soft: Array) -> Equilibrated:
    """Rows and columns of [Q; G; A] brought near size 1 (Ruiz), then z, then the objective."""
    Q, p, G, A, b, lower, upper = problem

    def root(size: Array) -> Array:
        return 1.0 / xp.sqrt(xp.where(size > 0.0, xp.clip(size, 1e-8, 1e8), 1.0))

    K = xp.concat_rows([Q, G, A])
    E = 0.0
    for i in range(EQUILIBRATIONS):
        size = abs(K)
        d = root(xp.mT(xp.max(xp.mT(size))))
        _, e_G, e_A = xp.parts(root(xp.mT(xp.max(size))), [p, None, b])
        e = xp.concat([d, e_G, e_A])
        K, E = K * xp.mT(e) * d, e if i == 0 else E * e
    D, E_G, E_A = xp.parts(E, [p, None, b])
    # Every measure of the method has a floor of 1: z is brought near it, so that an answer has no units.
    F = xp.concat([E_G, 1.0 / D])
    Q, p, G, A = Q * xp.mT(D) * D, p * D, G * xp.mT(E_G) * D, A * xp.mT(E_A) * D
    tau = size_of_z(xp, Q, p, bounds_of(xp, lower * F, upper * F)[0], b * E_A)
    D, F, E_A = D * tau, F / tau, E_A / tau
    Q, p = Q * (tau * tau), p * tau
    size = xp.maximum(xp.mean(xp.mT(xp.max(abs(Q)))), xp.largest(p))
    costs = (size > 0.0) & (soft < 1e-300)
    c = xp.where(costs, 1.0 / xp.clip(size, 1e-30, 1e30), 1.0)
    u, has = bounds_of(xp, lower * F, upper * F)
    has_upper, has_lower = xp.halves(has)
    return Equilibrated(
        of=matrices(xp, Q * c, G, A),
        p=p * c,
        b=b * E_A,
        u=u,
        has=has,
        any_has=xp.maximum(has_upper, has_lower),
        N=xp.maximum(xp.sum(has), 1.0),
        soft=soft,
        D=D,
        F=F,
        E=E_A,
        c=c,
    )


def bounds_of(xp: Namespace, lower: Array, upper: Array) -> tuple[Array, Array]:
    """[upper; −lower], 0 where there is no bound, and where there is one: 1, else 0."""
    sides = xp.concat([upper, -lower])
    is_bound = abs(sides) < BOUND_MAX
    return xp.where(is_bound, sides, 0.0), xp.indicator(is_bound)


def size_of_z(xp: Namespace, Q: Array, p: Array, u: Array, b: Array) -> Array:
    """A power of 2 near the size of z: what b and bounds away from 0 demand, else what curvature and bounds allow.

    1 where z is of that size already or nothing tells. A bound u < 0 keeps z from 0.
    """
    curvature = xp.mean(xp.mT(xp.sum(Q * xp.eye(Q))))
    bent = curvature > 0.0
    allowed = xp.where(bent, xp.largest(p) / xp.where(bent, curvature, 1.0), INFINITY)
    held = xp.largest(u)
    allowed = xp.minimum(allowed, xp.where(held > 0.0, held, INFINITY))
    size = xp.maximum(xp.maximum(xp.largest(b), xp.largest(xp.minimum(u, 0.0))), allowed)
    known = ((size < 1 / 64) | (size > 64.0)) & (size > 0.0) & (size < INFINITY)
    return xp.power_of_2(xp.clip(xp.where(known, size, 1.0), 2.0**-60, 2.0**60))


# --- Steps ---------------------------------------------------------------------------------------


def split(xp: Namespace, at: Equilibrated, x: Array) -> tuple[Array, Array, Array, Array]:
    """z, ν, l, s."""
    z, nu, l, s = xp.parts(x, [at.p, at.b, at.u, at.u])  # noqa: E741
    return z, nu, l, s


def both(xp: Namespace, r: Array) -> Array:
    """The amounts [r; −r] of both sides."""
    return xp.concat([r, -r])


def first(xp: Namespace, at: Equilibrated, start: Array, active: Array) -> Iterate:
    """The iterate to begin with: cold, the minimiser of the objective plus ½ ‖slacks‖², its slacks and multipliers
    lifted above 0; warm, an interior point near `start`."""
    of, p, b, u, has, soft = at.of, at.p, at.b, at.u, at.has, at.soft
    is_bound = has > 0.0
    has_upper, has_lower = xp.halves(has)
    u_upper, u_lower = xp.halves(u)
    W = (has_upper + has_lower) / (1.0 + soft)
    t = (u_lower - u_upper) / xp.maximum(has_upper + has_lower, 1.0)
    rho = REGULARISATION[0] + 0.0 * at.N
    z, _, nu = solver(xp, of, W, W / (1.0 + rho * W), rho, soft + rho)(-p, t, b, 1)
    s = u - both(xp, z @ of.Ct)
    least_s = xp.min(xp.where(is_bound, s, INFINITY))
    least_l = xp.min(xp.where(is_bound, -s, INFINITY))
    lift_s = xp.where(least_s < 1e-3, 1.0 - least_s, 0.0)
    lift_l = xp.where(least_l < 1e-3, 1.0 - least_l, 0.0)
    cold = xp.concat([z, nu, xp.where(is_bound, lift_l - s, 0.0), xp.where(is_bound, s + lift_s, 1.0)])

    z_given, lam_given, nu_given, mu_given = xp.parts(start, [p, None, b, p])
    z = z_given / at.D
    multiplier = xp.concat([lam_given, mu_given]) * at.c / at.F
    l = xp.where(is_bound, xp.maximum(both(xp, multiplier), WARM), 0.0)  # noqa: E741
    s = xp.where(is_bound, xp.maximum(u - both(xp, z @ of.Ct), WARM), 1.0)
    warm = xp.concat([z, nu_given * at.c / at.E, l, s])
    x = xp.where(xp.isfinite(xp.sum(start)), warm, cold)

    r_d, r_nu, r_s, gap, residual = evaluated(xp, at, x)
    going = active & (residual > ENOUGH)
    return Iterate(x, r_d, r_nu, r_s, gap, x, residual, 0.0 * residual, going)


def evaluated(xp: Namespace, at: Equilibrated, x: Array) -> tuple[Array, ...]:
    """The residuals r_d, r_ν and r_s, the gap l's, and the largest relative residual, infinite if not finite."""
    Q, C, Ct, A, At = at.of[:5]
    z, nu, l, s = split(xp, at, x)  # noqa: E741
    l_upper, l_lower = xp.halves(l)
    r, Qz, C_lam, A_nu, Az = z @ Ct, z @ Q, (l_upper - l_lower) @ C, nu @ A, z @ At
    r_d = Qz + at.p + C_lam + A_nu
    r_nu = Az - at.b - at.soft * nu
    r_s = (both(xp, r) + s - at.u - at.soft * l) * at.has
    gap = xp.sum(s * l)
    objective = 0.5 * xp.sum(z * Qz) + xp.sum(z * at.p)
    reach = xp.maximum(xp.largest(r * at.any_has), xp.largest(Az))
    stationarity = xp.largest(r_d) / (1.0 + xp.largest(xp.concat([Qz, at.p, C_lam, A_nu])))
    feasibility = xp.maximum(xp.largest(r_nu), xp.largest(r_s)) / (1.0 + xp.largest(at.b) + reach)
    relative = xp.maximum(xp.maximum(stationarity, feasibility), gap / (1.0 + abs(objective)))
    known = xp.isfinite(gap + xp.sum(r_d))  # sums are NaN where anything is NaN or infinite
    return r_d, r_nu, r_s, gap, xp.where(known, relative, INFINITY)


def step(xp: Namespace, at: Equilibrated, iterate: Iterate) -> Iterate:
    """One predictor-corrector step."""
    x, r_d, r_nu, r_s, gap, best_x, best_residual, idle, going = iterate
    has, soft = at.has, at.soft
    _, _, l, s = split(xp, at, x)  # noqa: E741
    mu = gap / at.N
    rho = xp.clip(1e-6 * mu, REGULARISATION[1], REGULARISATION[0])
    s_soft = s + soft * l
    w = l / s_soft
    w_upper, w_lower = xp.halves(w)
    W = w_upper + w_lower
    W_safe = W + (1.0 - at.any_has)
    solved = solver(xp, at.of, W, W / (1.0 + rho * W), rho, soft + rho)
    minus_r_d, minus_r_nu = -r_d, -r_nu

    def direction(c: Array) -> tuple[Array, Array, Array, Array]:
        """The Newton step dz, dν, dl, ds to l∘s + c = 0."""
        f = c / s_soft + w * r_s
        f_upper, f_lower = xp.halves(f)
        dz, _, dnu = solved(minus_r_d, (f_upper - f_lower) / W_safe, minus_r_nu, 1)
        dr = both(xp, dz @ at.of.Ct)
        dl = f + w * dr
        return dz, dnu, dl, has * (soft * dl - r_s - dr)

    # predictor
    sl = s * l
    l_safe = l + (1.0 - has)
    _, _, dl, ds = direction(-sl)
    a = 1.0 / xp.maximum(-xp.min(xp.minimum(dl / l_safe, ds / s)), 1.0)
    ahead = xp.sum((s + a * ds) * (l + a * dl))
    ratio = xp.clip(ahead / xp.maximum(gap, 1e-300), 0.0, 1.0)
    sigma = ratio * ratio * ratio
    # corrector; where the predictor soon met a boundary, its second order is far off and makes the steps cycle;
    # where they do, they are taken back to the central path
    cycles = (idle >= float(CYCLES[0])) & (best_residual >= NEARLY)
    target = xp.where(cycles, xp.maximum(sigma, CYCLES[1]), sigma) * mu
    second = xp.where(cycles | (a < SHORT_STEP), 0.0, has)
    dz, dnu, dl, ds = direction(has * target - second * (ds * dl) - sl)
    alpha = TO_BOUNDARY / xp.maximum(-xp.min(xp.minimum(dl / l_safe, ds / s)), TO_BOUNDARY)
    moved = x + alpha * xp.concat([dz, dnu, dl, ds])
    z, nu, l, s = split(xp, at, xp.where(going & xp.isfinite(xp.sum(dz)), moved, x))  # noqa: E741
    x = xp.concat([z, nu, xp.maximum(l, SMALLEST * has), xp.maximum(s, SMALLEST)])

    r_d, r_nu, r_s, gap, residual = evaluated(xp, at, x)
    idle = xp.where(residual < PROGRESS * best_residual, 0.0, idle + 1.0)
    better = going & (residual < best_residual)
    best_x, best_residual = xp.where(better, x, best_x), xp.where(better, residual, best_residual)
    patience = xp.where(best_residual < NEARLY, float(PATIENCE[0]), float(PATIENCE[1]) + 0.0 * idle)
    going = going & (best_residual > ENOUGH) & (idle < patience)
    return Iterate(x, r_d, r_nu, r_s, gap, best_x, best_residual, idle, going)


def finished(xp: Namespace, at: Equilibrated, problem: Problem, x: Array) -> Answer:
    """An iterate in the units of the data."""
    z, nu, l, s = split(xp, at, x)  # noqa: E741
    (l_upper, l_lower), (s_upper, s_lower) = xp.halves(l), xp.halves(s)
    lam = l_upper - l_lower
    lower, upper = problem.lower * at.F, problem.upper * at.F
    return Answer(
        z=z * at.D,
        lam=lam * at.F / at.c,
        nu=nu * at.E / at.c,
        slack=xp.where(l_upper >= l_lower, s_upper, s_lower) / at.F,
        residual=kkt_residual(xp, at.of, at.p, at.b, lower, upper, z, lam, nu),
        D=at.D,
    )


def kkt_residual(
    xp: Namespace, of: Matrices, p: Array, b: Array, lower: Array, upper: Array, z: Array, lam: Array, nu: Array
) -> Array:
    """Relative stationarity, feasibility and duality gap [B, 1, 3] of any z, λ of all rows and ν; NaN if they are.

    The solver's own measure; `qp_reference.kkt_residual` checks it and shares nothing with it.
    """
    Q, C, Ct, A, At = of[:5]
    Qz, r, Az, A_nu, C_lam = z @ Q, z @ Ct, z @ At, nu @ A, lam @ C
    _, mu = xp.parts(lam, [None, z])
    terms = xp.concat([Qz, p, C_lam - mu, A_nu, mu])
    stationarity = xp.largest(Qz + p + C_lam + A_nu) / (1.0 + xp.largest(terms))

    u, has = bounds_of(xp, lower, upper)
    has_upper, has_lower = xp.halves(has)
    above = has * (both(xp, r) - u)
    violation = xp.maximum(xp.maximum(xp.max(above), 0.0), xp.largest(Az - b))
    held = xp.largest(r * xp.maximum(has_upper, has_lower))
    feasibility = violation / (1.0 + xp.maximum(xp.maximum(xp.largest(b), xp.largest(Az)), held))

    # A multiplier of a side that is not there is as wrong as a gap of that size.
    push = xp.maximum(both(xp, lam), 0.0)
    gap = xp.sum(push * xp.where(has > 0.0, abs(above), 1.0))
    objective = 0.5 * xp.sum(z * Qz) + xp.sum(z * p)
    gap = gap / (1.0 + abs(objective))
    return xp.concat([stationarity, feasibility, gap]) + 0.0 * gap  # `largest` may pass over NaN
