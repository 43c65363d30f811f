"""Modules with QPLayer in ONNX: what torch.onnx.export makes of its operators, and the bodies that run them anywhere.

    program = torch.onnx.export(model, (x,), dynamo=True, custom_translation_table=qp_translation_table())
    add_bodies(program)
    program.save("model.onnx")

The nodes are ai.icnnrt::QuadraticProgram (and ::QPAdjoint where a traced graph takes gradients), or of a layer with a
pattern SparseQuadraticProgram (and ::SparseQPSensitivity), with bodies in standard operators beside them: any ONNX
runtime runs those, and one that has icnnrt's native library registered runs its kernels instead.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch

from icnnrt.errors import ExportError
from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.mathematics.qp_names import ADJOINT_INPUTS, SENSITIVITY, SETTINGS, SOLUTION, SOLVE_INPUTS
from icnnrt_exporters.operators.bodies import QP_BODIES, functions_qp
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

# Imported for the operators that it registers.
from icnnrt_models.layers import qp_operators as _qp_operators
from icnnrt_models.layers.qp_plan import plan_of

__all__ = ["add_bodies", "qp_translation_table"]

ONNX = onnxscript.values.Opset("", OPSET)
OPERATORS = onnxscript.values.Opset(OP_DOMAIN, OP_VERSION)


def _operator(name: str, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The operator with its schema, by which torch's translator knows the types."""
    types: Mapping[str, str] = {
        **dict.fromkeys(("status", "steps", "weak", "plan"), "tensor(int32)"),
        **dict.fromkeys(("residual", "tolerance", "seconds", "share"), "tensor(double)"),
        "most_steps": "tensor(int64)",
    }
    schema = onnx.defs.OpSchema(
        name,
        OP_DOMAIN,
        OP_VERSION,
        inputs=[onnx.defs.OpSchema.FormalParameter(a, types.get(a, "T")) for a in inputs],
        outputs=[onnx.defs.OpSchema.FormalParameter(a, types.get(a, "T")) for a in outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(double)"], "")],
    )
    return onnxscript.values.Op(OPERATORS, name, schema)


OP = onnxscript.values.Opset("", OPSET)
QuadraticProgram = _operator("QuadraticProgram", (*SOLVE_INPUTS, *SETTINGS), SOLUTION)
QPAdjoint = _operator("QPAdjoint", ADJOINT_INPUTS, SENSITIVITY[:4])
SparseQuadraticProgram = _operator("SparseQuadraticProgram", (*SOLVE_INPUTS, *SETTINGS, "plan"), SOLUTION)
SparseQPSensitivity = _operator("SparseQPSensitivity", (*ADJOINT_INPUTS, "plan"), SENSITIVITY)


def _qp_solve(
    Q: Any,
    p: Any,
    G: Any,
    h_lower: Any,
    h: Any,
    A: Any,
    b: Any,
    lower: Any,
    upper: Any,
    start: Any,
    steps: int,
    unsafe: int,
    tolerance: float = 0.0,
    plan: str = "",
    smoothing: float = 0.0,
    seconds: float = 0.0,
) -> Any:
    # `unsafe` and `smoothing` are of the gradient alone.
    settings = (_constant(tolerance, np.float64), _constant(steps, np.int64), _constant(seconds, np.float64))
    data = (Q, p, G, h_lower, h, A, b, lower, upper, start, *settings)
    return SparseQuadraticProgram(*data, _constant(plan_of(plan), np.int32)) if plan else QuadraticProgram(*data)


def _constant(number: Any, kind: Any) -> Any:
    return OP.Constant(value=onnx.numpy_helper.from_array(np.array(number, kind)))


def _qp_sensitivity(*data: Any, plan: str = "") -> Any:
    """QPAdjoint: graphs take what gradient there is, as if no loss lacked one and no row were weakly active. Sparse it
    is the one operator that there is."""
    if len(data) > len(ADJOINT_INPUTS):
        *data, plan = data  # type: ignore[assignment]
    if plan:
        return SparseQPSensitivity(*data, _constant(plan_of(plan), np.int32))
    _, _, _, _, _, _, _, status, *_ = data
    weak = ONNX.Sub(status, status)
    return *QPAdjoint(*data), ONNX.Cast(weak, to=onnx.TensorProto.DOUBLE), weak


def qp_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The custom_translation_table of torch.onnx.export for modules that hold a `QPLayer`."""
    assert _qp_operators.qp_solve is not None
    return {
        torch.ops.icnnrt.qp_solve.default: _qp_solve,
        torch.ops.icnnrt.qp_sensitivity.default: _qp_sensitivity,
    }


def add_bodies(program: Any) -> Any:
    """Put the bodies of the operators into a model that holds their nodes.

    Args:
        program: what torch.onnx.export returned, an onnx.ModelProto, or an onnx_ir.Model; changed in place.

    Returns:
        The same.

    Raises:
        ExportError: the model's opset is older than the bodies'.
    """
    if isinstance(program, onnx.ModelProto):
        model = ir.from_proto(program)
        _add(model)
        program.CopyFrom(ir.to_proto(model))
    else:
        _add(program if isinstance(program, ir.Model) else program.model)
    return program


def _add(model: ir.Model) -> None:
    opset = model.graph.opset_imports.get("", OPSET)
    if opset < OPSET:
        raise ExportError(
            f"program: expected opset {OPSET} or later, which the bodies are written in, but it has {opset}; pass "
            f"opset_version={OPSET} to torch.onnx.export"
        )
    model.graph.opset_imports[OP_DOMAIN] = OP_VERSION
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    programs = [name for name in QP_BODIES if (OP_DOMAIN, name, "") in used]
    bodies = {f.identifier(): f for f in map(ir.serde.deserialize_function, functions_qp(*programs))}
    wanted, queue = set(), [name for name in used if name in bodies]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue += [node.op_identifier() for node in bodies[name].all_nodes() if node.op_identifier() in bodies]
    model.functions.update({name: body for name, body in bodies.items() if name in wanted})
    # A function may not call for another opset than the graph that uses it.
    for name in wanted:
        model.functions[name].opset_imports[""] = opset
    model.ir_version = max(min(model.ir_version or IR_VERSION, 13), IR_VERSION)
