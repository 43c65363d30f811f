"""A torch energy, brought to one functional aten graph and split where y enters.

    f(x, y; θ) = value(θ, prepare(θ, x), y)

`prepare` is everything that does not depend on y (the x path of a partially convex network, transposed or
reparametrised weights): work that the iteration must not repeat. The split is made on the graph, so it needs nothing
from the model but a forward(x, y) -> [B] or [B, 1]. A module whose forward is the gradient itself, g(x, y) -> [B, n],
is traced the same way; its `value` is g.
"""

import operator as python
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from icnnrt.errors import ExportError
from icnnrt_exporters.tracing.lowering import lower, opened
from icnnrt_exporters.tracing.place import kind_and_line, operator, place, place_of, raised_in
from icnnrt_exporters.tracing.quiet import quiet

Theta = Mapping[str, Tensor]
Kind = Literal["energy", "gradient"]

aten = torch.ops.aten

# What has a derivative of zero wherever it has one: y that passes through these alone does not move the energy.
WITHOUT_DERIVATIVE = frozenset(
    {
        aten.detach.default,
        aten.round.default,
        aten.round.decimals,
        aten.floor.default,
        aten.ceil.default,
        aten.trunc.default,
        aten.sign.default,
        aten.sgn.default,
        aten.heaviside.default,
    }
)
# What may answer floats that do not depend on the values of what it is given.
FLAT = WITHOUT_DERIVATIVE | {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}

# Composites that stay as they are.
WHOLE = frozenset({aten.linear.default, aten.matmul.default})


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
        kind: "energy", or "gradient" where the forward returns g [B, n], the gradient of a convex function.
    """

    def __init__(
        self, graph: fx.Graph, theta: dict[str, Tensor], constants: frozenset[str], kind: Kind = "energy"
    ) -> None:
        self._graph = graph
        self.kind = kind
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
                f"energy: the value of {operator(node)} {place(node)} folds the batch into shape "
                f"({', '.join(map(str, node.meta['val'].shape))}); keep one batch dimension in the part of the forward "
                "that does not depend on y"
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
        """f [M] (or g [M, n]) at y [M, n], from boundary values with the same leading M."""
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

    def place_of(self, operator_name: str) -> str:
        """Where in the model an operator stands, such as "(in conv, a Conv2d)"; "" if that is not known."""
        return place_of(self._graph.nodes, operator_name)

    def _run(self, node: fx.Node, theta: Theta, environment: dict[fx.Node, Any], batch_source: Tensor) -> Any:
        if node.op == "get_attr":
            return theta[str(node.target)]
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt) and (size := self._of_batch(meta)):
            # Each part takes the batch from its own argument: the y part may run on B·K points.
            return size(batch_source.shape[0])
        if node.op != "call_function":
            raise ExportError(f"energy: cannot export the graph node {node.format_node()}")
        lookup = environment.__getitem__
        return node.target(*fx.map_arg(node.args, lookup), **fx.map_arg(node.kwargs, lookup))  # type: ignore[operator]

    def _of_batch(self, size: torch.SymInt) -> Callable[[Any], Any] | None:
        """A polynomial size as a function of the batch; None for what else there may be."""
        expression, batch = _expression(size), _expression(self._batch)
        if expression == batch:
            return lambda B: B
        if isinstance(expression, sympy.Expr) and expression.is_polynomial(batch):
            return sympy.lambdify(batch, expression)
        return None


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
    """The EnergyGraph of a module with forward(x [B, ...], y [B, n]) -> f [B] or [B, 1].

    Raises ExportError, in one sentence, when the batch is fixed, the output has another shape, the forward cannot be
    followed (branches on values, state, calls of autograd), or y does not reach the output in a differentiable way.
    """
    return _trace(energy, x_example, y_example, "energy")


def trace_gradient(gradient: nn.Module, x_example: Tensor, y_example: Tensor) -> EnergyGraph:
    """The EnergyGraph, kind "gradient", of a module with forward(x [B, ...], y [B, n]) -> g [B, n].

    g is taken to be ∇_y f of a convex f that has no formula. Raises ExportError as `trace_energy` does.
    """
    return _trace(gradient, x_example, y_example, "gradient")


def _trace(energy: nn.Module, x_example: Tensor, y_example: Tensor, kind: Kind) -> EnergyGraph:
    B = example_batch(energy, x_example, y_example)
    x, y = (t[:1].detach().expand(B, *t.shape[1:]).clone() for t in (x_example, y_example))
    column, unsteady = _try(energy, x, y, kind)
    module = followed(energy, x, y)
    graph = module.graph
    if unsteady:
        raise ExportError(f"energy: {unsteady}; make it a function of x, y and the weights alone")
    if column:
        (output,) = (node for node in graph.nodes if node.op == "output")
        _squeeze(graph, output)
    _refuse_flat(graph)
    _refuse_underivable(module, x, y)
    lower(module)
    graph.eliminate_dead_code()

    theta, constants = read_tensors(module, energy)
    return EnergyGraph(graph, theta, constants, kind)


def followed(module: nn.Module, *examples: Tensor) -> fx.GraphModule:
    """The forward as one functional graph of aten operators, each example with one batch.

    Raises ExportError for what cannot be followed: branches on values, state, a batch that is fixed, random numbers.
    """
    dim = torch.export.Dim("batch")
    try:
        with quiet():
            shapes = tuple({0: dim} for _ in examples)
            program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
            if not all(_plain(node) for node in program.graph.nodes):  # or else a second trace would find nothing
                program = program.run_decompositions({**opened(), aten.copy.default: _copy})
    except Exception as error:
        raise _cannot_follow(module, error) from error
    _refuse_mutation(program)
    with quiet():
        graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    graph.graph.eliminate_dead_code()
    _refuse_nodes(graph.graph)
    return graph


def _plain(node: fx.Node) -> bool:
    """It changes nothing in place, and is no composite of others."""
    target = node.target
    if node.op != "call_function" or target in WHOLE or target in (python.add, python.mul, python.getitem):
        return True
    if not isinstance(target, torch._ops.OpOverload) or target is aten.copy.default or target._schema.is_mutable:
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


def read_tensors(graph: fx.GraphModule, module: nn.Module) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Every tensor that a graph reads, by its name in the module's state_dict, and the names that are not there: of
    tensors that the forward creates itself."""
    state = module.state_dict()
    theta, constants = {}, set()
    for name in dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"):
        theta[name] = python.attrgetter(name)(graph).detach()
        if name not in state:
            constants.add(name)
    return theta, frozenset(constants)


def _try(energy: nn.Module, x: Tensor, y: Tensor, kind: Kind) -> tuple[bool, str]:
    """Run the forward as it is; (it returns a column [B, 1], what makes two runs differ or "")."""
    B = len(x)
    before = _plain_state(energy)
    try:
        with torch.no_grad(), _NoAutograd():
            f, again = energy(x.clone(), y.clone()), energy(x.clone(), y.clone())
    except _TakesGradient as error:
        where, _ = raised_in(energy, error)
        remedy = "return the energy alone, every package adds its gradient" if kind == "energy" else "write its formula"
        raise ExportError(
            f"energy: its forward {where} calls torch.autograd itself, which no exported graph can follow; {remedy}"
        ) from error
    except Exception as error:
        where, _ = raised_in(energy, error)
        raise ExportError(
            f"energy: its forward must work for a batch of any size, but fails {where + ' ' if where else ''}on {B} "
            f"samples made from x_example and y_example ({kind_and_line(error)})"
        ) from error
    shapes: tuple[tuple[int, ...], ...] = ((B,), (B, 1)) if kind == "energy" else (tuple(y.shape),)
    if not isinstance(f, Tensor) or tuple(f.shape) not in shapes:
        came = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
        expected = (
            f"one energy per sample, shape ({B},) or ({B}, 1). Sum over everything but the batch"
            if kind == "energy"
            else f"the gradient in y, shape {tuple(y.shape)}. Return one slope for every entry of y"
        )
        raise ExportError(f"energy: forward returned {came} for a batch of {B}; expected {expected}.")
    if f.is_complex() or f.dtype in (torch.float16, torch.bfloat16):
        raise ExportError(f"energy: forward returned {f.dtype}; convert what it computes to float32 or float64")
    if f.dtype != y.dtype or x.dtype != y.dtype:
        raise ExportError(
            f"energy: x is {x.dtype}, y is {y.dtype} and the energy {f.dtype}; expected one dtype. Convert the model "
            "with .float() or .double() and the examples likewise."
        )
    unsteady = ""
    if not torch.equal(f.nan_to_num(), again.nan_to_num()):
        unsteady = "two calls of its forward on the same x and y differ, by randomness or by state kept between calls"
    for name, value in _plain_state(energy).items():
        if name in before and before[name] != value:
            unsteady = f"its forward changes the Python attribute {name}, from {before[name]!r} to {value!r}"
            break
    return kind == "energy" and f.dim() == 2, unsteady


def _plain_state(energy: nn.Module) -> dict[str, object]:
    """Numbers and strings that the modules hold as plain attributes, by path."""
    return {
        f"{path}.{key}" if path else key: value
        for path, module in energy.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str) and value == value
    }


class _NoAutograd(TorchFunctionMode):
    """Refuses a forward that takes gradients itself: no exporter follows that."""

    REFUSED = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self.REFUSED:
            raise _TakesGradient
        return func(*args, **(kwargs or {}))


class _TakesGradient(Exception):
    pass


def _cannot_follow(energy: nn.Module, error: Exception) -> ExportError:
    """The sentence for what torch.export raised."""
    text = str(error)
    if "batch" in text and ("specialized" in text or "onstraint" in text):
        return ExportError(
            f"energy: its forward works for one batch size only ({_constraint(text)}); make it independent of "
            "x.shape[0]"
        )
    where, line = raised_in(energy, error)
    what = f" {where}" if where else ""
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        shown = f", at `{line}`" if line else ""
        return ExportError(
            f"energy: torch.export cannot follow its forward{what}: it branches on, or takes sizes from, the values of "
            f"tensors{shown}; write torch.where, or fix the branch when the module is made"
        )
    return ExportError(f"energy: torch.export cannot follow its forward{what} ({kind_and_line(error)})")


def _refuse_mutation(program: torch.export.ExportedProgram) -> None:
    """A graph answers and changes nothing."""
    signature = program.graph_signature
    for name in signature.buffers_to_mutate.values():
        raise ExportError(
            f"energy: its forward changes the buffer {name}; call .eval() first, or keep no state between calls"
        )
    for name in signature.user_inputs_to_mutate.values():
        raise ExportError(f"energy: its forward changes its argument {name} in place; let it work on {name}.clone()")


def _refuse_nodes(graph: fx.Graph) -> None:
    """Randomness, and numbers that no runtime of ours computes with."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if _draws(node):
            raise ExportError(
                f"energy: {operator(node)} {place(node)} draws random numbers; call .eval() first, or take it out"
            )
        vals = node.meta.get("val")
        if vals is not None and free_unbacked_symbols(vals):
            raise ExportError(
                f"energy: {operator(node)} {place(node)} has a size, or is a Python number, that depends on the values "
                "of tensors; write it with torch.where or masks, in tensors of fixed size"
            )
        for val in vals if isinstance(vals, tuple | list) else (vals,):
            if isinstance(val, Tensor) and (val.is_complex() or val.dtype in (torch.float16, torch.bfloat16)):
                raise ExportError(
                    f"energy: {operator(node)} {place(node)} computes in {val.dtype}; write it in real numbers of the "
                    "dtype of x and y"
                )


def _draws(node: fx.Node) -> bool:
    """A random operator; composite ones (recurrent layers, attention, dropout) only if they drop while training."""
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    if not target._can_decompose():
        return True
    arguments = {a.name: v for a, v in zip(target._schema.arguments, node.args, strict=False)} | node.kwargs
    return arguments.get("train") is True and "dropout" in str(target)


def _refuse_flat(graph: fx.Graph) -> None:
    """y that reaches the output must reach it through something that has a derivative."""
    y = [node for node in graph.nodes if node.op == "placeholder"][1]
    (output,) = (node for node in graph.nodes if node.op == "output")
    reached, smooth, stops = {y}, {y}, []
    for node in graph.nodes:
        sources = node.all_input_nodes
        if not any(source in reached for source in sources):
            continue
        reached.add(node)
        if not any(source in smooth for source in sources):
            continue
        if node.target in WITHOUT_DERIVATIVE or not _is_floating(node):
            if node.op == "call_function" and not isinstance(node.meta.get("val"), torch.SymInt):
                stops.append(node)
        else:
            smooth.add(node)
    (result,) = output.all_input_nodes
    if result in reached and result not in smooth and stops:
        raise ExportError(
            f"energy: y reaches its forward's result only through {operator(stops[0])} {place(stops[0])}, which has "
            "no derivative; write the energy with differentiable operators"
        )


def _refuse_underivable(module: fx.GraphModule, x: Tensor, y: Tensor) -> None:
    """Operators on the way of y that torch cannot differentiate: traced, they would silently count as constant."""
    values: dict[fx.Node, Any] = {}
    inputs = iter((x.clone(), y.clone().requires_grad_()))
    with torch.enable_grad():
        for node in module.graph.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = python.attrgetter(str(node.target))(module).detach()
            else:
                lookup = values.__getitem__
                values[node] = node.target(*fx.map_arg(node.args, lookup), **fx.map_arg(node.kwargs, lookup))
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            moved = any(_requires_grad(values[source]) for source in node.all_input_nodes)
            if moved and _is_floating(node) and not _requires_grad(values[node]) and node.target not in FLAT:
                raise ExportError(
                    f"energy: {operator(node)} {place(node)} has no derivative in torch; write it with operators that "
                    "have one"
                )


def _requires_grad(value: Any) -> bool:
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _is_floating(node: fx.Node) -> bool:
    vals = node.meta.get("val")
    vals = vals if isinstance(vals, tuple | list) else (vals,)
    return node.op == "output" or any(isinstance(v, Tensor) and v.is_floating_point() for v in vals)


def _squeeze(graph: fx.Graph, output: fx.Node) -> None:
    """[B, 1] -> [B] at the end of the graph."""
    (column,) = output.all_input_nodes
    with graph.inserting_before(output):
        flat = graph.call_function(aten.squeeze.dim, (column, 1))
    flat.meta["val"] = column.meta["val"].squeeze(1)
    output.replace_input_with(column, flat)


def _copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    # aten.copy has no derivative; what it computes is a broadcast of the source.
    return source.to(destination.dtype).expand_as(destination).clone()


def _constraint(text: str) -> str:
    line = next((line for line in text.splitlines() if "batch" in line and "specialized" in line), text)
    return line.strip(" -")[:200]
