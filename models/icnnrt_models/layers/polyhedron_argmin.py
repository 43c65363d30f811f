"""The bundle method over a polyhedron for energies in torch, recorded by autograd, and its adjoint.

`icnnrt.mathematics.bundle_qp` states both, over arrays; the energy alone runs in torch, on its device.
"""

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from icnnrt.errors import InputError
from icnnrt.mathematics.bundle_qp import PolyhedronCotangents, bundle_qp_adjoint, bundle_qp_argmin, bundle_qp_implicit
from icnnrt.mathematics.polyhedron import PolyhedronTrajectory
from icnnrt.mathematics.polyhedron_answers import doubt, known, solved
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.status import Status
from icnnrt.serving.polyhedron import TOLERANCE
from icnnrt_models.layers.bundle_qp import array, differentiate, on, solve
from icnnrt_models.layers.energy_at import EnergyAt, OnceDifferentiable, Point, hvp, plain, pulled_back
from icnnrt_models.layers.on_unsafe import OnUnsafe, unsafe
from icnnrt_models.layers.pieces import is_piecewise_linear
from icnnrt_models.layers.polyhedron_result import PolyhedronResult, result_of

PolyhedronAdjoint = Literal["auto", "prop3", "implicit", "exact"]
Array = NDArray[np.float64]
CONSTRAINTS = len(Polyhedron._fields)


class Cuts:
    """f and ∇f of float64 points, for the bundle method, and their graphs if they are to be kept.

    The energy sees ŷ, y in its own dtype, that of `like`; f is told at y along the cut that touches at ŷ, so that every
    cut is one of f.
    """

    def __init__(self, energy: EnergyAt, like: Tensor, adjoint: PolyhedronAdjoint, record: bool) -> None:
        self.energy, self.like, self.adjoint = energy, like, adjoint
        self.record = record and adjoint != "implicit"
        self.points: list[Point] = []

    @property
    def dtype(self) -> str:
        return str(self.like.dtype).removeprefix("torch.")

    def __call__(self, y: Array) -> tuple[Array, Array]:
        rounded = on(self.like, y).to(self.like.dtype)
        point = self.energy.at(rounded, create_graph=self.record)
        if self.adjoint == "auto":
            self.adjoint = _chosen(point)
            self.record = self.record and self.adjoint != "implicit"
        if self.record:
            self.points.append(point)
        f, g = array(point.f), array(point.g)
        return f + (g * (y - array(rounded))).sum(1), g


def _chosen(point: Point) -> PolyhedronAdjoint:
    pieces = is_piecewise_linear(point.f, point.y)
    if isinstance(pieces, str):
        raise InputError(
            f"adjoint: expected one by name for this energy, but got 'auto', and its {pieces} does not tell whether it "
            "is piecewise linear in y; give 'prop3' if it is (ReLU networks), 'implicit' if it is smooth."
        )
    return "prop3" if pieces else "implicit"


class Method(NamedTuple):
    """What a layer was made with."""

    energy: nn.Module
    iterations: int
    mu: float
    adjoint: PolyhedronAdjoint
    tolerance: float | None
    on_unsafe: OnUnsafe

    def run(self, cuts: Cuts, P: Sequence[Tensor], y_init: Tensor) -> PolyhedronTrajectory:
        """P of float64 tensors, as y_init."""
        tolerance = TOLERANCE[cuts.dtype] if self.tolerance is None else self.tolerance
        with torch.inference_mode(False):
            return bundle_qp_argmin(
                *(cuts, Polyhedron(*map(array, P)), self.iterations, self.mu, array(y_init), tolerance),
                solver=solve,
                precision=np.dtype(cuts.dtype),
            )


class Argmin(torch.autograd.Function):
    """The solve, and its adjoint with respect to x where it is spoilt, the context, the constraints and the weights.

    The graphs of f and ∇_y f at the cut points are kept from the solve: see `icnnrt_models.layers.argmin`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        method: Method,
        kept: list[PolyhedronResult],
        names: tuple[str, ...],
        n_context: int,
        like: Tensor,
        y_init: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        needed = ctx.needs_input_grad[6:]
        recorded = any(needed)
        at = 1 + n_context, 1 + n_context + CONSTRAINTS
        x, context, P, weights = inputs[0], inputs[1 : at[0]], inputs[at[0] : at[1]], inputs[at[1] :]
        # Fresh leaves: a context tensor's own history holds the x path, which ordinary autograd runs later.
        context = tuple(plain(c).requires_grad_(need) for c, need in zip(context, needed[1:], strict=False))
        overrides: dict[str, Tensor] | None = None
        if not all(p.is_leaf for p in weights):
            # Inside functional_call weights may depend on one another: cut that here too.
            weights = tuple(p.detach().requires_grad_() for p in weights)
            overrides = dict(zip(names, weights, strict=True))
        # What is chosen by "auto" is asked for only where it matters.
        adjoint = method.adjoint if recorded or method.on_unsafe == "raise" else "exact"
        cuts = Cuts(EnergyAt(method.energy, context, (), 1.0, overrides), like, adjoint, recorded)
        T = method.run(cuts, P, y_init)
        result = result_of(T, x, cuts.dtype)
        kept.append(result)
        status, uncertainty, lower_bound = (
            a.numpy(force=True) for a in (result.status, result.uncertainty, result.lower_bound)
        )
        may = known(status, uncertainty, lower_bound, cuts.adjoint)
        trusted = may & solved(T, cuts.adjoint)
        if method.on_unsafe == "raise" and not trusted.all():
            bad = np.flatnonzero(~trusted).tolist()
            i, code = bad[0], Status(int(status[bad[0]]))
            why = doubt(code, float(uncertainty[i]), float(lower_bound[i]), bool(may[i]), cuts.dtype)
            raise unsafe(bad, code, why or result.advice(i).removeprefix(f"sample {i}: "))
        if recorded:
            points = cuts.points
            if cuts.adjoint == "implicit":
                with torch.inference_mode(False):
                    points = [cuts.energy.at(result.y.nan_to_num().to(like.dtype), create_graph=True)]
            ctx.adjoint, ctx.on_unsafe, ctx.trajectory, ctx.needed = cuts.adjoint, method.on_unsafe, T, needed
            ctx.n_context = n_context
            # Saved this way, not as attributes, they are freed with the rest of the graph.
            flat = [tensor for point in points for tensor in point]
            ctx.save_for_backward(on(x, trusted), plain(x), *context, *weights, *flat)
        return result.y.clone()  # another tensor than what is kept

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        needed, n_context = ctx.needed, ctx.n_context
        trusted, x, *saved = ctx.saved_tensors
        n_given = len(needed) - 1 - CONSTRAINTS  # context and weights; beside them there is x
        given, flat = saved[:n_given], iter(saved[n_given:])
        points = [Point(*point) for point in zip(flat, flat, flat, strict=True)]
        of_given = (*needed[1 : 1 + n_context], *needed[1 + CONSTRAINTS + n_context :])
        wanted = [t for t, need in zip(given, of_given, strict=True) if need]
        with torch.no_grad():
            y_bar = torch.where(trusted[:, None], y_bar, 0.0)
            cotangents = _cotangents(ctx.adjoint, ctx.trajectory, points, y_bar)
            if ctx.adjoint == "implicit":  # whether Newton's program is solved is known now
                trusted = trusted & ~on(x, np.isnan(cotangents.cuts.seed).any((1, 2)))
            if ctx.on_unsafe == "raise" and not bool(trusted.all()):
                raise InputError(
                    f"on_unsafe: Newton's program at y* of sample {int((~trusted).nonzero()[0])} was not solved: raise "
                    "mu, or scale the constraints."
                )
            pulled = iter(_pull_back(points, cotangents, trusted, wanted))
            lost = math.nan if ctx.on_unsafe == "nan" else 0.0

            def rows(a: Tensor) -> Tensor:
                return torch.where(trusted.view(-1, *[1] * (a.dim() - 1)), a, lost)

            def total(a: Tensor) -> Tensor:
                return torch.where(trusted.all(), a, lost) if ctx.on_unsafe == "nan" else a

            found: list[Tensor] = []
            for i, need in enumerate(needed):
                if not need:
                    continue
                if i == 0:  # x itself: its context has the gradient, but not where it was cleaned
                    found.append(rows(torch.zeros_like(x)))
                elif i <= n_context:
                    found.append(rows(next(pulled)))
                elif i <= n_context + CONSTRAINTS:
                    found.append(rows(on(x, cotangents.polyhedron[i - n_context - 1])))
                else:
                    found.append(total(next(pulled)))
        if torch.is_grad_enabled():  # create_graph=True
            found = list(OnceDifferentiable.apply("PolyhedronArgmin", torch.zeros((), requires_grad=True), *found))
        gradients = iter(found)
        return (*[None] * 6, *(next(gradients) if need else None for need in needed))


def _cotangents(
    adjoint: PolyhedronAdjoint, T: PolyhedronTrajectory, points: list[Point], y_bar: Tensor
) -> PolyhedronCotangents:
    if adjoint == "implicit":
        (point,) = points
        eye = torch.eye(y_bar.shape[1], dtype=point.g.dtype, device=y_bar.device)
        hessian = torch.stack([hvp(point, e.expand_as(point.g)) for e in eye], 1)
        of_f = array(point.g), array(hessian)
        return bundle_qp_implicit(T, array(y_bar), *of_f, solver=solve, adjoint=differentiate)

    def product(i: int, y: Array, s: Array) -> Array:
        return array(hvp(points[i], on(y_bar, s)))

    return bundle_qp_adjoint(T, array(y_bar), product if adjoint == "exact" else None, differentiate)


def _pull_back(
    points: list[Point], cotangents: PolyhedronCotangents, trusted: Tensor, wanted: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Σ_i ∇[ē_i f(x, y_i) + seed_i' ∇_y f(x, y_i)] with respect to `wanted`; zeros for what f does not depend on."""
    offset_bar = torch.where(trusted[:, None], on(trusted, cotangents.cuts.offset_bar), 0.0)
    seed = torch.where(trusted[:, None, None], on(trusted, cotangents.cuts.seed), 0.0)
    # Most cuts hold no answer: they cost nothing then.
    counts = ((offset_bar != 0) | (seed != 0).any(2)).any(0).tolist()
    cuts = zip(points, offset_bar.unbind(1), seed.unbind(1), strict=False)
    return pulled_back(compress(cuts, counts), wanted)
