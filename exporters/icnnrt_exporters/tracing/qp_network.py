"""A torch network whose forward(x) goes through quadratic programs, as one functional graph, and its heads.

    z, status, residual = network(θ, x)                   status: of its first program that is not SOLVED, if any
                                                          residual: the worst of all its programs
    θ̄, x̄ = ∂z/∂θ' z̄, ∂z/∂x' z̄                          by QPAdjoint where the graph has a QuadraticProgram

Of a sample that some program was not solved for, z is NaN or inaccurate, and no gradient is taken: on the way back all
that its programs give counts as 0, so that no NaN of theirs meets the weights' sums, whatever layers follow.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.func import vjp

from icnnrt.errors import ExportError
from icnnrt.mathematics.qp_pattern import QPPattern
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt_exporters.tracing.energy_graph import example_batch, followed, read_tensors
from icnnrt_exporters.tracing.heads import Head, Input, trace, weights, with_weights
from icnnrt_exporters.tracing.lowering import lower
from icnnrt_models.layers.qp_operators import NAN, USE, differentiable, whole
from icnnrt_models.layers.qp_plan import text_of

Theta = Mapping[str, Tensor]


class QPNetwork:
    """forward(x) -> z [B, n] as a graph of aten operators with θ as an explicit argument.

    Attributes:
        theta: every tensor the graph reads, by its name in the state_dict; tensors that the forward creates itself
            follow under the names of `constants`.
        constants: names in `theta` that are not in the state_dict.
        n: columns of z.
    """

    def __init__(self, module: nn.Module, x_example: Tensor) -> None:
        B = example_batch(module, x_example)
        x = x_example[:1].detach().expand(B, *x_example.shape[1:]).clone()
        with torch.no_grad():
            z = module(x)
        if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != B or z.dtype != x.dtype:
            came = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ExportError(
                f"module: forward returned {came} for a batch of {B}; expected z, {x.dtype} of shape ({B}, n). Return "
                "one row for each sample, in the dtype of x, and of a QPLayer with multipliers its z"
            )
        try:
            graph = followed(module, x)
            lower(graph)
        except ExportError as error:
            raise ExportError(str(error).replace("energy: ", "module: ", 1)) from error
        graph.graph.eliminate_dead_code()
        self._graph = graph.graph
        if not any(node.target is differentiable for node in self._graph.nodes):
            raise ExportError(
                "module: expected a network with a QPLayer, but none of its forward; pass kind='energy' or 'gradient' "
                "for what has none"
            )
        self.n = z.shape[1]
        self.theta, self.constants = read_tensors(graph, module)
        (self._x,) = (node for node in self._graph.nodes if node.op == "placeholder")
        self._batch = self._x.meta["val"].shape[0]
        self._seen: dict[fx.Node, list[NDArray[Any]]] | None = None
        self._give_patterns({name for name, _ in module.named_parameters(remove_duplicate=False)}, x_example)

    def _give_patterns(self, parameters: set[str], x: Tensor) -> None:
        """Where the matrices of a program are 0 for any weights and any x, by a pattern if that pays.

        What is 0 is told from one evaluation elsewhere: there nothing else is 0. Should it be wrong, samples that do
        not keep to the pattern are solved without it.
        """
        g = torch.Generator().manual_seed(0)

        def moved(t: Tensor) -> Tensor:
            noise = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)
            return t + 0.1 * noise * (1.0 + t.abs()) if t.is_floating_point() else t

        theta = {name: moved(t.detach()) if name in parameters else t for name, t in self.theta.items()}
        self._seen = {}
        with torch.no_grad():
            self(theta, moved(x.detach()), clean=False)
        for node, matrices in self._seen.items():
            *arguments, plan, _, _ = whole(node.args)
            pattern = QPPattern(*matrices)
            if not plan and pattern.pays:
                node.args = (*arguments, text_of(pattern))
        self._seen = None

    def __call__(self, theta: Theta, x: Tensor, *, clean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, n], status [B] and residual [B, 3]; with `clean`, what was not solved is 0 and so has no gradient."""
        environment: dict[fx.Node, Any] = {self._x: x}
        found: list[tuple[Tensor, Tensor]] = []
        z: Tensor | None = None
        for node in self._graph.nodes:
            if node.op == "output":
                (result,) = node.all_input_nodes
                z = environment[result]
            elif node.op == "get_attr":
                environment[node] = theta[str(node.target)]
            elif node not in environment:
                environment[node] = self._run(node, environment, x, found, clean)
        assert z is not None
        B = x.shape[0]
        status, residual = found[0]
        for other_status, other_residual in found[1:]:
            # What went wrong first is the cause: its NaN makes those that follow NOT_FINITE_INPUT.
            status = torch.where(status > QPStatus.SOLVED, status, other_status)
            residual = torch.maximum(residual, other_residual)
        return z, status.expand(B), residual.expand(B, 3)

    def _run(
        self,
        node: fx.Node,
        environment: dict[fx.Node, Any],
        x: Tensor,
        found: list[tuple[Tensor, Tensor]],
        clean: bool,
    ) -> Any:
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt) and meta.node.expr == self._batch.node.expr:
            return x.shape[0]
        if node.op != "call_function":
            raise ExportError(f"module: cannot export the graph node {node.format_node()}")
        lookup = environment.__getitem__
        arguments = fx.map_arg(node.args, lookup)
        if node.target is not differentiable:
            return node.target(*arguments, **fx.map_arg(node.kwargs, lookup))  # type: ignore[operator]
        *data, _, tolerance, plan, _, _ = whole(arguments)
        if self._seen is not None:
            self._seen[node] = [data[i].numpy(force=True) for i in (0, 2, 5)]
        *floats, residual, status, ray, taken = differentiable(*data, USE if clean else NAN, tolerance, plan)
        found.append((status, residual))
        if clean:
            kept = (status == QPStatus.SOLVED).unsqueeze(1)
            floats = [torch.where(kept, a, 0.0) for a in floats]
        return (*floats, residual, status, ray, taken)


def solve_head(network: QPNetwork, x: Tensor) -> Head:
    """θ, x [B, ...] -> z [B, n], status [B], residual [B, 3]."""

    def head(theta: Theta, x: Tensor) -> tuple[Tensor, ...]:
        return network(theta, x, clean=False)

    inputs = [*weights(network.theta), Input("x", x, 0)]
    return trace(with_weights(head, network.theta), inputs, ["z", "status", "residual"])


def adjoint_head(network: QPNetwork, x: Tensor, trainable: tuple[str, ...]) -> Head:
    """θ, x [B, ...], z̄ [B, n] -> θ̄ of every trainable weight, summed over the batch, x̄ [B, ...], z, status, residual.

    z is that of the forward pass that this begins with, which does not wait for z̄.
    """

    def head(theta: Theta, x: Tensor, z_bar: Tensor) -> tuple[Tensor, ...]:
        def forward(moving: dict[str, Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            z, status, residual = network({**theta, **moving}, x, clean=True)
            return z, (status, residual)

        moving = {name: theta[name] for name in trainable}
        z, pull, (status, residual) = cast(Any, vjp(forward, moving, x, has_aux=True))
        theta_bar, x_bar = pull(z_bar)
        return (*(theta_bar[name] for name in trainable), x_bar, z, status, residual)

    inputs = [*weights(network.theta), Input("x", x, 0), Input("z_bar", x.new_zeros((len(x), network.n)), 0)]
    outputs = [*(f"theta_bar.{name}" for name in trainable), "x_bar", "z", "status", "residual"]
    return trace(with_weights(head, network.theta), inputs, outputs)
