"""Residuals, gaps and the verdict on every sample, in plain numpy: the judge of every solver here.

Problem, for B samples: min over y in [0,1]^n of f(y) − H(y). K cuts with slopes G [K, n] and centred offsets e [K]
give the values v = e + G(y − ½), which for convex f never exceed f.

    dual value     lower_bound = e'λ + ½ 1's − Σ softplus(s),  s = −G'λ,  for any λ on the simplex
    gap            f(y) − H(y) − lower_bound = [f(y) − max v] + [max v − λ'v]      at y = σ(s)

Both brackets are nonnegative when f is convex. The second is the complementarity of the model, so a gap below the
complementarity proves that f is not convex. Source of the method: Amos, Xu, Kolter (2017).

Other domains have their own centre, y(s) and dual, in `icnnrt.mathematics.domains`; boxes other than the unit box and
(μ/2)‖y‖² are judged in p, y = shift + scale∘p, as they are solved. `domain` says which; UNIT_BOX where not given.

`kkt_residuals`, `duality_gap` and `convexity_violation` take handed-out numbers alone, so they check a solver (or
another runtime's answer) without trusting any figure it reports.

`judge` takes energy, lower bound, gap and residual from the answer, and computes itself, from the other numbers handed
out, `convexity_violation` and what rounding may do (`icnnrt.mathematics.rounding`): `rounding`, which an energy has to
lie below its cuts by before f counts as not convex, and `uncertainty`, by which the gap may be off. These do not see
terms that cancel inside f wherever it was cut: of them only a proof that f is convex (`proven`) knows that they are no
sign of the contrary.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics import rounding as of_rounding
from icnnrt.mathematics.domains import UNIT_BOX, Domain
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.rounding import DIGITS, ROUNDING, UNCERTAIN
from icnnrt.mathematics.status import ANSWERED, Status

Array = NDArray[np.float64]
Floats = NDArray[Any]  # float32 or float64


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


def implied_point(slopes: Floats, lam: Floats, domain: Domain = UNIT_BOX) -> Array:
    """y(−G'λ), [B, n] float64: where the multipliers lam [B, K] of slopes [B, K, n] put y."""
    G, λ = _float64(slopes, lam)
    return np.asarray(domain.point(NUMPY, -np.einsum("bkn,bk->bn", G, λ)), np.float64)


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
        v = e + np.einsum("bkn,bn->bk", G, y64 - domain.centre(y64.shape[1]))
        stationarity = np.abs(y64 - implied_point(G, λ, domain)).max(1)
        feasibility = np.maximum(np.abs(λ.sum(1) - 1.0), (-λ).max(1))
        return np.stack([stationarity, feasibility, v.max(1) - (λ * v).sum(1)], axis=1)


def duality_gap(energy: Floats, slopes: Floats, offsets: Floats, lam: Floats, domain: Domain = UNIT_BOX) -> Array:
    """energy − e'λ + C(s), s = −G'λ, recomputed in float64: [B]. In the box C(s) is Σ softplus(s) − ½ 1's.

    energy [B] = f(y) − H(y), or f(y) + R(y). No y of the domain has an energy smaller by more than this, if the
    cuts hold (see `convexity_violation`) and λ is on the simplex.
    """
    G, e, λ, energy64 = _float64(slopes, offsets, lam, energy)
    with np.errstate(invalid="ignore", over="ignore"):
        s = -np.einsum("bkn,bk->bn", domain.plain(NUMPY, G), λ)
        return energy64 - ((λ * e).sum(1) - domain.conjugate(NUMPY, s)[:, 0])


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


def magnification(lower: Floats, upper: Floats) -> Array:
    """`icnnrt.mathematics.rounding.magnification` of bounds [B, n] in their dtype, [B, n]."""
    low, high = _float64(lower, upper)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        rows = of_rounding.magnification(NUMPY, low[:, None], high[:, None], float(np.finfo(lower.dtype).eps))
    return np.asarray(rows[:, 0], np.float64)


def _sizes(G: Array, offsets: Floats, domain: Domain, cut_points: Floats | None, magnified: Array | None) -> Array:
    """`icnnrt.mathematics.rounding.sizes` in rows, [B, 1, K]."""
    points = None if cut_points is None else cut_points.astype(np.float64)
    rows = None if magnified is None else magnified[:, None]
    return np.asarray(of_rounding.sizes(NUMPY, domain, G, offsets[:, None], points, rows))


def rounding(
    energy: Array,
    slopes: Floats,
    offsets: Floats,
    domain: Domain = UNIT_BOX,
    cut_points: Floats | None = None,
    magnified: Array | None = None,
) -> Array:
    """What rounding may add to a comparison of energies and cuts in the dtype of the slopes, [B]:
    `icnnrt.mathematics.rounding.rounding` of its `sizes`. `magnified` is what `magnification` gives, of a box."""
    eps = float(np.finfo(slopes.dtype).eps)
    with np.errstate(invalid="ignore", over="ignore"):
        size = _sizes(slopes.astype(np.float64), offsets, domain, cut_points, magnified)
        return np.asarray(of_rounding.rounding(NUMPY, energy[:, None, None], size, eps)[:, 0, 0])


def uncertainty(
    energy: Array,
    gap: Array,
    slopes: Floats,
    offsets: Floats,
    lam: Floats | None,
    domain: Domain = UNIT_BOX,
    cut_points: Floats | None = None,
    magnified: Array | None = None,
) -> Array:
    """By how much rounding in the dtype of the slopes may have moved gap and lower bound: [B].
    `icnnrt.mathematics.rounding.uncertainty` says what. lam [B, K] are the multipliers, None where they are not known.
    """
    eps = float(np.finfo(slopes.dtype).eps)
    with np.errstate(invalid="ignore", over="ignore"):
        G = slopes.astype(np.float64)
        size = _sizes(G, offsets, domain, cut_points, magnified)
        multipliers, magnifying = (None if a is None else a.astype(np.float64)[:, None] for a in (lam, magnified))
        of_energy = energy[:, None, None], gap[:, None, None]
        total = of_rounding.uncertainty(NUMPY, domain, *of_energy, G, size, multipliers, magnifying, eps)
    return np.asarray(total[:, 0, 0])


def differentiable(status: NDArray[np.int8], uncertainty: Array | float, lower_bound: Array) -> NDArray[np.bool_]:
    """[B] bool: y is known well enough for a gradient: CONVERGED, GAP or PRECISION, of an energy that is uncertain by
    at most 1e-3 max(1, |lower_bound|), whatever the tolerance of its gap was."""
    known = np.isin(status, ANSWERED)
    with np.errstate(invalid="ignore"):
        return known & (uncertainty <= DIGITS * unit(lower_bound))  # false for NaN


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
    uncertainty: Array | float,
    violation: Array | float = 0.0,
    proven: bool = False,
) -> NDArray[np.int8]:
    """The `Status` of every sample, [B] int8.

    x_finite [B], y [B, n], energy, lower_bound, gap [B], residual [B, 3]; `rounding`, `uncertainty` and `violation` [B]
    as the functions of those names give them. With unit = max(1, |lower_bound|), the first of these that holds:

        NOT_FINITE_INPUT  not x_finite
        NOT_FINITE        NaN or infinity in y, energy, lower_bound, gap or residual
        NOT_CONVEX        complementarity − gap > rounding, or violation > rounding
        SOLVER            max(stationarity, feasibility, complementarity / unit) > tolerances.residual
        PRECISION         uncertainty > tolerances.gap · unit, and not gap > uncertainty
        GAP               gap > tolerances.gap · unit
        CONVERGED

    That order is from worst to best, as whatever stands further down rests on what stands above: a gap means nothing
    without convexity, a tolerance nothing for NaN. Of two that concern the gap, GAP is what more cuts would mend.

    `proven`: f is proven convex in y. Then no number can tell the contrary: what an energy lies below its cuts by is
    rounding, however large, and makes the gap uncertain by as much.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        small = tolerances.gap * unit(lower_bound)
        # NaN in one term makes the sum NaN, infinity makes it infinite or NaN. Halves do not overflow on their own.
        total = 0.5 * energy + 0.5 * lower_bound + 0.5 * gap + residual.sum(1)
        excess = np.maximum(residual[:, 2] - gap, violation)
        bent = excess > rounding
        doubt = np.where(bent, np.maximum(uncertainty, excess), uncertainty) if proven else uncertainty
        status = np.full(len(energy), Status.CONVERGED, np.int8)
        status[gap > small] = Status.GAP
        if np.ndim(doubt) or doubt > tolerances.gap:
            status[(doubt > small) & ~(gap > doubt)] = Status.PRECISION
        status[relative_residual(residual, lower_bound) > tolerances.residual] = Status.SOLVER
        if not proven:
            status[bent] = Status.NOT_CONVEX
        status[~(np.isfinite(total) & np.isfinite(y).all(1))] = Status.NOT_FINITE
        status[~x_finite] = Status.NOT_FINITE_INPUT
    return status


def judge(
    x_finite: NDArray[np.bool_],
    answer: Mapping[str, NDArray[Any]],
    tolerances: Tolerances,
    domain: Domain = UNIT_BOX,
    lower: Floats | None = None,
    upper: Floats | None = None,
    *,
    proven: bool = False,
) -> tuple[NDArray[np.int8], Array | float]:
    """`status_of` an answer as a graph gives it, [B] int8, and its `uncertainty`, [B], or a number that is above it in
    all samples, where even that is within DIGITS and the tolerance.

    answer: y, energy, lower_bound, gap, residual, slopes, offsets and cut_points by these names, and lam where it is
    there; lower and upper of a box.
    """
    energy, lower_bound, gap, residual = (answer[name] for name in ("energy", "lower_bound", "gap", "residual"))
    slopes, offsets, points = answer["slopes"], answer["offsets"], answer["cut_points"]
    noise = rounding(energy, slopes, offsets, domain, points)
    violation = convexity_violation(slopes, offsets, points, domain)
    box = None if lower is None or upper is None else (lower, upper)
    # Most batches are far from all of this: then what may be told of them as a whole is enough. Comparisons are written
    # so that NaN is not.
    doubt: Array | float = _at_most(noise, slopes, box)
    little = min(tolerances.gap, DIGITS)
    told = doubt <= little and -float(gap.min(initial=0.0)) <= little
    if box is not None and told:
        least = float(noise.min(initial=np.inf))
        with np.errstate(invalid="ignore"):
            below = float((residual[:, 2] - gap).max(initial=0.0))
        told = float(violation.max(initial=0.0)) <= least and below <= least
    if not told:
        magnified = magnification(*box) if box else None
        noise = rounding(energy, slopes, offsets, domain, points, magnified)
        doubt = uncertainty(energy, gap, slopes, offsets, answer.get("lam"), domain, points, magnified)
    status = status_of(
        x_finite,
        answer["y"],
        energy,
        lower_bound,
        gap,
        residual,
        tolerances,
        rounding=noise,
        uncertainty=doubt,
        violation=violation,
        proven=proven,
    )
    return status, doubt


def _at_most(noise: Array, slopes: Floats, box: tuple[Floats, Floats] | None) -> float:
    """No `uncertainty` of the batch is above it but for −gap, told from `rounding` without a box, with little work.

    As Σ_j max_i |g_ij| |y_j| <= 2 Σ_i size_i and |g_i|'magnified <= 2 size_i max magnified.
    """
    _, K, n = slopes.shape
    scale, more = (1 + 2 * K) * UNCERTAIN / ROUNDING, 0.0
    if box is not None:
        lower, upper = box
        with np.errstate(invalid="ignore", over="ignore"):
            width = float((upper - lower).min(initial=np.inf))
        far = max(-float(lower.min(initial=np.inf)), float(upper.max(initial=-np.inf)))
        δ = float(np.finfo(slopes.dtype).eps) * far / width if width > 0 else np.inf
        if not δ <= 0.5:
            return np.inf
        scale *= 1 + 2 * far / width
        more = n * δ * (1.0 - math.log(δ)) if δ > 0 else 0.0  # H(δ) < δ − δ log δ
    return scale * float(noise.max(initial=0.0)) + more


def _float64(*arrays: Floats) -> tuple[Array, ...]:
    return tuple(np.asarray(a, np.float64) for a in arrays)
