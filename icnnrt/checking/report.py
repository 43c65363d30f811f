"""What `verify` says: checks, each a figure with its bound and its verdict, and the report of all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from icnnrt.format.fields import Report

Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
Verdict = Literal["pass", "fail", "skipped"]
NO_CONTEXT: Final = "the energy has no context"


@dataclass(frozen=True)
class Check:
    """One comparison: `figure` should not be above `bound` (for `signs`: not below)."""

    name: str
    figure: float | None
    bound: float | None
    verdict: Verdict
    detail: str
    """One line: what the figure is, or why the check was skipped."""


@dataclass(frozen=True)
class VerifyReport(Report):
    """What `verify` found."""

    package: str
    name: str
    dtype: str
    samples: int
    seed: int
    source: str
    """Where x came from: "data" or "random"."""
    checks: tuple[Check, ...]
    status: dict[str, int]
    """How many samples have which status."""

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if check.verdict == "fail"]

    @property
    def passed(self) -> bool:
        """No check failed; skipped ones count as neither."""
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for strict JSON: NaN and infinity are None."""
        return {**super().as_dict(), "passed": self.passed}


def skipped(name: str, why: str, bound: float | None = None) -> Check:
    """A check that has nothing to compare."""
    return Check(name, None, bound, "skipped", why)


def judged(name: str, figure: float, bound: float, detail: str) -> Check:
    """Passed where the figure is not above its bound; NaN fails."""
    return Check(name, figure, bound, "pass" if figure <= bound else "fail", detail)


def worst(name: str, figure: Array, bound: Array, detail: str) -> Check:
    """Judge every sample against its own bound, and show the one that comes nearest to it or goes furthest beyond."""
    if not figure.size:
        return skipped(name, "no sample has a finite answer")
    good = figure <= bound
    with np.errstate(invalid="ignore", divide="ignore"):
        if good.all():
            order = np.where(bound > 0, figure / bound, 0.0)
        else:  # NaN is the worst of all
            order = np.where(good, -np.inf, np.where(np.isfinite(figure), figure - bound, np.inf))
    at = int(np.argmax(order))
    return judged(name, float(figure[at]), float(bound[at]), detail)


def median(figure: Array) -> str:
    """As a line of a report has it; NaN of none."""
    return f"{np.median(figure) if figure.size else np.nan:.1e}"
