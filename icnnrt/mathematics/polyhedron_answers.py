"""Answers over a polyhedron: what is handed out of them, and which have a gradient, else why not.

What found them is `bundle_qp`.
"""

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.certificate import differentiable
from icnnrt.mathematics.polyhedron import PolyhedronTrajectory
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.rounding import DIGITS
from icnnrt.mathematics.status import ANSWERED, Status, imprecise

Array = NDArray[np.float64]


def answers(T: PolyhedronTrajectory, finite: NDArray[np.bool_]) -> tuple[PolyhedronTrajectory, Array, Array, Array]:
    """T with NaN where there is no answer, and λ of Gy <= h, ν and the bounds' multipliers in each sample's last model.

    finite [B]: whether x is; a sample whose x is not counts as one that was not run.
    """
    lam, nu, bounds = (np.zeros(a.shape) for a in (T.polyhedron.h, T.polyhedron.b, T.y))
    for k, (samples, s) in enumerate(T.models, start=1):
        last = T.cuts[samples] == k
        at = samples[last]
        lam[at], nu[at], bounds[at] = s.lam[last, :-k], s.nu[last], s.mu[last, : T.y.shape[1]]
    lost = ~finite | ~np.isfinite(T.y).all(1)
    y, energy, lower_bound, gap, residual, lam, nu, bounds = (
        np.where(lost.reshape(-1, *[1] * (a.ndim - 1)), np.nan, a) for a in (*T[:5], lam, nu, bounds)
    )
    status = np.where(finite, T.status, Status.NOT_FINITE_INPUT).astype(np.int8)
    cuts, ray = np.where(finite, T.cuts, 0), np.where(finite[:, None], T.ray, 0.0)
    told = T._replace(
        y=y, energy=energy, lower_bound=lower_bound, gap=gap, residual=residual, status=status, cuts=cuts, ray=ray
    )
    return told, lam, nu, bounds


def known(status: NDArray[np.int8], uncertainty: Array, lower_bound: Array, adjoint: str) -> NDArray[np.bool_]:
    """[B]: y is known well enough for a gradient by this adjoint, if the programs on its way are solved."""
    return differentiable(status, uncertainty, lower_bound) & ((adjoint != "implicit") | (status != Status.GAP))


def solved(T: PolyhedronTrajectory, adjoint: str) -> NDArray[np.bool_]:
    """[B]: the programs on the way of this adjoint, but that of "implicit", were all solved."""
    found = np.ones(len(T.y), bool)
    if adjoint != "implicit":
        assert T.projection is not None
        for k, (samples, solution) in enumerate((T.projection, *T.models)):
            poor = (T.best[samples] >= k) & (solution.status != QPStatus.SOLVED)
            if adjoint == "prop3":  # a point on a ray is held fixed, as every cut point is
                poor &= solution.status != QPStatus.DUAL_INFEASIBLE
            found[samples[poor]] = False
    return found


def doubt(status: Status, uncertainty: float, lower_bound: float, known: bool, dtype: str) -> str:
    """Why one sample, whose energy was computed in `dtype`, has no gradient; "" where its advice tells."""
    most = DIGITS * max(1.0, abs(lower_bound))
    if known:
        return "a program on the way was inaccurate: scale the constraints, or raise mu"
    return imprecise(uncertainty, most, dtype) if status in ANSWERED and uncertainty > most else ""
