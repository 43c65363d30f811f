"""Golden data: inputs of one batch, and what the machine of the export computed from them, to be replayed elsewhere.

golden.safetensors holds the inputs x, y, y_dot (lower and upper, where y lies in a box) and every output as
"<role>.<output>". Another machine, provider or version of onnxruntime may sum in another order, so a replay is judged
by bounds: relative to the scale of an output for the heads of the energy, and up to what the gaps allow for y*. With a
regulariser that is m-strongly convex an answer with a gap g is within √(2g/m) of the optimum, in p where y = shift +
scale∘p: m is 4 for the entropy of the unit box, 1 for the others. In R^n y is p/√μ, in a box p is scaled by its width.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.errors import InputError
from icnnrt.serving.heads import evaluated

if TYPE_CHECKING:
    from icnnrt.serving.session import Session

Arrays = dict[str, NDArray[Any]]

# Relative to the scale of an output. Sums of a few hundred terms in another order stay a hundred times below.
HEADS: Final = {"float64": 1e-11, "float32": 1e-4}
# y* where the gaps would allow less: the order of sums, magnified by K solves.
ANSWER: Final = {"float64": 1e-6, "float32": 1e-2}
# A cotangent, for the same reason: every solve of the way back divides by differences of cuts.
COTANGENT: Final = {"float64": 1e-4, "float32": 1e-1}


class Replayed(NamedTuple):
    """One output, replayed: the entry that comes nearest to its bound or goes furthest beyond."""

    output: str
    difference: float
    bound: float


def compute(session: "Session", inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """The outputs of every graph of the package for these inputs, as golden.safetensors names them."""
    if session.manifest.kind == "qp":
        return _qp(session, inputs["x"])
    x, y, v = inputs["x"], inputs["y"], inputs["y_dot"]
    out: Arrays = {}
    for role in session.manifest.graphs:
        if role in ("value", "gradient", "hessian", "gradient_x"):
            found = evaluated(session.runner, role, x, y)
        elif role == "hvp":
            found = evaluated(session.runner, role, x, y, y_dot=v)
        elif role == "pullback":
            # Of f + ∇f'y_dot. θ̄ is left out: it would be as large as the weights.
            pulled = session.pullback(x, y, np.ones(len(y)), v)
            found = {"y_bar": pulled.y, "x_bar": pulled.x}
        elif role == "argmin":
            found = _argmin(session, inputs)
        elif role == "argmin_polyhedron":
            found = _polyhedron(session, x, y)
        else:  # an adjoint is replayed with the argmin; a step of training, and graphs of others, are not
            continue
        out |= {f"{role}.{name}": np.array(array) for name, array in found.items()}
    return out


def _argmin(session: "Session", inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    solution = session.argmin(inputs["x"], lower=inputs.get("lower"), upper=inputs.get("upper"))
    cotangents = session.vjp(solution, solution.y, on_unsafe="skip")
    return {"y": solution.y, "energy": solution.energy, "gap": solution.gap, "x_bar": cotangents.x}


def _polyhedron(session: "Session", x: NDArray[Any], y: NDArray[Any]) -> Arrays:
    """In a box around y, at the sum of y."""
    Y = y.astype(np.float64)
    A, b = np.ones((len(Y), 1, Y.shape[1])), Y.sum(1, keepdims=True)
    return {"energy": session.argmin_polyhedron(x, A=A, b=b, lower=Y - 0.5, upper=Y + 0.5, strict=False).energy}


def _qp(session: "Session", x: NDArray[Any]) -> Arrays:
    answer = session.solve_qp(x, strict=False)
    cotangents = session.vjp(answer, np.nan_to_num(answer.z), on_unsafe="skip")
    found = {"z": answer.z, "status": answer.status, "x_bar": cotangents.x}
    return {f"solve.{name}": np.array(array) for name, array in found.items()}


def replay(session: "Session", golden: Mapping[str, NDArray[Any]]) -> list[Replayed]:
    """Compute everything once more and compare.

    Raises `InputError` if the golden data lacks an input or the gap that y* is judged by, or holds another shape.
    """
    if not hasattr(session, "manifest"):
        raise InputError(f"session: expected what icnnrt.load returned, but got {type(session).__name__}.")
    if not isinstance(golden, Mapping) or not all(isinstance(array, np.ndarray) for array in golden.values()):
        raise InputError("golden: expected arrays by name, as Package.golden has them, but got something else.")
    domain, T = session.manifest.domain, session.manifest.dtype
    needed = ["x", *(["y", "y_dot"] if session.manifest.kind != "qp" else [])]
    needed += ["lower", "upper"] if domain and domain.kind == "box" else []
    if not {"argmin.y", "argmin.energy", "argmin.gap"}.isdisjoint(golden):
        needed.append("argmin.gap")
    for name in needed:
        if name not in golden:
            raise InputError(f"golden: expected {name!r}, but there is none; export the package again.")
        if golden[name].shape[:1] != golden["x"].shape[:1] or (name == "argmin.gap" and golden[name].ndim != 1):
            raise InputError(
                f"golden: expected as many samples of {name!r} as of 'x', but the shapes are "
                f"{list(golden[name].shape)} and {list(golden['x'].shape)}; export the package again."
            )
    replayed = []
    now = compute(session, golden)
    for name, array in now.items():
        if name not in golden:
            continue
        then = golden[name].astype(np.float64)
        if then.shape != array.shape:
            replayed.append(Replayed(name, np.inf, 0.0))
            continue
        scale = max(1.0, float(np.abs(then[np.isfinite(then)]).max(initial=0.0)))
        special = {"argmin.x_bar": COTANGENT, "solve.x_bar": COTANGENT, "solve.z": ANSWER}
        relative = (special | {"argmin_polyhedron.energy": ANSWER}).get(name, HEADS)[T]
        bound: Any = relative * scale
        if name in ("argmin.y", "argmin.energy", "argmin.gap"):
            gaps = [np.nan_to_num(np.maximum(found["argmin.gap"], 0.0)) for found in (golden, now)]
            near = _apart(session, golden, gaps) if name == "argmin.y" else gaps[0] + gaps[1]
            # Rounding of f moves y as a gap of its size would.
            near = near + (np.sqrt(relative * scale) if name == "argmin.y" else relative * scale)
            bound = np.maximum(ANSWER[T] * scale, near if name != "argmin.y" else near[:, None])
        # NaN then and now agree: a sample that was left out then is left out now. So do infinities.
        same = (array == then) | np.isnan(then) & np.isnan(array)
        apart = np.abs(np.subtract(array, then, out=np.zeros_like(then), where=~same, dtype=np.float64))
        apart[np.isnan(apart)] = np.inf
        bound = np.broadcast_to(bound, apart.shape)
        worst = int(np.argmax(apart - bound)) if apart.size else None
        if worst is not None:
            replayed.append(Replayed(name, float(apart.flat[worst]), float(bound.flat[worst])))
    return replayed


def _apart(session: "Session", golden: Mapping[str, NDArray[Any]], gaps: list[NDArray[Any]]) -> NDArray[np.float64]:
    """How far y* of two answers with these gaps may be from one another: [B]."""
    domain = session.manifest.domain
    assert domain is not None
    strength = 4.0 if domain.kind in ("unit_box", "box") else 1.0
    size: Any = 1.0
    if domain.mu is not None:
        size = 1.0 / np.sqrt(domain.mu)
    if domain.kind == "box":
        size = np.maximum(golden["upper"].astype(np.float64) - golden["lower"], 0.0).max(1)
    both: NDArray[np.float64] = size * (np.sqrt(2 * gaps[0] / strength) + np.sqrt(2 * gaps[1] / strength))
    return both
