"""Tangents of the answer of a quadratic program, by the system of its adjoint, which is symmetric.

The KKT conditions hold along a path of the data, at a fixed active set::

    r_z = Q̇z + ṗ + Ġ'λ + Ȧ'ν              Q̇ its symmetric part
    r_λ = Ġz − ḣ where λ >= 0,  − ḣ_lower where λ < 0
    r_ν = Ȧz − ḃ
    r_μ = −u̇ where μ >= 0,  −l̇ where μ < 0        u, l = upper, lower

so that (ż, λ̇, ν̇, μ̇) is what `icnnrt.mathematics.qp_adjoint` makes of them as (z̄, λ̄, ν̄, μ̄): the exact transpose of its
`gradients`. A row with two equal sides whose multiplier is 0 moves by its upper one; of a path that keeps them equal
that is either.
"""

from collections.abc import Mapping
from typing import Any

Array = Any  # of numpy, or a tensor

__all__ = ["tangent_residuals"]


def tangent_residuals(
    z: Array, lam: Array, nu: Array, mu: Array, dots: Mapping[str, Array]
) -> tuple[Array, Array, Array, Array]:
    """r_z [B, n], r_λ [B, m], r_ν [B, q], r_μ [B, n] of an answer of those shapes.

    dots: tangents of the data by their names, [B, ...] or [1, ...]; what is left out does not move, nor does anything
    that has no columns.
    """

    def by(M: Array, v: Array) -> Array:
        """M v for matrices [B, rows, n] or [1, rows, n] and rows v [B, n]."""
        return (M @ v[:, :, None])[:, :, 0]

    def moved(multiplier: Array, above: str, below: str) -> Array:
        side = 0.0 * multiplier
        for name, points in ((above, multiplier >= 0), (below, multiplier < 0)):
            if name in dots:
                side = side - points * dots[name]
        return side

    r_z, r_lam = 0.0 * z, moved(lam, "h", "h_lower")
    r_nu, r_mu = 0.0 * nu, moved(mu, "upper", "lower")
    if "p" in dots:
        r_z = r_z + dots["p"]
    if "Q" in dots:
        Q = dots["Q"]
        r_z = r_z + 0.5 * (by(Q, z) + by(Q.swapaxes(-1, -2), z))
    if "G" in dots:
        r_z, r_lam = r_z + by(dots["G"].swapaxes(-1, -2), lam), r_lam + by(dots["G"], z)
    if "A" in dots:
        r_z, r_nu = r_z + by(dots["A"].swapaxes(-1, -2), nu), r_nu + by(dots["A"], z)
    if "b" in dots:
        r_nu = r_nu - dots["b"]
    return r_z, r_lam, r_nu, r_mu
