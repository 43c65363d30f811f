# mypy: disable-error-code="no-untyped-def"
"""The body of ai.icnnrt::BundleEntropyAdjoint, the ONNX twin of `icnnrt.mathematics.reference.kkt_adjoint`."""

from typing import Final

import onnx
from onnxscript import script

from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, SolveSPD, double, op

HALF: Final = double(0.5)
TRACE_RIDGE: Final = double(1e-13)
SMALLEST_RIDGE: Final = double(1e-30)
DOUBLE: Final = onnx.TensorProto.DOUBLE


@script(DOMAIN, default_opset=op)
def BundleEntropyAdjoint(slopes, offsets, lam, y_bar):
    """c_y [B, n] and c_λ [B, k] for a loss with ∂ℓ/∂y = ȳ at the solution λ of the k-cut model.

    Inputs slopes G [B, k, n], offsets e [B, k], lam [B, k], y_bar [B, n]: all float or all double, and so are the
    outputs; computed in double. Vectors are rows here, [B, 1, k] and [B, 1, n].

        y = σ(−G'λ),  D = σ(s) σ(−s),  w = max v − v,  q = √λ,  r = −G D ȳ
        Ã = diag(q) G D G' diag(q) + diag(w + δ),  δ = 1e-13 tr(qSq) + 1e-30
        X0 = Ã⁻¹(q∘r),  X1 = Ã⁻¹q
        c_λ = q∘(X0 − X1 (q'X0)/(q'X1)),   c_y = −D(ȳ + G'c_λ)
    """
    half = op.Constant(value=HALF)
    one = op.Constant(value=ONE)

    G = op.Cast(slopes, to=DOUBLE)
    e = op.Unsqueeze(op.Cast(offsets, to=DOUBLE), [1])
    row = op.Unsqueeze(op.Cast(lam, to=DOUBLE), [1])
    ybar = op.Unsqueeze(op.Cast(y_bar, to=DOUBLE), [1])
    N = -op.Transpose(G, perm=[0, 2, 1])  # −G', for the reason given in bundle_entropy_solve
    k = op.Shape(slopes, start=1, end=2)
    I = op.EyeLike(op.ConstantOfShape(op.Concat(k, k, axis=0)), dtype=DOUBLE)  # noqa: E741

    E = op.Exp(row @ G)  # e^−s with s = −G'λ; e^−s / (1 + e^−s)² would be inf / inf where e^−s overflows
    y = op.Reciprocal(one + E)
    D = y * op.Reciprocal(one + op.Reciprocal(E))
    v = e + (half - y) @ N
    w = op.ReduceMax(v, [2], keepdims=1) - v
    q = op.Sqrt(row)
    qSq = -((G * op.Transpose(q, perm=[0, 2, 1]) * D) @ (N * q))
    trace = op.ReduceSum(qSq * I, [1, 2], keepdims=1)
    delta = op.Constant(value=TRACE_RIDGE) * trace + op.Constant(value=SMALLEST_RIDGE)
    A = qSq + (w + delta) * I
    r = (D * ybar) @ N
    X0, X1 = op.Split(SolveSPD(A, op.Concat(q * r, q, axis=1), I), axis=1, num_outputs=2)
    qX0 = op.ReduceSum(q * X0, [2], keepdims=1)
    qX1 = op.ReduceSum(q * X1, [2], keepdims=1)
    cl = q * (X0 - X1 * (qX0 / qX1))
    cy = -(D * (ybar + cl @ G))
    c_y = op.CastLike(op.Squeeze(cy, [1]), slopes)
    c_lam = op.CastLike(op.Squeeze(cl, [1]), slopes)
    return c_y, c_lam
