"""What an argmin over a polyhedron in torch hands out: y with its certificate, multipliers and a status a sample."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from icnnrt.arguments import sample
from icnnrt.mathematics.bundle_qp import bundle_qp_uncertainty
from icnnrt.mathematics.polyhedron import PolyhedronTrajectory
from icnnrt.mathematics.polyhedron_answers import answers
from icnnrt.mathematics.status import Status, advise_polyhedron
from icnnrt_models.layers.bundle_qp import on


class PolyhedronResult(NamedTuple):
    """The answer for B samples with its certificate, without gradient; floats are float64.

    NaN where there is no answer.
    """

    y: Float[Tensor, "batch n"]  # the best point met, feasible to 1e-9 of the size of the constraints
    energy: Float[Tensor, " batch"]  # f(x, y) + (μ/2) ‖y‖²
    lower_bound: Float[Tensor, " batch"]  # no feasible energy is below it, up to the rounding of f, if f is convex in y
    gap: Float[Tensor, " batch"]  # energy − lower_bound
    residual: Float[Tensor, "batch 3"]  # relative stationarity, feasibility and duality gap of the last model
    status: Int[Tensor, " batch"]  # int32, of icnnrt.Status
    cuts: Int[Tensor, " batch"]  # int64, how many models were solved
    lam: Float[Tensor, "batch m"]  # multipliers of Gy <= h: by how much the optimum falls if h grows
    nu: Float[Tensor, "batch q"]  # multipliers of Ay = b
    bound_multipliers: Float[Tensor, "batch n"]  # of lower and upper: > 0 at an upper, < 0 at a lower one
    ray: Float[Tensor, "batch n"]  # of an UNBOUNDED sample the direction along which f falls, as in PolyhedronSolution
    uncertainty: Float[Tensor, " batch"]  # by how much rounding may have moved the gap

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        i = sample(i, len(self.status))
        gap, uncertainty = float(self.gap[i]), float(self.uncertainty[i])
        told = advise_polyhedron(Status(int(self.status[i])), gap=gap, cuts=int(self.cuts[i]), uncertainty=uncertainty)
        return f"sample {i}: {told}"


def finite_rows(x: Tensor) -> Tensor:
    """[B] bool: which samples of x hold finite numbers only."""
    return x.isfinite().flatten(1).all(1) if x.dim() > 1 else x.isfinite()


def result_of(T: PolyhedronTrajectory, x: Tensor, dtype: str) -> PolyhedronResult:
    """Of samples x and an energy of this dtype."""
    told, lam, nu, bounds = answers(T, finite_rows(x).numpy(force=True))
    of_f = (told.y, told.energy, told.gap, T.slopes, T.offsets, T.cut_points, T.lam)
    with np.errstate(invalid="ignore", over="ignore"):
        uncertainty = bundle_qp_uncertainty(*of_f, dtype)
    found: tuple[NDArray[Any], ...] = (
        *(told.y, told.energy, told.lower_bound, told.gap, told.residual, told.status.astype(np.int32), told.cuts),
        *(lam, nu, bounds, told.ray, uncertainty),
    )
    return PolyhedronResult(*(on(x, a) for a in found))
