"""What a package of a network of quadratic programs z(x; θ) is made of."""

import onnx_ir as ir
from torch import Tensor, nn

from icnnrt.arguments import refused
from icnnrt.errors import ExportError
from icnnrt.format.contents import weight_layout
from icnnrt.format.signatures import QP_ROLES
from icnnrt.format.signs import NONNEGATIVE, Sign
from icnnrt_exporters.assembly.losses import loss_graph, named
from icnnrt_exporters.assembly.optimizers import resolve
from icnnrt_exporters.assembly.qp_settings import give_settings
from icnnrt_exporters.assembly.qp_train_graph import qp_train_graph
from icnnrt_exporters.assembly.train_spec import TrainSpec
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.preconditions import check_network, float64_judge
from icnnrt_exporters.graphs.onnx_head import to_onnx
from icnnrt_exporters.surgery import dismantle, numbered
from icnnrt_exporters.tracing.qp_network import QPNetwork, adjoint_head, solve_head
from icnnrt_exporters.writing import Contents, Progress, dtype_name, plain_graph, serialise, stored


def network_contents(
    module: nn.Module,
    x_example: Tensor,
    z_example: Tensor,
    nonnegative: tuple[str, ...],
    train: TrainSpec | None,
    progress: Progress,
) -> tuple[Contents, nn.Module]:
    """The contents, and the float64 copy of the network that they are judged by; `export` documents the rest."""
    judge = float64_judge(module, "qp")
    check_network(judge, parity.inputs(x_example, z_example)[-1][0][3:7])
    progress("tracing the network")
    network = QPNetwork(module, x_example)
    if network.n != z_example.shape[1]:
        expected = f"answers of {network.n} columns, as the forward returns"
        remedy = "pass what module(x_example) returns, or targets like it"
        raise refused("y_example", expected, z_example.shape[1], remedy, kind=ExportError)
    x = x_example[:1].detach().expand(11, *x_example.shape[1:]).contiguous()
    weights, trainable = stored(module, network.theta)
    loss = None
    if train:  # before anything that takes longer, so that a choice that does not fit is told at once
        train.check_names(network.theta)
        loss = loss_graph(named(train.loss)[1], z_example, train.target(z_example))
    progress("solve")
    assembled = {"solve": plain_graph(to_onnx(solve_head(network, x)), "solve")}
    progress("adjoint")
    push = to_onnx(adjoint_head(network, x, trainable))
    training = None
    if train and loss:
        progress("training step")
        updated = train.chosen(trainable)
        training = train.described(updated, z_example)
        assembled["train"] = qp_train_graph(
            push.clone() if updated == trainable else to_onnx(adjoint_head(network, x, updated)),
            loss,
            optimizer=resolve(train.optimizer),
            updated=updated,
            signs={name: Sign(NONNEGATIVE) for name in nonnegative},
            clip_norm=train.clip_norm,
        )
    (*inputs, x_in, z_bar), results, nodes, constants = dismantle(push.graph, "network")
    assembled["solve_adjoint"] = ir.Graph(
        [x_in, z_bar, *inputs],
        results[:-3],  # not what the forward pass inside it found
        nodes=nodes,
        initializers=numbered(constants),
        name="solve_adjoint",
    )
    made = {name: network.theta[name] for name in network.constants}
    for role in QP_ROLES:
        give_settings(assembled[role])
    layout = weight_layout(weights)[1]
    graphs = {role: serialise(graph, weights, layout, made) for role, graph in assembled.items()}
    contents = Contents(
        "qp",
        dtype_name(x_example),
        x_shape=tuple(x_example.shape[1:]),
        y_shape=tuple(z_example.shape[1:]),
        graphs=graphs,
        weights=weights,
        trainable=trainable,
        nonnegative=nonnegative,
        train=training,
    )
    return contents, judge
