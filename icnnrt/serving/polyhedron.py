"""y* = argmin over a polyhedron of f(x, y) + (μ/2) ‖y‖², by a package's value and gradient alone; and gradients of it.

`icnnrt.mathematics.bundle_qp` has the method. A package with the head "polyhedron" has it as one graph,
argmin_polyhedron.onnx, and its adjoint as another. Elsewhere it runs in Python and float64, one call of value.onnx and
one quadratic program by the sessions of `icnnrt.qp` an iteration: slower by several times, and with the same answers.
Three adjoints of y*:

    prop3     the cuts of the model that gave y*, held fixed (Proposition 3): exact for energies of pieces (ReLU)
    implicit  the optimality conditions at y*, by hessian.onnx: exact for smooth energies (softplus) at convergence
    exact     the derivative of the iterations themselves, by pullback.onnx: for pieces the same as prop3, for smooth
              energies true of the algorithm, but not near the derivative of the argmin

adjoint_polyhedron.onnx is one of the first two, which the manifest names; the others are put together in Python.

Energies that have both kinks and curvature in y (ReLU plus squares) are served by none of them well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, check_finite_bar, finite_rows, integer, number, sample, untrusted
from icnnrt.errors import CertificateError, InputError, PackageError
from icnnrt.format.manifest import MAX_ITERATIONS
from icnnrt.mathematics.bundle_qp import (
    Polyhedron,
    PolyhedronCotangents,
    PolyhedronTrajectory,
    bundle_qp_adjoint,
    bundle_qp_argmin,
    bundle_qp_bound,
    bundle_qp_excess,
    bundle_qp_implicit,
    bundle_qp_models,
    bundle_qp_status,
    bundle_qp_uncertainty,
)
from icnnrt.mathematics.certificate import DIGITS, differentiable, unit
from icnnrt.mathematics.qp_reference import QPReference
from icnnrt.mathematics.status import Status, imprecise, summarise
from icnnrt.serving import adjoint as _adjoint
from icnnrt.serving.quadratic_program import _array_solver
from icnnrt.serving.solution import _Frozen

if TYPE_CHECKING:
    from icnnrt.serving.session import Session

__all__ = ["ConstraintCotangents", "PolyhedronSolution", "argmin", "evaluated", "given_rows", "vjp"]

Array = NDArray[np.float64]
Floats = NDArray[Any]

ADJOINTS: Final = ("auto", "prop3", "implicit", "exact")
ITERATIONS: Final = 100
# Of the gap, relative to max(1, |lower_bound|): what f's own rounding lets be told.
TOLERANCE: Final = {"float64": 1e-9, "float32": 1e-5}


def _usual(dtype: str) -> dict[str, Any]:
    """What `argmin` does where neither the call nor the package says otherwise."""
    return {"iterations": ITERATIONS, "mu": 1.0, "tolerance": TOLERANCE[dtype]}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PolyhedronSolution(_Frozen):
    """y* = argmin of f(x, y) + (μ/2) ‖y‖² over {Gy <= h, Ay = b, lower <= y <= upper}; NaN where there is none."""

    x: Floats
    """[B, *x_shape], the contexts as they were run, in the package's dtype."""
    y: Array
    """[B, n], the best point met, feasible to 1e-9 of the size of the constraints."""
    energy: Array
    """[B], f(x, y) + (μ/2) ‖y‖²."""
    lower_bound: Array
    """[B]: no feasible energy is below it if f is convex in y, up to the rounding of f in the package's dtype."""
    gap: Array
    """[B], energy − lower_bound."""
    residual: Array
    """[B, 3], relative stationarity, feasibility and duality gap of the last model."""
    status: NDArray[np.int8]
    """[B], a `Status` each; INFEASIBLE where no y meets the constraints, UNBOUNDED where the objective falls without
    end among those that do, SOLVER where a model could not be solved, or falls without end while f does not. Without a
    lower bound there is no answer: y is NaN."""
    cuts: NDArray[np.int64]
    """[B], how many models were solved."""
    lam: Array
    """[B, m], multipliers of Gy <= h: by how much the optimum falls if h grows."""
    nu: Array
    """[B, q], multipliers of Ay = b."""
    bound_multipliers: Array
    """[B, n], multipliers of lower and upper: > 0 at an upper, < 0 at a lower one."""
    ray: Array
    """[B, n], of an UNBOUNDED sample the direction d along which f falls; else 0. max |d| = 1, Gd <= 0 and Ad = 0 up to
    1e-8 of d, d_i >= 0 where lower_i is finite, d_i <= 0 where upper_i is. What was checked: all cuts fall along d, and
    f does so, ∇f(x, y)'d < 0, at y = y_0 + 2^60 max(1, |y_0|) d, y_0 = trajectory.cut_points[:, 0] a feasible point. If
    f is convex it falls all the way there. That it has no minimum further out is not known, as f was not seen there."""
    trajectory: PolyhedronTrajectory
    """All cuts, for the adjoints; of a graph without the models that they made."""
    y_init: Array
    """[B, n], where it started."""
    weights_id: str
    """Which weights it was computed with."""

    def __len__(self) -> int:
        return len(self.y)

    @property
    def ok(self) -> NDArray[np.bool_]:
        """[B] bool: the status is CONVERGED."""
        return self.status == Status.CONVERGED

    @property
    def uncertainty(self) -> Array:
        """[B], by how much rounding in the package's dtype may have moved the gap; NaN where there is none."""
        T = self.trajectory
        return bundle_qp_uncertainty(
            *(self.y, self.energy, self.gap, T.slopes, T.offsets, T.cut_points, T.lam, self.x.dtype)
        )

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        i = sample(i, len(self))
        status, gap, cuts = Status(self.status[i]), float(self.gap[i]), int(self.cuts[i])
        held = f"{cuts} cut{'s' * (cuts != 1)}"
        left = f"left {f'a gap of {gap:.1e}' if np.isfinite(gap) else 'no answer'}"
        told = {
            Status.CONVERGED: f"converged: a gap of {gap:.1e} after {held}",
            Status.GAP: f"{held} left a gap of {gap:.1e}: give more iterations, a larger mu or a better y_init",
            Status.SOLVER: f"after {held} a model was not solved, or falls without end where the energy does not, and "
            f"{left}: give more iterations, bound y, or raise mu",
            Status.NOT_CONVEX: "the energy lies below its own cuts, so it is not convex in y and no bound holds",
            Status.NOT_FINITE_INPUT: "x or a constraint holds NaN, or an infinity that is no absent bound: clean it",
            Status.NOT_FINITE: "the energy or its gradient is not finite: scale x, or export in float64",
            Status.INFEASIBLE: "no y meets the constraints: loosen them",
            Status.UNBOUNDED: "the energy falls along `ray`, within the constraints, as far as it was followed: "
            "bound y, or raise mu",
            Status.PRECISION: f"{held} left a gap of {gap:.1e}, but rounding may have moved it by "
            f"{float(self.uncertainty[i]):.1e}, more than the tolerance: scale x and y down, centre the energy, "
            "allow a larger tolerance, or export in float64 if it is float32",
        }[status]
        return f"sample {i}: {told}"

    def summary(self) -> str:
        """How many samples have which status, and the advice on the first of each kind that did not converge."""
        return summarise(self.status.tolist(), self.advice)

    def __repr__(self) -> str:
        head = self.summary().partition("\n")[0]
        return f"<PolyhedronSolution of {len(self)} x {self.y.shape[1]}: {head}>"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ConstraintCotangents(_Frozen):
    """The gradient of a loss on y* by everything that y* depends on."""

    G: Array
    """[B, m, n]; a datum that samples share has their sum. NaN where `skipped`, as all that follow."""
    h: Array
    """[B, m]"""
    A: Array
    """[B, q, n]"""
    b: Array
    """[B, q]"""
    lower: Array
    """[B, n]"""
    upper: Array
    """[B, n]"""
    mu: Array
    """[B]"""
    skipped: NDArray[np.bool_]
    """[B] bool: samples left out."""
    x: Floats | None
    """[B, *x_shape] in the package's dtype; None where the package has no graph for it."""
    weights: Mapping[str, Floats] | None
    """name -> array for every trainable weight, summed over the batch; None where the package has no graph for it."""


def argmin(
    session: "Session",
    x: object,
    *,
    G: object = None,
    h: object = None,
    A: object = None,
    b: object = None,
    lower: object = None,
    upper: object = None,
    mu: float | None = None,
    iterations: int | None = None,
    tolerance: float | None = None,
    y_init: object = None,
) -> PolyhedronSolution:
    """`Session.argmin_polyhedron` documents the arguments."""
    n, dtype = session.manifest.y_shape[0], session.dtype
    X = batch(x, "x", dtype, session.manifest.x_shape)
    B = len(X)
    spec = session.manifest.polyhedron
    usual = _usual(str(dtype)) if spec is None else vars(spec)
    K = integer(usual["iterations"] if iterations is None else iterations, "iterations", 1, MAX_ITERATIONS)
    μ = number(usual["mu"] if mu is None else mu, "mu", least=0.0)
    small = number(usual["tolerance"] if tolerance is None else tolerance, "tolerance", least=0.0)
    P = given_rows(B, n, G=G, h=h, A=A, b=b, lower=lower, upper=upper)
    start = np.zeros((B, n)) if y_init is None else batch(y_init, "y_init", "float64", (n,), length=B)
    if not finite_rows(start).all():
        raise InputError("y_init: expected finite numbers, but it holds others; leave it out.")
    by = _by_graph if B and session.manifest.polyhedron is not None else _by_method
    return by(session, X, P, start, K, μ, small)


def _by_method(
    session: "Session", X: Floats, P: Polyhedron, start: Array, iterations: int, mu: float, tolerance: float
) -> PolyhedronSolution:
    """The method in Python, one call of value.onnx and one quadratic program an iteration."""
    B, n = start.shape
    finite = finite_rows(X)
    weights_id = session.weights_id
    run = np.where(finite.reshape(B, *[1] * (X.ndim - 1)), X, 0)
    trajectory = bundle_qp_argmin(
        evaluated(session, run), P, iterations, mu, start, tolerance, solver=_solver(session), precision=X.dtype
    )
    if session.weights_id != weights_id:
        raise InputError("weights: they changed while the argmin was computed; call it again.")
    lam, nu, bounds = np.zeros(P.h.shape), np.zeros(P.b.shape), np.zeros((B, n))
    for k, model in enumerate(trajectory.models, start=1):
        on = trajectory.cuts[model.samples] == k
        at, s = model.samples[on], model.solution
        lam[at], nu[at], bounds[at] = s.lam[on, k:], s.nu[on], s.mu[on, :n]
    bad = ~finite | ~np.isfinite(trajectory.y).all(1)
    y, energy, lower_bound, gap, residual, lam, nu, bounds = (
        np.where(bad.reshape(B, *[1] * (a.ndim - 1)), np.nan, a) for a in (*trajectory[:5], lam, nu, bounds)
    )
    trajectory = trajectory._replace(
        y=y,
        energy=energy,
        lower_bound=lower_bound,
        gap=gap,
        residual=residual,
        status=np.where(finite, trajectory.status, Status.NOT_FINITE_INPUT).astype(np.int8),
        cuts=np.where(finite, trajectory.cuts, 0),
        ray=np.where(finite[:, None], trajectory.ray, 0.0),
    )
    if session._is_proven(weights_id):
        trajectory = _convex(trajectory, tolerance, X.dtype, lam, nu, bounds)
    return _solution(X, trajectory, lam, nu, bounds, start, weights_id)


def _solution(
    X: Floats, T: PolyhedronTrajectory, lam: Array, nu: Array, bounds: Array, start: Array, weights_id: str
) -> PolyhedronSolution:
    return PolyhedronSolution(
        *(X, T.y, T.energy, T.lower_bound, T.gap, T.residual, T.status, T.cuts, lam, nu, bounds, T.ray),
        *(T, start, weights_id),
    )


def _by_graph(
    session: "Session", X: Floats, P: Polyhedron, start: Array, iterations: int, mu: float, tolerance: float
) -> PolyhedronSolution:
    """The same by argmin_polyhedron.onnx, which looks after samples that are not finite itself."""
    settings = {"iterations": np.array(iterations), "mu": np.array(mu), "tolerance": np.array(tolerance)}
    feeds = {"x": X, "y_init": start, **_fed(P), **settings}
    out, weights_id = session._runner.run("argmin_polyhedron", feeds)
    K, codes = out["slopes"].shape[1], out["status"]
    slots = {out[name].shape[1] for name in ("offsets", "cut_points", "cut_lam")}
    if slots != {K} or codes.min() < 0 or codes.max() > max(Status) or out["best"].max() > K:
        raise PackageError(
            f"{session.path}: argmin_polyhedron.onnx: its outputs do not fit each other; export the package again."
        )
    trajectory = PolyhedronTrajectory(
        y=out["y"],
        energy=out["energy"],
        lower_bound=out["lower_bound"],
        gap=out["gap"],
        residual=out["residual"],
        status=codes.astype(np.int8),
        cuts=out["cuts"],
        best=out["best"],
        slopes=out["slopes"],
        offsets=out["offsets"],
        cut_points=out["cut_points"],
        lam=out["cut_lam"],
        ray=out.get("ray", np.zeros_like(out["y"])),
        projection=None,
        models=(),
        polyhedron=P,
        mu=mu,
    )
    multipliers = out["lam"], out["nu"], out["bounds"]
    again = np.zeros(0, np.int64)
    if "ray" not in out:
        trajectory, again = _second_look(trajectory, tolerance, X.dtype, *multipliers)
    if session._is_proven(weights_id):
        trajectory = _convex(trajectory, tolerance, X.dtype, *multipliers)
    solution = _solution(X, trajectory, *multipliers, start, weights_id)
    if again.size:
        some = Polyhedron(*(a[again] for a in P))
        part = _by_method(session, X[again], some, start[again], iterations, mu, tolerance)
        if part.weights_id != weights_id:
            raise InputError("weights: they changed while the argmin was computed; call it again.")
        solution = _with(solution, again, part)
    return solution


def _convex(
    T: PolyhedronTrajectory, tolerance: float, precision: Any, lam: Array, nu: Array, bounds: Array
) -> PolyhedronTrajectory:
    """The trajectory of an f that is proven convex: where it seems to lie below its own cuts, that is rounding."""
    bent = T.status == Status.NOT_CONVEX
    if not bent.any():
        return T
    outside = bundle_qp_excess(T.y, T.polyhedron, lam, nu, bounds)
    judged = T.y, T.energy, T.lower_bound, T.gap, T.slopes, T.offsets, T.cut_points, T.lam, *outside
    status = np.array(T.status)
    status[bent] = bundle_qp_status(
        *(a[bent] for a in judged),
        solved=np.zeros(int(bent.sum()), bool),
        tolerance=tolerance,
        precision=precision,
        proven=True,
    )
    return T._replace(status=status)


def _second_look(
    T: PolyhedronTrajectory, tolerance: float, precision: Any, lam: Array, nu: Array, bounds: Array
) -> tuple[PolyhedronTrajectory, NDArray[np.int64]]:
    """What a graph of before there were rays handed out, judged by these numbers as the method judges now; and which
    samples have no lower bound, so that only the method itself can tell what becomes of them.

    With μ = 0 such a graph took whatever its multipliers left of stationarity for rounding, however much it was against
    the slopes, so that its lower bound may be none; and it gave up where a model fell without end.
    """
    status, lower_bound = np.array(T.status), np.array(T.lower_bound)
    told = status <= Status.NOT_CONVEX
    at = np.flatnonzero(told & (T.mu == 0))
    if at.size:
        P = Polyhedron(*(a[at] for a in T.polyhedron))
        multipliers = T.lam[at], lam[at], nu[at], bounds[at]
        proved = bundle_qp_bound(T.slopes[at], T.offsets[at], P, 0.0, *multipliers, T.y[at])
        with np.errstate(invalid="ignore"):
            less = proved < lower_bound[at] - tolerance * unit(lower_bound[at])
        lower_bound[at] = np.where(less, proved, lower_bound[at])
    gap = T.energy - lower_bound
    some = np.flatnonzero(told & np.isfinite(lower_bound))
    outside = bundle_qp_excess(T.y, T.polyhedron, lam, nu, bounds)
    judged = T.y, T.energy, lower_bound, gap, T.slopes, T.offsets, T.cut_points, T.lam, *outside
    status[some] = bundle_qp_status(
        *(a[some] for a in judged),
        solved=T.status[some] <= Status.GAP,
        tolerance=tolerance,
        precision=precision,
    )
    without = np.flatnonzero(told & ~np.isfinite(lower_bound))
    return T._replace(lower_bound=lower_bound, gap=gap, status=status), without


def _with(solution: PolyhedronSolution, at: NDArray[np.int64], part: PolyhedronSolution) -> PolyhedronSolution:
    """The solution with another in the place of the samples `at`."""

    def put(whole: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        merged = np.array(whole)
        merged[at] = other
        return merged

    T, U = solution.trajectory, part.trajectory
    slots = np.arange(max(T.offsets.shape[1], U.offsets.shape[1]))  # slots beyond the cuts repeat the first

    def put_cuts(whole: Array, other: Array) -> Array:
        return put(*(a[:, np.where(slots < a.shape[1], slots, 0)] for a in (whole, other)))

    lam = put(*(np.where(slots < a.shape[1], a[:, np.minimum(slots, a.shape[1] - 1)], 0.0) for a in (T.lam, U.lam)))
    trajectory = T._replace(
        y=put(T.y, U.y),
        energy=put(T.energy, U.energy),
        lower_bound=put(T.lower_bound, U.lower_bound),
        gap=put(T.gap, U.gap),
        residual=put(T.residual, U.residual),
        status=put(T.status, U.status),
        cuts=put(T.cuts, U.cuts),
        best=put(T.best, U.best),
        slopes=put_cuts(T.slopes, U.slopes),
        offsets=put_cuts(T.offsets, U.offsets),
        cut_points=put_cuts(T.cut_points, U.cut_points),
        lam=lam,
        ray=put(T.ray, U.ray),
    )
    lam, nu, bounds = (
        put(solution.lam, part.lam),
        put(solution.nu, part.nu),
        put(solution.bound_multipliers, part.bound_multipliers),
    )
    return _solution(solution.x, trajectory, lam, nu, bounds, solution.y_init, solution.weights_id)


def _fed(P: Polyhedron) -> dict[str, Array]:
    """What a graph is fed of P: of data that all samples share, [B, ...] without a stride, one row."""
    return {name: a[:1] if a.strides[0] == 0 else a for name, a in P._asdict().items()}


def vjp(
    session: "Session", solution: PolyhedronSolution, y_bar: object, *, adjoint: str, on_unsafe: str
) -> ConstraintCotangents:
    """`Session.vjp_polyhedron` documents the arguments."""
    for argument, value, allowed in (("adjoint", adjoint, ADJOINTS), ("on_unsafe", on_unsafe, ("raise", "skip"))):
        if not isinstance(value, str) or value not in allowed:
            raise InputError(f"{argument}: expected one of {', '.join(map(repr, allowed))}, but got {value!r}.")
    if not isinstance(solution, PolyhedronSolution):
        raise InputError(
            f"solution: expected what session.argmin_polyhedron returned, but got {type(solution).__name__}."
        )
    if solution.weights_id != session.weights_id:
        raise InputError("solution: it was computed with other weights; call argmin_polyhedron again.")
    graphs, n = session.manifest.graphs, session.manifest.y_shape[0]
    ȳ = batch(y_bar, "y_bar", "float64", (n,), length=len(solution))
    spec = session.manifest.polyhedron
    if adjoint == "auto" and spec is not None:
        adjoint = spec.adjoint
    elif adjoint == "auto":
        from icnnrt.convexity.piecewise import is_piecewise_linear  # a reader of graphs, needed here alone

        x0 = np.zeros(session.manifest.x_shape)
        pieces = is_piecewise_linear(session._package.graphs["value"], dict(session.weights), x0, n)
        adjoint = "prop3" if pieces else "implicit"
    known = differentiable(solution.status, solution.uncertainty, solution.lower_bound)
    known &= (adjoint != "implicit") | (solution.status != Status.GAP)
    given = np.where(np.isfinite(ȳ), ȳ, 0.0)
    by_graph = spec is not None and adjoint == spec.adjoint and len(solution) > 0
    if by_graph:
        told = _cotangents_by_graph(session, solution, given, known)
        skipped = told.skipped
    else:
        found = _cotangents(session, solution, given, adjoint)
        skipped = ~known | ~np.isfinite(found.cuts.seed).all((1, 2))
    if on_unsafe == "raise" and skipped.any():

        def reason(i: int) -> str:
            if known[i]:
                return f"sample {i}: a model on the way was inaccurate"
            doubt, most = float(solution.uncertainty[i]), DIGITS * float(unit(solution.lower_bound[i]))
            if doubt > most and solution.status[i] in (Status.CONVERGED, Status.GAP, Status.PRECISION):
                return f"sample {i}: {imprecise(doubt, most, str(solution.x.dtype))}"
            return solution.advice(i)

        raise CertificateError(untrusted(skipped, reason, "on_unsafe='skip' to leave them out"))
    check_finite_bar(ȳ, skipped)
    if by_graph:
        return told
    constraints = [np.where(skipped.reshape(-1, *[1] * (a.ndim - 1)), np.nan, a) for a in found.polyhedron]
    mu = np.where(skipped, np.nan, found.mu)
    x_bar = weights = None
    if "pullback" in graphs:
        x_bar, weights = _pushed(session, solution.x, found, ~skipped)
    G, h, A, b, lower, upper = constraints
    return ConstraintCotangents(G, h, A, b, lower, upper, mu, skipped, x_bar, weights)


def given_rows(B: int, n: int, **given: object) -> Polyhedron:
    """G, h, A, b, lower and upper, any of them None, as a polyhedron of B samples in float64.

    Each may be that of one sample, which then all share; bounds may be one number. Raises `InputError`.
    """
    arrays = {
        "lower": _rows("lower", -np.inf if given["lower"] is None else given["lower"], B, (n,), bound=True),
        "upper": _rows("upper", np.inf if given["upper"] is None else given["upper"], B, (n,), bound=True),
    }
    for left, right in (("G", "h"), ("A", "b")):
        M, v = given[left], given[right]
        if (M is None) != (v is None):
            raise InputError(f"{left}, {right}: expected both or neither, but got one of them.")
        matrix = _rows(left, np.zeros((0, n)) if M is None else M, B, (None, n))
        arrays |= {left: matrix, right: _rows(right, np.zeros(0) if v is None else v, B, matrix.shape[1:2])}
    return Polyhedron(**arrays)


def _rows(name: str, value: object, B: int, shape: tuple[int | None, ...], *, bound: bool = False) -> Array:
    """[B, *shape] in float64, from that, from [*shape] for all samples, or, of a bound, from one number."""
    try:
        if np.asarray(value).dtype.kind not in "fiub":  # of text numpy would make numbers
            raise TypeError("not of real numbers")
        array = np.array(value, np.float64)  # a copy: a solution keeps it, and callers write in theirs
        came = list(array.shape)  # before it is made to fit
    except Exception as error:  # an object may have an idea of its own of what it is as an array
        raise InputError(f"{name}: expected numbers, but got {type(value).__name__} ({error}).") from error
    if bound and array.ndim == 0:
        array = np.full((1, *(s or 0 for s in shape)), array)
    elif array.ndim == len(shape):
        array = array[None]
    if array.shape[:1] == (1,) != (B,):
        array = np.broadcast_to(array, (B, *array.shape[1:]))
    fits = array.ndim == len(shape) + 1 and array.shape[0] == B
    if not fits or any(s is not None and s != came for s, came in zip(shape, array.shape[1:], strict=True)):
        wanted = ", ".join("rows" if s is None else str(s) for s in shape)
        raise InputError(f"{name}: expected shape [{wanted}] or [{B}, {wanted}], but got {came}.")
    if np.isnan(array).any() or (not bound and name != "h" and np.isinf(array).any()):
        raise InputError(f"{name}: expected finite numbers, but it holds NaN or infinity; leave out what is no bound.")
    return array


def _solver(session: "Session") -> Callable[..., QPReference]:
    return _array_solver(False if session._native is False else None)


def evaluated(session: "Session", X: Floats) -> Callable[[Array], tuple[Array, Array]]:
    """y -> f(X, y), ∇f of float64 points, by value.onnx. The graph sees ŷ, y in its own dtype; f is told at y along the
    cut that touches at ŷ, so that every cut is one of f."""

    def value_and_gradient(y: Array) -> tuple[Array, Array]:
        rounded = y.astype(session.dtype)
        f, g = (a.astype(np.float64) for a in session.value_and_gradient(X, rounded))
        return f + (g * (y - rounded)).sum(1), g

    return value_and_gradient


def _cotangents(session: "Session", solution: PolyhedronSolution, y_bar: Array, adjoint: str) -> PolyhedronCotangents:
    T, X = solution.trajectory, solution.x
    if T.projection is None and adjoint != "implicit":
        T = bundle_qp_models(T, solution.y_init, solver=_solver(session))
    if adjoint == "prop3":
        return bundle_qp_adjoint(T, y_bar, None)
    if adjoint == "implicit":
        _, gradient, hessian = session.value_gradient_hessian(X, np.nan_to_num(solution.y))
        return bundle_qp_implicit(
            T, y_bar, gradient.astype(np.float64), hessian.astype(np.float64), solver=_solver(session)
        )

    def hvp(_: int, y: Array, s: Array) -> Array:
        return session.pullback(X, y, np.zeros(len(y)), s).y.astype(np.float64)

    return bundle_qp_adjoint(T, y_bar, hvp)


def _cotangents_by_graph(
    session: "Session", solution: PolyhedronSolution, y_bar: Array, known: NDArray[np.bool_]
) -> ConstraintCotangents:
    T = solution.trajectory
    # The graph differentiates at CONVERGED and, but "implicit", at GAP.
    status = np.where(known, np.where(solution.status == Status.GAP, Status.GAP, Status.CONVERGED), Status.SOLVER)
    feeds = {
        **{"x": solution.x, "y": solution.y, "status": status.astype(np.int32), "y_bar": y_bar},
        **_fed(T.polyhedron),
        **{"mu": np.array(T.mu)},
    }
    assert session.manifest.polyhedron is not None
    if session.manifest.polyhedron.adjoint == "prop3":
        feeds |= {"y_init": solution.y_init, "best": T.best}
        feeds |= {"slopes": T.slopes, "offsets": T.offsets, "cut_points": T.cut_points}
    out, _ = session._runner.run("adjoint_polyhedron", feeds, made_with=solution.weights_id)
    G, h, A, b, lower, upper, mu = (out[f"{name}_bar"] for name in (*Polyhedron._fields, "mu"))
    weights = _adjoint.weights_bar(out)
    return ConstraintCotangents(G, h, A, b, lower, upper, mu, ~out["safe"], out["x_bar"], weights)


def _pushed(
    session: "Session", X: Floats, found: PolyhedronCotangents, kept: NDArray[np.bool_]
) -> tuple[Floats, dict[str, Floats]]:
    """x̄ and θ̄ of all cuts in one call: those that count for nothing are left out."""
    offset_bar, seed = found.cuts
    counts = kept[:, None] & ((offset_bar != 0) | (seed != 0).any(2))
    b, i = np.nonzero(counts)
    pulled = session.pullback(X[b], found.points[b, i], offset_bar[b, i], seed[b, i])
    x_bar = np.full(X.shape, np.nan, X.dtype)
    x_bar[kept] = 0
    np.add.at(x_bar, b, pulled.x)
    return x_bar, dict(pulled.weights)
