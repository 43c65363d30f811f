"""The weights of a session: whole sets that never change, one after the other.

A run takes the set that is the last when it begins, and keeps it; an update puts a new set behind the last one, in one
operation of the interpreter (see `_turns`). So a run never sees half an update, neither waits for the other, whatever
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
        self.arrays: Mapping[str, NDArray[Any]] = MappingProxyType(dict(arrays))
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
    """The same numbers in this machine's order of bytes, C-ordered; the same array where it is so already."""
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")
