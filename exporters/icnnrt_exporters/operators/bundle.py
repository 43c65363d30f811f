"""The bodies of the bundle operators: `icnnrt.mathematics.cut_model` and `kkt_adjoint`, traced for a domain."""

from collections.abc import Sequence

import onnx

from icnnrt.mathematics import cut_model
from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.kkt_adjoint import kkt_adjoint
from icnnrt_exporters.operators.functions import attribute, double, flat, function, row
from icnnrt_exporters.operators.traced import Symbol, Traced


def solve_body(at: Domain) -> list[onnx.FunctionProto]:
    """`Domain.operators` + "Solve": the solution of the model of k cuts.

    Inputs slopes G [B, k, n], centred offsets e [B, k], lam_start [B, k_prev] with 0 <= k_prev <= k, multipliers of the
    first cuts (k_prev = 0: cold start): all float or all double. Attribute steps: the most steps taken.

    Outputs y [B, n] and lam [B, k] of the inputs' type, lower_bound [B] and residual [B, 3] double. lam is the best
    iterate and y = y(−G'lam). residual is what rounding took from y on the way out, |1'λ − 1|, and the duality gap
    max v − λ'v of the model. A sample with NaN or infinite cuts has y, lower_bound and residual NaN, alone.
    """

    def traced(xp: Traced, slopes: Symbol, offsets: Symbol, lam_start: Symbol) -> Sequence[Symbol]:
        G, e, before = double(xp, slopes), row(xp, offsets), row(xp, lam_start)
        found = cut_model.solve(xp, at, G, e, before, attribute(xp, "steps"))
        y = xp.node("CastLike", found.y, slopes)
        rounding = xp.max(abs(double(xp, y) - found.y)) + 0.0 * found.gap
        return [
            flat(xp, y),
            xp.node("CastLike", flat(xp, found.lam), slopes),
            xp.node("Squeeze", found.lower_bound, xp.constant([1, 2])),
            flat(xp, xp.concat([rounding, found.feasibility, found.gap])),
        ]

    inputs, outputs = ["slopes", "offsets", "lam_start"], ["y", "lam", "lower_bound", "residual"]
    return function(at.operators + "Solve", traced, inputs, outputs, solve_body.__doc__, ["steps"])


def adjoint_body(at: Domain) -> list[onnx.FunctionProto]:
    """`Domain.operators` + "Adjoint": c_y [B, n] and c_λ [B, k] for a loss with ∂ℓ/∂y = ȳ at the solution λ.

    Inputs slopes G [B, k, n], offsets e [B, k], lam [B, k], y_bar [B, n]: all float or all double, and so are the
    outputs; computed in double.
    """

    def traced(xp: Traced, slopes: Symbol, *rows: Symbol) -> Sequence[Symbol]:
        e, lam, y_bar = (row(xp, a) for a in rows)
        found = kkt_adjoint(xp, at, double(xp, slopes), e, lam, y_bar)
        return [xp.node("CastLike", flat(xp, c), slopes) for c in found]

    inputs, outputs = ["slopes", "offsets", "lam", "y_bar"], ["c_y", "c_lam"]
    return function(at.operators + "Adjoint", traced, inputs, outputs, adjoint_body.__doc__)
