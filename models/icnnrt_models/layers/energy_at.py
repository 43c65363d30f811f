"""An energy at fixed contexts, evaluated under a graph that is kept: what layers of an argmin differentiate through."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from icnnrt.arguments import integer, refused


def place(p: Tensor, bounds: tuple[Tensor, ...], mu: float) -> Tensor:
    """y = l + (u − l)∘p, or p/√μ; never beyond a bound by rounding."""
    if bounds:
        l, u = bounds  # noqa: E741
        return torch.lerp(l, u, p)
    return p if mu == 1.0 else p / math.sqrt(mu)


def has_context(energy: nn.Module) -> bool:
    return callable(getattr(energy, "context", None)) and callable(getattr(energy, "value", None))


def context_of(energy: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What the energy needs of x."""
    if has_context(energy):
        return tuple(cast(Any, energy).context(x))
    return (x,)


def float_of(energy: nn.Module, x: Tensor) -> Tensor:
    """Some tensor of the energy's dtype; x's own where it has none."""
    floats = (p for p in (*energy.parameters(), *energy.buffers(), x) if p.is_floating_point())
    return next(floats, x)


def y_like(energy: nn.Module, x: Tensor, n: int) -> Tensor:
    """An empty y for x, [batch, n] in the energy's dtype."""
    return torch.empty((x.shape[0], n), dtype=float_of(energy, x).dtype, device=x.device)


def differentiated(energy: nn.Module) -> dict[str, Tensor]:
    """The weights that autograd asks for now, by name: frozen ones stay out, and so cost nothing."""
    if not torch.is_grad_enabled():
        return {}
    return {name: p for name, p in energy.named_parameters() if p.requires_grad}


def y_dim_of(energy: nn.Module, given: int | None) -> int:
    """The number of columns of y: as given, else the energy's own."""
    y_dim = getattr(energy, "y_dim", None) if given is None else given
    if y_dim is None:
        came = f"none, and {type(energy).__name__} has no attribute y_dim"
        raise refused("y_dim", "the number of columns of y", came, "pass y_dim=")
    return integer(y_dim, "y_dim", 1, remedy="give the number of columns of y")


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its history, usable by autograd even if it was made under inference_mode."""
    if tensor.is_inference():
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor.detach()


class Point(NamedTuple):
    """The energy at one p per sample, still attached to its graph: p, which is y but for `place`, is a leaf of it."""

    y: Tensor  # [B, n], p
    f: Tensor  # [B]
    g: Tensor  # [B, n], ∇_p f


class EnergyAt(nn.Module):
    """p -> f(x, y), y placed by p, at one fixed context. `weights` overrides the energy's own; `record` keeps that many
    points."""

    def __init__(
        self,
        energy: nn.Module,
        context: tuple[Tensor, ...],
        bounds: tuple[Tensor, ...],
        mu: float,
        weights: dict[str, Tensor] | None = None,
        record: int = 0,
    ) -> None:
        super().__init__()
        self.energy = energy
        self.context = context
        self.bounds = bounds
        self.mu = mu
        self.weights = weights
        self.record = record
        self.points: list[Point] = []

    def forward(self, p: Tensor) -> Tensor:
        energy = cast(Any, self.energy)
        y = place(p, self.bounds, self.mu)
        f = energy.value(self.context, y) if has_context(self.energy) else energy(*self.context, y)
        if f.shape != y.shape[:1]:
            expected = f"one number per row, shape {[y.shape[0]]}"
            raise refused("energy", expected, list(f.shape), "sum or squeeze its output to [batch]")
        return cast(Tensor, f)

    def at(self, y: Tensor, create_graph: bool) -> Point:
        """f and ∇_y f at y, under a graph that reaches the context and the weights."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            if self.weights is None:
                f = self(y)
            else:
                named = {f"energy.{name}": weight for name, weight in self.weights.items()}
                f = torch.func.functional_call(self, named, (y,))
            if not f.requires_grad:
                came = "an output that autograd does not follow"
                raise refused(
                    "energy", "one differentiable in y", came, "remove detach() and no_grad() from its forward"
                )
            (g,) = torch.autograd.grad(f.sum(), y, create_graph=create_graph, materialize_grads=True)
        return Point(y, f, g)

    def value_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        record = len(self.points) < self.record
        point = self.at(y, create_graph=record)
        if record:
            self.points.append(point)
        return point.f.detach(), point.g.detach()


def hvp(point: Point, s: Tensor) -> Tensor:
    """∇²f(y) s; zero where ∇f does not depend on y, as for a piecewise-linear f."""
    if not point.g.requires_grad:
        return torch.zeros_like(s)
    (h,) = torch.autograd.grad(point.g, point.y, s.to(point.g.dtype), retain_graph=True, materialize_grads=True)
    return h


def pulled_back(cuts: Iterable[tuple[Point, Tensor | None, Tensor]], wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Σ_i ∇[ē_i f(x, y_i) + S_i' ∇_y f(x, y_i)] with respect to `wanted`, of (point, ē_i [B], S_i [B, n]); None for an
    ē of zeros. Zeros for what f does not depend on."""
    outputs, seeds = [], []
    for (_, f, g), offset_bar, seed in cuts:
        if offset_bar is not None:
            outputs.append(f)
            seeds.append(offset_bar.to(f.dtype))
        if g.requires_grad:
            outputs.append(g)
            seeds.append(seed.to(g.dtype))
    if not outputs or not wanted:
        return tuple(torch.zeros_like(w) for w in wanted)
    # The graph stays: whether backward may be called again is decided by who holds it.
    return torch.autograd.grad(outputs, wanted, seeds, retain_graph=True, materialize_grads=True)


class OnceDifferentiable(torch.autograd.Function):
    """The identity, with an error for a derivative.

    torch's own once_differentiable lets a second derivative pass, wrong, when ȳ itself needs no gradient.
    """

    @staticmethod
    def forward(ctx: Any, layer: str, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.layer = layer
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.layer} can be differentiated once, got a request for a second derivative: take the penalty or "
            "Hessian of something else, or detach its gradient."
        )
