"""What a forked child must not use, and must never destroy: onnxruntime's sessions, and all that belongs to them.

A fork copies the thread that forks and the memory of all. A mutex that another thread of the parent held at that
instant stays locked in the child for ever, and a pool's threads are not there; onnxruntime's sessions have both. So
whatever holds such things gives them up in the child, before anything else runs there, and makes them anew when they
are needed; what it gave up is kept to the end of the process, as destroying it would wait for the same mutexes.
"""

import contextlib
import ctypes
import os
import weakref
from typing import Any, Final, Protocol


class Inheritor(Protocol):
    """Something that holds objects of onnxruntime."""

    def give_up(self) -> object:
        """Forget all of them, to make them anew when they are needed; return what was forgotten."""


_inheritors: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: Final[list[object]] = []
_generation = 0


def generation() -> int:
    """How many forks lie between this process and the one that began."""
    return _generation


def inherit(holder: Inheritor) -> None:
    """Have `holder` asked to give up what it holds in every child that is forked from here on."""
    _inheritors.add(holder)


def _in_child() -> None:
    global _generation
    _generation += 1
    _inherited.extend(holder.give_up() for holder in list(_inheritors))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
    with contextlib.suppress(AttributeError):  # of another Python than CPython
        # Not even the end of the interpreter, which clears every module, destroys the list.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_inherited))
