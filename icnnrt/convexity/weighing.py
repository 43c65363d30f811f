"""Which entries of a known factor stand between entries of the other operand and entries of the product."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.format.onnx_graph import Node

Tensor: TypeAlias = NDArray[Any]
_Mask: TypeAlias = NDArray[np.bool_]


def _scaling(node: Node, known: Tensor, strict: _Mask, wanted: _Mask, here: int) -> Tensor:
    known, strict, wanted = np.broadcast_arrays(known, strict, wanted)
    return known[strict & wanted]


def _matrix(node: Node, known: Tensor, strict: _Mask, wanted: _Mask, here: int) -> Tensor:
    """Entries of a known factor that stand between a strict entry of the other and a wanted one of the product."""
    flags = [node.attributes.get(t, 0) if node.op_type == "Gemm" else 0 for t in ("transA", "transB")]
    known = known.T if flags[here] else known
    strict = strict.T if flags[1 - here] else strict
    if known.ndim != 2 or strict.ndim < 2 or wanted.ndim < 2:
        return known[:0]
    p, q = strict.astype(np.float64), wanted.astype(np.float64)
    if here == 1:
        return known[p.reshape(-1, p.shape[-1]).T @ q.reshape(-1, q.shape[-1]) > 0]
    joint = q @ p.swapaxes(-1, -2)
    return known[joint.reshape(-1, *joint.shape[-2:]).sum(0) > 0]


def _kernels(node: Node, known: Tensor, strict: _Mask, wanted: _Mask, here: int) -> Tensor:
    if here != 1:
        return known[:0]
    away = (0, *range(2, strict.ndim))
    groups = node.attributes.get("group", 1)
    met = [
        kernels[np.ix_(made, read)].reshape(-1)
        for kernels, made, read in zip(
            np.split(known, groups), np.split(wanted.any(away), groups), np.split(strict.any(away), groups), strict=True
        )
    ]
    return np.concatenate(met)


# (node, factor, which entries of the other operand, which of the product, index of the factor) -> the entries of the
# factor that stand between the two
WEIGHED: Final[Mapping[str, Callable[[Node, Tensor, _Mask, _Mask, int], Tensor]]] = {
    "Mul": _scaling,
    "MatMul": _matrix,
    "Gemm": _matrix,
    "Conv": _kernels,
}
