"""What solvers hand out: one base class of answers, each with its certificate. All arrays are read-only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import rows, sample
from icnnrt.errors import CertificateError
from icnnrt.mathematics import certificate
from icnnrt.mathematics.status import ANSWERED, Status, imprecise, summarise

Floats = NDArray[Any]  # float32 or float64: the package's dtype
Array = NDArray[np.float64]

NAMED: Final = 3  # how many samples an error names


S = TypeVar("S", bound="Solution")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Record:
    """A frozen dataclass with read-only arrays and mappings, which pickling knows neither of."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, field.name, _read_only(value))
            elif isinstance(value, Mapping):
                frozen = {k: _read_only(v) if isinstance(v, np.ndarray) else v for k, v in value.items()}
                object.__setattr__(self, field.name, MappingProxyType(frozen))

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in fields(self))
        return type(self), tuple(dict(v) if isinstance(v, Mapping) else v for v in values)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be made writeable again: numpy allows that only if what it is a view of is writeable."""
    return np.asarray(array.data.toreadonly())


class Solution(Record):
    """The answer to B samples, whatever solved them; every solver returns a subclass, which says what else it holds.

    y       [B, n], the answer of each sample; z of a quadratic program
    status  [B], a `Status` each
    info    how it was computed: "providers", "native" (whether compiled kernels ran), "seconds"; where the solver has
            such, "iterations" (cuts at most), "steps" (of one solve), "gap_tolerance", "residual_tolerance"
    weights_id  which weights it was computed with, where it is a session's

    The length is B; `solution[i]`, a slice or a mask selects samples and gives a solution of them.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def y(self) -> NDArray[Any]: ...

        @property
        def status(self) -> Any: ...

        @property
        def info(self) -> Mapping[str, Any]: ...

        @property
        def weights_id(self) -> str: ...

    def __len__(self) -> int:
        return int(np.size(self.status))

    @property
    def ok(self) -> Any:
        """[B] bool: the status is CONVERGED."""
        return self.status == Status.CONVERGED

    def __getitem__(self, index: Any) -> Self:
        """The samples at `index` (integer, slice, mask or integer array), always with a batch dimension."""
        index = rows(index, len(self))
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(v[index] if isinstance(v, np.ndarray) else v for v in values))

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        raise NotImplementedError

    def summary(self) -> str:
        """How many samples have which status, and the advice on the first of each kind that did not converge."""
        return summarise(np.atleast_1d(self.status).tolist(), self.advice)

    def __repr__(self) -> str:
        head = self.summary().partition("\n")[0]
        return f"<{type(self).__name__} of {len(self)} x {self.y.shape[-1]}: {head}>"


class EnergySolution(Solution):
    """The answer of an energy: y*, what it costs, and how far that may be from the minimum.

    x            [B, *x_shape] in the package's dtype, the contexts as they were run
    energy       [B] float64, what y* minimises
    lower_bound  [B] float64: no energy is below it if f is convex in y, up to the rounding of f in the package's dtype
    gap          [B] float64, energy − lower_bound
    residual     [B, 3] float64, of the last model
    uncertainty  [B] float64, by how much rounding in the package's dtype may have moved gap and lower bound
    weights_id   which weights it was computed with
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def x(self) -> Floats: ...

        @property
        def lower_bound(self) -> Array: ...

        @property
        def uncertainty(self) -> Array: ...

    @property
    def differentiable(self) -> NDArray[np.bool_]:
        """[B] bool: y* is known well enough for a gradient, see `certificate.differentiable`."""
        return certificate.differentiable(self.status, self.uncertainty, self.lower_bound)

    def doubt(self, i: int) -> str:
        """Why y* of sample `i` is not known well enough for a gradient; empty if it is."""
        i = sample(i, len(self))
        one = self[i]
        if one.differentiable[0]:
            return ""
        if one.status[0] not in ANSWERED:
            return self.advice(i)
        most = certificate.DIGITS * float(certificate.unit(one.lower_bound)[0])
        return f"sample {i}: {imprecise(float(one.uncertainty[0]), most, str(self.x.dtype))}"


def first_of(samples: NDArray[np.bool_], told: Callable[[int], str]) -> str:
    """What is `told` of the first few of these samples, and how many more there are."""
    at = np.flatnonzero(samples)
    more = f"; and {len(at) - NAMED} more" if len(at) > NAMED else ""
    return "; ".join(told(int(i)) for i in at[:NAMED]) + more


def untrusted(unsafe: NDArray[np.bool_], reason: Callable[[int], str], skip: str) -> CertificateError:
    """What to raise where no gradient can be trusted at some samples: a reason for each, and how to `skip` them."""
    return CertificateError(
        f"solution: no gradient can be trusted at {unsafe.sum()} of {len(unsafe)} samples: {first_of(unsafe, reason)}. "
        f"Pass {skip}, or mend what they say."
    )


def demand_converged(solution: Solution) -> None:
    """Raise `CertificateError`, which names the first of them, if any sample has not converged."""
    failed = ~solution.ok
    if failed.any():
        named = first_of(failed, lambda i: f"{Status(solution.status[i]).name}, {solution.advice(i)}")
        raise CertificateError(
            f"strict: {failed.sum()} of {len(solution)} samples did not converge: {named}. Pass strict=False to get "
            "the solution with a status for every sample."
        )
