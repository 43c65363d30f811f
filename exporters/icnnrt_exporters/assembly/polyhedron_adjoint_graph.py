"""The graph (solution over a polyhedron, ȳ) -> θ̄, x̄ and the gradients of the constraints and of μ."""

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from icnnrt.format.manifest import PolyhedronSpec
from icnnrt.format.package import OP_DOMAIN
from icnnrt.mathematics.qp_reference import STEPS
from icnnrt.mathematics.status import Status
from icnnrt_exporters.assembly.polyhedron_graph import Constraints, all_finite, filled, setting
from icnnrt_exporters.surgery import Ops, describe, dismantle, numbered, replace, shapes_from, static, value

INT32, INT64, DOUBLE, BOOL = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL
POINTS = "points"  # the batch of the pull-back: all cut points of all samples


def polyhedron_adjoint_graph(push: ir.Model, hessian: ir.Model | None, spec: PolyhedronSpec) -> ir.Graph:
    """From the head `pullback`, and of "implicit" the head `hessian`, to the adjoint of the argmin over a polyhedron.

        a quadratic program has the answer y and its derivative; it is solved for its multipliers:
            prop3       the model that gave y, of the cuts i < best; where best is 0 the projection of y_init
            implicit    min over z in P of ∇f'z + ½ (z − y)'∇²f (z − y) + (μ/2) ‖z‖²,  Newton's at y
        d = QPAdjoint(its solution, ȳ), and from d the gradients of G, h, A, b, bounds and μ
        θ̄, x̄ = Σ_i ∇ [ ē_i f(x, y_i) + s_i'∇f(x, y_i) ]:
            prop3       ē_i = c_λi,  s_i = λ_i c_y + c_λi (y − y_i)                      at the cut points
            implicit    ē = 0,  s = c_y                                                  at y

    Inputs: x, what argmin_polyhedron.onnx took and gave, and y_bar [B, n]; `mu` has a default. Samples of any status
    but CONVERGED and, unless of "implicit", GAP, or whose program is not solved are not `safe`: NaN in all that is of
    one sample, and no part in θ̄. A session, which knows more of a sample than its status, feeds those of PRECISION that
    are known well enough as CONVERGED.
    """
    implicit = spec.adjoint == "implicit"
    (*weights, x_in, y_in, f_bar, gradient_bar), results, nodes, initializers = dismantle(push.graph, "push")
    assert y_in.dtype is not None
    T, n = y_in.dtype, static(y_in, 1)
    assert x_in.shape is not None
    shape_of_x: list[int | str | None] = ["batch", *(static(x_in, axis) for axis in range(1, len(x_in.shape)))]
    x = value("x", T, shape_of_x)
    y, y_bar = value("y", DOUBLE, ["batch", n]), value("y_bar", DOUBLE, ["batch", n])
    status, P, mu = value("status", INT32, ["batch"]), Constraints(n), setting("mu", spec.mu, DOUBLE)

    op = Ops("adjoint")
    one, two, none = op.constant([1]), op.constant([2]), op.constant(0.0, DOUBLE)
    nan = op.constant(float("nan"), DOUBLE)
    worst = op.constant(int(Status.CONVERGED if implicit else Status.GAP), INT32)
    trusted = op("Unsqueeze", op("LessOrEqual", status, worst), one)
    trusted = op("And", trusted, all_finite(op, op("Concat", y, y_bar, axis=1), one))
    y_safe = op("Where", trusted, y, none)
    if implicit:
        assert hessian is not None
        found = _newton(op, n, hessian, weights, x, y_safe, P, mu, T)
        trajectory = []
        initializers = [*initializers, *found.constants]
    else:
        y_init, best = value("y_init", DOUBLE, ["batch", n]), value("best", INT64, ["batch"])
        cuts = [value(name, DOUBLE, ["batch", "slots", n]) for name in ("slopes", "cut_points")]
        offsets = value("offsets", DOUBLE, ["batch", "slots"])
        trajectory = [y_init, best, cuts[0], offsets, cuts[1]]
        found = _last_model(op, n, y_safe, y_init, best, cuts[0], offsets, P, mu)

    z, lam, nu, mu_all, slack, box_slack, _, qp_status, _ = op.many(
        "QPSolve", *found.program, outputs=9, domain=OP_DOMAIN, steps=STEPS
    )
    absent = found.program[3]
    Q, rows, equalities = found.program[0], found.rows, found.program[5]
    if found.steepness is not None:
        lam, slack = op("Mul", lam, found.of_lam), op("Mul", slack, found.of_slack)
        nu, mu_all = op("Mul", nu, found.steepness), op("Mul", mu_all, found.steepness)
    width = op("Sub", op("Shape", z, start=1, end=2), op.constant([n]))
    pad = filled(op, op("Concat", op("Shape", y_bar, start=0, end=1), width, axis=0), 0.0)
    z_bar = op("Concat", y_bar, pad, axis=1)
    d_z, d_lam, d_nu, d_mu = op.many(
        *("QPAdjoint", Q, rows, equalities, lam, mu_all, slack, box_slack, qp_status, z_bar, absent, absent, absent),
        outputs=4,
        domain=OP_DOMAIN,
    )
    safe = op("And", trusted, all_finite(op, op("Concat", d_z, d_lam, d_nu, d_mu, axis=1), one))

    # The gradients of the constraints.
    zero, n_size = op.constant([0]), op.constant([n])
    c_y, c_bounds, bounds = (op("Slice", a, zero, n_size, one) for a in (d_z, d_mu, mu_all))
    z_y = op("Slice", z, zero, n_size, one)
    m = op("Shape", P.G, start=1, end=2)
    sizes = op("Concat", m, op("Sub", op("Shape", lam, start=1, end=2), m), axis=0)
    (lam_rows, lam_cuts), (c_rows, c_cuts) = (op.many("Split", a, sizes, outputs=2, axis=1) for a in (lam, d_lam))
    safe_3 = op("Unsqueeze", safe, two)

    def outer(a: ir.Value, c: ir.Value) -> ir.Value:
        return op("Mul", op("Unsqueeze", a, two), op("Unsqueeze", c, one))

    def told(v: ir.Value, name: str, shape: list[int | str | None], where: ir.Value = safe) -> ir.Value:
        return describe(op("Where", where, v, nan), name, DOUBLE, ["batch", *shape])

    down = op("Neg", c_bounds)
    of_P = [
        told(op("Add", outer(lam_rows, c_y), outer(c_rows, z_y)), "G_bar", ["m", n], safe_3),
        told(op("Where", op("Greater", lam_rows, none), op("Neg", c_rows), none), "h_bar", ["m"]),
        told(op("Add", outer(nu, c_y), outer(d_nu, z_y)), "A_bar", ["q", n], safe_3),
        told(op("Neg", d_nu), "b_bar", ["q"]),
        told(op("Where", op("Less", bounds, none), down, none), "lower_bar", [n]),
        told(op("Where", op("Greater", bounds, none), down, none), "upper_bar", [n]),
    ]
    by_mu = op("ReduceSum", op("Mul", c_y, z_y), one, keepdims=1)
    if found.curved is not None:
        by_mu = op("Where", found.curved, by_mu, none)
    mu_bar = describe(op("Squeeze", op("Where", safe, by_mu, nan), one), "mu_bar", DOUBLE, ["batch"])

    # θ̄ and x̄, of all cut points in one product; unused ones have no weight.
    def held(v: ir.Value, where: ir.Value = safe, nothing: ir.Value = none) -> ir.Value:
        return op("Where", where, v, nothing)

    nothing = none if T == DOUBLE else op.constant(0.0, T)
    like_x = op("Reshape", safe, op.constant([-1, *([1] * (len(shape_of_x) - 1))]))
    x_safe = held(x, like_x, nothing)
    if implicit:
        points, seeds = y_safe, held(c_y)
        e_bar = filled(op, op("Shape", y, start=0, end=1), 0.0)
        x_points = x_safe
    else:
        slots = op("Shape", cuts[1], start=1, end=2)
        points_3 = held(cuts[1], safe_3)
        moved = op("Mul", op("Unsqueeze", c_cuts, two), op("Sub", op("Unsqueeze", z_y, one), points_3))
        seeds = op("Reshape", held(op("Add", outer(lam_cuts, c_y), moved), safe_3), op.constant([-1, n]))
        points, e_bar = op("Reshape", points_3, op.constant([-1, n])), op("Reshape", held(c_cuts), op.constant([-1]))
        B, rest = op("Shape", x, start=0, end=1), op("Shape", x, start=1)
        every = op("Expand", op("Unsqueeze", x_safe, one), op("Concat", B, slots, rest, axis=0))
        x_points = op("Reshape", every, op("Concat", op("Mul", B, slots), rest, axis=0), allowzero=1)
    parts = [points, e_bar, seeds]
    if T != DOUBLE:
        parts = [op("Cast", v, to=T) for v in parts]
    shapes_from(nodes, y_in, parts[0])
    replace(nodes, {x_in: x_points, y_in: parts[0], f_bar: parts[1], gradient_bar: parts[2]})
    for node in nodes:  # onnxruntime takes equal names of sizes for equal sizes
        for v in node.outputs:
            if v.shape is not None and not implicit:
                v.shape = ir.Shape([POINTS if str(size) == "batch" else size for size in v.shape])
    op.extend(nodes)
    by_name = {v.name: v for v in results}
    by_name["y_bar"].name, by_name["x_bar"].name = "push/y_bar", "push/x_bar"
    x_bar = by_name["x_bar"]
    if not implicit:
        summed = op("Reshape", x_bar, op("Concat", B, slots, rest, axis=0), allowzero=1)
        x_bar = op("ReduceSum", summed, one, keepdims=0)
    x_bar = op("Where", like_x, x_bar, op.constant(float("nan"), T))
    cotangents = [v for name, v in by_name.items() if name and name.startswith("theta_bar.")]
    describe(x_bar, "x_bar", T, shape_of_x)
    final = [
        *(*of_P, mu_bar, x_bar),
        describe(op("Squeeze", safe, one), "safe", BOOL, ["batch"]),
        *cotangents,
    ]
    return ir.Graph(
        [x, y, status, *P.inputs, mu, y_bar, *trajectory, *weights],
        final,
        nodes=op.nodes,
        initializers=[*numbered([*initializers, *op.constants]), mu],
        name="adjoint_polyhedron",
    )


class _Program(NamedTuple):
    """The quadratic program whose derivative is that of y."""

    program: list[ir.Value]  # the ten inputs of QPSolve
    curved: ir.Value | None  # [B, 1] whether μ is in it; None: it is in all
    rows: ir.Value  # of the inequalities, as the adjoint takes them
    constants: Sequence[ir.Value] = ()
    # σ of a program that is solved as that of f/σ, [B, 1], and what it makes of λ and slacks, [B, m + slots]
    steepness: ir.Value | None = None
    of_lam: ir.Value | None = None
    of_slack: ir.Value | None = None


def _last_model(
    op: Ops,
    n: int,
    y: ir.Value,
    y_init: ir.Value,
    best: ir.Value,
    slopes: ir.Value,
    offsets: ir.Value,
    P: Constraints,
    mu: ir.Value,
) -> _Program:
    """Over (y, t): the model of the cuts i < best, or, where best is 0, the projection with a t of its own.

    A cut that has no part has a bound of +∞, which is none.
    """
    one = op.constant([1])
    B, m = (op("Shape", v, start=axis, end=axis + 1) for v, axis in ((y, 0), (P.G, 1)))
    slots, n_size = op("Shape", offsets, start=1, end=2), op.constant([n])
    column = op("Concat", B, one, axis=0)
    known = op("Unsqueeze", best, one)
    model = op("Greater", known, op.constant(0))
    model_3 = op("Unsqueeze", model, op.constant([2]))
    flat, unit = (
        op.constant([[[float(i == j < size) for j in range(n + 1)] for i in range(n + 1)]], DOUBLE)
        for size in (n, n + 1)
    )
    Q = op("Where", model_3, op("Mul", flat, mu), unit)
    none = op.constant(0.0, DOUBLE)
    start = op("Concat", op("Neg", y_init), filled(op, column, 0.0), axis=1)
    p = op("Where", model, op.constant([[float(j == n) for j in range(n + 1)]], DOUBLE), start)
    used = op("Less", op("Range", op.constant(0), op("Squeeze", slots), op.constant(1)), known)
    used_3 = op("Unsqueeze", used, op.constant([2]))

    cuts = op(
        "Concat",
        op("Where", used_3, slopes, none),
        filled(op, op("Concat", B, slots, one, axis=0), -1.0),
        axis=2,
    )
    G, A = P.wide(op, B)
    rows = op("Concat", G, cuts, axis=1)
    heights = op("Where", used, op("Neg", offsets), op.constant(float("inf"), DOUBLE))
    bounds = op("Concat", B, n_size, axis=0)
    lower, upper = (
        op("Concat", op("Expand", v, bounds), filled(op, column, infinite), axis=1)
        for v, infinite in ((P.lower, -float("inf")), (P.upper, float("inf")))
    )
    absent = filled(op, op.constant([1, 0]), 0.0)
    # As in `polyhedron_graph`: where nothing curves the model it is solved as that of f/σ, t = σ t̂.
    least = op.constant(1.0, DOUBLE)
    σ = op("ReduceMax", op("Abs", op("Where", used_3, slopes, none)), op.constant([1, 2]), keepdims=0)
    σ = op("Unsqueeze", σ, one)
    flat_model = op("And", op("And", model, op("Equal", mu, none)), op("Greater", σ, none))
    σ = op("Where", flat_model, op("Min", σ, least), least)
    scaled = op("Where", used_3, op("Div", slopes, op("Unsqueeze", σ, one)), none)
    scaled = op("Concat", scaled, filled(op, op("Concat", B, slots, one, axis=0), -1.0), axis=2)
    high = op("Concat", op("Expand", P.h, op("Concat", B, m, axis=0)), op("Div", heights, σ), axis=1)
    of_P, of_cuts = (op("Expand", v, op("Concat", B, size, axis=0)) for v, size in ((σ, m), (σ, slots)))
    ones_P, ones_cuts = (filled(op, op("Concat", B, size, axis=0), 1.0) for size in (m, slots))
    return _Program(
        [Q, p, op("Concat", G, scaled, axis=1), absent, high, A, P.b, lower, upper, absent],
        model,
        rows,
        steepness=σ,
        of_lam=op("Concat", of_P, ones_cuts, axis=1),
        of_slack=op("Concat", ones_P, of_cuts, axis=1),
    )


def _newton(
    op: Ops,
    n: int,
    head: ir.Model,
    weights: Sequence[ir.Value],
    x: ir.Value,
    y: ir.Value,
    P: Constraints,
    mu: ir.Value,
    T: ir.DataType,
) -> _Program:
    """min over z in P of (∇f − ∇²f y)'z + ½ z'(∇²f + μ) z."""
    one = op.constant([1])
    (*own, x_in, y_in), results, nodes, constants = dismantle(head.graph, "curvature")
    rounded = y if T == DOUBLE else op("Cast", y, to=T)
    shapes_from(nodes, y_in, rounded)
    replace(nodes, {**dict(zip(own, weights, strict=True)), x_in: x, y_in: rounded})
    op.extend(nodes)
    found = {v.name: v for v in results}
    for v in results:
        v.name = f"curvature/{v.name}"
    g, H = found["gradient"], found["hessian"]
    if T != DOUBLE:
        g, H = (op("Cast", v, to=DOUBLE) for v in (g, H))
    unit = op.constant([[[float(i == j) for j in range(n)] for i in range(n)]], DOUBLE)
    Q = op("Add", H, op("Mul", unit, mu))
    Hy = op("ReduceSum", op("Mul", H, op("Unsqueeze", y, one)), op.constant([2]), keepdims=0)
    absent = filled(op, op.constant([1, 0]), 0.0)
    program = [Q, op("Sub", g, Hy), P.G, absent, P.h, P.A, P.b, P.lower, P.upper, absent]
    return _Program(program, None, P.G, constants)
