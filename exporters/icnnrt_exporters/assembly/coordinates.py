"""y = shift + scale∘p in a graph: the solver works in p, the energy in y, and `icnnrt.mathematics.domains` says which p
is which y.

=========  ============================  =====
domain     y                             R(p)
=========  ============================  =====
unit_box   p                             −H(p)
box        lower + (upper − lower)∘p     −H(p)
simplex    p                             Σ p log p
space      p/√μ                          ½ ‖p‖²
=========  ============================  =====

Where y = p no node is added.
"""

import math

import numpy as np
import onnx_ir as ir

from icnnrt.format.manifest import Domain
from icnnrt.mathematics.domains import MODELS
from icnnrt_exporters.operators.traced import nodes_of
from icnnrt_exporters.surgery import Ops, value

DOUBLE = ir.DataType.DOUBLE


def factor(op: Ops, c: float, like: ir.Value) -> ir.Value:
    """c in every entry of a tensor [B, n].

    Not a scalar: ONNX Runtime folds a product with a constant of one entry into the MatMul beside it, where it is
    float32 even in a graph of float64 (MatMulScaleFusion, onnxruntime 1.31: off by 5e-9).
    """
    assert like.dtype is not None
    return op("Expand", op.constant([[c]], like.dtype), op("Shape", like))


class Coordinates:
    """The change of variables of one graph. `inputs` are the bounds of a box, [B, n] each, or nothing.

    `prepare` comes first: what it adds depends on the bounds alone, so it stands before any loop.
    """

    def __init__(self, domain: Domain, T: ir.DataType, n: int) -> None:
        self.domain, self.model = domain, MODELS[domain.kind]
        self.dtype, self.n = T, n
        self.centre = self.model.centre(n)
        self.inputs = [value(name, T, ["batch", n]) for name in ("lower", "upper")] if self.box else []
        scaled = domain.kind == "space" and domain.mu != 1.0
        self.identity = not (self.box or scaled)
        self._shift: dict[int, ir.Value] = {}  # by rank
        self._scale: dict[int, ir.Value] = {}

    @property
    def box(self) -> bool:
        return self.domain.kind == "box"

    def prepare(self, op: Ops, like: ir.Value, ranks: tuple[int, ...] = (2,)) -> None:
        """Shift and scale for points [B, n], as `like` is (rank 2), and for one point a cut, [B, K, n] (rank 3)."""
        if self.identity:
            return
        if not self.box:
            assert self.domain.mu is not None
            self._scale = {2: factor(op, 1.0 / math.sqrt(self.domain.mu), like)}
            if 3 in ranks:
                self._scale[3] = op("Unsqueeze", self._scale[2], op.constant([1]))
            return
        lower, upper = self.inputs
        # Where lower > upper there is no y: NaN there is NaN in the slopes, and so in that sample's whole answer.
        width = op("Where", op("LessOrEqual", lower, upper), op("Sub", upper, lower), op.constant(np.nan, self.dtype))
        self._shift, self._scale = {2: lower}, {2: width}
        if 3 in ranks:
            one = op.constant([1])
            self._shift[3], self._scale[3] = op("Unsqueeze", lower, one), op("Unsqueeze", width, one)

    def y(self, op: Ops, p: ir.Value, rank: int = 2) -> ir.Value:
        """shift + scale∘p."""
        if self.identity:
            return p
        moved = op("Mul", self._scale[rank], p)
        return op("Add", self._shift[rank], moved) if self.box else moved

    def answer(self, op: Ops, p: ir.Value) -> ir.Value:
        """The same, and no more than upper, which rounding can exceed."""
        return op("Min", self.y(op, p), self.inputs[1]) if self.box else self.y(op, p)

    def scaled(self, op: Ops, v: ir.Value, rank: int = 2) -> ir.Value:
        """scale∘v: a slope in y as one in p, or a seed in p as one in y."""
        return v if self.identity else op("Mul", self._scale[rank], v)

    def p(self, op: Ops, y: ir.Value) -> ir.Value:
        """The p of a y in the domain; ½ where a box has no width."""
        if self.identity:
            return y
        if not self.box:
            return op("Div", y, self._scale[2])
        zero, one = op.constant(0.0, self.dtype), op.constant(1.0, self.dtype)
        fixed = op("Equal", self._scale[2], zero)
        part = op("Div", op("Sub", y, self._shift[2]), op("Where", fixed, one, self._scale[2]))
        return op("Clip", op("Where", fixed, op.constant(0.5, self.dtype), part), zero, one)

    def p_of_cuts(self, op: Ops, slopes: ir.Value, lam: ir.Value, y: ir.Value) -> ir.Value:
        """The p of the answer y. In a box σ(−G'λ), as (y − lower)/width loses the digits that y and lower share."""
        if not self.box:
            return self.p(op, y)
        row = op("Unsqueeze", op("Cast", lam, to=DOUBLE), op.constant([1]))
        s = op("Neg", op("MatMul", row, op("Cast", slopes, to=DOUBLE)))
        p = nodes_of(op, self.model.point, op("Squeeze", s, op.constant([1])))
        return op("Cast", p, to=self.dtype)

    def regulariser(self, op: Ops, p: ir.Value) -> ir.Value:
        """R(p) [B], double."""
        found = nodes_of(op, self.model.regulariser, op("Cast", p, to=DOUBLE))
        return op("Squeeze", found, op.constant([1]))
