"""The graph x, G, h, A, b, bounds -> y*: the bundle method of `icnnrt.mathematics.polyhedron`, traced around an energy
and the operator that solves each model."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from icnnrt.format.manifest import OP_DOMAIN, PolyhedronSpec
from icnnrt.format.signatures import NAMES, Shape, arrays_of_polyhedron
from icnnrt.mathematics.polyhedron import argmin
from icnnrt.mathematics.polyhedron_programs import Polyhedron, Programs
from icnnrt.mathematics.qp_reference import QP, STEPS, QPReference
from icnnrt_exporters.operators.spliced import Spliced
from icnnrt_exporters.operators.traced import Symbol, Traced
from icnnrt_exporters.surgery import dismantle, dtype_of, static, value
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

INT32, INT64, DOUBLE = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.DOUBLE


def polyhedron_graph(head: ir.Model, spec: PolyhedronSpec) -> ir.Graph:
    """From value and gradient (θ, x, y -> f, gradient) to the whole of `icnnrt.mathematics.polyhedron.argmin`.

    Inputs: x, y_init [B, n], G, h, A, b, lower, upper, and, with defaults, `iterations`, `mu` and `tolerance`; all but
    x is float64 whatever the package is. There are as many slots as cuts were needed.
    """
    (*weights, x, y), results, nodes, constants = dismantle(head.graph, "energy")
    T, n = dtype_of(y), static(y, 1)
    _, told_of = NAMES["argmin_polyhedron"]
    xp, declare = Traced("argmin", rank=2), Declared(x, T, n)
    y_init = xp.of(declare.value("y_init"))
    given, P = declare.constraints(xp, y_init)
    settings = [declare.value(name, getattr(spec, name)) for name in ("iterations", "mu", "tolerance")]
    energy = Spliced(xp, nodes, {y: y_init.value}, results)

    def value_and_gradient(y: Symbol) -> tuple[Symbol, Symbol]:
        if T == DOUBLE:
            f, g = energy(y)
            return xp.column(f), g
        # f is told at y along the cut that touches at ŷ, so that every cut is one of f.
        rounded = xp.cast(y, T)
        f, g = map(xp.double, energy(rounded))
        return xp.column(f) + xp.sum(g * (y - xp.double(rounded))), g

    def solve(programs: Programs, qp: QP, σ: Symbol | None) -> QPReference:
        return programs.solved(operator(xp), qp, σ)

    eps = float(np.finfo(T.numpy()).eps)
    known, (iterations, mu, tolerance) = all_finite(xp, xp.of(x)), map(xp.of, settings)
    found, multipliers = argmin(xp, P, value_and_gradient, solve, y_init, known, iterations, mu, tolerance, eps)
    told = found._replace(lam=None)._asdict() | dict(zip(("lam", "nu", "bounds"), multipliers, strict=True))
    told["cut_lam"] = found.lam
    outputs = [declare.output(xp, name, told[name]) for name in told_of]
    graph = xp.graph([x, y_init.value, *given, *settings, *weights], outputs, constants, "argmin_polyhedron")
    for v in settings:
        graph.register_initializer(v)
    # What tells its size is not taken for the largest there is, where a session asks how many samples it runs at once.
    graph.opset_imports.update({"": OPSET, OP_DOMAIN: OP_VERSION})
    ShapeInferencePass(check_type=False, strict_mode=False)(ir.Model(graph, ir_version=IR_VERSION))
    return graph


class Declared:
    """What the graphs over polyhedra take and give by its name, with the dtypes and shapes that icnnrt expects."""

    def __init__(self, x: ir.Value, T: ir.DataType, n: int) -> None:
        assert x.shape is not None
        context = tuple(static(x, axis) for axis in range(1, len(x.shape)))
        self._arrays = arrays_of_polyhedron(T.numpy().name, context, n)

    def _of(self, name: str) -> tuple[ir.DataType, Shape]:
        dtype, shape = self._arrays[name]
        return ir.DataType.from_numpy(np.dtype(dtype)), shape

    def value(self, name: str, default: float | None = None) -> ir.Value:
        """An input, which may have a default."""
        v = value(name, *self._of(name))
        if default is not None:
            v.const_value = ir.tensor(default, dtype=v.dtype, name=name)
        return v

    def output(self, xp: Traced, name: str, v: Symbol) -> ir.Value:
        dtype, shape = self._of(name)
        return xp.output(xp.cast(v, dtype), name, shape)

    def constraints(self, xp: Traced, like: Symbol) -> tuple[list[ir.Value], Polyhedron]:
        """The inputs that say where y lies, and all of them for every sample of `like` [B, n]."""
        given = [self.value(name) for name in Polyhedron._fields]

        def every(v: ir.Value) -> Symbol:
            one = xp.of(v)
            rest = xp.node("Shape", one, result=INT64, rank=1, start=1)
            wide = xp.node("Expand", one, xp.node("Concat", xp.size(like, 0), rest, axis=0), rank=one.rank)
            wide.value.shape = ir.Shape(["batch", *one.shape[1:]])
            return wide

        return given, Polyhedron(*map(every, given))


def operator(xp: Traced) -> Callable[[QP], QPReference]:
    """QPSolve, cold and without lower bounds of rows."""
    absent = xp.constant(np.zeros((1, 0)), DOUBLE)

    def solve(qp: QP) -> QPReference:
        given = (qp.Q, qp.p, qp.G, absent, qp.h, qp.A, qp.b, qp.lower, qp.upper, absent)
        results, ranks = [*[DOUBLE] * 7, INT32, DOUBLE], [*[2] * 7, 1, 2]
        return QPReference(*xp.nodes("QPSolve", *given, results=results, ranks=ranks, domain=OP_DOMAIN, steps=STEPS))  # type: ignore[arg-type]

    return solve


def all_finite(xp: Traced, a: Symbol) -> Symbol:
    """[B, 1]: each sample's numbers are."""
    a = xp.node("Flatten", a, rank=2) if a.rank > 1 else xp.column(a)
    return xp.sum(a - a) >= 0.0
