# mypy: disable-error-code="no-untyped-def"
"""The parts of ai.icnnrt::BundleQuadraticSolve and ::BundleQuadraticAdjoint for R^n; see bundle_domain.py.

    y = s,  D = I,  C(s) = ½ ‖s‖²

The model is a quadratic program, so nothing is clipped and u = s throughout.
"""

from typing import Final

from onnxscript import script

from icnnrt_exporters.operators.bundle_domain import Parts
from icnnrt_exporters.operators.bundle_entropy_solve import HALF
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, op


@script(DOMAIN, default_opset=op)
def QuadraticPlain(G, e):
    slopes = op.Identity(G)
    offsets = op.Identity(e)
    return slopes, offsets


@script(DOMAIN, default_opset=op)
def QuadraticScaled(G, e):
    """G/r and (e − max e)/r², the cuts of y/r: slopes no longer than 1."""
    r2 = op.Max(op.ReduceMax(op.ReduceSumSquare(G, [2], keepdims=1), [1], keepdims=1), op.Constant(value=ONE))
    slopes = G / op.Sqrt(r2)
    offsets = (e - op.ReduceMax(e, [2], keepdims=1)) / r2
    return slopes, offsets


@script(DOMAIN, default_opset=op)
def QuadraticReach(G):
    """‖g_i‖ ‖y‖ with ‖y‖ = ‖G'λ‖ <= max ‖g_j‖."""
    length = op.Sqrt(op.ReduceSumSquare(G, [2], keepdims=1))
    reach = length * op.ReduceMax(length, [1], keepdims=1)
    return reach


@script(DOMAIN, default_opset=op)
def QuadraticPoint(s):
    y = op.Identity(s)
    return y


@script(DOMAIN, default_opset=op)
def QuadraticCurvature(s, a):
    Da = op.Identity(a)
    return Da


@script(DOMAIN, default_opset=op)
def QuadraticConjugate(s):
    C = op.Constant(value=HALF) * op.ReduceSumSquare(s, [2], keepdims=1)
    return C


@script(DOMAIN, default_opset=op)
def QuadraticFirstLogits(s, bound):
    u = op.Identity(s)
    return u


@script(DOMAIN, default_opset=op)
def QuadraticNextLogits(u, du):
    next_u = u + du
    return next_u


PARTS: Final = Parts(
    QuadraticPlain,
    QuadraticScaled,
    QuadraticReach,
    QuadraticPoint,
    QuadraticCurvature,
    QuadraticConjugate,
    QuadraticFirstLogits,
    QuadraticNextLogits,
)
