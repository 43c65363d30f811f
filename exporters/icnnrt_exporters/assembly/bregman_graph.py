"""The graphs of Bregman proximal gradient: argmin.onnx and adjoint.onnx with the signatures of the bundle method's.

`icnnrt.mathematics.bregman` states the method and its adjoint. No operator is needed: the step is closed form.
"""

import onnx_ir as ir

from icnnrt.format.manifest import Domain
from icnnrt.mathematics.bregman import EDGE, EDGE_FLOAT32
from icnnrt_exporters.assembly.adjoint_graph import bounds_bars, slope_mismatch
from icnnrt_exporters.assembly.argmin_graph import UNIT_BOX, stacked
from icnnrt_exporters.assembly.coordinates import Coordinates, factor
from icnnrt_exporters.operators.traced import Symbol, Traced, nodes_of
from icnnrt_exporters.surgery import (
    Ops,
    copy,
    describe,
    dismantle,
    needed,
    numbered,
    replace,
    shapes_from,
    split,
    static,
    value,
)

INT64, DOUBLE, BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL


def bregman_argmin_graph(head: ir.Model, K: int, step_size: float, domain: Domain = UNIT_BOX) -> ir.Graph:
    """From value and gradient (θ, x, y -> f, gradient) to the whole solver.

        repeat K times:  f, g = f(x, y), ∇_y f(x, y)
                         s <- (s/τ − g)/(1 + 1/τ),  y = y(s)
        then             energy = f(x, y) + R(y),  lower_bound = max_i e_i − C(−g_i)

    Inputs and outputs are those of `argmin_graph`: the cuts are those of the points y was at, λ is 1 at the cut of the
    best bound, residual and complementarity are zero.
    """
    (*weights, x, y), (f, gradient), nodes, initializers = dismantle(head.graph, "energy")
    assert y.dtype is not None
    T, n = y.dtype, static(y, 1)
    y_init = value("y_init", T, ["batch", n])
    shapes_from(nodes, y, y_init)
    before, body_nodes = split(nodes, [y])

    op = Ops("argmin")
    op.extend(before)
    at = Coordinates(domain, T, n)
    at.prepare(op, y_init)
    p_init = at.p(op, y_init)
    axis_1, axis_2, centre = op.constant([1]), op.constant([2]), op.constant(at.centre, T)
    kept, part = (factor(op, c, y_init) for c in (1 / (1 + step_size), step_size / (1 + step_size)))

    def logits(xp: Traced, p: Symbol) -> Symbol:
        return at.model.logits(xp, p, EDGE_FLOAT32 if T == ir.DataType.FLOAT else EDGE)

    s_init = nodes_of(op, logits, p_init, dtype=T)
    counter, going = value("cut/iteration", INT64, []), value("cut/going", BOOL, [])
    p_in, s_in = value("cut/p_in", T, ["batch", n]), value("cut/s_in", T, ["batch", n])
    body = Ops("cut", op.constants)
    y_in = at.y(body, p_in)
    replace(body_nodes, {y: y_in})
    body.extend(body_nodes)
    slope = at.scaled(body, gradient)
    e = body("Add", f, body("ReduceSum", body("Mul", slope, body("Sub", centre, p_in)), axis_1, keepdims=0))
    s_out = body("Sub", body("Mul", kept, s_in), body("Mul", part, slope))
    p_out = nodes_of(body, at.model.point, s_out, dtype=T)
    outputs = [
        describe(body("Identity", going), "cut/next_going", BOOL, []),
        describe(p_out, "cut/next_p", T, ["batch", n]),
        describe(s_out, "cut/next_s", T, ["batch", n]),
        describe(body("Identity", p_in), "cut/point", T, ["batch", n]),
        describe(body("Identity", slope), "cut/slope", T, ["batch", n]),
        describe(e, "cut/offset", T, ["batch"]),
    ]
    loop_body = ir.Graph([counter, going, p_in, s_in], outputs, nodes=body.nodes, name="one_step")
    p_star, _, points, slopes, offsets = op.many(
        "Loop",
        op.constant(K),
        op.constant(True, BOOL),
        p_init,
        s_init,
        outputs=5,
        body=loop_body,
    )
    batch = op("Shape", p_star, start=0, end=1)
    points, slopes = (stacked(op, v, K, batch, n) for v in (points, slopes))
    slopes, offsets = op("Transpose", slopes, perm=[1, 0, 2]), op("Transpose", offsets, perm=[1, 0])
    cut_points = op("Transpose", points, perm=[1, 0, 2])

    # The dual of one cut alone, λ = 1: e_i − C(−g_i).
    wide = op("Neg", op("Cast", slopes, to=DOUBLE))
    conjugate = op("Squeeze", nodes_of(op, at.model.conjugate, wide, rank=3), axis_2)
    bounds = op("Sub", op("Cast", offsets, to=DOUBLE), conjugate)
    lower = op("ReduceMax", bounds, axis_1, keepdims=0)
    best = op("ArgMax", bounds, axis=1, keepdims=1)
    lam = op("Cast", op("Equal", op.constant([list(range(K))]), best), to=T)
    lam_history = _zeros(op, batch, [K, K], T)

    y_star = at.answer(op, p_star)
    value_nodes, mapping = copy(needed(body_nodes, [f]), {y_in: y_star}, "final")
    op.extend(value_nodes)
    energy = op("Add", op("Cast", mapping.get(f, f), to=DOUBLE), at.regulariser(op, p_star))
    final = [
        describe(y_star, "y", T, ["batch", n]),
        describe(lam, "lam", T, ["batch", K]),
        describe(slopes, "slopes", T, ["batch", K, n]),
        describe(offsets, "offsets", T, ["batch", K]),
        describe(cut_points, "cut_points", T, ["batch", K, n]),
        describe(lam_history, "lam_history", T, ["batch", K, K]),
        describe(energy, "energy", DOUBLE, ["batch"]),
        describe(lower, "lower_bound", DOUBLE, ["batch"]),
        describe(op("Sub", energy, lower), "gap", DOUBLE, ["batch"]),
        describe(_zeros(op, batch, [3], DOUBLE), "residual", DOUBLE, ["batch", 3]),
        describe(_zeros(op, batch, [K], DOUBLE), "complementarity_history", DOUBLE, ["batch", K]),
    ]
    return ir.Graph(
        [x, y_init, *at.inputs, *weights],
        final,
        nodes=op.nodes,
        initializers=numbered([*initializers, *op.constants]),
        name="argmin",
    )


def bregman_adjoint_graph(
    push: ir.Model, hvp: ir.Model, K: int, step_size: float, domain: Domain = UNIT_BOX
) -> ir.Graph:
    """From the heads `cut_vjp` and `hessian_vector_product` to the whole adjoint.

        s̄ = D(y) ȳ
        for k = K−1 .. 0:   S_k = −s̄/(1 + 1/τ),  s̄ <- s̄/(1 + τ) + D(y_k) ∇²f(y_k) S_k
        θ̄, x̄ = one second-order product of all B·K points, with ē = 0

    Inputs and outputs are those of `adjoint_graph`; `depth`, offsets and multipliers are taken and not used.
    """
    (*weights, x, cut_points, e_bar_in, seed_in), results, push_nodes, push_constants = dismantle(push.graph, "push")
    (*hvp_inputs, y_k_in, s_in), (hessian_s,), hvp_nodes, hvp_constants = dismantle(hvp.graph, "hvp")
    boundary = [v for v in results if v.name is not None and v.name.startswith("boundary/")]
    (slopes_again,) = (v for v in results if v.name == "push/slopes_again")
    point_bar = next((v for v in results if v.name == "push/point_bar"), None)
    cotangents = [v for v in results if v not in (*boundary, slopes_again, point_bar)]
    hessian_s.name = "back/hessian_s"
    assert seed_in.dtype is not None
    T, n = seed_in.dtype, static(seed_in, 2)
    y, y_bar = value("y", T, ["batch", n]), value("y_bar", T, ["batch", n])
    slopes, offsets = value("slopes", T, ["batch", K, n]), value("offsets", T, ["batch", K])
    lam_history, points = value("lam_history", T, ["batch", K, K]), value("cut_points", T, ["batch", K, n])
    depth = value("depth", INT64, [])
    depth.const_value = ir.tensor(K, dtype=INT64, name="depth")

    op = Ops("adjoint")
    at = Coordinates(domain, T, n)
    at.prepare(op, y, (2, 3))
    y_points = at.y(op, points, 3)
    replace(push_nodes, {cut_points: y_points})
    shapes_from(push_nodes, y_points, points)
    shapes_from(push_nodes, e_bar_in, offsets)
    shapes_from(push_nodes, seed_in, slopes)
    before, after = split(push_nodes, [e_bar_in, seed_in])
    op.extend(before)
    same = dict(zip(hvp_inputs, [*weights, *boundary], strict=True))
    replace(hvp_nodes, same)
    shapes_from(hvp_nodes, y_k_in, y)
    shapes_from(hvp_nodes, s_in, y)
    invariant, hvp_nodes = split(hvp_nodes, [y_k_in, s_in])
    op.extend(invariant)

    kept, part = (factor(op, c, y) for c in (1 / (1 + step_size), -step_size / (1 + step_size)))
    zero = op.constant([0])
    p = at.p(op, y)
    s_bar = nodes_of(op, at.model.curvature_at, p, at.scaled(op, y_bar), dtype=T)
    if K > 1:
        counter, going = value("back/iteration", INT64, []), value("back/going", BOOL, [])
        s_bar_in = value("back/s_bar_in", T, ["batch", n])
        body = Ops("back", op.constants)
        k = body("Sub", op.constant(K - 1), counter)
        p_k = body("Gather", points, k, axis=1)
        y_k = p_k if at.identity else body("Gather", y_points, k, axis=1)
        seed_k = body("Mul", part, s_bar_in)
        replace(hvp_nodes, {y_k_in: y_k, s_in: at.scaled(body, seed_k)})
        body.extend(hvp_nodes)
        p_bar_k = at.scaled(body, same.get(hessian_s, hessian_s))
        bent = nodes_of(body, at.model.curvature_at, p_k, p_bar_k, dtype=T)
        s_bar_k = body("Add", body("Mul", kept, s_bar_in), bent)
        outputs = [
            describe(body("Identity", going), "back/next_going", BOOL, []),
            describe(s_bar_k, "back/next_s_bar", T, ["batch", n]),
            describe(seed_k, "back/seed", T, ["batch", n]),
        ]
        loop_body = ir.Graph([counter, going, s_bar_in], outputs, nodes=body.nodes, name="back_through_one_step")
        s_bar, later = op.many("Loop", op.constant(K - 1), op.constant(True, BOOL), s_bar, outputs=2, body=loop_body)
    # Seeds came last first, the first point's is still due.
    first = op("Unsqueeze", op("Mul", part, s_bar), zero)
    backwards = op("Concat", later, first, axis=0) if K > 1 else first
    forwards = op("Gather", backwards, op.constant(list(range(K))[::-1]), axis=0)
    seed = op("Transpose", forwards, perm=[1, 0, 2])
    e_bar = _zeros(op, op("Shape", y, start=0, end=1), [K], T)
    replace(after, {e_bar_in: e_bar, seed_in: at.scaled(op, seed, 3)})
    op.extend(after)
    met, mismatch = slope_mismatch(op, at, slopes_again, slopes)
    if at.box:
        assert point_bar is not None, "push has no points"
        moving = op("Reshape", point_bar, op("Shape", slopes))
        cotangents += bounds_bars(op, at, p, y_bar, points, seed, met, moving)

    constants = [*numbered([*push_constants, *hvp_constants, *op.constants]), depth]
    inputs = [x, y, slopes, offsets, points, lam_history, y_bar, depth, *at.inputs, *weights]
    return ir.Graph(inputs, [*cotangents, mismatch], nodes=op.nodes, initializers=constants, name="adjoint")


def _zeros(op: Ops, batch: ir.Value, shape: list[int], dtype: ir.DataType) -> ir.Value:
    size = op("Concat", batch, op.constant(shape), axis=0)
    return op("ConstantOfShape", size, value=ir.tensor([0.0], dtype=dtype))
