"""The portable bodies of the operators of domain ai.icnnrt, in standard ONNX operators.

A node of that domain runs these bodies in any ONNX runtime, and the native kernel of the same name where that is
registered.
"""

import onnx

from icnnrt.package import OP_DOMAIN
from icnnrt_exporters.bundle_entropy_adjoint import BundleEntropyAdjoint
from icnnrt_exporters.bundle_entropy_solve import BundleEntropySolve
from icnnrt_exporters.solve_spd import InverseSPD, SolveSPD
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

__all__ = ["IR_VERSION", "OPSET", "OP_DOMAIN", "OP_VERSION", "functions"]


def functions() -> list[onnx.FunctionProto]:
    """The bodies of BundleEntropySolve and BundleEntropyAdjoint, and of the linear solvers that they call."""
    bodies = [f.to_function_proto() for f in (InverseSPD, SolveSPD, BundleEntropySolve, BundleEntropyAdjoint)]
    for body in bodies:
        # onnxscript overlooks calls of our own functions that stand inside a Loop.
        del body.opset_import[:]
        body.opset_import.extend([onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(OP_DOMAIN, OP_VERSION)])
    return bodies
