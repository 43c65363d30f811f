"""Cotangents through the argmin: θ̄ and x̄ of a loss on y*, from a solution and ȳ = ∂ℓ/∂y*.

    exact   the K-step algorithm is differentiated through every cut point: K small solves, K − 1 Hessian-vector
            products, then one second-order product. It agrees with finite differences of `argmin` for every energy.
    prop3   Proposition 3 of Amos, Xu, Kolter (ICML 2017): the cut points are held fixed. Exact for piecewise-linear
            energies (ReLU); for smooth ones (softplus) off by 2 % and up, however long the solver ran.

θ̄ is a sum over the batch, so one sample whose gradient is no gradient spoils all of it: such are found beforehand.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, check_finite_bar, choice, untrusted
from icnnrt.errors import CertificateError, InputError
from icnnrt.format.manifest import Manifest
from icnnrt.format.signatures import BOUNDS, BOUNDS_BAR, THETA_BAR
from icnnrt.mathematics.certificate import DIGITS, differentiable, unit
from icnnrt.mathematics.status import Status, imprecise
from icnnrt.serving.solution import Cotangents, QPAnswer, Solution

ADJOINTS: Final = ("exact", "prop3")
ON_UNSAFE: Final = ("raise", "skip")
SKIP: Final = "on_unsafe='skip' to leave them out of the sum"

# Feeds, and the samples to run -> outputs, NaN for the others.
Run = Callable[[Mapping[str, NDArray[Any]], NDArray[np.bool_]], Mapping[str, NDArray[Any]]]


def vjp(run: Run, manifest: Manifest, solution: object, y_bar: object, *, adjoint: str, on_unsafe: str) -> Cotangents:
    """Cotangents by the graph adjoint.onnx, which `run` runs; `Session.vjp` documents the arguments."""
    for argument, value, allowed in (("adjoint", adjoint, ADJOINTS), ("on_unsafe", on_unsafe, ON_UNSAFE)):
        choice(value, argument, allowed)
    if adjoint == "prop3" and manifest.solver is not None and manifest.solver.step_size is not None:
        raise InputError(
            "adjoint: expected 'exact', as Bregman proximal gradient has no model of cuts that proposition 3 could "
            "differentiate, but got 'prop3'; leave it out."
        )
    if not isinstance(solution, Solution):
        raise InputError(
            f"solution: expected what session.argmin returned, but got {type(solution).__name__}; call argmin first."
        )
    ȳ = batch(y_bar, "y_bar", manifest.dtype, manifest.y_shape, length=len(solution))
    skipped = solution.unsafe(every_model=adjoint == "exact")
    if on_unsafe == "raise" and skipped.any():
        raise CertificateError(_unsafe(solution, skipped))
    check_finite_bar(ȳ, skipped)
    kept = ~skipped
    depth = solution.lam.shape[1] if adjoint == "exact" else 1
    outputs = run(
        {
            "x": solution.x,
            "y": solution.y,
            "slopes": solution.slopes,
            "offsets": solution.offsets,
            "cut_points": solution.cut_points,
            "lam_history": solution.lam_history,
            "y_bar": ȳ,
            "depth": np.array(depth, np.int64),
            **{name: bound for name in BOUNDS if (bound := getattr(solution, name)) is not None},
        },
        kept,
    )
    # Rounding moves a slope by some eps; another face moves it by much more than the root of eps.
    steepest = np.maximum(solution.slopes.max((1, 2), initial=0), -solution.slopes.min((1, 2), initial=0))
    bound = np.sqrt(np.finfo(solution.slopes.dtype).eps) * np.maximum(1.0, steepest)
    at_kink = kept & (outputs["slope_mismatch"] > bound)
    box = manifest.domain is not None and manifest.domain.kind == "box"
    bounds_bar = (outputs[name] for name in (BOUNDS_BAR if box else ()))
    return Cotangents(weights_bar(outputs), outputs["x_bar"], skipped, at_kink, *bounds_bar)


def vjp_qp(run: Run, manifest: Manifest, answer: object, z_bar: object, *, on_unsafe: str) -> Cotangents:
    """Cotangents by the graph solve_adjoint.onnx, which `run` runs; `Session.vjp` documents the arguments."""
    choice(on_unsafe, "on_unsafe", ON_UNSAFE)
    if not isinstance(answer, QPAnswer):
        raise InputError(
            f"solution: expected what session.solve_qp returned, but got {type(answer).__name__}; call solve_qp first."
        )
    z̄ = batch(z_bar, "y_bar", manifest.dtype, manifest.y_shape, length=len(answer))
    skipped = ~answer.ok
    if on_unsafe == "raise" and skipped.any():
        raise CertificateError(untrusted(skipped, answer.advice, SKIP))
    check_finite_bar(z̄, skipped)
    outputs = run({"x": answer.x, "z_bar": z̄}, ~skipped)
    return Cotangents(weights_bar(outputs), outputs["x_bar"], skipped, np.zeros_like(skipped))


def _unsafe(solution: Solution, unsafe: NDArray[np.bool_]) -> str:
    doubt = solution.uncertainty
    known = differentiable(solution.status, doubt, solution.lower_bound)

    def reason(i: int) -> str:
        if solution.status[i] not in (Status.CONVERGED, Status.GAP, Status.PRECISION):
            return solution.advice(i)
        if not known[i]:
            most = DIGITS * float(unit(solution.lower_bound[i]))
            return f"sample {i}: {imprecise(float(doubt[i]), most, str(solution.y.dtype))}"
        worst = float(np.nanmax(solution.complementarity_history[i], initial=0.0))
        return f"sample {i}: a model before the last was left with a complementarity of {worst:.1e}"

    return untrusted(unsafe, reason, SKIP)


def weights_bar(outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """θ̄ by the names of the weights."""
    return {name.removeprefix(THETA_BAR): a for name, a in outputs.items() if name.startswith(THETA_BAR)}
