"""The graph (solution, ȳ) -> θ̄, x̄: a solver's adjoint of `icnnrt.mathematics`, traced around an energy."""

from collections.abc import Sequence

import onnx_ir as ir

from icnnrt.format.manifest import OP_DOMAIN, Domain
from icnnrt.mathematics import bregman
from icnnrt.mathematics.bundle import Trajectory
from icnnrt.mathematics.recursive_adjoint import coordinates_adjoint, recursive_adjoint
from icnnrt_exporters.assembly.argmin_graph import UNIT_BOX
from icnnrt_exporters.assembly.coordinates import Coordinates
from icnnrt_exporters.operators.spliced import Spliced
from icnnrt_exporters.operators.traced import INT64, Symbol, Traced
from icnnrt_exporters.surgery import dismantle, dtype_of, replace, shapes_from, static, value


def adjoint_graph(
    push: ir.Model, hvp: ir.Model, K: int, domain: Domain = UNIT_BOX, step_size: float | None = None
) -> ir.Graph:
    """From the heads `cut_vjp` and `hessian_vector_product` to the whole adjoint: `recursive_adjoint`, whose systems an
    operator solves, or with a step size that of `icnnrt.mathematics.bregman`; then

        θ̄, x̄ = one second-order product of all B·K cut points

    `depth` = K (its default) is exact, 1 is Proposition 3 of Amos, Xu, Kolter (2017); the adjoint of Bregman proximal
    gradient takes it, offsets and multipliers and does not use them. `slope_mismatch` [B] is how far the slopes met on
    the way back are from the cuts': at a kink of a ReLU, to the last bit, a sum in another order can fall on the other
    face, and then θ̄ is that face's. The x path stands once, before the loop; its values serve the loop and the final
    product.

    All but y is in p, y = shift + scale∘p: seeds and what comes back of the energy pass through scale. A box, whose
    `push` has `points`, gives l̄ = shift_bar − scale_bar and ū = scale_bar too. The points y_i count as fixed there
    unless depth = K.
    """
    (*weights, x, points_in, e_bar_in, seed_in), results, push_nodes, push_constants = dismantle(push.graph, "push")
    (*hvp_inputs, y_k_in, s_in), (hessian_s,), hvp_nodes, hvp_constants = dismantle(hvp.graph, "hvp")
    boundary = [v for v in results if v.name is not None and v.name.startswith("boundary/")]
    (slopes_again,) = (v for v in results if v.name == "push/slopes_again")
    cotangents = [v for v in results if v not in (*boundary, slopes_again)]
    T, n = dtype_of(y_k_in), static(seed_in, 2)
    sizes = {"y": [n], "slopes": [K, n], "offsets": [K], "cut_points": [K, n], "lam_history": [K, K], "y_bar": [n]}
    given = {name: value(name, T, ["batch", *size]) for name, size in sizes.items()}
    depth = value("depth", INT64, [])
    depth.const_value = ir.tensor(K, dtype=INT64, name="depth")

    xp = Traced("adjoint")
    y, slopes, offsets, cut_points, lam_history, y_bar = (xp.of(v) for v in given.values())
    at = Coordinates(xp, domain, y)
    y_points = at.y(cut_points)

    # Energy and slopes at the cut points wait for nothing; their pull-back waits for what the recursion finds.
    shapes_from(push_nodes, points_in, cut_points.value)
    replace(push_nodes, {points_in: y_points.value})
    pulled_back = Spliced(xp, push_nodes, {e_bar_in: offsets.value, seed_in: slopes.value}, cotangents)
    replace(hvp_nodes, dict(zip(hvp_inputs, [*weights, *boundary], strict=True)))
    product = Spliced(xp, hvp_nodes, {y_k_in: y.value, s_in: y.value}, [hessian_s])

    def hvp_in_p(k: Symbol, s: Symbol) -> Symbol:
        return at.scaled(*product(xp.slot(y_points, k), at.scaled(s)))

    def kkt_adjoint(*of_cut_set: Symbol) -> Sequence[Symbol]:
        operator = at.model.operators + "Adjoint"
        return xp.nodes(operator, *of_cut_set, results=[T, T], ranks=[2, 2], domain=OP_DOMAIN)

    lam = xp.slot(lam_history, K - 1)
    p = at.p(y) if step_size is not None else at.p_of_cuts(slopes, lam, y)
    trajectory = Trajectory(p, lam, slopes, offsets, cut_points, lam_history, *[None] * 5)
    through, p_bar = xp.maximum(xp.minimum(xp.of(depth), K), 1), at.scaled(y_bar)
    e_bar, seed = (
        recursive_adjoint(xp, trajectory, p_bar, hvp_in_p, through, kkt_adjoint)
        if step_size is None
        else bregman.adjoint(xp, at.model, trajectory, p_bar, hvp_in_p, step_size)
    )
    found = dict(zip((str(v.name) for v in cotangents), pulled_back(e_bar, at.scaled(seed)), strict=True))

    like_slopes = xp.node("Shape", slopes, result=INT64, rank=1)
    met = xp.node("Reshape", xp.of(slopes_again), like_slopes, rank=3)
    found["slope_mismatch"] = xp.entry(xp.slot(xp.largest(at.scaled(met) - slopes), 0), 0)
    if at.box:
        point_bar = xp.node("Reshape", found.pop("push/point_bar"), like_slopes, rank=3)
        if step_size is None:
            point_bar = xp.where(xp.of(depth) >= K, point_bar, xp.column(e_bar) * met)
        of_bounds = coordinates_adjoint(xp, cut_points, met, seed, p, y_bar, point_bar)
        mismatch = found.pop("slope_mismatch")
        found |= {"lower_bar": of_bounds.shift - of_bounds.scale, "upper_bar": of_bounds.scale}
        found["slope_mismatch"] = mismatch
    shapes = {str(v.name): xp.of(v).shape for v in cotangents} | dict.fromkeys(("lower_bar", "upper_bar"), y.shape)
    shapes["slope_mismatch"] = ["batch"]
    outputs = [xp.output(v, name, shapes[name]) for name, v in found.items()]
    inputs = [x, *given.values(), depth, *at.inputs, *weights]
    graph = xp.graph(inputs, outputs, [*push_constants, *hvp_constants], "adjoint")
    graph.register_initializer(depth)
    return graph
