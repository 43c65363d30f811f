"""What a run of train.onnx says of the weights that it was made with, and of the new ones it gives."""

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics import certificate
from icnnrt.mathematics.status import Status
from icnnrt.serving.argmin import judged
from icnnrt.serving.session import Session
from icnnrt.serving.weight_sets import WeightSet

Arrays = dict[str, NDArray[Any]]

# Part of a batch that may be unsolved before the step that led there counts as harmful: rates that teach leave none.
UNSAFE: Final = 1 / 8


class Verdict(NamedTuple):
    """What a run says of the weights it was made with."""

    broken: str
    """Why no answer of theirs holds; empty if it may."""
    remedy: str
    unsafe: float
    """Part of the batch without a gradient to trust, or not solved."""

    @property
    def sound(self) -> bool:
        """Whether the weights are as good as any."""
        return not self.broken and self.unsafe <= UNSAFE


class Judge:
    """Of energies."""

    # Outputs of train.onnx that tell whether weights are sound, all but the gradient, which costs the most.
    outputs: tuple[str, ...] = (
        *("loss", "safe", "y", "lam", "slopes", "offsets", "cut_points"),
        *("energy", "lower_bound", "gap", "residual"),
    )

    def __init__(self, session: Session) -> None:
        self.session = session

    def status(self, out: Arrays, data: Arrays, weights: WeightSet) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """The status of every sample, and which of them have a gradient to trust."""
        proven = self.session.convexity.proven_with(weights.id)
        status, doubt = judged(self.session.manifest, np.ones(len(out["gap"]), bool), out, data, proven)
        return status, out["safe"] & certificate.differentiable(status, doubt, out["lower_bound"])

    def gaps(self, out: Arrays) -> NDArray[Any]:
        """The duality gaps that there are."""
        return out["gap"]

    def verdict(self, out: Arrays, data: Arrays, weights: WeightSet) -> Verdict:
        """On the weights that were run; the new ones are not looked at."""
        status, trusted = self.status(out, data, weights)
        unsafe = float((~trusted).mean())
        if not math.isfinite(out["loss"]):
            where = np.flatnonzero(status == Status.NOT_FINITE)
            which = f" (sample {where[0]} is NOT_FINITE)" if where.size else ""
            broken = f"the loss is {float(out['loss'])}{which}"
            return Verdict(broken, "leave the sample out, or lower the learning rate", unsafe)
        if not math.isfinite(out.get("gradient_norm", 0.0)):
            return Verdict("the gradient is not finite", "lower the learning rate, or export with clip_norm", unsafe)
        if (bent := status == Status.NOT_CONVEX).any():
            broken = f"the energy is not convex at sample {int(np.argmax(bent))}, so no answer holds"
            return Verdict(broken, "roll back, or repair the package", unsafe)
        return Verdict("", "", unsafe)

    def unsolved(self, moved: bool) -> str:
        """What to say where no sample has a gradient; `moved`: whether steps have led to these weights."""
        # Weights that were never moved are the export's; others are where the steps have led.
        remedy = "lower the learning rate and start anew" if moved else "export more steps"
        return f"no sample was solved to the residual tolerance, so there is no gradient to trust; {remedy}"


class QPJudge(Judge):
    """Of networks of quadratic programs."""

    outputs = ("loss", "safe", "residual")

    def status(self, out: Arrays, data: Arrays, weights: WeightSet) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """CONVERGED or SOLVER."""
        return np.where(out["safe"], np.int8(Status.CONVERGED), np.int8(Status.SOLVER)), out["safe"]

    def gaps(self, out: Arrays) -> NDArray[Any]:
        """Relative ones; there is none where there is no solution."""
        return out["residual"][out["safe"], 2]

    def verdict(self, out: Arrays, data: Arrays, weights: WeightSet) -> Verdict:
        """A batch without any solution has no loss, which is the batch's fault or the weights'."""
        return Judge.verdict(self, out, data, weights) if out["safe"].any() else Verdict("", "", 1.0)

    def unsolved(self, moved: bool) -> str:
        """The same of programs."""
        remedy = "loosen the constraints that x asks for, if they contradict each other"
        if moved:
            remedy += ", or lower the learning rate and start anew, if the steps led here"
        return f"no sample has a quadratic program with a solution, so there is no gradient; {remedy}"


def judge_of(session: Session) -> Judge:
    """The judge of what a session serves."""
    return (QPJudge if session.manifest.kind == "qp" else Judge)(session)
