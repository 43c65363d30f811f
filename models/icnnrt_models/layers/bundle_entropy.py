"""The bundle entropy method on tensors: the statements of `icnnrt.mathematics` by the native kernels, or in torch.

The problem and the method stand in `icnnrt.mathematics.bundle` and `cut_model`, the adjoints in `recursive_adjoint`,
`kkt_adjoint` and `implicit_adjoint`, the domains in `domains`; `domain` is UNIT_BOX where not given. All but the energy
is float64: the model of k cuts is small next to one evaluation of the energy, and its duality gap, max(v) − λ'v, is a
difference of nearly equal numbers. Nothing here is recorded by autograd.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from icnnrt.mathematics import bundle, cut_model
from icnnrt.mathematics import implicit_adjoint as adjoint_of_argmin
from icnnrt.mathematics import kkt_adjoint as adjoint_of_model
from icnnrt.mathematics.bundle import Trajectory as ArgminResult
from icnnrt.mathematics.cut_model import STEPS, InnerSolution
from icnnrt.mathematics.domains import UNIT_BOX, Domain
from icnnrt.mathematics.recursive_adjoint import CutCotangents, recursive_adjoint
from icnnrt_models.layers.kernels import eager_on_cpu, kernel, run_on
from icnnrt_models.layers.namespace import TORCH


def role(domain: Domain) -> str:
    """What the operators of a domain are called in `icnnrt.serving.operators`, less "_solve" and "_adjoint"."""
    return "bundle_" + domain.operators.removeprefix("Bundle").lower()


@torch.no_grad()
def bundle_entropy_solve(
    G: Float[Tensor, "batch k n"],
    e: Float[Tensor, "batch k"],
    lam_start: Float[Tensor, "batch k_prev"] | None = None,
    steps: int = STEPS,
    domain: Domain = UNIT_BOX,
) -> InnerSolution:
    """Solve the k-cut model, `icnnrt.mathematics.cut_model.solve`; all float64.

    By the native kernel where `icnnrt_models.layers.kernels` says so, else in torch.
    """
    native = steps == STEPS and G.dtype == torch.float64 and eager_on_cpu(G, e)
    if native and (found := kernel(f"{role(domain)}_solve", "float64")):
        return InnerSolution(*run_on(found, (G, e, e[:, :0] if lam_start is None else lam_start)))
    return cut_model.solved(TORCH, domain, G, e, lam_start, steps)


def rounded(solution: InnerSolution, like: Tensor) -> InnerSolution:
    """A solution with y in another dtype, and what rounding took from it as its stationarity; NaN where y is."""
    y = solution.y.to(like.dtype)
    rounding = (y.double() - solution.y).abs().amax(1, keepdim=True)
    return solution._replace(y=y, residual=torch.cat([rounding, solution.residual[:, 1:]], dim=1))


def in_double(value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]]) -> bundle.ValueAndGradient:
    """f [B, 1] and ∇f in float64, as cuts are kept."""

    def found(y: Tensor) -> tuple[Tensor, Tensor]:
        f, g = value_and_gradient(y)
        return f.double()[:, None], g.double()

    return found


@torch.no_grad()
def bundle_entropy_argmin(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    y_init: Float[Tensor, "batch n"],
    iterations: int,
    steps: int = STEPS,
    domain: Domain = UNIT_BOX,
) -> ArgminResult:
    """K cuts of the bundle entropy method from y_init, whose dtype the energy has: `icnnrt.mathematics.bundle.argmin`.

    `value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n])`.
    """

    def solve(G: Tensor, e: Tensor, lam: Tensor) -> InnerSolution:
        return rounded(bundle_entropy_solve(G, e, lam.double(), steps, domain), y_init)

    return bundle.argmin(TORCH, domain, in_double(value_and_gradient), y_init, iterations, solve)


@torch.no_grad()
def kkt_adjoint(
    G: Float[Tensor, "batch k n"],
    e: Float[Tensor, "batch k"],
    lam: Float[Tensor, "batch k"],
    y_bar: Float[Tensor, "batch n"],
    domain: Domain = UNIT_BOX,
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch k"]]:
    """Proposition 3, `icnnrt.mathematics.kkt_adjoint`: c_y and c_λ for a loss with ∂ℓ/∂y = ȳ; all float64.

    By the native kernel where `icnnrt_models.layers.kernels` says so, else in torch.
    """
    native = G.dtype == torch.float64 and eager_on_cpu(G, e, lam, y_bar)
    if native and (found := kernel(f"{role(domain)}_adjoint", "float64")):
        c_y, c_λ = run_on(found, (G, e, lam, y_bar))
        return c_y, c_λ
    return adjoint_of_model.adjoint(TORCH, domain, G, e, lam, y_bar)


@torch.no_grad()
def argmin_adjoint(
    trajectory: ArgminResult,
    y_bar: Float[Tensor, "batch n"],
    hvp: Callable[[int, Tensor], Tensor] | None,
    depth: int | None = None,
    domain: Domain = UNIT_BOX,
) -> CutCotangents:
    """Cotangents of the cuts of a K-step solution for ȳ: `icnnrt.mathematics.recursive_adjoint`."""

    def kkt(G: Tensor, e: Tensor, lam: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        return kkt_adjoint(G, e, lam, y_bar, domain)

    def product(k: int, s: Tensor) -> Tensor:
        assert hvp is not None, "hvp is needed beyond depth 1"
        return hvp(k, s).double()

    trajectory = trajectory._replace(y=trajectory.y.double(), cut_points=trajectory.cut_points.double())
    return recursive_adjoint(TORCH, trajectory, y_bar.double(), product, depth or trajectory.lam.shape[1], kkt)


@torch.no_grad()
def implicit_adjoint(
    trajectory: ArgminResult,
    y_bar: Float[Tensor, "batch n"],
    hvp: Callable[[Tensor], Tensor],
    tolerance: float,
    domain: Domain = UNIT_BOX,
) -> Float[Tensor, "batch n"]:
    """`icnnrt.mathematics.implicit_adjoint` at the answer of a trajectory: c_y, float64; hvp(p [B, n]) -> ∇²f(y*) p."""
    lam = trajectory.lam_history[:, -1, None]
    # s is finite where y is NaN because f(y_i) was; 0·y hands the NaN on.
    s = -(lam @ domain.plain(TORCH, trajectory.slopes))[:, 0] + 0.0 * trajectory.y.double()
    return adjoint_of_argmin.implicit_adjoint(TORCH, domain, s, y_bar, hvp, tolerance)
