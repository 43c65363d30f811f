"""The portable bodies of the operators of domain ai.icnnrt, in standard ONNX operators.

A node of that domain runs these bodies in any ONNX runtime, and the native kernel of the same name where that is
registered.
"""

import onnx

from icnnrt.format.package import OP_DOMAIN
from icnnrt.mathematics.domains import MODELS
from icnnrt_exporters.operators.bundle import adjoint_body, solve_body
from icnnrt_exporters.operators.inverse_cholesky import InverseCholesky
from icnnrt_exporters.operators.qp_adjoint import QPAdjoint
from icnnrt_exporters.operators.qp_interior_point import (
    QPDirection,
    QPEquilibrated,
    QPEvaluated,
    QPInteriorPoint,
    QPLargest,
    QPResidual,
    QPRoot,
    QPSizeOfZ,
)
from icnnrt_exporters.operators.qp_newton import QPCondensed, QPFactors, QPRefined
from icnnrt_exporters.operators.qp_solve import QPConvex, QPFarkas, QPRecession, QPSolve
from icnnrt_exporters.operators.solve_spd import InverseSPD, SolveSPD
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

__all__ = ["IR_VERSION", "OPSET", "OP_DOMAIN", "OP_VERSION", "functions", "functions_qp"]


def functions(domain: str = "unit_box") -> list[onnx.FunctionProto]:
    """The bodies of the two operators that serve `domain`, of icnnrt.mathematics.domains.NAMES, and of all functions
    they call.

    Two bodies, `MODELS[domain].operators` + "Solve" and + "Adjoint", come last.
    """
    model = MODELS[domain]
    linear = [f.to_function_proto() for f in (InverseSPD, SolveSPD)]
    return [*_imported(linear), solve_body(model), adjoint_body(model)]


def functions_qp(*operators: str) -> list[onnx.FunctionProto]:
    """The bodies of QPSolve or QPAdjoint or, by default, both, which come last, and of all functions they call."""
    solves = not operators or "QPSolve" in operators
    differentiates = not operators or "QPAdjoint" in operators
    newton = (InverseCholesky, QPFactors, QPCondensed, QPRefined)
    interior_point = (
        QPLargest,
        QPRoot,
        QPEquilibrated,
        QPSizeOfZ,
        QPResidual,
        QPEvaluated,
        QPDirection,
        QPInteriorPoint,
    )
    solve = (*interior_point, QPConvex, QPFarkas, QPRecession, QPSolve)
    wanted = (*newton, *(solve if solves else ()), *((QPAdjoint,) if differentiates else ()))
    return _imported([f.to_function_proto() for f in wanted])


def _imported(bodies: list[onnx.FunctionProto]) -> list[onnx.FunctionProto]:
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
