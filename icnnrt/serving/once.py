"""Things that take long to make, such as sessions of onnxruntime: each is made by whoever asks first, and only once."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from icnnrt.serving.forks import inherit
from icnnrt.serving.turns import Turns

T = TypeVar("T")


class Once(Generic[T]):
    """What has been made, by key. Thread-safe; a forked child makes everything anew."""

    def __init__(self) -> None:
        self._made: dict[Hashable, T] = {}
        self._turns = Turns()
        inherit(self)

    def find(self, key: Hashable) -> T | None:
        """What has been made for `key`, if anything has."""
        return self._made.get(key)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What has been made for `key`; made now, if nothing has. Others who ask meanwhile wait."""
        found = self._made.get(key)
        if found is not None:
            return found
        turn = self._turns.take()
        try:
            found = self._made.get(key)
            if found is None:
                found = self._made[key] = make()
            return found
        finally:
            turn.end()

    def give_up(self) -> object:
        """Forget everything; return what was there."""
        made, self._made = self._made, {}
        return made
