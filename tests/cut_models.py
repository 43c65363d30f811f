"""Models of k cuts, min over y of max_i (e_i + g_i'(y − centre)) + R(y), and every way to solve them."""

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import references
import torch
from onnx import TensorProto, helper

import icnnrt
from icnnrt import native_library
from icnnrt.mathematics import cut_model, kkt_adjoint, reference
from icnnrt.mathematics.cut_model import InnerSolution
from icnnrt.mathematics.domains import UNIT_BOX, Domain
from icnnrt_exporters.operators.bodies import IR_VERSION, OP_DOMAIN, OP_VERSION, OPSET, functions
from icnnrt_models.layers.namespace import TORCH

KERNELS = native_library.build().library is not None
TYPES = {np.float64: TensorProto.DOUBLE, np.float32: TensorProto.FLOAT}
SIGNATURES = {
    "Solve": (
        {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam_start": ["B", "k_prev"]},
        {"y": ["B", "n"], "lam": ["B", "k"], "lower_bound": ["B"], "residual": ["B", 3]},
    ),
    "Adjoint": (
        {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam": ["B", "k"], "y_bar": ["B", "n"]},
        {"c_y": ["B", "n"], "c_lam": ["B", "k"]},
    ),
}
ALWAYS_DOUBLE = ("lower_bound", "residual")


# --- Problems --------------------------------------------------------------------------------------


def random_cuts(seed, B, k, n, scale=1.0):
    """Cuts that compete: v differs from cut to cut by about as much as y can change it."""
    rng = np.random.default_rng(seed)
    G = scale * rng.standard_normal((B, k, n)) / np.sqrt(n) * 3
    return G, 0.3 * scale * rng.standard_normal((B, k))


HARD = (
    "duplicates",
    "equal",
    "nearly parallel",
    "saturated",
    "saturated below",
    "a large common slope",
    "one cut",
    "one variable",
    "more cuts than variables",
    "many",
)


def hard_cuts(kind, scale):
    if kind == "duplicates":
        G, e = random_cuts(1, 5, 4, 10, scale)
        return np.concatenate([G, G, G[:, :1]], axis=1), np.concatenate([e, e, e[:, :1]], axis=1)
    if kind == "equal":
        G, e = random_cuts(2, 5, 1, 10, scale)
        return np.repeat(G, 4, axis=1), np.repeat(e, 4, axis=1)
    if kind == "nearly parallel":
        rng = np.random.default_rng(3)
        G, e = random_cuts(3, 5, 1, 10, scale)
        return G + 1e-3 * scale * rng.standard_normal((5, 6, 10)), e + 1e-3 * scale * rng.standard_normal((5, 6))
    if kind.startswith("saturated"):  # slopes of one sign, far beyond what moves σ: y is 0 or 1 almost everywhere
        G, e = random_cuts(4, 5, 5, 30, 1.0)
        return (-1 if kind == "saturated below" else 1) * (2 * scale * np.abs(G) + scale / 2), e
    if kind == "a large common slope":
        G, e = random_cuts(5, 5, 5, 10, min(scale, 10.0))
        return G + scale * np.random.default_rng(5).standard_normal((5, 1, 10)), e
    k, n = {"one cut": (1, 10), "one variable": (5, 1), "more cuts than variables": (30, 3), "many": (10, 159)}[kind]
    return random_cuts(k, 5, k, n, scale)


def network(kind, n, seed):
    """Value, gradient and Hessian of a two-layer network convex in y: f = Σ a(Z a(Wy + b) + Vy) with Z >= 0."""
    rng = np.random.default_rng(seed)
    W, b = rng.standard_normal((20, n)), rng.standard_normal(20)
    Z, V = np.abs(rng.standard_normal((12, 20))) / 8, rng.standard_normal((12, n))
    bend = (lambda z: np.maximum(z, 0.0)) if kind == "relu" else references.softplus
    slope = (lambda z: (z > 0) * 1.0) if kind == "relu" else references.sigmoid
    curve = (lambda z: 0.0 * z) if kind == "relu" else (lambda z: references.sigmoid(z) * references.sigmoid(-z))

    def value_and_gradient(y):
        first = y @ W.T + b
        second = bend(first) @ Z.T + y @ V.T
        out = slope(second)
        return bend(second).sum(1), out @ V + ((out @ Z) * slope(first)) @ W

    def hessian(y):
        first = y @ W.T + b
        second = bend(first) @ Z.T + y @ V.T
        J = V + (Z * slope(first)[:, None, :]) @ W
        inner = (slope(second) @ Z) * curve(first)
        return J.swapaxes(1, 2) @ (curve(second)[:, :, None] * J) + W.T @ (inner[:, :, None] * W)

    return value_and_gradient, hessian


# --- Ways to solve them ----------------------------------------------------------------------------


def model(op: str, dtype: type, domain: Domain = UNIT_BOX, bodies: bool = True, **attributes: int) -> onnx.ModelProto:
    """One node, "Solve" or "Adjoint" of the domain, with the bodies that make it portable or without."""
    inputs, outputs = SIGNATURES[op]
    types = dict.fromkeys(ALWAYS_DOUBLE, TensorProto.DOUBLE)
    infos = [
        [helper.make_tensor_value_info(name, types.get(name, TYPES[dtype]), shape) for name, shape in each.items()]
        for each in (inputs, outputs)
    ]
    node = helper.make_node(domain.operators + op, list(inputs), list(outputs), domain=OP_DOMAIN, **attributes)
    return helper.make_model(
        helper.make_graph([node], op, *infos),
        functions=functions(domain.name) if bodies else [],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, OP_VERSION)],
        ir_version=IR_VERSION,
    )


class Operators:
    """In onnxruntime, by the portable bodies or by the native kernels."""

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels

    @functools.cache  # noqa: B019
    def session(
        self, op: str, dtype: type, domain: Domain = UNIT_BOX, threads: int = 1, **attributes: int
    ) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        if self.kernels:
            options.register_custom_ops_library(icnnrt.ops_library())
        made = model(op, dtype, domain, bodies=not self.kernels, **attributes).SerializeToString()
        return onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])

    def solve(
        self,
        G: Any,
        e: Any,
        lam_start: Any = None,
        domain: Domain = UNIT_BOX,
        dtype: type = np.float64,
        steps: int = reference.STEPS,
    ) -> InnerSolution:
        lam_start = np.empty((len(G), 0)) if lam_start is None else lam_start
        feeds = {"slopes": G.astype(dtype), "offsets": e.astype(dtype), "lam_start": lam_start.astype(dtype)}
        return InnerSolution(*self.session("Solve", dtype, domain, steps=steps).run(None, feeds))

    def adjoint(
        self, G: Any, e: Any, lam: Any, y_bar: Any, domain: Domain = UNIT_BOX, dtype: type = np.float64
    ) -> tuple[Any, Any]:
        arrays = {"slopes": G, "offsets": e, "lam": lam, "y_bar": y_bar}
        feeds = {name: array.astype(dtype) for name, array in arrays.items()}
        return tuple(self.session("Adjoint", dtype, domain).run(None, feeds))  # type: ignore[return-value]


class Reference:
    """The statement over numpy, of float64 alone."""

    def solve(self, G, e, lam_start=None, domain=UNIT_BOX, dtype=np.float64, steps=reference.STEPS):
        return reference.bundle_entropy_solve(G, e, lam_start, steps, domain)

    def adjoint(self, G, e, lam, y_bar, domain=UNIT_BOX, dtype=np.float64):
        return reference.kkt_adjoint(G, e, lam, y_bar, domain)


class Torch:
    """The statement over torch, as the layer traces it."""

    def solve(self, G, e, lam_start=None, domain=UNIT_BOX, dtype=np.float64, steps=reference.STEPS):
        lam_start = None if lam_start is None else torch.from_numpy(lam_start)
        found = cut_model.solved(TORCH, domain, torch.from_numpy(G), torch.from_numpy(e), lam_start, steps)
        return InnerSolution(*(a.numpy() for a in found))

    def adjoint(self, G, e, lam, y_bar, domain=UNIT_BOX, dtype=np.float64):
        found = kkt_adjoint.adjoint(TORCH, domain, *map(torch.from_numpy, (G, e, lam, y_bar)))
        return tuple(a.numpy() for a in found)


BODIES, NATIVE = Operators(kernels=False), Operators(kernels=True)
BACKENDS: dict[str, Any] = {"reference": Reference(), "torch": Torch(), "bodies": BODIES}
if KERNELS:
    BACKENDS["kernels"] = NATIVE
# Which computes in which types.
WAYS = [(way, dtype) for way in BACKENDS for dtype in TYPES if dtype is np.float64 or way in ("bodies", "kernels")]
