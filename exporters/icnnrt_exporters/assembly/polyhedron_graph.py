"""The graph x, G, h, A, b, bounds -> y*: the bundle method of `icnnrt.mathematics.polyhedron`, traced around an energy
and the operator that solves each model."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from icnnrt.format.manifest import PolyhedronSpec
from icnnrt.format.package import OP_DOMAIN
from icnnrt.mathematics.polyhedron import argmin
from icnnrt.mathematics.polyhedron_programs import Polyhedron, Programs
from icnnrt.mathematics.qp_reference import QP, STEPS, QPReference
from icnnrt_exporters.operators.spliced import Spliced
from icnnrt_exporters.operators.traced import Symbol, Traced
from icnnrt_exporters.surgery import describe, dismantle, static, value
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

INT32, INT64, DOUBLE = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.DOUBLE


def polyhedron_graph(head: ir.Model, spec: PolyhedronSpec) -> ir.Graph:
    """From value and gradient (θ, x, y -> f, gradient) to the whole of `icnnrt.mathematics.polyhedron.argmin`.

    Inputs: x, y_init [B, n], G, h, A, b, lower, upper, and, with defaults, `iterations`, `mu` and `tolerance`; all but
    x is float64 whatever the package is. Outputs: `_outputs`, with as many slots as cuts were
    needed.
    """
    (*weights, x, y), results, nodes, constants = dismantle(head.graph, "energy")
    assert y.dtype is not None
    T, n = y.dtype, static(y, 1)
    xp = Traced("argmin", rank=2)
    y_init = xp.of(value("y_init", DOUBLE, ["batch", n]))
    given, P = constraints(xp, y_init)
    settings = [
        setting("iterations", spec.iterations, INT64),
        setting("mu", spec.mu, DOUBLE),
        setting("tolerance", spec.tolerance, DOUBLE),
    ]
    energy = Spliced(xp, nodes, {y: y_init.value}, results)

    def value_and_gradient(y: Symbol) -> tuple[Symbol, Symbol]:
        if T == DOUBLE:
            f, g = energy(y)
            return xp.column(f), g
        # f is told at y along the cut that touches at ŷ, so that every cut is one of f.
        rounded = xp.node("Cast", y, result=T, to=T)
        f, g = map(xp.double, energy(rounded))
        return xp.column(f) + xp.sum(g * (y - xp.double(rounded))), g

    def solve(programs: Programs, qp: QP, σ: Symbol | None) -> QPReference:
        return programs.solved(operator(xp), qp, σ)

    eps = float(np.finfo(T.numpy()).eps)
    known, (iterations, mu, tolerance) = all_finite(xp, xp.of(x)), map(xp.of, settings)
    found, multipliers = argmin(xp, P, value_and_gradient, solve, y_init, known, iterations, mu, tolerance, eps)
    told = found._replace(lam=None)._asdict() | dict(zip(("lam", "nu", "bounds"), multipliers, strict=True))
    told["cut_lam"] = found.lam
    outputs = []
    for name, (dtype, sizes) in _outputs(n).items():
        v = told[name] if told[name].dtype == dtype else xp.node("Cast", told[name], result=dtype, to=dtype)
        outputs.append(describe(v.value, name, dtype, ["batch", *sizes]))
    graph = xp.graph([x, y_init.value, *given, *settings, *weights], outputs, constants, "argmin_polyhedron")
    for v in settings:
        graph.register_initializer(v)
    # What tells its size is not taken for the largest there is, where a session asks how many samples it runs at once.
    graph.opset_imports.update({"": OPSET, OP_DOMAIN: OP_VERSION})
    ShapeInferencePass(check_type=False, strict_mode=False)(ir.Model(graph, ir_version=IR_VERSION))
    return graph


def _outputs(n: int) -> dict[str, tuple[ir.DataType, list[int | str]]]:
    """What the graph gives, in order."""
    return {
        "y": (DOUBLE, [n]),
        "energy": (DOUBLE, []),
        "lower_bound": (DOUBLE, []),
        "gap": (DOUBLE, []),
        "residual": (DOUBLE, [3]),
        "status": (INT32, []),
        "cuts": (INT64, []),
        "lam": (DOUBLE, ["m"]),
        "nu": (DOUBLE, ["q"]),
        "bounds": (DOUBLE, [n]),
        "best": (INT64, []),
        "slopes": (DOUBLE, ["slots", n]),
        "offsets": (DOUBLE, ["slots"]),
        "cut_points": (DOUBLE, ["slots", n]),
        "cut_lam": (DOUBLE, ["slots"]),
        "ray": (DOUBLE, [n]),
    }


def constraints(xp: Traced, like: Symbol) -> tuple[list[ir.Value], Polyhedron]:
    """The inputs that say where y lies, float64, each with a leading axis of B or, shared, of 1; and all of them for
    every sample of `like` [B, n]."""
    n = like.shape[1]
    sizes = {"G": ["m", n], "h": ["m"], "A": ["q", n], "b": ["q"], "lower": [n], "upper": [n]}
    given = [value(name, DOUBLE, [f"B_{name}", *size]) for name, size in sizes.items()]

    def every(v: ir.Value) -> Symbol:
        one = xp.of(v)
        sizes = xp.node("Shape", one, result=INT64, rank=1, start=1)
        shape = xp.node("Concat", xp.size(like, 0), sizes, axis=0)
        wide = xp.node("Expand", one, shape, rank=one.rank)
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


def setting(name: str, number: float, dtype: ir.DataType) -> ir.Value:
    """An input that has a default."""
    setting = value(name, dtype, [])
    setting.const_value = ir.tensor(number, dtype=dtype, name=name)
    return setting


def all_finite(xp: Traced, a: Symbol) -> Symbol:
    """[B, 1]: each sample's numbers are."""
    a = xp.node("Flatten", a, rank=2) if a.rank > 1 else xp.column(a)
    return xp.sum(a - a) >= 0.0
