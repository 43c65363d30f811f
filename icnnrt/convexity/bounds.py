"""Two numbers that a finished walk can often give besides convexity: strong convexity and a Lipschitz constant.

Both hold for every x and come from the weights alone; where the rules below do not reach, there is no number.
"""

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity import rules
from icnnrt.convexity.memory import Unsupported
from icnnrt.convexity.onnx_numpy import convolve, promote, reduced_axes, run
from icnnrt.convexity.quadratic import MAX_QUADRATIC, MOVERS, Degree, hessians
from icnnrt.convexity.rules import CONCAVE, CONVEX, Fact
from icnnrt.convexity.walk import Walk
from icnnrt.format.onnx_graph import Node

Array = NDArray[np.float64]


def strong_convexity(walk: Walk) -> float | None:
    """mu > 0 with f − (mu/2)‖y‖² convex in y, or None.

    f = Σ c_i v_i + (convex terms), c_i >= 0 for every x, v_i quadratic with Hessians H_i of weights alone:
    mu = the least eigenvalue of Σ c_i H_i. The c_i are found from f backwards, through sums of convex terms only.
    """
    n = math.prod(walk.values["y"].shape[1:])
    if n > MAX_QUADRATIC:  # there are no Hessians to add up
        return None
    share: dict[str, Array] = {"f": np.zeros(walk.fact("f").shape)}
    share["f"][0] = 1.0  # of the first sample
    H, slack, found = np.zeros((n, n)), 0.0, False
    for node in reversed(walk.nodes):
        out = node.outputs[0]
        c = share.pop(out, None)
        if c is None or not c.any():
            continue
        if walk.kinds[out] is Degree.QUADRATIC:
            formed = hessians(walk, out)
            if formed is not None:
                (axis,) = walk.varying(out)
                weights = np.moveaxis(c, axis, 0)[0].reshape(-1)
                H += np.tensordot(weights, formed[0], 1)
                slack += float(weights @ formed[1]) * n
                found = True
            continue
        c = np.where(walk.fact(out).has(CONVEX), c, 0.0)
        try:
            for name, part in _shares(walk, node, c):
                if name not in walk.known:
                    share[name] = share.get(name, 0.0) + part
        except Unsupported:
            continue
    if not found:
        return None
    eigenvalues = np.linalg.eigvalsh(H)
    mu = float(eigenvalues[0]) - slack - 64 * float(np.finfo(np.float64).eps) * n * float(np.abs(eigenvalues).max())
    return mu if mu > 0 else None


def _shares(walk: Walk, node: Node, c: Array) -> list[tuple[str, Array]]:
    """For each input of a sum of convex terms, with which weights >= 0 its entries enter Σ c·output."""
    op, inputs = node.op_type, node.inputs
    facts = [walk.fact(name) for name in inputs if name]
    if op in MOVERS and len(node.outputs) == 1 and all(name in walk.known for name in inputs[1:]):
        a = walk.values[inputs[0]]
        places = run(node, [np.arange(a.size).reshape(a.shape), *(walk.values[one] for one in inputs[1:])])[0]
        back = np.bincount(places.reshape(-1), c.reshape(-1), a.size).astype(np.float64)
        return [(inputs[0], back.reshape(a.shape))]
    if op in ("Add", "Sum"):
        for f in facts:
            c = np.where(f.has(CONVEX), c, 0.0)
        return [(name, rules.gathered(np.add, c, f.shape)) for name, f in zip(inputs, facts, strict=True)]
    if op == "Sub":
        c = np.where(facts[0].has(CONVEX) & facts[1].has(CONCAVE), c, 0.0)
        return [(inputs[0], rules.gathered(np.add, c, facts[0].shape))]
    if op in ("ReduceSum", "ReduceMean"):
        a = walk.values[inputs[0]]
        axes = reduced_axes(node.attributes, [walk.values[one] if one else None for one in inputs])
        kept = [1 if i in axes else s for i, s in enumerate(a.shape)]
        count = math.prod(a.shape[i] for i in axes) if op == "ReduceMean" else 1
        return [(inputs[0], np.broadcast_to(c.reshape(kept), a.shape) / count)]
    if op in ("Mul", "Div") and len(facts) == 2:
        for one, other in ((0, 1), (1, 0)) if op == "Mul" else ((0, 1),):
            if facts[other].free.all():
                factor = facts[other] if op == "Mul" else rules.reciprocal(facts[other])
                least = np.where(np.isfinite(factor.lo), np.maximum(factor.lo, 0.0), 0.0)
                return [(inputs[one], rules.gathered(np.add, c * least, facts[one].shape))]
    if op in ("MatMul", "Gemm") and inputs[1] in walk.known and not node.attributes.get("transA", 0):
        W, scale = _matrix(walk, node)
        if W.ndim == 2 and scale > 0 and all(f.free.all() for f in facts[2:]):
            return [(inputs[0], np.where(facts[0].has(CONVEX), scale * (c @ np.maximum(W, 0.0).T), 0.0))]
    return []


def _matrix(walk: Walk, node: Node) -> tuple[Array, float]:
    """W and the scale of z @ W · scale, as MatMul and Gemm have it."""
    W = promote(walk.values[node.inputs[1]])
    return (W.T if node.attributes.get("transB", 0) else W), float(node.attributes.get("alpha", 1.0))


# Functions whose slope lies in [−1, 1].
_SHORT: Final = frozenset(("Relu", "Abs", "Neg", "Identity", "Tanh", "Sigmoid", "Softplus", "Celu", "Cast", "Clip"))


def lipschitz(walk: Walk) -> float | None:
    """L with |f(x, y) − f(x, y')| <= L ‖y − y'‖₂ for every x, y, y', or None.

    Entry by entry, forwards: rows of a matrix that meet y count by their norm, those that meet anything else by the
    entries they sum, Σ |W_ij| L_j. Lowered softplus counts 2 instead of 1. An upper bound, often a loose one.
    """
    y = walk.values["y"]
    bounds: dict[str, Array] = {"y": np.ones(y.shape)}

    def bound(name: str) -> Array:
        if name in bounds:
            return bounds[name]
        free = walk.fact(name).free
        return np.where(free, 0.0, np.inf)

    with np.errstate(all="ignore"):
        for node in walk.nodes:
            out = node.outputs[0]
            if out in walk.known or not node.inputs:
                continue
            try:
                L = _bound(walk, node, [bound(name) if name else np.zeros(()) for name in node.inputs])
            except Unsupported:
                L = None
            if L is None:
                continue
            shape = walk.values[out].shape
            free = walk.fact(out).free
            bounds[out] = np.where(free, 0.0, np.broadcast_to(np.where(np.isnan(L), np.inf, L), shape))
    result = float(bound("f").max(initial=0.0))
    return result if math.isfinite(result) else None


def _bound(walk: Walk, node: Node, L: list[Array]) -> Array | None:
    op, inputs = node.op_type, node.inputs
    facts: list[Fact] = [walk.fact(name) for name in inputs if name]
    if op in MOVERS and len(node.outputs) == 1 and all(name in walk.known for name in inputs[1:]):
        return run(node, [L[0], *(walk.values[name] for name in inputs[1:])])[0]
    if op == "Concat":
        return run(node, L)[0]
    if op in _SHORT and (op != "Cast" or walk.keeps(node)):
        return L[0] if op != "Clip" or all(not part.any() for part in L[1:]) else None
    if op in ("Add", "Sub", "Sum"):
        total = np.zeros(walk.values[node.outputs[0]].shape)
        for part in L:
            total = total + part
        return total
    if op in ("Max", "Min"):
        return np.maximum.reduce(np.broadcast_arrays(*L))
    if op == "LeakyRelu":
        return L[0] * max(1.0, abs(node.attributes.get("alpha", 0.01)))
    if op == "Exp":
        return _times(np.exp(facts[0].hi), L[0])
    if op == "Log":
        return _times(np.where(facts[0].lo > 0, 1 / facts[0].lo, np.inf), L[0])
    if op == "Where" and facts[0].free.all():
        return np.maximum(L[1], L[2])
    if op in ("Mul", "Div") and facts[1 if op == "Div" else 0].free.all() | facts[1].free.all():
        one, other = (0, 1) if facts[1].free.all() else (1, 0)
        factor = facts[other] if op == "Mul" else rules.reciprocal(facts[other])
        return _times(np.maximum(np.abs(factor.lo), np.abs(factor.hi)), L[one])
    if op in ("MatMul", "Gemm") and inputs[1] in walk.known and not node.attributes.get("transA", 0):
        W, scale = _matrix(walk, node)
        if W.ndim != 2 or (len(L) > 2 and L[2].any()):
            return None
        W = W * scale
        if inputs[0] == "y":
            return np.broadcast_to(np.sqrt(np.square(W).sum(0)), walk.values[node.outputs[0]].shape)
        return _product(L[0], np.abs(W))
    if op == "Conv" and inputs[1] in walk.known and np.isfinite(L[0]).all():
        return convolve(L[0], np.abs(promote(walk.values[inputs[1]])), node.attributes)
    if op in ("ReduceSum", "ReduceMean", "AveragePool", "GlobalAveragePool", "ReduceMax", "ReduceMin", "MaxPool"):
        # The smallest of several entries moves no faster than the fastest.
        reduction = replace(node, op_type="ReduceMax" if op == "ReduceMin" else op)
        return run(reduction, [L[0], *(walk.values[name] for name in inputs[1:])])[0]
    if op in ("ReduceL2", "ReduceLogSumExp"):
        rest: list[Any] = [walk.values[name] for name in inputs[1:]]
        reduction = replace(node, op_type="ReduceL2" if op == "ReduceL2" else "ReduceMax")
        return run(reduction, [L[0], *rest])[0]
    return None


def _times(factor: Array, L: Array) -> Array:
    """factor · L, where nothing times anything is nothing."""
    return np.where((L == 0) | (factor == 0), 0.0, factor * L)


def _product(L: Array, W: Array) -> Array:
    """L @ W with ∞ · 0 = 0."""
    finite = np.isfinite(L)
    result: Array = np.where(finite, L, 0.0) @ W
    return np.where((~finite).astype(float) @ (W > 0) > 0, np.inf, result)
