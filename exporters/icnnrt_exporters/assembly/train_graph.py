"""The graph (x, target, weights, optimiser state) -> loss, new weights, new state: one step of fine-tuning."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir

from icnnrt.format.manifest import Domain
from icnnrt.format.signatures import STEP_ANSWER
from icnnrt.format.signs import NONNEGATIVE, NONPOSITIVE, Sign
from icnnrt.mathematics.domains import MODELS
from icnnrt_exporters.assembly.adjoint_graph import adjoint_graph
from icnnrt_exporters.assembly.argmin_graph import UNIT_BOX, argmin_graph
from icnnrt_exporters.assembly.optimizers import Optimizer, Step
from icnnrt_exporters.graphs.certificate_nodes import Rounding
from icnnrt_exporters.surgery import Ops, describe, dismantle, dtype_of, numbered, replace, sizes, static, value

INT64, DOUBLE, BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL
CLIP_EPS: Final = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6


def train_graph(
    head: ir.Model,
    push: ir.Model,
    hvp: ir.Model,
    loss: ir.Model,
    *,
    K: int,
    steps: int,
    optimizer: Optimizer,
    updated: Sequence[str],
    signs: Mapping[str, Sign],
    depth: int,
    clip_norm: float | None,
    residual_tolerance: float,
    domain: Domain = UNIT_BOX,
    step_size: float | None = None,
) -> ir.Graph:
    """From the heads of energy, adjoint and loss to one training step; with a step size, of Bregman proximal gradient.

        y, cuts = argmin(x)                          K cuts from the centre of the domain, y = ½
        safe_b  = every model of sample b was solved to the residual tolerance, and rounding leaves its energy known
        ȳ       = ∂loss/∂y, 0 where not safe
        θ̄      = adjoint(cuts, ȳ)                    `depth` cut sets back
        norm    = √Σ θ̄²;  θ̄ <- θ̄ min(1, clip_norm / norm)
        θ, state <- optimizer(θ, θ̄, state, learning_rate);  θ <- max(θ, 0), min(θ, 0) where f's convexity needs it
        accepted = loss, norm and every new weight finite; where not, weights and state go out as they came in

    Inputs: x, of a box lower and upper, target, learning_rate [], state.step [] int64, state.<slot> [P], then the
    weights; P counts the entries of the updated weights, which stand in that vector in their order, each row by row.
    Outputs: loss [], gradient_norm [] float64, accepted [] bool, safe [B] bool, what `STEP_ANSWER` lists,
    new.state.step, new.state.<slot>, new.<weight>.
    """
    argmin = argmin_graph(head.clone(), K, steps, domain, step_size)
    adjoint = adjoint_graph(push, hvp, K, domain, step_size)
    (x, y_init, *weights), answer, argmin_nodes, argmin_constants = dismantle(argmin, "step_argmin")
    adjoint_inputs, cotangents, adjoint_nodes, adjoint_constants = dismantle(adjoint, "step_adjoint")
    (y_loss, target), (loss_value, y_bar), loss_nodes, loss_constants = dismantle(loss.graph, "step_loss")
    of_argmin = {v.name: v for v in answer}
    y = of_argmin["y"]
    T, n = dtype_of(y), static(y, 1)
    bounds, weights = (weights[:2], weights[2:]) if domain.kind == "box" else ([], weights)

    op = Ops("step")
    # K cuts from the centre of the domain.
    if bounds:
        lower, upper = bounds
        start = op("Add", lower, op("Mul", op("Sub", upper, lower), op.constant(0.5, T)))
    else:
        size = op("Concat", op("Shape", x, start=0, end=1), op.constant([n]), axis=0)
        start = op("Expand", op.constant(MODELS[domain.kind].centre(n), T), size)
    replace(argmin_nodes, {y_init: start})
    op.extend(argmin_nodes)

    one_axis = op.constant([1])
    bound = op("Max", op("Abs", of_argmin["lower_bound"]), op.constant(1.0, DOUBLE))
    worst = op("ReduceMax", of_argmin["complementarity_history"], one_axis, keepdims=0)
    relative = op("Div", worst, bound)
    safe = op("LessOrEqual", relative, op.constant(residual_tolerance, DOUBLE))  # false for NaN
    named = {str(v.name): v for v in answer}
    safe = op("And", safe, Rounding(op, named, MODELS[domain.kind], bounds).known())

    replace(loss_nodes, {y_loss: y})
    op.extend(loss_nodes)
    zero = op.constant(0.0, T)
    y_bar = op("Where", op("Unsqueeze", safe, one_axis), y_bar, zero)

    depth_value = op.constant(depth)
    same: dict[ir.Value, ir.Value] = {}
    by_name = {v.name: v for v in (*bounds, *weights)} | of_argmin | {"x": x, "y_bar": y_bar, "depth": depth_value}
    for v in adjoint_inputs:
        same[v] = by_name[v.name]
    adjoint_constants = [v for v in adjoint_constants if v.name != "depth"]
    replace(adjoint_nodes, same)
    op.extend(adjoint_nodes)
    gradients = {v.name.removeprefix("theta_bar."): v for v in cotangents if v.name and v.name.startswith("theta_bar.")}
    gradients = {name: gradients[name] for name in updated}

    theta = {v.name: v for v in weights}
    outputs, inputs = update(
        op,
        loss_value,
        safe,
        [of_argmin[name] for name in STEP_ANSWER],
        {name: theta[name] for name in updated},
        gradients,
        optimizer,
        signs,
        clip_norm,
    )
    constants = numbered([*argmin_constants, *adjoint_constants, *loss_constants, *op.constants])
    inputs = [x, *bounds, target, *inputs, *weights]
    return ir.Graph(inputs, outputs, nodes=op.nodes, initializers=constants, name="train")


def update(
    op: Ops,
    loss_value: ir.Value,
    safe: ir.Value,
    answer: Sequence[ir.Value],
    theta: Mapping[str, ir.Value],
    gradients: Mapping[str, ir.Value],
    optimizer: Optimizer,
    signs: Mapping[str, Sign],
    clip_norm: float | None,
) -> tuple[list[ir.Value], list[ir.Value]]:
    """From loss and gradients to the outputs of a step, in their order; and the inputs learning_rate and state."""
    updated = list(theta)
    T = dtype_of(next(iter(theta.values())))
    # One vector of all entries, so that the optimiser takes a dozen nodes and not a dozen for every weight.
    minus_one = op.constant([-1])
    g = _joined(op, [op("Reshape", v, minus_one) for v in gradients.values()])
    w = _joined(op, [op("Reshape", theta[name], minus_one) for name in updated])
    lengths = [math.prod(sizes(theta[name])) for name in updated]

    g64 = op("Cast", g, to=DOUBLE)
    norm = op("Sqrt", op("ReduceSum", op("Mul", g64, g64), keepdims=0))
    if clip_norm is not None:
        allowed = op("Div", op.constant(clip_norm, DOUBLE), op("Add", norm, op.constant(CLIP_EPS, DOUBLE)))
        g = op("Mul", g, op("Cast", op("Min", allowed, op.constant(1.0, DOUBLE)), to=T))

    learning_rate = value("learning_rate", T, [])
    count = value("state.step", INT64, [])
    next_count = op("Add", count, op.constant(1))
    step = Step(op, T, learning_rate, op("Cast", next_count, to=DOUBLE))
    slots = [value(f"state.{slot}", T, [sum(lengths)]) for slot in optimizer.slots]
    new_w, new_slots = optimizer.update(step, w, g, slots)

    # |loss| + norm + Σ |new|: finite exactly if each is, for each new entry of weights and state.
    total = op("Add", norm, op("Abs", op("Cast", loss_value, to=DOUBLE)))
    for moved in (new_w, *new_slots):
        total = op("Add", total, op("Cast", op("ReduceSum", op("Abs", moved), keepdims=0), to=DOUBLE))
    accepted = op("Not", op("Or", op("IsNaN", total), op("IsInf", total)))
    # The projection after that test, or it would make 0 of −∞.
    new_w = projected(op, new_w, {name: sizes(v) for name, v in theta.items()}, signs, T)
    kept_w = op("Where", accepted, new_w, w)
    parts = [kept_w] if len(updated) == 1 else op.many("Split", kept_w, op.constant(lengths), outputs=len(updated))
    new_weights = []
    for name, part in zip(updated, parts, strict=True):
        shaped = op("Reshape", part, op.constant(sizes(theta[name])))
        new_weights.append(describe(shaped, f"new.{name}", T, sizes(theta[name])))

    outputs = [
        describe(op("Cast", loss_value, to=T), "loss", T, []),  # targets may be of another float dtype than y
        describe(norm, "gradient_norm", DOUBLE, []),
        describe(accepted, "accepted", BOOL, []),
        describe(safe, "safe", BOOL, ["batch"]),
        *answer,
        describe(op("Where", accepted, next_count, count), "new.state.step", INT64, []),
        *(
            describe(op("Where", accepted, new, old), f"new.{old.name}", T, [sum(lengths)])
            for new, old in zip(new_slots, slots, strict=True)
        ),
        *new_weights,
    ]
    return outputs, [learning_rate, count, *slots]


def projected(
    op: Ops, w: ir.Value, shapes: Mapping[str, Sequence[int]], signs: Mapping[str, Sign], T: ir.DataType
) -> ir.Value:
    """max(w, 0) and min(w, 0) where the weights that the vector w is joined of have to have a sign.

    Each by one bound for all entries, most of them infinite.
    """
    for bit, infinite, project in ((NONNEGATIVE, -math.inf, "Max"), (NONPOSITIVE, math.inf, "Min")):
        if any(signs[name].asks(bit) for name in shapes if name in signs):
            bounds = [_bound(op, signs.get(name), bit, infinite, shape, T) for name, shape in shapes.items()]
            w = op(project, w, _joined(op, bounds))
    return w


def _bound(op: Ops, sign: Sign | None, bit: int, bound: float, shape: Sequence[int], T: ir.DataType) -> ir.Value:
    """0 where an entry of a weight has to have this sign, `bound` elsewhere, row by row."""

    def filled(length: int, value: float) -> ir.Value:
        return op("ConstantOfShape", op.constant([length]), value=ir.tensor([value], dtype=T))

    if sign is None or sign.whole:
        return filled(math.prod(shape), 0.0 if sign and sign.whole & bit else bound)
    length = math.prod(shape) if sign.axis is None else shape[sign.axis]
    parts, at = [], 0
    for start, stop, bits in sign.runs:
        parts += [filled(start - at, bound)] if start > at else []
        parts += [filled(stop - start, 0.0 if bits & bit else bound)]
        at = stop
    parts += [filled(length - at, bound)] if length > at else []
    line = _joined(op, parts)
    if sign.axis is None:
        return line
    upright = [length if axis == sign.axis else 1 for axis in range(len(shape))]
    whole = op("Expand", op("Reshape", line, op.constant(upright)), op.constant(list(shape)))
    return op("Reshape", whole, op.constant([-1]))


def _joined(op: Ops, vectors: Sequence[ir.Value]) -> ir.Value:
    return vectors[0] if len(vectors) == 1 else op("Concat", *vectors, axis=0)
