"""The files f.onnx and adj_f.onnx out of a package: a function and its vector-Jacobian product, side by side.

Tools that differentiate through ONNX models find the derivative of a file f.onnx in adj_f.onnx beside it, by name: it
takes the inputs of f and a seed adj_<output>, the gradient of a loss by that output, and gives adj_<input>, the
gradient of the loss by that input. No such tool can derive the argmin itself, which ends in operators of ours and in a
Loop; the package holds its exact adjoint.

    argmin.onnx      x, y_init -> y and its certificate          as the package has it
    adj_argmin.onnx  x, y_init, adj_y -> adj_x, adj_<weight>     the argmin once more, then the adjoint
    value.onnx       x, y -> f
    adj_value.onnx   x, y, adj_f -> adj_y, and adj_x if the package has the graph gradient_x

In a box the first two take lower and upper after y_init, and the second gives adj_lower and adj_upper after adj_x.
"""

import math
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from icnnrt import arguments
from icnnrt.errors import ExportError
from icnnrt.format import package
from icnnrt.format.signatures import BOUNDS, BOUNDS_BAR, STEP_ANSWER
from icnnrt.mathematics import rounding
from icnnrt.mathematics.domains import MODELS, Domain
from icnnrt_exporters.graphs.certificate_nodes import Rounding
from icnnrt_exporters.graphs.inlining import inlined
from icnnrt_exporters.graphs.packer import check_absent, embedded, of_anybody, write
from icnnrt_exporters.operators.traced import nodes_of
from icnnrt_exporters.surgery import Ops, Parts, describe, dismantle, dtype_of, numbered, replace, sizes, static, value

DOUBLE: Final = ir.DataType.DOUBLE

# What a sample without a gradient is given for its numbers, and ½ for the others.
HARMLESS_VALUES: Final = {"x": 0.0, "y_bar": 0.0, "lower": 0.0, "upper": 1.0}
# Cotangents that have a row a sample, as the adjoint calls them.
PER_SAMPLE_OUTPUTS: Final = ("x_bar", *BOUNDS_BAR)


def siblings(
    source: str | Path | package.Package, target: str | Path, *, portable: bool = False, overwrite: bool = False
) -> tuple[Path, ...]:
    """Write a package's functions and their derivatives as pairs of self-contained files.

    Args:
        source: the package folder, opened with all its checks, or a package that is open.
        target: a folder that is there, for argmin.onnx, adj_argmin.onnx, value.onnx and adj_value.onnx; or else a path
            whose last part is a prefix: out/digits gives out/digits_argmin.onnx, out/adj_digits_argmin.onnx, ...
        portable: as for `pack`.
        overwrite: replace files that are there.

    Returns:
        The files written, each f.onnx followed by its adj_f.onnx; the argmin's only if the package has it. Weights are
        overridable initialisers of all of them.

    adj_argmin.onnx agrees with `session.vjp(..., on_unsafe="skip")`: adj_<weight>, for every trainable weight, is the
    sum over the batch; samples without a trustworthy gradient are left out of it and have adj_x = NaN. Of an energy
    that was seen not to be convex no sample has one. The other outputs of argmin.onnx have no seed, as they are no
    functions to differentiate, and y_init no gradient.

    Raises:
        PackageError: the package is not sound. ExportError: a target exists or cannot be written, a file would be too
        large for ONNX. Files are written one after the other, each atomically.
    """
    target = arguments.path(target, "target")
    opened = package.opened(source)
    if opened.manifest.kind == "gradient":
        raise ExportError("source: it holds a gradient alone, no function whose derivative could be written; pack it")
    folder, prefix = (target, "") if target.is_dir() else (target.parent, f"{target.name}_")
    graphs = opened.graphs
    functions = [role for role, needs in (("argmin", "adjoint"), ("value", "value")) if {role, needs} <= set(graphs)]
    names = [(folder / f"{prefix}{role}.onnx", folder / f"adj_{prefix}{role}.onnx") for role in functions]
    for pair in names:
        for path in pair:
            if path.is_dir():
                raise ExportError(f"target: {path} is a folder; remove it, or choose another place")
            check_absent(path, overwrite)

    models: list[tuple[Path, onnx.ModelProto]] = []
    with of_anybody(opened):
        for role, (primal, adjoint) in zip(functions, names, strict=True):
            if role == "argmin":
                models.append((primal, embedded(opened, "argmin", portable=portable)))
                models.append((adjoint, _finished(_adj_argmin(opened), portable)))
            else:
                models.append((primal, _finished(_value(opened), portable)))
                models.append((adjoint, _finished(_adj_value(opened), portable)))
        for path, model in models:
            write(path, model)
    return tuple(path for path, _ in models)


# --- argmin --------------------------------------------------------------------------------------


def _adj_argmin(opened: package.Package) -> ir.Model:
    """From the graphs argmin and adjoint to x, y_init, adj_y -> adj_x, adj_<weight>; of a box bounds and theirs too.

    y, cuts = argmin(x, y_init)
    safe_b  = the certificate of sample b vouches for a gradient, and nothing is known against the energy
    θ̄, x̄    = adjoint(cuts, ȳ)     where not safe with ȳ = 0 and a model that is no trouble to solve,
                               all of its numbers ½ between the bounds 0 and 1: NaN times 0 would be NaN, and so
                               would 0/0 at λ = 0
    x̄_b     = NaN where not safe
    """
    argmin, adjoint = _loaded(opened, "argmin"), _loaded(opened, "adjoint")
    primal, backward = dismantle(argmin.graph, "primal"), dismantle(adjoint.graph, "adjoint")
    x, y_init = (_named(primal.inputs, name) for name in ("x", "y_init"))
    y = _named(primal.outputs, "y")
    T, n = dtype_of(y), static(y, 1)

    op = Ops("sibling")
    op.extend(primal.nodes)
    manifest = opened.manifest
    assert manifest.solver is not None
    assert manifest.domain is not None
    bounds = [_named(primal.inputs, name) for name in (BOUNDS if manifest.domain.kind == "box" else ())]
    certificate = {name: _named(primal.outputs, name) for name in STEP_ANSWER}
    model = MODELS[manifest.domain.kind]
    safe = _safe(op, [x, *bounds], bounds, certificate, manifest.solver.residual_tolerance, model)
    if manifest.convexity is not None and manifest.convexity.verdict == "violated":
        safe = op("And", safe, op.constant(False, ir.DataType.BOOL))
    adj_y = value("adj_y", T, ["batch", n])
    handed_on = {v.name: v for v in (*primal.outputs, *bounds)} | {"x": x, "y_bar": adj_y}
    weights, same = _shared_weights(primal, backward)
    for v in backward.inputs:
        if v not in same and v.const_value is None:
            if v.name not in handed_on:
                raise ExportError(f"adjoint: nothing of the argmin is its input {v.name!r}; export the package anew")
            given = handed_on[v.name]
            fill = HARMLESS_VALUES.get(str(v.name), 0.5)
            same[v] = op("Where", _rows(op, safe, given), given, op.constant(fill, T))
    replace(backward.nodes, same)
    op.extend(backward.nodes)

    outputs: list[ir.Value] = []
    of_samples: dict[str, ir.Value] = {}
    for v in backward.outputs:
        assert v.name is not None
        if v.name in PER_SAMPLE_OUTPUTS:
            marked = op("Where", _rows(op, safe, v), v, op.constant(math.nan, T))
            shape = manifest.x_shape if v.name == "x_bar" else (n,)
            of_samples[v.name] = describe(marked, f"adj_{v.name.removesuffix('_bar')}", T, ["batch", *shape])
        elif v.name.startswith("theta_bar."):
            outputs.append(describe(v, f"adj_{v.name.removeprefix('theta_bar.')}", dtype_of(v), sizes(v)))
        else:
            v.name = f"adjoint/{v.name}"
    for v in primal.outputs:
        v.name = f"primal/{v.name}"
    constants = [*_constants(primal), *_constants(backward)]
    # depth, which the adjoint could be fed, stays at its default: all K cuts, the exact derivative.
    outputs = [*(of_samples[name] for name in PER_SAMPLE_OUTPUTS if name in of_samples), *outputs]
    return _model([x, y_init, *bounds, adj_y], weights, outputs, op, constants, [argmin, adjoint])


def _safe(
    op: Ops,
    given: list[ir.Value],
    bounds: list[ir.Value],
    of: dict[str, ir.Value],
    tolerance: float,
    domain: Domain,
) -> ir.Value:
    """[B] bool, the samples that `Solution.unsafe(every_model=True)` does not name; of an energy that is proven convex,
    fewer, as what lies below its cuts by rounding is left out here.

        unit      = max(1, |lower_bound|)
        solved    = max(stationarity, feasibility, complementarity / unit) ≤ tolerance, at every model's complementarity
        violation = max_ij [v_j(y_i) − f(y_i)],  v_j(y) = e_j + g_j'(y − c),  f(y_i) = v_i(y_i)
        convex    = max(complementarity − gap, violation) ≤ rounding
        known     = uncertainty ≤ 1e-3 unit
        finite    = 0 · (what is given, y, energy, lower_bound, gap) = 0

    The centre c is that of the domain; `certificate_nodes` has rounding and uncertainty. All of them are false for NaN.
    """
    y, slopes, offsets, cut_points = of["y"], of["slopes"], of["offsets"], of["cut_points"]
    energy, lower, gap, residual = of["energy"], of["lower_bound"], of["gap"], of["residual"]
    T, n = dtype_of(y), static(y, 1)
    zero, one_axis = op.constant([0]), op.constant([1])
    one, bound = op.constant(1.0, DOUBLE), op.constant(tolerance, DOUBLE)

    unit = op("Max", one, op("Abs", lower))
    absolute, complementarity = op.many("Split", residual, op.constant([2, 1]), outputs=2, axis=1)
    complementarity = op("Squeeze", complementarity, one_axis)
    scaled = op("Div", op("ReduceMax", of["complementarity_history"], one_axis, keepdims=0), unit)
    worst = op("Max", op("ReduceMax", absolute, one_axis, keepdims=0), op("Div", complementarity, unit), scaled)
    solved = op("LessOrEqual", worst, bound)

    moved = op("Sub", cut_points, op.constant(domain.centre(n), T))
    excess = nodes_of(op, rounding.violation, slopes, op("Unsqueeze", offsets, one_axis), moved, dtype=T, rank=3)
    excess = op("Squeeze", excess, op.constant([1, 2]))
    violation = op("Max", op("Sub", complementarity, gap), op("Cast", excess, to=DOUBLE))
    of_rounding = Rounding(op, of, domain, bounds)
    convex = op("LessOrEqual", violation, of_rounding.rounding())

    nothing = op("Mul", energy, op.constant(0.0, DOUBLE))
    for v in (*given, y):
        flat = op("Mul", op("Flatten", v, axis=1), op.constant(0.0, T))
        nothing = op("Add", nothing, op("Cast", op("ReduceSum", flat, one_axis, keepdims=0), to=DOUBLE))
    for figure in (lower, gap):
        nothing = op("Add", nothing, op("Mul", figure, op.constant(0.0, DOUBLE)))
    finite = op("Equal", nothing, op("Cast", op("Squeeze", zero), to=DOUBLE))
    return op("And", op("And", solved, convex), op("And", of_rounding.known(), finite))


def _rows(op: Ops, of_sample: ir.Value, like: ir.Value) -> ir.Value:
    """[B] -> [B, 1, ..., 1], of as many dimensions as another value."""
    assert like.shape is not None
    more = len(like.shape) - 1
    return op("Unsqueeze", of_sample, op.constant(list(range(1, 1 + more)))) if more else of_sample


# --- value ---------------------------------------------------------------------------------------


def _value(opened: package.Package) -> ir.Model:
    """x, y -> f: the graph value without its gradient."""
    model = _loaded(opened, "value")
    parts = dismantle(model.graph, "value")
    f = _named(parts.outputs, "f")
    for v in parts.outputs:
        if v is not f:
            v.name = f"value/{v.name}"
    data = [_named(parts.inputs, name) for name in ("x", "y")]
    op = Ops("sibling")
    op.extend(parts.nodes)
    return _model(data, _weights(parts), [f], op, _constants(parts), [model])


def _adj_value(opened: package.Package) -> ir.Model:
    """x, y, adj_f -> adj_y = adj_f ∇_y f, and adj_x = adj_f ∇_x f where the package has the graph of ∇_x f."""
    models = [_loaded(opened, "value")]
    parts = dismantle(models[0].graph, "value")
    x, y = (_named(parts.inputs, name) for name in ("x", "y"))
    gradient = _named(parts.outputs, "gradient")
    T = dtype_of(gradient)
    adj_f = value("adj_f", T, ["batch"])
    weights, constants = _weights(parts), _constants(parts)
    for v in parts.outputs:
        v.name = f"value/{v.name}"
    op = Ops("sibling")
    op.extend(parts.nodes)
    outputs = [describe(op("Mul", _rows(op, adj_f, gradient), gradient), "adj_y", T, ["batch", static(gradient, 1)])]

    if "gradient_x" in opened.graphs:
        models.append(_loaded(opened, "gradient_x"))
        more = dismantle(models[1].graph, "gradient_x")
        gradient_x = _named(more.outputs, "gradient_x")
        weights, same = _shared_weights(parts, more)
        same |= {_named(more.inputs, "x"): x, _named(more.inputs, "y"): y}
        for v in more.outputs:
            v.name = f"gradient_x/{v.name}"
        replace(more.nodes, same)
        op.extend(more.nodes)
        constants += _constants(more)
        adj_x = op("Mul", _rows(op, adj_f, gradient_x), gradient_x)
        outputs.insert(0, describe(adj_x, "adj_x", T, ["batch", *opened.manifest.x_shape]))
    return _model([x, y, adj_f], weights, outputs, op, constants, models)


# --- Both ----------------------------------------------------------------------------------------


def _loaded(opened: package.Package, role: str) -> ir.Model:
    return ir.from_proto(embedded(opened, role, portable=False))


def _named(values: list[ir.Value], name: str) -> ir.Value:
    for v in values:
        if v.name == name:
            return v
    raise ExportError(f"graph: expected {name!r} among {', '.join(str(v.name) for v in values)}; export it anew")


def _weights(parts: Parts) -> list[ir.Value]:
    """The overridable initialisers of a graph, but `depth`, which is a setting."""
    return [v for v in parts.inputs if v.const_value is not None and v.name != "depth"]


def _constants(parts: Parts) -> list[ir.Value]:
    weights = _weights(parts)
    return [v for v in parts.initializers if v not in weights]


def _shared_weights(one: Parts, other: Parts) -> tuple[list[ir.Value], dict[ir.Value, ir.Value]]:
    """The weights of two graphs, each once, and by what to replace those of the other."""
    by_name = {v.name: v for v in _weights(one)}
    same = {v: by_name[v.name] for v in _weights(other) if v.name in by_name}
    return [*by_name.values(), *(v for v in _weights(other) if v not in same)], same


def _model(
    data: list[ir.Value],
    weights: list[ir.Value],
    outputs: list[ir.Value],
    op: Ops,
    constants: list[ir.Value],
    parts: list[ir.Model],
) -> ir.Model:
    """A model of these nodes, with the functions of the models they come from."""
    graph = ir.Graph(
        [*data, *weights],
        outputs,
        nodes=op.nodes,
        initializers=[*weights, *numbered([*constants, *op.constants])],
        opset_imports={domain: version for part in parts for domain, version in part.graph.opset_imports.items()},
        name="sibling",
    )
    names = [v.name for v in (*graph.inputs, *graph.outputs)]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ExportError(f"weights: one is called so that {twice[0]!r} has two meanings in a sibling; rename it")
    model = ir.Model(graph, ir_version=parts[0].ir_version, producer_name="icnnrt")
    for part in parts:
        model.functions.update(part.functions)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    passes.NameFixPass()(model)
    return model


def _finished(model: ir.Model, portable: bool) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    return inlined(proto) if portable else proto
