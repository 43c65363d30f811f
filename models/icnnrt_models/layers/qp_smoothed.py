"""The smoothed gradient of quadratic programs as an operator of torch, which torch.compile keeps as it is."""

from typing import Any, cast

import torch
from torch import Tensor

from icnnrt.mathematics.qp_smoothing import smoothed
from icnnrt_models.layers.namespace import TORCH
from icnnrt_models.layers.qp_tensors import filled, owned

__all__ = ["qp_smoothed"]

Tensors = tuple[Tensor, ...]


@torch.library.custom_op("icnnrt::qp_smoothed", mutates_args=())
def qp_smoothed(
    Q: Tensor,
    p: Tensor,
    G: Tensor,
    h_lower: Tensor,
    h: Tensor,
    A: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    z: Tensor,
    lam: Tensor,
    nu: Tensor,
    mu: Tensor,
    z_bar: Tensor,
    lam_bar: Tensor,
    nu_bar: Tensor,
    mu_bar: Tensor,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`icnnrt.mathematics.qp_smoothing.smoothed`, on any device with float64; a cotangent without columns is zero.

    Data are [B, ...] or [1, ...], bounds without columns where there is none; an answer that is NaN has none here.
    """
    answer = z, lam, nu, mu
    bounds = filled(h_lower, lam, -torch.inf), filled(h, lam, torch.inf), filled(lower, z, -torch.inf)
    data = Q, p, G, *bounds[:2], A, b, bounds[2], filled(upper, z, torch.inf)
    wide = [a.expand(len(z), *a.shape[1:]).double() for a in data]
    bars = [
        torch.zeros_like(a) if bar.shape[1] == 0 else bar
        for a, bar in zip(answer, (z_bar, lam_bar, nu_bar, mu_bar), strict=True)
    ]
    with torch.no_grad():
        found = smoothed(TORCH, wide, [a.double() for a in answer], [a.double() for a in bars], smoothing)
    rows = (owned(a, torch.float64 if name == "share" else z.dtype) for name, a in found._asdict().items())
    return cast(Any, tuple(rows))


@qp_smoothed.register_fake
def _shapes(*arguments: Any) -> Tensors:
    z, lam, nu, mu = arguments[9:13]
    rows = (torch.empty_like(a) for a in (z, lam, nu, mu, z, lam, nu, mu))
    return (*rows, z.new_empty((z.shape[0],), dtype=torch.float64), torch.empty_like(lam), torch.empty_like(z))
