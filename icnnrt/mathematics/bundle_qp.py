"""The bundle method over a polyhedron, and its exact adjoint, in float64 numpy, written to be read.

    y* = argmin over y in P of  f(y) + (μ/2) ‖y‖²,      P = {Gy <= h,  Ay = b,  lower <= y <= upper}

Every iteration solves one quadratic program with the cuts g_i'y + e_i, e_i = f(y_i) − g_i'y_i, and the constraints
themselves, so every answer is feasible whatever their number::

    y_k, t_k = argmin over y, t of  t + (μ/2) ‖y‖²   s.t.  g_i'y + e_i <= t for i < k,   y in P        k = 1 .. K

from the first cut at y_0, the point of P that is nearest to y_init. The dual value of the last of them is a lower bound
of the minimum if f is convex, for any multipliers::

    lower_bound = λ'e − h'λ_G − b'ν − bounds'μ − (1/2μ) ‖g'λ + G'λ_G + A'ν + μ‖²,      1'λ = 1

and what the best of y_0 .. y_K has above it is its gap. A sample is done once that is small: further cuts would be near
duplicates. Source of the cuts: Kelley, *The cutting-plane method for solving convex programs*, 1960; of differentiating
through them: Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, Proposition 3, here with every cut point y_i
taken as the variable it is.

Without curvature, μ = 0, that vector has to be 0, or nothing bounds the model; and a model may fall without end along a
ray d, with Gd <= 0, Ad = 0 and the bounds' own signs, and g_i'd < 0 for all of its cuts. Of f itself that says nothing
yet: what a later cut is may end the fall. So y_k is then a point on the ray, further out each time that f still fell
along it, and f is cut there, a little lower than it seems, by what rounding may have raised it::

    y_k = y_0 + T max(1, |y_0|) d,   max |d| = 1,   T = 2^4, 2^8, 2^16, 2^32, 2^48, 2^60, or 2^60 at once where k = K

If f still falls at 2^60, ∇f'd < 0, the sample is UNBOUNDED and d its ray. The slope of a convex f along d only grows
with T, so f falls all the way from y_0 to there; what it does beyond nobody has seen.

Everything is batched: a leading dimension B, one independent problem a sample.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics import certificate, rounding
from icnnrt.mathematics.domains import SPACE
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.qp_reference import (
    BOUND_MAX,
    QP,
    STEPS,
    QPCotangents,
    QPReference,
    qp_adjoint,
    qp_gradients,
    qp_solve,
)
from icnnrt.mathematics.qp_reference import TOLERANCE as QP_TOLERANCE
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.reference import CutCotangents
from icnnrt.mathematics.status import Status

__all__ = [
    "Model",
    "Polyhedron",
    "PolyhedronCotangents",
    "PolyhedronTrajectory",
    "bundle_qp_adjoint",
    "bundle_qp_argmin",
    "bundle_qp_bound",
    "bundle_qp_excess",
    "bundle_qp_implicit",
    "bundle_qp_models",
    "bundle_qp_status",
    "bundle_qp_uncertainty",
]

Array = NDArray[np.float64]
Solver = Callable[..., QPReference]  # (QP, start or None, steps=) -> QPReference
Adjoint = Callable[..., QPCotangents]  # (Q, G, A, QPReference, z_bar) -> QPCotangents

FAR: Final = 2.0**60  # how far out on a ray f is judged: in float32, too, squares of it are finite
OUT: Final = 2.0**4  # how far out f is cut first
FURTHER: Final = 2.0**16  # T is squared, but grows by no more than this
MILD: Final = 2.0**10  # how much steeper than before a cut at 2^60 may be: of a curved f it would drown all others
FALLS: Final = 1e-6  # how fast f has to fall along a ray, against the steepest slope met in every variable
OFF: Final = 1e-7  # how far y may be out of P, against its size: a hundred times what a program is solved to
LEFT: Final = 1e-7  # what may be left of stationarity without curvature, against the terms that cancel
GROWTH: Final = 1e12  # of cotangents, from y to a point on the way: what has grown by more has no digit left
SAME: Final = 1e-11  # energies that differ by less, relative to 1 + |energy|, are the same
TOLERANCE: Final = 1e-9  # of the gap, relative to max(1, |lower bound|), in float64


class Polyhedron(NamedTuple):
    """{y: Gy <= h, Ay = b, lower <= y <= upper}; infinite bounds are none."""

    G: Array  # [B, m, n]
    h: Array  # [B, m]
    A: Array  # [B, q, n]
    b: Array  # [B, q]
    lower: Array  # [B, n]
    upper: Array  # [B, n]


class Model(NamedTuple):
    """One quadratic program of some of the samples, solved."""

    samples: NDArray[np.int64]  # which they are
    solution: QPReference  # z = (y, t); rows are cuts, then those of G. Of the projection: z = y, rows of G alone


class PolyhedronTrajectory(NamedTuple):
    """All that the bundle method leaves behind, to differentiate through it. NaN in samples that were not run."""

    y: Array  # [B, n] the best point met: of the least energy
    energy: Array  # [B] f(y) + (μ/2) ‖y‖²
    lower_bound: Array  # [B] no energy in P is below it, if f is convex; −∞ if no model was solved
    gap: Array  # [B] energy − lower_bound
    residual: Array  # [B, 3] relative stationarity, feasibility, duality gap of the last model
    status: NDArray[np.int8]  # [B] Status
    cuts: NDArray[np.int64]  # [B] how many models were solved, each with one cut more
    best: NDArray[np.int64]  # [B] y is y_best: 0 is the projection, k the answer of the k-th model
    slopes: Array  # [B, K, n] g_i; slots beyond `cuts` repeat the first
    offsets: Array  # [B, K] e_i = f(y_i) − g_i'y_i
    cut_points: Array  # [B, K, n] y_0 .. y_{K−1}
    lam: Array  # [B, K] multipliers of the cuts in the last model
    ray: Array  # [B, n] of an UNBOUNDED sample the direction along which f falls, max |d| = 1; else 0
    projection: Model | None  # None where the models were not kept: `bundle_qp_models`
    models: tuple[Model, ...]  # K of them, the k-th of the samples that were not done before
    polyhedron: Polyhedron
    mu: float


class PolyhedronCotangents(NamedTuple):
    """∂ℓ/∂ of all that the answer depends on; NaN in samples without a trustworthy gradient."""

    points: Array  # [B, J, n] y_i: the cut points, or y alone
    cuts: CutCotangents  # [B, J]: θ̄ = Σ_i ∇θ [ offset_bar_i f(y_i) + seed_i'∇f(y_i) ], x̄ likewise
    polyhedron: Polyhedron  # of G, h, A, b, lower, upper
    mu: Array  # [B]


def bundle_qp_argmin(
    value_and_gradient: Callable[[Array], tuple[Array, Array]],
    polyhedron: Polyhedron,
    iterations: int,
    mu: float,
    y_init: Array | None = None,
    tolerance: float = TOLERANCE,
    steps: int = STEPS,
    solver: Solver = qp_solve,
    precision: Any = np.float64,
) -> PolyhedronTrajectory:
    """At most K = iterations >= 1 cuts of the bundle method over the polyhedron.

    value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n]); rows of samples that are done or have no answer may be anything
    there and are not looked at. y_init [B, n], 0 by default. tolerance: the gap, relative to max(1, |lower_bound|), at
    which a sample is done; 0 never is. solver: of the programs. precision: the dtype that f is computed in, whose
    rounding is no sign that f is not convex.

    The status of each sample: INFEASIBLE where P is empty, NOT_FINITE_INPUT where its data are not numbers,
    NOT_FINITE where f is not, UNBOUNDED where models and f fall along a ray, NOT_CONVEX where f lies below its own
    cuts, SOLVER where a model could not be solved, or falls without end while f does not, and left the gap above the
    tolerance, PRECISION where rounding leaves it so, GAP where it is after K cuts, else CONVERGED; of the last four y
    is feasible, and NaN where there is no lower bound: where not even one model was solved.
    """
    B, n = polyhedron.lower.shape
    K = iterations
    y_init = np.zeros((B, n)) if y_init is None else y_init
    projection = Model(np.arange(B), solver(_projection(polyhedron, y_init), None, steps=steps))
    first = projection.solution
    y = np.array(first.z)

    slopes, offsets, cut_points = np.full((B, K, n), np.nan), np.full((B, K), np.nan), np.full((B, K, n), np.nan)
    lam, residual = np.zeros((B, K)), np.full((B, 3), np.nan)
    of_rows, nu, bounds = (np.zeros(a.shape) for a in (polyhedron.h, polyhedron.b, polyhedron.lower))
    best_y, best, cuts = np.full((B, n), np.nan), np.zeros(B, np.int64), np.zeros(B, np.int64)
    energy, lower_bound = np.full(B, np.inf), np.full(B, -np.inf)
    going = np.asarray(first.status <= QPStatus.INACCURATE)
    finite, solved = np.ones(B, bool), np.ones(B, bool)
    enough, _ = QP_TOLERANCE[np.dtype(np.float64)]
    feasible = np.array(going)
    origin, steepest = np.array(y), np.zeros((B, n))
    ray, out, unbounded = np.zeros((B, n)), np.zeros(B), np.zeros(B, bool)  # out: T, 0 where y_k is on no ray
    models: list[Model] = []
    f, g = _evaluate(value_and_gradient, y, going)
    for k in range(K + 1):
        # y_k, its energy and, if it was not the last, its cut
        met = f + 0.5 * mu * (y * y).sum(1)
        numbers = np.isfinite(met) & np.isfinite(g).all(1)
        finite &= ~going | numbers | (out > 0)  # f may overflow far out: it does not fall there
        going &= numbers
        mild = (np.abs(g) <= MILD * steepest).all(1)
        steepest = np.where(going[:, None], np.maximum(steepest, np.abs(g)), steepest)
        falls = going & (out > 0) & _falls(g, ray, steepest)
        unbounded |= falls & (out >= FAR)
        going &= (out < FAR) | (mild & ~falls)
        # By more than a program is solved to, so that of points that are the same the first stays.
        noise = np.where(np.isfinite(energy), SAME * (1 + np.abs(energy)), 0.0)
        better = going & feasible & (met < energy - noise)
        best_y, best = np.where(better[:, None], y, best_y), np.where(better, k, best)
        energy = np.where(better, met, energy)
        going &= ~_small(energy - lower_bound, lower_bound, tolerance)
        if k == K or not going.any():
            break
        slopes[going, k], cut_points[going, k] = g[going], y[going]
        eps = np.where(out > 0, certificate.UNCERTAIN * float(np.finfo(precision).eps), 0.0)
        lowered = f - (g * y).sum(1) - eps * (np.abs(f) + np.abs(g * y).sum(1))
        offsets[going, k] = lowered[going]
        # the model of k + 1 cuts
        at = np.flatnonzero(going)
        P = Polyhedron(*(a[at] for a in polyhedron))
        qp = _model(slopes[at, : k + 1], offsets[at, : k + 1], P, mu)
        warm = _warm(models[-1], at, k) if models else None
        solution = _solved(solver, qp, warm, steps, k + 1)
        models.append(Model(at, solution))
        good = solution.status <= QPStatus.INACCURATE
        falling = (solution.status == QPStatus.DUAL_INFEASIBLE) & (mu == 0)
        solved[at], going[at] = solution.status == QPStatus.SOLVED, good | falling
        kept = at[good]
        cuts[kept] = k + 1
        bound = bundle_qp_bound(
            slopes[at, : k + 1],
            offsets[at, : k + 1],
            P,
            mu,
            *(solution.lam[:, : k + 1], solution.lam[:, k + 1 :], solution.nu, solution.mu[:, :n]),
            solution.z[:, :n],
        )
        lower_bound[kept] = np.fmax(lower_bound[kept], bound[good])
        lam[kept, : k + 1], residual[kept] = solution.lam[good, : k + 1], solution.residual[good]
        of_rows[kept], nu[kept], bounds[kept] = solution.lam[good, k + 1 :], solution.nu[good], solution.mu[good, :n]
        ray[at] = _ray(solution, P)
        further = np.where(falls[at], np.minimum(out[at], FURTHER) * out[at], np.maximum(np.sqrt(out[at]), OUT))
        out[at] = np.where(falling, FAR if k == K - 1 else np.minimum(further, FAR), 0.0)
        y[at] = np.where(falling[:, None], _on_ray(origin[at], ray[at], out[at]), solution.z[:, :n])
        feasible[at] = good & (solution.residual[:, 1] <= enough)
        f, g = _evaluate(value_and_gradient, y, going)

    unused = np.isnan(offsets)
    slopes, cut_points = (np.where(unused[:, :, None], a[:, :1], a) for a in (slopes, cut_points))
    offsets = np.where(unused, offsets[:, :1], offsets)
    # Without a bound a y tells nothing: of an objective that falls without end it is no optimum, however feasible.
    best_y[np.isneginf(lower_bound) | unbounded] = np.nan
    run = np.isfinite(best_y).all(1)
    energy, lower_bound = (np.where(run, a, np.nan) for a in (energy, lower_bound))
    gap = energy - lower_bound
    status = bundle_qp_status(
        *(best_y, energy, lower_bound, gap, slopes, offsets, cut_points, lam),
        *bundle_qp_excess(best_y, polyhedron, of_rows, nu, bounds),
        solved=solved,
        tolerance=tolerance,
        precision=precision,
    )
    status[unbounded] = Status.UNBOUNDED
    status[~finite] = Status.NOT_FINITE
    status[first.status > QPStatus.INACCURATE] = Status.SOLVER
    status[first.status == QPStatus.PRIMAL_INFEASIBLE] = Status.INFEASIBLE
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
        np.where((status == Status.UNBOUNDED)[:, None], ray, 0.0),
        projection,
        tuple(models),
        polyhedron,
        mu,
    )


def bundle_qp_adjoint(
    trajectory: PolyhedronTrajectory,
    y_bar: Array,
    hvp: Callable[[int, Array, Array], Array] | None,
    adjoint: Adjoint = qp_adjoint,
) -> PolyhedronCotangents:
    """Cotangents of cuts and constraints for a loss with ∂ℓ/∂y = ȳ [B, n].

    From the model that gave y back to the projection: its KKT system, solved once, tells what its cuts and constraints
    did to y_k; what the cuts at y_{k−1} did goes on to the model before, ȳ_{k−1} = ∇²f(y_{k−1}) s_{k−1}. `hvp(i, y, s)`
    is ∇²f(y) s [B, n], y = y_i where s is not 0; None holds the cut points fixed, which is Proposition 3, and exact for
    piecewise-linear f.

    That is the derivative of the algorithm, and for piecewise-linear f of the argmin. For smooth f the iterates of a
    cutting-plane method come near y*, but their derivatives do not come near that of y* (off by factors of 2 to 80 at
    gaps of 1e-3 to 1e-9): take `bundle_qp_implicit` there.

    A sample in which a model on the way was not SOLVED, or whose cotangents grew beyond all digits on the way, has NaN
    throughout. θ̄ is linear in what is returned, and so are
    the gradients of constraints that samples share: their sum over the batch.
    """
    assert trajectory.projection is not None, "bundle_qp_models solves the models that were not kept"
    P, mu = trajectory.polyhedron, trajectory.mu
    Y = trajectory.cut_points
    B, K, n = Y.shape
    bars = Polyhedron(*(np.zeros(a.shape) for a in P))
    mu_bar, offset_bar, seed = np.zeros(B), np.zeros((B, K)), np.zeros((B, K, n))
    point_bar = np.zeros((B, K + 1, n))
    point_bar[np.arange(B), trajectory.best] = y_bar
    most, grown = GROWTH * np.abs(y_bar).max(1, initial=0.0), np.zeros(B, bool)
    for k in range(len(trajectory.models), -1, -1):
        samples, solution = trajectory.models[k - 1] if k else trajectory.projection
        # Those whose y does not come from a later model, nor from none. With the cut points held fixed, a point on a
        # ray has no cotangent to hand on; else it has, and no derivative.
        on = trajectory.best[samples] >= k
        if hvp is None:
            on &= solution.status != QPStatus.DUAL_INFEASIBLE
        at = samples[on]
        if not len(at):
            continue
        if hvp is not None and k < K:  # y_k bears cut k, and all models that hold it are done
            moved = (trajectory.best > k)[:, None]
            s = np.where(moved, seed[:, k], 0.0)
            if s.any():
                point_bar[:, k] += np.where(moved, hvp(k, np.where(moved, Y[:, k], 0.0), s), 0.0)
        part = QPReference(*(a[on] for a in solution))  # type: ignore[arg-type]
        one = Polyhedron(*(a[at] for a in P))
        if k:
            qp = _model(trajectory.slopes[at, :k], trajectory.offsets[at, :k], one, mu)
            z_bar = np.concatenate([point_bar[at, k], np.zeros((len(at), 1))], 1)
        else:
            qp, z_bar = _projection(one, np.zeros((len(at), n))), point_bar[at, 0]
        grown[at] |= np.abs(z_bar).max(1) > most[at]
        d = adjoint(qp.Q, qp.G, qp.A, part, z_bar)
        found = qp_gradients(part, d)
        bars.G[at] += found.G[:, k:, :n]
        bars.h[at] += found.h[:, k:]
        bars.A[at] += found.A[:, :, :n]
        bars.b[at] += found.b
        bars.lower[at] += found.lower[:, :n]
        bars.upper[at] += found.upper[:, :n]
        if k:
            y_k, c_y, λ, c_λ = part.z[:, :n], d.d_z[:, :n], part.lam[:, :k], d.d_lam[:, :k]
            mu_bar[at] += (c_y * y_k).sum(1)
            offset_bar[at, :k] += c_λ
            # ḡ_i − ē_i y_i with ḡ_i = λ_i c_y + c_λi y_k
            seed[at, :k] += λ[:, :, None] * c_y[:, None] + c_λ[:, :, None] * (y_k[:, None] - Y[at, :k])
    offset_bar[grown] = np.nan
    return _withheld(trajectory, PolyhedronCotangents(Y, CutCotangents(offset_bar, seed), bars, mu_bar))


def bundle_qp_implicit(
    trajectory: PolyhedronTrajectory,
    y_bar: Array,
    gradient: Array,
    hessian: Array,
    steps: int = STEPS,
    solver: Solver = qp_solve,
    adjoint: Adjoint = qp_adjoint,
) -> PolyhedronCotangents:
    """Cotangents by the optimality conditions at y, for a smooth f solved to convergence.

    gradient [B, n] and hessian [B, n, n] are of f at y. The solution map of min over P of f + (μ/2) ‖·‖² has at y* the
    derivative of that of Newton's program, min over z in P of ∇f'z + ½ (z − y)'∇²f (z − y) + (μ/2) ‖z‖²; it is solved
    for its multipliers. θ̄ = ∇θ [ seed'∇f(y) ]. Blind to kinks: wrong for ReLU networks, whose ∇²f is 0.
    """
    P, mu = trajectory.polyhedron, trajectory.mu
    B, n = trajectory.y.shape
    on = np.isfinite(trajectory.y).all(1) & np.isfinite(gradient).all(1) & np.isfinite(hessian).all((1, 2))
    y, H, g = (np.where(on.reshape(B, *[1] * (a.ndim - 1)), a, 0.0) for a in (trajectory.y, hessian, gradient))
    projection = _projection(P, y)
    qp = projection._replace(Q=H + mu * np.eye(n), p=g - (H @ y[..., None])[..., 0])
    solution = solver(qp, None, steps=steps)
    d = adjoint(qp.Q, qp.G, qp.A, solution, y_bar)
    found = qp_gradients(solution, d)
    bars = Polyhedron(found.G, found.h, found.A, found.b, found.lower, found.upper)
    cuts = CutCotangents(np.zeros((B, 1)), d.d_z[:, None])
    mu_bar = (d.d_z * solution.z).sum(1)
    return _withheld(trajectory, PolyhedronCotangents(trajectory.y[:, None], cuts, bars, mu_bar))


def bundle_qp_models(
    trajectory: PolyhedronTrajectory, y_init: Array, steps: int = STEPS, solver: Solver = qp_solve
) -> PolyhedronTrajectory:
    """The trajectory with its projection and models, which a graph does not keep: solved once more, from the cuts."""
    P, mu = trajectory.polyhedron, trajectory.mu
    projection = Model(np.arange(len(y_init)), solver(_projection(P, y_init), None, steps=steps))
    models = []
    for k in range(1, int(trajectory.cuts.max(initial=0)) + 1):
        at = np.flatnonzero(trajectory.cuts >= k)
        qp = _model(trajectory.slopes[at, :k], trajectory.offsets[at, :k], Polyhedron(*(a[at] for a in P)), mu)
        models.append(Model(at, _solved(solver, qp, None, steps, k)))
    return trajectory._replace(projection=projection, models=tuple(models))


def _withheld(trajectory: PolyhedronTrajectory, found: PolyhedronCotangents) -> PolyhedronCotangents:
    """NaN throughout in samples that have one anywhere, or no y."""
    arrays = [np.array(a) for a in (*found.cuts, *found.polyhedron, found.mu)]
    bad = ~np.isfinite(trajectory.y).all(1)
    for a in arrays:
        bad |= ~np.isfinite(a).all(tuple(range(1, a.ndim)))
    for a in arrays:
        a[bad] = np.nan
    return PolyhedronCotangents(found.points, CutCotangents(*arrays[:2]), Polyhedron(*arrays[2:8]), arrays[8])


def _solved(solver: Solver, qp: QP, warm: tuple[Array, Array, Array, Array] | None, steps: int, k: int) -> QPReference:
    """The model of k cuts, from the warm start; what is not SOLVED from there once more without, and the better of the
    two.

    It is solved as that of f/σ, t = σ t̂, where σ < 1: so whether it falls along a ray is told from rounding by the
    slopes that there are, not by their size.
    """
    σ = _steepness(qp, k)
    one, last = np.ones(qp.G.shape[1]), np.ones(qp.p.shape[1])
    rows = np.where(np.arange(len(one)) < k, 1.0 / σ, one)  # [B, k + m], 1/σ of cuts
    height = np.where(np.arange(len(last)) == len(last) - 1, σ, last)  # [B, n + 1], σ of t
    qp = qp._replace(G=qp.G * rows[:, :, None] * height[:, None], h=qp.h * rows)
    if warm is not None:
        z, lam, nu, mu = warm
        warm = z / height, lam / (σ * rows), nu / σ, mu / σ
    solution = solver(qp, warm, steps=steps)
    again = np.flatnonzero(solution.status != QPStatus.SOLVED)
    if warm is not None and again.size:
        cold = solver(QP(*(a[again] for a in qp)), None, steps=steps)
        better = cold.status < solution.status[again]
        merged = QPReference(*(np.array(a) for a in solution))  # type: ignore[arg-type]
        a: NDArray[Any]
        other: NDArray[Any]
        for a, other in zip(merged, cold, strict=True):  # type: ignore[assignment]
            a[again[better]] = other[better]
        solution = merged
    return solution._replace(
        z=solution.z * height,
        lam=solution.lam * σ * rows,
        nu=solution.nu * σ,
        mu=solution.mu * σ,
        slack=solution.slack / rows,
    )


def _steepness(qp: QP, k: int) -> Array:
    """σ = min(1, max |g_i|) of k cuts, [B, 1]; 1 where all are 0, or where Q curves the model, which bounds it."""
    if qp.Q.any():
        return np.ones((len(qp.p), 1))
    σ = np.abs(qp.G[:, :k, :-1]).max((1, 2), initial=0.0)[:, None]
    return np.where(σ > 0, np.minimum(σ, 1.0), 1.0)


def _ray(solution: QPReference, P: Polyhedron) -> Array:
    """[B, n], max |d| = 1, the direction along which a model falls; 0 where there is none. The signs that the bounds of
    y ask for hold to the bit, Gd <= 0 and Ad = 0 to 1e-8 of d."""
    d = solution.ray[:, : P.lower.shape[1]]
    low, high = (np.abs(a) < BOUND_MAX for a in (P.lower, P.upper))
    d = np.clip(d, np.where(low, 0.0, -np.inf), np.where(high, 0.0, np.inf))
    d = np.where((solution.status == QPStatus.DUAL_INFEASIBLE)[:, None], d, 0.0)
    most = np.abs(d).max(1, keepdims=True, initial=0.0)
    return np.asarray(d / np.where(most > 0, most, 1.0))


def _on_ray(origin: Array, ray: Array, out: Array) -> Array:
    size = np.maximum(1.0, np.abs(origin).max(1, initial=0.0))
    return np.asarray(origin + (out * size)[:, None] * ray)


def _falls(g: Array, ray: Array, steepest: Array) -> NDArray[np.bool_]:
    """∇f'd < 0 by more than the rounding of either."""
    return np.asarray((g * ray).sum(1) < -FALLS * (steepest * np.abs(ray)).sum(1))


def _small(gap: Array, lower_bound: Array, tolerance: float) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return np.isfinite(lower_bound) & (gap <= tolerance * certificate.unit(lower_bound))


def _evaluate(
    value_and_gradient: Callable[[Array], tuple[Array, Array]], y: Array, going: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """f and ∇f in float64; points of samples that are out are 0."""
    f, g = value_and_gradient(np.where(going[:, None], y, 0.0))
    return np.asarray(f, np.float64), np.asarray(g, np.float64)


def _projection(P: Polyhedron, y_init: Array) -> QP:
    """min ½ ‖y‖² − y_init'y over P."""
    B, n = y_init.shape
    return QP(np.broadcast_to(np.eye(n), (B, n, n)), -y_init, P.G, np.full(P.h.shape, -np.inf), *P[1:])


def _model(slopes: Array, offsets: Array, P: Polyhedron, mu: float) -> QP:
    """min over (y, t) of t + (μ/2) ‖y‖² s.t. [slopes −1] (y, t) <= −offsets, [G 0] (y, t) <= h, and so on."""
    B, _, n = slopes.shape

    def wide(M: Array, last: float) -> Array:
        return np.concatenate([M, np.full((*M.shape[:2], 1), last)], 2)

    Q = np.zeros((B, n + 1, n + 1))
    Q[:, range(n), range(n)] = mu
    p = np.zeros((B, n + 1))
    p[:, n] = 1.0
    h = np.concatenate([-offsets, P.h], 1)
    free = np.full((B, 1), np.inf)
    return QP(
        Q,
        p,
        np.concatenate([wide(slopes, -1.0), wide(P.G, 0.0)], 1),
        np.full(h.shape, -np.inf),
        h,
        wide(P.A, 0.0),
        P.b,
        np.concatenate([P.lower, -free], 1),
        np.concatenate([P.upper, free], 1),
    )


def _warm(before: Model, at: NDArray[np.int64], k: int) -> tuple[Array, Array, Array, Array]:
    """(z, λ, ν, μ) of the model with one cut less, the new cut's multiplier 0; 0 where that model had no answer."""
    rows = np.searchsorted(before.samples, at)
    z, lam, nu, mu = (np.nan_to_num(a[rows], nan=0.0) for a in before.solution[:4])
    return z, np.insert(lam, k, 0.0, axis=1), nu, mu


def bundle_qp_bound(
    slopes: Array,
    offsets: Array,
    polyhedron: Polyhedron,
    mu: float,
    lam: Array,
    lam_rows: Array,
    nu: Array,
    bounds: Array,
    y: Array,
) -> Array:
    """The dual value of a model at any multipliers, [B]: no feasible point of it is below; −∞ where they prove none.

    slopes [B, k, n], offsets [B, k] of its cuts, lam [B, k] their multipliers, lam_rows, nu and bounds those of the
    polyhedron, y [B, n] a point of the size of the solution. With μ > 0 y is taken as −(g'λ + G'λ_G + A'ν + μ)/μ, so
    that any multipliers with 1'λ = 1 do. With μ = 0 that vector is 0 but for rounding, which counts by the size of y.
    What is more than 1e-7 of what it is summed from counts by the bound that it points at; where that is infinite, the
    multipliers prove no bound at all.
    """
    P = polyhedron
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if (
            mu == 0
        ):  # what has no slope needs nothing to hold it: such multipliers are rounding, with nothing to see it by
            sloped = (np.abs(slopes).max((1, 2)) > 0)[:, None]
            lam_rows, nu, bounds = (np.where(sloped, m, 0.0) for m in (lam_rows, nu, bounds))
        cuts, rows = np.maximum(lam, 0.0), np.maximum(lam_rows, 0.0)
        λ = cuts / cuts.sum(1, keepdims=True)
        value = (λ * offsets).sum(1) - (nu * P.b).sum(1)
        sides = ((P.h, rows), (P.upper, np.maximum(bounds, 0.0)), (P.lower, np.minimum(bounds, 0.0)))
        for bound, part in sides:
            there = (np.abs(bound) < BOUND_MAX) & (part != 0)
            value = value - np.where(there, part * np.where(there, bound, 0.0), 0.0).sum(1)
        terms = [(λ, slopes), (rows, P.G), (nu, P.A)]
        along = sum((m[:, None] @ M)[:, 0] for m, M in terms) + bounds
        if mu > 0:
            return np.asarray(value - 0.5 / mu * (along * along).sum(1))
        held = sum((np.abs(m)[:, None] @ np.abs(M))[:, 0] for m, M in terms) + np.abs(bounds)
        steep = np.abs(slopes).max(1)
        steep = np.where(steep > 0, steep, steep.max(1, keepdims=True))
        side = np.abs(np.where(along > 0, P.lower, P.upper))
        side = np.where(side < BOUND_MAX, side, np.inf)
        reach = np.where(np.abs(along) <= LEFT * (steep + held), np.abs(y), side)
        lost = np.where(along != 0, np.abs(along) * reach, 0.0).sum(1)
        return np.asarray(value - lost)


def bundle_qp_status(
    y: Array,
    energy: Array,
    lower_bound: Array,
    gap: Array,
    slopes: Array,
    offsets: Array,
    cut_points: Array,
    lam: Array,
    excess: Array,
    violation: Array,
    *,
    solved: NDArray[np.bool_],
    tolerance: float,
    precision: Any,
    proven: bool = False,
) -> NDArray[np.int8]:
    """The status of samples that were run to their end, [B]: SOLVER where there is no lower bound. excess and violation
    [B] are what `bundle_qp_excess` tells.

    The rules are those of `certificate.status_of`. What it calls a residual is here whether y is in P, and whether the
    last model was `solved`, which counts only where the gap is above the tolerance.
    """
    enough, _ = QP_TOLERANCE[np.dtype(np.float64)]
    status = np.zeros(len(energy), np.int8)
    with np.errstate(invalid="ignore"):
        unit = certificate.unit(lower_bound)
        # A model is solved to 1e-9 of its own numbers: less tells nothing of f.
        noise = _rounding(y, energy, slopes, offsets, cut_points, precision) + enough * unit
        below = np.maximum(-gap - excess, certificate.convexity_violation(slopes, offsets, cut_points, SPACE))
        doubt = bundle_qp_uncertainty(y, energy, gap, slopes, offsets, cut_points, lam, precision)
        if proven:
            doubt = np.where(below > noise, np.maximum(doubt, below), doubt)
        large = ~(gap <= tolerance * unit)
        status[large] = Status.GAP
        status[(doubt > tolerance * unit) & ~(gap > doubt)] = Status.PRECISION
        status[(large & ~solved) | (violation > OFF) | ~np.isfinite(lower_bound)] = Status.SOLVER
        if not proven:
            status[below > noise] = Status.NOT_CONVEX
    return status


def bundle_qp_excess(y: Array, polyhedron: Polyhedron, lam: Array, nu: Array, bounds: Array) -> tuple[Array, Array]:
    """What it means that y leaves P: by how much its energy may lie below the lower bound, and how far out it is, [B].

    `icnnrt.mathematics.rounding.excess` says what.
    """
    P = polyhedron
    with np.errstate(invalid="ignore"):
        rows = (a[:, None] for a in (P.h, P.b, P.lower, P.upper, y, lam, nu, bounds))
        h, b, lower, upper, point, *multipliers = rows
        below, out = rounding.excess(NUMPY, P.G, h, P.A, b, lower, upper, point, *multipliers)
    return below[:, 0, 0], out[:, 0, 0]


def _rounding(y: Array, energy: Array, slopes: Array, offsets: Array, cut_points: Array, precision: Any) -> Array:
    """What rounding in the dtype of f may add to a comparison of energies and cuts, as `certificate.rounding`: [B]."""
    eps = float(np.finfo(precision).eps)
    rows = energy[:, None, None], slopes, offsets[:, None], cut_points, y[:, None]
    return np.asarray(rounding.rounding_at(NUMPY, *rows, eps)[:, 0, 0])


def bundle_qp_uncertainty(
    y: Array,
    energy: Array,
    gap: Array,
    slopes: Array,
    offsets: Array,
    cut_points: Array,
    lam: Array,
    precision: Any,
) -> Array:
    """By how much rounding in the dtype of f may have moved the gap, [B]; as `certificate.uncertainty`."""
    eps = float(np.finfo(precision).eps)
    rows = energy[:, None, None], gap[:, None, None], slopes, offsets[:, None], cut_points, lam[:, None], y[:, None]
    return np.asarray(rounding.uncertainty_at(NUMPY, *rows, eps)[:, 0, 0])
