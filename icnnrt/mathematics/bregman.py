"""Bregman proximal gradient and its adjoint in float64 numpy: the second solver, for smooth energies.

    y* = argmin over y in the domain of f(y) + R(y);  K steps of

        s <- (s/τ − g)/(1 + 1/τ) = (s − τ g)/(1 + τ),     y = y(s),   g = ∇f(y)

which is the minimum of g'y + R(y) + (1/τ) times the Bregman distance of R to the last y. Where y no longer moves,
s = −g, which is optimality. No model is solved, so a step costs one gradient; it converges where τ is below the inverse
of the curvature of f measured by R's. Source: Bauschke, Bolte, Teboulle (2017), for their relative smoothness.

Every point gives a cut, and every cut alone a bound: with λ = 1 at cut i the dual of `icnnrt.mathematics.domains` is
e_i − C(−g_i). The best of them is the lower bound. It is as tight as the square of the distance of y_i to y*.

Adjoint, exact for the K-step algorithm: s̄ = D(y_K) ȳ; for k = K−1 .. 0: S_k = −s̄/(1 + 1/τ), s̄ <- s̄/(1 + τ) +
D(y_k) ∇²f(y_k) S_k; then θ̄ = Σ_k ∇θ [S_k' ∇_y f(x, y_k)], the form of `reference.CutCotangents` with ē = 0.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.domains import UNIT_BOX, Domain
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.reference import CutCotangents, Trajectory

Array = NDArray[np.float64]

# Logits of the start are those of entries this far from 0 and 1, where they would be infinite.
EDGE = 1e-12
EDGE_FLOAT32 = 1e-6


def bregman_argmin(
    value_and_gradient: Callable[[Array], tuple[Array, Array]],
    p_init: Array,
    iterations: int,
    step_size: float,
    domain: Domain = UNIT_BOX,
) -> Trajectory:
    """K steps from p_init [B, n], with the trajectory that the bundle method leaves; lam_history, residual and
    complementarity_history are zero. Changes of variables are those of `reference.bundle_entropy_argmin`.
    """
    B, n = p_init.shape
    c = domain.centre(n)
    p = p_init
    s = domain.logits(NUMPY, p, EDGE)
    slopes, points = np.empty((B, iterations, n)), np.empty((B, iterations, n))
    offsets = np.empty((B, iterations))
    for k in range(iterations):
        f, g = value_and_gradient(p)
        points[:, k], slopes[:, k], offsets[:, k] = p, g, f + (g * (c - p)).sum(1)
        s = (s - step_size * g) / (1.0 + step_size)
        p = domain.point(NUMPY, s)
    bounds = offsets - domain.conjugate(NUMPY, -slopes)[:, :, 0]
    lam = np.zeros((B, iterations))
    lam[np.arange(B), bounds.argmax(1)] = 1.0
    energy, lower_bound = value_and_gradient(p)[0] + domain.regulariser(NUMPY, p)[:, 0], bounds.max(1)
    return Trajectory(
        p,
        lam,
        slopes,
        offsets,
        points,
        np.zeros((B, iterations, iterations)),
        energy,
        lower_bound,
        energy - lower_bound,
        np.zeros((B, 3)),
        np.zeros((B, iterations)),
    )


def bregman_adjoint(
    trajectory: Trajectory,
    y_bar: Array,
    hvp: Callable[[Array, Array], Array],
    step_size: float,
    domain: Domain = UNIT_BOX,
) -> CutCotangents:
    """Cotangents of the cuts for a loss with ∂ℓ/∂y = ȳ [B, n], by `hvp(y, s) -> ∇²f(y) s`; the start is a constant."""
    Y = trajectory.cut_points
    seed = np.empty_like(Y)
    s_bar = domain.curvature_at(NUMPY, trajectory.y, y_bar)
    for k in range(Y.shape[1] - 1, -1, -1):
        seed[:, k] = -step_size / (1.0 + step_size) * s_bar
        if k:
            s_bar = s_bar / (1.0 + step_size) + domain.curvature_at(NUMPY, Y[:, k], hvp(Y[:, k], seed[:, k]))
    return CutCotangents(np.zeros(Y.shape[:2]), seed)
