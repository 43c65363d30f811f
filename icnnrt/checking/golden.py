"""Golden data: inputs of one batch, and what the machine of the export computed from them, to be replayed elsewhere.

golden.safetensors holds the inputs x, y, y_dot (lower and upper, where y lies in a box) and every output as
"<role>.<output>". Another machine, provider or version of onnxruntime may sum in another order, so a replay is judged
by bounds: relative to the scale of an output for the heads of the energy, and up to what the gaps allow for y*
(`mathematics.domains.distance`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import refused, shown
from icnnrt.format.signatures import expected
from icnnrt.mathematics.domains import MODELS, coordinates, distance
from icnnrt.serving.heads import evaluated

if TYPE_CHECKING:
    from icnnrt.serving.load import AnySession

Arrays = dict[str, NDArray[Any]]

# Relative to the scale of an output. Sums of a few hundred terms in another order stay a hundred times below.
HEADS: Final = {"float64": 1e-11, "float32": 1e-4}
# y* where the gaps would allow less: the order of sums, magnified by K solves.
ANSWER: Final = {"float64": 1e-6, "float32": 1e-2}
# A cotangent, for the same reason: every solve of the way back divides by differences of cuts.
COTANGENT: Final = {"float64": 1e-4, "float32": 1e-1}
RELATIVE: Final = dict.fromkeys(("argmin.x_bar", "solve.x_bar"), COTANGENT)
RELATIVE.update(dict.fromkeys(("solve.z", "argmin_polyhedron.energy"), ANSWER))
JUDGED_BY_GAP: Final = ("argmin.y", "argmin.energy", "argmin.gap")


class Replayed(NamedTuple):
    """One output, replayed: the entry that comes nearest to its bound or goes furthest beyond."""

    output: str
    difference: float
    bound: float


def compute(session: "AnySession", inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """The outputs of every graph of the package for these inputs, as golden.safetensors names them."""
    out: Arrays = {}
    for role in session.manifest.graphs:
        if expected(session.manifest, role) is None:  # a graph of others, under a name that means something elsewhere
            continue
        if role in EVALUATED:
            more: dict[str, Any] = {name: inputs[name] for name in EVALUATED[role]}
            found = evaluated(session.runner, role, inputs["x"], inputs["y"], **more)
        elif role in ANSWERED:
            found = ANSWERED[role](session, inputs)
        else:  # an adjoint is replayed with the argmin; a step of training is not
            continue
        out |= {f"{role}.{name}": np.array(array) for name, array in found.items()}
    return out


def _pullback(session: "AnySession", inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Of f + ∇f'y_dot. θ̄ is left out: it would be as large as the weights."""
    pulled = session.pullback(inputs["x"], inputs["y"], np.ones(len(inputs["y"])), inputs["y_dot"])
    return {"y_bar": pulled.y, "x_bar": pulled.x}


def _argmin(session: "AnySession", inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    solution = session.argmin(inputs["x"], lower=inputs.get("lower"), upper=inputs.get("upper"))
    cotangents = session.vjp(solution, solution.y, on_unsafe="skip")
    return {"y": solution.y, "energy": solution.energy, "gap": solution.gap, "x_bar": cotangents.x}


def _polyhedron(session: "AnySession", inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """In a box around y, at the sum of y."""
    Y = inputs["y"].astype(np.float64)
    given = {"A": np.ones((len(Y), 1, Y.shape[1])), "b": Y.sum(1, keepdims=True), "lower": Y - 0.5, "upper": Y + 0.5}
    return {"energy": session.argmin_polyhedron(inputs["x"], **given, strict=False).energy}


def _solve(session: "AnySession", inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    answer = session.solve_qp(inputs["x"], strict=False)
    cotangents = session.vjp(answer, np.nan_to_num(answer.z), on_unsafe="skip")
    return {"z": answer.z, "status": answer.status, "x_bar": cotangents.x}


# role -> the inputs of its graph, or how its outputs are asked for
# What these take beside x and y.
EVALUATED: Final[dict[str, tuple[str, ...]]] = {
    "value": (),
    "gradient": (),
    "hvp": ("y_dot",),
    "hessian": (),
    "gradient_x": (),
}
ANSWERED: Final = {"pullback": _pullback, "argmin": _argmin, "argmin_polyhedron": _polyhedron, "solve": _solve}


def replay(session: "AnySession", golden: Mapping[str, NDArray[Any]]) -> list[Replayed]:
    """Compute everything once more and compare.

    Raises `InputError` if the golden data lacks an input or the gap that y* is judged by, or holds another shape.
    """
    if not hasattr(session, "manifest"):
        raise refused("session", "what icnnrt.load returned", shown(session))
    if not isinstance(golden, Mapping) or not all(isinstance(array, np.ndarray) for array in golden.values()):
        raise refused("golden", "arrays by name, as Package.golden has them", shown(golden))
    _demand_inputs(session, golden)
    replayed = []
    now = compute(session, golden)
    for name, array in now.items():
        if name not in golden:
            continue
        then = golden[name].astype(np.float64)
        if then.shape != array.shape:
            replayed.append(Replayed(name, np.inf, 0.0))
            continue
        # NaN then and now agree: a sample that was left out then is left out now. So do infinities.
        same = (array == then) | np.isnan(then) & np.isnan(array)
        apart = np.abs(np.subtract(array, then, out=np.zeros_like(then), where=~same, dtype=np.float64))
        apart[np.isnan(apart)] = np.inf
        bound = np.broadcast_to(_bound(session, name, golden, now), apart.shape)
        if apart.size:
            worst = int(np.argmax(apart - bound))
            replayed.append(Replayed(name, float(apart.flat[worst]), float(bound.flat[worst])))
    return replayed


def _demand_inputs(session: "AnySession", golden: Mapping[str, NDArray[Any]]) -> None:
    manifest = session.manifest
    needed = ["x", *(["y", "y_dot"] if manifest.kind != "qp" else [])]
    needed += ["lower", "upper"] if manifest.domain and manifest.domain.kind == "box" else []
    needed += ["argmin.gap"] if not golden.keys().isdisjoint(JUDGED_BY_GAP) else []
    for name in needed:
        if name not in golden:
            raise refused("golden", repr(name), "none of that name", "export the package again")
        if golden[name].shape[:1] != golden["x"].shape[:1] or (name == "argmin.gap" and golden[name].ndim != 1):
            came = f"shapes {list(golden[name].shape)} and {list(golden['x'].shape)}"
            raise refused("golden", f"as many samples of {name!r} as of 'x'", came, "export the package again")


def _bound(session: "AnySession", name: str, golden: Mapping[str, NDArray[Any]], now: Arrays) -> Any:
    """What an output may differ by: one number, or one for each entry of the batch."""
    domain, T = session.manifest.domain, session.manifest.dtype
    then = golden[name].astype(np.float64)
    scale = max(1.0, float(np.abs(then[np.isfinite(then)]).max(initial=0.0)))
    bound = RELATIVE.get(name, HEADS)[T] * scale
    if name not in JUDGED_BY_GAP:
        return bound
    gaps = [np.nan_to_num(np.maximum(found["argmin.gap"], 0.0)) for found in (golden, now)]
    if name != "argmin.y":
        return np.maximum(ANSWER[T] * scale, gaps[0] + gaps[1] + bound)
    assert domain is not None
    at = coordinates(golden if domain.kind == "box" else {}, domain.mu)
    near = distance(MODELS[domain.kind], at, gaps[0]) + distance(MODELS[domain.kind], at, gaps[1])
    # Rounding of f moves y as a gap of its size would.
    return np.maximum(ANSWER[T] * scale, near + np.sqrt(bound))[:, None]
