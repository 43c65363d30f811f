"""Bregman proximal gradient and its adjoint: the second solver, for smooth energies.

    y* = argmin over y in the domain of f(y) + R(y);  K steps of

        s <- (s/τ − g)/(1 + 1/τ) = (s − τ g)/(1 + τ),     y = y(s),   g = ∇f(y)

which is the minimum of g'y + R(y) + (1/τ) times the Bregman distance of R to the last y. Where y no longer moves,
s = −g, which is optimality. No model is solved, so a step costs one gradient; it converges where τ is below the inverse
of the curvature of f measured by R's. Source: Bauschke, Bolte, Teboulle (2017), for their relative smoothness.

Every point gives a cut, and every cut alone a bound: with λ = 1 at cut i the dual of `icnnrt.mathematics.domains` is
e_i − C(−g_i). The best of them is the lower bound. It is as tight as the square of the distance of y_i to y*.

Adjoint, exact for the K-step algorithm: s̄ = D(y_K) ȳ; for k = K−1 .. 0: S_k = −s̄/(1 + 1/τ), s̄ <- s̄/(1 + τ) +
D(y_k) ∇²f(y_k) S_k; then θ̄ = Σ_k ∇θ [S_k' ∇_y f(x, y_k)], the form of `CutCotangents` with ē = 0.
"""

from collections.abc import Callable

from icnnrt.mathematics.bundle import Trajectory, ValueAndGradient
from icnnrt.mathematics.domains import UNIT_BOX, Domain
from icnnrt.mathematics.namespace import NUMPY, Array, Namespace
from icnnrt.mathematics.recursive_adjoint import CutCotangents

# Logits of the start are those of entries this far from 0 and 1, where they would be infinite.
EDGE = 1e-12
EDGE_FLOAT32 = 1e-6


def argmin(
    xp: Namespace,
    at: Domain,
    value_and_gradient: ValueAndGradient,
    y_init: Array,
    iterations: int,
    step_size: float,
    edge: float = EDGE,
) -> Trajectory:
    """K = iterations steps of length τ = step_size from y_init [B, n], with the trajectory of the bundle method: λ is 1
    at the cut of the best bound; lam_history, residual and complementarity_history are zero.

    `value_and_gradient(y [B, n]) -> f [B, 1], ∇f [B, n]`.
    """
    K, n = iterations, y_init.shape[1]
    kept, part = (xp.spread(a / (1.0 + step_size), y_init) for a in (1.0, step_size))

    def step(i: Array, y: Array, s: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        f, g = value_and_gradient(y)
        s = kept * s - part * g
        return (at.point(xp, s), s), (y, g, f)

    (y, _), (points, slopes, values) = xp.repeat(K, step, (y_init, at.logits(xp, y_init, edge)))
    e = values + xp.sum(slopes * (at.centre(n) - points))
    bounds = xp.mT(xp.double(e) - at.conjugate(xp, -xp.double(slopes)))  # of one cut alone
    lower_bound = xp.entry(xp.slot(xp.max(bounds), 0), 0)
    lam = xp.pick1(xp.eyes(bounds), xp.argmin1(-xp.mT(bounds)))
    energy = xp.entry(xp.double(value_and_gradient(y)[0]) + at.regulariser(xp, xp.double(y)), 0)
    return Trajectory(
        y=y,
        lam=xp.like(xp.slot(lam, 0), y),
        slopes=slopes,
        offsets=xp.entry(e, 0),
        cut_points=points,
        lam_history=xp.zeros(y, K, K),
        energy=energy,
        lower_bound=lower_bound,
        gap=energy - lower_bound,
        residual=xp.zeros(energy, 3),
        complementarity_history=xp.zeros(energy, K),
    )


def adjoint(
    xp: Namespace,
    at: Domain,
    trajectory: Trajectory,
    y_bar: Array,
    hvp: Callable[[Array, Array], Array],
    step_size: float,
) -> CutCotangents:
    """Cotangents of the cuts for a loss with ∂ℓ/∂y = ȳ [B, n]; the start is a constant.

    `hvp(k, s [B, n]) -> ∇²f(y_k) s`, k the 0-based index of the point.
    """
    Y = trajectory.cut_points
    K = Y.shape[1]
    kept, part = (xp.spread(a / (1.0 + step_size), y_bar) for a in (1.0, -step_size))

    def back(i: Array, s_bar: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        k = (K - 1) - i
        seed = part * s_bar
        s_bar = kept * s_bar + at.curvature_at(xp, xp.slot(Y, k), hvp(k, seed))
        return (s_bar,), (seed,)

    (s_bar,), later = xp.repeat(K - 1, back, (at.curvature_at(xp, trajectory.y, y_bar),))
    first = xp.row(part * s_bar)
    return CutCotangents(xp.zeros(y_bar, K), xp.concat_rows([first, *map(xp.backwards, later)]))


def bregman_argmin(
    value_and_gradient: Callable[[Array], tuple[Array, Array]],
    p_init: Array,
    iterations: int,
    step_size: float,
    domain: Domain = UNIT_BOX,
) -> Trajectory:
    """`argmin` in float64 numpy, by `value_and_gradient(p) -> (f [B], ∇f)`. Changes of variables are those of
    `reference.bundle_entropy_argmin`."""

    def found(p: Array) -> tuple[Array, Array]:
        f, g = value_and_gradient(p)
        return f[:, None], g

    return argmin(NUMPY, domain, found, p_init, iterations, step_size)


def bregman_adjoint(
    trajectory: Trajectory,
    y_bar: Array,
    hvp: Callable[[Array, Array], Array],
    step_size: float,
    domain: Domain = UNIT_BOX,
) -> CutCotangents:
    """`adjoint` in float64 numpy, by `hvp(y, s) -> ∇²f(y) s`."""
    points = trajectory.cut_points
    return adjoint(NUMPY, domain, trajectory, y_bar, lambda k, s: hvp(points[:, k], s), step_size)
