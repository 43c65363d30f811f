# mypy: disable-error-code="no-untyped-def"
"""The body of ai.icnnrt::QPAdjoint, the ONNX twin of `icnnrt.mathematics.qp_reference.qp_adjoint`; its symbols are
explained there."""

from typing import Final

import onnx
from onnxscript import script

from icnnrt.mathematics.qp_reference import HARD
from icnnrt_exporters.operators.qp_interior_point import DOUBLE
from icnnrt_exporters.operators.qp_newton import HALF, ZERO, QPCondensed, QPFactors, QPRefined
from icnnrt_exporters.operators.qp_solve import NOT_A_NUMBER, SOLVED
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, double, op

HARDNESS: Final = double(HARD)
REGULAR: Final = double(1e-13)


@script(DOMAIN, default_opset=op)
def QPAdjoint(Q, G, A, lam, mu, slack, box_slack, status, z_bar, lam_bar, nu_bar, mu_bar):
    """The adjoint d_z [B, n], d_lam [B, m], d_nu [B, q], d_mu [B, n] of a loss with ∂ℓ/∂z = z̄ and so on.

    Inputs Q [B, n, n], G [B, m, n], A [B, q, n], with a leading axis of B or, shared, of 1; lam and slack [B, m], mu
    and box_slack [B, n], status [B] int32 as QPSolve gave them; z_bar [B, n], lam_bar [B, m], nu_bar [B, q], mu_bar
    [B, n], where the last three may have no columns: zero. All are float or all double but status, and so are the
    outputs. A sample whose status is not SOLVED has NaN.

        [Q  G'       A'  I      ] [d_z]     [−z̄]
        [G  −1/W_λ              ] [d_λ]  =  [−λ̄]     W_λ = |λ| / slack,  W_μ = |μ| / box_slack
        [A           0          ] [d_ν]     [−ν̄]
        [I               −1/W_μ ] [d_μ]     [−μ̄]
    """
    zero, one, half = op.Constant(value=ZERO), op.Constant(value=ONE), op.Constant(value=HALF)
    not_a_number = op.Constant(value=NOT_A_NUMBER)
    n, m = op.Shape(G, start=2, end=3), op.Shape(G, start=1, end=2)
    q, B = op.Shape(A, start=1, end=2), op.Shape(z_bar, start=0, end=1)
    no_rows = op.Cast(op.Equal(q, [0]), to=onnx.TensorProto.INT64)
    q_1 = q + no_rows  # without equalities there is one of zeros
    I = op.EyeLike(op.ConstantOfShape(op.Concat(n, n, axis=0)), dtype=DOUBLE)  # noqa: E741
    I_q = op.EyeLike(op.ConstantOfShape(op.Concat(q_1, q_1, axis=0)), dtype=DOUBLE)
    first_above = op.Constant(value_int=1)
    Above = op.Trilu(op.Expand(one, op.Concat(n, n, axis=0)), first_above, upper=1)
    Above_q = op.Trilu(op.Expand(one, op.Concat(q_1, q_1, axis=0)), first_above, upper=1)

    Q_given = op.Cast(Q, to=DOUBLE)
    Q_sym = half * (Q_given + op.Transpose(Q_given, perm=[0, 2, 1]))
    Q_all = op.Expand(Q_sym, op.Concat(B, n, n, axis=0))
    I_all = op.Expand(I, op.Concat(B, n, n, axis=0))
    C = op.Concat(op.Expand(op.Cast(G, to=DOUBLE), op.Concat(B, m, n, axis=0)), I_all, axis=1)
    A_rows = op.Pad(op.Cast(A, to=DOUBLE), op.Concat([0, 0, 0, 0], no_rows, [0], axis=0))
    A_all = op.Expand(A_rows, op.Concat(B, q_1, n, axis=0))
    Ct = -op.Transpose(-C, perm=[0, 2, 1])  # −, for the reason given in bundle_entropy_solve
    At = -op.Transpose(-A_all, perm=[0, 2, 1])

    good = op.Unsqueeze(op.Equal(op.Cast(status, to=onnx.TensorProto.INT64), op.Constant(value=SOLVED)), [1, 2])
    multiplier = op.Unsqueeze(op.Cast(op.Concat(lam, mu, axis=1), to=DOUBLE), [1])
    s = op.Unsqueeze(op.Cast(op.Concat(slack, box_slack, axis=1), to=DOUBLE), [1])
    W = op.Where(good, op.Abs(multiplier) / s, zero)
    z_row = op.Unsqueeze(op.Cast(z_bar, to=DOUBLE), [1])
    lam_bars = op.Pad(op.Cast(lam_bar, to=DOUBLE), op.Concat([0, 0, 0], m - op.Shape(lam_bar, start=1, end=2), axis=0))
    mu_bars = op.Pad(op.Cast(mu_bar, to=DOUBLE), op.Concat([0, 0, 0], n - op.Shape(mu_bar, start=1, end=2), axis=0))
    nu_bars = op.Pad(op.Cast(nu_bar, to=DOUBLE), op.Concat([0, 0, 0], q_1 - op.Shape(nu_bar, start=1, end=2), axis=0))
    t = op.Unsqueeze(
        op.Concat(op.Expand(lam_bars, op.Concat(B, m, axis=0)), op.Expand(mu_bars, op.Concat(B, n, axis=0)), axis=1),
        [1],
    )
    r_nu = op.Unsqueeze(-op.Expand(nu_bars, op.Concat(B, q_1, axis=0)), [1])
    r_z = -z_row

    # In units of the curvature of Q, and of the rows: an active constraint counts 1e8 times as much as Q, and the
    # refinements take the rest of the way to a hard one.
    curvature = op.ReduceSum(op.Abs(Q_all) * I, [1, 2], keepdims=1) / op.Cast(n, to=DOUBLE)
    size = op.Where(curvature > zero, curvature, one)
    row = -op.Transpose(-op.ReduceSumSquare(C, [2], keepdims=1), perm=[0, 2, 1])
    W_most = op.Constant(value=HARDNESS) * size / op.Where(row > zero, row, one)
    W_capped = W * (W_most / (W + W_most))
    is_held = op.Greater(W, zero)
    has = op.Cast(is_held, to=DOUBLE)
    inverse_W = op.Reciprocal(op.Where(is_held, W, one))
    rho = op.Constant(value=REGULAR) * size
    delta = op.Constant(value=REGULAR) / size
    AtA = At @ A_all
    V, Vt, Y, Yt, V_q, Vt_q, gamma, left = QPFactors(
        Q_all, C, Ct, A_all, At, AtA, W_capped, rho, delta, I, Above, I_q, Above_q
    )
    z0, l0, v0 = QPCondensed(C, Ct, A_all, W_capped, V, Vt, Y, Yt, V_q, Vt_q, gamma, left, r_z, t, r_nu)
    z1, l1, v1 = QPRefined(
        Q_all, C, Ct, A_all, At, W_capped, has, inverse_W, rho, delta, V, Vt, Y, Yt, V_q, Vt_q, gamma, left,
        r_z, t, r_nu, z0, l0, v0,
    )  # fmt: skip
    z2, l2, v2 = QPRefined(
        Q_all, C, Ct, A_all, At, W_capped, has, inverse_W, rho, delta, V, Vt, Y, Yt, V_q, Vt_q, gamma, left,
        r_z, t, r_nu, z1, l1, v1,
    )  # fmt: skip
    z3, l3, v3 = QPRefined(
        Q_all, C, Ct, A_all, At, W_capped, has, inverse_W, rho, delta, V, Vt, Y, Yt, V_q, Vt_q, gamma, left,
        r_z, t, r_nu, z2, l2, v2,
    )  # fmt: skip
    lam_row, mu_row = op.Split(op.Where(good, l3, not_a_number), op.Concat(m, n, axis=0), axis=2)
    nu_row = op.Slice(op.Where(good, v3, not_a_number), [0], q, [2])
    d_z = op.CastLike(op.Squeeze(op.Where(good, z3, not_a_number), [1]), Q)
    d_lam = op.CastLike(op.Squeeze(lam_row, [1]), Q)
    d_nu = op.CastLike(op.Squeeze(nu_row, [1]), Q)
    d_mu = op.CastLike(op.Squeeze(mu_row, [1]), Q)
    return d_z, d_lam, d_nu, d_mu
