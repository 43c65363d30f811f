"""The bundle entropy method and its adjoints on tensors: the torch twin of `icnnrt.mathematics.reference`, with its
symbols.

Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4)::

    y* = argmin over y in [0,1]^n of  f(y) − H(y),      H(y) = −Σ y log y + (1−y) log(1−y)

    primal   min over y, t of  t − H(y)   s.t.  v = e + G(y − ½) <= t·1,   e_i = f(y_i) + g_i'(½ − y_i)
    dual     max over λ in the simplex of  e'λ + ½ 1's − Σ softplus(s),   s = −G'λ
    link     y = σ(s),   D = ∂y/∂s = diag(σ(s) σ(−s))

Other domains (`icnnrt_models.layers.domains`) have their own centre, y(s), D and dual; `domain` says which, UNIT_BOX
where not given, and ½, σ and H in the comments below are the box's.

Everything here is float64, whatever the energy computes in: the model of k cuts is small next to one evaluation of
the energy, and its duality gap, max(v) − λ'v, is a difference of nearly equal numbers. Nothing here is recorded by
autograd. Inside functions a vector over cuts is a column [B, k, 1] and a vector over y a row [B, 1, n], so that
products need no reshaping.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icnnrt.mathematics.reference import BACKTRACK, EPS, LAM_FLOOR, RELUCTANCE, SLACK_FLOOR, STEPS
from icnnrt_models.layers.domains import UNIT_BOX, Domain
from icnnrt_models.layers.kernels import eager_on_cpu, kernel, run_on

__all__ = [
    "ArgminResult",
    "CutCotangents",
    "InnerSolution",
    "argmin_adjoint",
    "bundle_entropy_argmin",
    "bundle_entropy_solve",
    "implicit_adjoint",
    "kkt_adjoint",
    "kkt_adjoint_in_torch",
    "negative_entropy",
    "solve_in_torch",
    "solve_spd",
]

TINY = torch.finfo(torch.float64).tiny
CG_ITERATIONS = 100  # exact after n in exact arithmetic; eigenvalues lie in [1, 1 + ‖D‖ ‖∇²f‖], so fewer are usual


def negative_entropy(y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """−H(y) = Σ y log y + (1−y) log(1−y); 0 log 0 = 0."""
    return UNIT_BOX.regulariser(y)


def _factorise(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LU, pivots and scale [B, k, 1] of symmetric positive semidefinite A [B, k, k], which is overwritten.

    A is scaled to unit diagonal first. Duplicate cuts make it singular, so the ridge is never zero. LU and not
    Cholesky: rounding may leave a tiny negative eigenvalue. Nothing raises: NaN gives NaN.
    """
    scale = A.diagonal(dim1=1, dim2=2).clamp(min=TINY).rsqrt()[:, :, None]
    A.mul_(scale).mul_(scale.mT).diagonal(dim1=1, dim2=2).add_(4 * EPS)
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    return LU, pivots, scale


def _substitute(factors: tuple[Tensor, Tensor, Tensor], R: Tensor) -> Tensor:
    """A⁻¹ R for R [B, k, r]."""
    LU, pivots, scale = factors
    return torch.linalg.lu_solve(LU, pivots, R * scale) * scale


def solve_spd(A: Float[Tensor, "batch k k"], R: Float[Tensor, "batch k r"]) -> Float[Tensor, "batch k r"]:
    """A⁻¹ R for symmetric positive semidefinite A, as `icnnrt.mathematics.reference.solve_spd`; never raises."""
    return _substitute(_factorise(A.clone()), R)


class InnerSolution(NamedTuple):
    """Solution of the k-cut model."""

    y: Float[Tensor, "batch n"]  # primal point, σ(−G'λ)
    lam: Float[Tensor, "batch k"]  # multipliers of the cuts, on the simplex
    lower_bound: Float[Tensor, " batch"]  # dual value
    residual: Float[Tensor, "batch 3"]  # stationarity, feasibility, complementarity (= duality gap of the model)


@torch.no_grad()
def bundle_entropy_solve(
    G: Float[Tensor, "batch k n"],
    e: Float[Tensor, "batch k"],
    lam_start: Float[Tensor, "batch k_prev"] | None = None,
    steps: int = STEPS,
    domain: Domain = UNIT_BOX,
) -> InnerSolution:
    """Solve the k-cut model by a predictor-corrector interior point method on (λ, w, t) with logits u; all float64.

    On return λ is the best of all iterates, λ >= 0 and 1'λ = 1, y = σ(−G'λ). A sample stops changing once its duality
    gap is at rounding level, so its answer does not depend on its neighbours. A sample with NaN or infinite cuts has
    y = NaN. Convergence is told by `residual`, never assumed.

    By the native kernel where `icnnrt_models.layers.kernels` says so, else by `solve_in_torch`.
    """
    native = steps == STEPS and G.dtype == torch.float64 and eager_on_cpu(G, e)
    if native and (found := kernel(f"{domain.role}_solve", "float64")):
        return InnerSolution(*run_on(found, (G, e, e[:, :0] if lam_start is None else lam_start)))
    return solve_in_torch(G, e, lam_start, steps, domain)


@torch.no_grad()
def solve_in_torch(
    G: Float[Tensor, "batch k n"],
    e: Float[Tensor, "batch k"],
    lam_start: Float[Tensor, "batch k_prev"] | None = None,
    steps: int = STEPS,
    domain: Domain = UNIT_BOX,
) -> InnerSolution:
    """`bundle_entropy_solve` on any device, traced or not."""
    B, k, n = G.shape
    plain_G = domain.plain(G)
    plain_e = e[:, :, None]
    G, e = domain.scaled(plain_G, plain_e)
    Gt = G.mT
    if lam_start is None:
        lam = G.new_full((B, k, 1), 1.0 / k)
        bound = 2.0
    else:
        lam = G.new_full((B, k, 1), 0.1 / k)
        lam[:, : lam_start.shape[1], 0] += 0.9 * lam_start
        lam = lam / lam.sum(1, keepdim=True)
        bound = 4.0

    s = (lam.mT @ G).neg_()
    v = _cut_values(G, e, s, domain)
    best_lam = lam
    best_gap = v.amax(1, keepdim=True) - lam.mT @ v
    enough = 2 * EPS * (1 + (e.abs() + domain.reach(G)).amax(1, keepdim=True))  # rounding of v

    u = domain.first_logits(s, bound)
    v = _cut_values(G, e, u, domain)
    M = v.amax(1, keepdim=True)
    δ = lam.mT @ (M - v) + 10 * EPS * (1 + M.abs())
    w, t = M - v + δ, M + δ
    ones = torch.ones_like(lam)
    backtrack = G.new_tensor(BACKTRACK)[None, :, None].expand(B, -1, -1)
    reluctance = G.new_tensor(RELUCTANCE)[None, :, None]
    # Written over in every step: allocating tensors of this size anew costs several times the arithmetic.
    GD = torch.empty_like(G)
    trial_s, trial_y = G.new_empty((2, B, len(BACKTRACK), n))

    for _ in range(steps):
        unfinished = best_gap > enough  # False for NaN
        if not unfinished.any():
            break
        λ = lam
        v = _cut_values(G, e, u, domain)
        r_u = u - s  # u + G'λ
        r_t = 1.0 - λ.sum(1, keepdim=True)
        GD = domain.curvature(u, G, GD)  # D = D(u)
        r_d = torch.baddbmm(v + w - t, GD, r_u.mT, alpha=-1)
        λw = λ * w
        μ = λw.mean(1, keepdim=True)
        A = torch.bmm(GD, Gt)
        A.diagonal(dim1=1, dim2=2).add_((w / λ)[:, :, 0])
        factors = _factorise(A)

        # predictor: r_c = −λw, so r_c/λ = −w and dw = (r_c − w dλ)/λ = −w (1 + dλ/λ)
        x = _substitute(factors, torch.cat([r_d - w, ones], dim=2))
        x_0, x_1 = x[:, :, :1], x[:, :, 1:]
        x_1_sum = x_1.sum(1, keepdim=True)
        dλ = x_0 - x_1 * ((x_0.sum(1, keepdim=True) - r_t) / x_1_sum)
        ρ = dλ / λ
        dw = -w * (1.0 + ρ)
        # a = the most, up to 1, that keeps λ + a dλ and w + a dw >= 0: 1/a is the largest −dλ/λ or −dw/w = 1 + ρ, if
        # that is more than 1. The larger of −ρ and 1 + ρ is ½ + |ρ + ½|.
        a = ((ρ + 0.5).abs_().amax(1, keepdim=True) + 0.5).clamp_(min=1.0).reciprocal_()
        affine = ((λ + a * dλ) * (w + a * dw)).mean(1, keepdim=True)
        σ_c = (affine / μ).clamp_(0.0, 1.0) ** 3
        # corrector
        r_c = σ_c * μ - λw - (a * a) * (dλ * dw)
        x_0 = _substitute(factors, r_d + r_c / λ)
        dt = (x_0.sum(1, keepdim=True) - r_t) / x_1_sum
        dλ = x_0 - x_1 * dt
        dw = (r_c - w * dλ) / λ
        # α = 0.99 of the way to the boundary, at most 1
        approach = torch.maximum((-dλ / λ).amax(1, keepdim=True), (-dw / w).amax(1, keepdim=True))
        α = 0.99 / approach.clamp_(min=0.99)

        trial = _to_simplex(λ.mT + (α * backtrack) * dλ.mT)  # [B, 3, k]
        torch.bmm(trial, G, out=trial_s).neg_()
        trial_v = torch.baddbmm(e.mT, domain.centred(trial_s, trial_y), Gt)
        trial_gap = trial_v.amax(2, keepdim=True) - (trial * trial_v).sum(2, keepdim=True)  # [B, 3, 1]
        chosen = (trial_gap * reluctance).argmin(1, keepdim=True)  # [B, 1, 1]
        gap = trial_gap.gather(1, chosen)

        du = torch.baddbmm(r_u, dλ.mT, G).neg_()  # −(r_u + G'dλ), one whole step
        α = α * backtrack.gather(1, chosen)
        u = domain.next_logits(u, du.mul_(α))
        lam = trial.gather(1, chosen.expand(-1, -1, k)).mT
        s = trial_s.gather(1, chosen.expand(-1, -1, n))
        w = (w + α * dw).clamp_(min=SLACK_FLOOR)
        t = t + α * dt

        better = (gap < best_gap) & unfinished
        best_lam = torch.where(better, lam, best_lam)
        best_gap = torch.where(better, gap, best_gap)

    λ = best_lam
    s = (λ.mT @ plain_G).neg_()
    y = domain.point(s)
    v = _cut_values(plain_G, plain_e, s, domain)
    gap = v.amax(1, keepdim=True) - λ.mT @ v
    dual = (λ.mT @ plain_e)[:, 0, 0] - domain.conjugate(s)[:, 0]
    poison = 0.0 * gap[:, 0]  # [B, 1]: NaN where any cut is NaN or infinite, else 0
    residual = torch.cat([poison, (λ.sum(1) - 1.0).abs(), gap[:, 0]], dim=1)
    return InnerSolution(y[:, 0] + poison, λ[:, :, 0], dual + poison[:, 0], residual)


def _cut_values(G: Tensor, e: Tensor, s: Tensor, domain: Domain) -> Tensor:
    """v = e + G(y(s) − c), [B, k, 1]."""
    return torch.baddbmm(e, G, domain.centred(s, None).mT)


def _to_simplex(λ: Tensor) -> Tensor:
    """λ kept off zero, where w/λ would overflow, and renormalised over the last dimension."""
    λ = λ.clamp(min=LAM_FLOOR)
    return λ / λ.sum(-1, keepdim=True)


class ArgminResult(NamedTuple):
    """The answer of the K-step bundle method, its certificate, and all that is needed to differentiate through it.

    y, lam and cut_points have the energy's dtype; everything else is float64.
    """

    y: Float[Tensor, "batch n"]  # the answer, y_K
    lam: Float[Tensor, "batch K"]  # multipliers of the last solve
    slopes: Float[Tensor, "batch K n"]  # g_i = ∇f(y_i)
    offsets: Float[Tensor, "batch K"]  # centred: e_i = f(y_i) + g_i'(½ − y_i)
    cut_points: Float[Tensor, "batch K n"]  # y_i; the first is y_init, the (i+1)-th the answer of the i-th solve
    lam_history: Float[Tensor, "batch K K"]  # row k−1: multipliers after k cuts, zero beyond the k-th
    energy: Float[Tensor, " batch"]  # f(y) − H(y) at the y handed out
    lower_bound: Float[Tensor, " batch"]  # a number no energy can be below, if f is convex
    gap: Float[Tensor, " batch"]  # energy − lower_bound
    residual: Float[Tensor, "batch 3"]  # of the last model: stationarity (rounding of y), feasibility, complementarity
    complementarity_history: Float[Tensor, "batch K"]  # of every solve; a gradient needs all of them small


@torch.no_grad()
def bundle_entropy_argmin(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    y_init: Float[Tensor, "batch n"],
    iterations: int,
    steps: int = STEPS,
    domain: Domain = UNIT_BOX,
) -> ArgminResult:
    """K cuts of the bundle entropy method from y_init: cut, solve the model, move to its solution, repeat.

    `value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n])` is called with y in the dtype of y_init; cuts are cast up to
    float64, y is cast down. Source: Amos, Xu, Kolter (2017), algorithm 1.
    """
    B, n = y_init.shape
    K, dtype = iterations, y_init.dtype
    c = domain.centre(n)
    slopes = y_init.new_empty((B, K, n), dtype=torch.float64)
    cut_points = torch.empty_like(slopes, dtype=dtype)
    offsets = slopes.new_empty((B, K))
    complementarity_history = torch.empty_like(offsets)
    lam_history = slopes.new_zeros((B, K, K))
    y = y_init
    solution: InnerSolution | None = None
    for k in range(1, K + 1):
        f, g = value_and_gradient(y)
        cut_points[:, k - 1] = y
        slopes[:, k - 1] = g
        offsets[:, k - 1] = f + (slopes[:, k - 1] * (c - y.double())).sum(1)
        warm = None if solution is None else solution.lam
        solution = bundle_entropy_solve(slopes[:, :k], offsets[:, :k], warm, steps, domain)
        y = solution.y.to(dtype)
        lam_history[:, k - 1, :k] = solution.lam
        complementarity_history[:, k - 1] = solution.residual[:, 2]
    assert solution is not None, "iterations >= 1"
    rounding = (y.double() - solution.y).abs().amax(1)  # NaN where y is
    residual = torch.cat([rounding[:, None], solution.residual[:, 1:]], dim=1)
    energy = value_and_gradient(y)[0].double() + domain.regulariser(y.double())
    return ArgminResult(
        y=y,
        lam=solution.lam.to(dtype),
        slopes=slopes,
        offsets=offsets,
        cut_points=cut_points,
        lam_history=lam_history,
        energy=energy,
        lower_bound=solution.lower_bound,
        gap=energy - solution.lower_bound,
        residual=residual,
        complementarity_history=complementarity_history,
    )


@torch.no_grad()
def kkt_adjoint(
    G: Float[Tensor, "batch k n"],
    e: Float[Tensor, "batch k"],
    lam: Float[Tensor, "batch k"],
    y_bar: Float[Tensor, "batch n"],
    domain: Domain = UNIT_BOX,
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch k"]]:
    """Proposition 3: c_y and c_λ for a loss with ∂ℓ/∂y = ȳ at the solution of the k-cut model; all float64.

    They solve, on the active cuts, c = −M⁻¹ [ȳ; 0; 0] with M = [[D⁻¹, G', 0], [G, 0, −1], [0, −1', 0]], and give
    ∂ℓ/∂e = c_λ, ∂ℓ/∂G = λ c_y' + c_λ (y − c)', c the centre, ½ in the box. No choice of
    active cuts is made: the slack w = max v − v on the diagonal switches inactive cuts off smoothly and makes
    duplicates harmless.

    By the native kernel where `icnnrt_models.layers.kernels` says so, else by `kkt_adjoint_in_torch`.
    """
    native = G.dtype == torch.float64 and eager_on_cpu(G, e, lam, y_bar)
    if native and (found := kernel(f"{domain.role}_adjoint", "float64")):
        c_y, c_λ = run_on(found, (G, e, lam, y_bar))
        return c_y, c_λ
    return kkt_adjoint_in_torch(G, e, lam, y_bar, domain)


@torch.no_grad()
def kkt_adjoint_in_torch(
    G: Float[Tensor, "batch k n"],
    e: Float[Tensor, "batch k"],
    lam: Float[Tensor, "batch k"],
    y_bar: Float[Tensor, "batch n"],
    domain: Domain = UNIT_BOX,
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch k"]]:
    """`kkt_adjoint` on any device, traced or not."""
    ȳ = y_bar[:, None]
    G = domain.plain(G)
    s = (lam[:, None] @ G).neg_()
    v = _cut_values(G, e[:, :, None], s, domain)
    w = v.amax(1, keepdim=True) - v
    q = lam.sqrt()[:, :, None]
    qG = q * G
    Ã = domain.curvature(s, qG, None) @ qG.mT  # qSq, then + diag(w + δ)
    diagonal = Ã.diagonal(dim1=1, dim2=2)
    δ = 1e-13 * diagonal.sum(1, keepdim=True) + 1e-30
    diagonal.add_(w[:, :, 0] + δ)
    r = -(G @ domain.curvature(s, ȳ, None).mT)
    X = _substitute(_factorise(Ã), torch.cat([q * r, q], dim=2))
    qX = q.mT @ X
    c_λ = q * (X[:, :, :1] - X[:, :, 1:] * (qX[:, :, :1] / qX[:, :, 1:]))
    c_y = -domain.curvature(s, torch.baddbmm(ȳ, c_λ.mT, G), None)
    return c_y[:, 0], c_λ[:, :, 0]


class CutCotangents(NamedTuple):
    """Cotangents of the cuts in the form that one second-order product pushes to the weights; float64.

    θ̄ = Σ_i ∇θ [ offset_bar_i f(x, y_i; θ) + seed_i' ∇_y f(x, y_i; θ) ], and x̄ the same with ∇x.
    """

    offset_bar: Float[Tensor, "batch K"]  # ē_i
    seed: Float[Tensor, "batch K n"]  # ḡ_i + ē_i (½ − y_i)


@torch.no_grad()
def argmin_adjoint(
    trajectory: ArgminResult,
    y_bar: Float[Tensor, "batch n"],
    hvp: Callable[[int, Tensor], Tensor] | None,
    depth: int | None = None,
    domain: Domain = UNIT_BOX,
) -> CutCotangents:
    """Cotangents of the cuts of a K-step solution for a loss with ∂ℓ/∂y = ȳ.

    `depth` is how many cut sets are differentiated through, from the last one back. depth = K (the default) is exact:
    the recursion through every cut point, by `hvp(i, seed [B, n]) -> ∇²f(y_i) seed`, i the 0-based index of the cut.
    depth = 1 is Proposition 3 of the paper, which holds the cut points fixed and needs no `hvp`; for piecewise-linear
    f both agree.
    """
    Y = trajectory.cut_points.double()
    K = Y.shape[1]
    depth = K if depth is None else depth
    offset_bar, seed = torch.zeros_like(trajectory.offsets), torch.zeros_like(Y)
    ȳ = y_bar.double()
    for k in range(K, K - depth, -1):
        if k < K:
            # The answer of solve k is the point of cut k+1: ȳ_k = ∇²f(y_k) (ḡ + ē (½ − y_k)).
            assert hvp is not None, "hvp is needed beyond depth 1"
            ȳ = hvp(k, seed[:, k]).double()
        y_k = trajectory.y.double() if k == K else Y[:, k]
        λ = trajectory.lam_history[:, k - 1, :k]
        c_y, c_λ = kkt_adjoint(trajectory.slopes[:, :k], trajectory.offsets[:, :k], λ, ȳ, domain)
        offset_bar[:, :k] += c_λ
        # ḡ_i + ē_i (½ − y_i) with ḡ_i = λ_i c_y + c_λi (y − ½)
        seed[:, :k] += λ[:, :, None] * c_y[:, None, :] + c_λ[:, :, None] * (y_k[:, None, :] - Y[:, :k])
    return CutCotangents(offset_bar, seed)


@torch.no_grad()
def implicit_adjoint(
    trajectory: ArgminResult,
    y_bar: Float[Tensor, "batch n"],
    hvp: Callable[[Tensor], Tensor],
    tolerance: float,
    domain: Domain = UNIT_BOX,
) -> Float[Tensor, "batch n"]:
    """c_y with (∇²f + D⁻¹) c_y = −ȳ, float64: θ̄ = ∇θ[c_y' ∇_y f(x, y*)] for smooth f solved to convergence.

    Conjugate gradients on (I + F'∇²f F) z = −F'ȳ, c_y = F z with D = F F', which stays regular where y saturates, and
    where D has no inverse, as on the simplex; `hvp(p [B, n]) -> ∇²f(y*) p`. Every sample stops by itself at a residual
    of `tolerance` relative to F'ȳ, all at CG_ITERATIONS. Blind to kinks: wrong for ReLU networks.
    """
    λ = trajectory.lam_history[:, -1, :, None]
    # s is finite where y is NaN because f(y_i) was; 0·y hands the NaN on.
    s = -(domain.plain(trajectory.slopes).mT @ λ)[:, :, 0] + 0.0 * trajectory.y.double()
    r = -domain.root_transposed(s, y_bar.double())
    z, p = torch.zeros_like(r), r
    rr = (r * r).sum(1, keepdim=True)
    enough = tolerance**2 * rr
    for _ in range(CG_ITERATIONS):
        unfinished = rr > enough  # False for NaN and for ȳ = 0
        if not unfinished.any():
            break
        Ap = p + domain.root_transposed(s, hvp(domain.root(s, p)).double())
        α = torch.where(unfinished, rr / (p * Ap).sum(1, keepdim=True), 0.0)
        z = torch.where(unfinished, z + α * p, z)
        r = torch.where(unfinished, r - α * Ap, r)
        rr_next = (r * r).sum(1, keepdim=True)
        p = torch.where(unfinished, r + (rr_next / rr) * p, p)
        rr = rr_next
    return domain.root(s, z)
