"""Bregman proximal gradient as a torch layer: y* = argmin_y f(x, y) + R(y) for smooth energies."""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icnnrt.arguments import choice, integer, number
from icnnrt.mathematics.bregman import EDGE, EDGE_FLOAT32, argmin
from icnnrt.mathematics.bundle import Trajectory
from icnnrt.mathematics.domains import MODELS, NAMES
from icnnrt_models.layers.argmin import check_tolerance
from icnnrt_models.layers.domain_arguments import placed
from icnnrt_models.layers.energy_at import has_context, y_dim_of, y_like
from icnnrt_models.layers.namespace import TORCH


class BregmanResult(NamedTuple):
    """y with its certificate; energy, lower_bound and gap are float64."""

    y: Float[Tensor, "batch n"]
    energy: Float[Tensor, " batch"]
    lower_bound: Float[Tensor, " batch"]
    gap: Float[Tensor, " batch"]


class BregmanProximalGradient(nn.Module):
    """K steps of Bregman proximal gradient on an energy smooth and convex in y, as a layer.

        s <- (s − τ ∇_y f(x, y))/(1 + τ),   y = y(s)

    `icnnrt.mathematics.bregman` states the method, `icnnrt.mathematics.domains` the domains, R and y(s). It solves no
    model of cuts, so a step is cheaper than one of the bundle method; for energies with kinks (ReLU) it does not
    converge: use `BundleEntropyArgmin` there.

    `forward(x, y_init=None, lower=None, upper=None) -> y` [batch, n]. It is differentiated by autograd through all K
    steps, which keeps K graphs of the energy; y_init, the domain's centre where not given, lies in the domain. lower
    and upper [batch, n] are the bounds of y for domain "box", and for no other.

    `solve`, of the same arguments, gives a `BregmanResult`: y with its duality gap.

    Args:
        energy: a module with forward(x, y) -> [batch], convex in y, twice differentiable.
        iterations: steps K.
        step_size: τ > 0. Too long a step swings, too short a one creeps: 1 suits energies as curved as R, and the
            inverse of their ratio others.
        gap_tolerance, domain, mu, y_dim: as of `BundleEntropyArgmin`.

    Raises:
        InputError: a ValueError, whose sentence has the argument, what was expected, what came, and the remedy.
    """

    steps = 1  # what a package says of a solver without inner steps
    residual_tolerance = None

    def __init__(
        self,
        energy: nn.Module,
        iterations: int = 20,
        step_size: float = 1.0,
        gap_tolerance: float = 1e-3,
        *,
        domain: str = "unit_box",
        mu: float = 1.0,
        y_dim: int | None = None,
    ) -> None:
        super().__init__()
        iterations = integer(iterations, "iterations", 1, remedy="give the number of steps K")
        check_tolerance("gap_tolerance", gap_tolerance)
        choice(domain, "domain", NAMES)
        self.energy = energy
        self.y_dim = y_dim_of(energy, y_dim)
        self.iterations = iterations
        self.step_size = number(step_size, "step_size", above=0.0, remedy="1.0 is usual")
        self.gap_tolerance = gap_tolerance
        self.domain, self.model = domain, MODELS[domain]
        self.mu = number(mu, "mu", above=0.0, remedy="1.0 is usual")

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        y_init: Float[Tensor, "batch n"] | None = None,
        lower: Float[Tensor, "batch n"] | None = None,
        upper: Float[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch n"]:
        """y after K steps, for each row of x."""
        return self._run(x, y_init, lower, upper)[0]

    @torch.no_grad()
    def solve(
        self,
        x: Float[Tensor, "batch ..."],
        y_init: Float[Tensor, "batch n"] | None = None,
        lower: Float[Tensor, "batch n"] | None = None,
        upper: Float[Tensor, "batch n"] | None = None,
    ) -> BregmanResult:
        """The y of `forward` with its certificate, without gradient."""
        y, found = self._run(x, y_init, lower, upper)
        return BregmanResult(y, found.energy, found.lower_bound, found.gap)

    def extra_repr(self) -> str:
        return (
            f"y_dim={self.y_dim}, iterations={self.iterations}, step_size={self.step_size}, domain={self.domain!r}, "
            f"gap_tolerance={self.gap_tolerance}"
        )

    # --- How -------------------------------------------------------------------------------------

    def _run(
        self, x: Tensor, y_init: Tensor | None, lower: Tensor | None, upper: Tensor | None
    ) -> tuple[Tensor, Trajectory]:
        """y, and the trajectory of its p."""
        like = y_like(self.energy, x, self.y_dim)
        mu = self.mu if self.model.family == "quadratic" else 1.0
        p, _, at = placed(self.model, mu, like, y_init, lower, upper)
        energy = cast(Any, self.energy)
        context = energy.context(x) if has_context(self.energy) else None
        recorded, calls = torch.is_grad_enabled(), 0

        def value_and_gradient(p: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            recorded_here = recorded and calls < self.iterations  # the last one is the certificate's
            calls += 1
            y = at.y(p)
            with torch.enable_grad():
                y = y if recorded_here and y.requires_grad else y.detach().requires_grad_()
                f = energy(x, y) if context is None else energy.value(context, y)
                (g,) = torch.autograd.grad(f.sum(), y, create_graph=recorded_here, materialize_grads=True)
            return f[:, None], at.scaled(g)

        edge = EDGE_FLOAT32 if like.dtype == torch.float32 else EDGE
        found = argmin(TORCH, self.model, value_and_gradient, p, self.iterations, self.step_size, edge)
        return at.y(found.y), found
