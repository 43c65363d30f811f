# mypy: disable-error-code="no-untyped-def"
"""Whether a symmetric matrix is positive definite: ONNX has no operator that factors one."""

from onnxscript import script

from icnnrt_exporters.operators.inverse_cholesky import TINY
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, ZERO, op


@script(DOMAIN, default_opset=op)
def PositiveDefinite(S, I):  # noqa: E741
    """Whether all pivots of S [B, k, k], double and symmetric, are positive [B, 1, 1]; I [k, k] is the identity.

    By Gaussian elimination. After a pivot that is not positive the others are NaN, or anything.
    """
    zero, one = op.Constant(value=ZERO), op.Constant(value=ONE)
    tiny = op.Constant(value=TINY)
    k = op.Shape(I, start=0, end=1)
    Above = op.Trilu(op.Expand(one, op.Concat(k, k, axis=0)), op.Constant(value_int=1), upper=1)
    for j in range(op.Squeeze(k)):
        pivot = op.Unsqueeze(j, [0])
        S_j = op.Gather(S, pivot, axis=1)
        d = op.Max(op.Gather(S_j, pivot, axis=2), tiny)
        u = S_j * op.Gather(Above, pivot, axis=0)
        S = S - op.Transpose(u, perm=[0, 2, 1]) * (u / d)
    pivots = op.ReduceSum(S * I, [1], keepdims=1)
    wrong = op.ReduceSum(op.Cast(op.Not(pivots > zero), to=11), [2], keepdims=1)
    definite = op.Equal(wrong, zero)
    return definite
