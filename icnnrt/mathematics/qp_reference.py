"""Convex quadratic programs and their adjoint in float64 numpy: the statements `quadratic_program` and `qp_adjoint`
beside this file for arrays as users have them, and a check of any answer that shares no code with them.

Everything is batched: a leading dimension B, one independent problem per sample. Signs and the problem stand in
`quadratic_program`, the adjoint in `qp_adjoint`.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics import qp_adjoint as adjoint_of
from icnnrt.mathematics import quadratic_program
from icnnrt.mathematics.infeasibility import CANCELLED, CERTIFICATE, CERTIFIED, FALLS
from icnnrt.mathematics.interior_point import BOUND_MAX, NEARLY, STEPS, Problem
from icnnrt.mathematics.namespace import EPS, NUMPY
from icnnrt.mathematics.qp_status import QPStatus

__all__ = [
    "BOUND_MAX",
    "CANCELLED",
    "CERTIFICATE",
    "CERTIFIED",
    "FALLS",
    "QP",
    "RAY",
    "RAY_FLOAT32",
    "STEPS",
    "TOLERANCE",
    "QPCotangents",
    "QPReference",
    "QPSensitivity",
    "kkt_residual",
    "precision_of",
    "qp_adjoint",
    "qp_gradients",
    "qp_sensitivity",
    "qp_solve",
]

Array = NDArray[np.float64]

# The relative KKT residual that counts as solved, and as inaccurate, by the precision of the data: float32 data hold
# equality constraints that depend on each other only up to their rounding.
TOLERANCE: Final = {np.dtype(np.float64): (1e-9, 1e-5), np.dtype(np.float32): (1e-6, 1e-4)}
# How far a ray may leave what it should stay in, against the sizes of the row and of the ray, by the precision of the
# data: float32 data are flat only up to their rounding.
RAY: Final = 1e-8
RAY_FLOAT32: Final = 1e-6


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


class QPReference(NamedTuple):
    """What the operator gives; B samples."""

    z: Array  # [B, n], NaN unless SOLVED or INACCURATE, and so the multipliers
    lam: Array  # [B, m]
    nu: Array  # [B, q]
    mu: Array  # [B, n]
    slack: Array  # [B, m] of the side that λ points at; 0 of bounds that leave no room, and of nothing else
    box_slack: Array  # [B, n]
    residual: (
        Array  # [B, 3] relative stationarity, feasibility, duality gap, in the data's units or equilibrated: the larger
    )
    status: NDArray[np.int32]  # [B] QPStatus
    ray: Array  # [B, n + m + q + n] certificate of infeasibility: a ray d of z, or (λ, ν, μ); else 0
    steps: NDArray[np.int32] | None = None  # [B] that were taken, of certificates aside; QPSolve tells none


class QPCotangents(NamedTuple):
    """Solution of the adjoint system."""

    d_z: Array
    d_lam: Array
    d_nu: Array
    d_mu: Array


class QPSensitivity(NamedTuple):
    """The same, and what is known of the gradient."""

    d_z: Array
    d_lam: Array
    d_nu: Array
    d_mu: Array
    share: Array  # [B] of the loss that has no gradient, in units of the equilibrated problem
    weak: NDArray[np.int32]  # [B] how many rows of G and of the box are weakly active


def precision_of(dtype: type[np.floating], tolerance: float | None = None) -> quadratic_program.Precision:
    """What data of this type decide; `tolerance`: the relative KKT residual that counts as solved, if not theirs."""
    solved, inaccurate = TOLERANCE[np.dtype(dtype)]
    solved, ends = (solved, NEARLY) if tolerance is None else (tolerance, tolerance)
    info = np.finfo(dtype)
    away = RAY if np.dtype(dtype) == np.float64 else RAY_FLOAT32
    noise = 8 * max(float(info.eps), 8 * EPS)
    return quadratic_program.Precision(solved, ends, inaccurate, away, noise, float(info.max))


def qp_solve(
    qp: QP,
    start: tuple[Array, Array, Array, Array] | None = None,
    steps: int = STEPS,
    precision: type[np.floating] = np.float64,
    tolerance: float | None = None,
) -> QPReference:
    """Solve B problems; `precision` is that of the data, which decides what counts as solved where `tolerance` does
    not. `start` is (z, λ, ν, μ) of a problem nearby.

    On return each sample has a status of its own and never depends on its neighbours. SOLVED and INACCURATE have
    z and multipliers; PRIMAL_INFEASIBLE and DUAL_INFEASIBLE have a ray instead, the others nothing but NaN.
    """
    (B, m), n, q = qp.h.shape, qp.p.shape[1], qp.b.shape[1]
    A, b = _with_a_row(qp.A, qp.b)
    if start is None:
        rows = np.full((B, n + m + b.shape[1] + n), np.nan)
    else:
        z, lam, nu, mu = start
        rows = np.concatenate([z, lam, np.pad(nu, ((0, 0), (0, b.shape[1] - q))), mu], 1)
    lower, upper = np.concatenate([qp.h_lower, qp.lower], 1), np.concatenate([qp.h, qp.upper], 1)
    problem = Problem(qp.Q, qp.p[:, None], qp.G, A, b[:, None], lower[:, None], upper[:, None])
    with np.errstate(all="ignore"):  # a sample that cannot be solved has a status, not a warning
        found = quadratic_program.solve(NUMPY, problem, rows[:, None], precision_of(precision, tolerance), steps)
    z, lam, nu, slack, residual, status, ray, taken = (a[:, 0] for a in found)
    d, ray_lam, ray_mu, ray_nu = np.split(ray, [n, n + m, n + m + n], axis=1)
    return QPReference(
        z,
        lam[:, :m],
        nu[:, :q],
        lam[:, m:],
        slack[:, :m],
        slack[:, m:],
        residual,
        status[:, 0].astype(np.int32),
        np.concatenate([d, ray_lam, ray_nu[:, :q], ray_mu], 1),
        taken[:, 0].astype(np.int32),
    )


def _with_a_row(A: Array, b: Array) -> tuple[Array, Array]:
    """Without equalities, one of zeros: 0'z = 0."""
    rows = ((0, 0), (0, int(b.shape[1] == 0)))
    return np.pad(A, (*rows, (0, 0))), np.pad(b, rows)


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
    return QPCotangents(*qp_sensitivity(Q, G, A, solution, z_bar, lam_bar, nu_bar, mu_bar)[:4])


def qp_sensitivity(
    Q: Array,
    G: Array,
    A: Array,
    solution: QPReference,
    z_bar: Array,
    lam_bar: Array | None = None,
    nu_bar: Array | None = None,
    mu_bar: Array | None = None,
    precision: type[np.floating] = np.float64,
) -> QPSensitivity:
    """The same, and what is known of the gradient; `precision` is that of the data, which decides what is weak."""
    B, n = z_bar.shape
    m, q = G.shape[1], A.shape[1]
    good = (solution.status == QPStatus.SOLVED)[:, None]
    multiplier = np.where(good, np.concatenate([solution.lam, solution.mu], 1), 0.0)
    slack = np.where(good, np.concatenate([solution.slack, solution.box_slack], 1), 1.0)
    lam_bar, nu_bar, mu_bar = (
        np.zeros((B, size)) if bar is None else bar for bar, size in ((lam_bar, m), (nu_bar, q), (mu_bar, n))
    )
    A, nu_bar = _with_a_row(A, nu_bar)
    rows = (multiplier, slack, z_bar, np.concatenate([lam_bar, mu_bar], 1), nu_bar)
    with np.errstate(all="ignore"):
        Q = 0.5 * (Q + Q.swapaxes(1, 2))
        found = adjoint_of.qp_adjoint(NUMPY, Q, G, A, *(row[:, None] for row in rows))
    d_z, d, d_nu, share, nearness = (a[:, 0] for a in found)
    out = d_z, d[:, :m], d_nu[:, :q], d[:, m:], share
    weak = (nearness < adjoint_of.WEAK[np.dtype(precision).name]).sum(1, dtype=np.int32)
    d_z, d_lam, d_nu, d_mu, share = (np.where(good, a, np.nan) for a in out)
    return QPSensitivity(d_z, d_lam, d_nu, d_mu, share[:, 0], weak)


def _apply(M: Array, a: Array) -> Array:
    """M a for a batch of matrices [B, r, c] and vectors [B, c]."""
    return (M @ a[..., None])[..., 0]


def _transposed(M: Array) -> Array:
    return M.swapaxes(1, 2)


def _largest(*arrays: Array) -> Array:
    """The largest magnitude of each sample [B]; 0 of nothing."""
    return np.max([np.abs(a).max(tuple(range(1, a.ndim)), initial=0.0) for a in arrays], axis=0)


def _finite(bound: Array) -> NDArray[np.bool_]:
    return np.abs(bound) < BOUND_MAX


def kkt_residual(qp: QP, z: Array, lam: Array, nu: Array, mu: Array) -> Array:
    """Relative stationarity, feasibility and duality gap [B, 3], in float64.

    The independent checker of any answer: it shares no code with the solver, whose own measure is
    `interior_point.measured`.
    """
    Q, p, G, h_lower, h, A, b, lower, upper = qp
    Qz, Gz, Az, G_lam, A_nu = (
        _apply(Q, z),
        _apply(G, z),
        _apply(A, z),
        _apply(_transposed(G), lam),
        _apply(_transposed(A), nu),
    )
    # By Qz and p, which what the constraints do adds up to, however large multipliers are that cancel; what rounding
    # of these hides counts as off.
    of_G, of_A = (_apply(EPS * np.abs(_transposed(M)), np.abs(a)) for M, a in ((G, lam), (A, nu)))
    rounding = _largest(of_G + of_A + EPS * np.abs(mu))
    stationarity = (_largest(Qz + p + G_lam + A_nu + mu) + rounding) / (1.0 + _largest(Qz, p))
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


def qp_gradients(solution: QPReference, d: QPCotangents) -> QP:
    """∂ℓ/∂ of every datum, from the adjoint."""
    return QP(**{name: gradient() for name, gradient in adjoint_of.gradients(NUMPY, *solution[:4], *d).items()})
