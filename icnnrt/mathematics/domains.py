"""The domains that y may range over, their regularisers, and what the solvers have to know of each.

=========  ==================  ==========================  =====================================================
name       y in                regulariser R(y)            solved as
=========  ==================  ==========================  =====================================================
unit_box   [0, 1]^n            Σ y log y + (1−y) log(1−y)  UNIT_BOX
box        [l, u], run time    that of p = (y − l)/(u − l)  BOX in p, y = l + (u − l)∘p
simplex    y >= 0, 1'y = 1     Σ y log y                   SIMPLEX
space      R^n                 (μ/2) ‖y‖²                  SPACE in p = √μ y
=========  ==================  ==========================  =====================================================

A `Domain` is one of the last column; BOX is UNIT_BOX with bounds given at run time. With slopes G [k, n] and cut values
v = e + G(y − c), the model of k cuts and its dual are::

    primal   min over y of  max_i v_i + R(y)
    dual     max over λ in the simplex of  e'λ − C(s),   s = −G'λ,   C(s) = max over y of  s'(y − c) − R(y)
    link     y = ∇C(s) + c,   D = ∂y/∂s = ∇²C(s) = F F'

=========  ====  ==========  =========================  ==========================
domain     c     y(s)        C(s)                       F'a
=========  ====  ==========  =========================  ==========================
UNIT_BOX   ½     σ(s)        Σ softplus(s) − ½ s        √(σ(s) σ(−s)) ∘ a
SIMPLEX    1/n   softmax(s)  logsumexp(s) − mean(s)     √y ∘ (a − y'a)
SPACE      0     s           ½ ‖s‖²                     a
=========  ====  ==========  =========================  ==========================

The last two lines of the first table are changes of variables of the energy, y = shift + scale∘p, and nothing else:
cuts, multipliers and certificates are those of f(shift + scale∘p) in p. See `Coordinates`.

The formulas are stated over a namespace, `icnnrt.mathematics.namespace`; leading axes are free. What is one number a
row keeps its last axis, with one entry.

To add a domain: a class below and its place in MODELS, with a `check_start` of its own unless a box and a sum say where
y may start; its change of variables, if it has one, in `coordinates` and in the exporter's `assembly.coordinates`; its
kernels, a file of `native/core` and a line in `native/ort/registration.cpp`, their names in `icnnrt.serving.operators`
and their files in `icnnrt/graphs`, which `icnnrt_exporters.operators.operator_graphs` writes; its literal in the argmin
layer and in the exporter's commands, and its kind in `icnnrt.format.manifest.Domain` and in what
`icnnrt.format.package` says of it. Tests that take `NAMES` or `MODELS` meet it by themselves.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import refused
from icnnrt.mathematics.namespace import NUMPY, Array, Namespace

LOGIT_BOUND: Final = 45.0  # σ(±45) is 0 or 1 to the last bit of float64: logits need go no further
LOGIT_STEP: Final = 4.0  # the most a logit moves in one step; undamped, saturated problems cycle


class Domain(ABC):
    """One domain with its regulariser R. s, y, u [..., n]; slopes G [B, k, n]; offsets e [B, 1, k]."""

    name: str
    operators: str  # the operators of domain ai.icnnrt are this + "Solve" and this + "Adjoint"
    family: str = "entropy"  # what packages call R
    where: str  # behind y, for people
    entries: str = "numbers in [0, 1]"  # what those of y are
    edges: tuple[float, float] = (0.0, 1.0)  # what they lie between; those of p where y has bounds
    total: float | None = None  # what they sum up to
    bounds: tuple[str, ...] = ()  # the arguments that say where y lies
    convexity: float = 1.0  # m: R is m-strongly convex

    @abstractmethod
    def centre(self, n: int) -> float:
        """c of R^n: every entry of the point that offsets refer to."""

    @abstractmethod
    def point(self, xp: Namespace, s: Array) -> Array:
        """y(s)."""

    @abstractmethod
    def centred(self, xp: Namespace, s: Array) -> Array:
        """What `plain` slopes take for y(s) − c."""

    @abstractmethod
    def logits(self, xp: Namespace, y: Array, edge: float = 0.0) -> Array:
        """An s with y(s) = y; infinite where y is 0 or 1, from which its entries are kept `edge` off."""

    @abstractmethod
    def conjugate(self, xp: Namespace, s: Array) -> Array:
        """C(s), [..., 1]."""

    @abstractmethod
    def curvature(self, xp: Namespace, s: Array, a: Array) -> Array:
        """D a."""

    @abstractmethod
    def curvature_at(self, xp: Namespace, y: Array, a: Array) -> Array:
        """D a at y(s) = y, which may saturate: then D is 0 to rounding, where `curvature` has all its digits."""

    @abstractmethod
    def root(self, xp: Namespace, s: Array, z: Array) -> Array:
        """F z."""

    @abstractmethod
    def root_transposed(self, xp: Namespace, s: Array, a: Array) -> Array:
        """F'a."""

    @abstractmethod
    def regulariser(self, xp: Namespace, y: Array) -> Array:
        """R(y), [..., 1]; NaN outside the domain, but for the sum of a simplex."""

    @abstractmethod
    def reach(self, xp: Namespace, G: Array, points: Array | None = None) -> Array:
        """About the most that G(y − c) can be in the model, or at `points` [B, k, n] of the domain: [B, k, 1]."""

    def plain(self, xp: Namespace, G: Array) -> Array:
        """Slopes that say the same with less rounding."""
        return G

    def scaled(self, xp: Namespace, G: Array, e: Array) -> tuple[Array, Array]:
        """Cuts with the same λ that are easier to solve."""
        return G, e

    @abstractmethod
    def first_logits(self, xp: Namespace, s: Array, bound: Array) -> Array:
        """The logits u to begin with, no farther out than about `bound`."""

    @abstractmethod
    def next_logits(self, xp: Namespace, u: Array, du: Array) -> Array:
        """u + du, damped and bounded."""

    @abstractmethod
    def random(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        """Points of the domain, [B, n]."""

    @abstractmethod
    def corners(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        """Random ones, [B, n]; R^n has none, and points further out stand in."""

    def check_start(self, y_init: NDArray[Any], bounds: Mapping[str, NDArray[Any]]) -> None:
        """Refuse a y_init [B, n] that is not finite or not in the domain, whose `bounds` are [B, n] each.

        Samples whose bounds leave nothing are told by their status.
        """
        low, high = (bounds[name] for name in self.bounds) if self.bounds else self.edges
        outside = ~(np.isfinite(y_init) & (y_init >= low) & (y_init <= high)) & np.less_equal(low, high)
        if outside.any():
            sample, entry = np.argwhere(outside)[0]
            came = f"{y_init[sample, entry]} in sample {sample}"
            raise refused("y_init", self.entries, came, "clip it, or leave y_init out")
        if self.total is not None:
            sums = y_init.sum(1, dtype=np.float64)
            # Each entry may be right to half of its digits.
            off = abs(sums - self.total) > y_init.shape[1] * np.sqrt(np.finfo(y_init.dtype).eps)
            if off.any():
                came, remedy = f"{sums[off][0]} in sample {off.argmax()}", "divide each row by its sum"
                raise refused("y_init", f"rows of sum {self.total:g}", came, f"{remedy}, or leave y_init out")


class _UnitBox(Domain):
    name, operators, where, convexity = "unit_box", "BundleEntropy", "in [0, 1]", 4.0

    def centre(self, n: int) -> float:
        return 0.5

    def point(self, xp: Namespace, s: Array) -> Array:
        return xp.sigmoid(s)

    def centred(self, xp: Namespace, s: Array) -> Array:
        return xp.sigmoid(s) - 0.5

    def logits(self, xp: Namespace, y: Array, edge: float = 0.0) -> Array:
        y = xp.clip(y, edge, 1.0 - edge)
        return xp.log(y) - xp.log(1.0 - y)

    def conjugate(self, xp: Namespace, s: Array) -> Array:
        # softplus(s) − ½ s in the form that does not cancel for large |s|.
        size = abs(s)
        return xp.sum(0.5 * size + xp.log1p(xp.exp(-size)))

    def curvature(self, xp: Namespace, s: Array, a: Array) -> Array:
        return (xp.sigmoid(s) * xp.sigmoid(-s)) * a  # never a/(1/y + 1/(1−y)): that overflows

    def curvature_at(self, xp: Namespace, y: Array, a: Array) -> Array:
        return (y * (1.0 - y)) * a

    def root(self, xp: Namespace, s: Array, z: Array) -> Array:
        return xp.sqrt(xp.sigmoid(s) * xp.sigmoid(-s)) * z

    def root_transposed(self, xp: Namespace, s: Array, a: Array) -> Array:
        return self.root(xp, s, a)

    def regulariser(self, xp: Namespace, y: Array) -> Array:
        return xp.sum(xp.x_log_x(y) + xp.x_log_x(1.0 - y))

    def reach(self, xp: Namespace, G: Array, points: Array | None = None) -> Array:
        return 0.5 * xp.sum(abs(G))

    def first_logits(self, xp: Namespace, s: Array, bound: Array) -> Array:
        return xp.clip(s, -bound, bound)

    def next_logits(self, xp: Namespace, u: Array, du: Array) -> Array:
        return xp.clip(u + xp.clip(du, -LOGIT_STEP, LOGIT_STEP), -LOGIT_BOUND, LOGIT_BOUND)

    def random(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        return rng.random((B, n))

    def corners(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        return np.round(rng.random((B, n)))


class _Box(_UnitBox):
    name, where, entries = "box", "between bounds given at run time", "numbers within the bounds"
    bounds = ("lower", "upper")


class _Simplex(Domain):
    name, operators, where, total = "simplex", "BundleSimplex", "in the simplex", 1.0

    def centre(self, n: int) -> float:
        return 1.0 / n

    def point(self, xp: Namespace, s: Array) -> Array:
        e = xp.exp(s - xp.max(s))
        return e / xp.sum(e)

    def centred(self, xp: Namespace, s: Array) -> Array:
        return self.point(xp, s)  # G 1 = 0 for plain slopes

    def logits(self, xp: Namespace, y: Array, edge: float = 0.0) -> Array:
        return xp.log(xp.clip(y, edge, 1.0 - edge))

    def conjugate(self, xp: Namespace, s: Array) -> Array:
        largest = xp.max(s)
        return xp.log(xp.sum(xp.exp(s - largest))) + (largest - xp.mean(s))

    def curvature(self, xp: Namespace, s: Array, a: Array) -> Array:
        # y∘b − y Σ y∘b with b = a − y'a: the second term is rounding, which a saturated y needs taken off.
        y = self.point(xp, s)
        b = self.curvature_at(xp, y, a)
        return b - y * xp.sum(b)

    def curvature_at(self, xp: Namespace, y: Array, a: Array) -> Array:
        return y * (a - xp.sum(y * a))

    def root(self, xp: Namespace, s: Array, z: Array) -> Array:
        y = self.point(xp, s)
        qz = xp.sqrt(y) * z
        return qz - y * xp.sum(qz)

    def root_transposed(self, xp: Namespace, s: Array, a: Array) -> Array:
        y = self.point(xp, s)
        return xp.sqrt(y) * (a - xp.sum(y * a))

    def regulariser(self, xp: Namespace, y: Array) -> Array:
        return xp.sum(xp.x_log_x(y))

    def reach(self, xp: Namespace, G: Array, points: Array | None = None) -> Array:
        return xp.max(abs(G))

    def plain(self, xp: Namespace, G: Array) -> Array:
        return G - xp.mean(G)  # where 1'y = 1 a constant in a slope changes nothing, and its rounding is saved

    def first_logits(self, xp: Namespace, s: Array, bound: Array) -> Array:
        return xp.maximum(s - xp.max(s), -2.0 * bound)

    def next_logits(self, xp: Namespace, u: Array, du: Array) -> Array:
        # u counts up to a constant. Which one decides what the bounds cut off; with y'du = 0 they cut off little
        # (unsolved of 1120 samples with slopes of 100 to 1e4: 13, with 1'du = 0 811).
        du = du - xp.sum(self.point(xp, u) * du)
        u = u + xp.clip(du, -LOGIT_STEP, LOGIT_STEP)
        return xp.maximum(u - xp.max(u), -LOGIT_BOUND)

    def random(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        return rng.dirichlet(np.ones(n), B)

    def corners(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        return np.eye(n)[rng.integers(n, size=B)]


class _Space(Domain):
    name, operators, where, family = "space", "BundleQuadratic", "in ℝⁿ", "quadratic"
    entries, edges = "finite numbers", (-math.inf, math.inf)

    def centre(self, n: int) -> float:
        return 0.0

    def point(self, xp: Namespace, s: Array) -> Array:
        return s

    def centred(self, xp: Namespace, s: Array) -> Array:
        return s

    def logits(self, xp: Namespace, y: Array, edge: float = 0.0) -> Array:
        return y

    def conjugate(self, xp: Namespace, s: Array) -> Array:
        return 0.5 * xp.sum(s * s)

    def curvature(self, xp: Namespace, s: Array, a: Array) -> Array:
        return a

    def curvature_at(self, xp: Namespace, y: Array, a: Array) -> Array:
        return a

    def root(self, xp: Namespace, s: Array, z: Array) -> Array:
        return z + 0.0 * s  # a NaN of s is handed on

    def root_transposed(self, xp: Namespace, s: Array, a: Array) -> Array:
        return a + 0.0 * s

    def regulariser(self, xp: Namespace, y: Array) -> Array:
        return 0.5 * xp.sum(y * y)

    def reach(self, xp: Namespace, G: Array, points: Array | None = None) -> Array:
        # ‖g_i‖ ‖y‖ with ‖y‖ = ‖G'λ‖ <= max ‖g_j‖
        length = xp.sqrt(xp.sum(G * G))
        far = length if points is None else xp.maximum(length, xp.sqrt(xp.sum(points * points)))
        return length * xp.max(xp.mT(far))

    def scaled(self, xp: Namespace, G: Array, e: Array) -> tuple[Array, Array]:
        # G/r and (e − max e)/r², the cuts of y/r: slopes no longer than 1.
        rr = xp.maximum(xp.max(xp.mT(xp.sum(G * G))), 1.0)
        return G / xp.sqrt(rr), (e - xp.max(e)) / rr

    def first_logits(self, xp: Namespace, s: Array, bound: Array) -> Array:
        return s

    def next_logits(self, xp: Namespace, u: Array, du: Array) -> Array:
        return u + du

    def random(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        return rng.standard_normal((B, n))

    def corners(self, rng: np.random.Generator, B: int, n: int) -> NDArray[np.float64]:
        return 3.0 * rng.standard_normal((B, n))


UNIT_BOX: Final = _UnitBox()
BOX: Final = _Box()
SIMPLEX: Final = _Simplex()
SPACE: Final = _Space()

MODELS: Final[dict[str, Domain]] = {domain.name: domain for domain in (UNIT_BOX, BOX, SIMPLEX, SPACE)}
NAMES: Final = tuple(MODELS)


def check_bounds(domain: Domain | None, lower: object, upper: object) -> bool:
    """Whether the domain has bounds, which have to be given then and not be given else, or the `InputError`."""
    bounded = domain is not None and bool(domain.bounds)
    for name, value in (("lower", lower), ("upper", upper)):
        if bounded and value is None:
            raise refused(name, "the bounds of y, as the domain is a box", "none", "give both")
        if not bounded and value is not None:
            raise refused(name, f"none, as the domain is {domain.name if domain else 'none'!r}", "one", "leave it out")
    return bounded


class Coordinates(NamedTuple):
    """y = shift + scale∘p: where the model's p stands for the user's y. Both are numbers, or arrays [B, n]."""

    shift: Any = 0.0
    scale: Any = 1.0

    def scaled(self, v: Array) -> Array:
        """scale∘v: a slope in y as one in p, or a seed in p as one in y."""
        return v if _is(self.scale, 1.0) else self.scale * v

    def y(self, p: Array) -> Array:
        """The y of p."""
        return self.scaled(p) if _is(self.shift, 0.0) else self.shift + self.scaled(p)

    def p(self, y: Array, xp: Namespace = NUMPY) -> Array:
        """The p of y; ½ where a box has no width, so that y = l fixes a variable."""
        if _is(self.shift, 0.0):
            return y if _is(self.scale, 1.0) else y / self.scale
        fixed = self.scale <= 0.0
        return xp.where(fixed, 0.5, (y - self.shift) / xp.where(fixed, 1.0, self.scale))

    def of_slots(self, xp: Namespace) -> "Coordinates":
        """The same for points [B, K, n]."""
        return Coordinates(*(a if isinstance(a, float) else xp.row(a) for a in self))


def _is(a: Any, number: float) -> bool:
    return isinstance(a, float) and a == number


def box_coordinates(lower: Array, upper: Array, *, xp: Namespace = NUMPY) -> Coordinates:
    """y = l + (u − l)∘p. Where l > u there is no y: scale is NaN there, and with it the answer. u = l fixes y."""
    return Coordinates(lower, xp.where(lower <= upper, upper - lower, float("nan")))


def space_coordinates(mu: float) -> Coordinates:
    """y = p/√μ, which turns (μ/2)‖y‖² into ½‖p‖²."""
    return Coordinates(0.0, 1.0 / math.sqrt(mu))


def coordinates(bounds: Mapping[str, NDArray[Any]], mu: float | None) -> Coordinates:
    """Those of a domain: by the bounds lower and upper of a box, by μ of R^n, else y = p."""
    if bounds:
        return box_coordinates(*(bounds[name].astype(np.float64) for name in ("lower", "upper")))
    return Coordinates(0.0, 1.0) if mu is None else space_coordinates(mu)


def distance(domain: Domain, at: Coordinates, gap: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far an entry of y may be from the optimum with this gap: √(2 gap/m) in p, [B]; R is m-strongly convex."""
    widest = np.max(np.nan_to_num(at.scale), axis=-1)
    return np.asarray(widest * np.sqrt(2.0 * gap / domain.convexity))
