"""The bundle entropy method: K cuts of an energy, each at the solution of the model of those before.

Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4 and algorithm 1)::

    y* = argmin over y in the domain of  f(y) + R(y)        for the unit box R = −H, H(y) = −Σ y log y + (1−y) log(1−y)

    repeat K times:  f_i, g_i = f(y_i), ∇f(y_i);  e_i = f_i + g_i'(c − y_i)
                     λ, y_{i+1} = solution of the model of cuts 1 .. i, from the last λ
    certificate      f(y) + R(y) at y = y_{K+1}, less the dual value of the last model

An energy is a callable here: a layer's, or the nodes of a head, spliced into the graph that is traced.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.namespace import Array, Namespace

ValueAndGradient: TypeAlias = Callable[[Array], tuple[Array, Array]]


class Trajectory(NamedTuple):
    """All that the K-step bundle method leaves behind; enough to differentiate through it.

    y, lam and cut_points have the energy's dtype; everything else is float64. ½ and H are the unit box's.
    """

    y: Array  # [B, n] the answer
    lam: Array  # [B, K] multipliers of the last solve
    slopes: Array  # [B, K, n] g_i = ∇f(y_i)
    offsets: Array  # [B, K] centred: e_i = f(y_i) + g_i'(½ − y_i)
    cut_points: Array  # [B, K, n] y_i; the first is y_init, the (i+1)-th the answer of the i-th solve
    lam_history: Array  # [B, K, K] row k−1: multipliers after k cuts, zero beyond the k-th
    energy: Array  # [B] f(y) − H(y) at the y handed out
    lower_bound: Array  # [B] a number no energy can be below, if f is convex
    gap: Array  # [B] energy − lower_bound
    residual: Array  # [B, 3] of the last model: stationarity (the rounding of y), feasibility, complementarity
    complementarity_history: Array  # [B, K] complementarity of every solve; a gradient needs all of them small


def argmin(
    xp: Namespace,
    at: Domain,
    value_and_gradient: ValueAndGradient,
    y_init: Array,
    iterations: int,
    solve: Callable[[Array, Array, Array], Sequence[Array]],
) -> Trajectory:
    """K = iterations cuts from y_init [B, n], whose dtype is the energy's.

    `value_and_gradient(y [B, n]) -> f [B, 1], ∇f [B, n]`, in the dtype that the cuts are kept in. `solve(G [B, k, n],
    e [B, k], λ [B, k−1])` gives y, in the energy's dtype, λ, lower bound [B] and residual [B, 3] of that model.
    """
    K, n = iterations, y_init.shape[1]
    c = at.centre(n)

    def cut(i: Array, y: Array, lam: Array, G: Array, e: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        f, g = value_and_gradient(y)
        G = xp.concat_rows([G, xp.row(g)])
        e = xp.concat([e, f + xp.sum(g * (c - xp.like(y, g)))])
        next_y, lam, lower_bound, residual = solve(G, e, lam)
        return (next_y, lam, G, e), (y, xp.padded(lam, K), lower_bound, residual)

    none = xp.zeros(y_init, 0)
    start = y_init, none, xp.zeros(y_init, 0, n), none
    (y, lam, slopes, offsets), (cut_points, lam_history, bounds, residuals) = xp.repeat(K, cut, start)
    lower_bound = xp.entry(bounds, K - 1)
    energy = xp.entry(xp.double(value_and_gradient(y)[0]) + at.regulariser(xp, xp.double(y)), 0)
    return Trajectory(
        y=y,
        lam=xp.like(lam, y_init),
        slopes=slopes,
        offsets=offsets,
        cut_points=cut_points,
        lam_history=lam_history,
        energy=energy,
        lower_bound=lower_bound,
        gap=energy - lower_bound,
        residual=xp.slot(residuals, K - 1),
        complementarity_history=xp.entry(residuals, 2),
    )
