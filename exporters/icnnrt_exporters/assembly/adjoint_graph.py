"""The graph (solution, ȳ) -> θ̄, x̄: cotangents through every cut of the bundle entropy method."""

import onnx_ir as ir

from icnnrt.format.manifest import Domain
from icnnrt.format.package import OP_DOMAIN
from icnnrt_exporters.assembly.coordinates import Coordinates
from icnnrt_exporters.surgery import (
    Ops,
    describe,
    dismantle,
    numbered,
    replace,
    shapes_from,
    split,
    static,
    value,
)

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
UNIT_BOX = Domain()


def adjoint_graph(push: ir.Model, hvp: ir.Model, K: int, domain: Domain = UNIT_BOX) -> ir.Graph:
    """From the heads `cut_vjp` and `hessian_vector_product` to the whole adjoint.

        c_y, c_λ = BundleEntropyAdjoint(G, e, λ, ȳ)                           at the last cut set
        ē = c_λ,  S_i = λ_i c_y + c_λi (y − y_i)
        for k = K−1 .. K−depth+1:
            ȳ = ∇²f(y_k) S_k                                                  the k-th answer is the (k+1)-th cut point
            c_y, c_λ = BundleEntropyAdjoint(G_k, e_k, λ^(k), ȳ)
            ē += c_λ,  S_i += λ^(k)_i c_y + c_λi (y_k − y_i)                  for i < k
        θ̄, x̄ = one second-order product of all B·K cut points

    `depth` = K (its default) is exact, 1 is Proposition 3 of Amos, Xu, Kolter (2017). `slope_mismatch` [B] is how far
    the slopes met on the way back are from the cuts': at a kink of a ReLU, to the last bit, a sum in another order can
    fall on the other face, and then θ̄ is that face's. The x path stands once, before the loop; its values serve the
    loop and the final product.

    In other domains this is done in p, y = shift + scale∘p: slopes, offsets and cut points are those of p, seeds and
    what comes back of the energy pass through scale. A box gives l̄ = shift_bar − scale_bar and ū = scale_bar too::

        shift_bar = ȳ + Σ_i ȳ_i,          scale_bar = p∘ȳ + Σ_i p_i∘ȳ_i + S_i∘∇f(y_i)
        ȳ_i = ē_i ∇f(y_i) + ∇²f(y_i)(scale∘S_i)

    the second term only where depth = K: else the points y_i count as fixed. `push` has `points` for a box.
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

    y = value("y", T, ["batch", n])
    slopes, offsets = value("slopes", T, ["batch", K, n]), value("offsets", T, ["batch", K])
    lam_history, y_bar = value("lam_history", T, ["batch", K, K]), value("y_bar", T, ["batch", n])
    depth = value("depth", INT64, [])
    depth.const_value = ir.tensor(K, dtype=INT64, name="depth")

    # Energy and slopes at the cut points wait for nothing; their pull-back waits for what the loop finds.
    op = Ops("adjoint")
    at = Coordinates(domain, T, n)
    at.prepare(op, y, (2, 3))
    y_points = cut_points
    if not at.identity:
        points = value("cut_points", T, ["batch", K, n])
        y_points = at.y(op, points, 3)
        replace(push_nodes, {cut_points: y_points})
        shapes_from(push_nodes, y_points, points)
        cut_points = points
    shapes_from(push_nodes, e_bar_in, offsets)
    shapes_from(push_nodes, seed_in, slopes)
    before, after = split(push_nodes, [e_bar_in, seed_in])
    op.extend(before)

    zero, one, two = op.constant([0]), op.constant([1]), op.constant([2])
    K_value, one_scalar, K_minus_1 = op.constant(K), op.constant(1), op.constant(K - 1)

    def spread(ops: Ops, lam_row: ir.Value, c_y: ir.Value, c_lam: ir.Value, p_k: ir.Value) -> ir.Value:
        """λ_i c_y + c_λi (p_k − p_i), [B, K, n]."""
        moved = ops("Sub", ops("Unsqueeze", p_k, one), cut_points)
        along = ops("Mul", ops("Unsqueeze", lam_row, two), ops("Unsqueeze", c_y, one))
        return ops("Add", along, ops("Mul", ops("Unsqueeze", c_lam, two), moved))

    lam_last = op("Gather", lam_history, K_minus_1, axis=1)
    adjoint_op = at.model.operators + "Adjoint"
    p = at.p_of_cuts(op, slopes, lam_last, y)
    p_bar = at.scaled(op, y_bar)
    c_y, c_lam = op.many(adjoint_op, slopes, offsets, lam_last, p_bar, outputs=2, domain=OP_DOMAIN)
    seed_last = spread(op, lam_last, c_y, c_lam, p)

    # Loop body: the second-order nodes, less what depends on neither the cut point nor the seed.
    same = dict(zip(hvp_inputs, [*weights, *boundary], strict=True))
    replace(hvp_nodes, same)
    shapes_from(hvp_nodes, y_k_in, y)
    shapes_from(hvp_nodes, s_in, y)
    invariant, hvp_nodes = split(hvp_nodes, [y_k_in, s_in])
    op.extend(invariant)

    counter, going = value("back/iteration", INT64, []), value("back/going", BOOL, [])
    e_bar, seed = value("back/e_bar_in", T, ["batch", K]), value("back/seed_in", T, ["batch", K, n])
    body = Ops("back")
    k = body("Sub", K_minus_1, counter)
    p_k = body("Gather", cut_points, k, axis=1)
    y_k = p_k if at.identity else body("Gather", y_points, k, axis=1)
    s_k = at.scaled(body, body("Gather", seed, k, axis=1))
    replace(hvp_nodes, {y_k_in: y_k, s_in: s_k})
    body.extend(hvp_nodes)
    p_bar_k = at.scaled(body, same.get(hessian_s, hessian_s))
    end = body("Unsqueeze", k, zero)
    lam_row = body("Gather", lam_history, body("Sub", k, one_scalar), axis=1)
    cut_set = [body("Slice", v, zero, end, one) for v in (slopes, offsets, lam_row)]
    c_y_k, c_lam_k = body.many(adjoint_op, *cut_set, p_bar_k, outputs=2, domain=OP_DOMAIN)
    pads = body("Concat", op.constant([0, 0, 0]), body("Unsqueeze", body("Sub", K_value, k), zero), axis=0)
    c_lam_k = body("Pad", c_lam_k, pads)
    outputs = [
        describe(body("Identity", going), "back/next_going", BOOL, []),
        describe(body("Add", e_bar, c_lam_k), "back/next_e_bar", T, ["batch", K]),
        describe(body("Add", seed, spread(body, lam_row, c_y_k, c_lam_k, p_k)), "back/next_seed", T, ["batch", K, n]),
    ]
    loop_body = ir.Graph([counter, going, e_bar, seed], outputs, nodes=body.nodes, name="back_through_one_cut")

    trips = op("Sub", op("Max", op("Min", depth, K_value), one_scalar), one_scalar)
    e_bar_all, seed_all = op.many("Loop", trips, op.constant(True, BOOL), c_lam, seed_last, outputs=2, body=loop_body)
    replace(after, {e_bar_in: e_bar_all, seed_in: at.scaled(op, seed_all, 3)})
    op.extend(after)

    met, mismatch = slope_mismatch(op, at, slopes_again, slopes)
    if at.box:
        assert point_bar is not None, "push has no points"
        held = op("Mul", op("Unsqueeze", e_bar_all, two), met)
        moving = op("Reshape", point_bar, op("Shape", slopes))
        point_bar = op("Where", op("GreaterOrEqual", depth, K_value), moving, held)
        cotangents += bounds_bars(op, at, p, y_bar, cut_points, seed_all, met, point_bar)

    constants = [*numbered([*push_constants, *hvp_constants, *op.constants]), depth]
    inputs = [x, y, slopes, offsets, cut_points, lam_history, y_bar, depth, *at.inputs, *weights]
    return ir.Graph(inputs, [*cotangents, mismatch], nodes=op.nodes, initializers=constants, name="adjoint")


def slope_mismatch(op: Ops, at: Coordinates, slopes_again: ir.Value, slopes: ir.Value) -> tuple[ir.Value, ir.Value]:
    """∇_y f as met on the way back, [B, K, n], and how far the slopes they make are from those of the cuts, [B]."""
    met = op("Reshape", slopes_again, op("Shape", slopes))
    apart = op("Abs", op("Sub", at.scaled(op, met, 3), slopes))
    assert slopes.dtype is not None
    farthest = op("ReduceMax", apart, op.constant([1, 2]), keepdims=0)
    return met, describe(farthest, "slope_mismatch", slopes.dtype, ["batch"])


def bounds_bars(
    op: Ops,
    at: Coordinates,
    p: ir.Value,
    y_bar: ir.Value,
    cut_points: ir.Value,
    seed: ir.Value,
    met: ir.Value,
    point_bar: ir.Value,
) -> list[ir.Value]:
    """lower_bar and upper_bar: l̄ = shift_bar − scale_bar, ū = scale_bar; point_bar [B, K, n] are the ȳ_i."""
    one = op.constant([1])
    of_cuts = op("Add", op("Mul", cut_points, point_bar), op("Mul", seed, met))
    scale_bar = op("Add", op("Mul", p, y_bar), op("ReduceSum", of_cuts, one, keepdims=0))
    shift_bar = op("Add", y_bar, op("ReduceSum", point_bar, one, keepdims=0))
    return [
        describe(op("Sub", shift_bar, scale_bar), "lower_bar", at.dtype, ["batch", at.n]),
        describe(op("Identity", scale_bar), "upper_bar", at.dtype, ["batch", at.n]),
    ]
