# mypy: disable-error-code="no-untyped-def"
"""The bodies of the bundle operators of a domain, from what distinguishes that domain.

The method is that of bundle_entropy_solve.py and bundle_entropy_adjoint.py, which stay as they are for the box: there
every node counts most. Here a domain hands over small functions of its own, its parts:

    Plain(G, e) -> G, e        cuts with the centre at zero: v = e + G y
    Scaled(G, e) -> G, e       cuts with the same λ that are easier to solve
    Reach(G) -> [B, k, 1]      about the most that G y can be
    Point(s) -> y              y(s)
    Curvature(s, a) -> D a     D = ∂y/∂s, a [B, m, n] row by row
    Conjugate(s) -> [B, 1, 1]  C(s)
    FirstLogits(s, bound) -> u
    NextLogits(u, du) -> u

s, u, du [B, 1, n] or [B, 3, n]; all is double. See `icnnrt.mathematics.domains` for the formulas.
"""

from dataclasses import dataclass
from typing import Any

import onnx
from onnxscript import BOOL, INT64, graph, script

from icnnrt_exporters.operators.bundle_entropy_adjoint import SMALLEST_RIDGE, TRACE_RIDGE
from icnnrt_exporters.operators.bundle_entropy_solve import (
    CLIP_0,
    CLIP_1,
    COLD_LOGIT,
    CUBE,
    LAM_SMALLEST,
    NINE_TENTHS,
    ROUNDING_ENOUGH,
    ROUNDING_START,
    SLACK_SMALLEST,
    STEP_LENGTHS,
    STEP_RELUCTANCE,
    TENTH,
    TO_BOUNDARY,
    WARM_LOGIT,
    ZERO,
)
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, InverseSPD, SolveSPD, op

DOUBLE = onnx.TensorProto.DOUBLE


@dataclass(frozen=True)
class Parts:
    """The functions, of onnxscript, that the head of this file lists."""

    Plain: Any
    Scaled: Any
    Reach: Any
    Point: Any
    Curvature: Any
    Conjugate: Any
    FirstLogits: Any
    NextLogits: Any

    def functions(self) -> list[Any]:
        return list(vars(self).values())


def solve_body(parts: Parts) -> Any:
    """The solve of one domain; a function of onnxscript, to be named by the caller."""
    Plain, Scaled, Reach, Point = parts.Plain, parts.Scaled, parts.Reach, parts.Point
    Curvature, Conjugate = parts.Curvature, parts.Conjugate
    FirstLogits, NextLogits = parts.FirstLogits, parts.NextLogits

    @script(DOMAIN, default_opset=op)
    def BundleSolve(slopes, offsets, lam_start, steps: int):
        """Solve max over λ in the simplex of e'λ − C(s), s = −G'λ; B samples of k cuts.

        Inputs slopes G [B, k, n], centred offsets e [B, k], lam_start [B, k_prev] with 0 <= k_prev <= k, multipliers
        of the first cuts (k_prev = 0: cold start): all float or all double. Attribute steps: the most steps taken.

        Outputs y [B, n] and lam [B, k] of the inputs' type, lower_bound [B] and residual [B, 3] double. lam is the
        best iterate and y = y(−G'lam). residual is what rounding took from y on the way out, |1'λ − 1|, and the
        duality gap max v − λ'v of the model. A sample with NaN or infinite cuts has y, lower_bound and residual NaN,
        alone. Vectors are rows inside, [B, 1, k] and [B, 1, n], the trials of a step [B, 3, k] and [B, 3, n].
        """
        one = op.Constant(value=ONE)
        lam_smallest = op.Constant(value=LAM_SMALLEST)
        to_boundary = op.Constant(value=TO_BOUNDARY)
        slack_smallest = op.Constant(value=SLACK_SMALLEST)
        clip_0, clip_1 = op.Constant(value=CLIP_0), op.Constant(value=CLIP_1)
        cube = op.Constant(value=CUBE)
        step_lengths = op.Constant(value=STEP_LENGTHS)
        reluctance = op.Constant(value=STEP_RELUCTANCE)

        given_e = op.Unsqueeze(op.Cast(offsets, to=DOUBLE), [1])
        plain_G, plain_e = Plain(op.Cast(slopes, to=DOUBLE), given_e)
        G, e = Scaled(plain_G, plain_e)
        N = -op.Transpose(G, perm=[0, 2, 1])  # −G', for the reason given in bundle_entropy_solve
        k = op.Shape(slopes, start=1, end=2)
        I = op.EyeLike(op.ConstantOfShape(op.Concat(k, k, axis=0)), dtype=DOUBLE)  # noqa: E741

        # start: λ = 1/k, warm 0.9 [λ_prev; 0] + 0.1/k
        k_prev = op.Shape(lam_start, start=1, end=2)
        lam_prev = op.Pad(op.Cast(lam_start, to=DOUBLE), op.Concat([0, 0, 0], k - k_prev, axis=0))
        lam_mixed = op.Constant(value=NINE_TENTHS) * lam_prev + op.Constant(value=TENTH) / op.Cast(k, to=DOUBLE)
        lam = op.Unsqueeze(lam_mixed / op.ReduceSum(lam_mixed, [1], keepdims=1), [1])
        bound = op.Where(op.Equal(k_prev, [0]), op.Constant(value=COLD_LOGIT), op.Constant(value=WARM_LOGIT))
        s = -(lam @ G)
        v = e - Point(s) @ N
        best_gap = op.ReduceMax(v, [2], keepdims=1) - op.ReduceSum(lam * v, [2], keepdims=1)
        largest = op.Abs(e) + op.Transpose(Reach(G), perm=[0, 2, 1])
        enough = op.Constant(value=ROUNDING_ENOUGH) * (one + op.ReduceMax(largest, [2], keepdims=1))
        unsolved = best_gap > enough  # false for NaN: such a sample holds up nobody

        # w = M − v + δ with M = max v, δ = λ'(M − v) + 10 eps (1 + |M|)
        u = FirstLogits(s, bound)
        v = e - Point(u) @ N
        M = op.ReduceMax(v, [2], keepdims=1)
        w = M - v
        w = w + (op.ReduceSum(lam * w, [2], keepdims=1) + op.Constant(value=ROUNDING_START) * (one + op.Abs(M)))

        @graph()
        def step(i: INT64, going: BOOL, lam, u, w, s, best_lam, best_gap, unsolved):
            # A = G D G' + diag(w/λ),  P = A⁻¹ − A⁻¹1 1'A⁻¹ / 1'A⁻¹1
            A_inv = InverseSPD(I * (w / lam) - Curvature(u, G) @ N, I)
            A_inv_1 = op.ReduceSum(A_inv, [1], keepdims=1)
            P = A_inv - op.Transpose(A_inv_1, perm=[0, 2, 1]) * (A_inv_1 / op.ReduceSum(A_inv_1, [2], keepdims=1))
            # r = r_d − w = v − G D r_u up to a constant;  r_u = u + G'λ
            r_u = u - s
            r = e + (Curvature(u, r_u) - Point(u)) @ N
            r = r - op.ReduceMax(r, [2], keepdims=1)
            c = lam * w
            mu = op.ReduceMean(c, [2], keepdims=1)

            # predictor, r_c = −c:  dλ = P r,  ζ = 1 + η,  a = min(1, 1 / max(−η, ζ))
            eta = r @ P / lam
            a = op.Reciprocal(op.ReduceMax(op.Max(-eta, one + eta, one), [2], keepdims=1))
            a_eta = a * eta
            h = a_eta * (a + a_eta)
            shrink = one - a - op.ReduceMean(c * h, [2], keepdims=1) / mu
            sigma_c = op.Pow(op.Clip(shrink, clip_0, clip_1), cube)

            # corrector, r_c = c∘(m − 1):  dλ = P(r + w∘m),  ζ = 1 + η − m,  α = min(1, 0.99 / max(−η, ζ))
            m = sigma_c * mu / c + h
            d_lam = (r + w * m) @ P
            eta = d_lam / lam
            zeta = one + eta - m
            alpha = to_boundary / op.ReduceMax(op.Max(-eta, zeta, to_boundary), [2], keepdims=1)

            # three step lengths; the shorter two have to leave less than half the gap
            lengths = alpha * step_lengths
            moved = op.Max(lam + lengths * d_lam, lam_smallest)
            trial = moved / op.ReduceSum(moved, [2], keepdims=1)
            trial_s = -(trial @ G)
            trial_v = e - Point(trial_s) @ N
            trial_gap = op.ReduceMax(trial_v, [2], keepdims=1) - op.ReduceSum(trial * trial_v, [2], keepdims=1)
            chosen = op.ArgMin(trial_gap * reluctance, axis=1, keepdims=1)
            alpha = op.GatherND(lengths, chosen, batch_dims=1)
            gap = op.GatherND(trial_gap, chosen, batch_dims=1)
            lam = op.GatherND(trial, chosen, batch_dims=1)
            s_next = op.GatherND(trial_s, chosen, batch_dims=1)

            # du = −(r_u + G'dλ), and α G'dλ = s − s_next
            u = NextLogits(u, s_next - s - alpha * r_u)
            w = op.Max(w * (one - alpha * zeta), slack_smallest)
            s = s_next

            better = op.And(gap < best_gap, unsolved)
            best_lam = op.Where(better, lam, best_lam)
            best_gap = op.Where(better, gap, best_gap)
            unsolved = best_gap > enough
            going = op.CastLike(op.ReduceSum(op.CastLike(unsolved, i), keepdims=0), going)
            return going, lam, u, w, s, best_lam, best_gap, unsolved

        going = op.Cast(op.ReduceSum(op.CastLike(unsolved, k), keepdims=0), to=onnx.TensorProto.BOOL)
        lam, u, w, s, best_lam, best_gap, unsolved = op.Loop(
            steps, going, lam, u, w, s, lam, best_gap, unsolved, body=step
        )

        s_best = -(best_lam @ plain_G)
        y_best = Point(s_best)
        v_best = plain_e + y_best @ op.Transpose(plain_G * one, perm=[0, 2, 1])
        gap_best = op.ReduceMax(v_best, [2], keepdims=1) - op.ReduceSum(best_lam * v_best, [2], keepdims=1)
        poison = op.Constant(value=ZERO) * gap_best  # NaN where any cut is NaN or infinite, else 0
        dual = op.ReduceSum(best_lam * plain_e, [2], keepdims=1) - Conjugate(s_best)
        y_double = y_best + poison
        y_out = op.CastLike(y_double, slopes)
        rounding = op.ReduceMax(op.Abs(op.Cast(y_out, to=DOUBLE) - y_double), [2], keepdims=1) + poison
        off_simplex = op.Abs(op.ReduceSum(best_lam, [2], keepdims=1) - one)
        y = op.Squeeze(y_out, [1])
        lam_out = op.CastLike(op.Squeeze(best_lam, [1]), slopes)
        lower_bound = op.Squeeze(dual + poison, [1, 2])
        residual = op.Squeeze(op.Concat(rounding, off_simplex, gap_best, axis=2), [1])
        return y, lam_out, lower_bound, residual

    return BundleSolve


def adjoint_body(parts: Parts) -> Any:
    """The KKT adjoint of one domain; a function of onnxscript, to be named by the caller."""
    Plain, Point, Curvature = parts.Plain, parts.Point, parts.Curvature

    @script(DOMAIN, default_opset=op)
    def BundleAdjoint(slopes, offsets, lam, y_bar):
        """c_y [B, n] and c_λ [B, k] for a loss with ∂ℓ/∂y = ȳ at the solution λ of the k-cut model.

        Inputs slopes G [B, k, n], offsets e [B, k], lam [B, k], y_bar [B, n]: all float or all double, and so are the
        outputs; computed in double. Vectors are rows here, [B, 1, k] and [B, 1, n]. The formulas are those of
        bundle_entropy_adjoint.py, with the domain's y(s) and D.
        """
        given_e = op.Unsqueeze(op.Cast(offsets, to=DOUBLE), [1])
        G, e = Plain(op.Cast(slopes, to=DOUBLE), given_e)
        row = op.Unsqueeze(op.Cast(lam, to=DOUBLE), [1])
        ybar = op.Unsqueeze(op.Cast(y_bar, to=DOUBLE), [1])
        N = -op.Transpose(G, perm=[0, 2, 1])  # −G', for the reason given in bundle_entropy_solve
        k = op.Shape(slopes, start=1, end=2)
        I = op.EyeLike(op.ConstantOfShape(op.Concat(k, k, axis=0)), dtype=DOUBLE)  # noqa: E741

        s = -(row @ G)
        v = e - Point(s) @ N
        w = op.ReduceMax(v, [2], keepdims=1) - v
        q = op.Sqrt(row)
        qSq = -(Curvature(s, G * op.Transpose(q, perm=[0, 2, 1])) @ (N * q))
        trace = op.ReduceSum(qSq * I, [1, 2], keepdims=1)
        delta = op.Constant(value=TRACE_RIDGE) * trace + op.Constant(value=SMALLEST_RIDGE)
        A = qSq + (w + delta) * I
        r = Curvature(s, ybar) @ N
        X0, X1 = op.Split(SolveSPD(A, op.Concat(q * r, q, axis=1), I), axis=1, num_outputs=2)
        qX0 = op.ReduceSum(q * X0, [2], keepdims=1)
        qX1 = op.ReduceSum(q * X1, [2], keepdims=1)
        cl = q * (X0 - X1 * (qX0 / qX1))
        cy = -Curvature(s, ybar + cl @ G)
        c_y = op.CastLike(op.Squeeze(cy, [1]), slopes)
        c_lam = op.CastLike(op.Squeeze(cl, [1]), slopes)
        return c_y, c_lam

    return BundleAdjoint
