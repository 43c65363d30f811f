"""Tuning as it is followed on the command line: a bar of its steps, and signals that wait for the end of one.

Ctrl-C is obeyed between two steps, so weights and optimiser state are never half of one and half of another; pressed
again it changes nothing, so that what was learnt is written. The same holds of SIGTERM, by which machines and queues
stop a process, and of SIGHUP, which comes when its terminal is closed.
"""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from icnnrt.cli.app import INTERRUPTED, SIGNAL_EXIT, console, number, pressed

if TYPE_CHECKING:
    from icnnrt.tuning.reports import EpochReport, StepReport

STOPPING: Final = "icnnrt: stopping after this step; what was learnt is then written, so Ctrl-C is ignored until it is."
SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not there on Windows


@contextlib.contextmanager
def between_steps(followed: "Followed") -> Iterator[None]:
    """Let signals wait for the end of a step, and ignore further ones until what was learnt is written."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread alone
        return
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def press(number: int, frame: object) -> None:
        if followed.signal is None:
            followed.signal = number
            # Not print: a handler runs in the middle of anything, a write to the same buffer among them.
            with contextlib.suppress(OSError):
                os.write(2, f"{os.linesep if os.isatty(2) else ''}{STOPPING}{os.linesep}".encode())
        # One that was closed refuses every write from now on, and is no terminal any more.
        _say_no_more([descriptor for descriptor in terminals if not os.isatty(descriptor)])

    if pressed:
        raise KeyboardInterrupt
    before = {}
    try:
        for name in SIGNALS:
            number = getattr(signal, name, None)
            # Whoever starts a process with SIGHUP ignored, as nohup does, wants it to go on.
            if number is not None and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
                before[number] = signal.signal(number, press)
        yield
    finally:
        for number, handler in before.items():
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual if handler is None else handler)


@contextlib.contextmanager
def whoever_listens(interrupted: bool) -> Iterator[None]:
    """Whoever interrupted the command need not be there to read what it says; its exit code stays what it is."""
    try:
        yield
        if interrupted:
            sys.stdout.flush()
    except OSError:
        if not interrupted:
            raise
        _say_no_more([1, 2])


def _say_no_more(descriptors: Sequence[int]) -> None:
    """Let what is written to these, and what lies in buffers for them, be lost without an error."""
    if descriptors:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


class Followed:
    """What has happened so far, and the bar that shows it. Raises KeyboardInterrupt after a step if it is to end."""

    def __init__(self, epochs: int, samples: int, batch_size: int) -> None:
        self.total = epochs * math.ceil(samples / batch_size)
        self.wanted = epochs
        self.steps: list[StepReport] = []
        self.epochs: list[EpochReport] = []
        self.gaps: list[float] = []
        """The largest duality gap of each epoch."""
        self.signal: int | None = None
        """Which one asked for an end first."""
        self._first = 0  # step of the epoch under way
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console(err=True))
        self._task = self._progress.add_task("", total=self.total, epoch=f"1/{epochs}", told="")

    @property
    def code(self) -> int:
        """The exit code of an interrupted command, as shells have it."""
        return INTERRUPTED if self.signal is None else SIGNAL_EXIT + self.signal

    @property
    def accepted(self) -> int:
        """Steps whose weights stayed, as far as later steps have told."""
        return sum(report.accepted - report.undone for report in self.steps)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The bar appears with the first step: what is wrong with the data is told before that."""
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self._progress.stop()

    def step(self, report: "StepReport") -> None:
        self.steps.append(report)
        with contextlib.suppress(OSError):  # a bar that cannot be drawn costs nobody what was learnt
            self._progress.start()
        self._tell(report)

    def epoch(self, report: "EpochReport") -> None:
        self.epochs.append(report)
        self.gaps.append(max((s.gap_max for s in self.steps[self._first :]), default=math.nan))
        self._first = len(self.steps)
        self._tell(self.steps[-1])

    def _tell(self, last: "StepReport") -> None:
        told = f"loss {number(last.loss)}, gap {number(last.gap_max)}"
        if self.epochs and self.epochs[-1].validation is not None:
            told += f", validation {number(self.epochs[-1].validation)}"
        refused = len(self.steps) - self.accepted
        epoch = min(len(self.epochs) + 1, self.wanted)
        with contextlib.suppress(OSError):
            self._progress.update(
                self._task,
                completed=len(self.steps),
                epoch=f"{epoch}/{self.wanted}",
                told=f"{told}, {refused} refused" if refused else told,
            )
        if self.signal is not None:
            raise KeyboardInterrupt
