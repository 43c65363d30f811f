"""Quadratic programs whose answers are known: built backwards from (z, λ, ν, μ), or from a certificate."""

from typing import NamedTuple

import numpy as np

from icnnrt.mathematics.qp_reference import QP
from icnnrt.mathematics.qp_status import QPStatus

# What an answer of `icnnrt` calls the outputs of the operators, z, λ, ν, μ.
ANSWER = {"z": "z", "lam": "lam", "nu": "nu", "mu": "bound_multipliers"}


class Known(NamedTuple):
    qp: QP
    z: np.ndarray
    lam: np.ndarray
    nu: np.ndarray
    mu: np.ndarray


KINDS = (
    "random",
    "low rank",
    "ill-conditioned",
    "scaled rows",
    "scaled columns",
    "duplicate rows",
    "dependent equalities",
    "degenerate",
    "linear",
)
SIZES = ((10, 5, 0), (10, 10, 3), (30, 60, 5), (5, 0, 2), (4, 0, 0), (1, 1, 0), (1, 0, 0))


def _apply(M, a):
    return (M @ a[..., None])[..., 0]


def _sides(rng, r, most, two_sided):
    """Multipliers of at most `most` active rows, their lower and upper bounds; 0.5 <= |λ| <= 1.5, slacks >= 0.5."""
    side = rng.integers(0, 3 if two_sided else 2, size=r.shape)
    side = np.where(np.cumsum(side > 0, axis=1) <= most, side, 0)
    multiplier = np.where(side == 1, 1.0, np.where(side == 2, -1.0, 0.0)) * rng.uniform(0.5, 1.5, r.shape)
    upper = r + np.where(side == 1, 0.0, rng.uniform(0.5, 1.0, r.shape))
    lower = r - np.where(side == 2, 0.0, rng.uniform(0.5, 1.0, r.shape))
    return multiplier, lower if two_sided else np.full_like(r, -np.inf), upper


def solvable(seed, B, n, m, q, kind="random", two_sided=False, box=False):
    """Problems that have the solution given. It is strictly complementary but where `kind` is degenerate."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((B, n, n))
    Q = M @ M.swapaxes(1, 2) / n + 0.1 * np.eye(n)
    G, A = rng.standard_normal((B, m, n)), rng.standard_normal((B, q, n))
    if kind == "low rank":
        F = rng.standard_normal((B, n, max(1, n // 2)))
        Q = F @ F.swapaxes(1, 2)
    if kind == "linear":
        Q = 0 * Q
    if kind == "ill-conditioned":
        U = np.linalg.qr(M)[0]
        Q = (U * np.logspace(-3, 3, n)) @ U.swapaxes(1, 2)
        Q = (Q + Q.swapaxes(1, 2)) / 2
    if kind == "scaled columns":
        d = 10 ** rng.uniform(-3, 3, (B, 1, n))
        Q, G, A = Q * d * d.swapaxes(1, 2), G * d, A * d
    if kind == "scaled rows":
        G = G * 10 ** rng.uniform(-4, 4, (B, m, 1))
    if kind == "duplicate rows" and m > 2:
        G[:, 1], G[:, 2] = G[:, 0], -3 * G[:, 0]
    if kind == "dependent equalities" and q > 1:
        A[:, 1] = 2 * A[:, 0]
    z = rng.standard_normal((B, n))
    if kind == "scaled columns":
        z = z / d[:, 0]
    r, size = _apply(G, z), np.abs(G).max(2, initial=0.0)
    most = max(1, (n - q) // (3 if box else 2))
    lam, low, high = _sides(rng, r / size if m else r, most, two_sided)
    lam, low, high = (lam / size, low * size, high * size) if m else (lam, low, high)
    if kind == "duplicate rows" and m > 2:  # the same constraint three times over, at one slack
        lam[:, 1:3], low[:, 1:3] = 0.0, -np.inf
        high[:, 1], high[:, 2] = high[:, 0], r[:, 2] + size[:, 2]
    if kind == "degenerate":
        lam = lam * (rng.random(lam.shape) < 0.5)
    mu, lower, upper = _sides(rng, z, most, two_sided)
    if not box:
        mu, lower, upper = 0 * mu, np.full_like(z, -np.inf), np.full_like(z, np.inf)
    nu = rng.standard_normal((B, q))
    p = -(_apply(Q, z) + _apply(G.swapaxes(1, 2), lam) + _apply(A.swapaxes(1, 2), nu) + mu)
    return Known(QP(Q, p, G, low, high, A, _apply(A, z), lower, upper), z, lam, nu, mu)


def most_unsolved(kind):
    """How many of six solvable problems may end INACCURATE or FAILED, by the kernels, the bodies or the reference.

    Counted among 3,000 of the kernels and 300 of the reference: where columns differ by 1e6 it is 1 to 3 in 100; where
    one variable has a row and bounds, between which rounding may leave no room, 1 in 100; elsewhere next to none.
    """
    return 2 if kind == "scaled columns" else 1


def determined(known):
    """[B]: whether the curvature of Q and the constraints that push leave z no direction: else it has no gradient."""
    found = []
    for Q, G, A, lam, mu in zip(known.qp.Q, known.qp.G, known.qp.A, known.lam, known.mu, strict=True):
        rows = np.concatenate([A, G[lam != 0], np.eye(len(Q))[mu != 0]])
        _, sizes, V = np.linalg.svd(rows)
        free = V[(sizes > 1e-9 * sizes.max(initial=0.0)).sum() :]
        found.append(np.linalg.eigvalsh(free @ Q @ free.T).min(initial=np.inf) > 1e-6 * np.abs(Q).max())
    return np.array(found)


def receding_horizon(seed, B, steps=25):
    """Inputs of unstable linear systems looked far ahead, |u| <= 1: predictor-corrector steps may cycle on these."""
    rng = np.random.default_rng(seed)
    Q, p = np.zeros((B, steps, steps)), np.zeros((B, steps))
    for i in range(B):
        M, N = np.eye(4) + 0.15 * rng.standard_normal((4, 4)), 0.3 * rng.standard_normal(4)
        cost, F, S = np.diag(10 ** rng.uniform(-2, 1, 4)), np.eye(4), np.zeros((4, steps))
        Q[i] = 0.01 * np.eye(steps)
        x = rng.uniform(-1, 1, 4)
        for k in range(steps):
            F, S = M @ F, M @ S
            S[:, k] = N
            Q[i] += 2 * S.T @ cost @ S
            p[i] += 2 * S.T @ cost @ F @ x
    none = np.zeros((B, 0))
    bound = np.ones((B, steps))
    return QP(Q, p, np.zeros((B, 0, steps)), none, none, np.zeros((B, 0, steps)), none, -bound, bound)


UNSOLVABLE = (
    "opposite rows",
    "combined rows",
    "nearly feasible",
    "scaled rows",
    "contradictory equalities",
    "crossed bounds",
    "row against box",
    "unbounded",
    "unbounded linear",
    "negative curvature",
    "nan",
)


def unsolvable(seed, B, n, m, q, why):
    """Problems without a solution, and the status they should get. m >= 4, q >= 2, n >= m // 2 + q."""
    rng = np.random.default_rng(seed)
    qp = solvable(seed, B, n, m, q).qp
    G, h, A, b = qp.G.copy(), qp.h.copy(), qp.A.copy(), qp.b.copy()
    infeasible = QPStatus.PRIMAL_INFEASIBLE
    match why:
        case "opposite rows":
            G[:, 1], h[:, 0], h[:, 1] = -G[:, 0], -1.0, 0.5
            return qp._replace(G=G, h=h), infeasible
        case "nearly feasible":
            G[:, 1], h[:, 0], h[:, 1] = -G[:, 0], -1e-4, -1e-4
            return qp._replace(G=G, h=h), infeasible
        case "combined rows":
            G[:, -1], h[:, -1] = -G[:, :3].sum(1), -h[:, :3].sum(1) - 0.1
            return qp._replace(G=G, h=h), infeasible
        case "scaled rows":
            size = 10 ** rng.uniform(-4, 4, (B, m))
            G[:, -1], h[:, -1] = -G[:, :3].sum(1), -h[:, :3].sum(1) - 0.1
            return qp._replace(G=G * size[..., None], h=h * size), infeasible
        case "contradictory equalities":
            A[:, 1], b[:, 1] = A[:, 0], b[:, 0] + 1.0
            return qp._replace(A=A, b=b), infeasible
        case "crossed bounds":
            low = np.full_like(h, -np.inf)
            low[:, 2] = h[:, 2] + 1.0
            return qp._replace(h_lower=low), infeasible
        case "row against box":
            h[:, 0] = -np.abs(G[:, 0]).sum(1) - 0.1
            return qp._replace(h=h, lower=np.full((B, n), -1.0), upper=np.full((B, n), 1.0)), infeasible
        case "unbounded":  # along d, on which Q is flat and G and A are 0 or fall
            d = rng.standard_normal((B, n))
            d /= np.linalg.norm(d, axis=1, keepdims=True)
            away = np.eye(n) - d[:, :, None] * d[:, None]
            Q, A = away @ qp.Q @ away, A @ away
            along = np.abs(_apply(G, d))
            G = G @ away - along[..., None] * d[:, None]
            return qp._replace(Q=(Q + Q.swapaxes(1, 2)) / 2, p=-d, G=G, A=A, h=h + 10.0, b=0 * b), (
                QPStatus.DUAL_INFEASIBLE
            )
        case "unbounded linear":
            return qp._replace(Q=0 * qp.Q, p=rng.standard_normal((B, n)), G=0 * G, h=np.abs(h)), (
                QPStatus.DUAL_INFEASIBLE
            )
        case "negative curvature":
            Q = qp.Q - (np.linalg.eigvalsh(qp.Q)[:, :1, None] + 0.01) * np.eye(n)
            return qp._replace(Q=Q), QPStatus.NOT_CONVEX
        case "nan":
            p = qp.p.copy()
            p[:, 0] = np.nan
            return qp._replace(p=p), QPStatus.NOT_FINITE_INPUT
    raise ValueError(why)


def mixed(seed, n=12, m=8, q=3):
    """One batch: every kind of unsolvable problem among solvable ones; the statuses wanted."""
    parts = [(solvable(seed, 2, n, m, q).qp, QPStatus.SOLVED)]
    for i, why in enumerate(UNSOLVABLE):
        parts.append(unsolvable(seed + i + 1, 1, n, m, q, why))
        parts.append((solvable(seed + 100 + i, 1, n, m, q, two_sided=True).qp, QPStatus.SOLVED))
    status = np.concatenate([np.full(len(qp.p), wanted) for qp, wanted in parts])
    return QP(*(np.concatenate(arrays) for arrays in zip(*(qp for qp, _ in parts), strict=True))), status


def bundle_models(seed, B, n=4, cuts=2, m=1):
    """min of t + ½ ‖y‖² over (y, t) under cuts g'y − t <= −e, rows, 1'y = b and a box: one in a thousand has
    predictor-corrector steps that cycle."""
    rng = np.random.default_rng(seed)
    Q, p = np.zeros((B, n + 1, n + 1)), np.zeros((B, n + 1))
    Q[:, range(n), range(n)] = 1.0
    p[:, n] = 1.0
    slopes = rng.standard_normal((B, cuts, n)) * 10 ** rng.uniform(-1, 1, (B, 1, 1))
    rows, y = rng.standard_normal((B, m, n)), rng.uniform(-0.2, 0.2, (B, n))
    h = np.concatenate([rng.standard_normal((B, cuts)), _apply(rows, y) + rng.exponential(0.2, (B, m))], 1)
    t = np.concatenate([-np.ones((B, cuts, 1)), np.zeros((B, m, 1))], 1)
    G = np.concatenate([np.concatenate([slopes, rows], 1), t], 2)
    A = np.concatenate([np.ones((B, 1, n)), np.zeros((B, 1, 1))], 2)
    free = np.full((B, 1), np.inf)
    lower, upper = np.full((B, n), -0.3), np.full((B, n), 0.5)
    return QP(
        Q, p, G, np.full_like(h, -np.inf), h, A, y.sum(1, keepdims=True),
        np.concatenate([lower, -free], 1), np.concatenate([upper, free], 1),
    )  # fmt: skip
