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

A point is [B, n] here, what counts a sample [B, 1]. Rows of a model are those of G, then the cuts, with t as their last
entry. A cut of a sample that is done, or out, has a bound of NaN: who solves the models leaves that sample out, so that
it costs nothing and disturbs no other. The loop ends with the last sample, so there are as many slots as cuts were
needed, and one at least.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from icnnrt.mathematics import rounding
from icnnrt.mathematics.bundle import ValueAndGradient
from icnnrt.mathematics.namespace import Array, Namespace
from icnnrt.mathematics.qp_reference import BOUND_MAX, QP, TOLERANCE, QPReference
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.status import Status

FAR: Final = 2.0**60  # how far out on a ray f is judged: in float32, too, squares of it are finite
OUT: Final = 2.0**4  # how far out f is cut first
FURTHER: Final = 2.0**16  # T is squared, but grows by no more than this
MILD: Final = 2.0**10  # how much steeper than before a cut at 2^60 may be: of a curved f it would drown all others
FALLS: Final = 1e-6  # how fast f has to fall along a ray, against the steepest slope met in every variable
OFF: Final = 1e-7  # how far y may be out of P, against its size: a hundred times what a program is solved to
LEFT: Final = 1e-7  # what may be left of stationarity without curvature, against the terms that cancel
SAME: Final = 1e-11  # energies that differ by less, relative to 1 + |energy|, are the same
ENOUGH: Final = TOLERANCE[np.dtype(np.float64)][0]  # the residual up to which a quadratic program is solved
NAN, INFINITY = float("nan"), float("inf")

Solve: TypeAlias = Callable[[QP], QPReference]  # of arrays of the namespace; h_lower is None, which is none


class Polyhedron(NamedTuple):
    """{y: Gy <= h, Ay = b, lower <= y <= upper}; infinite bounds are none."""

    G: Array  # [B, m, n]
    h: Array  # [B, m]
    A: Array  # [B, q, n]
    b: Array  # [B, q]
    lower: Array  # [B, n]
    upper: Array  # [B, n]


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


class Programs:
    """The quadratic programs over P: of points y [B, n], or of (y, t)."""

    def __init__(self, xp: Namespace, P: Polyhedron, mu: Any) -> None:
        self.xp, self.P, self.mu, self.n, self.m = xp, P, mu, P.lower.shape[1], xp.slots(P.h)
        none = xp.zeros(P.lower, 1)
        self.one = none + 1.0
        self.G, self.A = (xp.padded(rows, self.n + 1) for rows in (P.G, P.A))
        self.lower, self.upper = xp.concat([P.lower, none - INFINITY]), xp.concat([P.upper, none + INFINITY])
        self.of_t = xp.concat([xp.zeros(P.lower, self.n), self.one])
        # Bounds that are none as numbers, to be taken 0 times, and as infinities.
        self.h, *self.sides = (xp.clip(a, -BOUND_MAX, BOUND_MAX) for a in (P.h, P.lower, P.upper))
        self.below, self.above = (xp.where(abs(a) < BOUND_MAX, a, INFINITY) for a in (P.lower, P.upper))
        self.unit = xp.padded(xp.eyes(P.lower), self.n + 1)
        self.Q = self._diagonal(self.of_t, *[1.0] * self.n, 0.0) * mu
        self.ones = xp.ones_like(P.lower)

    def _diagonal(self, row: Array, *entries: float) -> Array:
        """For every sample, or for all together."""
        return self.xp.eye(row) * self.xp.rows(entries, row)

    def projection(self, y_init: Array) -> QP:
        """min ½ ‖y‖² − y_init'y over P."""
        return QP(self._diagonal(y_init, *[1.0] * self.n), -y_init, self.P.G, None, *self.P[1:])  # type: ignore[arg-type]

    def newton(self, y: Array, gradient: Array, hessian: Array) -> QP:
        """min over z in P of ∇f'z + ½ (z − y)'∇²f (z − y) + (μ/2) ‖z‖²."""
        xp = self.xp
        Q = hessian + self._diagonal(y, *[1.0] * self.n) * self.mu
        p = gradient - xp.entry(xp.sum(hessian * xp.row(y)), 0)
        return QP(Q, p, self.P.G, None, *self.P[1:])  # type: ignore[arg-type]

    def cut(self, slopes: Array) -> Array:
        """g_i'y − t, for slopes [B, k, n]."""
        return self.xp.concat([slopes, -self.xp.ones_like(self.xp.sum(slopes))])

    def model(self, rows: Array, heights: Array) -> QP:
        """min over (y, t) of t + (μ/2) ‖y‖² s.t. rows (y, t) <= heights, Ay = b, lower <= y <= upper."""
        return QP(self.Q, self.of_t, rows, None, heights, self.A, self.P.b, self.lower, self.upper)  # type: ignore[arg-type]

    def model_of(self, y_init: Array, best: Array, slopes: Array, offsets: Array) -> tuple[QP, Array, Array]:
        """The model of the cuts i < best [B, 1], or, where best is 0, the projection with a t of its own; whether it is
        a model, and σ, as `solved` takes it. A cut that has no part has a bound of +∞, which is none."""
        xp = self.xp
        model, used = best > 0, xp.places(offsets) < best
        slopes = xp.where(xp.column(used), slopes, 0.0)
        heights = xp.where(used, -offsets, INFINITY)
        qp = self.model(xp.concat_rows([self.G, self.cut(slopes)]), xp.concat([self.P.h, heights]))
        Q = xp.where(xp.column(model), qp.Q, self._diagonal(self.of_t, *[1.0] * (self.n + 1)))
        p = xp.where(model, self.of_t, xp.concat([-y_init, xp.zeros(y_init, 1)]))
        steepest = xp.where(model & xp.equal(self.mu, 0.0), xp.slot(xp.largest(slopes), 0), 0.0)
        return qp._replace(Q=Q, p=p), model, steepness(xp, steepest)

    def solved(self, solve: Solve, qp: QP, σ: Array | None) -> QPReference:
        """A model. Where there is a σ [B, 1] it is solved as that of f/σ, t = σ t̂: so whether it falls along a ray is
        told from rounding by the slopes that there are, not by their size."""
        if σ is None:
            return solve(qp)
        xp, m = self.xp, self.m
        height = xp.concat([self.ones, σ])
        cuts, heights = xp.beyond(qp.G, m) * xp.row(height / σ), xp.beyond(qp.h, m) / σ
        s = solve(qp._replace(G=xp.concat_rows([self.G, cuts]), h=xp.concat([self.P.h, heights])))
        return s._replace(
            z=s.z * height,
            lam=xp.concat([xp.upto(s.lam, m) * σ, xp.beyond(s.lam, m)]),
            nu=s.nu * σ,
            mu=s.mu * σ,
            slack=xp.concat([xp.upto(s.slack, m), xp.beyond(s.slack, m) * σ]),
        )

    def bound(
        self,
        rows: Array,
        heights: Array,
        lam: Array,
        nu: Array,
        bounds: Array,
        y: Array,
        half: Any = None,
        steepest: Array | None = None,
    ) -> Array:
        """The dual value of a model at any multipliers, [B, 1]: no feasible point of it is below. NaN where they prove
        nothing.

        With μ > 0, half = 1/2μ, y is taken as −(g'λ + G'λ_G + A'ν + μ)/μ, so that any multipliers with 1'λ = 1 do: they
        are divided by the sum of those of the cuts. Without curvature, steepest [B, n] the most that a slope of the
        cuts is, that vector is 0 but for rounding, which counts by the size of y, the solution. What is more than 1e-7
        of what it is summed from counts by the bound that it points at; where that is infinite, so is the loss.
        """
        xp = self.xp
        held = xp.maximum(lam, 0.0)
        of_cuts, parts = xp.beyond(held, self.m), [held, nu, bounds]
        if steepest is not None:
            # What has no slope needs nothing to hold it: such multipliers are rounding, with nothing to see it by.
            most = xp.max(steepest)
            of_G, *others = (xp.where(most > 0.0, a, 0.0) for a in (xp.upto(held, self.m), nu, bounds))
            parts = [of_G, of_cuts, *others]
        multipliers = xp.concat(parts) / xp.sum(of_cuts)
        lower, upper = self.sides
        terms = multipliers * xp.concat([heights, self.P.b, xp.where(bounds > 0.0, upper, lower)])
        all_rows = xp.concat_rows([rows, self.A, self.unit])

        def summed(weights: Array, rows: Array) -> Array:
            return xp.upto(xp.slot(xp.row(weights) @ rows, 0), self.n)

        along = summed(multipliers, all_rows)
        if steepest is None:
            left = along * (along * half)
        else:
            cancel = xp.where(steepest > 0.0, steepest, most) + summed(abs(multipliers), abs(all_rows))
            side = xp.where(along > 0.0, self.below, self.above)
            left = abs(along * xp.where(abs(along) <= LEFT * cancel, y, side))
        return -xp.sum(xp.concat([terms, left]))


def steepness(xp: Namespace, steepest: Array) -> Array:
    """σ = min(1, max |g_i|), [B, 1]; 1 where all are 0."""
    return xp.where(steepest > 0.0, xp.minimum(steepest, 1.0), 1.0)


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


PASSING: Final = ("y", "f", "g", "going", "beaten_by", "steepest", "out", "falls")  # of no use after the last cut


def argmin(
    xp: Namespace,
    P: Polyhedron,
    value_and_gradient: ValueAndGradient,
    solve: Callable[[Programs, QP, Array | None], QPReference],
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
    programs = Programs(xp, P, mu)
    n, m, half_mu = programs.n, programs.m, 0.5 * mu

    def meet(y: Array, moving: Array) -> tuple[Array, ...]:
        """f, g and f + (μ/2) ‖y‖² at y, what is better than that, and which samples have numbers there."""
        f, g = value_and_gradient(y)
        met = f + half_mu * xp.sum(y * y)
        numbers = xp.concat([met, g])
        live = moving & (xp.sum(numbers - numbers) >= 0.0)
        # By more than a program is solved to, so that of points that are the same the first stays.
        return f, g, met, met - SAME * (1.0 + abs(met)), live

    first = solve(programs, programs.projection(y_init), None)
    verdict = xp.where(known, xp.column(first.status), int(QPStatus.NOT_FINITE_INPUT))
    started = verdict <= int(QPStatus.INACCURATE)
    y_0 = xp.where(started, first.z, 0.0)
    f, g, met, less, live = meet(y_0, started)
    nothing = xp.zeros(y_init, 1)
    never, nowhere, minus = nothing > 0.0, xp.zeros(y_init, n), nothing - 1.0
    start = _State(
        y=y_0,
        f=f,
        g=g,
        going=live,
        finite=live | ~started,
        code=verdict,
        best_y=xp.where(live, y_0, NAN),
        best=xp.like(nothing, iterations),
        energy=xp.where(live, met, INFINITY),
        beaten_by=xp.where(live, less, INFINITY),
        lower_bound=nothing - INFINITY,
        cuts=xp.like(nothing, iterations),
        lam=0.0 * programs.h,
        nu=0.0 * P.b,
        bounds=nowhere,
        residual=xp.zeros(y_init, 3) + NAN,
        rows=programs.G,
        heights=programs.h,
        points=xp.zeros(y_init, 0, n),
    )
    low, high = xp.isfinite(programs.below), xp.isfinite(programs.above)
    origin_size = xp.maximum(xp.max(abs(y_0)), 1.0)

    def all_cuts(flat: bool) -> _State:
        """The state after the last cut; `flat`: of μ = 0."""
        half = None if flat else 0.5 / mu

        def cut(k: Any, *state: Array) -> tuple[_State, tuple[()]]:
            """y_k is cut, the model of k + 1 cuts solved, and its answer met."""
            s = _State(*state)
            touches = s.g * s.y
            height, σ = xp.sum(touches) - s.f, None
            if flat:
                # Far out a cut is lowered by what rounding may have raised it.
                raised = (rounding.UNCERTAIN * eps) * (abs(s.f) + xp.sum(abs(touches)))
                height = height + xp.where(s.out > 0.0, raised, 0.0)
                σ = steepness(xp, xp.max(s.steepest))
            rows = xp.concat_rows([s.rows, xp.row(xp.concat([s.g, minus]))])
            heights = xp.concat([s.heights, xp.where(s.going, height, NAN)])
            solution = solve(programs, programs.model(rows, heights), σ)
            code, next_k = xp.column(solution.status), k + 1
            good = s.going & (code <= int(QPStatus.INACCURATE))
            z, bounds = xp.upto(solution.z, n), xp.upto(solution.mu, n)
            dual = programs.bound(rows, heights, solution.lam, solution.nu, bounds, z, half, s.steepest)
            lower_bound = xp.where(good & (dual > s.lower_bound), dual, s.lower_bound)  # NaN is not

            moving, y = good, xp.where(good, z, 0.0)
            if flat:
                falling = s.going & xp.equal(code, int(QPStatus.DUAL_INFEASIBLE))
                moving = good | falling
                further = xp.minimum(s.out, FURTHER) * s.out
                out = xp.where(s.falls, further, xp.maximum(xp.sqrt(s.out), OUT))
                out = xp.where(falling, xp.where(next_k >= iterations, FAR, xp.minimum(out, FAR)), 0.0)
                # The signs that the bounds of y ask for hold to the bit, Gd <= 0 and Ad = 0 to 1e-8 of d.
                d = xp.upto(solution.ray, n)
                d = xp.where(low, xp.maximum(d, 0.0), d)
                d = xp.where(falling, xp.where(high, xp.minimum(d, 0.0), d), 0.0)
                most = xp.max(abs(d))
                d = d / xp.where(most > 0.0, most, 1.0)
                y = xp.where(falling, y_0 + (out * origin_size) * d, y)
            f, g, met, less, live = meet(y, moving)
            finite, of_rays = live | ~moving, {}
            if flat:
                finite = finite | falling  # f may overflow far out: it does not fall there
                slope, last = abs(g), out >= FAR
                steepest = xp.where(live, xp.maximum(s.steepest, slope), s.steepest)
                # ∇f'd < 0 by more than the rounding of either.
                falls = live & falling & (xp.sum(g * d) < -FALLS * xp.sum(steepest * abs(d)))
                mild = xp.max(slope - MILD * s.steepest) <= 0.0
                live = live & (~last | (mild & ~falls))
                of_rays = {"steepest": steepest, "out": out, "falls": falls}
                of_rays |= {"ray": xp.where(s.unbounded, s.ray, d), "unbounded": s.unbounded | (falls & last)}
            feasible = good & (xp.beyond(xp.upto(solution.residual, 2), 1) <= ENOUGH)
            better = live & feasible & (met < s.beaten_by)
            energy = xp.where(better, met, s.energy)
            after = _State(
                y=y,
                f=f,
                g=g,
                going=live & ~_near(xp, energy - lower_bound, lower_bound, tolerance),
                finite=s.finite & finite,
                code=xp.where(s.going, code, s.code),
                best_y=xp.where(better, y, s.best_y),
                best=xp.where(better, next_k, s.best),
                energy=energy,
                beaten_by=xp.where(better, less, s.beaten_by),
                lower_bound=lower_bound,
                cuts=xp.where(good, next_k, s.cuts),
                lam=xp.where(good, solution.lam, xp.concat([s.lam, nothing])),
                nu=xp.where(good, solution.nu, s.nu),
                bounds=xp.where(good, bounds, s.bounds),
                residual=xp.where(good, solution.residual, s.residual),
                rows=rows,
                heights=heights,
                points=xp.concat_rows([s.points, xp.row(s.y)]),
                **of_rays,
            )
            return after, ()

        state = start
        if flat:
            steepest = xp.where(live, abs(g), 0.0)
            state = start._replace(steepest=steepest, out=nothing, falls=never, ray=nowhere, unbounded=never)
        found, _ = xp.repeat(
            xp.maximum(iterations, 1), cut, state, unfinished=lambda *state: xp.any(_State(*state).going)
        )
        end = _State(*found)._replace(**dict.fromkeys(PASSING))
        return end if flat else end._replace(ray=nowhere, unbounded=never)

    end = _State(*xp.cond(mu > 0.0, lambda: all_cuts(flat=False), lambda: all_cuts(flat=True)))
    slopes, _ = xp.parts(xp.beyond(end.rows, m), [y_init, None])
    offsets, points = -xp.beyond(end.heights, m), end.points
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
