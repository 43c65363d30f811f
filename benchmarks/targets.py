"""What the native kernels have to reach, as ratios on one thread."""

from collections.abc import Mapping
from typing import Final

from benchmarks.report import Entry, Target

# (n, k, batch) -> how many times faster than the batched numpy reference an inner solve is, at least.
INNER: Final = {(159, 10, 1): 30.0, (2048, 10, 1): 10.0, (159, 10, 128): 4.0, (2048, 30, 128): 2.5}
# (n, batch) -> a whole argmin over its floor, at most.
ARGMIN: Final = {(24, 1): 1.5, (159, 1): 1.25, (159, 128): 1.25, (2048, 1): 2.0, (2048, 128): 2.0}
# batch -> a step of fine-tuning over one argmin, at most; and torch's eager step over it, at least.
STEP: Final = {32: 4.0}
STEP_OF_TORCH: Final = {1: 3.0, 32: 3.0}
# batch -> how many times faster than torch eager the gradient map is, at least; and value with gradient over value
# alone, at most.
GRADIENT_OF_TORCH: Final = {100_000: 1.0}
BOTH_OF_VALUE: Final = {1: 2.5, 128: 2.5, 100_000: 2.5}
# Quadratic programs: at this batch faster than every peer; alone, over the fastest compiled one, at most.
QP_BATCH: Final = 128
QP_OF_FASTEST: Final = 1.2
# Predictive control with a pattern: a forward pass over one of PIQP's sparse solver, at most; forward and backward it
# is faster than every peer that has a gradient.
MPC_OF_PIQP: Final = 3.0
# How cost may grow with k, n and batch; a fitted exponent is known to about a twentieth.
EXPONENTS: Final = {"k": 2.0, "n": 1.0, "batch": 1.0}
EXPONENT_TOLERANCE: Final = 0.05


def judged(
    what: str, limit: float | None, entries: Mapping[str, Entry], native: str, over: str, *, at_least: bool
) -> tuple[Target, ...]:
    """The target of one row, if it has one. `over` / `native` is judged if larger is better, else `native` / `over`."""
    if limit is None:
        return ()
    a, b = entries[native], entries[over]
    if a.ratio is None or b.ratio is None:
        return (
            Target(what, limit, at_least, None, f"{native if a.ratio is None else over}: {a.missing or b.missing}"),
        )
    return (Target(what, limit, at_least, b.ratio / a.ratio if at_least else a.ratio / b.ratio),)
