"""The adjoint of a quadratic program by one KKT system on the active set.

For a loss ℓ with z̄ = ∂ℓ/∂z, λ̄, ν̄, μ̄ at a solution (Amos, Kolter, *OptNet*, ICML 2017; Amos, Xu, Kolter, *Input Convex
Neural Networks*, ICML 2017, Proposition 3), with G_a and I_a the rows that hold z::

    [Q    G_a'  A'  I_a'] [d_z]     [−z̄]         ∂ℓ/∂p = d_z        ∂ℓ/∂Q = ½ (d_z z' + z d_z')
    [G_a                ] [d_λ]  =  [−λ̄]         ∂ℓ/∂G = λ d_z' + d_λ z'
    [A                  ] [d_ν]     [−ν̄]         ∂ℓ/∂A = ν d_z' + d_ν z'        ∂ℓ/∂b = −d_ν
    [I_a                ] [d_μ]     [−μ̄]         ∂ℓ/∂h = −d_λ where λ > 0,  ∂ℓ/∂h_lower = −d_λ where λ < 0

and the same of μ for the box; d_λ and d_μ are 0 elsewhere. A row holds z where its slack is 0, as it is of an equality,
and where its multiplier is larger than its slack, both in units of the equilibrated problem. Where both are 0 (no strict
complementarity) the solution has a kink, and this is the derivative of one side.

The system may be singular: where the solution is not unique, or rows depend on each other. It is solved by the proximal
point method from 0, x <- x + (K + reg)⁻¹ (r − K x) with K the matrix above, which tends to the solution of least norm
(Rockafellar, *Monotone operators and the proximal point algorithm*, 1976).
"""

from typing import Final

from icnnrt.mathematics.condensed_kkt import Step, matrices, solver
from icnnrt.mathematics.interior_point import units
from icnnrt.mathematics.namespace import Array, Namespace

RHO: Final = 1e-12
DELTA: Final = 1e-8
STEPS: Final = 10  # of the proximal point method: 2 are usual
ENOUGH: Final = 1e-14  # relative residual at which a sample stops


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
    Q, _, G, A, D, F, E, c = units(xp, Q, 0.0 * z_bar, G, A)
    of = matrices(xp, Q, G, A)
    holds = (slack <= 0.0) | (abs(multiplier) * c / F > slack * F)
    active = xp.indicator(holds)
    rho, delta = RHO + 0.0 * c, DELTA + 0.0 * c
    solve = solver(xp, of, active / DELTA, rho, delta)
    r_z, r, r_nu = -z_bar * D, active * (-bars * F / c), -nu_bar * E / c
    size = xp.maximum(xp.largest(xp.concat([r_z, r, r_nu])), 1e-300)

    def left(dz: Array, dlam: Array, dnu: Array) -> tuple[Array, Array, Array]:
        """r − K x."""
        return (
            r_z - dz @ of.Q - dlam @ of.C - dnu @ of.A,
            active * (r - dz @ of.Ct),
            r_nu - dz @ of.At,
        )

    def unfinished(dz: Array, dlam: Array, dnu: Array, going: Array) -> Array:
        return xp.any(going)

    def step(dz: Array, dlam: Array, dnu: Array, going: Array) -> tuple[Array, ...]:
        e_z, e, e_nu = left(dz, dlam, dnu)
        more_z, more, more_nu = solve(e_z, -e, e_nu, 1)
        x = (xp.where(going, a + d, a) for a, d in ((dz, more_z), (dlam, more), (dnu, more_nu)))
        dz, dlam, dnu = x
        off = xp.largest(xp.concat(list(left(dz, dlam, dnu))))
        return dz, dlam, dnu, going & (off > ENOUGH * size)

    begin = (0.0 * r_z, 0.0 * r, 0.0 * r_nu, size > 1e-300)
    dz, dlam, dnu, _ = xp.loop(unfinished, step, begin, STEPS)
    return dz * D * c, dlam * F, dnu * E
