"""The graph (solution over a polyhedron, ȳ) -> θ̄, x̄ and the gradients of the constraints and of μ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from icnnrt.format.manifest import OP_DOMAIN, PolyhedronSpec
from icnnrt.format.signatures import TRAJECTORY_NAMES
from icnnrt.mathematics.polyhedron_adjoint import pulled_back
from icnnrt.mathematics.polyhedron_programs import Programs
from icnnrt.mathematics.qp_reference import QPCotangents
from icnnrt.mathematics.qp_reliability import existing
from icnnrt.mathematics.status import Status
from icnnrt_exporters.assembly.polyhedron_graph import Declared, all_finite, operator
from icnnrt_exporters.operators.spliced import Spliced
from icnnrt_exporters.operators.traced import Symbol, Traced
from icnnrt_exporters.surgery import dismantle, dtype_of, replace, shapes_from, static

INT64, INT32, DOUBLE = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.DOUBLE
POINTS = "points"  # the batch of the pull-back: all cut points of all samples


def polyhedron_adjoint_graph(push: ir.Model, hessian: ir.Model | None, spec: PolyhedronSpec) -> ir.Graph:
    """From the head `pullback`, and of "implicit" the head `hessian`, to the adjoint of the argmin over a polyhedron:
    "prop3" or "implicit" of `icnnrt.mathematics.polyhedron_adjoint`, whose program is solved for its multipliers, and
    then one pull-back at all points.

    Inputs: x, what argmin_polyhedron.onnx took and gave, and y_bar [B, n]; `mu` has a default. Samples of any status
    but CONVERGED and, unless of "implicit", GAP, or whose program is not solved are not `safe`: NaN in all that is of
    one sample, and no part in θ̄. A session, which knows more of a sample than its status, feeds those of PRECISION that
    are known well enough as CONVERGED.
    """
    implicit = spec.adjoint == "implicit"
    (*weights, x_in, y_in, f_bar_in, gradient_bar_in), results, nodes, constants = dismantle(push.graph, "push")
    assert x_in.shape is not None
    T, n = dtype_of(y_in), static(y_in, 1)
    rank_of_x = len(x_in.shape)
    xp, declare = Traced("adjoint", rank=2), Declared(x_in, T, n)
    x, status, mu = declare.value("x"), declare.value("status"), declare.value("mu", spec.mu)
    y, y_bar = (xp.of(declare.value(name)) for name in ("y", "y_bar"))
    given, P = declare.constraints(xp, y)
    programs = Programs(xp, P, xp.of(mu))
    worst = Status.CONVERGED if implicit else Status.GAP
    trusted = (xp.column(xp.of(status)) <= int(worst)) & all_finite(xp, xp.concat([y, y_bar]))
    y_safe = xp.where(trusted, y, 0.0)
    trajectory, model, σ, z_bar = [], None, None, y_bar
    if implicit:
        assert hessian is not None
        (*own, x_at, y_at), told, at_y, more = dismantle(hessian.graph, "curvature")
        constants = [*constants, *more]
        by_role = {str(v.name): v for v in told}
        for v in told:
            v.name = f"curvature/{v.name}"
        replace(at_y, {**dict(zip(own, weights, strict=True)), x_at: x})
        curvature = Spliced(xp, at_y, {y_at: y.value}, [by_role["gradient"], by_role["hessian"]])
        gradient, matrix = map(xp.double, curvature(xp.cast(y_safe, T)))
        qp = programs.newton(y_safe, gradient, matrix)
        cut_points = xp.zeros(y, 0, n)
    else:
        trajectory = [declare.value(name) for name in TRAJECTORY_NAMES]
        y_init, best, slopes, offsets, cut_points = map(xp.of, trajectory)
        qp, model, σ = programs.model_of(y_init, xp.column(best), slopes, offsets)
        z_bar = xp.padded(y_bar, n + 1)
    solution = programs.solved(operator(xp), qp, σ)
    d = _adjoint(xp, qp, solution, z_bar)
    safe = trusted & all_finite(xp, xp.concat(d))
    found = pulled_back(xp, programs, solution, d, cut_points)

    def held(v: Symbol, nothing: float = 0.0) -> Symbol:
        which = safe if v.rank == 2 else xp.slot(safe, 0) if v.rank == 1 else xp.column(safe)
        return xp.where(which, v, nothing)

    of_mu = found.mu if model is None else xp.where(model, found.mu, 0.0)
    bars = [*zip(P._fields, found.polyhedron, strict=True), ("mu", xp.entry(of_mu, 0))]
    final = [declare.output(xp, f"{name}_bar", held(v, float("nan"))) for name, v in bars]

    # θ̄ and x̄, of all points in one product; unused ones have no weight.
    like_x = xp.node("Reshape", safe, xp.constant([-1, *[1] * (rank_of_x - 1)]), rank=rank_of_x)
    x_points = xp.where(like_x, xp.of(x), 0.0)
    if implicit:
        points, e_bar, seed = y_safe, xp.entry(xp.zeros(y, 1), 0), held(found.c_y)
    else:
        row, rest = xp.constant([-1, n]), xp.node("Shape", xp.of(x), result=INT64, rank=1, start=1)
        points, seed = (xp.node("Reshape", held(v), row, rank=2) for v in (cut_points, found.seed))
        e_bar = xp.node("Reshape", held(found.offset_bar), xp.constant([-1]), rank=1)
        of_slots = xp.node("Concat", xp.size(y, 0), xp.slots(offsets), rest, axis=0)
        apart = xp.node("Expand", xp.row(x_points), of_slots)
        flat = xp.node("Concat", xp.size(points, 0), rest, axis=0)
        x_points = xp.node("Reshape", apart, flat, allowzero=1, rank=rank_of_x)
    points, e_bar, seed = (xp.cast(v, T) for v in (points, e_bar, seed))
    shapes_from(nodes, y_in, points.value)
    at_points = {x_in: x_points, y_in: points, f_bar_in: e_bar, gradient_bar_in: seed}
    by_name = _spliced(xp, nodes, results, at_points, "batch" if implicit else POINTS)
    x_bar = xp.of(by_name["x_bar"], rank=rank_of_x)
    if not implicit:
        x_bar = xp.slots_sum(xp.node("Reshape", x_bar, of_slots, allowzero=1, rank=rank_of_x + 1))
    x_bar = xp.where(like_x, x_bar, float("nan"))
    final += [declare.output(xp, "x_bar", x_bar), declare.output(xp, "safe", xp.entry(safe, 0))]
    final += [v for name, v in by_name.items() if name.startswith("theta_bar.")]
    inputs = [x, y.value, status, *given, mu, y_bar.value, *trajectory, *weights]
    graph = xp.graph(inputs, final, constants, "adjoint_polyhedron")
    graph.register_initializer(mu)
    return graph


def _spliced(
    xp: Traced,
    nodes: Sequence[ir.Node],
    results: Sequence[ir.Value],
    given: Mapping[ir.Value, Symbol],
    batch: str,
) -> dict[str, ir.Value]:
    """The results of the pull-back by their names, of a batch of that name."""
    replace(nodes, {old: new.value for old, new in given.items()})
    for v in (v for node in nodes for v in node.outputs):
        if v.shape is not None:  # onnxruntime takes equal names of sizes for equal sizes
            v.shape = ir.Shape([batch if str(size) == "batch" else size for size in v.shape])
    xp.op.extend(nodes)
    by_name = {str(v.name): v for v in results}
    by_name["y_bar"].name, by_name["x_bar"].name = "push/y_bar", "push/x_bar"
    return by_name


def _adjoint(xp: Traced, qp: Any, s: Any, z_bar: Symbol) -> Any:
    """QPSensitivity at a solution, for a loss of z alone; NaN where a part of it has no gradient."""
    absent = xp.constant(np.zeros((1, 0)), DOUBLE)
    given = (qp.Q, qp.G, qp.A, s.lam, s.mu, s.slack, s.box_slack, s.status, z_bar, *[absent] * 3)
    types, ranks = [*[DOUBLE] * 5, INT32], [*[2] * 4, 1, 1]
    *d, share, _ = xp.nodes("QPSensitivity", *given, results=types, ranks=ranks, domain=OP_DOMAIN)
    return QPCotangents(*existing(xp, d, share))
