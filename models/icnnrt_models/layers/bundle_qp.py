"""The bundle method over a polyhedron for energies in torch: `icnnrt.mathematics.bundle_qp`, with tensors in and out.

The energy alone runs in torch, on its device. The programs of an iteration are small, have statuses that are asked one
by one, and are solved where that is done: on the CPU, by the native kernels where there are any. Everything is float64.
Nothing here is recorded by autograd.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icnnrt.mathematics import bundle_qp as stated
from icnnrt.mathematics import qp_reference
from icnnrt.mathematics.bundle_qp import Polyhedron, PolyhedronTrajectory
from icnnrt.mathematics.qp_reference import QP, QPCotangents, QPReference
from icnnrt_models.layers import quadratic_program

__all__ = ["PolyhedronCotangents", "bundle_qp_adjoint", "bundle_qp_argmin", "bundle_qp_implicit", "on"]

Array = NDArray[np.float64]


class PolyhedronCotangents(NamedTuple):
    """∂ℓ/∂ of all that the answer depends on; NaN where a program on the way was not SOLVED."""

    offset_bar: Tensor  # [B, J]: θ̄ = Σ_i ∇θ [ offset_bar_i f(y_i) + seed_i'∇f(y_i) ], x̄ likewise
    seed: Tensor  # [B, J, n]
    polyhedron: tuple[Tensor, ...]  # of G, h, A, b, lower, upper


def bundle_qp_argmin(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    polyhedron: tuple[Tensor, ...],
    iterations: int,
    mu: float,
    y_init: Tensor,
    tolerance: float,
    precision: torch.dtype,
) -> PolyhedronTrajectory:
    """At most K = iterations >= 1 cuts over the polyhedron (G, h, A, b, lower, upper), as arrays.

    value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n]), of a float64 y; rows of samples that are done or have no answer
    may be anything there and are not looked at. precision: the dtype that f is computed in.
    """

    def of_arrays(y: Array) -> tuple[Array, Array]:
        f, g = value_and_gradient(on(y_init, y))
        return _array(f), _array(g)

    return stated.bundle_qp_argmin(
        of_arrays,
        Polyhedron(*map(_array, polyhedron)),
        iterations,
        mu,
        _array(y_init),
        tolerance,
        solver=_solve,
        precision=np.float32 if precision == torch.float32 else np.float64,
    )


def bundle_qp_adjoint(
    trajectory: PolyhedronTrajectory, y_bar: Tensor, hvp: Callable[[int, Tensor], Tensor] | None
) -> PolyhedronCotangents:
    """Cotangents of cuts and constraints for a loss with ∂ℓ/∂y = ȳ; hvp(i, s) is ∇²f(y_i) s, i the index of the cut."""

    def of_arrays(i: int, y: Array, s: Array) -> Array:
        assert hvp is not None
        return _array(hvp(i, on(y_bar, s)))

    product = None if hvp is None else of_arrays
    return _on(y_bar, stated.bundle_qp_adjoint(trajectory, _array(y_bar), product, _differentiate))


def bundle_qp_implicit(
    trajectory: PolyhedronTrajectory, y_bar: Tensor, gradient: Tensor, hessian: Tensor
) -> PolyhedronCotangents:
    """Cotangents by the optimality conditions at y, gradient [B, n] and hessian [B, n, n] those of f there."""
    bar, g, H = (_array(a) for a in (y_bar, gradient, hessian))
    return _on(y_bar, stated.bundle_qp_implicit(trajectory, bar, g, H, solver=_solve, adjoint=_differentiate))


def on(like: Tensor, a: NDArray[np.generic]) -> Tensor:
    """An array on the device of a tensor."""
    return torch.from_numpy(np.ascontiguousarray(a)).to(like.device)


def _array(t: Tensor) -> Array:
    return t.detach().double().numpy(force=True)


def _on(like: Tensor, found: stated.PolyhedronCotangents) -> PolyhedronCotangents:
    cuts = found.cuts
    return PolyhedronCotangents(
        on(like, cuts.offset_bar), on(like, cuts.seed), tuple(on(like, a) for a in found.polyhedron)
    )


def _solve(qp: QP, start: tuple[Array, ...] | None, steps: int = qp_reference.STEPS) -> QPReference:
    """By the native kernel where there is one, else as stated."""
    found = quadratic_program.kernels(torch.float64, steps)
    if found is None:
        return qp_reference.qp_solve(qp, start, steps)  # type: ignore[arg-type]
    row = np.empty((1, 0)) if start is None else np.concatenate(start, axis=1)
    return QPReference(*found.solve((*qp, row)))


def _differentiate(Q: Array, G: Array, A: Array, solution: QPReference, z_bar: Array) -> QPCotangents:
    found = quadratic_program.kernels(torch.float64, qp_reference.STEPS)
    if found is None:
        return qp_reference.qp_adjoint(Q, G, A, solution, z_bar)
    s, none = solution, np.empty((1, 0))
    given = (Q, G, A, s.lam, s.mu, s.slack, s.box_slack, s.status, z_bar, none, none, none)
    return QPCotangents(*found.adjoint(given))
