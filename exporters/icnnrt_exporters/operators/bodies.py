"""The portable bodies of the operators of domain ai.icnnrt, in standard ONNX operators.

A node of that domain runs these bodies in any ONNX runtime, and the native kernel of the same name where that is
registered.
"""

from functools import cache
from typing import Any, Final

import onnx

from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.mathematics.domains import MODELS
from icnnrt_exporters.operators import bundle, quadratic_program
from icnnrt_exporters.operators.inverse_cholesky import InverseCholesky
from icnnrt_exporters.operators.positive_definite import PositiveDefinite
from icnnrt_exporters.operators.solve_spd import InverseSPD, SolveSPD
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

__all__ = ["IR_VERSION", "OPSET", "OP_DOMAIN", "OP_VERSION", "QP_BODIES", "functions", "functions_qp"]

QP_BODIES: Final = {
    "QuadraticProgram": quadratic_program.program_body,
    "QPSolve": quadratic_program.solve_body,
    "QPAdjoint": quadratic_program.adjoint_body,
    "QPSensitivity": quadratic_program.sensitivity_body,
    "SparseQuadraticProgram": quadratic_program.sparse_program_body,
    "SparseQPSensitivity": quadratic_program.sparse_sensitivity_body,
}
# The operators that others are made of.
QP_CALLS: Final = {
    "QPSolve": "QuadraticProgram",
    "SparseQuadraticProgram": "QuadraticProgram",
    "SparseQPSensitivity": "QPSensitivity",
}


@cache
def functions(domain: str = "unit_box") -> tuple[onnx.FunctionProto, ...]:
    """The bodies of the two operators that serve `domain`, of icnnrt.mathematics.domains.NAMES, and of all functions
    they call.

    Two bodies, `MODELS[domain].operators` + "Solve" and + "Adjoint", come last.
    """
    model = MODELS[domain]
    return (*_imported(InverseSPD, SolveSPD), *bundle.solve_body(model), *bundle.adjoint_body(model))


@cache
def functions_qp(*operators: str) -> tuple[onnx.FunctionProto, ...]:
    """The bodies of some of the operators of `QP_BODIES`, by default of its first three; they come last, and before
    them all functions they call."""
    wanted = {*(operators or ("QuadraticProgram", "QPSolve", "QPAdjoint"))}
    wanted |= {QP_CALLS[name] for name in wanted if name in QP_CALLS}
    return (
        *_imported(InverseCholesky, *([PositiveDefinite] if "QuadraticProgram" in wanted else [])),
        *(body for name, made in QP_BODIES.items() if name in wanted for body in made()),
    )


def _imported(*scripts: Any) -> list[onnx.FunctionProto]:
    """Functions of onnxscript."""
    bodies = [f.to_function_proto() for f in scripts]
    for body in bodies:
        # onnxscript overlooks calls of our own functions that stand inside a Loop.
        del body.opset_import[:]
        body.opset_import.extend([onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(OP_DOMAIN, OP_VERSION)])
        _give_conditions(body)
    return bodies


def _give_conditions(body: onnx.FunctionProto) -> None:
    """True as the condition of every Loop that has none: onnx.reference (onnx 1.23) makes no trip without."""
    nodes = list(body.node)
    bare = [node for node in nodes if node.op_type == "Loop" and not node.input[1]]
    if not bare:
        return
    name = "always"
    for node in bare:
        node.input[1] = name
    true = onnx.helper.make_tensor("value", onnx.TensorProto.BOOL, [], [True])
    del body.node[:]
    body.node.extend([onnx.helper.make_node("Constant", [], [name], value=true), *nodes])
