"""The adjoint of the K-step bundle method: the KKT rule at every cut set, from the last one back.

For a loss with ∂ℓ/∂y = ȳ at the answer of `icnnrt.mathematics.bundle.argmin`, and k from K down::

    c_y, c_λ = the KKT adjoint (`icnnrt.mathematics.kkt_adjoint`) at cut set k, with seed ȳ_k,  ȳ_K = ȳ
    ē_i += c_λi,   S_i += λ_i c_y + c_λi (y_k − y_i)          S_i = ḡ_i + ē_i (c − y_i),  ḡ_i = λ_i c_y + c_λi (y − c)
    ȳ_{k−1} = ∇²f(y_k) S_k                                     the answer of solve k−1 is y_k, the point of cut k

All the way (depth K) that is the derivative of the K-step method, exactly. Depth 1 is Proposition 3 of Amos, Xu, Kolter
(2017): it holds the cut points fixed and needs no Hessian. For piecewise-linear f both agree.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    hvp: Callable[[Array, Array], Array],
    depth: Any,
    kkt_adjoint: Callable[[Array, Array, Array, Array], Sequence[Array]],
) -> CutCotangents:
    """Cotangents of the cuts for ȳ = y_bar [B, n], all in one dtype; 1 <= depth <= K.

    `hvp(k, s [B, n]) -> ∇²f(y_k) s`, k the 0-based index of the cut; not called for depth 1.
    `kkt_adjoint(G [B, k, n], e [B, k], λ [B, k], ȳ) -> c_y, c_λ`.
    """
    Y, G, e, lam_history = trajectory.cut_points, trajectory.slopes, trajectory.offsets, trajectory.lam_history
    K = Y.shape[1]

    def spread(lam: Array, c_y: Array, c_lam: Array, y_k: Array) -> Array:
        return xp.column(lam) * xp.row(c_y) + xp.column(c_lam) * (xp.row(y_k) - Y)

    def back(i: Array, e_bar: Array, S: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        k = (K - 1) - i  # the cut set; its answer is y_k, and so y_k's cut is the next one
        lam = xp.slot(lam_history, k - 1)  # zero beyond the k-th
        y_bar = hvp(k, xp.slot(S, k))
        c_y, c_lam = kkt_adjoint(xp.upto(G, k), xp.upto(e, k), xp.upto(lam, k), y_bar)
        c_lam = xp.padded(c_lam, K)
        return (e_bar + c_lam, S + spread(lam, c_y, c_lam, xp.slot(Y, k))), ()

    lam = xp.slot(lam_history, K - 1)
    c_y, c_lam = kkt_adjoint(G, e, lam, y_bar)
    (offset_bar, seed), _ = xp.repeat(depth - 1, back, (c_lam, spread(lam, c_y, c_lam, trajectory.y)))
    return CutCotangents(offset_bar, seed)


class CoordinatesCotangents(NamedTuple):
    """∂ℓ/∂shift and ∂ℓ/∂scale of y = shift + scale∘p. For a box: l̄ = shift − scale, ū = scale."""

    shift: Array  # [B, n]
    scale: Array  # [B, n]


def coordinates_adjoint(
    xp: Namespace, cut_points: Array, gradients: Array, seed: Array, p: Array, y_bar: Array, point_bar: Array
) -> CoordinatesCotangents:
    """Cotangents of shift and scale for a loss with ∂ℓ/∂y = ȳ at y = shift + scale∘p, p the argmin.

    The cuts are those of f(shift + scale∘p), and depend on shift and scale through y_i = shift + scale∘p_i and
    g̃_i = scale∘∇f(y_i). With cotangents ē_i and seeds s_i of the cuts in p::

        shift_bar = ȳ + Σ_i ȳ_i
        scale_bar = p∘ȳ + Σ_i p_i∘ȳ_i + s_i∘∇f(y_i),      ȳ_i = ē_i ∇f(y_i) + ∇²f(y_i) (scale∘s_i)

    cut_points p_i, gradients ∇f(y_i), point_bar ȳ_i: all [B, K, n]. For the recursion they are exact if p_init counts
    as a constant. Proposition 3 holds the points p_i fixed: the same with its cuts, and no second term of ȳ_i. For the
    implicit adjoint the one cut is at y* with ē = 0 and s = c_p.
    """
    return CoordinatesCotangents(
        shift=y_bar + xp.slots_sum(point_bar),
        scale=p * y_bar + xp.slots_sum(cut_points * point_bar + seed * gradients),
    )
