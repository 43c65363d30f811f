"""The bundle method over a polyhedron.

    y* = argmin over y in P of  f(y) + (μ/2) ‖y‖²,      P = {Gy <= h,  Ay = b,  lower <= y <= upper}

Every iteration solves one quadratic program with the cuts g_i'y + e_i, e_i = f(y_i) − g_i'y_i, and the constraints
themselves, so every answer is feasible whatever their number::

    y_k, t_k = argmin over y, t of  t + (μ/2) ‖y‖²   s.t.  g_i'y + e_i <= t for i < k,   y in P        k = 1 .. K

from the first cut at y_0, the point of P that is nearest to y_init. The dual value of the last of them is a lower bound
of the minimum if f is convex, for any multipliers::

    lower_bound = λ'e − h'λ_G − b'ν − bounds'μ − (1/2μ) ‖g'λ + G'λ_G + A'ν + μ‖²,      1'λ = 1

and what the best of y_0 .. y_K has above it is its gap. A sample is done once that is small: further cuts would be near
duplicates. Source of the cuts: Kelley, *The cutting-plane method for solving convex programs*, 1960.

Without curvature, μ = 0, that vector has to be 0, or nothing bounds the model; and a model may fall without end along a
ray d, with Gd <= 0, Ad = 0 and the bounds' own signs, and g_i'd < 0 for all of its cuts. Of f itself that says nothing
yet: what a later cut is may end the fall. So y_k is then a point on the ray, further out each time that f still fell
along it, and f is cut there, a little lower than it seems, by what rounding may have raised it::

    y_k = y_0 + T max(1, |y_0|) d,   max |d| = 1,   T = 2^4, 2^8, 2^16, 2^32, 2^48, 2^60, or 2^60 at once where k = K

If f still falls at 2^60, ∇f'd < 0, the sample is UNBOUNDED and d its ray. The slope of a convex f along d only grows
with T, so f falls all the way from y_0 to there; what it does beyond nobody has seen.

A point is [B, n] here, what counts a sample [B, 1], and `Programs` are what is solved. A cut of a sample that is done,
or out, has a bound of NaN: who solves the models leaves that sample out, so that it costs nothing and disturbs no
other. The loop ends with the last sample, so there are as many slots as cuts were needed, and one at least.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from icnnrt.mathematics import rounding
from icnnrt.mathematics.bundle import ValueAndGradient
from icnnrt.mathematics.namespace import Array, Namespace
from icnnrt.mathematics.polyhedron_programs import INFINITY, Polyhedron, Programs, steepness
from icnnrt.mathematics.qp_reference import QP, TOLERANCE, QPReference
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.status import Status

FAR: Final = 2.0**60  # how far out on a ray f is judged: in float32, too, squares of it are finite
OUT: Final = 2.0**4  # how far out f is cut first
FURTHER: Final = 2.0**16  # T is squared, but grows by no more than this
MILD: Final = 2.0**10  # how much steeper than before a cut at 2^60 may be: of a curved f it would drown all others
FALLS: Final = 1e-6  # how fast f has to fall along a ray, against the steepest slope met in every variable
OFF: Final = 1e-7  # how far y may be out of P, against its size: a hundred times what a program is solved to
SAME: Final = 1e-11  # energies that differ by less, relative to 1 + |energy|, are the same
ENOUGH: Final = TOLERANCE[np.dtype(np.float64)][0]  # the residual up to which a quadratic program is solved
NAN: Final = float("nan")
PASSING: Final = ("y", "f", "g", "going", "beaten_by", "steepest", "out", "falls")  # of no use after the last cut

Solver: TypeAlias = Callable[[Programs, QP, Array | None], QPReference]  # `Programs.solved` by some solver


class Model(NamedTuple):
    """One quadratic program of some of the samples, solved."""

    samples: Any  # which they are
    solution: QPReference  # z = (y, t); rows are those of G, then cuts. Of the projection: z = y, rows of G alone


class PolyhedronTrajectory(NamedTuple):
    """All that the bundle method leaves behind, to differentiate through it. NaN in samples that were not run."""

    y: Array  # [B, n] the best point met: of the least energy
    energy: Array  # [B] f(y) + (μ/2) ‖y‖²
    lower_bound: Array  # [B] no energy in P is below it, if f is convex; −∞ if no model was solved
    gap: Array  # [B] energy − lower_bound
    residual: Array  # [B, 3] relative stationarity, feasibility, duality gap of the last model
    status: Array  # [B] Status
    cuts: Array  # [B] how many models were solved, each with one cut more
    best: Array  # [B] y is y_best: 0 is the projection, k the answer of the k-th model
    slopes: Array  # [B, K, n] g_i; K = the most cuts of a sample, and those beyond its own repeat the first
    offsets: Array  # [B, K] e_i = f(y_i) − g_i'y_i
    cut_points: Array  # [B, K, n] y_0 .. y_{K−1}
    lam: Array  # [B, K] multipliers of the cuts in the last model
    ray: Array  # [B, n] of an UNBOUNDED sample the direction along which f falls, max |d| = 1; else 0
    projection: Model | None  # None where the models were not kept: `bundle_qp_models`
    models: tuple[Model, ...]  # K of them, the k-th of the samples that were not done before
    polyhedron: Polyhedron
    mu: Any


class _State(NamedTuple):
    """What one iteration hands to the next."""

    y: Array  # [B, n] y_k; 0 in samples that are out
    f: Array
    g: Array  # [B, n]
    going: Array
    finite: Array  # f was, wherever it counts
    code: Array  # of the last model that was tried, a QPStatus
    best_y: Array  # [B, n]
    best: Array
    energy: Array
    beaten_by: Array  # what is better than that
    lower_bound: Array
    cuts: Array
    lam: Array  # [B, m + k]
    nu: Array  # [B, q]
    bounds: Array  # [B, n]
    residual: Array  # [B, 3]
    rows: Array  # [B, m + k, n + 1]
    heights: Array  # [B, m + k]
    points: Array  # [B, k, n]
    # Without curvature alone: the steepest slopes met [B, n], how far out on which ray y is, and whether f fell there.
    steepest: Array = None
    out: Array = None  # T, 0 where y is on no ray
    falls: Array = None
    ray: Array = None  # [B, n]
    unbounded: Array = None


class _Met(NamedTuple):
    """What is found at a point."""

    f: Array
    g: Array  # [B, n]
    met: Array  # f + (μ/2) ‖y‖²
    less: Array  # what is better than that
    live: Array  # moving, and all numbers


class _Method:
    """One run: what its iterations share."""

    def __init__(
        self,
        xp: Namespace,
        P: Polyhedron,
        value_and_gradient: ValueAndGradient,
        solve: Solver,
        iterations: Any,
        mu: Any,
        tolerance: Any,
        eps: float,
    ) -> None:
        self.xp, self.solve, self.value_and_gradient = xp, solve, value_and_gradient
        self.iterations, self.mu, self.half_mu, self.tolerance, self.eps = iterations, mu, 0.5 * mu, tolerance, eps
        self.programs = Programs(xp, P, mu)
        self.n, self.m = self.programs.n, self.programs.m
        self.nothing, self.nowhere = xp.zeros(P.lower, 1), xp.zeros(P.lower, self.n)
        self.never, self.of_t = self.nothing > 0.0, self.nothing - 1.0
        self.low, self.high = xp.isfinite(self.programs.below), xp.isfinite(self.programs.above)

    def meet(self, y: Array, moving: Array) -> _Met:
        """Of samples that are `moving`."""
        xp = self.xp
        f, g = self.value_and_gradient(y)
        met = f + self.half_mu * xp.sum(y * y)
        numbers = xp.concat([met, g])
        # By more than a program is solved to, so that of points that are the same the first stays.
        less = met - SAME * (1.0 + abs(met))
        return _Met(f, g, met, less, moving & (xp.sum(numbers - numbers) >= 0.0))

    def start(self, y_0: Array, started: Array, verdict: Array) -> _State:
        """y_0 is met."""
        xp, programs = self.xp, self.programs
        at = self.meet(y_0, started)
        self.y_0, self.size = y_0, xp.maximum(xp.max(abs(y_0)), 1.0)
        none = xp.like(self.nothing, self.iterations)
        return _State(
            y=y_0,
            f=at.f,
            g=at.g,
            going=at.live,
            finite=at.live | ~started,
            code=verdict,
            best_y=xp.where(at.live, y_0, NAN),
            best=none,
            energy=xp.where(at.live, at.met, INFINITY),
            beaten_by=xp.where(at.live, at.less, INFINITY),
            lower_bound=self.nothing - INFINITY,
            cuts=none,
            lam=0.0 * programs.h,
            nu=0.0 * programs.P.b,
            bounds=self.nowhere,
            residual=xp.zeros(y_0, 3) + NAN,
            rows=programs.G,
            heights=programs.h,
            points=xp.zeros(y_0, 0, self.n),
        )

    def all_cuts(self, start: _State, flat: bool) -> _State:
        """The state after the last cut; `flat`: of μ = 0."""
        half = None if flat else 0.5 / self.mu
        if flat:
            steepest = self.xp.where(start.going, abs(start.g), 0.0)
            rays = {"out": self.nothing, "falls": self.never, "ray": self.nowhere, "unbounded": self.never}
            start = start._replace(steepest=steepest, **rays)

        def cut(k: Any, *state: Array) -> tuple[_State, tuple[()]]:
            return self.cut(k, _State(*state), flat, half), ()

        def unfinished(*state: Array) -> Array:
            return self.xp.any(_State(*state).going)

        end, _ = self.xp.repeat(self.xp.maximum(self.iterations, 1), cut, start, unfinished)
        end = _State(*end)._replace(**dict.fromkeys(PASSING))
        return end if flat else end._replace(ray=self.nowhere, unbounded=self.never)

    def cut(self, k: Any, s: _State, flat: bool, half: Any) -> _State:
        """y_k is cut, the model of k + 1 cuts solved, and its answer met."""
        xp, n = self.xp, self.n
        touches = s.g * s.y
        height, σ = xp.sum(touches) - s.f, None
        if flat:
            # Far out a cut is lowered by what rounding may have raised it.
            raised = (rounding.UNCERTAIN * self.eps) * (abs(s.f) + xp.sum(abs(touches)))
            height = height + xp.where(s.out > 0.0, raised, 0.0)
            σ = steepness(xp, xp.max(s.steepest))
        rows = xp.concat_rows([s.rows, xp.row(xp.concat([s.g, self.of_t]))])
        heights = xp.concat([s.heights, xp.where(s.going, height, NAN)])
        solution = self.solve(self.programs, self.programs.model(rows, heights), σ)
        code, next_k = xp.column(solution.status), k + 1
        good = s.going & (code <= int(QPStatus.INACCURATE))
        z, bounds = xp.upto(solution.z, n), xp.upto(solution.mu, n)
        dual = self.programs.bound(rows, heights, solution.lam, solution.nu, bounds, z, half, s.steepest)
        lower_bound = xp.where(good & (dual > s.lower_bound), dual, s.lower_bound)  # NaN is not

        y, falling = xp.where(good, z, 0.0), self.never
        if flat:
            falling = s.going & xp.equal(code, int(QPStatus.DUAL_INFEASIBLE))
            ray, out = self.way_out(s, next_k, xp.upto(solution.ray, n), falling)
            y = xp.where(falling, self.y_0 + (out * self.size) * ray, y)
        moving = good | falling if flat else good
        at = self.meet(y, moving)
        live, finite = at.live, at.live | ~moving
        of_rays: dict[str, Array] = {}
        if flat:
            finite = finite | falling  # f may overflow far out: it does not fall there
            live, of_rays = self.on_ray(s, at, falling, ray, out)
        feasible = xp.beyond(xp.upto(solution.residual, 2), 1) <= ENOUGH
        better = live & good & feasible & (at.met < s.beaten_by)
        energy = xp.where(better, at.met, s.energy)
        return _State(
            y=y,
            f=at.f,
            g=at.g,
            going=live & ~_near(xp, energy - lower_bound, lower_bound, self.tolerance),
            finite=s.finite & finite,
            code=xp.where(s.going, code, s.code),
            best_y=xp.where(better, y, s.best_y),
            best=xp.where(better, next_k, s.best),
            energy=energy,
            beaten_by=xp.where(better, at.less, s.beaten_by),
            lower_bound=lower_bound,
            cuts=xp.where(good, next_k, s.cuts),
            lam=xp.where(good, solution.lam, xp.concat([s.lam, self.nothing])),
            nu=xp.where(good, solution.nu, s.nu),
            bounds=xp.where(good, bounds, s.bounds),
            residual=xp.where(good, solution.residual, s.residual),
            rows=rows,
            heights=heights,
            points=xp.concat_rows([s.points, xp.row(s.y)]),
            **of_rays,
        )

    def way_out(self, s: _State, next_k: Any, d: Array, falling: Array) -> tuple[Array, Array]:
        """The ray along which a model falls, max |d| = 1, and T, how far out on it the next point is; else 0. The signs
        that the bounds of y ask for hold to the bit, Gd <= 0 and Ad = 0 to 1e-8 of d."""
        xp = self.xp
        further = xp.minimum(s.out, FURTHER) * s.out
        out = xp.minimum(xp.where(s.falls, further, xp.maximum(xp.sqrt(s.out), OUT)), FAR)
        out = xp.where(falling, xp.where(next_k >= self.iterations, FAR, out), 0.0)
        d = xp.where(self.low, xp.maximum(d, 0.0), d)
        d = xp.where(falling, xp.where(self.high, xp.minimum(d, 0.0), d), 0.0)
        most = xp.max(abs(d))
        return d / xp.where(most > 0.0, most, 1.0), out

    def on_ray(self, s: _State, at: _Met, falling: Array, d: Array, out: Array) -> tuple[Array, dict[str, Array]]:
        """Which samples go on, once f is met on the ray d, and what is known of the ray."""
        xp = self.xp
        slope, last = abs(at.g), out >= FAR
        steepest = xp.where(at.live, xp.maximum(s.steepest, slope), s.steepest)
        # ∇f'd < 0 by more than the rounding of either.
        falls = at.live & falling & (xp.sum(at.g * d) < -FALLS * xp.sum(steepest * abs(d)))
        mild = xp.max(slope - MILD * s.steepest) <= 0.0
        rays = {"steepest": steepest, "out": out, "falls": falls, "ray": xp.where(s.unbounded, s.ray, d)}
        return at.live & (~last | (mild & ~falls)), rays | {"unbounded": s.unbounded | (falls & last)}


def argmin(
    xp: Namespace,
    P: Polyhedron,
    value_and_gradient: ValueAndGradient,
    solve: Solver,
    y_init: Array,
    known: Array,
    iterations: Any,
    mu: Any,
    tolerance: Any,
    eps: float,
) -> tuple[PolyhedronTrajectory, Sequence[Array]]:
    """At most `iterations` cuts, and one at least, from y_init [B, n], whose dtype is float64.

    `value_and_gradient(y [B, n]) -> f [B, 1], ∇f [B, n]`, float64, told at y itself; samples that are out have y = 0
    and are not looked at. `solve(programs, qp, σ)`: `Programs.solved` by some solver, of samples without NaN. known
    [B, 1]: false where a sample's context is not finite. tolerance: the gap, relative to max(1, |lower_bound|), at
    which a sample is done; 0 never is. eps: of the dtype that f is computed in.
    """
    method = _Method(xp, P, value_and_gradient, solve, iterations, mu, tolerance, eps)
    first = solve(method.programs, method.programs.projection(y_init), None)
    verdict = xp.where(known, xp.column(first.status), int(QPStatus.NOT_FINITE_INPUT))
    started = verdict <= int(QPStatus.INACCURATE)
    start = method.start(xp.where(started, first.z, 0.0), started, verdict)
    end = _State(
        *xp.cond(mu > 0.0, lambda: method.all_cuts(start, flat=False), lambda: method.all_cuts(start, flat=True))
    )
    slopes, _ = xp.parts(xp.beyond(end.rows, method.m), [y_init, None])
    offsets, points = -xp.beyond(end.heights, method.m), end.points
    used = xp.isfinite(offsets)
    slopes, points = (xp.where(xp.column(used), a, xp.upto(a, 1)) for a in (slopes, points))
    offsets = xp.where(used, offsets, xp.upto(offsets, 1))
    lam, cut_lam = xp.parts(end.lam, [P.h, None])

    # Without a bound a y tells nothing: of an objective that falls without end it is no optimum, however feasible.
    run = xp.isfinite(xp.upto(end.best_y, 1)) & xp.isfinite(end.lower_bound) & ~end.unbounded
    y, energy, lower_bound, *shown = (
        xp.where(run, a, NAN) for a in (end.best_y, end.energy, end.lower_bound, end.residual, lam, end.nu, end.bounds)
    )
    gap = energy - lower_bound
    outside = rounding.excess(xp, P.G, xp.row(P.h), P.A, *map(xp.row, (*P[3:], y, lam, end.nu, end.bounds)))
    code = status(
        *(xp, y, energy, lower_bound, gap, slopes, offsets, points, cut_lam, *(xp.slot(a, 0) for a in outside)),
        solved=xp.equal(end.code, int(QPStatus.SOLVED)),
        tolerance=tolerance,
        eps=eps,
    )
    for which, verdict_of in (
        (end.unbounded, Status.UNBOUNDED),
        (~end.finite, Status.NOT_FINITE),
        (verdict > int(QPStatus.INACCURATE), Status.SOLVER),
        (xp.equal(verdict, int(QPStatus.PRIMAL_INFEASIBLE)), Status.INFEASIBLE),
        (xp.equal(verdict, int(QPStatus.NOT_FINITE_INPUT)), Status.NOT_FINITE_INPUT),
    ):
        code = xp.where(which, float(verdict_of), code)
    ray = xp.where(xp.equal(code, float(Status.UNBOUNDED)), end.ray, 0.0)
    energy, lower_bound, gap, code, cuts, best = (
        xp.entry(a, 0) for a in (energy, lower_bound, gap, code, end.cuts, end.best)
    )
    residual, *multipliers = shown
    cuts_of = (slopes, offsets, points, cut_lam)
    found = (y, energy, lower_bound, gap, residual, code, cuts, best, *cuts_of, ray, None, (), P, mu)
    return PolyhedronTrajectory(*found), multipliers


def _near(xp: Namespace, gap: Array, lower_bound: Array, tolerance: Any) -> Array:
    """There is a lower bound, and the gap is within the tolerance."""
    return xp.isfinite(lower_bound) & (gap <= tolerance * xp.maximum(abs(lower_bound), 1.0))


def status(
    xp: Namespace,
    y: Array,
    energy: Array,
    lower_bound: Array,
    gap: Array,
    slopes: Array,
    offsets: Array,
    cut_points: Array,
    lam: Array,
    excess: Array,
    violation: Array,
    *,
    solved: Array,
    tolerance: Any,
    eps: float,
    proven: bool = False,
) -> Array:
    """The status of samples that were run to their end, [B, 1]: SOLVER where there is no lower bound.

    The rules are those of `certificate.status_of`. What it calls a residual is here whether y is in P, by the excess
    and violation of `rounding.excess`, and whether the last model was `solved`, which counts only where the gap is
    above the tolerance. proven: f is known to be convex.
    """
    met, at, cuts = xp.row(energy), xp.row(y), (slopes, xp.row(offsets), cut_points)
    unit = xp.maximum(abs(lower_bound), 1.0)
    # A model is solved to 1e-9 of its own numbers: less tells nothing of f.
    noise = xp.slot(rounding.rounding_at(xp, met, *cuts, at, eps), 0) + ENOUGH * unit
    below = xp.maximum(-gap - excess, xp.slot(rounding.violation(xp, *cuts), 0))
    doubt = xp.slot(rounding.uncertainty_at(xp, met, xp.row(gap), *cuts, xp.row(lam), at, eps), 0)
    bent = below > noise
    if proven:
        doubt = xp.where(bent, xp.maximum(doubt, below), doubt)
    large = ~_near(xp, gap, lower_bound, tolerance)
    code = xp.where(large, float(Status.GAP), float(Status.CONVERGED))
    code = xp.where((doubt > tolerance * unit) & ~(gap > doubt), float(Status.PRECISION), code)
    unsolved = (large & ~solved) | (violation > OFF) | ~xp.isfinite(lower_bound)
    code = xp.where(unsolved, float(Status.SOLVER), code)
    return code if proven else xp.where(bent, float(Status.NOT_CONVEX), code)
