"""The weights of a session: whole sets that never change, one after the other.

A run takes the set that is the last when it begins, and keeps it; an update puts a new set behind the last one, in one
operation of the interpreter (see `turns`). So a run never sees half an update, neither waits for the other, whatever
interrupts either leaves nothing to clean up, and a set is gone with the last run that uses it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class WeightSet:
    """All weights at one time, by name, read-only; `note` is what whoever made the set wants to keep beside it."""

    __slots__ = ("_values", "arrays", "id", "note")

    def __init__(self, arrays: Mapping[str, NDArray[Any]], id: str, note: object = None) -> None:
        for array in arrays.values():
            array.flags.writeable = False
        # Views: one of what is read-only cannot be made writeable.
        self.arrays: Mapping[str, NDArray[Any]] = MappingProxyType({name: a.view() for name, a in arrays.items()})
        self.id = id
        self.note = note
        self._values: dict[str, Any] | None = None

    def alone(self) -> "WeightSet":
        """The same weights without the note, and so without what that keeps alive."""
        other = WeightSet(self.arrays, self.id)
        other._values = self._values
        return other

    def values(self, ort_value: Callable[[NDArray[Any]], Any]) -> dict[str, Any]:
        """name -> OrtValue, which shares the memory of the array."""
        if self._values is None:
            self._values = {name: ort_value(array) for name, array in self.arrays.items()}
        return self._values


def as_used(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in this machine's order of bytes, C-ordered and without denormals; the same array where it is
    so already."""
    return without_denormals(np.asarray(array, array.dtype.newbyteorder("="), order="C"))


def without_denormals(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers, those nearer to 0 than the smallest normal one being 0 of their sign; float16 stays as it is.

    The same array where there are none. Processors take a hundred cycles for a product with a denormal, so weights
    that decayed made `value` 17 times as slow (of digits_completion, batch 64), and moments of units that are dead stay
    denormal for ever. onnxruntime's own setting, session.set_denormal_as_zero, is no way out: it does not hold for
    threads that are older than the session, and changes the arithmetic of the thread that makes one for good
    (measured). Looking through 6.3 MB of float32 takes 1.5 ms. In graphs float16 is widened, to normal numbers.
    """
    if array.dtype.kind != "f" or array.itemsize < np.dtype(np.float32).itemsize:
        return array
    size = np.abs(array)
    denormal = size < np.finfo(array.dtype).smallest_normal
    if denormal.any():
        denormal &= size > 0  # zeros are many where a weight is projected
        if denormal.any():
            return np.where(denormal, np.copysign(array.dtype.type(0), array), array)
    return array
