"""Every way to solve quadratic programs here, under one grammar: data of `QP` in, `Answer` out, cotangents back."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

import icnnrt
from icnnrt import native_library
from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.mathematics.qp_reference import QP, QPCotangents, QPReference, qp_adjoint, qp_gradients, qp_solve
from icnnrt.mathematics.qp_status import statuses
from icnnrt_exporters.operators.operator_graphs import KINDS, qp_model
from icnnrt_models import QPLayer
from icnnrt_models.layers import qp_operators as layer_home

KERNELS = native_library.build().library is not None
DATA = {"Q": 3, "p": 2, "G": 3, "h_lower": 2, "h": 2, "A": 3, "b": 2, "lower": 2, "upper": 2, "start": 2}
OF_SOLUTION = {"lam": 2, "mu": 2, "slack": 2, "box_slack": 2, "status": 1}  # what the adjoint takes of the answer
BARS = {"z_bar": 2, "lam_bar": 2, "nu_bar": 2, "mu_bar": 2}
SETTINGS = {"tolerance": 0, "most_steps": 0, "seconds": 0}
INPUTS = {
    "QPSolve": DATA,
    "QuadraticProgram": DATA | SETTINGS,
    "QPAdjoint": {"Q": 3, "G": 3, "A": 3, **OF_SOLUTION, **BARS},
}
SOLUTION = {"z": 2, "lam": 2, "nu": 2, "mu": 2, "slack": 2, "box_slack": 2, "residual": 2, "status": 1, "ray": 2}
OUTPUTS = {
    "QPSolve": SOLUTION,
    "QuadraticProgram": SOLUTION | {"steps": 1},
    "QPAdjoint": {"d_z": 2, "d_lam": 2, "d_nu": 2, "d_mu": 2},
}


class Answer(NamedTuple):
    z: Any
    lam: Any
    nu: Any
    mu: Any
    residual: Any
    status: Any  # icnnrt.Status
    ray: Any  # None where none is handed out
    handed: Any  # what the way itself gave


def rounded(qp: QP, dtype: type) -> QP:
    """The problem that is solved when data are given in that type."""
    return QP(*(a.astype(dtype).astype(np.float64) for a in qp))


def wide(answer: Any) -> Any:
    return type(answer)(*(a if a.dtype == np.int32 else a.astype(np.float64) for a in answer))


def node_alone(op: str, dtype: type, any_rank: bool = False, **attributes: int) -> onnx.ModelProto:
    """Without a body: nothing but the kernel can run it."""
    T = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def values(ranks: dict[str, int]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, KINDS.get(name, T), None if any_rank else [None] * rank)
            for name, rank in ranks.items()
        ]

    node = helper.make_node(op, list(INPUTS[op]), list(OUTPUTS[op]), domain=OP_DOMAIN, **attributes)
    graph = helper.make_graph([node], op, values(INPUTS[op]), values(OUTPUTS[op]))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(OP_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def opened(model: onnx.ModelProto, kernels: bool, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if kernels:
        options.register_custom_ops_library(icnnrt.ops_library())
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Reference:
    """The statement over numpy."""

    def solve(self, qp: QP, dtype: type = np.float64, start: Sequence[Any] | None = None, **options: Any) -> Answer:
        found = qp_solve(rounded(qp, dtype), start, precision=dtype, **options)
        answer = (a.astype(dtype) for a in found[:4])
        return Answer(*answer, found.residual, statuses(found.status), found.ray, found)

    def pull(self, qp: QP, answer: Answer, bars: Sequence[Any], dtype: type = np.float64) -> QP:
        """The gradients of Σ bar'answer with respect to every datum, sample by sample."""
        d = self.adjoint(rounded(qp, dtype), answer.handed, *bars, dtype=dtype)
        return qp_gradients(wide(answer.handed), wide(d))

    def adjoint(self, qp: QP, solution: QPReference, *bars: Any, dtype: type = np.float64) -> QPCotangents:
        return qp_adjoint(np.nan_to_num(qp.Q), qp.G, qp.A, solution, *bars)


class Operators(Reference):
    """ai.icnnrt::QuadraticProgram and ::QPAdjoint in onnxruntime, by their portable bodies or by the native kernels."""

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels

    @functools.cache  # noqa: B019
    def session(self, op: str, dtype: type, threads: int = 1, **attributes: int) -> onnxruntime.InferenceSession:
        made = node_alone(op, dtype, **attributes) if self.kernels else self.model(op, dtype, **attributes)
        return opened(made, self.kernels, threads)

    def model(self, op: str, dtype: type, **attributes: int) -> onnx.ModelProto:
        return qp_model(op, np.dtype(dtype).name, **attributes)

    def run(
        self,
        qp: QP,
        dtype: type = np.float64,
        start: Sequence[Any] | None = None,
        threads: int = 1,
        steps: int = 50,
        tolerance: float | None = None,
        seconds: float = 0.0,
    ) -> QPReference:
        rows = np.zeros((1, 0)) if start is None else np.concatenate(start, 1)
        with np.errstate(over="ignore"):
            feeds = {name: a.astype(dtype) for name, a in {**qp._asdict(), "start": rows}.items()}
        numbers = np.array(tolerance or 0.0), np.array(steps, np.int64), np.array(seconds)
        feeds |= dict(zip(SETTINGS, numbers, strict=True))
        return QPReference(*self.session("QuadraticProgram", dtype, threads).run(None, feeds))

    def solve(self, qp: QP, dtype: type = np.float64, start: Sequence[Any] | None = None, **options: Any) -> Answer:
        found = self.run(qp, dtype, start, **options)
        return Answer(*found[:4], found.residual, statuses(found.status), found.ray, found)

    def adjoint(self, qp: QP, solution: QPReference, *bars: Any, dtype: type = np.float64) -> QPCotangents:
        given = [*bars, *[np.zeros((1, 0))] * (4 - len(bars))]
        values = [a.astype(dtype) for a in (qp.Q, qp.G, qp.A, *(getattr(solution, name) for name in OF_SOLUTION))]
        values[7] = solution.status
        feeds = dict(zip(INPUTS["QPAdjoint"], [*values, *(bar.astype(dtype) for bar in given)], strict=True))
        return QPCotangents(*self.session("QPAdjoint", dtype).run(None, feeds))


def torch_alone() -> Any:
    """Without the kernels that answer for the layer in eager mode."""
    return mock.patch.object(layer_home, "kernels", return_value=None)


class Layer:
    """`QPLayer`, by torch's own solver."""

    def solve(self, qp: QP, dtype: type = np.float64) -> Answer:
        data = [torch.from_numpy(np.array(a.astype(dtype))).requires_grad_() for a in qp]
        with torch_alone():
            found = laid(QPLayer(multipliers=True), *data)
        numbers = [a.detach().numpy() for a in found]
        return Answer(*numbers[:4], numbers[5], numbers[6], None, (data, found))

    def pull(self, qp: QP, answer: Answer, bars: Sequence[Any], dtype: type = np.float64) -> QP:
        data, found = answer.handed
        with torch_alone():
            cotangents = [torch.from_numpy(bar.astype(dtype)) for bar in bars]
            gradients = torch.autograd.grad(found[: len(bars)], data, cotangents, retain_graph=True, allow_unused=True)
        of = zip(data, gradients, strict=True)
        return QP(*((torch.zeros_like(a) if g is None else g).numpy().astype(np.float64) for a, g in of))


def laid(layer: QPLayer, Q: Any, p: Any, G: Any, h_lower: Any, h: Any, A: Any, b: Any, lower: Any, upper: Any) -> Any:
    """The layer, of data in the order of `QP`."""
    return layer(Q, p, G, h, A, b, h_lower=h_lower, lower=lower, upper=upper)


class Function:
    """`icnnrt.qp` and the gradients of its solution."""

    def solve(self, qp: QP, dtype: type = np.float64, start: Any = None) -> Answer:
        data = QP(*(a.astype(dtype) for a in qp))
        bounds = {name: getattr(data, name) for name in ("h_lower", "lower", "upper")}
        found = icnnrt.qp(data.Q, data.p, data.G, data.h, data.A, data.b, **bounds, start=start)
        multipliers = found.lam, found.nu, found.bound_multipliers
        return Answer(found.z, *multipliers, found.residual, found.status, found.ray, found)

    def pull(self, qp: QP, answer: Answer, bars: Sequence[Any], dtype: type = np.float64) -> QP:
        found = answer.handed.vjp(*bars, on_unsafe="nan")
        return QP(*(np.asarray(getattr(found, name), np.float64) for name in QP._fields))


BODIES, NATIVE = Operators(kernels=False), Operators(kernels=True)
BACKENDS: dict[str, Any] = {"reference": Reference(), "torch": Layer(), "bodies": BODIES, "session": Function()}
if KERNELS:
    BACKENDS["kernels"] = NATIVE
