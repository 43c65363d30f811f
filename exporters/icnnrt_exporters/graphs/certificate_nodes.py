"""`icnnrt.mathematics.rounding` as nodes: for the graphs that leave samples out by themselves."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from icnnrt.mathematics import rounding
from icnnrt.mathematics.domains import Domain
from icnnrt_exporters.operators.traced import DOUBLE, Symbol, Traced
from icnnrt_exporters.surgery import Ops, dtype_of

EPS = {ir.DataType.FLOAT: 2.0**-23, DOUBLE: 2.0**-52}


class Rounding:
    """`rounding` and `known` of the answers of one argmin.

    of: slopes, offsets, lam, cut_points, energy, lower_bound and gap by these names; bounds: lower and upper of a box.
    """

    def __init__(self, op: Ops, of: Mapping[str, ir.Value], domain: Domain, bounds: Sequence[ir.Value]) -> None:
        slopes = of["slopes"]
        self.op, self.domain, self.eps = op, domain, EPS[dtype_of(slopes)]
        self.xp = xp = Traced(f"{op.prefix}/rounding/{len(op.nodes)}", op)

        def row(v: ir.Value) -> Symbol:
            """[B, m] -> [B, 1, m], double."""
            return xp.row(double(v, 2))

        def double(v: ir.Value, rank: int = 3) -> Symbol:
            # Even of a double: slopes may come of a transpose, which must not stand right before a product.
            return xp.node("Cast", xp.of(v, rank=rank), result=DOUBLE, to=DOUBLE)

        self.magnified = None
        if bounds:
            lower, upper = map(row, bounds)
            self.magnified = rounding.magnification(xp, lower, upper, self.eps)
        self.G, self.lam = double(slopes), row(of["lam"])
        self.size = rounding.sizes(xp, domain, self.G, row(of["offsets"]), double(of["cut_points"]), self.magnified)
        figures = (of["energy"], of["lower_bound"], of["gap"])
        self.energy, self.lower_bound, self.gap = (xp.row(xp.row(xp.of(v, rank=1))) for v in figures)

    def rounding(self) -> ir.Value:
        """64 eps max(1, |energy|, max_i size_i): [B]."""
        return self._flat(rounding.rounding(self.xp, self.energy, self.size, self.eps))

    def known(self) -> ir.Value:
        """The energy is uncertain by no more than 1e-3 max(1, |lower bound|): [B] bool, false for NaN."""
        uncertain = rounding.uncertainty(
            self.xp, self.domain, self.energy, self.gap, self.G, self.size, self.lam, self.magnified, self.eps
        )
        return self._flat(rounding.known(self.xp, uncertain, self.lower_bound))

    def _flat(self, v: Symbol) -> ir.Value:
        return self.xp.node("Squeeze", v, self.xp.constant([1, 2])).value
