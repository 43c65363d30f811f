"""The operator of quadratic programs as TorchScript's own code, for a user's trace: libtorch then runs it alone."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from icnnrt_models.layers.qp_script import Solution, numbers, qp_script, wide

__all__ = ["qp_trace"]


@functools.cache
def qp_trace() -> Any:
    """(*Data, steps, skip, demand, use, tolerance) -> Solution, differentiable by autograd.

    The answer is held fixed, and one Newton step from it, which is 0, is recorded with a fixed matrix: its derivative
    is that of the KKT conditions, so it is the adjoint, once. skip: samples without an answer add 0 to gradients, not
    NaN. demand: fail where a sample has none. use: what is INACCURATE is differentiated too.
    """
    solve, adjoint = qp_script()
    pointed_at, moved = _pointed_at, _moved

    # TorchScript knows no arguments by a star.
    # fmt: off
    def layer(
        Q: Tensor, p: Tensor, G: Tensor, h_lower: Tensor, h: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor,
        steps: int, skip: bool, demand: bool, use: bool, numbers32: list[float], numbers64: list[float],
    ) -> Solution:
        # Fixed by detach, not by no_grad alone: TorchScript's optimiser takes Q.mT in there for the one outside, which
        # then has no derivative.
        with torch.no_grad():
            found = solve(
                Q.detach(), p.detach(), G.detach(), h_lower.detach(), h.detach(), A.detach(), b.detach(),
                lower.detach(), upper.detach(), p.detach()[:, :0], numbers32, numbers64, steps,
            )
        # fmt: on
        if demand:
            assert bool((found.status == 0).all()), "on_unsafe: a quadratic program has no solution that could be found"
        z, lam, nu, mu = found.z, found.lam, found.nu, found.mu
        if torch.is_grad_enabled():
            of = wide(Q, p, G, h_lower, h, A, b, lower, upper, p[:, :0])
            kept = (found.status <= (1 if use else 0)).unsqueeze(1)
            with torch.no_grad():
                eye = torch.eye(z.size(1), dtype=z.dtype, device=z.device)
                fixed_Q = torch.where(kept.unsqueeze(2), of.Q.detach(), eye)
                fixed_G = torch.where(kept.unsqueeze(2), of.G.detach(), 0.0)
                fixed_A = torch.where(kept.unsqueeze(2), of.A.detach(), 0.0)
                z, lam = torch.where(kept, z, 0.0), torch.where(kept, lam, 0.0)
                nu, mu = torch.where(kept, nu, 0.0), torch.where(kept, mu, 0.0)
            column = z.unsqueeze(2)
            r_z = 0.5 * torch.matmul(of.Q + of.Q.mT, column) + torch.matmul(of.G.mT, lam.unsqueeze(2))
            r_z = (r_z + torch.matmul(of.A.mT, nu.unsqueeze(2))).squeeze(2) + of.p
            t = torch.matmul(of.G, column).squeeze(2) - pointed_at(found.lam, of.h_lower, of.h)
            t_box = z - pointed_at(found.mu, of.lower, of.upper)
            r_nu = torch.matmul(of.A, column).squeeze(2) - of.b
            if skip:
                r_z, t = torch.where(kept, r_z, 0.0), torch.where(kept, t, 0.0)
                r_nu, t_box = torch.where(kept, r_nu, 0.0), torch.where(kept, t_box, 0.0)
            d_z, d_lam, d_nu, d_mu, _share, _weak = adjoint(
                fixed_Q, fixed_G, fixed_A, found.lam, found.mu, found.slack, found.box_slack, r_z, t, r_nu, t_box
            )
            z, lam = moved(found.z, d_z, kept, skip), moved(found.lam, d_lam, kept, skip)
            nu, mu = moved(found.nu, d_nu, kept, skip), moved(found.mu, d_mu, kept, skip)
        return Solution(
            z.to(p.dtype),
            lam.to(p.dtype),
            nu.to(p.dtype),
            mu.to(p.dtype),
            found.slack.to(p.dtype),
            found.box_slack.to(p.dtype),
            found.residual,
            found.status,
            found.ray.to(p.dtype),
            found.steps,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(layer)
    return lambda *arguments: scripted(*arguments[:-1], *numbers(arguments[-1]))


def _pointed_at(multiplier: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The bound that a multiplier points at; of one that is not known both, so that neither has a gradient then."""
    both = torch.where(torch.isfinite(lower), lower, 0.0) + torch.where(torch.isfinite(upper), upper, 0.0)
    known = torch.where(multiplier < 0, lower, torch.where(torch.isfinite(upper), upper, 0.0))
    return torch.where(torch.isnan(multiplier), both, known)


def _moved(value: Tensor, d: Tensor, kept: Tensor, skip: bool) -> Tensor:
    """value with the derivative of d; where not kept with that of 0 or, unless `skip`, of NaN."""
    still = d - d.detach()
    if not skip:
        # √0 has the derivative ∞, and ∞·0 is NaN.
        poison = torch.where(kept, 1.0, 0.0 * still).sqrt()
        return value + torch.where(kept, still, poison)
    return value + torch.where(kept, still, 0.0)
