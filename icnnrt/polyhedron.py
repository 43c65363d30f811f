"""y* = argmin over a polyhedron of f(x, y) + (μ/2) ‖y‖², by a package's value and gradient alone; and gradients of it.

`icnnrt.bundle_qp` has the method. A package with the head "polyhedron" has it as one graph, argmin_polyhedron.onnx,
and its adjoint as another. Elsewhere it runs in Python and float64, one call of value.onnx and one quadratic program by
the sessions of `icnnrt.qp` an iteration: slower by several times, and with the same answers. Three adjoints of y*:

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

from icnnrt import adjoint as _adjoint
from icnnrt._arguments import batch, check_finite_bar, finite_rows, integer, number, sample, untrusted
from icnnrt._piecewise import is_piecewise_linear
from icnnrt.bundle_qp import (
    Polyhedron,
    PolyhedronCotangents,
    PolyhedronTrajectory,
    bundle_qp_adjoint,
    bundle_qp_argmin,
    bundle_qp_implicit,
    bundle_qp_models,
)
from icnnrt.errors import CertificateError, InputError, PackageError
from icnnrt.manifest import MAX_ITERATIONS
from icnnrt.qp_reference import QPReference
from icnnrt.quadratic_program import _array_solver
from icnnrt.solution import _Frozen
from icnnrt.status import Status, summarise

if TYPE_CHECKING:
    from icnnrt.session import Session

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
    """[B], a `Status` each; EMPTY_DOMAIN where no y meets the constraints, SOLVER where the objective falls without end
    among those that do, or a model could not be solved. Without any lower bound there is no answer: y is NaN."""
    cuts: NDArray[np.int64]
    """[B], how many models were solved."""
    lam: Array
    """[B, m], multipliers of Gy <= h: by how much the optimum falls if h grows."""
    nu: Array
    """[B, q], multipliers of Ay = b."""
    bounds: Array
    """[B, n], multipliers of the bounds: > 0 at an upper, < 0 at a lower one."""
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

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        i = sample(i, len(self))
        status, gap, cuts = Status(self.status[i]), float(self.gap[i]), int(self.cuts[i])
        held = f"{cuts} cut{'s' * (cuts != 1)}"
        unbounded = f"the model of {cuts + 1} cut{'s' * (cuts > 0)} was not solved, or falls without end"
        told = {
            Status.CONVERGED: f"converged: a gap of {gap:.1e} after {held}",
            Status.GAP: f"{held} left a gap of {gap:.1e}: give more iterations, a larger mu or a better y_init",
            Status.SOLVER: f"{unbounded}, and left {f'a gap of {gap:.1e}' if np.isfinite(gap) else 'no answer'}: "
            "bound y, or raise mu",
            Status.NOT_CONVEX: "the energy lies below its own cuts, so it is not convex in y and no bound holds",
            Status.NOT_FINITE_INPUT: "x or a constraint holds NaN, or an infinity that is no absent bound: clean it",
            Status.NOT_FINITE: "the energy or its gradient is not finite: scale x, or export in float64",
            Status.EMPTY_DOMAIN: "no y meets the constraints: loosen them",
        }[status]
        return f"sample {i}: {told}"

    def summary(self) -> str:
        """How many samples have which status, and the advice on the first of each kind that did not converge."""
        return summarise(self.status.tolist(), Status, self.advice)

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
    if B and session.manifest.polyhedron is not None:
        return _by_graph(session, X, P, start, K, μ, small)
    finite = finite_rows(X)
    weights_id = session.weights_id
    run = np.where(finite.reshape(B, *[1] * (X.ndim - 1)), X, 0)
    trajectory = bundle_qp_argmin(
        evaluated(session, run), P, K, μ, start, small, solver=_solver(session), precision=dtype
    )
    if session.weights_id != weights_id:
        raise InputError("weights: they changed while the argmin was computed; call it again.")
    lam, nu, bounds = np.zeros(P.h.shape), np.zeros(P.b.shape), np.zeros((B, n))
    for k, model in enumerate(trajectory.models, start=1):
        on = trajectory.cuts[model.samples] == k
        at, s = model.samples[on], model.solution
        lam[at], nu[at], bounds[at] = s.lam[on, k:], s.nu[on], s.mu[on, :n]
    bad = ~finite | ~np.isfinite(trajectory.y).all(1)
    arrays = (
        trajectory.y,
        trajectory.energy,
        trajectory.lower_bound,
        trajectory.gap,
        trajectory.residual,
        lam,
        nu,
        bounds,
    )
    y, energy, lower_bound, gap, residual, lam, nu, bounds = (
        np.where(bad.reshape(B, *[1] * (a.ndim - 1)), np.nan, a) for a in arrays
    )
    status = np.where(finite, trajectory.status, Status.NOT_FINITE_INPUT).astype(np.int8)
    return PolyhedronSolution(
        X,
        y,
        energy,
        lower_bound,
        gap,
        residual,
        status,
        np.where(finite, trajectory.cuts, 0),
        lam,
        nu,
        bounds,
        trajectory._replace(y=y),
        start,
        weights_id,
    )


def _by_graph(
    session: "Session", X: Floats, P: Polyhedron, start: Array, iterations: int, mu: float, tolerance: float
) -> PolyhedronSolution:
    """The same by argmin_polyhedron.onnx, which looks after samples that are not finite itself."""
    settings = {"iterations": np.array(iterations), "mu": np.array(mu), "tolerance": np.array(tolerance)}
    feeds = {"x": X, "y_init": start, **_fed(P), **settings}
    out, weights_id = session._runner.run("argmin_polyhedron", feeds)
    y, energy, lower_bound, gap, residual, cuts = (
        out[name] for name in ("y", "energy", "lower_bound", "gap", "residual", "cuts")
    )
    K, codes = out["slopes"].shape[1], out["status"]
    slots = {out[name].shape[1] for name in ("offsets", "cut_points", "cut_lam")}
    if slots != {K} or codes.min() < 0 or codes.max() > max(Status) or out["best"].max() > K:
        raise PackageError(
            f"{session.path}: argmin_polyhedron.onnx: its outputs do not fit each other; export the package again."
        )
    status = codes.astype(np.int8)
    best, slopes, offsets, points, lam = (out[name] for name in ("best", "slopes", "offsets", "cut_points", "cut_lam"))
    trajectory = PolyhedronTrajectory(
        *(y, energy, lower_bound, gap, residual, status, cuts, best, slopes, offsets, points, lam),
        projection=None,
        models=(),
        polyhedron=P,
        mu=mu,
    )
    return PolyhedronSolution(
        *(X, y, energy, lower_bound, gap, residual, status, cuts, out["lam"], out["nu"], out["bounds"]),
        *(trajectory, start, weights_id),
    )


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
        x0 = np.zeros(session.manifest.x_shape)
        pieces = is_piecewise_linear(session._package.graphs["value"], dict(session.weights), x0, n)
        adjoint = "prop3" if pieces else "implicit"
    worst = Status.CONVERGED if adjoint == "implicit" else Status.GAP
    given = np.where(np.isfinite(ȳ), ȳ, 0.0)
    by_graph = spec is not None and adjoint == spec.adjoint and len(solution) > 0
    if by_graph:
        told = _cotangents_by_graph(session, solution, given)
        skipped = told.skipped
    else:
        found = _cotangents(session, solution, given, adjoint)
        skipped = (solution.status > worst) | ~np.isfinite(found.cuts.seed).all((1, 2))
    if on_unsafe == "raise" and skipped.any():

        def reason(i: int) -> str:
            if solution.status[i] > worst:
                return solution.advice(i)
            return f"sample {i}: a model on the way was inaccurate"

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

    def hvp(y: Array, s: Array) -> Array:
        return session.pullback(X, y, np.zeros(len(y)), s).y.astype(np.float64)

    return bundle_qp_adjoint(T, y_bar, hvp)


def _cotangents_by_graph(session: "Session", solution: PolyhedronSolution, y_bar: Array) -> ConstraintCotangents:
    T = solution.trajectory
    feeds = {
        **{"x": solution.x, "y": solution.y, "status": solution.status.astype(np.int32), "y_bar": y_bar},
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
