# mypy: disable-error-code="no-untyped-def"
"""The interior point method for quadratic programs in ONNX, the twin of
`icnnrt.mathematics.qp_reference.interior_point` and of what is around it: equilibration, cold and warm start, the way
back to the units of the data.

Its symbols are the reference's, and these say the same with fewer nodes:

- C = [G; I] has the rows of all bounds, and the sides [C; −C] z + s = [upper; −lower] are all of one kind:
  λ = l_upper − l_lower, and has [B, 1, 2 (m + n)] is 1 where there is a bound, else 0.
- x = (z, ν, l, s) is one row, so that steps, and the best iterate, take one operator.
- The step to the boundary is 1 / max(−dl/l, −ds/s).

Vectors are rows, [B, 1, n]; numbers of a sample are [B, 1, 1]; all is double. Samples that are done stand still.
"""

import math
from typing import Final

import onnx
from onnxscript import BOOL, INT64, graph, script

from icnnrt.mathematics.qp_reference import (
    BOUND_MAX,
    CYCLES,
    ENOUGH,
    EQUILIBRATIONS,
    NEARLY,
    PATIENCE,
    REGULARISATION,
    SHORT_STEP,
    SMALLEST,
    TO_BOUNDARY,
    WARM,
)
from icnnrt_exporters.operators.qp_newton import HALF, ZERO, QPCondensed, QPFactors, QPRefined
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, double, op

DOUBLE: Final = onnx.TensorProto.DOUBLE
BOUND_LARGEST: Final = double(BOUND_MAX)
INFINITY: Final = double(float("inf"))
SCALE_LEAST, SCALE_MOST = double(1e-8), double(1e8)
COST_LEAST, COST_MOST = double(1e-30), double(1e30)
NEAR_LEAST, NEAR_MOST = double(1 / 64), double(64.0)
TAU_LEAST, TAU_MOST = double(2.0**-60), double(2.0**60)
TWO, LN_2 = double(2.0), double(math.log(2.0))
LEAST_WARM: Final = double(WARM)
LIFT_BELOW: Final = double(1e-3)
GAP_LEAST: Final = double(1e-300)
RHO_OF_MU: Final = double(1e-6)
RHO_MOST, RHO_LEAST = double(REGULARISATION[0]), double(REGULARISATION[1])
PROGRESS: Final = double(0.7)
RESIDUAL_ENOUGH, RESIDUAL_NEARLY = double(ENOUGH), double(NEARLY)
PATIENCE_NEARLY, PATIENCE_FAR = double(float(PATIENCE[0])), double(float(PATIENCE[1]))
FRACTION: Final = double(TO_BOUNDARY)
SHORT: Final = double(SHORT_STEP)
CYCLE, CYCLE_SIGMA = double(float(CYCLES[0])), double(CYCLES[1])
LEAST: Final = double(SMALLEST)
ROUNDS: Final = onnx.helper.make_tensor("value", onnx.TensorProto.INT64, [], [EQUILIBRATIONS])


@script(DOMAIN, default_opset=op)
def QPLargest(a):
    """The largest magnitude of each sample, [B, 1, 1]."""
    largest = op.ReduceMax(op.Abs(a), [1, 2], keepdims=1)
    return largest


@script(DOMAIN, default_opset=op)
def QPRoot(size):
    """1/√size, and 1 for rows of zeros."""
    clipped = op.Min(op.Max(size, op.Constant(value=SCALE_LEAST)), op.Constant(value=SCALE_MOST))
    one = op.Constant(value=ONE)
    root = op.Reciprocal(op.Sqrt(op.Where(size > op.Constant(value=ZERO), clipped, one)))
    return root


@script(DOMAIN, default_opset=op)
def QPEquilibrated(K, n):
    """Scales E [B, n + m + q, 1] that bring E K D, K = [Q; G; A], near size 1 by rows and columns (Ruiz); D are the
    first n, transposed."""
    size = op.Shape(K, start=1, end=2)
    E = op.ReduceSum(K, [2], keepdims=1) * op.Constant(value=ZERO) + op.Constant(value=ONE)
    true = op.Constant(value=onnx.helper.make_tensor("value", onnx.TensorProto.BOOL, [], [True]))

    @graph()
    def equilibrate(i: INT64, going: BOOL, E, K):
        magnitude = op.Abs(K)
        d = QPRoot(op.ReduceMax(magnitude, [1], keepdims=1))
        rows = QPRoot(op.Slice(op.ReduceMax(magnitude, [2], keepdims=1), n, size, [1]))
        e = op.Concat(op.Transpose(d, perm=[0, 2, 1]), rows, axis=1)
        E = E * e
        K = K * e * d
        going = op.Identity(going)
        return going, E, K

    E, K = op.Loop(op.Constant(value=ROUNDS), true, E, K, body=equilibrate)
    E_out = op.Identity(E)
    return E_out


@script(DOMAIN, default_opset=op)
def QPSizeOfZ(Q, p, bounds, b):
    """τ = 2^round(log2 max(max|b|, max(−u), min(max|p| / mean(diag Q), max|u|))) [B, 1, 1], u = bounds [B, 1, k] as
    upper ones, 0 for none: those below 0 exclude z = 0. 1 if it is of that size already or nothing says."""
    zero, one, infinity = op.Constant(value=ZERO), op.Constant(value=ONE), op.Constant(value=INFINITY)
    n = op.Shape(Q, start=1, end=2)
    I = op.EyeLike(op.ConstantOfShape(op.Concat(n, n, axis=0)), dtype=DOUBLE)  # noqa: E741
    slope = QPLargest(p)
    curvature = op.ReduceSum(Q * I, [1, 2], keepdims=1) / op.Cast(n, to=DOUBLE)
    falls = curvature > zero
    reach = op.Where(falls, slope / op.Where(falls, curvature, one), infinity)
    held = QPLargest(bounds)
    size = op.Max(QPLargest(b), QPLargest(op.Min(bounds, zero)), op.Min(reach, op.Where(held > zero, held, infinity)))
    far = op.Or(size < op.Constant(value=NEAR_LEAST), size > op.Constant(value=NEAR_MOST))
    known = op.And(far, op.And(size > zero, size < infinity))
    clipped = op.Min(op.Max(op.Where(known, size, one), op.Constant(value=TAU_LEAST)), op.Constant(value=TAU_MOST))
    tau = op.Pow(op.Constant(value=TWO), op.Round(op.Log(clipped) / op.Constant(value=LN_2)))
    return tau


@script(DOMAIN, default_opset=op)
def QPResidual(Q, p, C, A, b, lower, upper, z, lam, nu):
    """Relative stationarity, feasibility and duality gap [B, 1, 3] of z, λ of all rows and ν, in the units given."""
    zero, one, half = op.Constant(value=ZERO), op.Constant(value=ONE), op.Constant(value=HALF)
    n = op.Shape(Q, start=1, end=2)
    m = op.Shape(C, start=1, end=2) - n
    Qz = z @ Q
    r = z @ -op.Transpose(-C, perm=[0, 2, 1])  # −, for the reason given in bundle_entropy_solve
    Az = z @ -op.Transpose(-A, perm=[0, 2, 1])
    A_nu = nu @ A
    C_lam = lam @ C
    _, mu = op.Split(lam, op.Concat(m, n, axis=0), axis=2)
    terms = op.Concat(Qz, p, C_lam - mu, A_nu, mu, axis=1)
    stationarity = QPLargest(Qz + p + C_lam + A_nu) / (one + QPLargest(terms))

    sides = op.Concat(upper, -lower, axis=2)
    is_bound = op.Abs(sides) < op.Constant(value=BOUND_LARGEST)
    has = op.Cast(is_bound, to=DOUBLE)
    above = has * (op.Concat(r, -r, axis=2) - op.Where(is_bound, sides, zero))
    has_upper, has_lower = op.Split(has, axis=2, num_outputs=2)
    held = r * op.Max(has_upper, has_lower)
    violation = op.Max(op.ReduceMax(above, [2], keepdims=1), zero, QPLargest(Az - b))
    feasibility = violation / (one + op.Max(QPLargest(b), QPLargest(Az), QPLargest(held)))

    # A multiplier of a side that is not there is as wrong as a gap of that size.
    push = op.Max(op.Concat(lam, -lam, axis=2), zero)
    gap = op.ReduceSum(push * op.Where(is_bound, op.Abs(above), one), [2], keepdims=1)
    objective = op.ReduceSum(z * (half * Qz + p), [2], keepdims=1)
    residual = op.Concat(stationarity, feasibility, gap / (one + op.Abs(objective)), axis=2)
    return residual


@script(DOMAIN, default_opset=op)
def QPEvaluated(Q, p, C, Ct, A, At, b, u, has, any_has, scale_nu, soft, z, nu, l, s):  # noqa: E741
    """The residuals r_d, r_ν and r_s, the gap λ's, and the largest relative residual, inf if not finite."""
    half, one = op.Constant(value=HALF), op.Constant(value=ONE)
    zero = op.Constant(value=ZERO)
    r = z @ Ct
    l_upper, l_lower = op.Split(l, axis=2, num_outputs=2)
    Qz = z @ Q
    C_lam = (l_upper - l_lower) @ C
    A_nu = nu @ A
    Az = z @ At
    r_d = Qz + p + C_lam + A_nu
    r_nu = Az - b - soft * nu
    r_s = (op.Concat(r, -r, axis=2) + s - u - soft * l) * has
    gap = op.ReduceSum(s * l, [2], keepdims=1)
    objective = op.ReduceSum(z * (half * Qz + p), [2], keepdims=1)
    largest = QPLargest(op.Concat(Qz, p, C_lam, A_nu, axis=1))
    reach = op.Max(QPLargest(r * any_has), QPLargest(Az))
    relative = op.Max(
        QPLargest(r_d) / (one + largest),
        op.Max(QPLargest(r_nu), QPLargest(r_s)) / (scale_nu + reach),
        gap / (one + op.Abs(objective)),
    )
    total = zero * (gap + op.ReduceSum(r_d, [2], keepdims=1))  # NaN if anything is NaN or infinite, else 0
    residual = op.Where(op.Equal(total, zero), relative, op.Constant(value=INFINITY))
    return r_d, r_nu, r_s, gap, residual


@script(DOMAIN, default_opset=op)
def QPDirection(
    Q, C, Ct, A, At, has, soft, W_has, W_safe, W_capped, rho, delta, V, Vt, Y, Yt, V_q, Vt_q, gamma, left,
    r_d, r_nu, r_s, w, s_soft, c,
):  # fmt: skip
    """The Newton step dz, dν, dl, ds to l∘s + c = 0.

    s_soft is s + soft l and w = l / s_soft. W_safe [B, 1, m + n] is the sum of w over both sides and 1 where there is
    no bound, W_has is 0 there and else 1, W_capped is the W of QPFactors.
    """
    e = c / s_soft
    f = e + w * r_s
    f_upper, f_lower = op.Split(f, axis=2, num_outputs=2)
    t = (f_upper - f_lower) / W_safe
    r_z = -r_d
    e_nu = -r_nu
    z0, lam0, nu0 = QPCondensed(C, Ct, A, W_capped, V, Vt, Y, Yt, V_q, Vt_q, gamma, left, r_z, t, e_nu)
    inverse_W = op.Reciprocal(W_safe)
    dz, _, dnu = QPRefined(
        Q, C, Ct, A, At, W_capped, W_has, inverse_W, rho, delta, V, Vt, Y, Yt, V_q, Vt_q, gamma, left,
        r_z, t, e_nu, z0, lam0, nu0,
    )  # fmt: skip
    dr = dz @ Ct
    dr_sides = op.Concat(dr, -dr, axis=2)
    dl = f + w * dr_sides
    ds = has * (soft * dl - r_s - dr_sides)
    return dz, dnu, dl, ds


@script(DOMAIN, default_opset=op)
def QPInteriorPoint(Q, p, G, A, b, lower, upper, soft, start, active, steps):
    """z [B, 1, n], λ and its slack [B, 1, m + n], ν [B, 1, q]: the best iterate, in the units of the data; its
    residual [B, 1, 3] in those of the equilibrated problem, and D [B, 1, n], the units of z.

    Q [B, n, n] symmetric, p [B, 1, n], G [B, m, n], A [B, q, n] with q >= 1, b [B, 1, q], lower and upper
    [B, 1, m + n] of [Gz; z], soft [1] (a constraint may be violated by t at a price of ½ t² / soft), start
    [B, 1, n + m + q + n] = (z, λ, ν, μ) or NaN: cold, active [B, 1, 1] bool: samples to solve, steps [].
    """
    one, zero = op.Constant(value=ONE), op.Constant(value=ZERO)
    infinity = op.Constant(value=INFINITY)
    bound_most = op.Constant(value=BOUND_LARGEST)
    n, m, q = op.Shape(G, start=2, end=3), op.Shape(G, start=1, end=2), op.Shape(A, start=1, end=2)
    I = op.EyeLike(op.ConstantOfShape(op.Concat(n, n, axis=0)), dtype=DOUBLE)  # noqa: E741
    I_q = op.EyeLike(op.ConstantOfShape(op.Concat(q, q, axis=0)), dtype=DOUBLE)
    first_above = op.Constant(value_int=1)
    Above = op.Trilu(op.Expand(one, op.Concat(n, n, axis=0)), first_above, upper=1)
    Above_q = op.Trilu(op.Expand(one, op.Concat(q, q, axis=0)), first_above, upper=1)

    # z = D ẑ, λ = F λ̂ / c, ν = E_A ν̂ / c, s = ŝ / F, with F = [E_G, 1/D]
    parts = op.Concat(n, m, q, axis=0)
    K = op.Concat(Q, G, A, axis=1)
    E = QPEquilibrated(K, n)
    E_row = op.Transpose(E, perm=[0, 2, 1])
    D_ruiz, E_G, E_A_ruiz = op.Split(E_row, parts, axis=2)
    scaled = K * E * D_ruiz
    Q_ruiz, G_hat, A_hat = op.Split(scaled, parts, axis=1)
    _, Gt_hat, At_hat = op.Split(op.Transpose(scaled, perm=[0, 2, 1]), parts, axis=2)
    I_batch = op.Expand(I, op.Concat(op.Shape(Q, start=0, end=1), n, n, axis=0))
    C = op.Concat(G_hat, I_batch, axis=1)
    Ct = op.Concat(Gt_hat, I_batch, axis=2)
    AtA = At_hat @ A_hat
    # Every measure of the method has a floor of 1: z is brought near it, so that an answer has no units.
    F_ruiz = op.Concat(E_G, op.Reciprocal(D_ruiz), axis=2)
    sides_ruiz = op.Concat(upper * F_ruiz, -(lower * F_ruiz), axis=2)
    bounds_ruiz = op.Where(op.Abs(sides_ruiz) < bound_most, sides_ruiz, zero)
    p_ruiz = p * D_ruiz
    tau = QPSizeOfZ(Q_ruiz, p_ruiz, bounds_ruiz, b * E_A_ruiz)
    D = D_ruiz * tau
    E_A = E_A_ruiz / tau
    F = F_ruiz / tau
    Q_unit = Q_ruiz * (tau * tau)
    p_unit = p_ruiz * tau
    size_Q = op.ReduceMean(op.ReduceMax(op.Abs(Q_unit), [1], keepdims=1), [2], keepdims=1)
    size = op.Max(size_Q, QPLargest(p_unit))
    clipped = op.Min(op.Max(size, op.Constant(value=COST_LEAST)), op.Constant(value=COST_MOST))
    scales_cost = op.And(size > zero, op.Equal(soft, zero))
    c = op.Where(scales_cost, op.Reciprocal(clipped), one)
    Q_hat = Q_unit * c
    p_hat = p_unit * c
    b_hat = b * E_A

    upper_hat, lower_hat = upper * F, lower * F
    sides = op.Concat(upper_hat, -lower_hat, axis=2)
    is_bound = op.Abs(sides) < bound_most
    has = op.Cast(is_bound, to=DOUBLE)
    u = op.Where(is_bound, sides, zero)
    lacks = one - has
    has_upper, has_lower = op.Split(has, axis=2, num_outputs=2)
    any_has = op.Max(has_upper, has_lower)
    N = op.Max(op.ReduceSum(has, [2], keepdims=1), one)
    scale_nu = one + QPLargest(b_hat)

    # cold start: the minimiser of the objective plus ½ ‖slacks‖²; slacks and multipliers are then lifted above 0
    u_upper, u_lower = op.Split(u, axis=2, num_outputs=2)
    W0 = (has_upper + has_lower) / (one + soft)
    W0_safe = W0 + (one - any_has)
    t0 = (u_lower - u_upper) / op.Max(has_upper + has_lower, one)
    rho0 = op.Constant(value=RHO_MOST) + zero * size
    delta0 = soft + rho0
    W0_capped = W0 / (one + rho0 * W0)
    V, Vt, Y, Yt, V_q, Vt_q, gamma, left = QPFactors(
        Q_hat, C, Ct, A_hat, At_hat, AtA, W0_capped, rho0, delta0, I, Above, I_q, Above_q
    )
    minus_p = -p_hat
    z0, lam0, nu0 = QPCondensed(C, Ct, A_hat, W0_capped, V, Vt, Y, Yt, V_q, Vt_q, gamma, left, minus_p, t0, b_hat)
    inverse_W0 = op.Reciprocal(W0_safe)
    z_cold, _, nu_cold = QPRefined(
        Q_hat, C, Ct, A_hat, At_hat, W0_capped, any_has, inverse_W0, rho0, delta0, V, Vt, Y, Yt, V_q, Vt_q, gamma,
        left, minus_p, t0, b_hat, z0, lam0, nu0,
    )  # fmt: skip
    r_cold = z_cold @ Ct
    s_cold = u - op.Concat(r_cold, -r_cold, axis=2)
    lift_below = op.Constant(value=LIFT_BELOW)
    least_s = op.ReduceMin(op.Where(is_bound, s_cold, infinity), [2], keepdims=1)
    least_l = op.ReduceMin(op.Where(is_bound, -s_cold, infinity), [2], keepdims=1)
    lift_s = op.Where(least_s < lift_below, one - least_s, zero)
    lift_l = op.Where(least_l < lift_below, one - least_l, zero)
    x_cold = op.Concat(
        z_cold, nu_cold, op.Where(is_bound, lift_l - s_cold, zero), op.Where(is_bound, s_cold + lift_s, one), axis=2
    )

    # warm start
    z_given, lam_given, nu_given, mu_given = op.Split(start, op.Concat(n, m, q, n, axis=0), axis=2)
    z_warm = z_given / D
    multiplier = op.Concat(lam_given, mu_given, axis=2) * c / F
    r_warm = z_warm @ Ct
    least_warm = op.Constant(value=LEAST_WARM)
    l_warm = op.Where(is_bound, op.Max(op.Concat(multiplier, -multiplier, axis=2), least_warm), zero)
    s_warm = op.Where(is_bound, op.Max(u - op.Concat(r_warm, -r_warm, axis=2), least_warm), one)
    x_warm = op.Concat(z_warm, nu_given * c / E_A, l_warm, s_warm, axis=2)
    is_warm = op.Equal(op.ReduceSum(start - start, [2], keepdims=1), zero)
    x = op.Where(is_warm, x_warm, x_cold)

    M2 = op.Shape(sides, start=2, end=3)
    split = op.Concat(n, q, M2, M2, axis=0)
    z_now, nu_now, l_now, s_now = op.Split(x, split, axis=2)
    r_d, r_nu, r_s, gap, best_residual = QPEvaluated(
        Q_hat, p_hat, C, Ct, A_hat, At_hat, b_hat, u, has, any_has, scale_nu, soft, z_now, nu_now, l_now, s_now
    )
    going = op.And(active, best_residual > op.Constant(value=RESIDUAL_ENOUGH))
    idle = zero * gap

    gap_least = op.Constant(value=GAP_LEAST)
    rho_of_mu = op.Constant(value=RHO_OF_MU)
    rho_most, rho_least = op.Constant(value=RHO_MOST), op.Constant(value=RHO_LEAST)
    progress = op.Constant(value=PROGRESS)
    enough, nearly = op.Constant(value=RESIDUAL_ENOUGH), op.Constant(value=RESIDUAL_NEARLY)
    patience_nearly, patience_far = op.Constant(value=PATIENCE_NEARLY), op.Constant(value=PATIENCE_FAR)
    fraction, short = op.Constant(value=FRACTION), op.Constant(value=SHORT)
    cycle, cycle_sigma = op.Constant(value=CYCLE), op.Constant(value=CYCLE_SIGMA)
    least = op.Constant(value=LEAST)
    least_l_row = least * has

    @graph()
    def step(i: INT64, go_on: BOOL, x, r_d, r_nu, r_s, gap, best_x, best_residual, idle, going):
        _, _, l, s = op.Split(x, split, axis=2)  # noqa: E741
        mu = gap / N
        rho = op.Min(op.Max(rho_of_mu * mu, rho_least), rho_most)
        delta = soft + rho
        s_soft = s + soft * l
        w = l / s_soft
        w_upper, w_lower = op.Split(w, axis=2, num_outputs=2)
        W = w_upper + w_lower
        W_safe = W + (one - any_has)
        W_capped = W / (one + rho * W)
        V, Vt, Y, Yt, V_q, Vt_q, gamma, left = QPFactors(
            Q_hat, C, Ct, A_hat, At_hat, AtA, W_capped, rho, delta, I, Above, I_q, Above_q
        )
        # predictor
        sl = s * l
        c_p = -sl
        l_safe = l + lacks
        _, _, dl_p, ds_p = QPDirection(
            Q_hat, C, Ct, A_hat, At_hat, has, soft, any_has, W_safe, W_capped, rho, delta, V, Vt, Y, Yt, V_q, Vt_q,
            gamma, left, r_d, r_nu, r_s, w, s_soft, c_p,
        )  # fmt: skip
        to_p = op.ReduceMin(op.Min(dl_p / l_safe, ds_p / s), [2], keepdims=1)
        a = op.Reciprocal(op.Max(-to_p, one))
        ahead = op.ReduceSum((s + a * ds_p) * (l + a * dl_p), [2], keepdims=1)
        ratio = op.Min(op.Max(ahead / op.Max(gap, gap_least), zero), one)
        sigma = ratio * ratio * ratio
        # corrector, without second order where the predictor soon met a boundary or the steps cycle; those are taken
        # back to the central path
        cycles = op.And(idle >= cycle, best_residual >= nearly)
        target = op.Where(cycles, op.Max(sigma, cycle_sigma), sigma) * mu
        second = op.Where(op.Or(cycles, a < short), zero, has)
        c_c = has * target - second * (ds_p * dl_p) - sl
        dz, dnu, dl, ds = QPDirection(
            Q_hat, C, Ct, A_hat, At_hat, has, soft, any_has, W_safe, W_capped, rho, delta, V, Vt, Y, Yt, V_q, Vt_q,
            gamma, left, r_d, r_nu, r_s, w, s_soft, c_c,
        )  # fmt: skip
        to_c = op.ReduceMin(op.Min(dl / l_safe, ds / s), [2], keepdims=1)
        alpha = fraction / op.Max(-to_c, fraction)
        is_finite = op.Equal(op.ReduceSum(zero * dz, [2], keepdims=1), zero)
        dx = op.Concat(dz, dnu, dl, ds, axis=2)
        x_next = op.Where(op.And(going, is_finite), x + alpha * dx, x)
        z_x, nu_x, l_x, s_x = op.Split(x_next, split, axis=2)
        l_next = op.Max(l_x, least_l_row)
        s_next = op.Max(s_x, least)
        x = op.Concat(z_x, nu_x, l_next, s_next, axis=2)

        r_d, r_nu, r_s, gap, residual = QPEvaluated(
            Q_hat, p_hat, C, Ct, A_hat, At_hat, b_hat, u, has, any_has, scale_nu, soft, z_x, nu_x, l_next, s_next
        )
        idle = op.Where(residual < progress * best_residual, zero, idle + one)
        better = op.And(going, residual < best_residual)
        best_x = op.Where(better, x, best_x)
        best_residual = op.Where(better, residual, best_residual)
        patience = op.Where(best_residual < nearly, patience_nearly, patience_far)
        going = op.And(going, op.And(best_residual > enough, idle < patience))
        go_on = op.Cast(op.ReduceSum(op.CastLike(going, i), keepdims=0), to=onnx.TensorProto.BOOL)
        return go_on, x, r_d, r_nu, r_s, gap, best_x, best_residual, idle, going

    go_on = op.Cast(op.ReduceSum(op.Cast(going, to=onnx.TensorProto.INT64), keepdims=0), to=onnx.TensorProto.BOOL)
    x, r_d, r_nu, r_s, gap, best_x, best_residual, idle, going = op.Loop(
        steps, go_on, x, r_d, r_nu, r_s, gap, x, best_residual, idle, going, body=step
    )
    z_hat, nu_hat, l_hat, s_hat = op.Split(best_x, split, axis=2)
    l_high, l_low = op.Split(l_hat, axis=2, num_outputs=2)
    s_high, s_low = op.Split(s_hat, axis=2, num_outputs=2)
    z_out = z_hat * D
    lam_hat = l_high - l_low
    lam_out = lam_hat * F / c
    nu_out = nu_hat * E_A / c
    slack_out = op.Where(l_high >= l_low, s_high, s_low) / F
    residual_out = QPResidual(Q_hat, p_hat, C, A_hat, b_hat, lower_hat, upper_hat, z_hat, lam_hat, nu_hat)
    D_out = op.Identity(D)
    return z_out, lam_out, nu_out, slack_out, residual_out, D_out
