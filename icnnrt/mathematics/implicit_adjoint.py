"""The implicit adjoint: the derivative of the exact argmin of a smooth f, by conjugate gradients.

At y* with ∇f(y*) + ∇R(y*) = 0 and D = ∂y/∂s = F F' of the domain, a loss with ∂ℓ/∂y = ȳ has::

    (∇²f + D⁻¹) c_y = −ȳ,      θ̄ = ∇θ [c_y' ∇_y f(x, y*)]

solved as (I + F'∇²f F) z = −F'ȳ, c_y = F z, which stays regular where y saturates, and where D has no inverse, as on
the simplex. Blind to kinks: wrong for ReLU networks.
"""

from collections.abc import Callable

from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.namespace import Array, Namespace

ITERATIONS = 100  # exact after n in exact arithmetic; eigenvalues lie in [1, 1 + ‖D‖ ‖∇²f‖], so fewer are usual


def implicit_adjoint(
    xp: Namespace, at: Domain, s: Array, y_bar: Array, hvp: Callable[[Array], Array], tolerance: float
) -> Array:
    """c_y [B, n], float64, at the logits s [B, n] of y*, with `hvp(p [B, n]) -> ∇²f(y*) p`.

    Every sample stops by itself at a residual of `tolerance` relative to F'ȳ, all at ITERATIONS.
    """
    r = -at.root_transposed(xp, s, xp.double(y_bar))
    rr = xp.sum(r * r)
    enough = tolerance**2 * rr

    def unfinished(z: Array, r: Array, p: Array, rr: Array) -> Array:
        return xp.any(rr > enough)  # False for NaN and for ȳ = 0

    def step(z: Array, r: Array, p: Array, rr: Array) -> tuple[Array, ...]:
        going = rr > enough
        Ap = p + at.root_transposed(xp, s, xp.double(hvp(at.root(xp, s, p))))
        alpha = xp.where(going, rr / xp.sum(p * Ap), 0.0 * rr)
        z, r = xp.where(going, z + alpha * p, z), xp.where(going, r - alpha * Ap, r)
        rr_next = xp.sum(r * r)
        return z, r, xp.where(going, r + (rr_next / rr) * p, p), rr_next

    z, *_ = xp.loop(unfinished, step, (0.0 * r, r, r, rr), ITERATIONS)
    return at.root(xp, s, z)
