"""One step of fine-tuning a network of quadratic programs: (x, target, weights, state) -> loss, new weights, state."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from icnnrt.format.signs import Sign
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt_exporters.assembly.optimizers import Optimizer
from icnnrt_exporters.assembly.train_graph import update
from icnnrt_exporters.surgery import Ops, describe, dismantle, dtype_of, numbered, replace, split, static

INT32, INT64, DOUBLE, BOOL = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL


def qp_train_graph(
    push: ir.Model,
    loss: ir.Model,
    *,
    optimizer: Optimizer,
    updated: Sequence[str],
    signs: Mapping[str, Sign],
    clip_norm: float | None,
) -> ir.Graph:
    """From the heads of adjoint and loss to one training step.

        z, status = network(x);  safe_b = every program of sample b is SOLVED
        loss, z̄   = of the safe samples alone; z̄ = 0 of the others
        θ̄         = adjoint(x, z̄), and on as in `train_graph`

    Inputs: x, target, learning_rate [], state.step [] int64, state.<slot> [P], then the weights.
    Outputs: loss [], gradient_norm [] float64, accepted [] bool, safe [B] bool, z, residual, status, new.state.step,
    new.state.<slot>, new.<weight>. Without a safe sample the loss is NaN, and nothing moves.
    """
    (*weights, x, z_bar_in), results, push_nodes, push_constants = dismantle(push.graph, "step_network")
    (z_loss, target), (loss_value, z_bar), loss_nodes, loss_constants = dismantle(loss.graph, "step_loss")
    *cotangents, _, z, status, residual = results
    T, n = dtype_of(z), static(z, 1)
    before, after = split(push_nodes, [z_bar_in])

    op = Ops("step")
    op.extend(before)
    safe = op("Equal", status, op.constant(int(QPStatus.SOLVED), INT32))
    held = op("Compress", target, safe, axis=0)
    replace(loss_nodes, {z_loss: op("Compress", z, safe, axis=0), target: held})
    for node in loss_nodes:  # onnxruntime takes equal names of sizes for equal sizes
        for v in node.outputs:
            if v.shape is not None:
                v.shape = ir.Shape(["solved" if str(size) == "batch" else size for size in v.shape])
    op.extend(loss_nodes)
    # Back to their places: row i of the safe ones is that of the i-th safe sample; a row of 0 before them serves the
    # others.
    zero_row = op.constant([[0.0] * n], T)
    padded = op("Concat", zero_row, z_bar, axis=0)
    place = op("CumSum", op("Cast", safe, to=INT64), op.constant(0))
    z_bar = op("Gather", padded, op("Where", safe, place, op.constant(0)), axis=0)
    replace(after, {z_bar_in: z_bar})
    op.extend(after)

    gradients = {v.name.removeprefix("theta_bar."): v for v in cotangents if v.name}
    theta = {v.name: v for v in weights}
    nan = op.constant(float("nan"), T)
    # A sum over no samples is 0, which would read as a perfect fit.
    some = op("Greater", op("ReduceSum", op("Cast", safe, to=INT64), keepdims=0), op.constant(0))
    loss_value = op("Where", some, op("Cast", loss_value, to=T), nan)
    shown = op("Where", op("Unsqueeze", safe, op.constant([1])), z, nan)
    answer = [
        describe(shown, "z", T, ["batch", n]),
        describe(op("Identity", residual), "residual", DOUBLE, ["batch", 3]),
        describe(op("Identity", status), "status", INT32, ["batch"]),
    ]
    for v, name in ((z, "step_network/z"), (residual, "step_network/residual"), (status, "step_network/status")):
        v.name = name
    outputs, inputs = update(
        op,
        loss_value,
        safe,
        answer,
        {name: theta[name] for name in updated},
        {name: gradients[name] for name in updated},
        optimizer,
        signs,
        clip_norm,
    )
    constants = numbered([*push_constants, *loss_constants, *op.constants])
    return ir.Graph([x, target, *inputs, *weights], outputs, nodes=op.nodes, initializers=constants, name="train")
