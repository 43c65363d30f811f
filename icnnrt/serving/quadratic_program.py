"""Quadratic programs at run time: solved with a status for every sample, and differentiated, without torch or onnx.

    minimise over z in R^n  ½ z'Qz + p'z   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

    solution = icnnrt.qp(Q, p, G, h)
    gradients = solution.vjp(z_bar)          # ∂loss/∂Q, p, G, h, each in the shape it was given in

Q [n, n] is symmetric positive semidefinite (its symmetric part is used), G [m, n], A [q, n]. Each datum may have
a batch axis in front, of B or of 1; one without it, or of 1, is shared by all B problems, and its gradient is the sum
over them. Where no datum has one, neither has the answer. Multipliers are signed: λ_i > 0 pushes back from h_i, λ_i < 0
from h_lower_i, and so μ for the box, so that Qz + p + G'λ + A'ν + μ = 0.

Two ONNX graphs of one node each, QuadraticProgram and QPSensitivity of ai.icnnrt, do the work, in icnnrt/graphs/;
native kernels run them where icnnrt was installed with them, portable bodies elsewhere, in float64 inside. The
mathematics is stated in `icnnrt.mathematics.qp_reference`.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import alone, choice, converted, reals, refused, rows, sample, shown, whole_as_floats
from icnnrt.errors import IcnnrtError, LimitError
from icnnrt.mathematics.qp_advice import qp_advice
from icnnrt.mathematics.qp_data import NUMBERS, SHAPES, Sizes, check_shapes
from icnnrt.mathematics.qp_names import ADJOINT_INPUTS, SENSITIVITY, SOLUTION
from icnnrt.mathematics.qp_reference import QP, STEPS, QPReference
from icnnrt.mathematics.qp_reliability import LOST, dependent, gradient_advice, moved, reliable
from icnnrt.mathematics.qp_settings import USUAL, Settings, checked_smoothing
from icnnrt.mathematics.qp_status import STATUSES, QPStatus, statuses
from icnnrt.mathematics.qp_tangent import tangent_residuals
from icnnrt.ort import Provider, checked_providers, onnxruntime, provider_names
from icnnrt.printable import show
from icnnrt.serving.operators import operator_session, stopped_after
from icnnrt.serving.qp_smoothed import Points, smoothed_adjoint
from icnnrt.serving.solution import Solution, untrusted

__all__ = ["QPGradients", "QPSolution", "QPTangents", "array_solver", "qp"]

Floats = NDArray[Any]  # float32 or float64: the dtype of Q

DTYPES: Final = {np.dtype(np.float32): "float32", np.dtype(np.float64): "float64"}
ABSENT: Final = frozenset(("h_lower", "lower", "upper", "start"))  # which the graph has a default for
ON_UNSAFE: Final = ("nan", "raise", "use", "skip")


def qp(
    Q: object,
    p: object,
    G: object = None,
    h: object = None,
    A: object = None,
    b: object = None,
    *,
    lower: object = None,
    upper: object = None,
    h_lower: object = None,
    start: "QPSolution | None" = None,
    tolerance: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    native: bool | None = None,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
) -> "QPSolution":
    """Solve min over z of ½ z'Qz + p'z s.t. h_lower <= Gz <= h, Az = b, lower <= z <= upper.

    Q ... b:          arrays of one dtype, float32 or float64, shaped as the head of this module says; integers are
                      converted where that is exact, sparse matrices of scipy made dense. What is left out is not
                      there; G comes with h, h_lower or both, A with b. Bounds of ±1e20 and beyond are none
    h_lower:          lower bounds of Gz
    lower, upper:     the box; each of these, h and b may also be one number for all of it
    start:            the solution of a problem nearby, of the same sizes; samples it did not solve start cold
    tolerance:        the relative KKT residual at which a sample is CONVERGED, by default 1e-9 in float64 and 1e-6 in
                      float32; by a looser one steps end earlier, well below it
    steps:            the most interior point steps, by default 60; as many again where a start leads nowhere or bounds
                      far beyond z were left out, and four times as many from a last beginning, where 30 and more
                      found nothing. Native kernels try small problems by an active set first, whose answer counts as
                      one step
    seconds:          the most time of the call. Native kernels look at the clock in every step, and what runs out is
                      judged as it stands, without a certificate; portable bodies are stopped, which raises `LimitError`
    native, providers, threads:  as `icnnrt.load` takes them

    Returns a `QPSolution`. No sample spoils another: each has a status of its own, and data with NaN, an objective
    that is not convex, or constraints that contradict each other are statuses, not errors. The data are not copied,
    and `QPSolution.vjp` reads Q, G and A again: leave them as they are until then.

    Raises `InputError` for shapes, dtypes or settings that do not fit, and what `icnnrt.load` raises for the last
    three.
    """
    began = time.perf_counter()
    data = (Q, p, G, h_lower, h, A, b, lower, upper)
    given, sizes = _given(dict(zip(SHAPES, data, strict=True)))
    feeds, dtype, batched = _batched(given, sizes)
    B = sizes.B
    if start is not None:
        feeds["start"] = _start(start, dtype, sizes)
    if not B:
        feeds = {name: a[:0] for name, a in feeds.items()}
    where = (native, providers, threads)
    settings = USUAL
    if tolerance is not None or steps is not None or seconds is not None:
        settings = Settings.checked(tolerance, steps, seconds, dtype)
    session, ran_native = operator_session("qp_solve", DTYPES[dtype], *where)
    if settings is USUAL:
        out = _run(session, SOLUTION, feeds)
    else:
        limit = None if ran_native else settings.seconds
        out = _run(session, SOLUTION, {**feeds, **settings.feeds()}, limit)
    elapsed = time.perf_counter() - began
    return QPSolution._of(out, _Program(feeds, given, where, ran_native, elapsed, settings), batched)


def array_solver(
    native: bool | None = None, providers: Sequence[Provider] | None = None, threads: int | None = None
) -> tuple[Callable[..., QPReference], bool]:
    """`qp_reference.qp_solve` by the sessions of `qp`, and whether native kernels run in them.

    It takes a QP of float64, a start or None, and the most `steps`, and gives a QPReference.
    """
    where = "qp_solve", "float64", native, providers, threads

    def solve(problem: QP, start: Sequence[Floats] | None = None, steps: int = STEPS) -> QPReference:
        feeds = problem._asdict()
        feeds["start"] = np.zeros((1, 0)) if start is None else np.concatenate(start, 1)
        if steps != STEPS:
            feeds |= Settings(steps=steps).feeds()
        session, _ = operator_session(*where)  # asked for each time, as a forked child has another
        return QPReference(*_run(session, SOLUTION, feeds))

    return solve, operator_session(*where)[1]


class _Gradient(functools.cached_property[Any]):
    """That of one datum, None where it was not given: a formula, and what computes it, given the datum's name."""

    def __init__(self, formula: str, of: Callable[[Any, str], Floats]) -> None:
        super().__init__(lambda self_: None if self_._given[self.attrname] is None else of(self_, str(self.attrname)))
        self.__doc__ = formula


class QPGradients:
    """∂loss/∂ of every datum of a quadratic program, each in the shape it was given in, None where it was not given.

    A datum that several problems shared has the sum over them. Each is computed when it is first asked for.
    """

    def __init__(
        self,
        solution: "QPSolution",
        found: Sequence[Any],
        skipped: NDArray[np.bool_] | None,
        points: Points | None = None,
    ) -> None:
        self._given = solution._program.given
        self._smoothed = points is not None
        if points is None:
            z, lam, nu, mu = solution._rows[:4]
            points = Points(z, lam, nu, mu, lam >= 0, mu >= 0)
        self._points: tuple[Floats, ...] = points[:4]
        self._upper = points.upper, points.box_upper
        self._solution = solution
        self._d = found
        self._kept = None if skipped is None else ~skipped
        self.skipped = np.zeros(len(found[4]), bool) if skipped is None else skipped
        """[B] bool: samples that were left out of the sums; their own data have NaN."""

    def _rows_of(self, name: str) -> tuple[bool, bool]:
        """Whether the datum stands for several samples, and whether it has no batch axis."""
        datum = self._given[name]
        assert datum is not None
        alone = datum.ndim <= len(SHAPES[name])
        return len(self.skipped) != 1 and (alone or len(datum) == 1), alone

    def _vector(self, name: str, value: Floats) -> Floats:
        """`value` [B, k], each sample's own, in the shape of the datum."""
        shared, alone = self._rows_of(name)
        if shared:
            value = (value if self._kept is None else value[self._kept]).sum(0, keepdims=True)
        elif alone and self._kept is not None:  # the only sample, left out
            value = np.zeros_like(value)
        if not alone:
            return value
        datum = self._given[name]
        assert datum is not None
        return value[0] if datum.ndim else np.asarray(value.sum())  # one number for all of z

    def _matrix(self, name: str, *pairs: tuple[Floats, Floats]) -> Floats:
        """The sum of a c' over pairs (a, c) of rows, in the shape of the datum."""
        shared, alone = self._rows_of(name)
        if shared or (alone and self._kept is not None):
            if self._kept is not None:
                pairs = tuple((a[self._kept], c[self._kept]) for a, c in pairs)
            terms = [a.T @ c for a, c in pairs]
        elif alone:
            terms = [a[0][:, None] * c[0] for a, c in pairs]
        else:
            terms = [a[:, :, None] * c[:, None, :] for a, c in pairs]
        value: Floats = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        return value[None] if shared and not alone else value

    def _half(self, name: str) -> Floats:
        M = self._matrix(name, (self._d[0], self._points[0]))
        return 0.5 * (M + M.swapaxes(-1, -2))

    def _of_rows(self, name: str, at: int) -> Floats:
        z, *multipliers = self._points
        return self._matrix(name, (multipliers[at - 1], self._d[0]), (self._d[at], z))

    def _side(self, name: str, at: int, sign: int) -> Floats:
        upper = self._upper[at // 2]
        part = upper if sign > 0 else ~upper if upper.dtype == bool else 1 - upper
        return self._vector(name, -self._d[at] * part)

    @functools.cached_property
    def reliable(self) -> NDArray[np.bool_]:
        """[B] bool: samples that are CONVERGED and whose gradient by every datum exists; `advice` tells why another is
        not."""
        *d, share, weak = self._d
        solved = self._solution._rows[7] == QPStatus.SOLVED  # "use" differentiates others too
        return solved & reliable(share, weak, DTYPES[d[0].dtype]) & ~self._dependent

    @functools.cached_property
    def _dependent(self) -> NDArray[np.bool_]:
        """Of a smoothed gradient no row holds z alone."""
        return np.zeros(len(self.skipped), bool) if self._smoothed else self._solution._dependent()

    def advice(self, i: int = 0) -> str:
        """One sentence with numbers on the gradient of sample `i`: reliable, NO_GRADIENT (a part of the loss has none),
        KINK (a row is weakly active, or rows that hold z depend on each other), or what the solution's advice is."""
        *_, share, weak = self._d
        i = sample(i, len(share))
        return self._solution._gradient_advice(i, float(share[i]), int(weak[i]), bool(self._dependent[i]))

    Q = _Gradient("½ (d_z z' + z d_z'): symmetric.", _half)
    p = _Gradient("d_z", lambda self, name: self._vector(name, self._d[0]))
    G = _Gradient("λ d_z' + d_λ z'", lambda self, name: self._of_rows(name, 1))
    A = _Gradient("ν d_z' + d_ν z'", lambda self, name: self._of_rows(name, 2))
    h = _Gradient("−d_λ where λ >= 0, else 0.", lambda self, name: self._side(name, 1, 1))
    h_lower = _Gradient("−d_λ where λ < 0, else 0.", lambda self, name: self._side(name, 1, -1))
    upper = _Gradient("−d_μ where μ >= 0, else 0.", lambda self, name: self._side(name, 3, 1))
    lower = _Gradient("−d_μ where μ < 0, else 0.", lambda self, name: self._side(name, 3, -1))
    b = _Gradient("−d_ν", lambda self, name: self._vector(name, -self._d[2]))

    def __repr__(self) -> str:
        names = ", ".join(name for name, datum in self._given.items() if datum is not None)
        return f"<QPGradients of {names} and {len(self.skipped)} samples, {self.skipped.sum()} skipped>"


class QPTangents(NamedTuple):
    """How an answer moves with its data; NaN where there is no tangent to trust."""

    z: Floats  # [B, n]
    lam: Floats  # [B, m]
    nu: Floats  # [B, q]
    bound_multipliers: Floats  # [B, n]


class _Program(NamedTuple):
    """What was solved, and how."""

    feeds: dict[str, Floats]
    """What the graphs take, [B, ...] or [1, ...]."""
    given: dict[str, Floats | None]
    """The data as they were given."""
    where: tuple[bool | None, Sequence[Provider] | None, int | None]
    """native, providers and threads, as they were asked for."""
    native: bool
    seconds: float
    settings: Settings = USUAL

    def rows(self, at: Any, samples: int, left: int) -> "_Program":
        """That of some of so many samples, `left` of them; data that samples share stay as they are."""

        def part(name: str, array: Floats) -> Floats:
            datum = self.given.get(name)
            own = datum is not None and datum.ndim > len(SHAPES[name]) and len(datum) == samples
            return array[at] if own else array

        given = {name: None if a is None else part(name, a) for name, a in self.given.items()}
        feeds = {name: part(name, a) if left else a[:0] for name, a in self.feeds.items()}
        return self._replace(feeds=feeds, given=given)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class QPSolution(Solution):
    """z and multipliers of B quadratic programs, with residuals and a status each. Arrays are read-only.

    T is the dtype of Q. Without batch axis in the data there is none here either: z is [n], residual [3], status
    a `Status`. Of a sample that is not CONVERGED or INACCURATE all but status and ray is NaN. The length is B;
    `solution[i]`, a slice or a mask selects samples and gives a QPSolution of them, with a batch axis.
    """

    z: Floats
    """[B, n] T, the answer."""
    lam: Floats
    """[B, m] T, the multipliers of Gz: positive where h holds it, negative where h_lower does."""
    nu: Floats
    """[B, q] T, the multipliers of Az = b."""
    bound_multipliers: Floats
    """[B, n] T, the multipliers of the box: positive where upper holds z, negative where lower does."""
    slack: Floats
    """[B, m] T, how far Gz is from the bound that lam points at; positive."""
    box_slack: Floats
    """[B, n] T, how far z is from the bound that its multiplier points at; positive."""
    residual: NDArray[np.float64]
    """[B, 3] float64: relative stationarity, feasibility, duality gap of the answer as it was computed, in float64. In
    float32 z and multipliers are rounded after that: where they are large, and what they are in cancels, that may leave
    more than is told here."""
    status: Any
    """[B] int32, a `Status` each."""
    ray: Floats
    """[B, n + m + q + n] T: of INFEASIBLE a certificate (0, λ, ν, μ), of UNBOUNDED a direction (d, 0, 0, 0), see
    `Status`; else 0."""
    _rows: tuple[Floats, ...]
    _program: _Program

    def __post_init__(self) -> None:
        """Nothing: `_of` makes the arrays read-only, which are nobody else's, in a tenth of the time."""

    @classmethod
    def _of(cls, out: Sequence[Floats], program: _Program, batched: bool) -> "QPSolution":
        for array in out:
            array.setflags(write=False)
        parts: Any = out if batched else [array[0] for array in out]
        z, lam, nu, mu, slack, box_slack, residual, code, ray, _ = parts
        status: Any = statuses(code) if batched else STATUSES[int(code)]
        if batched:
            status.setflags(write=False)
        return cls(z, lam, nu, mu, slack, box_slack, residual, status, ray, tuple(out), program)

    def __reduce__(self) -> tuple[Any, ...]:
        return QPSolution._of, (self._rows, self._program, self.z.ndim > 1)

    def __getitem__(self, index: Any) -> "QPSolution":
        """The samples at `index` (integer, slice, mask or integer array), always with a batch dimension."""
        at = rows(index, len(self))
        out = [array[at] for array in self._rows]
        return QPSolution._of(out, self._program.rows(at, len(self), len(out[0])), True)

    @property
    def y(self) -> Floats:
        """z, by the name that every answer has."""
        return self.z

    @property
    def steps(self) -> Any:
        """[B] int32, the interior point steps that were taken, those for certificates aside; 1 where an active set, of
        a start or of native kernels' own, gave the answer."""
        taken = self._rows[9]
        return taken if self.z.ndim > 1 else int(taken[0])

    @property
    def native(self) -> bool:
        """Whether native kernels ran, and will for gradients."""
        return self._program.native

    @property
    def info(self) -> Mapping[str, Any]:
        """How it was computed: providers, native (whether compiled kernels ran), steps (the most), seconds."""
        _, providers, _ = self._program.where
        return {
            "providers": provider_names(checked_providers(onnxruntime(), providers)),
            "native": self.native,
            "steps": self._program.settings.steps or STEPS,
            "seconds": self._program.seconds,
        }

    def vjp(
        self,
        z_bar: object = None,
        lam_bar: object = None,
        nu_bar: object = None,
        bound_multipliers_bar: object = None,
        *,
        on_unsafe: str = "nan",
        smoothing: float | None = None,
    ) -> QPGradients:
        """∂ℓ/∂ of all data for a loss ℓ with ∂ℓ/∂z = z_bar and, where it depends on them, ∂ℓ/∂lam = lam_bar and so on.

        z_bar, lam_bar, nu_bar, bound_multipliers_bar: in the shapes of z, lam, nu and bound_multipliers; floats of
                           another width are converted. None is zero
        on_unsafe:         what becomes of samples that are not CONVERGED, and of those whose loss has a part without a
                           gradient (NO_GRADIENT, where the answer is not unique): "nan" makes their gradients NaN, and
                           so the sums that shared data get; "raise", the default of `session.vjp`, raises
                           `CertificateError`; "skip" leaves them out of the sums; "use" takes INACCURATE answers for
                           what they are, whose `residual` tells how good that is, and of a loss without a gradient
                           that of the rest, its solution of least norm
        smoothing:         κ > 0, for the gradient at the point of the central path where every multiplier times its
                           slack is κ, in units of the objective, instead of at the answer
                           (`icnnrt.mathematics.qp_smoothing`): that of a smooth function of the data, the argmin of
                           the objective with κ times the logarithms of all slacks taken off. It knows no kinks, tells
                           of constraints that do not hold yet, and takes about as long as a solve in numpy

        Where a multiplier and its slack are both 0 the answer has a kink (KINK), and the gradient is that of one side;
        so has it where rows that hold z depend on each other, as duplicates do: gradients by Q and p are what they are
        there, and those by h, b and the bounds, which exist for all of them together, are shared out among them.
        "raise" raises at both, and `QPGradients.reliable` says which samples have neither.
        """
        choice(on_unsafe, "on_unsafe", ON_UNSAFE)
        remedy = "on_unsafe='skip' to leave them out of the sums, or 'use' for inaccurate ones"
        skipped = self._unsafe(on_unsafe, remedy)
        z, lam, nu, mu, *_ = self._rows
        none = _nothing(z.dtype, z.shape[1])["lower"]
        bars = (
            np.zeros_like(z) if z_bar is None else _bar("z_bar", z_bar, self.z, z),
            none if lam_bar is None else _bar("lam_bar", lam_bar, self.lam, lam),
            none if nu_bar is None else _bar("nu_bar", nu_bar, self.nu, nu),
        )
        mu_bar = none
        if bound_multipliers_bar is not None:
            mu_bar = _bar("bound_multipliers_bar", bound_multipliers_bar, self.bound_multipliers, mu)
        if smoothing is None:
            found, points = self._adjoint(on_unsafe, *bars, mu_bar), None
        else:
            found, points = self._smoothed(checked_smoothing(smoothing), on_unsafe, *bars, mu_bar)
        gradients = QPGradients(self, found, self._without_gradient(found, on_unsafe, "use", skipped), points)
        if on_unsafe == "raise":
            self._demand_independent(gradients._dependent)
        return gradients

    def jvp(
        self,
        Q_dot: object = None,
        p_dot: object = None,
        G_dot: object = None,
        h_dot: object = None,
        A_dot: object = None,
        b_dot: object = None,
        *,
        lower_dot: object = None,
        upper_dot: object = None,
        h_lower_dot: object = None,
        on_unsafe: str = "nan",
    ) -> QPTangents:
        """How z and the multipliers move where the data move by Q_dot and so on: the derivative along that direction.

        Q_dot ... h_lower_dot:  each in the shape of its datum, or with a batch axis, [B, ...]; None does not move
        on_unsafe:              "nan" gives samples that are not CONVERGED, or do not move continuously along that
                                direction, NaN; "raise" raises `CertificateError`, and where the tangent is one-sided,
                                or rows that hold z depend on each other, which share theirs of multipliers;
                                "use" takes INACCURATE answers and such tangents, as `vjp` does

        It solves the system of `vjp` with another right-hand side (`icnnrt.mathematics.qp_tangent`), at a fixed active
        set: where a multiplier and its slack are both 0 it is the tangent of one side.
        """
        choice(on_unsafe, "on_unsafe", ON_UNSAFE[:3])
        self._unsafe(on_unsafe, "on_unsafe='nan' to have NaN there")
        given = (Q_dot, p_dot, G_dot, h_lower_dot, h_dot, A_dot, b_dot, lower_dot, upper_dot)
        named = zip(SHAPES, given, strict=True)
        dots = {name: self._dot(name, value) for name, value in named if value is not None}
        # In double, as sums of products of what a multiplier of 1e8 is in cancel.
        z, lam, nu, mu = (np.where(np.isfinite(a), a, 0.0).astype(np.float64) for a in self._rows[:4])
        residuals = [r.astype(self.z.dtype) for r in tangent_residuals(z, lam, nu, mu, dots)]
        found = self._adjoint(on_unsafe, *residuals)
        self._without_gradient(found, on_unsafe, "use")
        if on_unsafe == "raise":
            self._demand_independent(self._dependent())
        tangents = found[:4]
        return QPTangents(*(tangents if self.z.ndim > 1 else [a[0] for a in tangents]))

    def _dot(self, name: str, value: object) -> Floats:
        """[B, ...] or [1, ...], double."""
        if self._program.given[name] is None:
            remedy = "leave it out, or give the datum to icnnrt.qp"
            raise refused(f"{name}_dot", f"none, as the problem has no {name}", shown(value), remedy)
        own = self._program.feeds[name].shape[1:]
        array = reals(value, f"{name}_dot", np.float64).astype(np.float64)
        if array.ndim == 0 and name in NUMBERS:
            return np.full((1, *own), array)
        if array.shape not in (own, (1, *own), (len(self), *own)):
            expected = f"shape {list(own)} or [{len(self)}, {', '.join(map(str, own))}]"
            raise refused(f"{name}_dot", expected, list(array.shape), f"it is a direction in which {name} moves")
        return array if array.ndim > len(own) else array[None]

    def _unsafe(self, on_unsafe: str, remedy: str) -> NDArray[np.bool_] | None:
        """Which samples to leave out, None for none; or the `CertificateError`."""
        if on_unsafe in ("nan", "use"):
            return None
        failed = self._rows[7] != QPStatus.SOLVED
        if on_unsafe == "raise" and failed.any():
            raise untrusted(failed, self._unsolved, remedy)
        return failed if failed.any() else None

    def _without_gradient(
        self, found: list[Floats], on_unsafe: str, otherwise: str, skipped: NDArray[np.bool_] | None = None
    ) -> NDArray[np.bool_] | None:
        """`skipped` and what the adjoint adds to it, after it has made NaN, or raised, what `on_unsafe` wants so."""
        share, weak, most = found[4], found[5], LOST[DTYPES[found[0].dtype]]
        if len(share) == 1 and not share[0] > most and not weak[0]:  # the usual one, in a tenth of the time
            return skipped
        lost = share > most
        if on_unsafe == "raise" and (lost | (weak > 0)).any():

            def reason(i: int) -> str:
                return self._gradient_advice(i, float(share[i]), int(weak[i]))

            raise untrusted(lost | (weak > 0), reason, f"on_unsafe='{otherwise}' to take them as they are")
        if on_unsafe == "use" or not lost.any():
            return skipped
        for a in found[:4]:
            a[lost] = np.nan
        if on_unsafe == "nan":
            return skipped
        return lost if skipped is None else skipped | lost

    def _dependent(self) -> NDArray[np.bool_]:
        """[B] bool: whether rows that hold z depend on each other, see `qp_reliability.moves`."""
        z, _, _, mu = self._rows[:4]
        if all(self._program.given[name] is None for name in ("G", "A", "lower", "upper")):
            return np.zeros(len(z), bool)
        found = moved(self._program.feeds["G"], self._program.feeds["A"], mu)
        bars = [np.broadcast_to(bar, (len(z), bar.shape[1])).astype(z.dtype) for bar in found]
        return np.asarray(dependent(self._adjoint("use", np.zeros_like(z), *bars)[4], DTYPES[z.dtype]))

    def _demand_independent(self, dependent: NDArray[np.bool_]) -> None:
        """Raise where rows that hold z depend on each other."""
        if dependent.any():

            def reason(i: int) -> str:
                return self._gradient_advice(i, 0.0, 0, dependent=True)

            raise untrusted(dependent, reason, "on_unsafe='use' to take them as they are")

    def _gradient_advice(self, i: int, share: float, weak: int, dependent: bool = False) -> str:
        _, lam, _, mu, slack, box_slack, _, code, *_ = self._rows
        if code[i] != QPStatus.SOLVED:
            return self.advice(i)
        data = {name: (a := self._program.feeds[name])[i if len(a) > 1 else 0] for name in "QGA"}
        answer = {"lam": lam[i], "mu": mu[i], "slack": slack[i], "box_slack": box_slack[i]}
        return gradient_advice(i, share, weak, data, answer, dependent)

    def _smoothed(self, kappa: float, on_unsafe: str, *bars: Floats) -> tuple[list[Floats], Points]:
        """As `_adjoint` gives it, and the points of the central path that it is taken at."""
        code = self._rows[7]
        taken = (code == QPStatus.SOLVED) | ((code == QPStatus.INACCURATE) & (on_unsafe == "use"))
        return smoothed_adjoint(self._program.feeds, self._rows[:4], taken, bars, kappa)

    def _adjoint(self, on_unsafe: str, *bars: Floats) -> list[Floats]:
        _, lam, _, mu, slack, box_slack, _, code, *_ = self._rows
        if on_unsafe == "use":  # the operator differentiates what is SOLVED
            code = np.where(code == QPStatus.INACCURATE, np.int32(QPStatus.SOLVED), code)
        data = self._program.feeds
        inputs = data["Q"], data["G"], data["A"], lam, mu, slack, box_slack, code, *bars
        session, _ = operator_session("qp_sensitivity", DTYPES[lam.dtype], *self._program.where)
        return _run(session, SENSITIVITY, dict(zip(ADJOINT_INPUTS, inputs, strict=True)))

    def advice(self, i: int = 0) -> str:
        """One sentence with numbers: how sample `i` went, and what would make it better."""
        i = sample(i, len(self))
        data = {name: a[i if len(a) > 1 else 0] for name, a in self._program.feeds.items() if name != "start"}
        course = self._program.settings.told(self.z.dtype, int(self._rows[9][i]), self._program.seconds)
        return qp_advice(i, STATUSES[int(self._rows[7][i])], self._rows[6][i], data, **course)

    def _unsolved(self, i: int) -> str:
        return f"{STATUSES[int(self._rows[7][i])].name}, {self.advice(i)}"


# --- Arguments ---------------------------------------------------------------------------------------------------


def _given(values: dict[str, object]) -> tuple[dict[str, Floats | None], Sizes]:
    """The data as arrays of one dtype, None where one is absent, and their sizes."""
    Q = values["Q"]
    dtype = Q.dtype if type(Q) is np.ndarray and Q.dtype in DTYPES else _array("Q", Q, None).dtype
    given: dict[str, Floats | None] = {}
    for name, value in values.items():
        if value is None and name != "p":
            given[name] = None
        elif type(value) is np.ndarray and value.dtype == dtype and value.ndim:  # as most are
            given[name] = value
        else:
            given[name] = _array(name, value, dtype)
    return given, _sizes(*[None if a is None else a.shape for a in given.values()])


@functools.lru_cache(256)  # who solves in a loop has the same shapes again
def _sizes(*shapes: tuple[int, ...] | None) -> Sizes:
    return check_shapes(dict(zip(SHAPES, shapes, strict=True)))


def _array(name: str, value: object, dtype: np.dtype[Any] | None) -> Floats:
    """An array of `dtype`, or of float32 or float64 if that is None; of one number where a vector is due."""
    if type(value) is np.ndarray and value.ndim:
        array = value
    elif dtype is not None and name in NUMBERS and (one := alone(value)) is not None:
        try:
            return np.full((), one, dtype)
        except OverflowError:
            raise refused(name, f"a number that {dtype} holds", show(value)) from None
    else:
        array = converted(value, name)
    array = whole_as_floats(array, name, dtype or np.float64)
    if array.dtype != dtype and (dtype is not None or array.dtype not in DTYPES):
        expected = "float32 or float64" if dtype is None else f"{dtype}, as Q is"
        raise refused(name, expected, array.dtype, "convert all data to one of them")
    if np.ma.isMaskedArray(value):
        raise refused(name, "numbers without a mask", "some with one", "fill them in with numpy.ma.filled")
    return array


def _batched(given: dict[str, Floats | None], sizes: Sizes) -> tuple[dict[str, Floats], np.dtype[Any], bool]:
    """What the graph takes, its dtype, and whether any datum had a batch axis."""
    assert given["Q"] is not None
    dtype = given["Q"].dtype
    nothing = _nothing(dtype, sizes.n)
    feeds: dict[str, Floats] = {}
    batched = False
    for name, datum in given.items():
        letters = SHAPES[name]
        if datum is None:
            if name not in ABSENT:
                feeds[name] = nothing[name]
        elif datum.ndim == len(letters):
            feeds[name] = datum[None]
        elif datum.ndim:
            feeds[name], batched = datum, True
        else:
            feeds[name] = np.full((1, getattr(sizes, letters)), datum, dtype)
    if given["G"] is not None and given["h"] is None:
        feeds["h"] = np.full((1, sizes.m), np.inf, dtype)
    return feeds, dtype, batched


@functools.cache
def _nothing(dtype: np.dtype[Any], n: int) -> dict[str, Floats]:
    """What the graph takes for data that are not there."""
    none = np.zeros((1, 0), dtype)
    rows = np.zeros((1, 0, n), dtype)
    return {"G": rows, "A": rows, **dict.fromkeys(("h_lower", "h", "b", "lower", "upper"), none)}


def _start(start: object, dtype: np.dtype[Any], sizes: Sizes) -> Floats:
    if not isinstance(start, QPSolution):
        raise refused("start", "a QPSolution", type(start).__name__, "pass what icnnrt.qp returned")
    z, lam, nu, mu = start._rows[:4]
    came = (z.shape[1], lam.shape[1], nu.shape[1])
    if came != sizes[:3] or len(z) not in (1, sizes.B) or z.dtype != dtype:
        n, m, q, B = sizes
        expected = f"a solution of {B} samples with n, m, q = {n}, {m}, {q} in {dtype}"
        had = f"{len(z)} with {', '.join(map(str, came))} in {z.dtype}"
        raise refused("start", expected, had, "leave it out to start cold")
    return np.concatenate((z, lam, nu, mu), 1)


def _bar(name: str, value: object, like: Floats, rows: Floats) -> Floats:
    """An array of the shape of `like`, [B, ...] as `rows` is."""
    try:
        array = np.asarray(value, rows.dtype)
    except Exception as error:
        came = f"{type(value).__name__}, which does not convert to one ({error})"
        raise refused(name, "an array of numbers", came, "pass a numpy array") from error
    if array.shape != like.shape:
        expected = f"shape {list(like.shape)}, that of {name.removesuffix('_bar')}"
        raise refused(name, expected, list(array.shape), "it is the derivative of the loss by that")
    return array if array.ndim == 2 else array[None]


def _run(session: Any, names: Sequence[str], feeds: dict[str, Floats], seconds: float | None = None) -> list[Floats]:
    """`seconds` is the most time of portable bodies, which know no clock."""
    try:
        if seconds is not None:
            return stopped_after(seconds, lambda options: session.run(names, feeds, options))
        # Faster than io-binding, which wants an OrtValue made of each of up to twelve small arrays.
        out: list[Floats] = session.run(names, feeds)
    except LimitError:
        raise
    except Exception as error:
        raise IcnnrtError(
            f"qp: onnxruntime failed on a batch of {len(feeds['p' if 'p' in feeds else 'lam'])} ({error}); run smaller "
            "batches, or try native=False."
        ) from error
    return out
