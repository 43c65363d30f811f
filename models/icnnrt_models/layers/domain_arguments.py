"""Where y may lie and where a solver starts, as users give it to a layer: bounds of a box, a first point.

`like` is an empty y [batch, n], which has the dtype and the device. What is refused is so by an `InputError`.
"""

from typing import Any

import torch
from torch import Tensor

from icnnrt.arguments import instance, refused, shown
from icnnrt.mathematics.domains import Coordinates, Domain, box_coordinates, check_bounds, space_coordinates
from icnnrt_models.layers.namespace import TORCH


def placed(
    domain: Domain, mu: float, like: Tensor, y_init: Any, lower: Any, upper: Any
) -> tuple[Tensor, tuple[Tensor, ...], Coordinates]:
    """The p to start from, lower and upper [batch, n] of a box or nothing, and the coordinates of p.

    p is the centre of the domain where y_init is None, and has no history. lower is NaN in samples that have no y.
    """
    bounds: tuple[Tensor, ...] = ()
    at = space_coordinates(mu)
    if check_bounds(domain, lower, upper):
        l, u = (_bound(name, value, like) for name, value in (("lower", lower), ("upper", upper)))  # noqa: E741
        bounds = torch.where((l > u).any(1, keepdim=True), torch.nan, l), u
        at = box_coordinates(*bounds, xp=TORCH)
    centre = domain.centre(like.shape[1])
    if y_init is None:
        return torch.full_like(like, centre), bounds, at
    instance(y_init, "y_init", Tensor, "a tensor", "give one, or leave it out")
    if y_init.shape != like.shape:
        remedy = "give one row for each row of x, or leave it out"
        raise refused("y_init", f"a tensor of shape {list(like.shape)}", shown(y_init), remedy)
    _check_dtype("y_init", y_init, like)
    arrays = (bound.numpy(force=True) for bound in bounds)
    domain.check_start(y_init.numpy(force=True), dict(zip(domain.bounds, arrays, strict=True)))
    return TORCH.clip(at.p(y_init, TORCH).detach().nan_to_num(centre), *domain.edges), bounds, at


def _bound(name: str, value: Any, like: Tensor) -> Tensor:
    bound = value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)
    _check_dtype(name, bound, like)
    try:
        bound = bound.expand(like.shape)
    except RuntimeError:
        remedy = "give one row for each row of x, one row for all, or one number"
        raise refused(name, f"what broadcasts to shape {list(like.shape)}", shown(bound), remedy) from None
    if not torch.isfinite(bound).all():
        raise refused(name, "finite numbers", "infinity or NaN", "give a large finite bound, or use domain='space'")
    return bound


def _check_dtype(name: str, given: Tensor, like: Tensor) -> None:
    if given.dtype != like.dtype:
        raise refused(name, f"{like.dtype}, as the energy is", given.dtype, f"convert it with .to({like.dtype})")
