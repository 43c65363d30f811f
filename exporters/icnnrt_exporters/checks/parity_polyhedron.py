"""The check of the head polyhedron: its energies and its adjoint against the numpy method around torch in float64."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt.mathematics.bundle_qp import (
    PolyhedronCotangents,
    bundle_qp_adjoint,
    bundle_qp_argmin,
    bundle_qp_implicit,
    bundle_qp_models,
)
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.status import ANSWERED
from icnnrt.serving.polyhedron import PolyhedronSolution
from icnnrt_exporters.checks import by_torch
from icnnrt_exporters.checks.by_torch import Doubles


def constraints(y: NDArray[Any]) -> dict[str, Any]:
    """A row, an equality and a box around y [B, n], which meets them all."""
    Y = y.astype(np.float64)
    B, n = Y.shape
    G = np.cos(np.arange(n, dtype=np.float64) + np.arange(B)[:, None])[:, None]
    A = np.ones((B, 1, n))
    h, b = ((M @ Y[..., None])[..., 0] for M in (G, A))
    return {"G": G, "h": h + 0.05, "A": A, "b": b, "lower": Y - 0.3, "upper": Y + 0.5}


def figures(
    session: icnnrt.EnergySession, judge: nn.Module, x: Tensor, y: Tensor
) -> list[tuple[str, NDArray[Any], Tensor]]:
    """(name, what the package gives, what it should be), for one batch."""
    spec = session.manifest.polyhedron
    assert spec is not None
    given, mu = constraints(y.numpy()), spec.mu or 1.0  # the box bounds y, so μ = 0 would do, but y would not be unique
    solution = session.argmin_polyhedron(x.numpy(), **given, mu=mu)
    X = torch.from_numpy(np.array(solution.x)).double()
    true = bundle_qp_argmin(
        by_torch.of_arrays(judge, X), Polyhedron(**given), spec.iterations, mu, tolerance=spec.tolerance
    )
    both = np.isin(true.status, ANSWERED) & np.isin(solution.status, ANSWERED)
    found = [("polyhedron", solution.energy[both], torch.from_numpy(true.energy[both]))]

    y_bar = np.cos(np.arange(y.numel(), dtype=np.float64)).reshape(tuple(y.shape))
    cotangents = session.vjp_polyhedron(solution, y_bar, on_unsafe="skip")
    cuts = solution.trajectory
    met = by_torch.slopes(judge, X, np.nan_to_num(cuts.cut_points))
    kept = ~cotangents.skipped & by_torch.same_slopes(met, cuts.slopes, solution.x.dtype)
    if not kept.any() or cotangents.x is None or cotangents.weights is None:
        return found
    cotangents = session.vjp_polyhedron(
        solution, np.where(kept[:, None], y_bar, 0.0), adjoint=spec.adjoint, on_unsafe="skip"
    )
    assert cotangents.x is not None
    assert cotangents.weights is not None
    bars = _reference(judge, X, solution, y_bar, spec.adjoint)
    names = [name for name, weight in session.manifest.weights.tensors.items() if weight.trainable]
    points, offset_bar, seed = (
        np.where(kept.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0)
        for a in (bars.points, bars.cuts.offset_bar, bars.cuts.seed)
    )
    theta, x_bar, _ = by_torch.pushed(judge, X, points, offset_bar, seed, names)
    for field in (*Polyhedron._fields, "mu"):
        expected = bars.mu if field == "mu" else getattr(bars.polyhedron, field)
        found.append(("polyhedron_adjoint", getattr(cotangents, field)[kept], torch.from_numpy(expected[kept])))
    found.append(("polyhedron_adjoint", cotangents.x[kept], x_bar[torch.from_numpy(kept)]))
    found += [("polyhedron_adjoint", cotangents.weights[name], bar) for name, bar in zip(names, theta, strict=True)]
    return found


def _reference(
    judge: nn.Module, X: Tensor, solution: PolyhedronSolution, y_bar: Doubles, adjoint: str
) -> PolyhedronCotangents:
    """By numpy, from the trajectory of the graph."""
    T = bundle_qp_models(solution.trajectory, solution.y_init)
    if adjoint == "prop3":
        return bundle_qp_adjoint(T, y_bar, None)
    leaf = torch.from_numpy(np.nan_to_num(solution.y)).requires_grad_()
    g = by_torch.gradient(judge, X, leaf)[1]
    return bundle_qp_implicit(T, y_bar, g.detach().numpy(), by_torch.hessian(g, leaf).numpy())
