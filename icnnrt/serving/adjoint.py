"""Cotangents through the argmin: θ̄ and x̄ of a loss on y*, from a solution and ȳ = ∂ℓ/∂y*.

    exact   the K-step algorithm is differentiated through every cut point: K small solves, K − 1 Hessian-vector
            products, then one second-order product. It agrees with finite differences of `argmin` for every energy.
    prop3   Proposition 3 of Amos, Xu, Kolter (ICML 2017): the cut points are held fixed. Exact for piecewise-linear
            energies (ReLU); for smooth ones (softplus) off by 2 % and up, however long the solver ran.

θ̄ is a sum over the batch, so one sample whose gradient is no gradient spoils all of it: such are found beforehand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, check_finite_bar, choice, instance, refused
from icnnrt.format.signatures import BOUNDS, BOUNDS_BAR
from icnnrt.serving.argmin import ArgminSolution
from icnnrt.serving.domain_arguments import solver_of
from icnnrt.serving.heads import weights_bar
from icnnrt.serving.runner import Runner
from icnnrt.serving.solution import Floats, Record, Solution, untrusted

ADJOINTS: Final = ("exact", "prop3")
ON_UNSAFE: Final = ("raise", "skip")
SKIP: Final = "on_unsafe='skip' to leave them out of the sum"

S = TypeVar("S", bound=Solution)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Cotangents(Record):
    """θ̄ and x̄: the gradient of a loss on y* by the weights and by x."""

    weights: Mapping[str, Floats]
    """name -> array of the weight's shape and dtype, for every trainable weight; summed over the batch."""
    x: Floats
    """[B, *x_shape] in the package's dtype; NaN where `skipped`."""
    skipped: NDArray[np.bool_]
    """[B] bool: samples left out of the sum."""
    at_kink: NDArray[np.bool_]
    """[B] bool: samples with a cut at a kink of a ReLU, to the last bit, where the way back met another face of the
    energy than the cut was made of. Their share is a gradient of that face; elsewhere the energy is smooth and this is
    False."""
    lower: Floats | None = None
    """[B, n], ∂loss/∂lower of a box; NaN where `skipped`; None for other domains."""
    upper: Floats | None = None
    """[B, n], ∂loss/∂upper of a box; NaN where `skipped`; None for other domains."""

    def __repr__(self) -> str:
        return f"<Cotangents of {len(self.weights)} weights and {len(self.x)} samples, {self.skipped.sum()} skipped>"


def own(runner: Runner, kind: type[S], method: str, solution: object) -> S:
    """`solution`, which has to be what that method returned, computed with the weights of now."""
    runner.check_open()
    solution = instance(solution, "solution", kind, f"what session.{method} returned", f"call {method} first")
    runner.check_weights(solution.weights_id, method)
    return solution


def leave_out(
    unsafe: NDArray[np.bool_], reason: Callable[[int], str], y_bar: Floats, on_unsafe: str, skip: str = SKIP
) -> None:
    """Raise `CertificateError` with a `reason` for each of the unsafe samples, unless they are to be skipped, and
    `InputError` where ȳ is not finite at one that is not."""
    if on_unsafe == "raise" and unsafe.any():
        raise untrusted(unsafe, reason, skip)
    check_finite_bar(y_bar, unsafe)


def vjp(runner: Runner, solution: object, y_bar: object, *, adjoint: str, on_unsafe: str) -> Cotangents:
    """Cotangents by the graph adjoint.onnx; `EnergySession.vjp` documents the arguments."""
    manifest = runner.package.manifest
    solver = solver_of(manifest, "vjp")
    found = own(runner, ArgminSolution, "argmin", solution)
    choice(adjoint, "adjoint", ADJOINTS)
    choice(on_unsafe, "on_unsafe", ON_UNSAFE)
    if adjoint == "prop3" and solver.step_size is not None:
        why = "as Bregman proximal gradient has no model of cuts that proposition 3 could differentiate"
        raise refused("adjoint", f"'exact', {why}", "'prop3'", "leave it out")
    ȳ = batch(y_bar, "y_bar", manifest.dtype, manifest.y_shape, length=len(found))
    unsafe = found.unsafe(every_model=adjoint == "exact")

    def reason(i: int) -> str:
        worst = float(np.nanmax(found.complementarity_history[i], initial=0.0))
        return found.doubt(i) or f"sample {i}: a model before the last was left with a complementarity of {worst:.1e}"

    leave_out(unsafe, reason, ȳ, on_unsafe)
    names = ("x", "y", "slopes", "offsets", "cut_points", "lam_history", *BOUNDS)
    given = {name: array for name in names if (array := getattr(found, name)) is not None}
    depth = np.array(found.lam.shape[1] if adjoint == "exact" else 1, np.int64)
    feeds = {**given, "y_bar": ȳ, "depth": depth}
    outputs, _ = runner.run("adjoint", feeds, made_with=found.weights_id, where=~unsafe)
    # Rounding moves a slope by some eps; another face moves it by much more than the root of eps.
    steepest = np.maximum(found.slopes.max((1, 2), initial=0), -found.slopes.min((1, 2), initial=0))
    bound = np.sqrt(np.finfo(found.slopes.dtype).eps) * np.maximum(1.0, steepest)
    at_kink = ~unsafe & (outputs["slope_mismatch"] > bound)
    bounds_bar = (outputs[name] for name in BOUNDS_BAR if found.lower is not None)
    return Cotangents(weights_bar(outputs), outputs["x_bar"], unsafe, at_kink, *bounds_bar)
