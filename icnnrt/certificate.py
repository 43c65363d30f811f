"""Residuals, gaps and the verdict on every sample, in plain numpy: the judge of every solver here.

Problem, for B samples: min over y in [0,1]^n of f(y) − H(y). K cuts with slopes G [K, n] and centred offsets e [K]
give the values v = e + G(y − ½), which for convex f never exceed f.

    dual value     lower_bound = e'λ + ½ 1's − Σ softplus(s),  s = −G'λ,  for any λ on the simplex
    gap            f(y) − H(y) − lower_bound = [f(y) − max v] + [max v − λ'v]      at y = σ(s)

Both brackets are nonnegative when f is convex. The second is the complementarity of the model, so a gap below the
complementarity proves that f is not convex. Source of the method: Amos, Xu, Kolter (2017).

Other domains have their own centre, y(s) and dual, in `icnnrt.domains`; boxes other than the unit box and (μ/2)‖y‖²
are judged in p, y = shift + scale∘p, as they are solved. `domain` says which; UNIT_BOX where not given.

`kkt_residuals`, `duality_gap` and `convexity_violation` take handed-out numbers alone, so they check a solver (or
another runtime's answer) without trusting any figure it reports.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.domains import SPACE, UNIT_BOX, Domain
from icnnrt.reference import evaluate
from icnnrt.status import Status

Array = NDArray[np.float64]
Floats = NDArray[Any]  # float32 or float64

# How many units of rounding, eps times the scale of the cuts, an energy may lie below its cuts before it counts as not
# convex. Convex float32 PICNNs of 32 to 600 units, slopes from 0.2 to 2e9, stayed below 1.6 of them (measured).
ROUNDING: Final = 64.0


class Tolerances(NamedTuple):
    """What counts as solved.

    Gap and complementarity have the unit of an energy and are relative to max(1, |lower_bound|); stationarity and
    feasibility have the units of y and λ, which lie in [0, 1], and are absolute.
    """

    gap: float
    residual: float


def unit(lower_bound: Array) -> Array:
    """max(1, |lower_bound|), [B]: what the tolerances are multiples of."""
    return np.maximum(1.0, np.abs(lower_bound))


def relative_residual(residual: Array, lower_bound: Array) -> Array:
    """max(stationarity, feasibility, complementarity / unit), [B]: what the residual tolerance bounds."""
    return np.maximum(residual[:, :2].max(1), residual[:, 2] / unit(lower_bound))


def kkt_residuals(slopes: Floats, offsets: Floats, lam: Floats, y: Floats, domain: Domain = UNIT_BOX) -> Array:
    """Stationarity, feasibility and complementarity of (λ, y) for the model max_i v_i − H, recomputed in float64.

        stationarity     max |y − σ(−G'λ)|            the rounding of y, if y came from λ
        feasibility      max(|1'λ − 1|, max −λ)
        complementarity  max v − λ'v                  = the duality gap of the model, at y = σ(−G'λ)

    slopes [B, K, n], offsets [B, K] centred, lam [B, K], y [B, n], any float dtype -> [B, 3]. NaN where they hold NaN.
    In other domains y(−G'λ) takes the place of σ(−G'λ).
    """
    G, e, λ, y64 = _float64(slopes, offsets, lam, y)
    with np.errstate(invalid="ignore", over="ignore"):
        s = -np.einsum("bkn,bk->bn", G, λ)
        v = e + np.einsum("bkn,bn->bk", G, y64 - domain.centre(y64.shape[1]))
        stationarity = np.abs(y64 - domain.point(s)).max(1)
        feasibility = np.maximum(np.abs(λ.sum(1) - 1.0), (-λ).max(1))
        return np.stack([stationarity, feasibility, v.max(1) - (λ * v).sum(1)], axis=1)


def duality_gap(energy: Floats, slopes: Floats, offsets: Floats, lam: Floats, domain: Domain = UNIT_BOX) -> Array:
    """energy − e'λ + C(s), s = −G'λ, recomputed in float64: [B]. In the box C(s) is Σ softplus(s) − ½ 1's.

    energy [B] = f(y) − H(y), or f(y) + R(y). No y of the domain has an energy smaller by more than this, if the
    cuts hold (see `convexity_violation`) and λ is on the simplex.
    """
    G, e, λ, energy64 = _float64(slopes, offsets, lam, energy)
    with np.errstate(invalid="ignore", over="ignore"):
        return energy64 - evaluate(G, e, λ, domain).dual


def convexity_violation(slopes: Floats, offsets: Floats, cut_points: Floats, domain: Domain = UNIT_BOX) -> Array:
    """The most by which one cut exceeds the energy at the point of another: max_ij [v_j(y_i) − f(y_i)], [B] >= 0.

    slopes and cut_points [B, K, n], offsets [B, K]. f(y_i) is v_i(y_i), as cut i touches f there. Zero up to rounding
    (see `rounding`) if f is convex; above it, f is proven not convex. Zero proves nothing about other points.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        centre = cut_points.dtype.type(domain.centre(cut_points.shape[2]))
        v = offsets[:, None, :] + (cut_points - centre) @ slopes.swapaxes(1, 2)
        f = np.einsum("bkk->bk", v)
        return (v.max(2) - f).max(1).astype(np.float64)


def rounding(
    energy: Array, slopes: Floats, offsets: Floats, domain: Domain = UNIT_BOX, cut_points: Floats | None = None
) -> Array:
    """What rounding may add to a comparison of energies and cuts in the dtype of the slopes: [B].

    64 eps max(1, |energy|, max_i |e_i| + ½ ‖g_i‖₁): the last is the largest number a cut is summed from. On the simplex
    it is max_i |e_i| + max |g_i|, in R^n max_i |e_i| + ‖g_i‖ max(max_j ‖g_j‖, max_j ‖y_j‖), y_j the cut points.
    """
    eps = float(np.finfo(slopes.dtype).eps)
    with np.errstate(invalid="ignore", over="ignore"):
        # In float64, where the squares of float32 slopes do not overflow.
        G = slopes.astype(np.float64)
        reach = domain.reach(G)
        if domain is SPACE and cut_points is not None:
            length, far = (np.sqrt((a.astype(np.float64) ** 2).sum(2)) for a in (G, cut_points))
            reach = np.maximum(reach, length * far.max(1, keepdims=True))
        scale = (np.abs(offsets) + reach).max(1)
        return ROUNDING * eps * np.maximum(np.maximum(1.0, np.abs(energy)), scale)


def status_of(
    x_finite: NDArray[np.bool_],
    y: Floats,
    energy: Array,
    lower_bound: Array,
    gap: Array,
    residual: Array,
    tolerances: Tolerances,
    *,
    rounding: Array | float,
    violation: Array | float = 0.0,
) -> NDArray[np.int8]:
    """The `Status` of every sample, [B] int8.

    x_finite [B], y [B, n], energy, lower_bound, gap [B], residual [B, 3]; `rounding` and `violation` [B] as the
    functions of those names give them. With unit = max(1, |lower_bound|), the first of these that holds:

        NOT_FINITE_INPUT  not x_finite
        NOT_FINITE        NaN or infinity in y, energy, lower_bound, gap or residual
        NOT_CONVEX        complementarity − gap > rounding, or violation > rounding
        SOLVER            max(stationarity, feasibility, complementarity / unit) > tolerances.residual
        GAP               gap > tolerances.gap · unit
        CONVERGED

    That order is from worst to best, as whatever stands further down rests on what stands above: a gap means nothing
    without convexity, a tolerance nothing for NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scale = unit(lower_bound)
        # NaN in one term makes the sum NaN, infinity makes it infinite or NaN. Halves do not overflow on their own.
        total = 0.5 * energy + 0.5 * lower_bound + 0.5 * gap + residual.sum(1)
        status = np.zeros(len(energy), np.int8)
        status[gap > tolerances.gap * scale] = Status.GAP
        status[relative_residual(residual, lower_bound) > tolerances.residual] = Status.SOLVER
        status[np.maximum(residual[:, 2] - gap, violation) > rounding] = Status.NOT_CONVEX
        status[~(np.isfinite(total) & np.isfinite(y).all(1))] = Status.NOT_FINITE
        status[~x_finite] = Status.NOT_FINITE_INPUT
    return status


def _float64(*arrays: Floats) -> tuple[Array, ...]:
    return tuple(np.asarray(a, np.float64) for a in arrays)
