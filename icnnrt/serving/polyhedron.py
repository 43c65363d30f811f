"""y* = argmin over a polyhedron of f(x, y) + (μ/2) ‖y‖², by a package's value and gradient alone.

`icnnrt.mathematics.bundle_qp` has the method. A package with the head "polyhedron" has it as one graph,
argmin_polyhedron.onnx, and its adjoint as another, see `polyhedron_adjoint`. Elsewhere it runs in Python and float64,
one call of value.onnx and one quadratic program by the sessions of `icnnrt.qp` an iteration: slower by several times,
and with the same answers.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, finite_rows, integer, number, refused, rows, sample
from icnnrt.errors import InputError, PackageError
from icnnrt.format.manifest import MAX_ITERATIONS
from icnnrt.mathematics.bundle_qp import (
    bundle_qp_argmin,
    bundle_qp_bound,
    bundle_qp_excess,
    bundle_qp_status,
    bundle_qp_uncertainty,
)
from icnnrt.mathematics.certificate import unit
from icnnrt.mathematics.polyhedron import PolyhedronTrajectory
from icnnrt.mathematics.polyhedron_answers import answers
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.qp_reference import QPReference
from icnnrt.mathematics.status import Status, advise_polyhedron
from icnnrt.serving.domain_arguments import given_rows
from icnnrt.serving.heads import evaluated
from icnnrt.serving.quadratic_program import array_solver
from icnnrt.serving.solution import Array, EnergySolution, Floats

if TYPE_CHECKING:
    from icnnrt.serving.session import Session

ITERATIONS: Final = 100
# Of the gap, relative to max(1, |lower_bound|): what f's own rounding lets be told.
TOLERANCE: Final = {"float64": 1e-9, "float32": 1e-5}
CUTS: Final = ("slopes", "offsets", "cut_points", "lam")  # of a trajectory: an entry for each cut


def usual_settings(dtype: str) -> dict[str, Any]:
    """What `argmin` does where neither the call nor the package says otherwise."""
    return {"iterations": ITERATIONS, "mu": 1.0, "tolerance": TOLERANCE[dtype]}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PolyhedronSolution(EnergySolution):
    """y* = argmin of f(x, y) + (μ/2) ‖y‖² over {Gy <= h, Ay = b, lower <= y <= upper}; NaN where there is none.

    The length is B; `solution[i]`, a slice or a mask selects samples and gives a PolyhedronSolution of them.
    """

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
    info: Mapping[str, Any]
    """How it was computed: providers, native (whether compiled kernels ran), domain, iterations (cuts at most), mu,
    gap_tolerance, seconds."""

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
        one = self[i]
        return f"sample {i}: " + advise_polyhedron(
            Status(one.status[0]),
            gap=float(one.gap[0]),
            cuts=int(one.cuts[0]),
            uncertainty=float(one.uncertainty[0]),
        )

    def __getitem__(self, index: Any) -> "PolyhedronSolution":
        """The samples at `index` (integer, slice, mask or integer array), always with a batch dimension."""
        T, at = self.trajectory, rows(index, len(self))
        parts = {name: a[at] for name, a in T._asdict().items() if isinstance(a, np.ndarray)}
        # The models, which are made anew where they are needed, are of all samples together.
        T = T._replace(**parts, polyhedron=Polyhedron(*(a[at] for a in T.polyhedron)), projection=None, models=())
        return replace(EnergySolution.__getitem__(self, index), trajectory=T)


class _Run(NamedTuple):
    """What either way of solving gives."""

    trajectory: PolyhedronTrajectory
    multipliers: tuple[Array, Array, Array]
    """Of h, of b and of the bounds, in the last model."""
    weights_id: str
    native: bool


def argmin(
    session: "Session",
    x: object,
    constraints: Mapping[str, object],
    mu: float | None,
    iterations: int | None,
    tolerance: float | None,
    y_init: object,
) -> PolyhedronSolution:
    """`EnergySession.argmin_polyhedron` documents the arguments."""
    began = time.perf_counter()
    manifest, dtype = session.manifest, session.dtype
    n = manifest.y_shape[0]
    X = batch(x, "x", dtype, manifest.x_shape)
    B = len(X)
    usual = usual_settings(str(dtype)) if manifest.polyhedron is None else vars(manifest.polyhedron)
    K = integer(usual["iterations"] if iterations is None else iterations, "iterations", 1, MAX_ITERATIONS)
    μ = number(usual["mu"] if mu is None else mu, "mu", least=0.0)
    small = number(usual["tolerance"] if tolerance is None else tolerance, "tolerance", least=0.0)
    P = given_rows(B, n, **constraints)
    start = np.zeros((B, n)) if y_init is None else batch(y_init, "y_init", "float64", (n,), length=B)
    if not finite_rows(start).all():
        raise refused("y_init", "finite numbers", "others", "leave it out")
    by = _by_graph if B and manifest.polyhedron is not None else _by_method
    T, multipliers, weights_id, native = by(session, X, P, start, K, μ, small)
    if session.convexity.proven_with(weights_id):
        T = _convex(T, small, dtype, multipliers)
    status = session.convexity.doubted(T.status)
    if status is not T.status:
        T = T._replace(status=status, ray=np.zeros_like(T.ray))
    info = {
        "providers": session.providers,
        "native": native,
        "domain": "polyhedron",
        "iterations": K,
        "mu": μ,
        "gap_tolerance": small,
        "seconds": time.perf_counter() - began,
    }
    return PolyhedronSolution(
        *(X, T.y, T.energy, T.lower_bound, T.gap, T.residual, T.status, T.cuts, *multipliers, T.ray, T, start),
        *(weights_id, info),
    )


def _by_method(
    session: "Session", X: Floats, P: Polyhedron, start: Array, iterations: int, mu: float, tolerance: float
) -> _Run:
    """The method in Python, one call of value.onnx and one quadratic program an iteration."""
    finite = finite_rows(X)
    weights_id = session.weights_id
    run = np.where(finite.reshape(-1, *[1] * (X.ndim - 1)), X, 0)
    solve, native = programs_by(session)
    f = value_and_gradient(session, run)
    T = bundle_qp_argmin(f, P, iterations, mu, start, tolerance, solver=solve, precision=X.dtype)
    _check_same(session, weights_id)
    T, lam, nu, bounds = answers(T, finite)
    return _Run(T, (lam, nu, bounds), weights_id, native)


def _by_graph(
    session: "Session", X: Floats, P: Polyhedron, start: Array, iterations: int, mu: float, tolerance: float
) -> _Run:
    """The same by argmin_polyhedron.onnx, which looks after samples that are not finite itself."""
    settings = {"iterations": np.array(iterations), "mu": np.array(mu), "tolerance": np.array(tolerance)}
    feeds = {"x": X, "y_init": start, **fed(P), **settings}
    out, weights_id = session.runner.run("argmin_polyhedron", feeds)
    K, codes = out["slopes"].shape[1], out["status"]
    slots = {out[name].shape[1] for name in ("offsets", "cut_points", "cut_lam")}
    if slots != {K} or codes.min() < 0 or codes.max() > max(Status) or out["best"].max() > K:
        raise PackageError(
            f"{session.path}: argmin_polyhedron.onnx: its outputs do not fit each other; export the package again."
        )
    same = ("y", "energy", "lower_bound", "gap", "residual", "cuts", "best", "slopes", "offsets", "cut_points")
    T = PolyhedronTrajectory(
        **{name: out[name] for name in same},
        status=codes.astype(np.int8),
        lam=out["cut_lam"],
        ray=out.get("ray", np.zeros_like(out["y"])),
        projection=None,
        models=(),
        polyhedron=P,
        mu=mu,
    )
    multipliers = out["lam"], out["nu"], out["bounds"]
    found = _Run(T, multipliers, weights_id, session.runner.ran_native("argmin_polyhedron"))
    if "ray" in out:
        return found
    T, again = _second_look(T, tolerance, X.dtype, multipliers)
    found = found._replace(trajectory=T)
    if not again.size:
        return found
    some = Polyhedron(*(a[again] for a in P))
    part = _by_method(session, X[again], some, start[again], iterations, mu, tolerance)
    _check_same(session, weights_id)
    return _merged(found, again, part)


def _check_same(session: "Session", weights_id: str) -> None:
    if session.weights_id != weights_id:
        raise InputError("weights: they changed while the argmin was computed; call it again.")


def _convex(
    T: PolyhedronTrajectory, tolerance: float, precision: Any, multipliers: tuple[Array, Array, Array]
) -> PolyhedronTrajectory:
    """The trajectory of an f that is proven convex: where it seems to lie below its own cuts, that is rounding."""
    bent = np.flatnonzero(T.status == Status.NOT_CONVEX)
    if not bent.size:
        return T
    status = np.array(T.status)
    none = np.zeros(bent.size, bool)
    status[bent] = _judged(T, bent, tolerance, precision, multipliers, solved=none, proven=True)
    return T._replace(status=status)


def _judged(
    T: PolyhedronTrajectory,
    at: NDArray[np.int64],
    tolerance: float,
    precision: Any,
    multipliers: tuple[Array, Array, Array],
    **told: Any,
) -> NDArray[np.int8]:
    """`bundle_qp_status` of the samples `at`."""
    outside = bundle_qp_excess(T.y, T.polyhedron, *multipliers)
    numbers = T.y, T.energy, T.lower_bound, T.gap, T.slopes, T.offsets, T.cut_points, T.lam, *outside
    return bundle_qp_status(*(a[at] for a in numbers), tolerance=tolerance, precision=precision, **told)


def _second_look(
    T: PolyhedronTrajectory, tolerance: float, precision: Any, multipliers: tuple[Array, Array, Array]
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
        numbers = (a[at] for a in (T.lam, *multipliers, T.y))
        proved = bundle_qp_bound(T.slopes[at], T.offsets[at], P, 0.0, *numbers)
        with np.errstate(invalid="ignore"):
            less = proved < lower_bound[at] - tolerance * unit(lower_bound[at])
        lower_bound[at] = np.where(less, proved, lower_bound[at])
    T = T._replace(lower_bound=lower_bound, gap=T.energy - lower_bound)
    some = np.flatnonzero(told & np.isfinite(lower_bound))
    status[some] = _judged(T, some, tolerance, precision, multipliers, solved=T.status[some] <= Status.GAP)
    return T._replace(status=status), np.flatnonzero(told & ~np.isfinite(lower_bound))


def _merged(whole: _Run, at: NDArray[np.int64], part: _Run) -> _Run:
    """A run with another in the place of the samples `at`."""
    T, U = whole.trajectory, part.trajectory
    slots = max(T.offsets.shape[1], U.offsets.shape[1])

    def put(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        merged = np.array(a)
        merged[at] = b
        return merged

    def padded(name: str, a: NDArray[Any]) -> NDArray[Any]:
        """Slots beyond the cuts repeat the first, and have no multiplier."""
        if name not in CUTS:
            return a
        beyond = np.repeat(a[:, :1], slots - a.shape[1], axis=1)
        return np.concatenate((a, 0 * beyond if name == "lam" else beyond), axis=1)

    merged: dict[str, Any] = {
        name: put(padded(name, a), padded(name, getattr(U, name)))
        for name, a in T._asdict().items()
        if isinstance(a, np.ndarray)
    }
    lam, nu, bounds = (put(a, b) for a, b in zip(whole.multipliers, part.multipliers, strict=True))
    return whole._replace(trajectory=T._replace(**merged), multipliers=(lam, nu, bounds))


def fed(P: Polyhedron) -> dict[str, Array]:
    """What a graph is fed of P: of data that all samples share, [B, ...] without a stride, one row."""
    return {name: a[:1] if a.strides[0] == 0 else a for name, a in P._asdict().items()}


def programs_by(session: "Session") -> tuple[Callable[..., QPReference], bool]:
    """What solves the quadratic programs of a session's argmin, and whether that is the native kernel."""
    return array_solver(False if session.runner.options["native"] is False else None)


def value_and_gradient(session: "Session", X: Floats) -> Callable[[Array], tuple[Array, Array]]:
    """y -> f(X, y), ∇f of float64 points, by value.onnx. The graph sees ŷ, y in its own dtype; f is told at y along the
    cut that touches at ŷ, so that every cut is one of f."""

    def at(y: Array) -> tuple[Array, Array]:
        rounded = y.astype(session.dtype)
        found = evaluated(session.runner, "value", X, rounded)
        f, g = (found[name].astype(np.float64) for name in ("f", "gradient"))
        return f + (g * (y - rounded)).sum(1), g

    return at
