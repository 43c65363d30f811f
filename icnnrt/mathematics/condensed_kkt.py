"""The regularised KKT system of a quadratic program, condensed and factored.

With C = [G; I] and weights W >= 0 of its rows, dλ = W (C dz + t) leaves::

    [H   A'] [dz]   [r_z − C'W t]
    [A   −δ] [dν] = [r_ν        ]      H = Q + ρ + C'W C

solved by P = H + γ A'A and the Schur complement A P⁻¹ A' + δ / (1 − γδ). Any γ gives the same dz and dν; one above the
size of an equilibrated Q, which is 1, keeps P well conditioned where Q has no curvature of its own but A leaves no
freedom.

Refinements see dλ as unknown: W (C dz) would cancel where W is large.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from icnnrt.mathematics.namespace import Array, Namespace

GAMMA: Final = 1e2  # γ; anything from 1 to 1e6 serves

Step = tuple[Array, Array, Array]  # dz [B, 1, n], dλ [B, 1, m + n], dν [B, 1, q]


class Matrices(NamedTuple):
    """What stays the same while W changes."""

    Q: Array  # [B, n, n]
    C: Array  # [B, m + n, n]
    Ct: Array
    A: Array  # [B, q, n], q >= 1
    At: Array
    AtA: Array
    eye: Array  # [n, n]
    eye_q: Array  # [q, q]


def matrices(xp: Namespace, Q: Array, G: Array, A: Array) -> Matrices:
    """Those of Q [B, n, n], G [B, m, n] and A [B, q, n]."""
    C = xp.concat_rows([G, xp.eyes(Q)])
    At = transposed(xp, A)
    return Matrices(Q, C, transposed(xp, C), A, At, At @ A, xp.eye(Q), xp.eye(At))


def transposed(xp: Namespace, M: Array) -> Array:
    """M', to stand in a product, where a bare transpose may not."""
    return -xp.mT(-M)


def solver(
    xp: Namespace, of: Matrices, W: Array, rho: Array, delta: Array
) -> Callable[[Array, Array, Array, int], Step]:
    """The function (r_z, t, r_ν, refinements) -> dz, dλ, dν. W [B, 1, m + n]; ρ, δ [B, 1, 1]."""
    Q, C, Ct, A, At, AtA, eye, eye_q = of
    gamma = xp.minimum(0.5 / delta, GAMMA)
    left = 1.0 - gamma * delta
    P_solved = xp.factor_spd(Q + (Ct * W) @ C + gamma * AtA + rho * eye, eye)
    PA = P_solved(A)  # A P⁻¹
    S_solved = xp.factor_spd(PA @ At + delta / left * eye_q, eye_q)
    held = W > 0.0
    has, inverse_W = xp.indicator(held), 1.0 / xp.where(held, W, 1.0)

    def condensed(r_z: Array, t: Array, r_nu: Array) -> Step:
        # P dz + (1 − γδ) A'dν = r_z − C'W t + γ A'r_ν
        y = P_solved(r_z - (W * t) @ C + (gamma * r_nu) @ A)
        scaled_dnu = S_solved(y @ At - r_nu)
        dz = y - scaled_dnu @ PA
        return dz, W * (dz @ Ct + t), scaled_dnu / left

    def solve(r_z: Array, t: Array, r_nu: Array, refinements: int) -> Step:
        dz, dlam, dnu = condensed(r_z, t, r_nu)
        for _ in range(refinements):
            e_z = r_z - dz @ Q - rho * dz - dlam @ C - dnu @ A
            e_lam = has * (dz @ Ct + t - inverse_W * dlam)
            e_nu = r_nu - dz @ At + delta * dnu
            ddz, ddlam, ddnu = condensed(e_z, e_lam, e_nu)
            dz, dlam, dnu = dz + ddz, dlam + ddlam, dnu + ddnu
        return dz, dlam, dnu

    return solve
