"""The adjoint of the k-cut model by one KKT solve: Proposition 3 of the paper.

Source: Amos, Xu, Kolter, *Input Convex Neural Networks* (ICML 2017), Proposition 3, on all cuts at once. For a loss
with ∂ℓ/∂y = ȳ at the solution λ of the model (`icnnrt.mathematics.cut_model`)::

    c = −M⁻¹ [ȳ; 0; 0],   M = [[D⁻¹, G', 0], [G, 0, −1], [0, −1', 0]]  on the active cuts
    ∂ℓ/∂e = c_λ,   ∂ℓ/∂G = λ c_y' + c_λ (y − c)'

No choice of active cuts is made: the slack w = max v − v on the diagonal switches inactive cuts off smoothly and makes
duplicates harmless. With q = √λ and r = −G D ȳ::

    Ã = diag(q) G D G' diag(q) + diag(w + δ),   δ = 1e-13 tr(q G D G' q) + 1e-30
    X_0 = Ã⁻¹(q∘r),   X_1 = Ã⁻¹q
    c_λ = q∘(X_0 − X_1 (q'X_0)/(q'X_1)),   c_y = −D(ȳ + G'c_λ)
"""

from typing import Final

from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.namespace import Array, Namespace

TRACE_RIDGE: Final = 1e-13
SMALLEST_RIDGE: Final = 1e-30


def kkt_adjoint(xp: Namespace, at: Domain, G: Array, e: Array, lam: Array, y_bar: Array) -> tuple[Array, Array]:
    """c_y [B, 1, n] and c_λ [B, 1, k], of slopes G [B, k, n] and rows e, λ [B, 1, k], ȳ [B, 1, n]."""
    G = at.plain(xp, G)
    N = -xp.mT(G)
    s = -(lam @ G)
    v = e - at.centred(xp, s) @ N
    w = xp.max(v) - v
    q = xp.sqrt(lam)
    qSq = -(at.curvature(xp, s, xp.mT(q) * G) @ (N * q))
    eye = xp.eye(lam)
    delta = TRACE_RIDGE * xp.sum(xp.mT(xp.sum(qSq * eye))) + SMALLEST_RIDGE
    r = at.curvature(xp, s, y_bar) @ N
    X_0, X_1 = xp.solve_spd(qSq + (w + delta) * eye, eye, [q * r, q])
    c_lam = q * (X_0 - X_1 * (xp.sum(q * X_0) / xp.sum(q * X_1)))
    c_y = -at.curvature(xp, s, y_bar + c_lam @ G)
    return c_y, c_lam


def adjoint(xp: Namespace, at: Domain, G: Array, e: Array, lam: Array, y_bar: Array) -> tuple[Array, Array]:
    """`kkt_adjoint` for e, λ [B, k] and ȳ [B, n]: c_y [B, n] and c_λ [B, k]."""
    c_y, c_lam = kkt_adjoint(xp, at, G, e[:, None], lam[:, None], y_bar[:, None])
    return c_y[:, 0], c_lam[:, 0]
