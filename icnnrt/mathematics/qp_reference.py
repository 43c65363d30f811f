"""Convex quadratic programs and their adjoint in float64 numpy, written to be read.

This is the statement that every other implementation (portable ONNX bodies, native kernels) is tested against.
Everything is batched: a leading dimension B, one independent problem per sample.

Problem::

    min over z in R^n of  ½ z'Qz + p'z   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

with Q [n, n] symmetric positive semidefinite, G [m, n], A [q, n]; any bound may be infinite, m and q may be 0.
Multipliers are signed: λ_i > 0 pushes back from h_i, λ_i < 0 from h_lower_i, and so μ for the box. Where solved,

    stationarity     Qz + p + G'λ + A'ν + μ = 0
    complementarity  max(λ, 0)'(h − Gz) + max(−λ, 0)'(Gz − h_lower) + the same of μ = 0

which sum is the duality gap. With s the slack of the side that a multiplier points at, the adjoint of a loss ℓ with
z̄ = ∂ℓ/∂z, λ̄, ν̄, μ̄ (Amos, Kolter, *OptNet*, ICML 2017; Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017,
Proposition 3) is one linear system with W_λ = |λ|/s_λ, W_μ = |μ|/s_μ::

    [Q  G'       A'  I      ] [d_z]     [−z̄]         ∂ℓ/∂p = d_z        ∂ℓ/∂Q = ½ (d_z z' + z d_z')
    [G  −1/W_λ              ] [d_λ]  =  [−λ̄]         ∂ℓ/∂G = λ d_z' + d_λ z'
    [A           0          ] [d_ν]     [−ν̄]         ∂ℓ/∂A = ν d_z' + d_ν z'        ∂ℓ/∂b = −d_ν
    [I               −1/W_μ ] [d_μ]     [−μ̄]         ∂ℓ/∂h = −d_λ where λ > 0,  ∂ℓ/∂h_lower = −d_λ where λ < 0

and the same of μ for the box. A multiplier and its slack that are both 0 (no strict complementarity) leave a kink;
the constraint then counts by the multiplier and the slack that the solver ends with.

Method: Mehrotra's predictor-corrector interior point on all sides at once, the Newton systems condensed to z and ν,
regularised by ρ and δ (which the right-hand sides do not see, so that the answer does not either; Friedlander and
Orban, *A primal-dual regularized interior-point method for convex quadratic programs*, 2012) and refined once.
What was not solved is asked whether it can be: the residual t of the least squares problem

    min over z of ½ ‖t‖²,  t = the amounts by which constraints are violated

is a Farkas certificate if it is not 0, and the projection of −p onto {d: Qd = 0, Ad = 0, Gd and d within the
recession cones of their bounds} is a ray along which the objective falls without end if it is not 0. Both are
quadratic programs for the same interior point method.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.qp_status import QPStatus

__all__ = [
    "BOUND_MAX",
    "QP",
    "TOLERANCE",
    "QPCotangents",
    "QPIterate",
    "QPReference",
    "interior_point",
    "kkt_residual",
    "qp_adjoint",
    "qp_gradients",
    "qp_solve",
]

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
STEPS = 50  # bound on interior-point steps: 8 to 14 are usual, degenerate and badly scaled problems take up to 35
BOUND_MAX = 1e30  # bounds beyond are none
WARM = 1e-2  # the least slack and multiplier of a warm start, in units of the equilibrated problem
ENOUGH = 1e-12  # relative KKT residual at which a sample stops
TO_BOUNDARY = 0.995
SHORT_STEP = 0.2
CYCLES = (
    3,
    0.3,
)  # steps without progress, far from the solution, after which a step has no second order, and the least σ
SMALLEST = 1e-18  # of slacks and multipliers, so that their quotients stay finite
REGULARISATION = 1e-8, 1e-12  # ρ = δ: the most, and the least, in units of the equilibrated problem
PATIENCE = 6, 15  # steps without progress that end a sample: when it is nearly solved, and when it is not
NEARLY = 1e-9
EQUILIBRATIONS = 4
# The relative KKT residual that counts as solved, and as inaccurate, by the precision of the data: float32 data hold
# equality constraints that depend on each other only up to their rounding.
TOLERANCE = {np.dtype(np.float64): (1e-9, 1e-5), np.dtype(np.float32): (1e-6, 1e-4)}
HARD = 1e8  # the weight of an active constraint in the adjoint, in units of the curvature of Q
REFINEMENTS = (
    3  # of the adjoint; each leaves about 1e-8 of the error, more where constraints nearly depend on each other
)
CERTIFICATE = 1e-7  # how well a certificate must hold: its residual against the amount it proves
CANCELLED = 1e-6  # the same against the terms that cancel
# How far a ray may leave what it should stay in, against the sizes of the row and of the ray, by the precision of the
# data: float32 data are flat only up to their rounding.
RAY = 1e-8
RAY_FLOAT32 = 1e-6
FALLS = 1e-6  # how fast the objective has to fall along a ray, against the same
CERTIFIED = 1e-9  # the least relative amount of infeasibility that is told from rounding


class QP(NamedTuple):
    """B problems."""

    Q: Array  # [B, n, n]
    p: Array  # [B, n]
    G: Array  # [B, m, n]
    h_lower: Array  # [B, m]
    h: Array  # [B, m]
    A: Array  # [B, q, n]
    b: Array  # [B, q]
    lower: Array  # [B, n]
    upper: Array  # [B, n]


class QPIterate(NamedTuple):
    """A primal-dual point. Sides are those of [G; I], upper and lower, [B, m + n]; absent ones have λ = 0, s = 1."""

    z: Array  # [B, n]
    nu: Array  # [B, q]
    lam_upper: Array
    lam_lower: Array
    s_upper: Array
    s_lower: Array


class QPReference(NamedTuple):
    """What the operator gives; B samples."""

    z: Array  # [B, n], NaN unless SOLVED or INACCURATE, and so the multipliers
    lam: Array  # [B, m]
    nu: Array  # [B, q]
    mu: Array  # [B, n]
    slack: Array  # [B, m] of the side that λ points at, > 0
    box_slack: Array  # [B, n]
    residual: (
        Array  # [B, 3] relative stationarity, feasibility, duality gap, in the data's units or equilibrated: the larger
    )
    status: NDArray[np.int32]  # [B] QPStatus
    ray: Array  # [B, n + m + q + n] certificate of infeasibility: a ray d of z, or (λ, ν, μ); else 0


class QPCotangents(NamedTuple):
    """Solution of the adjoint system."""

    d_z: Array
    d_lam: Array
    d_nu: Array
    d_mu: Array


def _apply(M: Array, a: Array) -> Array:
    """M a for a batch of matrices [B, r, c] and vectors [B, c]."""
    return (M @ a[..., None])[..., 0]


def _transposed(M: Array) -> Array:
    return M.swapaxes(1, 2)


def _largest(*arrays: Array) -> Array:
    """The largest magnitude of each sample [B]; 0 of nothing."""
    return np.max([np.abs(a).reshape(len(a), -1).max(1, initial=0.0) for a in arrays], axis=0)


def _solve_spd(M: Array, R: Array) -> Array:
    """M⁻¹ R for symmetric positive semidefinite M, scaled to unit diagonal; the ridge is never zero."""
    scale = 1.0 / np.sqrt(np.maximum(np.einsum("bii->bi", M), np.finfo(np.float64).tiny))[:, :, None]
    return np.linalg.solve(M * scale * _transposed(scale) + 4 * EPS * np.eye(M.shape[1]), R * scale) * scale


def _finite(bound: Array) -> NDArray[np.bool_]:
    return np.abs(bound) < BOUND_MAX


def _rows(G: Array, z: Array) -> Array:
    """[G; I] z"""
    return np.concatenate([_apply(G, z), z], 1)


def _columns(G: Array, lam: Array) -> Array:
    """[G; I]' λ"""
    return _apply(_transposed(G), lam[:, : G.shape[1]]) + lam[:, G.shape[1] :]


class _Newton:
    """The regularised system of one step, condensed to (dz, dν), dλ = W([G; I] dz + t)::

        [H   A'] [dz]   [r_z − [G; I]' W t]
        [A   −δ] [dν] = [r_ν              ]      H = Q + ρ + [G; I]' W [G; I]

    solved by P = H + γ A'A and the Schur complement A P⁻¹ A' + δ / (1 − γδ). Any γ gives the same dz and dν; that
    of the size of H keeps P well conditioned where Q has no curvature of its own but A leaves no freedom.
    """

    def __init__(self, Q: Array, G: Array, A: Array, W: Array, rho: Array, delta: Array, W_most: Array) -> None:
        n, m = Q.shape[1], G.shape[1]
        self.Q, self.G, self.A, self.true_W = Q, G, A, W
        self.rho, self.delta = rho[:, None], delta[:, None]
        # Condensed with 1/W + 1/W_most, refined with 1/W: beyond W_most nothing but conditioning is lost.
        W = self.W = W * (W_most / (W + W_most))
        P = Q + _transposed(G) @ (W[:, :m, None] * G)
        i = np.arange(n)
        P[:, i, i] += W[:, m:] + self.rho
        trace_A = (A * A).sum((1, 2))
        self.gamma = np.where(trace_A > 0, P[:, i, i].sum(1) / np.where(trace_A > 0, trace_A, 1.0), 0.0)[:, None]
        self.gamma = np.minimum(self.gamma, 0.5 / self.delta)
        self.P = P + self.gamma[:, :, None] * (_transposed(A) @ A)
        self.left = 1.0 - self.gamma * self.delta
        self.PA = _solve_spd(self.P, _transposed(A))  # P⁻¹ A'
        j = np.arange(A.shape[1])
        self.schur = A @ self.PA
        self.schur[:, j, j] += self.delta / self.left

    def _condensed(self, r_z: Array, t: Array, r_nu: Array) -> tuple[Array, Array, Array]:
        # P dz + (1 − γδ) A'dν = r_z + γ A'r_ν
        r = r_z - _columns(self.G, self.W * t) + self.gamma * _apply(_transposed(self.A), r_nu)
        dz = _solve_spd(self.P, r[..., None])[..., 0]
        scaled_dnu = _solve_spd(self.schur, (_apply(self.A, dz) - r_nu)[..., None])[..., 0]
        dz = dz - _apply(self.PA, scaled_dnu)
        return dz, self.W * (_rows(self.G, dz) + t), scaled_dnu / self.left

    def solve(self, r_z: Array, t: Array, r_nu: Array, refinements: int = 1) -> tuple[Array, Array, Array]:
        """dz, dλ, dν. A refinement sees dλ as unknown: W reaches 1e18, and W [G; I] dz would cancel."""
        dz, dlam, dnu = self._condensed(r_z, t, r_nu)
        has = self.true_W > 0
        inverse_W = np.where(has, 1.0 / np.where(has, self.true_W, 1.0), 0.0)
        for _ in range(refinements):
            e_z = r_z - _apply(self.Q, dz) - self.rho * dz - _columns(self.G, dlam) - _apply(_transposed(self.A), dnu)
            e_lam = np.where(has, _rows(self.G, dz) + t - inverse_W * dlam, 0.0)
            e_nu = r_nu - _apply(self.A, dz) + self.delta * dnu
            ddz, ddlam, ddnu = self._condensed(e_z, e_lam, e_nu)
            dz, dlam, dnu = dz + ddz, dlam + ddlam, dnu + ddnu
        return dz, dlam, dnu


def interior_point(
    qp: QP, soft: float = 0.0, steps: int = STEPS, start: QPIterate | None = None
) -> tuple[QPIterate, Array]:
    """The best iterate met and its relative KKT residual [B].

    With soft > 0 a constraint may be violated by t at a price of ½ t² / soft; then λ = t / soft.
    """
    Q, p, G, h_lower, h, A, b, lower, upper = qp
    B = len(p)
    upper, lower = np.concatenate([h, upper], 1), np.concatenate([h_lower, lower], 1)
    has_upper, has_lower = _finite(upper), _finite(lower)
    upper, lower = np.where(has_upper, upper, 0.0), np.where(has_lower, lower, 0.0)
    N = np.maximum(has_upper.sum(1) + has_lower.sum(1), 1)
    scale_nu = 1.0 + _largest(b)

    z, nu, lu, ll, su, sl = _start(qp, upper, lower, has_upper, has_lower, soft) if start is None else start
    best = QPIterate(z, nu, lu, ll, su, sl)
    best_residual = np.full(B, np.inf)
    idle = np.zeros(B, np.int64)
    going = np.ones(B, bool)
    for step in range(steps + 1):
        r = _rows(G, z)
        Qz, G_lam, A_nu, Az = _apply(Q, z), _columns(G, lu - ll), _apply(_transposed(A), nu), _apply(A, z)
        r_d = Qz + p + G_lam + A_nu
        r_nu = Az - b - soft * nu
        r_u = np.where(has_upper, r + su - upper - soft * lu, 0.0)
        r_l = np.where(has_lower, -r + sl + lower - soft * ll, 0.0)
        gap = (su * lu + sl * ll).sum(1)
        objective = 0.5 * (z * Qz).sum(1) + (p * z).sum(1)
        reach = _largest(np.where(has_upper | has_lower, r, 0.0), Az)
        residual = np.max(
            [
                _largest(r_d) / (1.0 + _largest(Qz, p, G_lam, A_nu)),
                _largest(r_nu, r_u, r_l) / (scale_nu + reach),
                gap / (1.0 + np.abs(objective)),
            ],
            axis=0,
        )
        residual = np.where(np.isfinite(residual), residual, np.inf)
        idle = np.where(residual < 0.7 * best_residual, 0, idle + 1)
        better = going & (residual < best_residual)
        iterate = QPIterate(z, nu, lu, ll, su, sl)
        best = QPIterate(*(np.where(better[:, None], a, c) for a, c in zip(iterate, best, strict=True)))
        best_residual = np.where(better, residual, best_residual)
        going &= (best_residual > ENOUGH) & (idle < np.where(best_residual < NEARLY, *PATIENCE))
        if step == steps or not going.any():
            break

        mu = gap / N
        rho = np.clip(1e-6 * mu, REGULARISATION[1], REGULARISATION[0])
        Wu, Wl = lu / (su + soft * lu), ll / (sl + soft * ll)
        newton = _Newton(Q, G, A, Wu + Wl, rho, soft + rho, 1.0 / rho[:, None])

        def direction(
            c_u: Array,
            c_l: Array,
            *,
            at: QPIterate = iterate,
            r: tuple[Array, ...] = (r_d, r_nu, r_u, r_l),
            W: tuple[Array, Array] = (Wu, Wl),
            newton: _Newton = newton,
        ) -> QPIterate:
            """The Newton step to λ∘s + c = 0 on both sides."""
            r_d, r_nu, r_u, r_l = r
            _, _, lu, ll, su, sl = at
            Wu, Wl = W
            e_u, e_l = c_u / (su + soft * lu), c_l / (sl + soft * ll)
            t = np.where(Wu + Wl > 0, (e_u + Wu * r_u - e_l - Wl * r_l) / np.where(Wu + Wl > 0, Wu + Wl, 1.0), 0.0)
            dz, _, dnu = newton.solve(-r_d, t, -r_nu)
            dr = _rows(G, dz)
            dlu, dll = e_u + Wu * (r_u + dr), e_l + Wl * (r_l - dr)
            dsu = np.where(has_upper, -r_u - dr + soft * dlu, 0.0)
            dsl = np.where(has_lower, -r_l + dr + soft * dll, 0.0)
            return QPIterate(dz, dnu, dlu, dll, dsu, dsl)

        def to_boundary(d: QPIterate, *, at: QPIterate = iterate) -> Array:
            """The step length at which a slack or multiplier reaches 0 [B, 1]."""
            pairs = [(a, da) for a, da in zip(at[2:], d[2:], strict=True)]
            return np.min(
                [np.where(da < 0, -a / np.where(da < 0, da, -1.0), np.inf).min(1, initial=np.inf) for a, da in pairs],
                axis=0,
            )[:, None]

        # predictor
        d = direction(-su * lu, -sl * ll)
        a = np.minimum(1.0, to_boundary(d))
        ahead = ((su + a * d.s_upper) * (lu + a * d.lam_upper) + (sl + a * d.s_lower) * (ll + a * d.lam_lower)).sum(1)
        sigma = np.clip(ahead / np.maximum(gap, 1e-300), 0.0, 1.0) ** 3
        # corrector; where the predictor soon met a boundary, its second order is far off and makes the steps cycle;
        # where they do, they are taken back to the central path
        cycles = (idle >= CYCLES[0]) & (best_residual >= NEARLY)
        target = (np.where(cycles, np.maximum(sigma, CYCLES[1]), sigma) * mu)[:, None]
        second = np.where(cycles[:, None] | (a < SHORT_STEP), 0.0, 1.0)
        c_u = np.where(has_upper, target - su * lu - second * d.s_upper * d.lam_upper, 0.0)
        c_l = np.where(has_lower, target - sl * ll - second * d.s_lower * d.lam_lower, 0.0)
        d = direction(c_u, c_l)
        alpha = np.minimum(1.0, TO_BOUNDARY * to_boundary(d))
        alpha = np.where(going[:, None] & np.isfinite(d.z).all(1, keepdims=True), alpha, 0.0)
        z, nu, lu, ll, su, sl = (np.where(alpha > 0, v + alpha * dv, v) for v, dv in zip(iterate, d, strict=True))
        lu, ll = np.where(has_upper, np.maximum(lu, SMALLEST), 0.0), np.where(has_lower, np.maximum(ll, SMALLEST), 0.0)
        su, sl = np.maximum(su, SMALLEST), np.maximum(sl, SMALLEST)
    return best, best_residual


def _start(
    qp: QP, upper: Array, lower: Array, has_upper: NDArray[np.bool_], has_lower: NDArray[np.bool_], soft: float
) -> QPIterate:
    """The minimiser of the objective plus ½ ‖slacks‖²; slacks and multipliers are then lifted to be positive."""
    W = (np.float64(1.0) * has_upper + has_lower) / (1.0 + soft)
    t = -(upper + lower) / np.maximum(1.0 * has_upper + has_lower, 1.0)
    rho = np.full(len(W), REGULARISATION[0])
    z, _, nu = _Newton(qp.Q, qp.G, qp.A, W, rho, soft + rho, 1.0 / rho[:, None]).solve(-qp.p, t, qp.b)
    r = _rows(qp.G, z)

    def lifted(u: Array, low: Array) -> tuple[Array, Array]:
        least = np.minimum(
            np.where(has_upper, u, np.inf).min(1, initial=np.inf),
            np.where(has_lower, low, np.inf).min(1, initial=np.inf),
        )
        by = np.where(least < 1e-3, 1.0 - least, 0.0)[:, None]
        by = np.where(np.isfinite(by), by, 0.0)
        return u + by, low + by

    su, sl = lifted(upper - r, r - lower)
    lu, ll = lifted(r - upper, lower - r)
    return QPIterate(
        z,
        nu,
        np.where(has_upper, lu, 0.0),
        np.where(has_lower, ll, 0.0),
        np.where(has_upper, su, 1.0),
        np.where(has_lower, sl, 1.0),
    )


class _Scaling(NamedTuple):
    """z = D ẑ, λ = E_G λ̂ / c, ν = E_A ν̂ / c, μ = μ̂ / D / c, s = ŝ / E."""

    D: Array  # [B, n]
    E_G: Array  # [B, m]
    E_A: Array  # [B, q]
    c: Array  # [B, 1]


def _size_of_z(Q: Array, p: Array, bounds: list[Array], b: Array) -> Array:
    """A power of 2 near the size of z [B]: what b and bounds away from 0 demand, else what curvature and bounds allow.

    Every measure of the method has a floor of 1, so z is brought near it; 1 where it is there already.
    """
    curvature = np.einsum("bii->bi", Q).mean(1)
    t = np.where(curvature > 0, np.abs(p).max(1) / np.where(curvature > 0, curvature, 1.0), np.inf)
    # What keeps z from 0: lower bounds above it, upper ones below.
    away = np.max(
        [
            np.where(_finite(a), side * a, 0.0).max(1, initial=0.0)
            for a, side in zip(bounds, (1, -1, 1, -1), strict=True)
        ],
        axis=0,
    )
    held = np.max([np.where(_finite(a), np.abs(a), 0.0).max(1, initial=0.0) for a in bounds], axis=0)
    size = np.max([_largest(b), away, np.minimum(t, np.where(held > 0, held, np.inf))], axis=0)
    there = ~np.isfinite(size) | (size == 0) | ((size >= 1 / 64) & (size <= 64))
    return np.where(there, 1.0, 2.0 ** np.round(np.log2(np.clip(np.where(there, 1.0, size), 2.0**-60, 2.0**60))))


def _equilibrated(qp: QP, scale_cost: bool = True) -> tuple[QP, _Scaling]:
    """Rows and columns of [Q G' A'; G 0 0; A 0 0] brought near size 1 (Ruiz), then z, then the objective."""
    Q, p, G, h_lower, h, A, b, lower, upper = qp
    # Before anything is scaled: what is no bound stays none.
    h, upper = (np.where(_finite(a), a, np.inf) for a in (h, upper))
    h_lower, lower = (np.where(_finite(a), a, -np.inf) for a in (h_lower, lower))

    def root(size: Array) -> Array:
        return 1.0 / np.sqrt(np.where(size > 0, np.clip(size, 1e-8, 1e8), 1.0))

    D, E_G, E_A = np.ones_like(p), np.ones_like(h), np.ones_like(b)
    for _ in range(EQUILIBRATIONS):
        column = np.max([np.abs(M).max(1, initial=0.0) for M in (Q, G, A)], axis=0)
        d, e_G, e_A = root(column), root(np.abs(G).max(2, initial=0.0)), root(np.abs(A).max(2, initial=0.0))
        Q, G, A = Q * d[:, :, None] * d[:, None], G * e_G[:, :, None] * d[:, None], A * e_A[:, :, None] * d[:, None]
        D, E_G, E_A = D * d, E_G * e_G, E_A * e_A
    p = p * D
    tau = _size_of_z(Q, p, [h_lower * E_G, h * E_G, lower / D, upper / D], b * E_A)[:, None]
    Q, p, D, E_G, E_A = Q * tau[..., None] ** 2, p * tau, D * tau, E_G / tau, E_A / tau
    size = np.maximum(np.abs(Q).max(1).mean(1), np.abs(p).max(1))[:, None]
    c = np.where(size > 0, 1.0 / np.clip(size, 1e-30, 1e30), 1.0) if scale_cost else np.ones_like(size)
    scaled = QP(Q * c[..., None], p * c, G, h_lower * E_G, h * E_G, A, b * E_A, lower / D, upper / D)  # ±inf stays ±inf
    return scaled, _Scaling(D, E_G, E_A, c)


def _warm(scaled: QP, scaling: _Scaling, start: tuple[Array, ...]) -> QPIterate:
    """An interior point near (z, λ, ν, μ)."""
    D, E_G, E_A, c = scaling
    z, lam, nu, mu = start[0] / D, start[1] * c / E_G, start[2] * c / E_A, start[3] * c * D
    multiplier, r = np.concatenate([lam, mu], 1), _rows(scaled.G, z)
    upper, lower = np.concatenate([scaled.h, scaled.upper], 1), np.concatenate([scaled.h_lower, scaled.lower], 1)
    has_upper, has_lower = _finite(upper), _finite(lower)
    return QPIterate(
        z,
        nu,
        np.where(has_upper, np.maximum(multiplier, WARM), 0.0),
        np.where(has_lower, np.maximum(-multiplier, WARM), 0.0),
        np.where(has_upper, np.maximum(upper - r, WARM), 1.0),
        np.where(has_lower, np.maximum(r - lower, WARM), 1.0),
    )


def _solve(
    qp: QP, soft: float, steps: int, start: tuple[Array, ...] | None = None
) -> tuple[tuple[Array, ...], Array, Array]:
    """(z, λ, ν, μ, slack, box slack), the relative KKT residual of the equilibrated problem, and the size D of z."""
    m = qp.G.shape[1]
    scaled, scaling = _equilibrated(qp, scale_cost=soft == 0.0)
    D, E_G, E_A, c = scaling
    warm = None if start is None else _warm(scaled, scaling, start)
    (z, nu, lu, ll, su, sl), _ = interior_point(scaled, soft, steps, warm)
    lam, s = lu - ll, np.where(lu >= ll, su, sl)
    residual = kkt_residual(scaled, z, lam[:, :m], nu, lam[:, m:])
    answer = z * D, lam[:, :m] * E_G / c, nu * E_A / c, lam[:, m:] / D / c, s[:, :m] / E_G, s[:, m:] * D
    return answer, residual, D


def _pointed_at(multiplier: Array, upper: Array, lower: Array) -> Array:
    """The bound that a signed multiplier points at; 0 where there is none."""
    bound = np.where(multiplier >= 0, upper, lower)
    return np.where(_finite(bound), bound, 0.0)


def kkt_residual(qp: QP, z: Array, lam: Array, nu: Array, mu: Array) -> Array:
    """Relative stationarity, feasibility and duality gap [B, 3], in float64."""
    Q, p, G, h_lower, h, A, b, lower, upper = qp
    Qz, Gz, Az, G_lam, A_nu = (
        _apply(Q, z),
        _apply(G, z),
        _apply(A, z),
        _apply(_transposed(G), lam),
        _apply(_transposed(A), nu),
    )
    stationarity = _largest(Qz + p + G_lam + A_nu + mu) / (1.0 + _largest(Qz, p, G_lam, A_nu, mu))
    violations, gap = [np.abs(Az - b)], np.zeros(len(z))
    for r, low, high, multiplier in ((Gz, h_lower, h, lam), (z, lower, upper, mu)):
        has_low, has_high = _finite(low), _finite(high)
        above, below = r - np.where(has_high, high, r), np.where(has_low, low, r) - r
        violations += [above.clip(min=0.0), below.clip(min=0.0)]
        up, down = np.maximum(multiplier, 0.0), np.maximum(-multiplier, 0.0)
        # A multiplier of a side that is not there is as wrong as a gap of that size.
        gap = (
            gap
            + np.where(has_high, np.abs(up * above), up).sum(1)
            + np.where(has_low, np.abs(down * below), down).sum(1)
        )
    held = [np.where(_finite(high) | _finite(low), r, 0.0) for r, low, high in ((Gz, h_lower, h), (z, lower, upper))]
    feasibility = _largest(*violations) / (1.0 + _largest(b, Az, *held))
    objective = 0.5 * (z * Qz).sum(1) + (p * z).sum(1)
    return np.stack([stationarity, feasibility, gap / (1.0 + np.abs(objective))], 1)


def _farkas(qp: QP, steps: int) -> tuple[NDArray[np.bool_], Array]:
    """Whether no z is feasible, and a certificate: A'ν + G'λ + μ = 0 though its bounds sum to −1."""
    Q, p, G, h_lower, h, A, b, lower, upper = qp
    (_, lam, nu, mu, _, _), _, D = _solve(qp._replace(Q=np.zeros_like(Q), p=np.zeros_like(p)), 1.0, steps)
    terms = np.concatenate([lam * _pointed_at(lam, h, h_lower), nu * b, mu * _pointed_at(mu, upper, lower)], 1)
    amount = -terms.sum(1)
    size = np.abs(terms).sum(1)
    # In units of z: no z of a reasonable size makes up for what is off.
    off = _largest((_apply(_transposed(G), lam) + _apply(_transposed(A), nu) + mu) * D)
    magnitude = _largest(
        (_apply(np.abs(_transposed(G)), np.abs(lam)) + _apply(np.abs(_transposed(A)), np.abs(nu)) + np.abs(mu)) * D
    )
    proven = (amount > CERTIFIED * size) & (off <= CERTIFICATE * amount) & (off <= CANCELLED * magnitude)
    ray = np.concatenate([np.zeros_like(p), lam, nu, mu], 1) / np.where(amount > 0, amount, 1.0)[:, None]
    return proven, ray


def _unbounded(qp: QP, steps: int, precision: type[np.floating]) -> tuple[NDArray[np.bool_], Array]:
    """Whether the objective falls without end along some d, and that d, p'd = −1."""
    Q, p, G, h_lower, h, A, _, lower, upper = qp
    B, n = p.shape

    def cone(bound: Array) -> Array:
        return np.where(_finite(bound), 0.0, bound)

    size = np.maximum(_largest(p), np.finfo(np.float64).tiny)[:, None]
    flat = np.concatenate([A, Q], 1)
    ray_qp = QP(
        np.broadcast_to(np.eye(n), Q.shape),
        p / size,
        G,
        cone(h_lower),
        cone(h),
        flat,
        np.zeros(flat.shape[:2]),
        cone(lower),
        cone(upper),
    )
    (d, *_), _, D = _solve(ray_qp, 0.0, steps)
    ray_tolerance = RAY if np.dtype(precision) == np.float64 else RAY_FLOAT32
    amount = -(p * d).sum(1)
    # Each row against its own size and that of d, in units of z.
    length = _largest(d / D)[:, None]

    def reach(rows: Array) -> Array:
        return np.abs(rows * D[:, None]).max(2, initial=0.0) * length

    proven = (np.abs(_apply(flat, d)) <= ray_tolerance * reach(flat)).all(1)
    for r, low, high, most in ((_apply(G, d), h_lower, h, reach(G)), (d, lower, upper, D * length)):
        proven &= (np.where(_finite(high), r, 0.0) <= ray_tolerance * most).all(1)
        proven &= (np.where(_finite(low), -r, 0.0) <= ray_tolerance * most).all(1)
    proven &= (amount > 0) & (amount >= FALLS * _largest(p * D) * length[:, 0])
    ray = np.concatenate([d, np.zeros((B, G.shape[1] + A.shape[1] + n))], 1)
    return proven, ray / np.where(amount > 0, amount, 1.0)[:, None]


def qp_solve(
    qp: QP,
    start: tuple[Array, Array, Array, Array] | None = None,
    steps: int = STEPS,
    precision: type[np.floating] = np.float64,
) -> QPReference:
    """Solve B problems; `precision` is that of the data, which decides what counts as solved. `start` is (z, λ, ν, μ)
    of a problem nearby.

    On return each sample has a status of its own and never depends on its neighbours. SOLVED and INACCURATE have
    z and multipliers; PRIMAL_INFEASIBLE and DUAL_INFEASIBLE have a ray instead, the others nothing but NaN.
    """
    B, n = qp.p.shape
    m, q = qp.G.shape[1], qp.A.shape[1]
    status = np.full(B, QPStatus.SOLVED, np.int32)
    finite = np.ones(B, bool)
    for name, value in qp._asdict().items():
        bad = np.isnan(value) if name in ("h_lower", "h", "lower", "upper") else ~np.isfinite(value)
        finite &= ~bad.reshape(B, -1).any(1)
    # An upper bound of −inf, or a lower one of +inf, is no bound.
    for value, side in ((qp.h, -1), (qp.upper, -1), (qp.h_lower, 1), (qp.lower, 1)):
        finite &= ~(side * value >= BOUND_MAX).any(1)
    # No sample may spoil another: those that cannot be solved are replaced while the others are.
    Q = 0.5 * (qp.Q + _transposed(qp.Q))
    qp = qp._replace(Q=Q)
    qp = QP(*(np.where(finite.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0) for a in qp))
    convex = _positive_semidefinite(qp.Q, precision)
    crossed = (qp.h_lower > qp.h).any(1) | (qp.lower > qp.upper).any(1)
    trivial = ~finite | ~convex | crossed
    qp = qp._replace(
        Q=np.where(trivial[:, None, None], np.eye(n), qp.Q),
        h_lower=np.where(trivial[:, None], -np.inf, qp.h_lower),
        lower=np.where(trivial[:, None], -np.inf, qp.lower),
    )

    (z, lam, nu, mu, slack, box_slack), scaled, _ = _solve(qp, 0.0, steps, start)
    # In both units: those of the data must not be so small that the 1 in a denominator lets everything pass.
    residual = np.maximum(kkt_residual(qp, z, lam, nu, mu), scaled)
    solved, inaccurate = TOLERANCE[np.dtype(precision)]
    worst = residual.max(1)
    ray = np.zeros((B, 2 * n + m + q))
    unsolved = np.flatnonzero(~(worst <= solved) & ~trivial)
    if len(unsolved):
        rest = QP(*(a[unsolved] for a in qp))
        infeasible, farkas = _farkas(rest, steps)
        falling, d = _unbounded(rest, steps, precision)
        accurate = worst[unsolved] <= inaccurate
        status[unsolved] = np.select(
            [infeasible, falling, accurate],
            [QPStatus.PRIMAL_INFEASIBLE, QPStatus.DUAL_INFEASIBLE, QPStatus.INACCURATE],
            QPStatus.FAILED,
        )
        ray[unsolved] = np.select([infeasible[:, None], falling[:, None]], [farkas, d], 0.0)
    beyond = np.finfo(precision).max
    for a in (z, lam, nu, mu):
        status[(status <= QPStatus.INACCURATE) & ~(np.abs(a) <= beyond).all(1)] = QPStatus.FAILED
    status[crossed] = QPStatus.PRIMAL_INFEASIBLE
    status[~convex] = QPStatus.NOT_CONVEX
    status[~finite] = QPStatus.NOT_FINITE_INPUT
    lost = (status > QPStatus.INACCURATE)[:, None]
    z, lam, nu, mu, slack, box_slack, residual = (
        np.where(lost, np.nan, a) for a in (z, lam, nu, mu, slack, box_slack, residual)
    )
    return QPReference(z, lam, nu, mu, slack, box_slack, residual, status, ray)


def _positive_semidefinite(Q: Array, precision: type[np.floating]) -> NDArray[np.bool_]:
    """Up to what rounding to `precision` does to the eigenvalues of Q."""
    n = Q.shape[1]
    size = np.abs(Q).max((1, 2))
    noise = 8 * n * max(float(np.finfo(precision).eps), 8 * EPS)
    return np.linalg.eigvalsh(Q / np.where(size > 0, size, 1.0)[:, None, None])[:, 0] >= -noise


def qp_adjoint(
    Q: Array,
    G: Array,
    A: Array,
    solution: QPReference,
    z_bar: Array,
    lam_bar: Array | None = None,
    nu_bar: Array | None = None,
    mu_bar: Array | None = None,
) -> QPCotangents:
    """One KKT solve a sample, condensed as in the solver; NaN for samples that are not SOLVED."""
    B, n = z_bar.shape
    m, q = G.shape[1], A.shape[1]
    good = (solution.status == QPStatus.SOLVED)[:, None]
    multiplier = np.where(good, np.concatenate([solution.lam, solution.mu], 1), 0.0)
    s = np.where(good, np.concatenate([solution.slack, solution.box_slack], 1), 1.0)
    W = np.abs(multiplier) / s
    lam_bar, nu_bar, mu_bar = (
        np.zeros((B, size)) if bar is None else bar for bar, size in ((lam_bar, m), (nu_bar, q), (mu_bar, n))
    )
    Q = 0.5 * (Q + _transposed(Q))
    # In units of the curvature of Q, and of the rows: an active constraint counts 1e8 times as much as Q, and the
    # refinements take the rest of the way to a hard one.
    size = np.einsum("bii->b", np.abs(Q))[:, None] / n
    size = np.where(size > 0, size, 1.0)
    row = np.concatenate([(G * G).sum(2), np.ones((B, n))], 1)
    W_most = HARD * size / np.where(row > 0, row, 1.0)
    newton = _Newton(Q, G, A, W, 1e-13 * size[:, 0], 1e-13 / size[:, 0], W_most)
    d_z, d, d_nu = newton.solve(-z_bar, np.concatenate([lam_bar, mu_bar], 1), -nu_bar, REFINEMENTS)
    out = QPCotangents(d_z, d[:, :m], d_nu, d[:, m:])
    return QPCotangents(*(np.where(good, a, np.nan) for a in out))


def qp_gradients(solution: QPReference, d: QPCotangents) -> QP:
    """∂ℓ/∂ of every datum, from the adjoint."""
    z, lam, nu, mu = solution[:4]

    def outer(a: Array, c: Array) -> Array:
        return a[:, :, None] * c[:, None, :]

    return QP(
        0.5 * (outer(d.d_z, z) + outer(z, d.d_z)),
        d.d_z,
        outer(lam, d.d_z) + outer(d.d_lam, z),
        np.where(lam < 0, -d.d_lam, 0.0),
        np.where(lam > 0, -d.d_lam, 0.0),
        outer(nu, d.d_z) + outer(d.d_nu, z),
        -d.d_nu,
        np.where(mu < 0, -d.d_mu, 0.0),
        np.where(mu > 0, -d.d_mu, 0.0),
    )
