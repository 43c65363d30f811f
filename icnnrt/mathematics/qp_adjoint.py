"""The adjoint of a quadratic program by one KKT system on the active set.

For a loss ℓ with z̄ = ∂ℓ/∂z, λ̄, ν̄, μ̄ at a solution (Amos, Kolter, *OptNet*, ICML 2017; Amos, Xu, Kolter, *Input Convex
Neural Networks*, ICML 2017, Proposition 3), with G_a and I_a the rows that hold z::

    [Q    G_a'  A'  I_a'] [d_z]     [−z̄]         ∂ℓ/∂p = d_z        ∂ℓ/∂Q = ½ (d_z z' + z d_z')
    [G_a                ] [d_λ]  =  [−λ̄]         ∂ℓ/∂G = λ d_z' + d_λ z'
    [A                  ] [d_ν]     [−ν̄]         ∂ℓ/∂A = ν d_z' + d_ν z'        ∂ℓ/∂b = −d_ν
    [I_a                ] [d_μ]     [−μ̄]         ∂ℓ/∂h = −d_λ where λ > 0,  ∂ℓ/∂h_lower = −d_λ where λ < 0

and the same of μ for the box; d_λ and d_μ are 0 elsewhere. A row holds z where its slack is 0, as it is of an equality,
and where its multiplier is larger than its slack, both in units of the equilibrated problem. Where both are 0 (no
strict complementarity) the solution has a kink, and this is the derivative of one side.

The system may be singular: where the solution is not unique, or rows depend on each other. It is solved by the proximal
point method from 0, x <- x + (K + reg)⁻¹ (r − K x) with K the matrix above, which tends to the solution of least norm
(Rockafellar, *Monotone operators and the proximal point algorithm*, 1976).
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from icnnrt.mathematics.condensed_kkt import Matrices, Step, matrices, solver
from icnnrt.mathematics.interior_point import units
from icnnrt.mathematics.namespace import Array, Namespace

RHO: Final = 1e-12
DELTA: Final = 1e-8
FACTORS: Final = 5  # and for each so many steps of the proximal point method; 1 is usual
STEPS: Final = 2
ENOUGH: Final = 1e-14  # relative residual at which a sample stops


class Held(NamedTuple):
    """The equilibrated system on the active set, and its units."""

    of: Matrices
    active: Array  # [B, 1, m + n] 1 or 0
    r_z: Array
    r: Array
    r_nu: Array
    size: Array
    D: Array
    F: Array
    E: Array
    c: Array


def qp_adjoint(xp: Namespace, *given: Array) -> Step:
    """d_z [B, 1, n], d_λ and d_μ in one row [B, 1, m + n], d_ν [B, 1, q], of what `held` takes."""
    at = held(xp, *given)

    def unfinished(*state: Array) -> Array:
        return xp.any(state[-1])

    def proximal(*state: Array) -> tuple[Array, ...]:
        return step(xp, at, *state)

    dz, dlam, dnu, _ = xp.loop(unfinished, proximal, begin(at), FACTORS)
    return finished(at, dz, dlam, dnu)


def held(
    xp: Namespace,
    Q: Array,
    G: Array,
    A: Array,
    multiplier: Array,
    slack: Array,
    z_bar: Array,
    bars: Array,
    nu_bar: Array,
) -> Held:
    """Q [B, n, n] symmetric, G [B, m, n], A [B, q, n] with q >= 1; (λ, μ), their slacks, (λ̄, μ̄) in rows
    [B, 1, m + n]. A multiplier that is NaN counts as 0.
    """
    Q, _, G, A, D, F, E, c = units(xp, Q, 0.0 * z_bar, G, A)
    active = xp.indicator((slack <= 0.0) | (abs(multiplier) * c / F > slack * F))
    r_z, r, r_nu = -z_bar * D, active * (-bars * F / c), -nu_bar * E / c
    size = xp.largest(xp.concat([r_z, r, r_nu]))
    return Held(matrices(xp, Q, G, A), active, r_z, r, r_nu, size, D, F, E, c)


def begin(at: Held) -> tuple[Array, ...]:
    """dz, dλ, dν and which samples are going."""
    return 0.0 * at.r_z, 0.0 * at.r, 0.0 * at.r_nu, at.size > 0.0


def step(xp: Namespace, at: Held, dz: Array, dlam: Array, dnu: Array, going: Array) -> tuple[Array, ...]:
    """Some steps of the proximal point method."""
    of, active, r_z, r, r_nu = at[:5]
    solve = solver(xp, of, active / DELTA, RHO + 0.0 * at.c, DELTA + 0.0 * at.c)

    def left() -> Step:
        """r − K x."""
        return r_z - dz @ of.Q - dlam @ of.C - dnu @ of.A, active * (r - dz @ of.Ct), r_nu - dz @ of.At

    for _ in range(STEPS):
        e_z, e, e_nu = left()
        more = solve(e_z, -e, e_nu, 1)
        dz, dlam, dnu = (xp.where(going, a + d, a) for a, d in zip((dz, dlam, dnu), more, strict=True))
    return dz, dlam, dnu, going & (xp.largest(xp.concat(list(left()))) > ENOUGH * at.size)


def finished(at: Held, dz: Array, dlam: Array, dnu: Array) -> Step:
    """The same in the units of the data."""
    return dz * at.D * at.c, dlam * at.F, dnu * at.E


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
