"""A torch energy, brought to one functional aten graph and split where y enters.

    f(x, y; θ) = value(θ, prepare(θ, x), y)

`prepare` is everything that does not depend on y (the x path of a partially convex network, transposed or
reparametrised weights): work that the iteration must not repeat. The split is made on the graph, so it needs nothing
from the model but a forward(x, y) -> [B].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from icnnrt.errors import ExportError

Theta = Mapping[str, Tensor]


@dataclass(frozen=True)
class Boundary:
    """One value that crosses from the x part to the y part of the graph."""

    node: fx.Node
    batch_dim: int | None  # None: the same for all samples (depends on weights alone)


class EnergyGraph:
    """f(x, y; θ) as a graph of aten operators with θ as an explicit argument.

    Attributes:
        theta: every tensor the graph reads, by its name in the state_dict; tensors that the forward creates itself
            follow under the names of `constants`.
        constants: names in `theta` that are not in the state_dict.
        boundary: what crosses the split.
    """

    def __init__(self, graph: fx.Graph, theta: dict[str, Tensor], constants: frozenset[str]) -> None:
        self._graph = graph
        self.theta = theta
        self.constants = constants
        x, y = (node for node in graph.nodes if node.op == "placeholder")
        self._x, self._y = x, y
        self._batch = x.meta["val"].shape[0]
        self._after_y = _dependents(graph, y)
        crossing = dict.fromkeys(
            source
            for node in graph.nodes
            if node in self._after_y or node.op == "output"
            for source in node.all_input_nodes
            if source not in self._after_y and source.op != "get_attr" and isinstance(source.meta.get("val"), Tensor)
        )
        self.boundary = [Boundary(node, self._batch_dim(node)) for node in crossing]

    def _batch_dim(self, node: fx.Node) -> int | None:
        dims = [d for d, size in enumerate(node.meta["val"].shape) if _expression(size) == _expression(self._batch)]
        mixed = [size for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
        if len(dims) != len(mixed) or len(dims) > 1:
            raise ExportError(
                f"energy: the value {node.name} ({node.target}) folds the batch into shape "
                f"{tuple(map(str, node.meta['val'].shape))}; expected one batch dimension. Keep samples apart in the "
                "part of the forward that does not depend on y."
            )
        return dims[0] if dims else None

    def prepare(self, theta: Theta, x: Tensor) -> list[Tensor]:
        """Values of the boundary, computed from θ and x alone."""
        environment: dict[fx.Node, Any] = {self._x: x}
        wanted = [b.node for b in self.boundary]
        for node in self._graph.nodes:
            if node not in self._after_y and node not in environment and node.op != "output":
                environment[node] = self._run(node, theta, environment, x)
        return [environment[node] for node in wanted]

    def value(self, theta: Theta, boundary: Sequence[Tensor], y: Tensor) -> Tensor:
        """f [M] at y [M, n], from boundary values with the same leading M."""
        environment: dict[fx.Node, Any] = {b.node: v for b, v in zip(self.boundary, boundary, strict=True)}
        environment[self._y] = y
        result: Tensor | None = None
        for node in self._graph.nodes:
            if node.op == "output":
                result = fx.map_arg(node.args[0], environment.__getitem__)[0]
            elif node in environment:
                continue
            elif node in self._after_y or node.op == "get_attr" or isinstance(node.meta.get("val"), torch.SymInt):
                environment[node] = self._run(node, theta, environment, y)
        assert result is not None
        return result

    def repeat(self, boundary: Sequence[Tensor], K: int) -> list[Tensor]:
        """Boundary values of B samples, each sample K times in a row, for B·K points y."""
        return [
            v if b.batch_dim is None else _repeat_each(v, b.batch_dim, K)
            for b, v in zip(self.boundary, boundary, strict=True)
        ]

    def _run(self, node: fx.Node, theta: Theta, environment: dict[fx.Node, Any], batch_source: Tensor) -> Any:
        if node.op == "get_attr":
            return theta[str(node.target)]
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt) and _expression(meta) == _expression(self._batch):
            # Each part takes the batch from its own argument: the y part may run on B·K points.
            return batch_source.shape[0]
        if node.op != "call_function":
            raise ExportError(f"energy: cannot export the graph node {node.format_node()}")
        lookup = environment.__getitem__
        return node.target(*fx.map_arg(node.args, lookup), **fx.map_arg(node.kwargs, lookup))  # type: ignore[operator]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _repeat_each(v: Tensor, dim: int, K: int) -> Tensor:
    wide = v.unsqueeze(dim + 1)
    shape = list(wide.shape)
    shape[dim + 1] = K
    return wide.expand(shape).flatten(dim, dim + 1)


def _dependents(graph: fx.Graph, root: fx.Node) -> set[fx.Node]:
    """Every node whose value (not merely whose shape) depends on root."""
    found = {root}
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes) and not isinstance(
            node.meta.get("val"), torch.SymInt
        ):
            found.add(node)
    found.discard(next(n for n in graph.nodes if n.op == "output"))
    return found


def example_batch(energy: nn.Module, *examples: Tensor) -> int:
    """A batch size that equals no dimension in sight, so that no size is taken for the batch by chance."""
    taken = {size for t in (*energy.state_dict().values(), *examples) for size in t.shape}
    return next(p for p in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53) if p not in taken)


def trace_energy(energy: nn.Module, x_example: Tensor, y_example: Tensor) -> EnergyGraph:
    """The EnergyGraph of a module with forward(x [B, ...], y [B, n]) -> [B].

    Raises ExportError, in one sentence, when the batch is fixed, the output is not [B], or torch.export cannot follow
    the forward.
    """
    B = example_batch(energy, x_example, y_example)
    x, y = (t[:1].detach().expand(B, *t.shape[1:]).clone() for t in (x_example, y_example))
    with torch.no_grad():
        try:
            f = energy(x, y)
        except Exception as error:
            raise ExportError(
                f"energy: its forward must work for a batch of any size, but fails on {B} samples made from x_example "
                f"and y_example ({_first_line(error)})"
            ) from error
    if not isinstance(f, Tensor) or f.shape != (B,):
        came = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise ExportError(
            f"energy: forward returned {came} for a batch of {B}; expected one energy per sample, shape ({B},). "
            "Return z.squeeze(1), or sum over everything but the batch."
        )
    if f.dtype != y.dtype or x.dtype != y.dtype:
        raise ExportError(
            f"energy: x is {x.dtype}, y is {y.dtype} and the energy {f.dtype}; expected one dtype. Convert the model "
            "with .float() or .double() and the examples likewise."
        )
    dim = torch.export.Dim("batch")
    try:
        program = torch.export.export(energy, (x, y), dynamic_shapes=({0: dim}, {0: dim}), strict=False)
        program = program.run_decompositions({torch.ops.aten.copy.default: _copy})
    except Exception as error:
        text = str(error)
        if "batch" in text and ("specialized" in text or "onstraint" in text):
            raise ExportError(
                "energy: its forward works for one batch size only "
                f"({_constraint(text)}); make it independent of x.shape[0]"
            ) from error
        raise ExportError(f"energy: torch.export cannot follow its forward ({_first_line(error)})") from error
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    graph.eliminate_dead_code()

    read = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")
    state = energy.state_dict()
    theta, constants = {}, set()
    for name in read:
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(module.get_submodule(owner), attribute)
        theta[name] = tensor.detach()
        if name not in state:
            constants.add(name)
    return EnergyGraph(graph, theta, frozenset(constants))


def _copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    # aten.copy has no derivative; what it computes is a broadcast of the source.
    return source.to(destination.dtype).expand_as(destination).clone()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}" if lines else type(error).__name__


def _constraint(text: str) -> str:
    line = next((line for line in text.splitlines() if "batch" in line and "specialized" in line), text)
    return line.strip(" -")[:200]
