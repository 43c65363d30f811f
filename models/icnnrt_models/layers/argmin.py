"""y* = argmin_y f(x, y) + R(y) as a torch layer, differentiable in x, in the weights of f and in the bounds of y."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icnnrt.arguments import choice, integer, number, refused
from icnnrt.mathematics.bundle import Trajectory as ArgminResult
from icnnrt.mathematics.cut_model import STEPS
from icnnrt.mathematics.domains import MODELS, NAMES, Domain
from icnnrt_models.layers.bundle_entropy import argmin_adjoint, bundle_entropy_argmin, implicit_adjoint
from icnnrt_models.layers.domain_arguments import placed
from icnnrt_models.layers.energy_at import (
    EnergyAt,
    OnceDifferentiable,
    Point,
    context_of,
    differentiated,
    hvp,
    place,
    plain,
    pulled_back,
    y_dim_of,
    y_like,
)

Adjoint = Literal["exact", "prop3", "implicit"]
DomainName = Literal["unit_box", "box", "simplex", "space"]

# Relative residual of the conjugate gradients of adjoint="implicit": what Hessian-vector products of that dtype allow.
CG_TOLERANCE = {torch.float64: 1e-12}
CG_TOLERANCE_DEFAULT = 1e-6


class BundleEntropyArgmin(nn.Module):
    """The K-step bundle entropy argmin of an energy convex in y, as a layer.

    Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4), one per row of x:

        y* = argmin over y in [0,1]^n of  f(x, y; θ) − H(y),      H(y) = −Σ y log y + (1−y) log(1−y)

    With `domain` y ranges over something else, with another regulariser R in the place of −H:

        "box"       l <= y <= u, given with every call: forward(x, lower=l, upper=u); R(y) = −H((y − l)/(u − l))
        "simplex"   y >= 0, 1'y = 1; R(y) = Σ y log y
        "space"     R^n; R(y) = (μ/2) ‖y‖²

    Bounds are numbers or tensors that broadcast to [batch, n], in the dtype of y, and have gradients. u = l fixes a
    variable; a sample with any l > u has y = NaN.

    `forward(x, y_init=None) -> y` [batch, n], in the dtype of the energy's weights, float32 or float64; y_init, ½
    where not given (the middle of a box, 1/n in the simplex, 0 in R^n), lies in the domain and counts as a constant; in
    a box it is (y_init − l)/(u − l) that does. The solver itself, its certificates and the linear
    algebra of the gradient are float64 always. A sample whose energy is NaN or infinite has y = NaN and leaves the
    other rows of y, and of x's gradient, untouched; the gradient of the weights, a sum over the batch, is NaN then:
    it is never silently the gradient of fewer samples.

    `solve(x, y_init=None) -> ArgminResult`: the same y with its certificates; nothing is recorded for autograd. Of a
    box, and of μ other than 1, everything but y is told in p: y = l + (u − l)∘p, or p/√μ.

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
        domain: "unit_box", "box", "simplex" or "space", see above.
        mu: μ > 0 of the domain "space".

    Raises:
        InputError: a ValueError, whose sentence has the argument, what was expected, what came, and the remedy.
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
        domain: DomainName = "unit_box",
        mu: float = 1.0,
    ) -> None:
        super().__init__()
        iterations = integer(iterations, "iterations", 1, remedy="give the number of cuts K")
        remedy = f"give the most interior-point steps of an inner solve, {STEPS} is usual"
        steps = integer(steps, "steps", 1, remedy=remedy)
        remedy = (
            "choose 'exact' unless the energy is piecewise linear ('prop3' is cheaper) or smooth and solved to "
            "convergence ('implicit')"
        )
        choice(adjoint, "adjoint", get_args(Adjoint), remedy)
        choice(domain, "domain", NAMES, "choose 'box' for bounds of your own, 'space' for y without bounds")
        mu = number(mu, "mu", above=0.0, remedy="it is the curvature of (mu/2) ‖y‖²")
        if mu != 1.0 and MODELS[domain].family != "quadratic":
            remedy = "only 'space' has a quadratic regulariser"
            raise refused("mu", f"1 in the domain {domain!r}", mu, remedy)
        check_tolerance("gap_tolerance", gap_tolerance)
        if residual_tolerance is not None:
            check_tolerance("residual_tolerance", residual_tolerance)
        self.energy = energy
        self.y_dim = y_dim_of(energy, y_dim)
        self.iterations = iterations
        self.steps = steps
        self.adjoint: Adjoint = adjoint
        self.gap_tolerance = gap_tolerance
        self.residual_tolerance = residual_tolerance
        self.domain: DomainName = domain
        self.mu = mu

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        y_init: Float[Tensor, "batch n"] | None = None,
        *,
        lower: Tensor | float | None = None,
        upper: Tensor | float | None = None,
    ) -> Float[Tensor, "batch n"]:
        """y, the K-step argmin for each row of x."""
        p_init, bounds = self._placed(x, y_init, lower, upper)
        context = context_of(self.energy, x)
        weights = differentiated(self.energy)
        inputs = (*context, *bounds, *weights.values())
        p = cast(Tensor, _Argmin.apply(self, tuple(weights), len(context), len(bounds), p_init, *inputs))
        return place(p, bounds, self.mu)

    @torch.no_grad()
    def solve(
        self,
        x: Float[Tensor, "batch ..."],
        y_init: Float[Tensor, "batch n"] | None = None,
        *,
        lower: Tensor | float | None = None,
        upper: Tensor | float | None = None,
    ) -> ArgminResult:
        """The y of `forward` with its certificates and all cuts, without gradient."""
        p_init, bounds = self._placed(x, y_init, lower, upper)
        bounds = tuple(plain(b) for b in bounds)
        energy = EnergyAt(self.energy, tuple(plain(c) for c in context_of(self.energy, x)), bounds, self.mu)
        result = self._solve(energy, p_init)
        return result._replace(y=place(result.y, bounds, self.mu))

    def extra_repr(self) -> str:
        tolerance = "" if self.residual_tolerance is None else f", residual_tolerance={self.residual_tolerance}"
        domain = "" if self.domain == "unit_box" else f", domain={self.domain!r}"
        if self.domain == "space":
            domain += f", mu={self.mu}"
        return (
            f"y_dim={self.y_dim}, iterations={self.iterations}, steps={self.steps}, adjoint={self.adjoint!r}, "
            f"gap_tolerance={self.gap_tolerance}{tolerance}{domain}"
        )

    def _placed(self, x: Tensor, y_init: Any, lower: Any, upper: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Where the solver starts, and the bounds of a box."""
        like = y_like(self.energy, x, self.y_dim)
        return placed(MODELS[self.domain], self.mu, like, y_init, lower, upper)[:2]

    def _solve(self, energy: EnergyAt, p_init: Tensor) -> ArgminResult:
        with torch.inference_mode(False):
            domain = MODELS[self.domain]
            return bundle_entropy_argmin(energy.value_and_gradient, plain(p_init), self.iterations, self.steps, domain)


def check_tolerance(name: str, tolerance: float) -> None:
    """Refuse a tolerance that is not a finite number > 0."""
    number(tolerance, name, above=0.0, remedy="1e-3 suits a gap in float32")


class _Argmin(torch.autograd.Function):
    """The solve, and its adjoint with respect to the context and the weights.

    The graphs of f and ∇_y f at the cut points are kept from the solve, not rebuilt in backward. That saves K
    evaluations, and rebuilding would be wrong: the cut points of a ReLU network soon lie on kinks to the last bit, and
    a recomputation whose sums run in another order finds other pieces there than the cuts were made of (measured: 1 %
    of the gradient).
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: BundleEntropyArgmin,
        names: tuple[str, ...],
        n_context: int,
        n_bounds: int,
        p_init: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        needed = ctx.needs_input_grad[5:]
        n_given = n_context + n_bounds
        # Fresh leaves: a context tensor's own history holds the x path, which ordinary autograd runs later.
        given = tuple(plain(c).requires_grad_(need) for c, need in zip(inputs, needed[:n_given], strict=False))
        context, bounds = given[:n_context], given[n_context:]
        weights = inputs[n_given:]
        overrides: dict[str, Tensor] | None = None
        if not all(p.is_leaf for p in weights):
            # Inside functional_call weights may depend on one another: cut that here too.
            weights = tuple(p.detach().requires_grad_() for p in weights)
            overrides = dict(zip(names, weights, strict=True))
        recorded = any(needed)
        implicit = layer.adjoint == "implicit"
        record = layer.iterations if recorded and not implicit else 0
        energy = EnergyAt(layer.energy, context, bounds, layer.mu, overrides, record)
        result = layer._solve(energy, p_init)
        if recorded:
            points = [energy.at(result.y, create_graph=True)] if implicit else energy.points
            ctx.adjoint, ctx.domain, ctx.needed = layer.adjoint, MODELS[layer.domain], needed
            # Saved this way, not as attributes, they are freed with the rest of the graph.
            flat = [tensor for point in points for tensor in point]
            ctx.save_for_backward(*result, *given, *weights, *flat)
        return result.y

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needed
        saved = iter(ctx.saved_tensors)
        result = ArgminResult(*islice(saved, len(ArgminResult._fields)))
        wanted = [t for t, need in zip(islice(saved, len(needed)), needed, strict=True) if need]
        points = [Point(*point) for point in zip(saved, saved, saved, strict=True)]
        with torch.no_grad():
            found = _pull_back(ctx.adjoint, ctx.domain, result, points, y_bar, wanted)
        if torch.is_grad_enabled():  # create_graph=True
            found = OnceDifferentiable.apply("BundleEntropyArgmin", torch.zeros((), requires_grad=True), *found)
        gradients = iter(found)
        return None, None, None, None, None, *(next(gradients) if need else None for need in needed)


def _pull_back(
    adjoint: Adjoint,
    domain: Domain,
    result: ArgminResult,
    points: list[Point],
    y_bar: Tensor,
    wanted: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Σ_i ∇[ē_i f(x, y_i) + seed_i' ∇_y f(x, y_i)] with respect to `wanted`; zeros for what f does not depend on."""
    if adjoint == "implicit":
        tolerance = CG_TOLERANCE.get(result.y.dtype, CG_TOLERANCE_DEFAULT)
        seed = implicit_adjoint(result, y_bar, lambda s: hvp(points[0], s), tolerance, domain)[:, None]
        offset_bar = None
    else:
        depth = 1 if adjoint == "prop3" else None
        offset_bar, seed = argmin_adjoint(result, y_bar, lambda i, s: hvp(points[i], s), depth, domain)
    offsets = [None] * len(points) if offset_bar is None else offset_bar.unbind(1)
    return pulled_back(zip(points, offsets, seed.unbind(1), strict=True), wanted)
