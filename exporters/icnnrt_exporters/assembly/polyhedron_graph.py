"""The graph x, G, h, A, b, bounds -> y*: cuts of the bundle method around the operator that solves each model."""

from typing import NamedTuple

import onnx_ir as ir

from icnnrt.format.manifest import PolyhedronSpec
from icnnrt.format.package import OP_DOMAIN
from icnnrt.mathematics import certificate, rounding
from icnnrt.mathematics.bundle_qp import FALLS, FAR, FURTHER, LEFT, MILD, OFF, OUT, SAME
from icnnrt.mathematics.qp_reference import BOUND_MAX, STEPS, TOLERANCE
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.status import Status
from icnnrt_exporters.operators.traced import Symbol, Traced
from icnnrt_exporters.surgery import (
    Ops,
    copy,
    describe,
    dismantle,
    numbered,
    shapes_from,
    split,
    static,
    value,
)

INT32, INT64, DOUBLE, BOOL = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL
NAN, INFINITY = float("nan"), float("inf")
ENOUGH = TOLERANCE[DOUBLE.numpy()][0]  # the residual up to which a quadratic program is solved
LOWEST = -1e308  # no lower bound is below it, but for none, −∞


class Constraints:
    """The inputs that say where y lies, for one graph: float64, each with a leading axis of B or, shared, of 1."""

    def __init__(self, n: int) -> None:
        self.G, self.h = value("G", DOUBLE, ["B_G", "m", n]), value("h", DOUBLE, ["B_h", "m"])
        self.A, self.b = value("A", DOUBLE, ["B_A", "q", n]), value("b", DOUBLE, ["B_b", "q"])
        self.lower, self.upper = value("lower", DOUBLE, ["B_lower", n]), value("upper", DOUBLE, ["B_upper", n])

    @property
    def inputs(self) -> list[ir.Value]:
        return [self.G, self.h, self.A, self.b, self.lower, self.upper]

    def wide(self, op: Ops, B: ir.Value) -> tuple[ir.Value, ir.Value]:
        """G and A for every sample, with a column of zeros for t."""
        one = op.constant([1])

        def widened(rows: ir.Value) -> ir.Value:
            size, n = (op("Shape", rows, start=axis, end=axis + 1) for axis in (1, 2))
            every = op("Expand", rows, op("Concat", B, size, n, axis=0))
            return op("Concat", every, filled(op, op("Concat", B, size, one, axis=0), 0.0), axis=2)

        return widened(self.G), widened(self.A)


class _Met(NamedTuple):
    """What is found at a point, [B, 1] but g."""

    f: ir.Value
    g: ir.Value  # [B, n]
    met: ir.Value  # f + (μ/2) ‖y‖²
    less: ir.Value  # what is better than that
    live: ir.Value  # going, and all numbers
    finite: ir.Value  # out, or all numbers


def polyhedron_graph(head: ir.Model, spec: PolyhedronSpec) -> ir.Graph:
    """From value and gradient (θ, x, y -> f, gradient) to the whole of `icnnrt.mathematics.bundle_qp.bundle_qp_argmin`.

        y = argmin over z in P of ½ ‖z‖² − y_init'z
        repeat:   f, g = f(x, y), ∇_y f(x, y);   rows = [rows; g' −1],  heights = [heights; g'y − f]
                  y, t, λ, ν, μ = QPSolve(t + (μ/2) ‖y‖², rows <= heights);   lower bound = its dual value
                  keep y if f + (μ/2) ‖y‖² is the least met;   done where that is near the lower bound
        with μ = 0, where the model falls along a ray d:  y = y_0 + T max(1, |y_0|) d;  done where f falls at T = 2^60

    Inputs: x, y_init [B, n], G, h, A, b, lower, upper, and, with defaults, `iterations`, `mu` and `tolerance`; all but
    x is float64 whatever the package is. The cut of a sample that is done, or out, has a bound of NaN: the operator
    then leaves that sample out, so that it costs nothing and disturbs no other. The loop ends with the last sample, so
    the trajectory has as many slots as cuts were needed.

    Every model starts cold: from the answer of the one before it saves a step or two of ten (measured), and where that
    leads astray it would have to be solved again.
    """
    (*weights, x, y), (f, gradient), nodes, initializers = dismantle(head.graph, "energy")
    assert y.dtype is not None
    T, n = y.dtype, static(y, 1)
    y_init, P = value("y_init", DOUBLE, ["batch", n]), Constraints(n)
    settings = [
        setting("iterations", spec.iterations, INT64),
        setting("mu", spec.mu, DOUBLE),
        setting("tolerance", spec.tolerance, DOUBLE),
    ]
    iterations, mu, tolerance = settings
    shapes_from(nodes, y, y_init)
    before, body_nodes = split(nodes, [y])

    op = Ops("argmin")
    op.extend(before)
    zero, one, last_axis = op.constant([0]), op.constant([1]), op.constant([-1])
    n_size, nan, none = op.constant([n]), op.constant(NAN, DOUBLE), op.constant(0.0, DOUBLE)
    absent = filled(op, op.constant([1, 0]), 0.0)  # of h_lower and start
    B = op("Shape", y_init, start=0, end=1)
    m, q = op("Shape", P.G, start=1, end=2), op("Shape", P.A, start=1, end=2)
    column = op("Concat", B, one, axis=0)

    sizes = op("Concat", B, n_size, axis=0)

    # y_0
    projection = op.many(
        "QPSolve",
        op.constant([[[float(i == j) for j in range(n)] for i in range(n)]], DOUBLE),
        op("Neg", y_init),
        P.G,
        absent,
        *(P.h, P.A, P.b, P.lower, P.upper),
        absent,
        outputs=9,
        domain=OP_DOMAIN,
        steps=STEPS,
    )
    start_status = op("Unsqueeze", op("Cast", projection[7], to=INT64), one)
    assert x.shape is not None
    numbers = all_finite(op, op("Flatten", x) if len(x.shape) > 1 else op("Unsqueeze", x, one), one)
    answered = op.constant(int(QPStatus.INACCURATE) + 1)
    started = op("And", numbers, op("Less", start_status, answered))
    y_0 = op("Where", started, projection[0], none)

    # What all models have: the rows of P with a column for t, and bounds that are none as numbers, to be taken 0 times.
    limits = op.constant(-BOUND_MAX, DOUBLE), op.constant(BOUND_MAX, DOUBLE)
    G, A = P.wide(op, B)
    h = op("Clip", op("Expand", P.h, op("Concat", B, m, axis=0)), *limits)
    b = op("Expand", P.b, op("Concat", B, q, axis=0))
    lower, upper = (op("Clip", op("Expand", v, sizes), *limits) for v in (P.lower, P.upper))
    lowest, infinite = filled(op, column, -INFINITY), filled(op, column, INFINITY)
    half_mu = op("Mul", op.constant(0.5, DOUBLE), mu)

    def meet(ops: Ops, y_k: ir.Value, rounded: ir.Value, f_k: ir.Value, g: ir.Value, going: ir.Value) -> _Met:
        """f, g and f + (μ/2) ‖y‖² at y_k, and which samples have numbers there."""
        if T != DOUBLE:
            f_k, g = (ops("Cast", v, to=DOUBLE) for v in (f_k, g))
        f_k = ops("Unsqueeze", f_k, one)
        if T != DOUBLE:
            # f is told at y along the cut that touches at ŷ, so that every cut is one of f.
            off = ops("Sub", y_k, ops("Cast", rounded, to=DOUBLE))
            f_k = ops("Add", f_k, ops("ReduceSum", ops("Mul", g, off), last_axis, keepdims=1))
        met = ops("Add", f_k, ops("Mul", half_mu, ops("ReduceSumSquare", y_k, last_axis, keepdims=1)))
        live = ops("And", going, all_finite(ops, ops("Concat", met, g, axis=1), last_axis))
        # By more than a program is solved to, so that of points that are the same the first stays.
        size = ops("Add", op.constant(1.0, DOUBLE), ops("Abs", met))
        less = ops("Sub", met, ops("Mul", op.constant(SAME, DOUBLE), size))
        return _Met(f_k, g, met, less, live, ops("Equal", live, going))

    # --- Before the first trip: y_0 is met.
    rounded_0 = y_0 if T == DOUBLE else op("Cast", y_0, to=T)
    first_nodes, mapping = copy(body_nodes, {y: rounded_0}, "start")
    op.extend(first_nodes)
    first = meet(op, y_0, rounded_0, mapping.get(f, f), mapping.get(gradient, gradient), started)
    no_cut, false = op("Expand", op.constant([[0]]), column), op("Expand", op.constant([[False]], BOOL), column)
    nowhere, no_ray = filled(op, column, 0.0), filled(op, sizes, 0.0)
    start: dict[str, tuple[ir.DataType, list[int | str | None], ir.Value]] = {
        "y": (DOUBLE, ["batch", n], y_0),
        "f": (DOUBLE, ["batch", 1], first.f),
        "g": (DOUBLE, ["batch", n], first.g),
        "going": (BOOL, ["batch", 1], first.live),
        "finite": (BOOL, ["batch", 1], first.finite),
        "code": (INT64, ["batch", 1], no_cut),  # SOLVED
        "best_y": (DOUBLE, ["batch", n], op("Where", first.live, y_0, nan)),
        "best": (INT64, ["batch", 1], no_cut),
        "energy": (DOUBLE, ["batch", 1], op("Where", first.live, first.met, infinite)),
        "beaten_by": (DOUBLE, ["batch", 1], op("Where", first.live, first.less, infinite)),
        "lower_bound": (DOUBLE, ["batch", 1], lowest),
        "cuts": (INT64, ["batch", 1], no_cut),
        "lam": (DOUBLE, ["batch", None], filled(op, op("Concat", B, m, axis=0), 0.0)),
        "nu": (DOUBLE, ["batch", None], filled(op, op("Concat", B, q, axis=0), 0.0)),
        "bounds": (DOUBLE, ["batch", n], no_ray),
        "residual": (DOUBLE, ["batch", 3], filled(op, op("Concat", B, op.constant([3]), axis=0), NAN)),
        "rows": (DOUBLE, ["batch", None, n + 1], G),
        "heights": (DOUBLE, ["batch", None], h),
    }
    # With μ = 0 alone: the steepest slopes met, how far out on which ray y is, and whether f fell there.
    on_rays: dict[str, tuple[ir.DataType, list[int | str | None], ir.Value]] = {
        "steepest": (DOUBLE, ["batch", n], op("Where", first.live, op("Abs", first.g), none)),
        "out": (DOUBLE, ["batch", 1], nowhere),
        "falls": (BOOL, ["batch", 1], false),
        "ray": (DOUBLE, ["batch", n], no_ray),
        "unbounded": (BOOL, ["batch", 1], false),
    }
    # Bounds that are none as infinities.
    open_lower, open_upper = (
        op("Where", op("Less", op("Abs", v), limits[1]), v, op("Mul", v, infinite)) for v in (lower, upper)
    )
    far_out, origin_size = (
        op.constant(FAR, DOUBLE),
        op("Max", op.constant(1.0, DOUBLE), op("ReduceMax", op("Abs", y_0), last_axis, keepdims=1)),
    )
    unit_rows = op(
        "Expand",
        op.constant([[[float(i == j) for j in range(n + 1)] for i in range(n)]], DOUBLE),
        op("Concat", B, op.constant([n, n + 1]), axis=0),
    )
    of_t = op("Neg", op("Expand", op.constant([[1.0]], DOUBLE), column))
    of_t_alone = op.constant([[float(j == n) for j in range(n + 1)]], DOUBLE)
    but_t = op.constant([[float(j < n) for j in range(n + 1)]], DOUBLE)
    flat_Q = op.constant([[[float(i == j < n) for j in range(n + 1)] for i in range(n + 1)]], DOUBLE)
    Q = op("Mul", flat_Q, mu)
    lower_t, upper_t = op("Concat", open_lower, lowest, axis=1), op("Concat", open_upper, infinite, axis=1)
    eps = {ir.DataType.FLOAT: 2.0**-23}.get(T, 2.0**-52)

    all_of = op.constant([2**62])
    most_trips = op("Max", iterations, op.constant(1))  # so that there is a slot, at least

    def trip(flat: bool) -> tuple[ir.Graph, dict[str, tuple[ir.DataType, list[int | str | None], ir.Value]]]:
        """One trip: y_k is cut, the model of k + 1 cuts solved, and its answer met. `flat`: of μ = 0."""
        name = "flat" if flat else "cut"
        state = start | on_rays if flat else start
        k, going_on = value(f"{name}/k", INT64, []), value(f"{name}/going_on", BOOL, [])
        s = {key: value(f"{name}/{key}_in", dtype, shape) for key, (dtype, shape, _) in state.items()}
        body = Ops(name)

        def total(v: ir.Value) -> ir.Value:
            return body("ReduceSum", v, last_axis, keepdims=1)

        touches = body("Mul", s["g"], s["y"])
        height = body("Sub", total(touches), s["f"])
        if flat:
            # Far out a cut is lowered by what rounding may have raised it.
            size = body("Add", body("Abs", s["f"]), total(body("Abs", touches)))
            raised = body("Mul", op.constant(certificate.UNCERTAIN * eps, DOUBLE), size)
            height = body("Add", height, body("Where", body("Greater", s["out"], none), raised, none))
        height = body("Where", s["going"], height, nan)
        rows = body("Concat", s["rows"], body("Unsqueeze", body("Concat", s["g"], of_t, axis=1), one), axis=1)
        heights = body("Concat", s["heights"], height, axis=1)
        model_rows, model_heights = rows, heights
        if flat:
            # The model of f/σ, t = σ t̂, where slopes are small.
            least = op.constant(1.0, DOUBLE)
            σ = body("ReduceMax", s["steepest"], last_axis, keepdims=1)
            sloped = body("Greater", σ, none)
            σ = body("Where", sloped, body("Min", σ, least), least)
            by_σ = body("Div", least, σ)
            of_y = body("Unsqueeze", body("Add", body("Mul", by_σ, but_t), of_t_alone), one)
            cuts = body("Mul", body("Slice", rows, m, all_of, one), of_y)
            model_rows = body("Concat", G, cuts, axis=1)
            model_heights = body("Concat", h, body("Mul", body("Slice", heights, m, all_of, one), by_σ), axis=1)
        data = [model_rows, absent, model_heights, A, b, lower_t, upper_t]
        solution = body.many("QPSolve", Q, of_t_alone, *data, absent, outputs=9, domain=OP_DOMAIN, steps=STEPS)
        z, lam, nu, mu_all, _, _, residual, qp_status, ray = solution
        code = body("Unsqueeze", body("Cast", qp_status, to=INT64), one)
        good = body("And", s["going"], body("Less", code, answered))
        z_y = body("Slice", z, zero, n_size, one)
        bounds = body("Slice", mu_all, zero, n_size, one)
        if flat:
            nu, bounds = body("Mul", nu, σ), body("Mul", bounds, σ)
            of_G, of_cuts = (body("Slice", lam, *ends, one) for ends in ((zero, m), (m, all_of)))
            lam = body("Concat", body("Mul", of_G, σ), of_cuts, axis=1)
        next_k = body("Add", k, op.constant(1))

        # The dual value of the model, for any multipliers: divided by their sum over the cuts they are its multipliers
        # too.
        held = body("Relu", lam)
        weight = total(body("Slice", held, m, all_of, one))
        multipliers = body("Concat", held, nu, bounds, axis=1)
        if flat:
            # What has no slope needs nothing to hold it: such multipliers are rounding, with nothing to see it by.
            of_P = body("Concat", body("Slice", held, zero, m, one), nu, bounds, axis=1)
            of_P = body("Where", sloped, of_P, none)
            of_G, of_others = (body("Slice", of_P, *ends, one) for ends in ((zero, m), (m, all_of)))
            multipliers = body("Concat", of_G, body("Slice", held, m, all_of, one), of_others, axis=1)
        multipliers = body("Div", multipliers, weight)
        sides = body("Where", body("Greater", bounds, none), upper, lower)
        terms = body("Mul", multipliers, body("Concat", heights, b, sides, axis=1))
        all_rows = body("Concat", rows, A, unit_rows, axis=1)

        def summed(weights: ir.Value, rows: ir.Value) -> ir.Value:
            product = body("Squeeze", body("MatMul", body("Unsqueeze", weights, one), rows), one)
            return body("Slice", product, zero, n_size, one)

        along = summed(multipliers, all_rows)
        if flat:
            # Of what is left of it, rounding counts by the size of y, more than that by the bound that it points at.
            cancel = summed(body("Abs", multipliers), body("Abs", all_rows))
            steep = body("Where", body("Greater", s["steepest"], none), s["steepest"], σ)
            cancel = body("Add", steep, cancel)
            tiny = body("LessOrEqual", body("Abs", along), body("Mul", op.constant(LEFT, DOUBLE), cancel))
            side = body("Where", body("Greater", along, none), open_lower, open_upper)
            by = body("Where", tiny, z_y, side)
        else:
            by = body("Mul", along, body("Div", op.constant(0.5, DOUBLE), mu))  # (1/2μ) ‖along‖²
        left = body("Abs", body("Mul", along, by))
        dual = body("Neg", total(body("Concat", terms, left, axis=1)))
        higher = body("And", good, body("Greater", dual, s["lower_bound"]))  # NaN is not
        lower_bound = body("Where", higher, dual, s["lower_bound"])

        moving, y_k = good, body("Where", good, z_y, none)
        if flat:
            falling = body("And", s["going"], body("Equal", code, op.constant(int(QPStatus.DUAL_INFEASIBLE))))
            moving = body("Or", good, falling)
            further = body("Mul", body("Min", s["out"], op.constant(FURTHER, DOUBLE)), s["out"])
            back = body("Max", body("Sqrt", s["out"]), op.constant(OUT, DOUBLE))
            out = body("Min", body("Where", s["falls"], further, back), far_out)
            out = body("Where", body("Equal", next_k, most_trips), far_out, out)
            out = body("Where", falling, out, none)
            d = body("Slice", ray, zero, n_size, one)
            d = body("Where", body("IsInf", open_lower), d, body("Max", d, none))
            d = body("Where", body("IsInf", open_upper), d, body("Min", d, none))
            d = body("Where", falling, d, none)
            most = body("ReduceMax", body("Abs", d), last_axis, keepdims=1)
            d = body("Div", d, body("Where", body("Greater", most, none), most, least))
            y_far = body("Add", y_0, body("Mul", body("Mul", out, origin_size), d))
            y_k = body("Where", falling, y_far, y_k)
        rounded = y_k if T == DOUBLE else body("Cast", y_k, to=T)
        of_f, found = copy(body_nodes, {y: rounded}, name)
        body.extend(of_f)
        at = meet(body, y_k, rounded, found.get(f, f), found.get(gradient, gradient), moving)
        live, finite = at.live, at.finite
        rays: dict[str, ir.Value] = {}
        if flat:
            finite = body("Or", finite, falling)  # f may overflow far out: it does not fall there
            slope = body("Abs", at.g)
            steepest = body("Where", live, body("Max", s["steepest"], slope), s["steepest"])
            against = body("Mul", op.constant(-FALLS, DOUBLE), total(body("Mul", steepest, body("Abs", d))))
            falls = body("And", body("And", live, falling), body("Less", total(body("Mul", at.g, d)), against))
            last = body("GreaterOrEqual", out, far_out)
            above = body("Sub", slope, body("Mul", op.constant(MILD, DOUBLE), s["steepest"]))
            mild = body("LessOrEqual", body("ReduceMax", above, last_axis, keepdims=1), none)
            goes_on = body("Or", body("Not", last), body("And", mild, body("Not", falls)))
            live = body("And", live, goes_on)
            unbounded = body("Or", s["unbounded"], body("And", falls, last))
            rays = {"steepest": steepest, "out": out, "falls": falls, "ray": d, "unbounded": unbounded}
            rays["ray"] = body("Where", s["unbounded"], s["ray"], d)
        feasible = body("LessOrEqual", body("Slice", residual, one, op.constant([2]), one), op.constant(ENOUGH, DOUBLE))
        better = body("And", body("And", live, feasible), body("Less", at.met, s["beaten_by"]))
        energy = body("Where", better, at.met, s["energy"])
        near = _near(body, op, body("Sub", energy, lower_bound), lower_bound, tolerance)
        after = {
            "y": y_k,
            "f": at.f,
            "g": at.g if at.g is not found.get(gradient, gradient) else body("Identity", at.g),
            "going": body("And", live, body("Not", near)),
            "finite": body("And", s["finite"], finite),
            "code": body("Where", s["going"], code, s["code"]),
            "best_y": body("Where", better, y_k, s["best_y"]),
            "best": body("Where", better, next_k, s["best"]),
            "energy": energy,
            "beaten_by": body("Where", better, at.less, s["beaten_by"]),
            "lower_bound": lower_bound,
            "cuts": body("Where", good, next_k, s["cuts"]),
            "lam": body("Where", good, lam, body("Concat", s["lam"], nowhere, axis=1)),
            "nu": body("Where", good, nu, s["nu"]),
            "bounds": body("Where", good, bounds, s["bounds"]),
            "residual": body("Where", good, residual, s["residual"]),
            "rows": rows,
            "heights": heights,
            **rays,
        }
        any_going = body("Cast", body("ReduceSum", body("Cast", after["going"], to=INT64), keepdims=0), to=BOOL)
        outputs = [
            describe(any_going, f"{name}/next_going_on", BOOL, []),
            *(describe(after[key], f"{name}/next_{key}", dtype, shape) for key, (dtype, shape, _) in state.items()),
            describe(body("Identity", s["y"]), f"{name}/point", DOUBLE, ["batch", n]),
        ]
        graph = ir.Graph([k, going_on, *s.values()], outputs, nodes=body.nodes, name=f"{name}_and_solve")
        return graph, state

    def branch(flat: bool) -> ir.Graph:
        """All trips, and what they end with."""
        graph, state = trip(flat)
        name = "without_curvature" if flat else "with_curvature"
        ops = Ops(name)
        *ends, points = ops.many(
            "Loop",
            most_trips,
            op.constant(True, BOOL),
            *(first for *_, first in state.values()),
            outputs=len(state) + 1,
            body=graph,
        )
        end = dict(zip(state, ends, strict=True))
        if not flat:
            end |= {key: ops("Identity", v) for key, v in (("ray", no_ray), ("unbounded", false))}
        described = [
            *(describe(end[key], f"{name}/{key}", dtype, shape) for key, (dtype, shape, _) in handed_on.items()),
            describe(points, f"{name}/points", DOUBLE, [None, "batch", n]),
        ]
        return ir.Graph([], described, nodes=ops.nodes, name=name)

    handed_on = {
        key: of
        for key, of in (start | on_rays).items()
        if key not in ("y", "f", "g", "going", "beaten_by", "steepest", "out", "falls")
    }
    *ends, points = op.many(
        "If",
        op("Greater", mu, none),
        outputs=len(handed_on) + 1,
        then_branch=branch(flat=False),
        else_branch=branch(flat=True),
    )
    end = dict(zip(handed_on, ends, strict=True))

    # --- The answer and its status.
    slopes = op("Slice", op("Slice", end["rows"], m, all_of, one), zero, n_size, op.constant([2]))
    offsets = op("Neg", op("Slice", end["heights"], m, all_of, one))
    cut_points = op("Transpose", points, perm=[1, 0, 2])
    unused, at_first = op("IsNaN", offsets), (zero, one, one)
    offsets = op("Where", unused, op("Slice", offsets, *at_first), offsets)
    unused = op("Unsqueeze", unused, op.constant([2]))
    slopes, cut_points = (op("Where", unused, op("Slice", a, *at_first), a) for a in (slopes, cut_points))

    bounded = op("And", op("Greater", end["lower_bound"], op.constant(LOWEST, DOUBLE)), op("Not", end["unbounded"]))
    run = op("And", op("Not", op("IsNaN", op("Slice", end["best_y"], *at_first))), bounded)
    y_star = op("Where", run, end["best_y"], nan)
    energy, lower_bound = (op("Where", run, end[name], nan) for name in ("energy", "lower_bound"))
    gap = op("Sub", energy, lower_bound)
    large = op("Not", _near(op, op, gap, lower_bound, tolerance))
    status = op("Where", large, op.constant(int(Status.GAP)), op.constant(int(Status.CONVERGED)))
    widths = op("Concat", m, op("Shape", offsets, start=1, end=2), axis=0)
    lam_rows, lam_cuts = op.many("Split", end["lam"], widths, outputs=2, axis=1)

    # `icnnrt.mathematics.rounding` in one trace, so that what its figures share is computed once.
    xp = Traced(f"{op.prefix}/{len(op.nodes)}", op)

    def row(v: ir.Value) -> Symbol:
        return xp.row(xp.of(v, rank=2))

    def told(figure: Symbol) -> ir.Value:
        """[B, 1, 1] -> [B, 1]."""
        return op("Squeeze", figure.value, op.constant([2]))

    met, apart, point = row(energy), row(gap), row(y_star)
    cuts = (xp.of(slopes), row(offsets), xp.of(cut_points))
    doubt = told(rounding.uncertainty_at(xp, met, apart, *cuts, row(lam_cuts), point, eps))
    small = op("Mul", tolerance, _unit(op, op, lower_bound))
    hidden = op("And", op("Greater", doubt, small), op("Not", op("Greater", gap, doubt)))
    status = op("Where", hidden, op.constant(int(Status.PRECISION)), status)
    constraints = (xp.of(P.G), row(P.h), xp.of(P.A), row(P.b), row(P.lower), row(P.upper))
    multipliers = (row(v) for v in (lam_rows, end["nu"], end["bounds"]))
    excess, violation = map(told, rounding.excess(xp, *constraints, point, *multipliers))
    unsolved = op("Or", op("And", large, op("Greater", end["code"], op.constant(int(QPStatus.SOLVED)))), op("Not", run))
    unsolved = op("Or", unsolved, op("Greater", violation, op.constant(OFF, DOUBLE)))
    status = op("Where", unsolved, op.constant(int(Status.SOLVER)), status)
    noise = told(rounding.rounding_at(xp, met, *cuts, point, eps))
    noise = op("Add", noise, op("Mul", op.constant(ENOUGH, DOUBLE), _unit(op, op, lower_bound)))
    below = op("Sub", op("Neg", gap), excess)
    most = op("Max", below, told(rounding.violation(xp, *cuts)))
    status = op("Where", op("Greater", most, noise), op.constant(int(Status.NOT_CONVEX)), status)
    status = op("Where", end["unbounded"], op.constant(int(Status.UNBOUNDED)), status)
    status = op("Where", end["finite"], status, op.constant(int(Status.NOT_FINITE)))
    # By what became of the projection; −1 where it is solved.
    verdicts = [-1, -1, Status.INFEASIBLE, Status.SOLVER, Status.SOLVER, Status.NOT_FINITE_INPUT, Status.SOLVER]
    verdict = op("Gather", op.constant([int(code) for code in verdicts]), start_status, axis=0)
    status = op("Where", op("Less", verdict, op.constant(0)), status, verdict)
    status = op("Where", numbers, status, op.constant(int(Status.NOT_FINITE_INPUT)))
    ray = op("Where", op("Equal", status, op.constant(int(Status.UNBOUNDED))), end["ray"], none)

    def flat_column(v: ir.Value) -> ir.Value:
        return op("Squeeze", v, one)

    def shown(v: ir.Value) -> ir.Value:
        return op("Where", run, v, nan)

    final = [
        describe(y_star, "y", DOUBLE, ["batch", n]),
        describe(flat_column(energy), "energy", DOUBLE, ["batch"]),
        describe(flat_column(lower_bound), "lower_bound", DOUBLE, ["batch"]),
        describe(flat_column(gap), "gap", DOUBLE, ["batch"]),
        describe(shown(end["residual"]), "residual", DOUBLE, ["batch", 3]),
        describe(op("Cast", flat_column(status), to=INT32), "status", INT32, ["batch"]),
        describe(flat_column(end["cuts"]), "cuts", INT64, ["batch"]),
        describe(shown(lam_rows), "lam", DOUBLE, ["batch", "m"]),
        describe(shown(end["nu"]), "nu", DOUBLE, ["batch", "q"]),
        describe(shown(end["bounds"]), "bounds", DOUBLE, ["batch", n]),
        describe(flat_column(end["best"]), "best", INT64, ["batch"]),
        describe(slopes, "slopes", DOUBLE, ["batch", "slots", n]),
        describe(offsets, "offsets", DOUBLE, ["batch", "slots"]),
        describe(cut_points, "cut_points", DOUBLE, ["batch", "slots", n]),
        describe(lam_cuts, "cut_lam", DOUBLE, ["batch", "slots"]),
        describe(ray, "ray", DOUBLE, ["batch", n]),
    ]
    return ir.Graph(
        [x, y_init, *P.inputs, *settings, *weights],
        final,
        nodes=op.nodes,
        initializers=[*numbered([*initializers, *op.constants]), *settings],
        name="argmin_polyhedron",
    )


def setting(name: str, number: float, dtype: ir.DataType) -> ir.Value:
    """An input that has a default."""
    setting = value(name, dtype, [])
    setting.const_value = ir.tensor(number, dtype=dtype, name=name)
    return setting


def filled(op: Ops, shape: ir.Value, number: float) -> ir.Value:
    return op("ConstantOfShape", shape, value=ir.tensor([number], dtype=DOUBLE))


def all_finite(op: Ops, a: ir.Value, axis: ir.Value) -> ir.Value:
    """[B, 1] bool of [B, .]: a − a is NaN where a is NaN or infinite."""
    off = op("ReduceSum", op("Sub", a, a), axis, keepdims=1)
    return op("Equal", off, off)


def _unit(op: Ops, outside: Ops, lower_bound: ir.Value) -> ir.Value:
    return op("Max", outside.constant(1.0, DOUBLE), op("Abs", lower_bound))


def _near(op: Ops, outside: Ops, gap: ir.Value, lower_bound: ir.Value, tolerance: ir.Value) -> ir.Value:
    """There is a lower bound, and the gap is within the tolerance."""
    there = op("Greater", lower_bound, outside.constant(LOWEST, DOUBLE))
    return op("And", there, op("LessOrEqual", gap, op("Mul", tolerance, _unit(op, outside, lower_bound))))
