"""The bundle method over a polyhedron and its adjoints on tensors: the torch twin of `icnnrt.mathematics.bundle_qp`.

    y* = argmin over y in P of  f(y) + (μ/2) ‖y‖²,      P = {Gy <= h,  Ay = b,  lower <= y <= upper}

Method, certificate, adjoints and statuses stand there; the functions here bear the same names and the same symbols.
Everything is float64 and has a leading axis of B samples. The quadratic programs of an iteration are solved together by
the operators of `icnnrt_models.layers.quadratic_program`, on the device of the data: no loop is over samples. Nothing
here is recorded by autograd.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from icnnrt.mathematics.bundle_qp import FALLS, FAR, FURTHER, GROWTH, LEFT, MILD, OFF, OUT, SAME
from icnnrt.mathematics.certificate import ROUNDING, UNCERTAIN
from icnnrt.mathematics.qp_reference import BOUND_MAX, STEPS
from icnnrt.mathematics.qp_reference import TOLERANCE as QP_TOLERANCE
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.status import Status
from icnnrt_models.layers.qp_script import Solution

__all__ = [
    "Model",
    "Polyhedron",
    "PolyhedronCotangents",
    "PolyhedronTrajectory",
    "bundle_qp_adjoint",
    "bundle_qp_argmin",
    "bundle_qp_implicit",
]

ENOUGH, _ = QP_TOLERANCE[np.dtype(np.float64)]


class Polyhedron(NamedTuple):
    """{y: Gy <= h, Ay = b, lower <= y <= upper}; infinite bounds are none."""

    G: Tensor  # [B, m, n]
    h: Tensor  # [B, m]
    A: Tensor  # [B, q, n]
    b: Tensor  # [B, q]
    lower: Tensor  # [B, n]
    upper: Tensor  # [B, n]


class Model(NamedTuple):
    """One quadratic program of some of the samples, solved."""

    samples: Tensor  # which they are, int64
    solution: Solution  # z = (y, t); rows are cuts, then those of G. Of the projection: z = y, rows of G alone


class PolyhedronTrajectory(NamedTuple):
    """All that the bundle method leaves behind; as `icnnrt.mathematics.bundle_qp.PolyhedronTrajectory`.

    J <= K slots of cuts: as many as some sample has.
    """

    y: Tensor  # [B, n]
    energy: Tensor  # [B]
    lower_bound: Tensor  # [B]
    gap: Tensor  # [B]
    residual: Tensor  # [B, 3]
    status: Tensor  # [B] int32, Status
    cuts: Tensor  # [B] int64
    best: Tensor  # [B] int64
    slopes: Tensor  # [B, J, n]
    offsets: Tensor  # [B, J]
    cut_points: Tensor  # [B, J, n]
    lam: Tensor  # [B, J]
    ray: Tensor  # [B, n]
    uncertainty: Tensor  # [B]
    projection: Model
    models: tuple[Model, ...]
    polyhedron: Polyhedron
    mu: float


class PolyhedronCotangents(NamedTuple):
    """∂ℓ/∂ of all that the answer depends on; NaN where a program on the way was not SOLVED."""

    offset_bar: Tensor  # [B, J]: θ̄ = Σ_i ∇θ [ offset_bar_i f(y_i) + seed_i'∇f(y_i) ], x̄ likewise
    seed: Tensor  # [B, J, n]
    polyhedron: Polyhedron  # of G, h, A, b, lower, upper


@torch.no_grad()
def bundle_qp_argmin(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    polyhedron: Polyhedron,
    iterations: int,
    mu: float,
    y_init: Tensor,
    tolerance: float,
    precision: float,
) -> PolyhedronTrajectory:
    """At most K = iterations >= 1 cuts of the bundle method over the polyhedron.

    value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n]), of a float64 y; rows of samples that are done or have no answer
    may be anything there and are not looked at. precision: the rounding of the dtype that f is computed in.
    """
    P, K = polyhedron, iterations
    B, n = P.lower.shape
    everyone = torch.arange(B, device=y_init.device)
    projection = Model(everyone, _solve(*_projection(P, y_init)))
    first = projection.solution
    y = first.z

    infinity = float("inf")
    energy, lower_bound = y.new_full((B,), infinity), y.new_full((B,), -infinity)
    best_y, residual = torch.full_like(y, torch.nan), y.new_full((B, 3), torch.nan)
    best, cuts = torch.zeros_like(everyone), torch.zeros_like(everyone)
    going = first.status <= QPStatus.INACCURATE
    feasible, finite, solved = going, torch.ones_like(going), torch.ones_like(going)
    slopes, offsets, cut_points = y.new_empty((B, 0, n)), y.new_empty((B, 0)), y.new_empty((B, 0, n))
    lam = y.new_zeros((B, 0))
    of_P = tuple(torch.zeros_like(a) for a in (P.h, P.b, P.lower))  # multipliers of G, A and the bounds
    origin, steepest, ray = y, torch.zeros_like(y), torch.zeros_like(y)
    out, unbounded = y.new_zeros((B,)), torch.zeros_like(going)  # out: T, 0 where y_k is on no ray
    models: list[Model] = []
    f, g = value_and_gradient(torch.where(going[:, None], y, 0.0))
    for k in range(K + 1):
        # y_k, its energy and, if it was not the last, its cut
        met = f + 0.5 * mu * (y * y).sum(1)
        numbers = met.isfinite() & g.isfinite().all(1)
        finite = finite & (~going | numbers | (out > 0))  # f may overflow far out: it does not fall there
        going = going & numbers
        mild = (g.abs() <= MILD * steepest).all(1)
        steepest = torch.where(going[:, None], torch.maximum(steepest, g.abs()), steepest)
        falls = going & (out > 0) & ((g * ray).sum(1) < -FALLS * (steepest * ray.abs()).sum(1))
        unbounded = unbounded | (falls & (out >= FAR))
        going = going & ((out < FAR) | (mild & ~falls))
        # By more than a program is solved to, so that of points that are the same the first stays.
        noise = torch.where(energy.isfinite(), SAME * (1.0 + energy.abs()), 0.0)
        better = going & feasible & (met < energy - noise)
        best_y, best = torch.where(better[:, None], y, best_y), torch.where(better, k, best)
        energy = torch.where(better, met, energy)
        going = going & ~_small(energy - lower_bound, lower_bound, tolerance)
        if k == K or not bool(going.any()):
            break
        # Slots of samples that are done repeat their first cut; NaN in those that never had one.
        row, touches = going[:, None], g * y
        slope, point = (torch.where(row, a, b[:, 0] if k else torch.nan) for a, b in ((g, slopes), (y, cut_points)))
        eps = torch.where(out > 0, UNCERTAIN * precision, 0.0)
        lowered = f - touches.sum(1) - eps * (f.abs() + touches.abs().sum(1))
        offset = torch.where(going, lowered, offsets[:, 0] if k else torch.nan)
        slopes, cut_points = torch.cat([slopes, slope[:, None]], 1), torch.cat([cut_points, point[:, None]], 1)
        offsets = torch.cat([offsets, offset[:, None]], 1)
        # the model of k + 1 cuts
        at = going.nonzero().squeeze(1)
        part = Polyhedron(*(a[at] for a in P))
        qp = _model(slopes[at], offsets[at], part, mu)
        solution = _solved(qp, _warm(models[-1], at, k) if models else None, k + 1, mu)
        models.append(Model(at, solution))
        good = solution.status <= QPStatus.INACCURATE
        falling = (solution.status == QPStatus.DUAL_INFEASIBLE) & (mu == 0)
        solved, going, has = solved.clone(), going.clone(), torch.zeros_like(going)
        solved[at], going[at], has[at] = solution.status == QPStatus.SOLVED, good | falling, good
        cuts = torch.where(has, k + 1, cuts)
        dual = torch.fmax(lower_bound[at], _bound(slopes[at], offsets[at], part, mu, solution))
        lower_bound = lower_bound.index_put((at,), torch.where(good, dual, lower_bound[at]))
        residual = residual.index_put((at,), torch.where(good[:, None], solution.residual, residual[at]))
        lam = torch.nn.functional.pad(lam, (0, 1))
        lam = lam.index_put((at,), torch.where(good[:, None], solution.lam[:, : k + 1], lam[at]))
        found = solution.lam[:, k + 1 :], solution.nu, solution.mu[:, :n]
        of_P = tuple(a.index_put((at,), torch.where(good[:, None], b, a[at])) for a, b in zip(of_P, found, strict=True))
        further = torch.where(falls, out.clamp(max=FURTHER) * out, out.sqrt().clamp(min=OUT)).clamp(max=FAR)
        further = torch.full_like(further, FAR) if k == K - 1 else further
        out = out.index_put((at,), torch.where(falling, further[at], 0.0))
        ray = ray.index_put((at,), _ray(solution, part))
        size = origin.abs().amax(1).clamp(min=1.0)
        there = origin + (out * size)[:, None] * ray
        y = y.index_put((at,), torch.where(falling[:, None], there[at], solution.z[:, :n]))
        feasible = feasible.index_put((at,), good & (solution.residual[:, 1] <= ENOUGH))
        f, g = value_and_gradient(torch.where(going[:, None], y, 0.0))

    # Without a bound a y tells nothing: of an objective that falls without end it is no optimum, however feasible.
    best_y = torch.where((lower_bound.isneginf() | unbounded)[:, None], torch.nan, best_y)
    run = best_y.isfinite().all(1)
    energy, lower_bound = (torch.where(run, a, torch.nan) for a in (energy, lower_bound))
    gap = energy - lower_bound
    status = torch.full_like(first.status, Status.CONVERGED)
    unit = _unit(lower_bound)
    large = ~(gap <= tolerance * unit)
    status[large] = Status.GAP
    doubt = torch.full_like(gap, torch.nan)
    if models:
        doubt = _uncertainty(best_y, energy, gap, slopes, offsets, cut_points, lam, precision)
        status[(doubt > tolerance * unit) & ~(gap > doubt)] = Status.PRECISION
    excess, violation = _excess(best_y, P, *of_P)
    status[(large & ~solved) | (violation > OFF) | ~lower_bound.isfinite()] = Status.SOLVER
    if models:
        # A model is solved to 1e-9 of its own numbers: less tells nothing of f.
        noise = _rounding(best_y, energy, slopes, offsets, cut_points, precision) + ENOUGH * unit
        below = torch.maximum(-gap - excess, _convexity_violation(slopes, offsets, cut_points))
        status[below > noise] = Status.NOT_CONVEX
    status[unbounded] = Status.UNBOUNDED
    status[~finite] = Status.NOT_FINITE
    status[first.status > QPStatus.INACCURATE] = Status.SOLVER
    status[first.status == QPStatus.PRIMAL_INFEASIBLE] = Status.EMPTY_DOMAIN
    status[first.status == QPStatus.NOT_FINITE_INPUT] = Status.NOT_FINITE_INPUT
    return PolyhedronTrajectory(
        best_y,
        energy,
        lower_bound,
        gap,
        residual,
        status,
        cuts,
        best,
        slopes,
        offsets,
        cut_points,
        lam,
        torch.where((status == Status.UNBOUNDED)[:, None], ray, 0.0),
        doubt,
        projection,
        tuple(models),
        P,
        mu,
    )


@torch.no_grad()
def bundle_qp_adjoint(
    trajectory: PolyhedronTrajectory, y_bar: Tensor, hvp: Callable[[int, Tensor], Tensor] | None
) -> PolyhedronCotangents:
    """Cotangents of cuts and constraints for a loss with ∂ℓ/∂y = ȳ [B, n], through the models back to the projection.

    hvp(i, s) is ∇²f(y_i) s [B, n]; None holds the cut points fixed, which is Proposition 3, and exact for
    piecewise-linear f.
    """
    T, P, mu = trajectory, trajectory.polyhedron, trajectory.mu
    Y = T.cut_points
    B, J, n = Y.shape
    bars = Polyhedron(*(torch.zeros_like(a) for a in P))
    offset_bar, seed = Y.new_zeros((B, J)), Y.new_zeros((B, J, n))
    point_bar = Y.new_zeros((B, len(T.models) + 1, n))
    point_bar[torch.arange(B, device=Y.device), T.best] = y_bar
    most, grown = GROWTH * y_bar.abs().amax(1), torch.zeros_like(T.best, dtype=torch.bool)
    for k in range(len(T.models), -1, -1):
        samples, solution = T.models[k - 1] if k else T.projection
        # Those whose y does not come from a later model, nor from none. With the cut points held fixed, a point on a
        # ray has no cotangent to hand on; else it has, and no derivative.
        at = T.best[samples] >= k
        if hvp is None:
            at = at & (solution.status != QPStatus.DUAL_INFEASIBLE)
        on = at.nonzero().squeeze(1)
        if not len(on):
            continue
        at = samples[on]
        if hvp is not None and k < J:  # y_k bears cut k, and all models that hold it are done
            moved = (T.best > k)[:, None]
            s = torch.where(moved, seed[:, k], 0.0)
            if bool((s != 0).any()):
                point_bar[:, k] += torch.where(moved, hvp(k, s), 0.0)
        part = Solution(*(a[on] for a in solution))
        one = Polyhedron(*(a[at] for a in P))
        if k:
            Q, _, G, _, A, *_ = _model(T.slopes[at, :k], T.offsets[at, :k], one, mu)
            z_bar = torch.cat([point_bar[at, k], Y.new_zeros((len(at), 1))], 1)
        else:
            (Q, _, G, _, A, *_), z_bar = _projection(one, torch.zeros_like(one.lower)), point_bar[at, 0]
        grown[at] |= z_bar.abs().amax(1) > most[at]
        d_z, d_lam, *_, found = _gradients(Q, G, A, part, z_bar)
        whole = (found.G[:, k:, :n], found.h[:, k:], found.A[:, :, :n], found.b, found.lower[:, :n], found.upper[:, :n])
        for bar, a in zip(bars, whole, strict=True):
            bar[at] += a
        if k:
            y_k, c_y, λ, c_λ = part.z[:, :n], d_z[:, :n], part.lam[:, :k], d_lam[:, :k]
            offset_bar[at, :k] += c_λ
            # ḡ_i − ē_i y_i with ḡ_i = λ_i c_y + c_λi y_k
            seed[at, :k] += λ[:, :, None] * c_y[:, None] + c_λ[:, :, None] * (y_k[:, None] - Y[at, :k])
    for a in (offset_bar, seed, *bars):
        a[grown] = torch.nan
    return PolyhedronCotangents(offset_bar, seed, bars)


@torch.no_grad()
def bundle_qp_implicit(
    trajectory: PolyhedronTrajectory, y_bar: Tensor, gradient: Tensor, hessian: Tensor
) -> PolyhedronCotangents:
    """Cotangents by the optimality conditions at y, for a smooth f solved to convergence: by Newton's program there.

    gradient [B, n] and hessian [B, n, n] are of f at y. θ̄ = ∇θ [ seed'∇f(y) ]. Blind to kinks.
    """
    P, mu = trajectory.polyhedron, trajectory.mu
    B, n = trajectory.y.shape
    on = trajectory.y.isfinite().all(1) & gradient.isfinite().all(1) & hessian.isfinite().flatten(1).all(1)
    y, g = (torch.where(on[:, None], a, 0.0) for a in (trajectory.y, gradient))
    H = torch.where(on[:, None, None], hessian, 0.0)
    Q = H + mu * torch.eye(n, dtype=H.dtype, device=H.device)
    p = g - (H @ y[:, :, None])[:, :, 0]
    solution = _solve(Q, p, *P)
    d_z, *_, found = _gradients(Q, P.G, P.A, solution, y_bar)
    lost = ~on
    for a in (d_z, *found):
        a[lost] = torch.nan
    return PolyhedronCotangents(y.new_zeros((B, 1)), d_z[:, None], found)


# ---------------------------------------------------------------- quadratic programs

# Q, p, and G, h, A, b, lower, upper.
_QP = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _solve(
    Q: Tensor,
    p: Tensor,
    G: Tensor,
    h: Tensor,
    A: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    start: Tensor | None = None,
) -> Solution:
    none = p.new_zeros((1, 0))
    start = none if start is None else start
    return Solution(*torch.ops.icnnrt.qp_solve(Q, p, G, none, h, A, b, lower, upper, start, STEPS, False))


def _solved(qp: _QP, warm: Tensor | None, k: int, mu: float) -> Solution:
    """The model of k cuts, from the warm start; what is not SOLVED from there once more without, and the better of the
    two. As `icnnrt.mathematics.bundle_qp._solved`, it is solved as that of f/σ where slopes are small and μ = 0."""
    Q, p, G, h, A, b, lower, upper = qp
    σ = G[:, :k, :-1].abs().flatten(1).amax(1, keepdim=True)
    σ = torch.where((σ > 0) & (mu == 0), σ.clamp(max=1.0), 1.0)
    rows = torch.cat([(1.0 / σ).expand(-1, k), torch.ones_like(h[:, k:])], 1)
    height = torch.cat([torch.ones_like(lower[:, :-1]), σ], 1)
    scaled = (Q, p, G * rows[:, :, None] * height[:, None], h * rows, A, b, lower, upper)
    if warm is not None:
        of_b, of_bounds = (torch.ones_like(a) / σ for a in (b, lower))
        warm = warm * torch.cat([1.0 / height, 1.0 / (σ * rows), of_b, of_bounds], 1)
    solution = _solve(*scaled, warm)
    again = (solution.status != QPStatus.SOLVED).nonzero().squeeze(1)
    if warm is not None and len(again):
        cold = _solve(*(a if len(a) == 1 else a[again] for a in scaled))
        better = (cold.status < solution.status[again]).nonzero().squeeze(1)
        at = again[better]
        merged = zip(solution, cold, strict=True)
        solution = Solution(*(a.index_put((at,), other[better]) for a, other in merged))
    return solution._replace(
        z=solution.z * height,
        lam=solution.lam * σ * rows,
        nu=solution.nu * σ,
        mu=solution.mu * σ,
        slack=solution.slack / rows,
    )


def _ray(solution: Solution, P: Polyhedron) -> Tensor:
    """[B, n], max |d| = 1, the direction along which a model falls; 0 where there is none."""
    d = solution.ray[:, : P.lower.shape[1]]
    d = torch.where(P.lower.abs() < BOUND_MAX, d.clamp(min=0.0), d)
    d = torch.where(P.upper.abs() < BOUND_MAX, d.clamp(max=0.0), d)
    d = torch.where((solution.status == QPStatus.DUAL_INFEASIBLE)[:, None], d, 0.0)
    most = d.abs().amax(1, keepdim=True)
    return d / torch.where(most > 0, most, 1.0)


def _gradients(
    Q: Tensor, G: Tensor, A: Tensor, solution: Solution, z_bar: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Polyhedron]:
    """d_z, d_λ, d_ν, d_μ, and ∂ℓ/∂ of the constraints; NaN for samples that are not SOLVED."""
    s, none = solution, z_bar.new_zeros((1, 0))
    d_z, d_lam, d_nu, d_mu = torch.ops.icnnrt.qp_adjoint(
        Q, G, A, s.lam, s.mu, s.slack, s.box_slack, s.status, z_bar, none, none, none
    )

    def outer(a: Tensor, c: Tensor) -> Tensor:
        return a[:, :, None] * c[:, None]

    def at(side: Tensor, a: Tensor) -> Tensor:
        return torch.where(side, -a, 0.0 * a)

    found = Polyhedron(
        outer(s.lam, d_z) + outer(d_lam, s.z),
        at(s.lam > 0, d_lam),
        outer(s.nu, d_z) + outer(d_nu, s.z),
        -d_nu,
        at(s.mu < 0, d_mu),
        at(s.mu > 0, d_mu),
    )
    return d_z, d_lam, d_nu, d_mu, found


def _projection(P: Polyhedron, y_init: Tensor) -> _QP:
    """min ½ ‖y‖² − y_init'y over P."""
    eye = torch.eye(y_init.shape[1], dtype=y_init.dtype, device=y_init.device)
    return eye[None], -y_init, *P


def _model(slopes: Tensor, offsets: Tensor, P: Polyhedron, mu: float) -> _QP:
    """min over (y, t) of t + (μ/2) ‖y‖² s.t. [slopes −1] (y, t) <= −offsets, [G 0] (y, t) <= h, and so on."""
    n = slopes.shape[2]

    def wide(M: Tensor, last: float) -> Tensor:
        return torch.nn.functional.pad(M, (0, 1), value=last)

    p = wide(torch.zeros_like(P.lower), 1.0)
    Q = torch.zeros_like(p[0]).diag()
    Q.diagonal()[:n] = mu
    infinity = float("inf")
    return (
        Q[None],
        p,
        torch.cat([wide(slopes, -1.0), wide(P.G, 0.0)], 1),
        torch.cat([-offsets, P.h], 1),
        wide(P.A, 0.0),
        P.b,
        wide(P.lower, -infinity),
        wide(P.upper, infinity),
    )


def _warm(before: Model, at: Tensor, k: int) -> Tensor:
    """(z, λ, ν, μ) of the model with one cut less, the new cut's multiplier 0; 0 where that model had no answer."""
    rows = torch.searchsorted(before.samples, at)
    z, lam, nu, mu = (a[rows].nan_to_num(nan=0.0) for a in before.solution[:4])
    return torch.cat([z, lam[:, :k], torch.zeros_like(z[:, :1]), lam[:, k:], nu, mu], 1)


# ---------------------------------------------------------------- the certificate


def _small(gap: Tensor, lower_bound: Tensor, tolerance: float) -> Tensor:
    return lower_bound.isfinite() & (gap <= tolerance * _unit(lower_bound))


def _unit(lower_bound: Tensor) -> Tensor:
    return lower_bound.abs().clamp(min=1.0)


def _bound(slopes: Tensor, offsets: Tensor, P: Polyhedron, mu: float, solution: Solution) -> Tensor:
    """As `icnnrt.mathematics.bundle_qp.bundle_qp_bound`, at the model's multipliers: [B], −∞ where they prove none."""
    k, n = slopes.shape[1:]
    cuts, rows = solution.lam[:, :k].clamp(min=0.0), solution.lam[:, k:].clamp(min=0.0)
    nu, bounds, y = solution.nu, solution.mu[:, :n], solution.z[:, :n]
    if mu == 0:
        sloped = (slopes != 0).flatten(1).any(1)[:, None]
        rows, nu, bounds = (torch.where(sloped, m, 0.0) for m in (rows, nu, bounds))
    λ = cuts / cuts.sum(1, keepdim=True)
    value = (λ * offsets).sum(1) - (nu * P.b).sum(1)
    for bound, part in ((P.h, rows), (P.upper, bounds.clamp(min=0.0)), (P.lower, bounds.clamp(max=0.0))):
        there = (bound.abs() < BOUND_MAX) & (part != 0)
        value = value - torch.where(there, part * torch.where(there, bound, 0.0), 0.0).sum(1)
    terms = ((λ, slopes), (rows, P.G), (nu, P.A))
    along = sum(((m[:, None] @ M)[:, 0] for m, M in terms), bounds)
    if mu > 0:
        return value - 0.5 / mu * (along * along).sum(1)
    held = sum(((m.abs()[:, None] @ M.abs())[:, 0] for m, M in terms), bounds.abs())
    steep = slopes.abs().amax(1)
    steep = torch.where(steep > 0, steep, steep.amax(1, keepdim=True))
    side = torch.where(along > 0, P.lower, P.upper).abs()
    side = torch.where(side < BOUND_MAX, side, torch.inf)
    reach = torch.where(along.abs() <= LEFT * (steep + held), y.abs(), side)
    return value - torch.where(along != 0, along.abs() * reach, 0.0).sum(1)


def _excess(y: Tensor, P: Polyhedron, lam: Tensor, nu: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """As `icnnrt.mathematics.bundle_qp.bundle_qp_excess`: what the energy may lie below the bound by as y leaves P, and
    how far out it is, [B]."""
    Gy, Ay = (P.G @ y[:, :, None])[:, :, 0], (P.A @ y[:, :, None])[:, :, 0]
    above, off = (Gy - P.h).clamp(min=0.0), (Ay - P.b).abs()
    beyond = torch.maximum(y - P.upper, P.lower - y).clamp(min=0.0)
    excess = (lam.abs() * above).sum(1) + (nu.abs() * off).sum(1) + (bounds.abs() * beyond).sum(1)
    most, size = torch.cat([above, off, beyond], 1).amax(1), torch.cat([Ay, y], 1).abs().amax(1)
    return excess, most / (1.0 + size)


def _convexity_violation(slopes: Tensor, offsets: Tensor, cut_points: Tensor) -> Tensor:
    """As `icnnrt.mathematics.certificate.convexity_violation`: max_ij [v_j(y_i) − f(y_i)], [B] >= 0."""
    v = offsets[:, None] + cut_points @ slopes.mT
    return (v.amax(2) - v.diagonal(0, 1, 2)).amax(1)


def _rounding(
    y: Tensor, energy: Tensor, slopes: Tensor, offsets: Tensor, cut_points: Tensor, precision: float
) -> Tensor:
    """As `icnnrt.mathematics.bundle_qp._rounding`: what rounding may add to a comparison of energies and cuts, [B]."""
    far = torch.maximum(cut_points.abs().amax(1), y.abs())
    size = offsets.abs() + (slopes.abs() * far[:, None]).sum(2)
    return ROUNDING * precision * torch.maximum(energy.abs().clamp(min=1.0), size.amax(1))


def _uncertainty(
    y: Tensor,
    energy: Tensor,
    gap: Tensor,
    slopes: Tensor,
    offsets: Tensor,
    cut_points: Tensor,
    lam: Tensor,
    precision: float,
) -> Tensor:
    """As `icnnrt.mathematics.bundle_qp._uncertainty`: by how much rounding may have moved the gap, [B]."""
    G = slopes.abs()
    far = torch.maximum(cut_points.abs(), y.abs()[:, None])
    held = (lam.clamp(min=0.0) * (offsets.abs() + (G * far).sum(2))).sum(1) + (G.amax(1) * y.abs()).sum(1)
    return torch.maximum(UNCERTAIN * precision * torch.maximum(energy.abs().clamp(min=1.0), held), -gap)
