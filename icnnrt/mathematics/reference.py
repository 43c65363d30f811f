"""The bundle entropy method and its adjoints in float64 numpy, written to be read.

This is the statement that every other implementation (torch layer, portable ONNX bodies, native kernels) is
tested against. Everything is batched: a leading dimension B, one independent problem per sample.

Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4)::

    y* = argmin over y in [0,1]^n of  f(y) − H(y),      H(y) = −Σ y log y + (1−y) log(1−y)

With k cuts, slopes G [k, n] and centred offsets e_i = f(y_i) + g_i'(½ − y_i), the model of f is
max_i v_i with cut values v = e + G(y − ½). (Centring keeps the rounding error of v small when n is large.)

    primal   min over y, t of  t − H(y)   s.t.  e + G(y − ½) <= t·1
    dual     max over λ in the simplex of  e'λ + ½ 1's − Σ softplus(s),   s = −G'λ
    link     y = σ(s),   D = ∂y/∂s = diag(σ(s) σ(−s))

Strong duality makes max(v) − λ'v the exact gap between the two at y = σ(−G'λ).

The same method solves other domains, with the regularisers that `icnnrt.mathematics.domains` lists: only y(s), its
derivative D, the dual and the centre change. Every function here takes `domain`, UNIT_BOX where not given.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.domains import (
    SIMPLEX,
    SPACE,
    UNIT_BOX,
    Coordinates,
    Domain,
    negative_entropy,
    sigmoid,
    softplus,
)

__all__ = [
    "BACKTRACK",
    "EPS",
    "LAM_FLOOR",
    "LOGIT_BOUND",
    "LOGIT_STEP",
    "RELUCTANCE",
    "SLACK_FLOOR",
    "STEPS",
    "CoordinatesCotangents",
    "CutCotangents",
    "Evaluation",
    "InnerSolution",
    "Trajectory",
    "argmin_adjoint",
    "bundle_entropy_argmin",
    "bundle_entropy_solve",
    "coordinates_adjoint",
    "evaluate",
    "implicit_adjoint",
    "in_coordinates",
    "kkt_adjoint",
    "negative_entropy",
    "sigmoid",
    "softplus",
    "solve_spd",
]

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
LOGIT_BOUND = 45.0  # σ(±45) is 0 or 1 to the last bit of float64: logits need go no further
LOGIT_STEP = 4.0  # the most a logit moves in one step; undamped, saturated problems cycle
LAM_FLOOR = EPS**2
SLACK_FLOOR = 1e-3 * EPS
STEPS = 60  # bound on interior-point steps: 9 are usual, slopes of 1e3 want up to 60; solved samples stop early
# Plain predictor-corrector can cycle between two nearly parallel cuts, because v is not linear in the logits.
# So three step lengths are tried, and a shorter one is taken when it leaves less than half the gap.
BACKTRACK = np.array([1.0, 0.5, 0.25])
RELUCTANCE = np.array([1.0, 2.0, 2.0])


def _apply(M: Array, a: Array) -> Array:
    """M a for a batch of matrices [B, r, c] and vectors [B, c]."""
    return (M @ a[..., None])[..., 0]


def solve_spd(A: Array, R: Array) -> Array:
    """A⁻¹ R for symmetric positive semidefinite A [B, k, k], R [B, k, r].

    A is scaled to unit diagonal first. Duplicate cuts make it singular, so the ridge is never zero.
    """
    scale = 1.0 / np.sqrt(np.maximum(np.einsum("bii->bi", A), np.finfo(np.float64).tiny))[:, :, None]
    scaled = A * scale * scale.swapaxes(1, 2) + 4 * EPS * np.eye(A.shape[1])
    return np.linalg.solve(scaled, R * scale) * scale


class InnerSolution(NamedTuple):
    """Solution of the k-cut model; B samples."""

    y: Array  # [B, n] primal point, σ(−G'λ)
    lam: Array  # [B, k] multipliers of the cuts, on the simplex
    lower_bound: Array  # [B] dual value: a lower bound of min f − H
    residual: Array  # [B, 3] stationarity, feasibility, complementarity (= duality gap of the model)


class Evaluation(NamedTuple):
    """What multipliers λ imply."""

    y: Array
    v: Array
    dual: Array
    complementarity: Array


def evaluate(G: Array, e: Array, lam: Array, domain: Domain = UNIT_BOX) -> Evaluation:
    """Primal point, cut values, dual value and duality gap that belong to λ."""
    if domain is SIMPLEX:
        G = _without_constants(G)
    s = -_apply(G.swapaxes(1, 2), lam)  # s = −G'λ
    y = domain.point(s)
    v = e + _apply(G, y - domain.centre(G.shape[2]))
    dual = (lam * e).sum(1) - domain.conjugate(s)
    # λ'v sums every v, so a NaN in any cut makes the gap NaN.
    return Evaluation(y, v, dual, v.max(1) - (lam * v).sum(1))


def bundle_entropy_solve(
    G: Array, e: Array, lam_start: Array | None = None, steps: int = STEPS, domain: Domain = UNIT_BOX
) -> InnerSolution:
    """Solve the k-cut model by a predictor-corrector interior point method on (λ, w, t) with logits u.

    Parameters: slopes G [B, k, n], centred offsets e [B, k], optional multipliers of the first k_prev cuts
    lam_start [B, k_prev], the most steps taken, the domain of y.

    On return λ is the best of all iterates, λ >= 0 and 1'λ = 1, y = σ(−G'λ). A sample stops changing once its
    duality gap is at rounding level, so its answer does not depend on its neighbours. A sample with NaN or infinite
    cuts has y = NaN. Convergence is told by `residual`, never assumed.
    """
    B, k, n = G.shape
    G_given, e_given, c = G, e, domain.centre(n)
    G, e = _normal_form(G, e, domain)
    Gt = G.swapaxes(1, 2)
    if lam_start is None:
        lam = np.full((B, k), 1.0 / k)
        bound = 2.0
    else:
        lam = np.full((B, k), 0.1 / k)
        lam[:, : lam_start.shape[1]] += 0.9 * lam_start
        lam /= lam.sum(1, keepdims=True)
        bound = 4.0

    start = evaluate(G, e, lam, domain)
    best_lam, best_gap = lam, start.complementarity
    with np.errstate(invalid="ignore", over="ignore"):
        enough = 2 * EPS * (1 + (np.abs(e) + domain.reach(G)).max(1))  # rounding of v, y anywhere it may be

    s = -_apply(Gt, lam)
    u = _first_logits(s, bound, domain)
    v = e + _apply(G, domain.point(u) - c)
    M = v.max(1, keepdims=True)
    δ = (lam * (M - v)).sum(1, keepdims=True) + 10 * EPS * (1 + np.abs(M))
    w, t = M - v + δ, M + δ

    with np.errstate(all="ignore"):  # a NaN sample is an answer (NaN, told by its residual), not a warning
        for _ in range(steps):
            if not np.any(best_gap > enough):
                break
            λ = lam
            GD = domain.curvature(u[:, None, :], G)  # D = D(u)
            v = e + _apply(G, domain.point(u) - c)
            r_u = u - s  # u + G'λ
            r_t = 1.0 - λ.sum(1, keepdims=True)
            r_d = v + w - t - _apply(GD, r_u)
            μ = (λ * w).mean(1, keepdims=True)
            A = GD @ Gt + np.eye(k) * (w / λ)[:, None, :]

            def direction(x_0: Array, x_1: Array, r_c: Array) -> tuple[Array, Array, Array]:
                dt = (x_0.sum(1, keepdims=True) - r_t) / x_1.sum(1, keepdims=True)  # noqa: B023
                dλ = x_0 - x_1 * dt
                return dλ, (r_c - w * dλ) / λ, dt  # noqa: B023

            # predictor
            r_c = -λ * w
            x = solve_spd(A, np.stack([r_d + r_c / λ, np.ones_like(λ)], axis=2))
            x_1 = x[:, :, 1]
            dλ, dw, _ = direction(x[:, :, 0], x_1, r_c)
            a = np.minimum(1.0, _to_boundary(λ, dλ, w, dw))
            σ_c = np.clip(((λ + a * dλ) * (w + a * dw)).mean(1, keepdims=True) / μ, 0.0, 1.0) ** 3
            # corrector
            r_c = σ_c * μ - λ * w - a**2 * dλ * dw
            x_0 = solve_spd(A, (r_d + r_c / λ)[:, :, None])[:, :, 0]
            dλ, dw, dt = direction(x_0, x_1, r_c)
            α = np.minimum(1.0, 0.99 * _to_boundary(λ, dλ, w, dw))

            trial = _to_simplex(λ[:, None, :] + (α * BACKTRACK)[:, :, None] * dλ[:, None, :])  # [B, 3, k]
            trial_s = -(trial @ G)
            trial_v = e[:, None, :] + (domain.point(trial_s) - c) @ Gt
            trial_gap = trial_v.max(2) - (trial * trial_v).sum(2)
            chosen = np.argmin(trial_gap * RELUCTANCE, axis=1)[:, None]
            α = α * BACKTRACK[chosen]
            gap = np.take_along_axis(trial_gap, chosen, axis=1)[:, 0]

            du = -(r_u + _apply(Gt, dλ))
            u = _next_logits(u, α * du, domain)
            lam = _to_simplex(λ + α * dλ)
            w = np.maximum(w + α * dw, SLACK_FLOOR)
            t = t + α * dt
            s = -_apply(Gt, lam)

            better = (gap < best_gap) & (best_gap > enough)
            best_lam = np.where(better[:, None], lam, best_lam)
            best_gap = np.where(better, gap, best_gap)

        best = evaluate(G_given, e_given, best_lam, domain)
        poison = 0.0 * best.complementarity  # NaN where any cut is NaN or infinite, else 0
        y = best.y + poison[:, None]
        residual = np.stack([poison, np.abs(best_lam.sum(1) - 1.0), best.complementarity], axis=1)
    return InnerSolution(y, best_lam, best.dual + poison, residual)


def _without_constants(G: Array) -> Array:
    """G less the mean of every slope, which changes nothing where 1'y = 1 and saves its rounding."""
    with np.errstate(invalid="ignore"):
        return G - G.mean(2, keepdims=True)


def _normal_form(G: Array, e: Array, domain: Domain) -> tuple[Array, Array]:
    """Cuts with the same λ that are easier to compute with.

    On the simplex a constant in a slope changes nothing: it is taken out. In R^n the model has a scale, G/r and e/r²
    for the point y/r, and is solved with slopes no longer than 1.
    """
    if domain is SIMPLEX:
        G = _without_constants(G)
    if domain is SPACE:
        with np.errstate(invalid="ignore", over="ignore"):
            r = np.maximum(1.0, np.sqrt((G * G).sum(2)).max(1))
            G, e = G / r[:, None, None], (e - e.max(1, keepdims=True)) / (r * r)[:, None]
    return G, e


def _first_logits(s: Array, bound: float, domain: Domain) -> Array:
    if domain is SPACE:
        return s
    if domain is SIMPLEX:
        s = s - s.max(1, keepdims=True)
        return np.maximum(s, -2 * bound)
    return np.clip(s, -bound, bound)


def _next_logits(u: Array, du: Array, domain: Domain) -> Array:
    if domain is SPACE:
        return u + du
    if domain is SIMPLEX:
        # u counts up to a constant. Which one decides what the bounds cut off; with y'du = 0 they cut off little
        # (unsolved of 1120 samples with slopes of 100 to 1e4: 13, with 1'du = 0 811).
        du = du - (domain.point(u) * du).sum(1, keepdims=True)
        u = u + np.clip(du, -LOGIT_STEP, LOGIT_STEP)
        return np.maximum(u - u.max(1, keepdims=True), -LOGIT_BOUND)
    return np.clip(u + np.clip(du, -LOGIT_STEP, LOGIT_STEP), -LOGIT_BOUND, LOGIT_BOUND)


def _to_simplex(λ: Array) -> Array:
    """λ kept off zero, where w/λ would overflow, and renormalised: [..., k] -> [..., k]."""
    λ = np.maximum(λ, LAM_FLOOR)
    return λ / λ.sum(-1, keepdims=True)


def _to_boundary(λ: Array, dλ: Array, w: Array, dw: Array) -> Array:
    """The largest a with λ + a dλ >= 0 and w + a dw >= 0, [B, 1]; infinite if nothing decreases."""
    towards = [np.where(dz < 0, -z / dz, np.inf).min(1, keepdims=True) for z, dz in ((λ, dλ), (w, dw))]
    return np.minimum(towards[0], towards[1])


class Trajectory(NamedTuple):
    """All that the K-step bundle method leaves behind; enough to differentiate through it. ½ and H are the box's."""

    y: Array  # [B, n] the answer, y_K
    lam: Array  # [B, K] multipliers of the last solve
    slopes: Array  # [B, K, n] g_i = ∇f(y_i)
    offsets: Array  # [B, K] centred: e_i = f(y_i) + g_i'(½ − y_i)
    cut_points: Array  # [B, K, n] y_i; the first is y_init, the (i+1)-th the answer of the i-th solve
    lam_history: Array  # [B, K, K] row k−1: multipliers after k cuts, zero beyond the k-th
    energy: Array  # [B] f(y) − H(y)
    lower_bound: Array  # [B] a number no energy can be below, if f is convex
    gap: Array  # [B] energy − lower_bound
    residual: Array  # [B, 3] KKT residuals of the last model: stationarity, feasibility, complementarity
    complementarity_history: Array  # [B, K] complementarity of every solve; a gradient needs all of them small


def bundle_entropy_argmin(
    value_and_gradient: Callable[[Array], tuple[Array, Array]],
    y_init: Array,
    iterations: int,
    steps: int = STEPS,
    domain: Domain = UNIT_BOX,
) -> Trajectory:
    """K cuts of the bundle entropy method from y_init [B, n]: cut, solve the model, move to its solution, repeat.

    `value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n])`. Source: Amos, Xu, Kolter (2017), algorithm 1. Boxes other
    than the unit box, and (μ/2)‖y‖² with μ other than 1, are solved in p with y = shift + scale∘p: give
    `in_coordinates(value_and_gradient, ...)` and p_init, and get a trajectory of p.
    """
    B, n = y_init.shape
    c = domain.centre(n)
    slopes, offsets = np.empty((B, 0, n)), np.empty((B, 0))
    cut_points, lam_history = np.empty((B, iterations, n)), np.zeros((B, iterations, iterations))
    complementarity_history = np.empty((B, iterations))
    y, lam = y_init, None
    for k in range(1, iterations + 1):
        f, g = value_and_gradient(y)
        cut_points[:, k - 1] = y
        slopes = np.concatenate([slopes, g[:, None]], axis=1)
        offsets = np.concatenate([offsets, (f + (g * (c - y)).sum(1))[:, None]], axis=1)
        y, lam, lower_bound, residual = bundle_entropy_solve(slopes, offsets, lam, steps, domain)
        lam_history[:, k - 1, :k] = lam
        complementarity_history[:, k - 1] = residual[:, 2]
    assert lam is not None, "iterations >= 1"
    energy = value_and_gradient(y)[0] + domain.regulariser(y)
    gap = energy - lower_bound
    return Trajectory(
        y,
        lam,
        slopes,
        offsets,
        cut_points,
        lam_history,
        energy,
        lower_bound,
        gap,
        residual,
        complementarity_history,
    )


def in_coordinates(
    value_and_gradient: Callable[[Array], tuple[Array, Array]], coordinates: Coordinates
) -> Callable[[Array], tuple[Array, Array]]:
    """Value and gradient of p -> f(shift + scale∘p): f and scale∘∇f."""

    def of_p(p: Array) -> tuple[Array, Array]:
        f, g = value_and_gradient(coordinates.y(p))
        return f, coordinates.scale * g

    return of_p


def kkt_adjoint(G: Array, e: Array, lam: Array, y_bar: Array, domain: Domain = UNIT_BOX) -> tuple[Array, Array]:
    """Proposition 3: c_y [B, n] and c_λ [B, k] for a loss with ∂ℓ/∂y = ȳ at the solution of the k-cut model.

    They solve, on the active cuts, c = −M⁻¹ [ȳ; 0; 0] with M = [[D⁻¹, G', 0], [G, 0, −1], [0, −1', 0]], and give
    ∂ℓ/∂e = c_λ, ∂ℓ/∂G = λ c_y' + c_λ (y − c)', c the centre, ½ in the box. No choice of
    active cuts is made: the slack w = max v − v on the diagonal switches inactive cuts off smoothly and makes
    duplicates harmless.
    """
    if domain is SIMPLEX:
        G = _without_constants(G)
    Gt = G.swapaxes(1, 2)
    s = -_apply(Gt, lam)
    v = e + _apply(G, domain.point(s) - domain.centre(G.shape[2]))
    w = v.max(1, keepdims=True) - v
    q = np.sqrt(lam)
    qG = q[:, :, None] * G
    qSq = domain.curvature(s[:, None, :], qG) @ qG.swapaxes(1, 2)
    δ = 1e-13 * np.einsum("bii->b", qSq)[:, None] + 1e-30
    Ã = qSq + np.eye(G.shape[1]) * (w + δ)[:, None, :]
    r = -_apply(G, domain.curvature(s, y_bar))
    X = solve_spd(Ã, np.stack([q * r, q], axis=2))
    X_0, X_1 = X[:, :, 0], X[:, :, 1]
    c_λ = q * (X_0 - X_1 * (q * X_0).sum(1, keepdims=True) / (q * X_1).sum(1, keepdims=True))
    c_y = -domain.curvature(s, y_bar + _apply(Gt, c_λ))
    return c_y, c_λ


class CutCotangents(NamedTuple):
    """Cotangents of the cuts in the form that one second-order product pushes to the weights.

    θ̄ = Σ_i ∇θ [ offset_bar_i f(x, y_i; θ) + seed_i' ∇_y f(x, y_i; θ) ], and x̄ the same with ∇x.
    """

    offset_bar: Array  # [B, K] ē_i
    seed: Array  # [B, K, n] ḡ_i + ē_i (½ − y_i)


def argmin_adjoint(
    trajectory: Trajectory,
    y_bar: Array,
    hvp: Callable[[Array, Array], Array] | None,
    depth: int | None = None,
    domain: Domain = UNIT_BOX,
) -> CutCotangents:
    """Cotangents of the cuts of a K-step solution for a loss with ∂ℓ/∂y = ȳ [B, n].

    `depth` is how many cut sets are differentiated through, from the last one back. depth = K (the default) is
    exact: the recursion through every cut point, by `hvp(y, s) -> ∇²f(y) s`. depth = 1 is Proposition 3 of the
    paper, which holds the cut points fixed and needs no `hvp`; for piecewise-linear f both agree.
    """
    Y, Λ = trajectory.cut_points, trajectory.lam_history
    B, K, n = Y.shape
    depth = K if depth is None else depth
    offset_bar, seed = np.zeros((B, K)), np.zeros((B, K, n))
    for k in range(K, K - depth, -1):
        if k < K:
            # The answer of solve k is the point of cut k+1: ȳ_k = ∇²f(y_k) (ḡ + ē (½ − y_k)).
            assert hvp is not None, "hvp is needed beyond depth 1"
            y_bar = hvp(Y[:, k], seed[:, k])
        y_k = trajectory.y if k == K else Y[:, k]
        λ = Λ[:, k - 1, :k]
        c_y, c_λ = kkt_adjoint(trajectory.slopes[:, :k], trajectory.offsets[:, :k], λ, y_bar, domain)
        offset_bar[:, :k] += c_λ
        # ḡ_i + ē_i (½ − y_i) with ḡ_i = λ_i c_y + c_λi (y − ½)
        seed[:, :k] += λ[:, :, None] * c_y[:, None, :] + c_λ[:, :, None] * (y_k[:, None, :] - Y[:, :k])
    return CutCotangents(offset_bar, seed)


def implicit_adjoint(hessian: Array, y: Array, y_bar: Array, domain: Domain = UNIT_BOX) -> Array:
    """c_y with (∇²f + D⁻¹) c_y = −ȳ: θ̄ = ∇θ [c_y' ∇_y f(x, y*)] for smooth f solved to convergence.

    hessian [B, n, n] at y [B, n]. With D = F F', solved as (I + F'∇²f F) z = −F'ȳ, c_y = F z, which stays regular
    where y saturates, and where D has no inverse, as on the simplex. Blind to kinks: wrong for ReLU networks.
    """
    s = domain.logits(y)[:, None, :]
    HF = domain.root_transposed(s, hessian)  # F' applied to every row of ∇²f: ∇²f F
    system = np.eye(y.shape[1]) + domain.root_transposed(s, HF.swapaxes(1, 2))
    z = np.linalg.solve(system, -domain.root_transposed(s, y_bar[:, None]).swapaxes(1, 2))[:, :, 0]
    return domain.root(s[:, 0], np.asarray(z, np.float64))


class CoordinatesCotangents(NamedTuple):
    """∂ℓ/∂shift and ∂ℓ/∂scale of y = shift + scale∘p. For a box: l̄ = shift − scale, ū = scale."""

    shift: Array  # [B, n]
    scale: Array  # [B, n]


def coordinates_adjoint(
    cut_points: Array,
    gradients: Array,
    cuts: CutCotangents,
    p: Array,
    y_bar: Array,
    hessian_products: Array,
) -> CoordinatesCotangents:
    """Cotangents of shift and scale for a loss with ∂ℓ/∂y = ȳ at y = shift + scale∘p, p the argmin.

    The cuts are those of f(shift + scale∘p), and depend on shift and scale through y_i = shift + scale∘p_i and
    g̃_i = scale∘∇f(y_i). With cotangents ē_i and seeds s_i of the cuts in p::

        shift_bar = ȳ + Σ_i (ē_i ∇f(y_i) + h_i)
        scale_bar = p∘ȳ + Σ_i p_i∘(ē_i ∇f(y_i) + h_i) + s_i∘∇f(y_i),      h_i = ∇²f(y_i) (scale∘s_i)

    cut_points p_i, gradients ∇f(y_i), hessian_products h_i: all [B, K, n]. For the recursion of `argmin_adjoint` they
    are exact if p_init counts as a constant. Proposition 3 holds the points p_i fixed: the same with its cuts. For the
    implicit adjoint the one cut is at y* with ē = 0 and s = c_p.
    """
    y_i_bar = cuts.offset_bar[:, :, None] * gradients + hessian_products
    return CoordinatesCotangents(
        shift=y_bar + y_i_bar.sum(1),
        scale=p * y_bar + (cut_points * y_i_bar + cuts.seed * gradients).sum(1),
    )
