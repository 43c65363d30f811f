"""The smoothed gradient of quadratic programs that were solved: `icnnrt.mathematics.qp_smoothing` for `QPSolution`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.qp_data import SHAPES
from icnnrt.mathematics.qp_smoothing import smoothed

__all__ = ["Points", "smoothed_adjoint"]

Floats = NDArray[Any]


class Points(NamedTuple):
    """Where a gradient is taken; B samples."""

    z: Floats  # [B, n]
    lam: Floats  # [B, m]
    nu: Floats  # [B, q]
    mu: Floats  # [B, n]
    upper: Floats  # [B, m] bool or floats in [0, 1]: the part of the upper bound in what a row does
    box_upper: Floats  # [B, n] the same of the box


def smoothed_adjoint(
    feeds: Mapping[str, Floats],
    answer: Sequence[Floats],
    taken: NDArray[np.bool_],
    bars: Sequence[Floats],
    kappa: float,
) -> tuple[list[Floats], Points]:
    """d_z, d_λ, d_ν, d_μ, share and weak of the samples that are `taken`, NaN of the others; and the points.

    feeds: the data by their names, [B, ...] or [1, ...], bounds absent or without columns where there are none.
    answer: z, λ, ν, μ of B samples; bars: cotangents in their shapes, without columns where zero.
    """
    z, lam, _, _ = answer
    none = {"h_lower": lam - np.inf, "h": lam + np.inf, "lower": z - np.inf, "upper": z + np.inf}

    def whole(name: str) -> Floats:
        a = feeds.get(name)
        if a is None or (name in none and a.shape[1] != none[name].shape[1]):
            a = none[name]
        return np.broadcast_to(a, (len(z), *a.shape[1:])).astype(np.float64)

    def like(a: Floats, bar: Floats) -> Floats:
        return np.zeros(a.shape) if bar.shape[1] == 0 else np.broadcast_to(bar, a.shape).astype(np.float64)

    points = [np.where(taken[:, None], a, np.nan).astype(np.float64) for a in answer]
    back = [like(a, bar) for a, bar in zip(answer, bars, strict=True)]
    with np.errstate(all="ignore"):  # a sample without a point has NaN, not a warning
        found = smoothed(NUMPY, [whole(name) for name in SHAPES], points, back, kappa)
    at, d = ([a.astype(z.dtype) for a in part] for part in ((*found[:4], *found[9:]), found[4:8]))
    return [*d, np.where(taken, found.share, np.nan), np.zeros(len(z), np.int32)], Points(*at)
