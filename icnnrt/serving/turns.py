"""Taking turns in a way that no exception at any instant can break: Ctrl-C, an alarm, an injected exception.

A lock that is taken in one instruction and given back in another is held for ever by whoever is interrupted between.
Here a turn is an object that its taker holds in a local variable, and lasts as long as that object does: when the
frame is left, by whatever way, the object dies and the turn is over. Taking one is a single operation of the
interpreter, the `setdefault` of a dict, which two threads cannot both be the first at:

    first <- second <- third            each link was put behind the one before it by setdefault; the last one is who
                                        has the turn, if it still lives

A traceback keeps frames alive, and so turns; therefore they also end when told to, which is the usual way, and when
the frame that took them is found not to be running:

    turn = turns.take()
    try:
        ...
    finally:
        turn.end()

`end` is a function of C, so that a signal, whose handler runs between two instructions of Python, comes before it or
after it.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from icnnrt.serving.forks import generation

T = TypeVar("T")

# Seconds between two looks at whether whoever has the turn still lives. One that ends as it should is noticed at once.
LOOK: Final = 0.05


class Link(Generic[T]):
    """A value in a chain that grows at its end by one link at a time, whoever tries to lengthen it.

    Only the end is to be kept: what comes before it goes, and a link that is kept keeps all that follow.
    """

    __slots__ = ("_next", "value")

    def __init__(self, value: T) -> None:
        self.value = value
        self._next: dict[None, Link[T]] = {}

    def follow(self, other: "Link[T]") -> bool:
        """Put `other` behind this link, if nothing is there yet; False if something was first."""
        return self._next.setdefault(None, other) is other

    def last(self) -> "Link[T]":
        """The end of the chain, from here on."""
        link = self
        while (following := link._next.get(None)) is not None:
            link = following
        return link


class Turn:
    """Whoever holds it has the turn, until `end` is called or the object is gone."""

    __slots__ = ("__weakref__", "end")

    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end


# A function of C that does nothing.
_NOTHING: Final[Callable[[], object]] = ().__len__


class _Taken:
    """A turn as others see it."""

    __slots__ = ("frame", "generation", "lock", "thread", "turn")

    def __init__(self, turn: Turn, lock: threading.Lock, frame: int) -> None:
        self.turn = weakref.ref(turn)
        self.lock = lock
        self.frame = frame  # the id of the one that holds the turn, and so no other's while the turn lives
        self.thread = threading.get_ident()
        self.generation = generation()

    def over(self) -> bool:
        # Of a process that this one was forked from nobody is left to end it.
        return not self.lock.locked() or self.turn() is None or self.generation != generation()

    def abandoned(self) -> bool:
        """Whether the frame that took it is running no more; costs a walk through that thread's frames."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None and id(frame) != self.frame:
            frame = frame.f_back
        return frame is None


class Turns:
    """Turns at one thing. Whoever has the turn may take it again; it is over when the outermost one is."""

    __slots__ = ("_link",)

    def __init__(self) -> None:
        self._link: Link[_Taken | None] = Link(None)

    def take(self) -> Turn:
        """Wait for the turn, which lasts as long as what is returned is held, and has not been told to end."""
        lock = threading.Lock()
        lock.acquire()
        turn = Turn(lock.release)
        mine: Link[_Taken | None] = Link(_Taken(turn, lock, id(sys._getframe(1))))
        abandoned: Link[_Taken | None] | None = None
        while True:
            link = self._link = self._link.last()
            taken = link.value
            if taken is None or taken.over() or link is abandoned:
                if link.follow(mine):
                    self._link = mine
                    return turn
            elif taken.thread == threading.get_ident() and not taken.abandoned():
                return Turn(_NOTHING)
            elif taken.lock.acquire(timeout=LOOK):  # it ended; let others who wait for it see so too
                taken.lock.release()
            elif taken.abandoned():
                abandoned = link
