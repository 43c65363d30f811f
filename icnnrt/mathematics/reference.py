"""The bundle entropy method and its adjoints in float64 numpy, written to be read.

Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4)::

    y* = argmin over y in [0,1]^n of  f(y) − H(y),      H(y) = −Σ y log y + (1−y) log(1−y)

K times: cut f at y, solve the model of all cuts (`icnnrt.mathematics.cut_model`), move to its solution. Everything is
batched: a leading dimension B, one independent problem per sample.

The same method solves other domains, with the regularisers that `icnnrt.mathematics.domains` lists. Every function here
takes `domain`, UNIT_BOX where not given.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics import bundle, cut_model
from icnnrt.mathematics import kkt_adjoint as adjoint_of_model
from icnnrt.mathematics import recursive_adjoint as adjoint_of_cuts
from icnnrt.mathematics.bundle import Trajectory
from icnnrt.mathematics.cut_model import STEPS, InnerSolution
from icnnrt.mathematics.domains import UNIT_BOX, Coordinates, Domain
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.recursive_adjoint import CoordinatesCotangents, CutCotangents

Array = NDArray[np.float64]


def bundle_entropy_solve(
    G: Array, e: Array, lam_start: Array | None = None, steps: int = STEPS, domain: Domain = UNIT_BOX
) -> InnerSolution:
    """Solve the model of slopes G [B, k, n] and centred offsets e [B, k], `icnnrt.mathematics.cut_model.solve`.

    lam_start [B, k_prev]: multipliers of the first cuts to go on from; `steps`: the most that are taken. Convergence is
    told by `residual`, never assumed.
    """
    with np.errstate(all="ignore"):  # a NaN sample is an answer (NaN, told by its residual), not a warning
        return cut_model.solved(NUMPY, domain, G, e, lam_start, steps)


def bundle_entropy_argmin(
    value_and_gradient: Callable[[Array], tuple[Array, Array]],
    y_init: Array,
    iterations: int,
    steps: int = STEPS,
    domain: Domain = UNIT_BOX,
) -> Trajectory:
    """K cuts of the bundle entropy method from y_init [B, n]: cut, solve the model, move to its solution, repeat.

    `value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n])`. Source: Amos, Xu, Kolter (2017), algorithm 1. Boxes other
    than the unit box, and (μ/2)‖y‖² with μ other than 1, are solved in p with y = shift + scale∘p: give
    `in_coordinates(value_and_gradient, ...)` and p_init, and get a trajectory of p.
    """

    def found(y: Array) -> tuple[Array, Array]:
        f, g = value_and_gradient(y)
        return f[:, None], g

    def solve(G: Array, e: Array, lam: Array) -> InnerSolution:
        return bundle_entropy_solve(G, e, lam, steps, domain)

    return bundle.argmin(NUMPY, domain, found, y_init, iterations, solve)


def in_coordinates(
    value_and_gradient: Callable[[Array], tuple[Array, Array]], coordinates: Coordinates
) -> Callable[[Array], tuple[Array, Array]]:
    """Value and gradient of p -> f(shift + scale∘p): f and scale∘∇f."""

    def of_p(p: Array) -> tuple[Array, Array]:
        f, g = value_and_gradient(coordinates.y(p))
        return f, coordinates.scaled(g)

    return of_p


def kkt_adjoint(G: Array, e: Array, lam: Array, y_bar: Array, domain: Domain = UNIT_BOX) -> tuple[Array, Array]:
    """Proposition 3, `icnnrt.mathematics.kkt_adjoint`: c_y [B, n] and c_λ [B, k] for a loss with ∂ℓ/∂y = ȳ [B, n]."""
    with np.errstate(all="ignore"):
        return adjoint_of_model.adjoint(NUMPY, domain, G, e, lam, y_bar)


def argmin_adjoint(
    trajectory: Trajectory,
    y_bar: Array,
    hvp: Callable[[Array, Array], Array] | None,
    depth: int | None = None,
    domain: Domain = UNIT_BOX,
) -> CutCotangents:
    """Cotangents of the cuts of a K-step solution for a loss with ∂ℓ/∂y = ȳ [B, n].

    `depth` is how many cut sets are differentiated through, from the last one back. depth = K (the default) is
    exact: the recursion through every cut point, by `hvp(y, s) -> ∇²f(y) s`. depth = 1 is Proposition 3 of the
    paper, which holds the cut points fixed and needs no `hvp`; for piecewise-linear f both agree.
    """

    def product(k: int, s: Array) -> Array:
        assert hvp is not None, "hvp is needed beyond depth 1"
        return hvp(trajectory.cut_points[:, k], s)

    def kkt(G: Array, e: Array, lam: Array, y_bar: Array) -> tuple[Array, Array]:
        return kkt_adjoint(G, e, lam, y_bar, domain)

    return adjoint_of_cuts.recursive_adjoint(
        NUMPY, trajectory, y_bar, product, depth or trajectory.cut_points.shape[1], kkt
    )


def coordinates_adjoint(
    cut_points: Array,
    gradients: Array,
    cuts: CutCotangents,
    p: Array,
    y_bar: Array,
    hessian_products: Array,
) -> CoordinatesCotangents:
    """`recursive_adjoint.coordinates_adjoint` in numpy, of hessian_products ∇²f(y_i) (scale∘s_i) [B, K, n]."""
    point_bar = cuts.offset_bar[:, :, None] * gradients + hessian_products
    return adjoint_of_cuts.coordinates_adjoint(NUMPY, cut_points, gradients, cuts.seed, p, y_bar, point_bar)
