# mypy: disable-error-code="no-untyped-def"
"""The simplex's parts of ai.icnnrt::BundleSimplexSolve and ::BundleSimplexAdjoint; see bundle_domain.py.

y = softmax(s),  D = diag(y) − yy',  C(s) = logsumexp(s) − mean(s)
"""

from typing import Final

import onnx
from onnxscript import script

from icnnrt.mathematics.reference import LOGIT_BOUND
from icnnrt_exporters.operators.bundle_domain import Parts
from icnnrt_exporters.operators.bundle_entropy_solve import STEP_HIGH, STEP_LOW
from icnnrt_exporters.operators.solve_spd import DOMAIN, TWO, double, op

LOGIT_LOWEST: Final = double(-LOGIT_BOUND)
DOUBLE: Final = onnx.TensorProto.DOUBLE


@script(DOMAIN, default_opset=op)
def SimplexPlain(G, e):
    """Slopes less their mean: where 1'y = 1 a constant in a slope changes nothing, and G 1/n = 0 moves the centre."""
    centred = G - op.ReduceMean(G, [2], keepdims=1)
    offsets = op.Identity(e)
    return centred, offsets


@script(DOMAIN, default_opset=op)
def SimplexScaled(G, e):
    slopes = op.Identity(G)
    offsets = op.Identity(e)
    return slopes, offsets


@script(DOMAIN, default_opset=op)
def SimplexReach(G):
    reach = op.ReduceMax(op.Abs(G), [2], keepdims=1)
    return reach


@script(DOMAIN, default_opset=op)
def SimplexPoint(s):
    E = op.Exp(s - op.ReduceMax(s, [2], keepdims=1))
    y = E / op.ReduceSum(E, [2], keepdims=1)
    return y


@script(DOMAIN, default_opset=op)
def SimplexCurvature(s, a):
    """D a = y∘b − y Σ y∘b with b = a − y'a: the second term is rounding, which a saturated y needs taken off."""
    y = SimplexPoint(s)
    b = y * (a - op.ReduceSum(y * a, [2], keepdims=1))
    Da = b - y * op.ReduceSum(b, [2], keepdims=1)
    return Da


@script(DOMAIN, default_opset=op)
def SimplexConjugate(s):
    largest = op.ReduceMax(s, [2], keepdims=1)
    total = op.ReduceSum(op.Exp(s - largest), [2], keepdims=1)
    C = op.Log(total) + (largest - op.ReduceMean(s, [2], keepdims=1))
    return C


@script(DOMAIN, default_opset=op)
def SimplexFirstLogits(s, bound):
    u = op.Max(s - op.ReduceMax(s, [2], keepdims=1), -(op.Constant(value=TWO) * bound))
    return u


@script(DOMAIN, default_opset=op)
def SimplexNextLogits(u, du):
    """u counts up to a constant; y'du = 0 is the choice under which the bounds cut off least, see the reference."""
    mean = op.ReduceSum(SimplexPoint(u) * du, [2], keepdims=1)
    moved = u + op.Clip(du - mean, op.Constant(value=STEP_LOW), op.Constant(value=STEP_HIGH))
    next_u = op.Max(moved - op.ReduceMax(moved, [2], keepdims=1), op.Constant(value=LOGIT_LOWEST))
    return next_u


PARTS: Final = Parts(
    SimplexPlain,
    SimplexScaled,
    SimplexReach,
    SimplexPoint,
    SimplexCurvature,
    SimplexConjugate,
    SimplexFirstLogits,
    SimplexNextLogits,
)
