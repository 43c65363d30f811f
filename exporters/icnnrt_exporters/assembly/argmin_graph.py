"""The graph x -> y_star: K cuts of the bundle entropy method around the op that solves each model."""

import onnx_ir as ir

from icnnrt.format.manifest import Domain
from icnnrt.format.package import OP_DOMAIN
from icnnrt_exporters.assembly.coordinates import Coordinates
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
UNIT_BOX = Domain()


def argmin_graph(head: ir.Model, K: int, steps: int, domain: Domain = UNIT_BOX) -> ir.Graph:
    """From value and gradient (θ, x, y -> f, gradient) to the whole solver.

        repeat K times:  f, g = f(x, y), ∇_y f(x, y)
                         G = [G; g'],  e = [e; f + g'(½ − y)]
                         y, λ = BundleEntropySolve(G, e, λ)
        then             energy = f(x, y) − H(y),  gap = energy − lower_bound

    Inputs: x, y_init, of a box lower and upper, then the head's weights. What does not depend on y stands before the
    loop. In other domains R takes the place of −H and c of ½, and all but f is in p, y = shift + scale∘p: cuts of
    f(shift + scale∘p), so scale∘∇_y f for g, and the operator's answer for y. See `coordinates`.
    """
    (*weights, x, y), (f, gradient), nodes, initializers = dismantle(head.graph, "energy")
    assert y.dtype is not None
    T, n = y.dtype, static(y, 1)

    y_init = value("y_init", T, ["batch", n])
    shapes_from(nodes, y, y_init)
    before, body_nodes = split(nodes, [y])

    # f at the answer, for the certificate: the same nodes once more, without the gradient's.
    op = Ops("argmin")
    op.extend(before)
    at = Coordinates(domain, T, n)
    at.prepare(op, y_init)
    p_init = at.p(op, y_init)
    K_value, zero = op.constant(K), op.constant([0])
    batch = op("Shape", y_init, start=0, end=1)
    empty_slots = op("Concat", batch, zero, axis=0)
    none = op("ConstantOfShape", empty_slots, value=ir.tensor([0.0], dtype=T))  # [B, 0]
    no_slopes = op(
        "ConstantOfShape", op("Concat", batch, zero, op.constant([n]), axis=0), value=ir.tensor([0.0], dtype=T)
    )

    # Loop body.
    counter, going = value("cut/iteration", INT64, []), value("cut/going", BOOL, [])
    p_in = value("cut/y_in", T, ["batch", n])
    lam_in, G_in = value("cut/lam_in", T, ["batch", None]), value("cut/slopes_in", T, ["batch", None, n])
    e_in = value("cut/offsets_in", T, ["batch", None])
    body = Ops("cut")
    y_in = at.y(body, p_in)
    replace(body_nodes, {y: y_in})
    body.extend(body_nodes)
    axis_1, centre = op.constant([1]), op.constant(at.centre, T)
    slope = at.scaled(body, gradient)
    G = body("Concat", G_in, body("Unsqueeze", slope, axis_1), axis=1)
    centred = body("ReduceSum", body("Mul", slope, body("Sub", centre, p_in)), axis_1, keepdims=0)
    e = body("Concat", e_in, body("Unsqueeze", body("Add", f, centred), axis_1), axis=1)
    p_out, lam, lower_bound, residual = body.many(
        at.model.operators + "Solve", G, e, lam_in, outputs=4, domain=OP_DOMAIN, steps=steps
    )
    pads = body("Gather", op.constant([[0, 0, 0, K - 1 - i] for i in range(K)]), counter, axis=0)
    lam_row = body("Pad", lam, pads)  # [B, K]: zero beyond the cuts there are
    outputs = [body("Identity", going), p_out, lam, G, e, body("Identity", p_in), lam_row, lower_bound, residual]
    types: list[tuple[ir.DataType, list[int | str | None]]] = [
        (BOOL, []),
        (T, ["batch", n]),
        (T, ["batch", None]),
        (T, ["batch", None, n]),
        (T, ["batch", None]),
        (T, ["batch", n]),
        (T, ["batch", K]),
        (DOUBLE, ["batch"]),
        (DOUBLE, ["batch", 3]),
    ]
    names = ["going", "y", "lam", "slopes", "offsets", "cut_point", "lam_row", "lower_bound", "residual"]
    for v, name, (dtype, shape) in zip(outputs, names, types, strict=True):
        describe(v, f"cut/next_{name}", dtype, shape)
    loop_body = ir.Graph([counter, going, p_in, lam_in, G_in, e_in], outputs, nodes=body.nodes, name="cut_and_solve")

    true = op.constant(True, BOOL)
    p_star, lam_last, slopes, offsets, points, rows, bounds, residuals = op.many(
        "Loop", K_value, true, p_init, none, no_slopes, none, outputs=8, body=loop_body
    )
    last = op.constant(K - 1)
    points, rows, residuals = (stacked(op, v, K, batch, size) for v, size in ((points, n), (rows, K), (residuals, 3)))
    cut_points = op("Transpose", points, perm=[1, 0, 2])
    lam_history = op("Transpose", rows, perm=[1, 0, 2])
    lower = op("Gather", bounds, last, axis=0)
    residual_last = op("Gather", residuals, last, axis=0)
    complementarity = op("Transpose", op("Gather", residuals, op.constant(2), axis=2), perm=[1, 0])

    y_star = at.answer(op, p_star)
    value_nodes, mapping = copy(needed(body_nodes, [f]), {y_in: y_star}, "final")
    op.extend(value_nodes)
    f_star = mapping.get(f, f)
    regulariser = at.regulariser(op, p_star)
    energy = op("Add", op("Cast", f_star, to=DOUBLE), regulariser)
    gap = op("Sub", energy, lower)

    final = [
        describe(y_star, "y", T, ["batch", n]),
        describe(lam_last, "lam", T, ["batch", K]),
        describe(slopes, "slopes", T, ["batch", K, n]),
        describe(offsets, "offsets", T, ["batch", K]),
        describe(cut_points, "cut_points", T, ["batch", K, n]),
        describe(lam_history, "lam_history", T, ["batch", K, K]),
        describe(energy, "energy", DOUBLE, ["batch"]),
        describe(lower, "lower_bound", DOUBLE, ["batch"]),
        describe(gap, "gap", DOUBLE, ["batch"]),
        describe(residual_last, "residual", DOUBLE, ["batch", 3]),
        describe(complementarity, "complementarity_history", DOUBLE, ["batch", K]),
    ]
    return ir.Graph(
        [x, y_init, *at.inputs, *weights],
        final,
        nodes=op.nodes,
        initializers=numbered([*initializers, *op.constants]),
        name="argmin",
    )


def stacked(op: Ops, collected: ir.Value, K: int, batch: ir.Value, size: int) -> ir.Value:
    """What a Loop of K trips collected of [B, size], as [K, B, size].

    That it is, by the standard, and the node costs nothing. But onnx.reference (onnx 1.23) gives [K·B, size].
    """
    return op("Reshape", collected, op("Concat", op.constant([K]), batch, op.constant([size]), axis=0), allowzero=1)
