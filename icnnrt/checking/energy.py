"""Checks of an energy: each derivative against differences, and whether it bends upwards wherever it is looked at."""

import functools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.checking.differences import by_weights, head, judge_head, paired
from icnnrt.checking.report import NO_CONTEXT, Array, Arrays, Check, judged, skipped, worst
from icnnrt.checking.trial import Trial
from icnnrt.mathematics import certificate, reference

DIRECTIONS: Final = 4  # directions, segments and random points for every sample
ROOM: Final = 0.1  # for the steps of a difference along y
# Along y. Every one gives a valid bracket: a short one is narrow, a long one is little disturbed by the rounding of f,
# which counts divided by h.
GRADIENT_STEPS: Final = {"float64": (1e-2, 1e-4, 1e-6), "float32": (1e-1, 1e-2, 1e-3)}
CURVATURE_ITERATIONS: Final = 12
CURVATURE_STEP: Final = 0.05
# max |H − H'| / max |H|: both halves are sums of the same terms in another order.
SKEW: Final = {"float64": 1e-9, "float32": 1e-3}


def gradient(trial: Trial) -> Iterator[Check]:
    """min(φ⁻, φ⁺) <= g'd <= max(φ⁻, φ⁺) with the one-sided differences φ⁻ = (φ(0) − φ(−h))/h, φ⁺ likewise.

    For convex φ(t) = f(y + t d) that is the subgradient inequality, true for every h > 0, at kinks too.
    """
    B, steps = len(trial.X), GRADIENT_STEPS[trial.T]
    outside, allowed, width, size = [], [], [], []
    for _ in range(DIRECTIONS):
        # y in the dtype first, so that y, y + h d and y − h d lie on one line as nearly as they can.
        y, d = trial.interior(max(steps))
        f, g = trial.f(y)
        noise = trial.noise(f, g, y)
        for h in steps:
            # What the dtype makes of the step, so that the rounding of y does not count.
            forth, back = (trial.rounded(y + t * d).astype(np.float64) - y for t in (h, -h))
            rise = trial.f(y + forth)[0] - f - (g * forth).sum(1)
            fall = trial.f(y + back)[0] - f - (g * back).sum(1)
            # The subgradient inequality says rise >= 0 and fall >= 0; where f is concave along d, both are <= 0.
            # g is none of f's slopes if one is positive and the other negative.
            outside.append(np.minimum(np.maximum(rise, fall), -np.minimum(rise, fall)) / h)
            allowed.append(2 * noise / h)
            width.append(np.abs(rise + fall) / h)
            size.append(np.abs((g * d).sum(1)))
    brackets = np.min(np.reshape(width, (DIRECTIONS, len(steps), B)), axis=1)
    what = (
        f"g'd beyond its one-sided differences, whose median bracket is {np.median(brackets):.1e} wide at "
        f"|g'd| = {np.median(size):.1e}"
    )
    yield worst("gradient", np.maximum(np.concatenate(outside), 0.0), np.concatenate(allowed), what)


def hvp(trial: Trial) -> Iterator[Check]:
    """∇²f v against [∇f(y + h v) − ∇f(y − h v)] / 2h."""
    y, v = trial.interior(ROOM)
    told = trial.session.hvp(trial.X, y, trial.rounded(v))
    yield head(trial, "hvp", trial.g, {"y": trial.rounded(y)}, lambda step: told, "∇f along v", {"y": v})


def hessian(trial: Trial) -> Iterator[Check]:
    """The dense Hessian: symmetric, and along a direction against differences of ∇f."""
    y, v = trial.interior(ROOM)
    H = trial.session.hessian(trial.X, y).astype(np.float64)
    skew = np.abs(H - H.swapaxes(1, 2)).max((1, 2)) / np.maximum(1.0, np.abs(H).max((1, 2)))
    what = "max |H − H'|, relative: the gradient exported is not the gradient of anything"
    check, told = judged("hessian", float(skew.max()), SKEW[trial.T], what), np.einsum("bij,bj->bi", H, v)
    if check.verdict == "pass":
        check = head(trial, "hessian", trial.g, {"y": trial.rounded(y)}, lambda step: told, "∇f along v", {"y": v})
    yield check


def gradient_x(trial: Trial) -> Iterator[Check]:
    """∇_x f'd against [f(x + h d) − f(x − h d)] / 2h."""
    y, name = trial.interior(ROOM)[0], "gradient_x"
    told = paired({"x": trial.session.gradient_x(trial.X, y)})
    if trial.X[0].size:
        yield head(trial, name, lambda x: trial.f(y, x)[0], {"x": trial.X}, told, "f along a direction of x")
    else:
        yield skipped(name, NO_CONTEXT)


def pullback(trial: Trial) -> Iterator[Check]:
    """ȳ'd, x̄'d and θ̄'d of each sample against differences of φ = f̄ f + ḡ'∇_y f."""
    (y, v), X, pull = trial.interior(ROOM), trial.X, trial.session.pullback
    f_bar = trial.rounded(trial.rng.standard_normal(len(y)))
    g_bar = trial.rounded(trial.rng.standard_normal(y.shape))
    pulled, what, name = pull(X, y, f_bar, g_bar), "φ = f̄ f + ḡ'∇f along a direction of", "pullback: weights"

    def φ(y: Array = y, x: NDArray[Any] = X, few: slice = slice(None)) -> Array:
        f, g = trial.f(y[few], x[few])
        return f_bar[few] * f + (g_bar[few] * g).sum(1)

    def θ_bar(i: int) -> Arrays:
        return pull(*(a[i : i + 1] for a in (X, y, f_bar, g_bar))).weights

    yield head(trial, "pullback: y", φ, {"y": trial.rounded(y)}, paired({"y": pulled.y}), f"{what} y", {"y": v})
    if X[0].size:
        yield head(trial, "pullback: x", φ, {"x": X}, paired({"x": pulled.x}), f"{what} x")
    judge = functools.partial(judge_head, trial, name, what=f"{what} θ")
    yield by_weights(trial, name, θ_bar, lambda few: φ(few=few), judge)


def convexity(trial: Trial) -> Iterator[Check]:
    """f((a + b)/2) <= (f(a) + f(b))/2 for a, b in the domain: random points, corners, and where it bends down most."""
    count = 0
    excess, allowed = [], []
    for _ in range(DIRECTIONS):
        p = trial.somewhere()
        d = _least_curved(trial, p)
        t = trial.reach(p, d) * d
        anywhere = [trial.somewhere(), trial.somewhere()]
        corners = [trial.domain.corners(trial.rng, len(p), trial.n) for _ in range(2)]
        segments = [anywhere, corners, [p - t, p + t], [p - 0.1 * t, p + 0.1 * t]]
        for ends in segments:
            ends = [np.clip(end, *trial.domain.edges) for end in ends]  # rounding may have taken them out
            a, b = (trial.rounded(trial.at.y(end)).astype(np.float64) for end in ends)
            told = [(y, *trial.f(y)) for y in (a, b, (a + b) / 2)]
            (_, f_a, _), (_, f_b, _), (_, f_m, _) = told
            excess.append(np.maximum(f_m - (f_a + f_b) / 2, 0.0))
            allowed.append(2 * np.max([trial.noise(f, g, y) for y, f, g in told], axis=0))
        count += len(segments)
    what = f"f at the middle above the mean of the ends, {count} segments a sample"
    yield worst("convexity", np.concatenate(excess), np.concatenate(allowed), what)


def _least_curved(trial: Trial, p: Array) -> Array:
    """Directions d [B, n] of length 1 and of small, if possible negative, d'∇²f(p)d: the power method on c − ∇²f, in p.

    A random direction misses one negative eigenvalue among many positive ones. The Hessian is told by differences of g
    over a wide step, so kinks show as curvature too. It only chooses where to look: it convicts nobody.
    """
    f_of_p = reference.in_coordinates(trial.f, trial.at)
    step = trial.longest(CURVATURE_STEP)
    p = trial.inset(p, step)
    d = trial.rng.standard_normal(p.shape)
    c = np.zeros((len(p), 1))
    for _ in range(CURVATURE_ITERATIONS):
        d = trial.tangent(d)
        bend = (f_of_p(p + step * d)[1] - f_of_p(p - step * d)[1]) / (2 * step)
        bend = np.where(np.isfinite(bend), bend, 0.0)
        c = np.maximum(c, np.linalg.norm(bend, axis=1, keepdims=True))
        moved = c * d - bend
        d = np.where(np.linalg.norm(moved, axis=1, keepdims=True) > 0, moved, d)
    return trial.tangent(d)


def monotony(trial: Trial) -> Iterator[Check]:
    """(g(a) − g(b))'(a − b) >= 0, which holds for the gradient of a convex function and no other."""
    below, allowed = [], []
    for scale in (1.0, 0.1, 0.01):
        for _ in range(DIRECTIONS):
            a = trial.rounded(trial.rng.random((len(trial.X), trial.n))).astype(np.float64)
            b = trial.rounded(a + scale * trial.rng.standard_normal(a.shape)).astype(np.float64)
            g_a, g_b = trial.g(a), trial.g(b)
            below.append(np.maximum(-((g_a - g_b) * (a - b)).sum(1), 0.0))
            size = (np.abs(g_a) + np.abs(g_b)) * np.abs(a - b)
            allowed.append(certificate.ROUNDING * np.finfo(trial.dtype).eps * np.maximum(size.sum(1), scale**2))
    what = f"−(g(a) − g(b))'(a − b), {len(below)} pairs a sample"
    yield worst("monotony", np.concatenate(below), np.concatenate(allowed), what)
