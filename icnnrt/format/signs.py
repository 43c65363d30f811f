"""Signs of weights: which entries of a weight have to be >= 0 or <= 0 for the energy to be convex in y.

The set that they describe is a product of half-lines, so the nearest weight in it is had entry by entry,

    θ <- max(θ, 0) where θ has to be >= 0,   θ <- min(θ, 0) where it has to be <= 0,

and 0 where both are asked for. A weight may mix what needs a sign with what does not: of W in W [z, y], the columns
that meet convex z do, those that meet y do not. Therefore a sign may also be given in runs along one axis, or along
the entries row by row.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.format.fields import JsonObject, exactly, integer, listing, wrong

# Bits of an entry's sign.
FREE, NONNEGATIVE, NONPOSITIVE = 0, 1, 2
NAMES: Final = {NONNEGATIVE: "nonnegative", NONPOSITIVE: "nonpositive", NONNEGATIVE | NONPOSITIVE: "zero"}
BITS: Final = {name: bits for bits, name in NAMES.items()}
# Of one weight: a manifest has room for no more, and patterns that need more are none that a layer would have.
MAX_RUNS: Final = 1024


class Run(NamedTuple):
    """Entries start to stop, the last one excluded."""

    start: int
    stop: int
    bits: int


@dataclass(frozen=True)
class Sign:
    """The sign of one weight: the same for every entry, or for runs along an axis, everything else being free.

    axis None counts the entries row by row.
    """

    whole: int = FREE
    axis: int | None = None
    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, bits: NDArray[np.uint8]) -> "Sign | None":
        """The sign that has these bits, entry by entry; None where every entry is free.

        Raises `ValueError` for a pattern of more than `MAX_RUNS` runs along every axis.
        """
        if not bits.any():
            return None
        if (bits == bits.flat[0]).all():
            return cls(int(bits.flat[0]))
        for axis in range(bits.ndim):
            line = bits[tuple(slice(None) if a == axis else 0 for a in range(bits.ndim))]
            if (bits == np.expand_dims(line, [a for a in range(bits.ndim) if a != axis])).all():
                return cls(FREE, axis, _runs(line))
        return cls(FREE, None, _runs(bits.reshape(-1)))

    def asks(self, bit: int) -> bool:
        """Whether any entry has to be `NONNEGATIVE`, or `NONPOSITIVE`."""
        return any(bits & bit for bits in (self.whole, *(run.bits for run in self.runs)))

    def bits(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The bits of every entry of a weight of this shape."""
        if self.whole:
            return np.full(shape, self.whole, np.uint8)
        line = np.zeros(math.prod(shape) if self.axis is None else shape[self.axis], np.uint8)
        for start, stop, bits in self.runs:
            line[start:stop] = bits
        if self.axis is None:
            return line.reshape(shape)
        return np.broadcast_to(np.expand_dims(line, [a for a in range(len(shape)) if a != self.axis]), shape)

    def project(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The nearest weight that has this sign: a new array, or the same one if it has it already."""
        if self.holds(weight):
            return weight
        weight = np.array(weight, order="C")
        for part, bits in self._parts(weight):
            if bits & NONNEGATIVE:
                np.maximum(part, 0, out=part)
            if bits & NONPOSITIVE:
                np.minimum(part, 0, out=part)
        return weight

    def holds(self, weight: NDArray[Any]) -> bool:
        """Whether the weight has this sign; NaN has none."""
        return self.violation(weight) <= 0

    def violation(self, weight: NDArray[Any]) -> float:
        """By how much the entry that is furthest on the wrong side of 0 is there; at most 0 if none is, NaN for NaN."""
        worst = -math.inf
        for part, bits in self._parts(weight):
            if bits & NONNEGATIVE:
                worst = float(np.maximum(worst, -part.min(initial=np.inf)))
            if bits & NONPOSITIVE:
                worst = float(np.maximum(worst, part.max(initial=-np.inf)))
        return worst

    def fault(self, weight: NDArray[Any]) -> str:
        """What the weight should be and is not, for a sentence; empty if it has this sign."""
        for part, run in zip((part for part, _ in self._parts(weight)), self.runs or (None,), strict=True):
            sign = Sign(self.whole if run is None else run.bits)
            if sign.holds(part):
                continue
            where = "" if run is None else f" in entries {run.start} to {run.stop - 1}"
            where += "" if run is None or self.axis is None else f" along axis {self.axis}"
            low, high = f"{part.min():.6g}", f"{part.max():.6g}"
            came = {NONNEGATIVE: f"its smallest entry is {low}", NONPOSITIVE: f"its largest entry is {high}"}
            return f"{NAMES[sign.whole]}{where}, but {came.get(sign.whole, f'its entries are from {low} to {high}')}"
        return ""

    def _parts(self, weight: NDArray[Any]) -> Iterator[tuple[NDArray[Any], int]]:
        """Views of a C-ordered weight, each of one sign."""
        if self.whole:
            yield weight, self.whole
            return
        lines = weight.reshape(-1) if self.axis is None else np.moveaxis(weight, self.axis, 0)
        for start, stop, bits in self.runs:
            yield lines[start:stop], bits

    def to_json(self) -> object:
        """A name for every entry, or runs."""
        if self.whole:
            return NAMES[self.whole]
        return {"axis": self.axis, "runs": [[start, stop, NAMES[bits]] for start, stop, bits in self.runs]}

    @classmethod
    def from_json(cls, value: object, place: str, shape: tuple[int, ...]) -> "Sign | None":
        """What `to_json` gave, checked; null is no sign. Raises `PackageError`."""
        if value is None:
            return None
        if isinstance(value, str):
            return cls(BITS[exactly(*BITS)(value, place)])
        fields = JsonObject(value, f"{place}.")
        axis = fields.take("axis", lambda v, p: None if v is None else integer(0, max(len(shape) - 1, 0))(v, p))
        runs = fields.take("runs", listing(_run, MAX_RUNS))
        fields.close()
        if axis is not None and not shape:
            wrong(f"{place}.axis", "null, as the weight has no axes", axis)
        size = math.prod(shape) if axis is None else shape[axis]
        ends = [end for run in runs for end in run[:2]]
        if not runs or ends != sorted(ends) or ends[-1] > size or any(start == stop for start, stop, _ in runs):
            wrong(f"{place}.runs", f"runs in order that do not overlap, within 0 to {size}", value)
        return cls(FREE, axis, runs)


def _run(value: object, place: str) -> Run:
    if not isinstance(value, list) or len(value) != 3:
        wrong(place, f"[start, stop, {' or '.join(BITS)}]", value)
    end = integer(0, 1 << 31)
    return Run(end(value[0], place), end(value[1], place), BITS[exactly(*BITS)(value[2], place)])


def _runs(line: NDArray[np.uint8]) -> tuple[Run, ...]:
    """Runs of a line of bits, the free ones left out."""
    edges = [0, *(np.flatnonzero(line[1:] != line[:-1]) + 1).tolist(), len(line)]
    runs = tuple(Run(start, stop, int(line[start])) for start, stop in pairwise(edges) if line[start])
    if len(runs) > MAX_RUNS:
        raise ValueError(f"{len(runs)} runs")
    return runs


def united(one: Sign | None, other: Sign | None, shape: tuple[int, ...]) -> Sign | None:
    """The sign that asks for both."""
    if one is None or other is None or one == other:
        return one or other
    return Sign.of(one.bits(shape) | other.bits(shape))
