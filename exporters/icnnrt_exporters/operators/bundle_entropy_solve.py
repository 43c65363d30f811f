# mypy: disable-error-code="no-untyped-def"
"""The body of ai.icnnrt::BundleEntropySolve, the ONNX twin of `icnnrt.mathematics.reference.bundle_entropy_solve`.

The method and its symbols are the reference's. Three things are said differently, to the same effect and with fewer
nodes, since every node of a small graph costs as much as its arithmetic:

- σ(s) is 1 / (1 + e^−s): overflow gives 0, as it should, while ONNX Runtime's Sigmoid for float64 is 1 − 1/(1 + e^s)
  for negative s and loses the lower tail.
- Steps are relative, η = dλ/λ and −ζ = dw/w, and complementarity is in units of c = λ∘w. Then A = G D G' + diag(w/λ)
  and λ∘dw + w∘dλ = r_c read −ζ + η = r_c/c, and the step to the boundary is 1 / max(−η, ζ).
- The height t is eliminated: dλ = P r with P = A⁻¹ − A⁻¹1 1'A⁻¹ / 1'A⁻¹1, and P does not see a constant in r.
"""

from typing import Final

import onnx
from onnxscript import BOOL, INT64, graph, script

from icnnrt.mathematics.reference import BACKTRACK, EPS, LAM_FLOOR, LOGIT_BOUND, LOGIT_STEP, RELUCTANCE, SLACK_FLOOR
from icnnrt_exporters.operators.solve_spd import DOMAIN, ONE, InverseSPD, double, op

DOUBLE: Final = onnx.TensorProto.DOUBLE


def _scalar(value: float) -> onnx.TensorProto:
    """A float64 scalar: the bounds of Clip have no dimension."""
    return onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, [], [value])


def _column(*values: float) -> onnx.TensorProto:
    """Float64, [1, len(values), 1]: one row for each trial step."""
    return onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, [1, len(values), 1], values)


ZERO: Final = double(0.0)
HALF: Final = double(0.5)
TENTH: Final = double(0.1)
NINE_TENTHS: Final = double(0.9)
ROUNDING_START: Final = double(10.0 * EPS)
ROUNDING_ENOUGH: Final = double(2.0 * EPS)
TO_BOUNDARY: Final = double(0.99)
CUBE: Final = double(3.0)
LAM_SMALLEST: Final = double(LAM_FLOOR)
SLACK_SMALLEST: Final = double(SLACK_FLOOR)
STEP_LENGTHS: Final = _column(*BACKTRACK)
STEP_RELUCTANCE: Final = _column(*RELUCTANCE)
COLD_LOGIT, WARM_LOGIT = double(2.0), double(4.0)
CLIP_0, CLIP_1 = _scalar(0.0), _scalar(1.0)
STEP_LOW, STEP_HIGH = _scalar(-LOGIT_STEP), _scalar(LOGIT_STEP)
LOGIT_LOW, LOGIT_HIGH = _scalar(-LOGIT_BOUND), _scalar(LOGIT_BOUND)


@script(DOMAIN, default_opset=op)
def BundleEntropySolve(slopes, offsets, lam_start, steps: int):
    """Solve max over λ in the simplex of e'λ + ½ 1's − Σ softplus(s), s = −G'λ; B samples of k cuts.

    Inputs slopes G [B, k, n], centred offsets e [B, k], lam_start [B, k_prev] with 0 <= k_prev <= k, multipliers of
    the first cuts (k_prev = 0: cold start): all float or all double. Attribute steps: the most steps taken.

    Outputs y [B, n] and lam [B, k] of the inputs' type, lower_bound [B] and residual [B, 3] double. lam is the best
    iterate and y = σ(−G'lam). residual is what rounding took from y on the way out, |1'λ − 1|, and the duality gap
    max v − λ'v of the model. A sample with NaN or infinite cuts has y, lower_bound and residual NaN, alone.
    Vectors are rows inside, [B, 1, k] and [B, 1, n], the trials of a step [B, 3, k] and [B, 3, n]; all is double.
    """
    one = op.Constant(value=ONE)
    half = op.Constant(value=HALF)
    lam_smallest = op.Constant(value=LAM_SMALLEST)
    to_boundary = op.Constant(value=TO_BOUNDARY)
    slack_smallest = op.Constant(value=SLACK_SMALLEST)
    clip_0, clip_1 = op.Constant(value=CLIP_0), op.Constant(value=CLIP_1)
    cube = op.Constant(value=CUBE)
    step_low, step_high = op.Constant(value=STEP_LOW), op.Constant(value=STEP_HIGH)
    logit_low, logit_high = op.Constant(value=LOGIT_LOW), op.Constant(value=LOGIT_HIGH)
    step_lengths = op.Constant(value=STEP_LENGTHS)
    reluctance = op.Constant(value=STEP_RELUCTANCE)

    G = op.Cast(slopes, to=DOUBLE)
    # −G', since ONNX Runtime up to 1.21 fuses a bare transpose and a product of doubles into one it has no kernel for.
    N = -op.Transpose(G, perm=[0, 2, 1])
    e = op.Unsqueeze(op.Cast(offsets, to=DOUBLE), [1])
    k = op.Shape(slopes, start=1, end=2)
    I = op.EyeLike(op.ConstantOfShape(op.Concat(k, k, axis=0)), dtype=DOUBLE)  # noqa: E741

    # start: λ = 1/k, warm 0.9 [λ_prev; 0] + 0.1/k
    k_prev = op.Shape(lam_start, start=1, end=2)
    lam_prev = op.Pad(op.Cast(lam_start, to=DOUBLE), op.Concat([0, 0, 0], k - k_prev, axis=0))
    lam_mixed = op.Constant(value=NINE_TENTHS) * lam_prev + op.Constant(value=TENTH) / op.Cast(k, to=DOUBLE)
    lam = op.Unsqueeze(lam_mixed / op.ReduceSum(lam_mixed, [1], keepdims=1), [1])
    bound = op.Where(op.Equal(k_prev, [0]), op.Constant(value=COLD_LOGIT), op.Constant(value=WARM_LOGIT))
    s = -(lam @ G)
    v = e + (half - op.Reciprocal(one + op.Exp(-s))) @ N
    best_gap = op.ReduceMax(v, [2], keepdims=1) - op.ReduceSum(lam * v, [2], keepdims=1)
    # what rounding may do to v for any y in the box: eps (|e_i| + ½ ‖g_i‖₁)
    largest = op.Abs(e) + half * op.Transpose(op.ReduceSum(op.Abs(G), [2], keepdims=1), perm=[0, 2, 1])
    enough = op.Constant(value=ROUNDING_ENOUGH) * (one + op.ReduceMax(largest, [2], keepdims=1))
    unsolved = best_gap > enough  # false for NaN: such a sample holds up nobody

    # u = clip(s, ±bound);  w = M − v + δ with M = max v, δ = λ'(M − v) + 10 eps (1 + |M|)
    u = op.Max(op.Min(s, bound), -bound)
    v = e + (half - op.Reciprocal(one + op.Exp(-u))) @ N
    M = op.ReduceMax(v, [2], keepdims=1)
    w = M - v
    w = w + (op.ReduceSum(lam * w, [2], keepdims=1) + op.Constant(value=ROUNDING_START) * (one + op.Abs(M)))

    # An explicit Loop: of a Python loop with several state variables onnxscript 0.7 may mix up the outputs.
    @graph()
    def step(i: INT64, going: BOOL, lam, u, w, s, best_lam, best_gap, unsolved):
        # A = G D G' + diag(w/λ),  P = A⁻¹ − A⁻¹1 1'A⁻¹ / 1'A⁻¹1
        E = op.Exp(-u)
        y = op.Reciprocal(one + E)
        D = E * y * y  # σ(u) σ(−u); |u| <= 45 keeps E finite
        A_inv = InverseSPD(I * (w / lam) - (G * D) @ N, I)
        A_inv_1 = op.ReduceSum(A_inv, [1], keepdims=1)
        P = A_inv - op.Transpose(A_inv_1, perm=[0, 2, 1]) * (A_inv_1 / op.ReduceSum(A_inv_1, [2], keepdims=1))
        # r = r_d − w = v − G(D∘r_u) up to a constant;  r_u = u + G'λ
        r_u = u - s
        r = e + (half - y + D * r_u) @ N
        r = r - op.ReduceMax(r, [2], keepdims=1)
        c = lam * w
        mu = op.ReduceMean(c, [2], keepdims=1)

        # predictor, r_c = −c:  dλ = P r,  ζ = 1 + η,  a = min(1, 1 / max(−η, ζ))
        eta = r @ P / lam
        a = op.Reciprocal(op.ReduceMax(op.Max(-eta, one + eta, one), [2], keepdims=1))
        # (λ + a dλ)(w + a dw) = c∘((1 − a) − h) and a² dλ dw = −c∘h with h = aη(a + aη)
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
        trial_slope = trial @ G  # −s
        trial_v = e + (half - op.Reciprocal(one + op.Exp(trial_slope))) @ N
        trial_gap = op.ReduceMax(trial_v, [2], keepdims=1) - op.ReduceSum(trial * trial_v, [2], keepdims=1)
        chosen = op.ArgMin(trial_gap * reluctance, axis=1, keepdims=1)
        alpha = op.GatherND(lengths, chosen, batch_dims=1)
        gap = op.GatherND(trial_gap, chosen, batch_dims=1)
        lam = op.GatherND(trial, chosen, batch_dims=1)
        s_next = -op.GatherND(trial_slope, chosen, batch_dims=1)

        # du = −(r_u + G'dλ), and α G'dλ = s − s_next
        du = op.Clip(s_next - s - alpha * r_u, step_low, step_high)
        u = op.Clip(u + du, logit_low, logit_high)
        w = op.Max(w * (one - alpha * zeta), slack_smallest)
        s = s_next

        better = op.And(gap < best_gap, unsolved)
        best_lam = op.Where(better, lam, best_lam)
        best_gap = op.Where(better, gap, best_gap)
        unsolved = best_gap > enough
        going = op.CastLike(op.ReduceSum(op.CastLike(unsolved, i), keepdims=0), going)
        return going, lam, u, w, s, best_lam, best_gap, unsolved

    going = op.Cast(op.ReduceSum(op.CastLike(unsolved, k), keepdims=0), to=onnx.TensorProto.BOOL)
    lam, u, w, s, best_lam, best_gap, unsolved = op.Loop(steps, going, lam, u, w, s, lam, best_gap, unsolved, body=step)

    slope = best_lam @ G  # −s
    y_best = op.Reciprocal(one + op.Exp(slope))
    v_best = e + (half - y_best) @ N
    gap_best = op.ReduceMax(v_best, [2], keepdims=1) - op.ReduceSum(best_lam * v_best, [2], keepdims=1)
    poison = op.Constant(value=ZERO) * gap_best  # NaN where any cut is NaN or infinite, else 0
    # ½ s − softplus(s) = −(½|s| + log(1 + e^−|s|)), which does not cancel for large |s|
    size = op.Abs(slope)
    dual = op.ReduceSum(best_lam * e, [2], keepdims=1) - op.ReduceSum(
        half * size + op.Log(one + op.Exp(-size)), [2], keepdims=1
    )
    y_double = y_best + poison
    y_out = op.CastLike(y_double, slopes)
    rounding = op.ReduceMax(op.Abs(op.Cast(y_out, to=DOUBLE) - y_double), [2], keepdims=1) + poison
    off_simplex = op.Abs(op.ReduceSum(best_lam, [2], keepdims=1) - one)
    y = op.Squeeze(y_out, [1])
    lam_out = op.CastLike(op.Squeeze(best_lam, [1]), slopes)
    lower_bound = op.Squeeze(dual + poison, [1, 2])
    residual = op.Squeeze(op.Concat(rounding, off_simplex, gap_best, axis=2), [1])
    return y, lam_out, lower_bound, residual
