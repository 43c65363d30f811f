# mypy: disable-error-code="no-untyped-def"
"""The bodies of ai.icnnrt::InverseSPD and ::SolveSPD: ONNX has no operator that solves linear systems.

Both scale A to unit diagonal, S = A / √a √a' + 4 eps I, and eliminate pivot after pivot in a Loop of few nodes. No
pivot is searched for, which positive definiteness makes unnecessary. The identity I comes in from outside because
ONNX Runtime moves nothing out of a Loop, and the first of the two is called in one.

Where A is nearly singular, as duplicate cuts make it, A⁻¹R by SolveSPD is as accurate as by LU, relative error
1e-13 where R times InverseSPD has 1e-4. That is enough for a direction that the next step corrects and not for
a gradient.

The functions here and beside are ONNX functions written in onnxscript: Python that is translated, never run. Their
constants are tensors, because a Python float would be rounded to float32 on the way.
"""

from typing import Any, Final

import onnx
from onnxscript import opset21, script
from onnxscript.values import Opset

from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.mathematics.namespace import EPS
from icnnrt_exporters.versions import OP_VERSION

# Any, because onnxscript's annotations know neither Python's operators nor its numbers.
op: Any = opset21
DOMAIN: Final = Opset(OP_DOMAIN, OP_VERSION)


def double(*values: float) -> onnx.TensorProto:
    """A float64 tensor [len(values)] that an ONNX function can hold as a constant."""
    return onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, [len(values)], values)


ZERO: Final = double(0.0)
ONE: Final = double(1.0)
TWO: Final = double(2.0)
# A pivot is 1 less what the pivots before explain, so below this it is rounding: a duplicate.
RIDGE: Final = double(4.0 * EPS)


@script(DOMAIN, default_opset=op)
def InverseSPD(A, I):  # noqa: E741
    """A⁻¹ of symmetric positive semidefinite A [B, k, k], double; I [k, k] is the identity.

    The symmetric sweep operator. For every pivot j

        d = S_jj,  u = S_j − e_j:   S <- S − u u' / d

    turns row and column j into S_j / d and the rest into its Schur complement. S_jj, not used again, becomes
    2 − 1/d. After all k pivots 2I − S is the inverse of what was S.
    """
    ridge = op.Constant(value=RIDGE)
    scale = op.Sqrt(op.ReduceSum(A * I, [1], keepdims=1))  # √a, [B, 1, k]
    scale_column = op.Transpose(scale, perm=[0, 2, 1])
    S = A / scale / scale_column + ridge * I
    for j in range(op.Squeeze(op.Shape(I, start=0, end=1))):
        pivot = op.Unsqueeze(j, [0])
        S_j = op.Gather(S, pivot, axis=1)  # [B, 1, k]
        d = op.Max(op.Gather(S_j, pivot, axis=2), ridge)
        u = S_j - op.Gather(I, pivot, axis=0)
        S = S - op.Transpose(u, perm=[0, 2, 1]) * (u / d)
    A_inv = (op.Constant(value=TWO) * I - S) / scale / scale_column
    return A_inv


@script(DOMAIN, default_opset=op)
def SolveSPD(A, R, I):  # noqa: E741
    """X = R A⁻¹, rows [B, r, k], for symmetric positive semidefinite A [B, k, k], double; I [k, k] is the identity.

    Gauss-Jordan elimination by columns. For every pivot j

        d = S_jj,  [S; R] <- [S; R] − [S; R]_j (S_j − e_j)' / d

    clears row j of S but for a 1 on the diagonal, so after all k pivots R has become R S⁻¹.
    """
    ridge = op.Constant(value=RIDGE)
    scale = op.Sqrt(op.ReduceSum(A * I, [1], keepdims=1))  # √a, [B, 1, k]
    S = A / scale / op.Transpose(scale, perm=[0, 2, 1]) + ridge * I
    k = op.Shape(I, start=0, end=1)
    T = op.Concat(S, R / scale, axis=1)  # [S; R]
    for j in range(op.Squeeze(k)):
        pivot = op.Unsqueeze(j, [0])
        T_j = op.Gather(T, pivot, axis=2)  # [B, k + r, 1]
        S_j = op.Gather(T, pivot, axis=1)  # [B, 1, k]
        d = op.Max(op.Gather(S_j, pivot, axis=2), ridge)
        T = T - T_j * ((S_j - op.Gather(I, pivot, axis=0)) / d)
    X = op.Slice(T, k, op.Shape(T, start=1, end=2), [1]) / scale
    return X
