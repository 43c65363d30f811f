"""Why a quadratic program has no answer, told from its data: which eigenvalue, which datum, which pair of bounds."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.qp_reference import BOUND_MAX
from icnnrt.mathematics.qp_status import advise
from icnnrt.mathematics.status import Status

__all__ = ["far_bound", "qp_advice", "qp_cause"]

# From there on bounds are named where there is no answer: next to data of size 1 they are rounding.
FAR_BOUND: Final = 1e9


def qp_advice(
    i: int,
    status: int,
    residual: NDArray[Any],
    data: Mapping[str, NDArray[Any]],
    *,
    ray: bool = True,
    **course: Any,
) -> str:
    """One sentence with numbers on sample `i`: what its data say of the cause, else what its status does.

    residual:  [3], relative stationarity, feasibility, duality gap
    data:      of `icnnrt.qp`, by their names, of that sample alone; those that are absent are empty or left out
    ray:       whether who reads it has the ray to look at
    course:    how the solver got there, as `advise` takes it
    """
    verdict = Status(status)
    a, b, c = (float(r) for r in residual)
    told = qp_cause(verdict, data) or advise(verdict, residual=(a, b, c), ray=ray, **course)
    return f"sample {i}: {told}{far_bound(verdict, data)}"


def qp_cause(status: Status, data: Mapping[str, NDArray[Any]]) -> str:
    """What can be said with the data of a sample at hand; "" if that is no more than `advise` says."""
    data = {name: np.asarray(a, np.float64) for name, a in data.items()}
    match status:
        case Status.NOT_CONVEX:
            least = float(np.linalg.eigvalsh(0.5 * (data["Q"] + data["Q"].T))[0])
            return (
                f"Q has the eigenvalue {least:.1e}, so the problem is not convex: pass F F' + ε I with a factor F, "
                f"or add {-1.06 * least:.1e} to the diagonal"  # two digits round by less than 5 %
            )
        case Status.NOT_FINITE_INPUT:
            sides = {"h": -1.0, "upper": -1.0, "h_lower": 1.0, "lower": 1.0}
            bad = [
                name
                for name, a in data.items()
                if ((np.isnan(a) | (sides[name] * a >= BOUND_MAX)).any() if name in sides else not np.isfinite(a).all())
            ]
            return f"NaN, or an infinity that is no absent bound, in {', '.join(bad)}: clean it" if bad else ""
        case Status.INFEASIBLE:
            for low, high in (("h_lower", "h"), ("lower", "upper")):
                if low in data and high in data and data[low].size and data[high].size:
                    crossed = data[low] > data[high]
                    if crossed.any():
                        entry = int(np.argmax(crossed))
                        return (
                            f"{low}[{entry}] = {float(data[low][entry])!r} exceeds {high}[{entry}] = "
                            f"{float(data[high][entry])!r}: exchange or widen them"
                        )
    return ""


def far_bound(status: Status, data: Mapping[str, NDArray[Any]]) -> str:
    """What to do about the farthest bound where a sample was not solved, "" if no bound is far."""
    if status not in (Status.INACCURATE, Status.SOLVER):
        return ""
    far = [
        (abs(value), f"{name}[{i}] = {value:.3g}", f"z[{i}]" if name in ("lower", "upper") else f"row {i} of G")
        for name in ("lower", "upper", "h_lower", "h")
        for i, value in enumerate(np.asarray(data.get(name, ()), np.float64).reshape(-1).tolist())
        if FAR_BOUND <= abs(value) < BOUND_MAX
    ]
    if not far:
        return ""
    _, bound, of = max(far)
    more = f" and {len(far) - 1} more bounds are" if len(far) > 1 else " is"
    return (
        f"; {bound}{more} far beyond the other data: pass inf or -inf where there is no bound, or give {of} in larger "
        "units if it is one"
    )
