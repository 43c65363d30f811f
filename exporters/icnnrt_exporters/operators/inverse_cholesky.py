# mypy: disable-error-code="no-untyped-def"
"""A factor of the inverse, V'V = A⁻¹, by which one elimination serves many right-hand sides.

Triangular solves would cost a Loop each, and A⁻¹ itself loses as many digits as A has in its condition. V = D^-½ L⁻¹
of A = L D L' loses half of them, and a refinement takes back the rest.
"""

from onnxscript import script

from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, RIDGE, double, op

TINY = double(2.2250738585072014e-308)  # the smallest normal double: a row of zeros stays one


@script(DOMAIN, default_opset=op)
def InverseCholesky(A, I, Above):  # noqa: E741
    """V and V' [B, k, k] with V'V = A⁻¹ for symmetric positive semidefinite A [B, k, k], double.

    I [k, k] is the identity, Above [k, k] has ones above the diagonal. A is scaled to unit diagonal and gets a ridge,
    S = A / √a √a' + 4 eps I. For every pivot j

        d = S_jj,  c = S_j / d beyond j:   S <- S − c (S_j + e_j)'

    turns the rows below j into the Schur complement, and what they have at and before column j, which that no longer
    needs, into L⁻¹. Pivots stay on the diagonal.
    """
    ridge = op.Constant(value=RIDGE)
    scale = op.Reciprocal(op.Sqrt(op.Max(op.ReduceSum(A * I, [1], keepdims=1), op.Constant(value=TINY))))
    scale_column = op.Transpose(scale, perm=[0, 2, 1])
    S = A * scale * scale_column + ridge * I
    for j in range(op.Squeeze(op.Shape(I, start=0, end=1))):
        pivot = op.Unsqueeze(j, [0])
        S_j = op.Gather(S, pivot, axis=1)  # [B, 1, k]
        d = op.Max(op.Gather(S_j, pivot, axis=2), ridge)
        c = S_j * op.Gather(Above, pivot, axis=0) / d
        S = S - op.Transpose(c, perm=[0, 2, 1]) * (S_j + op.Gather(I, pivot, axis=0))
    d = op.Max(op.ReduceSum(S * I, [2], keepdims=1), ridge)  # [B, k, 1]
    half = (I + op.Trilu(S, op.Constant(value_int=-1), upper=0)) * (op.Constant(value=ONE) / op.Sqrt(d))
    V = half * scale
    Vt = op.Transpose(half, perm=[0, 2, 1]) * scale_column
    return V, Vt
