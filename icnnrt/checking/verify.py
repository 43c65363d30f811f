"""Checks of a package by what it does: each one compares two ways to the same number, none needs torch.

    package       sizes, hashes and the structure of every file (`Package.open`)
    signs         the weights of which f's convexity in y asks a sign: how far within it the nearest entry is
    convexity proof  disciplined rules on the value graph (`icnnrt.convexity`)
    gradient      g = ∇_y f against differences, by the subgradient inequality, which holds at kinks too
    convexity     f at the middle of a segment against the mean of its ends; of a gradient alone, its monotony
    hvp, hessian  against differences of the gradient; gradient_x against differences of f; pullback, by y, x and the
                  weights, against differences of f̄ f + ḡ'∇f; each if it is there
    polyhedron    y* under random linear constraints against `mathematics.bundle_qp`, run around the package's own value
                  graph, and its adjoint by x and the constraints against differences; if the head is there
    golden        outputs stored at the export, against the same computed here
    argmin        y* and its energy against `mathematics.reference`, run in float64 around the package's own value graph
    certificate   energy, gap and KKT residuals, recomputed
    lower bound   against every energy seen, random points included
    kernels       y* of the native kernels, if they run, against that of the portable bodies
    adjoint       x̄, θ̄ and, of a box, the cotangents of its bounds against central differences of the K-step argmin
    status        how many samples have which status

Points y lie in the package's domain, within random bounds where that is a box; without a solver in [0, 1]^n.

A check judges the worst sample against that sample's own bound, except for the adjoint: the K-step argmin of a
piecewise-linear energy has kinks in x and θ, a difference that straddles one is not a derivative, and so the median
over the samples is judged there.

Differences of rounded numbers need steps and bounds that suit the dtype; `_FLOATING` holds them, with reasons.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, finite_rows, integer
from icnnrt.checking import golden
from icnnrt.convexity import Grounds, Repeated
from icnnrt.errors import InputError
from icnnrt.format.fields import strict
from icnnrt.format.manifest import Manifest
from icnnrt.format.package import Package, opened
from icnnrt.limits import check
from icnnrt.mathematics import bregman, certificate, reference
from icnnrt.mathematics.bundle_qp import Polyhedron, bundle_qp_argmin
from icnnrt.mathematics.domains import MODELS, SIMPLEX, SPACE, UNIT_BOX, Coordinates, box_coordinates, space_coordinates
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.status import ANSWERED, Status
from icnnrt.ort import Provider
from icnnrt.serving import polyhedron
from icnnrt.serving.argmin import ArgminSolution
from icnnrt.serving.load import load
from icnnrt.serving.qp_session import QPNetworkSolution
from icnnrt.serving.session import Session
from icnnrt.serving.solution import Solution

Array = NDArray[np.float64]
Verdict = Literal["pass", "fail", "skipped"]

MAX_SAMPLES: Final = 1 << 16
DIRECTIONS: Final = 4  # directions, segments and random points for every sample
ADJOINT_SAMPLES: Final = 16  # θ̄ of one sample takes a run of its own, so only this many are tried
WEIGHT_DIRECTIONS: Final = 2
CURVATURE_ITERATIONS: Final = 12
CURVATURE_STEP: Final = 0.05
FAR: Final = 3.0  # how many times further out than a typical point of R^n
# max |H − H'| / max |H|: both halves are sums of the same terms in another order.
SKEW: Final = {"float64": 1e-9, "float32": 1e-3}


class _Floating(NamedTuple):
    """What differences in one dtype can tell."""

    gradient_steps: tuple[float, ...]
    """Steps h along y. Every one gives a valid bracket: a short one is narrow, a long one is little disturbed by the
    rounding of f, which counts divided by h."""
    y: float
    """What y* may differ by from the reference where the gap would allow less: the order of sums, magnified by K
    solves."""
    energy: float
    """The same for the energy, relative to max(1, |energy|)."""
    adjoint_steps: tuple[float, ...]
    """Steps along x and θ, relative to their size; the difference that comes nearest counts. The longest is the cube
    root of the rounding of y*; in float32 many samples of a piecewise-linear energy straddle kinks with it, and the
    shorter ones, though noisier, do not."""
    adjoint: float
    """The relative error the median may have: truncation and rounding at those steps, with a margin of 10 or more."""
    y_noise: float
    """Rounding of an entry of y*, which a difference divides by the step."""


_FLOATING: Final = {
    "float64": _Floating((1e-2, 1e-4, 1e-6), 1e-6, 1e-9, (1e-5, 1e-6), 1e-3, 1e-12),
    "float32": _Floating((1e-1, 1e-2, 1e-3), 1e-3, 1e-4, (1e-2, 1e-3), 1e-1, 1e-7),
}


# z of a quadratic program, relative: to the root of a gap of 1e-12 where a constraint is weakly active; float32 data
# move it by their rounding too.
QP_Z: Final = {"float64": 1e-5, "float32": 1e-3}


POLYHEDRON_SAMPLES: Final = 8  # the reference takes one quadratic program in numpy a cut
POLYHEDRON_CUTS: Final = 200
# Of a gap, for differences of y: y is open by its root. In float32 rounding ends the descent before.
FINE: Final = {"float64": 1e-12, "float32": 1e-7}
# Steps along x and the constraints: the longest that few samples cross a kink with.
POLYHEDRON_STEPS: Final = {"float64": (1e-2, 1e-3), "float32": (1e-1, 1e-2)}


@dataclass(frozen=True)
class Check:
    """One comparison: `figure` should not be above `bound` (for `signs`: not below)."""

    name: str
    figure: float | None
    bound: float | None
    verdict: Verdict
    detail: str
    """One line: what the figure is, or why the check was skipped."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    package: str
    name: str
    dtype: str
    samples: int
    seed: int
    source: str
    """Where x came from: "data" or "random"."""
    checks: tuple[Check, ...]
    status: dict[str, int]
    """How many samples have which status."""

    @property
    def passed(self) -> bool:
        """No check failed; skipped ones count as neither."""
        return all(check.verdict != "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for strict JSON: NaN and infinity are None."""
        return {**strict(asdict(self)), "passed": self.passed}


def verify(
    path: str | os.PathLike[str] | Package,
    x: object = None,
    *,
    samples: int = 64,
    seed: int = 0,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    native: bool | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> VerifyReport:
    """Check the package at `path`, or one that is open, on contexts x; every figure has its bound and verdict.

    x:         [B, *x_shape]; real data, of which at most `samples` are drawn. Without it x is standard normal, which
               may be unlike anything the model was trained on
    samples:   how many contexts
    seed:      of all random numbers; equal seeds give equal figures
    providers, threads, native: as for `icnnrt.load`
    progress:  called with a line of text at each stage

    Raises `PackageError` for a package that cannot be opened at all, `InputError` for x of the wrong shape or without
    a finite sample.
    """
    samples, seed = integer(samples, "samples", 1, MAX_SAMPLES), integer(seed, "seed", 0, 2**63 - 1)

    def begun(stage: str) -> None:
        check(f"verify: {stage}")
        progress(stage)

    begun("hashes and structure")
    package = opened(path)
    manifest = package.manifest
    checks = [
        Check("package", 0.0, 0.0, "pass", f"{_files(manifest)} files agree with the manifest"),
        _signs(package),
    ]
    rng = np.random.default_rng(seed)
    X = contexts(manifest, x, samples, rng)
    with load(package, providers=providers, threads=threads, native=native) as session:
        kind = _QPTrial if manifest.kind == "qp" else _Trial
        trial = kind(session, X, rng, providers=providers, threads=threads)
        for stage, applies, of in _CHECKS:
            if applies(trial):
                begun(stage)
                checks += of(trial)
    return VerifyReport(
        str(package.path),
        manifest.name,
        manifest.dtype,
        len(X),
        seed,
        "random" if x is None else "data",
        tuple(checks),
        trial.counts(),
    )


def contexts(manifest: Manifest, x: object, samples: int, rng: np.random.Generator) -> NDArray[Any]:
    """At most so many finite samples of x, in their order; without x standard normal ones."""
    if x is None:
        return rng.standard_normal((samples, *manifest.x_shape)).astype(manifest.dtype)
    X = batch(x, "x", manifest.dtype, manifest.x_shape)
    X = X[finite_rows(X)]
    if not len(X):
        raise InputError("x: expected at least one sample without NaN and infinity, but got none; clean the data.")
    return X[np.sort(rng.permutation(len(X))[:samples])]


def _files(manifest: Manifest) -> int:
    """Manifest, weights, graphs, and golden data if there is any."""
    return len(manifest.graphs) + 2 + (manifest.golden is not None)


def _golden(session: Session, package: Package) -> Iterator[Check]:
    for name, difference, bound in golden.replay(session, package.golden):
        verdict: Verdict = "pass" if difference <= bound else "fail"
        yield Check(f"golden: {name}", difference, bound, verdict, "stored at the export against computed here")


def _proof(session: Session, X: NDArray[Any]) -> Check:
    """What the rules say of the value graph; that they say nothing is no failure."""
    found = session.prove_convexity(X)
    verdicts: dict[str, Verdict] = {"proven": "pass", "violated": "fail", "unknown": "skipped"}
    excess = found.witness.excess if found.witness else None
    told = found.sentence().removesuffix(".")
    if found.verdict == "proven" and found.rests_on is not None:
        package = session.package
        told_of = package.manifest.weights
        noted = Grounds(told_of.signs, found.rests_on)
        proof = Repeated(package.graphs["value"], package.weights, noted, told_of.trainable)
        if lost := proof.failure(package.weights):
            told += f", but not for all weights with the signs that the manifest notes: {lost}"
            return Check("convexity proof", excess, None, "fail", told)
        told += ", and with all weights of the signs that the manifest notes" if noted.signs else ""
    return Check("convexity proof", excess, None, verdicts[found.verdict], told)


def _signs(package: Package) -> Check:
    marked = package.manifest.weights.signs
    if not marked:
        instead = "" if package.manifest.kind == "qp" else "; convexity is tried instead"
        return Check("signs", None, 0.0, "skipped", f"no sign is asked of any weight{instead}")
    inside = min(-sign.violation(package.weights[name]) for name, sign in marked.items())
    detail = f"how far within its sign the nearest entry of {len(marked)} weights is"
    return Check("signs", inside, 0.0, "pass" if inside >= 0 else "fail", detail)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda c: Status[c[0]]))


def _status(solution: Solution, counts: dict[str, int]) -> Check:
    # GAP and PRECISION are honest answers with their certificates; the others are none.
    bad = ~np.isin(solution.status, ANSWERED)
    useless = int(bad.sum())
    detail = _listed(counts)
    if useless:
        first = int(np.argmax(bad))
        detail += f"; {solution.advice(first)}"
    return Check("status", useless / len(solution), 0.0, "fail" if useless else "pass", detail)


def _worst(name: str, figure: Array, bound: Array, what: str) -> Check:
    """Judge every sample against its own bound, and show the one that comes nearest to it or goes furthest beyond."""
    if not figure.size:
        return Check(name, None, None, "skipped", "no sample has a finite answer")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(figure <= bound, np.where(bound > 0, figure / bound, 0.0), np.inf)
        excess = np.where(np.isfinite(figure), figure - bound, np.inf)  # NaN is the worst of all
    at = int(np.argmax(excess) if np.isinf(ratio).any() else np.argmax(ratio))
    good = bool((figure <= bound).all())
    return Check(name, float(figure[at]), float(bound[at]), "pass" if good else "fail", what)


def _qp_status(answer: QPNetworkSolution, counts: dict[str, int]) -> Check:
    """That some programs have no solution is what their status is for; that none has is no network to use."""
    unsolved = int((~answer.ok).sum())
    detail = _listed(counts)
    if unsolved:
        detail += f"; {answer.advice(int(np.argmin(answer.ok)))}"
    return Check("status", unsolved / len(answer), None, "fail" if unsolved == len(answer) else "pass", detail)


class _Trial:
    """One session and the contexts it is tried on; `again` is how it was opened, for another that takes the bodies."""

    def __init__(self, session: Session, X: NDArray[Any], rng: np.random.Generator, **again: Any) -> None:
        self.session, self.manifest, self.again = session, session.manifest, again
        self.X = X
        self.rng = rng
        self.n = session.manifest.y_shape[0]
        self.floating = _FLOATING[session.manifest.dtype]
        self.bounds: dict[str, NDArray[Any]] = {}
        self.at = Coordinates(0.0, 1.0)
        domain = session.manifest.domain
        self.domain = MODELS[domain.kind] if domain else UNIT_BOX
        if domain and domain.kind == "box":
            lower = rng.uniform(-1.0, 0.5, (len(X), self.n))
            upper = lower + rng.uniform(0.2, 2.0, lower.shape)
            self.bounds = {"lower": lower.astype(session.dtype), "upper": upper.astype(session.dtype)}
            self.at = box_coordinates(*(bound.astype(np.float64) for bound in self.bounds.values()))
        elif domain and domain.mu is not None:
            self.at = space_coordinates(domain.mu)

    @functools.cached_property
    def answer(self) -> Any:
        """Of all contexts, computed with the first check that asks for it."""
        return self.argmin(self.X)

    def counts(self) -> dict[str, int]:
        """How many samples have which status; none where there is nothing that has one."""
        if not (self.manifest.solver or self.manifest.kind == "qp"):
            return {}
        return dict(Counter(Status(int(code)).name for code in self.answer.status))

    def argmin(self, X: NDArray[Any], rows: Any = slice(None), **moved: NDArray[Any]) -> Any:
        """The argmin within this trial's bounds, or others, of the samples `rows`."""
        bounds = {name: bound[rows] for name, bound in {**self.bounds, **moved}.items()}
        return self.session.argmin(X, lower=bounds.get("lower"), upper=bounds.get("upper"))

    def somewhere(self, B: int) -> Array:
        """Random points p [B, n] of the domain."""
        if self.domain is SIMPLEX:
            return self.rng.dirichlet(np.ones(self.n), B)
        return self.rng.standard_normal((B, self.n)) if self.domain is SPACE else self.rng.random((B, self.n))

    def g(self, y: Array) -> Array:
        """∇_y f, from and to float64."""
        return self.session.gradient(self.X, y.astype(self.session.dtype)).astype(np.float64)

    def f(self, y: Array, X: NDArray[Any] | None = None) -> tuple[Array, Array]:
        """f and ∇_y f by the package's own value graph, from and to float64."""
        f, g = self.session.value_and_gradient(self.X if X is None else X, y.astype(self.session.dtype))
        return f.astype(np.float64), g.astype(np.float64)

    def noise(self, f: Array, g: Array, y: Array) -> Array:
        """What rounding may add to f at y, as in the verdict on a sample: [B]."""
        reach = (np.abs(g) * np.maximum(0.5, np.abs(y))).sum(1)
        return certificate.ROUNDING * np.finfo(self.session.dtype).eps * np.maximum(1.0, np.abs(f) + reach)

    def interior(self, room: float) -> Array:
        """Random points p [B, n] of the domain, in float64, about `room` or more away from its edges."""
        p = self.somewhere(len(self.X))
        if self.domain is UNIT_BOX:
            return room + (1 - 2 * room) * p
        return 0.5 * (p + 1.0 / self.n) if self.domain is SIMPLEX else p

    def along(self, d: Array, room: float) -> Array:
        """Directions d [B, n], made such that interior(room) ± room·d lies in the domain."""
        if self.domain is SIMPLEX:
            d = d - d.mean(1, keepdims=True)
        d = d / np.maximum(np.abs(d).max(1, keepdims=True), np.finfo(np.float64).tiny)
        return d * min(1.0, 0.5 / (self.n * room)) if self.domain is SIMPLEX else d

    # --- The energy ------------------------------------------------------------------------------

    def gradient(self) -> Check:
        """min(φ⁻, φ⁺) <= g'd <= max(φ⁻, φ⁺) with the one-sided differences φ⁻ = (φ(0) − φ(−h))/h, φ⁺ likewise.

        For convex φ(t) = f(y + t d) that is the subgradient inequality, true for every h > 0, at kinks too.
        """
        B, steps = len(self.X), self.floating.gradient_steps
        room = max(steps)
        outside, allowed, width, size = [], [], [], []
        for _ in range(DIRECTIONS):
            # y in the dtype first, so that y, y + h d and y − h d lie on one line as nearly as they can.
            y = self.at.y(self.interior(room)).astype(self.session.dtype).astype(np.float64)
            d = self.at.scale * self.along(self.rng.standard_normal(y.shape), room)
            f, g = self.f(y)
            noise = self.noise(f, g, y)
            for h in steps:
                # What the dtype makes of the step, so that the rounding of y does not count.
                forth, back = ((y + t * d).astype(self.session.dtype).astype(np.float64) - y for t in (h, -h))
                rise = self.f(y + forth)[0] - f - (g * forth).sum(1)
                fall = self.f(y + back)[0] - f - (g * back).sum(1)
                # The subgradient inequality says rise >= 0 and fall >= 0; where f is concave along d, both are <= 0.
                # g is none of f's slopes if one is positive and the other negative.
                outside.append(np.minimum(np.maximum(rise, fall), -np.minimum(rise, fall)) / h)
                allowed.append(2 * noise / h)
                width.append(np.abs(rise + fall) / h)
                size.append(np.abs((g * d).sum(1)))
        outside_all = np.maximum(np.concatenate(outside), 0.0)
        brackets = np.min(np.reshape(width, (DIRECTIONS, len(steps), B)), axis=1)
        what = (
            f"g'd beyond its one-sided differences, whose median bracket is {np.median(brackets):.1e} wide at "
            f"|g'd| = {np.median(size):.1e}"
        )
        return _worst("gradient", outside_all, np.concatenate(allowed), what)

    def convexity(self) -> Check:
        """f((a + b)/2) <= (f(a) + f(b))/2 for a, b in the domain: random points, corners, and where it bends down most.

        The corners of a simplex are the unit vectors; R^n has none, and points further out stand in for them.
        """
        B, n, count = len(self.X), self.n, 0
        excess, allowed = [], []
        for _ in range(DIRECTIONS):
            p = self.somewhere(B)
            d = self._least_curved(p)
            t = self._reach_along(p, d) * d
            anywhere = [self.somewhere(B), self.somewhere(B)]
            if self.domain is SIMPLEX:
                corners = list(np.eye(n)[self.rng.integers(n, size=(2, B))])
            elif self.domain is SPACE:
                corners = [FAR * far for far in self.rng.standard_normal((2, B, n))]
            else:
                corners = list(np.round(self.rng.random((2, B, n))))
            segments = [anywhere, corners, [p - t, p + t], [p - 0.1 * t, p + 0.1 * t]]
            for ends in segments:
                if self.domain is not SPACE:
                    ends = [np.clip(end, 0.0, 1.0) for end in ends]
                found, noise = self._above_chord(*(self.at.y(end) for end in ends))
                excess.append(found)
                allowed.append(noise)
            count += len(segments)
        what = f"f at the middle above the mean of the ends, {count} segments a sample"
        return _worst("convexity", np.concatenate(excess), np.concatenate(allowed), what)

    def _above_chord(self, a: Array, b: Array) -> tuple[Array, Array]:
        """max(0, f((a + b)/2) − (f(a) + f(b))/2) and what rounding may make of it, [B] each."""
        T = self.session.dtype
        a, b = a.astype(T).astype(np.float64), b.astype(T).astype(np.float64)
        (f_a, g_a), (f_b, g_b), (f_m, g_m) = self.f(a), self.f(b), self.f((a + b) / 2)
        noise = np.max([self.noise(f_a, g_a, a), self.noise(f_b, g_b, b), self.noise(f_m, g_m, (a + b) / 2)], axis=0)
        return np.maximum(f_m - (f_a + f_b) / 2, 0.0), 2 * noise

    def _reach_along(self, p: Array, d: Array) -> Array:
        """The largest t [B, 1] with p ± t d in the domain; of R^n the length of a typical p."""
        if self.domain is SPACE:
            return np.full((len(p), 1), math.sqrt(self.n))
        size = np.maximum(np.abs(d), 1e-12)
        room = p if self.domain is SIMPLEX else np.minimum(p, 1 - p)
        return np.asarray((room / size).min(1, keepdims=True))

    def _least_curved(self, p: Array) -> Array:
        """Directions d [B, n] of small, if possible negative, d'∇²f(p)d: the power method on c − ∇²f, in p.

        A random direction misses one negative eigenvalue among many positive ones. The Hessian is told by differences
        of g over a wide step, so kinks show as curvature too. It only chooses where to look: it convicts nobody.
        """
        f_of_p = reference.in_coordinates(self.f, self.at)
        tangent = self.domain is SIMPLEX
        step = min(CURVATURE_STEP, 0.5 / self.n) if tangent else CURVATURE_STEP
        # Far enough from the edges that p ± step d stays in the domain.
        if tangent:
            p = 0.5 * (p + 1.0 / self.n)
        elif self.domain is UNIT_BOX:
            p = step + (1 - 2 * step) * p
        d = self.rng.standard_normal(p.shape)
        c = np.zeros((len(p), 1))
        for _ in range(CURVATURE_ITERATIONS):
            if tangent:
                d = d - d.mean(1, keepdims=True)
            d = d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), np.finfo(np.float64).tiny)
            bend = (f_of_p(p + step * d)[1] - f_of_p(p - step * d)[1]) / (2 * step)
            bend = np.where(np.isfinite(bend), bend, 0.0)
            c = np.maximum(c, np.linalg.norm(bend, axis=1, keepdims=True))
            moved = c * d - bend
            d = np.where(np.linalg.norm(moved, axis=1, keepdims=True) > 0, moved, d)
        return d - d.mean(1, keepdims=True) if tangent else d

    def monotony(self) -> Check:
        """(g(a) − g(b))'(a − b) >= 0, which holds for the gradient of a convex function and no other."""
        T = self.session.dtype
        below, allowed = [], []
        for scale in (1.0, 0.1, 0.01):
            for _ in range(DIRECTIONS):
                a = self.rng.random((len(self.X), self.n)).astype(T).astype(np.float64)
                b = (a + scale * self.rng.standard_normal(a.shape)).astype(T).astype(np.float64)
                g_a, g_b = self.g(a), self.g(b)
                below.append(np.maximum(-((g_a - g_b) * (a - b)).sum(1), 0.0))
                size = (np.abs(g_a) + np.abs(g_b)) * np.abs(a - b)
                allowed.append(certificate.ROUNDING * np.finfo(T).eps * np.maximum(size.sum(1), scale**2))
        what = f"−(g(a) − g(b))'(a − b), {len(below)} pairs a sample"
        return _worst("monotony", np.concatenate(below), np.concatenate(allowed), what)

    def hvp(self) -> Check:
        """∇²f v against [∇f(y + h v) − ∇f(y − h v)] / 2h."""
        y, v = self._interior()
        product = self.session.hvp(self.X, y, v.astype(self.session.dtype)).astype(np.float64)
        return self._against_differences("hvp", product, lambda t: self.g(y + t * v), "∇f along v")

    def hessian(self) -> Check:
        """The dense Hessian: along a direction against differences of ∇f, and symmetric."""
        y, v = self._interior()
        H = self.session.hessian(self.X, y).astype(np.float64)
        skew = np.abs(H - H.swapaxes(1, 2)).max((1, 2)) / np.maximum(1.0, np.abs(H).max((1, 2)))
        product = np.einsum("bij,bj->bi", H, v)
        check = self._against_differences("hessian", product, lambda t: self.g(y + t * v), "∇f along v")
        bound = SKEW[self.session.dtype.name]
        if not skew.max(initial=0.0) <= bound:
            what = "max |H − H'|, relative: the gradient exported is not the gradient of anything"
            return Check("hessian", float(skew.max()), bound, "fail", what)
        return check

    def gradient_x(self) -> Check:
        """∇_x f'd against [f(x + h d) − f(x − h d)] / 2h."""
        if not self.X[0].size:
            return Check("gradient_x", None, None, "skipped", "the energy has no context")
        (y, _), T = self._interior(), self.session.dtype
        size = math.sqrt(float(np.mean(np.square(self.X, dtype=np.float64)))) or 1.0
        d = self.rng.standard_normal(self.X.shape) * (size / math.sqrt(self.X[0].size))
        told = _rows(self.session.gradient_x(self.X, y).astype(np.float64) * d)[:, None]

        def along(t: float) -> Array:
            return self.session.value((self.X + t * d).astype(T), y).astype(np.float64)[:, None]

        return self._against_differences("gradient_x", told, along, "f along a direction of x")

    def pullback(self) -> Iterator[Check]:
        """ȳ'd, x̄'d and θ̄'d of each sample against differences of φ = f̄ f + ḡ'∇_y f."""
        (y, v), T, session = self._interior(), self.session.dtype, self.session
        f_bar = self.rng.standard_normal(len(y)).astype(T)
        gradient_bar = self.rng.standard_normal(y.shape).astype(T)
        pulled = session.pullback(self.X, y, f_bar, gradient_bar)
        what = "φ = f̄ f + ḡ'∇f"

        def φ(y: Array, X: NDArray[Any] | None = None) -> Array:
            f, g = self.f(y, X)
            return (f_bar * f + (gradient_bar * g).sum(1))[:, None]

        told = (pulled.y * v).sum(1)[:, None]
        yield self._against_differences("pullback: y", told, lambda t: φ(y + t * v), f"{what} along a direction of y")
        if self.X[0].size:
            size = math.sqrt(float(np.mean(np.square(self.X, dtype=np.float64)))) or 1.0
            d = self.rng.standard_normal(self.X.shape) * (size / math.sqrt(self.X[0].size))
            told = _rows(pulled.x.astype(np.float64) * d)[:, None]
            yield self._against_differences(
                "pullback: x", told, lambda t: φ(y, (self.X + t * d).astype(T)), f"{what} along a direction of x"
            )
        yield self._pullback_by_weights(y, f_bar, gradient_bar, what)

    def _pullback_by_weights(self, y: Array, f_bar: NDArray[Any], gradient_bar: NDArray[Any], what: str) -> Check:
        """θ̄'d of one sample at a time, as a kink that one of them straddles would spoil the sum of all.

        The session's weights are changed in place and, whatever happens, put back.
        """
        name, session, few = "pullback: weights", self.session, slice(ADJOINT_SAMPLES)
        X, y, f_bar, gradient_bar = self.X[few], y[few], f_bar[few], gradient_bar[few]
        alone = [slice(i, i + 1) for i in range(len(y))]
        bars = [session.pullback(X[i], y[i], f_bar[i], gradient_bar[i]).weights for i in alone]
        old = {key: session.weights[key] for key in bars[0]}
        if not old:
            return Check(name, None, None, "skipped", "no weight is trainable")
        directions = [{key: self._direction(a) for key, a in old.items()} for _ in range(WEIGHT_DIRECTIONS)]
        told = [sum(float((bar[key] * d[key]).sum()) for key in old) for d in directions for bar in bars]

        def along(t: float) -> Array:
            rows = []
            for d in directions:
                session.update_weights({key: (a + t * d[key]).astype(a.dtype) for key, a in old.items()})
                f, g = self.f(y, X)
                rows.append(f_bar * f + (gradient_bar * g).sum(1))
            return np.concatenate(rows)[:, None]

        try:
            return self._against_differences(name, np.array(told)[:, None], along, f"{what} along a direction of θ")
        except InputError as error:  # a frozen export: its weights are constants of the graphs
            return Check(name, None, None, "skipped", f"the weights cannot be changed in memory: {error}")
        finally:
            session.update_weights(old)

    def _interior(self) -> tuple[Array, Array]:
        """Points y of the domain, and directions with room for every step of `_against_differences`."""
        room = 0.1
        y = self.at.y(self.interior(room)).astype(self.session.dtype).astype(np.float64)
        return y, self.at.scale * self.along(self.rng.standard_normal(y.shape), room)

    def _against_differences(self, name: str, told: Array, along: Callable[[float], Array], what: str) -> Check:
        """told [B, m] against central differences of `along`, at the step that comes nearest for each sample.

        Judged at the median, as a difference that straddles a kink is no derivative.
        """
        relative, steps = self.floating.adjoint, self.floating.adjoint_steps
        differences = np.array([(along(h) - along(-h)) / (2 * h) for h in steps])
        scale = max(1.0, float(np.median(np.abs(told).max(1, initial=0.0))))
        error = np.abs(differences - told).max(2, initial=0.0).min(0) / scale
        if not error.size:
            return Check(name, None, relative, "skipped", "no sample has a finite answer")
        median = float(np.median(error))
        detail = f"median relative error against differences of {what}, worst {error.max():.1e}"
        return Check(name, median, relative, "pass" if median <= relative else "fail", detail)

    # --- The argmin over a polyhedron ------------------------------------------------------------

    def polyhedron(self) -> Iterator[Check]:
        """y* of the graphs, and their adjoint, under constraints that a random point meets."""
        X, n, T = self.X[:POLYHEDRON_SAMPLES], self.n, self.session.manifest.dtype
        rng, B = self.rng, len(X)
        inside = rng.standard_normal((B, n)) / math.sqrt(n)
        # Few enough that f has a say.
        G, A = rng.standard_normal((B, 1, n)), rng.standard_normal((B, min(1, n - 1), n))
        given: dict[str, Any] = {
            "G": G,
            "h": np.einsum("bmn,bn->bm", G, inside) + 0.05,
            "A": A,
            "b": np.einsum("bmn,bn->bm", A, inside),
            "lower": inside - 1.0,
            "upper": inside + np.where(rng.random((B, n)) < 0.5, 1.0, np.inf),
        }
        settings: dict[str, Any] = {"mu": 1.0, "iterations": POLYHEDRON_CUTS}
        found = self.session.argmin_polyhedron(X, **given, **settings, strict=False)
        told_at = polyhedron.value_and_gradient(self.session, X)
        tolerance = polyhedron.TOLERANCE[T]
        true = bundle_qp_argmin(
            told_at, Polyhedron(**given), POLYHEDRON_CUTS, 1.0, tolerance=tolerance, precision=self.session.dtype
        )
        kept = np.isin(found.status, ANSWERED) & np.isin(true.status, ANSWERED)
        gaps = [np.maximum(a.gap, 0.0)[kept] + 4 * np.finfo(T).eps for a in (found, true)]
        Δy = np.abs(found.y - true.y)[kept].max(1, initial=0.0)
        what = f"max |y − y of the reference|, median {_median(Δy):.1e}; a gap g allows √(2g)"
        near = sum(np.sqrt(2 * gap) for gap in gaps)
        yield _worst("polyhedron: y", Δy, np.maximum(self.floating.y, near), what)
        scale = np.maximum(1.0, np.abs(true.energy[kept]))
        ΔE = np.abs(found.energy - true.energy)[kept]
        what = f"|energy − energy of the reference|, median {_median(ΔE):.1e}; the gap is allowed"
        yield _worst("polyhedron: energy", ΔE, np.maximum(self.floating.energy * scale, np.maximum(*gaps)), what)

        # To a gap as small as can be, as y is open by its root.
        settings["tolerance"] = FINE[T]
        y_bar = rng.standard_normal((B, n))
        moves = {"x": rng.standard_normal(X.shape) / math.sqrt(max(X[0].size, 1))}
        moves |= {key: rng.standard_normal(given[key].shape) for key in ("h", "b", "lower", "upper")}

        def y(t: float) -> Array:
            moved = given | {key: given[key] + t * d for key, d in moves.items() if key != "x"}
            ahead = (X + t * moves["x"]).astype(T)
            return self.session.argmin_polyhedron(ahead, **moved, **settings, strict=False).y

        exact = self.session.argmin_polyhedron(X, **given, **settings, strict=False)
        # At a gap that is as small as rounding lets it be, GAP is no reason to leave a sample out.
        exact = replace(exact, status=np.where(np.isin(exact.status, ANSWERED), np.int8(0), exact.status))
        bars = self.session.vjp_polyhedron(exact, y_bar, on_unsafe="skip")
        told = sum(_rows(getattr(bars, key) * d) for key, d in moves.items())
        steps = POLYHEDRON_STEPS[T]
        differences = np.array([_rows((y(h) - y(-h)) * y_bar) / (2 * h) for h in steps])
        yield self._adjoint_check("polyhedron: adjoint", np.array([told] * len(steps)), differences, y_bar)

    # --- The argmin ------------------------------------------------------------------------------

    def against_reference(self, solution: ArgminSolution) -> Iterator[Check]:
        """y*, energy, certificate and lower bound."""
        solver, kept = self.session.manifest.solver, np.isfinite(solution.energy) & np.isfinite(solution.gap)
        assert solver is not None
        part, X = solution[kept], self.X[kept]
        with np.errstate(invalid="ignore", over="ignore"):
            at = self._coordinates(kept)
            f, centre = reference.in_coordinates(lambda y: self.f(y, X), at), self.domain.centre(self.n)
            start = np.full((len(X), self.n), centre)
            if solver.step_size is None:
                true = reference.bundle_entropy_argmin(f, start, solver.iterations, domain=self.domain)
            else:
                true = bregman.bregman_argmin(f, start, solver.iterations, solver.step_size, self.domain)
            true = true._replace(y=at.y(true.y))
        # −H is 4-strongly convex: a y with a gap of at most g is within √(g/2) of the optimum. The other regularisers
        # are 1-strongly convex, so √(2g) there, and scale turns p into y. Below that distance two
        # answers are as good as each other, and where K cuts are few, or kinks many, they do differ.
        # f is known to its rounding only, which moves y as a gap of that size would.
        noise = 4 * np.finfo(part.y.dtype).eps * np.maximum(1.0, np.abs(true.energy))
        gaps = np.maximum(part.gap, 0.0) + noise, np.maximum(true.gap, 0.0) + noise
        near = self._reach(kept) * sum(np.sqrt(gap / 2) for gap in gaps)
        scale = np.maximum(1.0, np.abs(true.energy))
        Δy = np.abs(part.y - true.y).max(1, initial=0.0)
        yield _worst(
            "argmin: y",
            Δy,
            np.maximum(self.floating.y, near),
            f"max |y − y of the reference|, median {_median(Δy):.1e}; a gap g allows {self._allowed()}",
        )
        ΔE = np.abs(part.energy - true.energy)
        yield _worst(
            "argmin: energy",
            ΔE,
            np.maximum(self.floating.energy * scale, np.maximum(*gaps)),
            f"|energy − energy of the reference|, median {_median(ΔE):.1e}; the gap is allowed",
        )

        rounding = certificate.rounding(part.energy, part.slopes, part.offsets, self.domain, part.cut_points)
        y = part.y.astype(np.float64)
        p = at.p(y)
        if self.bounds and solver.step_size is None:
            # (y − lower)/(upper − lower) loses the digits that y and lower share, so by the multipliers
            p = certificate.implied_point(part.slopes, part.lam)
        energy = self.f(y, X)[0] + self.domain.regulariser(NUMPY, p)[:, 0]
        residual = certificate.kkt_residuals(part.slopes, part.offsets, part.lam, p, self.domain)
        gap = certificate.duality_gap(energy, part.slopes, part.offsets, part.lam, self.domain)
        differences = [np.abs(energy - part.energy), np.abs(gap - part.gap)]
        if solver.step_size is None:  # else there is no model whose multipliers would give y
            differences.append(np.abs(residual - part.residual).max(1))
        differences.append(np.abs(at.y(p) - y).max(1, initial=0.0))
        yield _worst(
            "certificate", np.max(differences, axis=0), rounding, "energy, gap and residuals, reported and recomputed"
        )

        seen = [energy, true.energy]
        for _ in range(DIRECTIONS):
            p = self.somewhere(len(X))
            seen.append(self.f(at.y(p), X)[0] + self.domain.regulariser(NUMPY, p)[:, 0])
        yield _worst(
            "lower bound",
            np.maximum(part.lower_bound - np.min(seen, axis=0), 0.0),
            2 * rounding,
            f"lower bound above an energy: of y*, of the reference, of {DIRECTIONS} random points",
        )

    def kernels(self, solution: Any) -> Check:
        """y* of this session against that of one that runs the portable bodies."""
        name = "kernels"
        if not self.session.native:
            return Check(name, None, None, "skipped", "the operators run on their portable bodies")
        with load(self.session.package, **self.again, native=False) as other:
            portable = other.argmin(self.X, lower=self.bounds.get("lower"), upper=self.bounds.get("upper"))
        kept = np.logical_and.reduce([np.isfinite(s.energy) & np.isfinite(s.gap) for s in (solution, portable)])
        # Both solve every model to rounding level, but with few cuts, or at kinks, the K steps magnify rounding as far
        # as the gap allows, as in `against_reference`.
        near = self._reach(kept) * sum(np.sqrt(np.maximum(s.gap[kept], 0.0) / 2) for s in (solution, portable))
        Δy = np.abs(solution.y.astype(np.float64) - portable.y)[kept].max(1, initial=0.0)
        what = f"max |y of native kernels − y of portable bodies|, median {_median(Δy):.1e}; a gap g allows "
        what += self._allowed()
        return _worst(name, Δy, np.maximum(self.floating.y, near), what)

    # --- The adjoint -----------------------------------------------------------------------------

    def adjoint_by_x(self, solution: Solution) -> Check:
        """x̄'d against [ȳ'y*(x + h d) − ȳ'y*(x − h d)] / 2h."""
        name, T = "adjoint: x", self.session.dtype
        if not self.X[0].size:
            return Check(name, None, None, "skipped", "the energy has no context")
        y_bar = self.rng.standard_normal(solution.y.shape).astype(T)
        cotangents = self.session.vjp(solution, y_bar, on_unsafe="skip")
        size = math.sqrt(float(np.mean(np.square(self.X, dtype=np.float64)))) or 1.0
        # As long as one typical entry, however many there are.
        d = self.rng.standard_normal(self.X.shape) * (size / math.sqrt(self.X[0].size))
        told, differences = [], []
        for h in self.floating.adjoint_steps:
            ahead, behind = ((self.X + t * d).astype(T) for t in (h, -h))
            # What the dtype makes of the step, so that the rounding of x does not count.
            step = (ahead.astype(np.float64) - behind) / (2 * h)
            change = self.argmin(ahead).y.astype(np.float64) - self.argmin(behind).y
            told.append(_rows(cotangents.x * step))
            differences.append(_rows(change * y_bar) / (2 * h))
        return self._adjoint_check(name, np.array(told), np.array(differences), y_bar)

    def adjoint_by_bounds(self, solution: ArgminSolution) -> Check:
        """The cotangents of lower and upper against differences, both bounds moved together."""
        T = self.session.dtype
        y_bar = self.rng.standard_normal(solution.y.shape).astype(T)
        cotangents = self.session.vjp(solution, y_bar, on_unsafe="skip")
        assert cotangents.lower is not None
        assert cotangents.upper is not None
        d = {name: self.rng.standard_normal(solution.y.shape) / math.sqrt(self.n) for name in self.bounds}
        told, differences = [], []
        for h in self.floating.adjoint_steps:
            ahead, behind = (
                {name: (bound + t * d[name]).astype(T) for name, bound in self.bounds.items()} for t in (h, -h)
            )
            step = {name: (ahead[name].astype(np.float64) - behind[name]) / (2 * h) for name in d}
            change = self.argmin(self.X, **ahead).y.astype(np.float64) - self.argmin(self.X, **behind).y
            told.append(_rows(cotangents.lower * step["lower"] + cotangents.upper * step["upper"]))
            differences.append(_rows(change * y_bar) / (2 * h))
        return self._adjoint_check("adjoint: bounds", np.array(told), np.array(differences), y_bar)

    def _coordinates(self, rows: Any) -> Coordinates:
        return Coordinates(*(part[rows] for part in self.at)) if self.bounds else self.at

    def _reach(self, rows: Any) -> Any:
        """√(g/2) times this is how far from the optimum a y may be whose gap is g."""
        scale = self._coordinates(rows).scale
        return (1.0 if self.domain is UNIT_BOX else 2.0) * (scale.max(1) if self.bounds else scale)

    def _allowed(self) -> str:
        return "√(g/2)" if self.domain is UNIT_BOX and not self.bounds else "√(g/2), √(2g) off boxes, in p"

    def adjoint_by_weights(self, solution: ArgminSolution | QPNetworkSolution) -> Check:
        """θ̄'d against differences, one sample at a time, all trainable weights moved together.

        The session's weights are changed in place and, whatever happens, put back.
        """
        name, session, steps = "adjoint: weights", self.session, self.floating.adjoint_steps
        trainable = session.manifest.weights.trainable
        if not trainable:
            return Check(name, None, None, "skipped", "no weight is trainable")
        part = solution[:ADJOINT_SAMPLES]
        y_bar = self.rng.standard_normal(part.y.shape).astype(session.dtype)
        old = {key: session.weights[key] for key in trainable}
        # All cotangents first: once the weights change, the solution is one of other weights.
        cotangents = [session.vjp(part[i], y_bar[i : i + 1], on_unsafe="skip") for i in range(len(part))]
        told = np.full((len(steps), WEIGHT_DIRECTIONS, len(part)), np.nan)
        differences = np.full_like(told, np.nan)
        try:
            for r in range(WEIGHT_DIRECTIONS):
                # As long as one typical entry: a network moved by h in every entry moves far more than h.
                d = {key: self._direction(a) for key, a in old.items()}
                for s, h in enumerate(steps):
                    ends = [{key: (a + t * d[key]).astype(a.dtype) for key, a in old.items()} for t in (h, -h)]
                    answers = []
                    for end in ends:
                        session.update_weights(end)
                        answers.append(self.argmin(part.x, slice(len(part))).y.astype(np.float64))
                    differences[s, r] = _rows((answers[0] - answers[1]) * y_bar) / (2 * h)
                    for key in trainable:
                        ends[0][key] = (ends[0][key].astype(np.float64) - ends[1][key]) / (2 * h)
                    for i, cotangent in enumerate(cotangents):
                        if not cotangent.skipped[0]:
                            told[s, r, i] = sum(float((cotangent.weights[k] * ends[0][k]).sum()) for k in trainable)
        except InputError as error:  # a frozen export: its weights are constants of the graphs
            return Check(name, None, None, "skipped", f"the weights cannot be changed in memory: {error}")
        finally:
            if session.weights_id != part.weights_id:
                session.update_weights(old)
        shape = (len(steps), WEIGHT_DIRECTIONS * len(part))
        seeds = np.concatenate([y_bar] * WEIGHT_DIRECTIONS)
        return self._adjoint_check(name, told.reshape(shape), differences.reshape(shape), seeds)

    def _direction(self, weight: NDArray[Any]) -> Array:
        size = math.sqrt(float(np.mean(np.square(weight, dtype=np.float64)))) or 1.0
        return self.rng.standard_normal(weight.shape) * (size / math.sqrt(weight.size))

    def _adjoint_check(self, name: str, told: Array, differences: Array, y_bar: NDArray[Any]) -> Check:
        """Judge derivatives [steps, N] against differences [steps, N]; NaN where a sample was left out."""
        bound = self.floating.adjoint
        kept = np.isfinite(told).all(0) & np.isfinite(differences).all(0)
        unsafe = f"; {(~kept).sum()} left out as unsafe" if not kept.all() else ""
        size = np.maximum(np.abs(told), np.abs(differences)).min(0, initial=np.inf)[kept]
        # Where a derivative is zero, or less than what the rounding of y* makes of a difference, both sides agree, or
        # not, by chance. Under a ReLU network y* often does not move at all.
        noise = self.floating.y_noise * np.linalg.norm(y_bar[kept], axis=1) / max(self.floating.adjoint_steps)
        usual = math.sqrt(float(np.mean(size**2))) if size.size else 0.0
        telling = size > np.maximum(noise / bound, 0.1 * usual)
        if not telling.any():
            return Check(name, None, bound, "skipped", f"no sample has a gradient that is safe and above noise{unsafe}")
        error = np.abs(told - differences)[:, kept].min(0)[telling] / size[telling]
        median = float(np.median(error))
        detail = f"median relative error of {len(error)} derivatives, worst {error.max():.1e}"
        if len(error) < len(size):
            detail += f"; {len(size) - len(error)} near zero"
        return Check(name, median, bound, "pass" if median <= bound else "fail", detail + unsafe)


class _QPTrial(_Trial):
    """A network of quadratic programs."""

    def argmin(self, X: NDArray[Any], rows: Any = slice(None), **moved: NDArray[Any]) -> QPNetworkSolution:
        return self.session.solve_qp(X, strict=False)

    def alone(self, answer: QPNetworkSolution) -> Check:
        """z of each sample in its batch, against z of it alone: neighbours without a solution must not matter."""
        few = answer[:ADJOINT_SAMPLES]
        parts = [self.argmin(few.x[i : i + 1]) for i in range(len(few))]
        kept = np.logical_and(few.ok, np.concatenate([part.ok for part in parts]))
        Δz = np.abs(few.z.astype(np.float64) - np.concatenate([part.z for part in parts]))[kept].max(1, initial=0.0)
        scale = np.maximum(1.0, np.abs(few.z[kept]).max(1, initial=0.0))
        return _worst("samples alone", Δz, QP_Z[self.session.manifest.dtype] * scale, "max |z in a batch − z alone|")

    def kernels(self, solution: QPNetworkSolution) -> Check:
        """z of this session against that of one that runs the portable bodies."""
        name = "kernels"
        if not solution.info["native"]:
            return Check(name, None, None, "skipped", "the operators run on their portable bodies")
        with load(self.session.package, **self.again, native=False) as other:
            portable = other.solve_qp(self.X)
        kept = solution.ok & portable.ok
        Δz = np.abs(solution.z.astype(np.float64) - portable.z)[kept].max(1, initial=0.0)
        scale = np.maximum(1.0, np.abs(portable.z[kept]).max(1, initial=0.0))
        what = f"max |z of native kernels − z of portable bodies|, median {_median(Δz):.1e}"
        return _worst(name, Δz, QP_Z[self.session.manifest.dtype] * scale, what)


def _rows(products: Array) -> Array:
    """The sum over all but the first dimension."""
    return products.reshape(len(products), -1).sum(1)


def _median(figure: Array) -> float:
    return float(np.median(figure)) if figure.size else math.nan


# --- The table -----------------------------------------------------------------------------------


class _Row(NamedTuple):
    """What is told when a check begins, which packages have it, and the check."""

    stage: str
    applies: Callable[[_Trial], bool]
    of: Callable[[_Trial], Iterable[Check]]


def _kind(kind: str) -> Callable[[_Trial], bool]:
    return lambda trial: trial.manifest.kind == kind


def _graph(role: str) -> Callable[[_Trial], bool]:
    return lambda trial: role in trial.manifest.graphs


def _solver(trial: _Trial) -> bool:
    return trial.manifest.solver is not None


def _answers(trial: _Trial) -> bool:
    return _solver(trial) or trial.manifest.kind == "qp"


def _statuses(trial: _Trial) -> Check:
    of = _qp_status if isinstance(trial, _QPTrial) else _status
    return of(trial.answer, trial.counts())


_CHECKS: Final = (
    _Row("gradient", _kind("energy"), lambda trial: [trial.gradient()]),
    _Row("convexity", _kind("energy"), lambda trial: [_proof(trial.session, trial.X), trial.convexity()]),
    _Row("monotony", _kind("gradient"), lambda trial: [trial.monotony()]),
    _Row("hvp", _graph("hvp"), lambda trial: [trial.hvp()]),
    _Row("hessian", _graph("hessian"), lambda trial: [trial.hessian()]),
    _Row("gradient_x", _graph("gradient_x"), lambda trial: [trial.gradient_x()]),
    _Row("pullback", _graph("pullback"), _Trial.pullback),
    _Row("argmin over a polyhedron", lambda trial: trial.manifest.polyhedron is not None, _Trial.polyhedron),
    _Row(
        "golden data",
        lambda trial: bool(trial.session.package.golden),
        lambda trial: _golden(trial.session, trial.session.package),
    ),
    _Row("argmin against the reference", _solver, lambda trial: trial.against_reference(trial.answer)),
    _Row("solve", _kind("qp"), lambda trial: [cast(_QPTrial, trial).alone(trial.answer)]),
    _Row("native kernels against portable bodies", _answers, lambda trial: [trial.kernels(trial.answer)]),
    _Row("adjoint by x", _answers, lambda trial: [trial.adjoint_by_x(trial.answer)]),
    _Row(
        "adjoint by the bounds",
        lambda trial: _solver(trial) and bool(trial.bounds),
        lambda trial: [trial.adjoint_by_bounds(trial.answer)],
    ),
    _Row("adjoint by the weights", _answers, lambda trial: [trial.adjoint_by_weights(trial.answer)]),
    _Row("status", _answers, lambda trial: [_statuses(trial)]),
)
