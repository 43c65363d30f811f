"""Timing of contenders in turn, so that noise hits all of them alike."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from icnnrt.errors import IcnnrtError

BLOCK: Final = 2e-3  # seconds: quicker calls are repeated to fill a block, since the clock itself costs 0.1 µs
MOST_CALLS: Final = 500
ROUNDS: Final = 25
FEWEST_ROUNDS: Final = 3
SLOW: Final = 4.0  # seconds: a call that takes longer is made once
SETTLE: Final = 5e-3  # seconds before each block with several threads: those of the last contender spin for a while


@dataclass(frozen=True)
class Missing:
    """A contender that cannot run, and why."""

    reason: str


@dataclass(frozen=True)
class Contender:
    """Something to time. `scale` times the seconds of one call are what it is compared by.

    first: seconds that a call took which was made beforehand; one longer than SLOW is not made again.
    """

    call: Callable[[], Any]
    scale: float = 1.0
    note: str = ""
    first: float = 0.0


@dataclass
class Timing:
    """Seconds of one call, by round."""

    samples: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples.values())


def ratio(a: Timing, b: Timing) -> float:
    """a / b: the median over the rounds that both were in, else the ratio of the medians."""
    common = a.samples.keys() & b.samples.keys()
    if len(common) < FEWEST_ROUNDS:
        return a.seconds / b.seconds
    return statistics.median(a.samples[r] / b.samples[r] for r in common)


def race(
    contenders: Mapping[str, Contender | Missing], budget: float, *, rounds: int = ROUNDS, settle: bool = False
) -> dict[str, Timing | Missing]:
    """Time every contender within about `budget` seconds; one that raises is missing, with its reason.

    Each round runs a block of every contender in a new order, after one call that is not timed and brings its data
    back into the caches. Dear contenders sit out rounds, evenly, down to FEWEST_ROUNDS; one whose first call takes
    longer than SLOW has that call alone.
    """
    outcome: dict[str, Timing | Missing] = {}
    calls: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for name, contender in contenders.items():
        if isinstance(contender, Missing):
            outcome[name] = contender
            continue
        try:
            first = contender.first if contender.first > SLOW else _seconds(contender.call, 1)
            if first > SLOW:
                outcome[name] = Timing({-1: first * contender.scale})
                continue
            once = _seconds(contender.call, 1)
        except Exception as error:
            outcome[name] = Missing(first_line(error))
            continue
        calls[name] = min(MOST_CALLS, max(1, math.ceil(BLOCK / once)))
        block = once * (calls[name] + 1)
        wanted[name] = max(FEWEST_ROUNDS, min(rounds, int(budget / len(contenders) / block)))
        outcome[name] = Timing()
    order, shuffled = list(wanted), random.Random(0)
    total = max(wanted.values(), default=0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(total):
            shuffled.shuffle(order)
            for name in order:
                if (r + 1) * wanted[name] // total == r * wanted[name] // total:
                    continue
                contender, timing = contenders[name], outcome[name]
                assert isinstance(contender, Contender)
                assert isinstance(timing, Timing)
                if settle:
                    time.sleep(SETTLE)
                contender.call()
                timing.samples[r] = _seconds(contender.call, calls[name]) * contender.scale
    finally:
        if collecting:
            gc.enable()
    return outcome


def _seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def first_line(error: BaseException) -> str:
    """An error as the reason of a `Missing`."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, IcnnrtError):
        return text
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
