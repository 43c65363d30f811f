"""The graph (x, target, weights, optimiser state) -> loss, new weights, new state: one step of fine-tuning."""

from collections.abc import Collection, Sequence
from typing import Final

import onnx_ir as ir

from icnnrt_exporters.adjoint_graph import adjoint_graph
from icnnrt_exporters.argmin_graph import argmin_graph
from icnnrt_exporters.optimizers import Optimizer, Step
from icnnrt_exporters.surgery import Ops, describe, dismantle, numbered, replace, sizes, static, value

INT64, DOUBLE, BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL
CLIP_EPS: Final = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6

# What the step hands on of the argmin inside it, for the status of every sample.
ANSWER: Final = (
    "y",
    "slopes",
    "offsets",
    "cut_points",
    "energy",
    "lower_bound",
    "gap",
    "residual",
    "complementarity_history",
)


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
    nonnegative: Collection[str],
    depth: int,
    clip_norm: float | None,
    residual_tolerance: float,
) -> ir.Graph:
    """From the heads of energy, adjoint and loss to one training step.

        y, cuts = argmin(x)                          K cuts from y = ½
        safe_b  = every model of sample b was solved to the residual tolerance
        ȳ       = ∂loss/∂y, 0 where not safe
        θ̄      = adjoint(cuts, ȳ)                    `depth` cut sets back
        norm    = √Σ θ̄²;  θ̄ <- θ̄ min(1, clip_norm / norm)
        θ, state <- optimizer(θ, θ̄, state, learning_rate);  θ <- max(θ, 0) where f's convexity needs it
        accepted = loss, norm and every new weight finite; where not, weights and state go out as they came in

    Inputs: x, target, learning_rate [], state.step [] int64, state.<slot>.<weight>, then the weights. Outputs: loss [],
    gradient_norm [] float64, accepted [] bool, safe [B] bool, what `ANSWER` lists, new.state..., new.<weight>.
    """
    argmin = argmin_graph(head.clone(), K, steps)
    adjoint = adjoint_graph(push, hvp, K)
    (x, y_init, *weights), answer, argmin_nodes, argmin_constants = dismantle(argmin, "step_argmin")
    adjoint_inputs, cotangents, adjoint_nodes, adjoint_constants = dismantle(adjoint, "step_adjoint")
    (y_loss, target), (loss_value, y_bar), loss_nodes, loss_constants = dismantle(loss.graph, "step_loss")
    of_argmin = {v.name: v for v in answer}
    y = of_argmin["y"]
    assert y.dtype is not None
    T, n = y.dtype, static(y, 1)

    op = Ops("step")
    # K cuts from the centre of the box.
    size = op("Concat", op("Shape", x, start=0, end=1), op.constant([n]), axis=0)
    start = op("Expand", op.constant(0.5, T), size)
    replace(argmin_nodes, {y_init: start})
    op.extend(argmin_nodes)

    one_axis = op.constant([1])
    bound = op("Max", op("Abs", of_argmin["lower_bound"]), op.constant(1.0, DOUBLE))
    worst = op("ReduceMax", of_argmin["complementarity_history"], one_axis, keepdims=0)
    relative = op("Div", worst, bound)
    safe = op("LessOrEqual", relative, op.constant(residual_tolerance, DOUBLE))  # false for NaN

    replace(loss_nodes, {y_loss: y})
    op.extend(loss_nodes)
    zero = op.constant(0.0, T)
    y_bar = op("Where", op("Unsqueeze", safe, one_axis), y_bar, zero)

    depth_value = op.constant(depth)
    same: dict[ir.Value, ir.Value] = {}
    by_name = {v.name: v for v in weights} | of_argmin | {"x": x, "y_bar": y_bar, "depth": depth_value}
    for v in adjoint_inputs:
        same[v] = by_name[v.name]
    adjoint_constants = [v for v in adjoint_constants if v.name != "depth"]
    replace(adjoint_nodes, same)
    op.extend(adjoint_nodes)
    gradients = {v.name.removeprefix("theta_bar."): v for v in cotangents if v.name and v.name.startswith("theta_bar.")}
    gradients = {name: gradients[name] for name in updated}

    squares = [
        op("ReduceSum", op("Mul", g64, g64), keepdims=0)
        for g64 in (op("Cast", g, to=DOUBLE) for g in gradients.values())
    ]
    norm = op("Sqrt", op("Sum", *squares))
    if clip_norm is not None:
        allowed = op("Div", op.constant(clip_norm, DOUBLE), op("Add", norm, op.constant(CLIP_EPS, DOUBLE)))
        factor = op("Cast", op("Min", allowed, op.constant(1.0, DOUBLE)), to=T)
        gradients = {name: op("Mul", g, factor) for name, g in gradients.items()}

    learning_rate = value("learning_rate", T, [])
    count = value("state.step", INT64, [])
    next_count = op("Add", count, op.constant(1))
    step = Step(op, T, learning_rate, op("Cast", next_count, to=DOUBLE))
    theta = {v.name: v for v in weights}
    states: dict[str, ir.Value] = {}
    moved: dict[str, ir.Value] = {}
    moved_states: dict[str, ir.Value] = {}
    for name, gradient in gradients.items():
        w = theta[name]
        slots = [value(f"state.{slot}.{name}", T, sizes(w)) for slot in optimizer.slots]
        states |= {str(v.name): v for v in slots}
        new, new_slots = optimizer.update(step, w, gradient, slots)
        moved[name] = op("Max", new, zero) if name in nonnegative else new
        moved_states |= {str(v.name): s for v, s in zip(slots, new_slots, strict=True)}

    # A sum of absolute values is finite only if every one of them is; a maximum may overlook NaN.
    totals = [op("ReduceSum", op("Cast", op("Abs", w), to=DOUBLE), keepdims=0) for w in moved.values()]
    totals += [op("ReduceSum", op("Cast", op("Abs", s), to=DOUBLE), keepdims=0) for s in moved_states.values()]
    total = op("Sum", norm, op("Abs", op("Cast", loss_value, to=DOUBLE)), *totals)
    accepted = op("Not", op("Or", op("IsNaN", total), op("IsInf", total)))

    def either(new: ir.Value, old: ir.Value, name: str) -> ir.Value:
        assert old.dtype is not None
        return describe(op("Where", accepted, new, old), f"new.{name}", old.dtype, sizes(old))

    outputs = [
        describe(op("Identity", loss_value), "loss", T, []),
        describe(norm, "gradient_norm", DOUBLE, []),
        describe(accepted, "accepted", BOOL, []),
        describe(safe, "safe", BOOL, ["batch"]),
        *(of_argmin[name] for name in ANSWER),
        either(next_count, count, "state.step"),
        *(either(moved_states[name], old, name) for name, old in states.items()),
        *(either(new, theta[name], name) for name, new in moved.items()),
    ]
    constants = numbered([*argmin_constants, *adjoint_constants, *loss_constants, *op.constants])
    inputs = [x, target, learning_rate, count, *states.values(), *weights]
    return ir.Graph(inputs, outputs, nodes=op.nodes, initializers=constants, name="train")
