"""The adjoint of the K-step bundle method: the KKT rule at every cut set, from the last one back.

For a loss with ∂ℓ/∂y = ȳ at the answer of `icnnrt.mathematics.bundle.argmin`, and k from K down::

    c_y, c_λ = the KKT adjoint (`icnnrt.mathematics.kkt_adjoint`) at cut set k, with seed ȳ_k,  ȳ_K = ȳ
    ē_i += c_λi,   S_i += λ_i c_y + c_λi (y_k − y_i)          S_i = ḡ_i + ē_i (c − y_i),  ḡ_i = λ_i c_y + c_λi (y − c)
    ȳ_{k−1} = ∇²f(y_k) S_k                                     the answer of solve k−1 is y_k, the point of cut k

All the way (depth K) that is the derivative of the K-step method, exactly. Depth 1 is Proposition 3 of Amos, Xu, Kolter
(2017): it holds the cut points fixed and needs no Hessian. For piecewise-linear f both agree.
"""

from collections.abc import Callable
from typing import NamedTuple

from icnnrt.mathematics.bundle import Trajectory
from icnnrt.mathematics.namespace import Array, Namespace


class CutCotangents(NamedTuple):
    """Cotangents of the cuts in the form that one second-order product pushes to the weights; float64.

    θ̄ = Σ_i ∇θ [ offset_bar_i f(x, y_i; θ) + seed_i' ∇_y f(x, y_i; θ) ], and x̄ the same with ∇x.
    """

    offset_bar: Array  # [B, K] ē_i
    seed: Array  # [B, K, n] S_i = ḡ_i + ē_i (½ − y_i), ½ the centre of the unit box


def recursive_adjoint(
    xp: Namespace,
    trajectory: Trajectory,
    y_bar: Array,
    hvp: Callable[[int, Array], Array] | None,
    depth: int | None,
    kkt_adjoint: Callable[[Array, Array, Array, Array], tuple[Array, Array]],
) -> CutCotangents:
    """Cotangents of the cuts for ȳ = y_bar [B, n]; depth None is K.

    `hvp(i, s [B, n]) -> ∇²f(y_i) s`, i the 0-based index of the cut; not needed for depth 1.
    `kkt_adjoint(G, e, λ, ȳ) -> c_y, c_λ` of [B, k, n], [B, k], [B, k], [B, n], float64.
    """
    Y = xp.double(trajectory.cut_points)
    K = Y.shape[1]
    offset_bar, seed = 0.0 * trajectory.offsets, 0.0 * Y
    y_bar = xp.double(y_bar)
    for k in range(K, K - (K if depth is None else depth), -1):
        if k < K:
            assert hvp is not None, "hvp is needed beyond depth 1"
            y_bar = xp.double(hvp(k, seed[:, k]))
        y_k = xp.double(trajectory.y) if k == K else Y[:, k]
        lam = trajectory.lam_history[:, k - 1, :k]
        c_y, c_lam = kkt_adjoint(trajectory.slopes[:, :k], trajectory.offsets[:, :k], lam, y_bar)
        offset_bar[:, :k] += c_lam
        seed[:, :k] += lam[:, :, None] * c_y[:, None, :] + c_lam[:, :, None] * (y_k[:, None, :] - Y[:, :k])
    return CutCotangents(offset_bar, seed)
