"""The bundle method over a polyhedron, and its adjoints, in float64 numpy.

The statements `polyhedron` and `polyhedron_adjoint` beside this file for arrays as users have them, around any solver
of quadratic programs; and the exact adjoint, which goes through all of them. Everything is batched: a leading dimension
B, one independent problem a sample.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics import polyhedron as stated
from icnnrt.mathematics import rounding
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.polyhedron import Model, PolyhedronTrajectory
from icnnrt.mathematics.polyhedron_adjoint import pulled_back
from icnnrt.mathematics.polyhedron_programs import Polyhedron, Programs, steepness
from icnnrt.mathematics.qp_reference import QP, STEPS, QPCotangents, QPReference, qp_sensitivity, qp_solve
from icnnrt.mathematics.qp_reliability import existing
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.recursive_adjoint import CutCotangents

Array = NDArray[np.float64]
Solver = Callable[..., QPReference]  # (QP, start or None, steps=) -> QPReference
Adjoint = Callable[..., QPCotangents]  # (Q, G, A, QPReference, z_bar) -> QPCotangents

GROWTH: Final = 1e12  # of cotangents, from y to a point on the way: what has grown by more has no digit left
TOLERANCE: Final = 1e-9  # of the gap, relative to max(1, |lower bound|), in float64


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
    B = len(polyhedron.lower)
    y_init = np.zeros(polyhedron.lower.shape) if y_init is None else y_init
    models = _Models(solver, steps)

    def found(y: Array) -> tuple[Array, Array]:
        f, g = value_and_gradient(y)
        return np.asarray(f, np.float64)[:, None], np.asarray(g, np.float64)

    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        T, _ = stated.argmin(
            *(NUMPY, polyhedron, found, models, y_init, np.ones((B, 1), bool), np.int64(iterations), mu, tolerance),
            eps=float(np.finfo(precision).eps),
        )
    projection, *others = models.kept
    return T._replace(status=T.status.astype(np.int8), projection=projection, models=tuple(others))


class _Models:
    """Solves the programs of one run, each of the samples that are in it, and keeps them.

    Every one starts cold: the answer of the one before saves a step or two of ten, and no time (measured), and where
    that leads astray it would have to be solved again.
    """

    def __init__(self, solver: Solver, steps: int) -> None:
        self.solver, self.steps = solver, steps
        self.kept: list[Model] = []

    def __call__(self, programs: Programs, qp: QP, σ: Array | None) -> QPReference:
        """As `polyhedron.argmin` asks: of samples that are not in it NaN, and a status."""
        at = np.flatnonzero(~np.isnan(qp.h).any(1)) if self.kept else np.arange(len(qp.p))

        def solve(scaled: QP) -> QPReference:
            (B, n), m, q = scaled.p.shape, scaled.h.shape[1], scaled.b.shape[1]
            whole: list[NDArray[Any]] = [np.full((B, width), np.nan) for width in (n, m, q, n, m, n, 3)]
            whole += [np.full(B, QPStatus.NOT_FINITE_INPUT, np.int32), np.zeros((B, n + m + q + n))]
            if at.size or not self.kept:
                found = _solved(self.solver, _rows(scaled, at), self.steps)._replace(steps=None)
                for a, solved in zip(whole, found, strict=False):
                    a[at] = solved
            return QPReference(*whole)

        solution = programs.solved(solve, qp, σ)
        if at.size or not self.kept:
            self.kept.append(Model(at, _rows(solution, at)))
        return solution


def _rows(of: Any, at: NDArray[Any]) -> Any:
    """A record of arrays of some samples; what is None stays None."""
    return of._make(None if a is None else a[at] for a in of)


def _solved(solver: Solver, qp: QP, steps: int) -> QPReference:
    return solver(qp._replace(h_lower=np.full(qp.h.shape, -np.inf)), None, steps=steps)


def _model(T: PolyhedronTrajectory, at: NDArray[Any], k: int) -> tuple[Programs, QP]:
    """The model of the first k cuts of some samples; of none the projection, but for y_init."""
    programs = Programs(NUMPY, _rows(T.polyhedron, at), T.mu)
    if not k:
        return programs, programs.projection(np.zeros((len(at), programs.n)))
    rows = np.concatenate([programs.G, programs.cut(T.slopes[at, :k])], 1)
    return programs, programs.model(rows, np.concatenate([programs.P.h, -T.offsets[at, :k]], 1))


def qp_existing(Q: Array, G: Array, A: Array, solution: QPReference, z_bar: Array) -> QPCotangents:
    """`qp_reference.qp_adjoint`, NaN where a part of the loss has no gradient."""
    *d, share, _ = qp_sensitivity(Q, G, A, solution, z_bar)
    return QPCotangents(*existing(NUMPY, d, share))


def bundle_qp_adjoint(
    trajectory: PolyhedronTrajectory,
    y_bar: Array,
    hvp: Callable[[int, Array, Array], Array] | None,
    adjoint: Adjoint = qp_existing,
) -> PolyhedronCotangents:
    """Cotangents of cuts and constraints for a loss with ∂ℓ/∂y = ȳ [B, n].

    `hvp(i, y, s)` is ∇²f(y) s [B, n], y = y_i where s is not 0; None holds the cut points fixed: "exact" and "prop3" of
    `icnnrt.mathematics.polyhedron_adjoint`. "exact" is the derivative of the algorithm, and for piecewise-linear f both
    are that of the argmin. For smooth f the iterates of a cutting-plane method come near y*, but their derivatives do
    not come near that of y* (off by factors of 2 to 80 at gaps of 1e-3 to 1e-9): take `bundle_qp_implicit` there.

    A sample in which a model on the way was not SOLVED or a part of the loss has no gradient, or whose cotangents grew
    beyond all digits on the way, has NaN throughout. θ̄ is linear in what is returned, and so are the gradients of
    constraints that samples share: their sum over the batch.
    """
    assert trajectory.projection is not None, "bundle_qp_models solves the models that were not kept"
    Y, best = trajectory.cut_points, trajectory.best
    B, K, n = Y.shape
    bars = Polyhedron(*(np.zeros(a.shape) for a in trajectory.polyhedron))
    mu_bar, offset_bar, seed = np.zeros(B), np.zeros((B, K)), np.zeros((B, K, n))
    point_bar = np.zeros((B, K + 1, n))
    point_bar[np.arange(B), best] = y_bar
    most, grown = GROWTH * np.abs(y_bar).max(1, initial=0.0), np.zeros(B, bool)
    for k in range(len(trajectory.models), -1, -1):
        samples, solution = trajectory.models[k - 1] if k else trajectory.projection
        # Those whose y does not come from a later model, nor from none. With the cut points held fixed, a point on a
        # ray has no cotangent to hand on; else it has, and no derivative.
        on = best[samples] >= k
        if hvp is None:
            on &= solution.status != QPStatus.DUAL_INFEASIBLE
        at = samples[on]
        if not len(at):
            continue
        if hvp is not None and k < K:  # y_k bears cut k, and all models that hold it are done
            moved = (best > k)[:, None]
            s = np.where(moved, seed[:, k], 0.0)
            if s.any():
                point_bar[:, k] += np.where(moved, hvp(k, np.where(moved, Y[:, k], 0.0), s), 0.0)
        part, (programs, qp) = _rows(solution, on), _model(trajectory, at, k)
        z_bar = NUMPY.padded(point_bar[at, k], qp.p.shape[1])
        grown[at] |= np.abs(z_bar).max(1) > most[at]
        found = pulled_back(NUMPY, programs, part, adjoint(qp.Q, qp.G, qp.A, part, z_bar), Y[at, :k])
        for total, bar in zip(bars, found.polyhedron, strict=True):
            total[at] += bar
        offset_bar[at, :k] += found.offset_bar
        seed[at, :k] += found.seed
        if k:  # the projection knows nothing of μ
            mu_bar[at] += found.mu[:, 0]
    offset_bar[grown] = np.nan
    return _withheld(trajectory, PolyhedronCotangents(Y, CutCotangents(offset_bar, seed), bars, mu_bar))


def bundle_qp_implicit(
    trajectory: PolyhedronTrajectory,
    y_bar: Array,
    gradient: Array,
    hessian: Array,
    steps: int = STEPS,
    solver: Solver = qp_solve,
    adjoint: Adjoint = qp_existing,
) -> PolyhedronCotangents:
    """Cotangents by the optimality conditions at y, for a smooth f solved to convergence: "implicit" of
    `icnnrt.mathematics.polyhedron_adjoint`.

    gradient [B, n] and hessian [B, n, n] are of f at y. Newton's program there is solved for its multipliers. θ̄ = ∇θ [
    seed'∇f(y) ]. Blind to kinks: wrong for ReLU networks, whose ∇²f is 0.
    """
    on = np.isfinite(trajectory.y).all(1) & np.isfinite(gradient).all(1) & np.isfinite(hessian).all((1, 2))
    y, H, g = (np.where(on.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0) for a in (trajectory.y, hessian, gradient))
    programs = Programs(NUMPY, trajectory.polyhedron, trajectory.mu)
    qp = programs.newton(y, g, H)
    solution = _solved(solver, qp, steps)
    d = adjoint(qp.Q, qp.G, qp.A, solution, y_bar)
    found = pulled_back(NUMPY, programs, solution, d, np.zeros((len(y), 0, programs.n)))
    cuts = CutCotangents(np.zeros((len(y), 1)), found.c_y[:, None])
    points = trajectory.y[:, None]
    return _withheld(trajectory, PolyhedronCotangents(points, cuts, found.polyhedron, found.mu[:, 0]))


def bundle_qp_models(
    trajectory: PolyhedronTrajectory, y_init: Array, steps: int = STEPS, solver: Solver = qp_solve
) -> PolyhedronTrajectory:
    """The trajectory with its projection and models, which a graph does not keep: solved once more, from the cuts."""
    projection = Programs(NUMPY, trajectory.polyhedron, trajectory.mu).projection(y_init)
    models = [Model(np.arange(len(y_init)), _solved(solver, projection, steps))]
    for k in range(1, int(trajectory.cuts.max(initial=0)) + 1):
        at = np.flatnonzero(trajectory.cuts >= k)
        programs, qp = _model(trajectory, at, k)
        slopes = np.abs(trajectory.slopes[at, :k]).max((1, 2))[:, None]
        σ = None if trajectory.mu > 0 else steepness(NUMPY, slopes)
        models.append(Model(at, programs.solved(lambda scaled: _solved(solver, scaled, steps), qp, σ)))
    return trajectory._replace(projection=models[0], models=tuple(models[1:]))


def _withheld(trajectory: PolyhedronTrajectory, found: PolyhedronCotangents) -> PolyhedronCotangents:
    """NaN throughout in samples that have one anywhere, or no y."""
    arrays = [np.array(a) for a in (*found.cuts, *found.polyhedron, found.mu)]
    bad = ~np.isfinite(trajectory.y).all(1)
    for a in arrays:
        bad |= ~np.isfinite(a).all(tuple(range(1, a.ndim)))
    for a in arrays:
        a[bad] = np.nan
    return PolyhedronCotangents(found.points, CutCotangents(*arrays[:2]), Polyhedron(*arrays[2:8]), arrays[8])


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
    """The dual value of a model at any multipliers, [B]: no feasible point of it is below; −∞ or NaN where they prove
    none. `polyhedron.Programs.bound` says why.

    slopes [B, k, n], offsets [B, k] of its cuts, lam [B, k] their multipliers, lam_rows, nu and bounds those of the
    polyhedron, y [B, n] a point of the size of the solution.
    """
    programs = Programs(NUMPY, polyhedron, mu)
    rows = np.concatenate([programs.G, programs.cut(slopes)], 1)
    heights, multipliers = (np.concatenate(pair, 1) for pair in ((programs.h, -offsets), (lam_rows, lam)))
    told = {"half": 0.5 / mu} if mu > 0 else {"steepest": np.abs(slopes).max(1)}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return np.asarray(programs.bound(rows, heights, multipliers, nu, bounds, y, **told)[:, 0])


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
    """`polyhedron.status` of samples that were run to their end, [B]. excess and violation [B] are what
    `bundle_qp_excess` tells."""
    energy, lower_bound, gap, excess, violation = (a[:, None] for a in (energy, lower_bound, gap, excess, violation))
    with np.errstate(invalid="ignore", over="ignore"):
        code = stated.status(
            *(NUMPY, y, energy, lower_bound, gap, slopes, offsets, cut_points, lam, excess, violation),
            solved=solved[:, None],
            tolerance=tolerance,
            eps=float(np.finfo(precision).eps),
            proven=proven,
        )
    return np.asarray(code[:, 0], np.int8)


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
