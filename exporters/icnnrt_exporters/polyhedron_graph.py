"""The graph x, G, h, A, b, bounds -> y*: cuts of the bundle method around the operator that solves each model."""

from typing import NamedTuple

import onnx_ir as ir

from icnnrt import certificate
from icnnrt.bundle_qp import SAME
from icnnrt.manifest import PolyhedronSpec
from icnnrt.package import OP_DOMAIN
from icnnrt.qp_reference import BOUND_MAX, STEPS, TOLERANCE
from icnnrt.qp_status import QPStatus
from icnnrt.status import Status
from icnnrt_exporters.surgery import (
    Ops,
    copy,
    describe,
    dismantle,
    numbered,
    replace,
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
    """From value and gradient (θ, x, y -> f, gradient) to the whole of `icnnrt.bundle_qp.bundle_qp_argmin`.

        y = argmin over z in P of ½ ‖z‖² − y_init'z
        repeat:   f, g = f(x, y), ∇_y f(x, y);   rows = [rows; g' −1],  heights = [heights; g'y − f]
                  y, t, λ, ν, μ = QPSolve(t + (μ/2) ‖y‖², rows <= heights);   lower bound = its dual value
                  keep y if f + (μ/2) ‖y‖² is the least met;   done where that is near the lower bound

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
    lower_t, upper_t = op("Concat", lower, lowest, axis=1), op("Concat", upper, infinite, axis=1)
    flat = op.constant([[[float(i == j < n) for j in range(n + 1)] for i in range(n + 1)]], DOUBLE)
    Q, p = op("Mul", flat, mu), op.constant([[float(j == n) for j in range(n + 1)]], DOUBLE)
    curved = op("Greater", mu, none)
    half_mu = op("Mul", op.constant(0.5, DOUBLE), mu)
    inverse_2mu = op("Where", curved, op("Div", op.constant(0.5, DOUBLE), mu), none)

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

    # --- One trip: y_k is cut, the model of k + 1 cuts solved, and its answer met.
    rounded_0 = y_0 if T == DOUBLE else op("Cast", y_0, to=T)
    first_nodes, mapping = copy(body_nodes, {y: rounded_0}, "start")
    op.extend(first_nodes)
    first = meet(op, y_0, rounded_0, mapping.get(f, f), mapping.get(gradient, gradient), started)
    no_cut = op("Expand", op.constant([[0]]), column)
    state: dict[str, tuple[ir.DataType, list[int | str | None], ir.Value]] = {
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
        "bounds": (DOUBLE, ["batch", n], filled(op, sizes, 0.0)),
        "residual": (DOUBLE, ["batch", 3], filled(op, op("Concat", B, op.constant([3]), axis=0), NAN)),
        "rows": (DOUBLE, ["batch", None, n + 1], G),
        "heights": (DOUBLE, ["batch", None], h),
    }
    k, going_on = value("cut/k", INT64, []), value("cut/going_on", BOOL, [])
    s = {name: value(f"cut/{name}_in", dtype, shape) for name, (dtype, shape, _) in state.items()}
    body = Ops("cut")
    falls_short = body("ReduceSum", body("Mul", s["g"], s["y"]), last_axis, keepdims=1)
    height = body("Where", s["going"], body("Sub", falls_short, s["f"]), nan)
    of_t = op("Neg", op("Expand", op.constant([[1.0]], DOUBLE), column))
    rows = body("Concat", s["rows"], body("Unsqueeze", body("Concat", s["g"], of_t, axis=1), one), axis=1)
    heights = body("Concat", s["heights"], height, axis=1)
    solution = body.many(
        "QPSolve", Q, p, rows, absent, heights, A, b, lower_t, upper_t, absent, outputs=9, domain=OP_DOMAIN, steps=STEPS
    )
    z, lam, nu, mu_all, _, _, residual, qp_status, _ = solution
    code = body("Unsqueeze", body("Cast", qp_status, to=INT64), one)
    good = body("And", s["going"], body("Less", code, answered))
    z_y = body("Slice", z, zero, n_size, one)
    bounds = body("Slice", mu_all, zero, n_size, one)
    next_k = body("Add", k, op.constant(1))

    # The dual value of the model, for any multipliers: divided by their sum over the cuts they are its multipliers too.
    held = body("Relu", lam)
    of_cuts = body("ReduceSum", body("Slice", held, m, op.constant([2**62]), one), last_axis, keepdims=1)
    multipliers = body("Div", body("Concat", held, nu, bounds, axis=1), of_cuts)
    sides = body("Where", body("Greater", bounds, none), upper, lower)
    terms = body("Mul", multipliers, body("Concat", heights, b, sides, axis=1))
    unit_rows = op(
        "Expand",
        op.constant([[[float(i == j) for j in range(n + 1)] for i in range(n)]], DOUBLE),
        op("Concat", B, op.constant([n, n + 1]), axis=0),
    )
    along = body("MatMul", body("Unsqueeze", multipliers, one), body("Concat", rows, A, unit_rows, axis=1))
    along = body("Slice", body("Squeeze", along, one), zero, n_size, one)
    # (1/2μ) ‖along‖². Without curvature what is left of stationarity counts by the size of y.
    by = body("Where", curved, body("Mul", along, inverse_2mu), z_y)
    left = body("Abs", body("Mul", along, by))
    dual = body("Neg", body("ReduceSum", body("Concat", terms, left, axis=1), last_axis, keepdims=1))
    lower_bound = body("Where", good, body("Max", s["lower_bound"], dual), s["lower_bound"])

    y_k = body("Where", good, z_y, none)
    rounded = y_k if T == DOUBLE else body("Cast", y_k, to=T)
    replace(body_nodes, {y: rounded})
    body.extend(body_nodes)
    at = meet(body, y_k, rounded, f, gradient, good)
    feasible = body("LessOrEqual", body("Slice", residual, one, op.constant([2]), one), op.constant(ENOUGH, DOUBLE))
    better = body("And", body("And", at.live, feasible), body("Less", at.met, s["beaten_by"]))
    energy = body("Where", better, at.met, s["energy"])
    near = _near(body, op, body("Sub", energy, lower_bound), lower_bound, tolerance)
    after = {
        "y": y_k,
        "f": at.f,
        "g": at.g if at.g is not gradient else body("Identity", gradient),
        "going": body("And", at.live, body("Not", near)),
        "finite": body("And", s["finite"], at.finite),
        "code": body("Where", s["going"], code, s["code"]),
        "best_y": body("Where", better, y_k, s["best_y"]),
        "best": body("Where", better, next_k, s["best"]),
        "energy": energy,
        "beaten_by": body("Where", better, at.less, s["beaten_by"]),
        "lower_bound": lower_bound,
        "cuts": body("Where", good, next_k, s["cuts"]),
        "lam": body("Where", good, lam, body("Concat", s["lam"], filled(body, column, 0.0), axis=1)),
        "nu": body("Where", good, nu, s["nu"]),
        "bounds": body("Where", good, bounds, s["bounds"]),
        "residual": body("Where", good, residual, s["residual"]),
        "rows": rows,
        "heights": heights,
    }
    any_going = body("Cast", body("ReduceSum", body("Cast", after["going"], to=INT64), keepdims=0), to=BOOL)
    outputs = [
        describe(any_going, "cut/next_going_on", BOOL, []),
        *(describe(after[name], f"cut/next_{name}", dtype, shape) for name, (dtype, shape, _) in state.items()),
        describe(body("Identity", s["y"]), "cut/point", DOUBLE, ["batch", n]),
    ]
    trip = ir.Graph([k, going_on, *s.values()], outputs, nodes=body.nodes, name="cut_and_solve")
    *ends, points = op.many(
        "Loop",
        op("Max", iterations, op.constant(1)),  # so that there is a slot, at least
        op.constant(True, BOOL),
        *(start for *_, start in state.values()),
        outputs=len(state) + 1,
        body=trip,
    )
    end = dict(zip(state, ends, strict=True))

    # --- The answer and its status.
    far = op.constant([2**62])
    slopes = op("Slice", op("Slice", end["rows"], m, far, one), zero, n_size, op.constant([2]))
    offsets = op("Neg", op("Slice", end["heights"], m, far, one))
    cut_points = op("Transpose", points, perm=[1, 0, 2])
    unused, at_first = op("IsNaN", offsets), (zero, one, one)
    offsets = op("Where", unused, op("Slice", offsets, *at_first), offsets)
    unused = op("Unsqueeze", unused, op.constant([2]))
    slopes, cut_points = (op("Where", unused, op("Slice", a, *at_first), a) for a in (slopes, cut_points))

    falls = op("Equal", end["code"], op.constant(int(QPStatus.DUAL_INFEASIBLE)))
    run = op("And", op("Not", op("IsNaN", op("Slice", end["best_y"], *at_first))), op("Not", falls))
    energy, lower_bound = (op("Where", run, end[name], nan) for name in ("energy", "lower_bound"))
    gap = op("Sub", energy, lower_bound)
    large = op("Not", _near(op, op, gap, lower_bound, tolerance))
    status = op("Where", large, op.constant(int(Status.GAP)), op.constant(int(Status.CONVERGED)))
    unsolved = op("Greater", end["code"], op.constant(int(QPStatus.SOLVED)))
    of_solver = op("And", large, unsolved)
    status = op("Where", of_solver, op.constant(int(Status.SOLVER)), status)
    noise = _rounding(op, T, energy, slopes, offsets, cut_points)
    noise = op("Add", noise, op("Mul", op.constant(ENOUGH, DOUBLE), _unit(op, op, lower_bound)))
    most = op("Max", op("Neg", gap), _violation(op, slopes, offsets, cut_points))
    status = op("Where", op("Greater", most, noise), op.constant(int(Status.NOT_CONVEX)), status)
    status = op("Where", end["finite"], status, op.constant(int(Status.NOT_FINITE)))
    # By what became of the projection; −1 where it is solved.
    verdicts = [-1, -1, Status.EMPTY_DOMAIN, Status.SOLVER, Status.SOLVER, Status.NOT_FINITE_INPUT, Status.SOLVER]
    verdict = op("Gather", op.constant([int(code) for code in verdicts]), start_status, axis=0)
    status = op("Where", op("Less", verdict, op.constant(0)), status, verdict)
    status = op("Where", numbers, status, op.constant(int(Status.NOT_FINITE_INPUT)))
    lam_rows, lam_cuts = op.many(
        "Split", end["lam"], op("Concat", m, op("Shape", offsets, start=1, end=2), axis=0), outputs=2, axis=1
    )

    def flat_column(v: ir.Value) -> ir.Value:
        return op("Squeeze", v, one)

    def shown(v: ir.Value) -> ir.Value:
        return op("Where", run, v, nan)

    final = [
        describe(shown(end["best_y"]), "y", DOUBLE, ["batch", n]),
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


def _rounding(
    op: Ops, T: ir.DataType, energy: ir.Value, slopes: ir.Value, offsets: ir.Value, points: ir.Value
) -> ir.Value:
    """`certificate.rounding` of R^n, in the dtype of the energy: [B, 1]."""
    eps = {ir.DataType.FLOAT: 2.0**-23}.get(T, 2.0**-52)
    one, two = op.constant([1]), op.constant([2])
    length, far = (op("Sqrt", op("ReduceSumSquare", a, two, keepdims=0)) for a in (slopes, points))
    most = op("Max", *(op("ReduceMax", a, one, keepdims=1) for a in (length, far)))
    scale = op("ReduceMax", op("Add", op("Abs", offsets), op("Mul", length, most)), one, keepdims=1)
    size = op("Max", op.constant(1.0, DOUBLE), op("Abs", energy), scale)
    return op("Mul", op.constant(certificate.ROUNDING * eps, DOUBLE), size)


def _violation(op: Ops, slopes: ir.Value, offsets: ir.Value, points: ir.Value) -> ir.Value:
    """`certificate.convexity_violation`: max_ij [v_j(y_i) − f(y_i)], [B, 1], with f(y_i) = v_i(y_i)."""
    one = op.constant([1])
    # −S', as ONNX Runtime up to 1.21 fuses a bare transpose and a product of doubles into what it has no kernel for.
    product = op("MatMul", points, op("Neg", op("Transpose", slopes, perm=[0, 2, 1])))
    v = op("Sub", op("Unsqueeze", offsets, one), product)
    touches = op("ReduceSum", op("Mul", slopes, points), op.constant([2]), keepdims=0)
    f = op("Add", offsets, touches)
    above = op("Sub", op("ReduceMax", v, op.constant([2]), keepdims=0), f)
    return op("ReduceMax", above, one, keepdims=1)
