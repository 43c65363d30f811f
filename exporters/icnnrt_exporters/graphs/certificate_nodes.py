"""What `icnnrt.mathematics.certificate` says of rounding, as nodes: for the graphs that leave samples out by
themselves."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from icnnrt.mathematics.certificate import DIGITS, ROUNDING, UNCERTAIN
from icnnrt.mathematics.domains import SIMPLEX, SPACE, Domain
from icnnrt_exporters.surgery import Ops

DOUBLE = ir.DataType.DOUBLE
SMALLEST = 2.2250738585072014e-308  # 0 log 0 = 0
EPS = {ir.DataType.FLOAT: 2.0**-23, DOUBLE: 2.0**-52}


class Rounding:
    """`rounding` and `known` of the answers of one argmin.

    of: slopes, offsets, lam, cut_points, energy, lower_bound and gap by these names; bounds: lower and upper of a box.
    """

    def __init__(self, op: Ops, of: Mapping[str, ir.Value], domain: Domain, bounds: Sequence[ir.Value]) -> None:
        slopes, offsets = of["slopes"], of["offsets"]
        assert slopes.dtype is not None
        self.op, self.domain, self.of, self.eps = op, domain, of, EPS[slopes.dtype]
        self.G = op("Cast", slopes, to=DOUBLE)  # where squares of float32 do not overflow
        self.one, self.axis, self.last = op.constant(1.0, DOUBLE), op.constant([1]), op.constant([2])
        self.magnified = self._magnification(*bounds) if bounds else None
        size = op("Abs", op("Cast", offsets, to=DOUBLE))
        self.size = op("Add", size, self._reach())  # [B, K]

    def _magnification(self, lower: ir.Value, upper: ir.Value) -> ir.Value:
        """max(|l|, |u|) / (u − l), at most 1/eps; 0 where u = l: [B, n]."""
        op = self.op
        low, high = (op("Cast", v, to=DOUBLE) for v in (lower, upper))
        width, none = op("Sub", high, low), op.constant(0.0, DOUBLE)
        wide = op("Greater", width, none)
        times = op("Div", op("Max", op("Abs", low), op("Abs", high)), op("Where", wide, width, self.one))
        return op("Where", wide, op("Min", times, op.constant(1.0 / self.eps, DOUBLE)), none)

    def _reach(self) -> ir.Value:
        """`Domain.reach`, in R^n over the cut points too, in a box with what its map magnifies: [B, K]."""
        op, wide = self.op, self.op("Abs", self.G)
        if self.domain is SIMPLEX:
            return op("ReduceMax", wide, self.last, keepdims=0)
        if self.domain is SPACE:
            points = op("Cast", self.of["cut_points"], to=DOUBLE)
            lengths, far = (op("ReduceL2", v, self.last, keepdims=0) for v in (self.G, points))
            farthest = op("ReduceMax", op("Max", lengths, far), self.axis, keepdims=1)
            return op("Mul", lengths, farthest)
        times = op.constant(0.5, DOUBLE)
        if self.magnified is not None:
            times = op("Unsqueeze", op("Add", times, self.magnified), self.axis)
        return op("ReduceSum", op("Mul", wide, times), self.last, keepdims=0)

    def rounding(self) -> ir.Value:
        """64 eps max(1, |energy|, max_i size_i): [B]."""
        op = self.op
        largest = op("ReduceMax", self.size, self.axis, keepdims=0)
        scale = op("Max", self.one, op("Abs", self.of["energy"]), largest)
        return op("Mul", op.constant(ROUNDING * self.eps, DOUBLE), scale)

    def uncertainty(self) -> ir.Value:
        """max(2 eps max(1, |energy|, Σ_i λ_i size_i + Σ_j max_i |g_ij| |y_j|), −gap), and what a box adds: [B]."""
        op = self.op

        def total_of(v: ir.Value) -> ir.Value:
            return op("ReduceSum", v, self.axis, keepdims=0)

        lam = op("Cast", self.of["lam"], to=DOUBLE)
        s = op("Neg", op("Squeeze", op("MatMul", op("Unsqueeze", lam, self.axis), self.G), self.axis))
        if self.domain is SPACE:
            p = op("Abs", s)
        elif self.domain is SIMPLEX:
            p = op("Softmax", s, axis=-1)
        else:
            p = op("Sigmoid", s)
        steepest = op("ReduceMax", op("Abs", self.G), self.axis, keepdims=0)
        held = op("Add", total_of(op("Mul", lam, self.size)), total_of(op("Mul", steepest, p)))
        scale = op("Max", self.one, op("Abs", self.of["energy"]), held)
        total = op("Max", op("Mul", op.constant(UNCERTAIN * self.eps, DOUBLE), scale), op("Neg", self.of["gap"]))
        if self.magnified is None:
            return total
        # |H(p + δ) − H(p)| <= min(H(δ), δ (|s| + 1)), s the logit of p
        δ = op("Min", op("Mul", op.constant(self.eps, DOUBLE), self.magnified), op.constant(0.5, DOUBLE))
        tiny = op.constant(SMALLEST, DOUBLE)
        parts = [op("Mul", q, op("Log", op("Max", q, tiny))) for q in (δ, op("Sub", self.one, δ))]
        linear = op("Mul", δ, op("Add", op("Abs", s), self.one))
        return op("Add", total, total_of(op("Min", op("Neg", op("Add", *parts)), linear)))

    def known(self) -> ir.Value:
        """The energy is uncertain by no more than 1e-3 max(1, |lower bound|): [B] bool, false for NaN."""
        op = self.op
        unit = op("Max", self.one, op("Abs", self.of["lower_bound"]))
        return op("LessOrEqual", self.uncertainty(), op("Mul", op.constant(DIGITS, DOUBLE), unit))
