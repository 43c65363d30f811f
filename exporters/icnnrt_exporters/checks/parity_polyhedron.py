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
from icnnrt_exporters.checks.true_hessian import true_gradient, true_hessian

Array = NDArray[np.float64]


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

    def value_and_gradient(y: Array) -> tuple[Array, Array]:
        f, g = true_gradient(judge, X, torch.from_numpy(np.ascontiguousarray(y)).requires_grad_())
        return f.detach().numpy(), g.detach().numpy()

    true = bundle_qp_argmin(value_and_gradient, Polyhedron(**given), spec.iterations, mu, tolerance=spec.tolerance)
    both = np.isin(true.status, ANSWERED) & np.isin(solution.status, ANSWERED)
    found = [("polyhedron", solution.energy[both], torch.from_numpy(true.energy[both]))]

    y_bar = np.cos(np.arange(y.numel(), dtype=np.float64)).reshape(tuple(y.shape))
    cotangents = session.vjp_polyhedron(solution, y_bar, on_unsafe="skip")
    # Where a cut stands on a kink to the last bit, torch may meet the other face: no figure of the package's.
    kept = ~cotangents.skipped & _same_slopes(judge, X, solution)
    if not kept.any() or cotangents.x is None or cotangents.weights is None:
        return found
    cotangents = session.vjp_polyhedron(
        solution, np.where(kept[:, None], y_bar, 0.0), adjoint=spec.adjoint, on_unsafe="skip"
    )
    assert cotangents.x is not None
    assert cotangents.weights is not None
    bars = _reference(judge, X, solution, y_bar, spec.adjoint)
    names = [name for name, weight in session.manifest.weights.tensors.items() if weight.trainable]
    theta, x_bar = _pushed(judge, X, bars, names, kept)
    for field in (*Polyhedron._fields, "mu"):
        expected = bars.mu if field == "mu" else getattr(bars.polyhedron, field)
        found.append(("polyhedron_adjoint", getattr(cotangents, field)[kept], torch.from_numpy(expected[kept])))
    found.append(("polyhedron_adjoint", cotangents.x[kept], x_bar[torch.from_numpy(kept)]))
    found += [("polyhedron_adjoint", cotangents.weights[name], bar) for name, bar in zip(names, theta, strict=True)]
    return found


def _same_slopes(judge: nn.Module, X: Tensor, solution: PolyhedronSolution) -> NDArray[np.bool_]:
    """[B] bool: torch meets the slopes of the cuts at the cut points."""
    T = solution.trajectory
    B, K, n = T.cut_points.shape
    points = torch.from_numpy(np.nan_to_num(T.cut_points).reshape(B * K, n)).requires_grad_()
    met = true_gradient(judge, X.repeat_interleave(K, 0), points)[1].detach().numpy().reshape(B, K, n)
    apart = np.abs(met - T.slopes).max((1, 2)) / np.maximum(1.0, np.abs(met).max((1, 2)))
    same: NDArray[np.bool_] = apart <= np.sqrt(np.finfo(solution.x.dtype).eps)
    return same


def _reference(
    judge: nn.Module, X: Tensor, solution: PolyhedronSolution, y_bar: Array, adjoint: str
) -> PolyhedronCotangents:
    """By numpy, from the trajectory of the graph."""
    T = bundle_qp_models(solution.trajectory, solution.y_init)
    if adjoint == "prop3":
        return bundle_qp_adjoint(T, y_bar, None)
    leaf = torch.from_numpy(np.nan_to_num(solution.y)).requires_grad_()
    g = true_gradient(judge, X, leaf)[1]
    return bundle_qp_implicit(T, y_bar, g.detach().numpy(), true_hessian(g, leaf).numpy())


def _pushed(
    judge: nn.Module, X: Tensor, bars: PolyhedronCotangents, names: list[str], kept: NDArray[np.bool_]
) -> tuple[list[Tensor], Tensor]:
    """θ̄ and x̄ by torch, of the samples that are kept."""
    B, J, _ = bars.points.shape

    def flat(a: Array) -> Tensor:
        held = np.where(kept.reshape(B, *[1] * (a.ndim - 1)), a, 0.0)
        return torch.from_numpy(np.ascontiguousarray(held.reshape(B * J, *a.shape[2:])))

    context = X.clone().requires_grad_()
    f, g = true_gradient(judge, context.repeat_interleave(J, 0), flat(bars.points).requires_grad_())
    paired = (flat(bars.cuts.offset_bar) * f).sum() + (flat(bars.cuts.seed) * g).sum()
    parameters = dict(judge.named_parameters(remove_duplicate=False))
    *theta, x_bar = torch.autograd.grad(
        paired, [*(parameters[name] for name in names), context], materialize_grads=True
    )
    return theta, x_bar
