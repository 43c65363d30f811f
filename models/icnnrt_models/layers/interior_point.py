"""Convex quadratic programs in torch: the statement of `icnnrt.mathematics.qp_reference` once more, in TorchScript's
Python.

Problem, signs, method and adjoint stand there; the functions here bear the same names and the same symbols. Everything
is float64 and has a leading axis of B samples. TorchScript reads no constants of a module, so they come as defaults of
arguments. Called from Python they run as they are; `torch.jit.script` takes each of them, so that a trace can hold the
solver whole: with its loop and its early end, not as the steps that one example took.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from icnnrt.mathematics.qp_reference import (
    BOUND_MAX,
    CANCELLED,
    CERTIFICATE,
    CERTIFIED,
    CYCLES,
    ENOUGH,
    EPS,
    EQUILIBRATIONS,
    FALLS,
    HARD,
    NEARLY,
    PATIENCE,
    RAY,
    RAY_FLOAT32,
    REFINEMENTS,
    REGULARISATION,
    SHORT_STEP,
    SMALLEST,
    TO_BOUNDARY,
    WARM,
)
from icnnrt.mathematics.qp_status import QPStatus

__all__ = ["Data", "Iterate", "Newton", "Solution", "adjoint", "adjoint_system", "newton_solve", "solve"]

TINY = torch.finfo(torch.float64).tiny
FLOAT_MOST, DOUBLE_MOST = torch.finfo(torch.float32).max, torch.finfo(torch.float64).max


class Data(NamedTuple):
    """B problems; as `icnnrt.mathematics.qp_reference.QP`."""

    Q: Tensor
    p: Tensor
    G: Tensor
    h_lower: Tensor
    h: Tensor
    A: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor


class Iterate(NamedTuple):
    """A primal-dual point; as `icnnrt.mathematics.qp_reference.QPIterate`."""

    z: Tensor
    nu: Tensor
    lu: Tensor
    ll: Tensor
    su: Tensor
    sl: Tensor


class Solution(NamedTuple):
    """As `icnnrt.mathematics.qp_reference.QPReference`, and the outputs of the operator QPSolve in their order."""

    z: Tensor
    lam: Tensor
    nu: Tensor
    mu: Tensor
    slack: Tensor
    box_slack: Tensor
    residual: Tensor
    status: Tensor
    ray: Tensor


class Point(NamedTuple):
    """An answer in the units of the problem; its KKT residual in those of the equilibrated one, and the units of z."""

    z: Tensor
    lam: Tensor
    nu: Tensor
    mu: Tensor
    slack: Tensor
    box_slack: Tensor
    residual: Tensor
    D: Tensor


class Factors(NamedTuple):
    """LU factors of a symmetric matrix that was scaled to unit diagonal."""

    LU: Tensor
    pivots: Tensor
    scale: Tensor


class Newton(NamedTuple):
    """The regularised system, condensed to z and ν and factored; as `icnnrt.mathematics.qp_reference._Newton`."""

    Q: Tensor
    G: Tensor
    A: Tensor
    true_W: Tensor
    W: Tensor
    rho: Tensor  # [B, 1], and so δ, γ and 1 − γδ
    delta: Tensor
    gamma: Tensor
    left: Tensor
    P: Factors
    schur: Factors
    PA: Tensor


class Scaling(NamedTuple):
    """z = D ẑ, λ = E_G λ̂ / c, ν = E_A ν̂ / c, μ = μ̂ / D / c, s = ŝ / E."""

    D: Tensor
    E_G: Tensor
    E_A: Tensor
    c: Tensor


def _apply(M: Tensor, a: Tensor) -> Tensor:
    """M a for a batch of matrices [B, r, c] and vectors [B, c]."""
    return torch.matmul(M, a.unsqueeze(2)).squeeze(2)


def _largest(arrays: list[Tensor]) -> Tensor:
    """The largest magnitude of each sample [B], of arrays [B, k]; 0 of nothing."""
    joined = torch.cat(arrays, 1).abs()
    return torch.cat([torch.zeros_like(joined[:, :0].sum(1, keepdim=True)), joined], 1).amax(1)


def _least(a: Tensor) -> Tensor:
    """The least entry of each sample [B, 1]; ∞ of nothing."""
    return torch.cat([torch.full_like(a[:, :0].sum(1, keepdim=True), float("inf")), a], 1).amin(1, keepdim=True)


def _most(M: Tensor, dim: int) -> Tensor:
    """The largest magnitude along a dimension, which may be empty."""
    if M.size(dim) == 0:
        return M.sum(dim)
    return M.abs().amax(dim)


def _finite(bound: Tensor, most: float = BOUND_MAX) -> Tensor:
    return bound.abs() < most


def _or_infinite(bound: Tensor, most: float = BOUND_MAX) -> Tensor:
    """Bounds that are none made infinite, which no scaling brings within reach."""
    return torch.where(bound.abs() >= most, bound * float("inf"), bound)


def _rows(G: Tensor, z: Tensor) -> Tensor:
    """[G; I] z"""
    return torch.cat([_apply(G, z), z], 1)


def _columns(G: Tensor, lam: Tensor) -> Tensor:
    """[G; I]' λ"""
    m = G.size(1)
    return _apply(G.mT, lam[:, :m]) + lam[:, m:]


def _factorise(M: Tensor, eps: float = EPS, tiny: float = TINY) -> Factors:
    """M symmetric positive semidefinite, scaled to unit diagonal; the ridge is never zero."""
    scale = M.diagonal(0, 1, 2).clamp(min=tiny).rsqrt().unsqueeze(2)
    M = M * scale * scale.mT
    M.diagonal(0, 1, 2).add_(4.0 * eps)
    if M.size(1) == 0:
        return Factors(M, torch.zeros(M.shape[:2], dtype=torch.int32, device=M.device), scale)
    LU, pivots, _ = torch.linalg.lu_factor_ex(M)
    return Factors(LU, pivots, scale)


def _substitute(factors: Factors, R: Tensor) -> Tensor:
    """X with M X = R, R [B, k, r]."""
    if R.size(1) == 0 or R.size(2) == 0:
        return R * factors.scale
    return torch.linalg.lu_solve(factors.LU, factors.pivots, R * factors.scale) * factors.scale


def newton(Q: Tensor, G: Tensor, A: Tensor, true_W: Tensor, rho: Tensor, delta: Tensor, W_most: Tensor) -> Newton:
    """Factors for [Q + ρ, [G; I]', A'; [G; I], −1/W, 0; A, 0, −δ]; ρ and δ [B, 1]."""
    m = G.size(1)
    W = true_W * (W_most / (true_W + W_most))
    P = Q + torch.matmul(G.mT, W[:, :m].unsqueeze(2) * G)
    P.diagonal(0, 1, 2).add_(W[:, m:] + rho)
    trace_A = (A * A).sum([1, 2]).unsqueeze(1)
    has = trace_A > 0
    gamma = torch.where(has, P.diagonal(0, 1, 2).sum(1, keepdim=True) / torch.where(has, trace_A, 1.0), 0.0)
    gamma = torch.minimum(gamma, 0.5 / delta)
    if A.size(1) > 0:
        P = P + gamma.unsqueeze(2) * torch.matmul(A.mT, A)
    left = 1.0 - gamma * delta
    factors = _factorise(P)
    PA = _substitute(factors, A.mT)
    schur = torch.matmul(A, PA)
    schur.diagonal(0, 1, 2).add_(delta / left)
    return Newton(Q, G, A, true_W, W, rho, delta, gamma, left, factors, _factorise(schur), PA)


def _condensed(N: Newton, r_z: Tensor, t: Tensor, r_nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r = r_z - _columns(N.G, N.W * t) + N.gamma * _apply(N.A.mT, r_nu)
    dz = _substitute(N.P, r.unsqueeze(2)).squeeze(2)
    scaled_dnu = _substitute(N.schur, (_apply(N.A, dz) - r_nu).unsqueeze(2)).squeeze(2)
    dz = dz - _apply(N.PA, scaled_dnu)
    return dz, N.W * (_rows(N.G, dz) + t), scaled_dnu / N.left


def newton_solve(
    N: Newton, r_z: Tensor, t: Tensor, r_nu: Tensor, refinements: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dλ, dν with dλ = W([G; I] dz + t); linear in the right-hand sides."""
    dz, dlam, dnu = _condensed(N, r_z, t, r_nu)
    has = N.true_W > 0
    inverse_W = torch.where(has, 1.0 / torch.where(has, N.true_W, 1.0), 0.0)
    for _ in range(refinements):
        e_z = r_z - _apply(N.Q, dz) - N.rho * dz - _columns(N.G, dlam) - _apply(N.A.mT, dnu)
        e_lam = torch.where(has, _rows(N.G, dz) + t - inverse_W * dlam, 0.0)
        e_nu = r_nu - _apply(N.A, dz) + N.delta * dnu
        ddz, ddlam, ddnu = _condensed(N, e_z, e_lam, e_nu)
        dz, dlam, dnu = dz + ddz, dlam + ddlam, dnu + ddnu
    return dz, dlam, dnu


def _direction(
    N: Newton,
    at: Iterate,
    Wu: Tensor,
    Wl: Tensor,
    r_d: Tensor,
    r_nu: Tensor,
    r_u: Tensor,
    r_l: Tensor,
    c_u: Tensor,
    c_l: Tensor,
    has_upper: Tensor,
    has_lower: Tensor,
    soft: float,
) -> Iterate:
    """The Newton step to λ∘s + c = 0 on both sides."""
    e_u, e_l = c_u / (at.su + soft * at.lu), c_l / (at.sl + soft * at.ll)
    W = Wu + Wl
    t = torch.where(W > 0, (e_u + Wu * r_u - e_l - Wl * r_l) / torch.where(W > 0, W, 1.0), 0.0)
    dz, _, dnu = newton_solve(N, -r_d, t, -r_nu)
    dr = _rows(N.G, dz)
    dlu, dll = e_u + Wu * (r_u + dr), e_l + Wl * (r_l - dr)
    dsu = torch.where(has_upper, -r_u - dr + soft * dlu, 0.0)
    dsl = torch.where(has_lower, -r_l + dr + soft * dll, 0.0)
    return Iterate(dz, dnu, dlu, dll, dsu, dsl)


def _to_boundary(at: Iterate, d: Iterate) -> Tensor:
    """The step length at which a slack or multiplier reaches 0 [B, 1]."""
    a = torch.cat([at.lu, at.ll, at.su, at.sl], 1)
    da = torch.cat([d.lu, d.ll, d.su, d.sl], 1)
    return _least(torch.where(da < 0, -a / torch.where(da < 0, da, -1.0), float("inf")))


def interior_point(
    qp: Data,
    soft: float,
    steps: int,
    start: Iterate,
    smallest: float = SMALLEST,
    enough: float = ENOUGH,
    nearly: float = NEARLY,
    patience: tuple[int, int] = PATIENCE,
    regularisation: tuple[float, float] = REGULARISATION,
    to_boundary: float = TO_BOUNDARY,
    short_step: float = SHORT_STEP,
    cycles: tuple[int, float] = CYCLES,
) -> Iterate:
    """The best iterate met. With soft > 0 a constraint may be violated by t at a price of ½ t² / soft."""
    Q, p, G, A, b = qp.Q, qp.p, qp.G, qp.A, qp.b
    upper, lower = torch.cat([qp.h, qp.upper], 1), torch.cat([qp.h_lower, qp.lower], 1)
    has_upper, has_lower = _finite(upper), _finite(lower)
    upper, lower = torch.where(has_upper, upper, 0.0), torch.where(has_lower, lower, 0.0)
    sides = (has_upper.sum(1, keepdim=True) + has_lower.sum(1, keepdim=True)).clamp(min=1)
    scale_nu = 1.0 + _largest([b])
    infinity = float("inf")

    at = start
    best = start
    best_residual = torch.full_like(p[:, 0], infinity)
    idle = torch.zeros_like(best_residual)
    going = torch.ones_like(best_residual, dtype=torch.bool)
    for step in range(steps + 1):
        z, nu, lu, ll, su, sl = at
        r = _rows(G, z)
        Qz, G_lam, A_nu, Az = _apply(Q, z), _columns(G, lu - ll), _apply(A.mT, nu), _apply(A, z)
        r_d = Qz + p + G_lam + A_nu
        r_nu = Az - b - soft * nu
        r_u = torch.where(has_upper, r + su - upper - soft * lu, 0.0)
        r_l = torch.where(has_lower, -r + sl + lower - soft * ll, 0.0)
        gap = (su * lu + sl * ll).sum(1, keepdim=True)
        objective = 0.5 * (z * Qz).sum(1) + (p * z).sum(1)
        reach = _largest([torch.where(has_upper | has_lower, r, 0.0), Az])
        residual = torch.maximum(
            _largest([r_d]) / (1.0 + _largest([Qz, p, G_lam, A_nu])),
            torch.maximum(_largest([r_nu, r_u, r_l]) / (scale_nu + reach), gap[:, 0] / (1.0 + objective.abs())),
        )
        residual = torch.where(torch.isfinite(residual), residual, infinity)
        idle = torch.where(residual < 0.7 * best_residual, 0.0, idle + 1.0)
        better = going & (residual < best_residual)
        chosen = better.unsqueeze(1)
        best = Iterate(
            torch.where(chosen, z, best.z),
            torch.where(chosen, nu, best.nu),
            torch.where(chosen, lu, best.lu),
            torch.where(chosen, ll, best.ll),
            torch.where(chosen, su, best.su),
            torch.where(chosen, sl, best.sl),
        )
        best_residual = torch.where(better, residual, best_residual)
        allowed = torch.where(best_residual < nearly, float(patience[0]), float(patience[1]))
        going = going & (best_residual > enough) & (idle < allowed)
        if step == steps or not bool(going.any()):
            break

        mu = gap / sides
        rho = (1e-6 * mu).clamp(regularisation[1], regularisation[0])
        Wu, Wl = lu / (su + soft * lu), ll / (sl + soft * ll)
        N = newton(Q, G, A, Wu + Wl, rho, soft + rho, 1.0 / rho)

        # predictor
        d = _direction(N, at, Wu, Wl, r_d, r_nu, r_u, r_l, -su * lu, -sl * ll, has_upper, has_lower, soft)
        a = _to_boundary(at, d).clamp(max=1.0)
        ahead = (su + a * d.su) * (lu + a * d.lu) + (sl + a * d.sl) * (ll + a * d.ll)
        sigma = (ahead.sum(1, keepdim=True) / gap.clamp(min=1e-300)).clamp(0.0, 1.0) ** 3
        # corrector; where the predictor soon met a boundary, its second order is far off and makes the steps cycle;
        # where they do, they are taken back to the central path
        cycling = ((idle >= float(cycles[0])) & (best_residual >= nearly)).unsqueeze(1)
        target = torch.where(cycling, sigma.clamp(min=cycles[1]), sigma) * mu
        second = torch.where(cycling | (a < short_step), 0.0, 1.0)
        c_u = torch.where(has_upper, target - su * lu - second * d.su * d.lu, 0.0)
        c_l = torch.where(has_lower, target - sl * ll - second * d.sl * d.ll, 0.0)
        d = _direction(N, at, Wu, Wl, r_d, r_nu, r_u, r_l, c_u, c_l, has_upper, has_lower, soft)
        alpha = (to_boundary * _to_boundary(at, d)).clamp(max=1.0)
        alpha = torch.where(going.unsqueeze(1) & torch.isfinite(d.z).all(1, keepdim=True), alpha, 0.0)
        moving = alpha > 0
        lu, ll = torch.where(moving, lu + alpha * d.lu, lu), torch.where(moving, ll + alpha * d.ll, ll)
        su, sl = torch.where(moving, su + alpha * d.su, su), torch.where(moving, sl + alpha * d.sl, sl)
        at = Iterate(
            torch.where(moving, z + alpha * d.z, z),
            torch.where(moving, nu + alpha * d.nu, nu),
            torch.where(has_upper, lu.clamp(min=smallest), 0.0),
            torch.where(has_lower, ll.clamp(min=smallest), 0.0),
            su.clamp(min=smallest),
            sl.clamp(min=smallest),
        )
    return best


def _lift(u: Tensor, low: Tensor, has_upper: Tensor, has_lower: Tensor) -> Tensor:
    """What makes all of u and low at least 1, if any is below 1e-3 [B, 1]."""
    infinity = float("inf")
    least = _least(torch.cat([torch.where(has_upper, u, infinity), torch.where(has_lower, low, infinity)], 1))
    by = torch.where(least < 1e-3, 1.0 - least, 0.0)
    return torch.where(torch.isfinite(by), by, 0.0)


def _cold(qp: Data, soft: float, rho_most: float = REGULARISATION[0]) -> Iterate:
    """The minimiser of the objective plus ½ ‖slacks‖²; slacks and multipliers are then lifted to be positive."""
    upper, lower = torch.cat([qp.h, qp.upper], 1), torch.cat([qp.h_lower, qp.lower], 1)
    has_upper, has_lower = _finite(upper), _finite(lower)
    upper, lower = torch.where(has_upper, upper, 0.0), torch.where(has_lower, lower, 0.0)
    sides = has_upper.to(qp.p.dtype) + has_lower
    t = -(upper + lower) / sides.clamp(min=1.0)
    rho = torch.full_like(qp.p[:, :1], rho_most)
    N = newton(qp.Q, qp.G, qp.A, sides / (1.0 + soft), rho, soft + rho, 1.0 / rho)
    z, _, nu = newton_solve(N, -qp.p, t, qp.b)
    r = _rows(qp.G, z)
    su, sl = upper - r, r - lower
    by = _lift(su, sl, has_upper, has_lower)
    lu, ll = -su, -sl
    lam_by = _lift(lu, ll, has_upper, has_lower)
    return Iterate(
        z,
        nu,
        torch.where(has_upper, lu + lam_by, 0.0),
        torch.where(has_lower, ll + lam_by, 0.0),
        torch.where(has_upper, su + by, 1.0),
        torch.where(has_lower, sl + by, 1.0),
    )


def _warm(qp: Data, scaling: Scaling, start: Tensor, cold: Iterate, least: float = WARM) -> Iterate:
    """An interior point near start = (z, λ, ν, μ); the cold one where that holds NaN. `qp` is scaled."""
    n, m, q = qp.p.size(1), qp.h.size(1), qp.b.size(1)
    z, lam, nu, mu = torch.split(start, [n, m, q, n], 1)
    z, lam = z / scaling.D, lam * scaling.c / scaling.E_G
    nu, mu = nu * scaling.c / scaling.E_A, mu * scaling.c * scaling.D
    multiplier, r = torch.cat([lam, mu], 1), _rows(qp.G, z)
    upper, lower = torch.cat([qp.h, qp.upper], 1), torch.cat([qp.h_lower, qp.lower], 1)
    has_upper, has_lower = _finite(upper), _finite(lower)
    given = ~torch.isnan(start).any(1, keepdim=True)
    return Iterate(
        torch.where(given, z, cold.z),
        torch.where(given, nu, cold.nu),
        torch.where(given, torch.where(has_upper, multiplier.clamp(min=least), 0.0), cold.lu),
        torch.where(given, torch.where(has_lower, (-multiplier).clamp(min=least), 0.0), cold.ll),
        torch.where(given, torch.where(has_upper, (upper - r).clamp(min=least), 1.0), cold.su),
        torch.where(given, torch.where(has_lower, (r - lower).clamp(min=least), 1.0), cold.sl),
    )


def _root(size: Tensor) -> Tensor:
    return torch.where(size > 0, size.clamp(1e-8, 1e8), 1.0).rsqrt()


def _size_of_z(Q: Tensor, p: Tensor, bounds: Tensor, b: Tensor) -> Tensor:
    """τ = 2^round(log2 max(max|b|, max(−u), min(max|p| / mean(diag Q), max|u|))) [B, 1], u = [h; upper;
    −h_lower; −lower]: those below 0 exclude z = 0, and so demand that size. 1 if it is of that size already.

    Every measure of the method has a floor of 1: z is brought near it, so that an answer has no units.
    """
    infinity = float("inf")
    slope, curvature = _most(p, 1), Q.diagonal(0, 1, 2).mean(1)
    u = torch.where(_finite(bounds), bounds, 0.0)
    held = _largest([u])
    has = curvature > 0
    size = torch.minimum(
        torch.where(has, slope / torch.where(has, curvature, 1.0), infinity), torch.where(held > 0, held, infinity)
    )
    size = torch.maximum(_largest([b, u.clamp(max=0.0)]), size)
    known = (size > 0) & torch.isfinite(size) & ~((size >= 1 / 64) & (size <= 64))
    power = torch.where(known, size, 1.0).clamp(2.0**-60, 2.0**60).log2().round()
    return torch.pow(2.0, power).unsqueeze(1)


def _equilibrated(qp: Data, scale_cost: bool, rounds: int = EQUILIBRATIONS) -> tuple[Data, Scaling]:
    """Rows and columns of [Q G' A'; G 0 0; A 0 0] brought near size 1 (Ruiz), then z, then the objective."""
    Q, G, A = qp.Q, qp.G, qp.A
    D, E_G, E_A = torch.ones_like(qp.p), torch.ones_like(qp.h), torch.ones_like(qp.b)
    for _ in range(rounds):
        column = torch.maximum(_most(Q, 1), torch.maximum(_most(G, 1), _most(A, 1)))
        d, e_G, e_A = _root(column), _root(_most(G, 2)), _root(_most(A, 2))
        Q = Q * d.unsqueeze(2) * d.unsqueeze(1)
        G = G * e_G.unsqueeze(2) * d.unsqueeze(1)
        A = A * e_A.unsqueeze(2) * d.unsqueeze(1)
        D, E_G, E_A = D * d, E_G * e_G, E_A * e_A
    p = qp.p * D
    bounds = torch.cat([qp.h * E_G, qp.upper / D, -qp.h_lower * E_G, -qp.lower / D], 1)
    tau = _size_of_z(Q, p, bounds, qp.b * E_A)
    Q, p, D, E_G, E_A = Q * (tau * tau).unsqueeze(2), p * tau, D * tau, E_G / tau, E_A / tau
    c = torch.ones_like(p[:, :1])
    if scale_cost:
        size = torch.maximum(_most(Q, 1).mean(1), _most(p, 1)).unsqueeze(1)
        c = torch.where(size > 0, 1.0 / size.clamp(1e-30, 1e30), 1.0)
    scaled = Data(Q * c.unsqueeze(2), p * c, G, qp.h_lower * E_G, qp.h * E_G, A, qp.b * E_A, qp.lower / D, qp.upper / D)
    return scaled, Scaling(D, E_G, E_A, c)


def _solved(qp: Data, soft: float, steps: int, start: Tensor | None) -> Point:
    m = qp.G.size(1)
    scaled, scaling = _equilibrated(qp, soft == 0.0)
    D, E_G, E_A, c = scaling
    first = _cold(scaled, soft)
    if start is not None:
        first = _warm(scaled, scaling, start, first)
    z, nu, lu, ll, su, sl = interior_point(scaled, soft, steps, first)
    lam, s = lu - ll, torch.where(lu >= ll, su, sl)
    lam, mu = lam[:, :m], lam[:, m:]
    residual = kkt_residual(scaled, z, lam, nu, mu)
    return Point(z * D, lam * E_G / c, nu * E_A / c, mu / D / c, s[:, :m] / E_G, s[:, m:] * D, residual, D)


def kkt_residual(qp: Data, z: Tensor, lam: Tensor, nu: Tensor, mu: Tensor) -> Tensor:
    """Relative stationarity, feasibility and duality gap [B, 3]."""
    Qz, Az = _apply(qp.Q, z), _apply(qp.A, z)
    G_lam, A_nu = _apply(qp.G.mT, lam), _apply(qp.A.mT, nu)
    stationarity = _largest([Qz + qp.p + G_lam + A_nu + mu]) / (1.0 + _largest([Qz, qp.p, G_lam, A_nu, mu]))
    r, multiplier = _rows(qp.G, z), torch.cat([lam, mu], 1)
    upper, lower = torch.cat([qp.h, qp.upper], 1), torch.cat([qp.h_lower, qp.lower], 1)
    has_upper, has_lower = _finite(upper), _finite(lower)
    above = torch.where(has_upper, r - upper, 0.0)
    below = torch.where(has_lower, lower - r, 0.0)
    up, down = multiplier.clamp(min=0.0), (-multiplier).clamp(min=0.0)
    gap = (torch.where(has_upper, (up * above).abs(), up) + torch.where(has_lower, (down * below).abs(), down)).sum(1)
    held = torch.where(has_upper | has_lower, r, 0.0)
    violated = _largest([Az - qp.b, above.clamp(min=0.0), below.clamp(min=0.0)])
    feasibility = violated / (1.0 + _largest([qp.b, Az, held]))
    objective = 0.5 * (z * Qz).sum(1) + (qp.p * z).sum(1)
    return torch.stack([stationarity, feasibility, gap / (1.0 + objective.abs())], 1)


def _pointed_at(multiplier: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """The bound that a signed multiplier points at; 0 where there is none."""
    bound = torch.where(multiplier >= 0, upper, lower)
    return torch.where(_finite(bound), bound, 0.0)


def _farkas(
    qp: Data, steps: int, least: float = CERTIFIED, holds: float = CERTIFICATE, cancelled: float = CANCELLED
) -> tuple[Tensor, Tensor]:
    """Whether no z is feasible, and a certificate: A'ν + G'λ + μ = 0 though its bounds sum to −1."""
    violations = Data(
        torch.zeros_like(qp.Q), torch.zeros_like(qp.p), qp.G, qp.h_lower, qp.h, qp.A, qp.b, qp.lower, qp.upper
    )
    point = _solved(violations, 1.0, steps, None)
    lam, nu, mu = point.lam, point.nu, point.mu
    terms = torch.cat(
        [lam * _pointed_at(lam, qp.h, qp.h_lower), nu * qp.b, mu * _pointed_at(mu, qp.upper, qp.lower)], 1
    )
    amount = -terms.sum(1)
    # In units of z: no z of a reasonable size makes up for what is off.
    off = _largest([(_apply(qp.G.mT, lam) + _apply(qp.A.mT, nu) + mu) * point.D])
    each = _apply(qp.G.mT.abs(), lam.abs()) + _apply(qp.A.mT.abs(), nu.abs()) + mu.abs()
    proven = (amount > least * terms.abs().sum(1)) & (off <= holds * amount)
    proven = proven & (off <= cancelled * _largest([each * point.D]))
    size = torch.where(amount > 0, amount, 1.0).unsqueeze(1)
    return proven, torch.cat([torch.zeros_like(qp.p), lam, nu, mu], 1) / size


def _cone(bound: Tensor) -> Tensor:
    return torch.where(_finite(bound), 0.0, bound)


def _unbounded(
    qp: Data,
    steps: int,
    precision: float,
    least: float = FALLS,
    double_leaves: float = RAY,
    float_leaves: float = RAY_FLOAT32,
    tiny: float = TINY,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """Whether the objective falls without end along some d, and that d, p'd = −1."""
    leaves = float_leaves if precision > eps else double_leaves
    B, n = qp.p.size(0), qp.p.size(1)
    flat = torch.cat([qp.A, qp.Q], 1)
    ray = Data(
        torch.eye(n, dtype=qp.p.dtype, device=qp.p.device).expand(B, n, n).contiguous(),
        qp.p / _largest([qp.p]).clamp(min=tiny).unsqueeze(1),
        qp.G,
        _cone(qp.h_lower),
        _cone(qp.h),
        flat,
        torch.zeros_like(flat[:, :, 0]),
        _cone(qp.lower),
        _cone(qp.upper),
    )
    point = _solved(ray, 0.0, steps, None)
    d, D = point.z, point.D
    amount = -(qp.p * d).sum(1)
    r = _rows(qp.G, d)
    upper, lower = torch.cat([qp.h, qp.upper], 1), torch.cat([qp.h_lower, qp.lower], 1)
    above = torch.where(_finite(upper), r, 0.0).clamp(min=0.0)
    below = torch.where(_finite(lower), -r, 0.0).clamp(min=0.0)
    # Each row against its own size and that of d, in units of z.
    length = _largest([d / D]).unsqueeze(1)
    most = torch.cat([_most(qp.G * D.unsqueeze(1), 2), D], 1) * length
    stays = _apply(flat, d).abs() <= leaves * _most(flat * D.unsqueeze(1), 2) * length
    proven = stays.all(1) & (torch.maximum(above, below) <= leaves * most).all(1)
    proven = proven & (amount > 0) & (amount >= least * _largest([qp.p * D]) * length[:, 0])
    size = torch.where(amount > 0, amount, 1.0).unsqueeze(1)
    return proven, torch.cat([d, torch.zeros_like(qp.h), torch.zeros_like(qp.b), torch.zeros_like(d)], 1) / size


def _positive_semidefinite(Q: Tensor, precision: float, eps: float = EPS) -> Tensor:
    """Up to what rounding to `precision` does to the eigenvalues of Q."""
    n = Q.size(1)
    size = Q.abs().amax([1, 2])
    noise = 8 * n * max(precision, 8.0 * eps)
    Q = Q / torch.where(size > 0, size, 1.0).view(-1, 1, 1)
    lifted = Q.clone()
    lifted.diagonal(0, 1, 2).add_(noise)
    convex = torch.linalg.cholesky_ex(lifted)[1] == 0
    if not bool(convex.all()):  # a factor is cheaper than eigenvalues, which decide where rounding lets it fail
        rest = torch.nonzero(~convex).squeeze(1)
        convex = convex.index_copy(0, rest, torch.linalg.eigvalsh(Q.index_select(0, rest))[:, 0] >= -noise)
    return convex


def _bounded(bound: Tensor, side: float, most: float = BOUND_MAX) -> Tensor:
    """Samples whose bound is no NaN, nor an upper one of −∞ or a lower one of +∞ [B]."""
    return ~(torch.isnan(bound) | (side * bound >= most)).any(1)


def _select(qp: Data, rows: Tensor) -> Data:
    return Data(
        qp.Q.index_select(0, rows),
        qp.p.index_select(0, rows),
        qp.G.index_select(0, rows),
        qp.h_lower.index_select(0, rows),
        qp.h.index_select(0, rows),
        qp.A.index_select(0, rows),
        qp.b.index_select(0, rows),
        qp.lower.index_select(0, rows),
        qp.upper.index_select(0, rows),
    )


def solve(
    qp: Data,
    start: Tensor | None,
    steps: int,
    precision: float,
    tolerance: tuple[float, float],
    inaccurate: int = int(QPStatus.INACCURATE),
    primal_infeasible: int = int(QPStatus.PRIMAL_INFEASIBLE),
    dual_infeasible: int = int(QPStatus.DUAL_INFEASIBLE),
    failed: int = int(QPStatus.FAILED),
    not_finite: int = int(QPStatus.NOT_FINITE_INPUT),
    not_convex: int = int(QPStatus.NOT_CONVEX),
    eps: float = EPS,
    float_most: float = FLOAT_MOST,
    double_most: float = DOUBLE_MOST,
) -> Solution:
    """As `icnnrt.mathematics.qp_reference.qp_solve`: `precision` is the rounding of the data, `tolerance` what counts
    as solved and as inaccurate, start [B, n + m + q + n] is (z, λ, ν, μ) of problems nearby."""
    B, n, m, q = qp.p.size(0), qp.p.size(1), qp.h.size(1), qp.b.size(1)
    finite = (
        torch.isfinite(qp.Q).all(2).all(1) & torch.isfinite(qp.G).all(2).all(1) & torch.isfinite(qp.A).all(2).all(1)
    )
    finite = finite & torch.isfinite(qp.p).all(1) & torch.isfinite(qp.b).all(1)
    finite = finite & _bounded(qp.h, -1.0) & _bounded(qp.upper, -1.0)
    finite = finite & _bounded(qp.h_lower, 1.0) & _bounded(qp.lower, 1.0)
    # No sample may spoil another: those that cannot be solved are replaced while the others are.
    column = finite.unsqueeze(1)
    matrix = finite.view(-1, 1, 1)
    Q = torch.where(matrix, 0.5 * (qp.Q + qp.Q.mT), 0.0)
    convex = _positive_semidefinite(Q, precision)
    crossed = (qp.h_lower > qp.h).any(1) | (qp.lower > qp.upper).any(1)
    trivial = ~finite | ~convex | crossed
    infinity = float("inf")
    skipped = trivial.unsqueeze(1)
    eye = torch.eye(n, dtype=Q.dtype, device=Q.device)
    qp = Data(
        torch.where(skipped.unsqueeze(2), eye, Q),
        torch.where(column, qp.p, 0.0),
        torch.where(matrix, qp.G, 0.0),
        _or_infinite(torch.where(skipped, -infinity, qp.h_lower)),
        _or_infinite(torch.where(column, qp.h, 0.0)),
        torch.where(matrix, qp.A, 0.0),
        torch.where(column, qp.b, 0.0),
        _or_infinite(torch.where(skipped, -infinity, qp.lower)),
        _or_infinite(torch.where(column, qp.upper, 0.0)),
    )

    point = _solved(qp, 0.0, steps, start)
    # In both units: those of the data must not be so small that the 1 in a denominator lets everything pass.
    residual = torch.maximum(kkt_residual(qp, point.z, point.lam, point.nu, point.mu), point.residual)
    worst = residual.amax(1)
    status = torch.zeros([B], dtype=torch.int32, device=Q.device)
    ray = torch.zeros([B, 2 * n + m + q], dtype=Q.dtype, device=Q.device)
    unsolved = ~(worst <= tolerance[0]) & ~trivial
    if bool(unsolved.any()):
        rows = torch.nonzero(unsolved).squeeze(1)
        rest = _select(qp, rows)
        infeasible, farkas = _farkas(rest, steps)
        falling, d = _unbounded(rest, steps, precision)
        found = torch.full_like(rows, failed, dtype=torch.int32)
        found = torch.where(worst.index_select(0, rows) <= tolerance[1], torch.full_like(found, inaccurate), found)
        found = torch.where(falling, torch.full_like(found, dual_infeasible), found)
        found = torch.where(infeasible, torch.full_like(found, primal_infeasible), found)
        status = status.index_copy(0, rows, found)
        proof = torch.where(infeasible.unsqueeze(1), farkas, torch.where(falling.unsqueeze(1), d, 0.0))
        ray = ray.index_copy(0, rows, proof)
    # What the type of the data cannot hold is no answer.
    beyond = float_most if precision > eps else double_most
    largest = _largest([point.z, point.lam, point.nu, point.mu])
    overflows = (status <= inaccurate) & ~(largest <= beyond)
    status = torch.where(overflows, torch.full_like(status, failed), status)
    status = torch.where(crossed, torch.full_like(status, primal_infeasible), status)
    status = torch.where(convex, status, torch.full_like(status, not_convex))
    status = torch.where(finite, status, torch.full_like(status, not_finite))
    lost = (status > inaccurate).unsqueeze(1)
    nan = float("nan")
    return Solution(
        torch.where(lost, nan, point.z),
        torch.where(lost, nan, point.lam),
        torch.where(lost, nan, point.nu),
        torch.where(lost, nan, point.mu),
        torch.where(lost, nan, point.slack),
        torch.where(lost, nan, point.box_slack),
        torch.where(lost, nan, residual),
        status,
        ray,
    )


def adjoint_system(
    Q: Tensor, G: Tensor, A: Tensor, lam: Tensor, mu: Tensor, slack: Tensor, box_slack: Tensor, hard: float = HARD
) -> Newton:
    """[Q, [G; I]', A'; [G; I], −s/|λ|, 0; A, 0, 0], factored; NaN multipliers count as 0."""
    multiplier, s = torch.cat([lam, mu], 1), torch.cat([slack, box_slack], 1)
    known = ~torch.isnan(multiplier)
    W = torch.where(known, multiplier, 0.0).abs() / torch.where(known, s, 1.0)
    Q = 0.5 * (Q + Q.mT)
    # In units of the curvature of Q, and of the rows: an active constraint counts 1e8 times as much as Q, and the
    # refinements take the rest of the way to a hard one.
    size = Q.diagonal(0, 1, 2).abs().mean(1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    row = torch.cat([(G * G).sum(2), torch.ones_like(box_slack)], 1)
    W_most = hard * size / torch.where(row > 0, row, 1.0)
    return newton(Q, G, A, W, 1e-13 * size, 1e-13 / size, W_most)


def adjoint(
    system: Newton,
    good: Tensor,
    z_bar: Tensor,
    lam_bar: Tensor,
    nu_bar: Tensor,
    mu_bar: Tensor,
    rounds: int = REFINEMENTS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_z, d_λ, d_ν, d_μ; NaN for samples that are not `good` [B]."""
    m = lam_bar.size(1)
    d_z, d, d_nu = newton_solve(system, -z_bar, torch.cat([lam_bar, mu_bar], 1), -nu_bar, rounds)
    kept = good.unsqueeze(1)
    nan = float("nan")
    return (
        torch.where(kept, d_z, nan),
        torch.where(kept, d[:, :m], nan),
        torch.where(kept, d_nu, nan),
        torch.where(kept, d[:, m:], nan),
    )
