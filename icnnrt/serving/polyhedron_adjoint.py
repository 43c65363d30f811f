"""Gradients of a loss on y* = argmin over a polyhedron of f(x, y) + (μ/2) ‖y‖². Three adjoints of y*:

    prop3     the cuts of the model that gave y*, held fixed (Proposition 3): exact for energies of pieces (ReLU)
    implicit  the optimality conditions at y*, by hessian.onnx: exact for smooth energies (softplus) at convergence
    exact     the derivative of the iterations themselves, by pullback.onnx: for pieces the same as prop3, for smooth
              energies true of the algorithm, but not near the derivative of the argmin

adjoint_polyhedron.onnx is one of the first two, which the manifest names; the others are put together in Python.

Energies that have both kinks and curvature in y (ReLU plus squares) are served by none of them well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, choice
from icnnrt.mathematics import polyhedron_answers
from icnnrt.mathematics.bundle_qp import PolyhedronCotangents, bundle_qp_adjoint, bundle_qp_implicit, bundle_qp_models
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.status import Status
from icnnrt.serving.adjoint import ON_UNSAFE, leave_out, own
from icnnrt.serving.heads import evaluated, pulled_back, weights_bar
from icnnrt.serving.polyhedron import PolyhedronSolution, fed, programs_by
from icnnrt.serving.solution import Array, Floats, Record

if TYPE_CHECKING:
    from icnnrt.serving.session import Session

ADJOINTS: Final = ("auto", "prop3", "implicit", "exact")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ConstraintCotangents(Record):
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


def vjp(session: "Session", solution: object, y_bar: object, *, adjoint: str, on_unsafe: str) -> ConstraintCotangents:
    """`EnergySession.vjp_polyhedron` documents the arguments."""
    choice(adjoint, "adjoint", ADJOINTS)
    choice(on_unsafe, "on_unsafe", ON_UNSAFE)
    found = own(session.runner, PolyhedronSolution, "argmin_polyhedron", solution)
    ȳ = batch(y_bar, "y_bar", "float64", session.manifest.y_shape, length=len(found))
    spec = session.manifest.polyhedron
    if adjoint == "auto":
        adjoint = _right(session) if spec is None else spec.adjoint
    known = polyhedron_answers.known(found.status, found.uncertainty, found.lower_bound, adjoint)
    given = np.where(np.isfinite(ȳ), ȳ, 0.0)
    by = _by_graph if spec is not None and adjoint == spec.adjoint and len(found) else _by_method
    cotangents = by(session, found, given, known, adjoint)

    def reason(i: int) -> str:
        if known[i]:
            return f"sample {i}: a model on the way was inaccurate"
        return found.doubt(i) or found.advice(i)

    leave_out(cotangents.skipped, reason, ȳ, on_unsafe, "on_unsafe='skip' to leave them out")
    return cotangents


def _right(session: "Session") -> str:
    """The adjoint that is right for an energy, as far as its graph tells."""
    from icnnrt.convexity.piecewise import is_piecewise_linear  # a reader of graphs, needed here alone

    x0, n = np.zeros(session.manifest.x_shape), session.manifest.y_shape[0]
    pieces = is_piecewise_linear(session.package.graphs["value"], dict(session.weights), x0, n)
    return "prop3" if pieces else "implicit"


def _by_graph(
    session: "Session", solution: PolyhedronSolution, y_bar: Array, known: NDArray[np.bool_], adjoint: str
) -> ConstraintCotangents:
    """By adjoint_polyhedron.onnx."""
    T = solution.trajectory
    # The graph differentiates at CONVERGED and, but "implicit", at GAP.
    status = np.where(known, np.where(solution.status == Status.GAP, Status.GAP, Status.CONVERGED), Status.SOLVER)
    feeds = {"x": solution.x, "y": solution.y, "status": status.astype(np.int32), "y_bar": y_bar}
    feeds |= {**fed(T.polyhedron), "mu": np.array(T.mu)}
    if adjoint == "prop3":
        feeds |= {"y_init": solution.y_init, "best": T.best}
        feeds |= {"slopes": T.slopes, "offsets": T.offsets, "cut_points": T.cut_points}
    out, _ = session.runner.run("adjoint_polyhedron", feeds, made_with=solution.weights_id)
    G, h, A, b, lower, upper, mu = (out[f"{name}_bar"] for name in (*Polyhedron._fields, "mu"))
    return ConstraintCotangents(G, h, A, b, lower, upper, mu, ~out["safe"], out["x_bar"], weights_bar(out))


def _by_method(
    session: "Session", solution: PolyhedronSolution, y_bar: Array, known: NDArray[np.bool_], adjoint: str
) -> ConstraintCotangents:
    """By the method in Python, and pullback.onnx where there is one."""
    found = _cotangents(session, solution, y_bar, adjoint)
    skipped = ~known | ~np.isfinite(found.cuts.seed).all((1, 2))
    G, h, A, b, lower, upper, mu = (
        np.where(skipped.reshape(-1, *[1] * (a.ndim - 1)), np.nan, a) for a in (*found.polyhedron, found.mu)
    )
    x_bar = weights = None
    if "pullback" in session.manifest.graphs:
        x_bar, weights = _pushed(session, solution.x, found, ~skipped)
    return ConstraintCotangents(G, h, A, b, lower, upper, mu, skipped, x_bar, weights)


def _cotangents(session: "Session", solution: PolyhedronSolution, y_bar: Array, adjoint: str) -> PolyhedronCotangents:
    T, X, runner = solution.trajectory, solution.x, session.runner
    solve, _ = programs_by(session)
    if T.projection is None and adjoint != "implicit":
        T = bundle_qp_models(T, solution.y_init, solver=solve)
    if adjoint == "prop3":
        return bundle_qp_adjoint(T, y_bar, None)
    if adjoint == "implicit":
        told = evaluated(runner, "hessian", X, np.nan_to_num(solution.y))
        gradient, hessian = (told[name].astype(np.float64) for name in ("gradient", "hessian"))
        return bundle_qp_implicit(T, y_bar, gradient, hessian, solver=solve)

    def hvp(_: int, y: Array, s: Array) -> Array:
        return pulled_back(runner, X, y, np.zeros(len(y)), s).y.astype(np.float64)

    return bundle_qp_adjoint(T, y_bar, hvp)


def _pushed(
    session: "Session", X: Floats, found: PolyhedronCotangents, kept: NDArray[np.bool_]
) -> tuple[Floats, dict[str, Floats]]:
    """x̄ and θ̄ of all cuts in one call: those that count for nothing are left out."""
    offset_bar, seed = found.cuts
    counts = kept[:, None] & ((offset_bar != 0) | (seed != 0).any(2))
    b, i = np.nonzero(counts)
    pulled = pulled_back(session.runner, X[b], found.points[b, i], offset_bar[b, i], seed[b, i])
    x_bar = np.full(X.shape, np.nan, X.dtype)
    x_bar[kept] = 0
    np.add.at(x_bar, b, pulled.x)
    return x_bar, dict(pulled.weights)
