"""solver="auto": the bundle method or Bregman proximal gradient, by what both do on the examples of an export."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from torch import Tensor, nn

from icnnrt.checking.recommend import prefixes
from icnnrt.format.manifest import SolverSpec
from icnnrt.mathematics import certificate
from icnnrt.mathematics.cut_model import STEPS
from icnnrt.mathematics.domains import UNIT_BOX, Coordinates
from icnnrt_exporters.checks.by_torch import of_arrays
from icnnrt_exporters.checks.preconditions import Solver
from icnnrt_models import BregmanProximalGradient, BundleEntropyArgmin

GAP: Final = 1e-3
MOST: Final = 40  # iterations tried
STEP_SIZES: Final = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class _Trial:
    solver: Solver
    gap: float  # the largest of the examples, relative to max(1, |lower bound|)
    seconds: float = 0.0

    def __str__(self) -> str:
        bregman = isinstance(self.solver, BregmanProximalGradient)
        name = f"BregmanProximalGradient of step size {self.solver.step_size:g}" if bregman else "BundleEntropy"
        return f"{name} {self.solver.iterations} iterations, a gap of {self.gap:.1e} and {1e3 * self.seconds:.2g} ms"


def choose_solver(
    energy: nn.Module, judge: nn.Module, x: Tensor, n: int, seconds: Callable[[Solver], float]
) -> tuple[Solver, str]:
    """The better of both solvers over [0, 1]^n for f(x, ·), with the sentence that says why.

    Each is given the smallest K with which every example has a relative gap of GAP (or MOST, if none has), found in
    float64 with `judge`; `seconds` then measures how long either takes for x where it will be served. Of those that
    reach the gap the faster one wins, else the one that comes nearest. The step size is that of STEP_SIZES which
    reaches the gap with the fewest iterations, or comes nearest: all steps take as long.
    """
    bundle, *bregman = [_try(energy, judge, x, n, step_size) for step_size in (None, *STEP_SIZES)]
    best = min(bregman, key=lambda trial: (*_rank(trial), trial.solver.iterations))
    measured = [replace(trial, seconds=seconds(trial.solver)) for trial in (bundle, best)]
    first, second = sorted(measured, key=_rank)
    samples = f"{len(x)} example{'s' if len(x) > 1 else ''}"
    return first.solver, f"on {samples} {first}; {second}, in onnxruntime"


def _rank(trial: _Trial) -> tuple[float, float]:
    return (0.0, trial.seconds) if trial.gap <= GAP else (trial.gap if np.isfinite(trial.gap) else np.inf, 0.0)


def _try(energy: nn.Module, judge: nn.Module, x: Tensor, n: int, step_size: float | None) -> _Trial:
    spec = SolverSpec(MOST, STEPS, GAP, 1.0, step_size=step_size)
    K, worst = MOST, np.inf
    answers = prefixes(of_arrays(judge, x.double()), (len(x), n), spec, UNIT_BOX, Coordinates(0.0, 1.0), MOST)
    for k, (value, lower_bound) in enumerate(answers, 1):
        worst = float(((value - lower_bound) / certificate.unit(lower_bound)).max())
        if worst <= GAP:
            K = k
            break
    solver: Solver = (
        BundleEntropyArgmin(energy, iterations=K, gap_tolerance=GAP, y_dim=n)
        if step_size is None
        else BregmanProximalGradient(energy, K, step_size, GAP, y_dim=n)
    )
    return _Trial(solver, worst)
