"""What tuning tells of each step, each epoch and all of it."""

from dataclasses import dataclass, field

from icnnrt.format.fields import Report


@dataclass(frozen=True)
class StepReport(Report):
    """What one step did."""

    step: int
    """How many steps have been accepted, this one included."""
    accepted: bool
    """Whether weights and state have changed."""
    reason: str
    """Why not; empty if they have."""
    loss: float
    """The loss at the weights before the step, averaged over the samples that were run."""
    gradient_norm: float
    """Euclidean norm of the gradient of all updated weights together, before clipping."""
    samples: int
    """How many samples were run."""
    skipped: int
    """How many were not, because x or target holds NaN or infinity."""
    unsafe: int
    """How many were run but gave no gradient, because a model of theirs was not solved to its tolerance, or rounding
    hides their energy."""
    gap_median: float
    gap_max: float
    """Duality gap of the samples: how far from its minimum the energy of their y* may be."""
    seconds: float
    undone: bool = False
    """Whether the step before was found to have done harm, so that its weights and state are gone again."""
    held: tuple[str, ...] = ()
    """Weights that stayed as they were, as f would not be proven convex with what the step made of them."""


@dataclass(frozen=True)
class EpochReport(Report):
    """What one pass over the data did."""

    epoch: int
    """From 1."""
    loss: float
    """Mean of the steps' losses, weighted by their samples."""
    validation: float | None
    """Loss on the validation data after the epoch."""
    accepted: int
    """Steps whose weights stayed."""
    refused: int
    """The others, those that were undone among them."""
    skipped: int
    unsafe: int
    rolled_back: bool
    """Whether validation had worsened so much that the last good weights were put back."""
    seconds: float


@dataclass(frozen=True)
class FitReport(Report):
    """What `FineTuner.fit` did."""

    epochs: list[EpochReport] = field(default_factory=list)
    validation_before: float | None = None
    best_epoch: int | None = None
    """The epoch whose weights the session has now: the best by validation, 0 for those before; None without
    validation, which leaves the last ones."""
    stopped: str = ""
    """Why it ended before the last epoch; empty if it did not."""
