# mypy: disable-error-code="no-untyped-def"
"""The condensed KKT system of a quadratic program in ONNX: factors, one solve, one refinement; see
`icnnrt.mathematics.qp_reference`, whose symbols these are.

    [H   A'] [dz]   [r_z − C' W t]
    [A   −δ] [dν] = [r_ν         ]      H = Q + ρ + C' W C,  C = [G; I],  dλ = W (C dz + t)

Vectors are rows, [B, 1, n] and so on; numbers of a sample are [B, 1, 1]; all is double. Ct and At are transposes,
made by the caller, who knows which stay the same. q is at least 1: a caller without equalities gives one row of zeros.
"""

from typing import Final

from onnxscript import script

from icnnrt_exporters.operators.inverse_cholesky import InverseCholesky
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, double, op

ZERO: Final = double(0.0)
HALF: Final = double(0.5)


@script(DOMAIN, default_opset=op)
def QPFactors(Q, C, Ct, A, At, AtA, W, rho, delta, I, Above, I_q, Above_q):  # noqa: E741
    """The factors of P = H + γ A'A, V'V = P⁻¹, and of A P⁻¹ A' + δ / (1 − γδ); Y = A V'; γ and 1 − γδ.

    W [B, 1, m + n] is capped, rho and delta are ρ and δ [B, 1, 1], AtA is A'A. I, Above [n, n] and I_q, Above_q
    [q, q] are those of InverseCholesky.
    """
    one = op.Constant(value=ONE)
    zero = op.Constant(value=ZERO)
    H = Q + (Ct * W) @ C + rho * I
    trace_H = op.ReduceSum(H * I, [1, 2], keepdims=1)
    trace_A = op.ReduceSum(AtA * I, [1, 2], keepdims=1)
    has_A = trace_A > zero
    wanted = op.Where(has_A, trace_H / op.Where(has_A, trace_A, one), zero)
    gamma = op.Min(wanted, op.Constant(value=HALF) / delta)
    left = one - gamma * delta
    V, Vt = InverseCholesky(H + gamma * AtA, I, Above)
    Y = A @ Vt
    Yt = V @ At
    V_q, Vt_q = InverseCholesky(Y @ Yt + delta / left * I_q, I_q, Above_q)
    return V, Vt, Y, Yt, V_q, Vt_q, gamma, left


@script(DOMAIN, default_opset=op)
def QPCondensed(C, Ct, A, W, V, Vt, Y, Yt, V_q, Vt_q, gamma, left, r_z, t, r_nu):
    """dz [B, 1, n], dλ [B, 1, m + n], dν [B, 1, q].

    P dz + (1 − γδ) A'dν = r_z − C'W t + γ A'r_ν =: r,   A dz − δ dν = r_ν
    """
    y = (r_z - (W * t) @ C + (gamma * r_nu) @ A) @ Vt
    scaled_dnu = ((y @ Yt - r_nu) @ Vt_q) @ V_q
    dz = (y - scaled_dnu @ Y) @ V
    dlam = W * (dz @ Ct + t)
    dnu = scaled_dnu / left
    return dz, dlam, dnu


@script(DOMAIN, default_opset=op)
def QPRefined(
    Q, C, Ct, A, At, W, has, inverse_W, rho, delta, V, Vt, Y, Yt, V_q, Vt_q, gamma, left, r_z, t, r_nu, dz, dlam, dnu
):
    """One refinement of dz, dλ, dν, with 1/W as it is where `has` is 1, and not as it was capped."""
    e_z = r_z - dz @ Q - rho * dz - dlam @ C - dnu @ A
    e_lam = has * (dz @ Ct + t - inverse_W * dlam)
    e_nu = r_nu - dz @ At + delta * dnu
    ddz, ddlam, ddnu = QPCondensed(C, Ct, A, W, V, Vt, Y, Yt, V_q, Vt_q, gamma, left, e_z, e_lam, e_nu)
    refined_z = dz + ddz
    refined_lam = dlam + ddlam
    refined_nu = dnu + ddnu
    return refined_z, refined_lam, refined_nu
