"""The domains that y may range over, their regularisers, and what the bundle method has to know of each.

=========  ==================  ==========================  =====================================================
name       y in                regulariser R(y)            solved as
=========  ==================  ==========================  =====================================================
unit_box   [0, 1]^n            Σ y log y + (1−y) log(1−y)  UNIT_BOX
box        [l, u], run time    that of p = (y − l)/(u − l)  UNIT_BOX in p, y = l + (u − l)∘p
simplex    y >= 0, 1'y = 1     Σ y log y                   SIMPLEX
space      R^n                 (μ/2) ‖y‖²                  SPACE in p = √μ y
=========  ==================  ==========================  =====================================================

A `Domain` is one of the three in the last column. With slopes G [k, n] and cut values v = e + G(y − c), the model of k
cuts and its dual are::

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

Numpy alone; everything is batched over leading dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NAMES: Final = ("unit_box", "box", "simplex", "space")


def sigmoid(s: Array) -> Array:
    """σ(s) = 1 / (1 + e^−s), without overflow and exact in both tails."""
    e = np.exp(-np.abs(s))
    return np.where(s >= 0, 1.0, e) / (1.0 + e)


def softplus(s: Array) -> Array:
    """log(1 + e^s) without overflow."""
    return np.maximum(s, 0.0) + np.log1p(np.exp(-np.abs(s)))


def softmax(s: Array) -> Array:
    """e^s / Σ e^s over the last dimension, without overflow."""
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _y_log_y(y: Array) -> Array:
    """y log y; 0 log 0 = 0; NaN where y < 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(y == 0.0, 0.0, y * np.log(y))


def _log(y: Array) -> Array:
    """log y; log 0 = −∞."""
    with np.errstate(divide="ignore"):
        return np.log(y)


def negative_entropy(y: Array) -> Array:
    """−H(y) = Σ y log y + (1−y) log(1−y), [..., n] -> [...]; 0 log 0 = 0; NaN outside [0, 1]."""
    return (_y_log_y(y) + _y_log_y(1.0 - y)).sum(-1)


def _box_conjugate(s: Array) -> Array:
    # softplus(s) − ½ s in the form that does not cancel for large |s|.
    return (0.5 * np.abs(s) + np.log1p(np.exp(-np.abs(s)))).sum(-1)


def _simplex_conjugate(s: Array) -> Array:
    largest = s.max(-1, keepdims=True)
    return np.log(np.exp(s - largest).sum(-1)) + (largest[..., 0] - s.mean(-1))


def _simplex_root_transposed(s: Array, a: Array) -> Array:
    y = softmax(s)
    return np.sqrt(y) * (a - (y * a).sum(-1, keepdims=True))


def _simplex_root(s: Array, z: Array) -> Array:
    y = softmax(s)
    q = np.sqrt(y)
    return q * z - y * (q * z).sum(-1, keepdims=True)


def _box_root(s: Array, a: Array) -> Array:
    return np.sqrt(sigmoid(s) * sigmoid(-s)) * a


@dataclass(frozen=True)
class Domain:
    """One domain with its regulariser R; the functions take s or y [..., n]."""

    name: str  # of NAMES
    operators: str  # the operators of domain ai.icnnrt are this + "Solve" and this + "Adjoint"
    centre: Callable[[int], float]  # c of R^n: every entry of the point that offsets refer to
    point: Callable[[Array], Array]  # y(s), [..., n]
    logits: Callable[[Array], Array]  # y -> an s with y(s) = y
    conjugate: Callable[[Array], Array]  # C(s), [...]
    curvature: Callable[[Array, Array], Array]  # (s, a) -> D a
    root: Callable[[Array, Array], Array]  # (s, z) -> F z
    root_transposed: Callable[[Array, Array], Array]  # (s, a) -> F'a
    regulariser: Callable[[Array], Array]  # R(y), [...]; NaN outside the domain, but for the sum of a simplex
    reach: Callable[[Array], Array]  # slopes [B, k, n] -> [B, k]: about the most that G(y − c) can be in the model


UNIT_BOX: Final = Domain(
    name="unit_box",
    operators="BundleEntropy",
    centre=lambda n: 0.5,
    point=sigmoid,
    logits=lambda y: _log(y) - _log(1.0 - y),
    conjugate=_box_conjugate,
    curvature=lambda s, a: (sigmoid(s) * sigmoid(-s)) * a,  # never a/(1/y + 1/(1−y)): that overflows
    root=_box_root,
    root_transposed=_box_root,
    regulariser=negative_entropy,
    reach=lambda G: 0.5 * np.abs(G).sum(2),
)
SIMPLEX: Final = Domain(
    name="simplex",
    operators="BundleSimplex",
    centre=lambda n: 1.0 / n,
    point=softmax,
    logits=lambda y: _log(y),
    conjugate=_simplex_conjugate,
    curvature=lambda s, a: _simplex_root(s, _simplex_root_transposed(s, a)),
    root=_simplex_root,
    root_transposed=_simplex_root_transposed,
    regulariser=lambda y: _y_log_y(y).sum(-1),
    reach=lambda G: np.abs(G).max(2),
)
SPACE: Final = Domain(
    name="space",
    operators="BundleQuadratic",
    centre=lambda n: 0.0,
    point=lambda s: s,
    logits=lambda y: y,
    conjugate=lambda s: 0.5 * (s * s).sum(-1),
    curvature=lambda s, a: a + 0.0 * s,
    root=lambda s, z: z,
    root_transposed=lambda s, a: a,
    regulariser=lambda y: 0.5 * (y * y).sum(-1),
    # ‖g_i‖ ‖y‖ with ‖y‖ = ‖G'λ‖ <= max ‖g_j‖
    reach=lambda G: (length := np.sqrt((G * G).sum(2))) * length.max(1, keepdims=True),
)

MODELS: Final = {"unit_box": UNIT_BOX, "box": UNIT_BOX, "simplex": SIMPLEX, "space": SPACE}  # by name of NAMES


class Coordinates(NamedTuple):
    """y = shift + scale∘p: where the model's p stands for the user's y. Either broadcasts against [B, n]."""

    shift: Any
    scale: Any

    def y(self, p: Array) -> Array:
        return np.asarray(self.shift + self.scale * p, np.float64)

    def p(self, y: Array) -> Array:
        """The p of y; ½ where a box has no width, so that y = l fixes a variable."""
        fixed = np.equal(self.scale, 0.0)
        return np.where(fixed, 0.5, (y - self.shift) / np.where(fixed, 1.0, self.scale))


def box_coordinates(lower: Array, upper: Array) -> Coordinates:
    """y = l + (u − l)∘p. A sample with any l > u has no y: its scale is NaN, and so is its answer. u = l fixes y."""
    empty = (lower > upper).any(-1, keepdims=True)
    return Coordinates(lower, np.where(empty, np.nan, upper - lower))


def space_coordinates(mu: float) -> Coordinates:
    """y = p/√μ, which turns (μ/2)‖y‖² into ½‖p‖²."""
    return Coordinates(0.0, 1.0 / np.sqrt(mu))
