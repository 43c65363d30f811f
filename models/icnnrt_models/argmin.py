"""y* = argmin_y f(x, y) − H(y) as a torch layer, differentiable in x and in the weights of the energy f."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icnnrt.reference import STEPS
from icnnrt_models.bundle_entropy import ArgminResult, argmin_adjoint, bundle_entropy_argmin, implicit_adjoint
from icnnrt_models.energy import check_size

__all__ = ["Adjoint", "ArgminResult", "BundleEntropyArgmin"]

Adjoint = Literal["exact", "prop3", "implicit"]

# Relative residual of the conjugate gradients of adjoint="implicit": what Hessian-vector products of that dtype allow.
CG_TOLERANCE = {torch.float64: 1e-12}
CG_TOLERANCE_DEFAULT = 1e-6


class BundleEntropyArgmin(nn.Module):
    """The K-step bundle entropy argmin of an energy convex in y, as a layer.

    Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4), one per row of x:

        y* = argmin over y in [0,1]^n of  f(x, y; θ) − H(y),      H(y) = −Σ y log y + (1−y) log(1−y)

    `forward(x, y_init=None) -> y` [batch, n], in the dtype of the energy's weights, float32 or float64; y_init, ½
    where not given, lies in [0, 1]^n and counts as a constant. The solver itself, its certificates and the linear
    algebra of the gradient are float64 always. A sample whose energy is NaN or infinite has y = NaN and leaves the
    other rows of y, and of x's gradient, untouched; the gradient of the weights, a sum over the batch, is NaN then:
    it is never silently the gradient of fewer samples.

    `solve(x, y_init=None) -> ArgminResult`: the same y with its certificates; nothing is recorded for autograd.

    An energy with `context` and `value` (`ContextEnergy`) has its x path computed once, by ordinary autograd, so batch
    norm on it counts a batch once. Of any other energy, forward(x, y) is called once for each cut and once more.

    Which adjoint is right (measured; relative error against finite differences of the K-step algorithm):

    - "exact", the default: recursion through all K cut points; 1e-10 to 5e-8 for every f, converged or not. Costs
      K small linear solves and K − 1 Hessian-vector products more than "prop3".
    - "prop3", proposition 3 of the paper: holds the cut points fixed. The same as "exact" for piecewise-linear f (ReLU
      networks), and cheaper; 2 % to 240 % wrong for smooth f, however long the solver runs.
    - "implicit", the implicit function theorem at y*: right for smooth f (softplus networks) run to convergence, and
      independent of how y* was found; blind to kinks, 80 % wrong for ReLU networks.

    Args:
        energy: a module with forward(x, y) -> [batch], convex in y, that autograd can differentiate.
        iterations: cuts K. ReLU networks need 20 to 40 for a gap of 1e-3 when strong or large, softplus ones 6 to 15.
        steps: the most interior-point steps of each inner solve; 9 are usual, slopes of 1e3 may need 60.
        adjoint: "exact", "prop3" or "implicit", see above.
        gap_tolerance: the duality gap up to which an answer counts as solved once exported; the layer itself always
            runs K iterations and reports the gap.
        residual_tolerance: the same for the KKT residual; None leaves it to the exporter, by dtype.
        y_dim: n, needed only for an energy without an attribute `y_dim`.

    Raises:
        ValueError: a sentence with the argument, what was expected, what came, and the remedy.
    """

    def __init__(
        self,
        energy: nn.Module,
        iterations: int = 10,
        steps: int = STEPS,
        adjoint: Adjoint = "exact",
        gap_tolerance: float = 1e-3,
        residual_tolerance: float | None = None,
        *,
        y_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_size("iterations", iterations, 1, "give the number of cuts K")
        check_size("steps", steps, 1, f"give the most interior-point steps of an inner solve, {STEPS} is usual")
        if adjoint not in get_args(Adjoint):
            raise ValueError(
                f"adjoint must be 'exact', 'prop3' or 'implicit', got {adjoint!r}: choose 'exact' unless the energy is "
                "piecewise linear ('prop3' is cheaper) or smooth and solved to convergence ('implicit')."
            )
        check_tolerance("gap_tolerance", gap_tolerance)
        if residual_tolerance is not None:
            check_tolerance("residual_tolerance", residual_tolerance)
        if y_dim is None:
            y_dim = getattr(energy, "y_dim", None)
            if y_dim is None:
                raise ValueError(
                    f"y_dim must be given, got None: {type(energy).__name__} has no attribute y_dim to take it from, "
                    "so pass y_dim=, the number of columns of y."
                )
        check_size("y_dim", y_dim, 1, "give the number of columns of y")
        self.energy = energy
        self.y_dim = y_dim
        self.iterations = iterations
        self.steps = steps
        self.adjoint: Adjoint = adjoint
        self.gap_tolerance = gap_tolerance
        self.residual_tolerance = residual_tolerance

    def forward(
        self, x: Float[Tensor, "batch ..."], y_init: Float[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch n"]:
        """y, the K-step argmin for each row of x."""
        y_init = self._start(x, y_init)
        context = self._context(x)
        weights = {}
        if torch.is_grad_enabled():
            # Frozen weights stay out, and so cost nothing.
            weights = {name: p for name, p in self.energy.named_parameters() if p.requires_grad}
        inputs = (*context, *weights.values())
        return cast(Tensor, _Argmin.apply(self, tuple(weights), len(context), y_init, *inputs))

    @torch.no_grad()
    def solve(self, x: Float[Tensor, "batch ..."], y_init: Float[Tensor, "batch n"] | None = None) -> ArgminResult:
        """The y of `forward` with its certificates and all cuts, without gradient."""
        energy = _EnergyAt(self.energy, tuple(_plain(c) for c in self._context(x)))
        return self._solve(energy, self._start(x, y_init))

    def extra_repr(self) -> str:
        tolerance = "" if self.residual_tolerance is None else f", residual_tolerance={self.residual_tolerance}"
        return (
            f"y_dim={self.y_dim}, iterations={self.iterations}, steps={self.steps}, adjoint={self.adjoint!r}, "
            f"gap_tolerance={self.gap_tolerance}{tolerance}"
        )

    def _context(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `_value` needs of x."""
        if _has_context(self.energy):
            return tuple(cast(Any, self.energy).context(x))
        return (x,)

    def _start(self, x: Tensor, y_init: Tensor | None) -> Tensor:
        """y_init or ½, [batch, n] in the energy's dtype."""
        floats = (p for p in (*self.energy.parameters(), *self.energy.buffers(), x) if p.is_floating_point())
        like = next(floats, x)
        shape = (x.shape[0], self.y_dim)
        if y_init is None:
            return torch.full(shape, 0.5, dtype=like.dtype, device=x.device)
        if y_init.shape != shape:
            raise ValueError(
                f"y_init must have shape {list(shape)}, got {list(y_init.shape)}: give one row of {self.y_dim} numbers "
                "for each row of x, or leave it out to start from 0.5."
            )
        if y_init.dtype != like.dtype:
            raise ValueError(
                f"y_init must have the dtype of the energy, {like.dtype}, got {y_init.dtype}: "
                f"convert it with .to({like.dtype})."
            )
        outside = ~((y_init >= 0) & (y_init <= 1))
        if outside.any():
            raise ValueError(
                f"y_init must lie in [0, 1], got {y_init[outside][0].item()!r}: clamp it with .clamp(0, 1), or leave "
                "it out to start from 0.5."
            )
        return y_init.detach()

    def _solve(self, energy: "_EnergyAt", y_init: Tensor) -> ArgminResult:
        with torch.inference_mode(False):
            return bundle_entropy_argmin(energy.value_and_gradient, _plain(y_init), self.iterations, self.steps)


def check_tolerance(name: str, tolerance: float) -> None:
    """Refuse a tolerance that is not a finite number > 0."""
    if not (isinstance(tolerance, (int, float)) and math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {tolerance!r}: 1e-3 suits a gap in float32.")


def _has_context(energy: nn.Module) -> bool:
    return callable(getattr(energy, "context", None)) and callable(getattr(energy, "value", None))


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without its history, usable by autograd even if it was made under inference_mode."""
    if tensor.is_inference():
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor.detach()


class _Point(NamedTuple):
    """The energy at one y per sample, still attached to its graph: y is a leaf of it."""

    y: Tensor  # [B, n]
    f: Tensor  # [B]
    g: Tensor  # [B, n], ∇_y f


class _EnergyAt(nn.Module):
    """y -> f(x, y) at one fixed context. `weights` overrides the energy's own; `record` keeps that many points."""

    def __init__(
        self,
        energy: nn.Module,
        context: tuple[Tensor, ...],
        weights: dict[str, Tensor] | None = None,
        record: int = 0,
    ) -> None:
        super().__init__()
        self.energy = energy
        self.context = context
        self.weights = weights
        self.record = record
        self.points: list[_Point] = []

    def forward(self, y: Tensor) -> Tensor:
        energy = cast(Any, self.energy)
        f = energy.value(self.context, y) if _has_context(self.energy) else energy(*self.context, y)
        if f.shape != y.shape[:1]:
            raise ValueError(
                f"energy must return one number per row, shape {[y.shape[0]]}, got {list(f.shape)}: "
                "sum or squeeze its output to [batch]."
            )
        return cast(Tensor, f)

    def at(self, y: Tensor, create_graph: bool) -> _Point:
        """f and ∇_y f at y, under a graph that reaches the context and the weights."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            if self.weights is None:
                f = self(y)
            else:
                named = {f"energy.{name}": weight for name, weight in self.weights.items()}
                f = torch.func.functional_call(self, named, (y,))
            if not f.requires_grad:
                raise ValueError(
                    "energy must be differentiable in y, got an output that autograd does not follow: remove "
                    "detach() and no_grad() from its forward."
                )
            (g,) = torch.autograd.grad(f.sum(), y, create_graph=create_graph, materialize_grads=True)
        return _Point(y, f, g)

    def value_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        record = len(self.points) < self.record
        point = self.at(y, create_graph=record)
        if record:
            self.points.append(point)
        return point.f.detach(), point.g.detach()


def _hvp(point: _Point, s: Tensor) -> Tensor:
    """∇²f(y) s; zero where ∇f does not depend on y, as for a piecewise-linear f."""
    if not point.g.requires_grad:
        return torch.zeros_like(s)
    (h,) = torch.autograd.grad(point.g, point.y, s.to(point.g.dtype), retain_graph=True, materialize_grads=True)
    return h


class _Argmin(torch.autograd.Function):
    """The solve, and its adjoint with respect to the context and the weights.

    The graphs of f and ∇_y f at the cut points are kept from the solve, not rebuilt in backward. That saves K
    evaluations, and rebuilding would be wrong: the cut points of a ReLU network soon lie on kinks to the last bit, and
    a recomputation whose sums run in another order finds other pieces there than the cuts were made of (measured: 1 %
    of the gradient).
    """

    @staticmethod
    def forward(
        ctx: Any, layer: BundleEntropyArgmin, names: tuple[str, ...], n_context: int, y_init: Tensor, *inputs: Tensor
    ) -> Tensor:
        needed = ctx.needs_input_grad[4:]
        # Fresh leaves: a context tensor's own history holds the x path, which ordinary autograd runs later.
        context = tuple(_plain(c).requires_grad_(need) for c, need in zip(inputs, needed[:n_context], strict=False))
        weights = inputs[n_context:]
        overrides: dict[str, Tensor] | None = None
        if not all(p.is_leaf for p in weights):
            # Inside functional_call weights may depend on one another: cut that here too.
            weights = tuple(p.detach().requires_grad_() for p in weights)
            overrides = dict(zip(names, weights, strict=True))
        recorded = any(needed)
        implicit = layer.adjoint == "implicit"
        energy = _EnergyAt(layer.energy, context, overrides, layer.iterations if recorded and not implicit else 0)
        result = layer._solve(energy, y_init)
        if recorded:
            points = [energy.at(result.y, create_graph=True)] if implicit else energy.points
            ctx.adjoint, ctx.needed = layer.adjoint, needed
            # Saved this way, not as attributes, they are freed with the rest of the graph.
            flat = [tensor for point in points for tensor in point]
            ctx.save_for_backward(*result, *context, *weights, *flat)
        return result.y

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needed
        saved = iter(ctx.saved_tensors)
        result = ArgminResult(*islice(saved, len(ArgminResult._fields)))
        wanted = [t for t, need in zip(islice(saved, len(needed)), needed, strict=True) if need]
        points = [_Point(*point) for point in zip(saved, saved, saved, strict=True)]
        with torch.no_grad():
            found = _pull_back(ctx.adjoint, result, points, y_bar, wanted)
        if torch.is_grad_enabled():  # create_graph=True
            found = _OnceDifferentiable.apply(torch.zeros((), requires_grad=True), *found)
        gradients = iter(found)
        return None, None, None, None, *(next(gradients) if need else None for need in needed)


def _pull_back(
    adjoint: Adjoint, result: ArgminResult, points: list[_Point], y_bar: Tensor, wanted: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Σ_i ∇[ē_i f(x, y_i) + seed_i' ∇_y f(x, y_i)] with respect to `wanted`; zeros for what f does not depend on."""
    if adjoint == "implicit":
        tolerance = CG_TOLERANCE.get(result.y.dtype, CG_TOLERANCE_DEFAULT)
        seed = implicit_adjoint(result, y_bar, lambda s: _hvp(points[0], s), tolerance)[:, None]
        offset_bar = None
    else:
        depth = 1 if adjoint == "prop3" else None
        offset_bar, seed = argmin_adjoint(result, y_bar, lambda i, s: _hvp(points[i], s), depth)
    outputs, seeds = [], []
    for i, (_, f, g) in enumerate(points):
        if offset_bar is not None:
            outputs.append(f)
            seeds.append(offset_bar[:, i].to(f.dtype))
        if g.requires_grad:
            outputs.append(g)
            seeds.append(seed[:, i].to(g.dtype))
    if not outputs:
        return tuple(torch.zeros_like(w) for w in wanted)
    # The graph stays: whether backward may be called again is decided by who holds it.
    return torch.autograd.grad(outputs, wanted, seeds, retain_graph=True, materialize_grads=True)


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, with an error for a derivative.

    torch's own once_differentiable lets a second derivative pass, wrong, when ȳ itself needs no gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "BundleEntropyArgmin can be differentiated once, got a request for a second derivative: take the penalty "
            "or Hessian of something else, or detach its gradient."
        )
