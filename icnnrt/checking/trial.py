"""What all checks of one package share: its session, the contexts, where y lies, and random numbers."""

import functools
import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, finite_rows
from icnnrt.checking import problems
from icnnrt.checking.report import Array, Arrays
from icnnrt.errors import InputError
from icnnrt.format.manifest import Manifest
from icnnrt.format.package import Package
from icnnrt.format.signatures import expected
from icnnrt.mathematics import certificate
from icnnrt.mathematics.domains import MODELS, UNIT_BOX, coordinates
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.status import Status
from icnnrt.serving.load import AnySession


class Trial:
    """One session of a package and the contexts it is tried on; `again` is how it was opened, to open another."""

    def __init__(self, package: Package, session: AnySession, X: NDArray[Any], rng: np.random.Generator, **again: Any):
        self.package, self.session, self.X, self.rng, self.again = package, session, X, rng, again
        self.manifest, self.n = package.manifest, package.manifest.y_shape[0]
        self.T, self.dtype = self.manifest.dtype, session.dtype
        self.bounds = random_bounds(self.manifest, len(X), rng)
        domain = self.manifest.domain
        self.domain = MODELS[domain.kind] if domain else UNIT_BOX
        self.at = coordinates(self.bounds, domain.mu if domain else None)
        ours = (role for role in self.manifest.graphs if expected(self.manifest, role))
        self.has = {"files", self.manifest.kind, *ours}
        self.has |= {name for name, there in (("golden", package.golden), ("bounds", self.bounds)) if there}

    @functools.cached_property
    def problem(self) -> problems.Problem:
        """What the package solves for these contexts, if it has a solver or is of kind "qp"."""
        if self.manifest.kind == "qp":
            return problems.quadratic_programs(self.session, {"x": self.X})
        return problems.argmin(self.session, {"x": self.X, **self.bounds}, self.f, self.domain, self.at)

    def counts(self) -> dict[str, int]:
        """How many samples have which status; none where there is nothing that has one."""
        codes = self.problem.answer.status if self.has & {"argmin", "solve"} else ()
        return dict(Counter(Status(int(code)).name for code in codes))

    def f(self, y: Array, X: NDArray[Any] | None = None) -> tuple[Array, Array]:
        """f and ∇_y f by the package's own value graph, from and to float64."""
        f, g = self.session.value_and_gradient(self.X if X is None else X, self.rounded(y))
        return f.astype(np.float64), g.astype(np.float64)

    def g(self, y: Array) -> Array:
        """∇_y f alone, which every package of an energy has."""
        return self.session.gradient(self.X, self.rounded(y)).astype(np.float64)

    def rounded(self, y: Array) -> NDArray[Any]:
        """y as the package takes it."""
        return y.astype(self.dtype)

    def noise(self, f: Array, g: Array, y: Array) -> Array:
        """What rounding may add to f at y, as in the verdict on a sample: [B]."""
        reach = (np.abs(g) * np.maximum(0.5, np.abs(y))).sum(1)
        return certificate.ROUNDING * np.finfo(self.dtype).eps * np.maximum(1.0, np.abs(f) + reach)

    # --- Where it is looked at: points p [B, n] in float64 of the domain; y = at.y(p) -------------------------------

    def somewhere(self) -> Array:
        """Random points of the domain."""
        return self.domain.random(self.rng, len(self.X), self.n)

    def inset(self, p: Array, room: float) -> Array:
        """The points p, drawn to the centre until steps as long as `longest` leave none of the edges behind."""
        centre, edge = self.domain.centre(self.n), self.domain.edges[0]
        # Halfway where entries share a sum: most of them are near 0 then.
        share = 0.5 if self.domain.total else self.longest(room) / (centre - edge)
        return centre + (1 - share) * (p - centre)

    def longest(self, room: float) -> float:
        """The longest step, in the largest entry of a direction, that `inset` leaves room for."""
        return min(room, 0.5 * (self.domain.centre(self.n) - self.domain.edges[0]))

    def tangent(self, d: Array) -> Array:
        """The part of the directions d [B, n] that stays in the domain, with length 1."""
        d = np.asarray(self.domain.plain(NUMPY, d))
        return d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), np.finfo(np.float64).tiny)

    def reach(self, p: Array, d: Array) -> Array:
        """The largest t [B, 1] with p ± t d in the domain; of R^n the length of a typical p."""
        low, high = self.domain.edges
        room = np.minimum(p - low, high - p) / np.maximum(np.abs(d), 1e-12)
        return np.asarray(np.minimum(room.min(1, keepdims=True), math.sqrt(self.n)))

    def interior(self, room: float) -> tuple[Array, Array]:
        """Points y [B, n] of the domain, as the dtype rounds them, and directions d such that y ± room·d lie in it."""
        y = self.rounded(self.at.y(self.inset(self.somewhere(), room))).astype(np.float64)
        d = self.tangent(self.rng.standard_normal(y.shape))
        d = d / np.maximum(np.abs(d).max(1, keepdims=True), np.finfo(np.float64).tiny)
        return y, self.at.scale * d * (self.longest(room) / room)

    def directions(self, arrays: Arrays, *, batched: bool = True) -> dict[str, Array]:
        """One for each array, in each sample if they are `batched`, as long as a typical entry, however many there are:
        a network moved by h in every entry moves far more than h."""
        found = {}
        for name, a in arrays.items():
            finite = a[np.isfinite(a)].astype(np.float64)
            size = (math.sqrt(np.mean(np.square(finite))) if finite.size else 0.0) or 1.0
            entries = max(a[0].size if batched else a.size, 1)
            found[name] = self.rng.standard_normal(a.shape) * (size / math.sqrt(entries))
        return found


def contexts(manifest: Manifest, x: object, samples: int | None, rng: np.random.Generator) -> NDArray[Any]:
    """At most so many finite samples of x, in their order, all where None; without x standard normal ones."""
    if x is None:
        return rng.standard_normal((samples or 1, *manifest.x_shape)).astype(manifest.dtype)
    X = batch(x, "x", manifest.dtype, manifest.x_shape)
    X = X[finite_rows(X)]
    if not len(X):
        raise InputError("x: expected at least one sample without NaN and infinity, but got none; clean the data.")
    return X[np.sort(rng.permutation(len(X))[:samples])]


def random_bounds(manifest: Manifest, B: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Lower and upper [B, n] around and beside [0, 1]^n, for a package whose y lies in a box; nothing for others."""
    if manifest.domain is None or not MODELS[manifest.domain.kind].bounds:
        return {}
    lower = rng.uniform(-1.0, 0.5, (B, *manifest.y_shape))
    upper = lower + rng.uniform(0.2, 2.0, lower.shape)
    return {"lower": lower.astype(manifest.dtype), "upper": upper.astype(manifest.dtype)}
