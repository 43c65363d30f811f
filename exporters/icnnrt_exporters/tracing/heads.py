"""Derivative graphs of an energy: each head a pure function of tensors, traced to aten operators.

Transforms of torch.func inside a forward do not survive torch.onnx.export. Traced beforehand, by make_fx on fake
tensors with one symbolic batch, they do: what comes out is a plain graph of forward operators.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vjp
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from icnnrt.errors import ExportError
from icnnrt_exporters.tracing.decompositions import decompositions
from icnnrt_exporters.tracing.energy_graph import EnergyGraph, Theta
from icnnrt_exporters.tracing.quiet import quiet
from icnnrt_exporters.tracing.replaced import replace

_TRACING = threading.RLock()


@dataclass(frozen=True)
class Input:
    """One argument of a head: its name, an example, and the dimension that is the batch (None: fixed)."""

    name: str
    example: Tensor
    batch_dim: int | None


@dataclass(frozen=True)
class Head:
    """A traced head.

    `graph` takes the inputs in order and returns the outputs in order; shapes hold for every batch. `energy` is what it
    was made of, where that is known: it tells where in the model an operator stands.
    """

    graph: fx.GraphModule
    inputs: list[Input]
    outputs: list[str]
    energy: EnergyGraph | None = None


def boundary_names(energy: EnergyGraph) -> list[str]:
    return [f"boundary/{i}" for i in range(len(energy.boundary))]


def value_and_gradient(energy: EnergyGraph, x: Tensor, y: Tensor) -> Head:
    """θ, x [B, ...], y [B, n] -> f [B], ∇_y f [B, n]."""
    _demand_energy(energy, "value_and_gradient")

    def head(theta: Theta, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _value_and_slope(energy, theta, energy.prepare(theta, x), y)

    return _trace(energy, head, [Input("x", x, 0), Input("y", y, 0)], ["f", "gradient"])


def gradient(energy: EnergyGraph, x: Tensor, y: Tensor) -> Head:
    """θ, x [B, ...], y [B, n] -> g [B, n], named "gradient": ∇_y f, or what a module of kind "gradient" returns."""

    def head(theta: Theta, x: Tensor, y: Tensor) -> Tensor:
        return _slope(energy, theta, energy.prepare(theta, x))(y)

    return _trace(energy, head, [Input("x", x, 0), Input("y", y, 0)], ["gradient"])


def gradient_x(energy: EnergyGraph, x: Tensor, y: Tensor) -> Head:
    """θ, x [B, ...], y [B, n] -> ∇_x f [B, ...], named "gradient_x"."""
    _demand_energy(energy, "gradient_x")

    def head(theta: Theta, x: Tensor, y: Tensor) -> Tensor:
        return grad(lambda x: energy.value(theta, energy.prepare(theta, x), y).sum())(x)

    return _trace(energy, head, [Input("x", x, 0), Input("y", y, 0)], ["gradient_x"])


def hessian_product(energy: EnergyGraph, x: Tensor, y: Tensor) -> Head:
    """θ, x [B, ...], y [B, n], v [B, n] -> ∇²_y f v [B, n], named "hvp"; g'(y) v for kind "gradient"."""

    def head(theta: Theta, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return _curvature(energy, theta, energy.prepare(theta, x), y, v)

    return _trace(energy, head, [Input("x", x, 0), Input("y", y, 0), Input("y_dot", y, 0)], ["hvp"])


def hessian(energy: EnergyGraph, x: Tensor, y: Tensor) -> Head:
    """θ, x [B, ...], y [B, n] -> f [B], gradient [B, n], hessian [B, n, n], dense: for small n.

    All B·n products with unit vectors are one batch; the x path is computed once for B samples. The result is made
    symmetric to the last bit. Kind "gradient" has no f, and its Jacobian hessian[b, i, j] = ∂g_i/∂y_j is returned as it
    is: how far it is from symmetric tells how far g is from a gradient.
    """
    n = y.shape[1]

    def head(theta: Theta, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        c = energy.prepare(theta, x)
        unit = torch.eye(n, dtype=y.dtype, device=y.device)
        directions = unit.expand(y.shape[0], n, n).reshape(y.shape[0] * n, n)
        points = y[:, None].expand(y.shape[0], n, n).reshape(y.shape[0] * n, n)
        rows = _curvature(energy, theta, energy.repeat(c, n), points, directions).reshape(y.shape[0], n, n)
        if energy.kind == "gradient":
            return energy.value(theta, c, y), rows.transpose(1, 2)
        f, slope = _value_and_slope(energy, theta, c, y)
        return f, slope, 0.5 * (rows + rows.transpose(1, 2))

    outputs = ["gradient", "hessian"] if energy.kind == "gradient" else ["f", "gradient", "hessian"]
    return _trace(energy, head, [Input("x", x, 0), Input("y", y, 0)], outputs)


def hessian_vector_product(energy: EnergyGraph, x: Tensor, y: Tensor) -> Head:
    """θ, boundary, y [B, n], s [B, n] -> ∇²_y f s [B, n]."""
    _demand_energy(energy, "hessian_vector_product")

    def head(theta: Theta, *data: Tensor) -> Tensor:
        *c, y, s = data
        return _curvature(energy, theta, c, y, s)

    data = [*_boundary(energy, x), Input("hvp/y", y, 0), Input("hvp/s", y, 0)]
    return _trace(energy, head, data, ["hvp/hessian_s"])


def context(energy: EnergyGraph, x: Tensor) -> Head:
    """θ, x [B, ...] -> boundary."""

    def head(theta: Theta, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(energy.prepare(theta, x))

    return _trace(energy, head, [Input("x", x, 0)], boundary_names(energy))


def value_and_gradient_at(energy: EnergyGraph, x: Tensor, y: Tensor) -> Head:
    """θ, boundary, y [B, n] -> f [B], ∇_y f [B, n]."""
    _demand_energy(energy, "value_and_gradient_at")

    def head(theta: Theta, *data: Tensor) -> tuple[Tensor, Tensor]:
        *c, y = data
        return _value_and_slope(energy, theta, c, y)

    return _trace(energy, head, [*_boundary(energy, x), Input("y", y, 0)], ["f", "gradient"])


def cut_vjp(
    energy: EnergyGraph, x: Tensor, y: Tensor, K: int, trainable: Sequence[str], *, points: bool = False
) -> Head:
    """θ, x, cut points Y [B, K, n], ē [B, K], seeds S [B, K, n] -> θ̄, x̄, slopes, boundary.

        θ̄ = Σ_b Σ_i ∇θ [ ē_bi f(x_b, y_bi; θ) + s_bi' ∇_y f(x_b, y_bi; θ) ]

    and x̄ likewise. All B·K cut points go through one second-order product; the x path is computed once for B samples,
    forward and backward. It also returns the boundary, so that the same computation serves the recursion, and the
    slopes ∇_y f [B·K, n] it found, which tell whether it met the same faces of f as the cuts did. With `points` it
    gives ē_bi ∇_y f + ∇²_y f s_bi [B·K, n] as well, the cotangent of the cut points, as the bounds of a box need.
    """
    _demand_energy(energy, "cut_vjp")
    B, n = y.shape

    def head(theta: Theta, x: Tensor, Y: Tensor, e_bar: Tensor, S: Tensor) -> tuple[Tensor, ...]:
        y_flat, e_flat, s_flat = Y.flatten(0, 1), e_bar.flatten(0, 1), S.flatten(0, 1)

        def pushed(moving: dict[str, Tensor], x: Tensor, y_flat: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            all_weights = {**theta, **moving}
            c = energy.prepare(all_weights, x)
            f, gradient = _value_and_slope(energy, all_weights, energy.repeat(c, K), y_flat)
            return (e_flat * f).sum() + (s_flat * gradient).sum(), (gradient, *c)

        moving = {name: theta[name] for name in trainable}
        argnums = (0, 1, 2) if points else (0, 1)
        (theta_bar, *data_bars), (slopes, *c) = grad(pushed, argnums=argnums, has_aux=True)(moving, x, y_flat)
        return (*(theta_bar[name] for name in trainable), *data_bars, slopes, *c)

    inputs = [
        Input("x", x, 0),
        Input("cut_points", y[:, None].expand(B, K, n).contiguous(), 0),
        Input("push/offset_bar", y.new_zeros(B, K), 0),
        Input("push/seed", y.new_zeros(B, K, n), 0),
    ]
    outputs = [*(f"theta_bar.{name}" for name in trainable), "x_bar", *(["push/point_bar"] if points else [])]
    return _trace(energy, head, inputs, [*outputs, "push/slopes_again", *boundary_names(energy)])


def pullback(energy: EnergyGraph, x: Tensor, y: Tensor, trainable: Sequence[str]) -> Head:
    """θ, x [B, ...], y [B, n], f̄ [B], ḡ [B, n] -> ȳ [B, n], x̄ [B, ...], θ̄: of f̄ f + ḡ'∇_y f, θ̄ summed over B."""
    _demand_energy(energy, "pullback")

    def head(theta: Theta, x: Tensor, y: Tensor, f_bar: Tensor, gradient_bar: Tensor) -> tuple[Tensor, ...]:
        def paired(moving: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            all_weights = {**theta, **moving}
            f, gradient = _value_and_slope(energy, all_weights, energy.prepare(all_weights, x), y)
            return (f_bar * f).sum() + (gradient_bar * gradient).sum()

        moving = {name: theta[name] for name in trainable}
        theta_bar, x_bar, y_bar = grad(paired, argnums=(0, 1, 2))(moving, x, y)
        return (y_bar, x_bar, *(theta_bar[name] for name in trainable))

    inputs = [
        Input("x", x, 0),
        Input("y", y, 0),
        Input("f_bar", y.new_zeros(y.shape[0]), 0),
        Input("gradient_bar", y, 0),
    ]
    return _trace(energy, head, inputs, ["y_bar", "x_bar", *(f"theta_bar.{name}" for name in trainable)])


def _boundary(energy: EnergyGraph, x: Tensor) -> list[Input]:
    """What crosses the split, as arguments of a head of the part that depends on y."""
    crossing = zip(boundary_names(energy), energy.prepare(energy.theta, x), energy.boundary, strict=True)
    return [Input(name, example, b.batch_dim) for name, example, b in crossing]


def _trace(energy: EnergyGraph, function: Callable[..., object], data: list[Input], outputs: list[str]) -> Head:
    return trace(with_weights(function, energy.theta), [*weights(energy.theta), *data], outputs, energy)


def weights(theta: Theta) -> list[Input]:
    """The weights as arguments, the first ones of a head."""
    return [Input(name, tensor, None) for name, tensor in theta.items()]


def with_weights(function: Callable[..., Any], theta: Theta) -> Callable[..., Any]:
    """A function of (θ, data...) with θ by name, as one of tensors alone."""
    names, count = list(theta), len(theta)
    return lambda *args: function(dict(zip(names, args[:count], strict=True)), *args[count:])


def _demand_energy(energy: EnergyGraph, head: str) -> None:
    if energy.kind != "energy":
        raise ExportError(
            f'energy: {head} needs an energy, but the forward returns its gradient (kind="gradient"), which has no '
            "value; take gradient, hessian_product or hessian, or return the energy"
        )


def _value_and_slope(energy: EnergyGraph, theta: Theta, c: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """f [B], ∇_y f [B, n] from the boundary."""

    def total(y: Tensor) -> tuple[Tensor, Tensor]:
        # Samples do not meet, so the gradient of the sum holds each sample's own.
        f = energy.value(theta, c, y)
        return f.sum(), f

    slope, f = grad(total, has_aux=True)(y)
    return f, slope


def _slope(energy: EnergyGraph, theta: Theta, c: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """y [B, n] -> ∇_y f, or g, [B, n]."""
    if energy.kind == "gradient":
        return lambda y: energy.value(theta, c, y)
    return grad(lambda y: energy.value(theta, c, y).sum())


def _curvature(energy: EnergyGraph, theta: Theta, c: Sequence[Tensor], y: Tensor, v: Tensor) -> Tensor:
    """∇²f v [B, n] as ∇_y (∇f'v); g' v for a gradient map, whose Jacobian may be found not symmetric."""
    slope = _slope(energy, theta, c)
    if energy.kind == "energy":
        return grad(lambda y: (slope(y) * v).sum())(y)
    # u -> g'(y)ᵀ u is linear, and its own transpose is g'(y): reverse mode twice, at any u.
    pull = vjp(slope, y)[1]
    return grad(lambda u: (pull(u)[0] * v).sum())(v)


def trace(
    function: Callable[..., object], inputs: list[Input], outputs: list[str], energy: EnergyGraph | None = None
) -> Head:
    """A function of tensors as one graph that holds for every batch.

    Raises ExportError when a derivative lets the batch be one number only.
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    batch: torch.SymInt | None = None
    fakes: list[Tensor] = []
    for argument in inputs:
        if argument.batch_dim is None:
            fakes.append(mode.from_tensor(argument.example, static_shapes=True))
            continue
        if batch is None:
            dims = [DimDynamic.STATIC] * argument.example.dim()
            dims[argument.batch_dim] = DimDynamic.DYNAMIC
            context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=dims)
            fake: Tensor = mode.from_tensor(argument.example, symbolic_context=context)
            batch = fake.shape[argument.batch_dim]  # type: ignore[assignment]
        else:
            # The same symbol everywhere: no guard "these two batches are equal" can arise.
            size: list[int | torch.SymInt] = list(argument.example.shape)
            size[argument.batch_dim] = batch
            with mode:
                fake = torch.empty(size, dtype=argument.example.dtype)
        fakes.append(fake)
    # Without the Python dispatcher, recurrent cells silently specialise the batch.
    with quiet(), _without_notes(), enable_python_dispatcher():
        graph = make_fx(function, decomposition_table=decompositions(), tracing_mode="fake")(*fakes)
    if isinstance(batch, torch.SymInt) and batch.node.maybe_as_int() is not None:
        guard = next((str(g.expr) for g in shapes.guards), "unknown")
        raise ExportError(f"energy: its derivatives fix the batch (guard {guard}); make them independent of x.shape[0]")
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Head(graph, inputs, outputs, energy)


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """While it is entered, nodes are not told their strides and memory formats, which compare symbols and nobody reads:
    they know the value that they make."""
    with _TRACING, contextlib.ExitStack() as stack:
        if hasattr(proxy_tensor, "_extract_tensor_metadata"):
            replace(stack, proxy_tensor, "_extract_tensor_metadata", lambda *arguments, **named: None)
        yield
