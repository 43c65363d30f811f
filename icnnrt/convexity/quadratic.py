"""Values of degree two in y: Hessians of weights alone, computed, tell whether such a value is convex."""

import math
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity.memory import Unsupported
from icnnrt.convexity.onnx_numpy import evaluate
from icnnrt.convexity.rules import CONCAVE, CONVEX
from icnnrt.format.onnx_graph import Node

if TYPE_CHECKING:
    from icnnrt.convexity.walk import Walk

Tensor: TypeAlias = NDArray[Any]

MOVERS: Final = frozenset(
    (
        *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"),
        *("Slice", "Split", "Gather", "GatherND"),
    )
)
SUMS: Final = frozenset(("ReduceSum", "ReduceMean", "AveragePool", "GlobalAveragePool", "CumSum"))
MAX_QUADRATIC: Final = 128  # the largest n for which Hessians of quadratic values are formed
MAX_NUMBERS: Final = 1 << 25  # and the most numbers that may take


class Degree(IntEnum):
    """How a value depends on y as a polynomial; each includes the ones before it."""

    NONE = 0
    LINEAR = 1
    """Affine, with coefficients of y that are weights alone."""
    AFFINE = 2
    QUADRATIC = 3
    """Of degree two, and its second-order coefficients are weights alone."""
    OTHER = 4


def degree(walk: "Walk", node: Node) -> Degree:
    """How what a node makes depends on y."""
    kinds = [walk.kinds.get(name, Degree.NONE) for name in node.inputs if name]
    op, most = node.op_type, max(kinds, default=Degree.NONE)
    if most == Degree.NONE:
        return Degree.NONE
    if op == "Cast" and not walk.keeps(node):
        return Degree.OTHER
    if (op in MOVERS or op in SUMS or op in ("Pad", "ScatterND")) and node.inputs[1:2]:
        where = node.inputs[1]
        if where and where not in walk.known:
            return Degree.OTHER  # which entries, depends on x or y
    if op in MOVERS or op in SUMS or op in ("Add", "Sub", "Neg", "Concat", "Sum", "Pad", "ScatterND", "Cast"):
        return most
    if op == "Einsum" and len(kinds) != 2:
        return Degree.OTHER  # a third operand is a factor, not a summand as it is of Gemm and Conv
    if op in ("Mul", "MatMul", "Gemm", "Einsum", "Conv") and len(kinds) >= 2:
        a, b = kinds[:2]
        if a == b == Degree.LINEAR:
            product = Degree.QUADRATIC
        elif Degree.NONE in (a, b) and node.inputs[0 if a == Degree.NONE else 1] in walk.known:
            product = max(a, b)
        elif Degree.NONE in (a, b) and max(a, b) <= Degree.AFFINE:
            product = Degree.AFFINE
        else:
            product = Degree.OTHER
        return max(product, *kinds[2:]) if len(kinds) > 2 else product
    if op == "Div" and kinds[1] == Degree.NONE:
        return most if node.inputs[1] in walk.known else (Degree.AFFINE if most <= Degree.AFFINE else Degree.OTHER)
    if op == "Pow" and kinds[0] == Degree.LINEAR and walk.number(node.inputs[1]) == 2.0:
        return Degree.QUADRATIC
    if op == "ReduceSumSquare" and kinds[0] == Degree.LINEAR:
        return Degree.QUADRATIC
    return Degree.OTHER


def hessians(walk: "Walk", name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """[entries of one sample, n, n], of a quadratic value, and how much each may be off: differences in float64.

    H_jk = v(e_j + e_k) − v(e_j) − v(e_k) + v(0)
    """
    if walk.stirred:
        return None
    y = walk.values["y"]
    n = math.prod(y.shape[1:])
    varying = walk.varying(name)
    size = walk.values[name].size // max(walk.batch, 1)
    rows = 1 + n + n * (n + 1) // 2
    if n > MAX_QUADRATIC or len(varying) != 1 or rows * size > MAX_NUMBERS or size * n * n > MAX_NUMBERS:
        return None
    (axis,) = varying
    j, k = np.triu_indices(n)
    eye = np.eye(n)
    points = np.concatenate([np.zeros((1, n)), eye, eye[j] + eye[k]])
    environment: dict[str, Tensor] = {one: walk.values[one] for one in walk.graph.initializers}
    environment["y"] = points.reshape(rows, *y.shape[1:])
    if "x" in walk.values:
        environment["x"] = np.repeat(walk.values["x"][:1], rows, 0)
    nodes = walk.nodes[: walk.nodes.index(walk.makers[name]) + 1]
    try:
        values = evaluate(nodes, environment, float64=True, only=name)
    except Unsupported:  # so many points take too much memory
        return None
    v = np.moveaxis(values[name], axis, 0)
    if v.shape[0] != rows:
        return None
    v = v.reshape(rows, -1)
    H = np.empty((v.shape[1], n, n))
    H[:, j, k] = H[:, k, j] = (v[1 + n :] - v[1 + j] - v[1 + k] + v[0]).T
    noise = 8 * np.finfo(np.float64).eps * np.abs(v - v[0]).max(0) + np.finfo(np.float64).eps * np.abs(v[0])
    return (H, noise) if np.isfinite(H).all() else None


def curvature(walk: "Walk", name: str) -> NDArray[Any] | None:
    """CONVEX where the Hessian is positive semidefinite up to float64's rounding, CONCAVE where negative."""
    found = hessians(walk, name)
    if found is None:
        return None
    H, noise = found
    eigenvalues = np.linalg.eigvalsh(H)
    largest = np.abs(eigenvalues).max(1)
    if (noise > 1e-12 * largest).any():
        return None  # lost in the rounding of the values it was computed from
    tolerance = 64 * np.finfo(np.float64).eps * H.shape[1] * largest
    code = np.where(eigenvalues[:, 0] >= -tolerance, CONVEX, 0) | np.where(eigenvalues[:, -1] <= tolerance, CONCAVE, 0)
    (axis,) = walk.varying(name)
    shape = list(walk.values[name].shape)
    shape[axis] = 1
    # Rows of H are entries of one sample in the order of the other axes.
    return np.broadcast_to(code.reshape(shape), walk.values[name].shape)
