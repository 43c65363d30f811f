"""The adjoint of a quadratic program by one KKT solve.

For a loss ℓ with z̄ = ∂ℓ/∂z, λ̄, ν̄, μ̄ at a solution, with s the slack of the side that a multiplier points at,
W_λ = |λ|/s_λ and W_μ = |μ|/s_μ (Amos, Kolter, *OptNet*, ICML 2017; Amos, Xu, Kolter, *Input Convex Neural Networks*,
ICML 2017, Proposition 3)::

    [Q  G'       A'  I      ] [d_z]     [−z̄]         ∂ℓ/∂p = d_z        ∂ℓ/∂Q = ½ (d_z z' + z d_z')
    [G  −1/W_λ              ] [d_λ]  =  [−λ̄]         ∂ℓ/∂G = λ d_z' + d_λ z'
    [A           0          ] [d_ν]     [−ν̄]         ∂ℓ/∂A = ν d_z' + d_ν z'        ∂ℓ/∂b = −d_ν
    [I               −1/W_μ ] [d_μ]     [−μ̄]         ∂ℓ/∂h = −d_λ where λ > 0,  ∂ℓ/∂h_lower = −d_λ where λ < 0

and the same of μ for the box. A multiplier and its slack that are both 0 (no strict complementarity) leave a kink; the
constraint then counts by the multiplier and the slack that the solver ends with.
"""

from collections.abc import Callable
from typing import Final

from icnnrt.mathematics.condensed_kkt import Step, matrices, solver
from icnnrt.mathematics.namespace import Array, Namespace

HARD: Final = 1e8  # the weight of an active constraint, in units of the curvature of Q
# Each leaves about 1e-8 of the error, more where constraints nearly depend on each other.
REFINEMENTS: Final = 3


def qp_adjoint(
    xp: Namespace,
    Q: Array,
    G: Array,
    A: Array,
    multiplier: Array,
    slack: Array,
    z_bar: Array,
    bars: Array,
    nu_bar: Array,
) -> Step:
    """d_z [B, 1, n], d_λ and d_μ in one row [B, 1, m + n], d_ν [B, 1, q].

    Q [B, n, n] symmetric, G [B, m, n], A [B, q, n] with q >= 1; (λ, μ), their slacks, (λ̄, μ̄) in rows [B, 1, m + n]. A
    multiplier that is NaN counts as 0.
    """
    known = abs(multiplier) >= 0.0
    W = xp.where(known, abs(multiplier) / slack, 0.0)
    of = matrices(xp, Q, G, A)
    # In units of the curvature of Q, and of the rows: an active constraint counts 1e8 times as much as Q, and the
    # refinements take the rest of the way to a hard one.
    size = xp.total(abs(Q) * of.eye) / xp.count(z_bar)
    size = xp.where(size > 0.0, size, 1.0)
    row = xp.mT(xp.sum(of.C * of.C))
    W_most = HARD * size / xp.where(row > 0.0, row, 1.0)
    solve = solver(xp, of, W, W * (W_most / (W + W_most)), 1e-13 * size, 1e-13 / size)
    return solve(-z_bar, bars, -nu_bar, REFINEMENTS)


def gradients(
    z: Array, lam: Array, nu: Array, mu: Array, d_z: Array, d_lam: Array, d_nu: Array, d_mu: Array
) -> dict[str, Callable[[], Array]]:
    """∂ℓ/∂ of every datum by its name, each sample's own, when it is asked for.

    Rows [B, n], [B, m], [B, q], [B, n] of the answer and of the adjoint's: arrays of numpy or tensors. Where the
    adjoint is NaN, so are the gradients.
    """

    def outer(a: Array, c: Array) -> Array:
        return a[:, :, None] * c[:, None, :]

    return {
        "Q": lambda: 0.5 * (outer(d_z, z) + outer(z, d_z)),
        "p": lambda: d_z,
        "G": lambda: outer(lam, d_z) + outer(d_lam, z),
        "h_lower": lambda: -d_lam * (lam < 0),
        "h": lambda: -d_lam * (lam > 0),
        "A": lambda: outer(nu, d_z) + outer(d_nu, z),
        "b": lambda: -d_nu,
        "lower": lambda: -d_mu * (mu < 0),
        "upper": lambda: -d_mu * (mu > 0),
    }
