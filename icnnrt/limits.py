"""Limits for graphs of strangers: how long a call may take, how much memory, and in which process it runs.

A graph is a program: a Loop of 2⁶⁰ trips is a few hundred bytes. What it can reach is known before it runs (`package`);
how long it takes and how much memory is not, so both are bounded while it runs:

    time     onnxruntime ends a run, or the loading of a graph, between two operators once the time is over (the loading
             from onnxruntime 1.22 on). A single operator is not interrupted; what it computes fits the memory, though.
    memory   what operators make comes from an arena of onnxruntime that has this size, and refuses more; what a few
             (NonZero, Unique, sequences) need on the way besides does not. Functions are counted before they are put in
             place of their calls, and tensors of text, each entry of which has memory of its own, are refused in every
             package (`wire`). Nothing is optimised or computed while a graph is loaded, so runs are somewhat slower.
    process  the graph runs in a process of its own, which is killed where the time is over, in the middle of an
             operator too, has no more memory than that, and cannot take the caller's down.

Limits bound the graphs, and the proof of convexity; what icnnrt itself does with their answers is bounded by the sizes
in the manifest.
"""

import contextlib
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Concatenate, Final, NamedTuple, ParamSpec, Protocol, TypeVar

from icnnrt.arguments import flag, instance, integer, number, refused
from icnnrt.errors import LimitError

SECONDS: Final = 60.0
BYTES: Final = 1 << 30
LEAST_BYTES: Final = 1 << 20
MOST_SECONDS: Final = 1e6  # what a timer takes
MOST_BYTES: Final = 1 << 46  # what systems take for a bound


@dataclass(frozen=True)
class Limits:
    """What a graph of a stranger may take.

    Raises `InputError` for times that are not positive, and for less than a mebibyte.
    """

    seconds: float = SECONDS
    """Of each call of a session, in seconds of the clock; each step of a `FineTuner` is one."""
    bytes: int = BYTES
    """Of what the operators of one graph make, all of its runs at a time together, outputs among it; with `process` of
    each process besides. What onnxruntime and icnnrt take themselves, some 80 MB, is not counted."""
    process: bool = False
    """Run graphs in a process of their own. Arrays go there and back, which takes a millisecond or so a call; a call
    for which a process has to be started first, as the first one has to, has the time for that besides. The process
    opens the package itself, so its folder has to stay as it was."""

    def __post_init__(self) -> None:
        seconds = number(self.seconds, "seconds", above=0.0)
        if seconds > MOST_SECONDS:
            raise refused("seconds", f"at most {MOST_SECONDS:g}", f"{seconds:g}")
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "bytes", integer(self.bytes, "bytes", LEAST_BYTES, MOST_BYTES))
        object.__setattr__(self, "process", flag(self.process, "process"))


class Deadline(NamedTuple):
    """When a call has to be over."""

    at: float  # of time.monotonic
    seconds: float  # that it had

    def left(self) -> float:
        """Seconds until then, 0 if it has passed."""
        return max(0.0, self.at - time.monotonic())

    def later(self, seconds: float) -> "Deadline":
        """So much later."""
        return Deadline(self.at + seconds, self.seconds)

    def over(self, what: str) -> LimitError | None:
        """What to raise, if it has passed while `what` was under way."""
        if self.left():
            return None
        return LimitError(
            f"{what} takes longer than the limit of {self.seconds:g} seconds; give more, if you trust its maker, or "
            "ask for less at a time."
        )


_in_force: ContextVar[Limits | None] = ContextVar("limits", default=None)
_deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def checked_limits(limits: Limits | None) -> Limits | None:
    """Those, or else the ones of the block that this is called in; `InputError` for what are none."""
    return _in_force.get() if limits is None else instance(limits, "limits", Limits, "icnnrt.Limits or None")


def deadline() -> Deadline | None:
    """When the call that is under way has to be over."""
    return _deadline.get()


def check(what: str) -> None:
    """Raise `LimitError` if the time of the call under way is over."""
    end = _deadline.get()
    if end is not None and (late := end.over(what)):
        raise late


def needs_memory(what: str, limits: Limits) -> LimitError:
    """What to raise where there is not enough of it for `what`."""
    return LimitError(
        f"{what} needs more memory than the limit of {limits.bytes:,} bytes; give more, if you trust its maker, or run "
        "smaller batches."
    )


@contextlib.contextmanager
def within(limits: Limits) -> Iterator[None]:
    """Sessions that are opened in this block have these limits, and all of it together has their time.

    For whole commands: if it is interrupted as it begins or ends, its limits may stay those of the thread.
    """
    kept = _in_force.set(limits), _deadline.set(_end_of(limits))
    try:
        yield
    finally:
        _in_force.reset(kept[0])
        _deadline.reset(kept[1])


P = ParamSpec("P")
R = TypeVar("R")


def call(limits: Limits | None, function: Callable[P, R], *args: P.args, **keywords: P.kwargs) -> R:
    """Call a function as one call, which has to be over after the time of the limits, and before that of the call that
    it is made by."""
    if limits is None:
        return function(*args, **keywords)
    # The deadline is that of a context of its own, which nothing has to undo: no interrupt can leave it behind.
    context = contextvars.copy_context()
    context.run(_deadline.set, _end_of(limits))
    return context.run(function, *args, **keywords)


def _end_of(limits: Limits) -> Deadline:
    end, outer = Deadline(time.monotonic() + limits.seconds, limits.seconds), _deadline.get()
    return end if outer is None or end.at < outer.at else outer


@contextlib.contextmanager
def ended(end: Deadline | None, stop: Callable[[], object]) -> Iterator[None]:
    """Have `stop` called, in another thread, if the block has not ended by then."""
    if end is None:
        yield
        return
    timer = threading.Timer(end.left(), stop)
    timer.daemon = True
    try:
        timer.start()
        yield
    finally:
        timer.cancel()


class Limited(Protocol):
    """What has methods that are calls with limits."""

    @property
    def limits(self) -> Limits | None: ...


S = TypeVar("S", bound=Limited)


def each_call(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method of which every call has the time of the limits of its object."""

    @functools.wraps(method)
    def bounded(self: S, *args: P.args, **keywords: P.kwargs) -> R:
        return call(self.limits, method, self, *args, **keywords)

    return bounded
