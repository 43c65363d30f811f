"""What Python and torch do beside an export's own work, and may do less of."""

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Final

import torch

# Allocations that start a collection of the youngest objects, and how often that goes on to the older ones. Tracing
# makes many objects and few cycles, beside the million that the packages of torch and onnx keep: at Python's usual
# threshold of 700 a tenth of an export's time went into looking through them.
THRESHOLDS: Final = (500_000, 50, 100)

_CHANGING = threading.Lock()
_entered: list[tuple[int, int, int]] = []  # what it was before, once for every export under way
_threads: list[int] = []  # the same of torch's threads, whose number is each thread's own, and new ones take the last


@contextlib.contextmanager
def collected_rarely() -> Iterator[None]:
    """Garbage in cycles waits while it is entered; whoever collects none at all is not made to."""
    with _CHANGING:
        _entered.append(_entered[0] if _entered else gc.get_threshold())
        if _entered[0][0]:
            gc.set_threshold(*(max(pair) for pair in zip(_entered[0], THRESHOLDS, strict=True)))
    try:
        yield
    finally:
        with _CHANGING:
            before = _entered.pop()
            if not _entered:
                gc.set_threshold(*before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: its matrices here are small, and waiting threads spin. On two busy cores the second
    thread made an epoch of the demo take 48 s in place of 1.4 s, and an export 24 s in place of 5 s (measured)."""
    with _CHANGING:
        _threads.append(_threads[0] if _threads else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _CHANGING:
            torch.set_num_threads(_threads.pop())
