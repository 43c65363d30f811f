"""Passes over the data: steps on batches drawn anew each time, validation, checkpoints, the best weights met."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from icnnrt.tuning.reports import EpochReport, FitReport, StepReport

if TYPE_CHECKING:
    from icnnrt.tuning.finetune import FineTuner

Arrays = dict[str, NDArray[Any]]


@dataclass
class Epochs:
    """What `FineTuner.fit` was asked for, and how far it is."""

    tuner: "FineTuner"
    step: Callable[[Arrays], StepReport]
    loss: Callable[[Arrays], float]
    save: Callable[[Mapping[str, float | None]], object] | None
    """Of figures, where there is a history."""
    data: Arrays
    skipped: int
    """How many samples were left out of the data."""
    held: Arrays | None
    """Validation data."""
    batch_size: int
    patience: int | None
    worse: float
    order: np.random.Generator
    on_step: Callable[[StepReport], None]
    on_epoch: Callable[[EpochReport], None]
    best: float | None = None
    best_epoch: int | None = None
    reports: list[EpochReport] = field(default_factory=list)

    def run(self, epochs: int) -> FitReport:
        """All of them, or as many as there is a point in."""
        self.tuner.keep()
        before = None if self.held is None else self.loss(self.held)
        self.best, self.best_epoch = before, None if self.held is None else 0
        stopped = ""
        for epoch in range(1, epochs + 1):
            stopped = self._epoch(epoch, last=epoch == epochs)
            if stopped:
                break
        self.tuner.settle()
        if self.best is not None and self.best_epoch != len(self.reports):
            self.tuner.rollback()
            self._save({"validation": self.best})  # the last checkpoint is what the session has
        return FitReport(self.reports, before, self.best_epoch, stopped)

    def _epoch(self, epoch: int, last: bool) -> str:
        """One pass; why no other one should follow, empty if one may."""
        began = time.perf_counter()
        steps: list[StepReport] = []
        accepted, count = 0, len(self.data["x"])
        for rows in np.array_split(self.order.permutation(count), math.ceil(count / self.batch_size)):
            steps.append(self.step({name: a[rows] for name, a in self.data.items()}))
            # The step that is undone may be the last of the epoch before, which is reported already.
            accepted = max(accepted + steps[-1].accepted - steps[-1].undone, 0)
            self.on_step(steps[-1])
        reason = steps[-1].reason
        # Where weights may be kept they are looked at; elsewhere the next step does it without another argmin.
        looked_at = self.held is not None or self.save is not None or last
        if looked_at and (undone := self.tuner.settle()):
            accepted, reason = max(accepted - 1, 0), undone
        loss = None if self.held is None else self.loss(self.held)
        rolled_back = loss is not None and self._validated(epoch, loss)
        report = EpochReport(
            epoch=epoch,
            loss=mean([s.loss for s in steps], [s.samples for s in steps]),
            validation=loss,
            accepted=accepted,
            refused=len(steps) - accepted,
            skipped=self.skipped,
            unsafe=sum(s.unsafe for s in steps),
            rolled_back=rolled_back,
            seconds=time.perf_counter() - began,
        )
        self.reports.append(report)
        # The figures are those of the weights that the session has now.
        figures = {"validation": self.best, "loss": None} if rolled_back else {"validation": loss, "loss": report.loss}
        self._save(figures)
        self.on_epoch(report)
        if not report.accepted:
            return f"no step of epoch {epoch} was accepted: {reason}"
        if self.patience is not None and self.best_epoch is not None and epoch - self.best_epoch >= self.patience:
            return f"validation has not improved for {self.patience} epochs"
        return ""

    def _validated(self, epoch: int, loss: float) -> bool:
        """Keep weights that are the best so far; whether these are so much worse that those were put back."""
        assert self.best is not None
        if loss < self.best or not math.isfinite(self.best):
            self.best, self.best_epoch = loss, epoch
            self.tuner.keep()
        elif not loss <= self.best + self.worse * abs(self.best):
            self.tuner.rollback()
            return True
        return False

    def _save(self, figures: Mapping[str, float | None]) -> None:
        if self.save is not None:
            self.save(figures)


def mean(values: list[float], weights: list[int]) -> float:
    """Σ wᵢ vᵢ / Σ wᵢ"""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
