"""What a session hands out: solutions with their certificates, and cotangents. All arrays are read-only."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import rows, sample
from icnnrt.mathematics import certificate
from icnnrt.mathematics.certificate import Tolerances
from icnnrt.mathematics.domains import MODELS, Domain
from icnnrt.mathematics.qp_reference import STEPS
from icnnrt.mathematics.qp_status import advise as advise_qp
from icnnrt.mathematics.status import Status, advise, summarise

Floats = NDArray[Any]  # float32 or float64: the package's dtype
Array = NDArray[np.float64]


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be made writeable again: numpy allows that only if what it is a view of is writeable."""
    return np.asarray(array.data.toreadonly())


class _Frozen:
    """Read-only arrays and mappings, and pickling, which knows neither."""

    __slots__: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, name, _read_only(value))
            elif isinstance(value, Mapping):
                frozen = {k: _read_only(v) if isinstance(v, np.ndarray) else v for k, v in value.items()}
                object.__setattr__(self, name, MappingProxyType(frozen))

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in self.__slots__)
        return type(self), tuple(dict(v) if isinstance(v, Mapping) else v for v in values)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Solution(_Frozen):
    """y* = argmin over y in the domain of f(x, y) + R(y) for B samples, with the certificate of each.

    By default that is [0,1]^n and −H(y), as below. A box and (μ/2)‖y‖² are solved in p, y = lower + (upper − lower)∘p
    or y = p/√μ: then slopes, offsets and cut_points are those of f as a function of p, and so is the y of the
    multipliers; see `icnnrt.mathematics.domains`, which has the centre of each domain too, where ½ stands here. y is y
    always. Bregman proximal gradient (`icnnrt.mathematics.bregman`) solves no models: its cuts are those of the points
    it was at, lam is 1 at the one with the best bound, and residuals and lam_history are zero.

    K cuts; T is the package's dtype. A sample that was not run (NOT_FINITE_INPUT) is NaN throughout. The length is B;
    `solution[i]`, a slice or a mask selects samples and gives a Solution of them.
    """

    x: Floats
    """[B, *x_shape] T, the contexts as they were run."""
    y: Floats
    """[B, n] T, the answer."""
    lam: Floats
    """[B, K] T, multipliers λ of the cuts: nonnegative, of sum 1, y = σ(−slopes'λ)."""
    slopes: Floats
    """[B, K, n] T, g_i = ∇f(y_i)."""
    offsets: Floats
    """[B, K] T, centred: e_i = f(y_i) + g_i'(½ − y_i)."""
    cut_points: Floats
    """[B, K, n] T, y_i: the first is where the solver started, the next one the answer with the cuts before it."""
    lam_history: Floats
    """[B, K, K] T, row k−1: the multipliers after k cuts, zero beyond the k-th."""
    energy: Array
    """[B] float64, f(x, y) − H(y)."""
    lower_bound: Array
    """[B] float64: no energy is below it if f is convex in y, up to the rounding of f in the package's dtype."""
    gap: Array
    """[B] float64, energy − lower_bound: the most that y can be suboptimal by. It is known to the rounding of f in the
    package's dtype only, which `uncertainty` tells: a gap below that, negative ones too, means zero."""
    residual: Array
    """[B, 3] float64, KKT residuals of the last model: stationarity, feasibility, complementarity."""
    complementarity_history: Array
    """[B, K] float64, complementarity of every model; an exact gradient needs all of them small."""
    status: NDArray[np.int8]
    """[B] int8, a `Status` each; `certificate.status_of` says how it is told."""
    info: Mapping[str, Any]
    """How it was computed: providers, native (whether compiled kernels ran), domain, iterations, steps, gap_tolerance,
    residual_tolerance, seconds."""
    weights_id: str
    """Which weights it was computed with; a session refuses to differentiate a solution of other weights."""
    lower: Floats | None = None
    """[B, n] T, the lower bounds of a box; None for other domains. Slopes, offsets and cut points of a box are those of
    p = (y − lower) / (upper − lower)."""
    upper: Floats | None = None
    """[B, n] T, the upper bounds of a box; None for other domains."""

    def __len__(self) -> int:
        return len(self.y)

    @property
    def ok(self) -> NDArray[np.bool_]:
        """[B] bool: the status is CONVERGED."""
        return self.status == Status.CONVERGED

    def __getitem__(self, index: Any) -> "Solution":
        """The samples at `index` (integer, slice, mask or integer array), always with a batch dimension."""
        index = rows(index, len(self))
        values = (getattr(self, field.name) for field in fields(self))
        return Solution(*(v[index] if isinstance(v, np.ndarray) else v for v in values))

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        one, info = self[sample(i, len(self))], self.info
        scale = float(certificate.unit(one.lower_bound)[0])
        below = certificate.convexity_violation(one.slopes, one.offsets, one.cut_points, one._model)[0]
        return f"sample {i}: " + advise(
            Status(one.status[0]),
            iterations=info["iterations"],
            steps=info["steps"],
            gap=float(one.gap[0]),
            gap_bound=info["gap_tolerance"] * scale,
            residual=float(certificate.relative_residual(one.residual, one.lower_bound)[0]),
            residual_bound=info["residual_tolerance"],
            violation=float(max(below, one.residual[0, 2] - one.gap[0])),
            uncertainty=float(one.uncertainty[0]),
            dtype=str(self.y.dtype),
        )

    @property
    def uncertainty(self) -> Array:
        """[B] float64: by how much rounding may have moved gap and lower bound, as `certificate.uncertainty` tells."""
        box = None if self.lower is None or self.upper is None else certificate.magnification(self.lower, self.upper)
        return certificate.uncertainty(
            *(self.energy, self.gap, self.slopes, self.offsets, self.lam, self._model, self.cut_points, box)
        )

    @property
    def _model(self) -> Domain:
        return MODELS[self.info.get("domain", "unit_box")]

    def summary(self) -> str:
        """How many samples have which status, and the advice on the first of each kind that did not converge."""
        return summarise(self.status.tolist(), self.advice)

    def __repr__(self) -> str:
        head = self.summary().partition("\n")[0] if len(self) else "no samples"
        return f"<Solution of {len(self)} x {self.y.shape[1]}: {head}>"

    def unsafe(self, *, every_model: bool) -> NDArray[np.bool_]:
        """[B] bool: samples that no gradient should be taken at.

        Those are all but the `certificate.differentiable` and, with `every_model`, those where any of the K models was
        left with a complementarity above the tolerance. GAP is safe: what is differentiated is the K-step algorithm
        itself.
        """
        bad = ~certificate.differentiable(self.status, self.uncertainty, self.lower_bound)
        if every_model:
            tolerances = Tolerances(self.info["gap_tolerance"], self.info["residual_tolerance"])
            with np.errstate(invalid="ignore"):
                bound = tolerances.residual * certificate.unit(self.lower_bound)
                # Written so that NaN is unsafe.
                bad = bad | ~(self.complementarity_history <= bound[:, None]).all(1)
        return bad


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class QPAnswer(_Frozen):
    """z of B samples, the answer of a network that goes through quadratic programs, with the certificate of each.

    The length is B; `answer[i]`, a slice or a mask selects samples and gives a QPAnswer of them.
    """

    x: Floats
    """[B, *x_shape] in the package's dtype, the inputs as they were run."""
    z: Floats
    """[B, n] in the package's dtype; NaN where a program has no solution."""
    status: NDArray[np.int32]
    """[B] int32, a `Status` each: of the first program on the sample's way that did not converge, if any."""
    residual: Array
    """[B, 3] float64, relative stationarity, feasibility and duality gap, the worst of all programs; NaN with z."""
    info: Mapping[str, Any]
    """How it was computed: providers, native (whether compiled kernels ran), seconds."""
    weights_id: str
    """Which weights it was computed with; a session refuses to differentiate an answer of other weights."""

    def __len__(self) -> int:
        return len(self.z)

    @property
    def y(self) -> Floats:
        """z, by the name that every answer has."""
        return self.z

    @property
    def ok(self) -> NDArray[np.bool_]:
        """[B] bool: the status is CONVERGED."""
        return self.status == Status.CONVERGED

    def __getitem__(self, index: Any) -> "QPAnswer":
        """The samples at `index` (integer, slice, mask or integer array), always with a batch dimension."""
        index = rows(index, len(self))
        return QPAnswer(
            self.x[index], self.z[index], self.status[index], self.residual[index], self.info, self.weights_id
        )

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        one = self[sample(i, len(self))]
        a, b, c = (float(r) for r in one.residual[0])
        return f"sample {i}: " + advise_qp(Status(int(one.status[0])), residual=(a, b, c), steps=STEPS, ray=False)

    def summary(self) -> str:
        """How many samples have which status, and the advice on the first of each kind that was not solved."""
        return summarise(self.status.tolist(), self.advice)

    def __repr__(self) -> str:
        head = self.summary().partition("\n")[0] if len(self) else "no samples"
        return f"<QPAnswer of {len(self)} x {self.z.shape[1]}: {head}>"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pulled(_Frozen):
    """Cotangents that f and ∇_y f send back: `Session.pullback`."""

    y: Floats
    """[B, n] in the package's dtype."""
    x: Floats
    """[B, *x_shape] in the package's dtype."""
    weights: Mapping[str, Floats]
    """name -> array of the weight's shape and dtype, for every trainable weight; summed over the batch."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Cotangents(_Frozen):
    """θ̄ and x̄: the gradient of a loss on y* by the weights and by x."""

    weights: Mapping[str, Floats]
    """name -> array of the weight's shape and dtype, for every trainable weight; summed over the batch."""
    x: Floats
    """[B, *x_shape] in the package's dtype; NaN where `skipped`."""
    skipped: NDArray[np.bool_]
    """[B] bool: samples left out of the sum."""
    at_kink: NDArray[np.bool_]
    """[B] bool: samples with a cut at a kink of a ReLU, to the last bit, where the way back met another face of the
    energy than the cut was made of. Their share is a gradient of that face; elsewhere the energy is smooth and this is
    False."""
    lower: Floats | None = None
    """[B, n], ∂loss/∂lower of a box; NaN where `skipped`; None for other domains."""
    upper: Floats | None = None
    """[B, n], ∂loss/∂upper of a box; NaN where `skipped`; None for other domains."""

    def __repr__(self) -> str:
        return f"<Cotangents of {len(self.weights)} weights and {len(self.x)} samples, {self.skipped.sum()} skipped>"
