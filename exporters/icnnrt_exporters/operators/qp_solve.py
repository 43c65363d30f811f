# mypy: disable-error-code="no-untyped-def"
"""The body of ai.icnnrt::QPSolve, the ONNX twin of `icnnrt.mathematics.qp_reference.qp_solve`; its symbols are
explained there.

Vectors are rows inside, [B, 1, n]; numbers of a sample are [B, 1, 1]; C = [G; I], λ of all its rows is [B, 1, m + n];
all is double.
"""

from typing import Final

import numpy as np
import onnx
from onnxscript import script

from icnnrt.mathematics.qp_reference import (
    BOUND_MAX,
    CANCELLED,
    CERTIFICATE,
    CERTIFIED,
    FALLS,
    RAY,
    RAY_FLOAT32,
    TOLERANCE,
)
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.reference import EPS
from icnnrt_exporters.operators.inverse_cholesky import TINY
from icnnrt_exporters.operators.qp_interior_point import (
    BOUND_LARGEST,
    DOUBLE,
    INFINITY,
    QPInteriorPoint,
    QPLargest,
    QPResidual,
)
from icnnrt_exporters.operators.qp_newton import HALF, ZERO
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, double, op


def _scalar(value: float) -> onnx.TensorProto:
    """A float64 scalar: the value that Pad pads with has no dimension."""
    return onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, [], [value])


NOT_A_NUMBER: Final = double(float("nan"))
PAD_NOTHING: Final = _scalar(float("nan"))
PAD_UPPER: Final = _scalar(float("inf"))
PAD_LOWER: Final = _scalar(-float("inf"))
BOUND_LOWEST: Final = double(-BOUND_MAX)
AMOUNT: Final = double(CERTIFIED)
HOLDS: Final = double(CERTIFICATE)
CANCEL: Final = double(CANCELLED)
AWAY_DOUBLE, AWAY_FLOAT = double(RAY), double(RAY_FLOAT32)
FALL: Final = double(FALLS)
_DOUBLES, _FLOATS = TOLERANCE[np.dtype(np.float64)], TOLERANCE[np.dtype(np.float32)]
SOLVED_DOUBLE, INACCURATE_DOUBLE = double(_DOUBLES[0]), double(_DOUBLES[1])
SOLVED_FLOAT, INACCURATE_FLOAT = double(_FLOATS[0]), double(_FLOATS[1])
NEARLY_ONE: Final = double(1.0 + 2.0**-40)  # which float32 rounds to 1
NOISE_DOUBLE: Final = double(8.0 * 8.0 * EPS)
NOISE_FLOAT: Final = double(8.0 * float(np.finfo(np.float32).eps))


def _status(status: QPStatus) -> onnx.TensorProto:
    return onnx.helper.make_tensor("value", onnx.TensorProto.INT64, [1], [int(status)])


SOLVED, INACCURATE, FAILED = _status(QPStatus.SOLVED), _status(QPStatus.INACCURATE), _status(QPStatus.FAILED)
PRIMAL_INFEASIBLE: Final = _status(QPStatus.PRIMAL_INFEASIBLE)
DUAL_INFEASIBLE: Final = _status(QPStatus.DUAL_INFEASIBLE)
NOT_CONVEX: Final = _status(QPStatus.NOT_CONVEX)
NOT_FINITE_INPUT: Final = _status(QPStatus.NOT_FINITE_INPUT)


@script(DOMAIN, default_opset=op)
def QPConvex(Q, noise):
    """Whether all pivots of Q / max |Q| + noise I are positive [B, 1, 1] bool, so that no eigenvalue of the first is
    below −noise; Q [B, n, n] symmetric. After a pivot that is not positive the others are NaN, or anything."""
    zero, one = op.Constant(value=ZERO), op.Constant(value=ONE)
    tiny = op.Constant(value=TINY)
    n = op.Shape(Q, start=1, end=2)
    I = op.EyeLike(op.ConstantOfShape(op.Concat(n, n, axis=0)), dtype=DOUBLE)  # noqa: E741
    Above = op.Trilu(op.Expand(one, op.Concat(n, n, axis=0)), op.Constant(value_int=1), upper=1)
    size = QPLargest(Q)
    S = Q / op.Where(size > zero, size, one) + noise * I
    for j in range(op.Squeeze(n)):
        pivot = op.Unsqueeze(j, [0])
        S_j = op.Gather(S, pivot, axis=1)
        d = op.Max(op.Gather(S_j, pivot, axis=2), tiny)
        u = S_j * op.Gather(Above, pivot, axis=0)
        S = S - op.Transpose(u, perm=[0, 2, 1]) * (u / d)
    pivots = op.ReduceSum(S * I, [1], keepdims=1)
    wrong = op.ReduceSum(op.Cast(op.Not(pivots > zero), to=DOUBLE), [2], keepdims=1)
    convex = op.Equal(wrong, zero)
    return convex


@script(DOMAIN, default_opset=op)
def QPFarkas(G, C, A, b, lower, upper, soft, start, active, steps):
    """Whether no z is feasible [B, 1, 1] bool, and λ and ν of the certificate: A'ν + C'λ = 0, bounds of sum −1."""
    zero, one = op.Constant(value=ZERO), op.Constant(value=ONE)
    n = op.Shape(G, start=2, end=3)
    B = op.Shape(G, start=0, end=1)
    no_p = op.Expand(zero, op.Concat(B, [1], n, axis=0))
    no_Q = op.Expand(zero, op.Concat(B, n, n, axis=0))
    _, lam, nu, _, _, D = QPInteriorPoint(no_Q, no_p, G, A, b, lower, upper, soft, start, active, steps)
    pointed = op.Where(lam >= zero, upper, lower)
    bound = op.Where(op.Abs(pointed) < op.Constant(value=BOUND_LARGEST), pointed, zero)
    terms = op.Concat(lam * bound, nu * b, axis=2)
    amount = -op.ReduceSum(terms, [2], keepdims=1)
    # In units of z: no z of a reasonable size makes up for what is off.
    off = QPLargest((lam @ C + nu @ A) * D)
    magnitude = QPLargest((op.Abs(lam) @ op.Abs(C) + op.Abs(nu) @ op.Abs(A)) * D)
    size = op.ReduceSum(op.Abs(terms), [2], keepdims=1)
    most = op.Min(op.Constant(value=HOLDS) * amount, op.Constant(value=CANCEL) * magnitude)
    proven = op.And(amount > op.Constant(value=AMOUNT) * size, off <= most)
    unit = op.Where(amount > zero, amount, one)
    farkas_lam = lam / unit
    farkas_nu = nu / unit
    return proven, farkas_lam, farkas_nu


@script(DOMAIN, default_opset=op)
def QPRecession(Q, p, G, C, A, lower, upper, soft, start, active, leaves, steps):
    """Whether the objective falls without end along some d [B, 1, 1] bool, and that d [B, 1, n], p'd = −1."""
    zero, one = op.Constant(value=ZERO), op.Constant(value=ONE)
    tiny, bound_most = op.Constant(value=TINY), op.Constant(value=BOUND_LARGEST)
    n = op.Shape(G, start=2, end=3)
    B = op.Shape(G, start=0, end=1)
    I = op.EyeLike(op.ConstantOfShape(op.Concat(n, n, axis=0)), dtype=DOUBLE)  # noqa: E741
    unit_Q = op.Expand(I, op.Concat(B, n, n, axis=0))
    has_upper, has_lower = op.Abs(upper) < bound_most, op.Abs(lower) < bound_most
    flat = op.Concat(A, Q, axis=1)
    no_b = op.Expand(zero, op.Concat(B, [1], op.Shape(flat, start=1, end=2), axis=0))
    cone_lower, cone_upper = op.Where(has_lower, zero, lower), op.Where(has_upper, zero, upper)
    unit_p = p / op.Max(QPLargest(p), tiny)
    # A warm start has as many ν as there were equalities; this is another problem, and starts cold.
    cold = op.Expand(
        op.Constant(value=NOT_A_NUMBER),
        op.Concat(B, [1], op.Shape(start, start=2, end=3) + n, axis=0),
    )
    d, _, _, _, _, D = QPInteriorPoint(unit_Q, unit_p, G, flat, no_b, cone_lower, cone_upper, soft, cold, active, steps)
    pd = p * d
    amount = -op.ReduceSum(pd, [2], keepdims=1)
    r = d @ -op.Transpose(-C, perm=[0, 2, 1])
    flat_d = d @ -op.Transpose(-flat, perm=[0, 2, 1])
    # Each row against its own size and that of d, in units of z.
    length = QPLargest(d / D)
    away = leaves * length
    size_C = op.Transpose(op.ReduceMax(op.Abs(C * D), [2], keepdims=1), perm=[0, 2, 1])
    size_flat = op.Transpose(op.ReduceMax(op.Abs(flat * D), [2], keepdims=1), perm=[0, 2, 1])
    violation = op.Max(op.Where(has_upper, r, zero), op.Where(has_lower, -r, zero))
    leaves = op.Not(op.Concat(violation, op.Abs(flat_d), axis=2) <= away * op.Concat(size_C, size_flat, axis=2))
    stays = op.Equal(op.ReduceSum(op.Cast(leaves, to=DOUBLE), [2], keepdims=1), zero)
    falls = op.And(amount > zero, amount >= op.Constant(value=FALL) * (QPLargest(p * D) * length))
    proven = op.And(stays, falls)
    ray = d / op.Where(amount > zero, amount, one)
    return proven, ray


@script(DOMAIN, default_opset=op)
def QPSolve(Q, p, G, h_lower, h, A, b, lower, upper, start, steps: int):
    """Solve min over z of ½ z'Qz + p'z s.t. h_lower <= Gz <= h, Az = b, lower <= z <= upper; B samples.

    Inputs Q [B, n, n], whose symmetric part is used, p [B, n], G [B, m, n], h_lower and h [B, m], A [B, q, n],
    b [B, q], lower and upper [B, n], start [B, n + m + q + n] = (z, λ, ν, μ) of a problem nearby, NaN in the rows of
    samples that start cold: all float or all double. m and q may be 0. Each has a leading axis of B or, shared by all
    samples, of 1. h_lower, lower, upper and start may have no columns: none. Bounds of 1e30 and beyond are none.
    Attribute steps: the most steps of the interior point method.

    Outputs z [B, n], lam [B, m], nu [B, q], mu [B, n], slack [B, m], box_slack [B, n] of the inputs' type, residual
    [B, 3] double, status [B] int32, a `QPStatus`, ray [B, n + m + q + n] of the inputs' type.
    """
    zero, one, half = op.Constant(value=ZERO), op.Constant(value=ONE), op.Constant(value=HALF)
    not_a_number = op.Constant(value=NOT_A_NUMBER)
    n, m = op.Shape(G, start=2, end=3), op.Shape(G, start=1, end=2)
    q = op.Shape(A, start=1, end=2)
    B = op.Max(
        op.Shape(Q, start=0, end=1), op.Shape(p, start=0, end=1), op.Shape(G, start=0, end=1),
        op.Shape(h_lower, start=0, end=1), op.Shape(h, start=0, end=1), op.Shape(A, start=0, end=1),
        op.Shape(b, start=0, end=1), op.Shape(lower, start=0, end=1), op.Shape(upper, start=0, end=1),
        op.Shape(start, start=0, end=1),
    )  # fmt: skip
    no_rows = op.Cast(op.Equal(q, [0]), to=onnx.TensorProto.INT64)
    q_1 = q + no_rows  # without equalities there is one of zeros
    all_columns = op.Concat(n, m, q, n, axis=0)

    Q_given = op.Cast(Q, to=DOUBLE)
    Q_sym = half * (Q_given + op.Transpose(Q_given, perm=[0, 2, 1]))
    Q_all = op.Expand(Q_sym, op.Concat(B, n, n, axis=0))
    p_all = op.Expand(op.Unsqueeze(op.Cast(p, to=DOUBLE), [1]), op.Concat(B, [1], n, axis=0))
    G_all = op.Expand(op.Cast(G, to=DOUBLE), op.Concat(B, m, n, axis=0))
    A_rows = op.Pad(op.Cast(A, to=DOUBLE), op.Concat([0, 0, 0, 0], no_rows, [0], axis=0))
    A_all = op.Expand(A_rows, op.Concat(B, q_1, n, axis=0))
    b_row = op.Pad(op.Cast(b, to=DOUBLE), op.Concat([0, 0, 0], no_rows, axis=0))
    b_all = op.Expand(op.Unsqueeze(b_row, [1]), op.Concat(B, [1], q_1, axis=0))
    m_row, n_row = op.Concat(B, [1], m, axis=0), op.Concat(B, [1], n, axis=0)
    pad_upper, pad_lower = op.Constant(value=PAD_UPPER), op.Constant(value=PAD_LOWER)
    # fmt: off
    h_low = op.Pad(
        op.Cast(h_lower, to=DOUBLE), op.Concat([0, 0, 0], m - op.Shape(h_lower, start=1, end=2), axis=0), pad_lower
    )
    box_low = op.Pad(
        op.Cast(lower, to=DOUBLE), op.Concat([0, 0, 0], n - op.Shape(lower, start=1, end=2), axis=0), pad_lower
    )
    box_high = op.Pad(
        op.Cast(upper, to=DOUBLE), op.Concat([0, 0, 0], n - op.Shape(upper, start=1, end=2), axis=0), pad_upper
    )
    # fmt: on
    low_given = op.Concat(
        op.Expand(op.Unsqueeze(h_low, [1]), m_row), op.Expand(op.Unsqueeze(box_low, [1]), n_row), axis=2
    )
    high_given = op.Concat(
        op.Expand(op.Unsqueeze(op.Cast(h, to=DOUBLE), [1]), m_row),
        op.Expand(op.Unsqueeze(box_high, [1]), n_row),
        axis=2,
    )
    # Bounds that are none are made infinite, which no scaling brings within reach.
    infinity, bound_most = op.Constant(value=INFINITY), op.Constant(value=BOUND_LARGEST)
    low = op.Where(op.Abs(low_given) >= bound_most, low_given * infinity, low_given)
    high = op.Where(op.Abs(high_given) >= bound_most, high_given * infinity, high_given)
    I = op.EyeLike(op.ConstantOfShape(op.Concat(n, n, axis=0)), dtype=DOUBLE)  # noqa: E741
    C = op.Concat(G_all, op.Expand(I, op.Concat(B, n, n, axis=0)), axis=1)
    start_columns = op.ReduceSum(all_columns, keepdims=1)
    start_given = op.Pad(
        op.Cast(start, to=DOUBLE),
        op.Concat([0, 0, 0], start_columns - op.Shape(start, start=1, end=2), axis=0),
        op.Constant(value=PAD_NOTHING),
    )
    z_0, lam_0, nu_0, mu_0 = op.Split(start_given, all_columns, axis=1)
    nu_rows = op.Pad(nu_0, op.Concat([0, 0, 0], no_rows, axis=0))
    start_rows = op.Unsqueeze(op.Concat(z_0, lam_0, nu_rows, mu_0, axis=1), [1])
    start_all = op.Expand(start_rows, op.Concat(B, [1], start_columns + no_rows, axis=0))

    is_float = op.Equal(op.Cast(op.CastLike(op.Constant(value=NEARLY_ONE), Q), to=DOUBLE), one)
    solved_at = op.Where(is_float, op.Constant(value=SOLVED_FLOAT), op.Constant(value=SOLVED_DOUBLE))
    inaccurate_at = op.Where(is_float, op.Constant(value=INACCURATE_FLOAT), op.Constant(value=INACCURATE_DOUBLE))
    leaves = op.Where(is_float, op.Constant(value=AWAY_FLOAT), op.Constant(value=AWAY_DOUBLE))
    eps = op.Where(is_float, op.Constant(value=NOISE_FLOAT), op.Constant(value=NOISE_DOUBLE))

    # a − a is NaN where a is NaN or infinite; an upper bound of −inf, or a lower one of +inf, is no bound
    rows = op.Concat(op.ReduceSum(Q_all - Q_all, [1], keepdims=1), p_all - p_all, axis=2)
    rows_G = op.ReduceSum(G_all - G_all, [1], keepdims=1)
    rows_A = op.ReduceSum(A_all - A_all, [1], keepdims=1)
    off = op.ReduceSum(op.Concat(rows, rows_G, rows_A, b_all - b_all, axis=2), [2], keepdims=1)
    is_bound = op.And(
        op.And(high > op.Constant(value=BOUND_LOWEST), low < op.Constant(value=BOUND_LARGEST)),
        op.And(op.Equal(high, high), op.Equal(low, low)),
    )
    wrong_bounds = op.ReduceSum(op.Cast(op.Not(is_bound), to=DOUBLE), [2], keepdims=1)
    finite = op.And(op.Equal(off, zero), op.Equal(wrong_bounds, zero))
    convex = QPConvex(Q_all, eps * op.Cast(n, to=DOUBLE))
    crossed = op.ReduceSum(op.Cast(low > high, to=DOUBLE), [2], keepdims=1) > zero
    trivial = op.Or(op.Not(op.And(finite, convex)), crossed)

    steps_tensor = op.Constant(value_int=steps)
    z_all, lam_all, nu_all, slack_all, residual_hat, _ = QPInteriorPoint(
        Q_all, p_all, G_all, A_all, b_all, low, high, zero, start_all, op.Not(trivial), steps_tensor
    )
    # In both units: those of the data must not be so small that the 1 in a denominator lets everything pass.
    residual_data = QPResidual(Q_all, p_all, C, A_all, b_all, low, high, z_all, lam_all, nu_all)
    residual_all = op.Max(residual_data, residual_hat)
    worst = op.ReduceMax(residual_all, [2], keepdims=1)
    unsolved = op.And(op.Not(trivial), op.Not(worst <= solved_at))
    ray_row = op.Concat(B, start_columns, axis=0)
    no_ray = op.Expand(zero, ray_row)
    solved_status = op.Expand(op.Constant(value=SOLVED), op.Concat(B, [1], [1], axis=0))

    any_unsolved = op.Cast(
        op.ReduceSum(op.Cast(unsolved, to=onnx.TensorProto.INT64), keepdims=0), to=onnx.TensorProto.BOOL
    )
    if any_unsolved:
        which = op.Squeeze(unsolved, [1, 2])
        all_samples = op.Range(op.Constant(value_int=0), op.Squeeze(B), op.Constant(value_int=1))
        at = op.Unsqueeze(op.Compress(all_samples, which, axis=0), [1])
        Q_few, p_few = op.Compress(Q_all, which, axis=0), op.Compress(p_all, which, axis=0)
        G_few, A_few = op.Compress(G_all, which, axis=0), op.Compress(A_all, which, axis=0)
        C_few, b_few = op.Compress(C, which, axis=0), op.Compress(b_all, which, axis=0)
        low_few, high_few = op.Compress(low, which, axis=0), op.Compress(high, which, axis=0)
        start_few = op.Compress(start_all, which, axis=0) * not_a_number
        active_few = op.Compress(unsolved, which, axis=0)
        infeasible, farkas_lam, farkas_nu = QPFarkas(
            G_few, C_few, A_few, b_few, low_few, high_few, one, start_few, active_few, steps_tensor
        )
        falling, d = QPRecession(
            Q_few, p_few, G_few, C_few, A_few, low_few, high_few, zero, start_few, active_few, leaves, steps_tensor
        )
        accurate = op.Compress(worst, which, axis=0) <= inaccurate_at
        verdict = op.Where(
            infeasible,
            op.Constant(value=PRIMAL_INFEASIBLE),
            op.Where(
                falling,
                op.Constant(value=DUAL_INFEASIBLE),
                op.Where(accurate, op.Constant(value=INACCURATE), op.Constant(value=FAILED)),
            ),
        )
        row_lam, row_mu = op.Split(farkas_lam, op.Concat(m, n, axis=0), axis=2)
        row_nu = op.Slice(farkas_nu, [0], q, [2])
        nothing = zero * d
        farkas = op.Concat(nothing, row_lam, row_nu, row_mu, axis=2)
        along = op.Pad(d, op.Concat([0, 0, 0, 0, 0], start_columns - n, axis=0))
        proof = op.Where(infeasible, farkas, op.Where(falling, along, zero))
        ray_found = op.ScatterND(no_ray, at, op.Squeeze(proof, [1]))
        status_found = op.Squeeze(op.ScatterND(solved_status, at, verdict), [2])
        # One output: onnxscript would give two in an order that changes from run to run.
        found = op.Concat(op.Cast(status_found, to=DOUBLE), ray_found, axis=1)
    else:
        found = op.Concat(op.Cast(op.Squeeze(solved_status, [2]), to=DOUBLE), no_ray, axis=1)
    status_column, ray_all = op.Split(found, op.Concat([1], start_columns, axis=0), axis=1)
    found_status = op.Cast(op.Unsqueeze(status_column, [2]), to=onnx.TensorProto.INT64)

    # What the type of the data cannot hold is no answer: a − a is NaN there.
    answer = op.Cast(op.CastLike(op.Concat(z_all, lam_all, nu_all, axis=2), Q), to=DOUBLE)
    overflows = op.Not(op.Equal(op.ReduceSum(answer - answer, [2], keepdims=1), zero))
    answered = op.Not(found_status > op.Constant(value=INACCURATE))
    held_status = op.Where(op.And(overflows, answered), op.Constant(value=FAILED), found_status)

    status_all = op.Where(
        finite,
        op.Where(
            convex, op.Where(crossed, op.Constant(value=PRIMAL_INFEASIBLE), held_status), op.Constant(value=NOT_CONVEX)
        ),
        op.Constant(value=NOT_FINITE_INPUT),
    )
    lost = status_all > op.Constant(value=INACCURATE)
    z_row = op.Where(lost, not_a_number, z_all)
    lam_row, mu_row = op.Split(op.Where(lost, not_a_number, lam_all), op.Concat(m, n, axis=0), axis=2)
    nu_row = op.Slice(op.Where(lost, not_a_number, nu_all), [0], q, [2])
    slack_row, box_row = op.Split(op.Where(lost, not_a_number, slack_all), op.Concat(m, n, axis=0), axis=2)
    z = op.CastLike(op.Squeeze(z_row, [1]), Q)
    lam = op.CastLike(op.Squeeze(lam_row, [1]), Q)
    nu = op.CastLike(op.Squeeze(nu_row, [1]), Q)
    mu = op.CastLike(op.Squeeze(mu_row, [1]), Q)
    slack = op.CastLike(op.Squeeze(slack_row, [1]), Q)
    box_slack = op.CastLike(op.Squeeze(box_row, [1]), Q)
    residual = op.Squeeze(op.Where(lost, not_a_number, residual_all), [1])
    status = op.Cast(op.Squeeze(status_all, [1, 2]), to=onnx.TensorProto.INT32)
    ray = op.CastLike(ray_all, Q)
    return z, lam, nu, mu, slack, box_slack, residual, status, ray
