"""The quadratic programs of the bundle method over a polyhedron P, and what their multipliers prove.

A model is that of the cuts g_i'y + e_i met so far, over (y, t): rows are those of G, then the cuts, with t as their
last entry, heights what bounds them. A program's h_lower is None, which is none.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from icnnrt.mathematics.namespace import Array, Namespace
from icnnrt.mathematics.qp_reference import BOUND_MAX, QP, QPReference

LEFT: Final = 1e-7  # what may be left of stationarity without curvature, against the terms that cancel
INFINITY: Final = float("inf")

Solve: TypeAlias = Callable[[QP], QPReference]  # of arrays of the namespace


class Polyhedron(NamedTuple):
    """{y: Gy <= h, Ay = b, lower <= y <= upper}; infinite bounds are none."""

    G: Array  # [B, m, n]
    h: Array  # [B, m]
    A: Array  # [B, q, n]
    b: Array  # [B, q]
    lower: Array  # [B, n]
    upper: Array  # [B, n]


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
